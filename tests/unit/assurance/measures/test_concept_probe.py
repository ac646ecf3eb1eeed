"""Linear probes: the optimum's conditions, seeds, scales, batches, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from modules.assurance.measures import concept_probe
from modules.assurance.measures.concept_probe import fit_logistic, probe_selectivity


def _data(samples: int = 300, size: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, size, generator=generator)
    w = torch.randn(size, classes, generator=generator)
    labels = (x @ w + torch.randn(samples, classes, generator=generator)).argmax(1)
    return x, labels, torch.randint(30, (samples,), generator=generator)


def test_seeds_are_reproducible_and_differ():
    x, labels, types = _data()
    one, again, other = (probe_selectivity(x, labels, types, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.task, again.task)
    assert torch.equal(one.control, again.control)
    assert not torch.equal(one.control, other.control)
    assert one.task.shape == one.control.shape == one.majority.shape == one.selectivity.shape == (5,)
    assert len(set(one.task.tolist())) > 1
    assert torch.equal(probe_selectivity(x, labels, types, seeds=2).task, one.task[:2])


def test_accuracies_count_held_out_samples_only():
    """Labels without any structure and as many features as samples: the fit is perfect, held-out accuracy is not."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(200, 200, generator=generator), torch.randint(2, (200,), generator=generator)
    found = probe_selectivity(x, labels, torch.arange(200), split=0.5)
    assert found.task.mean() < 0.65
    scores = fit_logistic(x, labels[None], torch.ones(1, 200, dtype=torch.bool), classes=2)
    assert (scores[0].argmax(1) == labels).all()


def test_majority_is_that_of_the_training_part():
    x, _, types = _data()
    labels = (torch.arange(300) >= 240).long()
    found = probe_selectivity(x, labels, types)
    assert found.majority.mean().item() == pytest.approx(0.8, abs=0.05)
    assert (found.majority * 90).round().tolist() == pytest.approx((found.majority * 90).tolist())  # of 90 held out


def test_scale_shift_constants_and_names_change_nothing():
    x, labels, types = _data()
    plain = probe_selectivity(x.double(), labels, types)
    scaled = x.double() * torch.logspace(-6, 6, 6).double() + torch.arange(6) * 1e3
    padded = torch.cat([scaled, torch.full((300, 1), 7.0).double()], 1)
    renamed = probe_selectivity(padded, labels * 10 - 3, types * 1000)
    torch.testing.assert_close(plain.task, renamed.task)
    torch.testing.assert_close(plain.control, renamed.control)


def test_groups_of_seeds_change_nothing(monkeypatch):
    x, labels, types = _data()
    together = probe_selectivity(x, labels, types)
    monkeypatch.setattr(concept_probe, "_CELLS", 2 * 300 * 3 * 2)  # two seeds at a time
    apart = probe_selectivity(x, labels, types)
    torch.testing.assert_close(together.task, apart.task)
    torch.testing.assert_close(together.control, apart.control)


@pytest.mark.parametrize("l2", [1e-5, 1e-2, 10.0])
def test_a_fit_is_a_stationary_point(l2):
    """Autograd's gradient of the stated objective at the fit, with weights recovered from the logits."""
    x, labels, _ = _data()
    trained = torch.arange(300) < 200
    scores = fit_logistic(x, labels[None], trained[None], classes=3, l2=l2)[0]
    rows = x.double()
    scaled = (rows - rows[trained].mean(0)) / rows[trained].std(0, correction=0)
    design = torch.cat([scaled, torch.ones(300, 1).double()], 1)
    weights = torch.linalg.lstsq(design, scores).solution.requires_grad_()
    torch.testing.assert_close((design @ weights).detach(), scores, atol=1e-9, rtol=0)
    value = torch.nn.functional.cross_entropy((design @ weights)[trained], labels[trained])
    value = value + l2 / 2 * weights[:-1].square().sum()
    (slope,) = torch.autograd.grad(value, weights)
    assert slope.abs().max() < 2e-6


def test_a_class_that_training_lacks_is_never_said():
    x, labels, _ = _data()
    trained = labels != 2
    scores = fit_logistic(x, labels[None], trained[None], classes=3)[0]
    assert not (scores[~trained].argmax(1) == 2).any()


def test_no_convergence_says_so():
    x, labels, _ = _data()
    with pytest.raises(RuntimeError, match="no convergence in 1 iterations; raise l2"):
        fit_logistic(x, labels[None], torch.ones(1, 300, dtype=torch.bool), classes=3, iterations=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(0, 6)}, "with values"),
        ({"features": torch.ones(300, 6, dtype=torch.long)}, "floating point"),
        ({"features": torch.full((300, 6), math.nan)}, "must be finite"),
        ({"features": torch.full((300, 6), 2.0)}, "the same for all samples"),
        ({"labels": torch.zeros(300, dtype=torch.long)}, "hold one class"),
        ({"labels": torch.zeros(300)}, "labels: must be integers"),
        ({"types": torch.zeros(299, dtype=torch.long)}, r"types: must be integers \[300\]"),
        ({"types": torch.zeros(300, dtype=torch.long)}, "hold one type"),
        ({"split": 1.0}, "split in"),
        ({"split": 0.999}, "too few to be split"),
        ({"seeds": 0}, "seeds >= 1"),
        ({"l2": 0.0}, "l2: must be above 0"),
    ],
)
def test_probe_refuses(change, message):
    x, labels, types = _data()
    with pytest.raises(ValueError, match=message):
        probe_selectivity(**{"features": x, "labels": labels, "types": types, **change})
