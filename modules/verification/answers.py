"""An answer's structure: numbers and formulas, tuples, intervals, sets, lists, unions, matrices, relations, text.

``parse_answer`` never fails: what is not mathematics is ``Text``. The parts are small frozen records that
``equivalence`` compares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from modules.verification.expression import WRAPPERS, Node, ParseError, parse_expression
from modules.verification.extraction import balanced_group

MAX_ITEMS = 200
MAX_LENGTH = 10_000

SET_OPEN, SET_CLOSE = "\u2983", "\u2984"
_OPEN, _CLOSE = "([{" + SET_OPEN, ")]}" + SET_CLOSE
_RELATIONS = "=<>\u2264\u2265\u2260\u2208"

_REPLACEMENTS = (
    ("\u2212", "-"), ("\u2013", "-"), ("\u2014", "-"), ("\u00d7", "*"), ("\u00b7", "*"), ("\u22c5", "*"),
    ("\u03c0", r"\pi "), ("\u221a", r"\sqrt"), ("\u00b0", r"^\circ"), ("\u00b1", r"\pm "), ("\u00bd", r"\frac12"),
    ("\uff0c", ","), ("\u2032", "'"),
    (r"\$", ""), ("$", ""), (r"\{,\}", ","), ("{,}", ","), (r"\{", SET_OPEN), (r"\}", SET_CLOSE),
    (r"\%", "%"), ("~", " "),
)  # fmt: skip
_COMMANDS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom", "tbinom": r"\binom",
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "over": "/", "colon": ":",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "lbrace": SET_OPEN, "rbrace": SET_CLOSE,
    "le": "\u2264", "leq": "\u2264", "leqslant": "\u2264", "ge": "\u2265", "geq": "\u2265", "geqslant": "\u2265",
    "ne": "\u2260", "neq": "\u2260", "lt": "<", "gt": ">", "in": "\u2208", "cup": "\u222a", "infty": "\u221e",
    "degree": r"^\circ", "degrees": r"^\circ", "emptyset": "\u2205", "varnothing": "\u2205", "lbrack": "[",
    "rbrack": "]", "prime": "'", "dots": "...", "ldots": "...", "cdots": "...", "to": "\u2192", "rightarrow": "\u2192",
    "displaystyle": " ", "textstyle": " ", "limits": "", "quad": ", ", "qquad": ", ", "left": "", "right": "",
    "big": "", "Big": "", "bigg": "", "Bigg": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "", "tag": "",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_SPACING = re.compile(r"\\[,!;:> ]")
_DELIMITER_DOT = re.compile(r"\\(?:left|right)\s*\.")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_MATRIX = re.compile(r"\\begin\{([pbBv]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_WRAPPED = re.compile(r"\\(" + "|".join(sorted(WRAPPERS, key=len, reverse=True)) + r")(?![A-Za-z])\s*\{([^{}]*)\}")
_FENCED_MATRIX = re.compile(r"[(\[]\s*(\\begin\{(?:small)?matrix\}.*\\end\{(?:small)?matrix\})\s*[)\]]", re.DOTALL)
_MIXED = re.compile(r"([-+]?)\s*(\d{1,9})\s+(\d{1,9})\s*/\s*(\d{1,9})")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])")
_LIST_WORDS = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<=[\d)}\s])(?:and|or)(?=[\s\\(\d-])|;")
_TRAILING_UNIT = re.compile(r"\\(?:text|mathrm|mbox|textrm|rm)\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*(\d)\s*\}?)?\s*\.?$")
_PLAIN_UNIT = re.compile(r"(?<=[\d)}!%])\s*([A-Za-z][A-Za-z/. ]*)(?:\^\s*\{?\s*(\d)\s*\}?)?$")
_COUNTED = re.compile(r"([-+]?[\d.,]+(?:/\d+)?) ([A-Za-z]{2,}(?: [A-Za-z]+){0,3})")  # "7 apples"
_SIMPLE_NAME = re.compile(r"\\?[A-Za-z]+'?(?:_\{?\w+\}?)?(?:\([A-Za-z](?:,[A-Za-z])*\))?")

_UNIT_ALIASES = {
    "inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "centimeter": "cm",
    "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "millimeter": "mm",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "day": "day", "week": "week", "year": "year",
    "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz", "liter": "l", "litre": "l", "milliliter": "ml",
    "dollar": "", "cent": "cent", "degree": "", "deg": "", "unit": "", "percent": "", "mile per hour": "mph",
    "miles per hour": "mph", "mi/h": "mph", "mph": "mph", "cubic": "cubic", "square": "square", "joule": "J",
    "newton": "N", "watt": "W", "kelvin": "K", "radian": "", "rad": "", "way": "", "point": "", "time": "",
    "people": "", "student": "", "number": "", "integer": "", "solution": "", "root": "", "triangle": "", "digit": "",
}  # fmt: skip
_SHORT_WORDS = frozenset(
    ("no", "on", "so", "is", "in", "it", "at", "an", "as", "we", "he", "me", "or", "if", "do", "up", "us", "am", "pm")
)
_SYMBOL_UNITS = {"in", "ft", "yd", "mi", "cm", "m", "km", "mm", "s", "min", "h", "g", "kg", "lb", "oz", "l", "ml"}
_SYMBOL_UNITS |= {"mph", "J", "N", "W", "K", "Hz", "eV", "keV", "MeV", "pc", "kpc", "Mpc", "erg", "ergs", "nm", "m/s"}
_AMBIGUOUS_UNITS = {"m", "s", "h", "g", "l", "K", "N", "W", "J", "in"}  # after "5" alone they may be symbols: 5m


@dataclass(frozen=True)
class Text:
    """Words, or anything that is not mathematics; compared as ``canonical`` strings."""

    canonical: str


@dataclass(frozen=True)
class Scalar:
    """A number or formula; ``unit`` in canonical spelling ("" if none); ``percent``: it carried a percent sign."""

    tree: Node
    unit: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Collection:
    """``brackets``: "()" tuple or open interval, "[)" ..., "{}" set (unordered), "" bare list (unordered)."""

    brackets: str
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Union:
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Relation:
    """Sides joined by relation signs: "2 < x \u2264 5" has three sides and two signs."""

    sides: tuple[str, ...]
    signs: str


Answer = Text | Scalar | Collection | Union | Matrix | Relation


def clean(text: str) -> str:
    r"""Spelling differences removed that never change the meaning: spacing, \left, \dfrac, unicode signs, $, ..."""
    text = _DELIMITER_DOT.sub("", text.strip())
    text = re.sub(r"(?<=\d)\\[,!](?=\d{3}(?!\d))", "", text)  # 10\,000
    text = _SPACING.sub(lambda match: "" if match.group() == r"\!" else " ", text)
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match.group(1), match.group()), text)
    text = _DEGREES.sub("", text)
    text = re.sub(r"\s+", " ", text).strip()
    while text.endswith((".", ",", ";", ":")) and not text.endswith("..."):
        text = text[:-1].rstrip()
    for command in ("\\boxed", "\\fbox"):
        if text.startswith(command + "{") and balanced_group(text, len(command)) == len(text):
            return clean(text[len(command) + 1 : -1])
    return text


def canonical_text(text: str) -> str:
    """String under which texts are compared: wrappers, braces and spaces removed; case folded for words."""
    text = _WRAPPED.sub(r"\2", text)
    text = re.sub(r"_\s*\{\s*(\w+)\s*\}", r"_\1", re.sub(r"\^\s*\{\s*(\w)\s*\}", r"^\1", text))
    text = re.sub(r"[\s\"`]|\\(?=[^A-Za-z\\])", "", text).strip(".,;:")
    if re.fullmatch(r"\([A-Za-z]\)", text):
        text = text[1]
    return text if len(text) == 1 or re.search(r"[\\_^]", text) else text.casefold()


def split_top(text: str, separators: str, keep_thousands: bool = False) -> tuple[list[str], str]:
    """Parts of ``text`` between separators outside all brackets, and the separators met."""
    parts, met, depth, start, index = [], "", 0, 0, 0
    while index < len(text):
        character = text[index]
        if character == "\\":
            index += 2
            continue
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth = max(0, depth - 1)
        elif depth == 0 and character in separators:
            grouping = keep_thousands and character == "," and re.match(r",\d{3}(?!\d)", text[index : index + 5])
            if not (grouping and index > 0 and text[index - 1].isdigit()):
                parts.append(text[start:index].strip())
                met += character
                start = index + 1
        index += 1
    return [*parts, text[start:].strip()], met


def _bracketed(text: str) -> tuple[str, str, str] | None:
    """(opening, content, closing) if one pair of brackets of any kind spans the whole text."""
    if len(text) < 2 or text[0] not in "([" + SET_OPEN or text[-1] not in ")]" + SET_CLOSE:
        return None
    depth, index = 0, 0
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += (text[index] in _OPEN) - (text[index] in _CLOSE)
        if depth == 0:
            return (text[0], text[1:-1].strip(), text[-1]) if index == len(text) - 1 else None
        index += 1
    return None


def canonical_unit(text: str, power: str | None) -> str:
    words = re.sub(r"[\s.]+", " ", text).strip()
    if words in _SYMBOL_UNITS:
        base = _UNIT_ALIASES.get(words, words)
    else:
        lower = words.lower()
        prefix = ""
        for name, digit in (("square ", "2"), ("sq ", "2"), ("cubic ", "3"), ("cu ", "3")):
            if lower.startswith(name):
                lower, prefix = lower[len(name) :], digit
        singular = lower[:-1] if len(lower) > 3 and lower.endswith("s") else lower
        base = _UNIT_ALIASES.get(lower, _UNIT_ALIASES.get(singular, singular))
        power = prefix or power
    return f"{base}^{power}" if base and power in ("2", "3") else base


def _is_unit(words: str) -> bool:
    words = words.strip()
    first = words.split(" ")[0].lower().rstrip(".")
    return words in _SYMBOL_UNITS or first in _UNIT_ALIASES or first.rstrip("s") in _UNIT_ALIASES


def _strip_unit(text: str) -> tuple[str, str]:
    """Expression and canonical unit of "5 \\text{ cm}^2", "5 cm", "5 miles per hour"."""
    match = _TRAILING_UNIT.search(text)
    if match and match.start() > 0 and text[: match.start()].strip():
        return text[: match.start()].strip(), canonical_unit(match.group(1), match.group(2))
    match = _COUNTED.fullmatch(text)
    if match and max(map(len, match.group(2).split())) > 3:
        return match.group(1), canonical_unit(match.group(2), None)
    match = _PLAIN_UNIT.search(text)
    if match:
        words, spaced = match.group(1).strip(), text[match.start()] == " "
        if _is_unit(words) and (spaced or words not in _AMBIGUOUS_UNITS):
            return text[: match.start()].strip(), canonical_unit(words, match.group(2))
    return text, ""


def _scalar(text: str) -> Answer:
    if text.lower() in _SHORT_WORDS or (re.fullmatch(r"[A-Za-z]{3,}", text) and re.search(r"[aeiouAEIOU]", text)):
        return Text(canonical_text(text))  # a word, not a product of letters
    body, unit = _strip_unit(text)
    percent = body.endswith("%") or unit == "percent" or text.rstrip(" .").lower().endswith(("percent", "percent}"))
    body = body.rstrip("% ")
    mixed = _MIXED.fullmatch(body)
    if mixed and int(mixed.group(4)):
        value = parse_expression(f"{mixed.group(2)}+{mixed.group(3)}/{mixed.group(4)}")
        return Scalar(("neg", value) if mixed.group(1) == "-" else value, unit, percent)
    try:
        return Scalar(parse_expression(body.replace("\u221e", "\\infty ")), unit, percent)
    except ParseError:
        return Text(canonical_text(text))


def _matrix(text: str) -> Answer | None:
    match = _MATRIX.fullmatch(text)
    if match is None or "\\begin" in match.group(2) or match.group(1) == "vmatrix":
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match.group(2)) if row.strip()]
    cells = [row.split("&") for row in rows]
    if sum(map(len, cells)) > MAX_ITEMS:
        return None
    return Matrix(tuple(tuple(_scalar(cell.strip()) for cell in row) for row in cells))


def parse_answer(text: str, depth: int = 0) -> Answer:
    """Structure of an answer; ``Text`` for what is not mathematics, too long, or nested too deeply."""
    if len(text) > MAX_LENGTH or depth > 6:
        return Text(canonical_text(text))
    if depth == 0:
        # Row ends would be taken for spacing: keep them out of the cleaning.
        text = "\\\\".join(clean(part) if "\\\\" not in text else part for part in text.split("\\\\"))
        if "\\\\" in text:
            text = "\\\\".join(_clean_row(part) for part in text.split("\\\\"))
    if not text:
        return Text("")
    if wrapped := _WRAPPED.fullmatch(text):
        return _worded(wrapped.group(2).strip(), depth)
    if fenced := _FENCED_MATRIX.fullmatch(text):
        text = fenced.group(1)
    if text.startswith("\\begin"):
        return _matrix(text) or Text(canonical_text(text))
    parts, _ = split_top(text, "\u222a")
    if 1 < len(parts) <= MAX_ITEMS:
        return Union(tuple(parse_answer(part, depth + 1) for part in parts))
    if several := _same_name(text):
        return several
    sides, signs = split_top(text, _RELATIONS)
    if 1 < len(sides) <= 4 and all(sides[1:]):
        return Relation(tuple(sides), signs)
    listed = _LIST_WORDS.sub(",", text)
    if _THOUSANDS.fullmatch(listed):
        return _scalar(listed)
    items, _ = split_top(listed, ",", keep_thousands=True)
    items = [item for item in items if item]
    if 1 < len(items) <= MAX_ITEMS:
        return Collection("", tuple(parse_answer(item, depth + 1) for item in items))
    if inside := _bracketed(text):
        opening, content, closing = inside
        items, _ = split_top(_LIST_WORDS.sub(",", content), ",")
        if len(items) > MAX_ITEMS:
            return Text(canonical_text(text))
        is_set = opening == SET_OPEN and closing == SET_CLOSE
        if is_set and not content:
            return Text("\u2205")
        if is_set or (len(items) > 1 and all(items)):
            brackets = "{}" if is_set else opening + closing
            return Collection(brackets, tuple(parse_answer(item, depth + 1) for item in items))
    for sign in ("\\pm", "\\mp"):
        if text.count(sign) == 1:
            variants = [re.sub(r"\\[pm][pm](?![A-Za-z])", each, text) for each in "+-"]
            return Collection("", tuple(parse_answer(variant, depth + 1) for variant in variants))
    return _scalar(text)


def _same_name(text: str) -> Answer | None:
    """ "x=1, x=2" as x = 1, 2; "x=1, y=2" as a list of relations; None for anything else."""
    if text.count("=") < 2:
        return None
    items, _ = split_top(_LIST_WORDS.sub(",", text), ",", keep_thousands=True)
    pairs = [split_top(item, _RELATIONS) for item in items if item]
    if not 1 < len(pairs) <= MAX_ITEMS or any(signs != "=" or not is_simple_name(sides[0]) for sides, signs in pairs):
        return None
    names = {sides[0].replace(" ", "") for sides, _ in pairs}
    if len(names) == 1:
        return Relation((names.pop(), ", ".join(sides[1] for sides, _ in pairs)), "=")
    return Collection("", tuple(Relation(tuple(sides), signs) for sides, signs in pairs))


def _worded(text: str, depth: int) -> Answer:
    r"""Content of an answer that is one \text{...}: numbers stay numbers, words and lists of words are text."""
    if not re.search("[A-Za-z]", text):
        return parse_answer(text, depth + 1)
    parts = [part for part in re.split(r"\s*(?:,|\band\b|\bor\b)\s*", text) if part]
    if 1 < len(parts) <= MAX_ITEMS:
        return Collection("", tuple(Text(canonical_text(part)) for part in parts))
    return Text(canonical_text(text))


def _clean_row(row: str) -> str:
    """``clean`` for a matrix row, which may end in separators."""
    return " & ".join(clean(cell) for cell in row.split("&"))


def is_simple_name(text: str) -> bool:
    """A variable or function value that an answer is given to: "x", "x_1", "f(x)"."""
    return _SIMPLE_NAME.fullmatch(text.replace(" ", "")) is not None
