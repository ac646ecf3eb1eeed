"""A small decision tree that imitates a policy: how well does it, and what does it say?

Trees are grown greedily (CART, Breiman et al. 1984). Gini impurity of classes is the squared error of one-hot rows, so
one split search serves classification and regression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Kind = Literal["classification", "regression"]
_CELLS = 4_000_000  # sorted outputs held at once in the split search: 32 MB


@dataclass(frozen=True)
class Tree:
    """A binary tree in arrays; node 0 is the root, children come after their parents.

    Attributes:
        kind: what ``values`` mean.
        feature: ``[nodes]`` int64, the input that a node looks at; -1 for a leaf.
        threshold: ``[nodes]`` float64; ``x <= threshold`` goes left. NaN for a leaf.
        left, right: ``[nodes]`` int64 children; -1 for a leaf.
        values: ``[nodes, K]`` float64: shares of the classes, or mean outputs, of the node's samples.
        samples: ``[nodes]`` int64, how many training samples came there.
        classes: ``[K]`` the labels of classification; empty for regression.
    """

    kind: Kind
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    values: np.ndarray
    samples: np.ndarray
    classes: np.ndarray

    @property
    def leaves(self) -> int:
        """Number of leaves."""
        return int((self.feature < 0).sum())

    def apply(self, inputs: ArrayLike) -> np.ndarray:
        """The leaf ``[N]`` that each input of ``[N, F]`` falls into."""
        x = np.asarray(inputs, dtype=np.float64)
        node = np.zeros(len(x), dtype=np.int64)
        while (inner := self.feature[node] >= 0).any():
            at = node[inner]
            goes_left = x[inner, self.feature[at]] <= self.threshold[at]
            node[inner] = np.where(goes_left, self.left[at], self.right[at])
        return node

    def predict(self, inputs: ArrayLike) -> np.ndarray:
        """Labels ``[N]`` (classification) or outputs ``[N, K]`` (regression) for inputs ``[N, F]``."""
        values = self.values[self.apply(inputs)]
        return self.classes[values.argmax(1)] if self.kind == "classification" else values

    def render(self, names: Sequence[str] = (), outputs: Sequence[str] = ()) -> str:
        """The tree as indented text, one line a node.

        Args:
            names: of the inputs; default ``x0``, ``x1``, ...
            outputs: of the classes, or of the ``K`` outputs; default: the labels, or ``y0``, ``y1``, ...

        Raises:
            ValueError: fewer names than the tree uses, or another number of ``outputs``.
        """
        if len(names) and len(names) <= self.feature.max():
            raise ValueError(f"render: names: the tree looks at input {self.feature.max()}, got {len(names)} names")
        width = self.values.shape[1]
        if len(outputs) not in (0, width):
            raise ValueError(f"render: outputs: must be {width} names, got {len(outputs)}")
        if not outputs:
            outputs = [str(one) for one in self.classes] or [f"y{index}" for index in range(width)]

        def lines(node: int, indent: str) -> list[str]:
            if self.feature[node] < 0:
                share = f"n={self.samples[node]}"
                if self.kind == "classification":
                    best = int(self.values[node].argmax())
                    return [f"{indent}-> {outputs[best]} ({self.values[node, best]:.0%}, {share})"]
                shown = ", ".join(f"{o} = {v:.4g}" for o, v in zip(outputs, self.values[node], strict=True))
                return [f"{indent}-> {shown} ({share})"]
            name = names[self.feature[node]] if len(names) else f"x{self.feature[node]}"
            found = []
            for sign, child in (("<=", self.left[node]), (">", self.right[node])):
                found.append(f"{indent}{name} {sign} {self.threshold[node]:.4g}")
                found += lines(int(child), indent + "  ")
            return found

        return "\n".join(lines(0, ""))


def fit_tree(inputs: ArrayLike, outputs: ArrayLike, *, kind: Kind, depth: int = 4, min_leaf: int = 1) -> Tree:
    """Grows a tree of at most ``depth`` levels of questions.

    Every node takes the feature and threshold that lower the summed squared error most (Gini impurity for classes),
    the first of equals. Several outputs count in their own units: scale them first where those differ.

    Args:
        inputs: ``[N, F]``.
        outputs: ``[N]`` labels of any kind that sorts (classification), or ``[N]`` or ``[N, K]`` numbers (regression).
        kind: ``classification`` or ``regression``.
        depth: levels of questions; 0 gives a leaf.
        min_leaf: samples that each leaf keeps at least.

    Raises:
        ValueError: no samples, unequal lengths, NaN or infinity, an unknown kind, ``depth`` below 0, ``min_leaf``
            below 1.
    """
    x, y, classes = _checked(inputs, outputs, kind)
    if depth < 0 or min_leaf < 1:
        raise ValueError(f"fit_tree: needs depth >= 0 and min_leaf >= 1, got {depth} and {min_leaf}")
    feature, threshold, left, right, values, samples = [], [], [], [], [], []
    total = float(np.square(y - y.mean(0)).sum())

    def grow(rows: np.ndarray, levels: int) -> int:
        node, mean = len(feature), y[rows].mean(0)
        for column, value in ((feature, -1), (threshold, math.nan), (left, -1), (right, -1)):
            column.append(value)
        values.append(mean)
        samples.append(len(rows))
        if levels and len(rows) >= 2 * min_leaf:
            gain, at, cut = _best_split(x[rows], y[rows] - mean, min_leaf)
            if gain > 1e-12 * total:
                goes_left = x[rows, at] <= cut
                feature[node], threshold[node] = at, cut
                left[node] = grow(rows[goes_left], levels - 1)
                right[node] = grow(rows[~goes_left], levels - 1)
        return node

    grow(np.arange(len(x)), depth)
    as_int = [np.array(column, dtype=np.int64) for column in (feature, left, right, samples)]
    return Tree(kind, as_int[0], np.array(threshold), as_int[1], as_int[2], np.stack(values), as_int[3], classes)


def _checked(inputs: ArrayLike, outputs: ArrayLike, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs ``[N, F]``, outputs or one-hot rows ``[N, K]``, and classes ``[K]``."""
    x, out = np.asarray(inputs, dtype=np.float64), np.asarray(outputs)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"fit_tree: inputs: must be [N, F] and hold values, got shape {x.shape}")
    if out.ndim not in (1, 2) or len(out) != len(x) or not out.size:
        raise ValueError(f"fit_tree: outputs: must be [{len(x)}] or [{len(x)}, K], got shape {out.shape}")
    if kind == "classification":
        if out.ndim != 1:
            raise ValueError(f"fit_tree: outputs: must be one label a sample [{len(x)}], got shape {out.shape}")
        classes, index = np.unique(out, return_inverse=True)
        y = np.eye(len(classes))[index]
        finite = bool(np.all(classes == classes))  # a label of NaN differs from itself
    elif kind == "regression":
        classes, y = np.empty(0), out.astype(np.float64).reshape(len(x), -1)
        finite = bool(np.isfinite(y).all())
    else:
        raise ValueError(f"fit_tree: kind: must be 'classification' or 'regression', got '{kind}'")
    if not (finite and np.isfinite(x).all()):
        raise ValueError("fit_tree: inputs and outputs must be finite, got NaN or infinity")
    return x, y, classes


def _best_split(x: np.ndarray, y: np.ndarray, min_leaf: int) -> tuple[float, int, float]:
    """Largest fall of the squared error, its feature and threshold; ``y`` ``[n, K]`` has mean 0. Gain 0: no split."""
    count = len(x)
    best = (0.0, -1, math.nan)
    on_left = np.arange(1, count)[:, None]
    allowed = (on_left >= min_leaf) & (count - on_left >= min_leaf)
    group = max(1, _CELLS // y.size)
    for first in range(0, x.shape[1], group):
        order = x[:, first : first + group].argsort(0, kind="stable")
        ordered = np.take_along_axis(x[:, first : first + group], order, 0)
        sums = y[order].cumsum(0)[:-1]  # [n - 1, features, K], of the samples left of each cut
        # sum of squares explained by two means; the sides' sums are opposite as y has mean 0
        gain = np.square(sums).sum(-1) * (1 / on_left + 1 / (count - on_left))
        gain[~(allowed & (ordered[1:] > ordered[:-1]))] = 0.0
        place = int(gain.T.argmax())  # first feature first
        column, row = divmod(place, count - 1)
        if gain[row, column] > best[0]:
            low, high = ordered[row, column], ordered[row + 1, column]
            middle = low / 2 + high / 2
            # between neighbouring floats the middle rounds up to the right one, which must not go left
            best = (float(gain[row, column]), first + column, float(middle if low <= middle < high else low))
    return best


@dataclass(frozen=True)
class Surrogate:
    """A fitted tree and how well it imitates on samples that it was not fitted to.

    Attributes:
        tree: fitted to the training part.
        fidelity: classification: share of held-out samples where the tree says what the policy does; regression: R^2 of
            the tree on them, errors and variances summed over outputs. NaN where the policy does the same in all
            held-out samples: any tree would imitate that.
        baseline: the same of a tree without questions.
        held_out: number of held-out samples.
    """

    tree: Tree
    fidelity: float
    baseline: float
    held_out: int


def surrogate_tree(
    inputs: ArrayLike,
    outputs: ArrayLike,
    *,
    kind: Kind,
    depth: int = 4,
    min_leaf: int = 1,
    split: float = 0.7,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> Surrogate:
    """Fits a tree to what a policy did and measures how faithful it is on held-out samples.

    Args:
        inputs: ``[N, F]``, what the policy saw.
        outputs: what it did: as :func:`fit_tree`, which names the errors too.
        kind, depth, min_leaf: as :func:`fit_tree`.
        split: share of samples (or groups) that the tree is fitted to.
        groups: ``[N]``, e.g. the episode: a group is held out whole, as neighbouring steps are nearly copies.
        seed: of the split.

    Raises:
        ValueError: as :func:`fit_tree`; ``split`` outside (0, 1), groups of another length, an empty side.
    """
    x, out = np.asarray(inputs, dtype=np.float64), np.asarray(outputs)
    _checked(x, out, kind)
    unit = np.arange(len(x)) if groups is None else np.asarray(groups)
    if unit.shape != (len(x),):
        raise ValueError(f"surrogate_tree: groups: must be [{len(x)}], got shape {unit.shape}")
    names, of_unit = np.unique(unit, return_inverse=True)
    count = round(split * len(names))
    if not 0 < split < 1 or not 0 < count < len(names):
        raise ValueError(
            f"surrogate_tree: split: must leave samples or groups on both sides, got {split} of {len(names)}"
        )
    chosen = np.zeros(len(names), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(names))[:count]] = True
    train = chosen[of_unit]
    tree = fit_tree(x[train], out[train], kind=kind, depth=depth, min_leaf=min_leaf)
    stump = fit_tree(x[train], out[train], kind=kind, depth=0)
    return Surrogate(
        tree, _fidelity(tree, x[~train], out[~train]), _fidelity(stump, x[~train], out[~train]), int((~train).sum())
    )


def _fidelity(tree: Tree, x: np.ndarray, out: np.ndarray) -> float:
    if (out == out[:1]).all():
        return math.nan
    said = tree.predict(x)
    if tree.kind == "classification":
        return float((said == out).mean())
    y = out.astype(np.float64).reshape(len(out), -1)
    return float(1 - np.square(y - said).sum() / np.square(y - y.mean(0)).sum())
