"""Best-first search on invented proof trees: order, merging, budgets, and trust in the check alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from modules.verification.contracts import Verdict
from modules.verification.proof_search import SearchLimits, best_first_search, rank_candidates
from modules.verification.proposers import Candidate
from modules.verification.provers.base import MissingLibraryError, Prover, StatementError, Step

Edges = dict[tuple[str, str], str]


class TreeProver:
    """States are names; edges (state, tactic) -> state; "" is the proved state; unknown edges are errors."""

    name = "tree"

    def __init__(self, edges: Edges, accept: bool = True, start_error: Exception | None = None) -> None:
        self.edges, self.accept, self.start_error = edges, accept, start_error
        self.applied: list[tuple[str, str]] = []
        self.checked: list[tuple[str, ...]] = []
        self.closed = 0

    def start(self, statement: str) -> str:
        if self.start_error:
            raise self.start_error
        return statement

    def goals(self, state: str) -> str:
        return state.split("#")[0]  # "a#1" and "a#2" are different states with the same goals

    def apply(self, state: str, tactic: str) -> Step:
        self.applied.append((state, tactic))
        after = self.edges.get((state, tactic))
        if after is None:
            return Step("error", message="no such edge")
        return Step("proved" if after == "" else "open", after)

    def check(self, statement: str, proof: Sequence[str]) -> Verdict:
        self.checked.append(tuple(proof))
        return Verdict(self.accept, "accepted" if self.accept else "cheat", 0.0)

    def close(self) -> None:
        self.closed += 1


class TableProposer:
    def __init__(self, table: dict[str, list[tuple[str, float]]]) -> None:
        self.table = table
        self.asked: list[str] = []

    def propose(self, goals: str, n: int) -> list[Candidate]:
        self.asked.append(goals)
        return [Candidate(*item) for item in self.table.get(goals, [])]


def test_tree_prover_meets_the_protocol() -> None:
    assert isinstance(TreeProver({}), Prover)


def test_states_are_expanded_by_accumulated_score() -> None:
    # a: -1 then -1 (total -2) must be expanded before b at -1.5; c at -3 last.
    edges = {("r", "a"): "A", ("r", "b"): "B", ("A", "aa"): "AA", ("A", "c"): "C", ("B", "end"): ""}
    table = {
        "r": [("b", -1.5), ("a", -1.0)],
        "A": [("c", -2.0), ("aa", -0.2)],
        "AA": [("nothing", -1.0)],
        "B": [("end", -0.5)],
    }
    prover, proposer = TreeProver(edges), TableProposer(table)
    result = best_first_search(prover, "r", proposer)
    assert proposer.asked == ["r", "A", "AA", "B"]
    assert result.proved
    assert result.proof == ("b", "end")
    assert result.score == pytest.approx(-2.0)
    assert (result.expansions, result.tactic_calls) == (4, 6)
    assert prover.checked == [("b", "end")]
    assert result.outcomes == {"open": 4, "error": 1, "proved": 1}
    assert prover.closed == 1


def test_equal_goals_are_pushed_once_even_before_any_is_expanded() -> None:
    edges = {("r", "x"): "same#1", ("r", "y"): "same#2", ("r", "z"): "r#again"}
    proposer = TableProposer({"r": [("x", -1), ("y", -2), ("z", -3)]})
    result = best_first_search(TreeProver(edges), "r", proposer)
    assert proposer.asked == ["r", "same"]
    assert result.outcomes == {"open": 1, "duplicate": 2}
    assert result.status == "exhausted"


def test_a_rejected_proof_never_counts_and_the_search_goes_on() -> None:
    edges = {("r", "cheat"): "", ("r", "go"): "A", ("A", "cheat"): ""}
    table = {"r": [("cheat", -0.1), ("go", -1)], "A": [("cheat", -0.1)]}
    result = best_first_search(TreeProver(edges, accept=False), "r", TableProposer(table))
    assert not result.proved
    assert result.proof is None
    assert result.outcomes == {"rejected": 2, "open": 1}
    assert result.verdict == Verdict(False, "cheat", 0.0)


def test_budgets_end_the_search() -> None:
    endless = {(str(i), "next"): str(i + 1) for i in range(50)}
    table = {str(i): [("next", -1.0)] for i in range(50)}
    result = best_first_search(TreeProver(endless), "0", TableProposer(table), SearchLimits(max_expansions=7))
    assert (result.status, result.expansions, result.tactic_calls) == ("max_expansions", 7, 7)
    ticks = iter(range(1000))
    result = best_first_search(
        TreeProver(endless), "0", TableProposer(table), SearchLimits(wall_seconds=10), clock=lambda: float(next(ticks))
    )
    assert result.status == "wall"
    assert result.expansions < 7
    proposer = TableProposer({"r": [(f"t{i}", -i) for i in range(20)]})
    assert best_first_search(TreeProver({}), "r", proposer, SearchLimits(candidates=4)).tactic_calls == 4


def test_unusable_statements_are_results_of_their_own() -> None:
    missing = TreeProver({}, start_error=MissingLibraryError("library X is not installed"))
    result = best_first_search(missing, "r", TableProposer({}))
    assert (result.status, result.reason) == ("missing_library", "library X is not installed")
    assert missing.closed == 1
    assert best_first_search(TreeProver({}, start_error=StatementError("no")), "r", TableProposer({})).status == (
        "bad_statement"
    )


def test_ties_are_broken_by_order_of_discovery() -> None:
    edges = {("r", t): t.upper() for t in "abcd"}
    table = {"r": [(t, -1.0) for t in "abcd"]}
    runs = []
    for _ in range(2):
        proposer = TableProposer(table)
        best_first_search(TreeProver(edges), "r", proposer)
        runs.append(proposer.asked)
    assert runs[0] == runs[1] == ["r", "A", "B", "C", "D"]


def test_candidates_are_merged_ranked_and_cleaned() -> None:
    given = [("lia", -2.0), (" lia ", -1.0), ("nan", math.nan), ("", -0.5), ("a  b", -3.0), ("up", 0.7)]
    given.append(("off", -math.inf))
    assert rank_candidates([Candidate(*c) for c in given], 10) == [("up", 0.0), ("lia", -1.0), ("a b", -3.0)]
    assert rank_candidates([Candidate(*c) for c in given], 1) == [("up", 0.0)]


@pytest.mark.parametrize("field", ["max_expansions", "wall_seconds", "candidates"])
def test_limits_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be > 0, got 0"):
        SearchLimits(**{field: 0})
