"""What the planted-feature classifier offers to be measured by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modules.assurance.subject import CardFacts, DataSource, Subject
from modules.objectives.adversarial import linear_worst_margin
from modules.seeds import stream


def planted_subject(module: Any, data: Any) -> Subject:
    """The subject of a ``PlantedClassifier``; ``data`` draws units (``units(seed, count)``) and names its groups."""
    groups = len(data.groups)

    def units(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y = data.units(seed, count)
        return x.to(module.device), y.to(module.device), torch.arange(count, device=module.device) % groups

    def margins(x: Tensor, y: Tensor) -> Tensor:
        return y * module(x)

    def outputs() -> Tensor:
        return module(torch.randn(64, module.features, generator=stream(0)).to(module.device)).detach()

    capabilities: dict[str, Any] = {
        "labelled_units": units,
        "margins": margins,
        "attack_budget": module.eval_eps,
        "outputs": outputs,
    }
    if isinstance(module.network, nn.Linear):
        weight = module.network.weight
        capabilities["exact_margins"] = lambda x, y, eps: linear_worst_margin(margins(x, y), weight, eps)
    if groups > 1:
        capabilities["number_of_groups"] = groups
    card = CardFacts(
        title="Planted-feature classifier",
        summary="Tells two classes of generated samples apart by one robust feature and many fragile ones.",
        intended_use="A demonstration whose worst case is known in closed form; a check of the assurance suite itself.",
        out_of_scope="Any decision about people or things.",
        limitations="Two Gaussian classes in a few dimensions.",
        licence="MIT",
        data=(DataSource("samples generated from the run's seed", "CC0-1.0"),),
    )
    return Subject("planted", module, capabilities, card)
