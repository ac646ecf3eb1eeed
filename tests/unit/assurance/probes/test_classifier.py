"""Probes of classifiers against the closed form, on models that are known to be robust, fragile or blind."""

from __future__ import annotations

import pytest
import torch

from datamodules.planted_data import PlantedData
from modules.assurance.subject import state_digest
from modules.assurance.suites import SuiteSettings, run_suite
from modules.assurance.verdict import Limit
from modules.planted import PlantedClassifier
from modules.planted.assurance import planted_subject

PROBES = ("attack", "attack_exact", "feature_saliency", "groups")


def _measured(weight, groups=(1.0,), hidden=0, **settings):
    model = PlantedClassifier(features=20, hidden=hidden)
    if weight is not None:
        with torch.no_grad():
            model.network.weight.copy_(torch.tensor(weight).view(1, -1))
            model.network.bias.zero_()
    subject = planted_subject(model, PlantedData(groups=groups, seed=3))
    given = {"suite": "custom", "probes": PROBES, "n0": 400, "n_max": 400} | settings
    return run_suite(subject, SuiteSettings(**given)), model


ROBUST = [1.0] + [0.0] * 19
FRAGILE = [0.0] + [1.0] * 19
BLIND = [0.0] * 20


def test_the_gradient_attack_finds_the_exact_worst_case():
    found, model = _measured([1.0] + [0.1] * 19)
    assert 0.0 < found.figure("r.accuracy").value < found.figure("u.accuracy").value
    assert found.figure("r.attack_gap").value == 0.0
    assert found.figure("r.masking").value == 0.0
    area = found.figure("r.accuracy_area").value
    assert found.figure("r.accuracy").value < area < found.figure("u.accuracy").value


def test_robust_fragile_and_blind_models():
    robust, fragile, blind = (_measured(weight)[0] for weight in (ROBUST, FRAGILE, BLIND))
    assert robust.figure("r.accuracy").low > 0.9
    assert robust.figure("i.saliency").value == pytest.approx(1.0)
    assert fragile.figure("u.accuracy").low > 0.95
    assert fragile.figure("r.accuracy").high < 0.3
    assert fragile.figure("i.saliency").value < 0.3
    assert blind.figure("u.accuracy").value == 0.0  # a margin of 0 is no answer
    assert blind.figure("r.accuracy").value == 0.0


def test_masked_gradients_are_found():
    found, _ = _measured([1.0] + [0.1] * 19)
    model = PlantedClassifier(features=20)
    subject = planted_subject(model, PlantedData(seed=3))

    def steps(x, y):  # a staircase: flat almost everywhere, so that the gradient says nothing
        return y * ((x @ torch.tensor([1.0] + [0.1] * 19)) * 50).round().detach() + 0.0 * x.sum(-1)

    capabilities = {name: value for name, value in subject.capabilities.items() if name != "exact_margins"}
    from dataclasses import replace

    masked = replace(subject, capabilities={**capabilities, "margins": steps})
    result = run_suite(masked, SuiteSettings(suite="custom", probes=("attack",), n0=400, n_max=400))
    assert result.figure("r.accuracy").value > found.figure("r.accuracy").value
    assert result.figure("r.masking").low > 0.01


def test_worst_group():
    found, _ = _measured([0.2] + [1.0] * 19, groups=(1.0, -1.0))
    worst = found.figure("e.worst_group")
    assert set(worst.conditions) == {"group 0", "group 1"}
    assert worst.value == min(worst.conditions.values())
    assert worst.value < 0.5 < worst.conditions["group 0"]


def test_deep_suites_never_find_less_and_leave_no_trace():
    rice, model = _measured(None, hidden=8)
    before = state_digest(model)
    subject = planted_subject(model, PlantedData(seed=3))
    settings = {"suite": "custom", "probes": ("attack",), "n0": 400, "n_max": 400}
    few, many = (
        run_suite(subject, SuiteSettings(**settings, effort={"attack_steps": 10, "restarts": n})).figure("r.accuracy")
        for n in (1, 4)
    )
    assert many.value <= few.value
    assert state_digest(model) == before
    assert run_suite(subject, SuiteSettings(**settings), [Limit("u.accuracy", 0.9)]).verdict != "pass"  # untrained
