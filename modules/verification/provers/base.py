"""What proof search needs from a prover: one small interface, met by Coq and Metamath.

A *statement* is what is to be proved (opaque to the search), a *state* is an immutable, hashable position in a
proof (any number of states may be alive at once), a *tactic* is one line of text. `apply` may say "proved", but
only `check`, which starts afresh and trusts nothing of the session, decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from modules.verification.contracts import Verdict

StepStatus = Literal["open", "proved", "error", "refused", "timeout", "died"]

StatementT = TypeVar("StatementT", contravariant=True)


class ProverError(RuntimeError):
    """Something other than an unprovable goal: the message names the culprit and the mend."""


class ProverUnavailableError(ProverError):
    """The prover's program is not installed; the message names the packages."""


class StatementError(ProverError):
    """The statement itself is not accepted by the prover, so nothing can be said about its proof."""


class MissingLibraryError(StatementError):
    """The statement needs a library that is not installed. A fault of the installation, never of the proof."""


class RefusedTacticError(ValueError):
    """Text that is not one allowed proof step (a command, a cheat, several sentences, too long)."""


@dataclass(frozen=True)
class Step:
    """Outcome of one tactic on one state.

    status: "open" (a new state with goals left), "proved" (no goals left, still to be checked), "error" (the prover
    rejects it), "refused" (never sent to the prover), "timeout", "died" (the prover process had to be restarted).
    state is set for "open" and "proved" only; message explains every other status.
    """

    status: StepStatus
    state: Any = None
    message: str = ""


@runtime_checkable
class Prover(Protocol[StatementT]):
    """A step-wise prover. One instance works on one statement at a time and is not thread-safe."""

    name: str

    def start(self, statement: StatementT) -> Any:
        """Open `statement` and return its root state. Raises StatementError, ProverUnavailableError."""
        ...

    def goals(self, state: Any) -> str:
        """The open goals as text: what a model sees, and the key under which equal states are merged."""
        ...

    def apply(self, state: Any, tactic: str) -> Step:
        """Run one tactic. Never raises on bad tactics: model text is data."""
        ...

    def check(self, statement: StatementT, proof: Sequence[str]) -> Verdict:
        """Re-check a finished proof from nothing but the statement and the tactics."""
        ...

    def close(self) -> None:
        """Release processes. The prover may be started again."""
        ...
