"""Files, figures and the table of an evaluation under attacks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks.attacks import COLUMNS, AttackMatrix, draw_returns, draw_traces, table


def row(name: str, coupled: bool, mean: float, error: float = 0.1, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "coupled": coupled, "episodes": 50, "return_mean": mean, "return_std": error * 50**0.5,
        "return_se": error, "length_mean": 20.0, "linf": 0.1 / 3, "step_linf": 0.05, "runs": 1, "frames": 0, **more,
    }  # fmt: skip


def report(worst: float = -7.25) -> dict[str, Any]:
    steps = torch.linspace(0.0, 0.1, 6)
    return {
        "attacks": [row("none", False, 12345.5), row("random", False, 2.0), row("random", True, worst, 1 / 3)],
        "natural": 12345.5,
        "worst_case": worst,
        "worst_attack": "random_coupled",
        "perturbation": {"space": "state", "norm": "inf", "eps": 0.1, "eps_bar": 0.02},
        "flags": ["pa_ad is weaker than noise"],
        "traces": {"random": steps.unsqueeze(1).repeat(1, 2), "random_coupled": steps[:4].unsqueeze(1)},
    }


class Evaluated(LightningModule):
    """Reports what it is given, a lower worst case with every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.evaluations = 0

    def attack_report(self) -> dict[str, Any]:
        return report(-float(self.evaluations))

    def on_validation_start(self) -> None:
        self.evaluations += 1

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.weight * batch).sum()

    def validation_step(self, batch: torch.Tensor) -> None:
        pass

    def on_test_start(self) -> None:
        self.evaluations = 100

    def test_step(self, batch: torch.Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, callbacks=[AttackMatrix()], **options,
    )  # fmt: skip


@pytest.fixture
def batches() -> DataLoader:
    return DataLoader(torch.ones(1, 1))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_test_leaves_files_and_figures_and_prints_the_table_once(tmp_path, batches, capsys):
    trainer(tmp_path).test(Evaluated(), batches, verbose=False)
    printed = capsys.readouterr().out
    for line in table(report(-100.0)):
        assert printed.count(f"{line}\n") == 1
    with open(tmp_path / "attacks" / "attacks.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [one["attack"] for one in rows] == ["none", "random", "random_coupled"]
    assert tuple(rows[0]) == COLUMNS
    assert float(rows[2]["return_se"]) == 1 / 3  # to the last bit
    assert float(rows[1]["linf"]) == 0.1 / 3
    kept = json.loads((tmp_path / "attacks" / "attacks.json").read_text())
    assert (kept["worst_case"], kept["worst_attack"], kept["natural"]) == (-100.0, "random_coupled", 12345.5)
    assert kept["flags"] == report()["flags"]
    assert [one["return_mean"] for one in kept["attacks"]] == [12345.5, 2.0, -100.0]
    assert "traces" not in kept
    with np.load(tmp_path / "attacks" / "traces.npz") as traces:
        assert {name: traces[name].shape for name in traces.files} == {"random": (6, 2), "random_coupled": (4, 1)}
        assert np.array_equal(traces["random_coupled"], report()["traces"]["random_coupled"].numpy())
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"attacks_returns.png", "attacks_traces.png"}
    assert not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_fit_keeps_the_last_validation_and_not_the_sanity_check(tmp_path, batches, capsys):
    class Watch(Evaluated):
        seen: list[bool] = []

        def on_train_start(self) -> None:
            self.seen.append((tmp_path / "attacks").exists())

    module = Watch()
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=1).fit(module, batches, batches)
    assert (module.seen, module.evaluations) == ([False], 3)
    assert json.loads((tmp_path / "attacks" / "attacks.json").read_text())["worst_case"] == -3.0
    assert "worst" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_nothing_is_written_before_anything_was_evaluated(tmp_path, batches, monkeypatch):
    monkeypatch.setattr(Evaluated, "attack_report", lambda self: {})
    trainer(tmp_path).test(Evaluated(), batches, verbose=False)
    assert not list(tmp_path.iterdir())


def test_a_module_without_report_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"AttackMatrix: module: must offer attack_report\(\), got LightningModule"):
        AttackMatrix().setup(trainer(tmp_path), LightningModule(), "test")


def test_the_table_marks_the_worst_and_aligns():
    head, *rows, last, note = table(report())
    assert [line.split()[0] for line in rows] == ["none", "random", "random_coupled"]
    assert [line.endswith("<- worst") for line in rows] == [False, False, True]
    ends = [
        line.index(word) + len(word)
        for line, word in zip([head, *rows], ["return", "12,346", "2", "-7.25"], strict=True)
    ]
    assert len(set(ends)) == 1
    assert last == "worst case -7.25 (random_coupled), natural return 12,346"
    assert note == "note: pa_ad is weaker than noise"


def test_bars_with_errors_and_the_worst_in_another_colour():
    (axes,) = draw_returns(report()).axes
    bars = axes.containers[-1]
    assert [bar.get_width() for bar in bars] == [12345.5, 2.0, -7.25]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["none", "random", "random_coupled"]
    colours = [bar.get_facecolor() for bar in bars]
    assert colours[0] == colours[1] != colours[2]
    (segments,) = bars.errorbar.lines[2]
    assert np.allclose([end[:, 0] for end in segments.get_segments()][2], [-7.25 - 1 / 3, -7.25 + 1 / 3])


@pytest.mark.parametrize(("norm", "eps", "bounds"), [("inf", 0.1, 2), ("2", 0.1, 0), ("inf", [0.1, 0.2], 0)])
def test_a_panel_for_each_trace_with_its_coordinates(norm, eps, bounds):
    traces = {f"attack{i}": np.full((5, 2), float(i)) for i in range(4)}
    figure = draw_traces(traces, {"norm": norm, "eps": eps})
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == list(traces)
    assert [len(axes.lines) for axes in drawn] == [2 + bounds] * 4
    assert drawn[3].lines[1].get_xydata().tolist() == [[t, 3.0] for t in range(5)]
    assert [line.get_ydata()[0] for line in drawn[0].lines[2:]] == [-0.1, 0.1][:bounds]
