"""Metamath databases: parser and proof checker (Megill & Wheeler, Metamath, 2nd ed. 2019, chapter 4 and appendix B).

Pure Python, no recursion, bounded in text size, proof steps and expression length, so hostile input ends in
`MetamathError` and never in a crash. Includes (`$[`) are refused: a database is one file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

Expression = tuple[str, ...]
Pair = tuple[str, str]

MAX_TEXT_CHARS = 100_000_000
MAX_PROOF_STEPS = 1_000_000
MAX_EXPRESSION_SYMBOLS = 100_000
MAX_PROOF_SYMBOLS = 50_000_000

_LABEL_RE = re.compile(r"[A-Za-z0-9._-]+")
_TOKEN_RE = re.compile(r"[!-~]+")


class MetamathError(ValueError):
    """A database or proof that breaks a rule; the message names the label or token and the rule."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """`$f` (floating: typecode, variable) or `$e` (essential) hypothesis."""

    label: str
    kind: str
    expression: Expression


@dataclass(frozen=True, slots=True)
class Assertion:
    """`$a` axiom or `$p` theorem with its frame.

    expression: typecode and symbols of the conclusion. hypotheses: mandatory ones in order of appearance. disjoint:
    sorted pairs of mandatory variables that must stay disjoint when it is used. scope_disjoint: all pairs in force
    where it stands (its own proof may use them for dummy variables). floating: labels of the `$f` statements in
    force there. proof: tokens between `$=` and `$.`, normal or compressed, () for axioms. index: position among all
    assertions.
    """

    label: str
    kind: str
    expression: Expression
    hypotheses: tuple[Hypothesis, ...]
    disjoint: frozenset[Pair]
    scope_disjoint: frozenset[Pair]
    floating: frozenset[str]
    proof: tuple[str, ...]
    index: int

    @property
    def essential(self) -> tuple[Hypothesis, ...]:
        return tuple(h for h in self.hypotheses if h.kind == "$e")

    @property
    def variables(self) -> tuple[Hypothesis, ...]:
        """Mandatory `$f` hypotheses: one for each variable of conclusion and essential hypotheses."""
        return tuple(h for h in self.hypotheses if h.kind == "$f")


@dataclass
class _Scope:
    variables: set[str] = field(default_factory=set)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    disjoint: set[Pair] = field(default_factory=set)


def pair(x: str, y: str) -> Pair:
    """A disjoint-variable pair in canonical order."""
    return (x, y) if x < y else (y, x)


class Database:
    """A parsed database. Statements are checked while parsing, proofs by `check` or `check_all`.

    Attributes: constants; hypotheses and assertions by label, in order of appearance; variables (every `$v` symbol).
    """

    def __init__(self) -> None:
        self.constants: set[str] = set()
        self.variables: set[str] = set()
        self.hypotheses: dict[str, Hypothesis] = {}
        self.assertions: dict[str, Assertion] = {}
        self._scopes: list[_Scope] = [_Scope()]
        self._floating_cache: frozenset[str] | None = None
        self._disjoint_cache: frozenset[Pair] | None = None

    # ------------------------------------------------------------------------------------------------------- parsing
    @classmethod
    def load(cls, path: str | Path) -> Database:
        """Parse a file. Raises MetamathError for bad content, OSError for a bad path."""
        try:
            return cls.parse(Path(path).read_text(encoding="ascii"))
        except UnicodeDecodeError:
            raise MetamathError(f"Metamath database {path}: characters outside ASCII") from None

    @classmethod
    def parse(cls, text: str) -> Database:
        """Parse the text of a database. Raises MetamathError."""
        if len(text) > MAX_TEXT_CHARS:
            raise MetamathError(f"Metamath: {len(text)} characters, at most {MAX_TEXT_CHARS} are accepted")
        database = cls()
        tokens = _tokens(text)
        label: str | None = None
        for token in tokens:
            if not token.startswith("$"):
                if label is not None:
                    raise MetamathError(f"Metamath: label `{label}` is followed by `{token}`, expected a keyword")
                label = token
                continue
            if (token in ("$f", "$e", "$a", "$p")) != (label is not None):
                raise MetamathError(
                    f"Metamath: `{token}` {'without a' if label is None else 'with'} label {label or ''}"
                )
            if token == "${":
                database._scopes.append(_Scope())
            elif token == "$}":
                if len(database._scopes) == 1:
                    raise MetamathError("Metamath: `$}` without `${`")
                database._scopes.pop()
                database._floating_cache = database._disjoint_cache = None
            elif token in ("$c", "$v", "$d"):
                database._declare(token, _until(tokens, "$.", token))
            elif token in ("$f", "$e", "$a", "$p"):
                assert label is not None
                database._labelled(label, token, tokens)
            else:
                raise MetamathError(f"Metamath: keyword `{token}` is not accepted here")
            label = None
        if label is not None:
            raise MetamathError(f"Metamath: label `{label}` at the end of the text")
        if len(database._scopes) != 1:
            raise MetamathError("Metamath: `${` is never closed")
        return database

    def _declare(self, kind: str, symbols: list[str]) -> None:
        if kind == "$d":
            if len(symbols) < 2 or len(set(symbols)) != len(symbols):
                raise MetamathError(f"Metamath: `$d {' '.join(symbols)}` needs two or more different variables")
            for symbol in symbols:
                if not self._active(symbol):
                    raise MetamathError(f"Metamath: `$d` names `{symbol}`, which is no active variable")
            self._scopes[-1].disjoint.update(pair(x, y) for x, y in combinations(symbols, 2))
            self._disjoint_cache = None
            return
        if kind == "$c" and len(self._scopes) > 1:
            raise MetamathError("Metamath: `$c` inside a block")
        for symbol in symbols:
            clash = symbol in self.constants or self._active(symbol) or (kind == "$c" and symbol in self.variables)
            if clash or symbol in self.hypotheses or symbol in self.assertions:
                raise MetamathError(f"Metamath: `{symbol}` is declared twice")
            if kind == "$c":
                self.constants.add(symbol)
            else:
                self.variables.add(symbol)
                self._scopes[-1].variables.add(symbol)

    def _active(self, variable: str) -> bool:
        return any(variable in scope.variables for scope in self._scopes)

    def _active_hypotheses(self) -> Iterator[Hypothesis]:
        for scope in self._scopes:
            yield from scope.hypotheses

    def _labelled(self, label: str, kind: str, tokens: Iterator[str]) -> None:
        if not _LABEL_RE.fullmatch(label):
            raise MetamathError(f"Metamath: `{label}` is not a label (letters, digits, `.`, `-`, `_`)")
        if label in self.hypotheses or label in self.assertions or label in self.constants or label in self.variables:
            raise MetamathError(f"Metamath: label `{label}` is used twice")
        proof: list[str] = []
        expression = tuple(_until(tokens, "$=" if kind == "$p" else "$.", label))
        if kind == "$p":
            proof = _until(tokens, "$.", label)
            if not proof:
                raise MetamathError(f"Metamath: theorem `{label}` has no proof")
        typed = {h.expression[1] for h in self._active_hypotheses() if h.kind == "$f"}
        if kind == "$f":
            if len(expression) != 2 or expression[0] not in self.constants or not self._active(expression[1]):
                raise MetamathError(f"Metamath: `{label} $f` needs a constant and an active variable")
            if expression[1] in typed:
                raise MetamathError(f"Metamath: variable `{expression[1]}` has two active `$f`")
        else:
            self._check_symbols(label, expression, typed)
        if kind in ("$f", "$e"):
            hypothesis = Hypothesis(label, kind, expression)
            self.hypotheses[label] = hypothesis
            self._scopes[-1].hypotheses.append(hypothesis)
            if kind == "$f":
                self._floating_cache = None
        else:
            essential = [h for h in self._active_hypotheses() if h.kind == "$e"]
            self.assertions[label] = self._assertion(label, kind, expression, essential, (), tuple(proof))

    def _check_symbols(self, label: str, expression: Expression, typed: set[str]) -> None:
        if not expression or expression[0] not in self.constants:
            raise MetamathError(f"Metamath: statement `{label}` must begin with a constant")
        for symbol in expression:
            if symbol not in self.constants and symbol not in typed:
                raise MetamathError(
                    f"Metamath: `{symbol}` in `{label}` is neither a constant nor a variable with a `$f`"
                )

    def _assertion(
        self,
        label: str,
        kind: str,
        expression: Expression,
        essential: Sequence[Hypothesis],
        extra_disjoint: Iterable[Pair],
        proof: tuple[str, ...],
    ) -> Assertion:
        used = {s for e in (expression, *(h.expression for h in essential)) for s in e} - self.constants
        chosen = {h.label for h in essential}
        active = [*self._active_hypotheses(), *(h for h in essential if h.label not in self.hypotheses)]
        mandatory = tuple(h for h in active if (h.expression[1] in used if h.kind == "$f" else h.label in chosen))
        if self._disjoint_cache is None:
            self._disjoint_cache = frozenset().union(*(scope.disjoint for scope in self._scopes))
        if self._floating_cache is None:
            self._floating_cache = frozenset(h.label for h in self._active_hypotheses() if h.kind == "$f")
        scope_disjoint = self._disjoint_cache
        if extra := frozenset(extra_disjoint):
            scope_disjoint |= extra
        disjoint = frozenset(p for p in scope_disjoint if p[0] in used and p[1] in used)
        return Assertion(
            label,
            kind,
            expression,
            mandatory,
            disjoint,
            scope_disjoint,
            self._floating_cache,
            proof,
            len(self.assertions),
        )

    def theorem(
        self, label: str, conclusion: str, hypotheses: Sequence[str] = (), disjoint: Sequence[Pair] = ()
    ) -> Assertion:
        """A new theorem to prove at the end of the database (it is not added).

        Args:
            label: its name. conclusion, hypotheses: symbols separated by blanks, typecode first; hypothesis k is
                labelled `<label>.k`. disjoint: pairs of variables.
        Raises:
            MetamathError: label in use, unknown symbol, malformed statement.
        """
        if label in self.hypotheses or label in self.assertions or not _LABEL_RE.fullmatch(label):
            raise MetamathError(f"Metamath: `{label}` is in use or is not a label")
        typed = {h.expression[1] for h in self._active_hypotheses() if h.kind == "$f"}
        essential = [Hypothesis(f"{label}.{k}", "$e", tuple(text.split())) for k, text in enumerate(hypotheses, 1)]
        expression = tuple(conclusion.split())
        for name, symbols in [(label, expression), *((h.label, h.expression) for h in essential)]:
            if name in self.hypotheses or name in self.assertions and name != label:
                raise MetamathError(f"Metamath: label `{name}` is used twice")
            self._check_symbols(name, symbols, typed)
        return self._assertion(label, "$p", expression, essential, (pair(x, y) for x, y in disjoint), ())

    # ------------------------------------------------------------------------------------------------------ checking
    def check(self, theorem: Assertion, proof: Sequence[str] | None = None) -> int:
        """Check a proof (default: the theorem's own) and return its number of steps.

        Args:
            proof: labels in reverse Polish order, or the compressed form `( labels ) LETTERS`.
        Raises:
            MetamathError: the proof does not prove the theorem; the message says at which step.
        """
        tokens = theorem.proof if proof is None else tuple(proof)
        if not tokens:
            raise MetamathError(f"Metamath: theorem `{theorem.label}` has no proof")
        stack: list[Expression] = []
        saved: list[Expression] = []
        own = {h.label: h for h in theorem.hypotheses if h.kind == "$e"}
        count = symbols = 0
        for count, step in enumerate(proof_steps(theorem, tokens), 1):
            if count > MAX_PROOF_STEPS:
                raise MetamathError(f"Metamath: proof of `{theorem.label}` has more than {MAX_PROOF_STEPS} steps")
            if step is None:
                saved.append(stack[-1])
            elif isinstance(step, int):
                stack.append(saved[step])
            elif hypothesis := own.get(step):
                stack.append(hypothesis.expression)
            elif step in theorem.floating:
                stack.append(self.hypotheses[step].expression)
            else:
                self._apply(theorem, count, step, stack)
                symbols += len(stack[-1])
                if symbols > MAX_PROOF_SYMBOLS:
                    raise MetamathError(f"Metamath: proof of `{theorem.label}` writes over {MAX_PROOF_SYMBOLS} symbols")
        if len(stack) != 1:
            raise MetamathError(f"Metamath: proof of `{theorem.label}` leaves {len(stack)} expressions, expected 1")
        if stack[0] != theorem.expression:
            raise MetamathError(
                f"Metamath: proof of `{theorem.label}` ends in `{_shown(stack[0])}`, not in its statement"
            )
        return count

    def _apply(self, theorem: Assertion, count: int, label: str, stack: list[Expression]) -> None:
        """One assertion: pop its hypotheses, check them and the disjoint variables, push the conclusion."""

        def fail(what: str) -> MetamathError:
            return MetamathError(f"Metamath: proof of `{theorem.label}`, step {count} (`{label[:60]}`): {what}")

        used = self.assertions.get(label)
        if used is None or used.index >= theorem.index:
            raise fail("is no hypothesis in force and no assertion stated before")
        base = len(stack) - len(used.hypotheses)
        if base < 0:
            raise fail(f"needs {len(used.hypotheses)} expressions, the stack holds {len(stack)}")
        values: dict[str, Expression] = {}
        for hypothesis, entry in zip(used.hypotheses, stack[base:], strict=True):
            if hypothesis.kind == "$f":
                typecode, variable = hypothesis.expression
                if entry[0] != typecode:
                    raise fail(f"variable `{variable}` needs a {typecode}, got `{_shown(entry)}`")
                values[variable] = entry[1:]
            elif (expected := substitute(hypothesis.expression, values)) != entry:
                raise fail(f"hypothesis {hypothesis.label} needs `{_shown(expected)}`, got `{_shown(entry)}`")
        for x, y in used.disjoint:
            left, right = set(values[x]) - self.constants, set(values[y]) - self.constants
            if common := left & right:
                raise fail(f"`$d {x} {y}` is violated: both contain `{min(common)}`")
            for p in left:
                for q in right:
                    if pair(p, q) not in theorem.scope_disjoint:
                        raise fail(f"`$d {x} {y}` needs `$d {p} {q}`, which the theorem does not have")
        del stack[base:]
        stack.append(substitute(used.expression, values))

    def check_all(self) -> int:
        """Check every theorem; returns their number. Raises MetamathError at the first bad one."""
        theorems = [a for a in self.assertions.values() if a.kind == "$p"]
        for theorem in theorems:
            self.check(theorem)
        return len(theorems)


def substitute(expression: Expression, values: dict[str, Expression]) -> Expression:
    """Replace variables simultaneously. Raises MetamathError beyond MAX_EXPRESSION_SYMBOLS symbols."""
    result: list[str] = []
    for symbol in expression:
        value = values.get(symbol)
        if value is None:
            result.append(symbol)
        else:
            result += value
    if len(result) > MAX_EXPRESSION_SYMBOLS:
        raise MetamathError(f"Metamath: an expression grows beyond {MAX_EXPRESSION_SYMBOLS} symbols")
    return tuple(result)


def proof_steps(theorem: Assertion, tokens: Sequence[str]) -> Iterator[str | int | None]:
    """Steps of a proof in either form: a label, an int (recall saved expression k), or None (save the top).

    Raises:
        MetamathError: unknown (`?`) step or malformed compressed proof.
    """

    def fail(what: str) -> MetamathError:
        return MetamathError(f"Metamath: proof of `{theorem.label}`: {what}")

    if tokens[0] != "(":
        for token in tokens:
            if token == "?":
                raise fail("is incomplete (`?`)")
            yield token
        return
    if ")" not in tokens:
        raise fail("compressed proof without `)`")
    close = tokens.index(")")
    labels = [h.label for h in theorem.hypotheses]
    mandatory = set(labels)
    for label in tokens[1:close]:
        if label in mandatory:
            raise fail(f"compressed proof lists the mandatory hypothesis `{label}`")
        labels.append(label)
    number, saves, may_save = 0, 0, False
    for letter in "".join(tokens[close + 1 :]):
        if "A" <= letter <= "T":
            number = number * 20 + ord(letter) - ord("A")
            if number < len(labels):
                yield labels[number]
            elif number - len(labels) < saves:
                yield number - len(labels)
            else:
                raise fail(f"compressed proof refers to entry {number + 1}, there are {len(labels) + saves}")
            number, may_save = 0, True
        elif "U" <= letter <= "Y":
            number = number * 5 + ord(letter) - ord("U") + 1
            if number > MAX_PROOF_STEPS:
                raise fail("compressed proof holds a number that is too large")
            may_save = False
        elif letter == "Z" and may_save:
            yield None
            saves, may_save = saves + 1, False
        else:
            raise fail("is incomplete (`?`)" if letter == "?" else f"compressed proof holds a misplaced `{letter}`")
    if number:
        raise fail("compressed proof ends inside a number")


def _tokens(text: str) -> Iterator[str]:
    """Tokens outside comments. Comments do not nest."""
    inside = False
    for match in re.finditer(r"\S+", text):
        token = match.group(0)
        if inside:
            if token == "$)":
                inside = False
            elif "$(" in token or "$)" in token:
                raise MetamathError(f"Metamath: `{token[:40]}` inside a comment")
        elif token == "$(":
            inside = True
        elif not _TOKEN_RE.fullmatch(token):
            raise MetamathError(f"Metamath: token {token[:40]!r} holds characters outside printable ASCII")
        elif token.startswith("$["):
            raise MetamathError("Metamath: includes (`$[`) are refused; join the files first")
        else:
            yield token
    if inside:
        raise MetamathError("Metamath: comment is never closed")


def _until(tokens: Iterator[str], end: str, where: str) -> list[str]:
    found: list[str] = []
    for token in tokens:
        if token == end:
            return found
        if "$" in token:
            raise MetamathError(f"Metamath: `{token}` inside `{where}`, expected `{end}`")
        found.append(token)
    raise MetamathError(f"Metamath: the text ends inside `{where}`, expected `{end}`")


def _shown(expression: Expression) -> str:
    text = " ".join(expression[:60])
    return text if len(expression) <= 60 else f"{text} ..."
