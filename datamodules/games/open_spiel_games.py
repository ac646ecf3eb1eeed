"""OpenSpiel games as :class:`GameTree` (Lanctot et al. 2019, arXiv 1908.09453); needs the extra ``games``."""

from __future__ import annotations

import difflib
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.games.tree import CHANCE, TERMINAL, GameTree
from modules.files import atomic_write, canonical_digest, write_bytes
from modules.optional import require

MAX_ONE_HOT = 2**26
"""Largest table of one-hot observations, in elements (256 MB)."""

_FORMAT = 1  # of the cache; raise it when the walk or the fields change
_NODE_FIELDS = ("parent", "action", "player", "probability", "info_state", "utility")
_BROKEN = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


class OpenSpielGame:
    """An OpenSpiel game that a config names.

    Args:
        game: as OpenSpiel writes it, e.g. ``"liars_dice(dice_sides=5)"``.
        cache_dir: folder for finished trees; ``None``: no cache.

    Raises:
        ValueError: no game named.
    """

    def __init__(self, game: str, cache_dir: str | None = None) -> None:
        if not game:
            raise ValueError("OpenSpielGame: game: must name an OpenSpiel game, got ''")
        self.game = game
        self.cache_dir = cache_dir

    def __repr__(self) -> str:
        return f"OpenSpielGame({self.game!r})"

    def tree(self, max_nodes: int) -> GameTree:
        """Its whole tree; see :func:`open_spiel_tree`."""
        return open_spiel_tree(self.game, max_nodes, self.cache_dir)


def open_spiel_tree(game_string: str, max_nodes: int = 5_000_000, cache_dir: str | Path | None = None) -> GameTree:
    """Walk an OpenSpiel game's whole tree.

    Simultaneous moves become turns in which the later player does not see the earlier one's move
    (``convert_to_turn_based``). Information states are told apart by ``information_state_string`` and numbered in the
    order of a depth-first walk. An observation is the game's information-state tensor, else its observation tensor,
    else the one-hot index of the information state.

    Args:
        game_string: as OpenSpiel writes it, e.g. ``"liars_dice(dice_sides=5)"``.
        max_nodes: the walk stops with an error at this many nodes.
        cache_dir: folder for the finished tree (``.npz``, one file for each game and OpenSpiel version); a file that
            cannot be read is built again. ``None``: no cache.

    Raises:
        ImportError: OpenSpiel is not installed.
        ValueError: unknown game or parameter; a mean-field game; chance that can only be sampled; no
            information-state strings; more than ``max_nodes`` nodes.
    """
    if max_nodes < 1:
        raise ValueError(f"open_spiel_tree: max_nodes: must be at least 1, got {max_nodes}")
    game = _load(game_string)
    if cache_dir is None:
        return _walk(game, game_string, max_nodes)
    version = str(getattr(require("pyspiel", extra="games"), "__version__", "unknown"))
    key = canonical_digest({"game": str(game), "open_spiel": version, "format": _FORMAT})
    path = Path(cache_dir) / f"{game.get_type().short_name}-{key[:16]}.npz"
    tree = _read(path, key)
    if tree is None:
        tree = _walk(game, game_string, max_nodes)
        _write(path, key, tree)
    if len(tree) > max_nodes:
        raise _too_large(game_string, len(tree), max_nodes)
    return tree


def _load(game_string: str) -> Any:
    """The game, turn-based, checked to be one that a tree can hold."""
    spiel: Any = require("pyspiel", extra="games")
    short = game_string.split("(")[0].strip()
    known = spiel.registered_names()
    if short not in known:
        near = difflib.get_close_matches(short, known, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else "; pyspiel.registered_names() lists them"
        raise ValueError(f"open_spiel_tree: game_string: OpenSpiel has no game {short!r}{hint}")
    try:
        game = spiel.load_game(game_string)
    except Exception as error:  # a SpielError; any other error while parsing means the same to the user
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"open_spiel_tree: game_string: OpenSpiel refuses {game_string!r}: {reason}") from None
    kind = game.get_type()
    if kind.dynamics == spiel.GameType.Dynamics.SIMULTANEOUS:
        game = spiel.convert_to_turn_based(game)
        kind = game.get_type()
    if kind.dynamics != spiel.GameType.Dynamics.SEQUENTIAL:
        raise ValueError(f"open_spiel_tree: game_string: {game_string!r} is a mean-field game and has no finite tree")
    if kind.chance_mode == spiel.GameType.ChanceMode.SAMPLED_STOCHASTIC:
        raise ValueError(
            f"open_spiel_tree: game_string: {game_string!r} only samples its chance moves and does not list their "
            "probabilities, so that no tree can be built; choose a game with explicit chance"
        )
    if not kind.provides_information_state_string:
        raise ValueError(
            f"open_spiel_tree: game_string: {game_string!r} offers no information-state strings, by which a tree's "
            "information states are told apart; choose a game that does"
        )
    return game


def _too_large(game_string: str, reached: int, max_nodes: int) -> ValueError:
    return ValueError(
        f"open_spiel_tree: max_nodes: {game_string!r} has at least {reached:,} nodes, more than max_nodes="
        f"{max_nodes:,}; raise max_nodes, choose smaller game parameters, or play sampled games by a rules engine"
    )


def _observe(game: Any) -> str | None:
    """Which tensor of a state the networks see; ``None``: there is none."""
    kind = game.get_type()
    if kind.provides_information_state_tensor:
        return "information_state_tensor"
    return "observation_tensor" if kind.provides_observation_tensor else None


def _walk(game: Any, game_string: str, max_nodes: int) -> GameTree:
    """Depth first, which holds few live states, then sorted by depth, which gives breadth-first order."""
    players, num_actions = game.num_players(), game.num_distinct_actions()
    observe = _observe(game)
    ids: list[dict[str, int]] = [{} for _ in range(players)]
    legal: list[list[list[int]]] = [[] for _ in range(players)]
    seen: list[list[np.ndarray]] = [[] for _ in range(players)]
    parent, action, depth, player, info, chance = [], [], [], [], [], []
    ends, utility = [], []
    stack: list[tuple[Any, int, int, int, float]] = [(game.new_initial_state(), -1, -1, 0, 1.0)]
    while stack:
        state, above, move, level, probability = stack.pop()
        node = len(parent)
        parent.append(above)
        action.append(move)
        depth.append(level)
        chance.append(probability)
        info.append(-1)
        if node + len(stack) >= max_nodes:
            raise _too_large(game_string, node + len(stack) + 1, max_nodes)
        if state.is_terminal():
            player.append(TERMINAL)
            ends.append(node)
            utility.append(state.returns())
            continue
        if state.is_chance_node():
            player.append(CHANCE)
            outcomes = state.chance_outcomes()
            stack.extend((state.child(a), node, a, level + 1, p) for a, p in reversed(outcomes))
            continue
        mover = state.current_player()
        player.append(mover)
        moves = state.legal_actions()
        known = ids[mover]
        index = known.setdefault(state.information_state_string(mover), len(known))
        info[node] = index
        if index == len(legal[mover]):
            legal[mover].append(moves)
            if observe is not None:
                seen[mover].append(np.asarray(getattr(state, observe)(mover), dtype=np.float32))
        stack.extend((state.child(a), node, a, level + 1, 1.0) for a in reversed(moves))

    order = np.argsort(np.asarray(depth), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    above_sorted = np.asarray(parent)[order]
    payoff = np.zeros((len(order), players))
    if ends:
        payoff[place[ends]] = utility

    def nodes(values: list[int]) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)[order])

    return GameTree(
        name=str(game),
        num_players=players,
        num_actions=num_actions,
        parent=torch.from_numpy(np.where(above_sorted < 0, -1, place[above_sorted])),
        action=nodes(action),
        player=nodes(player),
        probability=torch.from_numpy(np.asarray(chance, dtype=np.float64)[order]),
        info_state=nodes(info),
        utility=torch.from_numpy(payoff),
        legal=tuple(_mask(rows, num_actions) for rows in legal),
        observations=tuple(_observations(game_string, rows, len(known)) for rows, known in zip(seen, ids, strict=True)),
        zero_sum=bool(np.abs(payoff.sum(1)).max() < 1e-9),
        labels=tuple(tuple(known) for known in ids),
    )


def _mask(rows: list[list[int]], num_actions: int) -> Tensor:
    mask = torch.zeros(len(rows), num_actions, dtype=torch.bool)
    states = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]).long())
    mask[states, torch.tensor([a for row in rows for a in row]).long()] = True
    return mask


def _observations(game_string: str, rows: list[np.ndarray], states: int) -> Tensor:
    if rows:
        return torch.from_numpy(np.stack(rows))
    if states * states > MAX_ONE_HOT:
        raise ValueError(
            f"open_spiel_tree: game_string: {game_string!r} offers no observation tensor, and a one-hot index of its "
            f"{states:,} information states would take {states * states:,} numbers (limit {MAX_ONE_HOT:,}); choose a "
            "smaller game or one with observations"
        )
    return torch.eye(states, dtype=torch.float32)


def _write(path: Path, key: str, tree: GameTree) -> None:
    """Text goes in as JSON bytes, since ``.npz`` without pickles holds numbers only."""
    meta = {"key": key, "name": tree.name, "num_players": tree.num_players, "num_actions": tree.num_actions}
    meta |= {"zero_sum": tree.zero_sum, "labels": tree.labels}
    arrays = {"meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)}
    arrays |= {name: getattr(tree, name).numpy() for name in _NODE_FIELDS}
    for player in range(tree.num_players):
        arrays[f"legal_{player}"] = tree.legal[player].numpy()
        arrays[f"observations_{player}"] = tree.observations[player].numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    with atomic_write(path) as stream:
        write_bytes(stream, buffer.getbuffer())


def _read(path: Path, key: str) -> GameTree | None:
    """The tree in ``path``; ``None`` where there is none or what is there is broken or another game's."""
    if not path.is_file():
        return None
    try:
        # Read first: numpy leaves a file open that turns out not to be an archive.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            meta = json.loads(archive["meta"].tobytes())
            if meta["key"] != key:
                return None
            players = range(meta["num_players"])
            fields = {name: torch.from_numpy(archive[name]) for name in _NODE_FIELDS}
            return GameTree(
                name=meta["name"],
                num_players=meta["num_players"],
                num_actions=meta["num_actions"],
                zero_sum=meta["zero_sum"],
                legal=tuple(torch.from_numpy(archive[f"legal_{player}"]) for player in players),
                observations=tuple(torch.from_numpy(archive[f"observations_{player}"]) for player in players),
                labels=tuple(tuple(labels) for labels in meta["labels"]),
                **fields,
            )
    except _BROKEN:
        return None
