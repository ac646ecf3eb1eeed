"""MiniWoB++ as a TorchRL environment: its specs, rollouts and resets as TorchRL does them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from browsing import browser_pool
from tensordict import NonTensorStack, TensorDict
from tensordict.base import TensorDictBase
from torchrl.envs.utils import check_env_specs

from datamodules.envs.browser.demonstrations import expert_move
from datamodules.envs.browser.env import MiniWoBEnv
from datamodules.envs.browser.pool import MiniWoBPool
from modules.contracts.browsing import EpisodeSpec, PageView

pytestmark = pytest.mark.xdist_group("browser")

TASKS = ["click-button", "login-user", "click-checkboxes"]
SLOTS = 3


@pytest.fixture(scope="module")
def pool() -> Iterator[MiniWoBPool]:
    with browser_pool(pages=SLOTS) as pool:
        yield pool


def texts(tensordict: TensorDictBase, key: str | tuple[str, ...]) -> list[Any]:
    value: Any = tensordict.get(key)
    return value.tolist()


def acting(tensordict: TensorDictBase, actions: list[str]) -> TensorDictBase:
    stack: Any = NonTensorStack
    return tensordict.set("action", stack(*actions))


class Expert:
    """A policy that plays the experts; what is over gets an instruction that does nothing."""

    def __init__(self) -> None:
        self.past: dict[tuple[str, str], list[str]] = {}

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = []
        columns = (texts(tensordict, key) for key in ("task", "seed", "utterance", "html", "page"))
        for task, seed, utterance, html, page in zip(*columns, strict=True):
            past = self.past.setdefault((task, seed), [])
            move = expert_move(task, PageView(utterance, html, page), past) if html else None
            actions.append(move or "press arrowup")
            past.append(actions[-1])
        return acting(tensordict, actions)


def test_specs_are_kept(pool):
    check_env_specs(MiniWoBEnv(pool, TASKS, seed=1))


def test_experts_solve_every_page_in_a_rollout(pool):
    env = MiniWoBEnv(pool, TASKS, seed=2)
    rollout: Any = env.rollout(20, Expert(), break_when_any_done=False, break_when_all_done=True)
    assert rollout.batch_size[0] == SLOTS
    assert texts(rollout[:, 0], "task") == TASKS
    reward, done = rollout["next", "reward"], rollout["next", "done"]
    assert reward.dtype == torch.float32
    assert torch.equal(done, rollout["next", "terminated"])
    for slot in range(SLOTS):
        first = int(done[slot, :, 0].int().argmax())
        assert done[slot].any()
        assert reward[slot, :first].eq(0).all()  # nothing before the end
        assert reward[slot, first] == 1
    assert len(set(texts(rollout[:, 0], "seed"))) == SLOTS


def test_pages_that_are_over_start_again_alone_and_tasks_take_turns(pool):
    env = MiniWoBEnv(pool, ["click-test", "enter-text"], seed=3)
    rollout: Any = env.rollout(6, Expert(), break_when_any_done=False)
    assert rollout.batch_size == (SLOTS, 6)
    # a click-test is one instruction, an enter-text three; slots begin with tasks 0, 1, 0, and go on by 3 slots
    tasks = [texts(rollout[slot], "task") for slot in range(SLOTS)]
    assert tasks[0] == tasks[2] == ["click-test", *["enter-text"] * 3, "click-test", "enter-text"]
    assert tasks[1] == [*["enter-text"] * 3, "click-test", *["enter-text"] * 2]
    rewards = rollout["next", "reward"][..., 0].tolist()
    assert rewards == [[1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0]]
    seeds = [list(dict.fromkeys(texts(rollout[slot], "seed"))) for slot in range(SLOTS)]
    assert len({seed for slot in seeds for seed in slot}) == 4 + 3 + 4


def test_a_partial_reset_starts_only_what_it_names(pool):
    env = MiniWoBEnv(pool, TASKS, seed=4)
    before = env.reset()
    stepped = env.step(acting(before, ["press arrowup"] * SLOTS))["next"]
    marked = stepped.clone().set("_reset", torch.tensor([[False], [True], [False]]))
    after = env.reset(marked)
    for key in ("task", "seed", "html", "utterance"):
        old, new = texts(stepped, key), texts(after, key)
        assert (old[0], old[2]) == (new[0], new[2])
    assert texts(after, "seed")[1] != texts(stepped, "seed")[1]
    assert texts(after, "html")[1] != texts(stepped, "html")[1]
    # slot 1 goes on with the next task that is its own
    assert texts(after, "task") == ["click-button", TASKS[(1 + SLOTS) % 3], "click-checkboxes"]
    assert not after["done"].any()


def test_episodes_can_be_chosen(pool):
    env = MiniWoBEnv(pool, TASKS, seed=5)
    stack: Any = NonTensorStack
    chosen = {"task": ["click-link", "click-test", "click-link"], "seed": ["te1", "x", "7"]}
    given = TensorDict({key: stack(*values) for key, values in chosen.items()}, batch_size=[SLOTS])
    first = env.reset(given)
    assert {key: texts(first, key) for key in chosen} == chosen
    views = pool.reset_pages({s: EpisodeSpec(chosen["task"][s], chosen["seed"][s]) for s in range(SLOTS)})
    assert texts(first, "html") == [views[slot].html for slot in range(SLOTS)]
    # it was not an episode of the sequence
    plain = MiniWoBEnv(pool, TASKS, seed=5).reset()
    assert texts(env.reset(), "seed") == texts(plain, "seed")


def test_equal_seeds_play_equal_episodes_in_any_instance_and_order(pool):
    def seen(env: MiniWoBEnv, resets: int) -> list[list[Any]]:
        return [[texts(td, key) for key in ("task", "seed", "html")] for td in (env.reset() for _ in range(resets))]

    env = MiniWoBEnv(pool, TASKS, seed=6)
    once = seen(env, 3)
    assert seen(MiniWoBEnv(pool, TASKS, seed=6), 3) == once
    env.set_seed(6)
    assert seen(env, 3) == once
    env.set_seed(7)
    assert [seeds for _, seeds, _ in seen(env, 3)] != [seeds for _, seeds, _ in once]
    assert len({seed for _, seeds, _ in once for seed in seeds}) == 3 * SLOTS
    # slots do not depend on each other: a slot reset alone goes on with its own episodes
    env.set_seed(6)
    for number in range(2):
        alone = env.reset(TensorDict({"_reset": torch.tensor([[True], [False], [False]])}, batch_size=[SLOTS]))
        assert texts(alone, "seed")[0] == once[number][1][0]


@pytest.mark.parametrize(
    "action", ["", "drag //a", "clickxpath //button[", "type", "clickxpath //a\npress enter", "\x00"]
)
def test_what_is_no_instruction_changes_nothing(pool, action):
    env = MiniWoBEnv(pool, ["enter-text"], seed=8)
    before = env.reset()
    after = env.step(acting(before.clone(), [action, "clickxpath //input", "clickxpath //nothing"]))["next"]
    assert texts(after, "status") == ["bad_xpath" if "[" in action else "malformed", "ok", "no_match"]
    assert texts(after, "html")[::2] == texts(before, "html")[::2]
    assert texts(after, "html")[1] != texts(before, "html")[1]  # it has the focus now
    assert not after["done"].any()
    assert not after["reward"].any()


def test_refusals_and_closing():
    with browser_pool() as pool:
        with pytest.raises(ValueError, match="tasks is empty"):
            MiniWoBEnv(pool, [])
        with pytest.raises(ValueError, match="no task 'click-buton'; did you mean click-button"):
            MiniWoBEnv(pool, ["click-buton"])
        env, other = MiniWoBEnv(pool, ["click-test"]), MiniWoBEnv(pool, ["click-test"])
        assert not env.is_closed
        env.reset()
        pid = pool._browsers[0].pid
        assert pid is not None
        del other
        gc.collect()
        os.kill(pid, 0)  # still there
        env.close()
        assert env.is_closed
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        env.close()
