"""Utilities of all agents and ensemble members as one batched network: feed-forward, or recurrent over histories."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from modules.networks.stacked_mlp import StackedMLP


class StackedGRU:
    """``L`` networks Linear -> ReLU -> GRU -> Linear as a pure function of their stacked parameters.

    Shapes as in :class:`~modules.networks.stacked_mlp.StackedMLP`: ``weight`` ``[L, in, out]``, ``bias`` ``[L, out]``;
    the GRU's own ``weight_ih``, ``weight_hh`` ``[L, 3 * hidden, hidden]`` and biases ``[L, 3 * hidden]`` are laid out
    as ``torch.nn.GRU``'s. Without ``head`` there is no last layer: outputs are the hidden states.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, output_gain: float = 1.0, head: bool = True) -> None:
        if min(inputs, hidden, outputs) < 1:
            raise ValueError(f"StackedGRU: inputs, hidden, outputs must be >= 1, got {inputs}, {hidden}, {outputs}")
        self.inputs, self.hidden, self.outputs, self.output_gain = inputs, hidden, outputs, output_gain
        self.head = head

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden
        return {
            "weight_in": (self.inputs, hidden),
            "bias_in": (hidden,),
            "weight_ih": (3 * hidden, hidden),
            "weight_hh": (3 * hidden, hidden),
            "bias_ih": (3 * hidden,),
            "bias_hh": (3 * hidden,),
            **({"weight_out": (hidden, self.outputs), "bias_out": (self.outputs,)} if self.head else {}),
        }

    def init(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters ``[count, ...]``, uniform in +-1/sqrt(fan-in) as ``nn.Linear`` and ``nn.GRU`` start."""
        params = {}
        for name, shape in self.shapes.items():
            fan_in = self.inputs if name in ("weight_in", "bias_in") else self.hidden
            bound = 1.0 / math.sqrt(fan_in) * (self.output_gain if name.endswith("_out") else 1.0)
            drawn = torch.rand(count, *shape, generator=generator, device=generator.device)
            params[name] = (2.0 * drawn - 1.0) * bound
        return params

    def _enter(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        count = params["weight_in"].shape[0]
        rows = inputs.expand(count, *inputs.shape) if inputs.ndim == 2 else inputs
        return torch.relu(torch.baddbmm(params["bias_in"].unsqueeze(1), rows, params["weight_in"]))

    def step(self, params: Mapping[str, Tensor], inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One step of acting: ``inputs`` ``[rows, in]`` or ``[L, rows, in]``, ``hidden`` ``[L, rows, hidden]``.

        Returns:
            Outputs ``[L, rows, outputs]`` and the new hidden state.
        """
        entered = self._enter(params, inputs)
        gates_in = torch.baddbmm(params["bias_ih"].unsqueeze(1), entered, params["weight_ih"].transpose(1, 2))
        gates = torch.baddbmm(params["bias_hh"].unsqueeze(1), hidden, params["weight_hh"].transpose(1, 2))
        reset_in, update_in, new_in = gates_in.chunk(3, -1)
        reset, update, new = gates.chunk(3, -1)
        update = torch.sigmoid(update_in + update)
        new = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
        hidden = new + update * (hidden - new)
        return self._leave(params, hidden), hidden

    def _leave(self, params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        if not self.head:
            return hidden
        return torch.baddbmm(params["bias_out"].unsqueeze(1), hidden, params["weight_out"])

    def sequence(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Whole sequences from a zero hidden state: ``[rows, time, in]`` or ``[L, rows, time, in]`` to
        ``[L, rows, time, outputs]``; equal to :meth:`step` after step."""
        count = params["weight_in"].shape[0]
        if inputs.ndim == 3:
            inputs = inputs.expand(count, *inputs.shape)
        rows, time = inputs.shape[1], inputs.shape[2]
        entered = self._enter(params, inputs.flatten(1, 2)).view(count, rows, time, self.hidden)
        start = entered.new_zeros(1, rows, self.hidden)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        # one fused call a network over the whole sequence: a loop over time would launch a dozen kernels a step
        through = torch.stack(
            [
                torch.gru(entered[i], start, [params[n][i] for n in names], True, 1, 0.0, False, False, True)[0]
                for i in range(count)
            ]
        )
        return self._leave(params, through.flatten(1, 2)).view(count, rows, time, -1)


class StackedAgents:
    """Utilities ``Q_i^k(h_i, a)`` of ``agents`` agents in ``members`` ensemble members (Schaefer et al. 2025, sec. 4).

    A pure function of one flat parameter ``[members, size]``, so that a gradient norm, a target copy or a step of Adam
    is one kernel. Members never share parameters; agents of a member do if ``share_agents``, told apart by a one-hot
    ``agent_id`` behind the observation.

    Args:
        members: ensemble size K.
        agents, observation_size, num_actions: of the environment.
        hidden: width of both hidden layers, or of the GRU.
        recurrent: Linear, ReLU, GRU, Linear over histories in place of two hidden layers with ReLU.
        share_agents: one network for all agents of a member; else one each.
        agent_id: append the agent's one-hot number to its observation.
        output_gain: factor on the last layer's initial weights.
        head: without it there is no last layer: what would be utilities are its ``hidden`` inputs, for a head of the
            caller's.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(
        self,
        members: int,
        agents: int,
        observation_size: int,
        num_actions: int,
        hidden: int = 64,
        recurrent: bool = False,
        share_agents: bool = True,
        agent_id: bool = True,
        output_gain: float = 1.0,
        head: bool = True,
    ) -> None:
        if min(members, agents) < 1:
            raise ValueError(f"StackedAgents: members and agents must be >= 1, got {members}, {agents}")
        self.members, self.agents, self.num_actions = members, agents, num_actions
        self.share_agents, self.agent_id, self.recurrent = share_agents, agent_id, recurrent
        self.hidden, self.head = hidden, head
        inputs = observation_size + (agents if agent_id else 0)
        self.network: StackedMLP | StackedGRU = (
            StackedGRU(inputs, hidden, num_actions, output_gain, head)
            if recurrent
            else StackedMLP(inputs, [hidden, hidden], num_actions, "relu", "kaiming", output_gain)
            if head
            else StackedMLP(inputs, [hidden], hidden, "relu", "kaiming")
        )
        self.copies = 1 if share_agents else agents
        self._shapes = self.network.shapes
        self._sizes = [math.prod(shape) * self.copies for shape in self._shapes.values()]
        self.size = sum(self._sizes)

    def init(self, generator: torch.Generator) -> Tensor:
        """Fresh parameters ``[members, size]``, every member its own draw."""
        drawn = self.network.init(self.members * self.copies, generator)
        return torch.cat([drawn[name].reshape(self.members, -1) for name in self._shapes], dim=1)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The networks' parameters ``[members * copies, ...]`` as views of ``flat``; differentiable."""
        parts = flat.split(self._sizes, dim=1)
        return {
            name: part.reshape(flat.shape[0] * self.copies, *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def _inputs(self, observation: Tensor) -> Tensor:
        """``[..., agents, features]`` with the agents' numbers behind."""
        if not self.agent_id:
            return observation
        identity = torch.eye(self.agents, device=observation.device, dtype=observation.dtype)
        return torch.cat([observation, identity.expand(*observation.shape[:-1], self.agents)], dim=-1)

    def apply(self, flat: Tensor, observation: Tensor) -> Tensor:
        """Utilities ``[members, rows, agents, actions]`` of feed-forward agents.

        Args:
            flat: ``[members, size]``.
            observation: ``[rows, agents, features]``, seen by all members, or ``[members, rows, agents, features]``.
        """
        assert isinstance(self.network, StackedMLP)
        params, inputs = self.views(flat), self._inputs(observation)
        members, agents = flat.shape[0], self.agents
        rows = inputs.shape[-3]
        if self.share_agents:
            out = self.network.apply(params, inputs.flatten(-3, -2)).view(members, rows, agents, -1)
        else:
            inputs = inputs.transpose(-3, -2)  # [(members,) agents, rows, features]
            inputs = inputs.expand(members, *inputs.shape[-3:]).reshape(members * agents, rows, -1)
            out = self.network.apply(params, inputs).view(members, agents, rows, -1).transpose(1, 2)
        return out if self.head else torch.relu(out)

    def step(self, flat: Tensor, observation: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One step of recurrent agents: ``observation`` ``[rows, agents, features]``, ``hidden``
        ``[rows, members, agents, hidden]``; utilities ``[members, rows, agents, actions]`` and the new hidden."""
        assert isinstance(self.network, StackedGRU)
        params, inputs = self.views(flat), self._inputs(observation)
        members, agents, rows = flat.shape[0], self.agents, inputs.shape[0]
        if self.share_agents:
            state = hidden.transpose(0, 1).reshape(members, rows * agents, -1)
            out, state = self.network.step(params, inputs.flatten(0, 1), state)
            return (
                out.view(members, rows, agents, -1),
                state.view(members, rows, agents, -1).transpose(0, 1).contiguous(),
            )
        state = hidden.permute(1, 2, 0, 3).reshape(members * agents, rows, -1)
        inputs = inputs.transpose(0, 1).expand(members, agents, rows, inputs.shape[-1]).reshape(len(state), rows, -1)
        out, state = self.network.step(params, inputs, state)
        return (
            out.view(members, agents, rows, -1).transpose(1, 2),
            state.view(members, agents, rows, -1).permute(2, 0, 1, 3).contiguous(),
        )

    def sequence(self, flat: Tensor, observation: Tensor) -> Tensor:
        """Utilities ``[members, rows, time, agents, actions]`` of whole histories from their start.

        Args:
            flat: ``[members, size]``.
            observation: ``[(members,) rows, time, agents, features]``.
        """
        if not self.recurrent:
            rows, time = observation.shape[-4], observation.shape[-3]
            return self.apply(flat, observation.flatten(-4, -3)).unflatten(1, (rows, time))
        assert isinstance(self.network, StackedGRU)
        params, inputs = self.views(flat), self._inputs(observation)
        members, agents = flat.shape[0], self.agents
        rows, time = inputs.shape[-4], inputs.shape[-3]
        inputs = inputs.movedim(-2, -4)  # [(members,) agents, rows, time, features]
        if self.share_agents:
            out = self.network.sequence(params, inputs.flatten(-4, -3))
        else:
            inputs = inputs.expand(members, *inputs.shape[-4:]).flatten(0, 1)
            out = self.network.sequence(params, inputs)
        return out.view(members, agents, rows, time, -1).permute(0, 2, 3, 1, 4)
