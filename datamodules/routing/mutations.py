"""Mutations of uniform instances: nodes thrown out, drawn in, pushed, turned, put on a grid, each within some region.

Source: Bossek et al. 2019, "Evolving diverse TSP instances by means of novel and creative mutation operators".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.routing.distribution import Distribution, normal, uniform


@dataclass(frozen=True)
class Mutation(Distribution):
    """Base of the mutations of uniform instances (Bossek et al. 2019; defaults as in their package tspgen).

    Each round draws new places per instance, moves the nodes that they affect (where these are two or more), and puts
    nodes that left the square anywhere in it. One round is common in the literature on neural solvers, 10 in tspgen.

    Args:
        rounds: mutations in a row.

    Raises:
        ValueError: no round, or a parameter out of range.
    """

    rounds: int = 10

    def __post_init__(self) -> None:
        self.check_within("rounds", 1)
        lengths = [key for key in ("smallest", "largest") if hasattr(self, key)]
        for key in lengths:
            self.check_within(key, 0, 0.5, least_open=True)
        if lengths and self._range()[0] > self._range()[1]:
            raise ValueError(f"{self.name}: smallest must be <= largest, got {self._range()}")

    def _range(self) -> tuple[float, float]:
        return getattr(self, "smallest"), getattr(self, "largest")  # noqa: B009 - fields of subclasses

    def _length(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """``[count, 1, 1]``: radius, half width or side, drawn per instance."""
        low, high = self._range()
        return low + (high - low) * uniform(like, len(like), 1, 1, generator=generator)

    @abstractmethod
    def _moved(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where nodes would move to ``[count, nodes, 2]``, and which of them do ``[count, nodes, 1]`` bool."""

    def __call__(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        points = noise
        for _ in range(self.rounds):
            moved, affected = self._moved(points, generator)
            outside = ((moved < 0) | (moved > 1)).any(-1, keepdim=True)
            moved = torch.where(outside, uniform(noise, *noise.shape, generator=generator), moved)
            points = torch.where(affected & (affected.sum(1, keepdim=True) >= 2), moved, points)
        return points


def _away(points: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors from ``centre`` to ``points`` (zero where they coincide) and distances ``[count, nodes, 1]``."""
    way = points - centre
    distance = way.norm(dim=-1, keepdim=True)
    return way / distance.clamp(min=1e-12), distance


def _exponential(like: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """``[count, nodes, 1]``, exponential of mean ``1 / rate``."""
    return torch.empty(*like.shape[:2], 1, device=like.device).exponential_(rate, generator=generator)


@dataclass(frozen=True)
class Explosion(Mutation):
    """Nodes within a radius of a random centre are thrown out of it, along the ray from the centre.

    They land at the radius plus an exponential distance of mean ``1 / rate``.

    Args:
        rounds: mutations in a row.
        smallest, largest: range of the radius, in sides of the square.
        rate: of the exponential distance.
    """

    smallest: float = 0.1
    largest: float = 0.4
    rate: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_within("rate", 0, least_open=True)

    def _moved(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        centre = uniform(points, len(points), 1, 2, generator=generator)
        radius = self._length(points, generator)
        way, distance = _away(points, centre)
        return centre + way * (radius + _exponential(points, self.rate, generator)), distance < radius


@dataclass(frozen=True)
class Implosion(Mutation):
    """Nodes within a radius of a random centre are drawn towards it, by the share ``min(|N(0, 1)|, pull)`` of the way.

    Args:
        rounds: mutations in a row.
        smallest, largest: range of the radius, in sides of the square.
        pull: largest share; ``null``: the radius, as in tspgen. With 1, a third of the nodes meet in the centre.
    """

    smallest: float = 0.1
    largest: float = 0.3
    pull: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pull is not None:
            self.check_within("pull", 0, 1, least_open=True)

    def _moved(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        centre = uniform(points, len(points), 1, 2, generator=generator)
        radius = self._length(points, generator)
        share = normal(points, *points.shape[:2], 1, generator=generator).abs()
        share = share.minimum(radius if self.pull is None else torch.full_like(radius, self.pull))
        return points + share * (centre - points), (points - centre).norm(dim=-1, keepdim=True) < radius


@dataclass(frozen=True)
class _Tube(Mutation):
    """Nodes near a random line, whose intercept is U(0, 1) and slope U(0, 3), downwards from an intercept >= 1/2."""

    smallest: float = 0.1
    largest: float = 0.3

    def _line(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Each node's nearest point of its instance's line, ``[count, nodes, 2]``."""
        drawn = uniform(points, len(points), 1, 2, generator=generator)
        intercept, slope = drawn[..., :1], 3 * drawn[..., 1:]
        slope = torch.where(intercept < 0.5, slope, -slope)
        start = torch.cat([torch.zeros_like(intercept), intercept], -1)
        along = torch.cat([torch.ones_like(slope), slope], -1)
        share = ((points - start) * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True)
        return start + share * along


@dataclass(frozen=True)
class Expansion(_Tube):
    """Nodes near a random line are pushed away from it, at right angles: an explosion of a tube.

    Args:
        rounds: mutations in a row.
        smallest, largest: range of the tube's half width, in sides of the square.
        rate: of the exponential distance beyond it.
    """

    rate: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_within("rate", 0, least_open=True)

    def _moved(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        width, line = self._length(points, generator), self._line(points, generator)
        way, distance = _away(points, line)
        return line + way * (width + _exponential(points, self.rate, generator)), distance < width


@dataclass(frozen=True)
class Compression(_Tube):
    """Nodes near a random line are drawn to it, by the share ``min(|N(0, 1)|, 1)`` of the way.

    Args:
        rounds: mutations in a row.
        smallest, largest: range of the tube's half width, in sides of the square.
    """

    def _moved(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        width, line = self._length(points, generator), self._line(points, generator)
        share = normal(points, *points.shape[:2], 1, generator=generator).abs().clamp(max=1)
        return points + share * (line - points), (points - line).norm(dim=-1, keepdim=True) < width


@dataclass(frozen=True)
class Rotation(Mutation):
    """Some nodes are turned about the origin by one random angle and moved by one random vector of U(0, 1)^2.

    Args:
        rounds: mutations in a row.
        share: of the nodes, on average.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_within("share", 0, 1, least_open=True)

    def _moved(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = uniform(points, *points.shape[:2], 1, generator=generator) < self.share
        angle = 2 * math.pi * uniform(points, len(points), 1, generator=generator)
        cos, sin = angle.cos(), angle.sin()
        x, y = points.unbind(-1)
        turned = torch.stack([cos * x - sin * y, sin * x + cos * y], -1)
        return turned + uniform(points, len(points), 1, 2, generator=generator), chosen


@dataclass(frozen=True)
class Grid(Mutation):
    """Nodes in a random box are put on a square grid that fills it.

    Of m nodes in the box, a random ``floor(sqrt(m))^2`` go to the grid, the rest stay.

    Args:
        rounds: mutations in a row.
        smallest, largest: range of the box's width and height, in sides of the square.
    """

    smallest: float = 0.1
    largest: float = 0.3

    def _moved(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        low, high = self._range()
        box = low + (high - low) * uniform(points, len(points), 1, 2, generator=generator)
        corner = (1 - box) * uniform(points, len(points), 1, 2, generator=generator)
        inside = ((points > corner) & (points <= corner + box)).all(-1)
        side = inside.sum(1, keepdim=True).sqrt().floor().long()  # [count, 1], in nodes
        # number of each node among those inside, in random order: the grid's places are dealt out by it
        lot = uniform(points, *points.shape[:2], generator=generator) + (~inside).to(points.dtype)
        number = lot.argsort(dim=1).argsort(dim=1)
        row, column = number // side.clamp(min=1), number % side.clamp(min=1)
        place = torch.stack([column, row], -1) / (side - 1).clamp(min=1).unsqueeze(-1)
        # m >= 2 counts nodes in the box: with 2 or 3 of them the grid is one place, and the others stay
        chosen = inside & (number < side * side) & (inside.sum(1, keepdim=True) >= 2)
        return (corner + box * place).clamp(0, 1), chosen.unsqueeze(-1)
