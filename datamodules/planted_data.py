"""Planted features: two classes of Gaussian samples, one feature that survives an attack and many that do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from torch import Tensor

from datamodules.text.loader import training_steps
from modules.seeds import global_seed, stream, stream_seed

TRAIN_STREAM, BATCH_STREAM, VAL_STREAM, TEST_STREAM, UNIT_STREAM = range(0x504C, 0x504C + 5)
"""Keys of the random streams, so that no two kinds of draws share one."""

_BLOCK = 256  # held-out units that one stream draws


class PlantedData(LightningDataModule):
    """Labels ``y`` of -1 and 1, equally likely, and features ``x = y mean + noise``, all independent.

    The first feature is robust: an Linf attack within ``eps`` moves its mean by a small part only. The others are
    fragile: together they tell the classes better, but an ``eps`` above their mean turns each of them round. A model
    trained without an attack leans on them (Tsipras et al. 2019, arXiv 1805.12152, section 2.1, whose fragile features
    have unit variance).

    Groups differ in what their fragile features are worth: ``groups: [1.0, -1.0]`` turns them round in the second.
    Batches hold ``x`` float32 ``[B, features]``, ``y`` float32 ``[B]`` and ``group`` int64 ``[B]``; each training
    batch has the groups in their shares, drawn with replacement within each group, held-out ones have all groups
    equally often, and a ``weight`` ``[B]``, 0 for rows that only fill up a rank's share.

    All training rows come from the run's seed, those of step s from the seed and s: the same for every number of ranks
    and after every resume.

    Args:
        features: features of a sample, at least 1; all but the first are fragile.
        robust_mean: mean of the robust feature times the label.
        fragile_mean: mean of each fragile feature times the label, in a group of strength 1.
        robust_noise: standard deviation of the robust feature.
        fragile_noise: standard deviation of the fragile features.
        groups: strength of each group: a factor of its fragile means.
        shares: of the groups in the training rows, sum 1; ``null``: equal.
        train_size: training rows over all groups.
        val_size: held-out samples of each validation, the same every time.
        test_size: held-out samples of a test.
        batch_size: training rows per step over all ranks.
        seed: of everything drawn; ``null``: the run's (``seed_everything``).

    Raises:
        ValueError: a value out of range, or a group without a row in the training set or in a batch.
    """

    def __init__(
        self,
        features: int = 20,
        robust_mean: float = 1.5,
        fragile_mean: float = 0.2,
        robust_noise: float = 0.6,
        fragile_noise: float = 0.35,
        groups: Sequence[float] = (1.0,),
        shares: Sequence[float] | None = None,
        train_size: int = 2000,
        val_size: int = 2000,
        test_size: int = 10000,
        batch_size: int = 256,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for key, value in (
            ("features", features), ("train_size", train_size), ("val_size", val_size), ("test_size", test_size),
            ("batch_size", batch_size),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"PlantedData: {key} must be >= 1, got {value}")
        for key, value in (("robust_noise", robust_noise), ("fragile_noise", fragile_noise)):
            if not 0 <= value < math.inf:
                raise ValueError(f"PlantedData: {key} must be >= 0 and finite, got {value}")
        if not groups or not all(math.isfinite(value) for value in [robust_mean, fragile_mean, *groups]):
            raise ValueError("PlantedData: groups needs a strength at least; means and strengths must be finite")
        if seed is not None and seed < 0:
            raise ValueError(f"PlantedData: seed must be >= 0, got {seed}")
        self.features, self.robust_mean, self.fragile_mean = features, robust_mean, fragile_mean
        self.robust_noise, self.fragile_noise = robust_noise, fragile_noise
        self.groups = [float(strength) for strength in groups]
        self.shares = [1.0 / len(groups)] * len(groups) if shares is None else [float(share) for share in shares]
        if len(self.shares) != len(groups) or min(self.shares) <= 0 or abs(sum(self.shares) - 1.0) > 1e-6:
            raise ValueError(f"PlantedData: shares must be {len(groups)} numbers > 0 of sum 1, got {self.shares}")
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        self.batch_size, self.seed = batch_size, seed
        for key, value in (("train_size", train_size), ("batch_size", batch_size)):
            if min(_split(value, self.shares)) < 1:
                raise ValueError(f"PlantedData: {key} {value} leaves a group without a row, of shares {self.shares}")
        self._rows: TensorDict | None = None
        self.save_hyperparameters({**self._identity(), "val_size": val_size, "test_size": test_size}, logger=False)

    # ------------------------------------------------------------------------------------------------------- samples

    def units(self, seed: int, count: int, group: int | None = None) -> tuple[Tensor, Tensor]:
        """Fresh held-out samples ``x`` ``[count, features]`` and labels ``y`` ``[count]``; no training row among them.

        Unit i is a pure function of ``seed`` and i, so that the first of many units are those of few; without
        ``group`` it belongs to group ``i % G``.

        Raises:
            ValueError: no such group, or a count or seed below 0.
        """
        if group is not None and not 0 <= group < len(self.groups):
            raise ValueError(f"PlantedData: units: group must be below {len(self.groups)}, got {group}")
        if count < 0 or seed < 0:
            raise ValueError(f"PlantedData: units: count and seed must be >= 0, got {count} and {seed}")
        drawn = self._held_out(stream_seed(seed, UNIT_STREAM), count, group)
        return drawn["x"], drawn["y"]

    def _held_out(self, seed: int, count: int, group: int | None = None) -> TensorDict:
        """The first ``count`` samples of a seed; block by block, as a normal draw depends on how many are drawn."""
        parts = []
        for first in range(0, max(count, 1), _BLOCK):
            number = torch.arange(first, first + _BLOCK)
            member = number % len(self.groups) if group is None else torch.full_like(number, group)
            parts.append(self._sample(member, stream(seed, first)))
        return torch.cat(parts)[:count]  # type: ignore[return-value]

    def _sample(self, group: Tensor, generator: torch.Generator) -> TensorDict:
        """Samples ``[n]`` of the groups ``[n]``."""
        y = 2.0 * torch.randint(2, group.shape, generator=generator) - 1.0
        noise = torch.randn(len(group), self.features, generator=generator)
        mean = self.fragile_mean * torch.tensor(self.groups)[group].unsqueeze(1).repeat(1, self.features)
        mean[:, 0] = self.robust_mean
        deviation = torch.full((self.features,), self.fragile_noise)
        deviation[0] = self.robust_noise
        return TensorDict({"x": y.unsqueeze(1) * mean + deviation * noise, "y": y, "group": group}, [len(group)])

    # --------------------------------------------------------------------------------------------------------- set-up

    def setup(self, stage: str | None = None) -> None:
        """Draw the training rows; a second call does nothing.

        Raises:
            ValueError: ranks cannot share a batch equally, or gradients are accumulated, which would make a
                nonlinear objective over groups one of micro-batches.
        """
        trainer = self.trainer
        if trainer is not None and stage == "fit":
            if trainer.accumulate_grad_batches != 1:
                raise ValueError("PlantedData: accumulate_grad_batches must be 1: rows are small, raise batch_size")
            if self.batch_size % trainer.world_size:
                raise ValueError(
                    f"PlantedData: batch_size must be a multiple of the {trainer.world_size} ranks, got "
                    f"{self.batch_size}"
                )
        if self._rows is None:
            sizes = torch.tensor(_split(self.train_size, self.shares))
            group = torch.arange(len(sizes)).repeat_interleave(sizes)
            self._rows = self._sample(group, stream(self._seed, TRAIN_STREAM))
            in_batch = torch.tensor(_split(self.batch_size, self.shares))
            self._size = sizes.repeat_interleave(in_batch)  # [batch_size]: rows of each one's group, and its first
            self._first = (sizes.cumsum(0) - sizes).repeat_interleave(in_batch)

    @property
    def _seed(self) -> int:
        return global_seed() if self.seed is None else self.seed

    @property
    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def describe(self) -> dict[str, str]:
        """Keys, dtypes and shapes of a training batch on this rank."""
        rows = self.batch_size // self._place[1]
        return {"x": f"float32 [{rows}, {self.features}]", "y": f"float32 [{rows}]", "group": f"int64 [{rows}]"}

    def digest(self) -> dict[str, str]:
        """What every rank must agree on before training."""
        return {key: str(value) for key, value in self._identity().items()}

    # -------------------------------------------------------------------------------------------------------- loaders

    @property
    def rows(self) -> TensorDict:
        """All training rows ``[train_size]``, group by group. Raises: RuntimeError before ``setup``."""
        if self._rows is None:
            raise RuntimeError("PlantedData: call setup() first")
        return self._rows

    def batch(self, step: int) -> TensorDict:
        """This rank's rows of training step ``step`` (from 0)."""
        rows, (rank, world) = self.rows, self._place
        uniform = torch.rand(self.batch_size, generator=stream(self._seed, BATCH_STREAM, step), dtype=torch.float64)
        drawn = self._first + torch.minimum((uniform * self._size).long(), self._size - 1)
        return rows[drawn[rank::world]]  # every world-th: ranks have the groups in nearly equal numbers

    def train_dataloader(self) -> _TrainBatches:
        """This rank's batches from the trainer's current step to ``max_steps``."""
        return _TrainBatches(self, training_steps(self.trainer, "PlantedData"))

    def val_dataloader(self) -> _OneBatch:
        """This rank's share of the held-out samples, in one batch."""
        return self._shared(self._held_out(stream_seed(self._seed, VAL_STREAM), self.val_size))

    def test_dataloader(self) -> _OneBatch:
        """As :meth:`val_dataloader`, of other samples."""
        return self._shared(self._held_out(stream_seed(self._seed, TEST_STREAM), self.test_size))

    def _shared(self, samples: TensorDict) -> _OneBatch:
        rank, world = self._place
        number = rank + world * torch.arange(-(-len(samples) // world))
        index = number.clamp_max(len(samples) - 1)
        columns = {key: samples[key][index] for key in ("x", "y", "group")}
        return _OneBatch(TensorDict({**columns, "weight": (number < len(samples)).float()}, [len(index)]))

    # ------------------------------------------------------- exact position: the trainer's count of steps is all of it

    def _identity(self) -> dict[str, Any]:
        keys = (
            "features", "robust_mean", "fragile_mean", "robust_noise", "fragile_noise", "groups", "shares",
            "train_size", "batch_size",
        )  # fmt: skip
        return {"seed": self._seed, **{key: getattr(self, key) for key in keys}}

    def state_dict(self) -> dict[str, Any]:
        return self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: ValueError naming the first setting that is not the checkpoint's, when training goes on from it."""
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            return
        for key, now in self._identity().items():
            if state_dict.get(key) != now:
                raise ValueError(
                    f"PlantedData: the checkpoint was trained on other data: {key} was {state_dict.get(key)}, is "
                    f"{now}; restore it, or start anew from the checkpoint's weights"
                )


class _TrainBatches:
    """Batches made when they are asked for, from the trainer's step on; the length counts from the run's start."""

    def __init__(self, data: PlantedData, steps: int) -> None:
        self._data, self._steps = data, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[TensorDict]:
        trainer: Any = self._data.trainer
        for step in range(trainer.global_step, self._steps):
            yield self._data.batch(step)

    # Having these two tells Lightning that a resume inside an epoch is safe.
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class _OneBatch:
    """A loader of one batch."""

    def __init__(self, batch: TensorDict) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[TensorDict]:
        yield self._batch.clone()


def _split(count: int, shares: Sequence[float]) -> list[int]:
    """``count`` rows in the proportions of ``shares``, by largest remainders."""
    parts = [int(count * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda part: (parts[part] - count * shares[part], part))
    for part in by_remainder[: count - sum(parts)]:
        parts[part] += 1
    return parts
