"""What every executor of answers offers: a checker of one answer to one problem.

Symbolic equivalence, Python programs and provers stand behind the same two names, so that evaluation callbacks,
majority voting and reward functions need to know neither sympy nor a prover.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable


@dataclass(frozen=True)
class Problem:
    """One item with a known answer.

    Attributes:
        question: text put to the model, or the formal statement.
        answer: gold answer, already extracted ("\\\\frac12", "1,200", "C"); empty where only a prover can tell.
        metadata: anything else of the source's record (level, type, choices, ...).
    """

    question: str
    answer: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Outcome of a check.

    Attributes:
        ok: the answer is right.
        reason: one short phrase: which rule accepted it, or why it was refused ("string", "symbolic", "timeout", ...).
        seconds: wall time the check took.
    """

    ok: bool
    reason: str
    seconds: float


ProblemT = TypeVar("ProblemT", contravariant=True)


@runtime_checkable
class Verifier(Protocol[ProblemT]):
    """Checks an answer to a problem. A wrong, malformed or hostile answer is a ``Verdict``, never an exception."""

    def check(self, problem: ProblemT, answer: str) -> Verdict:
        """Judge ``answer`` (text as extracted from the model's output) against ``problem``."""
        ...
