"""A multi-agent learner's acting as a TensorDictModule, for TorchRL's collectors and ``env.rollout``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

if TYPE_CHECKING:
    from modules.contracts import ActsMultiAgent


class MultiAgentPolicy(TensorDictModuleBase):
    """Reads observation, action mask, state and ``is_init``; writes ``("agents", "action")`` and what is carried.

    What a policy remembers within an episode travels under ``("carry", name)`` and is begun anew where ``is_init``.
    ``("carried", name)`` is what replay shall have of it (:class:`~modules.contracts.StoresCarry`).

    Args:
        actor: whose ``begin`` and ``act`` are called.

    Attributes:
        generator: random numbers of exploration.
        frames: environment steps so far, for schedules; ``None``: evaluation.
    """

    def __init__(self, actor: ActsMultiAgent) -> None:
        super().__init__()
        self.in_keys = cast(Any, [("agents", "observation"), ("agents", "action_mask"), "state", "is_init"])
        self.out_keys = cast(Any, [("agents", "action")])
        object.__setattr__(self, "_actor", actor)  # not a submodule: the actor holds this policy
        self.generator = torch.Generator()
        self.frames: int | None = None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        actor: ActsMultiAgent = self._actor  # pyright: ignore[reportAssignmentType]
        observation, state = tensordict["agents", "observation"], tensordict["state"]
        legal = tensordict["agents", "action_mask"]
        first = tensordict["is_init"].reshape(-1)
        kept = tensordict.get("carry", None)
        carry = {} if kept is None else {str(name): kept[name] for name in kept.keys()}  # noqa: SIM118 - a TensorDict
        if bool(first.any()):
            rows = first.nonzero().squeeze(1)
            for name, value in actor.begin(observation[rows], state[rows], self.generator, self.frames).items():
                whole = carry.get(name)
                whole = value.new_zeros(len(first), *value.shape[1:]) if whole is None else whole.clone()
                whole[rows] = value
                carry[name] = whole
        for name in getattr(actor, "carried", ()):  # as it is when acting, for replay
            tensordict["carried", name] = carry[name]
        action, carry = actor.act(observation, legal, carry, self.generator, self.frames)
        for name, value in carry.items():
            tensordict["carry", name] = value
        return tensordict.set(("agents", "action"), action)
