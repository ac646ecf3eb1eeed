from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from modules.networks.stacked_agents import StackedAgents, StackedGRU

SHAPES = list(product((False, True), (False, True)))  # share_agents, agent_id


def _agents(recurrent: bool, share: bool = True, agent_id: bool = True, members: int = 3) -> StackedAgents:
    return StackedAgents(members, 4, 5, 6, hidden=7, recurrent=recurrent, share_agents=share, agent_id=agent_id)


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _torch_gru(agents: StackedAgents, flat: torch.Tensor, row: int) -> tuple[nn.Linear, nn.GRU, nn.Linear]:
    """The same network out of torch's own layers."""
    params = {name: value[row] for name, value in agents.views(flat).items()}
    enter, leave = nn.Linear(*params["weight_in"].shape), nn.Linear(*params["weight_out"].shape)
    gru = nn.GRU(agents.hidden, agents.hidden, batch_first=True)
    with torch.no_grad():
        for linear, name in ((enter, "in"), (leave, "out")):
            linear.weight.copy_(params[f"weight_{name}"].T)
            linear.bias.copy_(params[f"bias_{name}"])
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(gru, f"{name}_l0").copy_(params[name])
    return enter, gru, leave


def _seen(agents: StackedAgents, observation: torch.Tensor, agent: int) -> torch.Tensor:
    """What the network of ``agent`` reads of ``observation`` ``[..., agents, features]``."""
    mine = observation[..., agent, :]
    if not agents.agent_id:
        return mine
    return torch.cat([mine, nn.functional.one_hot(torch.tensor(agent), 4).expand(*mine.shape[:-1], 4)], -1)


@pytest.mark.parametrize(("share", "agent_id"), SHAPES)
@pytest.mark.parametrize("own_inputs", [False, True])
def test_recurrent_agents_equal_torch_gru_in_value_and_gradient(share, agent_id, own_inputs):
    agents = _agents(True, share, agent_id)
    flat = agents.init(_draw()).requires_grad_()
    observation = torch.randn((3, 2, 9, 4, 5) if own_inputs else (2, 9, 4, 5), generator=_draw(1))
    out = agents.sequence(flat, observation)
    assert out.shape == (3, 2, 9, 4, 6)
    weight = torch.randn(out.shape, generator=_draw(2))
    (gradient,) = torch.autograd.grad((out * weight).sum(), flat)
    views = {name: value.view(3, agents.copies, *value.shape[1:]) for name, value in agents.views(gradient).items()}
    for member in range(3):
        nets = [_torch_gru(agents, flat.detach(), member * agents.copies + i) for i in range(agents.copies)]
        total = torch.zeros(())
        for agent in range(4):
            enter, gru, leave = nets[0 if share else agent]
            seen = _seen(agents, observation[member] if own_inputs else observation, agent)
            expected = leave(gru(torch.relu(enter(seen)))[0])
            torch.testing.assert_close(out[member, :, :, agent], expected, rtol=1e-5, atol=1e-6)
            total = total + (expected * weight[member, :, :, agent]).sum()
        total.backward()
        for copy, (enter, gru, leave) in enumerate(nets):
            for name, module, field in (
                ("weight_in", enter, "weight"),
                ("weight_out", leave, "weight"),
                ("weight_hh", gru, "weight_hh_l0"),
                ("bias_ih", gru, "bias_ih_l0"),
            ):
                theirs = getattr(module, field).grad
                theirs = theirs.T if name in ("weight_in", "weight_out") else theirs
                torch.testing.assert_close(views[name][member, copy], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "agent_id"), SHAPES)
def test_whole_sequences_equal_acting_step_by_step(share, agent_id):
    agents = _agents(True, share, agent_id)
    flat = agents.init(_draw())
    observation = torch.randn(11, 8, 4, 5, generator=_draw(1))
    whole = agents.sequence(flat, observation)
    hidden = torch.zeros(11, 3, 4, 7)
    for step in range(8):
        values, hidden = agents.step(flat, observation[:, step], hidden)
        torch.testing.assert_close(values, whole[:, :, step], rtol=0.0, atol=1e-6)
        assert hidden.shape == (11, 3, 4, 7)


def test_later_observations_do_not_reach_back():
    agents = _agents(True)
    flat, observation = agents.init(_draw()), torch.randn(2, 6, 4, 5, generator=_draw(1))
    before = agents.sequence(flat, observation)
    observation[:, 4:] = 100.0
    after = agents.sequence(flat, observation)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


@pytest.mark.parametrize(("share", "agent_id"), SHAPES)
@pytest.mark.parametrize("own_inputs", [False, True])
def test_feed_forward_agents_equal_separate_sequentials(share, agent_id, own_inputs):
    agents = _agents(False, share, agent_id)
    flat = agents.init(_draw())
    observation = torch.randn((3, 9, 4, 5) if own_inputs else (9, 4, 5), generator=_draw(1))
    out = agents.apply(flat, observation)
    assert out.shape == (3, 9, 4, 6)
    params = agents.views(flat)
    for member, agent in product(range(3), range(4)):
        row = member * agents.copies + (0 if share else agent)
        seen = _seen(agents, observation[member] if own_inputs else observation, agent)
        for layer in range(3):
            seen = seen @ params[f"weight_{layer}"][row] + params[f"bias_{layer}"][row]
            seen = seen.relu() if layer < 2 else seen
        torch.testing.assert_close(out[member, :, agent], seen, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("own_inputs", [False, True])
def test_feed_forward_agents_read_sequences_step_by_step(own_inputs):
    agents = _agents(False)
    flat = agents.init(_draw())
    observation = torch.randn((3, 2, 9, 4, 5) if own_inputs else (2, 9, 4, 5), generator=_draw(1))
    out = agents.sequence(flat, observation)
    assert out.shape == (3, 2, 9, 4, 6)
    for step in range(9):
        torch.testing.assert_close(out[:, :, step], agents.apply(flat, observation[..., step, :, :]))


@pytest.mark.parametrize(("recurrent", "share"), list(product((False, True), (False, True))))
def test_members_and_unshared_agents_are_drawn_apart_and_in_torch_range(recurrent, share):
    agents = StackedAgents(3, 4, 5, 6, 64, recurrent, share, True, 0.5)
    flat = agents.init(_draw())
    assert flat.shape == (3, agents.size)
    for name, value in agents.views(flat).items():
        assert value.shape[0] == 3 * (1 if share else 4)
        assert len({tuple(row) for row in value.flatten(1).tolist()}) == value.shape[0], name
        first = name.endswith(("_in", "_0"))
        last = name.endswith(("_out", "_2"))
        bound = (9 if first else 64) ** -0.5 * (0.5 if last else 1.0)
        assert float(value.abs().max()) <= bound
        if value.numel() > 500:
            assert float(value.abs().max()) > 0.95 * bound
            assert float(value.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_number_of_an_agent_tells_agents_apart_only_if_asked():
    same = torch.randn(1, 1, 5, generator=_draw(1)).expand(1, 4, 5)
    for agent_id in (False, True):
        agents = _agents(False, True, agent_id)
        out = agents.apply(agents.init(_draw()), same)
        assert torch.equal(out[:, :, 0], out[:, :, 1]) is not agent_id


@pytest.mark.parametrize(("members", "agents"), [(0, 2), (2, 0)])
def test_counts_below_one_are_named(members, agents):
    with pytest.raises(ValueError, match=rf"StackedAgents: members and agents must be >= 1, got {members}, {agents}"):
        StackedAgents(members, agents, 3, 2)
    with pytest.raises(ValueError, match="StackedGRU: inputs, hidden, outputs must be >= 1, got 3, 0, 2"):
        StackedGRU(3, 0, 2)
