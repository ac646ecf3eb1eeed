"""Programs as answers: exact values stay exact, nothing is rounded, forged values are refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modules.verification.contracts import Problem, Verifier
from modules.verification.equivalence import SymbolicEquivalence
from modules.verification.programs import ProgramMode, ProgramVerifier, extract_code, read_value
from modules.verification.sandbox import Limits
from modules.verification.server import PythonSandbox


@pytest.fixture(scope="module")
def tools() -> Iterator[tuple[PythonSandbox, SymbolicEquivalence]]:
    with PythonSandbox() as sandbox, SymbolicEquivalence() as equivalence:
        yield sandbox, equivalence


def judge(tools: tuple[PythonSandbox, SymbolicEquivalence], mode: ProgramMode, program: str, gold: str) -> bool:
    verifier = ProgramVerifier(mode, sandbox=tools[0], equivalence=tools[1])
    return verifier.check(Problem("", gold), program).ok


@pytest.mark.parametrize(
    ("value", "gold", "right"),
    [
        ("18", "18", True),
        ("1200", "1,200", True),
        ("0.1 + 0.2", "0.3", True),
        ("2.7", "2", False),
        ("2", "2.7", False),
        ("0", "0", True),
        ("0.0", "0", True),
        ("7 / 2", "3.5", True),
        ("7 // 2", "3.5", False),
        ("-5", "-5", True),
        ("None", "0", False),
        ("True", "1", False),
        ("float('nan')", "0", False),
        ("10**30 + 1", "10" + "0" * 29, False),
        ("10**30 + 1", "1" + "0" * 29 + "1", True),
        ("1e6 * 1.0000001", "1000000", True),
        ("'12'", "12", True),
    ],
)
def test_pal(tools: tuple[PythonSandbox, SymbolicEquivalence], value: str, gold: str, right: bool) -> None:
    assert judge(tools, "pal", f"def solution():\n    return {value}\n", gold) is right


@pytest.mark.parametrize(
    ("program", "gold", "right"),
    [
        ("answer = Rational(3, 2)", "1", False),
        ("answer = Rational(3, 2)", r"\frac32", True),
        ("answer = 2.7", "2", False),
        ("answer = sqrt(8)", r"2\sqrt{2}", True),
        ("answer = float(sqrt(2))", r"\sqrt2", True),
        ("x = symbols('x')\nanswer = solve(x**2 - 5*x + 6)", "3,2", True),
        ("answer = [7]", "7", True),
        ("answer = (1, 2)", "(1,2)", True),
        ("answer = (2, 1)", "(1,2)", False),
        ("answer = {2, 1}", r"\{1,2\}", True),
        ("x = symbols('x')\nanswer = (x - 1)*(x + 1)", "x^2-1", True),
        ("answer = Fraction(1, 3)", "0.333", False),
        ("answer = Matrix([1, 2])", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        ("answer = 'even'", r"\text{even}", True),
        ("answer = Interval(1, 2)", "[1,2]", True),
        ("answer = oo", r"\infty", True),
        ("answer = S(0)", "0", True),
        ("answer = n_value", "1", False),
        ("x = 1", "1", False),
        ("answer = 1/0", "1", False),
        ("answer = Integer(4)", "4", True),
        ("import numpy as np\nanswer = np.float64(2.5)", "2.5", True),
        ("answer = 10**5000", "1", False),
        ("answer = [1, [2, [3, [4, [5, [6, [7]]]]]]]", "1", False),
    ],
)
def test_sympy(tools: tuple[PythonSandbox, SymbolicEquivalence], program: str, gold: str, right: bool) -> None:
    assert judge(tools, "sympy", program, gold) is right


@pytest.mark.parametrize(
    ("program", "gold", "right"),
    [
        ("print(0.1 + 0.2)", "0.3", True),
        ("print('work')\nprint(5)", "5", True),
        ("print()", "5", False),
        ("print(2.7)", "2", False),
        ("print(r'\\frac{1}{2}')", "0.5", True),
        ("print('a' * 10**7)", "5", False),
    ],
)
def test_print(tools: tuple[PythonSandbox, SymbolicEquivalence], program: str, gold: str, right: bool) -> None:
    assert judge(tools, "print", program, gold) is right


def test_reasons(tools: tuple[PythonSandbox, SymbolicEquivalence]) -> None:
    limits = Limits(wall_seconds=0.5, cpu_seconds=5.0, processes=0)
    verifier = ProgramVerifier("pal", sandbox=tools[0], equivalence=tools[1], limits=limits)
    assert isinstance(verifier, Verifier)
    reasons = [
        verifier.check(Problem("", "1"), program).reason
        for program in ("def solution():\n  while True: pass", "x = 1", "def solution(): pass")
    ]
    assert reasons == ["timeout", "NameError: the program does not define 'solution'", "no answer"]


def test_votes_use_the_text(tools: tuple[PythonSandbox, SymbolicEquivalence]) -> None:
    verifier = ProgramVerifier("sympy", sandbox=tools[0], equivalence=tools[1])
    assert verifier.run("answer = Rational(6, 4)").text == "3/2"
    assert verifier.run("answer = [1, sqrt(2)]").text == r"1, \sqrt{2}"
    assert verifier.run("answer = None").text is None


def test_code_is_taken_from_a_fence() -> None:
    assert extract_code("Here:\n```python\nx = 1\n```\nand ```python\ny\n```") == "x = 1\n"
    assert extract_code("```\nx = 1\n") == "x = 1\n"
    assert extract_code("x = 1") == "x = 1"


@pytest.mark.parametrize(
    "forged",
    [
        None,
        3,
        "text",
        [],
        {},
        {"kind": "rational", "text": "1/0"},
        {"kind": "rational", "text": "__import__('os')/1"},
        {"kind": "rational", "text": 5},
        {"kind": "float", "text": "inf"},
        {"kind": "float", "text": "x"},
        {"kind": "list", "items": 3},
        {"kind": "list", "items": []},
        {"kind": "list", "items": [None]},
        {"kind": "code", "text": "1"},
        {"kind": "text", "text": " "},
        {"kind": "rational", "text": "9" * 100_000 + "/1"},
    ],
)
def test_forged_values_are_refused(forged: object) -> None:
    assert read_value(forged) is None


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be pal, sympy or print, got 'exec'"):
        ProgramVerifier("exec")  # pyright: ignore[reportArgumentType]
