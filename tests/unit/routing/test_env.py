"""RoutingEnv: TorchRL's contract, the same masks and costs as raw tensors, given instances, resets, exact resume."""

from __future__ import annotations

import io

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs, step_mdp

from datamodules.routing.distributions import Explosion
from datamodules.routing.env import RoutingEnv
from datamodules.routing.problems import PROBLEMS, make_problem

NAMES = list(PROBLEMS)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def env_of(name, envs=4, size=20, **options):
    return RoutingEnv(make_problem(name), envs, size, **options)


def episode(env, start=None):
    """Random steps until every route is finished: the tensordicts before each step, with ``next``."""
    seen, steps = env.reset(start), []
    while not bool(seen["done"].all()):
        taken = env.step(env.rand_action(seen))
        steps.append(taken)
        seen = step_mdp(taken)
    return steps


@pytest.mark.parametrize("name", NAMES)
def test_specs_hold(name):
    check_env_specs(env_of(name))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_masks_contexts_and_costs_equal_the_raw_tensors(name, device):
    torch.manual_seed(1)
    env = env_of(name, envs=16, seed=3, device=device)
    problem = env.problem
    seen = env.reset()
    instances = env.instances.clone()
    state = problem.begin(instances, 1)
    total = torch.zeros(16, 1, device=device)
    actions = []
    for _ in range(problem.max_steps(env.nodes)):
        running = ~problem.finished(state)[:, 0]
        assert torch.equal(seen["done"][:, 0], ~running)
        assert torch.equal(seen["action_mask"][running], state["allowed"][:, 0][running])
        assert torch.equal(seen["current_node"][running], state["current"][:, 0][running])
        context = problem.context(state)
        if context is not None:
            assert torch.equal(seen["context"][running], context[:, 0].float()[running])
        taken = env.step(env.rand_action(seen))
        # the tensors of a finished route may wait at the depot as well
        problem.step(state, taken["action"].unsqueeze(1))
        actions.append(taken["action"])
        total += taken["next", "reward"]
        seen = step_mdp(taken)
        if bool(seen["done"].all()):
            break
    assert bool(seen["done"].all())
    routes = torch.stack(actions, -1).unsqueeze(1)
    if not problem.spec.closed:
        routes = torch.nn.functional.pad(routes, (0, 1))
    problem.check(instances, routes)
    torch.testing.assert_close(total, -problem.cost(instances, routes).float())
    if problem.spec.closed:
        assert torch.equal(seen["first_node"], actions[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_reward_comes_once_and_finished_routes_wait(name):
    torch.manual_seed(0)
    env = env_of(name, envs=24)
    steps = episode(env)
    reward = torch.stack([step["next", "reward"] for step in steps], 1)[..., 0]
    done = torch.stack([step["next", "done"] for step in steps], 1)[..., 0]
    first = done & (done.cumsum(1) == 1)
    assert bool((reward[~first] == 0).all())
    # an orienteer without a customer earns nothing
    assert bool((reward[first] != 0).any())
    assert name == "op" or bool((reward[first] != 0).all())
    for step in steps:
        waits = step["done"][:, 0]
        mask = step["action_mask"]
        assert bool(mask.any(-1).all())
        if bool(waits.any()):
            assert bool((mask[waits].sum(-1) == 1).all())
            assert torch.equal(step["next", "current_node"][waits], step["current_node"][waits])


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_everything(name):
    def run(seed):
        env = env_of(name, seed=9)
        env.set_seed(seed)
        torch.manual_seed(seed)
        return env.rollout(60, break_when_any_done=False)

    one, same, other = run(5), run(5), run(6)
    assert bool((one == same).all())
    assert not torch.equal(one["locs"], other["locs"])
    # the constructor's seed is the same thing as set_seed
    assert torch.equal(env_of(name, seed=5).reset()["locs"], one["locs"][:, 0])


@pytest.mark.parametrize("name", ["cvrp", "pctsp", "op"])
def test_only_finished_rows_get_new_instances(name):
    torch.manual_seed(2)
    env = env_of(name, envs=6)
    run = env.rollout(80, break_when_any_done=False)
    # within a rollout the tensordict after a step is the next one's, but for rows that were reset
    over = run["next", "done"][:, :-1, 0]
    assert bool(over.any())
    assert not bool(over.all(0).any())
    after, before = run["locs"][:, 1:], run["locs"][:, :-1]
    changed = (after != before).flatten(2).any(-1)
    assert torch.equal(changed, over)
    assert bool((run["current_node"][:, 1:][over] == 0).all())
    assert torch.equal(run["current_node"][:, 1:][~over], run["next", "current_node"][:, :-1][~over])
    # each episode's reward is that of its own instance
    row, end = [int(index) for index in over.nonzero()[0]]
    again = env_of(name, envs=1)
    given = TensorDict({key: run[key][row : row + 1, 0] for key in again.visible_keys}, [1])
    if name == "pctsp":
        given["real_prize"] = given["prize"]
    seen = again.reset(given)
    for step in range(end + 1):
        seen = again.step(seen.set("action", run["action"][row : row + 1, step]))["next"]
    torch.testing.assert_close(seen["reward"][0, 0], run["next", "reward"][row, end, 0])
    assert bool(seen["done"].all())


def test_a_rollout_until_all_are_done():
    torch.manual_seed(2)
    env = env_of("cvrp", envs=6)
    run = env.rollout(80, break_when_any_done=False, break_when_all_done=True)
    assert bool(run["next", "done"][:, -1].all())
    assert len({int(row.sum()) for row in run["next", "done"][..., 0]}) > 1  # they end at different steps
    env.problem.check(env.instances, torch.nn.functional.pad(env.routes, (0, 1)).unsqueeze(1))


@pytest.mark.parametrize("name", ["tsp", "cvrp", "op"])
def test_steps_of_some_rows_leave_the_others_alone(name):
    torch.manual_seed(0)
    env = env_of(name, envs=4)
    seen = env.reset()
    for _ in range(2):
        seen = step_mdp(env.step(env.rand_action(seen)))
    seen = env.rand_action(seen)
    rest = torch.tensor([True, False, True, False])
    seen["action"][~rest] = -1  # whatever stands there
    after = env.step(seen.clone().set("_step", rest))["next"]
    for key in ("current_node", "action_mask", *(["context"] if name != "tsp" else [])):
        assert torch.equal(after[key][~rest], seen[key][~rest])
    assert torch.equal(after["current_node"][rest], seen["action"][rest])


# -- given instances --------------------------------------------------------------------------------------------------
def instances_of(name, count=4, size=20, seed=1):
    problem = make_problem(name)
    generator = torch.Generator().manual_seed(seed)
    return problem, problem.generate(torch.rand(count, problem.nodes(size), 2, generator=generator), generator)


@pytest.mark.parametrize("name", NAMES)
def test_given_instances_are_taken_and_left_as_they_are(name):
    problem, given = instances_of(name)
    before = given.clone()
    env = env_of(name)
    steps = episode(env, given)
    assert torch.equal(steps[-1]["locs"], given["locs"])
    routes = torch.nn.functional.pad(env.routes, (0, 0 if problem.spec.closed else 1)).unsqueeze(1)
    total = sum(step["next", "reward"] for step in steps)
    torch.testing.assert_close(total, -problem.cost(given, routes).float())
    assert all(torch.equal(given[key], value) for key, value in before.items())


def test_costs_of_given_instances_are_measured_as_their_file_says():
    _, given = instances_of("tsp")
    given["original"] = given["locs"].double() * 100
    given["rounded"] = torch.tensor([True, False, True, False])
    env = env_of("tsp")
    steps = episode(env, given)
    closed = torch.cat([env.routes, env.routes[:, :1]], 1)
    points = given["original"].gather(1, closed.unsqueeze(-1).expand(-1, -1, 2))
    legs = (points[:, 1:] - points[:, :-1]).norm(dim=-1)
    legs[::2] = (legs[::2] + 0.5).floor()
    torch.testing.assert_close(steps[-1]["next", "reward"][:, 0], -legs.sum(1).float())
    # new instances beside them are measured as drawn
    last = step_mdp(steps[-1])
    again = env.reset(last.set("_reset", torch.tensor([[True], [True], [False], [True]])))
    assert torch.equal(env.instances["original"][:2], again["locs"][:2].double())
    assert env.instances["rounded"].tolist() == [False, False, True, False]
    assert torch.equal(again["locs"][2], given["locs"][2])


def test_real_prizes_are_not_shown():
    env = env_of("spctsp")
    steps = episode(env)
    assert all("real_prize" not in step and "real_prize" not in step["next"] for step in steps)
    assert not torch.equal(env.instances["real_prize"], env.instances["prize"])
    one = steps[0]
    collected = env.instances["real_prize"].gather(1, one["action"].unsqueeze(1) - 1)
    torch.testing.assert_close(one["next", "context"], (1 - collected).clamp(min=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda td: td.exclude("demand"), "given instances lack demand"),
        (lambda td: td.set("locs", td["locs"][:, 1:]), r"given locs must be \[4, 21, 2\], got \[4, 20, 2\]"),
        (lambda td: td.set("demand", td["demand"][:, 1:]), r"demand must be \[4, 20\], got \[4, 19\]"),
        (lambda td: td.set("locs", td["locs"].index_fill(0, torch.tensor(2), torch.nan)), "instance 2: .*finite"),
        (lambda td: td.set("demand", td["demand"] * 20), "CVRP: instance 0: .*demand"),
    ],
)
def test_bad_given_instances_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        env_of("cvrp").reset(change(instances_of("cvrp")[1]))


# -- actions ----------------------------------------------------------------------------------------------------------
def wrong_actions(kind):
    good = torch.tensor([1, 2, 3, 4])
    return {
        "visited": torch.tensor([2, 3, 5, 2]),
        "the depot twice": good.where(torch.arange(4) != 2, 0),
        "beyond": good.where(torch.arange(4) != 2, 21),
        "negative": good.where(torch.arange(4) != 2, -1),
        "floating": good.float(),
        "two per instance": good.unsqueeze(1).expand(4, 2),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("visited", "CVRP: instance 2: action 5 is not allowed at node 5: take one where action_mask is true"),
        ("the depot twice", "CVRP: instance 2: action 0 is not allowed at node 0"),
        ("beyond", "CVRP: instance 2: action 21 is not allowed"),
        ("negative", "CVRP: instance 2: action -1 is not allowed"),
        ("floating", r"action must be int64 \[4\], got torch.float32 \[4\]"),
        ("two per instance", r"action must be int64 \[4\], got torch.int64 \[4, 2\]"),
    ],
)
def test_bad_actions_are_refused_and_change_nothing(kind, message):
    env = RoutingEnv(make_problem("cvrp", capacity=1000), 4)
    env.reset()
    if kind == "visited":
        env.step(TensorDict({"action": torch.tensor([1, 2, 5, 4])}, [4]))
    before = env.snapshot()
    with pytest.raises(ValueError, match=message.replace("-", r"\-")):
        env._step(TensorDict({"action": wrong_actions(kind)}, [4]))
    after = env.snapshot()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_random_actions_are_uniform_over_the_mask():
    env = RoutingEnv(make_problem("tsp"), 4000, 5)
    seen = step_mdp(env.step(env.reset().set("action", torch.zeros(4000, dtype=torch.int64))))
    torch.manual_seed(0)
    counts = env.rand_action(seen)["action"].bincount(minlength=5)
    assert counts[0] == 0
    # 1000 expected of each, standard deviation 27
    assert bool(((counts[1:] - 1000).abs() < 140).all())
    assert env.rand_action()["action"].shape == (4000,)


# -- exact position ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_goes_on_exactly(name):
    torch.manual_seed(4)
    env = env_of(name, seed=1)
    last = env.rollout(13, break_when_any_done=False)[:, -1]
    saved = io.BytesIO()
    torch.save(env.snapshot(), saved)
    saved.seek(0)
    other = env_of(name, seed=77)
    other.restore(torch.load(saved, weights_only=True))
    runs = []
    for one in (env, other):
        torch.manual_seed(8)
        start = step_mdp(last)
        runs.append(one.rollout(70, tensordict=start, auto_reset=False, break_when_any_done=False))
    assert bool((runs[0] == runs[1]).all())
    assert bool(runs[0]["next", "done"].any())  # so that new instances were drawn


def test_a_snapshot_of_other_instances_is_refused():
    env = env_of("cvrp")
    with pytest.raises(ValueError, match=r"snapshot: 'instances.locs' must be \[4, 21, 2\], got \[4, 22, 2\]"):
        env.restore(env_of("cvrp", size=21).snapshot())
    with pytest.raises(ValueError, match="snapshot: 'instances.demand' must be .* got nothing"):
        env.restore(env_of("op").snapshot())


def test_a_snapshot_of_given_instances_keeps_their_coordinates():
    _, given = instances_of("op")
    given["original"], given["limit"] = given["locs"].double() * 10, given["limit"] * 10
    env, other = env_of("op"), env_of("op")
    env.reset(given)
    other.restore(env.snapshot())
    assert torch.equal(other.instances["original"], given["original"])
    env.restore(env_of("op").snapshot())
    assert "original" not in env.instances


# -- construction -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"envs": 0}, "envs must be >= 1, got 0"),
        ({"size": 0}, "size must be >= 1, got 0"),
        ({"size": 7}, "CVRP: .*capacity"),
        ({"distribution": "uniformly"}, "uniformly"),
        ({"distribution": lambda noise, generator: noise[..., :1]}, r"must make coordinates \[1, 21, 2\], got"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        env_of("cvrp", **options)


def test_distributions_by_name_object_and_function():
    named = env_of("tsp", distribution="explosion", seed=2).reset()["locs"]
    assert torch.equal(named, env_of("tsp", distribution=Explosion(), seed=2).reset()["locs"])
    shrunk = env_of("tsp", distribution=lambda noise, generator: noise / 10, seed=2).reset()["locs"]
    assert float(shrunk.max()) < 0.1
    torch.testing.assert_close(shrunk * 10, env_of("tsp", seed=2).reset()["locs"])
