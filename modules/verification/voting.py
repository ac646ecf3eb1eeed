"""Majority voting over equivalent answers, pass@k, and confidence intervals of an accuracy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modules.assurance.intervals import wilson_interval as wilson_interval


@dataclass(frozen=True)
class Vote:
    """Outcome of a vote.

    Attributes:
        answer: the winner's first spelling, None if no sample had an answer.
        votes: samples in the winning cluster.
        valid: samples with an answer; the rest had no vote.
        samples: all samples.
        clusters: indices of equivalent samples, clusters in order of first occurrence.
    """

    answer: str | None
    votes: int
    valid: int
    samples: int
    clusters: tuple[tuple[int, ...], ...]


def cluster_answers(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> tuple[tuple[int, ...], ...]:
    """Indices of equivalent answers, by first occurrence; None and blank answers are in no cluster.

    Each distinct spelling is compared with the first spelling of each cluster, so ``equal`` is called at most
    (distinct spellings x clusters) times.
    """
    members: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer is not None and answer.strip():
            members.setdefault(answer.strip(), []).append(index)
    clusters: list[tuple[str, list[int]]] = []
    for spelling, indices in members.items():
        for representative, cluster in clusters:
            if equal(representative, spelling):
                cluster.extend(indices)
                break
        else:
            clusters.append((spelling, list(indices)))
    return tuple(tuple(sorted(cluster)) for _, cluster in clusters)


def majority_vote(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> Vote:
    """Largest cluster of equivalent answers; ties go to the one that occurs first."""
    clusters = cluster_answers(answers, equal)
    valid = sum(map(len, clusters))
    if not clusters:
        return Vote(None, 0, 0, len(answers), ())
    winner = max(clusters, key=lambda cluster: (len(cluster), -cluster[0]))
    return Vote(answers[winner[0]], len(winner), valid, len(answers), clusters)


def maj_at_k(answers: Sequence[str | None], gold: str, equal: Callable[[str, str], bool], k: int | None = None) -> bool:
    """Whether the majority of the first ``k`` samples (default: all) answers ``gold``. k = 1 is maj@1.

    Raises:
        ValueError: k < 1, or more than there are samples.
    """
    k = len(answers) if k is None else k
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj_at_k: k must be in [1, {len(answers)}], got {k}")
    winner = majority_vote(answers[:k], equal).answer
    return winner is not None and equal(gold, winner)


def pass_rate(answers: Sequence[str | None], gold: str, equal: Callable[[str, str], bool]) -> float:
    """Share of all samples that are right; a sample without an answer counts as wrong.

    Raises:
        ValueError: no sample.
    """
    if not answers:
        raise ValueError("pass_rate: no samples")
    counts = Counter(answer for answer in answers if answer is not None and answer.strip())
    return sum(count for answer, count in counts.items() if equal(gold, answer)) / len(answers)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right): 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"pass_at_k: correct must be in [0, {samples}], got {correct}")
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k must be in [1, {samples}], got {k}")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, for scores that are not 0 or 1 (pass rates per problem).

    Raises:
        ValueError: no values, resamples < 1, confidence outside (0, 1).
    """
    import torch

    if not values or resamples < 1:
        raise ValueError(f"bootstrap_interval: need values and resamples >= 1, got {len(values)} and {resamples}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"bootstrap_interval: confidence must be in (0, 1), got {confidence}")
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, 2_000_000 // len(values))  # bounds the index matrix
    means = [
        data[torch.randint(len(values), (min(chunk, resamples - start), len(values)), generator=generator)].mean(1)
        for start in range(0, resamples, chunk)
    ]
    tail = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), tail).tolist()
    return low, high
