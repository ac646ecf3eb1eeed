"""Demonstrations: recording that goes on after a kill, renamed copies, wrong drafts and what is said of them."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from browsing import browser_pool
from fake_pages import MARK, FakePages
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.envs.browser.demonstrations import (
    Episode,
    Renamer,
    Step,
    check_experts,
    corrupt,
    examples,
    expert_move,
    fault,
    load_drafts,
    load_episodes,
    page_key,
    record,
    summary,
    training_rows,
)
from datamodules.envs.browser.experts import EXPERTS, NoMoveError
from modules.contracts.browsing import ActionPrompts, EpisodeSpec, PageView, is_instruction
from modules.rci.agent import Reset

WORDS = re.compile(r"[A-Za-z]+|[0-9]+")
LITERAL = re.compile(r"'[^']*'")
SCRIPT = ("clickxpath //a[.='é']", "type b", "press enter")


def script(spec: EpisodeSpec) -> tuple[str, ...]:
    return SCRIPT[: 1 + int(spec.seed) % 3]


def read(view: PageView, history: Any) -> str:
    """An expert of the pages without a browser."""
    task, seed, done = MARK.findall(view.html)[-1]
    assert int(done) == len(history)
    return script(EpisodeSpec(task, seed))[int(done)]


@pytest.fixture(autouse=True)
def _experts(monkeypatch):
    monkeypatch.setitem(EXPERTS, "fake", read)


def specs(count: int) -> list[EpisodeSpec]:
    return [EpisodeSpec("fake", str(seed)) for seed in range(count)]


def played(pages: FakePages) -> list[str]:
    return [entry.spec.seed for entry in pages.log if isinstance(entry, Reset)]


# ------------------------------------------------------------------------------------------------------------ recording


@pytest.mark.parametrize("slots", [1, 3, 20])
def test_experts_are_recorded_in_order_whatever_the_number_of_pages(tmp_path, slots):
    pages = FakePages(script, slots=slots, goal="é\u2028\x85 goal")
    path = tmp_path / "new" / "fake.jsonl"
    found = record(pages, specs(8), path)  # pyright: ignore[reportArgumentType]
    assert [episode.seed for episode in found] == [str(seed) for seed in range(8)]
    assert all(episode.solved for episode in found)
    assert [[step["action"] for step in episode.steps] for episode in found] == [list(script(s)) for s in specs(8)]
    assert found[4].steps[1] == {"goal": "é\u2028\x85 goal", "page": "button [at fake 4 1]", "action": "type b"}
    assert load_episodes(path) == {("fake", episode.seed): episode for episode in found}
    decisions = list(found[5].decisions())
    assert [len(step.history) for step in decisions] == [0, 1, 2]
    assert decisions[2].history == SCRIPT[:2]
    assert decisions[2].action == "press enter"
    assert summary(found) == {"fake": {"episodes": 8, "solved": 8, "steps": 3 + 3 * 3 + 3}}


def test_a_recording_cut_anywhere_goes_on_and_plays_nothing_twice(tmp_path):
    path = tmp_path / "fake.jsonl"
    once = record(FakePages(script, slots=1, goal="é"), specs(4), path)  # pyright: ignore[reportArgumentType]
    whole = path.read_bytes()
    for cut in range(0, len(whole) + 1, 29):
        path.write_bytes(whole[:cut])
        pages = FakePages(script, slots=1, goal="é")
        assert record(pages, specs(4), path) == once  # pyright: ignore[reportArgumentType]
        assert path.read_bytes() == whole
        assert played(pages) == [str(seed) for seed in range(whole[:cut].count(b"\n"), 4)]
    pages = FakePages(script, slots=1)
    assert [e.seed for e in record(pages, specs(6)[::-1], path)] == list("543210")  # pyright: ignore[reportArgumentType]
    assert played(pages) == ["5", "4"]


def test_a_browser_that_fails_is_tried_again_and_then_named(tmp_path):
    class Once(FakePages):
        def step_pages(self, instructions: Any) -> Any:
            views = super().step_pages(instructions)
            if any(view.status == "error" for view in views.values()):
                self.trouble = {}
            return views

    pages = Once(script, trouble={("2", 1): "error"}, slots=1)
    found = record(pages, specs(4), tmp_path / "a.jsonl")  # pyright: ignore[reportArgumentType]
    assert [episode.solved for episode in found] == [True] * 4
    assert len(found[2].steps) == 3  # nothing of the failed attempt is in it
    assert played(pages) == ["0", "1", "2", "2", "3"]
    for at, status in ((-1, "error"), (0, "left_page")):
        pages = FakePages(script, trouble={("2", at): status}, slots=1)
        path = tmp_path / f"{status}.jsonl"
        with pytest.raises(RuntimeError, match=r"fake, seed '2': the browser failed 3 times \((no page|lost)\)"):
            record(pages, specs(4), path, attempts=3)  # pyright: ignore[reportArgumentType]
        assert played(pages) == ["0", "1", "2", "2", "2"]
        assert list(load_episodes(path)) == [("fake", "0"), ("fake", "1")]  # what was recorded stands


def wrong(view: PageView, history: Any) -> str:
    return "press space"


def lost(view: PageView, history: Any) -> str:
    if history:
        raise NoMoveError("no way on")
    return read(view, history)


@pytest.mark.parametrize(
    ("expert", "most", "steps", "solved"),
    [(wrong, 25, [1, 1, 1], [False] * 3), (lost, 25, [1, 1, 1], [True, False, False]),
     (read, 2, [1, 2, 2], [True, True, False])],
)  # fmt: skip
def test_episodes_that_experts_do_not_solve_are_kept_and_marked(tmp_path, monkeypatch, expert, most, steps, solved):
    monkeypatch.setitem(EXPERTS, "fake", expert)
    found = record(FakePages(script), specs(3), tmp_path / "a.jsonl", max_steps=most)  # pyright: ignore[reportArgumentType]
    assert [len(episode.steps) for episode in found] == steps
    assert [episode.solved for episode in found] == solved
    assert list(load_episodes(tmp_path / "a.jsonl").values()) == found


def test_experts_are_asked_where_they_can_answer():
    view = PageView("do it", "[at fake 2 0]", "")
    assert expert_move("fake", view, []) == SCRIPT[0]
    assert expert_move("fake", PageView("", "", ""), []) is None  # a page it can't read
    assert expert_move("fake", PageView("do it", "[at fake 2 0]", "", done=True), []) is None
    assert expert_move("nothing", view, []) is None
    check_experts(["fake", "click-button"])
    with pytest.raises(ValueError, match="no expert for task 'nothing'; there are choose-list, click-button, "):
        check_experts(["fake", "nothing"])


def test_files_of_another_kind_are_named(tmp_path):
    path: Path = tmp_path / "a.jsonl"
    for row, line in (({"task": "a"}, "line 1 is no episode"), ({"task": "a", "seed": "1", "x": 1}, "is no episode")):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=f"^demonstrations: .*a.jsonl: {line}|{line}"):
            load_episodes(path)
        with pytest.raises(ValueError, match="^drafts: .*a.jsonl: line 1 is no step with a draft"):
            load_drafts(path)
    row = {"task": "a", "seed": "1", "goal": "g", "page": "p", "history": ["x"], "action": "press enter",
           "draft": "press up", "status": "malformed"}  # fmt: skip
    path.write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    assert load_drafts(path) == [Step("a", "1", "g", "p", ("x",), "press enter", "press up", "malformed")]
    assert page_key("a", "b") == page_key("a", "b") != page_key("a", "c") != page_key("a\nb", "")


@pytest.mark.xdist_group("browser")
def test_real_episodes_are_solved_and_what_is_said_of_wrong_drafts_is_what_the_browser_says(tmp_path):
    tasks = ("click-checkboxes", "login-user")
    with browser_pool(pages=3) as pool:
        for task in tasks:
            found = record(pool, [EpisodeSpec(task, f"tr{n}") for n in range(3)], tmp_path / f"{task}.jsonl")
            assert all(episode.solved for episode in found)
            claimed: Counter[tuple[str, str]] = Counter()
            paths = [list(episode.decisions()) for episode in found]
            views = pool.reset_pages({slot: EpisodeSpec(task, path[0].seed) for slot, path in enumerate(paths)})
            for number in range(3):
                live = {slot: path[number] for slot, path in enumerate(paths) if number < len(path)}
                for slot, step in live.items():
                    assert (step.goal, step.page) == (views[slot].utterance, views[slot].page)
                for draw in range(20):
                    drafts = {slot: corrupt(step, random.Random(f"{slot} {draw}")) for slot, step in live.items()}
                    statuses = pool.probe_pages({slot: draft for slot, (draft, _) in drafts.items()})
                    claimed.update((drafts[slot][1], statuses[slot]) for slot in live)
                views |= pool.step_pages({slot: step.action for slot, step in live.items()})
            assert set(claimed) == {(s, s) for s in ("ok", "malformed", "bad_xpath", "no_match")}
            assert min(claimed.values()) >= 5


# ------------------------------------------------------------------------------------------------------- renamed copies

NAMES = st.one_of(
    st.from_regex(r"[a-z]{1,2}|[0-9]|[A-Z][a-z]{0,5}|[A-Za-z0-9]{2,6}", fullmatch=True), st.sampled_from("abAB019")
)


def boxes(names: list[str], target: str, done: tuple[str, ...] = ()) -> Step:
    """A step as the checkbox tasks have them."""
    page = "\n".join(f"label {name}\ninput#ch{i}[checkbox] off" for i, name in enumerate(names))
    action = f"clickxpath //label[contains(., '{target}')]/input"
    history = tuple(f"clickxpath //label[contains(., '{name}')]/input" for name in done)
    return Step("boxes", "tr0", f"Select {', '.join(names[:2])} and click Submit.", page, history, action)


FIXED = [boxes([f"{chr(97 + n)}q{n}", f"Zeta{n * 7}{chr(98 + n)}"], f"{chr(97 + n)}q{n}") for n in range(12)]


def occurs(literal: str, text: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(literal.strip(chr(39)))}(?![A-Za-z0-9])", text) is not None


@settings(max_examples=150, deadline=None)
@given(st.lists(NAMES, min_size=2, max_size=8), NAMES, st.booleans(), st.integers(0, 10**6))
def test_renaming_keeps_which_words_are_equal_and_where_literals_occur(names, other, inside, seed):
    step = boxes(names, names[seed % len(names)] if inside else other, tuple(names[:2]))
    renamer = Renamer([*FIXED, step])
    renamed = renamer(step, random.Random(seed))
    texts = [(step.goal, renamed.goal), (step.page, renamed.page), (step.action, renamed.action),
             *zip(step.history, renamed.history, strict=True)]  # fmt: skip
    pairs: dict[str, str] = {}
    for before, after in texts:
        assert WORDS.sub("", before) == WORDS.sub("", after)  # the rest of the text stays
        for old, new in zip(WORDS.findall(before), WORDS.findall(after), strict=True):
            assert pairs.setdefault(old, new) == new
            assert (old.isdigit(), old[0].isupper()) == (new.isdigit(), new[0].isupper())
    assert len(set(pairs.values())) == len(pairs)  # what differed differs
    for word in ("Select", "click", "Submit", "label", "input", "checkbox", "off", "clickxpath", "contains"):
        assert pairs.get(word, word) == word
    for old, new in zip(LITERAL.findall(step.action), LITERAL.findall(renamed.action), strict=True):
        for before, after in texts[:2]:
            assert occurs(old, before) == occurs(new, after)
    assert is_instruction(renamed.action)
    assert (renamed.task, renamed.seed, renamed.draft, renamed.status) == ("boxes", "tr0", "", "ok")


def test_a_step_is_renamed_as_a_whole():
    step = boxes(["kFt", "oM9", "Rue 7"], "oM9", ("kFt",))
    renamed = Renamer([*FIXED, step])(step, random.Random(1))
    first, second = re.findall(r"label (\S+)\n", renamed.page)[:2]
    assert renamed.goal == f"Select {first}, {second} and click Submit."
    assert renamed.action == f"clickxpath //label[contains(., '{second}')]/input"
    assert renamed.history == (f"clickxpath //label[contains(., '{first}')]/input",)
    assert not {first, second} & {"kFt", "oM9"}
    again = [Renamer([*FIXED, step])(step, random.Random(seed)) for seed in (1, 1, 2)]
    assert again[0] == again[1] == renamed != again[2]
    drafted = Step(**{**vars(step), "draft": "clickxpath //label[contains(., 'kFt')]/input", "status": "ok"})
    assert Renamer([*FIXED, step])(drafted, random.Random(1)).draft == renamed.history[0]


def test_grammar_is_never_renamed_and_what_can_not_be_copied_stays_as_it_is():
    def step(action: str, page: str = "button#go Go", goal: str = "Enter 03/07/2018.") -> Step:
        return Step("boxes", "1", goal, page, (), action)

    for action in ("press arrowdown", "clickxpath (//li[contains(concat(' ', @class), ' Enter ')])[1]"):
        renamed = Renamer([*FIXED, step(action)], common=0.2)(step(action), random.Random(3))
        assert LITERAL.sub("", renamed.action) == LITERAL.sub("", action)
        assert renamed.goal != "Enter 03/07/2018."
    date = step("type 03072018")  # follows from the goal, but not word by word
    assert Renamer([*FIXED, date])(date, random.Random(3)) == date
    typed = step("type 2018")
    renamed = Renamer([*FIXED, typed])(typed, random.Random(3))
    assert renamed.goal.split("/")[2] == renamed.action.split()[1] + "." != "2018."


# ---------------------------------------------------------------------------------------- wrong drafts and their faults

PAGE = "label Username\ninput#username *\nlabel Password\ninput#password[password]\nbutton#subbtn Login\nbutton Cancel"
LOGIN = Step("login", "1", 'Enter the username "ann".', PAGE, (), "clickxpath //*[@id='username']")
OPTION = Step("list", "1", "Select Chad.", "select#options\noption Chad on\noption Togo\nbutton Submit", (),
              "clickoption //option[normalize-space()='Togo']")  # fmt: skip
TYPED = Step(**{**vars(LOGIN), "action": "type ann"})


@pytest.mark.parametrize("step", [LOGIN, OPTION, TYPED])
def test_wrong_drafts_are_of_the_kinds_and_shares_that_are_promised(step):
    drafts = [corrupt(step, random.Random(seed)) for seed in range(1500)]
    kinds: Counter[str] = Counter()
    names = {"Chad", "Togo", "Submit"} if step is OPTION else {"Username", "Password", "Login", "Cancel"}
    frame = LITERAL.sub("''", step.action)
    for draft, status in drafts:
        assert (status == "malformed") == (not is_instruction(draft))
        if draft.split()[0] != step.action.split()[0]:
            kinds["verb"] += 1
            assert draft.split(" ", 1)[1] == step.action.split(" ", 1)[1]
        elif step is TYPED:
            kinds["name" if draft[5:] in names else "more"] += 1
            assert draft[5:] in {*names, "annx"}
            assert status == "ok"
        elif draft.count("'") % 2:
            kinds["broken"] += 1
            assert status == "bad_xpath"
        elif LITERAL.sub("''", draft) == frame:
            kinds["name"] += 1
            assert LITERAL.findall(draft)[0].strip("'") in names
            assert status == ("ok" if "Chad" in draft or "Togo" in draft else "no_match")
        else:
            kinds["tag"] += 1
            assert LITERAL.findall(draft) == LITERAL.findall(step.action)
            assert status == "no_match"
            assert not draft.startswith(("clickxpath //input", "clickoption //option"))  # which would be right
    shares = {kind: count / 1500 for kind, count in kinds.items()}
    promised = {"name": 0.4, "verb": 0.2, "broken": 0.2, "tag": 0.2}
    if step is TYPED:
        promised = {"name": 0.4, "verb": 0.2, "more": 0.4}  # no XPath to break
    assert shares.keys() == promised.keys()
    for kind, share in promised.items():
        assert abs(shares[kind] - share) < 4 * (share * (1 - share) / 1500) ** 0.5, kind


@pytest.mark.parametrize(
    ("draft", "action", "status", "said"),
    [
        ("press enter", "press enter", "ok", "ok"),
        ("press enter", "press enter", "no_match", "ok"),
        ("say it", "press enter", "ok", "not an instruction"),
        ("", "press enter", "malformed", "not an instruction"),
        ("clickxpath //a[", "clickxpath //a", "bad_xpath", "broken XPath"),
        ("clickxpath //b", "clickxpath //a", "no_match", "no such element"),
        ("clickxpath //b", "type x", "not_clickable", "no such element"),
        ("type x", "clickxpath //a", "ok", "not the time to type"),
        ("CLICKXPATH //a", "press enter", "ok", "not the time to clickxpath"),
        ("type y", "type x", "ok", "wrong text"),
        ("press space", "press enter", "ok", "wrong key"),
        ("clickxpath //b", "clickxpath //a", "ok", "wrong element"),
        ("clickoption //b", "clickoption //a", "ok", "wrong element"),
    ],
)
def test_the_fault_of_a_draft(draft, action, status, said):
    assert fault(draft, action, status) == said


def test_examples_are_what_the_agent_will_be_asked():
    prompts = ActionPrompts()
    start = prompts.acting(LOGIN.goal, LOGIN.page, LOGIN.history)
    act = {"kind": "act", "prompt": start, "response": " clickxpath //*[@id='username']"}
    assert examples(LOGIN, prompts) == [act]
    drafted = Step(**{**vars(LOGIN), "draft": "type ann", "status": "ok"})
    said = f"{start} type ann\n?"
    for generator in (None, random.Random(1)):  # a draft of its own goes first
        assert examples(drafted, prompts, generator) == [
            act,
            {"kind": "critique", "prompt": said, "response": " not the time to type"},
            {"kind": "improve", "prompt": f"{said} not the time to type\n>", "response": act["response"]},
        ]
    right = 0
    for seed in range(400):
        rows = examples(LOGIN, prompts, random.Random(seed))
        assert [row["kind"] for row in rows] == ["act", "critique", "improve"]
        assert rows[2]["prompt"].startswith(rows[1]["prompt"] + rows[1]["response"])
        assert rows[0]["response"] == rows[2]["response"] == act["response"]
        right += rows[1]["response"] == " ok"
    assert 0.3 < right / 400 < 0.5


def test_training_rows_are_a_pure_function_of_steps_and_seed():
    prompts = ActionPrompts()

    def rows(**changes: Any) -> list[dict[str, str]]:
        options = {"renamed": 2, "critiques": True, "seed": 5, **changes}
        return list(training_rows(FIXED, prompts, **options))

    assert rows() == rows()
    assert rows() != rows(seed=6)
    assert len(rows()) == len(FIXED) * 3 * 3
    plain = rows(renamed=0, critiques=False)
    assert [row["prompt"] for row in plain] == [prompts.acting(s.goal, s.page, s.history) for s in FIXED]
    assert rows(critiques=False)[::3] == plain  # the step itself, then its copies
    assert len({row["prompt"] for row in rows(critiques=False)}) == len(FIXED) * 3
    acts = rows(only={"act": True, "critique": False})
    assert acts == [row for row in rows() if row["kind"] == "act"]
    assert Counter(row["kind"] for row in rows()) == dict.fromkeys(("act", "critique", "improve"), len(FIXED) * 3)
    assert list(training_rows([], prompts, renamed=1, critiques=True, seed=0)) == []


def test_an_episode_without_steps_is_one():
    assert list(Episode("fake", "1").decisions()) == []
    assert summary([Episode("b", "1"), Episode("a", "1", True, [{}])]) == {
        "b": {"episodes": 1, "solved": 0, "steps": 0}, "a": {"episodes": 1, "solved": 1, "steps": 1},
    }  # fmt: skip
