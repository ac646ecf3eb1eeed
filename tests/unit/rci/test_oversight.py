"""Oversight of episodes: what is refused, what is asked for, and where an episode ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modules.contracts.browsing import EpisodeSpec, PageView
from modules.rci.agent import Agent, Record, Strategy
from modules.rci.effects import Act, Confirm, Reset
from modules.rci.module import RCIAgent
from modules.rci.oversight import Oversight, described, irreversible
from modules.rci.prompting import PromptLibrary

HTML = (
    '<div><button id="b1">Send message</button><a href="/delete/3">x</a><span>Resend</span>'
    '<button id="b2">Close</button><select><option>Pay</option><option>Wait</option></select></div>'
)
VIEW = PageView("do it", HTML, "")
DIRECT = Strategy(erci=-1, irci=0, state_grounding=False, max_steps=9)
SPEC = EpisodeSpec("some-task", "7")


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("clickxpath //*[@id='b1']", True),  # by its text, whatever selects it
        ("clickxpath //button[1]", True),
        ("clickxpath //button[2]", False),
        ("clickxpath //a", True),  # by its address
        ("clickxpath //span", False),  # "resend" does not begin with the word
        ("clickoption //option[1]", True),
        ("clickoption //option[2]", False),
        ("press enter", True),
        ("press backspace", False),
        ("type send", False),
        ("movemouse //button[1]", False),
        ("clickxpath //*[@id='submit-all']", True),  # not on the page: by what the instruction says
        ("clickxpath //button[", False),
        ("no instruction", False),
    ],
)
def test_what_can_not_be_undone(instruction, expected):
    assert irreversible(VIEW, instruction) is expected
    assert not irreversible(VIEW, instruction, [])


def test_an_element_is_told_by_text_and_names():
    assert described(VIEW, "clickxpath //button[@id='b1']/text()") == "Send message | b1"
    assert described(VIEW, "clickxpath //button") == "Send message | b1 | Close | b2"


def episode(rules: Oversight, answers: list[str], approve: bool = True, stop_at: int | None = None) -> tuple[Any, ...]:
    """Record, instructions that reached the page, and approvals asked for."""
    acted: list[str] = []
    asked: list[Confirm] = []
    calls = iter(answers)
    agent = Agent(PromptLibrary("default"), oversight=rules)
    loop = agent.episode("it", DIRECT, SPEC, stopping=lambda: stop_at is not None and len(acted) >= stop_at)
    result: Any = None
    try:
        while True:
            effect = loop.send(result)
            if isinstance(effect, Reset):
                result = VIEW
            elif isinstance(effect, Act):
                acted.append(effect.instruction)
                result = replace(VIEW)
            elif isinstance(effect, Confirm):
                asked.append(effect)
                result = approve
            else:
                from modules.language.backends.base import Reply

                result = Reply(next(calls))
    except StopIteration as end:
        record: Record = end.value
    return record, acted, asked


SEND, CLOSE = "clickxpath //*[@id='b1']", "clickxpath //*[@id='b2']"


def test_approval_is_asked_for_and_its_answer_stands():
    record, acted, asked = episode(Oversight(max_actions=2), [SEND, CLOSE, CLOSE])
    assert (acted, [one.instruction for one in asked]) == ([SEND, CLOSE], [SEND])
    assert asked[0].touched == "Send message | b1"
    assert record.result.reason == "halted: budget of 2 actions"
    record, acted, asked = episode(Oversight(max_actions=1), [SEND, CLOSE, CLOSE], approve=False)
    assert (acted, record.refused, len(asked)) == ([CLOSE], [SEND], 1)
    assert record.result.history == [CLOSE]  # what was refused was not done


def test_what_is_off_limits_is_refused_and_stubbornness_ends_the_episode():
    record, acted, asked = episode(Oversight(confirm=[], off_limits=["Close"]), [SEND, CLOSE, CLOSE, CLOSE, CLOSE])
    assert (acted, asked, record.refused) == ([SEND], [], [CLOSE, CLOSE])
    assert record.result.reason == "halted: 3 refused instructions"
    assert not record.result.success


@pytest.mark.parametrize(("rules", "calls", "acts"), [({"max_calls": 2}, 2, 2), ({"max_actions": 1}, 2, 1),
                                                      ({"max_calls": 0}, 0, 0)])  # fmt: skip
def test_budgets(rules, calls, acts):
    record, acted, _ = episode(Oversight(confirm=[], **rules), [CLOSE] * 9)
    assert (record.result.calls, len(acted)) == (calls, acts)


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_a_stop_is_obeyed_at_once(stop_at):
    record, acted, _ = episode(Oversight(confirm=[]), [CLOSE] * 9, stop_at=stop_at)
    assert (len(acted), record.result.reason) == (stop_at, "halted: stopped")


@pytest.mark.parametrize(
    ("rules", "message"),
    [({"max_calls": -1}, "max_calls"), ({"max_refusals": 0}, "max_refusals"), ({"off_limits": [" "]}, "empty text")],
)
def test_wrong_rules_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        Oversight(**rules).check("it")


def test_the_module_passes_its_rules_on_and_answers_as_they_say():
    from modules.language.backends.scripted import ScriptedBackend

    def module(**rules: Any) -> RCIAgent:
        backend = ScriptedBackend(lambda request: SEND)
        return RCIAgent(backend=backend, prompts="default", oversight=Oversight(**rules), strategies={"direct": DIRECT})

    asked = Confirm(SEND, "Send message")
    assert module().approve(asked)
    assert not module(approve=False).approve(asked)
    assert RCIAgent(backend=ScriptedBackend(lambda request: SEND), prompts="default").approve(asked)
    with pytest.raises(ValueError, match="oversight"):
        module(max_actions=-1)
