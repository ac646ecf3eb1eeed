"""Finding the answer in what a model wrote. Every function returns None where there is no answer.

Formats: the Minerva sentence of MATH and OCW, boxes, GSM8K's "The answer is N", letters of multiple choice, printed
output of programs, and the zero-shot cleansing of the RCI and zero-shot-CoT tables. ``official_compat=True`` repeats
the official evaluation's regular expressions, faults included, to reproduce published tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

AnswerKind = Literal["number", "choice", "yes_no"]
AnswerStyle = Literal["minerva", "boxed", "gsm8k", "choice", "program"]

_OFFICIAL_FINAL = re.compile(r"Final [Aa]nswer: The final answer is(.*?). I hope it is correct.")
_FINAL = re.compile(r"Final answer:?\s*(?:The final answer is:?)\s*", re.IGNORECASE)
_HOPE = re.compile(r"\.?\s*I hope it is correct", re.IGNORECASE)
_OFFICIAL_GSM8K = re.compile(r"The answer is (\d+)")
_ANSWER_IS = re.compile(r"the (?:final |correct )?answer is:?\s*", re.IGNORECASE)
_SIGNED_NUMBER = re.compile(
    r"(?P<sign>[-\u2212+]?)\s*\\?\$?\s*(?P<inner>[-\u2212]?)\s*"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<fraction>\s*/\s*\d+)?",
    re.ASCII,
)
_GSM8K_GOLD = re.compile(r"####\s*(\S[^\n]*)")
_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")


def balanced_group(text: str, start: int) -> int | None:
    """Index after the brace that closes the one at ``start``; escaped braces do not count; None if never closed."""
    depth, index = 0, start
    while index < len(text):
        character = text[index]
        if character == "\\":
            index += 2
            continue
        depth += (character == "{") - (character == "}")
        index += 1
        if depth == 0:
            return index
    return None


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` or ``\fbox{...}`` (also ``\boxed 7``); None if none, or if it never closes.

    A box inside a box counts as part of the outer one.
    """
    found, end = None, 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue
        if match.end() < len(text) and text[match.end()] == "{":
            close = balanced_group(text, match.end())
            if close is None:
                return None
            found, end = text[match.end() + 1 : close - 1], close
        else:
            token = re.compile(r"[^\s$]+").match(text, match.end())
            found, end = (token.group(), token.end()) if token else (None, match.end())
    return found.strip() if found is not None else None


def minerva_answer(text: str, *, official_compat: bool = False) -> str | None:
    """X of "Final Answer: The final answer is X. I hope it is correct." (MATH; OCW writes "Final answer").

    The closing sentence may be missing: generation stops there. The first such sentence counts, later ones belong to
    problems the model went on to invent.
    """
    if official_compat:
        match = _OFFICIAL_FINAL.search(text + "I hope it is correct.")
        return match.group(1).strip() if match else None
    match = _FINAL.search(text)
    if match is None:
        return None
    rest = text[match.end() :]
    hope = _HOPE.search(rest)
    answer = rest[: hope.start()] if hope else rest.split("\n\n", 1)[0]
    answer = answer.strip()
    answer = answer[:-1].rstrip() if answer.endswith(".") else answer
    return answer or None


def first_number(text: str) -> str | None:
    """First signed number, canonical: no commas, no $, ASCII minus; "a/b" is kept, a percent sign is not."""
    match = _SIGNED_NUMBER.search(text)
    if match is None:
        return None
    # "5-3" or "x-3": a minus straight after a word is subtraction or a hyphen, not a sign.
    before = text[match.start() - 1] if match.start() else " "
    signs = (match["sign"] if not before.isalnum() else "") + match["inner"]
    negative = sum(sign in "-\u2212" for sign in signs) % 2 == 1
    fraction = re.sub(r"\s", "", match["fraction"] or "")
    return ("-" if negative else "") + match["number"].replace(",", "") + fraction


def gsm8k_answer(text: str, *, official_compat: bool = False) -> str | None:
    """Number of the first "The answer is N": signed, with commas, decimals, $ and %.

    Official regular expression (``official_compat``): digits only, so "1,200" becomes 1 and negatives are lost.
    """
    if official_compat:
        match = _OFFICIAL_GSM8K.search(text)
        return match.group(1) if match else None
    match = _ANSWER_IS.search(text)
    if match is None:
        return None
    return first_number(text[match.end() :].split("\n", 1)[0])


def gsm8k_gold(answer: str) -> str:
    """Gold number of a GSM8K solution ("... #### 1,200" -> "1200").

    Raises:
        ValueError: no "####" line.
    """
    matches = _GSM8K_GOLD.findall(answer)
    if not matches:
        raise ValueError(f"GSM8K solution without '####' line: '{answer[-60:]}'")
    return matches[-1].strip().replace(",", "")


def calculator_annotations(text: str) -> list[tuple[str, str]]:
    """The ``<<a=b>>`` calculator marks of a GSM8K solution as (a, b); b may itself hold an "=" (chained steps)."""
    return _ANNOTATION.findall(text)


def choice_letter(text: str, letters: str = "ABCDE", *, choices: Sequence[str] | None = None) -> str | None:
    """Letter of a multiple-choice answer.

    Looks after the first "answer is" (everywhere if there is none) for a bracketed letter, then for a letter that
    stands alone; an "A" that is an article ("A dog") does not count. With ``choices``, text that equals one of them
    counts as its letter. ``letters`` must cover the choices.
    """
    if choices is not None and len(choices) > len(letters):
        raise ValueError(f"choice_letter: {len(choices)} choices but letters '{letters}'")
    marked = _ANSWER_IS.search(text)
    tail = text[marked.end() :] if marked else text
    tail = tail.split("I hope it is correct", 1)[0]
    bracketed = re.search(rf"\(\s*([{letters}])\s*\)|\\text(?:bf)?\s*{{\s*\(?([{letters}])\)?\s*}}", tail)
    if bracketed:
        return bracketed.group(1) or bracketed.group(2)
    stripped = tail.strip().strip("$. \n")
    if choices is not None:
        for letter, choice in zip(letters, choices, strict=False):
            if stripped.casefold() == choice.strip().strip("$. \n").casefold():
                return letter
    alone = re.search(rf"(?<![A-Za-z\\])([{letters}])(?![A-Za-z'])(?!\s+[a-z])", tail)
    if alone is None:
        return None
    return alone.group(1)


def program_output(output: str) -> str | None:
    """Last non-empty line printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else None


def cleanse(text: str, kind: AnswerKind, *, few_shot: bool = False, strict_choice: bool = False) -> str | None:
    """Answer cleansing of the zero-shot chain-of-thought harness, which the RCI reasoning tables use.

    number: commas deleted, first match of ``-?\\d+\\.?\\d*`` less a trailing dot; choice: first of A-E (a capital A in
    prose is a known false hit, which ``strict_choice`` avoids); yes_no: first word equal to yes or no. With
    ``few_shot`` the text after the last "The answer is" is searched, or the last candidate counts if there is none.
    """
    parts = text.split("The answer is")
    marked = len(parts) > 1
    if few_shot:
        text = parts[-1]
    if kind == "number":
        found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    elif kind == "choice":
        found = [letter] if strict_choice and (letter := choice_letter(text)) else []
        found = found if strict_choice else re.findall(r"A|B|C|D|E", text)
    else:
        words = re.sub(r"[\"'\n.\s:,]", " ", text.lower()).split(" ")
        found = [word for word in words if word in ("yes", "no")]
    if not found:
        return None
    answer = found[-1] if few_shot and not marked else found[0]
    return answer.removesuffix(".") if answer else None


def extract_answer(text: str, style: AnswerStyle, *, official_compat: bool = False) -> str | None:
    """Answer in ``text`` by the style of its task.

    minerva falls back to the last box (also for models that were not prompted in Minerva's way), unless
    ``official_compat``; program takes the last printed line.
    """
    if style == "minerva":
        found = minerva_answer(text, official_compat=official_compat)
        return found if found is not None or official_compat else last_boxed(text)
    if style == "boxed":
        return last_boxed(text)
    if style == "gsm8k":
        return gsm8k_answer(text, official_compat=official_compat)
    if style == "choice":
        return choice_letter(text)
    if style == "program":
        return program_output(text)
    raise ValueError(f"extract_answer: unknown style '{style}'; styles are minerva, boxed, gsm8k, choice, program")
