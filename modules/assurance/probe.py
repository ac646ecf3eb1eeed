"""The contract of a probe: what it needs, what it measures, and on which units.

A probe's function is pure: it gets a subject and a :class:`Block` of units and returns values per unit. All randomness
comes from the block's seed, a function of root seed, round, probe, split and block number: so any number of ranks, and
any order, gives the same values, and more units never change those that were measured before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from modules.assurance.figures import Measure, Split
from modules.assurance.subject import Subject
from modules.seeds import stream, stream_seed, text_seed

SUITES = ("quick", "rice", "deep")


@dataclass(frozen=True)
class Effort:
    """How hard a suite tries (sheet, section 2.5).

    Args:
        suite: ``quick``, ``rice`` or ``deep``.
        attack_steps: of projected gradient attacks.
        restarts: of attacks.
    """

    suite: str = "rice"
    attack_steps: int = 40
    restarts: int = 1

    @property
    def quick(self) -> bool:
        return self.suite == "quick"

    @property
    def deep(self) -> bool:
        return self.suite == "deep"


EFFORTS: Mapping[str, Effort] = {
    "quick": Effort("quick", attack_steps=20),
    "rice": Effort("rice", attack_steps=40),
    "deep": Effort("deep", attack_steps=40, restarts=5),
}


@dataclass(frozen=True)
class Block:
    """Consecutive units of one split that are measured together.

    Args:
        index: number of the block.
        start: number of its first unit.
        count: its units.
        split: ``fresh`` units are new in every round; ``anchor`` units are the same in all rounds and feed nothing.
        seed: of all randomness.
        effort: how hard to try.
    """

    index: int
    start: int
    count: int
    split: Split
    seed: int
    effort: Effort = field(default_factory=Effort)

    def generator(self, *keys: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A stream of its own for each of ``keys`` (conditions with common random numbers use the same keys)."""
        return stream(self.seed, *keys, device=device)

    def unit_seeds(self, *keys: int) -> list[int]:
        """One seed a unit."""
        return [stream_seed(self.seed, *keys, unit) for unit in range(self.start, self.start + self.count)]


Values = Mapping[str, np.ndarray | Mapping[str, np.ndarray] | str]
"""Figure name -> values ``[units]``, or condition -> values ``[units]``.

Fewer units than the block has: the source (a finite set of prompts, say) is exhausted. An exact figure's one value
comes with block 0 of the fresh split. A string in place of values says why a figure is undefined for this subject (a
normalisation by 0, no such unit), whichever block says so.
"""


@dataclass(frozen=True)
class Probe:
    """A measurement of one or several figures.

    Args:
        name: stable identifier, e.g. ``"perturbed_returns"``.
        measures: the figures that :attr:`run` returns values for.
        needs: capabilities without which the probe does not apply.
        run: the measurement.
        suites: where it takes part.
        block: units measured together; work is shared among ranks by blocks.
        units: of the first look, per suite, in place of the suite's own number (costly units).
        limit: most units per suite, where more would cost too much.
        baselines: figures' values of a random policy, an untrained net, the optimum, ... from the subject.
        autograd: the measurement needs gradients; else it runs in inference mode.

    Raises:
        ValueError: no measures, an unknown suite, a block without units.
    """

    name: str
    measures: tuple[Measure, ...]
    needs: tuple[str, ...]
    run: Callable[[Subject, Block], Values]
    suites: tuple[str, ...] = SUITES
    block: int = 50
    units: Mapping[str, int] = field(default_factory=dict)
    limit: Mapping[str, int] = field(default_factory=dict)
    baselines: Callable[[Subject], Mapping[str, Mapping[str, float]]] | None = None
    autograd: bool = False

    def __post_init__(self) -> None:
        if not self.measures or self.block < 1:
            raise ValueError(f"probe {self.name}: needs measures and a block of at least one unit")
        for suite in (*self.suites, *self.units, *self.limit):
            if suite not in SUITES:
                raise ValueError(f"probe {self.name}: suite must be one of {', '.join(SUITES)}, got '{suite}'")

    @property
    def exact(self) -> bool:
        """Whether every figure is exact: measured once, on one block of one unit, for both splits."""
        return all(measure.estimator == "exact" for measure in self.measures)


def block_seed(root: int, round_number: int, probe: str, split: Split, index: int) -> int:
    """Seed of a block; an anchor block's does not depend on the round."""
    return stream_seed(root, 0 if split == "anchor" else round_number + 1, text_seed(probe), text_seed(split), index)
