"""Checks of scores: which reward, which sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modules.contracts import PromptSample
from modules.rlhf.rewards import Responses, Reward, RewardError, check_bounds, score_all

BATCH = Responses(
    [PromptSample(f"prompt {i}", "r") for i in range(3)], ["a", "b", "c"], [[0]] * 3, [[1]] * 3, [True] * 3
)


class _Fixed(Reward):
    def __init__(self, give: Callable[[Responses], Tensor], bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        self.give, self.bounds = give, bounds

    def score(self, batch: Responses) -> Tensor:
        return self.give(batch)


def _values(*values: float) -> _Fixed:
    return _Fixed(lambda batch: torch.tensor(values, dtype=torch.float64))


def test_columns_are_in_the_order_of_the_config() -> None:
    scores = score_all({"second": _values(1, 2, 3), "first": _values(4, 5, 6)}, BATCH)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[1, 4], [2, 5], [3, 6]]


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda batch: torch.zeros(2), r"rewards\.bad: want one score a response, .*\(3,\), got shape \(2,\)"),
        (lambda batch: torch.zeros(3, 1), r"got shape \(3, 1\)"),
        (lambda batch: [0.0] * 3, "got list"),
        (lambda batch: torch.tensor([0, float("nan"), 0]), r"rewards\.bad: score nan at sample 1 \(prompt 'prompt 1'"),
        (lambda batch: torch.tensor([0.0, 0.0, float("inf")]), r"score inf at sample 2 .*response 'c'"),
        (lambda batch: {}["k"], r"rewards\.bad: KeyError: 'k'"),
    ],
)
def test_a_bad_reward_is_named(give: Callable, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_all({"good": _values(0, 0, 0), "bad": _Fixed(give)}, BATCH)


def test_no_reward_is_refused() -> None:
    with pytest.raises(RewardError, match="at least one"):
        score_all({}, BATCH)


def test_bounds() -> None:
    rewards = {"inside": _values(0, 1 + 1e-6, 0.5), "free": _Fixed(lambda batch: torch.tensor([-9.0, 9, 0]))}
    rewards["free"].bounds = (-float("inf"), float("inf"))
    check_bounds(rewards, score_all(rewards, BATCH), BATCH)
    rewards["above"] = _values(0, 0.5, 1.25)
    with pytest.raises(
        RewardError, match=r"rewards\.above: score 1\.25 outside its declared range \[0, 1\] at sample 2"
    ):
        check_bounds(rewards, score_all(rewards, BATCH), BATCH)
    rewards["above"] = _values(-0.5, 0, 0)
    with pytest.raises(RewardError, match=r"rewards\.above: score -0\.5 .*sample 0"):
        check_bounds(rewards, score_all(rewards, BATCH), BATCH)
