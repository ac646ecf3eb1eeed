"""What a population game refuses: one line that names the culprit, exit code 1 or 2, before any iteration is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

GAMES = "datamodules.games"


def _layer(folder: Path, part: str, **init_args: Any) -> list[str]:
    path = folder / f"{part}.yaml"
    path.write_text(yaml.safe_dump({part: {"init_args": init_args}}))
    return ["-c", str(path)]


def _game(folder: Path, class_path: str, **init_args: Any) -> list[str]:
    return _layer(folder, "data", game={"class_path": class_path, "init_args": init_args})


@pytest.fixture
def refused(cli, capfd, tmp_path):
    """Runs a command line that must fail; returns its one line."""

    def run(*argv: object) -> str:
        code = cli("fit", *argv, "--trainer.enable_progress_bar=false")
        err = [line for line in capfd.readouterr().err.splitlines() if line and not line.startswith(("INFO", "Restor"))]
        lines = [line for line in err if not line.startswith(("Seed set", "GPU available", "TPU available"))]
        assert code in (1, 2), lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert len(lines[0]) < 400
        for metrics in tmp_path.glob("runs/*/*/metrics.jsonl"):
            assert not any("meta/nashconv" in json.loads(line) for line in metrics.read_text().splitlines())
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("name", "table", "says"),
    [
        ("apart.npy", [[0.0, 1.0], [1.0, 0.0]], ["square and antisymmetric", "|M+M^T| = 2"]),
        ("nan.npy", [[0.0, np.nan], [1.0, 0.0]], ["finite", "nan", "row 0, column 1"]),
        ("nan.csv", [[0.0, np.nan], [1.0, 0.0]], ["finite", "nan"]),
        ("table.pkl", [[0.0, 1.0], [-1.0, 0.0]], ["pickles", "refused", "numpy.save"]),
        ("absent.npy", None, ["no such file"]),
    ],
)
def test_payoff_file_is_refused(refused, tmp_path, name, table, says):
    path = tmp_path / name
    if path.suffix == ".npy" and table is not None:
        np.save(path, np.array(table))
    elif path.suffix == ".csv":
        np.savetxt(path, np.array(table), delimiter=",")
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(table))
    said = refused("-c", "psd_psro/skill300", *_game(tmp_path, f"{GAMES}.load_payoffs", path=str(path)))
    assert name in said
    assert all(part in said for part in says)


@pytest.mark.parametrize(
    ("class_path", "init_args", "says"),
    [
        (f"{GAMES}.KuhnPocker", {}, ["unknown class 'datamodules.games.KuhnPocker'", "datamodules.games.KuhnPoker'?"]),
        ("KuhnPocker", {}, ["unknown class 'KuhnPocker'", "datamodules.games.KuhnPoker'?"]),
        ("datamodules.game.KuhnPoker", {}, ["unknown class", "datamodules.games.KuhnPoker'?"]),
        (f"{GAMES}.KuhnPoker", {"player": 2}, ["unknown key 'player'", "'players'?"]),
        (f"{GAMES}.KuhnPoker", {"players": 30}, ["KuhnPoker: players", "got 30"]),
        (f"{GAMES}.Negotiation", {}, ["not zero-sum", "NashLP does not apply", "AlphaRank", "ProjectedReplicator"]),
        (f"{GAMES}.prisoners_dilemma", {}, ["prisoners_dilemma", "not zero-sum", "AlphaRank"]),
    ],
)
def test_game_is_refused(refused, tmp_path, class_path, init_args, says):
    said = refused("-c", "psd_psro/kuhn", *_game(tmp_path, class_path, **init_args))
    assert all(part in said for part in says), said


def test_unknown_open_spiel_game_names_the_nearest(refused, tmp_path):
    pytest.importorskip("pyspiel")
    said = refused("-c", "psd_psro/kuhn", *_game(tmp_path, f"{GAMES}.OpenSpielGame", game="kuhn_pocker"))
    assert "no game 'kuhn_pocker'" in said
    assert "nearest: kuhn_poker" in said


def test_game_too_large_for_a_tree_names_its_size(refused):
    said = refused("-c", "psd_psro/leduc", "--data.init_args.max_nodes=1000")
    assert "leduc_poker(players=2)" in said
    assert "1417 nodes" in said
    assert "got 1000" in said


@pytest.mark.parametrize("config", ["psd_psro/kuhn", "psd_psro_ppo"])
def test_nan_return_stops_before_it_is_believed(refused, support_configs, tmp_path, config):
    """Exact payoffs and sampled ones; a payoff table, a learner and NashConv never see it."""
    path = config if "/" in config else support_configs / f"{config}.yaml"
    said = refused("-c", path, *_game(tmp_path, "population_runs.BrokenKuhn"))
    assert "finite" in said
    assert "nan" in said.lower()


@pytest.mark.parametrize("weight", ["-1", "-0.001"])
def test_negative_lambda_is_refused(refused, weight):
    said = refused("-c", "psd_psro/skill300", f"--model.init_args.diversity.init_args.weight={weight}")
    assert "PolicySpaceDiversity: weight: must be at least 0" in said
    assert f"got {float(weight)}" in said


def test_misspelt_class_within_the_model_names_the_nearest(refused):
    said = refused("-c", "psd_psro/kuhn", "--model.init_args.scheme=modules.psd_psro.Sequentail")
    assert said == (
        "error: unknown class 'modules.psd_psro.Sequentail' in 'scheme'; did you mean 'modules.psd_psro.Sequential'?"
    )


def test_symmetrize_needs_seats(refused, tmp_path):
    game = _game(tmp_path, f"{GAMES}.battle_of_sexes")
    said = refused("-c", "psd_psro/kuhn", *game, "--data.init_args.symmetrize=true")
    assert "symmetrize" in said
    assert "battle_of_sexes" in said


@pytest.mark.parametrize(
    ("evaluation", "says"), [("exact", "NeuralOracle: rock_paper_scissors"), ("sampled", "evaluation: exact")]
)
def test_neural_oracle_needs_moves(refused, support_configs, tmp_path, evaluation, says):
    game = _game(tmp_path, f"{GAMES}.rock_paper_scissors")
    flags = ["--data.init_args.symmetrize=false", f"--model.init_args.evaluation={evaluation}"]
    assert says in refused("-c", support_configs / "psd_psro_ppo.yaml", *game, *flags)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        (
            "data.init_args.streams=5",
            "oracle.episodes must be a multiple of 10, the datamodule's streams times",
        ),
        ("model.init_args.oracle.init_args.episodes=63", "oracle.episodes must be a multiple of 8"),
        ("model.init_args.simulations=80", "simulations / evaluation_steps must be a multiple of 8"),
        ("model.init_args.simulations=63", "simulations must be a multiple of evaluation_steps (4), got 63"),
        ("data.init_args.streams=0", "streams must be >= 1, got 0"),
    ],
)
def test_episodes_that_streams_cannot_share_are_refused_at_set_up(refused, support_configs, flag, says):
    assert says in refused("-c", support_configs / "psd_psro_ppo.yaml", f"--{flag}")


def test_xdo_needs_a_population_per_player(refused):
    said = refused("-c", "psd_psro/skill300", "-c", "psd_psro/variant/xdo")
    assert "ExtensiveFormOracle: needs a population per player" in said


def test_checkpoint_of_another_game_is_refused(cli, capfd, tmp_path):
    quiet = "--trainer.enable_progress_bar=false"
    assert cli("fit", "-c", "psd_psro/kuhn", quiet, "--trainer.max_epochs=1") == 0
    capfd.readouterr()
    found = tmp_path / "runs" / "psd_psro-kuhn" / "run-001" / "checkpoints" / "last.ckpt"
    for other, named in (("leduc", "leduc_poker(players=2)"), ("skill300", "random_game_of_skill")):
        assert cli("fit", "-c", f"psd_psro/{other}", quiet, "--ckpt_path", found) == 1
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert "kuhn_poker(players=2)" in said[0]
        assert named in said[0]
        assert "Traceback" not in said[0]


def test_resume_with_another_number_of_steps_is_refused(cli, support_configs, capsys):
    """Even between iterations: Lightning would skip or cut short the first one."""
    run = ["fit", "-c", support_configs / "psd_psro_ppo.yaml", "--experiment=steps"]
    assert cli(*run, "--trainer.max_epochs=1") == 0
    capsys.readouterr()
    assert cli(*run, "--ckpt_path", "last", "--model.init_args.oracle.init_args.updates=5") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "steps, the config has [5, 4]: keep them equal" in error
