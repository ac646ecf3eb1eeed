"""Prompt files: that the shipped ones load, what is refused, and how a reply becomes an instruction or a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.contracts.browsing import ActionPrompts, PageView, is_instruction
from modules.rci.agent import MAX_PLAN_LINES, clean, clean_plan
from modules.rci.prompting import FOLDER, PromptLibrary, fill

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in ("default", "compact"))


@pytest.mark.parametrize("task", [*SHIPPED, "a-task-without-a-file"])
def test_shipped_prompts_load_and_their_exemplars_are_of_the_grammar_they_describe(task):
    prompts = PromptLibrary("default")[task]
    context = prompts.start("GOAL", exemplars=True)
    text = "".join(turn.text for turn in context.turns)
    assert context.turns[0].role == "system"
    assert "{" not in text
    for kind in prompts.kinds:
        assert prompts.describe[kind] in text
        assert f"- {kind} " in text
    for shown in prompts.exemplars:
        assert f'A plan for the task "{shown["goal"]}":\n{shown["plan"]}' in text
        for line in shown["plan"].splitlines():
            assert is_instruction(line), line
            assert line.split()[0] in prompts.kinds
    assert text.count("A plan for the task") == len(prompts.exemplars)
    assert "A plan for the task" not in "".join(turn.text for turn in prompts.start("GOAL", exemplars=False).turns)
    assert prompts.before + prompts.after == "`."
    if task not in SHIPPED:
        assert (prompts.exemplars, list(prompts.kinds)) == ([], ["type", "clickxpath"])


def test_there_are_files_of_tasks_and_small_models_get_none_of_them():
    assert len(SHIPPED) >= 16
    library = PromptLibrary("compact")
    assert library["enter-date"] == library["click-tab"]
    assert library["enter-date"].seen(PageView("", "<html>", "compact")) == "compact"
    assert PromptLibrary("default")["enter-date"].seen(PageView("", "<html>", "compact")) == "<html>"
    assert library["enter-date"].action_rci.before == " "
    assert not library["enter-date"].plan


def test_an_own_folder_replaces_single_keys(tmp_path):
    (tmp_path / "default.yaml").write_text("history: 'Done: {history}'\nsystem: Be brief.\n", encoding="utf-8")
    (tmp_path / "click-tab.yaml").write_text("state: now\n", encoding="utf-8")
    (tmp_path / "my-task.yaml").write_text("kinds: [press]\nsystem: é\n", encoding="utf-8")
    packaged, mine = PromptLibrary("default"), PromptLibrary("default", tmp_path)
    assert mine["click-tab"].state == "now"
    assert packaged["click-tab"].state == ""
    assert mine["click-tab"].exemplars == packaged["click-tab"].exemplars  # of the packaged file
    assert mine["click-tab"].history == mine["enter-date"].history == "Done: {history}"
    assert mine["enter-date"].exemplars == packaged["enter-date"].exemplars
    assert mine["enter-date"].plan == packaged["enter-date"].plan
    assert (mine["enter-date"].system, mine["my-task"].system) == ("Be brief.", "é")
    assert list(mine["my-task"].kinds) == ["press"]
    (tmp_path / "compact.yaml").write_text("agent: again\n", encoding="utf-8")
    assert PromptLibrary("compact", tmp_path)["x"].agent == "again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stat: ''", "unknown key 'stat'; keys are after, agent, base"),
        ("exemplars: [{goal: g}]", "every exemplar needs goal and plan"),
        ("exemplars: [text]", "every exemplar needs goal and plan"),
        ("exemplars: [{goal: g, plan: 3}]", "every exemplar needs goal and plan"),
        ("exemplars:", "exemplars must be a list"),
        ("kinds: [type, drag]", "kind 'drag' has no text in 'describe'"),
        ("kinds: type", "kinds must be a list"),
        ("kinds:", "kinds must be a list"),
        ("describe: [type]", "describe must give a text for each"),
        ("describe: {type: 1}", "describe must give a text for each"),
        ("view: pixels", "view must be html or page, got 'pixels'"),
        ("state:", "'state' must be a text, got None"),
        ("plan: 3", "'plan' must be a text, got 3"),
        ("state: 'open", "my-task.yaml: while scanning"),
        ("a: b: c", "my-task.yaml: mapping values are not allowed here"),
        ("- state", "must hold keys and texts"),
        ("", "must hold keys and texts"),
        (b"\xff\xfe\xff", "my-task.yaml: 'utf-8' codec can't decode"),
        ("state: !!python/object/apply:os.getcwd []", "my-task.yaml: could not determine a constructor"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, text, message):
    path: Path = tmp_path / "my-task.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="^RCI: prompts ") as caught:
        PromptLibrary("default", tmp_path)["my-task"]
    assert message in str(caught.value)
    assert "my-task" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert PromptLibrary("default", tmp_path)["click-tab"].exemplars  # other tasks are not hurt


def test_unknown_libraries_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="must be 'default' or 'compact', got 'long'"):
        PromptLibrary("long")
    with pytest.raises(FileNotFoundError, match="prompt_folder .*nowhere does not exist"):
        PromptLibrary("default", tmp_path / "nowhere")
    (tmp_path / "default.yaml").write_text("stat: ''", encoding="utf-8")
    with pytest.raises(ValueError, match=r"default.yaml: unknown key 'stat'"):
        PromptLibrary("default", tmp_path)


def test_the_digest_is_that_of_what_is_said_about_the_tasks(tmp_path):
    plain = PromptLibrary("default").digest(["click-tab", "enter-date"], None)
    assert PromptLibrary("default", tmp_path).digest(["enter-date", "click-tab", "click-tab"], None) == plain
    assert PromptLibrary("default").digest(["click-tab"], None) != plain
    assert PromptLibrary("default").digest(["click-tab", "enter-date"], ActionPrompts(act="x")) == plain
    (tmp_path / "click-link.yaml").write_text("state: other", encoding="utf-8")  # of no task in question
    assert PromptLibrary("default", tmp_path).digest(["click-tab", "enter-date"], None) == plain
    found = {plain}
    for task, text in (("enter-date", "state: one"), ("enter-date", "state: two"), ("default", "base: '{kinds}'"),
                       ("click-tab", "exemplars: [{goal: a, plan: b}]")):  # fmt: skip
        (tmp_path / f"{task}.yaml").write_text(text, encoding="utf-8")
        found.add(PromptLibrary("default", tmp_path).digest(["click-tab", "enter-date"], None))
    assert len(found) == 5
    small = {PromptLibrary("compact").digest(["x"], action) for action in (ActionPrompts(), ActionPrompts(act="x"))}
    assert len(small) == 2


@pytest.mark.parametrize(("number", "later"), [(2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (20, "20th")])
def test_later_questions_count_and_quote(number, later):
    prompts = PromptLibrary("default")["x"]
    assert prompts.ask_next(number, "a `{nth}", planned=True) == (
        f"The previous instruction was `a `{{nth}}`. According to the plan, the {later} instruction is `"
    )
    assert prompts.ask_next(number, "b", planned=False).startswith("The previous instruction was `b`. The ")
    assert prompts.ask_next(1, "", planned=True) == prompts.next_first
    assert prompts.ask_next(1, "", planned=False) == prompts.next_first_unplanned


BRACED = st.one_of(st.text(), st.lists(st.sampled_from(["{a}", "{b}", "{c}", "\\1", "{", "x"])).map("".join))


@settings(deadline=None)
@given(BRACED, BRACED)
def test_filled_in_text_is_data(one, two):
    assert fill("<{a}|{b}|{a}|{c}|{ a }>", a=one, b=two) == f"<{one}|{two}|{one}|{{c}}|{{ a }}>"


# ------------------------------------------------------------------------------------------- what a reply comes down to


@pytest.mark.parametrize(
    ("reply", "instruction"),
    [
        ("press enter", "press enter"),
        ("  press enter \n", "press enter"),
        ("press enter`. Then", "press enter"),
        ("`press enter`", ""),  # the prompt opened the backtick already
        ("press\nenter", "pressenter"),
        ("press\r\nenter", "pressenter"),
        ("type a\\nb", "type a\nb"),  # a written line break becomes one, and so no instruction
        ("press enter\\n", "press enter"),
        ("'press enter'", "press enter"),
        ("' press enter '", "press enter"),
        ("'", "'"),
        ("''", ""),
        ("clickxpath //a[text()='x']", "clickxpath //a[text()='x']"),
        ("type 'x'", "type 'x'"),
        ('type "x"', 'type "x"'),
        ("", ""),
    ],
)
def test_the_instruction_in_a_reply(reply, instruction):
    assert clean(reply) == instruction


@settings(deadline=None)
@given(st.text())
def test_a_cleaned_reply_has_no_backtick_and_no_blank_around_it(reply):
    found = clean(reply)
    assert "`" not in found
    assert found == found.strip()


@pytest.mark.parametrize(
    ("reply", "plan"),
    [
        ("press enter\ntype x", "press enter\ntype x"),
        ("1. press enter\n2) type x\n- type y\n* type z", "press enter\ntype x\ntype y\ntype z"),
        ("\n\n press enter \r\n\n type x\n", "press enter\ntype x"),
        ("`press enter`\n`type x`", "press enter\ntype x"),
        ("press enter\n```\nand now", "press enter"),
        ("```\npress enter\ntype x\n```\nThat is it.", "press enter\ntype x"),
        ("```text\npress enter\n```", "press enter"),
        ("10. type 10", "type 10"),
        ("", ""),
        ("\n - \n 3. \n", ""),
        ("```", ""),
    ],
)
def test_the_plan_in_a_reply(reply, plan):
    assert clean_plan(reply) == plan


@settings(deadline=None)
@given(st.lists(st.sampled_from(["press enter", "1. type a", "", "  ", "- b"]), max_size=100))
def test_a_plan_is_bounded_and_has_no_empty_line(lines):
    found = clean_plan("\n".join(lines)).splitlines()
    assert len(found) == min(MAX_PLAN_LINES, sum(bool(line.strip()) for line in lines))
    assert all(line == line.strip() != "" for line in found)
