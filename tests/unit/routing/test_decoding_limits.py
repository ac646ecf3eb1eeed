"""Budgets of decoded routes, fixed prefixes, and what every decision chose from."""

from __future__ import annotations

import pytest
import torch

from datamodules import RoutingDataModule
from modules.routing.assurance import Metered
from modules.routing.decoding import Choice, decisions, decode
from modules.routing.solver import Decoding, RoutingSolver, SolverSettings


def _made(problem: str, size: int = 8, **options):
    data = RoutingDataModule(problem, size=size, problem_options=options, oracle="exact")
    torch.manual_seed(3)
    solver = RoutingSolver(data.problem.spec, SolverSettings(dim=16, heads=2, layers=1, hidden=32)).eval()
    batch = data.fresh_instances([f"uniform/{size}"], 6, 4, references=False)[f"uniform/{size}"]
    return data.problem, solver, batch


DECODINGS = {
    "starts": Decoding(),
    "copies": Decoding(augment=True),
    "samples": Decoding(starts=False, samples=20),
    "samples from starts": Decoding(samples=3),
    "beam": Decoding(starts=False, beam=6),
}


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
@pytest.mark.parametrize(("problem", "options"), [("tsp", {}), ("cvrp", {"capacity": 12})])
def test_a_budget_bounds_what_is_decoded(problem, options, decoding):
    rules, solver, batch = _made(problem, **options)
    costs = []
    for budget in (1, 3, 11, 0):
        metered = Metered(rules, len(batch), torch.device("cpu"))
        bounded = Decoding(**{**vars(decoding), "budget": budget})
        routes, cost = solver.solve(metered, batch, bounded)  # type: ignore[arg-type]
        rules.check(batch, routes.unsqueeze(1))
        assert (metered.routes <= (budget or 64)).all()
        assert (metered.decisions <= metered.routes * rules.max_steps(batch["locs"].shape[1])).all()
        costs.append(cost)
        if budget == 11 and decoding.augment:
            assert (metered.routes == 11).all()  # 8 starts of the first copy, 3 of the second
    if not decoding.beam:  # a wider beam may lose what a narrower one keeps
        for less, more in zip(costs, costs[1:], strict=False):
            assert (more <= less + 1e-6).all()
    assert torch.equal(costs[-1], solver.solve(rules, batch, decoding)[1])
    with pytest.raises(ValueError, match="budget must be >= 0"):
        Decoding(budget=-1)


@pytest.mark.parametrize(("problem", "options"), [("tsp", {}), ("cvrp", {"capacity": 12}), ("op", {"limit": 2.0})])
def test_a_prefix_is_kept_and_completed(problem, options):
    rules, solver, batch = _made(problem, **options)
    greedy, cost = solver.solve(rules, batch, Decoding(starts=False))
    for steps in (1, 3):
        routes, again = solver.complete(rules, batch, greedy[:, :steps])
        width = max(routes.shape[1], greedy.shape[1])
        padded = [torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in (routes, greedy)]
        assert torch.equal(*padded)  # greedy decoding goes on as it began
        assert torch.equal(again, cost)
    other = rules.starts(batch)[:, 4:5]
    if problem != "op":
        routes, sampled = solver.complete(rules, batch, other, samples=16, seed=1)
        assert torch.equal(routes[:, :1], other)
        rules.check(batch, routes.unsqueeze(1))
        one = solver.complete(rules, batch, other, samples=1, seed=1)[1]
        assert (sampled <= one).all()


def test_a_prefix_that_breaks_the_rules_is_refused():
    rules, solver, batch = _made("tsp")
    for prefix, message in (
        (torch.tensor([[1, 2, 1]] * 6), "instance 0, step 2: node 1 is not allowed there"),
        (torch.zeros(6, 0, dtype=torch.int64), r"must be int64 \[6, steps\] with a step at least"),
        (torch.zeros(5, 1, dtype=torch.int64), r"must be int64 \[6, steps\]"),
        (torch.full((6, 1), 8), r"nodes in \[0, 8\)"),
        (torch.zeros(6, 9, dtype=torch.int64), "at most 8 nodes"),
    ):
        with pytest.raises(ValueError, match=message):
            solver.complete(rules, batch, prefix)


@pytest.mark.parametrize(("problem", "options"), [("tsp", {}), ("cvrp", {"capacity": 12})])
@pytest.mark.parametrize("starts", [False, True])
def test_decisions_are_those_of_decoding(problem, options, starts):
    rules, solver, batch = _made(problem, **options)
    with torch.no_grad():
        tables = solver.tables(rules, batch)
        forced = rules.starts(batch).unsqueeze(-1) if starts else None
        rollouts = 8 if starts else 1
        routes, likelihood = decode(rules, batch, tables, rollouts, Choice(forced))
        found, probability, allowed, here = decisions(rules, batch, tables, forced, rollouts)
    assert torch.equal(found, routes)
    assert torch.allclose(probability.sum(-1), torch.ones(()))
    assert float(probability[~allowed].max()) == 0.0
    chosen = probability.gather(-1, routes.unsqueeze(-1)).squeeze(-1).log()
    assert torch.allclose(chosen[..., int(starts) :].sum(-1), likelihood, atol=1e-5)
    before = torch.nn.functional.pad(routes[..., :-1], (1, 0), value=-1 if problem == "tsp" else 0)
    assert torch.equal(here, before)
