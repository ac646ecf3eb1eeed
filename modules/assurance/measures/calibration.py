"""Whether stated confidence can be trusted: calibration error, Brier score, rank correlation."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Binning = Literal["width", "mass"]
_SLACK = 1e-6  # a float32 softmax exceeds 1 by this at most


def _finite(values: ArrayLike, owner: str, name: str) -> np.ndarray:
    """``values`` as a float64 list ``[N]`` or an error that names the culprit."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{owner}: {name}: must be [N] and hold values, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{owner}: {name}: must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite")
    return array


def _same_length(first: np.ndarray, second: np.ndarray, owner: str) -> None:
    if len(first) != len(second):
        raise ValueError(f"{owner}: must have one value of each a sample, got {len(first)} and {len(second)}")


def _probabilities(values: np.ndarray, owner: str, name: str) -> np.ndarray:
    if values.min() < -_SLACK or values.max() > 1 + _SLACK:
        raise ValueError(f"{owner}: {name}: must be in [0, 1], got [{values.min():g}, {values.max():g}]")
    return values.clip(0.0, 1.0)


def expected_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15, binning: Binning = "width"
) -> float:
    """Mean over samples of |accuracy - mean confidence| of the sample's bin (Guo et al. 2017, equation 3).

    Args:
        confidence: ``[N]`` in [0, 1], the probability given to the answer.
        correct: ``[N]`` 0 or 1, whether the answer was right.
        bins: how many bins; empty ones count nothing.
        binning: ``width`` bins ``((b - 1) / bins, b / bins]``, or ``mass``: bins of equal numbers of samples, in which
            equal confidences share a bin.

    Returns:
        In [0, 1]; 0 is calibrated. Biased upwards where bins hold few samples.

    Raises:
        ValueError: no samples, unequal lengths, values outside those above, ``bins`` below 1, unknown ``binning``.
    """
    owner = "expected_calibration_error"
    p = _probabilities(_finite(confidence, owner, "confidence"), owner, "confidence")
    right = _finite(correct, owner, "correct")
    _same_length(p, right, owner)
    if not np.isin(right, (0.0, 1.0)).all():
        raise ValueError(f"{owner}: correct: must be 0 or 1, got values in [{right.min():g}, {right.max():g}]")
    if bins < 1:
        raise ValueError(f"{owner}: bins: must be at least 1, got {bins}")
    if binning == "width":
        index = np.ceil(p * bins).astype(np.int64) - 1
    elif binning == "mass":
        index = np.floor((average_ranks(p) - 0.5) * bins / len(p)).astype(np.int64)
    else:
        raise ValueError(f"{owner}: binning: must be 'width' or 'mass', got '{binning}'")
    gaps = np.bincount(index.clip(0, bins - 1), weights=right - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def brier_score(probabilities: ArrayLike, outcomes: ArrayLike) -> float:
    """Mean squared error of probabilities (Brier 1950); lower is better.

    Args:
        probabilities: ``[N]``, of the outcome 1; or ``[N, K]``, rows that sum to 1.
        outcomes: ``[N]``, 0 or 1; with ``[N, K]`` the class, 0 to ``K - 1``.

    Returns:
        ``mean (p - y)^2`` in [0, 1]; with ``[N, K]`` ``mean sum_k (p_k - y_k)^2`` in [0, 2], Brier's own definition:
        twice the other for two classes.

    Raises:
        ValueError: no samples, unequal lengths, values outside those above.
    """
    owner = "brier_score"
    p, y = np.asarray(probabilities, dtype=np.float64), _finite(outcomes, owner, "outcomes")
    if p.ndim not in (1, 2):
        raise ValueError(f"{owner}: probabilities: must be [N] or [N, K], got shape {p.shape}")
    shape = p.shape
    p = _probabilities(_finite(p.ravel(), owner, "probabilities"), owner, "probabilities").reshape(shape)
    _same_length(p, y, owner)
    classes = shape[1] if p.ndim == 2 else 2
    if not np.isin(y, np.arange(classes)).all():
        raise ValueError(f"{owner}: outcomes: must be integers from 0 to {classes - 1}, got others")
    if p.ndim == 1:
        return float(np.square(p - y).mean())
    if np.abs(p.sum(1) - 1).max() > 1e-3:
        raise ValueError(f"{owner}: probabilities: rows must sum to 1, got {p.sum(1).min():g} to {p.sum(1).max():g}")
    return float(np.square(p - np.eye(classes)[y.astype(np.int64)]).sum(1).mean())


def average_ranks(values: ArrayLike) -> np.ndarray:
    """Ranks from 1, ``[N]`` float64; equal values share the mean of their ranks.

    Raises:
        ValueError: no values, NaN or infinity.
    """
    _, index, counts = np.unique(_finite(values, "average_ranks", "values"), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[index]


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation: Pearson's of the average ranks, right with ties.

    Args:
        first, second: ``[N]``, one value of each a sample.

    Returns:
        In [-1, 1]; NaN where either is constant (so also for one sample): ranks without spread have no correlation.

    Raises:
        ValueError: no samples, unequal lengths, NaN or infinity.
    """
    x, y = _finite(first, "spearman", "first"), _finite(second, "spearman", "second")
    _same_length(x, y, "spearman")
    a, b = (average_ranks(one) - (len(x) + 1) / 2 for one in (x, y))  # ranks' mean is exact, ties or not
    spread = math.sqrt(float(a @ a) * float(b @ b))  # one root: exactly 1 for equal ranks
    return max(-1.0, min(1.0, float(a @ b) / spread)) if spread else math.nan
