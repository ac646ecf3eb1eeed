"""Program-aided answers: run the model's Python in the sandbox and judge the value it computes.

``pal``: GSM8K in the manner of PAL (Gao et al. 2023): the program defines ``solution()``, whose value counts.
``sympy``: MATH: the program sets ``answer``; imports stand in a block of their own. ``print``: the last printed line.

Values are compared exactly where they are exact (int, Fraction, sympy Rational) and as close floats otherwise. Nothing
is rounded on the way: 2.7 is not 2, Rational(3, 2) is not 1.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, Self

from modules.verification.answers import Answer, Collection, Scalar, Text, canonical_text, parse_answer
from modules.verification.contracts import Problem, Verdict
from modules.verification.equivalence import SymbolicEquivalence
from modules.verification.extraction import program_output
from modules.verification.sandbox import Limits
from modules.verification.server import PROGRAM_LIMITS, ExecutionResult, PythonSandbox

ProgramMode = Literal["pal", "sympy", "print"]
SYMPY_IMPORTS = "import math\nimport itertools\nfrom fractions import Fraction\nimport sympy\nfrom sympy import *\n"
FLOAT_TOLERANCE = 1e-6
MAX_DEPTH = 6
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_DECIMAL = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class ProgramAnswer:
    """What a program computed.

    Attributes:
        answer: the value as an answer, None if there is none.
        text: the same as text, for voting and for logs; None if there is none.
        approximate: a float is part of it.
        execution: how the program ended.
    """

    answer: Answer | None
    text: str | None
    approximate: bool
    execution: ExecutionResult


def extract_code(text: str) -> str:
    """The program in a completion: the first fenced block if there is one, else the text itself."""
    match = _FENCE.search(text)
    return match.group(1) if match else text


def read_value(value: Any, depth: int = 0) -> tuple[Answer, str, bool] | None:
    """Answer, text and "holds a float" of a value described by the sandbox; None if it is no such description.

    The description comes from a process that ran untrusted code: its shape is checked, none of it is evaluated.
    """
    if not isinstance(value, dict) or depth > MAX_DEPTH:
        return None
    kind, text, items = value.get("kind"), value.get("text"), value.get("items")
    if kind in ("list", "tuple", "set") and isinstance(items, list):
        parts = [read_value(item, depth + 1) for item in items]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not parts:
            return None
        if len(parts) == 1:  # sympy.solve returns [x]
            return known[0]
        opening, closing = {"list": ("", ""), "tuple": ("(", ")"), "set": ("\\{", "\\}")}[kind]
        answer = Collection({"list": "", "tuple": "()", "set": "{}"}[kind], tuple(part[0] for part in known))
        joined = opening + ", ".join(part[1] for part in known) + closing
        return answer, joined, any(part[2] for part in known)
    if not isinstance(text, str) or len(text) > 100_000:
        return None
    if kind == "rational" and re.fullmatch(r"-?\d+/\d+", text, re.ASCII):
        top, _, bottom = text.partition("/")
        if len(text) > 4000 or int(bottom) == 0:
            return None
        exact = Fraction(int(top), int(bottom))
        return Scalar(("num", str(exact))), str(exact), False
    if kind == "float":
        try:
            number = float(text)
        except ValueError:
            return None
        return (Scalar(("num", str(Fraction(number)))), repr(number), True) if math.isfinite(number) else None
    if kind in ("latex", "text") and text.strip():
        return parse_answer(text), text, False
    return None


def _printed(output: str) -> tuple[Answer, str, bool] | None:
    line = program_output(output)
    if line is None:
        return None
    if _DECIMAL.fullmatch(line):  # printed floats carry rounding errors: 0.30000000000000004
        return read_value({"kind": "float", "text": line})
    return parse_answer(line), line, False


class ProgramVerifier:
    """Runs a program and judges its value against the gold answer. A ``Verifier`` whose answers are programs.

    Args:
        mode: "pal", "sympy" or "print".
        sandbox: where programs run; None starts a private one, closed by ``close``.
        equivalence: symbolic comparison; None for a private one.
        limits: of each program.
        float_tolerance: relative tolerance where a float is involved.
        allow_unsafe_exec: run programs without isolation where none can be had (see ``sandbox.choose_backend``).

    Raises:
        ValueError: unknown mode.  SandboxUnavailableError: no isolation here.
    """

    def __init__(
        self,
        mode: ProgramMode,
        *,
        sandbox: PythonSandbox | None = None,
        equivalence: SymbolicEquivalence | None = None,
        limits: Limits = PROGRAM_LIMITS,
        float_tolerance: float = FLOAT_TOLERANCE,
        allow_unsafe_exec: bool = False,
    ) -> None:
        if mode not in ("pal", "sympy", "print"):
            raise ValueError(f"ProgramVerifier: mode must be pal, sympy or print, got '{mode}'")
        self.mode, self.limits = mode, limits
        self._owned: list[Any] = []
        if sandbox is None:
            sandbox = PythonSandbox(allow_unsafe_exec=allow_unsafe_exec)
            self._owned.append(sandbox)
        if equivalence is None:
            equivalence = SymbolicEquivalence()
            self._owned.append(equivalence)
        self.sandbox, self.equivalence = sandbox, equivalence
        self.float_tolerance = float_tolerance

    def run(self, program: str) -> ProgramAnswer:
        """Execute a completion and read its answer."""
        code = extract_code(program)
        if self.mode == "pal":
            result = self.sandbox.run(code, call="solution", limits=self.limits)
        elif self.mode == "sympy":
            result = self.sandbox.run(SYMPY_IMPORTS + code, variable="answer", limits=self.limits)
        else:
            result = self.sandbox.run(code, limits=self.limits)
        found = None
        if result.ok:
            found = _printed(result.output) if self.mode == "print" else read_value(result.value)
        if found is None or (isinstance(found[0], Text) and found[0].canonical in ("", "none")):
            return ProgramAnswer(None, None, False, result)
        return ProgramAnswer(found[0], found[1], found[2], result)

    def check(self, problem: Problem, answer: str) -> Verdict:
        """Judge a program (``answer``) against ``problem.answer``."""
        started = time.perf_counter()
        outcome = self.run(answer)
        if outcome.answer is None:
            status = outcome.execution.status
            reason = outcome.execution.error or ("no answer" if status == "ok" else status)
            reason = reason[:120] if status in ("ok", "error") else status
            return Verdict(False, reason, time.perf_counter() - started)
        ok, reason = self.judge(problem.answer, outcome)
        return Verdict(ok, reason, time.perf_counter() - started)

    def judge(self, gold: str, outcome: ProgramAnswer) -> tuple[bool, str]:
        """Compare a program's value with ``gold``: exactly, or within the tolerance where a float is involved."""
        if outcome.answer is None or not gold.strip():
            return False, "empty"
        expected, value = parse_answer(gold), outcome.answer
        if isinstance(value, Collection) and isinstance(expected, Collection):
            # A Python list or tuple says nothing about brackets: it takes those of the gold answer.
            value = replace(value, brackets=expected.brackets)
        if isinstance(expected, Text) and outcome.text is not None:
            value = Text(canonical_text(outcome.text))
        tolerance = self.float_tolerance if outcome.approximate else 0.0
        return self.equivalence.compare_answers(expected, value, relative_tolerance=tolerance)

    def close(self) -> None:
        """Stop the workers this object started itself."""
        for owned in self._owned:
            owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
