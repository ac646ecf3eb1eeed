"""Planted features and their classifier: distributions, streams, ranks, worst cases, objectives, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from datamodules.planted_data import PlantedData
from modules.objectives.shift import ShiftObjective
from modules.planted import PlantedClassifier


def data(**options: Any) -> PlantedData:
    made = PlantedData(**{"seed": 4, **options})
    made.setup()
    return made


def on_rank(made: PlantedData, rank: int, world: int) -> PlantedData:
    made.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
    return made


def trained(module: PlantedClassifier, made: PlantedData, steps: int) -> PlantedClassifier:
    """After some steps of Lightning's loop, without files."""
    Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    ).fit(module, made)  # fmt: skip
    return module.eval()


def accuracy(module: PlantedClassifier, x: Tensor, y: Tensor) -> float:
    return float((y * module(x) > 0).float().mean())


# ---------------------------------------------------------------------------------------------------------------- data


def test_features_have_the_means_and_deviations_asked_for():
    made = data(groups=[1.0, -2.0], train_size=10, batch_size=4)
    for group, strength in ((0, 1.0), (1, -2.0)):
        x, y = made.units(1, 20_000, group)
        assert x.dtype == y.dtype == torch.float32
        assert x.shape == (20_000, 20)
        assert set(y.unique().tolist()) == {-1.0, 1.0}
        assert abs(float(y.mean())) < 0.03
        signal = y.unsqueeze(1) * x
        assert signal.mean(0).tolist() == pytest.approx([1.5, *[0.2 * strength] * 19], abs=0.02)
        assert signal.std(0).tolist() == pytest.approx([0.6, *[0.35] * 19], rel=0.03)
        noise = signal - signal.mean(0)
        assert (torch.corrcoef(noise.T) - torch.eye(20)).abs().max() < 0.04


def test_fresh_units_are_a_pure_function_of_seed_and_number():
    made = data(groups=[1.0, -1.0])
    many, few = made.units(9, 700), made.units(9, 300)
    assert torch.equal(many[0][:300], few[0])
    assert torch.equal(many[1][:300], few[1])
    assert not torch.equal(made.units(8, 300)[0], few[0])
    assert torch.equal(data(groups=[1.0, -1.0], seed=5).units(9, 300)[0], few[0])  # whatever the training seed
    assert made.units(9, 0)[0].shape == (0, 20)
    # units alternate between groups
    signal = many[1].unsqueeze(1) * many[0]
    assert float(signal[::2, 1:].mean()) > 0.15
    assert float(signal[1::2, 1:].mean()) < -0.15


def test_no_two_splits_share_a_sample():
    made = data(val_size=500, test_size=500)
    parts = {"train": made.rows["x"], "units": made.units(4, 500)[0]}  # the training seed itself
    parts |= {name: next(iter(getattr(made, f"{name}_dataloader")()))["x"] for name in ("val", "test")}
    start = torch.cat([part[:, :2] for part in parts.values()])  # single coordinates coincide now and then
    assert len(start.unique(dim=0)) == len(start) == 2000 + 3 * 500


def test_a_batch_is_a_pure_function_of_the_step_and_has_every_group_in_its_share():
    made = data(groups=[1.0, 0.5, -1.0], shares=[0.7, 0.2, 0.1], batch_size=50)
    assert torch.bincount(made.rows["group"]).tolist() == [1400, 400, 200]
    assert made.batch(7).batch_size == torch.Size([50])
    assert torch.equal(data(groups=[1.0, 0.5, -1.0], shares=[0.7, 0.2, 0.1], batch_size=50).batch(7)["x"],
                       made.batch(7)["x"])  # fmt: skip
    assert not torch.equal(made.batch(8)["x"], made.batch(7)["x"])
    drawn = torch.cat([made.batch(step)["x"][:, 0] for step in range(200)])
    for step in range(5):
        batch = made.batch(step)
        assert torch.bincount(batch["group"]).tolist() == [35, 10, 5]
        for row in range(0, 50, 7):  # whole rows of the training set, of their group
            index = int((made.rows["x"][:, 0] == batch["x"][row, 0]).nonzero())
            for key in ("x", "y", "group"):
                assert torch.equal(made.rows[key][index], batch[key][row])
    assert len(drawn.unique()) > 1900  # all rows take part


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_rows_of_one(world):
    made = data(groups=[1.0, -1.0], batch_size=16, val_size=101, seed=2)
    whole, held = made.batch(3), next(iter(made.val_dataloader()))
    assert held["weight"].sum() == len(held) == 101
    shares = [on_rank(made, rank, world).batch(3) for rank in range(world)]
    assert {len(share) for share in shares} == {16 // world}
    assert torch.equal(torch.cat([s["x"] for s in shares]).sort(0).values, whole["x"].sort(0).values)
    parts = [next(iter(on_rank(made, rank, world).val_dataloader())) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    kept = torch.cat([part["x"][part["weight"] > 0] for part in parts])
    assert torch.equal(kept.sort(0).values, held["x"].sort(0).values)


def test_the_run_seed_is_the_default(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert torch.equal(data(seed=None).rows["x"], data(seed=4).rows["x"])
    assert not torch.equal(data(seed=3).rows["x"], data(seed=4).rows["x"])
    assert data(seed=None).state_dict()["seed"] == 4


def test_a_checkpoint_of_other_data_is_refused():
    saved = data().state_dict()
    data().load_state_dict(saved)
    for key, other in (("seed", 5), ("batch_size", 128), ("groups", [2.0]), ("fragile_noise", 0.1)):
        with pytest.raises(ValueError, match=rf"trained on other data: {key} was"):
            data(**{key: other}).load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "features must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"fragile_noise": -1.0}, "fragile_noise must be >= 0"),
        ({"groups": []}, "groups needs a strength"),
        ({"robust_mean": float("nan")}, "must be finite"),
        ({"groups": [1.0, 2.0], "shares": [1.0]}, "shares must be 2 numbers"),
        ({"groups": [1.0, 2.0], "shares": [0.999, 0.001]}, "batch_size 256 leaves a group without a row"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_data_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PlantedData(**options)


def test_units_out_of_range_are_refused():
    with pytest.raises(ValueError, match="group must be below 1"):
        data().units(0, 5, group=1)
    with pytest.raises(ValueError, match="count and seed must be >= 0"):
        data().units(0, -5)
    with pytest.raises(RuntimeError, match="call setup"):
        PlantedData().batch(0)


def test_what_ranks_cannot_share_is_refused():
    made = PlantedData(batch_size=255)
    made.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 ranks"):
        made.setup("fit")
    made.trainer = SimpleNamespace(accumulate_grad_batches=4, world_size=1)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1"):
        made.setup("fit")


# ---------------------------------------------------------------------------------------------------------- classifier


def test_pgd_accuracy_of_a_linear_classifier_equals_the_closed_form():
    torch.manual_seed(0)
    made, module = data(), PlantedClassifier()
    x, y = made.units(0, 2000)
    with torch.no_grad():
        module.network.weight[0, 0] += 1.0  # so that the budget decides, and not the draw
    for eps in (0.05, 0.3):
        exact = y * module(x) - eps * module.network.weight.abs().sum()  # type: ignore[union-attr]
        found = y * module(module.attacked(x, y, eps, 40))
        assert torch.allclose(found, exact, atol=1e-5)
    assert 0.2 < float((exact > 0).float().mean()) < accuracy(module, x, y)


def test_adversarial_training_moves_a_classifier_to_the_robust_feature():
    made = data(batch_size=100)
    x, y = made.units(0, 4000)
    robust = {}
    for eps in (0.0, 0.225):
        torch.manual_seed(0)
        module = trained(PlantedClassifier(eps=eps, lr=0.05), made, 80)
        assert accuracy(module, x, y) > 0.98
        robust[eps] = accuracy(module, module.attacked(x, y, 0.3, 20), y)
        assert torch.isfinite(module.network.weight).all()
    assert robust[0.0] < 0.6
    assert robust[0.225] > 0.95


def test_objectives_help_the_rare_group_whose_fragile_features_lie():
    """A twentieth of the rows has the fragile features turned round: the mean leans on them, the others less."""
    shares = [0.95, 0.05]
    made = data(groups=[1.0, -1.0], shares=shares, batch_size=200)
    options: dict[str, dict[str, Any]] = {
        "erm": {"shares": shares}, "dro": {"eta": 0.5}, "rex": {"beta": 10.0, "shares": shares}, "cvar": {"alpha": 0.5},
    }  # fmt: skip
    worst = {}
    for kind, given in options.items():
        torch.manual_seed(1)
        objective = ShiftObjective(kind, groups=2, **given)  # type: ignore[arg-type]
        module = trained(PlantedClassifier(lr=0.05, objective=objective), made, 60)
        worst[kind] = min(accuracy(module, *made.units(3, 4000, group)) for group in (0, 1))
    assert worst.pop("erm") < 0.85
    assert min(worst.values()) > 0.95, worst


def test_group_losses_and_slopes_are_those_of_each_group_by_itself():
    """IRM's training loss against its definition, group by group."""
    made = data(groups=[1.0, -1.0], batch_size=10)
    module = PlantedClassifier(objective=ShiftObjective("irm", groups=2, penalty=3.0))
    module.trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    batch = made.batch(0)
    want = torch.zeros(())
    for group in (0, 1):
        of = batch[batch["group"] == group]
        scale = torch.ones((), requires_grad=True)
        risk = torch.nn.functional.softplus(-of["y"] * scale * module(of["x"])).mean()
        (slope,) = torch.autograd.grad(risk, scale, create_graph=True)
        want = want + (risk + 3.0 * slope.square()) / 2
    found = module.training_step(batch, 0)
    assert found.item() == pytest.approx(want.item(), rel=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(found, [*module.network.parameters()]),
        torch.autograd.grad(want, [*module.network.parameters()]),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_loss_that_is_no_number_stops_the_run():
    module = PlantedClassifier()
    module.trainer = SimpleNamespace(world_size=1, lightning_module=module, global_step=0)  # type: ignore[assignment]
    batch = data().batch(0)
    batch["x"][0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        module.training_step(batch, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": -1}, "hidden must be >= 0"),
        ({"eps": float("inf")}, "eps must be >= 0.0 and finite"),
        ({"attack_steps": 0}, "attack_steps must be >= 1"),
        ({"lr": 0.0}, "lr must be > 0"),
    ],
)
def test_classifiers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PlantedClassifier(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 5}, "features is 5, the data's is 20"),
        ({"objective": ShiftObjective(groups=3)}, "objective.groups is 3, the data's is 1"),
    ],
)
def test_data_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trained(PlantedClassifier(**options), data(), 1)
