"""Backward proof search in Metamath: a step-wise prover over a database, and a proposer that needs no model.

A state is a list of open goals with metavariables. A tactic names an assertion stated before the theorem (or one of the
theorem's own hypotheses) whose conclusion unifies with the first goal, with optional substitutions for its variables:

    LABEL  [VARIABLE := SYMBOLS]...                 e.g.  ax-r2 b := ( a v b )

Its essential hypotheses become the new first goals; variables left open become metavariables `&<typecode><number>`,
bound by later steps. A finished search gives labels in reverse Polish order, which the checker of `metamath` judges.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modules.verification.contracts import Verdict
from modules.verification.provers.base import ProverError, StatementError, Step
from modules.verification.provers.metamath import Assertion, Database, MetamathError
from modules.verification.provers.metamath_proof import compress
from modules.verification.provers.metamath_terms import (
    Bindings,
    Grammar,
    Term,
    instantiate,
    resolve,
    unify,
)

MAX_TACTIC_CHARS = 4096
MAX_GOALS = 64
MAX_STATE_SIZE = 20_000
MAX_PROOF_TACTICS = 1000


@dataclass(frozen=True)
class Pattern:
    """An assertion as trees: variables ($f labels, typecodes), conclusion, essential hypotheses."""

    label: str
    variables: tuple[str, ...]
    types: tuple[str, ...]
    conclusion: Term
    essential: tuple[Term, ...]


class Library:
    """A database with its grammar, patterns parsed on demand and counts of use; shared by prover and proposer.

    Args:
        database: parsed database.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.grammar = Grammar(database)
        self.type_of = {**self.grammar.variable_type, **{r.label: r.typecode for r in self.grammar.rules.values()}}
        self._patterns: dict[str, Pattern] = {}
        self._order = list(database.assertions.values())
        self._users: dict[str, list[int]] = defaultdict(list)
        for assertion in self._order:
            for label in dict.fromkeys(assertion.proof):
                if label in database.assertions:
                    self._users[label].append(assertion.index)

    def pattern(self, assertion: Assertion) -> Pattern:
        """Trees of an assertion. Raises MetamathError if it does not parse."""
        found = self._patterns.get(assertion.label)
        if found is None:
            variables = assertion.variables
            found = Pattern(
                assertion.label,
                tuple(h.label for h in variables),
                tuple(h.expression[0] for h in variables),
                self.grammar.parse(assertion.expression),
                tuple(self.grammar.parse(h.expression) for h in assertion.essential),
            )
            if assertion.label in self.database.assertions:
                self._patterns[assertion.label] = found
        return found

    def before(self, theorem: Assertion) -> list[Assertion]:
        """Assertions a proof of `theorem` may use, syntax left out."""
        typecode = theorem.expression[0]
        return [a for a in self._order[: theorem.index] if a.expression[0] == typecode]

    def uses(self, label: str, before: int) -> int:
        """Number of theorems with index below `before` whose proofs name `label`."""
        return bisect_left(self._users.get(label, []), before)


@dataclass(frozen=True)
class _Node:
    """A proof step: assertion or hypothesis, terms for its variables, slots of the steps for its hypotheses."""

    label: str
    terms: tuple[Term, ...] = ()
    slots: tuple[int, ...] = ()


@dataclass(frozen=True)
class MetamathState:
    """Open goals (slot, statement), proof steps by slot (None: open), metavariables (id -> typecode), goal text."""

    goals: tuple[tuple[int, Term], ...]
    nodes: tuple[_Node | None, ...]
    metas: Mapping[int, str] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    text: str = ""


def parse_tactic(tactic: str) -> tuple[str, dict[str, list[str]]]:
    """Split `LABEL VARIABLE := SYMBOLS ...`. Raises MetamathError."""
    if len(tactic) > MAX_TACTIC_CHARS:
        raise MetamathError(f"tactic of {len(tactic)} characters, at most {MAX_TACTIC_CHARS} are accepted")
    tokens = tactic.split()
    if not tokens:
        raise MetamathError("empty tactic")
    starts = [i for i in range(1, len(tokens) - 1) if tokens[i + 1] == ":="]
    if len(tokens) > 1 and (not starts or starts[0] != 1):
        raise MetamathError(f"tactic must read `LABEL VARIABLE := SYMBOLS ...`, got `{tactic[:80]}`")
    values: dict[str, list[str]] = {}
    for start, stop in zip(starts, [*starts, len(tokens)][1:], strict=True):
        if tokens[start] in values:
            raise MetamathError(f"tactic gives variable `{tokens[start]}` twice")
        values[tokens[start]] = tokens[start + 2 : stop]
    return tokens[0], values


class MetamathProver:
    """Metamath behind the `Prover` interface; a statement is an `Assertion` (its own proof is never looked at).

    Args:
        library: database to prove in; `Library(Database.load(path))`.
    """

    name = "metamath"

    def __init__(self, library: Library) -> None:
        self.library = library
        self._theorem: Assertion | None = None
        self._own: dict[str, Term] = {}

    def start(self, statement: Assertion) -> MetamathState:
        """Root state. Raises StatementError for a statement the grammar does not parse."""
        try:
            pattern = self.library.pattern(statement)
        except MetamathError as error:
            raise StatementError(f"MetamathProver: {statement.label}: {error}") from None
        self._theorem = statement
        self._own = dict(zip((h.label for h in statement.essential), pattern.essential, strict=True))
        return self._describe(((0, pattern.conclusion),), (None,), {})

    def goals(self, state: MetamathState) -> str:
        """`N goals`, the theorem's hypotheses, then the open statements, the one to work on first."""
        return state.text

    def _describe(
        self, goals: tuple[tuple[int, Term], ...], nodes: tuple[_Node | None, ...], metas: Mapping[int, str]
    ) -> MetamathState:
        """State with metavariables named in order of appearance, so that equal states print alike."""
        assert self._theorem is not None
        names: dict[int, str] = {}
        for _, goal in goals:
            stack = [goal]
            while stack:
                top = stack.pop()
                if isinstance(top.head, int):
                    names.setdefault(top.head, f"&{metas[top.head]}{len(names) + 1}")
                if not top.ground:
                    stack.extend(reversed(top.args))
        lines = [f"{len(goals)} goal{'' if len(goals) == 1 else 's'}"]
        lines += [f"{h.label}: {' '.join(h.expression)}" for h in self._theorem.essential]
        lines += [" ".join(self.library.grammar.symbols(goal, names)) for _, goal in goals]
        return MetamathState(goals, nodes, metas, names, "\n".join(lines))

    def apply(self, state: MetamathState, tactic: str) -> Step:
        """Resolve the first goal with a tactic (see the module's text for its form)."""
        if self._theorem is None:
            raise ProverError("MetamathProver: call start(statement) before apply")
        try:
            label, values = parse_tactic(tactic)
        except MetamathError as error:
            return Step("refused", message=str(error))
        if not state.goals:
            return Step("error", message="no goal left")
        try:
            after = self._resolve_goal(state, label, values)
        except MetamathError as error:
            return Step("error", message=str(error))
        return Step("open" if after.goals else "proved", after)

    def _resolve_goal(self, state: MetamathState, label: str, values: dict[str, list[str]]) -> MetamathState:
        assert self._theorem is not None
        (slot, goal), *rest = state.goals
        bindings: Bindings = {}
        metas = dict(state.metas)
        terms: tuple[Term, ...] = ()
        new_goals: list[Term] = []
        if label in self._own:
            conclusion = self._own[label]
            if values:
                raise MetamathError(f"hypothesis `{label}` takes no substitution")
        else:
            used = self.library.database.assertions.get(label)
            if used is None or used.index >= self._theorem.index or used.expression[0] != self._theorem.expression[0]:
                raise MetamathError(f"`{label[:60]}` is no assertion stated before `{self._theorem.label}`")
            pattern = self.library.pattern(used)
            first = max(metas, default=0) + 1
            metas.update(zip(range(first, first + len(pattern.types)), pattern.types, strict=True))
            fresh = {name: Term(first + i) for i, name in enumerate(pattern.variables)}
            self._bind_given(state, used, fresh, values, bindings, metas)
            terms = tuple(fresh.values())
            conclusion = instantiate(pattern.conclusion, fresh)
            new_goals = [instantiate(e, fresh) for e in pattern.essential]
        if not unify(goal, conclusion, bindings, metas, self.library.type_of):
            raise MetamathError(f"the conclusion of `{label}` does not unify with the goal")
        return self._after(slot, label, terms, new_goals, rest, state.nodes, bindings, metas)

    def _bind_given(
        self,
        state: MetamathState,
        used: Assertion,
        fresh: Mapping[str, Term],
        values: dict[str, list[str]],
        bindings: Bindings,
        metas: Mapping[int, str],
    ) -> None:
        ids = {name: meta for meta, name in state.names.items()}
        for hypothesis in used.variables:
            typecode, variable = hypothesis.expression
            if (symbols := values.pop(variable, None)) is not None:
                value = self.library.grammar.parse((typecode, *symbols), ids)
                if not unify(fresh[hypothesis.label], value, bindings, metas, self.library.type_of):
                    raise MetamathError(f"`{variable} := {' '.join(symbols)[:80]}` is not a {typecode}")
        if values:
            raise MetamathError(f"`{used.label}` has no variable `{next(iter(values))}`")

    def _after(
        self,
        slot: int,
        label: str,
        terms: tuple[Term, ...],
        new_goals: Sequence[Term],
        rest: Sequence[tuple[int, Term]],
        nodes: tuple[_Node | None, ...],
        bindings: Bindings,
        metas: Mapping[int, str],
    ) -> MetamathState:
        if len(new_goals) + len(rest) > MAX_GOALS:
            raise MetamathError(f"more than {MAX_GOALS} open goals")
        slots = tuple(range(len(nodes), len(nodes) + len(new_goals)))
        grown: list[_Node | None] = [*nodes, *(None for _ in slots)]
        grown[slot] = _Node(label, terms, slots)
        size = 0
        for i, node in enumerate(grown):
            if node is not None and not all(t.ground for t in node.terms):
                node = grown[i] = _Node(node.label, tuple(resolve(t, bindings) for t in node.terms), node.slots)
            size += sum(t.size for t in node.terms) if node else 0
        goals = tuple((s, resolve(g, bindings)) for s, g in [*zip(slots, new_goals, strict=True), *rest])
        if size + sum(g.size for _, g in goals) > MAX_STATE_SIZE:
            raise MetamathError(f"the proof grows beyond {MAX_STATE_SIZE} nodes")
        open_metas = {meta: typecode for meta, typecode in metas.items() if meta not in bindings}
        return self._describe(goals, tuple(grown), open_metas)

    # ------------------------------------------------------------------------------------------------------- results
    def labels(self, state: MetamathState) -> list[str]:
        """Normal proof of a state without goals. Metavariables never bound become some variable of their typecode.

        Raises:
            MetamathError: goals are left, or a typecode has no variable.
        """
        assert self._theorem is not None
        if state.goals:
            raise MetamathError(f"{len(state.goals)} goals are left")
        # Variables the theorem does not have come first: sharing one could break a disjoint-variable condition.
        own = {h.label for h in self._theorem.hypotheses}
        spare: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self._theorem.floating, key=lambda name: (name in own, name)):
            spare[self.library.grammar.variable_type[name]].append(name)
        dummies: Bindings = {}
        for meta, typecode in sorted(state.metas.items()):
            if not spare[typecode]:
                raise MetamathError(f"no variable of typecode {typecode} is in force")
            dummies[meta] = Term(spare[typecode][len(dummies) % len(spare[typecode])])
        proof: list[str] = []
        stack: list[int | str] = [0]
        while stack:
            top = stack.pop()
            if isinstance(top, str):
                proof.append(top)
                continue
            node = state.nodes[top]
            assert node is not None
            used = self.library.database.assertions.get(node.label)
            stack.append(node.label)
            if used is None:
                continue
            terms, slots = iter(node.terms), iter(node.slots)
            parts: list[int | str] = []
            for hypothesis in used.hypotheses:
                if hypothesis.kind == "$f":
                    parts += self.library.grammar.syntax_proof(resolve(next(terms), dummies))
                else:
                    parts.append(next(slots))
            stack.extend(reversed(parts))
        return proof

    def replay(self, statement: Assertion, proof: Sequence[str]) -> list[str]:
        """Labels (normal form) of a proof given as tactics. Raises MetamathError, StatementError."""
        if len(proof) > MAX_PROOF_TACTICS:
            raise MetamathError(f"proof of {len(proof)} tactics, at most {MAX_PROOF_TACTICS} are checked")
        prover = MetamathProver(self.library)
        state = prover.start(statement)
        for number, tactic in enumerate(proof, 1):
            step = prover.apply(state, tactic)
            if step.state is None:
                raise MetamathError(f"tactic {number}: {step.message}")
            state = step.state
        return prover.labels(state)

    def compressed(self, statement: Assertion, proof: Sequence[str]) -> list[str]:
        """Compressed proof of a proof given as tactics. Raises MetamathError, StatementError."""
        return compress(self.library.database, statement, self.replay(statement, proof))

    def check(self, statement: Assertion, proof: Sequence[str]) -> Verdict:
        """Turn the tactics into labels and let the proof checker judge those, disjoint variables included."""
        started = time.monotonic()
        try:
            labels = self.replay(statement, proof)
            steps = self.library.database.check(statement, labels)
        except (MetamathError, StatementError) as error:
            return Verdict(False, str(error), time.monotonic() - started)
        return Verdict(True, f"accepted by the Metamath checker in {steps} steps", time.monotonic() - started)

    def close(self) -> None:
        """Forget the statement."""
        self._theorem = None
        self._own = {}
