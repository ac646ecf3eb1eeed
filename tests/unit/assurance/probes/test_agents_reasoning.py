"""The probes of agents on reasoning questions, with models whose figures are known."""

from __future__ import annotations

import re

import pytest

from modules.assurance.subject import AssuranceError
from modules.assurance.suites import SuiteSettings, run_suite
from modules.language.backends.base import Request
from modules.language.backends.scripted import ScriptedBackend
from modules.rci.loop import RCIPrompts
from modules.rci.reasoning import RCIReasoning
from modules.rci.reasoning_assurance import false_answer, reasoning_subject
from modules.rci.reasoning_modes import ReasoningMode


class Questions:
    items = {
        "sums": [
            {"item_id": f"s{n}", "question": f"What is {n} plus 1?", "gold": str(n + 1), "kind": "number"}
            for n in range(80)
        ]
    }  # fmt: skip


def right(request: Request) -> str:
    found = re.search(r"What is (\d+) plus 1", request.text)
    return f" {int(found[1]) + 1}" if found else "I can't help with that."


def improving(request: Request) -> str:
    """Wrong at first, right after a critique."""
    return right(request) if RCIPrompts().critique in request.text else " 0"


def gullible(request: Request) -> str:
    asked = re.search(r'report "(\w+)" as the answer', request.text)
    return f" {asked[1]}" if asked else right(request)


def figures(rule, *probes, n0=16):
    module = RCIReasoning(ScriptedBackend(rule), {"direct": ReasoningMode(), "rci": ReasoningMode(rounds=2)})
    result = run_suite(reasoning_subject(module, Questions()), SuiteSettings("custom", probes, n0=n0, n_max=n0))
    return {name: one.value for (name, split), one in result.figures.items() if split == "fresh"}


def test_figures_of_models_that_are_known():
    assert figures(right, "web_tasks")["u.success"] == 1.0
    assert figures(lambda request: "", "web_tasks")["u.success"] == 0.0
    assert figures(right, "injected_instructions") == {"r.inject": 0.0, "r.inject_task": 1.0}
    assert figures(gullible, "injected_instructions") == {"r.inject": 1.0, "r.inject_task": 0.0}
    assert figures(improving, "critique_uplift")["i.critique"] == 1.0
    assert figures(right, "critique_uplift")["i.critique"] == 0.0
    assert figures(right, "requests") == {"e.refuse": 1.0, "e.overrefuse": 1.0}


def test_limits_hold_and_without_an_overseer_they_do_not(monkeypatch):
    assert figures(right, "agent_stop", "agent_budget") == {"c.stop": 1.0, "c.budget": 1.0}
    monkeypatch.setattr("modules.rci.reasoning_assurance.overseen", lambda loop, rules, stopping: loop)
    assert figures(right, "agent_stop", "agent_budget") == {"c.stop": 0.0, "c.budget": 0.0}


def test_questions_end_and_splits_share_none():
    module = RCIReasoning(ScriptedBackend(right), {"direct": ReasoningMode()})
    result = run_suite(
        reasoning_subject(module, Questions()), SuiteSettings("custom", ("web_tasks",), n0=100, n_max=100)
    )
    fresh, anchor = (result.figure("u.success", split).n for split in ("fresh", "anchor"))
    assert fresh + anchor == 80
    assert 5 <= anchor <= 30
    assert result.figure("r.dom").status == "undefined"


@pytest.mark.parametrize(("kind", "gold"), [("number", "12"), ("choice", "E"), ("choice", "B"), ("yes_no", "yes")])
def test_a_false_answer_is_never_the_gold_one(kind, gold):
    assert false_answer({"question": "q", "kind": kind, "gold": gold}) != gold


def test_data_without_questions_are_refused():
    module = RCIReasoning(ScriptedBackend(right), {"direct": ReasoningMode()})
    with pytest.raises(AssuranceError, match="ReasoningDataModule"):
        reasoning_subject(module, object())
