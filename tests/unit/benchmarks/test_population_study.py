"""The population study's statistics, tuning and reading of runs, on made-up figures and one short real run."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch):
    """The script as a module, forgotten afterwards: benchmark scripts have generic names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("population_study")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


def figures(nashconv: float, pe: float = 0.5) -> dict:
    return {
        "nashconv": {"5": 2 * nashconv, "10": nashconv},
        "population_exploitability": {"5": 1.0, "10": pe},
        **dict.fromkeys(("members", "episodes", "frames", "cpu_s"), 1.0),
    }


def test_ratio_is_paired_by_seed(study: ModuleType) -> None:
    """Every seed halves: the interval has no width, although the seeds differ a hundredfold."""
    found = study.paired_ratio([0.5, 5.0, 50.0], [1.0, 10.0, 100.0])
    assert [found[key] for key in ("ratio", "low", "high")] == pytest.approx([0.5] * 3)
    assert (found["wins"], found["pairs"]) == (3, 3)


def test_ratio_is_the_geometric_mean_and_its_interval_holds_it(study: ModuleType) -> None:
    found = study.paired_ratio([1.0, 4.0, 2.0, 1.0], [2.0, 1.0, 2.0, 4.0])
    assert found["ratio"] == pytest.approx((1 / 2 * 4 * 1 * 1 / 4) ** (1 / 4))
    assert found["low"] < found["ratio"] < found["high"]
    assert found["wins"] == 2  # a tie is no win
    assert math.log(found["low"]) == pytest.approx(-1.04, abs=0.15)  # 2.5% quantile of the mean of 4 log ratios
    turned = study.paired_ratio([2.0, 1.0, 2.0, 4.0], [1.0, 4.0, 2.0, 1.0])
    assert turned["ratio"] == pytest.approx(1 / found["ratio"])


def test_ratio_of_solved_games_is_finite_and_of_unequal_seeds_refused(study: ModuleType) -> None:
    assert study.paired_ratio([0.0, -1e-17], [1e-18, 0.0])["ratio"] == pytest.approx(1.0)
    assert study.paired_ratio([0.0, -1e-17], [1e-18, 0.0])["wins"] == 0  # both are 0 up to rounding
    with pytest.raises(ValueError, match="got 2 values and 1 references"):
        study.paired_ratio([1.0, 2.0], [1.0])


def test_summary_compares_the_last_iteration_with_each_reference(study: ModuleType) -> None:
    runs = {"psro": [figures(4.0), figures(2.0)], "psd": [figures(1.0), figures(1.0)]}
    table = study.summarise(runs, ("pipeline", "psro"))
    assert table["psro"]["nashconv"]["mean"] == 3.0
    assert table["psro"]["nashconv"]["standard_error"] == pytest.approx(1.0)  # sd sqrt(2) over sqrt(2)
    assert table["psro"]["nashconv"]["mean_by_iteration"] == {"5": 6.0, "10": 3.0}
    assert "against_psro" not in table["psro"]["nashconv"]
    assert "against_pipeline" not in table["psd"]["nashconv"]  # did not run
    assert table["psd"]["nashconv"]["against_psro"]["ratio"] == pytest.approx(8**-0.5)
    single = study.summarise({"psd": [figures(1.0)]}, ())
    assert single["psd"]["nashconv"]["standard_error"] is None
    json.dumps(table, allow_nan=False)


def test_a_run_without_the_iteration_is_refused(study: ModuleType, tmp_path: Path) -> None:
    last = {"meta/members": 3.0, "episodes": 0.0, "frames": 0.0}
    rows = [
        {"step": 0, "meta/nashconv": 0.4, "meta/population_exploitability": 0.3, "iteration": 5.0, **last},
        {"step": 1, "meta/nashconv": 0.2, "iteration": 6.0, **last},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert study.read_run(tmp_path, [5])["nashconv"] == {"5": 0.4}
    with pytest.raises(ValueError, match="'meta/population_exploitability' at iteration 6"):
        study.read_run(tmp_path, [6])
    with pytest.raises(ValueError, match="'meta/nashconv' at iteration 10"):
        study.read_run(tmp_path, [5, 10])


def test_marks_end_with_the_last_iteration(study: ModuleType) -> None:
    assert study.marks_of(100, 25) == [25, 50, 75, 100]
    assert study.marks_of(20, 25) == [20]
    assert study.marks_of(60, 25) == [25, 50, 60]


def test_merged_settings_keep_what_later_layers_do_not_name(study: ModuleType) -> None:
    both = study.merged(study.diversity(weight=0.1), study.diversity(eps=1e-3), study.gate(0.5))
    assert both["model"]["init_args"]["diversity"]["init_args"] == {"weight": 0.1, "eps": 1e-3}
    assert both["model"]["init_args"]["oracle"]["init_args"] == {"diversity_probability": 0.5}


def test_tuning_takes_the_best_of_both_stages(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight 2 is best at the first stage and every gate is worse: the answer is the weight alone."""
    seen = []

    def run_once(one, name, method, seed, *rest):
        arguments = method.settings["model"]["init_args"]
        weight = arguments["diversity"]["init_args"]["weight"]
        probability = arguments.get("oracle", {}).get("init_args", {}).get("diversity_probability")
        seen.append((weight, probability, seed))
        return figures(abs(weight - 2.0) + 0.1 + (probability or 0.0)), Path()

    monkeypatch.setattr(study, "run_once", run_once)
    plain = study.Study("x", {"psd": study.Method()}, 10, 2, grid={"psd": study._grid((1.0, 2.0, 3.0), (0.5, 0.2))})
    found = study.tune(plain, ["psd"], [100, 101], 10, Path())["psd"]
    assert found["best"] == "weight 2"
    assert found["settings"] == study.diversity(weight=2.0)
    assert {pair[:2] for pair in seen} == {(1.0, None), (2.0, None), (3.0, None), (2.0, 0.5), (2.0, 0.2)}
    assert {pair[2] for pair in seen} == {100, 101}


def test_every_studys_layers_are_shipped(study: ModuleType) -> None:
    configs = BENCHMARKS.parent / "configs"
    for one in study.STUDIES.values():
        names = {one.experiment, *(layer for method in one.methods.values() for layer in method.layers)}
        assert [name for name in sorted(names) if not (configs / f"{name}.yaml").is_file()] == []
        assert set(one.references) <= set(one.methods)
        assert set(one.grid) <= set(one.methods)


def test_unknown_method_is_refused(study: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["skill", "--methods", "psd", "pds"]) == 2
    assert "got ['pds']" in capsys.readouterr().err


def test_command_in_the_result_names_no_folder(study: ModuleType) -> None:
    words = ["skill", "--work", "/a/b", "--seeds", "2", "--out", "/c.json"]
    assert study._public_command(words) == "python benchmarks/population_study.py skill --seeds 2"


def test_a_short_study_writes_figures_and_the_comparison(study: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "result.json"
    options = ["--seeds", "1", "--first-seed", "3", "--iterations", "2", "--methods", "psro", "double_oracle"]
    assert study.main(["skill", *options, "--work", str(tmp_path / "work"), "--out", str(out)]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["seeds"] == [3]
    (run,) = record["runs"]["double_oracle"]
    assert list(run["nashconv"]) == ["2"]
    assert 0 < run["population_exploitability"]["2"] <= run["nashconv"]["2"] + 1e-9
    assert run["members"] == 3  # one at the start, one an iteration
    config = (tmp_path / "work/runs/double_oracle/run-001/config.yaml").read_text(encoding="utf-8")
    assert "game_seed: 3" in config
    assert out.with_suffix(".png").is_file()
