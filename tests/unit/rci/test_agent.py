"""The computer agent on pages without a browser: what it asks, how often, and what comes of it."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import asdict, replace
from typing import Any

import pytest
from fake_pages import FakePages, play, requests, where
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.contracts.browsing import ActionPrompts, EpisodeSpec
from modules.language.backends.base import Request
from modules.rci.agent import STEP_CAP, Act, Agent, Strategy
from modules.rci.prompting import PromptLibrary

DIRECT = Strategy(erci=-1, irci=0, state_grounding=False)
DEFAULT = PromptLibrary("default")
AGENT = Agent(DEFAULT, seed=3)
PROMPTS = DEFAULT["some-task"]  # without a file of its own: the defaults
SPEC = EpisodeSpec("some-task", "7")
SAY = "please click the right button"


def steps(*texts: str) -> FakePages:
    return FakePages(lambda _: texts)


def right(pages: FakePages) -> Any:
    """A model that knows the right instruction, as a plan or as a step."""

    def answer(request: Request) -> str:
        spec, done = where(request)
        return "\n".join(pages.script(spec)) if plans(request) else pages.script(spec)[done]

    return answer


def plans(request: Request) -> bool:
    """Whether a plan, or a critique of one, is asked for."""
    return any(turn.text == PROMPTS.plan for turn in request.turns)


def said(request: Request) -> list[str]:
    """What the model said before, in this conversation."""
    return [turn.text for turn in request.turns if turn.role == "assistant"]


# ------------------------------------------------------------------------------------------------------ what is asked


def test_with_everything_off_a_step_is_one_question_in_these_words():
    pages = steps("clickxpath //a", "type {goal}", "press enter")
    (record,) = play(AGENT, DIRECT, [SPEC], pages, right(pages))
    asked = requests(pages)
    assert record.result.success
    assert record.result.strict
    assert record.result.calls == record.result.steps == len(asked) == 3
    base = PROMPTS.base.split("{kinds}")
    forms = "\n".join(PROMPTS.describe[kind] for kind in PROMPTS.kinds)
    for number, request in enumerate(asked):
        assert request.turns[0].role == "system"
        assert [turn.role for turn in request.turns[1:]] == ["user"] * (len(request.turns) - 1)
        assert request.text == (
            "You are a helpful assistant." + base[0] + forms + base[1]
            + f"This is the HTML of the page:\n[at some-task 7 {number}]\nTask: do it\n"
            + ("", "Already executed:\nclickxpath //a\n", "Already executed:\nclickxpath //a\ntype {goal}\n")[number]
            + ("The first instruction is `", "The previous instruction was `clickxpath //a`. The 2nd instruction is `",
               "The previous instruction was `type {goal}`. The 3rd instruction is `")[number]
        )  # fmt: skip
    assert record.result.prompt_tokens == sum(len(request.text) for request in asked)
    assert record.result.completion_tokens == 3


@pytest.mark.parametrize(
    "same", [replace(DIRECT, retry=1), replace(DIRECT, vote=1), replace(DIRECT, implicit_plan=True)]
)
def test_one_sample_without_rounds_is_direct_whatever_it_is_called(same):
    logs = []
    for strategy in (DIRECT, same):
        pages = steps("clickxpath //a", "press enter")
        play(AGENT, strategy, [SPEC], pages, right(pages))
        logs.append(pages.log)
    assert logs[0] == logs[1]
    assert len(requests(pages)) == 2


def test_exemplars_are_shown_to_the_planner_or_where_there_is_none_to_the_actor():
    shown = DEFAULT["click-button"].exemplars[0]["plan"]
    for strategy, expected in ((DIRECT, [True]), (replace(DIRECT, erci=0), [True, False])):
        pages = steps("clickxpath //b")
        play(AGENT, strategy, [EpisodeSpec("click-button", "1")], pages, right(pages))
        assert [shown in request.text for request in requests(pages)] == expected


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("erci", [-1, 0, 1, 2])
def test_calls_are_those_of_the_formula(erci, implicit):
    script = ("clickxpath //a", "press enter", "clickxpath //b")
    for irci, state, broken in itertools.product((0, 1, 3), (False, True), (0, 1, 2, 4)):
        pages = FakePages(lambda _: script)
        good = right(pages)

        def answer(request: Request, broken: int = broken, good: Any = good) -> str:
            # the first drafts of every second step are no instructions
            if not plans(request) and where(request)[1] == 1 and len(said(request)) < broken:
                return SAY
            return good(request)

        strategy = Strategy(erci=erci, irci=irci, state_grounding=state, implicit_plan=implicit)
        (record,) = play(AGENT, strategy, [SPEC], pages, answer)
        plan = 0 if erci < 0 else 1 + (1 if implicit else 2) * erci
        needed = max(0, broken - state)  # the state's draft is one more
        repairs, solved = min(irci, needed), irci >= needed
        asked = 3 if solved else 2  # instructions
        expected = plan + asked * (1 + state) + repairs
        assert record.result.calls == len(requests(pages)) == expected, (irci, state, broken)
        assert expected <= strategy.most_calls(asked)
        assert record.result.success == solved
        assert record.result.steps == (3 if solved else 1)
        assert (record.result.malformed, record.result.unrepaired) == (broken > 0, not solved)
    assert strategy.most_calls(3) == plan + 3 * (1 + 1 + 3)


def test_the_longest_episode_takes_most_calls_exactly():
    strategy = Strategy(erci=2, irci=2, explicit_action=2, state_grounding=True)
    pages = steps("press enter", "press space", "press backspace")
    asked = iter(range(1000))

    def answer(request: Request) -> str:
        next(asked)
        repairs = sum(turn.text == PROMPTS.agent for turn in request.turns)
        return right(pages)(request) if plans(request) or repairs == 2 else SAY

    (record,) = play(AGENT, strategy, [SPEC], pages, answer)
    assert record.result.success
    assert record.result.calls == strategy.most_calls(3) == 5 + 3 * (5 + 1 + 2) == next(asked)


def test_a_model_that_always_says_the_same_plays_the_same_with_and_without_rci():
    def same(_: Request) -> str:
        return "clickxpath //button"

    found = []
    for strategy in (DIRECT, Strategy(), Strategy(erci=2, explicit_action=2, irci=3)):
        pages = steps(*["clickxpath //button"] * 3)
        (record,) = play(AGENT, strategy, [SPEC], pages, same)
        found.append((record.result.history, record.result.reward, record.result.reason))
        assert pages.log.count(Act("clickxpath //button")) == 3
    assert found == [(["clickxpath //button"] * 3, 1.0, "done")] * 3


def test_broken_grammar_fails_exactly_those_episodes_and_one_repair_mends_them():
    def script(spec: EpisodeSpec) -> list[str]:
        return [f"type {number}" for number in range(1 + int(spec.seed) % 4)]

    pages = FakePages(script)

    def answer(request: Request) -> str:
        _, done = where(request)
        broken = done == 2 and PROMPTS.agent not in [turn.text for turn in request.turns]
        return SAY if broken else right(pages)(request)

    specs = [EpisodeSpec("some-task", str(seed)) for seed in range(20)]
    plain = [record.result for record in play(AGENT, DIRECT, specs, pages, answer, width=5)]
    # lengths 1, 2, 3, 4 in turn; the third instruction is broken: seeds 2, 3, 6, 7, ... fail, 10 of 20
    assert [result.seed for result in plain if not result.success] == [str(s) for s in range(20) if s % 4 >= 2]
    assert {(r.reason, r.steps, r.unrepaired) for r in plain if not r.success} == {("not an instruction", 2, 1)}
    repaired = [record.result for record in play(AGENT, replace(DIRECT, irci=1), specs, pages, answer, width=5)]
    assert all(result.strict for result in repaired)
    assert sum(result.malformed for result in repaired) == 10
    assert sum(result.unrepaired for result in repaired) == 0
    assert sum(result.calls for result in repaired) == 5 * (1 + 2 + 3 + 4) + 10


@pytest.mark.parametrize(
    ("lines", "most", "limit"),
    [(0, None, 4), (1, None, 4), (2, None, 3), (5, None, 6), (19, None, 20), (30, None, STEP_CAP), (5, 2, 2), (1, 9, 9),
     (None, None, STEP_CAP), (None, 5, 5)],
)  # fmt: skip
def test_the_limit_of_steps(lines, most, limit):
    pages = steps(*["press space"] * 60)
    strategy = replace(DIRECT, erci=-1 if lines is None else 0, max_steps=most)
    plan = "\n".join(f"{number + 1}. press space" for number in range(lines or 0))
    (record,) = play(AGENT, strategy, [SPEC], pages, lambda request: plan if plans(request) else "press space")
    assert record.result.steps == limit
    assert record.result.reason == "step limit"
    assert not record.result.success
    assert record.result.plan_lines == (lines or 0)


def test_an_instruction_without_a_match_is_counted_and_the_episode_goes_on():
    pages = steps("press enter", "press space")
    answers = iter(["clickxpath //missing", "press enter", "clickxpath //missing", "press space"])
    (record,) = play(AGENT, DIRECT, [SPEC], pages, lambda _: next(answers))
    assert (record.result.unmatched, record.result.steps, record.result.success) == (2, 4, True)


@pytest.mark.parametrize("status", ["error", "left_page"])
@pytest.mark.parametrize("at", [-1, 0, 1])
def test_a_browser_that_fails_is_a_failure_marked_as_such(status, at):
    pages = FakePages(lambda _: ["press enter", "press space"], trouble={("7", at): status})
    bad, good = play(AGENT, DIRECT, [SPEC, EpisodeSpec("some-task", "8")], pages, right(pages), width=2)
    assert bad.result.error
    assert bad.result.reason in ("lost", "no page")
    assert (bad.result.success, bad.result.strict, bad.result.reward) == (False, False, 0.0)
    assert bad.result.steps == bad.result.calls == at + 1
    assert (good.result.success, good.result.error) == (True, False)


def test_films_transcripts_and_familiar_pages():
    pages = steps("press enter", "press space")
    reset = pages.reset_pages
    pages.reset_pages = lambda episodes: {s: replace(view, familiar=True) for s, view in reset(episodes).items()}
    (record,) = play(AGENT, replace(DIRECT, irci=1), [SPEC], pages, right(pages), film=True)
    assert record.frames == [b"[at some-task 7 0]", b"[at some-task 7 1]"]
    assert record.transcript[1::2] == ["[did] press enter -> ok", "[did] press space -> ok done"]
    assert record.transcript[0].endswith("The first instruction is `\n[answered]press enter")
    assert record.result.familiar
    assert play(AGENT, DIRECT, [SPEC], steps("press enter"), lambda _: "press enter")[0].frames == []


# ------------------------------------------------------------------------------------------------ how it comes to it


def test_criticised_drafts_are_shown_verbatim_and_conversations_only_grow():
    strategy = Strategy(erci=2, irci=2, explicit_action=1, replan_every=2)
    pages = steps("press enter", "press space", "press backspace")
    counter = itertools.count()

    def answer(request: Request) -> str:
        if request.turns[-1].text in (PROMPTS.plan_critique, PROMPTS.critique):
            return f"problem {next(counter)}"
        if plans(request):
            return f"type {next(counter)}\ntype {next(counter)}"
        if PROMPTS.agent not in [turn.text for turn in request.turns]:
            return f"say {next(counter)}"  # none of the grammar: repaired once
        return right(pages)(request)

    (record,) = play(AGENT, strategy, [SPEC], pages, answer)
    assert record.result.success
    conversations: list[list[Request]] = []
    for request in requests(pages):
        if request.turns[-1].text == PROMPTS.plan or "instruction is `" in request.turns[-1].text and not said(request):
            conversations.append([])
        conversations[-1].append(request)
    # plan (5 calls) at steps 0 and 2; a step: draft, critique, improvement, state, one repair
    assert [len(asked) for asked in conversations] == [5, 5, 5, 5, 5]
    assert record.result.calls == 25
    for asked in conversations:
        for before, after in itertools.pairwise(asked):
            assert after.turns[: len(before.turns)] == before.turns
            assert len(after.turns) > len(before.turns)
            assert after.text.startswith(before.text)
        assert len({request.seed for request in asked}) == len(asked)
    critiques = [r for r in requests(pages) if r.turns[-1].text in (PROMPTS.plan_critique, PROMPTS.critique)]
    assert len(critiques) == 2 * 2 + 3
    for request in critiques:
        draft = said(request)[-1]
        assert draft.startswith("type " if plans(request) else "say ")
        assert request.text.endswith(draft + ("" if plans(request) else "`.") + request.turns[-1].text)


def test_a_plan_is_improved_with_or_without_a_sampled_critique():
    for implicit in (False, True):
        pages = steps("press enter")
        answers = iter(["press a", *([] if implicit else ["bad key"]), "press enter"])
        (record,) = play(
            AGENT, replace(DIRECT, erci=1, implicit_plan=implicit), [SPEC], pages,
            lambda request, answers=answers: next(answers) if plans(request) else "press enter",
        )  # fmt: skip
        asked = requests(pages)
        assert len(asked) == (3 if implicit else 4)
        assert (PROMPTS.plan_critique in asked[-2].text) == (not implicit)
        assert (PROMPTS.plan_requirement in asked[-2].text) == implicit
        assert asked[-2].text.count("[at some-task 7 0]") == (1 if implicit else 2)  # the page is shown again
        assert asked[-1].text.count("The plan is:\npress enter\n") == 1
        assert "press a" not in asked[-1].text
        assert record.result.success


@pytest.mark.parametrize(("every", "planned"), [(0, [0]), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_plans_are_made_again(every, planned):
    pages = steps(*["press space"] * 5)
    strategy = replace(DIRECT, erci=0, replan_every=every, max_steps=5)
    play(AGENT, strategy, [SPEC], pages, right(pages))
    assert [where(request)[1] for request in requests(pages) if plans(request)] == planned


def test_state_grounding_is_off_where_the_task_has_no_text_for_it():
    for task, calls in (("click-tab", 1), ("some-task", 2)):
        pages = steps("press enter")
        play(AGENT, replace(DIRECT, state_grounding=True), [EpisodeSpec(task, "1")], pages, right(pages))
        assert len(requests(pages)) == calls


def test_a_verifier_ends_the_rounds_on_an_instruction():
    strategy = replace(DIRECT, explicit_action=4, action_stop="verifier")
    pages = steps("press enter")
    answers = iter([SAY, "critique", "clickxpath //missing", "critique", "press enter"])
    (record,) = play(AGENT, strategy, [SPEC], pages, lambda _: next(answers))
    assert record.result.calls == 5
    assert record.result.success


def test_retry_takes_the_first_sample_that_passes_and_shows_no_other_afterwards():
    strategy = Strategy(erci=-1, irci=1, state_grounding=True, retry=4, temperature=1.0)
    pages = steps("press enter")
    answers = iter([SAY, "clickxpath //missing", "press space", "press up", "press enter"])
    (record,) = play(AGENT, strategy, [SPEC], pages, lambda _: next(answers))
    drafts, (state, repair) = requests(pages)[:3], requests(pages)[3:]
    assert len({request.turns for request in drafts}) == 1
    assert len({request.seed for request in requests(pages)}) == 5
    assert state.text == f"{drafts[0].text}press space`.{PROMPTS.state}"
    assert repair.text == f"{state.text}press up`.{PROMPTS.agent}"
    assert record.result.calls == 5
    assert record.result.success


@pytest.mark.parametrize(("samples", "winner"), [("abb", "b"), ("aba", "a"), ("abc", "a"), ("baab", "b")])
def test_the_most_frequent_sample_wins_the_vote_and_is_what_the_state_is_held_against(samples, winner):
    strategy = replace(DIRECT, vote=len(samples), temperature=1.0, state_grounding=True)
    pages = steps("type z")
    answers = iter([*(f"type {letter}" for letter in samples), "type z"])
    (record,) = play(AGENT, strategy, [SPEC], pages, lambda _: next(answers))
    first, last = requests(pages)[0], requests(pages)[-1]
    assert last.text == f"{first.text}type {winner}`.{PROMPTS.state}"
    assert record.result.success
    assert record.result.calls == len(samples) + 1


def test_sampling_is_that_of_the_strategy():
    strategy = Strategy(
        erci=1, irci=0, explicit_action=1, temperature=0.7, top_p=0.9, critique_temperature=0.2, max_new_tokens=33
    )
    pages = steps("press enter")
    play(AGENT, strategy, [SPEC], pages, lambda _: "press enter")
    temperatures = [request.temperature for request in requests(pages)]
    assert temperatures == [0.7, 0.2, 0.7, 0.7, 0.2, 0.7, 0.7]
    assert {(request.top_p, request.max_new_tokens) for request in requests(pages)} == {(0.9, 33)}


def test_prompts_of_small_models():
    prompts = ActionPrompts()
    agent = Agent(PromptLibrary("compact"), prompts)
    strategy = Strategy(erci=1, irci=1, explicit_action=1)
    pages = steps("press enter", "press space")
    answers = iter(["press no", "bad", "press nor", "press enter", "press a", "ok", "press space"])
    (record,) = play(agent, strategy, [SPEC], pages, lambda _: " " + next(answers))
    asked = requests(pages)
    assert asked[0].text == "do it\nbutton [at some-task 7 0]\n>"
    assert asked[3].text == f"{asked[0].text} press no\n? bad\n> press nor\n>"
    assert asked[6].text == "do it\nbutton [at some-task 7 1]\n- press enter\n> press a\n? ok\n>"
    assert (record.result.calls, record.result.success) == (7, True)
    with pytest.raises(ValueError, match="compact needs a datamodule with action_prompts"):
        Agent(PromptLibrary("compact"))


# --------------------------------------------------------------------------------------------- text is never a template

NASTY = st.lists(
    st.sampled_from(["{page}", "{goal}", "{plan}", "{kinds}", "{history}", "{previous}", "{nth}", "{", "}", "{{", "%s",
                     "`", "```", "\\1", "\\g<0>", "\n", "Task: ", "system: ", PROMPTS.plan, PROMPTS.agent, "é", "x"]),
    max_size=8,
).map("".join)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(NASTY, NASTY)
def test_what_a_page_says_changes_no_template(html, goal):
    found = []
    for inside, task in ((html, goal), ("<<HTML>>", "<<GOAL>>")):
        pages = FakePages(lambda _: ["press enter", "press space"], html=inside, goal=task)
        answers = iter(["press enter\npress space", "none", "press enter", "press enter", "press no", "press enter",
                        "press space", "press space"])  # fmt: skip
        (record,) = play(AGENT, Strategy(), [SPEC], pages, lambda _, said=answers: next(said))
        found.append([[(turn.role, turn.text) for turn in request.turns] for request in requests(pages)])
        assert record.result.success
    filled = [
        [(role, text.replace("<<HTML>>", html).replace("<<GOAL>>", goal)) for role, text in turns] for turns in found[1]
    ]
    assert found[0] == filled


def test_what_a_model_says_changes_no_template():
    pages = steps("type {previous} {nth} {page}", "type {goal}")
    (record,) = play(AGENT, replace(DIRECT, erci=1), [SPEC], pages, right(pages))
    last = requests(pages)[-1].text
    assert "The plan is:\ntype {previous} {nth} {page}\ntype {goal}\nAlready executed:\n" in last
    assert last.endswith("The previous instruction was `type {previous} {nth} {page}`. According to the plan, the 2nd "
                         "instruction is `")  # fmt: skip
    assert record.result.success


# ------------------------------------------------------------------------------------------------ seeds, order, experts


def drawn(request: Request) -> str:
    """A model whose replies are drawn: pure functions of prompt and seed."""
    number = int(hashlib.sha256(f"{request.seed}{request.text}".encode()).hexdigest(), 16)
    if plans(request):
        return "\n".join(["press space"] * (number % 4))
    return ["press enter", "press space", "clickxpath //missing", SAY][number % 4]


def test_results_do_not_depend_on_order_or_on_how_many_are_played_at_once():
    specs = [EpisodeSpec(task, str(seed)) for task in ("some-task", "click-tab") for seed in range(15)]
    strategy = Strategy(erci=1, irci=1, temperature=1.0, retry=2)
    found = []
    for width, order in ((1, specs), (4, specs), (30, specs[::-1])):
        pages = FakePages(lambda _: ["press space", "press enter"], experts=True, slots=width)
        records = play(AGENT, strategy, order, pages, drawn, width=width)
        found.append({(r.result.task, r.result.seed): (asdict(r.result), r.transcript, r.drafts) for r in records})
    assert found[0] == found[1] == found[2]
    assert 0 < sum(result["success"] for result, _, _ in found[0].values()) < 30


def test_first_drafts_of_all_strategies_are_drawn_with_equal_seeds():
    def first(strategy: Strategy, seed: int = 3, spec: EpisodeSpec = SPEC) -> list[Request]:
        pages = steps("press enter", "press space")
        play(Agent(DEFAULT, seed=seed), strategy, [spec], pages, right(pages))
        found: dict[int, Request] = {}
        for request in requests(pages):
            if not plans(request):
                found.setdefault(where(request)[1], request)
        return list(found.values())

    warm = replace(DIRECT, temperature=1.0)
    direct = first(warm)
    variants = {"irci": 2, "retry": 3, "vote": 2, "explicit_action": 1, "state_grounding": True}
    for key, value in variants.items():
        assert first(replace(warm, **{key: value})) == direct, key
    assert [r.seed for r in first(replace(warm, erci=1))] == [r.seed for r in direct]  # with a plan in the prompt
    everywhere = [direct, first(warm, seed=4), first(warm, spec=EpisodeSpec("some-task", "8"))]
    assert len({request.seed for asked in everywhere for request in asked}) == 6


def test_flips_and_drafts_are_noted_beside_the_expert():
    def script(spec: EpisodeSpec) -> list[str]:
        return ["press enter"] * 5

    pages = FakePages(script, experts=True)
    # (draft, after state grounding), by step; the last revision is wrong and ends the episode
    pairs = [("press enter", "press enter"), (SAY, "press enter"), ("clickxpath //missing", "clickxpath //missing"),
             ("press space", "press enter"), ("press enter", "press space")]  # fmt: skip
    answers = iter([text for pair in pairs for text in pair])
    (record,) = play(AGENT, replace(DIRECT, state_grounding=True), [SPEC], pages, lambda _: next(answers))
    assert record.result.flips == {"rr": 1, "wr": 2, "ww": 1, "rw": 1}
    assert record.result.malformed == 1
    assert [row["draft"] for row in record.drafts] == [draft for draft, _ in pairs]
    assert [row["status"] for row in record.drafts] == ["ok", "malformed", "no_match", "ok", "ok"]
    assert {row["action"] for row in record.drafts} == {"press enter"}
    assert [len(row["history"]) for row in record.drafts] == [0, 1, 2, 3, 4]
    assert record.drafts[4]["page"] == "button [at some-task 7 3]"
    # one draft is no revision; without experts there is nothing to compare with
    (plain,) = play(AGENT, DIRECT, [SPEC], FakePages(script, experts=True), lambda _: "press enter")
    assert (plain.result.flips, len(plain.drafts)) == ({}, 5)
    (alone,) = play(AGENT, Strategy(), [SPEC], FakePages(script), lambda _: "press enter")
    assert (alone.result.flips, alone.drafts) == ({}, [])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"erci": -2}, "erci must be >= -1, got -2"),
        ({"irci": -1}, "irci must be >= 0, got -1"),
        ({"explicit_action": -1}, "explicit_action must be >= 0"),
        ({"retry": -1}, "retry must be >= 0"),
        ({"vote": -3}, "vote must be >= 0"),
        ({"replan_every": -1}, "replan_every must be >= 0"),
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"critique_temperature": -0.1}, "critique_temperature must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in \\(0, 1\\]"),
        ({"top_p": 1.1}, "top_p must be in \\(0, 1\\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1"),
        ({"max_steps": 0}, "max_steps must be >= 1 or null"),
        ({"action_stop": "never"}, "action_stop must be one of fixed, oracle"),
        ({"action_stop": "oracle"}, "no label to stop by on a page"),
        ({"retry": 2}, "several samples at temperature 0 are equal"),
        ({"vote": 2}, "several samples at temperature 0 are equal"),
        ({"retry": 2, "vote": 2, "temperature": 1.0}, "set one of retry, vote and explicit_action"),
        ({"retry": 1, "explicit_action": 1}, "set one of retry, vote and explicit_action"),
        ({"erci": -1, "replan_every": 1}, "replan_every needs a plan"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=f"^RCI: strategy mine: .*{message}"):
        Strategy(**changes).check("mine")


def test_right_settings_pass():
    warm = {"temperature": 1.0, "critique_temperature": 0.0, "top_p": 0.5}
    for changes in ({}, asdict(DIRECT), {"retry": 1}, {"vote": 1}, {"retry": 5, **warm}, {"vote": 5, **warm}):
        Strategy(**changes).check("mine")
