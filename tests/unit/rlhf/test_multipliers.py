from __future__ import annotations

import io
import math
import warnings

import pytest
import torch
from torch import Tensor

from modules.objectives.lagrangian import multiplier_loss, multiplier_weights
from modules.rlhf.multipliers import Multipliers

NAMES, KINDS, THETAS = ["meteor", "intent"], ["ge", "eq"], [0.23, 0.48]


def build(**options) -> Multipliers:
    return Multipliers(**{"names": NAMES, "kinds": KINDS, "thresholds": THETAS, **options})


def returns(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feed(multipliers: Multipliers, rows: list[list[float]]) -> list[dict[str, Tensor]]:
    figures = []
    for row in rows:
        multipliers.update(torch.tensor(row, dtype=torch.float64))
        figures.append(multipliers.figures())
    return figures


@pytest.mark.parametrize("clip", [0.5, 0.02, None])
@pytest.mark.parametrize(("parameterisation", "kinds"), [("bounded", KINDS), ("softplus", ["ge", "le"])])
def test_a_step_equals_torch_sgd_after_clipping(clip, parameterisation, kinds):
    ours = build(kinds=kinds, parameterisation=parameterisation, lr=0.3, momentum=0.6, clip=clip)
    raw = ours.raw.clone().requires_grad_()
    optimiser = torch.optim.SGD([raw], lr=0.3, momentum=0.6)
    for observed in returns(20):
        optimiser.zero_grad()
        weights = multiplier_weights(raw, kinds, parameterisation)
        multiplier_loss(weights, observed, torch.tensor(THETAS, dtype=torch.float64)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([raw], clip)
        optimiser.step()
        ours.update(observed)
    torch.testing.assert_close(ours.raw, raw.detach(), rtol=1e-14, atol=1e-15)
    assert not torch.equal(ours.raw, build(kinds=kinds, parameterisation=parameterisation).raw)


def test_too_little_reward_raises_and_too_much_lowers_the_weight():
    below, above = torch.tensor([0.1, 0.1]), torch.tensor([0.9, 0.9])
    for kinds in (["ge", "eq"], ["le", "le"]):
        multipliers = build(kinds=kinds)
        start = multipliers.weights()
        multipliers.update(below)
        assert (multipliers.weights() > start).all()
        multipliers = build(kinds=kinds)
        multipliers.update(above)
        assert (multipliers.weights() < start).all()


def test_defaults_are_the_papers():
    multipliers = build()
    assert multipliers.raw.tolist() == [0.0, 0.0]
    assert multipliers.weights().tolist() == [0.5, 0.0]
    assert (multipliers.lr, multipliers.momentum, multipliers.clip) == (0.1, 0.1, 0.5)
    for form in ("softplus", "exp", "projected"):
        unbounded = build(kinds=["ge", "le"], parameterisation=form)
        assert unbounded.weights().tolist() == pytest.approx([0.5, -0.5])
    assert build(parameterisation="free", init=[0.5, -0.2]).weights().tolist() == [0.5, -0.2]


def test_one_draw_is_shared_by_all_and_follows_the_seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    raw = build(init_std=0.01).raw
    assert raw[0] == raw[1]
    assert 0 < float(raw[0].abs()) < 0.06
    assert torch.equal(build(init_std=0.01).raw, raw)
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    assert not torch.equal(build(init_std=0.01).raw, raw)


@pytest.mark.parametrize("window", [0, 4])
def test_a_checkpoint_resumes_bitwise(window):
    options = {"window": window, "momentum": 0.7, "lambda_clip": 0.2, "patience": 3, "saturation": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, first, second = (build(**options) for _ in range(3))
        for observed in returns(12):
            whole.update(observed)
        for observed in returns(12)[:7]:
            first.update(observed)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        for observed in returns(12)[7:]:
            second.update(observed)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert second.figures() == whole.figures()
    assert not list(whole.parameters())


def test_half_precision_and_devices_leave_float64():
    multipliers = build(init=[0.1234567890123, 0.2])
    before = multipliers.raw.clone()
    multipliers.to(torch.bfloat16).half().float()
    assert multipliers.raw.dtype == torch.float64
    assert torch.equal(multipliers.raw, before)
    multipliers.to("meta")
    assert multipliers.raw.device.type == "meta"


def test_a_window_averages_the_last_returns():
    plain, windowed = build(kinds=["le", "le"], momentum=0.0), build(kinds=["le", "le"], momentum=0.0, window=3)
    observed = returns(6)
    means = torch.stack([observed[max(0, end - 2) : end + 1].mean(0) for end in range(6)])
    for row, mean in zip(observed, means, strict=True):
        windowed.update(row)
        plain.update(mean)
    torch.testing.assert_close(windowed.raw, plain.raw)
    assert torch.equal(windowed.last_return, observed[-1])


def test_safe_rlhf_log_multiplier_stays_below_its_maximum_and_comes_back():
    multipliers = Multipliers(["cost"], ["le"], [0.0], "exp", lr=0.1, momentum=0.0, clip=None, init=1.0, lambda_max=5.0)
    assert multipliers.weights().tolist() == [-1.0]
    multipliers.update(torch.tensor([0.5]))
    assert float(multipliers.raw) == pytest.approx(0.1 * 0.5 * 1.0)  # log-lambda + lr * cost * lambda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(100):
            multipliers.update(torch.tensor([1.0]))
    assert multipliers.weights().tolist() == pytest.approx([-5.0])
    multipliers.update(torch.tensor([-1.0]))
    assert float(multipliers.weights()) > -4.0  # at once, since the raw value was kept at its limit


def test_projected_multipliers_come_back_from_zero():
    multipliers = Multipliers(["a"], ["ge"], [0.5], "projected", lr=0.1, momentum=0.0, init=0.05)
    for _ in range(5):
        multipliers.update(torch.tensor([1.0]))
    assert multipliers.weights().tolist() == [0.0]
    multipliers.update(torch.tensor([0.0]))
    assert multipliers.weights().tolist() == pytest.approx([0.05], rel=1e-4)


def test_an_infeasible_threshold_is_named_once_and_a_feasible_one_never():
    multipliers = build(kinds=["ge", "ge"], init=[6.0, 6.0], patience=10)
    rows = [[0.1, 0.1 if step % 9 else 0.6] for step in range(40)]
    with pytest.warns(UserWarning, match=r"constraints\.meteor: threshold 0\.23 looks infeasible") as seen:
        figures = feed(multipliers, rows)
    assert len(seen) == 1
    assert [float(row["constraint/meteor/infeasible"]) for row in figures] == [0.0] * 9 + [1.0] * 31
    assert figures[-1]["constraint/intent/infeasible"] == 0
    assert multipliers.saturated().tolist() == [True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relaxed = build(kinds=["ge", "eq"], init=[-6.0, 6.0], patience=2)
        for _ in range(20):
            relaxed.update(torch.tensor([0.9, 0.9]))  # slack, and on the way down
        near = build(kinds=["ge", "ge"], init=6.0, patience=2, tolerance=0.05)
        for _ in range(20):
            near.update(torch.tensor([0.225, 0.47]))


def test_an_equality_can_be_infeasible_from_above():
    multipliers = build(kinds=["eq", "eq"], init=[-6.0, 0.0], patience=5)
    with pytest.warns(UserWarning, match=r"constraints\.meteor"):
        feed(multipliers, [[0.9, 0.48]] * 6)


def test_new_thresholds_start_the_watch_and_the_averages_afresh():
    multipliers = build(kinds=["ge", "ge"], init=6.0, patience=3)
    with pytest.warns(UserWarning, match="looks infeasible"):
        feed(multipliers, [[0.1, 0.5]] * 4)
    raw = multipliers.raw.clone()
    multipliers.set_thresholds([0.05, 0.4])
    assert multipliers.infeasible().tolist() == [False, False]
    assert torch.equal(multipliers.raw, raw)
    (figures,) = feed(multipliers, [[0.2, 0.6]])
    assert float(figures["constraint/meteor/mean_return"]) == pytest.approx(0.2)
    assert float(figures["constraint/intent/threshold"]) == pytest.approx(0.4)


def test_averages_and_violations_of_each_kind():
    multipliers = Multipliers(["a", "b", "c"], ["ge", "le", "eq"], [0.5, 0.5, 0.5])
    weights = []
    for value in (0.2, 0.4):
        (figures,) = feed(multipliers, [[value] * 3])
        weights.append(multipliers.weights())
    assert [float(figures[f"constraint/{name}/violation"]) for name in "abc"] == pytest.approx([0.1, 0.0, -0.1])
    assert float(figures["constraint/b/mean_return"]) == pytest.approx(0.3)
    assert float(figures["multiplier/b/mean_w"]) == pytest.approx(float(sum(weights)[1] / 2))
    assert float(figures["multiplier/c/rho"]) == pytest.approx(float(multipliers.effective()[2]))
    (figures,) = feed(multipliers, [[0.6] * 3])
    assert [float(figures[f"constraint/{name}/violation"]) for name in "abc"] == pytest.approx([0.0, 0.1, 0.1])


def test_frozen_weights_stay_while_figures_go_on():
    frozen = build(kinds=["ge", "ge"], frozen_weights=[1.0, 0.25])
    (figures,) = feed(frozen, [[0.1, 0.1]])
    assert frozen.weights().tolist() == [1.0, 0.25]
    assert float(figures["constraint/meteor/mean_return"]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"weights\.intent: a frozen ge weight must be in \[0, 1\]"):
        build(kinds=["ge", "ge"], frozen_weights=[1.0, 1.25])


def test_weights_can_be_put():
    multipliers = build()
    multipliers.update(torch.tensor([0.0, 0.0]))
    multipliers.set_weights([0.9, -0.3])
    assert multipliers.weights().tolist() == pytest.approx([0.9, -0.3])
    assert multipliers.velocity.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="no bounded multiplier"):
        multipliers.set_weights([-0.9, 0.3])


def test_unbounded_multipliers_without_a_limit_are_never_called_infeasible():
    multipliers = Multipliers(["a"], ["ge"], [0.5], "projected", patience=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            multipliers.update(torch.tensor([0.0]))
    assert float(multipliers.weights()) > 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.2]}, "thresholds: want one for each of the constraints meteor, intent"),
        ({"kinds": ["ge"]}, "kinds"),
        ({"names": [], "kinds": [], "thresholds": []}, "at least one constraint"),
        ({"parameterisation": "projected"}, "multiplier.parameterisation"),
        ({"thresholds": [0.2, math.inf]}, r"constraints\.intent\.threshold"),
        ({"lr": -0.1}, "multiplier.lr"),
        ({"momentum": 1.5}, "multiplier.momentum"),
        ({"clip": 0.0}, "multiplier.clip"),
        ({"window": -1}, "multiplier.window"),
        ({"init": [0.1]}, "multiplier.init"),
        ({"kinds": ["ge", "ge"], "parameterisation": "exp", "init": 0.0}, "no exp multiplier"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_returns_are_named():
    with pytest.raises(ValueError, match="intent=nan"):
        build().update(torch.tensor([0.1, math.nan]))
    with pytest.raises(ValueError, match="want 2 finite returns"):
        build().update(torch.tensor([0.1]))


def test_relative_violations_move_multipliers_of_unlike_scales_alike():
    moved = Multipliers(["small", "large"], ["ge", "ge"], [0.1, 10.0], lr=0.1, momentum=0.0, clip=None, relative=True)
    moved.update(torch.tensor([0.05, 5.0], dtype=torch.float64))
    torch.testing.assert_close(moved.raw[0], moved.raw[1])
    assert moved.raw[0] == pytest.approx(0.1 * 0.25 * 0.5)  # lr, slope of the sigmoid at 0, half of it missing
    plain = Multipliers(["small", "large"], ["ge", "ge"], [0.1, 10.0], lr=0.1, momentum=0.0, clip=None)
    plain.update(torch.tensor([0.05, 5.0], dtype=torch.float64))
    assert plain.raw[1] == pytest.approx(100 * float(plain.raw[0]))
