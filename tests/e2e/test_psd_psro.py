"""PSD-PSRO and its relatives through the command line: equilibria, equivalences, and every shipped layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from population_runs import assert_same_games, checkpoint, iterations, population, rows

from datamodules.games import random_game_of_skill
from datamodules.games.expand import expand
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.sequence_form import SequenceFormGame
from modules.population.exploitability import population_exploitability

Run = Callable[..., Path]
MANY_PLAYERS = {  # solvers beyond two-player zero-sum games, at sizes for tests
    "AlphaRank": ["--model.init_args.meta_solver=modules.population.AlphaRank"],
    "ProjectedReplicator": [
        "--model.init_args.meta_solver=modules.population.ProjectedReplicator",
        "--model.init_args.meta_solver.init_args.iterations=4000",
    ],
}
NO_DIVERSITY = "--model.init_args.diversity=modules.psd_psro.NoDiversity"


def zero_lambda(folder: Path) -> list[str]:
    path = folder / "zero.yaml"
    term = {"class_path": "modules.psd_psro.PolicySpaceDiversity", "init_args": {"weight": 0.0}}
    path.write_text(yaml.safe_dump({"model": {"init_args": {"diversity": term}}}))
    return ["-c", str(path)]


def game(folder: Path, class_path: str, **init_args: object) -> list[str]:
    path = folder / f"{class_path.rpartition('.')[2]}.yaml"
    content = {"class_path": f"datamodules.games.{class_path}", "init_args": init_args}
    path.write_text(yaml.safe_dump({"data": {"init_args": {"game": content}}}))
    return ["-c", str(path)]


@pytest.fixture
def fit(cli, support_configs, tmp_path) -> Run:
    """Trains ``iterations`` of a support or shipped config under layers and flags; returns the run's folder."""

    def run(name: str, config: str, count: int, *argv: object) -> Path:
        own = support_configs / f"{config}.yaml"
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
        steps = [f"--trainer.max_epochs={count}", f"--experiment={name}"]
        assert cli("fit", "-c", own if own.is_file() else config, *argv, *quiet, *steps) == 0
        return tmp_path / "runs" / name / "run-001"

    return run


def assert_finite(folder: Path, count: int) -> dict[str, float]:
    """A row per iteration, every number in it finite; returns the last."""
    found = [row for row in rows(folder) if "meta/nashconv" in row]
    assert [row["iteration"] for row in found] == list(range(1, count + 1))
    assert all(math.isfinite(value) for row in rows(folder) for value in row.values())
    return found[-1]


# -- equilibria -------------------------------------------------------------------------------------------------------
def test_double_oracle_solves_kuhn_and_the_test_verb_says_so(cli, fit, capsys):
    folder = fit("kuhn", "psd_psro/kuhn", 15)
    last = [row for row in rows(folder) if "meta/nashconv" in row][-1]
    assert last["meta/nashconv"] < 1e-9
    assert last["meta/population_exploitability"] < 1e-9
    assert last["meta/value"] == pytest.approx(-1 / 18, abs=1e-12)
    assert last["iteration"] < 15, "StopAtExploitability did not stop the run"
    assert checkpoint(folder)["global_step"] == 2 * last["iteration"]
    assert all(value > 1e-9 for value in iterations(folder)[:-1])
    capsys.readouterr()
    config = ["-c", "psd_psro/kuhn", "--ckpt_path", folder / "checkpoints" / "last.ckpt"]
    assert cli("test", *config, "--trainer.enable_progress_bar=false") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test/nashconv"))
    assert float(line.split()[1]) < 1e-9


@pytest.mark.parametrize(("config", "count"), [("psd_psro/kuhn", 15), ("psd_psro/leduc", 10)])
def test_anytime_never_rises_and_equals_population_exploitability(fit, config, count):
    flags = ["--model.init_args.population_exploitability_every=1", "--trainer.callbacks=null"]
    folder = fit("anytime", config, count, "-c", "psd_psro/variant/anytime", *flags)
    values = iterations(folder)
    assert len(values) == count
    assert all(later <= before + 1e-9 for before, later in zip(values, values[1:], strict=False))
    assert values[-1] < 0.9 * values[0]
    assert values == pytest.approx(iterations(folder, "meta/population_exploitability"), abs=1e-8)


def test_xdo_solves_kuhn_in_a_few_iterations(fit):
    values = iterations(fit("xdo", "psd_psro/kuhn", 5, "-c", "psd_psro/variant/xdo"))
    assert values[0] > 0.1
    assert values[-1] < 1e-3


def test_open_spiel_kuhn_equals_ours(fit, tmp_path):
    pytest.importorskip("pyspiel")
    ours = iterations(fit("ours", "psd_psro/kuhn", 15))
    theirs = iterations(fit("theirs", "psd_psro/kuhn", 15, *game(tmp_path, "OpenSpielGame", game="kuhn_poker")))
    assert theirs == pytest.approx(ours, abs=1e-9)
    assert len(ours) >= 5


# -- equivalences -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "count", "flags"),
    [
        ("psd_psro_skill", 12, []),
        ("psd_psro/kuhn", 6, ["--model.init_args.init=random"]),
        ("psd_psro/leduc", 3, ["--trainer.callbacks=null"]),
        ("psd_psro_ppo", 3, []),
    ],
)
def test_lambda_0_equals_psro_bitwise(fit, tmp_path, config, count, flags):
    zero = fit("zero", config, count, *zero_lambda(tmp_path), *flags)
    none = fit("none", config, count, NO_DIVERSITY, *flags)
    assert_same_games(population(zero), population(none))
    more = fit("more", config, count, *zero_lambda(tmp_path), *flags, "--model.init_args.diversity.init_args.weight=10")
    one, other = population(zero)["members"][0]["members"], population(more)["members"][0]["members"]
    assert len(one["strategy"]) != len(other["strategy"]) or not torch.equal(one["strategy"], other["strategy"])


def test_pipeline_of_one_learner_equals_the_psro_layer_bitwise(fit, tmp_path):
    flags = ["--model.init_args.scheme.init_args.learners=1"]
    one = fit("one", "psd_psro_skill", 12, *zero_lambda(tmp_path), *flags)
    assert_same_games(population(one), population(fit("psro", "psd_psro_skill", 12, "-c", "psd_psro/variant/psro")))


def test_double_oracle_layer_equals_the_leduc_experiment_bitwise(fit):
    none = "--trainer.callbacks=null"
    layer = fit("layer", "psd_psro/leduc", 4, "-c", "psd_psro/variant/double_oracle", none)
    assert_same_games(population(fit("plain", "psd_psro/leduc", 4, none)), population(layer))


def test_fsp_layer_is_fictitious_play(fit):
    """Exact responses to the mean of all members are Brown's fictitious play, here replayed in a few lines."""
    folder = fit(
        "fsp", "psd_psro_skill", 8, "-c", "psd_psro/variant/fsp", "--model.init_args.oracle.init_args.rate=1.0"
    )
    payoffs = random_game_of_skill(n=20, seed=3).table[0]
    members = population(folder)["members"][0]["members"]["strategy"][:, 0]
    played = [members[0]]
    for _ in range(8):
        played.append(torch.eye(20, dtype=torch.float64)[(payoffs @ torch.stack(played).mean(0)).argmax()])
    assert torch.equal(members, torch.stack(played))
    mean = torch.stack(played).mean(0)
    assert iterations(folder)[-1] == pytest.approx(2 * float((payoffs @ mean).max()), abs=1e-12)


def test_self_play_layer_responds_to_the_newest_member(fit):
    flags = ["-c", "psd_psro/variant/self_play", "--model.init_args.oracle.init_args.rate=1.0"]
    members = population(fit("self", "psd_psro_skill", 8, *flags))["members"][0]["members"]["strategy"][:, 0]
    payoffs = random_game_of_skill(n=20, seed=3).table[0]
    best = (payoffs @ members[:-1].T).argmax(0)
    assert torch.equal(members[1:], torch.eye(20, dtype=torch.float64)[best])


def test_duplicate_member_leaves_population_exploitability_unchanged(fit):
    saved = population(fit("kuhn", "psd_psro/kuhn", 3))
    kuhn = SequenceFormGame(expand(KuhnPoker()))
    plans = [kuhn.plans(p, members["members"]["strategy"]) for p, members in enumerate(saved["members"])]
    before = population_exploitability(kuhn, plans).value
    assert before == pytest.approx(saved["history"]["meta/population_exploitability"][-1][2], abs=1e-9)
    assert before > 0.01
    doubled = [torch.cat([own, own[1:2], own[:1]]) for own in plans]
    assert population_exploitability(kuhn, doubled).value == pytest.approx(before, abs=1e-8)


# -- every layer and kind of game -------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", ["bd_rd", "dpp", "fsp", "pipeline", "psro", "rectified", "self_play"])
def test_variant_layer_on_a_game_of_skill(fit, layer):
    last = assert_finite(fit(layer, "psd_psro_skill", 3, "-c", f"psd_psro/variant/{layer}"), 3)
    assert last["meta/population_exploitability"] <= last["meta/nashconv"] + 1e-9


@pytest.mark.parametrize("weight", [0.1, 1.0])
@pytest.mark.parametrize("term", ["ExpectedCardinality", "BehaviourResponseDiversity", "PolicySpaceDiversity"])
def test_diversity_terms_on_kuhn(fit, tmp_path, term, weight):
    flags = [f"--model.init_args.diversity=modules.psd_psro.{term}"]
    if term != "BehaviourResponseDiversity":
        flags.append(f"--model.init_args.diversity.init_args.weight={weight}")
    assert_finite(fit(term, "psd_psro/kuhn", 3, *flags), 3)


def test_gradient_responses_on_the_mixture_model(fit, tmp_path):
    oracle = "--model.init_args.oracle=modules.psd_psro.GradientResponse"
    flags = [*game(tmp_path, "MixtureModelGame"), oracle, "--model.init_args.scheme.init_args.learners=4"]
    folder = fit("nmm", "psd_psro_skill", 5, *flags, "--model.init_args.diversity.init_args.weight=0.3")
    last = assert_finite(folder, 5)
    assert last["meta/nashconv"] > 0
    again = fit("nmm-4", "psd_psro_skill", 2, *flags, "--model.init_args.diversity.init_args.weight=0.3")
    assert iterations(again) == iterations(folder)[:2]


@pytest.mark.parametrize("solver", MANY_PLAYERS)
def test_general_sum_negotiation(fit, tmp_path, solver):
    flags = [*game(tmp_path, "Negotiation", pool=[1, 1], total_value=2), *MANY_PLAYERS[solver]]
    last = assert_finite(fit(solver, "psd_psro/kuhn", 4, *flags, "--trainer.callbacks=null"), 4)
    assert "meta/population_exploitability" not in last
    assert last["meta/nashconv"] >= -1e-12


def test_three_player_kuhn(fit, tmp_path):
    flags = [*game(tmp_path, "KuhnPoker", players=3), *MANY_PLAYERS["ProjectedReplicator"]]
    folder = fit("three", "psd_psro/kuhn", 5, *flags, "--trainer.callbacks=null")
    assert_finite(folder, 5)
    table = population(folder)["payoff_table"]
    assert table["counts"].shape == (6, 6, 6)
    assert float(table["sums"].sum(0).abs().max()) < 1e-12
    assert iterations(folder)[-1] < iterations(folder)[0]


@pytest.mark.parametrize("layers", [[], ["psd_psro_dqn"]])
def test_every_batch_was_played_by_the_newest_policy(fit, support_configs, monkeypatch, layers):
    """Lag 0: the probability recorded with each move of a learner is the one its network gives now."""
    from modules.psd_psro.neural_oracle import NeuralOracle, PlayedGame

    train_on, seen = NeuralOracle.step, []

    def step(self, batch, update, diversity):
        played = self.turn.game
        assert isinstance(played, PlayedGame)
        tables = {number: stack.tables() for number, stack in self.stacks.items()}
        group = 0
        for number, learners in self.by_population.items():
            for index in range(len(learners)):
                for seat, first in played.seats(number):
                    moves = batch[batch["group"] == group]
                    own = moves["player"] == seat
                    state, action = moves["info_state"][own] + first, moves["action"][own]
                    assert torch.equal(tables[number][index][state, action], moves["probability"][own])
                    seen.append(tables[number][index].clone())
                    group += 1
        return train_on(self, batch, update, diversity)

    monkeypatch.setattr(NeuralOracle, "step", step)
    folder = fit(
        "lag", "psd_psro_ppo", 2, *(part for one in layers for part in ("-c", support_configs / f"{one}.yaml"))
    )
    assert assert_finite(folder, 2)["meta/standard_error"] > 0
    assert len(seen) >= 12
    assert not torch.equal(seen[0], seen[-1]), "no learner has moved: the comparison shows nothing"
