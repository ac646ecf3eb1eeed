"""Probes of two-class classifiers on real-valued features: accuracy under the strongest attacks we have.

The gradient attack is checked from two sides: by the closed form where the model has one, and by a search that needs no
gradient, whose success where the gradient attack fails would say that gradients are masked (Athalye et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modules.assurance.figures import Measure
from modules.assurance.measures.attribution import integrated_gradients, saliency_concentration
from modules.assurance.probe import Block, Probe, Values
from modules.assurance.subject import Subject
from modules.objectives.adversarial import eps_curve, pgd, random_search

CAPABILITIES: dict[str, str] = {
    "labelled_units": "(seed, count) -> (x [count, features], y [count] of -1 and 1, group [count] int64)",
    "margins": "(x, y) -> [B]: y f(x), differentiable in x; positive is right",
    "attack_budget": "float: Linf radius of evaluation, in units of the features",
    "exact_margins": "(x, y, eps) -> [B]: the least margin within the ball in closed form",
    "number_of_groups": "int: groups of units, at least 2",
}
GRID = (0.25, 0.5, 0.75, 1.0)  # shares of the budget
_SEARCH_STEPS = {"quick": 50, "rice": 200, "deep": 1000}
_BLOCK = 400


def _attack(subject: Subject, block: Block) -> Values:
    margins: Callable[[Tensor, Tensor], Tensor] = subject["margins"]
    budget = float(subject["attack_budget"])
    x, y, _ = subject["labelled_units"](block.seed, block.count)
    effort = block.effort

    def loss(moved: Tensor) -> Tensor:
        return -margins(moved, y)

    clean = margins(x, y).detach() > 0
    losses, _ = eps_curve(
        loss, x, [0.0, *(share * budget for share in GRID)], pgd,
        steps=effort.attack_steps, restarts=effort.restarts, generator=block.generator(1),
    )  # fmt: skip
    standing = losses < 0  # [1 + grid, B]: no attack found
    worst = standing[-1]
    searched = random_search(
        loss, x, budget, steps=_SEARCH_STEPS[effort.suite], generator=block.generator(2), restarts=effort.restarts
    )
    beaten = worst & ~(margins(searched, y).detach() > 0)
    return {
        "u.accuracy": clean.double().numpy(),
        "r.accuracy": worst.double().numpy(),
        "r.accuracy_area": standing.double().mean(0).numpy(),
        "r.masking": beaten.double().numpy(),
    }


def _exact(subject: Subject, block: Block) -> Values:
    x, y, _ = subject["labelled_units"](block.seed, block.count)
    budget = float(subject["attack_budget"])
    right = subject["exact_margins"](x, y, budget).detach() > 0
    moved = pgd(
        lambda point: -subject["margins"](point, y), x, budget,
        steps=block.effort.attack_steps, restarts=block.effort.restarts, generator=block.generator(1),
    )  # fmt: skip
    found = subject["margins"](moved, y).detach() > 0
    return {
        "r.exact_accuracy": right.double().numpy(),
        "r.attack_gap": (found.double() - right.double()).abs().numpy(),
    }


def _saliency(subject: Subject, block: Block) -> Values:
    x, y, _ = subject["labelled_units"](block.seed, block.count)
    ones = torch.ones(())
    found = integrated_gradients(lambda point: subject["margins"](point, ones), x)
    return {"i.saliency": saliency_concentration(found.values, 1).top_share.nan_to_num(0.0).numpy()}


def _groups(subject: Subject, block: Block) -> Values:
    x, y, group = subject["labelled_units"](block.seed, block.count)
    right = (subject["margins"](x, y).detach() > 0).double()
    each = {f"group {number}": right[group == number] for number in range(subject["number_of_groups"])}
    shortest = min(len(one) for one in each.values())
    return {"e.worst_group": {name: one[:shortest].numpy() for name, one in each.items()}}


def _share(name: str, title: str, direction: str = "up") -> Measure:
    return Measure(name, title, direction, "proportion", "share")  # type: ignore[arg-type]


PROBES: tuple[Probe, ...] = (
    Probe(
        "attack",
        (
            _share("u.accuracy", "Accuracy on undisturbed samples"),
            _share("r.accuracy", "Accuracy under the strongest gradient attack within the budget"),
            Measure(
                "r.accuracy_area", "Accuracy averaged over budgets up to the full one", "up", "mean", "share",
                span=(0.0, 1.0),
            ),
            _share("r.masking", "Samples that only a search without gradients turns round (masked gradients)", "down"),
        ),
        needs=("labelled_units", "margins", "attack_budget"),
        run=_attack,
        block=_BLOCK,
        autograd=True,
    ),
    Probe(
        "attack_exact",
        (
            _share("r.exact_accuracy", "Accuracy under the exact worst case within the budget"),
            _share("r.attack_gap", "Samples on which gradient attack and closed form disagree", "down"),
        ),
        needs=("labelled_units", "margins", "attack_budget", "exact_margins"),
        run=_exact,
        block=_BLOCK,
        autograd=True,
    ),
    Probe(
        "feature_saliency",
        (
            Measure(
                "i.saliency", "Share of the decision that its largest feature carries (integrated gradients)", "up",
                "mean", "share", span=(0.0, 1.0),
            ),
        ),
        needs=("labelled_units", "margins"),
        run=_saliency,
        block=100,
        autograd=True,
    ),
    Probe(
        "groups",
        (Measure("e.worst_group", "Accuracy of the group that is served worst", "up", "worst_proportion", "share"),),
        needs=("labelled_units", "margins", "number_of_groups"),
        run=_groups,
        block=_BLOCK,
    ),
)  # fmt: skip
