"""An ensemble against what it must reduce to: clones, separate networks, independent runs, and one agent."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from emax_batches import adam, make_batch, make_learner, make_spec, sequential, update, with_ids
from tensordict import TensorDict
from torch import Tensor

from modules.emax import AgentNetwork, Clip, Ensemble, Mixing, Reward, Target, ValueMARL

KINDS = ("mean_online", "mean_target", "own_online", "own_target")
MEMBERS = 4


def _set_members(learner: ValueMARL, weights: Tensor, mixers: Tensor | None = None) -> None:
    """Online and lagged weights all from ``weights`` ``[1 or members, size]``."""
    with torch.no_grad():
        learner.online.copy_(weights.expand_as(learner.online))
        if mixers is not None:
            learner.online_mixer.copy_(mixers.expand_as(learner.online_mixer))
        if learner.target.lagged:
            learner.get_buffer("lagged").copy_(learner.online)
            learner.get_buffer("lagged_mixer").copy_(learner.online_mixer)


# -- clones -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "mixing", "recurrent"), list(product(KINDS, ("none", "vdn", "qmix"), (False, True))))
def test_clones_on_one_minibatch_learn_as_one_network_does(kind, mixing, recurrent):
    """Deviation 0, K times the loss, each gradient the single network's; and they stay equal for ever."""
    spec = make_spec(restricts_actions=True)
    settings: dict[str, Any] = {
        "target": Target(kind, double_q=kind == "own_target", update_every=2),
        "network": AgentNetwork(hidden=8, recurrent=recurrent),
        "mixing": Mixing(mixing, per_member=True, embed=4, hypernet_hidden=8),
        "clip": Clip(0.5),
        "learning_rate": 1e-2,
    }
    one = make_learner(spec, ensemble=Ensemble(1), **settings)
    many = make_learner(spec, seed=1, ensemble=Ensemble(MEMBERS, separate_batches=False), **settings)
    _set_members(many, one.online.detach().clone(), one.online_mixer.detach().clone())
    steps_one, steps_many = adam(one), adam(many)
    for number in range(5):
        part = make_batch(spec, items=16, steps=4 if recurrent else 1, seed=number)
        single, _, _ = one.losses(part)
        losses, _, values = many.losses(part)
        assert torch.equal(values, values[:1].expand_as(values))
        torch.testing.assert_close(losses, single.expand(MEMBERS), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(losses.sum(), MEMBERS * single.sum(), rtol=1e-5, atol=1e-6)
        (alone,) = torch.autograd.grad(single.sum(), one.online)
        (each,) = torch.autograd.grad(losses.sum(), many.online)
        torch.testing.assert_close(each, alone.expand_as(each), rtol=1e-4, atol=1e-6)
        update(one, steps_one, part, number)
        update(many, steps_many, part, number)
        assert torch.equal(many.online, many.online[:1].expand_as(many.online))
    torch.testing.assert_close(many.online, one.online.expand_as(many.online), rtol=1e-3, atol=1e-5)


# -- stacked = looped -------------------------------------------------------------------------------------------------
def _looped(learner: ValueMARL, nets: list[torch.nn.Sequential], lagged: list[torch.nn.Sequential], part: TensorDict):
    """VDN-EMAX as plain code: a loss a member from networks of its own; ``lagged`` make the averaged target."""
    with torch.no_grad():
        following = with_ids(part["observation"][:, :, 1])
        mean = torch.stack([net(following) for net in lagged]).mean(0)
        mean = torch.where(part["legal"][:, :, 1], mean, -torch.inf)
        alive = (~part["terminated"][:, :, 0]).float()
        target = part["reward"][:, :, 0].sum(-1) + learner.gamma * alive * mean.amax(-1).sum(-1)
    losses = []
    for member, net in enumerate(nets):
        values = net(with_ids(part["observation"][member, :, 0]))
        chosen = values.gather(-1, part["action"][member, :, 0].unsqueeze(-1)).squeeze(-1).sum(-1)
        losses.append((chosen - target[member]).square().mean())
    return losses


@pytest.mark.parametrize("clip", [0.1, 10.0, None])
def test_stacked_members_equal_separate_networks(clip):
    """Utilities within 1e-6; losses and ten steps of clipped Adam with minibatches of their own, within 1e-6 a step."""
    spec = make_spec(restricts_actions=True)
    learner = make_learner(
        spec,
        ensemble=Ensemble(MEMBERS),
        target=Target("mean_target", double_q=False, update_every=3),
        network=AgentNetwork(hidden=16),
        clip=Clip(clip, "member"),
        learning_rate=1e-3,
    )
    nets = [sequential(learner, k) for k in range(MEMBERS)]
    lagged = [sequential(learner, k) for k in range(MEMBERS)]
    steps = adam(learner)
    theirs = [torch.optim.Adam(net.parameters(), lr=learner.learning_rate, eps=learner.adam_eps) for net in nets]
    for number in range(10):
        part = make_batch(spec, MEMBERS, items=16, seed=number)
        if number and number % 3 == 0:
            for copy, net in zip(lagged, nets, strict=True):
                copy.load_state_dict(net.state_dict())
        seen = part["observation"][:, :, 0]
        values = torch.stack([net(with_ids(rows)) for net, rows in zip(nets, seen, strict=True)])
        torch.testing.assert_close(learner.agents.apply(learner.online, seen), values, rtol=0.0, atol=1e-6)
        expected = _looped(learner, nets, lagged, part)
        losses = update(learner, steps, part, number)
        torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)
        for net, optimizer, loss in zip(nets, theirs, expected, strict=True):
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
        for member, net in enumerate(nets):
            for ours, other in zip(sequential(learner, member).parameters(), net.parameters(), strict=True):
                torch.testing.assert_close(ours, other, rtol=0.0, atol=1e-6 * (number + 1))


# -- own_target: K independent runs -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mixing", "recurrent", "share"), list(product(("none", "vdn", "qmix"), (False, True), (True, False)))
)
def test_own_targets_with_own_minibatches_are_independent_runs(mixing, recurrent, share):
    """K members of the base algorithm side by side end where K runs of one member each do."""
    spec = make_spec(restricts_actions=True)
    settings: dict[str, Any] = {
        "target": Target("own_target", double_q=True, update_every=3),
        "network": AgentNetwork(hidden=8, recurrent=recurrent, share_agents=share),
        "mixing": Mixing(mixing, per_member=True, embed=4, hypernet_hidden=8),
        "reward": Reward("none" if mixing == "none" else "sum"),
        "clip": Clip(0.5, "member"),
        "learning_rate": 1e-2,
    }
    many = make_learner(spec, ensemble=Ensemble(MEMBERS), **settings)
    runs = []
    for member in range(MEMBERS):
        run = make_learner(spec, ensemble=Ensemble(1), **settings)
        rows = slice(member, member + 1)
        _set_members(run, many.online.detach()[rows].clone(), many.online_mixer.detach()[rows].clone())
        runs.append((run, adam(run)))
    steps = adam(many)
    for number in range(8):
        part = make_batch(spec, MEMBERS, items=16, steps=4 if recurrent else 1, seed=number)
        losses = update(many, steps, part, number)
        for member, (run, optimizer) in enumerate(runs):
            alone = update(run, optimizer, part[member : member + 1], number)
            torch.testing.assert_close(losses[member], alone[0], rtol=1e-4, atol=1e-5)
    for member, (run, _) in enumerate(runs):
        torch.testing.assert_close(many.online[member], run.online[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(many.online_mixer[member], run.online_mixer[0], rtol=1e-3, atol=1e-5)


def test_global_clipping_does_tie_members_together():
    """Why ``member`` is the default: with one norm over all, a member's step depends on the others' gradients."""
    spec = make_spec()
    for scope, tied in (("member", False), ("global", True)):
        weights = []
        for size in (1.0, 100.0):  # of what the other members learn from
            clip = Clip(0.5, scope)  # pyright: ignore[reportArgumentType]
            learner = make_learner(spec, ensemble=Ensemble(2), target=Target("own_target"), clip=clip)
            optimizer = torch.optim.SGD([learner.online], lr=0.1)
            part = make_batch(spec, 2)
            part["reward"][1] *= size
            update(learner, optimizer, part)
            weights.append(learner.online.detach()[0])
        assert torch.equal(*weights) is not tied


# -- one agent, one member --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_one_agent_makes_vdn_an_independent_learner(kind):
    spec = make_spec(agents=1)
    settings: dict[str, Any] = {"ensemble": Ensemble(3), "target": Target(kind), "learning_rate": 1e-2}
    vdn = make_learner(spec, mixing=Mixing("vdn"), **settings)
    idqn = make_learner(spec, mixing=Mixing("none"), **settings)
    steps = adam(vdn), adam(idqn)
    for number in range(5):
        part = make_batch(spec, 3, seed=number)
        update(vdn, steps[0], part, number)
        update(idqn, steps[1], part, number)
    assert torch.equal(vdn.online, idqn.online)


def test_one_member_averages_over_itself():
    """``mean_online`` with K = 1 is Q-learning without a target network; ``mean_target`` is ``own_target``."""
    spec = make_spec(restricts_actions=True)
    for mean, own in (("mean_online", "own_online"), ("mean_target", "own_target")):
        for mixing, double in product(("none", "vdn", "qmix"), (False, True)):
            learners = [
                make_learner(spec, target=Target(kind, double_q=double), mixing=Mixing(mixing), learning_rate=1e-2)  # pyright: ignore
                for kind in (mean, own)
            ]
            steps = [adam(learner) for learner in learners]
            for number in range(4):
                part = make_batch(spec, seed=number)
                for learner, optimizer in zip(learners, steps, strict=True):
                    update(learner, optimizer, part, number)
            assert torch.equal(learners[0].online, learners[1].online)
    part = make_batch(spec)
    learner = make_learner(spec, target=Target("mean_online"), gamma=0.5, mixing=Mixing("vdn"))
    values = sequential(learner, 0)(with_ids(part["observation"][0, :, 1]))
    best = torch.where(part["legal"][0, :, 1], values, -torch.inf).amax(-1).sum(-1)
    expected = part["reward"][0, :, 0].sum(-1) + 0.5 * best * (~part["terminated"][0, :, 0])
    torch.testing.assert_close(learner.targets(part)[0, :, 0, 0], expected.detach())
