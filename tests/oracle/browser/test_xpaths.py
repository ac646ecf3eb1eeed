"""XPaths in a live page against lxml on the page's saved HTML; agents that know nothing; a coin on two buttons."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from browsing import browser_pool, start
from fake_pages import play

from datamodules.envs.browser.pool import MiniWoBPool
from modules.contracts.browsing import EpisodeSpec
from modules.language.backends.base import Request
from modules.rci.agent import Agent, Strategy
from modules.rci.prompting import PromptLibrary

etree = pytest.importorskip("lxml.etree", reason="extra rci")
html = pytest.importorskip("lxml.html", reason="extra rci")
pytestmark = pytest.mark.xdist_group("browser")

TASKS = ("click-checkboxes", "login-user", "click-tab-2", "choose-list", "email-inbox", "multi-layouts", "social-media")
#: What models write, over tags, attributes, texts, axes, functions, positions, unions, and mistakes.
XPATHS = (
    "//button", "//input", "//a", "//div", "//span", "//label", "//option", "//p", "//h3", "//select", "//*",
    "//nothing", "//*[@id='subbtn']", "//*[@id='tt']", "//*[@id='username']", "//*[@id='wrap']", '//*[@id="password"]',
    "//*[@class]", "//*[@class='bold']", "//*[contains(@class, 'icon')]", "//div[@id='area']//a",
    "//input[@type='checkbox'][2]", "(//input)[last()]", "(//a)[3]", "//a[1]", "//a[position()=2]", "(//div)[9]",
    "(//span)[99]", "//input[not(@id)]", "//button[text()='Submit']", "//button[normalize-space()='Submit']",
    "//button[.='Submit']", "//button[text()]", "//*[text()='Login']", "//label[contains(., 'a')]",
    "//label[contains(., 'e')]/input", "//label/following::input[1]", "//input/..", "//input/parent::label",
    "//input/ancestor::div[1]", "//button/preceding::input[1]", "//div/div/span", "//label/descendant-or-self::*",
    "//ul/li[2]/a", "//li[starts-with(., 'Tab')]", "//li[last()]", "//button | //input", "//input | //a | //div",
    "//*[self::button or self::a]", "//*[string-length(@id) > 6]", "//div[count(*) > 2]", "//option[2]",
    "//option[normalize-space()='Chad']", "//select/option[last()]", "//input[@type='text' and @id]",
    "//*[@id='area']/*[1]", "//*[translate(@id, 'SUB', 'sub')='subbtn']", "//div[.//span and not(@id)]",
    "//*[name()='button']", "//button[2 > 1]", "//button[1 = 2]", "//*[concat(@id, 'x')='subbtnx']", "//@id/..",
    "//*[@id='Cote d''Or']", "//button[", "//button]", "//", "button", "//button[text()='Submit]", "//a[@href=]",
    "//*[@id=subbtn]", "//button[contains(text(), 'Sub')]", "//*[contains(text(), 'u')]", "(//button", "//button)[1]",
    "string(//button)", "count(//a)", "1 = 1", "//*[unknown()]", "$x", "//x:button", "//button/@id", "//button/text()",
)  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[MiniWoBPool]:
    with browser_pool(pages=8) as pool:
        yield pool


class Saved:
    """What a page showed, read by lxml, as far as it is in ``wrap``: the browser also sees the frame around it."""

    def __init__(self, text: str) -> None:
        self.root = html.document_fromstring(f"<html><body>{text}</body></html>")
        (self.wrap,) = self.root.xpath("//*[@id='wrap']")

    def select(self, xpath: str) -> list[Any] | None:
        """Elements in document order, that of an attribute or text in its place; None: no XPath, or no nodes."""
        try:
            found = self.root.xpath(xpath)
        except etree.XPathError:
            return None
        if not isinstance(found, list):
            return None
        nodes = [node if isinstance(node, etree._Element) else node.getparent() for node in found]
        return [node for node in nodes if node is self.wrap or self.wrap in node.iterancestors()]

    def place(self, node: Any) -> str:
        """The way from ``wrap`` to an element, as an XPath."""
        steps = []
        while node is not self.wrap:
            above = node.getparent()
            steps.append(f"/*[{list(above.iterchildren('*')).index(node) + 1}]")
            node = above
        return "//*[@id='wrap']" + "".join(reversed(steps))


def within(xpath: str) -> str:
    """The elements in ``wrap`` alone."""
    return f"({xpath})[ancestor-or-self::*[@id='wrap']]"


def is_first(xpath: str, place: str) -> str:
    """An XPath that has a match if the first match of ``xpath`` is the element at ``place``."""
    return f"//*[@id='wrap'][count(({within(xpath)})[1]/ancestor-or-self::*[1] | {place}) = 1]"


@pytest.mark.parametrize("task", TASKS)
def test_first_matches_equal_those_of_lxml_on_the_saved_page(pool, task):
    saved = Saved(start(pool, task, "12").html)

    def probed(xpath: str) -> str:
        return pool.probe_pages({0: f"clickxpath {xpath}"})[0]

    seen: Counter[str] = Counter()
    for xpath in XPATHS:
        nodes = saved.select(xpath)
        expected = "bad_xpath" if nodes is None else "ok" if nodes else "no_match"
        assert probed(within(xpath)) == expected, xpath
        seen[expected] += 1
        if nodes is None:
            assert probed(xpath) == "bad_xpath", xpath
        elif nodes:
            assert probed(xpath) == "ok", xpath
            assert probed(is_first(xpath, saved.place(nodes[0]))) == "ok", xpath
            assert all(probed(is_first(xpath, saved.place(n))) == "no_match" for n in nodes[1:3] if n is not nodes[0])
    assert seen["bad_xpath"] >= 12
    assert seen["ok"] >= 12
    assert seen["no_match"] >= 8


def test_where_a_live_page_and_lxml_differ_by_design(pool):
    saved = Saved(start(pool, "click-shape", "12").html)
    # in a live page, drawings have a namespace of their own, and the names of other elements know no case; lxml reads
    # three slashes as two
    for xpath, live, stored in (
        ("//svg", "no_match", True), ("//*[name()='svg']", "ok", True), ("//DIV", "ok", False), ("//div", "ok", True),
        ("///div", "bad_xpath", True),
    ):  # fmt: skip
        assert pool.probe_pages({0: f"clickxpath {xpath}"})[0] == live
        assert bool(saved.select(xpath)) == stored


# ------------------------------------------------------------------------------------------- agents that know nothing

AGENT = Agent(PromptLibrary("default"))
DIRECT = Strategy(erci=-1, irci=0, state_grounding=False, max_steps=3)


def test_doing_nothing_solves_nothing(pool):
    specs = [EpisodeSpec(task, f"te{seed}") for task in TASKS[:3] for seed in range(8)]
    records = play(AGENT, DIRECT, specs, pool, lambda _: "press arrowup", width=pool.slots)
    assert [record.result.reward for record in records] == [0.0] * 24
    assert {record.result.reason for record in records} == {"step limit"}
    assert not any(record.result.error for record in records)


def test_a_coin_between_two_buttons_is_right_in_half_of_the_episodes(pool):
    generator = random.Random(4)
    specs = [EpisodeSpec("click-test-2", f"te{seed}") for seed in range(60)]

    def coin(_: Request) -> str:
        return f"clickxpath (//button)[{generator.randint(1, 2)}]"

    records = play(AGENT, DIRECT, specs, pool, coin, width=pool.slots)
    assert {record.result.steps for record in records} == {1}
    solved = sum(record.result.strict for record in records)
    # fewer than 18 or more than 42 of 60: 0.2 % of fair coins
    assert 18 <= solved <= 42
    assert all(record.result.reward in (1.0, -1.0) for record in records)
