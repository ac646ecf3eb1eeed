"""Comparison of runs from their metrics files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from callbacks import compare
from callbacks.jsonl_logger import JsonlLogger

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[3]


def _run(folder: Path, values: list[float], first: int = 0, every: int = 1) -> Path:
    """A run folder as training writes it: other metrics in rows of their own."""
    logger = JsonlLogger(folder)
    for number, value in enumerate(values):
        step = first + every * number
        logger.log_metrics({"train/loss": 0.5}, step)
        logger.log_metrics({"meta/nashconv": value, "meta/episodes": 100.0 * step}, step)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[Path]]:
    return {
        "psro": [_run(tmp_path / f"psro-{seed}", [1.0 + seed, 0.5 + seed, 0.25 + seed]) for seed in range(3)],
        "psd": [_run(tmp_path / "psd-0", [0.9, 0.1, 0.0])],
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_median_and_range_over_seeds(tmp_path, runs):
    bands = compare.compare_runs(runs, "meta/nashconv", tmp_path / "out" / "plot.png", log_scale=True)
    np.testing.assert_array_equal(bands["psro"].x, [0, 1, 2])
    np.testing.assert_array_equal(bands["psro"].median, [2.0, 1.5, 1.25])
    np.testing.assert_array_equal(bands["psro"].low, [1.0, 0.5, 0.25])
    np.testing.assert_array_equal(bands["psro"].high, [3.0, 2.5, 2.25])
    assert (tmp_path / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    rows = _rows(tmp_path / "out" / "plot.csv")
    assert len(rows) == 6
    assert rows[1] == {"experiment": "psro", "step": "1.0", "median": "1.5", "min": "0.5", "max": "2.5", "runs": "3"}
    assert rows[5]["median"] == "0.0"


def test_seeds_logged_at_different_steps_are_interpolated_within_their_range():
    first = np.array([[0.0, 0.0], [4.0, 4.0]])
    second = np.array([[2.0, 10.0], [6.0, 10.0]])
    one = compare.band([first, second])
    np.testing.assert_array_equal(one.x, [0, 2, 4, 6])
    np.testing.assert_array_equal(one.runs, [1, 2, 2, 1])
    np.testing.assert_array_equal(one.low, [0, 2, 4, 10])
    np.testing.assert_array_equal(one.high, [0, 10, 10, 10])
    np.testing.assert_array_equal(one.median, [0, 6, 7, 10])


def test_another_horizontal_axis(tmp_path, runs):
    points = compare.read_metric(runs["psd"][0], "meta/nashconv", x="meta/episodes")
    np.testing.assert_array_equal(points, [[0, 0.9], [100, 0.1], [200, 0.0]])


def test_repeated_cut_and_missing_values(tmp_path):
    lines = [
        {"step": 2, "m": 5.0},
        {"step": 1, "m": 1.0},
        {"step": 2, "m": 2.0},
        {"step": 3, "m": float("nan")},
        {"step": None, "m": 9.0},
        {"step": 4, "other": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "m"')
    np.testing.assert_array_equal(compare.read_metric(tmp_path, "m"), [[1, 1], [2, 2]])
    kept = compare.read_metric(tmp_path, "m", keep_nan=True)
    np.testing.assert_array_equal(kept, [[1, 1], [2, 2], [3, np.nan]])


def test_all_zero_values_on_a_log_scale_are_no_error(tmp_path):
    folder = _run(tmp_path / "run", [0.0, 0.0])
    compare.compare_runs({"a": [folder]}, "meta/nashconv", tmp_path / "p.png", log_scale=True)
    assert (tmp_path / "p.png").exists()


def test_what_is_wrong_is_named(tmp_path, runs):
    def draw(folders: dict[str, list[Path]], metric: str = "meta/nashconv", out: str = "p.png", x: str = "step"):
        compare.compare_runs(folders, metric, tmp_path / out, x)

    with pytest.raises(ValueError, match="no metric 'meta/nashcov'; the nearest is 'meta/nashconv'"):
        draw(runs, "meta/nashcov")
    with pytest.raises(ValueError, match="no metric 'qqq'; it has meta/episodes, meta/nashconv, step, train/loss"):
        draw(runs, "qqq")
    with pytest.raises(ValueError, match="no row with both 'train/loss' and 'meta/nashconv'"):
        draw(runs, x="train/loss")
    with pytest.raises(ValueError, match="experiment 'empty' has no run folders"):
        draw({"empty": []})
    with pytest.raises(ValueError, match="at least one experiment"):
        draw({})
    with pytest.raises(ValueError, match="out: must end in .png"):
        draw(runs, out="p.svg")
    with pytest.raises(FileNotFoundError, match=r"nothing.metrics\.jsonl does not exist"):
        draw({"a": [tmp_path / "nothing"]})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.jsonl").write_text('{"step": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 must be a JSON object"):
        draw({"a": [tmp_path / "bad"]})
    assert not (tmp_path / "p.png").exists()


def test_the_command_line(tmp_path, runs, capsys):
    out = tmp_path / "plot.png"
    argv = ["--metric", "meta/nashconv", "--out", str(out), "--log", f"psro={tmp_path}/psro-*", f"psd={tmp_path}/psd-*"]
    assert compare.main(argv) == 0
    assert "psro: 1.25 [0.25, 2.25] at step 2" in capsys.readouterr().out
    assert {row["runs"] for row in _rows(tmp_path / "plot.csv")} == {"3", "1"}
    assert compare.main([*argv[:1], "meta/nothing", *argv[2:]]) == 1
    assert "error: read_metric:" in capsys.readouterr().err
    for wrong, message in (("psro", "must be name=GLOB"), (f"psro={tmp_path}/zzz-*", "no folder matches")):
        with pytest.raises(SystemExit) as caught:
            compare.main([*argv[:4], wrong])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_it_runs_as_a_module(tmp_path, runs):
    command = [sys.executable, "-m", "callbacks.compare", "--metric", "meta/nashconv", "--out", str(tmp_path / "m.png")]
    done = subprocess.run(
        [*command, f"psd={tmp_path}/psd-*"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.png").exists()
    assert (tmp_path / "m.csv").exists()
