"""Metamath expressions as trees: a grammar read off a database's syntax axioms, parsing, printing, unification.

Syntax axioms are the `$a` statements whose typecode some `$f` has; they are taken as productions. Statements of other
typecodes (`|-`) either hold one typed expression after the typecode (`|- wff`) or a fixed form around several
(`|- term |= term`); the forms are learnt from the database, shortest first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from modules.verification.provers.metamath import Assertion, Database, Expression, MetamathError

MAX_TERM_SIZE = 2000
MAX_TERM_DEPTH = 120
"""Deeper terms are refused: a bound for hostile input, far above real statements (set.mm stays below 40)."""


class Term:
    """Immutable tree. head: label of a syntax axiom or of a `$f` (a variable), or an int (a metavariable).

    ground: no metavariable inside. size: nodes; depth: levels.
    """

    __slots__ = ("args", "depth", "ground", "head", "size")

    def __init__(self, head: str | int, args: tuple[Term, ...] = ()) -> None:
        size, depth, ground = 1, 1, isinstance(head, str)
        for arg in args:
            size += arg.size
            depth = max(depth, arg.depth + 1)
            ground = ground and arg.ground
        if size > MAX_TERM_SIZE or depth > MAX_TERM_DEPTH:
            raise MetamathError(
                f"Metamath: term of size {size}, depth {depth} is over {MAX_TERM_SIZE}/{MAX_TERM_DEPTH}"
            )
        self.head, self.args, self.size, self.depth, self.ground = head, args, size, depth, ground


@dataclass(frozen=True)
class Rule:
    """A production: label, typecode made, and the right-hand side, of constants (str) and argument numbers (int)."""

    label: str
    typecode: str
    parts: tuple[str | int, ...]
    types: tuple[str, ...]


class Grammar:
    """Parser and printer for the expressions of one database.

    Args:
        database: its syntax axioms are the productions.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        floating = [h for h in database.hypotheses.values() if h.kind == "$f"]
        self.typecodes = {h.expression[0] for h in floating}
        self.variable_type = {h.label: h.expression[0] for h in floating}
        self._variable_symbol = {h.label: h.expression[1] for h in floating}
        self._variables: dict[str, list[str]] = defaultdict(list)  # symbol -> labels of its $f
        for h in floating:
            self._variables[h.expression[1]].append(h.label)
        self.rules: dict[str, Rule] = {}
        self._by_constant: dict[str, list[Rule]] = defaultdict(list)
        self._by_type: dict[str, list[Rule]] = defaultdict(list)
        for assertion in database.assertions.values():
            if assertion.kind == "$a" and assertion.expression[0] in self.typecodes and not assertion.essential:
                self._add_rule(assertion)
        self._forms: dict[str, list[Rule]] = defaultdict(list)
        self._learn_forms()

    def _add_rule(self, axiom: Assertion) -> None:
        place = {h.expression[1]: i for i, h in enumerate(axiom.variables)}
        body = axiom.expression[1:]
        if not body or any(body.count(variable) > 1 for variable in place):
            return  # no context-free production; such syntax is not parsed
        parts = tuple(place.get(symbol, symbol) for symbol in body)
        rule = Rule(axiom.label, axiom.expression[0], parts, tuple(h.expression[0] for h in axiom.variables))
        self.rules[rule.label] = rule
        if isinstance(parts[0], str):
            self._by_constant[parts[0]].append(rule)
        else:
            self._by_type[rule.types[parts[0]]].append(rule)

    def _learn_forms(self) -> None:
        statements: dict[Expression, dict[str, str]] = {}
        for assertion in self.database.assertions.values():
            types = {h.expression[1]: h.expression[0] for h in assertion.variables}
            for expression in (assertion.expression, *(h.expression for h in assertion.essential)):
                if expression[0] not in self.typecodes:
                    statements.setdefault(expression, types)
        order = sorted(statements, key=lambda e: (len(e), -sum(s in statements[e] for s in e), e))
        for expression in order:
            types = statements[expression]
            try:
                self.parse(expression)
            except MetamathError:
                body = expression[1:]
                if any(body.count(symbol) > 1 for symbol in types):
                    continue
                used = [symbol for symbol in body if symbol in types]
                place = {symbol: i for i, symbol in enumerate(used)}
                parts = tuple(place.get(symbol, symbol) for symbol in body)
                label = f"{expression[0]} form {len(self._forms[expression[0]]) + 1}"
                rule = Rule(label, expression[0], parts, tuple(types[symbol] for symbol in used))
                self._forms[expression[0]].append(rule)
                self.rules[label] = rule

    # ------------------------------------------------------------------------------------------------------- parsing
    def parse(self, expression: Sequence[str], metas: Mapping[str, int] | None = None) -> Term:
        """Tree of a whole statement, typecode first.

        Args:
            metas: metavariable tokens (`&<typecode><number>`) that may occur -> their ids.
        Raises:
            MetamathError: no parse, or nested too deeply.
        """
        if not expression:
            raise MetamathError("Metamath: empty statement")
        typecode, body = expression[0], tuple(expression[1:])
        chart = _Chart(self, body, metas or {})
        if typecode in self.typecodes:
            return chart.whole(typecode)
        for candidate in sorted(self.typecodes):
            if (tree := chart.complete(candidate)) is not None:
                return Term(f"{typecode} {candidate}", (tree,))
        for rule in self._forms[typecode]:
            for args in chart.match(rule.parts, rule.types, 0, 0):
                if args[0] == len(body):
                    return Term(rule.label, args[1])
        raise MetamathError(f"Metamath: `{' '.join(expression)[:200]}` does not parse")

    def leaves(self, token: str, metas: Mapping[str, int]) -> Iterator[tuple[str, Term]]:
        """(typecode, tree) of a token standing for a variable or a metavariable."""
        for label in self._variables.get(token, ()):
            yield self.variable_type[label], Term(label)
        if token in metas:
            yield meta_typecode(token), Term(metas[token])

    def starting_with(self, constant: str) -> list[Rule]:
        return self._by_constant.get(constant, [])

    def continuing(self, typecode: str) -> list[Rule]:
        return self._by_type.get(typecode, [])

    # ------------------------------------------------------------------------------------------------------ printing
    def symbols(self, term: Term, names: Mapping[int, str] | None = None) -> list[str]:
        """Symbols of a term, without typecode; metavariables by `names`. For a statement, typecode first."""
        result: list[str] = []
        stack: list[Term | str] = [term]
        while stack:
            top = stack.pop()
            if isinstance(top, str):
                result.append(top)
            elif isinstance(top.head, int):
                result.append(names[top.head] if names else f"&{top.head}")
            elif (symbol := self._variable_symbol.get(top.head)) is not None:
                result.append(symbol)
            elif (rule := self.rules.get(top.head)) is not None:
                stack.extend(top.args[part] if isinstance(part, int) else part for part in reversed(rule.parts))
                if rule.typecode not in self.typecodes:
                    stack.append(rule.typecode)
            else:  # "|- wff": the one typed expression of a statement
                stack += [top.args[0], top.head.split(" ")[0]]
        return result

    def syntax_proof(self, term: Term) -> list[str]:
        """Labels that build a ground typed expression, in reverse Polish order."""
        result: list[str] = []
        stack: list[Term | str] = [term]
        while stack:
            top = stack.pop()
            if isinstance(top, str):
                result.append(top)
                continue
            if isinstance(top.head, int):
                raise MetamathError("Metamath: a metavariable is left in the proof")
            stack.append(top.head)
            stack.extend(reversed(top.args))
        return result


class _Chart:
    """Left-corner parsing of one body, memoised by position; keeps the first tree for each (typecode, end)."""

    def __init__(self, grammar: Grammar, body: Expression, metas: Mapping[str, int]) -> None:
        self.grammar, self.body, self.metas = grammar, body, metas
        self._found: dict[int, dict[tuple[str, int], Term]] = {}
        self._depth = 0

    def whole(self, typecode: str) -> Term:
        tree = self.complete(typecode)
        if tree is None:
            raise MetamathError(f"Metamath: `{' '.join(self.body)[:200]}` does not parse as {typecode}")
        return tree

    def complete(self, typecode: str) -> Term | None:
        return self.at(0).get((typecode, len(self.body))) if self.body else None

    def at(self, position: int) -> dict[tuple[str, int], Term]:
        """Every (typecode, end) that starts at `position`."""
        if position in self._found:
            return self._found[position]
        if position >= len(self.body):
            return {}
        if self._depth >= MAX_TERM_DEPTH:
            raise MetamathError(f"Metamath: expression nested deeper than {MAX_TERM_DEPTH}")
        self._depth += 1
        found: dict[tuple[str, int], Term] = {}
        agenda: list[tuple[str, int, Term]] = []

        def add(typecode: str, end: int, tree: Term) -> None:
            if (typecode, end) not in found:
                found[typecode, end] = tree
                agenda.append((typecode, end, tree))

        token = self.body[position]
        for typecode, leaf in self.grammar.leaves(token, self.metas):
            add(typecode, position + 1, leaf)
        for rule in self.grammar.starting_with(token):
            for end, args in self.match(rule.parts, rule.types, 1, position + 1):
                add(rule.typecode, end, Term(rule.label, args))
        while agenda:
            typecode, end, tree = agenda.pop()
            for rule in self.grammar.continuing(typecode):
                for last, args in self.match(rule.parts, rule.types, 1, end, {rule.parts[0]: tree}):
                    add(rule.typecode, last, Term(rule.label, args))
        self._depth -= 1
        self._found[position] = found
        return found

    def match(
        self,
        parts: Sequence[str | int],
        types: Sequence[str],
        index: int,
        position: int,
        bound: Mapping[str | int, Term] | None = None,
    ) -> Iterator[tuple[int, tuple[Term, ...]]]:
        """Ways to match parts[index:] from `position`: (end, arguments in order)."""
        pending: list[tuple[int, int, dict[str | int, Term]]] = [(index, position, dict(bound or {}))]
        while pending:
            i, at, args = pending.pop()
            while i < len(parts) and isinstance(parts[i], str):
                if at >= len(self.body) or self.body[at] != parts[i]:
                    break
                i, at = i + 1, at + 1
            else:
                if i == len(parts):
                    yield at, tuple(args[k] for k in range(len(types)))
                    continue
                part = parts[i]
                assert isinstance(part, int)
                for (typecode, end), tree in reversed(self.at(at).items()):
                    if typecode == types[part]:
                        pending.append((i + 1, end, {**args, part: tree}))


def meta_typecode(token: str) -> str:
    """Typecode of a metavariable token `&<typecode><number>`."""
    return token[1:].rstrip("0123456789")


# ------------------------------------------------------------------------------------------------------- unification
Bindings = dict[int, Term]


def instantiate(term: Term, values: Mapping[str, Term]) -> Term:
    """Replace variables (leaves by `$f` label). Depth is bounded by MAX_TERM_DEPTH, hence the recursion."""
    if not term.args:
        return values.get(term.head, term) if isinstance(term.head, str) else term
    return Term(term.head, tuple(instantiate(arg, values) for arg in term.args))


def resolve(term: Term, bindings: Bindings) -> Term:
    """Replace bound metavariables, all the way."""
    if term.ground:
        return term
    if isinstance(term.head, int):
        bound = bindings.get(term.head)
        return term if bound is None else resolve(bound, bindings)
    return Term(term.head, tuple(resolve(arg, bindings) for arg in term.args))


def _occurs(meta: int, term: Term, bindings: Bindings) -> bool:
    stack = [term]
    while stack:
        top = stack.pop()
        if top.ground:
            continue
        if isinstance(top.head, int):
            if top.head == meta:
                return True
            if top.head in bindings:
                stack.append(bindings[top.head])
        stack.extend(top.args)
    return False


def unify(left: Term, right: Term, bindings: Bindings, types: Mapping[int, str], type_of: Mapping[str, str]) -> bool:
    """Most general unifier, added to `bindings` (left half-changed on failure). True if there is one.

    Args:
        types: typecode of each metavariable. type_of: typecode of each head (rule or variable label).
    """
    stack = [(left, right)]
    while stack:
        a, b = stack.pop()
        while isinstance(a.head, int) and a.head in bindings:
            a = bindings[a.head]
        while isinstance(b.head, int) and b.head in bindings:
            b = bindings[b.head]
        if a is b or (a.head == b.head and not a.args and not b.args):
            continue
        if not isinstance(a.head, int) and isinstance(b.head, int):
            a, b = b, a
        if isinstance(a.head, int):
            other = types[b.head] if isinstance(b.head, int) else type_of.get(b.head)
            if types[a.head] != other or _occurs(a.head, b, bindings):
                return False
            bindings[a.head] = b
        elif a.head != b.head or len(a.args) != len(b.args):
            return False
        else:
            stack.extend(zip(a.args, b.args, strict=True))
    return True
