"""Sampled games on raw tensors: no environment, no TensorDict per step, one policy call per move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.games.rules import TERMINAL, Rules, resolve_chance, sample_rows

Policy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``policy(observation [rows, features], legal [rows, actions], player [rows], seat [rows]) -> [rows, actions]``."""


@torch.no_grad()
def play(rules: Rules, policy: Policy, seats: Tensor, generator: torch.Generator) -> TensorDict:
    """Play one game in each row of ``seats`` to its end.

    Args:
        rules: the game.
        policy: action probabilities; called once per move with the rows still in play. ``player`` is the mover,
            ``seat`` is ``seats[row, player]``. Illegal actions must have probability 0.
        seats: ``[envs, players]`` int64, who sits where (a member's index); it also chooses the device.
        generator: source of all draws, on the device of ``seats``. Per move: one number for each row in play (in row
            order) for the action, then one for each row at a chance node until none is; the same order as stepping
            :class:`~datamodules.games.rules_env.RulesEnv` with actions drawn by
            :func:`~datamodules.games.rules.sample_rows`.

    Returns:
        TensorDict, batch size ``[envs]``, ``time`` being the decisions of the longest game, padded at the end:
        ``observation`` ``[envs, time, features]`` float32 (pad 0), ``legal`` ``[envs, time, actions]`` bool (pad
        False), ``action`` ``[envs, time]`` int64 (pad 0), ``probability`` ``[envs, time]`` in the policy's dtype, of
        the action taken (pad 1, so that its logarithm is 0), ``player`` ``[envs, time]`` int64 (pad -1), ``returns``
        ``[envs, players]`` float64, ``seats`` as given.

    Raises:
        ValueError: if ``seats`` has the wrong shape, or the policy's probabilities are of the wrong shape, not finite,
            negative, on illegal actions, or do not add up to 1 within 1e-3.
    """
    if seats.ndim != 2 or not len(seats) or seats.shape[1] != rules.num_players:
        raise ValueError(f"play: seats: must be [envs >= 1, {rules.num_players}], got {list(seats.shape)}")
    envs, device = seats.shape[0], seats.device
    final = rules.initial(envs, device)
    rows = torch.arange(envs, device=device)
    state, mover = resolve_chance(rules, final, generator)
    moves: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    while True:
        live = mover != TERMINAL
        if not bool(live.all()):
            final[rows[~live]] = state[~live]
            rows, state, mover = rows[live], state[live], mover[live]
        if not len(rows):
            break
        observation, legal = rules.observation(state, mover), rules.legal(state)
        probabilities = policy(observation, legal, mover, seats[rows, mover])
        _check(probabilities, legal)
        action = sample_rows(probabilities, generator)
        taken = probabilities.gather(1, action.unsqueeze(1)).squeeze(1)
        step = (observation, legal, action, taken, mover)
        moves.append(tuple(_spread(part, rows, envs, pad) for part, pad in zip(step, PADDING, strict=True)))  # type: ignore[arg-type]
        state, mover = resolve_chance(rules, rules.step(state, action), generator)
    names = ("observation", "legal", "action", "probability", "player")
    columns = {name: torch.stack(part, dim=1) for name, part in zip(names, zip(*moves, strict=True), strict=True)}
    return TensorDict({**columns, "returns": rules.returns(final), "seats": seats}, batch_size=[envs], device=device)


PADDING = (0, False, 0, 1, -1)


def _spread(part: Tensor, rows: Tensor, envs: int, pad: int | bool) -> Tensor:
    """``part`` of the rows in play, set into a batch of all ``envs`` games filled with ``pad``."""
    if len(rows) == envs:
        return part
    return part.new_full((envs, *part.shape[1:]), pad).index_copy_(0, rows, part)


def _check(probabilities: Tensor, legal: Tensor) -> None:
    if probabilities.shape != legal.shape:
        raise ValueError(f"play: policy: must give probabilities {list(legal.shape)}, got {list(probabilities.shape)}")
    good = (probabilities >= 0).all(1) & (probabilities * ~legal == 0).all(1)  # both False where not a number
    bad = (~good | ((probabilities.sum(1) - 1).abs() >= 1e-3)).nonzero()
    if len(bad):
        raise ValueError(
            "play: policy: each row must be finite, non-negative, 0 on illegal actions and add up to 1, got "
            f"{probabilities[bad[0, 0]].tolist()}"
        )
