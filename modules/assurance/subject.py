"""What a trained module offers to be measured by: named capabilities, and facts for its card.

Probes ask for capabilities by name and never for a class, so a probe works for every module that offers what it needs,
today's and tomorrow's. Each probe file declares the capabilities that it knows, with their signatures, in its
``CAPABILITIES``.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn


class AssuranceError(ValueError):
    """A suite, limit or subject that does not fit; the message is one line that names the culprit and the mend."""


@dataclass(frozen=True)
class DataSource:
    """Where training data came from: a name, a licence (``"unknown"`` is an answer) and its share of the data."""

    name: str
    licence: str
    share: float = 1.0


@dataclass(frozen=True)
class CardFacts:
    """What a model card needs to say beside figures; what stays empty lowers ``i.card``.

    Args:
        title: name of the model.
        summary: what it does, one sentence.
        intended_use, out_of_scope, limitations: sentences for people.
        licence: of the weights.
        data: sources of training data.
        library: that made it.
    """

    title: str = ""
    summary: str = ""
    intended_use: str = ""
    out_of_scope: str = ""
    limitations: str = ""
    licence: str = ""
    data: tuple[DataSource, ...] = ()
    library: str = "plumbline"

    FIELDS = ("title", "summary", "intended_use", "out_of_scope", "limitations", "licence", "data")

    def completeness(self) -> float:
        """Share of the fields that are filled in."""
        return sum(bool(getattr(self, name)) for name in self.FIELDS) / len(self.FIELDS)


@dataclass(frozen=True)
class Subject:
    """A module under assurance.

    Args:
        family: of the method, for messages and the report (``"planted"``, ``"control"``, ...).
        model: whose weights must come out of the suite as they went in.
        capabilities: name -> callable or value; the names are those of the probe files' ``CAPABILITIES``.
        card: facts for people.

    Raises:
        AssuranceError: an unknown capability.
    """

    family: str
    model: nn.Module
    capabilities: Mapping[str, Any]
    card: CardFacts = field(default_factory=CardFacts)

    def __post_init__(self) -> None:
        from modules.assurance.probes import known_capabilities

        known = known_capabilities()
        for name in self.capabilities:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                raise AssuranceError(
                    f"subject '{self.family}': unknown capability '{name}'"
                    + (f"; did you mean '{near[0]}'?" if near else "; declare it in the probe file that asks for it")
                )

    def offers(self, *names: str) -> bool:
        return all(name in self.capabilities for name in names)

    def lacks(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if name not in self.capabilities]

    def __getitem__(self, name: str) -> Any:
        try:
            return self.capabilities[name]
        except KeyError:
            offered = ", ".join(sorted(self.capabilities)) or "none"
            raise AssuranceError(
                f"subject '{self.family}' does not offer '{name}'; it offers {offered}: name it in the probe's needs"
            ) from None


def state_digest(model: nn.Module) -> str:
    """:func:`mapping_digest` of a module's state."""
    return mapping_digest(dict(model.state_dict()))


def mapping_digest(state: Mapping[str, Any]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors of the state, and the text of all else in it."""
    digest = hashlib.sha256()

    def feed(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            raw = value.detach().cpu().contiguous().reshape(-1)
            digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                feed(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                feed(f"{name}[{index}]", item)
        else:
            digest.update(f"{name}={value!r}".encode())

    feed("", state)
    return digest.hexdigest()


@contextmanager
def untouched(model: nn.Module, check: bool = True) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, gradients and all random states are as before.

    Args:
        model: the module that is measured.
        check: also compare the digest of the weights before and after.

    Raises:
        AssuranceError: the weights or other state of ``model`` changed inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    python, numpy = random.getstate(), copy.deepcopy(np.random.get_state())  # noqa: NPY002
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    before = state_digest(model) if check else ""
    model.eval()
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for parameter, needs in wanted:
            parameter.requires_grad_(needs)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
    if check and state_digest(model) != before:
        raise AssuranceError("the suite changed the model's state: a probe must work on a copy")
