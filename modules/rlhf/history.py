"""A bounded record of training: what multipliers, KL and evaluations were, from the first step to the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class History(nn.Module):
    """Rows of numbers, evenly spread over all that were added.

    When it is full every second row goes, and from then on only every second one is taken: any run's length fits, and
    every part of it is kept alike. The record is state, so a resumed run has the one of an uninterrupted run.

    Args:
        columns: numbers of a row; 0: nothing is kept.
        rows: most rows kept, even.

    Raises:
        ValueError: an odd number of rows, or none.
    """

    kept: Tensor
    place: Tensor

    def __init__(self, columns: int, rows: int = 512) -> None:
        super().__init__()
        if rows < 2 or rows % 2:
            raise ValueError(f"History: rows must be even and at least 2, got {rows}")
        self.columns, self.rows = columns, rows
        self.register_buffer("kept", torch.zeros(rows, columns, dtype=torch.float64))
        self.register_buffer("place", torch.tensor([0, 0, 1]))  # rows kept, rows seen, rows seen for one kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> History:
        # half precision casts all buffers; a record keeps its float64, and only changes device
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything."""
        self.kept.zero_()
        self.place.copy_(torch.tensor([0, 0, 1]))

    @torch.no_grad()
    def add(self, values: Sequence[float]) -> None:
        """Record one row ``[columns]``.

        Raises:
            ValueError: another number of values.
        """
        if len(values) != self.columns:
            raise ValueError(f"History: want {self.columns} values a row, got {len(values)}")
        length, seen, stride = self.place.tolist()
        if seen % stride == 0:
            if length == self.rows:  # seen is then an even number of strides: this row belongs to the halved record too
                self.kept[: self.rows // 2] = self.kept[::2].clone()
                length, stride = self.rows // 2, 2 * stride
            self.kept[length] = torch.tensor(values, dtype=torch.float64)
            length += 1
        self.place.copy_(torch.tensor([length, seen + 1, stride]))

    def values(self) -> Tensor:
        """``[kept, columns]`` float64 on the host, the oldest first."""
        return self.kept[: int(self.place[0])].to("cpu", copy=True)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """A checkpoint from before there were records has none: it loads, and the record begins there."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs  # type: ignore[arg-type]
        )  # fmt: skip
        for name in ("kept", "place"):
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)
