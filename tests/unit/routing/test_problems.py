"""Rules of the routing problems: what masks allow, what complete routes are refused for, instances, the registry."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from datamodules.routing.problem import rule_for_size
from datamodules.routing.problems import PROBLEMS, make_problem
from modules.contracts import RoutingProblem

OPTIONS = {"cvrp": {"capacity": 10}, "sdvrp": {"capacity": 10}, "pctsp": {"tour_length": 2.0},
           "spctsp": {"tour_length": 2.0}, "op": {"limit": 1.5}, "tsp": {}}  # fmt: skip


def draw(name, count=6, size=20, seed=0, dtype=torch.float32, **options):
    problem = make_problem(name, **(options or OPTIONS[name]))
    generator = torch.Generator().manual_seed(seed)
    locs = torch.rand(count, problem.nodes(size), 2, generator=generator).to(dtype)
    return problem, problem.generate(locs, generator)


def roll(problem, instances, rollouts, seed=0, extra=0):
    """Uniformly random allowed routes; ``extra`` steps beyond the end."""
    generator = torch.Generator().manual_seed(seed)
    state, actions = problem.begin(instances, rollouts), []
    nodes = instances["locs"].shape[1]
    for _ in range(problem.max_steps(nodes)):
        if actions and problem.finished(state).all():
            break
        assert state["allowed"].any(-1).all()
        action = torch.multinomial(state["allowed"].flatten(0, 1).float(), 1, generator=generator)
        actions.append(action.view(state["allowed"].shape[:2]))
        problem.step(state, actions[-1])
        assert torch.equal(state["current"], actions[-1])
    assert problem.finished(state).all()
    for _ in range(extra):
        if problem.spec.depot:
            allowed = state["allowed"]
            assert allowed[..., 0].all()
            assert not allowed[..., 1:].any()
            actions.append(torch.zeros_like(actions[-1]))
            problem.step(state, actions[-1])
            assert problem.finished(state).all()
    return torch.stack(actions, -1)


def fields(problem, name, **values):
    """One instance from plain lists."""
    made = {key: torch.tensor([value]) for key, value in values.items()}
    return TensorDict(made, [1])


@pytest.mark.parametrize("name", PROBLEMS)
@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 12), rollouts=st.integers(1, 5), seed=st.integers(0, 2**31), data=st.data())
def test_every_allowed_route_passes_check(name, size, rollouts, seed, data):
    options = dict(OPTIONS[name])
    if name == "op":
        options["limit"] = data.draw(st.floats(0.05, 4))
    problem, instances = draw(name, count=3, size=size, seed=seed, **options)
    if data.draw(st.booleans()):
        side = data.draw(st.floats(0.5, 1000))
        instances["original"] = instances["locs"].double() * side
        instances["rounded"] = torch.tensor([True, False, True])
        if name == "op":
            instances["limit"] = instances["limit"] * side + 1
    if "capacity" in instances and data.draw(st.booleans()):
        del instances["capacity"]
    problem.check_instances(instances)
    routes = roll(problem, instances, rollouts, seed, extra=2)
    problem.check(instances, routes)
    assert routes.shape[-1] <= problem.max_steps(problem.nodes(size)) + 2
    cost = problem.cost(instances, routes)
    assert cost.isfinite().all()
    assert cost.dtype == (torch.float64 if "original" in instances else torch.float32)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_keeps_the_contract(name):
    problem, instances = draw(name)
    assert isinstance(problem, RoutingProblem)
    assert problem.spec.name == name
    problem.check_instances(instances)
    assert problem.customer_features(instances).shape == (6, 20, problem.spec.customer_features)
    before = {key: value.clone() for key, value in instances.items()}
    state = problem.begin(instances, 3)
    for value in state.values():
        assert value.shape[:2] == (6, 3)
    context = problem.context(state)
    if problem.spec.context_features:
        assert context is not None
        assert context.shape == (6, 3, problem.spec.context_features)
    else:
        assert context is None
    starts = problem.starts(instances)
    assert starts.shape == (6, 20)
    assert starts.dtype == torch.int64
    assert problem.begin(instances, 20)["allowed"].gather(-1, starts.unsqueeze(-1)).all()
    roll(problem, instances, 3)
    for key, value in instances.items():
        assert torch.equal(value, before[key]), f"a rollout changed {key} of the instances"


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "tsp"])
def test_waiting_at_the_depot_costs_nothing(name):
    problem, instances = draw(name, dtype=torch.float64)
    routes = roll(problem, instances, 4)
    waiting = torch.nn.functional.pad(routes, (0, 5))
    problem.check(instances, waiting)
    torch.testing.assert_close(problem.cost(instances, waiting), problem.cost(instances, routes))


@pytest.mark.parametrize("name", PROBLEMS)
def test_masks_do_not_depend_on_the_batch(name):
    problem, instances = draw(name)
    routes = roll(problem, instances, 4)
    together, alone = problem.begin(instances, 4), problem.begin(instances[2:3], 1)
    for action in routes.unbind(-1):
        assert torch.equal(together["allowed"][2:3, 1:2], alone["allowed"])
        problem.step(together, action)
        problem.step(alone, action[2:3, 1:2])
    assert torch.equal(problem.finished(together)[2:3, 1:2], problem.finished(alone))


@pytest.mark.parametrize("name", PROBLEMS)
def test_states_can_be_reordered_between_rollouts(name):
    """Beam search gathers every entry along the rollouts: a state must go on from there as from its own path."""
    problem, instances = draw(name)
    routes = roll(problem, instances, 4)
    parent = torch.tensor([3, 3, 0, 1]).expand(6, -1)
    moved = routes.gather(1, parent.unsqueeze(-1).expand(-1, -1, routes.shape[-1]))
    half = routes.shape[-1] // 2
    state, own = problem.begin(instances, 4), problem.begin(instances, 4)
    for number in range(routes.shape[-1]):
        if number == half:
            state = {
                key: value.gather(
                    1, parent.view(*parent.shape, *[1] * (value.ndim - 2)).expand(-1, -1, *value.shape[2:])
                )
                for key, value in state.items()
            }
        problem.step(state, (moved if number >= half else routes)[..., number])
        problem.step(own, moved[..., number])
        if number >= half:
            assert torch.equal(state["allowed"], own["allowed"])


# -- masks, by hand ---------------------------------------------------------------------------------------------------
LINE = [[0.0, 0.0], [0.1, 0.0], [0.2, 0.0], [0.3, 0.0]]


def allowed_after(problem, instances, actions):
    state = problem.begin(instances, 1)
    for action in actions:
        problem.step(state, torch.tensor([[action]]))
    return state["allowed"][0, 0].nonzero().flatten().tolist(), state


def test_cvrp_masks():
    problem = make_problem("cvrp")
    one = fields(problem, "cvrp", locs=LINE, demand=[0.6, 0.3, 0.2])
    assert allowed_after(problem, one, [])[0] == [1, 2, 3]
    nodes, state = allowed_after(problem, one, [1])
    assert nodes == [0, 2, 3]
    torch.testing.assert_close(problem.context(state), torch.tensor([[[0.4]]]))
    assert allowed_after(problem, one, [1, 2])[0] == [0]  # 0.1 left, 0.2 asked
    nodes, state = allowed_after(problem, one, [1, 2, 0])
    assert nodes == [3]
    assert float(problem.context(state)) == 1.0
    assert not problem.finished(state).any()
    nodes, state = allowed_after(problem, one, [1, 2, 0, 3])
    assert nodes == [0]
    assert problem.finished(state).all()


def test_shares_that_add_up_to_the_capacity_fit():
    """Three float32 tenths and seven: the sum may come out above 1."""
    problem = make_problem("cvrp")
    locs = torch.rand(1, 11, 2)
    for count, whole in ((10, 1), (7, 1), (3, 3)):
        share = whole / (count * whole)
        one = TensorDict({"locs": locs[:, : count + 1], "demand": torch.full((1, count), share)}, [1])
        state = problem.begin(one, 1)
        for customer in range(1, count + 1):
            assert state["allowed"][0, 0, customer]
            problem.step(state, torch.tensor([[customer]]))
        problem.check(one, torch.arange(1, count + 1).view(1, 1, -1))


def test_large_whole_demands_are_exact():
    """One unit in 200 000 is less than the tolerance of shares, and still one too many."""
    problem = make_problem("cvrp")
    capacity = 200_000
    demand = torch.tensor([[100_000.0, 100_000.0, 100_001.0]]) / capacity
    one = TensorDict({"locs": torch.tensor([LINE]), "demand": demand, "capacity": torch.tensor([capacity])}, [1])
    problem.check_instances(one)
    nodes, state = allowed_after(problem, one, [1])
    assert nodes == [0, 2]
    assert float(problem.context(state)) == 0.5  # a share, though units are counted
    problem.check(one, torch.tensor([[[1, 2, 0, 3]]]))
    with pytest.raises(ValueError, match="capacity"):
        problem.check(one, torch.tensor([[[1, 3, 0, 2]]]))


def test_sdvrp_masks():
    problem = make_problem("sdvrp")
    one = fields(problem, "sdvrp", locs=LINE, demand=[0.6, 0.6, 0.8])
    assert allowed_after(problem, one, [])[0] == [1, 2, 3]
    assert allowed_after(problem, one, [1])[0] == [0, 2, 3]  # 0.4 left: both may have a part
    nodes, state = allowed_after(problem, one, [1, 2])
    assert nodes == [0]
    assert float(problem.context(state)) == 0.0
    assert allowed_after(problem, one, [1, 2, 0])[0] == [2, 3]
    assert allowed_after(problem, one, [1, 2, 0, 2])[0] == [0, 3]
    nodes, state = allowed_after(problem, one, [1, 2, 0, 2, 3])
    assert nodes == [0]  # 0.2 + 0.8: all served
    assert problem.finished(state).all()
    problem.check(one, torch.tensor([[[1, 2, 0, 2, 3, 0]]]))


@pytest.mark.parametrize("name", ["pctsp", "spctsp"])
def test_pctsp_masks_follow_real_prizes(name):
    problem = make_problem(name)
    one = fields(problem, name, locs=LINE, prize=[0.5, 0.5, 0.5], real_prize=[0.4, 0.6, 0.5], penalty=[0.1, 0.2, 0.3])
    assert allowed_after(problem, one, [])[0] == [1, 2, 3]
    nodes, state = allowed_after(problem, one, [1])
    assert nodes == [2, 3]
    torch.testing.assert_close(problem.context(state), torch.tensor([[[0.6]]]))
    assert allowed_after(problem, one, [1, 3])[0] == [2]
    nodes, state = allowed_after(problem, one, [1, 2])
    assert nodes == [0, 3]
    assert float(problem.context(state)) < 1e-6
    assert not problem.finished(state).any()
    nodes, state = allowed_after(problem, one, [1, 2, 0])
    assert nodes == [0]
    assert problem.finished(state).all()
    cost = problem.cost(one, torch.tensor([[[1, 2, 0]]]))
    torch.testing.assert_close(cost, torch.tensor([[0.1 + 0.1 + 0.2 + 0.3]]))


def test_pctsp_with_too_little_to_collect_visits_all():
    problem = make_problem("pctsp")
    one = fields(problem, "pctsp", locs=LINE, prize=[0.1] * 3, real_prize=[0.1] * 3, penalty=[0.1] * 3)
    assert allowed_after(problem, one, [1, 2])[0] == [3]
    assert allowed_after(problem, one, [1, 2, 3])[0] == [0]
    problem.check(one, torch.tensor([[[1, 2, 3]]]))
    with pytest.raises(ValueError, match="or all customers visited"):
        problem.check(one, torch.tensor([[[1, 2, 0]]]))


def test_solvers_never_see_real_prizes():
    problem, instances = draw("spctsp")
    seen = problem.customer_features(instances)
    assert torch.equal(seen, torch.stack([instances["prize"], instances["penalty"]], -1))
    assert not torch.equal(instances["prize"], instances["real_prize"])
    problem, instances = draw("pctsp")
    assert torch.equal(instances["prize"], instances["real_prize"])


def test_op_masks_and_starts():
    problem = make_problem("op")
    one = fields(problem, "op", locs=[*LINE, [0.0, 0.25]], prize=[1.0, 2.0, 3.0, 4.0], limit=0.4)
    assert allowed_after(problem, one, [])[0] == [0, 1, 2]  # 0.4 there and back is just allowed
    assert problem.starts(one).tolist() == [[1, 2, 1, 1]]
    nodes, state = allowed_after(problem, one, [1])
    assert nodes == [0, 2]
    torch.testing.assert_close(problem.context(state), torch.tensor([[[0.3]]]))
    assert allowed_after(problem, one, [1, 2])[0] == [0]
    nodes, state = allowed_after(problem, one, [1, 2, 0])
    assert nodes == [0]
    assert problem.finished(state).all()
    assert float(problem.cost(one, torch.tensor([[[1, 2, 0]]]))) == -3.0
    one["limit"] = torch.tensor([0.1])
    assert problem.starts(one).tolist() == [[0, 0, 0, 0]]
    assert allowed_after(problem, one, [])[0] == [0]
    problem.check(one, torch.tensor([[[0]]]))


def test_a_stretched_view_of_an_instance_changes_no_rule():
    """Solvers may see scaled coordinates: lengths that they are told scale too, masks and costs stay."""
    for name in ("op", "pctsp"):
        problem, instances = draw(name, dtype=torch.float64)
        seen = instances.copy()
        seen["original"], seen["locs"] = instances["locs"], 3.0 * instances["locs"] - 0.5
        routes = roll(problem, instances, 3)
        plain, stretched = problem.begin(instances, 3), problem.begin(seen, 3)
        for action in routes.unbind(-1):
            assert torch.equal(plain["allowed"], stretched["allowed"])
            factor = 3.0 if name == "op" else 1.0
            torch.testing.assert_close(problem.context(stretched), factor * problem.context(plain))
            problem.step(plain, action)
            problem.step(stretched, action)
        torch.testing.assert_close(problem.cost(seen, routes), problem.cost(instances, routes))
        scale = torch.tensor([1.0]) if name == "op" else torch.tensor([1.0, 3.0])
        features = problem.customer_features(instances)
        torch.testing.assert_close(problem.customer_features(seen), features * scale.to(features.dtype))


# -- broken routes ----------------------------------------------------------------------------------------------------
DEMAND = {"locs": LINE, "demand": [0.6, 0.6, 0.4]}
PRIZES = {"locs": LINE, "prize": [0.5] * 3, "real_prize": [0.5] * 3, "penalty": [0.1] * 3}
BROKEN = [
    ("tsp", {"locs": LINE}, [0, 1, 2], "must have 4 steps"),
    ("tsp", {"locs": LINE}, [0, 1, 2, 2], "visited exactly once"),
    ("tsp", {"locs": LINE}, [0, 1, 2, 4], r"in \[0, 4\)"),
    ("tsp", {"locs": LINE}, [0, 1, 2, -1], r"in \[0, 4\)"),
    ("cvrp", DEMAND, [1, 0, 2], "visited exactly once"),
    ("cvrp", DEMAND, [1, 0, 2, 3, 0, 1], "visited exactly once"),
    ("cvrp", DEMAND, [1, 2, 0, 3], "more than the capacity"),
    ("cvrp", DEMAND, [3, 0, 1, 2], "more than the capacity"),
    ("cvrp", DEMAND, [1, 0, 0, 2, 3], "may not follow itself"),
    ("cvrp", DEMAND, [0, 1, 0, 2, 3], "may not follow itself"),
    ("cvrp", DEMAND, [1, 0, 2, 4], r"in \[0, 4\)"),
    ("sdvrp", DEMAND, [1, 2, 0, 3], "delivered in full"),
    ("sdvrp", DEMAND, [1, 2, 3, 0, 2, 3], "deliver something"),
    ("sdvrp", DEMAND, [1, 2, 0, 1, 2, 3], "deliver something"),
    ("sdvrp", DEMAND, [1, 2, 0, 0, 2, 3], "may not follow itself"),
    ("pctsp", PRIZES, [1, 0], "at least 1"),
    ("pctsp", PRIZES, [1, 1, 0], "visited twice"),
    ("pctsp", PRIZES, [1, 2, 0, 3], "depot ends a route"),
    ("pctsp", PRIZES, [0, 1, 2, 0], "depot ends a route"),
    ("spctsp", {**PRIZES, "real_prize": [0.9, 0.05, 0.5]}, [1, 2, 0], "at least 1"),
    ("op", {"locs": LINE, "prize": [1.0] * 3, "limit": 0.5}, [1, 3, 0], "exceed the limit"),
    ("op", {"locs": LINE, "prize": [1.0] * 3, "limit": 0.5}, [1, 1, 0], "visited twice"),
    ("op", {"locs": LINE, "prize": [1.0] * 3, "limit": 0.5}, [1, 0, 2], "depot ends a route"),
    ("op", {"locs": LINE, "prize": [1.0] * 3, "limit": 0.5}, [5], r"in \[0, 4\)"),
]  # fmt: skip
FINE = {"tsp": [3, 1, 2, 0], "cvrp": [1, 0, 2, 3], "sdvrp": [1, 2, 0, 2, 3], "pctsp": [1, 2, 0], "spctsp": [1, 2, 3, 0],
        "op": [1, 2, 0]}  # fmt: skip


@pytest.mark.parametrize(("name", "values", "route", "rule"), BROKEN)
def test_check_names_the_broken_rule(name, values, route, rule):
    problem = make_problem(name)
    pair = torch.cat([fields(problem, name, **values)] * 2)
    fine = torch.tensor(FINE[name])
    longest = max(len(route), len(fine))
    if name == "tsp" and len(route) < 4:
        routes = torch.tensor([[route], [route]])
        where = ""
    else:
        routes = torch.stack([torch.nn.functional.pad(r, (0, longest - len(r))) for r in (fine, torch.tensor(route))])
        routes = torch.stack([routes[:1].expand(2, -1), routes])  # broken: instance 1, route 1
        problem.check(pair[:1], routes[:1])
        where = "instance 1, route 1: "
    with pytest.raises(ValueError, match=f"{type(problem).__name__}: {where}.*{rule}"):
        problem.check(pair, routes)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("routes", [torch.zeros(1, 3), torch.zeros(2, 1, 3, dtype=torch.int64)])
def test_check_refuses_other_shapes(name, routes):
    problem, instances = draw(name, count=1)
    with pytest.raises(ValueError, match=re.escape("routes must be [instances, rollouts, steps] of 1 instances")):
        problem.check(instances, routes)
    with pytest.raises(ValueError, match="routes must be int64"):
        problem.check(instances, torch.zeros(1, 1, 20))


# -- instances --------------------------------------------------------------------------------------------------------
def test_drawn_fields_have_the_papers_distributions():
    count = 2000
    _, made = draw("cvrp", count, capacity=30)
    whole = made["demand"].double() * 30
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-5)
    shares = torch.bincount(whole.round().long().flatten(), minlength=10)[1:] / whole.numel()
    torch.testing.assert_close(shares, torch.full((9,), 1 / 9), rtol=0, atol=0.01)
    assert (made["capacity"] == 30).all()

    _, made = draw("spctsp", count, tour_length=2.0)
    assert float(made["prize"].max()) <= 4 / 20
    torch.testing.assert_close(made["prize"].mean(), torch.tensor(2 / 20), rtol=0.02, atol=0)
    torch.testing.assert_close(made["penalty"].mean(), torch.tensor(3 * 2.0 / 20 / 2), rtol=0.02, atol=0)
    assert float(made["penalty"].max()) <= 3 * 2.0 / 20
    ratio = made["real_prize"] / made["prize"]
    torch.testing.assert_close(ratio.mean(), torch.tensor(1.0), rtol=0.02, atol=0)
    torch.testing.assert_close(ratio.var(), torch.tensor(1 / 3), rtol=0.03, atol=0)

    _, made = draw("op", count)
    away = (made["locs"][:, 1:] - made["locs"][:, :1]).norm(dim=-1)
    assert torch.equal(made["prize"].amax(-1), torch.ones(count))
    assert float(made["prize"].min()) >= 0.01 - 1e-7
    assert torch.equal(made["prize"].argmax(-1), away.argmax(-1))
    torch.testing.assert_close(made["prize"], away / away.amax(-1, keepdim=True), rtol=0, atol=0.0101)


def test_instances_follow_the_generator():
    for name in PROBLEMS:
        first, again, other = (draw(name, seed=seed)[1] for seed in (3, 3, 4))
        assert (first == again).all()
        assert not (first == other).all()


def test_settings_by_size():
    for size, capacity in ((10, 20), (15, 25), (20, 30), (25, 35), (50, 40), (55, 45), (100, 50)):
        problem = make_problem("cvrp")
        made = problem.generate(torch.rand(1, size + 1, 2), torch.Generator())
        assert int(made["capacity"]) == capacity
    for size, limit in ((20, 2.0), (35, 2.5), (50, 3.0), (75, 3.5), (100, 4.0)):
        assert float(make_problem("op").generate(torch.rand(1, size + 1, 2), torch.Generator())["limit"]) == limit
    table = {20: 2.0, 30: 3.0, 50: 3.0}
    assert [rule_for_size("X", "k", table, n, "k") for n in (20, 25, 30, 41, 50)] == [2.0, 2.5, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("name", "size", "option"), [("cvrp", 9, "capacity"), ("cvrp", 101, "capacity"), ("sdvrp", 5, "capacity"),
                                 ("pctsp", 10, "tour_length"), ("spctsp", 200, "tour_length"), ("op", 7, "limit")]
)  # fmt: skip
def test_sizes_without_a_rule_are_refused(name, size, option):
    with pytest.raises(
        ValueError, match=f"{name.upper()}: .* is known for .* customers, got {size}: set '{option}' for others"
    ):
        make_problem(name).generate(torch.rand(1, size + 1, 2), torch.Generator())
    made = make_problem(name, **OPTIONS[name]).generate(torch.rand(1, size + 1, 2), torch.Generator())
    assert made["locs"].shape == (1, size + 1, 2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_coordinates_are_checked(name):
    problem = make_problem(name, **OPTIONS[name])
    for locs in (torch.rand(3, 2), torch.rand(1, 4, 3), torch.rand(1, 0, 2), torch.ones(1, 4, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=f"{type(problem).__name__}: locs must be floating point"):
            problem.generate(locs, torch.Generator())


def spoil(key, value):
    def change(instances):
        instances[key] = instances[key].clone()
        instances[key][1, ..., 0] = value

    return change


def replace(key, value):
    def change(instances):
        instances[key] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tsp", spoil("locs", torch.nan), "instance 1: locs must be finite"),
        ("tsp", replace("original", torch.zeros(6, 3, 2)), r"original must be \[6, 20, 2\], got \[6, 3, 2\]"),
        ("tsp", replace("rounded", torch.zeros(6, 1)), r"rounded must be \[6\], got \[6, 1\]"),
        ("tsp", lambda made: made.pop("locs"), "instances need locs, got nothing"),
        ("cvrp", lambda made: made.pop("demand"), r"demand must be \[6, 20\], got nothing"),
        ("cvrp", spoil("demand", -0.1), "instance 1: demand must be finite and >= 0"),
        ("cvrp", spoil("demand", 1.1), "instance 1: demand must be <= 1, the capacity"),
        ("cvrp", spoil("demand", 0.25), "instance 1: demand [*] capacity must be whole"),
        ("cvrp", replace("capacity", torch.ones(6)), r"capacity must be int64 \[6\]"),
        ("cvrp", replace("capacity", torch.zeros(6, dtype=torch.int64)), "instance 0: capacity must be >= 1"),
        ("sdvrp", spoil("demand", 0.0), "instance 1: demand must be > 0"),
        ("pctsp", spoil("penalty", torch.inf), "instance 1: penalty must be finite"),
        ("spctsp", lambda made: made.pop("real_prize"), "real_prize must be .* got nothing"),
        ("op", replace("limit", torch.zeros(6)), "instance 0: limit must be finite and > 0"),
        ("op", lambda made: made.pop("limit"), r"instances need limit \[6\]"),
    ],
)
def test_check_instances_names_field_and_instance(name, change, message):
    problem, instances = draw(name)
    change(instances)
    with pytest.raises(ValueError, match=f"{type(problem).__name__}: {message}"):
        problem.check_instances(instances)


# -- registry ---------------------------------------------------------------------------------------------------------
def test_registry():
    assert list(PROBLEMS) == ["tsp", "cvrp", "sdvrp", "pctsp", "spctsp", "op"]
    assert make_problem("cvrp", capacity=50).generate(torch.rand(1, 4, 2), torch.Generator())["capacity"] == 50
    with pytest.raises(ValueError, match="unknown name 'cvpr' .did you mean cvrp.*tsp, cvrp, sdvrp, pctsp, spctsp, op"):
        make_problem("cvpr")
    with pytest.raises(ValueError, match="cvrp has no option 'size': it has capacity"):
        make_problem("cvrp", size=4)
    with pytest.raises(ValueError, match="tsp has no option 'capacity': it has none"):
        make_problem("tsp", capacity=4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cvrp", {"capacity": 8}, "CVRP: capacity must be a whole number >= 9.*got 8"),
        ("sdvrp", {"capacity": 30.5}, "SDVRP: capacity must be a whole number"),
        ("pctsp", {"tour_length": 0.0}, "PCTSP: tour_length must be > 0, got 0.0"),
        ("spctsp", {"tour_length": float("nan")}, "SPCTSP: tour_length must be > 0"),
        ("op", {"limit": -1.0}, "OP: limit must be > 0, got -1.0"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_problem(name, **options)
