"""What a batch from replay must look like: foreign data fail with the field's name, and not inside torch."""

from __future__ import annotations

from collections.abc import Mapping

from tensordict import TensorDict

from modules.contracts import MultiAgentSpec


def check_batch(
    batch: TensorDict,
    spec: MultiAgentSpec,
    minibatches: int,
    sequences: bool,
    members: int,
    masked: bool,
    dropout: bool = False,
) -> None:
    """Hold ``batch`` ``[updates, minibatches, items]`` against :class:`~modules.contracts.LearnsFromReplay`.

    Args:
        batch: as a training step gets it.
        spec: of the environment.
        minibatches, sequences, members: as the module declares them.
        masked: items are for some members only.
        dropout: items say which agents were missing.

    Raises:
        ValueError: naming the field, with the shape or range that it must have and the one that it has.
    """
    names = set(map(str, batch.keys()))
    if "action" not in names or batch["action"].ndim != 5:
        got = list(batch["action"].shape) if "action" in names else "nothing"
        raise ValueError(f"ValueMARL: batch: 'action' must be [updates, minibatches, items, steps, agents], got {got}")
    updates, _, items, steps = batch["action"].shape[:4]
    steps = steps if sequences else 1
    lead, agents = (updates, minibatches, items), spec.num_agents
    wanted: Mapping[str, tuple[int, ...]] = {
        "action": (*lead, steps, agents),
        "observation": (*lead, steps + 1, agents, spec.observation_size),
        "reward": (*lead, steps, agents),
        "terminated": (*lead, steps),
        "filled": (*lead, steps),
        **({"legal": (*lead, steps + 1, agents, spec.num_actions)} if spec.restricts_actions else {}),
        **({"state": (*lead, steps + 1, spec.state_size)} if spec.own_state else {}),
        **({"member_mask": (*lead, members)} if masked else {}),
        **({"carry_absent": (*lead, agents)} if dropout else {}),
    }
    for name, shape in wanted.items():
        got = list(batch[name].shape) if name in names else "nothing"
        if got != list(shape):
            raise ValueError(f"ValueMARL: batch: '{name}' must be {list(shape)}, got {got}")
    low, high = int(batch["action"].min()), int(batch["action"].max())
    if low < 0 or high >= spec.num_actions:
        raise ValueError(f"ValueMARL: batch: 'action' must be in [0, {spec.num_actions}), got [{low}, {high}]")
