"""Where the next tactic comes from: a script, a fixed list, or a language model's samples.

A proposer sees goal text only and returns candidates with log-probabilities (or log-priors), so every proposer serves
every prover and none is trusted: provers refuse what is not a proof step, and check what is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from modules.verification.provers.coq_grammar import CoqSyntaxError, sentences


class Candidate(NamedTuple):
    """A tactic and its score: log-probability per token, or log-prior."""

    tactic: str
    score: float


@runtime_checkable
class Proposer(Protocol):
    """Suggests tactics for the goals of one state."""

    def propose(self, goals: str, n: int) -> list[Candidate]:
        """At most about `n` candidates, in any order."""
        ...


class ScriptedProposer:
    """Replays tactics: either the same for every goal, or by a mapping from a piece of goal text.

    Args:
        script: tactics in order (scores fall with the position), or {text to find in the goals: tactics}; with a
            mapping, the first key found decides and "" matches all goals.
    """

    def __init__(self, script: Sequence[str] | Mapping[str, Sequence[str]]) -> None:
        self._script = dict(script) if isinstance(script, Mapping) else {"": list(script)}

    def propose(self, goals: str, n: int) -> list[Candidate]:
        for key, tactics in self._script.items():
            if key in goals:
                return [Candidate(tactic, -0.01 * (i + 1)) for i, tactic in enumerate(tactics[:n])]
        return []


COQ_TACTICS: tuple[tuple[str, float], ...] = (
    ("intros", 12.0),
    ("lia", 8.0),
    ("lra", 8.0),
    ("nra", 6.0),
    ("nia", 6.0),
    ("reflexivity", 6.0),
    ("split", 5.0),
    ("subst", 5.0),
    ("field", 4.0),
    ("ring", 4.0),
    ("intuition (try lra; try lia)", 4.0),
    ("vm_compute; reflexivity", 3.0),
    ("simpl in *", 3.0),
    ("auto", 2.0),
    ("congruence", 2.0),
    ("discriminate", 2.0),
    ("tauto", 2.0),
    ("firstorder", 1.0),
    ("intuition lra", 1.0),
    ("field_simplify_eq", 1.0),
    ("ring_simplify", 1.0),
    ("f_equal", 1.0),
    ("constructor", 1.0),
    ("left", 1.0),
    ("right", 1.0),
    ("compute; lia", 1.0),
    ("compute; lra", 1.0),
)
"""The 27 tactics of the baseline without a language model, with prior weights (ours, set before any test run)."""


class FixedListProposer:
    """The same list for every goal: the baseline below which a prover score says nothing about the model.

    Args:
        tactics: (tactic, weight > 0); scores are the logarithms of the normalised weights.
    """

    def __init__(self, tactics: Sequence[tuple[str, float]] = COQ_TACTICS) -> None:
        if not tactics:
            raise ValueError("FixedListProposer: tactics must not be empty")
        for tactic, weight in tactics:
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"FixedListProposer: weight of '{tactic}' must be finite and > 0, got {weight}")
        total = sum(weight for _, weight in tactics)
        ranked = sorted(tactics, key=lambda item: -item[1])
        self._candidates = [Candidate(tactic, math.log(weight / total)) for tactic, weight in ranked]

    def propose(self, goals: str, n: int) -> list[Candidate]:
        return self._candidates[:n]


COQ_EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "1 goal\n\n  ============================\n  forall a b : nat, a + b = 7 -> a <= 7",
        "intros a b total.",
    ),
    (
        "1 goal\n\n  x, y : R\n  sum : (x + y = 5)%R\n  diff : (x - y = 1)%R\n"
        "  ============================\n  (x = 3)%R",
        "lra.",
    ),
    (
        "1 goal\n\n  n : nat\n  small : n < 4\n  even : Nat.even n = true\n"
        "  ============================\n  n = 0 \\/ n = 2",
        "destruct n as [|[|[|[|n]]]]; simpl in *; try discriminate; lia.",
    ),
)
"""Three worked goal states for the few-shot prompt (Llemma's formal2formal format; text ours)."""

METAMATH_EXAMPLES: tuple[tuple[str, str], ...] = (
    ("1 goal\n|- a = a", "id"),
    ("1 goal\nh1: |- a = b\n|- b = a", "ax-r1"),
    ("1 goal\nh1: |- a = b\nh2: |- b = c\n|- a = c", "ax-r2 b := b"),
)


class FewShotPrompt:
    """Instruction, examples of goal state and next tactic, then the goals at hand.

    Args:
        prover: name in the instruction ("Coq 8.16", "Metamath").
        examples: (goal state, next tactic) pairs.
        max_goal_chars: longer goal text keeps its end, where the conclusions stand.
    """

    separator = "---"

    def __init__(self, prover: str, examples: Sequence[tuple[str, str]], max_goal_chars: int = 4000) -> None:
        if max_goal_chars < 1:
            raise ValueError(f"FewShotPrompt: max_goal_chars must be >= 1, got {max_goal_chars}")
        self.prover, self.examples, self.max_goal_chars = prover, tuple(examples), max_goal_chars

    def render(self, goals: str) -> str:
        """The prompt; it ends where the model is to write the tactic and the stop text is `separator`."""
        line = self.separator
        shown = goals if len(goals) <= self.max_goal_chars else "..." + goals[-self.max_goal_chars :]
        head = f"Read the goals of a proof in {self.prover} and write the one tactic to apply next.\n"
        shots = "".join(
            f"\nGoals:\n{line}\n{state}\n{line}\nTactic:\n{line}\n{tactic}\n{line}\n" for state, tactic in self.examples
        )
        return f"{head}{shots}\nGoals:\n{line}\n{shown}\n{line}\nTactic:\n{line}\n"


def first_line(text: str) -> str:
    """First non-empty line of a completion up to the separator (Metamath: one tactic a line)."""
    body = text.split(FewShotPrompt.separator)[0]
    return next((line.strip() for line in body.splitlines() if line.strip()), "")


def first_coq_sentence(text: str) -> str:
    """First tactic sentence of a completion, leading bullets skipped; the first line if there is no full stop."""
    body = text.split("\n" + FewShotPrompt.separator)[0]
    try:
        for sentence in sentences(body):
            if sentence.kind == "sentence":
                return sentence.text
    except CoqSyntaxError:
        return first_line(body)
    return ""


class SampledProposer:
    """Tactics sampled from a language model with a few-shot prompt.

    Args:
        generate: (prompts, n) -> for each prompt up to n completions (text, score), where score is the sum of the
            completion's token log-probabilities divided by its number of tokens. Completions should stop at
            `stop`; text beyond it is cut here anyway.
        prompt: template; default Coq with `COQ_EXAMPLES`.
        extract: completion -> one tactic ("" drops it).
    """

    def __init__(
        self,
        generate: Callable[[list[str], int], list[list[tuple[str, float]]]],
        prompt: FewShotPrompt | None = None,
        extract: Callable[[str], str] = first_coq_sentence,
    ) -> None:
        self.generate, self.extract = generate, extract
        self.prompt = prompt or FewShotPrompt("Coq 8.16", COQ_EXAMPLES)

    @property
    def stop(self) -> str:
        """Text at which generation should end."""
        return "\n" + self.prompt.separator

    def propose(self, goals: str, n: int) -> list[Candidate]:
        answers = self.generate([self.prompt.render(goals)], n)
        if len(answers) != 1:
            raise ValueError(f"SampledProposer: generate returned {len(answers)} lists for 1 prompt")
        candidates = [Candidate(self.extract(text), float(score)) for text, score in answers[0]]
        return [candidate for candidate in candidates if candidate.tactic]


class UnionProposer:
    """Candidates of several proposers together; the same tactic keeps its best score (see `rank_candidates`)."""

    def __init__(self, *proposers: Proposer) -> None:
        if not proposers:
            raise ValueError("UnionProposer: at least one proposer is needed")
        self._proposers = proposers

    def propose(self, goals: str, n: int) -> list[Candidate]:
        return [candidate for proposer in self._proposers for candidate in proposer.propose(goals, n)]


def mean_log_probability(total: float, tokens: int) -> float:
    """Score of a completion: sum of token log-probabilities / number of tokens. Raises ValueError for no tokens."""
    if tokens < 1:
        raise ValueError(f"mean_log_probability: tokens must be >= 1, got {tokens}")
    return total / tokens
