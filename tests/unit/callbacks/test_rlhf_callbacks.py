"""Callbacks that show what a language model's training does: sample texts, the trajectory figure, collapse warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from callbacks.collapse import CollapseWarning
from callbacks.text_samples import TextSamples
from callbacks.trajectory import TrajectoryFigure

# the data below need no position: every batch is the same
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Speaker(LightningModule):
    """Logs given figures, one set a validation, and says its step.

    Args:
        figures: by metric, the values of the validations after each step.
    """

    def __init__(self, **figures: list[float]) -> None:
        super().__init__()
        self.figures = figures
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name, values in self.figures.items():
            self.log(f"val/{name}", values[max(0, self.global_step - 1)])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def sample_texts(self) -> list[dict[str, str]]:
        return [{"prompt": f"p{i}", "response": f"at {self.global_step} | _so_\n[x]"} for i in range(3)]


class Mute(Speaker):
    sample_texts = None  # type: ignore[assignment]


def run(
    module: LightningModule, folder: Path, *callbacks: Callback, steps: int = 3, resume: str | None = None,
    sanity: int = 0,
) -> Trainer:  # fmt: skip
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, val_check_interval=1, num_sanity_val_steps=sanity, accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version=""), callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    batches: Any = DataLoader(torch.zeros(8, 1))
    trainer.fit(module, batches, DataLoader(torch.zeros(1, 1)), ckpt_path=resume, weights_only=True)
    return trainer


class TestTextSamples:
    def test_texts_go_to_a_file_and_to_tensorboard(self, tmp_path, monkeypatch):
        shown: list[tuple[str, str, int]] = []
        monkeypatch.setattr(
            "torch.utils.tensorboard.SummaryWriter.add_text",
            lambda self, tag, text, step: shown.append((tag, text, step)),
        )
        run(Speaker(), tmp_path, TextSamples(count=2), sanity=1)
        rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        assert [(row["step"], row["prompt"]) for row in rows] == [(s, f"p{i}") for s in range(4) for i in range(2)]
        assert rows[-1]["response"] == "at 3 | _so_\n[x]"
        assert [(tag, step) for tag, _, step in shown] == [("samples", step) for step in range(4)]
        lines = shown[-1][1].split("\n")
        assert lines[:2] == ["| prompt | response |", "| --- | --- |"]
        assert lines[2] == "| p0 | at 3 &#124; &#95;so&#95; &#91;x&#93; |"  # what Markdown would read as its own
        assert len(lines) == 4

    def test_a_resumed_run_writes_no_line_twice(self, tmp_path):
        file = tmp_path / "samples.jsonl"
        trainer = run(Speaker(), tmp_path, TextSamples(count=1), steps=2)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        run(Speaker(), tmp_path, TextSamples(count=1), steps=4, resume=str(tmp_path / "two.ckpt"))
        whole = file.read_text()
        assert [json.loads(line)["step"] for line in whole.splitlines()] == [1, 2, 3, 4]
        file.write_text(whole + '{"step": 5, "prom')  # a kill in the middle of a line
        run(Speaker(), tmp_path, TextSamples(count=1), steps=4, resume=str(tmp_path / "two.ckpt"))
        assert file.read_text() == whole

    def test_what_cannot_speak_and_a_count_of_0_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="Mute has no sample_texts"):
            run(Mute(), tmp_path, TextSamples())
        with pytest.raises(ValueError, match="count must be >= 1, got 0"):
            TextSamples(count=0)


class TestTrajectoryFigure:
    FIGURES = {"a": [0.1, 0.2, 0.3, 0.4], "b": [0.5, 0.4, 0.2, 0.1], "score": [1.0, 3.0, 2.0, 0.5]}

    def test_points_of_every_validation_are_drawn(self, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        drawn: list[Any] = []
        monkeypatch.setattr(
            "torch.utils.tensorboard.SummaryWriter.add_figure", lambda self, tag, figure, step: drawn.append(figure)
        )
        callback = TrajectoryFigure("val/a", "val/b", "val/score", cross=["val/b", "val/a"])
        run(Speaker(**self.FIGURES), tmp_path, callback, sanity=1)
        want = [[1, 0.1, 0.5, 1.0], [2, 0.2, 0.4, 3.0], [3, 0.3, 0.2, 2.0]]
        assert [point for row in callback.points for point in row] == pytest.approx(sum(want, []))
        assert (tmp_path / "figures" / "trajectory.png").stat().st_size > 1000
        plane = drawn[0].axes[0]
        path, mark = (line.get_xydata().tolist() for line in plane.lines)
        assert path == [pytest.approx(row[1:3]) for row in want]
        assert mark == [pytest.approx([0.2, 0.3])]
        assert plane.collections[0].get_array().tolist() == pytest.approx([1.0, 3.0, 2.0])

    def test_history_is_part_of_the_checkpoint(self, tmp_path):
        pytest.importorskip("matplotlib")
        first, second = (TrajectoryFigure("val/a", "val/b", "val/score") for _ in range(2))
        trainer = run(Speaker(**self.FIGURES), tmp_path, first, steps=2)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        run(Speaker(**self.FIGURES), tmp_path, second, steps=4, resume=str(tmp_path / "two.ckpt"))
        assert second.points[:2] == first.points
        assert [point[0] for point in second.points] == [1.0, 2.0, 3.0, 4.0]

    def test_a_metric_that_is_not_logged_and_a_cross_of_one_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"no metric val/c is logged; validation has val/a, val/b, val/score"):
            run(Speaker(**self.FIGURES), tmp_path, TrajectoryFigure("val/a", "val/c"))
        with pytest.raises(ValueError, match="cross must name two metrics"):
            TrajectoryFigure("val/a", "val/b", cross=["val/a"])


class TestCollapseWarning:
    def test_warns_once_below_the_share_of_the_first_validation(self, tmp_path):
        callback = CollapseWarning("val/vocab_3", share=0.5)
        with pytest.warns(UserWarning, match=r"step 3: val/vocab_3 fell from 100 to 49, below 0.5") as caught:
            run(Speaker(vocab_3=[100.0, 50.0, 49.0, 10.0]), tmp_path, callback, steps=4, sanity=1)
        assert len([w for w in caught if "vocab_3" in str(w.message)]) == 1
        assert callback.state_dict() == {"first": 100.0, "warned": True}

    def test_is_silent_where_nothing_falls_or_nothing_is_logged(self, tmp_path):
        run(Speaker(vocab_3=[100.0, 50.0, 120.0]), tmp_path, CollapseWarning())  # warnings are errors here
        callback = CollapseWarning()
        run(Speaker(), tmp_path, callback)
        assert callback.first is None

    def test_a_resumed_run_remembers_where_it_began(self, tmp_path):
        figures = {"vocab_3": [100.0, 90.0, 40.0, 30.0]}
        trainer = run(Speaker(**figures), tmp_path, CollapseWarning(), steps=2)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        with pytest.warns(UserWarning, match="fell from 100 to 40"):
            run(Speaker(**figures), tmp_path, CollapseWarning(), steps=3, resume=str(tmp_path / "two.ckpt"))

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_a_share_out_of_range_is_refused(self, share):
        with pytest.raises(ValueError, match=r"share must be in \(0, 1\)"):
            CollapseWarning(share=share)
