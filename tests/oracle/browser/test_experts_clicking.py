"""Experts of the clicking tasks, judged by MiniWoB++'s own pages in a live browser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from browsing import browser_pool
from expert_play import play

from datamodules.envs.browser.experts import EXPERTS, NoMoveError
from datamodules.envs.browser.pool import MiniWoBPool
from modules.contracts.browsing import PageView, parse_instruction

pytest.importorskip("miniwob", reason="extra rci")
pytest.importorskip("lxml.html", reason="extra rci")

SOLVED = (
    "click-button", "click-link", "click-test", "click-test-2", "click-tab", "click-checkboxes", "click-dialog",
    "click-dialog-2", "click-option", "click-button-sequence", "click-collapsible", "click-color", "click-widget",
    "click-checkboxes-large", "click-checkboxes-transfer", "click-checkboxes-soft", "click-scroll-list", "choose-list",
    "click-tab-2", "click-tab-2-hard", "click-collapsible-2", "click-menu", "click-shades", "click-shape",
    "count-shape", "identify-shape", "navigate-tree", "grid-coordinate", "multi-layouts", "multi-orderings",
)  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[MiniWoBPool]:
    with browser_pool(pages=4) as made:
        yield made


def check_solved(pool: MiniWoBPool, task: str, seeds: Sequence[int]) -> None:
    """Each episode of the task's expert must earn the whole reward."""
    played = play(pool, task, seeds)
    assert sorted(int(one.seed) for one in played) == sorted(seeds)
    failed = [one for one in played if not (one.last.done and one.last.reward >= 1)]
    assert not failed, [(one.seed, one.first.utterance, one.instructions, one.last.reason) for one in failed]


@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("task", SOLVED)
def test_expert_solves_its_task_as_miniwob_judges_it(pool: MiniWoBPool, task: str) -> None:
    check_solved(pool, task, range(4))


@pytest.mark.slow
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("task", SOLVED)
def test_expert_solves_its_task_on_50_seeds_as_miniwob_judges_it(pool: MiniWoBPool, task: str) -> None:
    check_solved(pool, task, range(50))


BOXES = (
    '<div><label><input type="checkbox" id="ch0"{0}>ab</label><label><input type="checkbox" id="ch1"{1}>c3</label>'
    '<label><input type="checkbox" id="ch2"{2}>Zz</label><button id="subbtn">Submit</button></div>'
)
OFF, ON = "", " checked"
LIST = (
    '<div><select id="options" multiple><option{0}>Cote d\'Or</option><option{1}>Chad</option></select>'
    "<button>Submit</button></div>"
)
SHADES = (
    '<div><span data-color="red"{0}></span><span data-color="red"{1}></span><span data-color="blue"{2}></span>'
    '<button id="submit">Submit</button></div>'
)


@pytest.mark.parametrize(
    ("task", "utterance", "html", "instruction"),
    [
        ("click-checkboxes", "Select Zz, ab and click Submit.", BOXES.format(OFF, OFF, OFF), "//*[@id='ch2']"),
        ("click-checkboxes", "Select Zz, ab and click Submit.", BOXES.format(OFF, OFF, ON), "//*[@id='ch0']"),
        ("click-checkboxes", "Select Zz, ab and click Submit.", BOXES.format(ON, ON, ON), "//*[@id='ch1']"),
        ("click-checkboxes", "Select Zz, ab and click Submit.", BOXES.format(ON, OFF, ON), "//*[@id='subbtn']"),
        ("click-checkboxes", "Select nothing and click Submit.", BOXES.format(OFF, OFF, OFF), "//*[@id='subbtn']"),
        ("click-checkboxes", "Select nothing and click Submit.", BOXES.format(OFF, ON, OFF), "//*[@id='ch1']"),
        ("click-shades", "Select all the shades of red and", SHADES.format("", "", ""), "//span[@data-color='red']"),
        (
            "click-shades", "Select all the shades of red and", SHADES.format(' class="selected"', "", ""),
            "//span[@data-color='red' and not(@class)]",
        ),
        (
            "click-shades", "Select all the shades of red and", SHADES.format("", "", ' class="selected"'),
            "//span[@data-color='blue' and @class]",
        ),
    ],
)  # fmt: skip
def test_what_was_done_wrong_is_put_right(task: str, utterance: str, html: str, instruction: str) -> None:
    assert EXPERTS[task](PageView(utterance, html, ""), ()) == f"clickxpath {instruction}"


@pytest.mark.parametrize(
    ("chosen", "instruction"),
    [
        (("", ""), 'clickoption //option[normalize-space()="Cote d\'Or"]'),
        ((" selected", " selected"), "clickoption //option[normalize-space()='Chad']"),
        ((" selected", ""), "clickxpath //button[normalize-space()='Submit']"),
    ],
)
def test_options_are_chosen_and_taken_back(chosen: tuple[str, str], instruction: str) -> None:
    view = PageView("Select Cote d'Or from the scroll list and click Submit.", LIST.format(*chosen), "")
    given = EXPERTS["click-scroll-list"](view, ())
    assert given == instruction
    assert str(parse_instruction(given)) == given


TREE = (
    '<ul id="tree"><li class="{0}"><span class="folder">Ann</span><ul><li class="{1}"><span class="folder">Ann</span>'
    '<ul><li><span class="file">Bo</span></li></ul></li></ul></li><li><span class="file">Ann</span></li></ul>'
)


@pytest.mark.parametrize(
    ("outer", "inner", "instruction"),
    [
        ("expandable", "expandable", "clickxpath (//span[normalize-space()='Ann'])[1]"),
        ("collapsable", "expandable", "clickxpath (//span[normalize-space()='Ann'])[2]"),
        ("collapsable", "collapsable", "clickxpath //span[normalize-space()='Bo']"),
    ],
)
def test_folders_of_equal_names_are_opened_from_outside_in(outer: str, inner: str, instruction: str) -> None:
    view = PageView('Find and click on the folder or file named "Bo".', TREE.format(outer, inner), "")
    assert EXPERTS["navigate-tree"](view, ()) == instruction


@pytest.mark.parametrize(
    ("task", "utterance", "html", "culprit"),
    [
        ("click-checkboxes", "Select q and click Submit.", BOXES.format(OFF, OFF, OFF), "no box 'q'"),
        (
            "click-checkboxes-soft",
            "Select words similar to big and click",
            BOXES.format(OFF, OFF, OFF),
            "similar to 'big'",
        ),
        ("click-option", "Select q and click Submit.", BOXES.format(OFF, OFF, OFF), "no match of .*name 'q'"),
        ("click-shape", "Click on a red item", '<svg id="area_svg"><line x1="0"></line></svg>', "holds a <line>"),
        ("click-shape", "Click on a red item", '<svg id="area_svg"></svg>', "no red item"),
        ("click-tab-2", 'click on the link "a".', "<div></div>", "no tab holds a link 'a'"),
        ("navigate-tree", 'file named "Cy".', TREE, "no 'Cy'"),
        ("multi-layouts", "for a movies directed by B from year 1990.", "<p>Genre</p>", "no label like Genre"),
        ("click-color", "Click.", "<div></div>", "does not read like"),
    ],
)
def test_page_of_another_kind_is_an_error(task: str, utterance: str, html: str, culprit: str) -> None:
    with pytest.raises(NoMoveError, match=culprit):
        EXPERTS[task](PageView(utterance, f"<div>{html}</div>", ""), ())
