"""PPO's gradients in closed form against autograd, and the optimiser's kernel against the optimiser."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modules.control.learner import PPOLearner, Rows
from modules.control.players import PlayerNetworks
from modules.control.ppo_settings import PPOSettings


def _learner(settings, hidden):
    learner = PPOLearner(PlayerNetworks(5, 3, hidden, False, 0.6, 5), settings, "agent")
    learner.begin((4,))
    with torch.no_grad():  # a policy that is not near its start, so that ratios leave the interval on both sides
        learner.policy.flat += 0.3 * torch.randn(learner.policy.flat.shape, generator=torch.Generator().manual_seed(5))
    return learner


@pytest.mark.parametrize("rows", [7, 64, 600])
@pytest.mark.parametrize("hidden", [[8], [64, 64], [16, 16, 16]])
@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_a_step_equals_autograds(rows, hidden, value_clip):
    settings = PPOSettings(lr=1e-3, value_lr=1e-3, entropy=0.01, value_clip=value_clip)
    closed, plain = _learner(settings, hidden), _learner(settings, hidden)
    g = torch.Generator().manual_seed(rows)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    batch = Rows(draw(rows, 5), draw(rows, 3), draw(rows) - 3.0, draw(rows), draw(rows), draw(rows))
    taken = {}
    for name, learner in (("closed", closed), ("plain", plain)):
        for part in ("policy", "value"):
            one = getattr(learner, part)
            one.descend = lambda slope, count, *rest, key=(name, part): taken.update({key: slope / count}) or {
                "gradient_norm": slope.norm(dim=1), "value_loss": slope.norm(dim=1)
            }  # fmt: skip
    closed._closed_step(batch, None, True)
    plain._autograd_step(batch, None, None, True)
    for part in ("policy", "value"):
        assert float(taken["plain", part].abs().max()) > 1e-4
        torch.testing.assert_close(taken["closed", part], taken["plain", part], atol=2e-6, rtol=2e-5)


def test_metrics_equal_autograds():
    settings = PPOSettings(entropy=0.01)
    closed, plain = _learner(settings, [8]), _learner(settings, [8])
    g = torch.Generator().manual_seed(0)
    batch = Rows(*(torch.randn(*shape, generator=g) for shape in ((50, 5), (50, 3), (50,), (50,), (50,), (50,))))
    mine, theirs = closed._closed_step(batch, None, True), plain._autograd_step(batch, None, None, True)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_many_steps_of_the_kernel_equal_the_optimiser():
    """The first step is the optimiser's own, later ones its kernel's: weights and moments as torch.optim.Adam's."""
    settings = replace(PPOSettings(), lr=1e-2)
    learner = _learner(settings, [8])
    weights = learner.policy.flat.detach().clone().requires_grad_()
    adam = torch.optim.Adam([weights], lr=1e-2, eps=1e-5, fused=True)
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        slope = torch.randn(weights.shape, generator=g)
        learner.policy.descend(slope * 4.0, torch.tensor([4.0]))
        weights.grad = slope
        adam.step()
    assert torch.equal(learner.policy.flat, weights)
    mine, theirs = learner.policy.optimiser.state[learner.policy.flat], adam.state[weights]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(mine[name], theirs[name])
