"""Proposers: scripts, the fixed list, few-shot prompts and what is read out of completions."""

from __future__ import annotations

import math

import pytest

from modules.verification.proposers import (
    COQ_EXAMPLES,
    COQ_TACTICS,
    METAMATH_EXAMPLES,
    Candidate,
    FewShotPrompt,
    FixedListProposer,
    Proposer,
    SampledProposer,
    ScriptedProposer,
    UnionProposer,
    first_coq_sentence,
    first_line,
    mean_log_probability,
)
from modules.verification.provers.coq_grammar import check_tactic


def test_fixed_list_holds_27_accepted_tactics_with_normalised_priors() -> None:
    candidates = FixedListProposer().propose("any", 100)
    assert len(COQ_TACTICS) == len(candidates) == len({check_tactic(t) for t, _ in candidates}) == 27
    assert sum(math.exp(score) for _, score in candidates) == pytest.approx(1.0)
    assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)
    assert len(FixedListProposer().propose("any", 5)) == 5


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_fixed_list_weights_must_be_positive(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of 'lia' must be finite and > 0"):
        FixedListProposer([("lia", weight)])


def test_script_follows_the_goals() -> None:
    proposer = ScriptedProposer({"x = x": ["reflexivity"], "": ["intros", "split"]})
    assert proposer.propose("goal x = x", 9) == [Candidate("reflexivity", -0.01)]
    assert [c.tactic for c in proposer.propose("other", 9)] == ["intros", "split"]
    assert [c.tactic for c in ScriptedProposer(["a", "b", "c"]).propose("", 2)] == ["a", "b"]
    assert ScriptedProposer({"never": ["a"]}).propose("x", 3) == []


def test_prompt_shows_three_examples_then_the_goals() -> None:
    prompt = FewShotPrompt("Coq 8.16", COQ_EXAMPLES).render("1 goal\n\n  x = x")
    assert prompt.count("Tactic:\n---\n") == len(COQ_EXAMPLES) + 1 == 4
    assert prompt.endswith("Goals:\n---\n1 goal\n\n  x = x\n---\nTactic:\n---\n")
    for goals, tactic in COQ_EXAMPLES:
        assert f"{goals}\n---\nTactic:\n---\n{tactic}\n---\n" in prompt
        check_tactic(tactic)
    assert len(METAMATH_EXAMPLES) == 3


def test_long_goals_keep_their_end() -> None:
    prompt = FewShotPrompt("Coq", [], max_goal_chars=10).render("a" * 50 + "conclusion")
    assert "...conclusion\n" in prompt
    assert "aconclusion" not in prompt
    with pytest.raises(ValueError, match="max_goal_chars must be >= 1"):
        FewShotPrompt("Coq", [], max_goal_chars=0)


@pytest.mark.parametrize(
    ("completion", "tactic"),
    [
        ("intros x.\n---\nGoals:", "intros x."),
        ("  - intros x. lia.", "intros x."),
        ("lia", "lia"),
        ("\n\nlia\nmore", "lia"),
        ("(* think. *) nra.", "nra."),
        ("", ""),
        ("\n---\nlia.", ""),
        ('idtac "open', 'idtac "open'),
    ],
)
def test_first_coq_sentence(completion: str, tactic: str) -> None:
    assert first_coq_sentence(completion) == tactic


def test_first_line_stops_at_the_separator() -> None:
    assert first_line("\n ax-r2 b := c \n more") == "ax-r2 b := c"
    assert first_line("---\nid") == ""


def test_sampled_proposer_passes_prompt_and_scores_through() -> None:
    asked: list[tuple[list[str], int]] = []

    def generate(prompts: list[str], n: int) -> list[list[tuple[str, float]]]:
        asked.append((prompts, n))
        return [[("lia.\n---", -0.25), ("- nra. ring.", -0.5), ("", -0.1)]]

    proposer = SampledProposer(generate)
    assert isinstance(proposer, Proposer)
    assert proposer.propose("1 goal", 32) == [Candidate("lia.", -0.25), Candidate("nra.", -0.5)]
    assert asked == [([FewShotPrompt("Coq 8.16", COQ_EXAMPLES).render("1 goal")], 32)]
    assert proposer.stop == "\n---"
    with pytest.raises(ValueError, match="returned 0 lists for 1 prompt"):
        SampledProposer(lambda prompts, n: []).propose("1 goal", 1)


def test_union_keeps_every_candidate() -> None:
    union = UnionProposer(ScriptedProposer(["a"]), ScriptedProposer(["b", "a"]))
    assert [c.tactic for c in union.propose("", 5)] == ["a", "b", "a"]
    with pytest.raises(ValueError, match="at least one"):
        UnionProposer()


def test_score_is_the_mean_log_probability() -> None:
    assert mean_log_probability(-6.0, 4) == -1.5
    with pytest.raises(ValueError, match="tokens must be >= 1"):
        mean_log_probability(-1.0, 0)
