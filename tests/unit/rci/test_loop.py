"""The pure loop: prefix property, calls, stop rules, retry, and many loops driven at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.language.backends.base import Reply, Request
from modules.rci.driving import drive, watched
from modules.rci.loop import Context, RCIPrompts, Sampling, rci_loop, retry_loop

PROMPTS = RCIPrompts("CRITIQUE", "IMPROVE", " ", "`")


def played(loop, answer):
    """Run a loop with ``answer(request)``; what it returned, and all its requests."""
    requests = []

    def generate(effects):
        requests.extend(request for _, request in effects)
        return [Reply(answer(request)) for _, request in effects]

    ((_, outcome),) = drive([loop], 1, {Request: generate})
    return outcome, requests


def right(*answers):
    """A check that passes these answers, without effects."""

    def check(answer):
        yield from ()
        return answer in answers

    return check


@settings(deadline=None)  # a loaded machine is no fault
@given(st.integers(0, 4), st.booleans())
def test_contexts_only_grow_and_show_draft_and_critique_verbatim(rounds, explicit):
    said = iter(f"text {i}" for i in range(100))
    context = Context().say("question")
    outcome, requests = played(
        rci_loop(context, Sampling(), PROMPTS, rounds=rounds, explicit=explicit), lambda _: next(said)
    )
    for before, after in zip(requests, requests[1:], strict=False):
        assert after.turns[: len(before.turns)] == before.turns
        assert after.text.startswith(before.text)
    assert len(requests) == 1 + rounds * (2 if explicit else 1) == outcome.calls
    assert len(outcome.answers) == rounds + 1
    for number, draft in enumerate(outcome.answers[:-1]):
        assert f" {draft}`" in requests[1 + number * (2 if explicit else 1)].text
    for critique in outcome.critiques:
        assert f"CRITIQUE {critique}IMPROVE" in requests[-1].text
    assert len(outcome.critiques) == (rounds if explicit else 0)
    assert len({request.seed for request in requests}) == len(requests)


def test_a_model_that_always_flips_is_back_at_its_start_after_two_rounds():
    def flip(request):
        answers = [turn.text.strip() for turn in request.turns if turn.role == "assistant"]
        return "no" if answers and answers[-1] == "yes" else "yes"

    loop = rci_loop(Context().say("q"), Sampling(), PROMPTS, rounds=2, explicit=False)
    assert played(loop, flip)[0].answers == ["yes", "no", "yes"]


@pytest.mark.parametrize(("wanted", "calls"), [("a0", 1), ("a1", 3), ("a2", 5), ("never", 7)])
def test_stop_by_the_oracle(wanted, calls):
    def answer(request):
        number = sum(turn.text == "IMPROVE" for turn in request.turns)
        return "critique" if request.turns[-1].text == "CRITIQUE" else f"a{number}"

    loop = rci_loop(Context().say("q"), Sampling(), PROMPTS, rounds=3, stop="oracle", check=right(wanted))
    outcome, requests = played(loop, answer)
    assert len(requests) == outcome.calls == calls
    # an answer is right at the end exactly if one of the rounds was
    assert (outcome.answer == wanted) == (wanted in outcome.answers)
    assert outcome.stopped_by == ("rounds" if wanted == "never" else "oracle")


def test_stop_when_a_round_repeats_the_answer():
    loop = rci_loop(Context().say("q"), Sampling(), PROMPTS, rounds=5, stop="unchanged")
    outcome, requests = played(loop, lambda _: "same")
    assert outcome.answers == ["same", "same"]
    assert outcome.stopped_by == "unchanged"
    assert len(requests) == 3


def test_retry_takes_the_first_that_passes_and_its_first_sample_is_the_direct_answer():
    said = iter(["bad", "bad", "good", "late"])
    outcome, requests = played(
        retry_loop(Context(seed=7).say("q"), Sampling(temperature=1.0), calls=4, check=right("good")),
        lambda _: next(said),
    )
    assert outcome.answers == ["bad", "bad", "good"]
    assert outcome.stopped_by == "verifier"
    assert len({request.seed for request in requests}) == 3
    assert len({request.turns for request in requests}) == 1
    _, direct = played(rci_loop(Context(seed=7).say("q"), Sampling(temperature=1.0), PROMPTS, rounds=0), lambda _: "x")
    assert direct[0] == requests[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rci_loop(Context(), Sampling(), PROMPTS, rounds=-1), "rounds must be >= 0"),
        (lambda: rci_loop(Context(), Sampling(), PROMPTS, rounds=1, stop="sometimes"), "stop must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: rci_loop(Context(), Sampling(), PROMPTS, rounds=1, stop="oracle"), "needs a check"),
        (lambda: rci_loop(Context(), Sampling(), RCIPrompts(""), rounds=1), "needs a critique prompt"),
        (lambda: rci_loop(Context(), Sampling(), RCIPrompts("c", ""), rounds=1), "needs an improve prompt"),
        (lambda: retry_loop(Context(), Sampling(), calls=0), "calls >= 1"),
        (lambda: retry_loop(Context(), Sampling(), calls=2), "temperature 0"),
    ],
)
def test_rules_that_can_not_be_followed_are_named_at_once(call, message):
    with pytest.raises(ValueError, match=message):
        next(call())


def test_many_loops_are_asked_in_batches_and_give_what_each_gives_alone():
    def loop(number):
        return rci_loop(Context(seed=number).say(f"q{number}"), Sampling(), PROMPTS, rounds=number % 3)

    def answer(request):
        return f"{request.text[-9:]}/{request.seed % 97}"

    batches = []

    def generate(effects):
        batches.append(len(effects))
        return [Reply(answer(request)) for _, request in effects]

    together = dict(drive((loop(number) for number in range(10)), 4, {Request: generate}))
    assert max(batches) == 4
    assert sum(batches) == sum(1 + 2 * (number % 3) for number in range(10))
    assert {number: outcome.answers for number, outcome in together.items()} == {
        number: played(loop(number), answer)[0].answers for number in range(10)
    }


def test_loops_are_closed_when_the_driver_stops_early():
    closed = []

    def loop(number):
        try:
            yield Request((), seed=number)
        finally:
            closed.append(number)

    def fail(_):
        raise RuntimeError("endpoint down")

    with pytest.raises(RuntimeError, match="endpoint down"):
        list(drive([loop(0), loop(1), loop(2)], 2, {Request: fail}))
    assert sorted(closed) == [0, 1]
    with pytest.raises(TypeError, match="Request, which nothing here does"):
        list(drive([loop(0)], 1, {}))
    with pytest.raises(ValueError, match="must be >= 1"):
        list(drive([], 0, {}))


def test_a_watched_loop_shows_every_effect_with_its_result():
    seen = []
    loop = rci_loop(Context().say("q"), Sampling(), PROMPTS, rounds=1)
    outcome, requests = played(watched(loop, lambda effect, result: seen.append((effect, result.text))), lambda _: "y")
    assert [effect for effect, _ in seen] == requests
    assert [text for _, text in seen] == ["y"] * 3
    assert outcome.calls == 3
