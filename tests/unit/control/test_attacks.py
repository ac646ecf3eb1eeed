"""Attacks: feasible at every step of long sequences with resets, callable anywhere, and what each of them is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules.control.attacks import (
    constant_bias,
    critic_attack,
    director_attack,
    maximal_action_difference,
    ornstein_uhlenbeck,
    random_uniform,
    sgld_worst_case,
)
from modules.control.bounds import interval_bounds
from modules.control.perturbation import PerturbationSet, PerturbationSettings
from modules.networks.stacked_mlp import StackedMLP

ROWS, SIZE, ACTIONS, STEPS = 6, 4, 2, 5
EPS, EPS_BAR = 0.2, 0.03
ATTACKS = ["random", "ou", "constant", "mad", "critic", "director"]
NET = StackedMLP(SIZE, [8], ACTIONS, "tanh")
PARAMS = NET.init(1, torch.Generator().manual_seed(0))


def mean(seen: Tensor) -> Tensor:
    return NET.apply(PARAMS, seen)[0]


def value(seen: Tensor) -> Tensor:
    return mean(seen)[:, 0]


def make(norm: str = "inf", coupled: bool = True, first: str = "free", eps=EPS, eps_bar=EPS_BAR) -> PerturbationSet:
    return PerturbationSet(PerturbationSettings("state", norm, eps, eps_bar, coupled, first), SIZE)


class Runner:
    """One attack over many steps, with its memory."""

    def __init__(self, name: str, budget: PerturbationSet, seed: int) -> None:
        self.name, self.budget = name, budget
        self.generator = torch.Generator().manual_seed(seed)
        self.path = torch.zeros(ROWS, SIZE)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def __call__(self, observation: Tensor, previous: Tensor, fresh: Tensor | None) -> Tensor:
        budget, norm = self.budget, self.budget.settings.norm

        def project(p: Tensor) -> Tensor:
            return budget.project(p, previous, fresh)

        uniform = torch.rand(ROWS, SIZE, generator=self.generator) * 2 - 1
        if self.name == "random":
            return random_uniform(previous, fresh, uniform, budget)
        if self.name == "ou":
            if fresh is not None:
                self.path = self.path.masked_fill(fresh.unsqueeze(-1), 0.0)
            self.path = ornstein_uhlenbeck(self.path, self.draw(ROWS, SIZE), budget.eps)
            return project(self.path)
        if self.name == "constant":
            p, self.path = constant_bias(self.path, fresh, self.draw(ROWS, SIZE), budget)
            return project(p)
        if self.name == "mad":
            start, noise = self.draw(ROWS, SIZE), self.draw(STEPS, ROWS, SIZE)
            std = torch.tensor([0.3, 0.5])
            return maximal_action_difference(mean, observation, std, budget.eps, project, start, noise, STEPS, norm)
        if self.name == "critic":
            return critic_attack(value, observation, budget.eps, project, STEPS, norm)
        return director_attack(mean, observation, self.draw(ROWS, ACTIONS), budget.eps, project, uniform, STEPS, norm)


def play(name: str, budget: PerturbationSet, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Perturbations ``[steps, rows, size]`` and where episodes began; every one is checked against both budgets."""
    runner, generator = Runner(name, budget, seed), torch.Generator().manual_seed(seed + 1)
    p, path, began = torch.zeros(ROWS, SIZE), [], []
    for step in range(steps):
        fresh = torch.rand(ROWS, generator=generator) < 0.03
        fresh = torch.ones_like(fresh) if step == 0 else fresh
        observation = torch.randn(ROWS, SIZE, generator=generator)
        before, p = p, runner(observation, p, fresh if fresh.any() else None)
        over, leap = budget.excess(p, before, fresh)
        assert over.max() <= budget.tolerance, (name, step)
        assert leap.max() <= budget.tolerance, (name, step)
        assert p.dtype == torch.float32
        assert not p.requires_grad
        path.append(p)
        began.append(fresh)
    return torch.stack(path), torch.stack(began)


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("first", ["free", "zero"])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_coupled_attack_is_feasible_at_every_step_of_a_long_sequence(name: str, first: str, norm: str) -> None:
    budget = make(norm, first=first)
    path, began = play(name, budget, 150)
    leap = budget.norms(path[1:] - path[:-1])
    held = leap[~began[1:]]
    assert held.max() <= EPS_BAR + 1e-6
    if name != "constant":
        assert held.max() > 0.8 * EPS_BAR  # the budget is used
    assert budget.norms(path).max() > 0.5 * EPS


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_uncoupled_attack_uses_its_whole_budget(name: str, norm: str) -> None:
    budget = make(norm, coupled=False)
    path, _ = play(name, budget, 40)
    assert budget.norms(path).max() > 0.9 * EPS
    if name != "constant":
        assert budget.norms(path[1:] - path[:-1]).max() > EPS_BAR


@pytest.mark.parametrize("name", ATTACKS)
def test_no_budget_is_no_perturbation(name: str) -> None:
    for coupled in (False, True):
        path, _ = play(name, make(coupled=coupled, eps=0.0), 5)
        assert (path == 0).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_bounds_of_each_coordinate(name: str) -> None:
    path, _ = play(name, make(eps=[0.2, 0.0, 0.1, 0.4], eps_bar=[0.02, 0.1, 0.3, 0.01]), 40)
    assert (path[..., 1] == 0).all()
    assert path[..., 2].abs().max() > 0.05


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mad", "critic", "director"])
def test_gradient_attacks_run_where_gradients_are_off(name: str, mode) -> None:
    """Also on tensors made in inference mode, and with the same result."""
    budget = make()
    observation, previous = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1)), torch.zeros(ROWS, SIZE)
    expected = Runner(name, budget, 3)(observation, previous, None)
    with mode():
        found = Runner(name, budget, 3)(observation + 0.0, previous + 0.0, None)
        assert torch.equal(found, expected)
        assert torch.is_grad_enabled() is False
    assert expected.abs().max() > 0


def test_the_inner_maximum_runs_in_inference_mode() -> None:
    observation = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1))
    drawn = torch.randn(STEPS + 1, ROWS, SIZE, generator=torch.Generator().manual_seed(2))
    std, eps = torch.tensor([0.3, 0.5]), torch.tensor([0.1, 0.2, 0.0, 0.3])
    expected = sgld_worst_case(mean, observation, std, eps, drawn[0], drawn[1:], STEPS)
    with torch.inference_mode():
        found = sgld_worst_case(mean, observation + 0.0, std + 0.0, eps + 0.0, drawn[0] + 0.0, drawn[1:] + 0.0, STEPS)
    assert torch.equal(found, expected)
    assert (expected.abs() <= eps).all()
    assert (expected[:, 2] == 0).all()


def test_attacks_leave_their_arguments_and_gradients_alone() -> None:
    params = {name: tensor.clone().requires_grad_() for name, tensor in PARAMS.items()}
    observation = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1))
    drawn = torch.randn(STEPS + 1, ROWS, SIZE, generator=torch.Generator().manual_seed(2))
    kept = observation.clone(), drawn.clone()

    def policy(seen: Tensor) -> Tensor:
        return NET.apply(params, seen)[0]

    def project(p: Tensor) -> Tensor:
        return p.clamp(-0.1, 0.1)

    maximal_action_difference(policy, observation, torch.ones(ACTIONS), 0.1, project, drawn[0], drawn[1:], STEPS)
    critic_attack(lambda seen: policy(seen)[:, 0], observation, 0.1, project, STEPS)
    director_attack(policy, observation, torch.ones(ROWS, ACTIONS), 0.1, project, drawn[0].tanh(), STEPS)
    sgld_worst_case(policy, observation, torch.ones(ACTIONS), 0.1, drawn[0], drawn[1:], STEPS)
    assert torch.equal(observation, kept[0])
    assert torch.equal(drawn, kept[1])
    assert all(tensor.grad is None for tensor in params.values())
    assert not observation.requires_grad


def test_rows_do_not_see_one_another() -> None:
    observation = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1))
    drawn = torch.randn(STEPS + 1, ROWS, SIZE, generator=torch.Generator().manual_seed(2))

    def run(rows: slice) -> Tensor:
        return maximal_action_difference(
            mean,
            observation[rows],
            torch.ones(ACTIONS),
            0.3,
            lambda p: p.clamp(-0.3, 0.3),
            drawn[0, rows],
            drawn[1:, rows],
            STEPS,
        )

    torch.testing.assert_close(run(slice(0, ROWS)), torch.cat([run(slice(i, i + 1)) for i in range(ROWS)]))


def test_the_start_of_mad_must_not_be_zero() -> None:
    """At 0 the gradient is 0: without a start and without noise nothing moves."""
    observation, none = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1)), torch.zeros(ROWS, SIZE)
    silent = torch.zeros(STEPS, ROWS, SIZE)

    def run(start: Tensor) -> Tensor:
        return maximal_action_difference(
            mean, observation, torch.ones(ACTIONS), 0.1, lambda p: p.clamp(-0.1, 0.1), start, silent, STEPS
        )

    assert (run(none) == 0).all()
    assert (run(none + 1.0).abs().amax(-1) > 0.099).all()


def test_the_best_point_on_the_way_is_kept() -> None:
    """A value with a narrow valley that steps of ``eps / steps`` go through and leave."""
    observation = torch.zeros(1, 1)

    def valley(seen: Tensor) -> Tensor:
        p = seen[:, 0]
        # falls to the left all the way, but the valley at -0.41 is deepest
        return 0.1 * p - 5.0 * torch.exp(-((p + 0.41) / 0.02).square())

    p = critic_attack(valley, observation, 1.0, lambda p: p.clamp(-1, 1), 10)
    assert float(p) == pytest.approx(-0.4, abs=1e-5)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_gradients_that_are_no_numbers_are_no_step(norm: str) -> None:
    observation, budget = torch.zeros(ROWS, SIZE), make(norm, coupled=False)
    start = torch.ones(ROWS, SIZE)

    def broken(seen: Tensor) -> Tensor:
        return seen[:, :ACTIONS] * torch.nan

    def project(p: Tensor) -> Tensor:
        return budget.project(p, torch.zeros_like(p))

    p = critic_attack(lambda seen: broken(seen)[:, 0], observation, EPS, project, STEPS, norm)
    assert (p == 0).all()
    p = director_attack(broken, observation, torch.ones(ROWS, ACTIONS), EPS, project, start, STEPS, norm)
    assert (budget.norms(p) <= EPS / STEPS + 1e-7).all()  # the start


def test_random_noise_fills_its_range_and_walks_when_coupled() -> None:
    uniform = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    nothing = torch.zeros(1, SIZE)
    new, old = torch.tensor([True]), torch.tensor([False])
    free = make(coupled=False)
    torch.testing.assert_close(random_uniform(nothing, old, uniform, free), EPS * uniform)
    coupled = make()
    torch.testing.assert_close(random_uniform(nothing + 0.1, old, uniform, coupled), 0.1 + EPS_BAR * uniform)
    torch.testing.assert_close(random_uniform(nothing + 0.1, None, uniform, coupled), 0.1 + EPS_BAR * uniform)
    torch.testing.assert_close(random_uniform(nothing + 0.1, new, uniform, coupled), EPS * uniform)
    zero = make(first="zero")
    torch.testing.assert_close(random_uniform(nothing + 0.1, new, uniform, zero), EPS_BAR * uniform)
    at_the_edge = random_uniform(nothing + EPS, None, uniform, coupled)
    torch.testing.assert_close(at_the_edge, (EPS + EPS_BAR * uniform).clamp_max(EPS))


def test_an_ornstein_uhlenbeck_path_has_the_deviation_and_memory_it_should() -> None:
    generator = torch.Generator().manual_seed(0)
    path, paths = torch.zeros(2000, 1), []
    for _ in range(300):
        path = ornstein_uhlenbeck(path, torch.randn(2000, 1, generator=generator), torch.tensor([EPS]), theta=0.15)
        paths.append(path)
    late = torch.stack(paths[100:]).squeeze(-1)
    assert late.std().item() == pytest.approx(EPS, rel=0.02)
    assert (late[1:] * late[:-1]).mean().item() / EPS**2 == pytest.approx(0.85, abs=0.02)
    torch.testing.assert_close(
        ornstein_uhlenbeck(torch.ones(1, 1), torch.ones(1, 1), EPS, theta=0.5, sigma=0.25), torch.tensor([[0.75]])
    )


def test_a_constant_bias_is_held_for_an_episode() -> None:
    budget = make(coupled=False)
    path, began = play("constant", budget, 100)
    assert torch.equal(path.abs(), torch.full_like(path, EPS))
    same = (path[1:] == path[:-1]).all(-1)
    assert same[~began[1:]].all()
    assert not same[began[1:]].all()
    path, _ = play("constant", make("2", coupled=False), 20)
    torch.testing.assert_close(path.norm(dim=-1), torch.full((20, ROWS), EPS))


def test_a_coupled_constant_bias_is_reached_as_fast_as_may_be() -> None:
    runner, budget = Runner("constant", make(first="zero"), 0), make(first="zero")
    p = torch.zeros(ROWS, SIZE)
    for step in range(12):
        p = runner(torch.zeros(ROWS, SIZE), p, torch.full((ROWS,), step == 0))
        torch.testing.assert_close(p.abs(), torch.full_like(p, min(EPS, (step + 1) * EPS_BAR)))
    assert budget.excess(p, p)[0].max() <= budget.tolerance


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_interval_bounds_refuse_activations_that_are_not_monotone(activation: str) -> None:
    net = StackedMLP(3, [4], 2, activation)
    box = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=f"must be monotone .* got '{activation}'"):
        interval_bounds(net, net.init(1, torch.Generator()), box, box)
    linear = StackedMLP(3, [], 2, activation)  # has no activation to apply
    low, high = interval_bounds(linear, linear.init(1, torch.Generator()), box, box)
    assert torch.equal(low, high)


def test_interval_bounds_refuse_boxes_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"must be \[L, rows, 4\] both"):
        interval_bounds(NET, PARAMS, torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="both"):
        interval_bounds(NET, PARAMS, torch.zeros(2, 4), torch.zeros(1, 4))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_interval_bounds_are_differentiable(activation: str) -> None:
    net = StackedMLP(3, [5], 2, activation)
    drawn = {name: tensor.double() for name, tensor in net.init(2, torch.Generator().manual_seed(0)).items()}
    centre = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def bounds(*values: Tensor) -> tuple[Tensor, Tensor]:
        params = dict(zip(drawn, values[1:], strict=True))
        return interval_bounds(net, params, centre - values[0], centre + values[0])

    reach = torch.full((4, 3), 0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bounds, (reach, *(tensor.requires_grad_() for tensor in drawn.values())))
