"""The baseline proposer for Metamath: every assertion that unifies, ranked by use and by what it leaves to prove."""

from __future__ import annotations

import math

from modules.verification.proposers import Candidate
from modules.verification.provers.metamath import Assertion, MetamathError
from modules.verification.provers.metamath_search import Library
from modules.verification.provers.metamath_terms import Bindings, Term, instantiate, resolve, unify


class AssertionProposer:
    """Tactics for the first goal, read back from the goal text.

    The log-prior of an assertion is a softmax over log(1 + uses)/2 - goals/2 - 2 * new metavariables - size of the new
    goals / 5; uses are counted in proofs stated before the theorem only. (Chosen once on 40 ql.mm and 40 hol.mm
    theorems; seven settings proved 8-11 and 5-7 of them, so little hangs on the numbers.)

    Args:
        library: shared with the prover. theorem: what is being proved; only what stands before it is proposed.
    """

    def __init__(self, library: Library, theorem: Assertion) -> None:
        self.library, self.theorem = library, theorem
        self._patterns = []
        for assertion in library.before(theorem):
            try:
                pattern = library.pattern(assertion)
            except MetamathError:
                continue  # an assertion outside the grammar can be checked, but not searched with
            weight = 0.5 * math.log1p(library.uses(assertion.label, theorem.index))
            self._patterns.append((pattern, weight, bool(assertion.disjoint)))

    def propose(self, goals: str, n: int) -> list[Candidate]:
        """At most `n` candidates; a single one where it closes a goal without metavariables at no cost."""
        lines = goals.splitlines()[1 + len(self.theorem.essential) :]
        if not lines:
            return []
        tokens = lines[0].split()
        ids = {name: i for i, name in enumerate(dict.fromkeys(t for t in tokens if t.startswith("&")), 1)}
        types = {i: name[1:].rstrip("0123456789") for name, i in ids.items()}
        try:
            goal = self.library.grammar.parse(tokens, ids)
        except MetamathError:
            return []
        ranked: list[tuple[float, str]] = []
        for hypothesis in self.theorem.essential:
            bindings: Bindings = {}
            if unify(goal, self.library.grammar.parse(hypothesis.expression), bindings, types, self.library.type_of):
                if goal.ground:
                    return [Candidate(hypothesis.label, 0.0)]
                ranked.append((1.0, hypothesis.label))
        for pattern, weight, has_disjoint in self._patterns:
            first = len(ids) + 1
            fresh = {name: Term(first + i) for i, name in enumerate(pattern.variables)}
            bindings = {}
            all_types = {**types, **dict(zip(range(first, first + len(fresh)), pattern.types, strict=True))}
            if pattern.conclusion.head != goal.head:
                continue
            try:
                if not unify(goal, instantiate(pattern.conclusion, fresh), bindings, all_types, self.library.type_of):
                    continue
                if goal.ground and not pattern.essential and not has_disjoint:
                    return [Candidate(pattern.label, 0.0)]
                new = [resolve(instantiate(e, fresh), bindings) for e in pattern.essential]
            except MetamathError:
                continue  # the result would be too large
            free = sum(1 for i in range(first, first + len(fresh)) if i not in bindings)
            size = sum(g.size for g in new)
            ranked.append((weight - 0.5 * len(new) - 2.0 * free - 0.2 * size, pattern.label))
        if not ranked:
            return []
        top = max(weight for weight, _ in ranked)
        total = top + math.log(sum(math.exp(weight - top) for weight, _ in ranked))
        ranked.sort(key=lambda item: (-item[0], item[1]))
        return [Candidate(label, weight - total) for weight, label in ranked[:n]]
