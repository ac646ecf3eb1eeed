"""Probes of solutions of games: closed forms, degenerate players, what is wrong on purpose, exact against played."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.game_data import GameDataModule
from datamodules.games import (
    Goofspiel,
    KuhnPoker,
    MixtureModelGame,
    Negotiation,
    NormalFormGame,
    OpenSpielGame,
    battle_of_sexes,
    prisoners_dilemma,
    rock_paper_scissors,
)
from datamodules.games.expand import expand
from datamodules.games.sequence_form import SequenceFormGame
from modules.assurance.figures import Figure
from modules.assurance.probe import Block, block_seed
from modules.assurance.probes import all_probes
from modules.assurance.probes.games import share_of_best
from modules.assurance.subject import AssuranceError, Subject, mapping_digest, state_digest
from modules.assurance.suites import SuiteSettings, run_suite
from modules.contracts import PlanGame, PlaysGames
from modules.population import AlphaRank
from modules.population.members import Members
from modules.population.neural import PPOResponse
from modules.psd_psro import PSDPSRO, ExtensiveFormOracle, GradientResponse, SampledPSRO, played_assurance
from modules.psd_psro.assurance import Population, SolvedGame, card
from modules.psd_psro.hull import hull_distance
from modules.psd_psro.played_assurance import PlayedGame, played_subject
from modules.seeds import stream

ROCK, PAPER, SCISSORS = torch.eye(3, dtype=torch.float64).unsqueeze(1)


def _solved(game: PlanGame, strategies: list[Tensor], sigma: list[list[float]] | None = None) -> Subject:
    """A solution; without ``sigma`` every member is played alike."""
    tensors = {f"strategy_{p}": members for p, members in enumerate(strategies)}
    for p, members in enumerate(strategies):
        given = [1 / len(members)] * len(members) if sigma is None else sigma[p]
        tensors[f"meta_strategy_{p}"] = torch.tensor(given, dtype=torch.float64)
    population = Population(tensors)
    trials = SolvedGame(game, population, len(strategies), False)
    return Subject("game", population, trials.capabilities(), card("test", game.name, game.num_players))


def _figure(subject: Subject, probe: str, name: str) -> Figure:
    return run_suite(subject, SuiteSettings("custom", (probe,))).figure(name)


def _value(subject: Subject, probe: str, name: str) -> float:
    found = _figure(subject, probe, name)
    assert found.value is not None, found.reason
    return found.value


@pytest.fixture(scope="module")
def kuhn() -> SequenceFormGame:
    return SequenceFormGame(expand(KuhnPoker()))


def _uniform(game: SequenceFormGame) -> list[Tensor]:
    return [game.uniform_strategy(player).unsqueeze(0) for player in range(game.num_players)]


def _random(game: PlanGame, count: int, seed: int) -> list[Tensor]:
    return [game.random_strategies(p, count, stream(seed, p)) for p in range(game.num_players)]


# -- oracle group 3; the functions below the probe are compared in tests/oracle/population and tests/oracle/games --
def test_uniform_kuhn_has_nashconv_11_12ths_and_is_worth_nothing(kuhn):
    subject = _solved(kuhn, _uniform(kuhn))
    found = _figure(subject, "exploitability", "r.nashconv")
    assert found.value == pytest.approx(11 / 12, abs=1e-12)
    assert dict(found.conditions) == {"best responses by backward induction": found.value}
    assert found.baselines == {"equilibrium": 0.0, "uniformly random play": pytest.approx(11 / 12)}
    assert _value(subject, "value_against_random", "u.value") == pytest.approx(0.0, abs=1e-12)


def test_rock_paper_scissors():
    game = rock_paper_scissors()
    mixed = _solved(game, [torch.stack([ROCK, PAPER, SCISSORS])])
    assert _value(mixed, "exploitability", "r.nashconv") == 0.0
    assert _value(mixed, "restricted_game", "r.pop_ex") == 0.0
    rock = _solved(game, [ROCK.unsqueeze(0)])
    found = _figure(rock, "exploitability", "r.nashconv")
    assert found.value == 2.0
    assert list(found.conditions) == ["best of all pure strategies"]
    assert _value(rock, "restricted_game", "r.pop_ex") == 0.0  # rock alone knows no better
    undefined = _figure(rock, "value_against_random", "u.value")
    assert undefined.status == "undefined"
    assert "no scale" in undefined.reason


@pytest.mark.parametrize("seed", [0, 1])
def test_nashconv_and_payoffs_equal_open_spiel(seed):
    pyspiel = pytest.importorskip("pyspiel")
    game = SequenceFormGame(OpenSpielGame("kuhn_poker(players=3)").tree(10**5))
    tables = _random(game, 1, seed)
    assert game.tree.labels is not None
    rows = {
        label: [(int(a), float(table[0, state, a])) for a in game.legal(player)[state].nonzero()]
        for player, table in enumerate(tables)
        for state, label in enumerate(game.tree.labels[player])
    }
    theirs = pyspiel.nash_conv(pyspiel.load_game("kuhn_poker(players=3)"), pyspiel.TabularPolicy(rows), False)
    subject = _solved(game, tables)
    assert _value(subject, "exploitability", "r.nashconv") == pytest.approx(theirs, abs=1e-10)
    assert _value(subject, "welfare", "e.welfare") == 0.0


# -- figures by hand --
def test_rock_and_paper_leave_one_gain_within_and_two_thirds_outside():
    """Of p rock and 1 - p paper, paper gains p and scissors 1 - 2 p: the larger is least at p = 1/3, for both seats."""
    subject = _solved(rock_paper_scissors(), [torch.stack([ROCK, PAPER])], [[1.0, 0.0]])
    assert _value(subject, "restricted_game", "r.pop_ex") == pytest.approx(2.0)
    assert _value(subject, "population_hull", "r.pe") == pytest.approx(2 / 3, abs=1e-9)


def test_support_and_entropy():
    subject = _solved(rock_paper_scissors(), [torch.stack([ROCK, PAPER, SCISSORS])], [[0.5, 0.5, 0.0]])
    assert _value(subject, "meta_strategy", "i.support") == 2.0
    assert _value(subject, "meta_strategy", "i.support_entropy") == pytest.approx(math.log(2))


def test_two_pure_strategies_are_as_far_apart_as_smoothing_lets_them():
    high, low = 1.001 / 1.003, 0.001 / 1.003
    subject = _solved(rock_paper_scissors(), [torch.stack([ROCK, PAPER])])
    wanted = (high - low) * math.log(high / low)
    assert _value(subject, "population_diversity", "i.div") == pytest.approx(wanted, abs=1e-6)
    same = _solved(rock_paper_scissors(), [torch.stack([ROCK, ROCK])])
    assert _value(same, "population_diversity", "i.div") == pytest.approx(0.0, abs=1e-6)
    alone = _figure(_solved(rock_paper_scissors(), [ROCK.unsqueeze(0)]), "population_diversity", "i.div")
    assert (alone.status, "no others" in alone.reason) == ("undefined", True)


def test_a_best_response_to_random_play_is_worth_1_and_far_from_safe(kuhn):
    plans = [kuhn.plans(p, table[0]) for p, table in enumerate(_uniform(kuhn))]
    best = [kuhn.best_response(p, kuhn.payoff_vector(p, plans))[0].unsqueeze(0) for p in range(2)]
    subject = _solved(kuhn, best)
    assert _value(subject, "value_against_random", "u.value") == pytest.approx(1.0)
    assert _value(subject, "exploitability", "r.nashconv") > 0.5


# -- what is wrong on purpose --
def test_illegal_mass_in_one_state_of_one_member_is_seen():
    game = SequenceFormGame(expand(Goofspiel(num_cards=3, imp_info=True)))
    tables = _random(game, 3, 0)
    assert _value(_solved(game, tables), "legal_play", "c.seat") == 0.0
    state = int((~game.legal(1)).any(1).nonzero()[0])
    tables[1][2, state] = torch.where(game.legal(1)[state], 0.9 * tables[1][2, state], 0.1)
    subject = _solved(game, tables)
    assert _value(subject, "legal_play", "c.seat") == pytest.approx(1 / sum(game.num_states(p) for p in range(2)))
    found = _figure(subject, "distributions", "c.mix")
    assert found.value == pytest.approx(0.1)
    assert list(found.conditions) == ["members' actions"]


def test_a_mixture_that_does_not_sum_to_1_is_seen(kuhn):
    tables = _random(kuhn, 2, 0)
    assert _value(_solved(kuhn, tables), "distributions", "c.mix") < 1e-12
    found = _figure(_solved(kuhn, tables, [[0.5, 0.6], [0.5, 0.5]]), "distributions", "c.mix")
    assert found.value == pytest.approx(0.1)
    assert list(found.conditions) == ["meta-strategies"]


def test_averaging_actions_without_reach_does_not_pay_what_the_members_pay(kuhn, monkeypatch):
    """The classic mistake: the mixture's behaviour is the plain mean of the members' tables."""
    tables = _random(kuhn, 2, 3)
    subject = _solved(kuhn, tables)
    means = [table.mean(0) for table in tables]
    monkeypatch.setattr(kuhn, "strategy_of", lambda player, plan: means[player])
    found = _figure(subject, "distributions", "c.mix")
    assert found.value is not None
    assert found.value > 1e-3
    assert list(found.conditions) == ["the mixture's payoffs"]


# -- two seats together --
def test_prisoners_gain_by_keeping_silent_together():
    game = prisoners_dilemma()
    pure = torch.eye(2, dtype=torch.float64).unsqueeze(1)
    sums = game.table.sum(0)
    worst = int(torch.diagonal(sums).argmin())
    subject = _solved(game, [pure[worst : worst + 1]] * game.num_players if not game.symmetric else [pure[[worst]]])
    assert _value(subject, "exploitability", "r.nashconv") == 0.0, "defecting is the equilibrium"
    found = _figure(subject, "joint_play", "e.collude")
    gain = float(sums.max() - sums[worst, worst])
    assert gain > 0
    assert found.value == pytest.approx(gain)
    assert list(found.conditions) == ["seats 0 and 1: all pure pairs"]
    assert _value(subject, "welfare", "e.welfare") == float(sums[worst, worst])


def test_of_three_the_pair_that_can_rob_the_third_is_found():
    """Seats 0 and 2 take 3 from seat 1 where both play action 1; nothing else pays."""
    payoffs = torch.zeros(3, 2, 2, 2)
    payoffs[:, 1, :, 1] = torch.tensor([1.0, -3.0, 2.0]).view(3, 1)
    game = NormalFormGame(payoffs)
    first = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    found = _figure(_solved(game, [first] * 3), "joint_play", "e.collude")
    assert found.value == pytest.approx(3.0)
    assert list(found.conditions) == ["seats 0 and 2: all pure pairs"]
    second = first.flip(-1)
    robbed = _figure(_solved(game, [second, first, second]), "joint_play", "e.collude")
    assert dict(robbed.conditions) == {"seats 0 and 1: all pure pairs": 2.0}  # seat 0 gives up 1, seat 1 saves 3


def test_collusion_of_two_in_a_zero_sum_game_is_0_by_definition(kuhn):
    found = _figure(_solved(kuhn, _uniform(kuhn)), "joint_play", "e.collude")
    assert found.value == 0.0
    assert list(found.conditions) == ["two players, zero-sum: 0 by definition"]


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_what_all_pure_pairs_do(seed):
    table = torch.rand(2, 4, 5, generator=stream(seed), dtype=torch.float64)
    game = NormalFormGame(table)
    subject = _solved(game, _random(game, 2, seed))
    trials: SolvedGame = subject["joint_gain"].__self__
    profile = trials.profile()
    exact = trials._best_pair((0, 1), profile)
    assert exact == pytest.approx(float(table.sum(0).max()))
    assert trials._searched_pair((0, 1), profile) == pytest.approx(exact)


def test_bargainers_leave_a_joint_gain_and_refusing_leaves_all():
    game = SequenceFormGame(expand(Negotiation(max_offers=1)))
    subject = _solved(game, _random(game, 2, 0))
    found = _figure(subject, "joint_play", "e.collude")
    apart = _value(subject, "welfare", "e.welfare")
    # with one offer the best joint play depends on the proposer's valuation alone, the other's being averaged
    worth = Negotiation(max_offers=1).worth
    joint = float((worth + 4 - worth.mean(0)).max(1).values.mean())
    assert found.value == pytest.approx(joint - apart)
    refusing = [table.clone() for table in _uniform(game)]
    refusing[1] = torch.zeros_like(refusing[1])
    refusing[1][..., -1] = 1.0  # every offer
    idle = _solved(game, refusing)
    assert _value(idle, "welfare", "e.welfare") == 0.0
    assert _value(idle, "value_against_random", "u.value") < 0


# -- whole suites --
def test_a_suite_leaves_everything_as_it_was_and_says_the_same_twice(kuhn):
    subject = _solved(kuhn, _random(kuhn, 3, 1))
    before = state_digest(subject.model)
    first, second = (run_suite(subject, SuiteSettings("rice")) for _ in range(2))
    assert state_digest(subject.model) == before
    assert first.figures == second.figures
    assert first.figure("c.rollback").value == 1.0
    assert first.figure("i.card").value == first.figure("e.provenance").value == 1.0
    row = {"r.nashconv", "r.pop_ex", "r.pe", "i.support", "i.support_entropy", "i.div", "c.seat", "c.mix", "e.collude"}
    assert {name for name in row | {"e.welfare", "u.value"} if not first.figure(name).measured} == set()


def test_a_continuous_game_names_its_own_search():
    game = MixtureModelGame()
    subject = _solved(game, [game.random_strategies(0, 3, stream(0))])
    found = run_suite(subject, SuiteSettings("rice"))
    assert "can miss the best" in next(iter(found.figure("r.nashconv").conditions))
    assert found.figure("c.seat").status == "not_applicable"
    assert abs(found.figure("u.value").value or 0.0) < 0.1  # points that a population starts from are random play


def _trainer(datamodule):
    return SimpleNamespace(
        datamodule=datamodule, world_size=1, global_rank=0, is_global_zero=True, lightning_module=None, max_epochs=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip


def _module(game, **arguments) -> PSDPSRO:
    data = GameDataModule(game)
    data.setup("fit")
    module = PSDPSRO(**arguments)
    module.trainer = _trainer(data)  # type: ignore[assignment]
    module.setup("fit")
    return module


def test_training_goes_on_after_a_suite_in_inference_mode():
    """What a suite makes the module keep must not be tensors of inference mode, which no gradient goes through."""
    module = _module(KuhnPoker(), oracle=GradientResponse(updates=2))
    with torch.inference_mode():
        run_suite(module.assurance_subject(), SuiteSettings("rice"))
    module.begin_iteration()
    for step in range(2):
        module.response_step({}, step)  # type: ignore[arg-type]
    module.end_response()
    assert [len(members) for members in module.members] == [2, 2]


def test_the_subject_shares_the_modules_memory():
    module = _module(KuhnPoker())
    subject = module.assurance_subject()
    module.members[0]["strategy"][0, 0] = torch.tensor([0.25, 0.75])
    assert subject.model["strategy_0"][0, 0].tolist() == [0.25, 0.75]  # type: ignore[index]


def test_xdo_is_measured_by_its_own_solution():
    module = _module(KuhnPoker(), scheme=ExtensiveFormOracle(), init="pure")
    found = run_suite(module.assurance_subject(), SuiteSettings("rice"))
    with torch.no_grad():
        assert found.figure("r.nashconv").value == pytest.approx(module.measure(False)["meta/nashconv"])
    assert found.figure("i.support").status == "not_applicable"
    assert found.figure("c.rollback").value == 1.0


def test_payoffs_of_a_file_have_no_known_licence():
    facts = card("PSDPSRO", "payoff_file(league)", 2)
    assert (facts.licence, facts.data[0].licence) == ("unknown", "unknown")


# -- games that are only played --
def _played(rules, members: int = 1, scale: float = 0.01, symmetrize: bool = True, **arguments) -> Subject:
    data = GameDataModule(rules, symmetrize=symmetrize, expand=False)
    data.setup("fit")
    assert isinstance(data, PlaysGames)
    module = SampledPSRO(PPOResponse([16], 1e-2), episodes=64, simulations=64, **arguments)
    module.trainer = _trainer(data)  # type: ignore[assignment]
    module.setup("fit")
    module.initialise()
    for p in range(module.populations):
        drawn = module.response._make_networks(module.networks.inputs, module.networks.actions)
        weights = {
            f"{network}.{name}": scale * 100 * value if (network, name) == ("actor", "weight_1") else value
            for network, mlp in drawn.items()
            for name, value in mlp.init(members, stream(p)).items()
        }
        fresh = Members()
        fresh.extend(weights)
        module.members[p] = fresh
        module.meta_strategies[p] = torch.full((members,), 1 / members, dtype=torch.float64)
    return played_subject(module)


def _block(probe: str, count: int, index: int = 0) -> Block:
    return Block(index, index * count, count, "fresh", block_seed(7, 0, probe, "fresh", index))


def _played_values(subject: Subject, probe: str, count: int, index: int = 0):
    return all_probes()[probe].run(subject, _block(probe, count, index))


def _tables(subject: Subject, game: SequenceFormGame) -> list[Tensor]:
    """The members' behaviour ``[members, states, actions]`` in the information states of both seats."""
    trials: PlayedGame = subject["solution_games"].__self__
    found = []
    for player in range(2):
        seen, legal = game.observations(player), game.legal(player)
        features = trials.networks.features(seen, torch.full((len(seen),), player))
        found.append(trials.networks.log_policies(trials._actors(0), features, legal).exp().double().detach())
    return found


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setitem(played_assurance.TRAINING, "rice", (25, 512))  # type: ignore[arg-type]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(played_assurance.TRAINING, "rice", (2, 64))  # type: ignore[arg-type]


def test_played_figures_agree_with_exact_ones(kuhn, fast):
    """Kuhn poker, members far from uniform; the exact figures are those of the same tables."""
    subject = _played(KuhnPoker(), members=3, scale=3.0)
    tables = _tables(subject, kuhn)
    exact = _solved(kuhn, tables)
    nashconv = _value(exact, "exploitability", "r.nashconv")
    ((how, gains),) = _played_values(subject, "trained_exploiter", 8000)["r.nashconv"].items()  # type: ignore[union-attr]
    assert how == "responses by PPO, 25 updates of 512 games: a lower bound"
    error = gains.std() / math.sqrt(len(gains))
    assert 0.75 * nashconv < gains.mean() < nashconv + 4 * error

    found = _played_values(subject, "played_members", 4000)
    plans = [kuhn.plans(p, table) for p, table in enumerate(tables)]
    solution = [one.mean(0) for one in plans]
    for k, sampled in enumerate(found["r.pop_ex"].values()):  # type: ignore[union-attr]
        wanted = sum(float(plans[p][k] @ kuhn.payoff_vector(p, solution)) for p in range(2))
        assert abs(sampled.mean() - wanted) < 4 * sampled.std() / math.sqrt(len(sampled)), k
    both = torch.cat(plans, 1)  # of either seat in half of the games
    reach = torch.cat([kuhn.reach(p, solution) for p in range(2)]) / 2
    wanted = np.mean(
        [float(hull_distance(both[k], both[[j for j in range(3) if j != k]], reach).value) for k in range(3)]
    )
    apart = np.asarray(found["i.div"])
    assert wanted > 0.03
    assert abs(apart.mean() - wanted) < 4 * apart.std() / math.sqrt(len(apart)) + 1e-3

    value = share_of_best(np.stack(list(_played_values(subject, "played_value", 8000)["u.value"].values()), 1))  # type: ignore[union-attr]
    wanted = _value(exact, "value_against_random", "u.value")
    assert abs(value - wanted) < 0.15


def test_untrained_networks_are_random_play_and_the_response_is_not(fast):
    subject = _played(KuhnPoker())
    found = _played_values(subject, "played_value", 4000)["u.value"]
    names = ("the solution", "random play", "response trained by PPO")
    random = replace_condition(found, names[0], found[names[1]])  # type: ignore[index]
    assert share_of_best(random) == 0.0
    assert abs(share_of_best(np.stack([found[name] for name in names], 1))) < 0.2  # type: ignore[index]
    assert share_of_best(replace_condition(found, names[0], found[names[2]])) == 1.0  # type: ignore[index]
    assert math.isnan(share_of_best(np.zeros((5, 3))))


def replace_condition(found, name, values) -> np.ndarray:
    return np.stack(list({**found, name: values}.values()), 1)


def test_clones_are_not_told_apart(tiny):
    subject = _played(KuhnPoker(), members=2, scale=2.0)
    for parameter in subject.model.parameters():
        if parameter.ndim > 1:
            parameter.data[1] = parameter.data[0]
    assert np.abs(_played_values(subject, "played_members", 50)["i.div"]).max() < 1e-4  # type: ignore[arg-type]
    assert "no others" in str(_played_values(_played(KuhnPoker()), "played_members", 10)["i.div"])


def test_a_policy_that_ignores_the_rules_is_caught_in_every_game(monkeypatch):
    subject = _played(Goofspiel(num_cards=3, imp_info=True), members=2, scale=2.0)
    assert not _played_values(subject, "played_conduct", 50)["c.seat"].any()  # type: ignore[union-attr]
    trials: PlayedGame = subject["solution_games"].__self__

    def anything(observation, legal, player, seat):
        return torch.full(legal.shape, 1 / legal.shape[1])

    monkeypatch.setattr(trials, "policy", lambda newcomers=None: played_assurance.Policy(anything))
    assert _played_values(subject, "played_conduct", 50)["c.seat"].all()  # type: ignore[union-attr]
    assert trials.departures()["members' actions"] > 0.3


def test_played_blocks_depend_on_their_seed_alone(tiny):
    subject = _played(KuhnPoker(), members=2)
    before = state_digest(subject.model)
    state = torch.get_rng_state()
    for probe in ("trained_exploiter", "played_value", "played_conduct", "played_members"):
        first = _played_values(subject, probe, 40)
        again = _played_values(_played(KuhnPoker(), members=2), probe, 40)
        other = _played_values(subject, probe, 40, index=1)
        digests = [mapping_digest(_tensors(one)) for one in (first, again, other)]
        assert digests[0] == digests[1], probe
        assert digests[0] != digests[2] or probe == "played_conduct"  # nothing is illegal, and all sums are 0
    assert state_digest(subject.model) == before
    assert torch.equal(torch.get_rng_state(), state)


def _tensors(values):
    return {
        name: {key: torch.tensor(part) for key, part in one.items()} if isinstance(one, dict) else torch.as_tensor(one)
        for name, one in values.items()
    }


def test_players_of_their_own_and_general_sums(tiny):
    subject = _played(Negotiation(max_offers=1), symmetrize=False, meta_solver=AlphaRank())
    found = run_suite(subject, SuiteSettings("rice", n0=200, n_max=200))
    assert found.figure("e.collude").status == "not_applicable"
    assert "populations of their own" in found.figure("r.pop_ex").reason
    for name in ("r.nashconv", "e.welfare", "u.value", "c.seat", "c.rollback", "c.mix"):
        assert found.figure(name).measured, (name, found.figure(name).reason)
    assert 0 < (found.figure("e.welfare").value or 0) < 8
    assert (found.figure("c.mix").value or 0) < 1e-6
    assert found.figure("c.rollback").value == 1.0


def test_data_that_play_no_games_are_refused():
    module = SampledPSRO()
    module.trainer = _trainer(object())  # type: ignore[assignment]
    with pytest.raises(AssuranceError, match="assurance plays games, which object cannot: use .*expand: false"):
        module.assurance_subject()
    tree = GameDataModule(battle_of_sexes())
    tree.setup("fit")
    with pytest.raises(ValueError, match="play_games: plays by the rules alone"):
        tree.play_games(lambda *_: torch.ones(1, 1), torch.zeros(1, 2, dtype=torch.int64), 0)


def test_replaced_capabilities_reach_the_probe(kuhn):
    """The probe believes what it is told, so that a wrong subject shows."""
    subject = _solved(kuhn, _uniform(kuhn))
    worse = replace(subject, capabilities={**subject.capabilities, "illegal_states": lambda: (3, 12)})
    assert _value(worse, "legal_play", "c.seat") == 0.25
