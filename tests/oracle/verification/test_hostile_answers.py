"""No answer, however hostile, hangs the caller, runs code, or is taken for right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.verification.equivalence import SymbolicEquivalence

MARK = "hostile-answer-was-executed"
TOWERS = [
    "9^(9^9)",
    "9^{9^{9^9}}",
    "9^{9^{9^{9^9}}}",
    "2^{2^{2^{2^{2^2}}}}",
    "x^{x^{x^{x^x}}}",
    "e^" * 30 + "e",
    "e^{9999999}",
]
TOWERS += ["1000000!", "99999999999!", "(10^{10^{10}})!", "1" + "!" * 12, r"\binom{10^9}{10^8}", "0." + "0" * 390 + "1"]
NESTED = [
    "(" * 5000 + "1" + ")" * 5000,
    r"\frac{1}{" * 300 + "1" + "}" * 300,
    r"\sqrt{" * 30 + "2" + "}" * 30,
    "{" * 2000,
]
NESTED += [
    "sin(" * 38 + "1" + ")" * 38,
    r"\sin " * 500 + "1",
    "|" * 1001,
    "(1," * 300,
    "x_" + "{" * 200,
    r"\text{" * 1000,
]
LONG = [
    "x" * 10**6,
    "1" * 10**6,
    " " * 10**6 + "7",
    "\\" * 10**6,
    "$" * 10**5,
    "{,}" * 10**4,
    "1," * 5000 + "1",
    "1+" * 900 + "1",
]
LONG += [
    "-" * 1999 + "1",
    "and " * 5000,
    "x=" * 500,
    "<" * 100,
    r"\cup " * 1000,
    r"\pm " * 500,
    r"\frac" * 500,
    "1e" + "9" * 50,
]
MATRICES = [r"\begin{matrix}" * 2000, r"\begin{pmatrix}" + "1&" * 5000 + r"1\end{pmatrix}"]
MATRICES += [
    r"\begin{pmatrix}" + r"1\\" * 5000 + r"1\end{pmatrix}",
    r"\begin{pmatrix}" * 50 + "1" + r"\end{pmatrix}" * 50,
]
HARD = [
    r"(1+x+y+z)^{60}-1",
    r"(\sqrt2+\sqrt3+\sqrt5)^{50}",
    r"\sqrt{1+\sqrt{2+\sqrt{3+\sqrt{4+\sqrt{5}}}}}",
    r"(1+x)^{1000}",
]


def injections(target: Path) -> list[str]:
    command = f"open({str(target)!r}, 'w').write('{MARK}')"
    return [
        f"__import__('os').system('touch {target}')",
        f"exec({command!r})",
        f"eval({command!r})",
        f"{command}",
        f"lambda: {command}",
        rf"\write18{{touch {target}}}",
        rf"\immediate\write18{{touch {target}}}",
        r"\input{/etc/passwd}",
        r"\include{/etc/passwd}",
        f"().__class__.__base__.__subclasses__()[0]({command!r})",
        f"S('{command}')",
        f"sympify({command!r})",
        "\x00",
        "\ud800",
        r"\operatorname{__import__}(os)",
        r"\mathrm{os}.system(id)",
        "{{7*7}}",
        "${{7*7}}",
        "`id`",
        "$(id)",
        "; id",
        "%s%s%n",
    ]


@pytest.fixture(scope="module")
def checker() -> Iterator[SymbolicEquivalence]:
    with SymbolicEquivalence(wall_seconds=5.0) as equivalence:
        equivalence.compare(r"\sqrt8", r"2\sqrt2")  # the worker is up
        yield equivalence


@pytest.mark.parametrize("kind", ["towers", "nested", "long", "matrices", "hard", "injections"])
def test_bounded_and_never_right(checker: SymbolicEquivalence, kind: str, tmp_path: Path) -> None:
    target = tmp_path / MARK
    texts = {"towers": TOWERS, "nested": NESTED, "long": LONG, "matrices": MATRICES, "hard": HARD}.get(kind)
    slowest = 0.0
    for text in injections(target) if texts is None else texts:
        for gold in ("5", r"\sqrt{2}+x"):
            for pair in ((gold, text), (text, gold)):
                started = time.monotonic()
                assert not checker.compare(*pair).ok, text[:60]
                slowest = max(slowest, time.monotonic() - started)
    assert slowest < 10  # the worker's 5 seconds and a loaded machine
    assert not target.exists()


@pytest.mark.parametrize("text", TOWERS[:3] + HARD)
def test_hostile_text_against_its_neighbour(checker: SymbolicEquivalence, text: str) -> None:
    started = time.monotonic()
    assert not checker.compare(text, text + "+1").ok
    assert checker.compare(text, text).ok
    assert time.monotonic() - started < 12
    assert checker.compare(r"\sqrt{8}", r"2\sqrt{2}").ok  # the worker is alive, or again
