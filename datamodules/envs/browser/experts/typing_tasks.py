"""Experts of the MiniWoB++ tasks in which something is typed, counted or looked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from datamodules.envs.browser.experts.base import NoMoveError, by_id, by_text, element, expert, fill, find, quote, tree
from modules.contracts.browsing import PageView


def form(view: PageView, fields: dict[str, str], submit: str = "subbtn") -> str:
    """Fill text fields, then click ``submit``."""
    return fill(tree(view), {by_id(name): text for name, text in fields.items()}) or by_id(submit)


@expert("enter-text", "enter-text-dynamic")
def enter_text(view: PageView, history: Sequence[str]) -> str:
    (text,) = find(view, r'Enter "(.*)" into')
    return form(view, {"tt": text})


@expert("focus-text")
def focus_text(view: PageView, history: Sequence[str]) -> str:
    return by_id("tt")


@expert("focus-text-2")
def focus_text_2(view: PageView, history: Sequence[str]) -> str:
    (number,) = find(view, r"the (\d)\w\w input")
    return by_id(f"tt{number}")


@expert("login-user", "login-user-popup")
def login_user(view: PageView, history: Sequence[str]) -> str:
    root = tree(view)
    if root.xpath("//*[@id='popup-cancel']"):
        return by_id("popup-cancel")
    user, password = find(view, r'username "(.*)" and the password "(.*)" into')
    return fill(root, {by_id("username"): user, by_id("password"): password}) or by_id("subbtn")


@expert("enter-password")
def enter_password(view: PageView, history: Sequence[str]) -> str:
    (password,) = find(view, r'password "(.*)" into')
    return form(view, {"password": password, "verify": password})


@expert("enter-date")
def enter_date(view: PageView, history: Sequence[str]) -> str:
    month, day, year = find(view, r"(\d+)/(\d+)/(\d+)")
    return _parts(view, history, f"{month}{day}{year}", f"{year}-{month}-{day}")


@expert("enter-time")
def enter_time(view: PageView, history: Sequence[str]) -> str:
    hour, minute, half = find(view, r"(\d+):(\d+)\s*([AP]M)")
    day_hour = int(hour) % 12 + (12 if half == "PM" else 0)
    return _parts(view, history, f"{int(hour):02d}{minute}{half}", f"{day_hour:02d}:{minute}")


def _parts(view: PageView, history: Sequence[str], keys: str, value: str) -> str:
    """Fill a date or time field: a click may land in any of its three parts, typing goes on from part to part."""
    field = element(tree(view), "tt")
    if field.get("value") == value:
        return by_id("subbtn")
    if "data-focused" not in field.attrib:
        return by_id("tt")
    return f"type {keys}" if list(history[-2:]) == ["press arrowleft"] * 2 else "press arrowleft"


@expert("text-transform")
def text_transform(view: PageView, history: Sequence[str]) -> str:
    root = tree(view)
    text = "".join(span.text_content() for span in element(root, "captcha"))
    return fill(root, {by_id("tt"): text}) or by_id("subbtn")


@expert("simple-arithmetic")
def simple_arithmetic(view: PageView, history: Sequence[str]) -> str:
    root = tree(view)
    problem = element(root, "math-problem").text_content()
    match = re.fullmatch(r"\s*(\d+) ([-+x]) (\d+) =\s*", problem)
    if match is None:
        raise NoMoveError(f"{problem!r} is no sum, difference or product")
    left, right = int(match[1]), int(match[3])
    answer = {"+": left + right, "-": left - right, "x": left * right}[match[2]]
    return fill(root, {by_id("math-answer"): str(answer)}) or by_id("subbtn")


@expert("simple-algebra")
def simple_algebra(view: PageView, history: Sequence[str]) -> str:
    root = tree(view)
    problem = element(root, "math-problem").text_content()
    match = re.fullmatch(r"\s*(x|\d+) ([-+]) (x|\d+) = (-?\d+)\s*", problem)
    if match is None or (match[1] == "x") == (match[3] == "x"):
        raise NoMoveError(f"{problem!r} is no equation in x")
    result = int(match[4])
    if match[1] == "x":
        answer = result - int(match[3]) if match[2] == "+" else result + int(match[3])
    else:
        answer = result - int(match[1]) if match[2] == "+" else int(match[1]) - result
    return fill(root, {by_id("math-answer"): str(answer)}) or by_id("subbtn")


@expert("use-spinner")
def use_spinner(view: PageView, history: Sequence[str]) -> str:
    (number,) = find(view, r"Select (-?\d+) with")
    value = int(element(tree(view), "spinner").get("value") or 0)
    if value == int(number):
        return by_id("subbtn")
    return f"clickxpath //a[contains(@class,'ui-spinner-{'up' if value < int(number) else 'down'}')]"


@expert("use-autocomplete")
def use_autocomplete(view: PageView, history: Sequence[str]) -> str:
    (start,) = find(view, r'starts with "(.*?)"')
    ending = re.search(r'ends with "(.*?)"', view.utterance)
    end = ending[1] if ending else ""
    if history and history[-1].startswith("clickxpath //li"):
        return by_id("subbtn")
    root = tree(view)
    for item in root.xpath("//li[contains(@class,'ui-menu-item')]"):
        text = item.text_content().strip()
        if text.startswith(start) and text.endswith(end):
            return by_text("li", text)
    # The arrow opens the list at once; by itself it opens only after a pause.
    return fill(root, {by_id("tags"): start.rstrip()}) or "press arrowdown"


@expert("search-engine")
def search_engine(view: PageView, history: Sequence[str]) -> str:
    text, number = find(view, r'enter "(.*)" and press "Search", then find and click the (\d+)')
    root, index = tree(view), int(number) - 1
    shown = [int(number) for number in root.xpath("//a/@data-result")]
    if index in shown:
        return f"clickxpath //a[@data-result='{index}']"
    if shown:
        return by_text("a", str(index // 3 + 1))
    return fill(root, {by_id("search-text"): text}) or by_id("search")


@expert("social-media")
def social_media(view: PageView, history: Sequence[str]) -> str:
    user, action = find(view, r'For the user (@\S+), click on the "(.*)" button')
    if action in ("Reply", "Retweet", "Like"):
        return f"clickxpath ({_controls(user, action)})[1]"
    if not tree(view).xpath("//ul[not(contains(@class,'hide'))]"):
        return f"clickxpath ({_controls(user, 'more')})[1]"
    return by_text("li", f"{action} {user}" if action in ("Mute", "Block") else action)


@expert("social-media-all")
def social_media_all(view: PageView, history: Sequence[str]) -> str:
    action, user = find(view, r'Click the "(.*)" button on all posts by (@\S+) and')
    controls = _controls(user, action)
    if tree(view).xpath(controls):
        return f"clickxpath {controls}"  # all matches of a span are clicked
    return by_text("button", "Submit")


@expert("social-media-some")
def social_media_some(view: PageView, history: Sequence[str]) -> str:
    action, number, user = find(view, r'Click the "(.*)" button on (\d+) posts? by (@\S+) and')
    active = _controls(user, f"{action} active")
    if len(tree(view).xpath(active)) < int(number):
        return f"clickxpath ({_controls(user, action)})[1]"  # a clicked one is no longer of this class alone
    return by_text("button", "Submit")


def _controls(user: str, action: str) -> str:
    """XPath of the buttons for an action on a user's posts."""
    return f"//span[@class='username' and .={quote(user)}]/../..//span[@class='{action.lower()}']"


@expert("terminal")
def terminal(view: PageView, history: Sequence[str]) -> str:
    root = tree(view)
    if "data-focused" not in element(root, "terminal-target").attrib or not history:
        return by_id("terminal")
    line = element(root, "active-input").text_content()
    lines = [line.strip() for line in root.xpath("//div[@class='terminal-output']/span[@class='output']/text()")]
    commands = [text.strip() for text in root.xpath("//span[@class='command' and not(@id)]/text()")]
    wanted = f"rm {_doomed(view, lines[-1].split())}" if commands[-1:] == ["ls"] else "ls"
    if line == wanted:
        return "press enter"
    return f"type {wanted[len(line) :]}" if wanted.startswith(line) else "press backspace"


def _doomed(view: PageView, files: Sequence[str]) -> str:
    """The file to delete."""
    match = re.search(r"the extension (\.\S+)", view.utterance)
    fit = [name for name in files if (name.endswith(match[1]) if match else "." not in name)]
    if not fit:
        raise NoMoveError(f"none of {', '.join(files)} is such a file")
    if match is None:
        return fit[0]
    # The page looks for the letters of the extension from the left, so that it takes shark.sh for a wrong file.
    letters = match[1][1:]
    return min(fit, key=lambda name: name.index(letters) + len(letters) != len(name))


@expert("guess-number")
def guess_number(view: PageView, history: Sequence[str]) -> str:
    """Halve the range; the page tells the last answer, the guess that followed an earlier one tells that one's."""
    root = tree(view)
    guesses = [int(line.removeprefix("type ")) for line in history if line.startswith("type ")]
    if history and history[-1].startswith("type "):
        return by_id("subbtn")
    low, high = 0, 9
    for guess, following in pairwise(guesses):
        low, high = (guess + 1, high) if following > guess else (low, guess - 1)
    if guesses:
        larger = "hide" not in element(root, "higher").get("class", "")
        low, high = (guesses[-1] + 1, high) if larger else (low, guesses[-1] - 1)
    # The middle of the narrow field is its down button, so that a click also lowers the number, to -1 when empty; a
    # lone minus sign does not show in its value.
    if "data-focused" not in element(root, "tt").attrib:
        return by_id("tt")
    return f"type {(low + high) // 2}" if list(history[-2:]) == ["press backspace"] * 2 else "press backspace"


_LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


@expert("tic-tac-toe")
def tic_tac_toe(view: PageView, history: Sequence[str]) -> str:
    """Never loses; of the moves that don't, the one that wins most often against the page's player."""
    root = tree(view)
    marks = {"mark-x": "x", "mark-o": "o"}
    board = "".join(marks.get(element(root, f"ttt-{cell}").get("class", ""), " ") for cell in range(9))
    return by_id(f"ttt-{_best(board)[1]}")


def _won(board: str, mark: str) -> bool:
    return any(all(board[cell] == mark for cell in line) for line in _LINES)


def _children(board: str, mark: str) -> dict[int, str]:
    return {cell: board[:cell] + mark + board[cell + 1 :] for cell in range(9) if board[cell] == " "}


@cache
def _outcome(board: str, mark: str) -> int:
    """For x, when ``mark`` is to move and both play perfectly: 1 a win, 0 a draw, -1 a loss."""
    for winner, value in (("x", 1), ("o", -1)):
        if _won(board, winner):
            return value
    values = [_outcome(child, "o" if mark == "x" else "x") for child in _children(board, mark).values()]
    return (max if mark == "x" else min)(values, default=0)


@cache
def _best(board: str) -> tuple[float, int]:
    """Probability of a win for x, to move, and the move."""
    children = _children(board, "x")
    if not children:
        raise NoMoveError("the board is full")
    top = max(_outcome(child, "o") for child in children.values())
    return max((_chance(child), cell) for cell, child in children.items() if _outcome(child, "o") == top)


@cache
def _chance(board: str) -> float:
    """Probability of a win for x after its move: the page's player is random in 55 % of its moves.

    In the others it wins where it can, else blocks where it must, else is random.
    """
    if _won(board, "x"):
        return 1.0
    children = _children(board, "o")
    wins = {cell for cell, child in children.items() if _won(child, "o")}
    blocks = {cell for cell, child in _children(board, "x").items() if _won(child, "x")}
    smart = wins or blocks or set(children)
    chance = 0.0
    for cell, child in children.items():
        weight = 0.55 / len(children) + (0.45 / len(smart) if cell in smart else 0.0)
        if not _won(child, "o") and " " in child:
            chance += weight * _best(child)[0]
    return chance


# ------------------------------------------------------------------------------------------------------------- e-mails


@expert("email-inbox")
def email_inbox(view: PageView, history: Sequence[str]) -> str:
    (sender,) = find(view, r"Find the email by (.+?) and ")
    text = re.search(r'with the text "(.*)"', view.utterance)
    receiver = re.search(r"forward that email to (.*)\.", view.utterance)
    if text:
        return _reply(view, sender, text[1])
    if receiver:
        return _forward(view, sender, receiver[1])
    return _mark(sender, "trash" if "delete it" in view.utterance else "star")


@expert("email-inbox-nl-turk", "email-inbox-forward-nl", "email-inbox-forward-nl-turk")
def email_inbox_words(view: PageView, history: Sequence[str]) -> str:
    """The same in people's own words, taken at their word.

    The page holds a few requests to the opposite of what they say (the one whose e-mail it is and the one it goes to
    change places); an expert that teaches gives them up.
    """
    senders = tree(view).xpath("//*[@id='main']//div[@class='email-sender']/text()")
    action, sender, detail = read_request(view.utterance, senders)
    if action == "reply":
        return _reply(view, sender, detail)
    if action == "forward":
        return _forward(view, sender, detail)
    return _mark(sender, action)


_DELETE = re.compile(r"delete|get rid|trash|recycl|remove|throw away|don't want|out of my inbox", re.IGNORECASE)


def read_request(text: str, senders: Sequence[str]) -> tuple[str, str, str]:
    """What a request about an e-mail asks for.

    Args:
        text: the request, in free words.
        senders: the names in the inbox; whoever an e-mail goes to is among them.

    Returns:
        ``reply``, ``forward``, ``trash`` or ``star``; whose e-mail; the reply's text or who it is forwarded to.

    Raises:
        NoMoveError: it names none of the senders.
    """
    message = re.search(r'"+([^"]+)"', text)
    words = re.sub(r'"+[^"]*"[" ]*', " ", text) if message else text
    names = "|".join(re.escape(name) for name in sorted(set(senders), key=len, reverse=True))
    # Some requests run a name together with a word before or after it: "AnswerAda's email", "Adas email".
    found = list(re.finditer(rf"(?<![\w-])(?:Answer)?({names})s?(?![\w-])", words)) if names else []
    if not found:
        raise NoMoveError(f"{text!r} names none of {', '.join(senders)}")
    if message:
        return "reply", found[-1][1], message[1]
    if len(found) == 1:
        return "trash" if _DELETE.search(words) else "star", found[0][1], ""
    first, second = found[-2:]  # a word that is also a name can only stand at the beginning ("May", "Star")
    if _receiver_first(words, first, second):
        first, second = second, first
    return "forward", first[1], second[1]


def _receiver_first(words: str, first: re.Match[str], second: re.Match[str]) -> bool:
    """Whether the first of two names is who the second one's e-mail goes to."""
    if words[first.end(1) :].startswith("'s") or re.search(r"\b(from|by|that) $", words[: first.start(1)]):
        return False
    if re.search(r"\bto $", words[: first.start(1)]):
        return True
    between, after = words[first.end(1) : second.start(1)], words[second.end(1) :]
    return re.search(r"\b(from|by|that) $", between) is not None or after.startswith(("'s", " sent"))


def _thread(sender: str) -> str:
    """XPath of the name in the inbox; an e-mail opened or answered hides it."""
    return f"//div[.={quote(sender)}]"


def _mark(sender: str, icon: str) -> str:
    return f"clickxpath {_thread(sender)}/../..//span[@class='{icon}']"


def _open(root: Any, sender: str, button: str) -> str:
    """Open the e-mail, then click a button below it."""
    opened = root.xpath("//*[@id='email']")
    return f"clickxpath //span[@class='{button}']" if opened else f"clickxpath {_thread(sender)}"


def _reply(view: PageView, sender: str, text: str) -> str:
    root = tree(view)
    if root.xpath("//*[@id='reply']"):
        return fill(root, {by_id("reply-text"): text}) or by_id("send-reply")
    return _open(root, sender, "email-reply")


def _forward(view: PageView, sender: str, receiver: str) -> str:
    root = tree(view)
    if root.xpath("//*[@id='forward']"):
        return fill(root, {"clickxpath //input[@class='forward-sender']": receiver}) or by_id("send-forward")
    return _open(root, sender, "email-forward")
