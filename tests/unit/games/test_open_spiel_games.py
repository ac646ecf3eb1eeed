from __future__ import annotations

from pathlib import Path

import pytest
import torch

from datamodules.games import open_spiel_games
from datamodules.games.open_spiel_games import open_spiel_tree
from datamodules.games.sequence_form import SequenceFormGame
from datamodules.games.tree import CHANCE, TERMINAL, GameTree

pytest.importorskip("pyspiel")

GOOFSPIEL = "goofspiel(num_cards=4,imp_info=True,points_order=descending)"


def same(one: GameTree, other: GameTree) -> bool:
    plain = ("name", "num_players", "num_actions", "zero_sum", "labels")
    tensors = ("parent", "action", "player", "probability", "info_state", "utility")
    return (
        all(getattr(one, name) == getattr(other, name) for name in plain)
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
        and all(map(torch.equal, one.legal + one.observations, other.legal + other.observations))
    )


@pytest.mark.parametrize(
    ("game", "nodes", "states"),
    [
        ("kuhn_poker", 58, [6, 6]),
        ("leduc_poker", 9457, [468, 468]),
        ("liars_dice(dice_sides=5)", 51181, [2560, 2560]),
        (GOOFSPIEL, 1077, [81, 81]),
        ("goofspiel(num_cards=5,imp_info=True,points_order=descending)", 26931, [1062, 1062]),
        ("kuhn_poker(players=3)", 617, [16, 16, 16]),
    ],
)
def test_sizes_are_the_published_ones(game: str, nodes: int, states: list[int]) -> None:
    tree = open_spiel_tree(game)
    assert len(tree) == nodes
    assert [legal.shape[0] for legal in tree.legal] == states
    assert tree.zero_sum


def test_nodes_come_breadth_first_with_contiguous_children() -> None:
    tree = open_spiel_tree("kuhn_poker")
    assert bool((tree.parent[1:] >= tree.parent[:-1]).all())
    assert (int(tree.parent[0]), int(tree.action[0])) == (-1, -1)
    chance = tree.player[tree.parent.clamp_min(0)] == CHANCE
    chance[0] = False
    assert torch.equal(tree.probability < 1, chance)
    assert bool((tree.utility[tree.player != TERMINAL] == 0).all())
    assert bool((tree.utility[tree.player == TERMINAL] != 0).all())
    assert tree.labels is not None
    assert set(tree.labels[0]) == {"0", "1", "2", "0pb", "1pb", "2pb"}


def test_observations_fall_back_to_the_index_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = open_spiel_tree("coordinated_mp")  # offers no tensors
    assert torch.equal(tree.observations[1], torch.eye(tree.legal[1].shape[0]))
    assert open_spiel_tree("mnk(m=2,n=2,k=2)").observations[0].shape[1] == 12  # it has an observation tensor only
    monkeypatch.setattr(open_spiel_games, "MAX_ONE_HOT", 3)
    with pytest.raises(ValueError, match=r"one-hot index of its 2 information states would take 4 numbers \(limit 3\)"):
        open_spiel_tree("coordinated_mp")


@pytest.mark.parametrize(
    ("game", "message"),
    [
        ("leduc_pokr", r"no game 'leduc_pokr'; nearest: leduc_poker"),
        ("qqqqqq", r"no game 'qqqqqq'; pyspiel.registered_names\(\) lists them"),
        ("leduc_poker(foo=3)", r"refuses 'leduc_poker\(foo=3\)': Unknown parameter 'foo'"),
        ("mfg_crowd_modelling", "mean-field"),
        ("negotiation", "only samples its chance moves"),
        ("markov_soccer", "information-state strings"),
    ],
)
def test_games_without_a_tree_are_refused_in_one_line(game: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^open_spiel_tree: game_string: .*{message}") as caught:
        open_spiel_tree(game)
    assert "\n" not in str(caught.value)


def test_walk_stops_at_the_largest_number_of_nodes() -> None:
    assert len(open_spiel_tree("kuhn_poker", max_nodes=58)) == 58
    with pytest.raises(
        ValueError, match=r"'kuhn_poker' has at least 58 nodes, more than max_nodes=57; raise max_nodes"
    ):
        open_spiel_tree("kuhn_poker", max_nodes=57)
    with pytest.raises(ValueError, match=r"more than max_nodes=1,000; raise"):
        open_spiel_tree("chess", max_nodes=1000)
    with pytest.raises(ValueError, match="max_nodes: must be at least 1, got 0"):
        open_spiel_tree("kuhn_poker", max_nodes=0)


def test_cache_gives_the_same_tree_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    walk = open_spiel_games._walk
    monkeypatch.setattr(open_spiel_games, "_walk", lambda *args: walks.append(args) or walk(*args))
    built = open_spiel_tree(GOOFSPIEL, cache_dir=tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    read = open_spiel_tree(GOOFSPIEL, cache_dir=tmp_path / "new")
    assert len(walks) == 1
    assert same(built, read)
    assert SequenceFormGame(built).digest() == SequenceFormGame(read).digest()
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    for broken in (b"", b"not a zip", content[: len(content) // 2], bytes(damaged)):
        path.write_bytes(broken)
        assert same(open_spiel_tree(GOOFSPIEL, cache_dir=tmp_path / "new"), built)
        assert path.read_bytes() == content or path.stat().st_size > 100
    assert len(walks) == 5
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_cache_tells_games_apart_and_keeps_to_max_nodes(tmp_path: Path) -> None:
    for sides in (2, 3):
        assert len(open_spiel_tree(f"liars_dice(dice_sides={sides})", cache_dir=tmp_path)) < 3000
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="more than max_nodes=10;"):
        open_spiel_tree("liars_dice(dice_sides=2)", max_nodes=10, cache_dir=tmp_path)
