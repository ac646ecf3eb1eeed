"""Coq as a step-wise prover: `coqtop -emacs` kept in step with a tree of proof states.

A state is the path of tactics that leads to it. The process holds one branch of the tree at a time: going back along it
costs one `BackTo n.`; going to another branch goes back to the fork and replays from there (Coq forgets a branch
once it leaves it). A process that hangs, runs out of memory or falls out of step is killed, restarted and replayed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from modules.verification.contracts import Verdict
from modules.verification.provers.base import (
    MissingLibraryError,
    ProverError,
    RefusedTacticError,
    StatementError,
    Step,
)
from modules.verification.provers.coq_check import (
    TACTIC_LIBRARIES,
    CoqChecker,
    CoqLimits,
    CoqTools,
    missing_library,
)
from modules.verification.provers.coq_grammar import check_tactic
from modules.verification.provers.coq_statements import CoqStatement
from modules.verification.provers.process import InteractiveProcess, ProcessDiedError

_PROMPT_RE = re.compile(rb"\n?<prompt>\S+ < (\d+) \|([^|\n]*)\| \d+ < </prompt>")
_GOAL_ID_RE = re.compile(r" \(ID \d+\)")
_COUNT_RE = re.compile(r"^(\d+) (?:focused )?goals?\b")
_MARKUP_RE = re.compile(r"</?(?:infomsg|warning)>")
_MAX_GOALS_SHOWN = 16


@dataclass(frozen=True)
class CoqState:
    """A proof state: the tactics from the root, and the text of its goals."""

    path: tuple[str, ...]
    goals: str = field(compare=False)


@dataclass
class _Reply:
    ok: bool
    text: str
    number: int
    theorem: str


class CoqSession:
    """One `coqtop` process on one statement, moved between proof states.

    Args:
        statement: theorem to prove.
        tools: programs, resolved once by `CoqTools.find()`.
        limits: memory, CPU and load time of the process, seconds per tactic.
        imports: commands run inside the proof before anything else (`coq_check.tactic_import`).
    Raises:
        StatementError, MissingLibraryError: Coq does not accept the statement.
    """

    def __init__(self, statement: CoqStatement, tools: CoqTools, limits: CoqLimits, imports: Sequence[str]) -> None:
        self.statement, self.tools, self.limits, self.imports = statement, tools, limits, tuple(imports)
        self.restarts = -1
        self._process: InteractiveProcess | None = None
        self._branch: list[tuple[str, int]] = []  # (tactic, state number after it) along the branch Coq now holds
        self._root = 0
        self._number = 0
        self.root = CoqState((), "")
        self._restart()
        self.root = CoqState((), self._show())

    # -------------------------------------------------------------------------------------------------- conversation
    def _restart(self) -> None:
        self.close()
        self.restarts += 1
        self._branch = []
        process = InteractiveProcess(self.tools.session_command(self.limits), _PROMPT_RE)
        self._process = process
        try:
            _, prompt = process.read(self.limits.load_seconds)
            self._number = int(prompt.group(1))
            for command in [*_SETTINGS, *self.statement.commands(), *self.imports]:
                reply = self._ask(command, self.limits.load_seconds)
                if not reply.ok:
                    self._refuse_statement(command, reply.text)
        except ProcessDiedError as error:
            self._process = None
            raise StatementError(f"CoqStatement {self.statement.name}: coqtop could not load it: {error}") from None
        self._root = self._number

    def _refuse_statement(self, command: str, text: str) -> None:
        self.close()
        shown = " ".join(text.split())[-400:]
        if library := missing_library(text):
            raise MissingLibraryError(f"CoqStatement {self.statement.name}: {library}")
        raise StatementError(f"CoqStatement {self.statement.name}: Coq refuses `{command[:80]}`: {shown}")

    def _ask(self, command: str, timeout: float) -> _Reply:
        assert self._process is not None
        before = self._number
        text, prompt = self._process.ask(" ".join(command.split()), timeout)
        self._number = int(prompt.group(1))
        clean = _MARKUP_RE.sub("", text).strip()
        # A rejected command leaves the state number where it was: unlike any text, tactics cannot forge that.
        return _Reply(self._number != before, clean, self._number, prompt.group(2).decode())

    def _show(self) -> str:
        reply = self._ask("Show.", self.limits.grace_seconds)
        text = _GOAL_ID_RE.sub("", reply.text)
        count = int(match.group(1)) if (match := _COUNT_RE.match(text)) else 0
        if count < 2:
            return text
        # `Show.` gives the hypotheses of the first goal only; two states may differ in the others.
        goals = [text.split("\n\ngoal 2 is:")[0]]
        for index in range(2, min(count, _MAX_GOALS_SHOWN) + 1):
            goals.append(_GOAL_ID_RE.sub("", self._ask(f"Show {index}.", self.limits.grace_seconds).text))
        return "\n\n".join(goals)

    # ------------------------------------------------------------------------------------------------------ movement
    def go_to(self, state: CoqState) -> None:
        """Bring the process to `state`: back along the branch, then replay. Raises ProcessDiedError, ProverError."""
        if self._process is None:
            self._restart()
        common = 0
        for (tactic, _), wanted in zip(self._branch, state.path, strict=False):
            if tactic != wanted:
                break
            common += 1
        target = self._branch[common - 1][1] if common else self._root
        if self._number != target:
            self._ask(f"BackTo {target}.", self.limits.grace_seconds)
            if self._number != target:
                raise self._lost(f"`BackTo {target}` led to state {self._number}")
        del self._branch[common:]
        for tactic in state.path[common:]:
            reply = self._run(tactic, self.limits.replay_seconds)
            if not reply.ok:
                raise self._lost(f"replay of `{tactic}` failed: {reply.text[-200:]}")
            self._branch.append((tactic, self._number))

    def _lost(self, message: str) -> ProcessDiedError:
        self.close()
        return ProcessDiedError(message)

    def _run(self, tactic: str, seconds: float) -> _Reply:
        """One tactic in the current state, under Coq's own time limit and ours behind it."""
        focus = not tactic.endswith(".")
        command = tactic if focus else f"Timeout {max(1, round(seconds))} {tactic}"
        reply = self._ask(command, seconds + self.limits.grace_seconds)
        if reply.theorem != self.statement.name:
            raise self._lost(f"`{tactic}` left the proof of {self.statement.name}")
        return reply

    def apply(self, state: CoqState, tactic: str) -> Step:
        """Run one canonical tactic (`coq_grammar.check_tactic`) on a state."""
        try:
            self.go_to(state)
            reply = self._run(tactic, self.limits.tactic_seconds)
            if not reply.ok:
                timed_out = "Timeout!" in reply.text
                return Step("timeout" if timed_out else "error", message=_error_line(reply.text))
            self._branch.append((tactic, self._number))
            goals = self._show()
        except ProcessDiedError as error:
            self.close()
            return Step("timeout" if error.timeout else "died", message=str(error))
        if goals == "No more goals.":
            return Step("proved", CoqState((*state.path, tactic), goals))
        if not _COUNT_RE.match(goals) and not goals.startswith("This subproof is complete"):
            return Step("error", message=goals[:200])
        return Step("open", CoqState((*state.path, tactic), goals))

    def close(self) -> None:
        """End the process; the next `apply` starts another and replays."""
        if self._process is not None:
            self._process.close()
            self._process = None


# Wide lines and deep printing, so that equal goals print alike and different ones do not end in the same "...".
_SETTINGS = ("Set Printing Width 110.", "Set Printing Depth 300.")


def _error_line(text: str) -> str:
    """The message of a Coq error without the echo of the command."""
    _, found, message = text.rpartition("Error:")
    return " ".join((message if found else text).split())[:400]


class CoqProver:
    """Coq behind the `Prover` interface.

    Args:
        coqtop, coqc: programs to use; None looks on PATH.
        limits: resources of session and check.
        allowed_axioms: axioms a checked proof may rest on, None for those of the Reals library.
        tactic_libraries: libraries of tactics opened inside every proof.
        allow_unsafe_exec: run without namespaces where the machine offers none (see `modules.verification.sandbox`).
    Raises:
        ProverUnavailableError: no Coq, in one line naming the Debian packages.
    """

    name = "coq"

    def __init__(
        self,
        coqtop: str | None = None,
        coqc: str | None = None,
        limits: CoqLimits | None = None,
        allowed_axioms: Sequence[str] | None = None,
        tactic_libraries: Sequence[str] = TACTIC_LIBRARIES,
        allow_unsafe_exec: bool = False,
    ) -> None:
        self.limits = limits or CoqLimits()
        self.tools = CoqTools.find(coqtop, coqc, allow_unsafe_exec=allow_unsafe_exec)
        self.checker = CoqChecker(self.tools, self.limits, allowed_axioms, tactic_libraries)
        self._session: CoqSession | None = None

    def start(self, statement: CoqStatement) -> CoqState:
        """Load the statement in a fresh process; its root state. Raises StatementError, MissingLibraryError."""
        self.close()
        self._session = CoqSession(statement, self.tools, self.limits, self.checker.imports)
        return self._session.root

    def goals(self, state: CoqState) -> str:
        """Goal text as Coq prints it, every goal with its hypotheses, goal numbers left out."""
        return state.goals

    def apply(self, state: CoqState, tactic: str) -> Step:
        """Run one tactic sentence. Refused text never reaches Coq."""
        if self._session is None:
            raise ProverError("CoqProver: call start(statement) before apply")
        try:
            canonical = check_tactic(tactic)
        except RefusedTacticError as error:
            return Step("refused", message=str(error))
        try:
            return self._session.apply(state, canonical)
        except StatementError as error:  # the restart after a death failed: the machine is short of something
            return Step("died", message=str(error))

    def check(self, statement: CoqStatement, proof: Sequence[str]) -> Verdict:
        """Fresh `coqc` on statement and proof, then `Print Assumptions` (see `CoqChecker.check`)."""
        return self.checker.check(statement, proof)

    @property
    def restarts(self) -> int:
        """Processes of the current statement that had to be replaced."""
        return self._session.restarts if self._session else 0

    def close(self) -> None:
        """End the session's process."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> CoqProver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
