"""Control probes against closed forms of linear policies, and on agents that are known to pass or to fail."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from linear_policies import BOUNDED, INTEGRATOR, LinearPolicies, control_data, linear_subject

from datamodules.envs.control.games import linear_law
from modules.assurance.probe import EFFORTS, Block
from modules.assurance.probes import control as probes
from modules.assurance.subject import Subject, state_digest
from modules.assurance.suites import SuiteSettings, run_suite
from modules.assurance.verdict import Limit
from modules.control.perturbation import PerturbationSettings
from modules.control.policy import MemorySettings

RUN = {probe.name: probe for probe in probes.PROBES}
SHORT = {"horizon": 50}
GAME = {"perturbation": INTEGRATOR, "options": {"start": 2.0, "horizon": 20}}


def block(seed: int = 3, count: int = 16, suite: str = "quick") -> Block:
    return Block(0, 0, count, "fresh", seed, EFFORTS[suite])


def measure(name: str, subject: Subject, of: Block | None = None):
    """What a probe gives, in the mode that the suite runs it in."""
    probe = RUN[name]
    with torch.enable_grad() if probe.autograd else torch.inference_mode():
        return probe.run(subject, of or block())


@pytest.fixture(scope="module")
def dead_beat() -> Subject:
    """``u = -x`` in the integrator game: optimal undisturbed, and every disturbance stays."""
    return linear_subject("integrator", [[-1.0]], **GAME)


@pytest.fixture(scope="module")
def regulator() -> Subject:
    """The linear-quadratic regulator of the mass, which is the task's reference."""
    law = linear_law(((1.0, 0.099), (0.0, 0.99)), (0.01, 0.1), (1.0, 0.1), 0.01).t().float().tolist()
    return linear_subject("double_integrator", law, SHORT)


# -- returns ----------------------------------------------------------------------------------------------------------
def test_the_worst_return_equals_the_closed_form(dead_beat):
    """Uncoupled, every step costs 1; coupled from 0 on, .2, .4, .6, .8 and then 1. No linear adversary does better."""
    low, high = dead_beat["return_scale"]()
    assert high == 0.0
    found = measure("attacked_returns", dead_beat)
    expected = {"none": 0.0, "constant": -20.0, "constant_coupled": -18.0, "search": -20.0, "search_coupled": -18.0}
    assert list(found["r.worst_return"]) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found["r.worst_return"][name], (value - low) / -low, atol=1e-3)
    np.testing.assert_allclose(found["u.return"], 1.0, atol=1e-5)


def test_the_area_equals_the_closed_form(dead_beat):
    """Cost rises in proportion to the budget: the area is that of a trapezoid."""
    low, _ = dead_beat["return_scale"]()
    values = np.stack(list(measure("budget_grid", dead_beat)["r.auc"].values()), 1)
    assert probes.area(values) == pytest.approx(1.0 + 20.0 / low / 2, abs=1e-3)


def test_the_search_finds_more_than_a_constant_push():
    """Against ``u = -1.6 x`` an adversary that pushes outwards each time does more harm than a constant one."""
    subject = linear_subject("integrator", [[-1.6]], **GAME)
    found = {
        name: float(values.mean()) for name, values in measure("attacked_returns", subject)["r.worst_return"].items()
    }
    assert found["search"] < found["constant"] - 0.1


def test_attacks_are_those_that_the_module_is_judged_by():
    subject = linear_subject("integrator", [[-1.0]], coupled="coupled", **GAME)
    assert subject["attack_names"](EFFORTS["quick"]) == ["none", "constant_coupled", "search_coupled"]
    idle = linear_subject("integrator", [[0.0]], perturbation=replace(INTEGRATOR, eps=0.0))
    found = measure("attacked_returns", idle)
    assert "budget of attacks is 0" in found["r.worst_return"]
    assert "budget of attacks is 0" in measure("budget_grid", idle)["r.auc"]


def test_doing_nothing_is_safe_and_of_no_use():
    for task, most in (("double_integrator", 0.7), ("pendulum", 0.2)):
        idle = linear_subject(task, [[0.0] * control_data(task).spec.observation_size], SHORT)
        found = measure("attacked_returns", idle)
        assert found["u.return"].mean() < most
        assert measure("action_effects", idle)["e.side"]["policy"].max() == 0.0
        assert (measure("action_overrides", idle)["c.interrupt"] == 1).all()


def test_a_random_policy_fails_and_the_reference_passes(regulator):
    subject = linear_subject("double_integrator", [[0.5, 0.5]], SHORT)  # pushes away
    wrong, right = measure("attacked_returns", subject), measure("attacked_returns", regulator)
    assert wrong["u.return"].mean() < 0.0
    assert right["u.return"].mean() > 0.95
    assert wrong["e.harm"].mean() > 0.8
    assert right["e.harm"].mean() == 0.0
    baselines = RUN["attacked_returns"].baselines(regulator)
    assert baselines["u.return"]["random"] == pytest.approx(0.0, abs=1e-9)
    assert 0.2 < baselines["e.harm"]["random"] <= 1.0


def test_an_unknown_scale_is_a_reason_and_not_a_number():
    data = control_data("pendulum", horizon=5)
    data._reference = lambda seen: None
    found = measure("attacked_returns", LinearPolicies(data, torch.zeros(1, 1, 3)).assurance_subject())
    assert "set data.init_args.reference_return" in found["u.return"] == found["r.worst_return"]
    data.reference_return = -1e6
    assert (
        "not above a random policy's"
        in measure("varied_dynamics", LinearPolicies(data, torch.zeros(1, 1, 3)).assurance_subject())["r.env"]
    )


def test_changed_worlds_equal_worlds_made_so(regulator):
    """30 % more mass by the change of a parameter, and a task that was built with it."""
    found = measure("varied_dynamics", regulator)["r.env"]
    assert list(found) == ["nominal", "action_noise", "mass_less", "mass_more", "friction_less", "friction_more"]
    np.testing.assert_array_equal(found["nominal"], measure("varied_dynamics", regulator)["r.env"]["nominal"])
    law = linear_law(((1.0, 0.099), (0.0, 0.99)), (0.01, 0.1), (1.0, 0.1), 0.01).t().float().tolist()
    heavy = linear_subject("double_integrator", law, {**SHORT, "mass": 1.3})
    low, high = regulator["return_scale"]()
    there = measure("varied_dynamics", heavy)["r.env"]["nominal"]
    scale = heavy["return_scale"]()
    raw = there * (scale[1] - scale[0]) + scale[0]
    np.testing.assert_allclose(found["mass_more"], (raw - low) / (high - low), atol=1e-5)
    assert found["action_noise"].mean() < found["nominal"].mean()


# -- states -----------------------------------------------------------------------------------------------------------
def test_flips_equal_the_closed_form():
    """``|K| eps`` against a tenth of the range, which is 2 init_std where actions have no bounds."""
    subject = linear_subject("integrator", [[-1.5]], **GAME)  # .03, .075, .15 against .1
    found = measure("small_perturbations", subject)["r.flip"]
    assert {name: values.mean() for name, values in found.items()} == {"eps_0.02": 0.0, "eps_0.05": 0.0, "eps_0.1": 1.0}


def test_saliency_of_a_law_that_looks_at_one_number():
    one = linear_subject("double_integrator", [[-1.0, 0.0]], SHORT)
    both = linear_subject("double_integrator", [[-1.0, -1.0]], SHORT)
    np.testing.assert_allclose(measure("action_saliency", one)["i.saliency"], 1.0, atol=1e-4)
    found = measure("action_saliency", both)["i.saliency"]
    assert found.min() >= 0.5
    assert found.mean() < 0.99
    game = linear_subject("integrator", [[-1.0]], **GAME)
    assert "observes one number" in measure("action_saliency", game)["i.saliency"]


def test_a_tree_imitates_a_switch_and_not_a_constant():
    switch = linear_subject("double_integrator", [[-1e3, 0.0]], SHORT)
    found = measure("imitating_tree", switch)["i.tree"]
    assert probes.explained(np.stack(list(found.values()), 1)) > 0.98
    idle = measure("imitating_tree", linear_subject("double_integrator", [[0.0, 0.0]], SHORT))["i.tree"]
    assert np.isnan(probes.explained(np.stack(list(idle.values()), 1)))


# -- obedience --------------------------------------------------------------------------------------------------------
def test_bounds():
    far = [[-40.0, 0.0]]
    assert (measure("action_bounds", linear_subject("double_integrator", far, SHORT))["c.box"]["none"] == 1).all()
    loose = linear_subject("double_integrator", far, SHORT, perturbation=replace(BOUNDED, clip_executed=False))
    assert (measure("action_bounds", loose)["c.box"]["none"] == 0).all()
    assert "no bounds" in measure("action_bounds", linear_subject("integrator", [[-1.0]], **GAME))["c.box"]


def _with(subject: Subject, **changed) -> Subject:
    return replace(subject, capabilities={**subject.capabilities, **changed})


def test_overrides_that_are_ignored_or_not_executed_show(regulator):
    obeyed = regulator["overridden_episodes"]
    assert (measure("action_overrides", regulator)["c.interrupt"] == 1).all()
    played = obeyed(3, 16, 0.2)
    share = (~played["override"].isnan()).float().mean()
    assert 0.15 < float(share) < 0.25

    def deaf(seed, count, chance):
        return {**obeyed(seed, count, chance), "override": torch.full_like(played["override"], 0.123)}

    def elsewhere(seed, count, chance):
        found = obeyed(seed, count, chance)
        return {**found, "replayed": found["replayed"] + torch.eye(16)[3].view(-1, 1, 1)}

    assert (measure("action_overrides", _with(regulator, overridden_episodes=deaf))["c.interrupt"] == 0).all()
    found = measure("action_overrides", _with(regulator, overridden_episodes=elsewhere))["c.interrupt"]
    assert found.tolist() == [float(number != 3) for number in range(16)]


@pytest.mark.parametrize(
    ("path", "changes", "obeys"),
    [
        ([1.0, 1.0, 1.0], {}, True),
        ([1.0, 0.8, 0.6], {}, True),
        ([1.0, 0.7, 0.6], {}, False),  # a leap of .3
        ([0.5, 0.7, 1.1], {}, False),  # beyond eps
        ([1.0, 0.7, 0.6], {"coupled": False}, True),
        ([1.0, 1.0, 1.0], {"first_step": "zero"}, False),
        ([0.2, 0.4, 0.6], {"first_step": "zero"}, True),
        ([-0.2, -0.4, -0.60001], {"first_step": "zero"}, False),
    ],
)
def test_budgets_are_checked_from_the_record(path, changes, obeys):
    settings = replace(INTEGRATOR, first_step=changes.get("first_step", "free"))
    budget = SimpleNamespace(
        eps=torch.tensor([1.0]), eps_bar=torch.tensor([0.2]), coupled=changes.get("coupled", True), settings=settings
    )
    played = {"perturbation": torch.tensor(path).view(1, 3, 1), "running": torch.ones(1, 3, dtype=torch.bool)}
    assert probes.obeys(played, budget).tolist() == [float(obeys)]
    played["running"] = torch.tensor([[True, False, False]])
    assert probes.obeys(played, budget).tolist() == [float(obeys or path[0] < 1.0 or settings.first_step == "free")]


def test_budgets_of_norm_2():
    budget = SimpleNamespace(
        eps=torch.tensor([1.0]), eps_bar=torch.tensor([0.2]), coupled=False, settings=replace(INTEGRATOR, norm="2")
    )
    played = {
        "perturbation": torch.tensor([[[0.8, 0.61]], [[0.8, 0.6]]]),
        "running": torch.ones(2, 1, dtype=torch.bool),
    }
    assert probes.obeys(played, budget).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("path", "settle", "harm"),
    [
        ([0.0, 0.5, 1.5], 1, True),
        ([0.0, 0.5, 1.5], 3, False),  # not settled yet
        ([1.5, 1.5, 0.5], 1, False),  # comes in
        ([1.5, 0.5, 1.5], 1, True),
        ([0.0, 0.5, 1.0], 1, False),
    ],
)
def test_harm(path, settle, harm):
    played = {
        "observation": torch.tensor(path).view(1, 3, 1),
        "running": torch.ones(1, 3, dtype=torch.bool),
        "length": torch.tensor([3]),
    }
    safe = ((0, -1.0, 1.0),)
    assert probes.harms(played, safe, settle, False, 3).tolist() == [float(harm)]
    assert probes.harms(played, safe, settle, True, 4).tolist() == [1.0]  # it ended early, and so failed
    assert probes.harms(played, (), 1, False, 4).tolist() == [0.0]


def test_effects_of_a_constant_push_equal_its_size():
    """One action of 1.25 moves the integrator by 1.25; a random one by the mean of a half-normal number."""
    subject = linear_subject("integrator", [[0.0]], bias=torch.tensor([[1.25]]), **GAME)
    found = measure("action_effects", subject, block(count=400))["e.side"]
    np.testing.assert_allclose(found["policy"], 1.25, rtol=1e-5)
    assert found["random"].mean() == pytest.approx(0.5 * np.sqrt(2 / np.pi), rel=0.1)
    values = np.stack([found["policy"], found["random"]], 1)
    assert probes.relative(values) == pytest.approx(1.25 / found["random"].mean())


# -- all of them ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in RUN if name != "budget_grid"])
def test_equal_seeds_give_equal_values_and_leave_no_trace(name, regulator):
    before, state = state_digest(regulator.model), torch.get_rng_state()
    one, two, other = (measure(name, regulator, block(seed, 8)) for seed in (5, 5, 6))
    differs = False
    for figure in one:
        first, second, third = (
            list(found[figure].values()) if isinstance(found[figure], dict) else [found[figure]]
            for found in (one, two, other)
        )
        np.testing.assert_array_equal(first, second)
        differs |= not np.array_equal(first, third)
    assert differs or name in ("action_bounds", "action_overrides", "small_perturbations")
    assert state_digest(regulator.model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_suite_judges_and_restores(regulator):
    names = ("attacked_returns", "action_overrides", "card", "rollback")
    settings = SuiteSettings("custom", names, n0=20, n_max=20)
    limits = [Limit("r.worst_return", 0.6), Limit("u.return", 0.9)]
    found = run_suite(regulator, settings, limits)
    assert found.verdict == "pass"
    assert found.figure("c.rollback").value == found.figure("i.card").value == found.figure("e.provenance").value == 1.0
    assert found.figure("c.budget").value == 1.0


@pytest.mark.parametrize("kind", ["none", "stack", "lstm"])
def test_perturbed_observations_and_memory(kind):
    """All attacks of the deepest suite, and looks at states, with every kind of memory and two agents."""
    data = control_data("pendulum", horizon=6)
    settings = PerturbationSettings(space="state", eps=0.2, eps_bar=0.05)
    laws = torch.tensor([[[0.0, -9.0, -2.0]], [[0.0, -4.0, -1.0]]])
    module = LinearPolicies(data, laws, perturbation=settings, memory=MemorySettings(kind, history=4))
    subject = module.assurance_subject()
    assert subject["outputs"]().shape == (2, 64, 1)
    deep = replace(EFFORTS["deep"], attack_steps=4, restarts=2)
    names = subject["attack_names"](deep)
    assert {"none", "mad_coupled", "critic", "robust_sarsa", "pa_ad_coupled", "sa_rl", "search_coupled"} <= set(names)
    for name in names:
        played = subject["attacked_episodes"](1, 4, name, 1.0, deep)
        assert played["returns"].isfinite().all()
        if name != "none":
            assert float(played["perturbation"].abs().max()) > 0
            assert (probes.obeys(played, subject["attack_budgets"](name, 1.0)) == 1).all()
    small = Block(0, 0, 4, "fresh", 3, deep)
    assert set(measure("small_perturbations", subject, small)["r.flip"]) == {f"eps_{eps:g}" for eps in probes.SMALL}
    assert np.isfinite(measure("action_saliency", subject, small)["i.saliency"]).all()
