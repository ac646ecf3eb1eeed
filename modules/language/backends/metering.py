"""What a run asks of a model, counted and limited."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from modules.language.backends.base import Backend, BackendError, Reply, Request


class BudgetExceededError(BackendError):
    """A budget of calls, tokens or seconds is used up."""


@dataclass(frozen=True)
class Usage:
    """What was asked; usages of batches or ranks add up.

    Args:
        calls: requests made, those that failed too.
        prompt_tokens, completion_tokens: as the backend counts them.
        seconds: spent in ``generate``; over ranks a sum, no wall-clock time.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def counts(self) -> list[float]:
        """The numbers as one vector, to be summed over ranks."""
        return [float(value) for value in astuple(self)]

    @classmethod
    def from_counts(cls, counts: Sequence[float]) -> Usage:
        """The usage that :meth:`counts` gave, or a sum of such."""
        calls, prompt, completion, seconds = counts
        return cls(round(calls), round(prompt), round(completion), float(seconds))


class MeteredBackend:
    """A backend whose use is counted and may be limited.

    Args:
        backend: who answers.
        max_calls: requests; a batch that would go beyond is not made.
        max_tokens: of prompts and completions; the batch that reaches it is the last one.
        max_seconds: in ``generate``; as ``max_tokens``.

    ``usage`` is what was used so far; assign it to go on from a checkpoint.

    Raises:
        ValueError: a budget below 0.
    """

    def __init__(
        self,
        backend: Backend,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        max_seconds: float | None = None,
    ) -> None:
        for name, value in (("max_calls", max_calls), ("max_tokens", max_tokens), ("max_seconds", max_seconds)):
            if value is not None and value < 0:
                raise ValueError(f"MeteredBackend: {name} must be >= 0, got {value}")
        self.backend = backend
        self.max_calls, self.max_tokens, self.max_seconds = max_calls, max_tokens, max_seconds
        self.usage = Usage()

    @property
    def identity(self) -> str:
        return self.backend.identity

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """See :class:`~modules.language.backends.base.Backend`. Raises also: BudgetExceededError, before the batch."""
        if not requests:
            return []
        self._check(len(requests))
        start = time.perf_counter()
        replies: list[Reply] = []
        try:
            replies = self.backend.generate(requests)
        finally:
            self.usage += Usage(
                len(requests),
                sum(reply.prompt_tokens for reply in replies),
                sum(reply.completion_tokens for reply in replies),
                time.perf_counter() - start,
            )
        return replies

    def close(self) -> None:
        self.backend.close()

    def _check(self, calls: int) -> None:
        used = self.usage
        if self.max_calls is not None and used.calls + calls > self.max_calls:
            raise BudgetExceededError(
                f"MeteredBackend: {calls} more calls exceed the budget max_calls {self.max_calls}, of which "
                f"{used.calls} are used; raise it or ask less"
            )
        if self.max_tokens is not None and used.tokens >= self.max_tokens:
            raise BudgetExceededError(
                f"MeteredBackend: the budget max_tokens {self.max_tokens} is used up ({used.tokens} tokens in "
                f"{used.calls} calls); raise it or ask less"
            )
        if self.max_seconds is not None and used.seconds >= self.max_seconds:
            raise BudgetExceededError(
                f"MeteredBackend: the budget max_seconds {self.max_seconds:g} is used up ({used.seconds:.1f} s in "
                f"{used.calls} calls); raise it or ask less"
            )
