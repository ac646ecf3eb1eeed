"""PSRO without a tree, through the command line, on games small enough for their trees to tell the truth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from population_runs import assert_same, assert_same_games, checkpoint, population, rows
from torch import Tensor

from datamodules.games import Goofspiel, KuhnPoker
from datamodules.games.expand import expand
from datamodules.games.sequence_form import SequenceFormGame
from modules.networks.stacked_mlp import StackedMLP
from modules.objectives.ppo import masked_log_softmax
from modules.population.exploitability import nash_conv

PPO = {"hidden": [16], "learning_rate": 1.0e-2, "entropy_weight": 0.02, "epochs": 2, "minibatches": 2}
SHORT = {  # iterations of 3 response and 4 evaluation steps
    "model": {
        "class_path": "modules.psd_psro.SampledPSRO",
        "init_args": {
            "response": {"class_path": "modules.population.PPOResponse", "init_args": PPO},
            "updates": 3,
            "episodes": 64,
            "simulations": 64,
            "evaluation_steps": 4,
        },
    },
    "data": {
        "class_path": "datamodules.GameDataModule",
        "init_args": {"game": {"class_path": "datamodules.games.KuhnPoker"}, "expand": False},
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 3, "log_every_n_steps": 1, "enable_progress_bar": False},
    "checkpoint": {"every_n_steps": 3},
}
MODEL, DATA = "--model.init_args", "--data.init_args"
BOTH_SEATS = f"{DATA}.symmetrize=true"
MIXTURE = [f"{MODEL}.hull_distance=mixture", f"{MODEL}.weight=0.1"]
VERTICES = [f"{MODEL}.hull_distance=vertices", f"{MODEL}.weight=0.1"]
SETTINGS = {
    "both seats, hull": [BOTH_SEATS, *MIXTURE],
    "a population per player, nearest member": [
        *VERTICES,
        f"{MODEL}.init=previous",
        f"{MODEL}.response.init_args.lambda_=0.9",
    ],
}


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "sampled.yaml"
    path.write_text(yaml.safe_dump(SHORT))
    return path


@pytest.fixture
def fit(cli, config, tmp_path):
    """Trains under flags and returns the run's folder."""

    def run(name: str, *flags: object) -> Path:
        assert cli("fit", "-c", config, *flags, f"--experiment={name}") == 0
        return tmp_path / "runs" / name / "run-001"

    return run


def truth(saved: dict[str, Any], game: SequenceFormGame) -> tuple[list[Tensor], list[Tensor]]:
    """Per player ``[members, sequences]``, the saved networks' plans on the tree, and the meta-strategies."""
    shared, plans = len(saved["members"]) == 1, []
    for player in range(2):
        members = saved["members"][0 if shared else player]["members"]
        actor = {name[6:]: value for name, value in members.items() if name.startswith("actor.")}
        seen = game.observations(player)
        if shared:
            seen = torch.cat([seen, torch.eye(2)[player].expand(len(seen), 2)], dim=1)
        network = StackedMLP(seen.shape[1], [actor["bias_0"].shape[1]], actor["bias_1"].shape[1])
        tables = masked_log_softmax(network.apply(actor, seen), game.legal(player)).exp()
        plans.append(game.plans(player, tables.double()))
    return plans, saved["meta_strategies"] * (2 if shared else 1)


@pytest.mark.parametrize(("flags", "bound"), [([], 0.3), ([BOTH_SEATS, f"{MODEL}.hull_distance=mixture"], 0.35)])
def test_nash_conv_on_kuhn_falls_far_and_sampled_cells_are_right(fit, flags, bound):
    counts = [f"{MODEL}.updates=20", f"{MODEL}.episodes=256", f"{MODEL}.simulations=512"]
    saved = population(
        fit(
            "kuhn",
            *flags,
            *counts,
            "--trainer.max_epochs=5",
            f"{MODEL}.evaluation_steps=1",
            "--checkpoint.every_n_steps=200",
        )
    )
    game = SequenceFormGame(expand(KuhnPoker()))
    plans, mixtures = truth(saved, game)
    start, _ = nash_conv(game, [own[0] for own in plans])
    end, _ = nash_conv(game, [sigma @ own for sigma, own in zip(mixtures, plans, strict=True)])
    assert float(start) == pytest.approx(11 / 12, abs=0.05), "networks start near uniform play"
    assert float(end) < bound
    exact, table = game.payoffs(plans)[0], saved["payoff_table"]
    if flags:
        exact = (exact - exact.T) / 2
    assert bool(((table["counts"] == 512) | table["exact"]).all())
    mean = table["sums"][0] / table["counts"]
    error = ((table["squares"][0] / table["counts"] - mean.square()) / table["counts"]).clamp(min=0).sqrt()
    assert bool(((mean - exact).abs() <= 4 * error + 1e-9).all())
    bounds = {key: [value for _, _, value in saved["history"][f"meta/{key}"]] for key in ("value", "nashconv_lower")}
    assert bounds["nashconv_lower"][0] > 0.5
    assert bounds["nashconv_lower"][-1] < 0.5 * bounds["nashconv_lower"][0]
    assert bounds["value"][-1] == pytest.approx(0.0 if flags else -1 / 18, abs=0.1)


def test_gain_of_responses_bounds_nash_conv_from_below(fit, tmp_path):
    """Goofspiel with four cards: the first gain against the exact NashConv of the first members, 4 standard errors."""
    game = {"class_path": "datamodules.games.Goofspiel", "init_args": {"num_cards": 4}}
    (tmp_path / "game.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"game": game}}}))
    flags = ["-c", tmp_path / "game.yaml", f"{MODEL}.updates=40", f"{MODEL}.episodes=256", f"{MODEL}.simulations=1024"]
    saved = population(fit("goofspiel", *flags, "--trainer.max_epochs=1"))
    tree = SequenceFormGame(expand(Goofspiel(num_cards=4)))
    plans, _ = truth(saved, tree)
    exact, _ = nash_conv(tree, [own[0] for own in plans])
    found, error = (saved["history"][f"meta/nashconv_lower{end}"][0][2] for end in ("", "_error"))
    gains = [tree.payoffs([plans[0][1:], plans[1][:1]])[0], tree.payoffs([plans[0][:1], plans[1][1:]])[1]]
    assert 0 < error < 0.1
    assert abs(found - float(sum(gains))) < 4 * error
    assert 0.6 * float(exact) < found < float(exact) + 4 * error


@pytest.mark.parametrize("name", SETTINGS)
def test_run_continues_exactly_from_any_step(cli, fit, config, tmp_path, name):
    """From checkpoints within a response (8: step 1 of 3), at its end (10), within an evaluation (12), between (14)."""
    flags = SETTINGS[name]
    whole = fit("whole", *flags, "--checkpoint.every_n_steps=1", "--checkpoint.keep_last=99")
    assert population(whole)["payoff_table"]["counts"].max() == 64
    assert checkpoint(whole)["global_step"] == 21
    for step in (8, 10, 12, 14):
        start = whole / "checkpoints" / f"step-{step:08d}.ckpt"
        again = fit(f"from-{step}", *flags, "--ckpt_path", start)
        assert_same_games(population(whole), population(again))
        assert_same(rows(whole, step), rows(again, step))
    assert len(rows(whole, 8)) > 6


@pytest.mark.ddp
def test_two_ranks_equal_one_bitwise(fit, cli_process, config, tmp_path):
    flags = SETTINGS["both seats, hull"]
    one = fit("one", *flags)
    done = cli_process("fit", "-c", config, "-c", "hardware/ddp2", *flags, "--experiment=two")
    assert done.returncode == 0, done.stderr[-4000:]
    two = tmp_path / "runs" / "two" / "run-001"
    assert_same_games(population(one), population(two))


def test_weight_0_equals_psro_bitwise_and_another_weight_does_not(fit):
    short = ["--trainer.max_epochs=2", "--checkpoint.every_n_steps=99"]
    none = population(fit("none", *short))
    for kind in ("mixture", "vertices"):
        zero = population(fit(f"zero-{kind}", f"{MODEL}.hull_distance={kind}", f"{MODEL}.weight=0", *short))
        assert_same_games(none, zero)
        more = population(fit(f"more-{kind}", f"{MODEL}.hull_distance={kind}", f"{MODEL}.weight=1", *short))
        weights = [saved["members"][0]["members"]["actor.weight_0"] for saved in (none, more)]
        assert not torch.equal(*weights)


@pytest.mark.parametrize("flags", [[], [BOTH_SEATS]])
def test_every_batch_was_played_by_the_newest_networks(fit, monkeypatch, flags):
    """Lag 0: the probability recorded with each of a learner's moves is the one that PPO takes it for."""
    from modules.population.neural import PPOResponse

    learn, seen = PPOResponse.update, []

    def update(self, batch, seed, rows=None):
        now = self.tables().gather(2, batch["action"].unsqueeze(2)).squeeze(2)
        assert torch.allclose(now[0, batch["state"][0]], now[0])
        assert torch.allclose(now, batch["probability"], atol=1e-6)
        seen.append(float(batch["probability"].std()))
        return learn(self, batch, seed, rows)

    monkeypatch.setattr(PPOResponse, "update", update)
    folder = fit("lag", *flags)
    assert len(seen) == 9 * (1 if flags else 2)
    assert max(seen) > 0.01
    assert all(math.isfinite(value) for row in rows(folder) for value in row.values())
    last = [row for row in rows(folder) if "meta/value" in row][-1]
    # 64 games in each of 3 x 3 updates per learner, and in each cell: 1 + 2 + 3, or all of 4 x 4
    assert last["episodes"] == 64 * (9 + 6 if flags else 2 * 9 + 16)


def test_test_verb_prints_the_meta_strategies_figures(cli, fit, config, capsys):
    folder = fit("run")
    capsys.readouterr()
    assert cli("test", "-c", config, "--ckpt_path", folder / "checkpoints" / "last.ckpt") == 0
    printed = capsys.readouterr().out
    assert "test/value" in printed
    assert "test/support" in printed


def test_export_holds_the_networks_that_the_checkpoint_holds(fit, tmp_path):
    (tmp_path / "export.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "callbacks.export.ExportModel"}]}})
    )
    folder = fit("run", BOTH_SEATS, "-c", tmp_path / "export.yaml", "--trainer.max_epochs=2")
    saved = population(folder)
    with np.load(folder / "export" / "solution.npz", allow_pickle=False) as found:
        assert np.array_equal(found["meta_strategy_0"], saved["meta_strategies"][0].numpy())
        for name, value in saved["members"][0]["members"].items():
            assert np.array_equal(found[f"members_0.{name}"], value.numpy())
        assert np.array_equal(found["payoffs"], -found["payoffs"].transpose(0, 2, 1))
    about = json.loads((folder / "export" / "solution.json").read_text())
    assert about["iteration"] == 2
    assert about["widths"] == [13, 16, 2]
    assert about["game"] == "kuhn_poker(players=2)"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model=modules.psd_psro.PSDPSRO"], "PSDPSRO needs the game tree, got expand: false: set expand: true"),
        ([f"{DATA}.expand=true"], "use datamodules.GameDataModule with expand: false"),
        ([f"{MODEL}.simulations=0"], "simulations must be >= 2, got 0"),
        ([f"{MODEL}.episodes=66"], "episodes must be a multiple of 4, the datamodule's streams, got 66"),
        ([f"{DATA}.game=datamodules.games.Negotiation"], "NashLP needs two players and zero sum"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(cli, config, tmp_path, capfd, flags, says):
    content = json.loads(json.dumps(SHORT))
    if flags[0].startswith("--model="):
        content["model"] = {"class_path": flags[0].partition("=")[2]}
        config.write_text(yaml.safe_dump(content))
        flags = []
    assert cli("fit", "-c", config, *flags) in (1, 2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]


def test_a_run_is_not_resumed_with_other_networks(cli, fit, config, capfd):
    folder = fit("run")
    last = folder / "checkpoints" / "last.ckpt"
    flags = [f"{MODEL}.response.init_args.hidden=[8]", "--trainer.max_epochs=4", "--experiment=other"]
    assert cli("fit", "-c", config, *flags, "--ckpt_path", last) in (1, 2)
    assert "written for networks [11, 16, 2] relu, the config names [11, 8, 2] relu" in capfd.readouterr().err
