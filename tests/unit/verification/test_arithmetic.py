"""Exact arithmetic on text, and its bounds."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.verification.arithmetic import evaluate_arithmetic, parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-1,200", -1200),
        ("3.50", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("2.", 2),
        ("1e-3", Fraction(1, 1000)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("\u22127", -7),
        ("+2", 2),
        ("", None),
        ("-", None),
        ("abc", None),
        ("1,2", None),
        ("1/0", None),
        ("1/2/3", None),
        ("1e999999", None),
        ("--1", None),
        ("9" * 401, None),
        ("0x10", None),
        ("1_000", None),
        ("nan", None),
        ("\u0665", None),
    ],
)
def test_parse_number(text: str, value: object) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("-2^2", -4),
        ("2**3", 8),
        ("7//2", 3),
        ("1/3+1/6", Fraction(1, 2)),
        ("2(3)(4)", 24),
        ("1,000*2", 2000),
        ("-(3)", -3),
        ("2^-1", Fraction(1, 2)),
        ("10-3-2", 5),
        ("12/2/3", 2),
    ],
)
def test_evaluate(text: str, value: object) -> None:
    assert evaluate_arithmetic(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1+",
        "1/0",
        "0^-1",
        "9^9^9^9",
        "2^(1/2)",
        "(" * 60 + "1" + ")" * 60,
        "1" * 5000,
        "a",
        "__import__('os')",
        "(1",
        "1)",
    ],
)
def test_what_is_not_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        evaluate_arithmetic(text)


@given(
    st.recursive(
        st.integers(-50, 50).map(lambda n: (f"({n})", Fraction(n))),
        lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
            lambda t: (
                f"({t[0][0]}{t[1]}{t[2][0]})",
                {"+": t[0][1] + t[2][1], "-": t[0][1] - t[2][1], "*": t[0][1] * t[2][1]}[t[1]],
            )
        ),
        max_leaves=12,
    )
)
def test_agrees_with_fractions(pair: tuple[str, Fraction]) -> None:
    text, value = pair
    assert evaluate_arithmetic(text) == value
