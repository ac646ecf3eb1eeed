"""Sampled play and the TorchRL environment: against the exact tree, against each other, and at their edges."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs.utils import check_env_specs

from datamodules.games.expand import expand
from datamodules.games.goofspiel import Goofspiel
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.leduc import LeducPoker
from datamodules.games.liars_dice import LiarsDice
from datamodules.games.negotiation import Negotiation
from datamodules.games.play import play
from datamodules.games.rules import TERMINAL, Rules, sample_rows
from datamodules.games.rules_env import RulesEnv
from datamodules.games.tree import GameTree

GAMES: dict[str, Callable[[], Rules]] = {
    "kuhn-3": lambda: KuhnPoker(3),
    "leduc": LeducPoker,
    "liars": lambda: LiarsDice(2, 2),
    "goofspiel": lambda: Goofspiel(4, points_order="random"),
    "negotiation": Negotiation,
}


def skewed(observation: Tensor, legal: Tensor, player: Tensor, seat: Tensor) -> Tensor:
    """A fixed policy that differs by observation and seat: softmax of a linear map with set weights."""
    features, actions = observation.shape[1], legal.shape[1]
    weights = torch.sin(torch.arange(features * actions, dtype=torch.float64)).view(features, actions)
    logits = observation.double() @ weights * (1.0 + 0.5 * seat.unsqueeze(1))
    return logits.masked_fill(~legal, -torch.inf).softmax(1)


def visits(tree: GameTree, seats: list[int]) -> tuple[list[Tensor], Tensor]:
    """Exact probability of each player's information states being met, and expected payoffs, under ``skewed``."""
    tables = [
        skewed(obs, legal, torch.full((len(obs),), p), torch.full((len(obs),), seats[p]))
        for p, (obs, legal) in enumerate(zip(tree.observations, tree.legal, strict=True))
    ]
    reach = torch.ones(len(tree), dtype=torch.float64)
    for node in range(1, len(tree)):
        parent = int(tree.parent[node])
        mover = int(tree.player[parent])
        edge = tables[mover][tree.info_state[parent], tree.action[node]] if mover >= 0 else tree.probability[node]
        reach[node] = reach[parent] * edge
    met = []
    for player, table in enumerate(tables):
        rows = tree.player == player
        met.append(torch.zeros(len(table)).double().index_add_(0, tree.info_state[rows], reach[rows]))
    return met, reach @ tree.utility


def env_games(rules: Rules, env: RulesEnv, seats: Tensor, generator: torch.Generator) -> TensorDict:
    """Games through the environment in the format of ``play``, actions drawn by ``skewed`` for running games only."""
    data, moves, returns = env.reset(), [], torch.zeros(seats.shape)
    while not bool(data["done"].all()):
        mover = data["player"].squeeze(1)
        rows = (mover >= 0).nonzero().squeeze(1)
        observation, legal = data["observation"], data["action_mask"]
        chances = skewed(observation[rows], legal[rows], mover[rows], seats[rows, mover[rows]])
        action = torch.zeros(len(seats), dtype=torch.int64)
        action[rows] = sample_rows(chances, generator)
        taken = torch.ones(len(seats), dtype=torch.float64)
        taken[rows] = chances.gather(1, action[rows].unsqueeze(1)).squeeze(1)
        running = (mover >= 0).unsqueeze(1)
        moves.append((observation, legal & running, action, taken, torch.where(mover >= 0, mover, -1)))
        data = env.step(data.set("action", action))["next"]
        returns += data["reward"]
    names = ("observation", "legal", "action", "probability", "player")
    columns = {name: torch.stack(part, dim=1) for name, part in zip(names, zip(*moves, strict=True), strict=True)}
    return TensorDict({**columns, "returns": returns.double(), "seats": seats}, batch_size=[len(seats)])


@pytest.mark.parametrize("game", GAMES)
def test_play_and_environment_make_the_same_games_step_by_step(game: str) -> None:
    """One generator for chance and actions, drawn from in the same order: all tensors equal."""
    rules = GAMES[game]()
    seats = torch.arange(64).unsqueeze(1).expand(-1, rules.num_players) % 3
    fused = play(rules, skewed, seats, torch.Generator().manual_seed(5))
    env = RulesEnv(rules, 64, seed=5)
    stepped = env_games(rules, env, seats, env.generator)
    assert set(fused.keys()) == set(stepped.keys())
    for name in sorted(fused.keys()):
        torch.testing.assert_close(fused[name], stepped[name], rtol=0, atol=1e-6 if name == "returns" else 1e-12)


@pytest.mark.parametrize("game", ["leduc", "goofspiel-4"])
def test_sampled_games_meet_information_states_as_often_as_the_tree_says(game: str) -> None:
    """Play and environment, different seeds: frequencies within five standard errors of exact reach; payoffs."""
    rules = LeducPoker() if game == "leduc" else Goofspiel(4)
    tree, count = expand(rules), 20_000
    met, value = visits(tree, seats=[0, 1])
    seats = torch.tensor([[0, 1]]).expand(count, -1)
    fused = play(rules, skewed, seats, torch.Generator().manual_seed(1))
    env = RulesEnv(rules, count, check_actions=False, seed=2)
    stepped = env_games(rules, env, seats, torch.Generator().manual_seed(3))
    for games in (fused, stepped):
        spread = games["returns"].std(0) / count**0.5
        assert ((games["returns"].mean(0) - value).abs() < 4 * spread).all()
        for player in range(2):
            seen = games["observation"][games["player"] == player].double()
            keys = torch.randn(seen.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(9))
            known, order = (tree.observations[player].double() @ keys).sort()
            place = torch.searchsorted(known, seen @ keys - 1e-9)
            counted = torch.zeros_like(known).index_add_(0, order[place], torch.ones(len(place)).double()) / count
            error = (met[player] * (1 - met[player]) / count).sqrt()
            assert ((counted - met[player]).abs() <= 5 * error + 3 / count).all()
            assert counted.max() > 0.05


def test_finished_games_leave_the_batch_and_padding_is_marked() -> None:
    rules, asked = KuhnPoker(), []

    def policy(observation: Tensor, legal: Tensor, player: Tensor, seat: Tensor) -> Tensor:
        asked.append((len(observation), set(player.tolist()), set(seat.tolist())))
        return torch.full(legal.shape, 0.5)

    seats = torch.tensor([[10, 20]]).expand(400, -1)
    games = play(rules, policy, seats, torch.Generator().manual_seed(0))
    lengths = (games["player"] >= 0).sum(1)
    assert [rows for rows, _, _ in asked] == [int((lengths > t).sum()) for t in range(3)]
    assert [(p, s) for _, p, s in asked] == [({0}, {10}), ({1}, {20}), ({0}, {10})]
    assert games.batch_size == (400,)
    assert sorted(lengths.unique().tolist()) == [2, 3]
    short = lengths == 2
    assert games["player"][short, 2].eq(-1).all()
    assert games["probability"][short, 2].eq(1).all()
    assert not games["observation"][short, 2].any()
    assert not games["legal"][short, 2].any()
    assert games["probability"][~short].eq(0.5).all()
    assert games["returns"].abs().min() >= 1
    assert torch.equal(games["seats"], seats)


@pytest.mark.parametrize("game", GAMES)
def test_all_tensors_are_made_on_the_states_device(game: str) -> None:
    """With another default device, a tensor made without naming one would meet the states' and raise."""
    rules, generator = GAMES[game](), torch.Generator().manual_seed(0)
    seats = torch.zeros(8, rules.num_players, dtype=torch.int64)
    uniform = lambda observation, legal, player, seat: legal / legal.sum(1, keepdim=True)  # noqa: E731
    expected = play(rules, uniform, seats, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        games = play(rules, uniform, seats, generator)
        data = RulesEnv(rules, 8, device="cpu").rollout(30, break_when_any_done=False)
    assert games["returns"].device.type == data["next", "reward"].device.type == "cpu"
    assert torch.equal(games["returns"], expected["returns"])


def test_play_refuses_seats_and_policies_that_do_not_fit() -> None:
    rules, generator = KuhnPoker(), torch.Generator().manual_seed(0)
    seats = torch.zeros(4, 2, dtype=torch.int64)

    def constant(*row: float) -> Callable[..., Tensor]:
        return lambda observation, legal, player, seat: torch.tensor(row).expand(len(legal), -1)

    with pytest.raises(ValueError, match=r"play: seats: must be \[envs >= 1, 2\], got \[4, 3\]"):
        play(rules, constant(0.5, 0.5), torch.zeros(4, 3, dtype=torch.int64), generator)
    with pytest.raises(ValueError, match=r"play: policy: must give probabilities \[4, 2\], got \[4, 3\]"):
        play(rules, constant(0.5, 0.5, 0.0), seats, generator)
    for row in ((0.7, 0.7), (1.5, -0.5), (float("nan"), 1.0), (float("inf"), 0.0)):
        with pytest.raises(ValueError, match="play: policy: each row must be finite"):
            play(rules, constant(*row), seats, generator)
    with pytest.raises(ValueError, match="0 on illegal actions"):
        play(LeducPoker(), constant(0.2, 0.4, 0.4), seats, generator)


@pytest.mark.parametrize("game", GAMES)
def test_environment_passes_torchrl_spec_check(game: str) -> None:
    env = RulesEnv(GAMES[game](), 7)
    check_env_specs(env, seed=0)
    check_env_specs(env, break_when_any_done="both")


def test_environment_is_deterministic_by_its_seed() -> None:
    first, second = RulesEnv(LeducPoker(), 32), RulesEnv(LeducPoker(), 32, seed=9)
    first.set_seed(9)
    torch.manual_seed(0)
    one = first.rollout(20, break_when_any_done=False)
    torch.manual_seed(1)
    two = second.rollout(20, break_when_any_done=False)
    assert all(torch.equal(one[key], two[key]) for key in one.keys(True, True))
    assert not torch.equal(second.rollout(20, break_when_any_done=False)["state"], two["state"])


def test_environment_starts_finished_games_anew_and_leaves_the_others() -> None:
    rules = LeducPoker()
    env = RulesEnv(rules, 64, seed=3)
    data = env.rollout(60, break_when_any_done=False)
    done = data["next", "done"].squeeze(-1)
    assert done.any(1).all()
    following, after = data["state"][:, 1:], data["next", "state"][:, :-1]
    kept = ~done[:, :-1]
    assert torch.equal(following[kept], after[kept])
    restarted = following[~kept]
    assert (restarted[:, :2] >= 0).all()
    assert (restarted[:, 2:] == -1).all()
    assert (data["player"] >= 0).all()
    torch.testing.assert_close(data["next", "reward"][done].sum(-1), torch.zeros(int(done.sum())))
    assert not data["next", "reward"][~done].any()
    assert (data["action_mask"].gather(-1, data["action"].unsqueeze(-1))).all()
    expected = rules.returns(data["next", "state"].flatten(0, 1)).view(64, 60, 2)
    torch.testing.assert_close(data["next", "reward"], expected.float())


def test_finished_game_stays_finished_without_further_reward() -> None:
    env = RulesEnv(KuhnPoker(), 16, seed=0)
    data = env.reset()
    for _ in range(3):
        data = env.step(env.rand_action(data))["next"]
    over = data["done"].squeeze(1)
    assert over.all()
    assert (data["player"] == TERMINAL).all()
    assert data["action_mask"].all()
    assert not data["observation"].any()
    again = env.step(data.clone().set("action", torch.ones(16, dtype=torch.int64)))["next"]
    assert torch.equal(again["state"], data["state"])
    assert not again["reward"].any()


def test_environment_refuses_illegal_actions_and_bad_sizes() -> None:
    env = RulesEnv(LeducPoker(), 3)
    data = env.reset()
    with pytest.raises(ValueError, match=r"RulesEnv: action: must be one of \[1, 2\] in row 1, got 0"):
        env.step(data.set("action", torch.tensor([1, 0, 2])))
    with pytest.raises(ValueError, match=r"RulesEnv: action: must be one of \[1, 2\] in row 2, got 3"):
        env.step(data.set("action", torch.tensor([1, 1, 3])))
    with pytest.raises(ValueError, match="RulesEnv: rand_action: tensordict must hold 'action_mask'"):
        env.rand_action()
    with pytest.raises(ValueError, match="RulesEnv: envs: must be an integer >= 1, got 0"):
        RulesEnv(LeducPoker(), 0)
