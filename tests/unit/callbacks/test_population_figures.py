"""Population callbacks: when they fire, what they write, resume, stopping."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from callbacks.population import (
    PayoffTableWriter,
    PopulationFigures,
    ReportsPopulation,
    StopAtExploitability,
    draw_meta_strategies_over_time,
    draw_payoffs,
)

pytest.importorskip("matplotlib")
BATCHES_AN_ITERATION = 3


class Plain(LightningModule):
    """Trains, and has no population."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches += 1
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FakePopulation(Plain):
    """Grows by one member after every third batch; NashConv is 1 / iteration."""

    def __init__(self, players: int = 2) -> None:
        super().__init__()
        self.players = players

    def population_report(self) -> dict[str, Any]:
        iteration = int(self.batches) // BATCHES_AN_ITERATION
        members = iteration + 1
        payoffs = torch.arange(float(members**self.players), dtype=torch.float64).sin()
        sigma = torch.arange(1.0, members + 1, dtype=torch.float64)
        return {
            "iteration": iteration,
            "payoffs": torch.stack([payoffs.reshape((members,) * self.players) + i for i in range(self.players)]),
            "meta_strategies": [sigma / sigma.sum()] * self.players,
            "history": {"meta/nashconv": [(float(i), 100.0 * i, 1.0 / i) for i in range(1, iteration + 1)]},
        }


def _fit(
    folder: Path, callbacks: list[Callback], batches: int, module: LightningModule | None = None, **options: Any
) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=batches,
        callbacks=callbacks,
        accelerator="cpu",
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module or FakePopulation(), DataLoader(list(range(100)), batch_size=1))
    return trainer


class _CountingFigures(PopulationFigures):
    def __init__(self, every_n_iterations: int) -> None:
        super().__init__(every_n_iterations)
        self.drawn_at: list[int] = []

    def _draw(self, trainer: Trainer, report: Any) -> None:
        self.drawn_at.append(report["iteration"])
        super()._draw(trainer, report)


def test_the_fake_module_offers_the_protocol():
    assert isinstance(FakePopulation(), ReportsPopulation)
    assert not isinstance(LightningModule(), ReportsPopulation)


def test_figures_are_drawn_every_n_iterations_and_at_the_end(tmp_path):
    figures = _CountingFigures(2)
    _fit(tmp_path, [figures], batches=17)  # iterations 0 to 5, the sixth unfinished
    assert figures.drawn_at == [0, 2, 4, 5]
    assert figures.iterations == [0, 1, 2, 3, 4, 5]
    assert [len(each[0]) for each in figures.meta_strategies] == [1, 2, 3, 4, 5, 6]
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {
        "population_exploitability.png",
        "population_payoffs.png",
        "population_meta_strategy.png",
        "population_meta_strategy_over_time.png",
    }
    assert all((tmp_path / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in written)


def test_the_end_does_not_draw_twice(tmp_path):
    figures = _CountingFigures(2)
    _fit(tmp_path, [figures], batches=4 * BATCHES_AN_ITERATION)
    assert figures.drawn_at == [0, 2, 4]


def test_three_players_have_no_heat_map(tmp_path):
    _fit(tmp_path, [PopulationFigures(1)], batches=3, module=FakePopulation(players=3))
    assert not (tmp_path / "figures" / "population_payoffs.png").exists()
    assert (tmp_path / "figures" / "population_meta_strategy.png").exists()


def test_figures_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    _fit(tmp_path, [PopulationFigures(2)], batches=9, logger=logger, log_every_n_steps=100)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {
        "population/exploitability",
        "population/payoffs",
        "population/meta_strategy",
        "population/meta_strategy_over_time",
    }
    assert len(events.Images("population/payoffs")) == 3


def test_a_resumed_callback_holds_the_whole_history(tmp_path):
    whole = PopulationFigures(100)
    _fit(tmp_path / "whole", [whole], batches=12)
    first, module = PopulationFigures(100), FakePopulation()
    _fit(tmp_path / "parts", [first], batches=6, module=module)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = PopulationFigures(100)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    _fit(tmp_path / "parts", [second], batches=6, module=module)
    assert second.state_dict() == whole.state_dict()
    assert second.iterations == [0, 1, 2, 3, 4]


def test_the_heat_map_is_centred_on_zero():
    figure = draw_payoffs(torch.tensor([[0.5, -2.0, 1.0]]), 3)
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-2.0, 2.0)
    np.testing.assert_array_equal(image.get_array(), [[0.5, -2.0, 1.0]])
    assert draw_payoffs(torch.zeros(2, 2), 0).axes[0].images[0].get_clim() == (-1.0, 1.0)


def test_stacked_areas_reach_one_at_every_iteration():
    figure = draw_meta_strategies_over_time([1, 2, 5], [[[1.0]], [[0.25, 0.75]], [[0.2, 0.3, 0.5]]])
    layers = figure.axes[0].collections
    assert len(layers) == 3
    edge = layers[-1].get_paths()[0].vertices
    for iteration in (1, 2, 5):
        assert edge[edge[:, 0] == iteration][:, 1].max() == pytest.approx(1.0)
    assert layers[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(1.0)


@pytest.mark.parametrize("players", [2, 3])
def test_the_payoff_table_is_written_whole(tmp_path, players):
    module = FakePopulation(players)
    _fit(tmp_path, [PayoffTableWriter()], batches=6, module=module)
    report = module.population_report()
    with np.load(tmp_path / "population" / "payoffs.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["payoffs"], report["payoffs"].numpy())
        np.testing.assert_array_equal(archive["meta_strategy_1"], report["meta_strategies"][1].numpy())
        assert int(archive["iteration"]) == 2
    with open(tmp_path / "population" / "payoffs.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3**players
    for row in rows:
        profile = tuple(int(row[f"member_{i}"]) for i in range(players))
        for player in range(players):
            assert float(row[f"payoff_{player}"]) == float(report["payoffs"][(player, *profile)])
    assert {path.name for path in (tmp_path / "population").iterdir()} == {"payoffs.npz", "payoffs.csv"}


def test_training_stops_at_the_threshold(tmp_path):
    trainer = _fit(tmp_path, [StopAtExploitability(0.25)], batches=90)
    assert trainer.global_step == 4 * BATCHES_AN_ITERATION  # 1 / 4 is reached in the fourth iteration
    trainer = _fit(tmp_path, [StopAtExploitability(0.0)], batches=20)
    assert trainer.global_step == 20


def test_an_unknown_metric_is_named_once_with_what_there_is(tmp_path):
    with pytest.warns(UserWarning, match="'meta/nash' was not reported in 10 iterations.*meta/nashconv") as caught:
        _fit(tmp_path, [StopAtExploitability(0.5, metric="meta/nash")], batches=45)
    assert sum("meta/nash" in str(one.message) for one in caught) == 1


def test_wrong_arguments_and_modules_are_refused(tmp_path):
    with pytest.raises(ValueError, match="PopulationFigures: every_n_iterations: must be >= 1, got 0"):
        PopulationFigures(0)
    with pytest.raises(ValueError, match="StopAtExploitability: threshold: must be >= 0, got nan"):
        StopAtExploitability(float("nan"))
    with pytest.raises(ValueError, match=r"PayoffTableWriter: module: must offer population_report\(\), got Plain"):
        _fit(tmp_path, [PayoffTableWriter()], batches=1, module=Plain())
