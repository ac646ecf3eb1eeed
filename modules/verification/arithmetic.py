"""Exact arithmetic on plain number text, without eval: the fast path of everything that compares numbers."""

from __future__ import annotations

import re
from fractions import Fraction

# Bounds that keep any input cheap: a number is at most MAX_DIGITS long, a power at most MAX_BITS wide.
MAX_DIGITS = 400
MAX_BITS = 4096
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+", re.ASCII)
_EXPONENT = re.compile(r"[eE]([+-]?\d{1,4})", re.ASCII)
_TOKEN = re.compile(r"\s*(?:((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)|(\*\*|//|[-+*/^()]))", re.ASCII)


def parse_number(text: str) -> Fraction | None:
    """Exact value of one signed number: "-1,200", "3.50", ".5", "2.", "1e-3", "3/4"; None if ``text`` is not one."""
    text = text.strip().replace("\u2212", "-")
    if not text or len(text) > MAX_DIGITS:
        return None
    sign = 1
    if text[0] in "+-":
        sign = -1 if text[0] == "-" else 1
        text = text[1:].lstrip()
    numerator, slash, denominator = text.partition("/")
    if slash:
        top, bottom = parse_number(numerator), parse_number(denominator)
        if top is None or not bottom or "/" in denominator or top < 0:
            return None
        return sign * top / bottom
    match = _NUMBER.match(text)
    if match is None:
        return None
    value = Fraction(match.group().replace(",", "").rstrip(".") or "0")
    rest = text[match.end() :]
    if rest:
        exponent = _EXPONENT.fullmatch(rest)
        if exponent is None or abs(int(exponent.group(1))) > MAX_DIGITS:
            return None
        value *= Fraction(10) ** int(exponent.group(1))
    return sign * value


class _Parser:
    """Recursive descent over + - * / // ^ ** and brackets; multiplication by juxtaposition "2(3)" and "(2)(3)"."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise ValueError(f"not arithmetic: '{text[position : position + 20]}'")
            self.tokens.append(match.group(1) or match.group(2))
            position = match.end()
        self.index = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.index] if self.index < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.index += 1
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while self.peek() in ("*", "/", "//", "("):
            if self.peek() == "(":
                value *= self.power()
                continue
            operator, operand = self.take(), self.signed()
            if operator == "*":
                value *= operand
            elif operand == 0:
                raise ValueError("division by zero")
            else:
                value = value / operand if operator == "/" else Fraction(value // operand)
        return value

    def signed(self) -> Fraction:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign * self.power()

    def power(self) -> Fraction:
        base = self.atom()
        if self.peek() in ("^", "**"):
            self.take()
            exponent = self.signed()
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if exponent.denominator != 1 or abs(exponent) > MAX_BITS or abs(exponent) * size > MAX_BITS:
                raise ValueError("power out of range")
            if base == 0 and exponent < 0:
                raise ValueError("division by zero")
            return base ** int(exponent)
        return base

    def atom(self) -> Fraction:
        token = self.take()
        if token == "(":
            self.depth += 1
            if self.depth > 50:
                raise ValueError("nested too deeply")
            value = self.sum()
            if self.take() != ")":
                raise ValueError("unbalanced bracket")
            self.depth -= 1
            return value
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise ValueError(f"number expected, got '{token}'")
        return Fraction(token.replace(",", "").rstrip(".") or "0")


def evaluate_arithmetic(text: str) -> Fraction:
    """Exact value of an arithmetic expression such as "2*(3+.5)/1,000"; commas group thousands.

    Raises:
        ValueError: not such an expression, division by zero, a power or a length out of bounds.
    """
    if len(text) > 10 * MAX_DIGITS:
        raise ValueError(f"expression of {len(text)} characters")
    parser = _Parser(text)
    value = parser.sum()
    if parser.index < len(parser.tokens):
        raise ValueError(f"unexpected '{parser.peek()}'")
    return value
