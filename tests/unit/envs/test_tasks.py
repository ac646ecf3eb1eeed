"""Task ids: what they parse to, what is refused and how it is said."""

from __future__ import annotations

import pytest

from datamodules.envs import tasks
from datamodules.envs.boulder_push import BoulderPush
from datamodules.envs.foraging import Foraging
from datamodules.envs.matrix_games import MatrixGame
from datamodules.envs.particles import Adversary, Spread, Tag
from datamodules.envs.tasks import SUITES, known_tasks, make_env
from datamodules.envs.warehouse import Warehouse


def test_every_listed_task_parses():
    for task in known_tasks():
        family, _, name = task.partition("/")
        assert tasks._PARSERS[family](name) is not None, task
    assert len(set(known_tasks())) == len(known_tasks())


@pytest.mark.parametrize("suite", SUITES)
def test_every_task_of_a_suite_is_known_and_makes_a_tensor_environment(suite):
    known = set(known_tasks())
    for task in SUITES[suite]:
        assert task in known
        env = make_env(task, 2)
        assert env.rollout(2, break_when_any_done=False)["next", "agents", "reward"].shape[:2] == (2, 2)


def test_emax_suite_has_its_papers_counts():
    families = [task.split("/")[0] for task in SUITES["emax21"]]
    assert {name: families.count(name) for name in set(families)} == {"lbf": 7, "bpush": 5, "rware": 4, "mpe": 5}


@pytest.mark.parametrize(
    ("task", "kind", "expected"),
    [
        ("lbf/8x8-2p-2f-coop", Foraging, {"rows": 8, "columns": 8, "num_agents": 2, "food": 2, "coop": True}),
        ("lbf/2s-15x15-4p-3f", Foraging, {"rows": 15, "num_agents": 4, "food": 3, "coop": False, "sight": 2}),
        ("rware/tiny-2ag", Warehouse, {"height": 11, "width": 10, "num_agents": 2, "requests": 2}),
        ("rware/large-4ag-hard", Warehouse, {"height": 29, "width": 16, "num_agents": 4, "requests": 2}),
        ("rware/small-3ag-easy", Warehouse, {"height": 20, "width": 10, "num_agents": 3, "requests": 6}),
        ("bpush/8x12-3ag", BoulderPush, {"height": 8, "width": 12, "num_agents": 3}),
        ("mpe/spread-4", Spread, {"num_agents": 4, "observation_size": 24}),
        ("mpe/tag", Tag, {"num_agents": 3, "observation_size": 16}),
        ("mpe/adversary", Adversary, {"num_agents": 2, "observation_size": 10}),
        ("matrix/climbing", MatrixGame, {"num_actions": 3}),
    ],
)
def test_an_id_becomes_the_right_environment(task, kind, expected):
    env = make_env(task, 3, seed=1)
    assert type(env) is kind
    assert env.batch_size == (3,)
    assert {name: getattr(env, name) for name in expected} == expected


def test_penalty_ids_name_a_negative_payoff():
    env = make_env("matrix/penalty-75", 1)
    assert isinstance(env, MatrixGame)
    assert env.payoffs[0, 0] == env.payoffs[2, 2] == -75.0
    assert make_env("matrix/penalty-0", 1).payoffs[0, 0] == 0.0


def test_options_override_the_id():
    env = make_env("lbf/15x15-3p-4f", 2, options={"food": 5, "episode_limit": 7})
    assert (env.food, env.episode_limit) == (5, 7)


def test_seeds_decide_the_start():
    starts = [make_env("mpe/spread-3", 4, seed=seed).reset()["state"] for seed in (1, 1, 2)]
    assert starts[0].equal(starts[1])
    assert not starts[0].equal(starts[2])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "lbf/15x15-3p-5f",
            r"registers food counts 1\.\.4 only.*'lbf/15x15-3p-4f' with options: \{food: 5\}",
        ),
        ("lbf/2s-8x8-12p-2f-coop", r"player counts 2\.\.9 only.*'lbf/2s-8x8-9p-2f-coop' with options: \{agents: 12\}"),
        ("lbf/30x30-2p-2f", r"sizes 5\.\.19 only.*'lbf/19x19-2p-2f' with options: \{rows: 30, columns: 30\}"),
        ("lbf/8x9-2p-2f", r"square fields only.*'lbf/8x8-2p-2f' with options: \{rows: 8, columns: 9\}"),
        ("lbf/8x8-2p-2f-coop-pen", r"no '-pen' ids; take 'lbf/8x8-2p-2f-coop' with options: \{penalty: 0\.1\}"),
        ("lbf/8x8-2p-2f-ind", r"no '-ind' ids; .*options: \{max_food_level: 1\}"),
        ("rware/tiny-1ag-hard", "requests no shelf"),
        ("rware/tny-2ag", "no task 'rware/tny-2ag'; did you mean rware/tiny-2ag"),
        ("rware/tiny-20ag", "no task"),
        ("mpe/spread-7", "did you mean mpe/spread-"),
        ("matrix/penalty-60", "did you mean matrix/penalty-"),
        ("matrix/penalty100", "matrix/penalty-100"),
        ("Foraging-8x8-2p-2f-v3", "no task"),
        ("", "families are lbf"),
        ("os:system/1", "no task"),
        ("smac/../../3m", "no task"),
        ("vmas/__init__", "no task"),
    ],
)
def test_other_ids_are_refused_with_a_hint(task, message):
    with pytest.raises(ValueError, match=message):
        make_env(task, 2)


def test_what_the_hint_says_works():
    assert make_env("lbf/8x8-2p-2f", 2, options={"rows": 8, "columns": 9}).rollout(2).numel() > 0
    assert make_env("lbf/8x8-2p-2f", 2, options={"penalty": 0.1}).rollout(2).numel() > 0
    assert make_env("lbf/8x8-2p-2f", 2, options={"max_food_level": 1}).rollout(2).numel() > 0


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("matrix/climbing", {"options": {"round": 2}}, "MatrixGame has no 'round'; nearest is 'rounds'"),
        ("mpe/spread-3", {"options": {"local_ration": 0.0}}, "nearest is 'local_ratio'"),
        ("mpe/spread-3", {"options": {"seed": 3}}, "has no 'seed'"),
        ("mpe/spread-3", {"backend": "tensors"}, "backend: tensor or package, got 'tensors'"),
        ("bpush/8x8-2ag", {"backend": "package"}, "'bpush/8x8-2ag' has backend tensor only"),
        ("vmas/simple_spread", {}, "'vmas/simple_spread' has backend package only"),
        ("mpe/tag", {"workers": 2}, "workers: needs backend package"),
        ("mpe/tag", {"workers": -1, "backend": "package"}, "workers: .* got -1"),
    ],
)
def test_wrong_arguments_are_named(task, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_env(task, 2, **arguments)
