"""The solution of a population game as plain arrays, readable without this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from modules.contracts import PlanGame, TabularGame
from modules.files import atomic_directory, write_json


def export_solution(
    folder: str | Path,
    game: PlanGame,
    profile: Sequence[Tensor],
    payoffs: Tensor,
    meta_strategies: Sequence[Tensor],
    strategies: Sequence[Tensor],
    figures: Mapping[str, Any],
) -> None:
    """Write ``folder`` as a whole, replacing an older one atomically.

    ``solution.npz`` (no pickled objects) holds per player ``policy_<i>`` ``[states, actions]``, the behaviour policy of
    the mixture, with ``legal_<i>`` and ``observation_<i>`` of its states (games with information states), per
    population ``members_<i>`` and ``meta_strategy_<i>``, and ``payoffs``; ``solution.json`` names the game and holds
    ``figures``.

    Args:
        folder: where to.
        game: the game.
        profile: per player ``[sequences]``, the solution's plans.
        payoffs: ``[players, members_0, ...]``.
        meta_strategies: per population ``[members]``.
        strategies: per population ``[members, *strategy_shape]``.
        figures: what is known of the solution, e.g. its NashConv.
    """
    arrays: dict[str, Tensor] = {"payoffs": payoffs}
    for index, (sigma, members) in enumerate(zip(meta_strategies, strategies, strict=True)):
        arrays |= {f"meta_strategy_{index}": sigma, f"members_{index}": members}
    if isinstance(game, TabularGame):
        for player, plan in enumerate(profile):
            arrays[f"policy_{player}"] = game.strategy_of(player, plan)
            arrays[f"legal_{player}"] = game.legal(player)
            arrays[f"observation_{player}"] = game.observations(player)
    with atomic_directory(folder) as target:
        with open(target / "solution.npz", "wb") as stream:
            content: dict[str, Any] = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
            np.savez_compressed(stream, **content)
        write_json(target / "solution.json", {"game": game.name, "digest": dict(game.digest()), **figures})
