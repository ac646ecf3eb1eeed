from __future__ import annotations

import pytest
import torch
from torch import Tensor

from datamodules.games import simulate as simulation
from datamodules.games.expand import expand
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.leduc import LeducPoker
from datamodules.games.sequence_form import SequenceFormGame
from datamodules.games.simulate import TreeSimulator, simulate
from datamodules.games.tree import CHANCE, TERMINAL, GameTree

TREES = {"kuhn": KuhnPoker(), "leduc": LeducPoker(), "kuhn3": KuhnPoker(players=3)}


@pytest.fixture(scope="module", params=list(TREES))
def tree(request: pytest.FixtureRequest) -> GameTree:
    return expand(TREES[request.param])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tables(tree: GameTree, members: int, sparse: bool = False) -> list[Tensor]:
    """``sparse``: about half of the legal actions get no probability, where another is left."""
    game, draws = SequenceFormGame(tree), generator(1)
    tables = [game.random_strategies(player, members, draws) for player in range(tree.num_players)]
    if sparse:
        kept = [t * ((torch.rand(t.shape, generator=draws) < 0.5) | (t == t.amax(-1, keepdim=True))) for t in tables]
        tables = [table / table.sum(-1, keepdim=True) for table in kept]
    return tables


def random_seats(tree: GameTree, games: int, members: int) -> Tensor:
    return torch.randint(0, members, (games, tree.num_players), generator=generator(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_games_can_be_replayed_on_the_tree(tree: GameTree, dtype: torch.dtype) -> None:
    """Walk every recorded game move by move; chance is the one thing not recorded, so all its outcomes stay open."""
    tables = [table.to(dtype) for table in random_tables(tree, 3)]
    seats = random_seats(tree, 300, 3)
    played = simulate(tree, tables, seats, generator())
    children: dict[int, list[int]] = {}
    for node, above in enumerate(tree.parent.tolist()):
        children.setdefault(above, []).append(node)
    player, action, info = tree.player.tolist(), tree.action.tolist(), tree.info_state.tolist()

    def after_chance(nodes: list[int]) -> list[int]:
        return [n for node in nodes for n in (after_chance(children[node]) if player[node] == CHANCE else [node])]

    for game in played:
        nodes, moves = after_chance([0]), int((game["player"] >= 0).sum())
        for mover, state, move, chosen in zip(
            *(game[key][:moves].tolist() for key in ("player", "info_state", "action", "probability")), strict=True
        ):
            nodes = [node for node in nodes if player[node] == mover and info[node] == state]
            assert nodes
            assert bool(tree.legal[mover][state, move])
            assert chosen == float(tables[mover][game["seats"][mover], state, move])
            nodes = after_chance([child for node in nodes for child in children[node] if action[child] == move])
        ends = [node for node in nodes if player[node] == TERMINAL]
        assert any(torch.equal(tree.utility[node], game["returns"]) for node in ends)
        for key, padding in (("player", -1), ("info_state", -1), ("action", -1), ("probability", 1)):
            assert bool((game[key][moves:] == padding).all())


def test_shapes_types_and_length(tree: GameTree) -> None:
    played = simulate(tree, random_tables(tree, 2), random_seats(tree, 2000, 2), generator())
    moves = {2: 3, 3: 5}[tree.num_players] if len(tree) < 2000 else 8
    assert played.batch_size == torch.Size([2000])
    for key, dtype in {"info_state": torch.int64, "action": torch.int64, "player": torch.int64}.items():
        assert (played[key].shape, played[key].dtype) == ((2000, moves), dtype)
    assert (played["probability"].shape, played["probability"].dtype) == ((2000, moves), torch.float64)
    assert (played["returns"].shape, played["returns"].dtype) == ((2000, tree.num_players), torch.float64)
    assert int((played["player"] >= 0).sum(1).max()) == moves


def test_the_generator_decides_the_games(tree: GameTree) -> None:
    simulator, tables = TreeSimulator(tree), random_tables(tree, 2)
    seats, ready = random_seats(tree, 500, 2), None
    ready = simulator.prepare(tables)
    first = simulator.play(tables, seats, generator(5))
    again = simulator.play(ready, seats, generator(5))
    other = simulator.play(ready, seats, generator(6))
    assert all(torch.equal(first[key], again[key]) for key in first.keys())  # noqa: SIM118
    assert not torch.equal(first["action"], other["action"])
    assert torch.equal(simulator.play(ready, seats, generator(5), returns_only=True), first["returns"])


@pytest.mark.parametrize("edge", ["lowest", "highest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_on_the_edge_never_take_an_action_without_probability(
    tree: GameTree, monkeypatch: pytest.MonkeyPatch, edge: str, dtype: torch.dtype
) -> None:
    def draw(count: int, kind: torch.dtype, *_: object) -> Tensor:
        # The largest number below 1 that torch.rand can give.
        return torch.full((count,), 0.0 if edge == "lowest" else 1 - torch.finfo(kind).eps / 2, dtype=kind)

    monkeypatch.setattr(simulation, "_uniform", draw)
    tables = [table.to(dtype) for table in random_tables(tree, 50, sparse=True)]
    seats = random_seats(tree, 500, 50)
    played = simulate(tree, tables, seats, generator())
    taken = played["player"] >= 0
    assert bool((played["probability"][taken] > 0).all())
    for player in range(tree.num_players):
        game, time = (played["player"] == player).nonzero(as_tuple=True)
        possible = tables[player][seats[game, player], played["info_state"][game, time]] > 0
        wanted = (
            possible.byte().argmax(1) if edge == "lowest" else possible.shape[1] - 1 - possible.flip(1).byte().argmax(1)
        )
        assert game.numel() > 0
        assert torch.equal(played["action"][game, time], wanted)


def test_a_row_that_adds_up_to_slightly_less_than_one_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = expand(KuhnPoker())
    monkeypatch.setattr(simulation, "_uniform", lambda count, kind, *_: torch.full((count,), 0.99999, dtype=kind))
    tables = [torch.tensor([0.99995, 0.0]).expand(1, 6, 2)] * 2
    played = simulate(tree, tables, torch.zeros(10, 2, dtype=torch.int64), generator())
    assert bool((played["action"][played["player"] >= 0] == 0).all())


@pytest.mark.parametrize("width", range(1, 20))
def test_search_counts_the_ends_at_or_below_the_draw(width: int) -> None:
    draws = generator(width)
    last = torch.randint(0, width, (200,), generator=draws)
    last[0] = width - 1
    ends = torch.rand(200, width, dtype=torch.float64, generator=draws).mul(8).floor().div(8).sort(1).values
    ends[torch.arange(200), last] = 2.0
    ends[torch.arange(width) > last.unsqueeze(1)] = -1.0  # another row's, which must not be read
    draw = torch.rand(200, dtype=torch.float64, generator=draws).mul(8).floor().div(8)
    counted = simulation._count_passed(ends.flatten(), torch.arange(200) * width, last, width, draw)
    passed = (draw.unsqueeze(1) >= ends) & (torch.arange(width) <= last.unsqueeze(1))
    assert torch.equal(counted, passed.sum(1))


def node_probability(tree: GameTree, tables: list[Tensor]) -> Tensor:
    """Exact, by recursion in node order; ``tables``: one member a player."""
    reach = [1.0] * len(tree)
    parent, action, info, player = (t.tolist() for t in (tree.parent, tree.action, tree.info_state, tree.player))
    rows, chance = [table.tolist() for table in tables], tree.probability.tolist()
    for node in range(1, len(tree)):
        mover = player[parent[node]]
        edge = chance[node] if mover == CHANCE else rows[mover][info[parent[node]]][action[node]]
        reach[node] = reach[parent[node]] * edge
    return torch.tensor(reach, dtype=torch.float64)


def test_frequencies_agree_with_reach(tree: GameTree) -> None:
    games, tables = 100_000, random_tables(tree, 2)
    seats = torch.ones(games, tree.num_players, dtype=torch.int64)
    played = simulate(tree, tables, seats, generator(3))
    reach = node_probability(tree, [table[1] for table in tables])
    ends = tree.player == TERMINAL
    mean = reach[ends] @ tree.utility[ends]
    variance = reach[ends] @ tree.utility[ends] ** 2 - mean**2
    assert bool(((played["returns"].mean(0) - mean).abs() < 4 * (variance / games).sqrt()).all())
    squares = []
    for player in range(tree.num_players):
        mine, size = tree.player == player, tree.legal[player].shape[0]
        wanted = torch.zeros(size, dtype=torch.float64).index_add(0, tree.info_state[mine], reach[mine])
        seen = torch.bincount(played["info_state"][played["player"] == player], minlength=size) / games
        often = wanted * games > 50
        squares.append((((seen - wanted) ** 2) / (wanted * (1 - wanted) / games))[often])
    total = torch.cat(squares)
    assert float(total.max()) < 5**2  # the largest of up to 700 states: 4 is passed by chance once in 25 seeds
    assert abs(float(total.mean()) - 1) < 4 * (2 / total.numel()) ** 0.5  # the spread is that of independent draws


def test_seats_choose_the_members() -> None:
    tree = expand(KuhnPoker())
    passes, bets = torch.tensor([1.0, 0.0]).expand(6, 2), torch.tensor([0.0, 1.0]).expand(6, 2)
    tables = [torch.stack([passes, bets]), torch.stack([bets, passes, bets])]
    seats = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 2]]).repeat(50, 1)
    played = simulate(tree, tables, seats, generator())
    assert played["action"].view(50, 4, 3).unique(dim=0).tolist() == [[[0, 1, 0], [1, 1, -1], [0, 0, -1], [1, 1, -1]]]
    size = played["returns"].abs().view(50, 4, 2)
    assert size[:, :, 0].unique(dim=0).tolist() == [[1, 2, 1, 2]]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (lambda t: t[:1], "one for each of 2 players, got 1"),
        (lambda t: [t[0][0], t[1]], r"tables\[0\]: shape \[members, 936, 3\]|tables\[0\]: shape \[members, 468, 3\]"),
        (lambda t: [t[0], t[1] * 0.5], r"tables\[1\]: every row .* got sums from 0.5 to 0.5"),
        (lambda t: [t[0], torch.full_like(t[1], 1 / 3)], r"tables\[1\]: every row .* mask illegal actions"),
        (lambda t: [t[0], t[1] * torch.nan], r"tables\[1\]: every row"),
        (lambda t: [t[0], torch.cat([2 * t[1][..., :1] + 3, t[1][..., 1:] - 1], -1)], r"tables\[1\]: every row"),
    ],
)
def test_tables_that_are_no_policies_are_refused(tables, message: str) -> None:
    tree = expand(LeducPoker())
    with pytest.raises(ValueError, match=f"TreeSimulator: .*(?:{message})"):
        TreeSimulator(tree).prepare(tables(random_tables(tree, 1)))


@pytest.mark.parametrize(
    ("seats", "message"),
    [
        (torch.zeros(5, 3, dtype=torch.int64), r"seats: integers \[games, 2\], got torch.int64 of shape \[5, 3\]"),
        (torch.zeros(5, 2), r"seats: integers"),
        (torch.zeros(0, 2, dtype=torch.int64), r"seats: integers"),
        (torch.tensor([[0, 2]]), r"seats\[:, 1\]: members are 0 to 1, got 2 to 2"),
        (torch.tensor([[-1, 0]]), r"seats\[:, 0\]: members are 0 to 1, got -1 to -1"),
    ],
)
def test_seats_without_a_member_are_refused(seats: Tensor, message: str) -> None:
    tree = expand(KuhnPoker())
    with pytest.raises(ValueError, match=message):
        simulate(tree, random_tables(tree, 2), seats, generator())
