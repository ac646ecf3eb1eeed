"""What distributions of coordinates share: their contract, the noise that they start from, the unit box."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

TINY = 2.0**-25  # half of the smallest step of torch.rand, which may draw 0


def uniform_noise(count: int, nodes: int, generator: torch.Generator) -> Tensor:
    """``[count, nodes, 2]`` float32, uniform in the open interval (0, 1), on the device of ``generator``."""
    return torch.rand(count, nodes, 2, generator=generator, device=generator.device).clamp_(min=TINY)


def unit_box(locs: Tensor) -> Tensor:
    """Each instance of ``locs`` ``[..., N, 2]`` moved to the origin and divided by its larger side, same dtype.

    An instance whose nodes are all equal comes out as zeros. Lengths of routes are divided by the side.
    """
    low = locs.amin(-2, keepdim=True)
    side = (locs.amax(-2, keepdim=True) - low).amax(-1, keepdim=True)
    return (locs - low) / side.clamp(min=torch.finfo(locs.dtype).tiny)


def snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


@dataclass(frozen=True)
class Distribution(ABC):
    """Coordinates of instances; a subclass implements ``__call__``, and lists its parameters as fields.

    The call is what :class:`modules.contracts.InstanceRequest` asks for: ``noise`` ``[count, nodes, 2]`` uniform in
    (0, 1), and a generator on the same device for what else is drawn, to coordinates of the same shape.
    """

    joint: ClassVar[bool] = False
    """Whether the instances of one call depend on each other."""

    @property
    def name(self) -> str:
        """Snake case of the class name, as a config may name it."""
        return snake_case(type(self).__name__)

    def __str__(self) -> str:
        """The name with all parameters: ``gaussian_mixture(clusters=3, spread=10.0)``."""
        values = ", ".join(f"{item.name}={getattr(self, item.name)!r}" for item in fields(self))
        return f"{self.name}({values})" if values else self.name

    @abstractmethod
    def __call__(self, noise: Tensor, generator: torch.Generator) -> Tensor: ...

    def sample(self, count: int, nodes: int, generator: torch.Generator) -> Tensor:
        """``[count, nodes, 2]`` float32 in [0, 1]. Raises: ValueError for a count or nodes below 1."""
        if count < 1 or nodes < 1:
            raise ValueError(f"{self.name}: count and nodes must be >= 1, got {count} and {nodes}")
        return self(uniform_noise(count, nodes, generator), generator)

    def check_within(self, key: str, low: float, high: float = math.inf, least_open: bool = False) -> None:
        """Raises: ValueError for a parameter that is not finite or outside ``[low, high]``."""
        value = getattr(self, key)
        fits = math.isfinite(value) and (low < value if least_open else low <= value) and value <= high
        if not fits:
            bound = f"{'>' if least_open else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
            raise ValueError(f"{self.name}: {key} must be {bound}, got {value}")


def uniform(like: Tensor, *shape: int, generator: torch.Generator) -> Tensor:
    """Draws of U(0, 1) of a shape, on the device of ``like``."""
    return torch.rand(*shape, generator=generator, device=like.device)


def normal(like: Tensor, *shape: int, generator: torch.Generator) -> Tensor:
    """Draws of N(0, 1) of a shape, on the device of ``like``."""
    return torch.randn(*shape, generator=generator, device=like.device)
