"""Probes for any module: rollback, the card, provenance, spread over seeds."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from modules.assurance.figures import Measure, interquartile
from modules.assurance.probe import Block, Probe, Values
from modules.assurance.subject import Subject

CAPABILITIES: dict[str, str] = {
    "outputs": "() -> Tensor: what the model answers to fixed inputs; deterministic",
    "seed_values": "() -> Sequence[float]: the usefulness figure of runs that differ in their training seed alone",
}


def _rollback(subject: Subject, block: Block) -> Values:
    """Save, disturb, restore through a file's bytes: the answers must be the same, bit for bit."""
    outputs: Callable[[], torch.Tensor] = subject["outputs"]
    before = outputs().clone()
    saved = io.BytesIO()
    torch.save(subject.model.state_dict(), saved)
    saved.seek(0)
    try:
        _disturb(subject.model, block.generator())
        disturbed = outputs().clone()
    finally:
        subject.model.load_state_dict(torch.load(saved, weights_only=True))
    after = outputs()
    if torch.equal(before, disturbed):
        return {"c.rollback": "disturbed weights give the same outputs: the outputs do not depend on the model"}
    return {"c.rollback": np.array([float(torch.equal(before, after))])}


def _disturb(model: nn.Module, generator: torch.Generator) -> None:
    """Noise onto every floating-point tensor of the state: weights, and tables that are buffers."""
    with torch.no_grad():
        for value in model.state_dict().values():  # tensors share their storage with the model's
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                noise = torch.randn(value.shape, generator=generator).to(value)
                value.add_(noise * (value.abs().mean() + 0.1))


def _card(subject: Subject, block: Block) -> Values:
    sources = subject.card.data
    total = sum(source.share for source in sources)
    known = sum(source.share for source in sources if source.licence not in ("", "unknown"))
    return {
        "i.card": np.array([subject.card.completeness()]),
        "e.provenance": np.array([known / total]) if total > 0 else "the card names no source of training data",
    }


def _seeds(subject: Subject, block: Block) -> Values:
    return {"r.seed": np.asarray(subject["seed_values"](), dtype=np.float64) if block.index == 0 else np.empty(0)}


PROBES: tuple[Probe, ...] = (
    Probe(
        "rollback",
        (Measure("c.rollback", "A saved state restores identical outputs", "up", "exact"),),
        needs=("outputs",),
        run=_rollback,
        suites=("rice", "deep"),
    ),
    Probe(
        "card",
        (
            Measure("i.card", "Share of the model card that is filled in", "up", "exact", "share"),
            Measure("e.provenance", "Share of training data with a named source and licence", "up", "exact", "share"),
        ),
        needs=(),
        run=_card,
    ),
    Probe(
        "seeds",
        (Measure("r.seed", "Usefulness over training seeds (IQM)", "up", "bootstrap", statistic=interquartile),),
        needs=("seed_values",),
        run=_seeds,
    ),
)
