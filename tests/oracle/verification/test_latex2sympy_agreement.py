"""Our expression parser against latex2sympy2_extended: same value at a random point for the scalars of MATH and OCW."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from modules.verification.answers import Scalar, clean, parse_answer
from modules.verification.evaluation import FloatOps, evaluate_numeric, symbols
from modules.verification.extraction import last_boxed

latex2sympy2 = pytest.importorskip("latex2sympy2_extended", reason="extra 'dev' brings it with math-verify")

# What the peer reads in another way: 3e8 as 3*e*8, "f(x)" and "u(t)" as function values, (gamma^2 - 1) as zoo.
OTHER_READING = re.compile(r"\d[eE]-?\d|[A-Za-z]\(|\\gamma|\\delta|\\Delta|\\mbox|\\text|\d\}? *m$")


def compare(data_dir: Path, step: int) -> tuple[int, list[tuple[str, complex, complex]]]:
    import sympy

    compared, refused, wrong = 0, 0, []
    for name in ("math_test", "ocw_test"):
        lines = (data_dir / "math" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines[::step]:
            text = last_boxed(json.loads(line)["solution"]) or ""
            ours = parse_answer(text)
            if not isinstance(ours, Scalar) or OTHER_READING.search(text) or text.isdigit():
                continue
            try:
                theirs = latex2sympy2.latex2sympy(clean(text).rstrip("% ").replace("\u221e", r"\infty"))
            except (
                Exception
            ):  # the peer raises bare Exception; spellings such as \frac12 are refused without its own cleaning
                refused += 1
                continue
            generator = random.Random(0)
            point = {
                name: complex(generator.uniform(0.5, 2), generator.uniform(-1, 1))
                for name in sorted(symbols(ours.tree))
            }
            # The peer leaves i a symbol and folds capitals to small letters.
            folded = {re.sub(r"[\\{}]", "", name).lower(): value for name, value in point.items()}
            if len(folded) < len(point):
                continue
            values = {s: folded.get(re.sub(r"[\\{}]", "", str(s)).lower(), 1j) for s in theirs.free_symbols}
            try:
                a = complex(evaluate_numeric(ours.tree, point, FloatOps()))
            except OverflowError:  # 2004!, 2^{2005}: beyond double precision
                continue
            b = complex(sympy.N(theirs.subs(values)))
            compared += 1
            if not abs(a - b) <= 1e-9 * max(1.0, abs(a)):
                wrong.append((text, a, b))
    assert refused <= 0.2 * compared
    return compared, wrong


def test_values_equal_latex2sympy_on_a_sample(data_dir: Path) -> None:
    compared, wrong = compare(data_dir, step=10)
    assert wrong == []
    assert compared > 60


@pytest.mark.slow
def test_values_equal_latex2sympy_on_all_scalars(data_dir: Path) -> None:
    compared, wrong = compare(data_dir, step=1)
    assert wrong == []
    assert compared > 800
