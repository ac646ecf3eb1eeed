"""Where nodes lie: distributions of coordinates, each a function of uniform noise and a generator.

Coordinates are float32 ``[count, nodes, 2]`` in the unit square. Sources: the mutations of Bossek et al. 2019
("Evolving diverse TSP instances by means of novel and creative mutation operators"), the Gaussian mixtures of Zhou et
al. 2023 ("Towards omni-generalizable neural methods for vehicle routing problems"), and the held-out sets of Wang et
al. 2024 ("ASP: learn a universal neural solver!").
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from datamodules.routing.distribution import TINY, Distribution, normal, snake_case, uniform, uniform_noise, unit_box
from datamodules.routing.mutations import Compression, Expansion, Explosion, Grid, Implosion, Mutation, Rotation

__all__ = [
    "DISTRIBUTIONS", "Cluster", "Compression", "Distribution", "Expansion", "Explosion", "GaussianMixture", "Grid",
    "Implosion", "Mixed", "MixtureFile", "Mutation", "Rotation", "Uniform", "make_distribution", "uniform_noise",
    "unit_box",
]  # fmt: skip


def _members(like: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """``[count, nodes, 2]`` int64: a group per node, all equally likely, to gather centres with."""
    drawn = torch.randint(groups, like.shape[:2], generator=generator, device=like.device)
    return drawn.unsqueeze(-1).expand(-1, -1, 2)


@dataclass(frozen=True)
class Uniform(Distribution):
    """Independent uniform nodes in the unit square."""

    def __call__(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        return noise


@dataclass(frozen=True)
class GaussianMixture(Distribution):
    """Gaussian clusters of unit variance, stretched to the unit square (Zhou et al. 2023, section 5).

    Each instance has its own centres, uniform in a square of side ``spread``; nodes choose theirs with equal chances.
    Each axis of each instance is then min-max scaled to [0, 1].

    Args:
        clusters: Gaussians per instance (the paper: 1 to 10).
        spread: side of the square of centres, in standard deviations of a cluster (the paper: 1, 10, 20, 30, 50).

    Raises:
        ValueError: no cluster, or a spread that is not a finite number >= 0.
    """

    clusters: int = 3
    spread: float = 10.0

    def __post_init__(self) -> None:
        self.check_within("clusters", 1)
        self.check_within("spread", 0)

    def __call__(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        centres = self.spread * uniform(noise, len(noise), self.clusters, 2, generator=generator)
        points = centres.gather(1, _members(noise, self.clusters, generator)) + torch.special.ndtri(noise)
        low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
        return (points - low) / (high - low).clamp(min=torch.finfo(noise.dtype).tiny)


@dataclass(frozen=True)
class Cluster(Distribution):
    """A few tight clusters on a uniform background.

    Args:
        clusters: per instance, with centres uniform in [0.2, 0.8]^2.
        std: standard deviation of a cluster, in sides of the square; nodes beyond the square are put on its border.
        background: share of nodes, on average, that lie uniformly instead (0.5: the "mixed" instances of the
            literature, 0: the "cluster" ones).

    Raises:
        ValueError: no cluster, ``std`` not > 0, ``background`` outside [0, 1].
    """

    clusters: int = 3
    std: float = 0.07
    background: float = 0.2

    def __post_init__(self) -> None:
        self.check_within("clusters", 1)
        self.check_within("std", 0, least_open=True)
        self.check_within("background", 0, 1)

    def __call__(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        centres = 0.2 + 0.6 * uniform(noise, len(noise), self.clusters, 2, generator=generator)
        points = centres.gather(1, _members(noise, self.clusters, generator)) + self.std * torch.special.ndtri(noise)
        loose = uniform(noise, *noise.shape[:2], 1, generator=generator) < self.background
        return torch.where(loose, noise, points.clamp(0, 1))


@dataclass(frozen=True)
class MixtureFile(Distribution):
    """The held-out "generated" sets of Wang et al. 2024: a set of instances made at once.

    ``components`` Gaussians of mean ``0.1 i + U(0, 0.1)`` (both coordinates), standard deviation U(0, 1) and random
    weight; each node *number* draws one of them for all instances of the set; a node is U(0, 1)^2 plus a draw from
    its Gaussian; the whole set is min-max scaled by one smallest and one largest number. So instances shrink to a part
    of the square (standard deviation of coordinates about 0.1, against 0.289 of uniform ones), the more so the larger
    the set. A set is what one call makes: all instances of a training step, or of a held-out set.

    Args:
        components: Gaussians (the paper: 10).

    Raises:
        ValueError: no component.
    """

    components: int = 10
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_within("components", 1)

    def __call__(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        shift, std, weight = uniform(noise, 3, self.components, generator=generator).clamp(min=TINY)
        mean = 0.1 * (torch.arange(self.components, device=noise.device) + shift)
        component = torch.multinomial(weight, noise.shape[1], replacement=True, generator=generator)
        offset = std[component, None] * normal(noise, *noise.shape, generator=generator)
        points = noise + offset + mean[component, None]
        low, high = points.amin(), points.amax()
        return ((points - low) / (high - low).clamp(min=torch.finfo(noise.dtype).tiny)).clamp(0, 1)


@dataclass(frozen=True)
class Mixed(Distribution):
    """Each instance is of one of several distributions, drawn by weight.

    Args:
        parts: distributions.
        weights: one each, > 0, in any scale.

    Raises:
        ValueError: no part, or weights that do not fit.
    """

    parts: tuple[Distribution, ...]
    weights: tuple[float, ...]

    @property
    def joint(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(part.joint for part in self.parts)

    def shares(self) -> dict[str, float]:
        """Part -> its share of all instances."""
        total = math.fsum(self.weights)
        return {str(part): weight / total for part, weight in zip(self.parts, self.weights, strict=True)}

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights):
            raise ValueError(f"mixed: needs one weight per part, got {len(self.weights)} for {len(self.parts)} parts")
        for part, weight in zip(self.parts, self.weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"mixed: the weight of {part} must be a finite number > 0, got {weight}")

    def __str__(self) -> str:
        return " + ".join(f"{share:.6g} {part}" for part, share in self.shares().items())

    def __call__(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        weights = torch.tensor(self.weights, device=noise.device)
        drawn = torch.multinomial(weights, len(noise), replacement=True, generator=generator)
        locs = torch.empty_like(noise)
        for number, part in enumerate(self.parts):
            rows = (drawn == number).nonzero().flatten()
            if len(rows):
                locs[rows] = part(noise[rows], generator)
        return locs


_KINDS: tuple[type[Distribution], ...] = (
    Uniform, GaussianMixture, Cluster, Explosion, Implosion, Expansion, Compression, Rotation, Grid, MixtureFile,
)  # fmt: skip
DISTRIBUTIONS: dict[str, type[Distribution]] = {snake_case(kind.__name__): kind for kind in _KINDS}
"""The distributions by name."""


def make_distribution(spec: str | Mapping[str, float] | Distribution) -> Distribution:
    """A distribution from a config.

    Args:
        spec: a distribution; a name of :data:`DISTRIBUTIONS`, perhaps with parameters
            (``"gaussian_mixture(clusters=5)"``); or a mapping from such names to weights, for a mix of instances.

    Raises:
        ValueError: an unknown name or parameter (naming the nearest ones), a value out of range, or an empty mapping.
    """
    if isinstance(spec, Distribution):
        return spec
    if isinstance(spec, Mapping):
        return Mixed(tuple(make_distribution(name) for name in spec), tuple(float(weight) for weight in spec.values()))
    if not isinstance(spec, str):
        raise ValueError(f"distribution: must be a name or a mapping from names to weights, got {spec!r}")
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", spec)
    if match is None:
        raise ValueError(f"distribution: must look like name(key=value, ...), got {spec!r}")
    kind = DISTRIBUTIONS.get(match[1])
    if kind is None:
        near = difflib.get_close_matches(match[1], DISTRIBUTIONS, 3) or list(DISTRIBUTIONS)
        raise ValueError(f"distribution: unknown name {match[1]!r}; nearest: {', '.join(near)}")
    return kind(**_parameters(match[1], kind, match[2] or ""))


def _parameters(name: str, kind: type[Distribution], text: str) -> dict[str, float]:
    """``key=value, ...`` with number values; whole numbers where the field is one."""
    known = {item.name: str(item.type) for item in fields(kind)}
    values: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in known:
            raise ValueError(f"distribution: {name} has no parameter {key!r}; known: {', '.join(known) or 'none'}")
        try:
            number = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            number = value
        if number is None and "None" in known[key]:
            continue
        whole = known[key] == "int"
        if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
            raise ValueError(f"distribution: {name}: {key} must be a {'whole ' * whole}number, got {value!r}")
        values[key] = number if whole else float(number)
    return values
