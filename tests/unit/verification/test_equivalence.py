"""Equivalence: no process for simple cases, options, options' errors, thread safety."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.verification import server
from modules.verification.answers import Collection, Matrix, Relation, Scalar, Text, Union, clean, parse_answer
from modules.verification.contracts import Problem, Verifier
from modules.verification.equivalence import SymbolicEquivalence
from modules.verification.minerva import normalise_minerva


@pytest.fixture(scope="module")
def checker() -> Iterator[SymbolicEquivalence]:
    with SymbolicEquivalence() as equivalence:
        yield equivalence


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(server.subprocess, "Popen", refuse)


SIMPLE = [
    ("18", "18", True),
    ("1,200", "1200", True),
    (r"\frac12", "0.5", True),
    ("x=5", "5", True),
    ("(2,4)", "(2, 4.0)", True),
    ("50\\%", "50", True),
    (r"\text{(C)}", "C", True),
    ("x^2-1", "(x-1)(x+1)", True),
    ("30^\\circ", "30", True),
    ("2.7", "2", False),
    (r"\sqrt{2}", "1.5", False),
    (r"2\pi", "6", False),
    ("x", "y", False),
    (r"\sin x", r"\cos x", False),
    ("Monday", "Tuesday", False),
    (r"\{1,2\}", "2,1", True),
    ("[2,5)", "(2,5)", False),
    ("", "", False),
    (r"\sqrt{4}", "2", True),
    ("5 cm", "5", True),
]


@pytest.mark.parametrize(("gold", "answer", "equal"), SIMPLE)
@pytest.mark.usefixtures("no_process")
def test_simple_cases_start_no_process(gold: str, answer: str, equal: bool) -> None:
    assert SymbolicEquivalence().compare(gold, answer).ok is equal


def test_it_is_a_verifier(checker: SymbolicEquivalence) -> None:
    assert isinstance(checker, Verifier)
    verdict = checker.check(Problem("What is 1/2?", r"\frac{1}{2}"), "0.5")
    assert verdict.ok
    assert verdict.reason == "number"
    assert 0 <= verdict.seconds < 60


@pytest.mark.parametrize("answer", [None, "", "  ", "$", "\n"])
def test_empty_is_never_right(checker: SymbolicEquivalence, answer: str | None) -> None:
    assert not checker.compare("5", answer).ok
    assert not checker.compare("", answer).ok


def test_worker_is_asked_only_for_irrational_agreement(checker: SymbolicEquivalence) -> None:
    assert checker.compare(r"\sqrt{8}", r"2\sqrt{2}").reason == "symbolic"
    assert checker.counts["symbolic"] == 1


def test_worker_time_limit_is_a_verdict() -> None:
    with SymbolicEquivalence(wall_seconds=0.001) as short:
        verdict = short.compare(r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}")  # takes tens of milliseconds
        assert not verdict.ok
        assert verdict.reason == "timeout"


def test_relative_tolerance_is_for_numbers_only() -> None:
    loose = SymbolicEquivalence(relative_tolerance=0.01)
    assert loose.compare("100", "100.9").ok
    assert not loose.compare("100", "101.1").ok
    assert loose.compare("4.5e33", "4.52e33").ok
    assert loose.compare(r"\sqrt2", "1.41").ok
    assert loose.compare("0", "0.000001").ok
    assert not loose.compare("1e-27", "2e-27").ok
    assert not loose.compare("100x", "100.9x").ok
    assert not SymbolicEquivalence().compare("100", "100.0000001").ok


def test_assumptions_about_symbols() -> None:
    with SymbolicEquivalence(assume="positive") as positive:
        assert positive.equal(r"\sqrt{x^2}", "x")
        assert positive.equal(r"\sqrt{ab}", r"\sqrt{a}\sqrt{b}")
    with SymbolicEquivalence(assume="real") as real:
        assert not real.equal(r"\sqrt{x^2}", "x")
        assert real.equal(r"\sqrt{x^2}", "|x|")


def test_official_compat_repeats_the_papers_normalisation() -> None:
    official = SymbolicEquivalence(official_compat=True)
    assert official.equal("x=5", "y=5")  # only what follows the last "=" is kept
    assert not SymbolicEquivalence().equal("x=5", "y=5")
    assert official.equal("5\\text{ cm}", "5\\text{ inches}")
    assert not SymbolicEquivalence().equal("5\\text{ cm}", "5\\text{ inches}")
    assert official.equal("0", "0.0")  # a falsy zero is a parser's fault, not the normalisation's


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("$x=5$", "5"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("100,000", "100000"),
        ("1,2", "12"),
        (r"\text{Monday}", "Monday"),
        (r"5\text{ cm}", "5"),
        ("10 dollars", "10"),
        ("30^\\circ", "30"),
        (r"\boxed{7}", "7"),
    ],
)
def test_minerva_normalisation(answer: str, expected: str) -> None:
    assert normalise_minerva(answer) == expected


def test_structures() -> None:
    assert isinstance(parse_answer("5"), Scalar)
    assert isinstance(parse_answer("hello there"), Text)
    assert isinstance(parse_answer(r"(-\infty,2)\cup(3,4]"), Union)
    assert isinstance(parse_answer(r"\begin{pmatrix}1\\2\end{pmatrix}"), Matrix)
    assert isinstance(parse_answer(r"x \le 2"), Relation)
    interval = parse_answer("[2,5)")
    assert isinstance(interval, Collection)
    assert interval.brackets == "[)"


def test_many_pairs_from_many_threads(checker: SymbolicEquivalence) -> None:
    with SymbolicEquivalence(workers=2) as pool:
        pairs = [(f"\\sqrt{{{4 * n}}}", f"2\\sqrt{{{n}}}") for n in (2, 3, 5, 6, 7, 10)] * 3
        assert all(verdict.ok for verdict in pool.compare_many(pairs))
    failures = []

    def work() -> None:
        failures.extend(1 for _ in range(50) if not checker.equal("0.5", r"\frac12"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_it_travels_to_another_process(checker: SymbolicEquivalence) -> None:
    copy = pickle.loads(pickle.dumps(checker))
    assert copy.equal("0.5", r"\frac12")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"relative_tolerance": 1.0}, r"must be in \[0, 1\), got 1.0"),
        ({"assume": "integer"}, "got 'integer'"),
        ({"wall_seconds": 0}, "wall_seconds must be positive"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SymbolicEquivalence(**options)


@given(st.text(alphabet=r"0123456789xyABC+-*/^_(){}[]|!., \\fracsqrtpintex$%&=<>;:'\"", max_size=80))
@settings(max_examples=300)
def test_any_text_equals_itself_and_parses(text: str) -> None:
    parse_answer(text)
    cleaned = clean(text)
    assert SymbolicEquivalence().compare(text, text).ok is bool(text.strip())
    assert clean(cleaned) is not None


@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_fractions_agree_exactly_when_they_are_equal(a, b) -> None:
    spelled = f"{a.numerator}/{a.denominator}", rf"\frac{{{b.numerator}}}{{{b.denominator}}}"
    assert SymbolicEquivalence().compare(*spelled).ok is (a == b)
