"""One player's members as stacked tensors: a population is a batch, so all of it is evaluated in one matmul."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Members:
    """A growing store of members, each a dictionary of tensors (a behaviour table, network parameters, a cached plan).

    The first member fixes names, shapes, dtypes and device; later ones must match. Members are detached copies. Storage
    doubles when it is full, so appending costs amortised O(member).

    Args:
        capacity: members to reserve space for at the first append, >= 1.

    Raises:
        ValueError: capacity < 1.
    """

    def __init__(self, capacity: int = 16) -> None:
        if capacity < 1:
            raise ValueError(f"Members: capacity: must be >= 1, got {capacity}")
        self._reserve = capacity
        self._count = 0
        self._storage: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: str) -> bool:
        return name in self._storage

    def __getitem__(self, name: str) -> Tensor:
        """``[members, ...]`` view of the tensor ``name`` of all members.

        Raises:
            KeyError: no member has ``name``; the message lists the names there are.
        """
        if name not in self._storage:
            raise KeyError(f"Members: no tensor named {name!r}, the members hold {sorted(self._storage)}")
        return self._storage[name][: self._count]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of a member's tensors, in the order of the first member."""
        return tuple(self._storage)

    def append(self, member: Mapping[str, Tensor]) -> int:
        """Add one member and return its index.

        Raises:
            ValueError: names, shapes or dtypes differ from the first member's, or a value is not finite.
        """
        return self.extend({name: value.unsqueeze(0) for name, value in member.items()})

    def extend(self, members: Mapping[str, Tensor]) -> int:
        """Add ``n`` members given as ``[n, ...]`` tensors and return the index of the first of them.

        Raises:
            ValueError: as for :meth:`append`, or the tensors disagree on ``n``.
        """
        lengths = {name: value.shape[0] for name, value in members.items() if value.ndim}
        if len(lengths) != len(members) or len(set(lengths.values())) != 1:
            raise ValueError(f"Members: every tensor needs the same leading length, got {lengths}")
        added = next(iter(lengths.values()))
        if self._storage:
            self._check(members)
        else:
            _check_finite(members)
            self._storage = {
                name: value.new_empty((max(self._reserve, added), *value.shape[1:])) for name, value in members.items()
            }
        first, self._count = self._count, self._count + added
        self._make_room()
        for name, value in members.items():
            self._storage[name][first : self._count] = value.detach()
        return first

    def replace(self, index: int, member: Mapping[str, Tensor]) -> None:
        """Overwrite member ``index`` in place (views handed out before see the change).

        Raises:
            IndexError: no such member.
            ValueError: as for :meth:`append`.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"Members: index: must be in [0, {self._count}), got {index}")
        self._check({name: value.unsqueeze(0) for name, value in member.items()})
        for name, value in member.items():
            self._storage[name][index] = value.detach()

    def stacked(self) -> dict[str, Tensor]:
        """``[members, ...]`` views of all tensors; they go stale when a later append makes the storage grow."""
        return {name: value[: self._count] for name, value in self._storage.items()}

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """Copies ``[*indices.shape, ...]`` of the members ``indices`` (int64).

        Raises:
            IndexError: an index outside ``[0, members)``; storage reserved beyond the last member is never read.
        """
        if indices.numel():
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= self._count:
                raise IndexError(f"Members: indices: must be in [0, {self._count}), got {low} to {high}")
        return {name: value[indices.to(value.device)] for name, value in self._storage.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors ``[members, ...]`` and an int, loadable with ``torch.load(weights_only=True)``."""
        return {"count": self._count, "members": {name: value.clone() for name, value in self.stacked().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all members by those of :meth:`state_dict`, whatever their number was here.

        Raises:
            ValueError: the state's tensors do not have ``count`` rows; nothing is changed then.
        """
        count, members = int(state["count"]), state["members"]
        wrong = {name: value.shape[0] for name, value in members.items() if value.ndim == 0 or value.shape[0] != count}
        if wrong:
            raise ValueError(f"Members: state_dict: tensors must have count = {count} rows, got {wrong}")
        self._storage, self._count = {}, 0
        if count:
            self.extend(members)

    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of all members: equal on ranks that hold the same population."""
        sha = hashlib.sha256()
        for name, value in sorted(self.stacked().items()):
            sha.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            sha.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def _check(self, members: Mapping[str, Tensor]) -> None:
        if members.keys() != self._storage.keys():
            raise ValueError(f"Members: names: must be {sorted(self._storage)} as before, got {sorted(members)}")
        for name, value in members.items():
            mine = self._storage[name]
            if value.shape[1:] != mine.shape[1:] or value.dtype != mine.dtype:
                raise ValueError(
                    f"Members: {name}: must be {tuple(mine.shape[1:])} {mine.dtype} as in the first member, "
                    f"got {tuple(value.shape[1:])} {value.dtype}"
                )
        _check_finite(members)

    def _make_room(self) -> None:
        for name, value in self._storage.items():
            capacity = value.shape[0]
            if capacity < self._count:
                grown = value.new_empty((max(2 * capacity, self._count), *value.shape[1:]))
                grown[:capacity] = value
                self._storage[name] = grown


def _check_finite(members: Mapping[str, Tensor]) -> None:
    for name, value in members.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"Members: {name}: values must be finite, got NaN or inf: a response has diverged")
