"""Experts of the typing tasks, judged by MiniWoB++'s own pages in a live browser."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from browsing import browser_pool
from expert_play import Played, play

from datamodules.envs.browser.experts import EXPERTS, NoMoveError
from datamodules.envs.browser.experts import typing_tasks as experts
from datamodules.envs.browser.pool import MiniWoBPool
from datamodules.envs.browser.tasks import package_pages
from modules.contracts.browsing import PageView, parse_instruction

pytest.importorskip("miniwob", reason="extra rci")
pytest.importorskip("lxml.html", reason="extra rci")

SOLVED = (
    "enter-text", "focus-text", "focus-text-2", "login-user", "enter-password", "enter-text-dynamic",
    "login-user-popup", "enter-date", "enter-time", "text-transform", "simple-arithmetic", "simple-algebra",
    "use-spinner", "use-autocomplete", "search-engine", "email-inbox", "email-inbox-nl-turk", "email-inbox-forward-nl",
    "email-inbox-forward-nl-turk", "social-media", "social-media-some", "social-media-all", "terminal", "guess-number",
)  # fmt: skip
#: Requests that the page judges by the opposite of what they say, and one it uses both ways round.
REVERSED = (
    r"Find the email from \S+ and forward it to \S+\.",
    r"Find yesterday's emails from \S+ and forward them to \S+\.",
    r"Forward \S+'s email from yesterday to \S+\.",
    r"Forward all messages from \S+ to \S+\.",
    r"Send \S+ the message from \S+\.",
)


@pytest.fixture(scope="module")
def pool() -> Iterator[MiniWoBPool]:
    with browser_pool(pages=4) as made:
        yield made


def fair(one: Played) -> bool:
    """Whether the page asks for what it rewards, and tells all that is needed."""
    if any(re.fullmatch(pattern, one.first.utterance) for pattern in REVERSED):
        return False
    senders = Counter(re.findall(r'class="email-sender">([^<]+)<', one.first.html))
    forwarded = one.instructions[-1] == "clickxpath //*[@id='send-forward']"
    # Two e-mails by the sender: the words don't tell which of them to forward.
    return not (forwarded and max(senders[name] for name in senders if name in one.first.utterance) > 1)


def check_solved(pool: MiniWoBPool, task: str, seeds: Sequence[int]) -> None:
    played = play(pool, task, seeds)
    assert sorted(int(one.seed) for one in played) == sorted(seeds)
    failed = [one for one in played if not (one.last.done and one.last.reward >= 1) and fair(one)]
    assert not failed, [(one.seed, one.first.utterance, one.instructions, one.last.reason) for one in failed]
    assert sum(one.last.reward >= 1 for one in played) >= 0.75 * len(played)  # `fair` excuses few


@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("task", SOLVED)
def test_expert_solves_its_task_as_miniwob_judges_it(pool: MiniWoBPool, task: str) -> None:
    check_solved(pool, task, range(4))


@pytest.mark.slow
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("task", SOLVED)
def test_expert_solves_its_task_on_50_seeds_as_miniwob_judges_it(pool: MiniWoBPool, task: str) -> None:
    check_solved(pool, task, range(50))


def check_never_loses(pool: MiniWoBPool, seeds: Sequence[int]) -> None:
    rewards = Counter(one.last.reward for one in play(pool, "tic-tac-toe", seeds))
    assert sum(rewards.values()) == len(seeds)
    assert set(rewards) <= {1.0, -0.5}, rewards  # wins and draws
    assert rewards[1.0] >= 0.6 * len(seeds), rewards  # 0.82 is expected


@pytest.mark.xdist_group("browser")
def test_tic_tac_toe_expert_never_loses_as_miniwob_judges_it(pool: MiniWoBPool) -> None:
    check_never_loses(pool, range(4))


@pytest.mark.slow
@pytest.mark.xdist_group("browser")
def test_tic_tac_toe_expert_never_loses_on_50_seeds_as_miniwob_judges_it(pool: MiniWoBPool) -> None:
    check_never_loses(pool, range(50))


def ttt_view(board: str) -> PageView:
    marks = {"x": ' class="mark-x"', "o": ' class="mark-o"', " ": ""}
    cells = "".join(f'<span id="ttt-{cell}"{marks[mark]}></span>' for cell, mark in enumerate(board))
    return PageView("Playing as 'X', win a game of tic-tac-toe.", f'<div id="wrap">{cells}</div>', "")


def test_tic_tac_toe_expert_loses_against_no_opponent() -> None:
    lines = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
    boards, ends = [" " * 9, *(" " * cell + "o" + " " * (8 - cell) for cell in range(9))], Counter()
    while boards:  # all games that can come about
        board = boards.pop()
        cell = int(re.fullmatch(r"clickxpath //\*\[@id='ttt-(\d)'\]", EXPERTS["tic-tac-toe"](ttt_view(board), ()))[1])  # type: ignore[index]
        assert board[cell] == " "
        board = board[:cell] + "x" + board[cell + 1 :]
        if any(all(board[i] == "x" for i in line) for line in lines):
            ends["win"] += 1
            continue
        if " " not in board:
            ends["draw"] += 1
        for reply in (i for i in range(9) if board[i] == " "):
            after = board[:reply] + "o" + board[reply + 1 :]
            assert not any(all(after[i] == "o" for i in line) for line in lines), after
            if " " in after:
                boards.append(after)
            else:
                ends["draw"] += 1
    assert ends["win"] > ends["draw"] > 0


def requests() -> list[tuple[str, str]]:
    """Kind and template of all requests that the pages make in free words."""
    text = (package_pages() / "common/special/email-inbox-nl/templates.js").read_text(encoding="utf-8")
    listed = json.loads(text.split("=", 1)[1].strip().removesuffix(";"))
    found = [(kind, line) for kind, parts in listed.items() for part in parts.values() for line in part]
    page = (package_pages() / "miniwob/email-inbox-forward-nl.html").read_text(encoding="utf-8")
    lists = page[page.index("var NL_TEMPLATES") : page.index("var displayQuery")]
    return found + [("forward", line) for line in re.findall(r"^ +'(.*)',$", lists, re.MULTILINE)]


@pytest.mark.parametrize(
    ("name", "other"), [("Ada", "Zoe"), ("Ada", "Adaline"), ("Adaline", "Ada"), ("Ann", "Ann-Marie"), ("Dee Dee", "Al")]
)
def test_requests_are_read_as_miniwob_means_them(name: str, other: str) -> None:
    wanted = {
        "reply": ("reply", name, "Sed ut. Nibh."), "forward": ("forward", name, other),
        "important": ("star", name, ""), "delete": ("trash", name, ""),
    }  # fmt: skip
    wrong, kinds = [], Counter()
    for kind, template in requests():
        kinds[kind] += 1
        text = template.replace("NAME", name, 1).replace("DEST", other, 1).replace("MSG", "Sed ut. Nibh.", 1)
        if experts.read_request(" ".join(text.split()), ["Vi", name, other, "Sed"]) != wanted[kind]:
            wrong.append(template)
    assert kinds == {"forward": 189, "reply": 136, "important": 108, "delete": 87}
    # Only those whose words say the opposite.
    assert sorted(wrong) == [
        "Find the email from DEST and forward it to NAME.",
        "Find yesterday's emails from DEST and forward them to NAME.",
        "Forward DEST's email from yesterday to NAME.",
        "Forward all messages from DEST to NAME.",
        "Send NAME the message from DEST.",
    ]


def test_request_that_names_nobody_in_the_inbox_is_an_error() -> None:
    with pytest.raises(NoMoveError, match="names none of Ada, Zoe"):
        experts.read_request("Delete the email from Adam.", ["Ada", "Zoe"])


FORM = '<div id="wrap"><input id="tt" type="text"{0}><input id="tags"{0}><button id="subbtn">Submit</button></div>'


@pytest.mark.parametrize(
    ("task", "utterance", "state", "instruction"),
    [
        ("enter-text", 'Enter "Ada" into the text field.', "", "clickxpath //*[@id='tt']"),
        ("enter-text", 'Enter "Ada" into the text field.', " data-focused", "type Ada"),
        ("enter-text", 'Enter "Ada" into the text field.', ' data-focused value="Ad"', "type a"),
        ("enter-text", 'Enter "Ada" into the text field.', ' data-focused value="Abe"', "press backspace"),
        ("enter-text", 'Enter "Ada" into the text field.', ' value="Ada"', "clickxpath //*[@id='subbtn']"),
        ("use-autocomplete", 'Enter an item that starts with "Sri ".', " data-focused", "type Sri"),
        ("use-autocomplete", 'Enter an item that starts with "Sri ".', ' data-focused value="Sri"', "press arrowdown"),
    ],
)  # fmt: skip
def test_fields_are_brought_to_their_values_one_instruction_at_a_time(
    task: str, utterance: str, state: str, instruction: str
) -> None:
    given = EXPERTS[task](PageView(utterance, FORM.format(state), ""), ())
    assert given == instruction
    assert str(parse_instruction(given)) == given


@pytest.mark.parametrize(
    ("task", "html", "culprit"),
    [
        ("simple-algebra", '<div id="math-problem">7 + 1 = 8</div>', "no equation in x"),
        ("simple-arithmetic", '<div id="math-problem">7 / 1 =</div>', "no sum, difference or product"),
        ("text-transform", "<div></div>", "no element 'captcha'"),
        ("enter-text", "<div></div>", "does not read like"),
    ],
)
def test_page_of_another_kind_is_an_error(task: str, html: str, culprit: str) -> None:
    with pytest.raises(NoMoveError, match=culprit):
        EXPERTS[task](PageView("Do this.", html, ""), ())
