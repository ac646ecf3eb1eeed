r"""Scalar mathematics written in LaTeX (or plain text) as a small tree.

The parser is a bounded recursive descent: no eval, no sympify, linear in the length of its input. A tree is nested
tuples of strings (so it travels as JSON):

  ("num", "3/4") ("sym", "x") ("const", "pi" | "e" | "i" | "oo") ("neg", a) ("add", a, b, ...) ("mul", a, b, ...)
  ("div", a, b) ("pow", a, b) ("root", a, n) ("fn", name, a) ("log", a, base) ("binom", n, k)
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Node = tuple[Any, ...]

MAX_LENGTH = 2_000
MAX_DEPTH = 40  # of groups; each costs about seven Python frames
MAX_CHAIN = 40  # divisions or postfix signs in a row; sums and products are flat and may be long
MAX_DIGITS = 400

FUNCTIONS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "arcsin": "asin",
    "arccos": "acos", "arctan": "atan", "asin": "asin", "acos": "acos", "atan": "atan", "sinh": "sinh",
    "cosh": "cosh", "tanh": "tanh", "ln": "ln", "exp": "exp", "log": "log", "abs": "abs", "floor": "floor",
    "ceil": "ceil", "sqrt": "sqrt",
}  # fmt: skip
INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan"}
GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma",
    "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega", "ell", "hbar",
}  # fmt: skip
WRAPPERS = {"mathrm", "mathbf", "mathit", "mathsf", "boldsymbol", "bm", "mathbb", "mathcal", "operatorname", "text"}
WRAPPERS |= {"textbf", "textit", "rm", "bf", "mbox", "textrm"}
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+", re.ASCII)
_SCIENTIFIC = re.compile(r"[eE]([+-]?\d{1,4})(?![\d.])", re.ASCII)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_INDEX_GROUP = re.compile(r"\{((?:[^{}]|\{[^{}]*\})*)\}")
_INDEX = re.compile(r"[A-Za-z0-9+,-]{1,20}")
_WORD = re.compile(r"[A-Za-z]+")
_GROUP_WORD = re.compile(r"\s*\{\s*([A-Za-z]+)\s*\}")
_PROPER_FRACTION = re.compile(r"\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", re.ASCII)


class ParseError(ValueError):
    """The text is not a scalar expression of the supported kind."""


def number(value: Fraction | int) -> Node:
    return ("num", str(Fraction(value)))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0
        self.bars = 0  # open |...| groups: a bar then closes

    # ------------------------------------------------------------------------------------------------------- scanning
    def skip(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def peek(self) -> str:
        """Next character, or the whole command ("\\frac")."""
        self.skip()
        if self.position >= len(self.text):
            return ""
        match = _COMMAND.match(self.text, self.position)
        return match.group() if match else self.text[self.position]

    def accept(self, *wanted: str) -> str:
        token = self.peek()
        if token and token in wanted:
            self.position += len(token)
            return token
        return ""

    def expect(self, wanted: str) -> None:
        if not self.accept(wanted):
            raise ParseError(f"'{wanted}' expected at '{self.text[self.position : self.position + 20]}'")

    # -------------------------------------------------------------------------------------------------------- grammar
    def expression(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deeply")
        terms = [self.term()]
        while sign := self.accept("+", "-"):
            terms.append(self.term() if sign == "+" else ("neg", self.term()))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def term(self) -> Node:
        factors = [self.signed()]
        divisions = 0
        while True:
            if self.accept("*"):
                factors.append(self.signed())
            elif self.accept("/"):  # from the left: a b / c d is (a b / c) d
                divisions += 1
                if divisions > MAX_CHAIN:
                    raise ParseError("too many divisions")
                factors = [("div", self.product(factors), self.signed())]
            elif self.starts_factor(self.peek()):
                factors.append(self.power())
            else:
                return self.product(factors)

    @staticmethod
    def product(factors: list[Node]) -> Node:
        return factors[0] if len(factors) == 1 else ("mul", *factors)

    def starts_factor(self, token: str) -> bool:
        if not token or token in "+-*/^_)]}!,;:=<>&":
            return False
        if token == "|":
            return self.bars == 0
        if (token.isdigit() or token == ".") and self._after_digit():
            raise ParseError("two numbers without a sign between them")
        if token in ("\\rfloor", "\\rceil"):
            return False
        return token[0] == "\\" or token.isalnum() or token in "([{.\u221e"

    def _after_digit(self) -> bool:
        index = self.position - 1
        while index >= 0 and self.text[index].isspace():
            index -= 1
        return index >= 0 and (self.text[index].isdigit() or self.text[index] == ".")

    def signed(self) -> Node:
        negative = False
        while sign := self.accept("+", "-"):
            negative ^= sign == "-"
        value = self.power()
        return ("neg", value) if negative else value

    def power(self) -> Node:
        value = self.postfix(self.atom())
        if self.accept("^") or (self.text.startswith("**", self.position) and self.accept("*") and self.accept("*")):
            value = self.postfix(("pow", value, self.exponent()))
        return value

    def postfix(self, value: Node) -> Node:
        for _ in range(MAX_CHAIN):
            if not self.accept("!"):
                return value
            value = ("fn", "factorial", value)
        raise ParseError("too many factorials")

    def exponent(self) -> Node:
        if self.peek() == "{":
            return self.group()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deeply")
        sign = self.accept("+", "-")
        value = self.power()  # "x^2^3" groups to the right
        self.depth -= 1
        return ("neg", value) if sign == "-" else value

    def group(self, opening: str = "{", closing: str = "}") -> Node:
        self.expect(opening)
        bars, self.bars = self.bars, 0
        value = self.expression()
        self.bars = bars
        self.expect(closing)
        return value

    def argument(self) -> Node:
        r"""Argument of \frac or \sqrt: a group, or one single character or command as TeX takes it."""
        token = self.peek()
        if token == "{":
            return self.group()
        if token.isdigit():
            self.position += 1
            return ("num", token)
        return self.atom()

    def atom(self) -> Node:
        token = self.peek()
        if not token:
            raise ParseError("expression ends too early")
        if token.isdigit() or token == ".":
            return self.number()
        if token in ("(", "[", "{"):
            return self.group(token, {"(": ")", "[": "]", "{": "}"}[token])
        if token == "|":
            return self.bar()
        if token == "\u221e":
            self.position += 1
            return ("const", "oo")
        if token[0] == "\\":
            self.position += len(token)
            return self.command(token[1:])
        if token.isalpha() and token.isascii():
            return self.word()
        raise ParseError(f"unexpected '{token}'")

    def bar(self) -> Node:
        self.expect("|")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deeply")
        self.bars += 1
        value = self.expression()
        self.bars -= 1
        self.depth -= 1
        self.expect("|")
        return ("fn", "abs", value)

    def number(self) -> Node:
        match = _NUMBER.match(self.text, self.position)
        if match is None or match.end() - match.start() > MAX_DIGITS:
            raise ParseError("number expected" if match is None else "number too long")
        self.position = match.end()
        value = Fraction(match.group().replace(",", "").rstrip(".") or "0")
        scientific = _SCIENTIFIC.match(self.text, self.position)
        if scientific and abs(int(scientific.group(1))) <= MAX_DIGITS:
            self.position = scientific.end()
            value *= Fraction(10) ** int(scientific.group(1))
        # An integer before a proper fraction of integers is a mixed number, not a product.
        mixed = _PROPER_FRACTION.match(self.text, self.position) if value.denominator == 1 and not scientific else None
        if mixed:
            top, bottom = int(mixed.group(1) or mixed.group(2)), int(mixed.group(3) or mixed.group(4))
            if top < bottom:
                self.position = mixed.end()
                value += Fraction(top, bottom)
        return number(value)

    def word(self) -> Node:
        match = _WORD.match(self.text, self.position)
        assert match is not None
        name = match.group()
        for prefix in ("np", "math", "sympy"):  # "np.arcsin(10/13)"
            if name == prefix and self.text.startswith(".", match.end()):
                self.position = match.end() + 1
                return self.word()
        if name in FUNCTIONS or name in ("pi", "oo", "infty", "infinity") or name in GREEK:
            self.position = match.end()
            return self.command(name)
        if len(name) > 3:
            raise ParseError(f"'{name}' is a word")
        self.position += 1
        return self.symbol(name[0])

    def symbol(self, name: str) -> Node:
        self.skip()
        if self.accept("_"):
            if self.peek() == "{":
                match = _INDEX_GROUP.match(self.text, self.position)
                if match is None:
                    raise ParseError("index expected")
                index, self.position = match.group(1), match.end()
            else:
                index = self.peek()
                self.position += len(index)
            index = re.sub(r"\\(?:text|mathrm|rm)\b|[\s{}\\]", "", index)
            if not _INDEX.fullmatch(index):
                raise ParseError(f"index '{index[:20]}'")
            return ("sym", f"{name}_{index}")
        primes = 0
        while self.accept("'"):
            primes += 1
        if name in ("e", "i") and not primes:
            return ("const", name)
        return ("sym", name + "'" * primes)

    def command(self, name: str) -> Node:
        if name == "frac":
            top = self.argument()
            return ("div", top, self.argument())
        if name == "binom":
            top = self.argument()
            return ("binom", top, self.argument())
        if name == "sqrt":
            degree = self.group("[", "]") if self.peek() == "[" else ("num", "2")
            return ("root", self.group("(", ")") if self.peek() == "(" else self.argument(), degree)
        if name == "pi":
            return ("const", "pi")
        if name in ("infty", "oo", "infinity"):
            return ("const", "oo")
        if name in GREEK:
            return self.symbol("\\" + name)
        if name in ("lfloor", "lceil"):
            value = self.expression()
            self.expect("\\rfloor" if name == "lfloor" else "\\rceil")
            return ("fn", "floor" if name == "lfloor" else "ceil", value)
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if name in WRAPPERS:
            return self.wrapped()
        raise ParseError(f"command '\\{name}'")

    def wrapped(self) -> Node:
        match = _GROUP_WORD.match(self.text, self.position)
        if match is None:
            raise ParseError("text inside an expression")
        self.position = match.end()
        name = match.group(1)
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if len(name) > 1:
            raise ParseError(f"'{name}' is a word")
        return self.symbol(name)

    def function(self, name: str) -> Node:
        base: Node | None = None
        power: Node | None = None
        for _ in range(2):
            if name == "log" and self.accept("_"):
                base = self.argument()
            elif self.accept("^"):
                power = self.exponent()
        if power == ("neg", ("num", "1")) and name in INVERSES:
            name, power = INVERSES[name], None
        value = self.function_argument()
        if name == "log":
            result: Node = ("log", value, base or ("num", "10"))
        elif name == "sqrt":
            result = ("root", value, ("num", "2"))
        else:
            result = ("fn", name, value)
        return ("pow", result, power) if power is not None else result

    def function_argument(self) -> Node:
        """A bracketed argument, or the run of factors after the name: sin 2x is sin(2x), sin x cos y a product."""
        if self.peek() in ("(", "[", "{"):
            opening = self.peek()
            return self.group(opening, {"(": ")", "[": "]", "{": "}"}[opening])
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deeply")
        factors = [self.signed()]
        while self.starts_factor(token := self.peek()) and token not in ("(", "["):
            if token.lstrip("\\") in FUNCTIONS and token.lstrip("\\") != "sqrt":
                break
            factors.append(self.power())
        self.depth -= 1
        return self.product(factors)


def parse_expression(text: str) -> Node:
    """Tree of a scalar expression, already cleaned by ``answers.clean``.

    Raises:
        ParseError: empty, too long, too deep, unbalanced, or words and commands that are not mathematics.
    """
    if len(text) > MAX_LENGTH:
        raise ParseError(f"{len(text)} characters")
    parser = _Parser(text)
    tree = parser.expression()
    if parser.peek():
        raise ParseError(f"unexpected '{parser.peek()}'")
    return tree
