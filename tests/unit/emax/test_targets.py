"""Targets against numbers worked out by hand, and against plain loops over members, items and agents."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from emax_batches import make_batch, make_learner, make_spec, sequential, with_ids
from tensordict import TensorDict
from torch import Tensor

from modules.emax import AgentNetwork, Ensemble, Mixing, Reward, Target, ValueMARL
from modules.emax.acting import greedy_value

KINDS = ("mean_online", "mean_target", "own_online", "own_target")


def _by_hand(kind: str, reduce: str, terminated: bool = False, legal: list[bool] | None = None) -> Tensor:
    """The sheet's numbers: one agent, K = 2, Q1 = [1, 4], Q2 = [3, 0] everywhere, r = 1, gamma = 0.5; ``[members]``."""
    spec = make_spec(agents=1, actions=2, features=1, restricts_actions=legal is not None)
    learner = make_learner(
        spec,
        ensemble=Ensemble(2, separate_batches=False),
        target=Target(kind=kind, reduce=reduce, double_q=False),  # pyright: ignore[reportArgumentType]
        gamma=0.5,
    )
    weights = torch.zeros_like(learner.online)
    learner.agents.views(weights)["bias_2"].copy_(torch.tensor([[1.0, 4.0], [3.0, 0.0]]))  # a view
    with torch.no_grad():
        learner.online.copy_(weights)
        if learner.target.lagged:
            learner.get_buffer("lagged").copy_(weights)
    part = {
        "observation": torch.randn(1, 1, 2, 1, 1),
        "action": torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        "reward": torch.ones(1, 1, 1, 1),
        "terminated": torch.full((1, 1, 1), terminated),
        "filled": torch.ones(1, 1, 1, dtype=torch.bool),
    }
    if legal is not None:
        part["legal"] = torch.tensor(legal).expand(1, 1, 2, 1, 2)
    return learner.targets(TensorDict(part, [1, 1])).flatten()


@pytest.mark.parametrize("kind", ["mean_online", "mean_target"])
def test_ensemble_target_by_hand(kind):
    assert _by_hand(kind, "max_of_mean").tolist() == [2.0]  # mean [2, 2], max 2
    assert _by_hand(kind, "mean_of_max").tolist() == [2.75]  # maxima 4 and 3, mean 3.5
    assert _by_hand(kind, "max_of_mean", terminated=True).tolist() == [1.0]
    assert _by_hand(kind, "mean_of_max", terminated=True).tolist() == [1.0]


@pytest.mark.parametrize("kind", ["own_online", "own_target"])
def test_own_target_by_hand(kind):
    assert _by_hand(kind, "max_of_mean").tolist() == [3.0, 2.5]
    assert _by_hand(kind, "max_of_mean", terminated=True).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_unavailable_actions_never_enter_a_target(kind):
    only_first = _by_hand(kind, "max_of_mean", legal=[True, False])
    assert only_first.tolist() == ([2.0] if kind.startswith("mean") else [1.5, 2.5])
    assert _by_hand(kind, "mean_of_max", legal=[True, False]).tolist() == only_first.tolist()
    # nothing available: an agent that is out is worth nothing more
    assert set(_by_hand(kind, "max_of_mean", legal=[False, False]).tolist()) == {1.0}


def test_double_q_gives_nothing_where_nothing_is_available():
    values, chooser = torch.tensor([[5.0, 7.0]]), torch.tensor([[1.0, 0.0]])
    assert float(greedy_value(values, chooser, torch.tensor([[True, True]]))) == 5.0
    assert float(greedy_value(values, chooser, torch.tensor([[False, True]]))) == 7.0
    assert float(greedy_value(values, chooser, torch.tensor([[False, False]]))) == 0.0


def test_truncated_steps_bootstrap_and_terminated_ones_do_not():
    """A batch has only ``terminated``: at a time limit that truncates it is False, and the target looks ahead."""
    spec = make_spec()
    learner = make_learner(spec, ensemble=Ensemble(3, separate_batches=False), target=Target(kind="mean_online"))
    part = make_batch(spec, items=16)
    part["terminated"] = torch.zeros(1, 16, 1, dtype=torch.bool)
    truncated = learner.targets(part)
    part["terminated"] = torch.ones(1, 16, 1, dtype=torch.bool)
    terminated = learner.targets(part)
    torch.testing.assert_close(terminated, part["reward"].sum(-1, keepdim=True))
    ahead = learner._next_values(part, None).sum(-1, keepdim=True)
    torch.testing.assert_close(truncated, terminated + 0.99 * ahead)
    assert float(ahead.abs().min()) > 0.0


@pytest.mark.parametrize("restricts", [False, True])
def test_max_of_mean_is_at_most_mean_of_max(restricts):
    spec = make_spec(restricts_actions=restricts)
    part = make_batch(spec, items=500)
    part["observation"] *= 10.0  # or output biases alone would choose

    def ahead(reduce: Any) -> Tensor:
        target = Target(kind="mean_online", reduce=reduce)
        learner = make_learner(spec, ensemble=Ensemble(2, separate_batches=False), target=target)
        return learner._next_values(part, None)

    inner, outer = ahead("max_of_mean"), ahead("mean_of_max")
    assert bool((inner <= outer + 1e-6).all())
    assert bool((inner < outer - 1e-3).any())
    # equal where all members agree on the best action
    learner = make_learner(spec, ensemble=Ensemble(2, separate_batches=False))
    values = learner.agents.sequence(learner.online.detach(), part["observation"][0])[:, :, 1:]
    if restricts:
        values = torch.where(part["legal"][0, :, 1:], values, -torch.inf)
    best = values.argmax(-1)
    agree = (best == best[0]).all(0)
    assert 0 < int(agree.sum()) < agree.numel()
    torch.testing.assert_close(inner[0][agree], outer[0][agree])


CASES = list(
    product(KINDS, ("max_of_mean", "mean_of_max"), (False, True), ("none", "vdn", "qmix"), (False, True), (False, True))
)


def _mix(learner: ValueMARL, flat: Tensor, member: int, values: Tensor, state: Tensor) -> Tensor:
    """Joint value ``[1]`` of one step's ``values`` ``[agents]`` by the mixer that serves ``member``."""
    row = member if flat.shape[0] > 1 else 0
    return learner.mixer.mix(flat[row : row + 1], values.view(1, 1, -1), state.view(1, 1, -1)).view(1)


@pytest.mark.parametrize(("kind", "reduce", "double", "mixing", "separate", "per_member"), CASES)
def test_targets_equal_a_plain_loop(kind, reduce, double, mixing, separate, per_member):
    """All kinds of targets, one item, member and agent at a time, with lagged weights that differ from the online."""
    spec = make_spec(restricts_actions=True, own_state=True, state_size=4)
    members = 3
    learner = make_learner(
        spec,
        ensemble=Ensemble(members, separate_batches=separate),
        target=Target(kind=kind, reduce=reduce, double_q=double),
        mixing=Mixing(mixing, per_member=per_member, embed=4, hypernet_hidden=8),
        reward=Reward("none" if mixing == "none" else "mean"),
        network=AgentNetwork(hidden=8, share_agents=mixing != "vdn"),
        gamma=0.9,
    )
    if learner.target.lagged:
        other = make_learner(spec, 1, ensemble=learner.ensemble, mixing=learner.mixing, network=learner.network)
        learner.get_buffer("lagged").copy_(other.online.detach())
        learner.get_buffer("lagged_mixer").copy_(other.online_mixer.detach())
    part = make_batch(spec, members if separate else 1, items=3)
    got = learner.targets(part)
    lagged = learner.get_buffer("lagged") if learner.target.lagged else learner.online.detach()
    mixer = learner.get_buffer("lagged_mixer") if learner.target.lagged else learner.online_mixer.detach()

    def utilities(flat: Tensor, member: int, minibatch: int, item: int, agent: int) -> Tensor:
        net = sequential(learner, member, 0 if learner.network.share_agents else agent, flat)
        values = net(with_ids(part["observation"][minibatch, item, 1])[agent]).detach()
        return torch.where(part["legal"][minibatch, item, 1, agent], values, -torch.inf)

    everyone = range(members)
    for row, item in product(range(got.shape[0]), range(3)):
        own = kind.startswith("own")
        batch = row if separate else 0
        ahead = []
        for agent in range(3):
            args = (batch, item, agent)
            if own:
                values = utilities(lagged, row, *args)
                by = utilities(learner.online, row, *args) if double and kind == "own_target" else values
                ahead.append(values[by.argmax()])
                continue
            each = torch.stack([utilities(lagged, k, *args) for k in everyone])
            by = each
            if double and kind == "mean_target":
                by = torch.stack([utilities(learner.online, k, *args) for k in everyone])
            if reduce == "max_of_mean":
                ahead.append(each.mean(0)[by.mean(0).argmax()])
            else:
                ahead.append(torch.stack([each[k, by[k].argmax()] for k in everyone]).mean())
        value = torch.stack(ahead)
        reward = part["reward"][batch, item, 0]
        if mixing == "none":
            expected = reward + 0.9 * value * (not part["terminated"][batch, item, 0])
        else:
            state = part["state"][batch, item, 1]
            averaged = everyone if per_member and not own else [row if own else 0]
            joint = torch.stack([_mix(learner, mixer, k, value, state) for k in averaged]).mean(0)
            expected = reward.mean() + 0.9 * joint * (not part["terminated"][batch, item, 0])
        torch.testing.assert_close(got[row, item, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "double"), list(product(KINDS, (False, True))))
@pytest.mark.parametrize("separate", [False, True])
def test_recurrent_targets_equal_feed_forward_code_on_the_same_utilities(kind, double, separate):
    """With histories, the next step's utilities are those of the whole sequence, one step on."""
    spec = make_spec(restricts_actions=True)
    learner = make_learner(
        spec,
        ensemble=Ensemble(3, separate_batches=separate),
        target=Target(kind=kind, double_q=double),
        network=AgentNetwork(hidden=8, recurrent=True),
        mixing=Mixing("vdn"),
    )
    if learner.target.lagged:
        learner.get_buffer("lagged").copy_(torch.randn_like(learner.online) * 0.3)
    part = make_batch(spec, 3 if separate else 1, items=4, steps=5)
    online_next = None
    if separate or not kind.startswith("mean"):
        seen = part["observation"] if separate else part["observation"][0]
        online_next = learner.utilities(learner.online.detach(), seen)[:, :, 1:]
    with torch.no_grad():
        shortcut, whole = learner.targets(part, online_next), learner.targets(part, None)
    torch.testing.assert_close(shortcut, whole)
    flat = learner.get_buffer("lagged") if learner.target.lagged else learner.online.detach()
    if not double and kind.startswith("mean"):
        for minibatch in range(len(part["observation"])):
            values = learner.agents.sequence(flat, part["observation"][minibatch]).mean(0)[:, 1:]
            best = torch.where(part["legal"][minibatch, :, 1:], values, -torch.inf).amax(-1).sum(-1)
            alive = (~part["terminated"][minibatch]).float()
            expected = part["reward"][minibatch].sum(-1) + 0.99 * alive * best
            torch.testing.assert_close(whole[minibatch, ..., 0], expected)


def test_targets_carry_no_gradient():
    spec = make_spec()
    for kind in KINDS:
        learner = make_learner(spec, ensemble=Ensemble(2), target=Target(kind=kind), mixing=Mixing("qmix"))
        assert not learner.targets(make_batch(spec, 2)).requires_grad
