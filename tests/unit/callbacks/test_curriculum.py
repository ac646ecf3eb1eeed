"""Figures of the curriculum, from a real run's report."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.curriculum import CurriculumFigures, draw_densities, draw_gaps, draw_staircase

HISTORY = {
    "gap/held_out/20": [[1.0, 0.0, 8.0], [2.0, 0.0, 4.0]],
    "gap/held_out/100": [[2.0, 0.0, 30.0]],
    "curriculum/scale": [[1.0, 0.0, 20.0], [2.0, 0.0, 100.0]],
    "curriculum/weight_20": [[1.0, 0.0, 1.0], [2.0, 0.0, 0.25]],
    "curriculum/weight_100": [[2.0, 0.0, 0.75]],
}


def test_gaps_are_a_line_per_scale_in_the_order_of_numbers():
    (axes,) = draw_gaps(HISTORY).axes
    assert [line.get_label() for line in axes.lines] == ["n = 20", "n = 100"]
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 8.0], [2.0, 4.0]]


def test_staircase_and_shares():
    above, below = draw_staircase(HISTORY).axes
    assert list(above.lines[0].get_ydata()) == [20.0, 100.0]
    assert [list(line.get_ydata()) for line in below.lines] == [[1.0, 0.25], [0.75]]


def test_densities_are_side_by_side_with_x_to_the_right():
    density = torch.zeros(4, 4)
    density[3, 0] = 16.0  # right, below
    (axes,) = draw_densities([("generator 0: 100 %", density)]).axes
    shown = axes.images[0].get_array()
    assert axes.images[0].origin == "lower"
    assert float(shown[0, 3]) == 16.0
    assert axes.get_title() == "generator 0: 100 %"


def test_settings_and_modules_are_checked():
    with pytest.raises(ValueError, match="every_n_iterations must be >= 1, got 0"):
        CurriculumFigures(every_n_iterations=0)
    with pytest.raises(ValueError, match="must offer population_report"):
        CurriculumFigures().setup(Trainer(logger=False, enable_checkpointing=False), LightningModule(), "fit")


def test_a_run_leaves_its_pictures(cli, support_configs, tmp_path):
    names = ("population.PopulationFigures", "curriculum.CurriculumFigures")
    callbacks = ", ".join(f"{{class_path: callbacks.{name}}}" for name in names)
    run = ["fit", "-c", support_configs / "asp.yaml", f"--trainer.callbacks=[{callbacks}]", "--experiment=figures"]
    assert cli(*run) == 0
    folder = tmp_path / "runs" / "figures" / "run-001" / "figures"
    assert {path.name for path in folder.glob("*.png")} >= {
        "curriculum_gaps.png",
        "curriculum_staircase.png",
        "curriculum_generators.png",
        "population_payoffs.png",
        "population_meta_strategy.png",
        "population_meta_strategy_over_time.png",
    }
