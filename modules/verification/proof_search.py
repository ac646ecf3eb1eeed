"""Best-first proof search over a step-wise prover (Llemma, Azerbayev et al. 2024, section 3.3; Polu & Sutskever 2020).

    push (0, root);  seen = {goals(root)}
    repeat up to max_expansions, within the wall limit:
        (cost, state, path) = pop the lowest cost
        for tactic, score in proposer(goals(state)):                  score = sum log p / tokens
            error      -> next
            proved     -> check from nothing; accepted -> done
            new goals  -> push (cost - score, state', path + [tactic])

A state is marked seen when it is *pushed*: marking on pop (as the paper's code does) lets duplicates fill the
queue. The search is deterministic given proposer and prover: ties are broken by order of discovery.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from modules.verification.contracts import Verdict
from modules.verification.proposers import Candidate, Proposer
from modules.verification.provers.base import MissingLibraryError, Prover, StatementError

SearchStatus = Literal["proved", "exhausted", "max_expansions", "wall", "missing_library", "bad_statement"]


@dataclass(frozen=True)
class SearchLimits:
    """Budget of one search (paper: 100 expansions, 600 s, 32 candidates). Tactic time limits belong to the prover."""

    max_expansions: int = 100
    wall_seconds: float = 600.0
    candidates: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"SearchLimits: {name} must be > 0, got {value}")


@dataclass(frozen=True)
class SearchResult:
    """Outcome of one search.

    status: "proved" only if the prover's check accepted the proof; "missing_library" and "bad_statement" say that no
    search took place, which is no failure to prove. proof: tactics from the root, None unless proved. score:
    accumulated normalised log-probability of the proof. outcomes: how many tactics ended in each `StepStatus`, and
    "duplicate" and "rejected" (no goals left, yet not accepted by the check). verdict: of the accepted, else of the
    last rejected proof.
    """

    status: SearchStatus
    reason: str
    proof: tuple[str, ...] | None = None
    score: float | None = None
    expansions: int = 0
    tactic_calls: int = 0
    wall_seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    verdict: Verdict | None = None

    @property
    def proved(self) -> bool:
        return self.status == "proved"


def rank_candidates(candidates: list[Candidate], n: int) -> list[Candidate]:
    """At most `n` distinct candidates, best score first (ties: first given), blanks collapsed, NaN scores dropped.

    A score above 0 is no log-probability and would make longer paths cheaper; it counts as 0.
    """
    best: dict[str, float] = {}
    for tactic, score in candidates:
        key = " ".join(tactic.split())
        if key and not math.isnan(score):
            best[key] = max(best.get(key, -math.inf), min(score, 0.0))
    ranked = sorted(best.items(), key=lambda item: -item[1])
    return [Candidate(tactic, score) for tactic, score in ranked[:n] if score > -math.inf]


def best_first_search(
    prover: Prover[Any],
    statement: Any,
    proposer: Proposer,
    limits: SearchLimits | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Search for a proof of `statement` and have the prover check it.

    Args:
        prover: session is opened on `statement` and closed at the end.
        proposer: gives candidates for the goals of one state.
        clock: seconds, for the wall limit.
    Returns:
        SearchResult. Missing libraries and unusable statements are results, not exceptions.
    Raises:
        ProverUnavailableError: the prover is not installed (nothing was tried).
    """
    limits = limits or SearchLimits()
    began = clock()
    try:
        root = prover.start(statement)
        return _search(prover, statement, root, proposer, limits, clock, began)
    except MissingLibraryError as error:
        return SearchResult("missing_library", str(error), wall_seconds=clock() - began)
    except StatementError as error:
        return SearchResult("bad_statement", str(error), wall_seconds=clock() - began)
    finally:
        prover.close()


def _search(
    prover: Prover[Any],
    statement: Any,
    root: Any,
    proposer: Proposer,
    limits: SearchLimits,
    clock: Callable[[], float],
    began: float,
) -> SearchResult:
    order = itertools.count()
    queue: list[tuple[float, int, Any, tuple[str, ...]]] = [(0.0, next(order), root, ())]
    seen = {prover.goals(root)}
    outcomes: Counter[str] = Counter()
    expansions = calls = 0
    verdict: Verdict | None = None

    def result(status: SearchStatus, reason: str, **found: Any) -> SearchResult:
        return SearchResult(
            status,
            reason,
            expansions=expansions,
            tactic_calls=calls,
            wall_seconds=clock() - began,
            outcomes=dict(outcomes),
            verdict=verdict,
            **found,
        )

    out_of_time = f"no proof within {limits.wall_seconds:g} s"
    while queue:
        if expansions >= limits.max_expansions:
            return result("max_expansions", f"no proof within {limits.max_expansions} expansions")
        if clock() - began >= limits.wall_seconds:
            return result("wall", out_of_time)
        cost, _, state, path = heapq.heappop(queue)
        expansions += 1
        proposed = proposer.propose(prover.goals(state), limits.candidates)
        for tactic, score in rank_candidates(proposed, limits.candidates):
            if clock() - began >= limits.wall_seconds:
                return result("wall", out_of_time)
            calls += 1
            step = prover.apply(state, tactic)
            if step.status == "proved":
                verdict = prover.check(statement, (*path, tactic))
                if verdict.ok:
                    outcomes["proved"] += 1
                    return result("proved", verdict.reason, proof=(*path, tactic), score=-cost + score)
                outcomes["rejected"] += 1
            elif step.status == "open":
                goals = prover.goals(step.state)
                outcomes["duplicate" if goals in seen else "open"] += 1
                if goals not in seen:
                    seen.add(goals)
                    heapq.heappush(queue, (cost - score, next(order), step.state, (*path, tactic)))
            else:
                outcomes[step.status] += 1
    return result("exhausted", "every reachable state was expanded without a proof")
