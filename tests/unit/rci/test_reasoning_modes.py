"""Conversations on reasoning questions: prompts, calls, stop rules, controls, extraction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modules.language.backends.base import Reply, Request
from modules.language.backends.scripted import ScriptedBackend
from modules.rci.driving import drive
from modules.rci.loop import RCIPrompts
from modules.rci.reasoning_modes import (
    EXEMPLARS,
    Answered,
    ReasoningMode,
    answer_question,
    read_exemplars,
    same_answer,
)

CRITIQUE = RCIPrompts().critique
ITEM = {"set": "s", "item_id": "s/0", "question": "What is 6 times 7?", "gold": "42", "kind": "number"}
THEREFORE = "\nTherefore, the answer (arabic numerals) is"


def ask(
    mode: ReasoningMode, rule: Callable[[Request], str], item: dict[str, Any] | None = None, **options: Any
) -> Answered:
    backend = ScriptedBackend(rule)
    options = {"prompts": RCIPrompts(), **options}
    loop = answer_question(item or ITEM, mode, **options)
    (_, answered), = drive([loop], 1, {Request: lambda effects: backend.generate([e for _, e in effects])})  # fmt: skip
    return answered


def in_turn(*replies: str) -> Callable[[Request], str]:
    left = list(replies)
    return lambda _: left.pop(0)


def test_zero_shot_asks_once_in_the_harness_s_words() -> None:
    answered = ask(ReasoningMode(), in_turn(" 42 dollars."))
    (call,) = answered.calls
    assert call.request.text == "Q: What is 6 times 7?\nA: The answer (arabic numerals) is"
    assert call.request.max_new_tokens == 32
    assert (answered.answer, answered.ok, answered.right) == ("42", True, [True])


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("number", THEREFORE),
        ("choice", "\nTherefore, among A through E, the answer is"),
        ("yes_no", "\nTherefore, the answer (Yes or No) is"),
    ],
)
def test_chain_of_thought_asks_twice(kind: str, line: str) -> None:
    item = {**ITEM, "kind": kind, "gold": {"number": "7", "choice": "C", "yes_no": "no"}[kind]}
    answered = ask(ReasoningMode("zero_shot_cot"), in_turn(" 3 and 4, Yes, A. \n", f" {item['gold']}."), item)
    first, second = answered.calls
    assert first.request.text == "Q: What is 6 times 7?\nA: Let's think step by step."
    assert second.request.text == f"{first.request.text} 3 and 4, Yes, A.{line}"
    assert [first.extracts, second.extracts] == [False, True]
    assert [first.request.max_new_tokens, second.request.max_new_tokens] == [256, 32]
    assert answered.ok


def test_few_shot_reads_the_answer_behind_its_mark() -> None:
    worked = read_exemplars(EXEMPLARS, "number")
    assert worked.count("Q: ") == worked.count(" The answer is ") == 8
    mode = ReasoningMode("few_shot_cot")
    answered = ask(mode, in_turn(" 6 times 7 is 42. The answer is 42.\nQ: 99"), worked=worked, stop_strings=("\nQ:",))
    assert answered.calls[0].request.text == f"{worked}Q: What is 6 times 7?\nA:"
    assert (answered.answer, len(answered.calls)) == ("42", 1)
    assert answered.calls[0].request.stop == ("\nQ:",)
    assert ask(mode, in_turn(" It is 6 and 7, so 42"), worked=worked).answer == "42"  # no mark: the last number


@pytest.mark.parametrize("kind", ["number", "choice", "yes_no"])
def test_shipped_examples_are_extracted_as_their_answers(kind: Any) -> None:
    from modules.verification.extraction import cleanse

    blocks = read_exemplars(EXEMPLARS, kind).strip().split("\n\n")
    answers = [cleanse(block.split("\nA:")[1], kind, few_shot=True) for block in blocks]
    stated = [block.rsplit("The answer is ", 1)[1].strip("().") for block in blocks]
    assert answers == stated
    assert len(blocks) == {"number": 8, "choice": 5, "yes_no": 6}[kind]
    assert len(set(answers)) >= 2


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("prompt", ["zero_shot", "zero_shot_cot", "few_shot_cot"])
def test_calls_and_append_only_contexts(prompt: Any, rounds: int, explicit: bool) -> None:
    """Calls follow the formula; each prompt holds all before it; extraction is a branch that is never seen again."""
    mode = ReasoningMode(prompt, rounds=rounds, explicit=explicit)
    answered = ask(mode, lambda request: f" thought {len(request.text)} \n")
    answer_calls, critiques = (2 if prompt == "zero_shot_cot" else 1), int(explicit)
    assert len(answered.calls) == answer_calls * (rounds + 1) + critiques * rounds
    main = [call for call in answered.calls if not call.extracts]
    extractions = [call for call in answered.calls if call.extracts]
    assert len(extractions) == (rounds + 1 if prompt == "zero_shot_cot" else 0)
    for before, after in zip(main, main[1:], strict=False):
        assert after.request.turns[: len(before.request.turns)] == before.request.turns
        said = after.request.turns[len(before.request.turns)]
        assert (said.role, said.text.strip()) == ("assistant", before.reply.text.strip())
    assert len({call.request.seed for call in answered.calls}) == len(answered.calls)
    whole = main[-1].request.turns
    for number, call in enumerate(extractions):
        turns = call.request.turns
        assert turns[-1].text == THEREFORE
        if number < rounds:
            assert whole[: len(turns) - 1] == turns[:-1]
        assert THEREFORE not in main[-1].request.text
    assert [CRITIQUE in call.request.turns[-1].text for call in main].count(True) == critiques * rounds
    assert len(answered.tried) == rounds + 1


def test_the_critique_sees_the_draft_and_the_better_answer_the_critique() -> None:
    answered = ask(ReasoningMode(rounds=1), in_turn(" 41.", "6 times 7 is not 41.", " 42."))
    assert [turn.role for turn in answered.calls[2].request.turns] == ["user", "assistant", "user", "assistant", "user"]
    assert " 41." + CRITIQUE in answered.calls[1].request.text
    assert "6 times 7 is not 41.\n\nBased on the problems you found" in answered.calls[2].request.text
    assert answered.calls[2].request.text.endswith("improve your answer.\n\nThe answer (arabic numerals) is")
    assert [call.request.max_new_tokens for call in answered.calls] == [32, 256, 32]
    assert (answered.tried, answered.right, answered.ok) == (["41", "42"], [False, True], True)
    assert answered.stopped_by == "rounds"


def flipping(request: Request) -> str:
    """Right at first and whenever the number of answers asked for so far is odd; critiques say nothing."""
    if request.text.endswith(CRITIQUE):
        return "Hm."
    return " 42." if request.text.count("The answer (arabic numerals) is") % 2 else " 41."


@pytest.mark.parametrize("rounds", range(5))
def test_a_flipping_model_returns_to_its_start_after_an_even_number_of_rounds(rounds: int) -> None:
    fixed = ask(ReasoningMode(rounds=rounds), flipping)
    assert fixed.right == [number % 2 == 0 for number in range(rounds + 1)]
    assert fixed.ok == (rounds % 2 == 0)
    oracle = ask(ReasoningMode(rounds=rounds, stop="oracle"), flipping)
    assert oracle.ok
    assert len(oracle.calls) == 1


def test_an_always_same_model_gives_what_it_gives_directly() -> None:
    direct = ask(ReasoningMode(), lambda _: " 40.")
    rci = ask(ReasoningMode(rounds=4, stop="unchanged"), lambda _: " 40.")
    assert (rci.answer, rci.calls[0]) == (direct.answer, direct.calls[0])
    assert (rci.stopped_by, len(rci.calls)) == ("unchanged", 3)


def drifting(request: Request) -> str:
    """An answer from 1 to 4 that depends on all that was said, or none."""
    value = int.from_bytes(hashlib.sha256(request.text.encode()).digest()[:4], "big") % 5
    return f" {value}." if value else " unknown"


@pytest.mark.parametrize("prompt", ["zero_shot", "zero_shot_cot", "few_shot_cot"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_oracle_stop_is_right_where_any_round_is(prompt: Any, rounds: int) -> None:
    """Identity of section 6: accuracy under oracle stop = share with any right round; and it can't fall with K."""
    items = [{**ITEM, "question": f"Question {number}?", "gold": str(1 + number % 4)} for number in range(60)]
    fixed = [ask(ReasoningMode(prompt, rounds=rounds), drifting, item) for item in items]
    oracle = [ask(ReasoningMode(prompt, rounds=rounds, stop="oracle"), drifting, item) for item in items]
    assert [any(one.right) for one in fixed] == [one.ok for one in oracle]
    shares = [sum(one.round_right(k) for one in oracle) for k in range(rounds + 1)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert sum(one.ok for one in fixed) < sum(one.ok for one in oracle)


def test_verifier_stop_goes_on_until_an_answer_can_be_read() -> None:
    replies = ("I can't tell", " no idea", "Say a number.", "six times seven", " forty-one: 41")
    mode = ReasoningMode("zero_shot_cot", rounds=3, stop="verifier")
    answered = ask(mode, in_turn(*replies))
    assert answered.tried == [None, "41"]
    assert (answered.stopped_by, len(answered.calls), answered.ok) == ("verifier", 5, False)


@pytest.mark.parametrize("prompt", ["zero_shot", "zero_shot_cot"])
def test_one_sample_and_the_first_of_many_equal_direct(prompt: Any) -> None:
    sampled = ReasoningMode(prompt, temperature=0.7)
    direct = ask(sampled, drifting, seed=5)
    for one in (replace(sampled, samples=1), replace(sampled, retry=1)):
        assert ask(one, drifting, seed=5) == direct
    three = ask(replace(sampled, samples=3), drifting, seed=5)
    assert three.calls[0].request == direct.calls[0].request
    assert three.tried[0] == direct.tried[0]
    samples = [call.request for call in three.calls if not call.extracts]
    assert len({request.seed for request in samples}) == 3
    assert len({request.turns for request in samples}) == 1


def test_self_consistency_takes_the_majority_of_those_that_answered() -> None:
    mode = ReasoningMode(samples=5, temperature=0.5)
    answered = ask(mode, in_turn(" 41", " 42", " none", " 42", " none"))
    assert (answered.tried, answered.answer) == (["41", "42", None, "42", None], "42")
    assert (answered.ok, answered.stopped_by, len(answered.calls)) == (True, "vote", 5)
    numeric = ask(ReasoningMode(samples=3, temperature=0.5), in_turn(" 41", " 42", " 42.0"), compare="numeric")
    assert numeric.answer == "42"
    assert ask(ReasoningMode(samples=3, temperature=0.5), in_turn(" 41", " 42", " 42.0")).answer == "41"


def test_retry_stops_at_the_first_answer_and_may_find_none() -> None:
    mode = ReasoningMode("zero_shot_cot", retry=3, temperature=0.5)
    answered = ask(mode, in_turn("a", " none", "b", " 40", "c", " 42"))
    assert (answered.tried, answered.answer, len(answered.calls)) == ([None, "40"], "40", 4)
    assert answered.stopped_by == "verifier"
    nothing = ask(mode, lambda _: "none")
    assert (nothing.answer, nothing.ok, len(nothing.calls)) == (None, False, 6)


def test_comparison_by_string_and_by_value() -> None:
    assert not same_answer("string", "number")("43", "43.0")
    equal = same_answer("numeric", "number")
    assert equal("43", "43.0")
    assert equal("-0.50", "-0.5")
    assert not equal("43", "43.5")
    assert not equal("-", "0")
    assert not same_answer("numeric", "choice")("A", "B")


def test_strict_choice_passes_over_a_capital_a_in_prose() -> None:
    item = {**ITEM, "kind": "choice", "gold": "D"}
    reply = " likely this: A dog is meant, so (D)."
    assert ask(ReasoningMode(), in_turn(reply), item).answer == "A"
    assert ask(ReasoningMode(strict_choice=True), in_turn(reply), item).answer == "D"


def test_tokens_are_summed_over_all_calls() -> None:
    loop = answer_question(ITEM, ReasoningMode("zero_shot_cot"), prompts=RCIPrompts())
    replies = iter([Reply("think", "stop", 10, 3), Reply("42", "stop", 20, 1)])
    ((_, answered),) = drive([loop], 1, {Request: lambda effects: [next(replies) for _ in effects]})
    assert (answered.prompt_tokens, answered.completion_tokens) == (30, 4)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({"samples": 3}, r"mode 'm': samples = 3 at temperature 0 repeats one answer"),
        ({"retry": 2}, r"mode 'm': retry = 2 at temperature 0"),
        ({"rounds": -1}, r"mode 'm': rounds must be >= 0"),
        ({"rounds": 1, "stop": "never"}, r"mode 'm': stop must be one of fixed, oracle"),
        ({"rounds": 1, "samples": 2, "temperature": 1.0}, r"rounds and samples are set"),
        ({"prompt": "few_shot"}, r"prompt must be one of zero_shot, zero_shot_cot, few_shot_cot"),
        ({"temperature": -1.0}, r"temperature must be >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"answer_tokens": 0}, r"answer_tokens must be >= 1"),
    ],
)
def test_modes_that_cannot_be_followed_are_refused(mode: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningMode(**mode).check("m", RCIPrompts())


def test_rounds_need_a_critique_prompt() -> None:
    with pytest.raises(ValueError, match=r"mode 'm': rounds > 0 needs a critique prompt"):
        ReasoningMode(rounds=1).check("m", RCIPrompts(critique=""))
    ReasoningMode(rounds=1, explicit=False).check("m", RCIPrompts(critique=""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- question: a\n  answer: b\n", "example 1 must hold the texts answer, question, reasoning"),
        ("- {question: a, reasoning: b, answer: 4}\n", "example 1"),
        ("[]", "must hold a list"),
        ("a: [", "not valid YAML"),
        (None, "is no file"),
    ],
)
def test_bad_examples_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "number.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"number\.yaml.*{message}"):
        read_exemplars(tmp_path, "number")
