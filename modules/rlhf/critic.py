"""Value heads: one linear head per advantage stream, on the policy's hidden state or on a trunk of their own."""

from __future__ import annotations

import copy
from typing import Any, cast

from tensordict import TensorDict
from torch import Tensor, nn

from modules.language.responses import response_hidden
from modules.rlhf.rollout import response_rows


class Critic(nn.Module):
    """``values = heads(hidden)``, without bias; heads start at 0.

    Args:
        streams: number of heads.
        hidden_size: of the trunk.
        trunk: a causal language model of its own (the paper: a copy of the start model); ``None``: shared.
        detach: shared: let no gradient into the policy's trunk.
    """

    def __init__(self, streams: int, hidden_size: int, trunk: nn.Module | None = None, detach: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.detach = detach
        self.heads = nn.Linear(hidden_size, streams, bias=False)
        nn.init.zeros_(self.heads.weight)

    @classmethod
    def separate(cls, streams: int, start: nn.Module) -> Critic:
        """A critic with a trainable copy of ``start`` as its trunk; the copy's unused output head is frozen."""
        trunk = copy.deepcopy(start).requires_grad_(True)
        config: Any = start.config
        head, embedding = cast(Any, trunk).lm_head.weight, getattr(getattr(trunk, "model", None), "embed_tokens", None)
        if embedding is None or head is not embedding.weight:
            cast(Any, trunk).lm_head.requires_grad_(False)
        return cls(streams, config.hidden_size, trunk)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., streams]`` of hidden states ``[..., hidden_size]``."""
        return self.heads((hidden.detach() if self.detach else hidden).to(self.heads.weight.dtype))

    def values(self, rows: TensorDict, policy_hidden: Tensor | None) -> Tensor:
        """``[P, S, R, streams]`` of the states before each response token.

        Args:
            rows: a rollout ``[P]``. policy_hidden: ``[P * S, R, D]``; read without a trunk only.
        """
        if self.trunk is not None:
            policy_hidden = response_hidden(self.trunk, *response_rows(rows))
        assert policy_hidden is not None
        return self(policy_hidden).unflatten(0, tuple(rows["length"].shape))
