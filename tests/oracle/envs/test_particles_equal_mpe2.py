"""Batched particle environments against mpe2 1.1.1: the same states and actions give the same observations and rewards.

The package is put into our start states and both play whole episodes side by side in float64, the scripted mover's
action handed to the package. Errors therefore add up over an episode, and the tolerance still holds.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from datamodules.envs.particles import Adversary, ParticleEnv, Spread, Tag

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
pytest.importorskip("mpe2", reason="extra marl")

TOLERANCE = 1e-4
SCENARIOS = {
    "spread2": (Spread, {"agents": 2}, "simple_spread_v3", {"N": 2}),
    "spread3": (Spread, {"agents": 3}, "simple_spread_v3", {"N": 3}),
    "spread5": (Spread, {"agents": 5, "local_ratio": 0.2}, "simple_spread_v3", {"N": 5, "local_ratio": 0.2}),
    "spread3_common": (Spread, {"local_ratio": 0.0}, "simple_spread_v3", {"local_ratio": 0.0}),
    "tag": (Tag, {}, "simple_tag_v3", {}),
    "tag_large": (
        Tag,
        {"predators": 4, "prey": 2, "obstacles": 3},
        "simple_tag_v3",
        {"num_adversaries": 4, "num_good": 2, "num_obstacles": 3},
    ),
    "adversary": (Adversary, {}, "simple_adversary_v3", {}),
    "adversary3": (Adversary, {"agents": 3}, "simple_adversary_v3", {"N": 3}),
}


def _inject(package, env: ParticleEnv, copy: int) -> None:
    """Put one package environment into the state of ``env``'s copy."""
    world = package.unwrapped.world
    for i, mover in enumerate(world.agents):
        mover.state.p_pos = env._position[:, i, copy].numpy().astype(np.float64).copy()
        mover.state.p_vel = env._velocity[:, i, copy].numpy().astype(np.float64).copy()
    for i, landmark in enumerate(world.landmarks):
        landmark.state.p_pos = env._position[:, env.movers + i, copy].numpy().astype(np.float64).copy()
    if "goal" in env.fields:
        for mover in world.agents:
            mover.goal_a = world.landmarks[int(env.fields["goal"][copy])]


def compare(name: str, episodes: int, seed: int) -> tuple[int, int, float]:
    """Play ``episodes`` episodes in both.

    Returns:
        Steps of the package, how many of them began with bodies in contact, and the largest difference in any
        observation, reward, position or velocity.
    """
    kind, ours, module, theirs = SCENARIOS[name]
    env = kind(episodes, dtype="float64", seed=seed, **ours)
    factory = __import__(f"mpe2.{module}", fromlist=["parallel_env"]).parallel_env
    packages = [factory(max_cycles=env.episode_limit, **theirs) for _ in range(episodes)]
    draws = torch.Generator().manual_seed(seed)
    env.restart()
    # every second episode starts crowded and moving, so that bodies touch and speed limits bind
    crowded = torch.arange(episodes) % 2 == 1
    shrink = torch.where(crowded, 0.3, 1.0)[:, None, None]
    position, landmarks = env._position[:, : env.movers], env._position[:, env.movers :]
    env.place(
        position.permute(2, 1, 0) * shrink,
        torch.randn(episodes, env.movers, 2, generator=draws, dtype=torch.float64) * crowded[:, None, None],
        landmarks.permute(2, 1, 0) * shrink,
        env.fields.get("goal"),
    )
    for copy, package in enumerate(packages):
        package.reset(seed=copy)
        _inject(package, env, copy)
    names = packages[0].possible_agents
    controlled = names[env.controlled]
    worst, touched = 0.0, 0
    for step in range(env.episode_limit):
        actions = torch.randint(5, (episodes, env.num_agents), generator=draws)
        if step % 2:  # the crowd moves one way together, for more contacts
            actions = torch.where(crowded[:, None], torch.full_like(actions, 1 + step // 2 % 4), actions)
        joint = actions.t()
        if env.scripted:
            scripted = env._scripted()
            joint = torch.cat([joint, scripted] if env.controlled.start == 0 else [scripted, joint])
        joint = joint.t().tolist()
        reward, terminated, truncated = env.advance(actions)
        observation = env.observe()[0]
        for copy, package in enumerate(packages):
            before = [(m.state.p_pos.copy(), m.state.p_vel.copy()) for m in package.unwrapped.world.agents]
            seen, paid, ended, cut, _ = package.step(dict(zip(names, joint[copy], strict=True)))
            for i, agent in enumerate(controlled):
                worst = max(worst, float(np.abs(observation[copy, i].numpy() - seen[agent]).max()))
                worst = max(worst, abs(float(reward[copy, i]) - paid[agent]))
            for i, mover in enumerate(package.unwrapped.world.agents):  # the scripted ones too
                worst = max(worst, float(np.abs(env._position[:, i, copy].numpy() - mover.state.p_pos).max()))
                worst = max(worst, float(np.abs(env._velocity[:, i, copy].numpy() - mover.state.p_vel).max()))
            touched += _touching(package, [p for p, _ in before])
            assert bool(terminated[copy]) is ended[controlled[0]] is False
            assert bool(truncated[copy]) is cut[controlled[0]]
    return episodes * env.episode_limit, touched, worst


def _touching(package, positions: list[np.ndarray]) -> bool:
    """Whether two colliding bodies overlapped before the step."""
    world = package.unwrapped.world
    bodies = [*zip(world.agents, positions, strict=True), *((mark, mark.state.p_pos) for mark in world.landmarks)]
    return any(
        a.collide and b.collide and float(np.linalg.norm(p - q)) < a.size + b.size
        for i, (a, p) in enumerate(bodies)
        for b, q in bodies[:i]
        if a.movable or b.movable
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_particles_equal_mpe2(name):
    steps, touched, worst = compare(name, episodes=24, seed=1)
    assert worst < TOLERANCE
    if SCENARIOS[name][0] is not Adversary:  # where nothing collides
        assert touched > 0.02 * steps


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCENARIOS)
def test_particles_equal_mpe2_over_100_000_steps(name):
    total, touches, worst = 0, 0, 0.0
    while total < 100_000:
        steps, touched, difference = compare(name, episodes=200, seed=1000 + total)
        total, touches, worst = total + steps, touches + touched, max(worst, difference)
    print(f"{name}: {total} package steps, {touches} in contact, largest difference {worst:.1e}")
    assert worst < TOLERANCE


@pytest.mark.parametrize("name", ["spread3", "tag", "adversary"])
def test_random_play_returns_what_mpe2s_does(name):
    """Starts come from our own draws: mean return of random play, prey and adversary random too, within 5 errors."""
    kind, ours, module, theirs = SCENARIOS[name]
    draws = torch.Generator().manual_seed(7)

    class Aimless(kind):
        def _scripted(self):
            return torch.randint(5, (self.scripted, self.envs), generator=draws)

    env = Aimless(4000, seed=11, **ours)
    env.restart()
    mine = torch.zeros(4000)
    for _ in range(25):
        mine += env.advance(torch.randint(5, (4000, env.num_agents), generator=draws))[0].mean(1)
    package = __import__(f"mpe2.{module}", fromlist=["parallel_env"]).parallel_env(**theirs)
    controlled = package.possible_agents[env.controlled]
    returns = []
    for episode in range(150):
        package.reset(seed=episode)
        total = 0.0
        while package.agents:
            joint = torch.randint(5, (len(package.agents),), generator=draws).tolist()
            reward = package.step(dict(zip(package.agents, joint, strict=True)))[1]
            total += float(np.mean([reward[agent] for agent in controlled]))
        returns.append(total)
    error = np.hypot(np.std(returns) / len(returns) ** 0.5, float(mine.std()) / 4000**0.5)
    assert abs(float(mine.mean()) - np.mean(returns)) < 5 * error
