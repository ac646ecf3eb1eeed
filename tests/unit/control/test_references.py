"""What tasks know of themselves for assurance: good controllers, safe sets; and episodes that no run's seed changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from datamodules.control_data import ControlDataModule
from datamodules.envs.control.games import IntegratorGame, linear_law, lq_saddle
from datamodules.envs.control.tasks import make_control_env
from datamodules.rollout.control import play_episodes
from modules.contracts import EpisodesRequest, RolloutRequest, ScalesReturns
from modules.control.trials import Scripted
from modules.seeds import SEED_VARIABLE


def _returns(task: str, law) -> Tensor:
    env = make_control_env(task, 64)
    return play_episodes(env, EpisodesRequest(Scripted(law), 1, 64, (1,), seed=5), 0, 1)["episode_return"][0]


@pytest.mark.parametrize(("task", "least"), [("pendulum", -200.0), ("double_integrator", -8.0), ("lq", -10.0)])
def test_reference_controllers_are_good(task, least):
    env = make_control_env(task, 1)
    found = _returns(task, lambda seen, noise: env.reference_action(seen))
    assert float(found.mean()) > least
    idle = _returns(task, lambda seen, noise: torch.zeros(len(seen), 1))
    assert float(idle.mean()) < 5 * least


def test_the_linear_law_is_the_saddle_point_without_a_disturbance():
    """An adversary that pays a fortune for every disturbance makes none."""
    law = linear_law(((1.0, 0.1), (0.0, 1.0)), (0.005, 0.1), (1.0, 1.0), 0.1)
    torch.testing.assert_close(law.t(), lq_saddle(1e9)[1], rtol=1e-6, atol=1e-8)


def test_known_optima():
    assert IntegratorGame(1).best_return == 0.0
    assert make_control_env("cartpole", 1, options={"horizon": 70}).best_return == 70.0
    assert make_control_env("pendulum", 1).best_return is None
    data = ControlDataModule("integrator", reference_return=-3.0)
    data.setup("test")
    assert isinstance(data, ScalesReturns)
    assert data.reference_return == -3.0  # the config's goes before the task's


def test_the_integrator_begins_where_it_is_told():
    env = IntegratorGame(200, start=2.0)
    env.restart(torch.rand(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert 1.9 < float(env.observe().max()) <= 2.0
    assert -2.0 <= float(env.observe().min()) < -1.9
    env.restart(torch.full((1, 1), 0.75, dtype=torch.float64), torch.tensor([3]))
    assert float(env.observe()[3]) == 1.0
    assert IntegratorGame(2).reset_size == 0
    with pytest.raises(ValueError, match="start must be >= 0 and finite, got -1"):
        IntegratorGame(1, start=-1)


def _noisy() -> Scripted:
    return Scripted(lambda seen, noise: noise, 1)


def test_episodes_of_a_seed_do_not_depend_on_run_or_rank(monkeypatch):
    request = EpisodesRequest(_noisy(), 2, 6, (1,), trace=6, seed=9)
    monkeypatch.setenv(SEED_VARIABLE, "1")
    one = play_episodes(make_control_env("pendulum", 12, options={"horizon": 5}), request, 0, 1)
    monkeypatch.setenv(SEED_VARIABLE, "2")
    two = play_episodes(make_control_env("pendulum", 12, options={"horizon": 5}), request, 1, 2)  # rank 1 plays all
    assert torch.equal(one["episode_return"], two["episode_return"])
    assert torch.equal(one["trace", "executed"], two["trace", "executed"])
    other = EpisodesRequest(_noisy(), 2, 6, (1,), seed=10)
    three = play_episodes(make_control_env("pendulum", 12, options={"horizon": 5}), other, 0, 1)
    assert not torch.equal(one["episode_return"], three["episode_return"])


def test_rollouts_of_a_seed_leave_nothing_in_checkpoints(monkeypatch):
    def collect(run: str, seed: int) -> Tensor:
        monkeypatch.setenv(SEED_VARIABLE, run)
        data = ControlDataModule("pendulum", {"horizon": 5}, envs=4, frames_per_batch=16)
        data.setup("test")
        found = data.rollout(RolloutRequest(_noisy(), "attack", (1,), 0, seed=seed))["observation"]
        assert not data.rank_state_dict()
        return found

    assert torch.equal(collect("1", 9), collect("2", 9))
    assert not torch.equal(collect("1", 9), collect("1", 8))
