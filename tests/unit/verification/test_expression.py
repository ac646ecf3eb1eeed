"""LaTeX to trees, and their values."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.verification.evaluation import (
    FloatOps,
    NotExactError,
    evaluate_exact,
    evaluate_numeric,
    is_rational_function,
    symbols,
)
from modules.verification.expression import ParseError, parse_expression


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\frac12", Fraction(1, 2)),
        (r"\frac{1}{2}3", Fraction(3, 2)),
        (r"2\frac{3}{4}", Fraction(11, 4)),
        (r"2\frac{4}{3}", Fraction(8, 3)),
        (r"11 \frac{2}{3}", Fraction(35, 3)),
        ("-2^2", -4),
        ("2^3^2", 512),
        ("2^{-1}", Fraction(1, 2)),
        ("(2)(3)", 6),
        ("2(3+4)", 14),
        ("8/4/2", 1),
        ("5!", 120),
        ("3!!", 720),
        (r"\binom{5}{2}", 10),
        (r"\sqrt{9}", 3),
        (r"\sqrt[3]{-27}", -3),
        ("|3-5|", 2),
        ("||-2|-3|", 1),
        (r"\lfloor -1.5\rfloor", -2),
        ("1,234.5", Fraction(2469, 2)),
        ("2e3", 2000),
        ("2**3", 8),
        ("+5", 5),
        ("--5", 5),
        ("16^{0.5}", None),
    ],
)
def test_exact_values(text: str, value: object) -> None:
    tree = parse_expression(text)
    if value is None:
        with pytest.raises(NotExactError):
            evaluate_exact(tree, {})
    else:
        assert evaluate_exact(tree, {}) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"2\sqrt2", 2 * math.sqrt(2)),
        (r"\sqrt{2}3", 3 * math.sqrt(2)),
        (r"\pi/2", math.pi / 2),
        (r"e^{2}", math.e**2),
        (r"\sin 2\pi/4", math.sin(2 * math.pi) / 4),
        (r"\sin^2 1", math.sin(1) ** 2),
        (r"\tan^{-1} 1", math.pi / 4),
        (r"\cos 1 \sin 2", math.cos(1) * math.sin(2)),
        (r"\log_2 10", math.log2(10)),
        (r"\log_{3} 10", math.log(10, 3)),
        (r"\log 50", math.log10(50)),
        (r"\ln 2", math.log(2)),
        ("sqrt(2)", math.sqrt(2)),
        ("i^2", -1),
        (r"\sinh 1", math.sinh(1)),
        (r"\operatorname{sin}(1)", math.sin(1)),
        (r"\cot 1", 1 / math.tan(1)),
        ("np.arcsin(1/2)", math.asin(0.5)),
    ],
)
def test_numeric_values(text: str, value: float) -> None:
    assert evaluate_numeric(parse_expression(text), {}, FloatOps()) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("3x^2y", {"x", "y"}),
        ("x_1+x_{12}", {"x_1", "x_12"}),
        (r"\alpha\beta_0", {"\\alpha", "\\beta_0"}),
        ("f'", {"f'"}),
        (r"\mathrm{k}x", {"k", "x"}),
        ("2ei", set()),
        (r"v_{\text{max}}", {"v_max"}),
    ],
)
def test_symbols(text: str, names: set[str]) -> None:
    assert symbols(parse_expression(text)) == names


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "5+",
        r"\frac{1}",
        r"\sqrt{",
        "(",
        ")",
        "1 2",
        "word",
        r"\unknown{3}",
        r"\text{two words}",
        "1..2",
        "x^",
        "^2",
        "x__1",
        "(" * 50 + "1" + ")" * 50,
        "1" * 401,
        "x" * 3000,
        "!!",
        "|1",
        "1|",
        "\\",
        "1=2",
        "x&y",
        "é",
        "1/" * 60 + "1",
    ],
)
def test_what_is_not_an_expression_is_refused(text: str) -> None:
    with pytest.raises(ParseError):
        parse_expression(text)


def test_long_sums_stay_flat() -> None:
    assert evaluate_exact(parse_expression("1" + "+1" * 900), {}) == 901
    assert evaluate_exact(parse_expression("1" + "*1" * 900), {}) == 1


def test_rational_functions_exclude_roots_of_symbols() -> None:
    assert is_rational_function(parse_expression(r"\frac{x^2-1}{\sqrt{4}x}"))
    assert not is_rational_function(parse_expression(r"\sqrt{x^2}"))
    assert not is_rational_function(parse_expression("|x|"))


@given(st.text(alphabet=r"0123456789xy+-*/^_(){}[]|!., \\fracsqrtpinlog$%&=<>'", max_size=60))
def test_parser_never_fails_otherwise(text: str) -> None:
    try:
        tree = parse_expression(text)
    except ParseError:
        return
    with contextlib.suppress(NotExactError, ZeroDivisionError):
        evaluate_exact(tree, dict.fromkeys(symbols(tree), Fraction(3, 7)))
