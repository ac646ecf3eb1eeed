"""Members that are networks alone: seating, likelihoods, the sampled hull distance, and played rules as data."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from datamodules.game_data import GameDataModule
from datamodules.games import Goofspiel, KuhnPoker, Negotiation, rock_paper_scissors
from datamodules.games.expand import expand
from datamodules.games.sequence_form import SequenceFormGame
from modules.contracts import PlayRequest, RulesGame
from modules.population import AlphaRank
from modules.population.neural import PPOResponse
from modules.psd_psro import PSDPSRO, SampledPSRO
from modules.psd_psro.hull import hull_distance, sampled_hull
from modules.psd_psro.policies import ActorNetworks, SeatedPolicies


def data(rules, **arguments) -> GameDataModule:
    module = GameDataModule(rules, expand=False, **arguments)
    module.setup("fit")
    return module


def networks(rules, symmetrize: bool = False) -> ActorNetworks:
    game = data(rules, symmetrize=symmetrize).rules_game
    assert game is not None
    return ActorNetworks(game, PPOResponse(hidden=[8]))


def actors(own: ActorNetworks, members: int, seed: int, scale: float = 3.0) -> dict[str, Tensor]:
    """Weights far enough from zero for policies that differ much."""
    drawn = own.mlp.init(members, torch.Generator().manual_seed(seed))
    return {name: scale * value if name.startswith("weight") else value for name, value in drawn.items()}


def uniform(observation: Tensor, legal: Tensor, player: Tensor, seat: Tensor) -> Tensor:
    return legal / legal.sum(1, keepdim=True)


def request(policy, groups: int = 2, episodes: int = 64, **arguments) -> PlayRequest:
    weights = [torch.full((groups, 3), 1 / 3, dtype=torch.float64)] * 2
    return PlayRequest((), weights, episodes, (1, 2, 3), policy=policy, **arguments)


# -- policies ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("symmetrize", [False, True])
def test_every_row_is_played_by_its_own_member(symmetrize):
    rules = KuhnPoker()
    own = networks(rules, symmetrize)
    stacks = [actors(own, 3, seed) for seed in range(1 if symmetrize else 2)]
    policies, rows = SeatedPolicies(own, stacks), []

    def spy(observation, legal, player, seat):
        probabilities = policies(observation, legal, player, seat)
        rows.append((observation, legal, player, seat, probabilities))
        return probabilities

    data(rules, symmetrize=symmetrize).batch(request(spy))
    observation, legal, player, seat, played = (torch.cat(part) for part in zip(*rows, strict=True))
    assert len(set(zip(player.tolist(), seat.tolist(), strict=True))) == 6
    features = own.features(observation, player)
    assert features.shape[1] == rules.observation_size + 2 * symmetrize
    for row in range(0, len(played), 7):
        stack = stacks[0 if symmetrize else int(player[row])]
        wanted = own.log_policies(stack, features[row : row + 1], legal[row : row + 1])[seat[row], 0].exp()
        assert torch.allclose(played[row], wanted, atol=1e-6)
    assert float(played.std(0).min()) > 0.05, "the members do not differ: the comparison shows nothing"


def test_seat_is_told_where_the_observation_does_not_tell_it():
    own = networks(KuhnPoker(), symmetrize=True)
    same = torch.zeros(2, KuhnPoker().observation_size)
    policies = SeatedPolicies(own, [actors(own, 1, 0)])
    zero = torch.zeros(2, dtype=torch.int64)
    first, second = policies(same, torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 1]), zero)
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 1 << 27])
def test_log_likelihoods_add_up_an_episodes_own_actions(monkeypatch, chunk):
    monkeypatch.setattr("modules.psd_psro.policies._CHUNK", chunk)
    own = networks(KuhnPoker())
    stack = actors(own, 3, 5)
    features = torch.rand(5, own.inputs, generator=torch.Generator().manual_seed(0))
    legal = torch.ones(5, 2, dtype=torch.bool)
    legal[3, 0] = False
    action, episode = torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 3, 3])
    found = own.log_likelihoods(stack, features, legal, action, episode, 4)
    taken = own.log_policies(stack, features, legal).gather(2, action.expand(3, 5).unsqueeze(2)).squeeze(2).double()
    wanted = torch.stack([taken[:, 0] + taken[:, 1], taken[:, 2], torch.zeros(3), taken[:, 3] + taken[:, 4]], 1)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.equal(found[:, 2], torch.zeros(3).double()), "an episode without own moves has likelihood 1"


@pytest.mark.parametrize("kind", ["vertices", "mixture"])
def test_sampled_distance_equals_the_exact_one_in_plan_space(kind):
    """Kuhn, seat 0: mean over 20,000 games against uniform play, in 4 standard errors of the sequence-form value."""
    rules = KuhnPoker()
    own, game = networks(rules), SequenceFormGame(expand(rules))
    members, learner = actors(own, 3, 1), actors(own, 1, 17)
    observations, legal = game.observations(0), game.legal(0)
    plans = [game.plans(0, own.log_policies(w, observations, legal).exp().double()) for w in (learner, members)]
    exact = hull_distance(plans[0][0], plans[1], game.reach(0), kind)
    assert float(exact.value) > 0.1

    def policy(observation, legal, player, seat):
        learnt = own.log_policies(learner, observation, legal)[0].exp()
        return torch.where((player == 0).unsqueeze(1), learnt, legal / legal.sum(1, keepdim=True))

    batch = data(rules).batch(request(policy, groups=1, episodes=20_000))
    episode, move = (batch["player"] == 0).nonzero(as_tuple=True)
    rows = {key: batch[key][episode, move] for key in ("observation", "legal", "action", "probability")}
    likelihood = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, episode, rows["probability"].double().log())
    theirs = own.log_likelihoods(members, rows["observation"], rows["legal"], rows["action"], episode, len(batch))
    bonus, sigma = sampled_hull(likelihood, theirs, kind)
    error = float(bonus.std()) / math.sqrt(len(batch))
    assert abs(float(bonus.mean()) - float(exact.value)) < 4 * error
    assert error < 0.03
    assert torch.allclose(sigma, exact.sigma, atol=0.05)


@pytest.mark.parametrize("kind", ["vertices", "mixture"])
def test_distance_of_a_clone_is_0_and_of_another_is_not(kind):
    rules = Goofspiel(num_cards=4)
    module = SampledPSRO(hull_distance=kind, episodes=64, simulations=64)
    module.trainer = trainer(data(rules))
    module.setup("fit")
    own, others = module.networks, None
    others = actors(own, 3, 3)
    batch = data(rules).batch(request(SeatedPolicies(own, [others, others]), episodes=200))
    seats = torch.zeros(len(batch), dtype=torch.int64)
    batch = batch[batch["seats"][:, 0] == 1]
    episode, move = (batch["player"] == seats[: len(batch), None]).nonzero(as_tuple=True)
    rows = {key: batch[key][episode, move] for key in ("observation", "legal", "action", "probability")}
    likelihood = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, episode, rows["probability"].double().log())
    arguments = (likelihood, rows["observation"], rows["legal"], rows["action"], episode)
    module.actors = lambda population: others  # type: ignore[method-assign]
    clone = module._distances(0, *arguments)
    assert float(clone.abs().max()) < 1e-4
    assert float(clone.mean().abs()) < 1e-5
    module.actors = lambda population: {k: v[[0, 2]] for k, v in others.items()}  # type: ignore[method-assign]
    assert float(module._distances(0, *arguments).mean()) > 0.1


# -- data -------------------------------------------------------------------------------------------------------------
def trainer(datamodule, world: int = 1, rank: int = 0):
    return SimpleNamespace(
        datamodule=datamodule,
        world_size=world,
        global_rank=rank,
        lightning_module=None,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def test_rules_are_played_without_a_tree():
    module = data(Goofspiel(num_cards=8))
    assert module.game is None
    assert module.simulator is None
    game = module.rules_game
    assert isinstance(game, RulesGame)
    assert (game.num_players, game.num_actions, game.max_moves, game.zero_sum) == (2, 8, 14, True)
    assert not game.symmetric
    assert module.digest()["game"] == game.name
    batch = module.batch(request(uniform))
    assert batch["observation"].shape == (128, 14, game.observation_size)
    assert set(module.describe()) <= {*batch.keys()}
    assert torch.equal(batch["legal"].any(-1), batch["player"] >= 0)
    assert batch["legal"].gather(-1, batch["action"].unsqueeze(-1)).all()
    assert torch.equal(batch["returns"].sum(1), torch.zeros(128, dtype=torch.float64))
    assert batch["group"].bincount().tolist() == [64, 64]
    short = module.batch(request(uniform, returns_only=True))
    assert set(short.keys()) == {"returns", "seats", "group", "stream"}
    assert torch.equal(short["returns"], batch["returns"]), "the same games, moves left out"


def test_two_ranks_play_the_games_of_one_and_agree_in_shape():
    """Kuhn's games end after 2 or 3 moves of players; ranks that gather pad to the rules' bound of 5."""
    whole = data(KuhnPoker()).batch(request(uniform, episodes=8))
    assert whole["player"].shape[1] == 3
    parts = []
    for rank in range(2):
        module = GameDataModule(KuhnPoker(), expand=False)
        module.trainer = trainer(module, world=2, rank=rank)
        module.setup("fit")
        parts.append(module.batch(request(uniform, episodes=8)))
        assert parts[-1]["player"].shape[1] == KuhnPoker().max_moves
    both = torch.cat(parts)
    both = both[both["stream"].argsort(stable=True)]
    for key in whole.keys():  # noqa: SIM118 - a TensorDict is no dictionary
        theirs = both[key][:, :3] if key in ("observation", "legal", "action", "probability", "player") else both[key]
        assert torch.equal(whole[key], theirs), key
    assert torch.equal(both["player"][:, 3:], torch.full((16, 2), -1))
    assert bool((both["probability"][:, 3:] == 1).all())


# -- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"simulations": 0}, "simulations must be >= 2, got 0"),
        ({"updates": 0}, "updates must be >= 1, got 0"),
        ({"episodes": 0}, "episodes must be >= 1, got 0"),
        ({"evaluation_steps": 0}, "evaluation_steps must be >= 1, got 0"),
        ({"simulations": 10, "evaluation_steps": 4}, "multiple of evaluation_steps"),
        ({"weight": -1.0}, "weight must be finite and >= 0, got -1"),
        ({"weight": math.nan}, "weight must be finite"),
        ({"max_bonus": 0.0}, "max_bonus must be > 0, got 0"),
    ],
)
def test_values_out_of_range_are_refused(arguments, says):
    with pytest.raises(ValueError, match=f"SampledPSRO: .*{says}"):
        SampledPSRO(**arguments)


@pytest.mark.parametrize(
    ("arguments", "datamodule", "says"),
    [
        ({}, {"symmetrize": True, "streams": 3}, "episodes must be a multiple of 6, .*times the 2 seats, got 1024"),
        ({"simulations": 18}, {}, "simulations / evaluation_steps must be a multiple of 4, .*got 18"),
        ({}, {"game": Negotiation()}, "NashLP needs two players and zero sum, got .*AlphaRank"),
        ({}, {"game": KuhnPoker(players=3)}, "NashLP needs two players and zero sum"),
        ({}, {"expand": True}, "played by its rules, got GameDataModule without: .*expand: false"),
    ],
)
def test_data_that_do_not_fit_are_refused(arguments, datamodule, says):
    module = SampledPSRO(**arguments)
    played = GameDataModule(**{"game": KuhnPoker(), "expand": False, **datamodule})
    played.setup("fit")
    module.trainer = trainer(played)
    with pytest.raises(ValueError, match=f"SampledPSRO: .*{says}"):
        module.setup("fit")


def test_three_players_are_set_up_with_a_solver_that_serves_them():
    module = SampledPSRO(meta_solver=AlphaRank(), episodes=64, simulations=64)
    module.trainer = trainer(data(KuhnPoker(players=3)))
    module.setup("fit")
    assert module.populations == 3


@pytest.mark.parametrize(
    ("game", "arguments", "says"),
    [
        (rock_paper_scissors(), {}, "expand: only rules are played without a tree"),
        (KuhnPoker(players=3), {"symmetrize": True}, "symmetrize: needs two players and zero sum"),
        (Negotiation(), {"symmetrize": True}, "symmetrize: needs two players and zero sum"),
    ],
)
def test_games_that_need_a_tree_are_refused(game, arguments, says):
    with pytest.raises(ValueError, match=f"GameDataModule: {says}"):
        data(game, **arguments)


def test_a_module_that_needs_the_tree_is_refused():
    module = GameDataModule(KuhnPoker(), expand=False)
    module.trainer = trainer(module)
    module.trainer.lightning_module = PSDPSRO()
    with pytest.raises(ValueError, match="GameDataModule: expand: PSDPSRO needs the game tree, .*SampledPSRO"):
        module.setup("fit")


def test_a_policy_on_a_tree_and_tables_on_rules_are_refused():
    tree = GameDataModule(KuhnPoker())
    tree.setup("fit")
    with pytest.raises(ValueError, match="GameDataModule: expand: a policy plays by the rules"):
        tree.batch(request(uniform))
    with pytest.raises(ValueError, match="has no game tree"):
        data(KuhnPoker()).batch(PlayRequest([], [torch.ones(1, 1)] * 2, 4, (0,)))
