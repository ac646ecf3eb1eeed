"""Probes of routing solvers: degenerate agents, hand-computed figures, determinism."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from datamodules import RoutingDataModule
from modules.assurance.probe import Block, block_seed
from modules.assurance.probes import all_probes, routing
from modules.assurance.subject import AssuranceError, Subject, state_digest
from modules.assurance.suites import SuiteSettings, run_suite
from modules.baselines import POMO
from modules.routing.assurance import assurance_subject
from modules.routing.solver import SolverSettings, exact_cost

PROBES = ("instance_kinds", "gap_closed", "symmetries", "route_decisions", "decoding_budget", "fixed_prefix")
SETTINGS = SuiteSettings("custom", PROBES, n0=25, n_max=25)
SETS = {"uniform": {"sizes": [5, 8], "count": 4}, "mixture_file": {"sizes": [8], "count": 4}}


def _subject(problem: str = "tsp", size: int = 8, sets: dict | None = None, **options) -> Subject:
    data = RoutingDataModule(
        problem, size=size, eval_sets=SETS if sets is None else sets, oracle="exact", problem_options=options
    )
    module = POMO(SolverSettings(dim=16, heads=2, layers=1, hidden=32))
    module.build(data.problem.spec)
    return assurance_subject(module, data, module.training_sources() if module._trainer else [])


@pytest.fixture(scope="module")
def subject() -> Subject:
    return _subject()


@pytest.fixture(scope="module")
def result(subject):
    return run_suite(subject, SETTINGS)


def _with(subject: Subject, **capabilities) -> Subject:
    return replace(subject, capabilities={**subject.capabilities, **capabilities})


def _value(subject: Subject, name: str, *probes: str) -> float:
    found = run_suite(subject, replace(SETTINGS, probes=probes)).figure(name)
    assert found.value is not None, found.reason
    return found.value


def _block(probe: str, **changed) -> Block:
    return replace(Block(0, 0, 25, "fresh", block_seed(7, 0, probe, "fresh", 0)), **changed)


# -- agents whose figures are known --
def _random_routes(subject: Subject):
    return lambda batch, seed: subject["solution_prefix"](batch, 1.0, seed)


def test_the_reference_itself_has_no_gap_and_closes_it_whole(subject):
    best = _with(
        subject,
        solve_instances=lambda batch, seed: batch["reference_route"],
        sampled_solutions=lambda batch, seed, count: batch["reference_route"].unsqueeze(1),
    )
    found = run_suite(best, replace(SETTINGS, probes=("instance_kinds", "gap_closed")))
    for name, value in {"r.gap_ood": 0.0, "r.gap_slope": 0.0, "e.spread": 0.0, "c.feasible": 1.0}.items():
        assert found.figure(name).value == pytest.approx(value, abs=1e-9), name
    assert found.figure("u.gap_closed").value == pytest.approx(1.0)
    assert found.figure("r.gap_ood").baselines["reference: exact"] == 0.0
    assert found.figure("r.gap_ood").baselines["nearest neighbour"] > 5.0


def test_the_nearest_neighbour_closes_nothing_and_random_routes_less(subject):
    near = _with(subject, solve_instances=lambda batch, seed: subject["simple_solutions"](batch))
    assert _value(near, "u.gap_closed", "gap_closed") == pytest.approx(0.0, abs=1e-12)
    random = _with(subject, solve_instances=_random_routes(subject))
    found = run_suite(random, replace(SETTINGS, probes=("instance_kinds", "gap_closed")))
    assert found.figure("u.gap_closed").value < -1
    assert found.figure("r.gap_ood").value > 30
    assert found.figure("r.gap_slope").value > 5  # random routes grow with n, optimal ones with its root
    assert found.figure("c.feasible").value == 1.0


def test_doing_nothing_fails_all_that_counts(subject):
    def nothing(batch, seed):
        return torch.zeros(batch["locs"].shape[:2], dtype=torch.int64)

    idle = _with(subject, solve_instances=nothing)
    found = run_suite(idle, replace(SETTINGS, probes=("instance_kinds", "gap_closed")))
    assert found.figure("c.feasible").value == 0.0
    assert found.figure("r.gap_ood").value == pytest.approx(routing.INFEASIBLE)
    assert found.figure("u.gap_closed").value < -10


def test_one_wrong_sample_among_many_is_seen(subject):
    """The route decoded may be right and the policy's mask wrong."""

    def sampled(batch, seed, count):
        routes = subject["sampled_solutions"](batch, seed, count).clone()
        routes[0, -1, 0] = routes[0, -1, 1]
        return routes

    assert _value(_with(subject, sampled_solutions=sampled), "c.feasible", "instance_kinds") == 24 / 25


def test_budgets_and_prefixes_that_are_ignored_are_counted(subject, result):
    assert result.figure("c.time").conditions == {"1 route": 1.0, "4 routes": 1.0, "16 routes": 1.0}
    assert set(result.figure("c.warm").conditions.values()) == {1.0}
    greedy = _with(subject, solve_within=lambda batch, budget: subject["solve_within"](batch, 0))
    assert run_suite(greedy, replace(SETTINGS, probes=("decoding_budget",))).figure("c.time").conditions == {
        "1 route": 0.0, "4 routes": 0.0, "16 routes": 1.0,  # of 8 starts
    }  # fmt: skip
    deaf = _with(subject, complete_solution=lambda batch, prefix: subject["solve_instances"](batch, 0))
    assert _value(deaf, "c.warm", "fixed_prefix") < 0.1
    short = _with(subject, complete_solution=lambda batch, prefix: prefix[:, :1])
    assert _value(short, "c.warm", "fixed_prefix") == 0.0


def test_a_solver_that_looks_at_places_changes_when_they_turn_and_not_when_they_are_renamed(result):
    found = result.figure("r.perm")
    assert found.conditions["customers permuted"] < 0.2  # ties of float32 aside
    assert found.conditions["turned by 90 degrees"] > 0.5
    assert found.value == max(found.conditions.values())


def test_symmetric_copies_have_the_costs_of_their_instances():
    subject = _subject("cvrp", 6, {"uniform": {"sizes": [6], "count": 4}}, capacity=12)
    batch = subject["draw_instances"](["uniform/6"], 3, 5, references=False)["uniform/6"]
    copies = subject["symmetric_copies"](batch, 1)
    for name in ("turned by 90 degrees", "mirrored"):
        routes = subject["solve_instances"](batch, 0)
        assert torch.allclose(subject["solution_costs"](copies[name], routes), subject["solution_costs"](batch, routes))
        assert not torch.allclose(copies[name]["locs"], batch["locs"])
    permuted = copies["customers permuted"]
    assert torch.equal(permuted["locs"][:, 0], batch["locs"][:, 0])  # the depot stays
    pairs = [torch.cat([one["locs"][:, 1:], one["demand"].unsqueeze(-1)], -1).tolist() for one in (batch, permuted)]
    assert [sorted(each) for each in pairs[0]] == [sorted(each) for each in pairs[1]]
    assert pairs[0] != pairs[1]


# -- hand-computed --
def test_the_worst_of_twenty_against_the_mean():
    values = np.zeros((10, 2))
    values[3, 1] = 20.0
    assert routing.worst_excess(values) == pytest.approx(20.0 - 1.0)  # 5 % of 20 values is one
    assert routing.worst_excess(np.stack([values, values + 3])).tolist() == pytest.approx([19.0, 19.0])


def test_slope_of_a_line_in_size():
    gaps = {"a/10": np.array([1.0]), "a/20": np.array([3.0]), "b/20": np.array([5.0]), "b/40": np.array([8.0])}
    slope = np.polyfit([10, 20, 20, 40], [1.0, 3.0, 5.0, 8.0], 1)[0]
    assert routing._slopes(gaps) == pytest.approx([10 * slope])
    assert "one size" in routing._slopes({"a/10": np.ones(2), "b/10": np.ones(2)})
    assert "one size" in routing._slopes({"a": np.ones(2), "b/10": np.ones(2)})


def test_entropy_of_decisions():
    allowed = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)[None, None]
    uniform = allowed / allowed.sum(-1, keepdim=True)
    assert routing.decision_entropy(uniform, allowed).tolist() == pytest.approx([1.0])
    certain = torch.nn.functional.one_hot(torch.tensor([[[1, 0, 0]]]), 4).float()
    assert routing.decision_entropy(certain, allowed).tolist() == [0.0]
    mixed = torch.tensor([[[[0.5, 0.5, 0, 0], [1.0, 0, 0, 0], [1.0, 0, 0, 0]]]])
    assert routing.decision_entropy(mixed, allowed).tolist() == pytest.approx([math.log(2) / math.log(4) / 2])
    assert routing.decision_entropy(certain[:, :, 2:], allowed[:, :, 2:]).isnan().all()


def test_area_of_edges():
    heat = torch.zeros(4, 4)
    heat[0, 1], heat[1, 2], heat[2, 3], heat[0, 3], heat[0, 2] = 0.9, 0.8, 0.7, 0.1, 0.75
    edges = torch.zeros(4, 4, dtype=torch.bool)
    for i, j in ((0, 1), (1, 2), (2, 3), (0, 3)):
        edges[i, j] = edges[j, i] = True
    # used 0.9 0.8 0.7 0.1 against unused 0.75 and 0 (1-3): 2 + 2 + 1 + 1 of 8 pairs
    assert routing.edge_area((heat + heat.T)[None], edges[None]).tolist() == [6 / 8]
    assert routing.edge_area(torch.zeros(1, 4, 4), edges[None]).tolist() == [0.5]
    assert np.isnan(routing.edge_area(torch.zeros(1, 3, 3), ~torch.eye(3, dtype=torch.bool)[None])).all()
    # a certain policy that takes the reference's edges ranks all of them first
    here = torch.tensor([[[-1, 0, 1, 2, 3]]])
    sure = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 2, 3, 0]]]), 4).float()
    assert routing.edge_area(routing.edge_heat(sure, here), edges[None]).tolist() == [1.0]


def test_an_untrained_policy_ranks_edges_badly_and_decides_by_chance(result):
    assert 0.4 < result.figure("i.edge").value < 0.8
    assert result.figure("i.attn_entropy").value > 0.5


def test_equity_of_vehicles():
    subject = _subject("cvrp", 6, {"uniform": {"sizes": [6], "count": 4}}, capacity=12)
    batch = subject["draw_instances"](["uniform/6"], 3, 5, references=False)["uniform/6"]
    routes = subject["solve_instances"](batch, 0)
    lengths = subject["vehicle_lengths"](batch, routes)
    assert [float(one.sum()) for one in lengths] == pytest.approx(subject["solution_costs"](batch, routes).tolist())
    trips = [sum(1 for a, b in zip([0, *row], [*row, 0], strict=True) if a == 0 != b) for row in routes.tolist()]
    assert [len(one) for one in lengths] == trips
    equal, single = (
        _with(subject, vehicle_lengths=lambda *_, given=given: [torch.tensor(given)] * 25)
        for given in ([2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0])
    )
    assert _value(equal, "e.equity", "vehicle_equity") == 0.0
    assert _value(single, "e.equity", "vehicle_equity") == pytest.approx(0.75)
    with pytest.raises(AssuranceError, match="no probe of suite"):
        run_suite(_subject(), SuiteSettings("custom", ("vehicle_equity",), n0=25))


# -- purity --
def test_values_are_functions_of_the_block_and_the_model_stays(subject):
    before = state_digest(subject.model)
    for name in PROBES:
        probe = all_probes()[name]
        first, again = (probe.run(subject, _block(name)) for _ in range(2))
        torch.rand(3)
        other = probe.run(subject, _block(name, seed=5))
        assert first.keys() == again.keys() == {measure.name for measure in probe.measures}
        for figure, values in first.items():
            np.testing.assert_equal(values, again[figure], err_msg=figure)
        assert str(first) != str(other) or name in ("decoding_budget", "fixed_prefix")  # all ones
    assert state_digest(subject.model) == before


def test_rollback_depends_on_the_solver(subject):
    found = run_suite(subject, SuiteSettings("custom", ("rollback", "card"), n0=2))
    assert found.figure("c.rollback").value == 1.0
    assert found.figure("i.card").value == pytest.approx(6 / 7)  # no data named here


def test_free_references_leave_gaps_undefined_with_a_reason(subject):
    free = _with(subject, reference_costs=lambda batch: torch.zeros(len(batch)))
    found = run_suite(free, replace(SETTINGS, probes=("instance_kinds",)))
    assert found.figure("r.gap_ood").status == "undefined"
    assert "reference cost 0" in found.figure("r.gap_ood").reason
    assert found.figure("c.feasible").value == 1.0


def test_data_that_draw_nothing_are_refused():
    data = RoutingDataModule("tsp", size=8)
    module = POMO(SolverSettings(dim=16, heads=2, layers=1, hidden=32))
    module.build(data.problem.spec)
    with pytest.raises(AssuranceError, match="eval_sets is empty"):
        assurance_subject(module, data, [])
    with pytest.raises(AssuranceError, match="which str cannot"):
        assurance_subject(module, "files", [])


def test_reference_edges_are_the_routes(subject):
    batch = subject["draw_instances"](["uniform/8"], 3, 4)["uniform/8"]
    edges = subject["reference_edges"](batch)
    assert (edges.sum(-1) == 2).all()
    route = batch["reference_route"]
    assert torch.allclose(exact_cost(subject["solve_instances"].__self__.problem, batch, route.unsqueeze(1))[:, 0],
                          batch["reference"])  # fmt: skip
    length = (batch["locs"].double().unsqueeze(1) - batch["locs"].double().unsqueeze(2)).norm(dim=-1)
    assert torch.allclose((length * edges).sum((1, 2)) / 2, batch["reference"])
    depot = _subject("cvrp", 6, {"uniform": {"sizes": [6], "count": 4}}, capacity=12)
    batch = depot["draw_instances"](["uniform/6"], 3, 4)["uniform/6"]
    path = pad(batch["reference_route"], (1, 1))
    edges = depot["reference_edges"](batch)
    assert all(edges[i, a, b] for i in range(4) for a, b in zip(path[i].tolist(), path[i].tolist()[1:], strict=False))
