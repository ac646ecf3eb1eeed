"""Batched particle environments: layouts, rewards and scripts by hand, episodes, snapshots."""

from __future__ import annotations

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from datamodules.envs.particles import Adversary, ParticleEnv, Spread, Tag, approach, flee

ALL = [Spread, Tag, Adversary]


def still(env: ParticleEnv, position: list[list[float]], landmarks: list[list[float]], **goal: torch.Tensor) -> None:
    """Put every copy into one state at rest."""
    env.place(
        torch.tensor(position).expand(env.envs, -1, -1),
        torch.zeros(env.envs, env.movers, 2),
        torch.tensor(landmarks).reshape(1, -1, 2).expand(env.envs, -1, -1),
        **goal,
    )


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_specs_hold(kind, dtype):
    check_env_specs(kind(3, dtype=dtype, seed=1), break_when_any_done="both")


@pytest.mark.parametrize("kind", ALL)
def test_an_episode_is_truncated_at_its_limit(kind):
    env = kind(2, episode_limit=3)
    env.restart()
    flags = [env.advance(torch.zeros(2, env.num_agents, dtype=torch.int64))[1:] for _ in range(3)]
    assert [bool(cut.all()) for _, cut in flags] == [False, False, True]
    assert not any(bool(ended.any()) for ended, _ in flags)


def test_actions_push_left_right_down_up():
    env = Spread(5, agents=1)
    still(env, [[0.0, 0.0]], [[0.5, 0.5]])
    env.advance(torch.arange(5).unsqueeze(1))
    velocity = env.observe()[0][:, 0, :2]  # 5 * 0.1 from rest
    assert torch.allclose(velocity, torch.tensor([[0.0, 0], [-0.5, 0], [0.5, 0], [0, -0.5], [0, 0.5]]))
    env.advance(torch.zeros(5, 1, dtype=torch.int64))
    observation = env.observe()[0][:, 0]
    assert torch.allclose(observation[:, :2], velocity * 0.75)
    assert torch.allclose(observation[:, 2:4], velocity * 0.1)


def test_spread_observation_and_reward_by_hand():
    env = Spread(1, agents=2)
    still(env, [[0.0, 0.0], [0.3, 0.4]], [[0.0, 0.1], [-1.0, 0.0]])
    seen = env.observe()[0][0]
    assert torch.allclose(seen[1], torch.tensor([0, 0, 0.3, 0.4, -0.3, -0.3, -1.3, -0.4, -0.3, -0.4, 0, 0]))
    assert torch.allclose(env._reward(), torch.full((1, 2), -0.5 * 1.1))  # nearest: 0.1 and 1.0
    still(env, [[0.0, 0.0], [0.0, 0.2]], [[0.0, 0.0], [0.0, 0.2]])  # covered, and overlapping by 0.1
    assert torch.allclose(env._reward(), torch.full((1, 2), -0.5))


def test_spread_rewards_are_common_at_ratio_zero_only():
    assert Spread(1, local_ratio=0.0).common_reward
    assert not Spread(1).common_reward
    env = Spread(1, agents=3, local_ratio=1.0)
    still(env, [[0.0, 0.0], [0.1, 0.0], [0.9, 0.9]], [[0.0, 0.0]] * 3)
    assert env._reward().tolist() == [[-1.0, -1.0, 0.0]]


def test_bodies_in_contact_part_and_others_do_not_feel_each_other():
    env = Tag(1, predators=1, prey=1, obstacles=1)
    still(env, [[0.0, 0.0], [0.1, 0.0]], [[-0.9, -0.9]])  # touch at 0.125
    env.move(torch.zeros(2, 1, dtype=torch.int64))
    # 100 * 0.025 of overlap on mass 1 over 0.1 seconds
    assert torch.allclose(env._velocity[0, :, 0], torch.tensor([-0.25, 0.25]), atol=1e-4)
    still(env, [[0.0, 0.0], [0.5, 0.0]], [[-0.9, -0.9]])
    env.move(torch.zeros(2, 1, dtype=torch.int64))
    assert bool((env._velocity == 0).all())


def test_tag_pays_every_predator_for_every_touch():
    env = Tag(1, predators=2, prey=2, obstacles=0)
    still(env, [[0.0, 0.0], [0.05, 0.0], [0.1, 0.0], [0.9, 0.9]], [])
    assert env._reward().tolist() == [[20.0, 20.0]]


def test_tag_speeds_are_limited():
    env = Tag(4)
    env.restart()
    fast = torch.zeros(4, env.movers, 2)
    fast[..., 0] = 5.0
    env.place(torch.rand(4, env.movers, 2), fast, torch.full((4, 2, 2), -0.9))
    env.move(torch.zeros(env.movers, 4, dtype=torch.int64))
    speed = env._velocity.square().sum(0).sqrt()
    assert torch.allclose(speed, torch.tensor([1.0, 1.0, 1.0, 1.3]).unsqueeze(1).expand(4, 4))


def test_adversary_observation_and_reward_by_hand():
    env = Adversary(2)
    still(env, [[0.5, 0.0], [0.0, 0.0], [0.0, 0.3]], [[0.0, 0.1], [1.0, 0.0]], goal=torch.tensor([0, 1]))
    first, second = env.observe()[0][:, 0]
    assert torch.allclose(first, torch.tensor([0, 0.1, 0, 0.1, 1, 0, 0.5, 0, 0, 0.3]))
    assert torch.allclose(second[:2], torch.tensor([1.0, 0.0]))
    assert torch.allclose(env._reward()[0], torch.tensor(0.26**0.5 - 0.1))
    assert torch.allclose(env._reward()[1], torch.tensor(0.5 - 1.0))


def test_prey_flees_from_the_nearest_predator_but_not_off_the_field():
    still_ones = torch.zeros(2, 1, 4)
    prey = torch.tensor([[0.0, 0.0, 0.0, 0.89], [0.0, 0.0, 0.0, 0.0]]).unsqueeze(1)
    predators = torch.tensor([[0.3, 0.0, -0.3, 0.6], [0.0, 0.3, 0.0, 0.0]]).unsqueeze(1)
    chosen = flee(prey, still_ones, predators, still_ones)[0].tolist()
    assert chosen[:3] == [1, 3, 2]
    assert chosen[3] in (3, 4)  # at the right edge it slips along it


def test_adversary_heads_for_the_landmark_with_an_agent_and_brakes():
    landmarks = torch.tensor([[-0.8, 0.8], [0.0, 0.0]]).unsqueeze(-1)  # left and right
    agents = torch.tensor([[0.7], [0.1]]).unsqueeze(-1)
    at = torch.zeros(2, 1, 1)
    rest = torch.zeros(2, 1, 1)
    assert approach(at, rest, agents, landmarks).item() == 2
    assert approach(at, rest, -agents, landmarks).item() == 1
    assert approach(landmarks[:, 1:], rest, agents, landmarks).item() == 0
    rushing = torch.tensor([[3.0], [0.0]]).unsqueeze(-1)  # would coast 1.2 to the right, past the landmark at 0.8
    assert approach(at, rushing, agents, landmarks).item() == 1


def test_scripts_make_the_tasks_harder_than_standing_still():
    """Random predators touch a fleeing prey less often than one that stands still."""

    class Standing(Tag):
        def _scripted(self):
            return torch.zeros(1, self.envs, dtype=torch.int64)

    touches = []
    for kind in (Tag, Standing):
        env = kind(512, seed=3)
        env.restart()
        draws = torch.Generator().manual_seed(0)
        rewards = [env.advance(torch.randint(5, (512, 3), generator=draws))[0] for _ in range(25)]
        touches.append(float(torch.stack(rewards).mean()))
    assert touches[0] < 0.5 * touches[1]


@pytest.mark.parametrize("kind", ALL)
def test_a_snapshot_goes_on_exactly(kind):
    env = kind(6, seed=5)
    draws = torch.Generator().manual_seed(0)
    actions = torch.randint(5, (40, 6, env.num_agents), generator=draws)

    def play(env, steps):
        seen = []
        for joint in steps:
            reward, _, truncated = env.advance(joint)
            rows = truncated.nonzero().squeeze(1)
            if len(rows):
                env.restart(rows)
            seen += [reward, *env.observe()]
        return seen

    env.restart()
    env.advance(actions[0])
    env.restart(torch.tensor([1, 4]))
    play(env, actions[:10])
    kept = env.snapshot()
    wanted = play(env, actions[10:])
    other = kind(6, seed=99)
    other.restore(kept)
    got = play(other, actions[10:])
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_rows_restart_alone_and_are_observed_alone(kind):
    env = kind(4, seed=2)
    env.restart()
    before = env.observe()[0]
    rows = torch.tensor([1, 3])
    env.restart(rows)
    after = env.observe()[0]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])
    assert torch.equal(env.observe(rows)[0], after[rows])


def test_starts_are_uniform():
    env = Tag(4000, seed=1)
    env.restart()
    movers, landmarks = env._position[:, : env.movers].flatten(), env._position[:, env.movers :].flatten()
    for values, half in ((movers, 1.0), (landmarks, 0.9)):
        assert values.abs().max() <= half
        assert float(values.mean()) == pytest.approx(0.0, abs=0.02)
        assert float(values.var()) == pytest.approx(half**2 / 3, rel=0.03)
    adversary = Adversary(4000, agents=3, seed=1)
    adversary.restart()
    assert adversary.fields["goal"].bincount().tolist() == pytest.approx([4000 / 3] * 3, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Spread, {"agents": 0}, "Spread: agents must be >= 1, got 0"),
        (Spread, {"local_ratio": 1.5}, r"Spread: local_ratio: in \[0, 1\], got 1.5"),
        (Spread, {"local_ratio": float("nan")}, "Spread: local_ratio"),
        (Tag, {"predators": 0}, "Tag: predators must be >= 1"),
        (Tag, {"obstacles": -1}, "Tag: obstacles must be >= 0"),
        (Adversary, {"agents": 0}, "Adversary: agents must be >= 1"),
        (Spread, {"dtype": "float16"}, "Spread: dtype: float32 or float64, got 'float16'"),
        (Spread, {"envs": 0}, "Spread: envs must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"envs": 2, **arguments})


@pytest.mark.parametrize("kind", ALL)
def test_float32_steps_as_float64_does(kind):
    """Each step from the same state; a reward may differ only where a distance is at the threshold of a touch."""
    double, single = kind(512, dtype="float64", seed=4), kind(512, seed=4)
    double.restart()
    draws = torch.Generator().manual_seed(1)
    differing = 0
    for _ in range(25):
        movers = double.movers
        single.place(
            double._position[:, :movers].permute(2, 1, 0),
            double._velocity.permute(2, 1, 0),
            double._position[:, movers:].permute(2, 1, 0),
            double.fields.get("goal"),
        )
        joint = torch.randint(5, (movers, 512), generator=draws)
        double.move(joint)
        single.move(joint)
        assert (double.observe()[0] - single.observe()[0]).abs().max() < 1e-4
        differing += int(((double._reward() - single._reward()).abs() > 1e-4).sum())
    assert differing <= 2
