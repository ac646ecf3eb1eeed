"""Eight ways to disturb a text without changing its answer: the conditions of ``r.ppl_ratio`` and its like.

Each is a pure function of text and seed. What an answer depends on stays, character by character and in order: numbers
(digits, numerals of any script, number words), formulas (``$...$``, ``\\(...\\)``, ``\\[...\\]``, ``\\boxed{...}`` and
other LaTeX commands), code in back quotes, addresses, single letters and acronyms (variables, points, choices), and the
words that turn a meaning (not, less, each). A text in which a way finds nothing to change comes back as it is.

Disturb a question before it is put into its frame: a suffix after ``Answer:`` would be another task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from modules.assurance.subject import AssuranceError
from modules.assurance.text.assets import check_text, nearest, read_asset
from modules.seeds import stream_seed, text_seed

Perturbation = Callable[[str, "int | torch.Generator"], str]
RATE = 0.15  # share of the places that are changed, where a way has many; never fewer than one place


def _words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NUMBER_WORDS = _words_of(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million
    millions billion billions trillion dozen dozens score pair pairs couple single double triple quadruple half halves
    third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh eighth eighths ninth tenth tenths
    hundredth first second once twice thrice percent
    """
)
_TURNING_WORDS = _words_of(
    """
    not cannot no nor none never neither without except unless only less fewer least more most than each every per any
    all both either before after minus plus times over under above below increase decrease increases decreases increased
    decreased
    """
)
_FORMULA = re.compile(
    r"""\$\$.*?\$\$ | \$[^$]*\$ | \\\(.*?\\\) | \\\[.*?\\\] | \\begin\{(?P<env>[^}]*)\}.*?\\end\{(?P=env)\}
    | ```.*?``` | `[^`]*` | \bhttps?://\S+ | (?<![\w.+-])[\w.+-]+@[\w.-]+""",
    re.VERBOSE | re.DOTALL,
)
_COMMAND = re.compile(r"\\[A-Za-z]+\*?|\\.", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_TOKEN = re.compile(r"\S+")
_OPERATORS = frozenset("=<>+*/^_%|~\u00d7\u00f7\u2212\u2264\u2265\u2260\u2248\u00b1\u00b7\u221a\u03c0")


def _formulas(text: str) -> list[tuple[int, int]]:
    """Spans of formulas, code, addresses, and LaTeX commands with their arguments (braces in balance)."""
    spans, at = [(m.start(), m.end()) for m in _FORMULA.finditer(text)], 0
    while (command := _COMMAND.search(text, at)) is not None:
        start, at = command.span()
        while at < len(text) and text[at] in "{[":
            closing, depth, here = {"{": "}", "[": "]"}[text[at]], 0, at
            opening = text[at]
            while here < len(text):
                depth += (text[here] == opening) - (text[here] == closing)
                here += 1
                if depth == 0:
                    break
            at = here  # an argument that never closes reaches to the end
        spans.append((start, at))
    return spans


def _is_kept(word: str) -> bool:
    """Whether a word decides the answer: a number word, a word that turns a meaning, a letter or an acronym."""
    low = word.lower().replace("\u2019", "'")
    return (
        len(word) == 1
        or (word.isupper() and len(word) <= 4)
        or low in _NUMBER_WORDS
        or low in _TURNING_WORDS
        or low.endswith("n't")
    )


def protected_spans(text: str) -> list[tuple[int, int]]:
    """The parts of a text that no perturbation alters: ``[start, end)``, in order, none touching another."""
    spans = _formulas(text)
    for token in _TOKEN.finditer(text):
        if any(c.isnumeric() or c in _OPERATORS for c in token[0]):
            spans.append(token.span())
    spans += [word.span() for word in _WORD.finditer(text) if _is_kept(word[0])]
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        # what stands between two numbers (blanks of 1 000, a dash) belongs to them
        if merged and (start <= merged[-1][1] or not _WORD.search(text, merged[-1][1], start)):
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _free(text: str) -> list[tuple[int, int]]:
    """The parts between the protected ones."""
    edges = [0, *(edge for span in protected_spans(text) for edge in span), len(text)]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end > start]


def _matches(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """Matches that lie inside free parts; what follows a part is not seen, what precedes it is."""
    return [match for start, end in _free(text) for match in pattern.finditer(text, start, end)]


def _words(text: str, least: int = 2) -> list[tuple[int, int]]:
    """Spans of the free words of at least ``least`` characters."""
    return [word.span() for word in _matches(_WORD, text) if len(word[0]) >= least]


def _random(seed: int | torch.Generator) -> random.Random:
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
    return random.Random(seed)


def _some(places: Sequence[tuple[int, int]], rng: random.Random, rate: float = RATE) -> list[tuple[int, int]]:
    """A share of the places, at least one if there are any, from the last to the first."""
    if not places:
        return []
    return sorted(rng.sample(places, max(1, round(rate * len(places)))), reverse=True)


def _replace(text: str, edits: Sequence[tuple[tuple[int, int], str]]) -> str:
    """Apply replacements of spans, which are given from the last to the first."""
    for (start, end), new in edits:
        text = text[:start] + new + text[end:]
    return text


# -- the eight ways --
def _other_case(character: str, upper: bool) -> str:
    """The character in the other case, where that can be undone; else itself."""
    other = character.upper() if upper else character.lower()
    back = other.lower() if upper else other.upper()
    return other if len(other) == 1 and back == character else character


def _cased(word: str, style: str) -> str:
    if style == "title":
        return _other_case(word[0], True) + "".join(_other_case(c, False) for c in word[1:])
    return "".join(_other_case(c, style == "upper") for c in word)


def change_case(text: str, seed: int | torch.Generator) -> str:
    """All words in lower case, all in upper case, all with a capital, or some in upper case."""
    rng, words = _random(seed), _words(text)[::-1]
    some = _some(words, rng)
    styles = [("lower", words), ("upper", words), ("title", words), ("upper", some)]
    rng.shuffle(styles)
    for style, places in styles:
        changed = _replace(text, [((s, e), _cased(text[s:e], style)) for s, e in places])
        if changed != text:
            return changed
    return text


_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_SHIFTS = (0.0, 0.25, 0.75)  # of the rows of a keyboard, in keys


@cache
def _neighbours() -> dict[str, str]:
    """The keys that touch each key of an English keyboard."""
    at = {key: (row, column + _SHIFTS[row]) for row, keys in enumerate(_ROWS) for column, key in enumerate(keys)}
    return {
        key: "".join(o for o, (r, c) in at.items() if o != key and abs(r - row) <= 1 and abs(c - column) <= 1)
        for key, (row, column) in at.items()
    }


def _mistyped(word: str, rng: random.Random) -> str:
    """One slip inside a word: a neighbouring key, two letters swapped, one dropped, one doubled. Ends stay."""
    inner = list(range(1, len(word) - 1))
    for _ in range(20):
        at, slip = rng.choice(inner), rng.choice(("neighbour", "swap", "drop", "double"))
        if slip == "neighbour" and word[at].lower() in _neighbours():
            key = rng.choice(_neighbours()[word[at].lower()])
            typed = word[:at] + (key.upper() if word[at].isupper() else key) + word[at + 1 :]
        elif slip == "swap" and at + 1 in inner:
            typed = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif slip == "drop":
            typed = word[:at] + word[at + 1 :]
        else:
            typed = word[: at + 1] + word[at] + word[at + 1 :]
        if typed != word and not _is_kept(typed):
            return typed
    return word


def add_typos(text: str, seed: int | torch.Generator) -> str:
    """Typing slips in some words of five letters or more; shorter ones become other words too easily."""
    rng = _random(seed)
    return _replace(text, [((s, e), _mistyped(text[s:e], rng)) for s, e in _some(_words(text, 5), rng)])


_GAP = re.compile(r"(?<=\S) (?=\S)")


def change_whitespace(text: str, seed: int | torch.Generator) -> str:
    """Some blanks between words doubled, tripled or made a tab; blanks at the ends. Lines stay as they are."""
    rng = _random(seed)
    gaps = [gap.span() for gap in _matches(_GAP, text)]
    changed = _replace(text, [(span, rng.choice(("  ", "   ", "\t"))) for span in _some(gaps, rng)])
    before, after = rng.choice(((" ", ""), ("", " "), ("", "  "), ("  ", "\n"), ("", "")))
    if changed == text and not before + after:
        after = " "
    return before + changed + after if text else text


_PREFIXES = (
    "Please read the following text carefully.",
    "Here is something that came up today.",
    "Good morning, and welcome back.",
    "The weather was fine, and everyone was in a good mood.",
    "This was found in an old notebook.",
    "Take your time with the next lines.",
    "The following was written on the board.",
    "Someone asked about this in the library.",
)
_SUFFIXES = (
    "Thank you in advance.",
    "Please take your time.",
    "The rest of the day was quiet.",
    "Nothing else was said about it.",
    "Have a nice afternoon.",
    "That is how it was written down.",
    "Many people have read this before.",
    "All of this took place in the same town.",
)


def add_prefix(text: str, seed: int | torch.Generator) -> str:
    """A harmless sentence in front."""
    return f"{_random(seed).choice(_PREFIXES)} {text}"


def add_suffix(text: str, seed: int | torch.Generator) -> str:
    """A harmless sentence behind."""
    return f"{text} {_random(seed).choice(_SUFFIXES)}"


_MARK = re.compile(r"(?<=[^\W\d_])[,;:](?=\s)|(?<=[^\W\d_])[.!?](?=\s|$)")
_WRITINGS: Mapping[str, tuple[str, ...]] = {
    ",": ("", ",,", " ,"),
    ";": (",", " ;"),
    ":": (" :", "::"),
    ".": ("..", " .", "...", ""),
    "!": (".", "!!", " !"),
    "?": ("??", " ?", "?!"),
}


def change_punctuation(text: str, seed: int | torch.Generator) -> str:
    """Some marks behind words doubled, dropped or set apart; a full stop or a blank and one where there are none."""
    rng = _random(seed)
    marks = [mark.span() for mark in _matches(_MARK, text)]
    if marks:
        return _replace(text, [((s, e), rng.choice(_WRITINGS[text[s:e]])) for s, e in _some(marks, rng, 0.5)])
    ends = [span for span in _words(text, 1) if span[1] == len(text)]
    return text + rng.choice((".", "...", " .", "!")) if ends else text


@cache
def rewrites() -> Mapping[str, str]:
    """Phrase -> phrase of the same meaning, from ``paraphrases.yaml``.

    Raises:
        AssuranceError: a malformed file, or a phrase with something in it that is to be kept.
    """
    path = Path(__file__).with_name("paraphrases.yaml")
    table = read_asset(path, ("rewrites",))["rewrites"]
    if not isinstance(table, dict):
        raise AssuranceError(f"{path.name}: rewrites: must map phrases to phrases")
    for old, new in table.items():
        owner = f"{path.name}: {old}"
        if check_text(owner, old) != old.lower() or check_text(owner, new) == old:
            raise AssuranceError(f"{owner}: must be in lower case and differ from its rewrite '{new}'")
    return table


_ARTICLE = re.compile(r"\ban?\s+\Z", re.IGNORECASE)


@cache
def _phrases() -> re.Pattern[str]:
    longest_first = sorted(rewrites(), key=lambda phrase: (-len(phrase), phrase))
    return re.compile(rf"\b(?:{'|'.join(r'[ ]'.join(map(re.escape, p.split())) for p in longest_first)})\b", re.I)


def _breaks_article(text: str, start: int, new: str) -> bool:
    """Whether an article in front would have to change: a whole, an entire."""
    article = _ARTICLE.search(text, max(0, start - 4), start)
    return article is not None and (text[start].lower() in "aeiou") != (new[0] in "aeiou")


def paraphrase(text: str, seed: int | torch.Generator) -> str:
    """Half of the phrases that the list of rewrites knows, rewritten; at least one."""
    rng = _random(seed)
    spans = [phrase.span() for phrase in _matches(_phrases(), text)]
    fit = [
        (start, end) for start, end in spans if not _breaks_article(text, start, rewrites()[text[start:end].lower()])
    ]
    edits = []
    for start, end in _some(fit, rng, 0.5):
        old = text[start:end]
        new = rewrites()[old.lower()]
        edits.append(((start, end), new[0].upper() + new[1:] if old[0].isupper() else new))
    return _replace(text, edits)


HOMOGLYPHS: Mapping[str, str] = {
    "a": "\u0430", "c": "\u0441", "e": "\u0435", "i": "\u0456", "j": "\u0458", "o": "\u043e", "p": "\u0440",
    "s": "\u0455", "x": "\u0445", "y": "\u0443", "A": "\u0410", "B": "\u0412", "C": "\u0421", "E": "\u0415",
    "H": "\u041d", "I": "\u0406", "K": "\u041a", "M": "\u041c", "O": "\u041e", "P": "\u0420", "S": "\u0405",
    "T": "\u0422", "X": "\u0425", "Y": "\u04ae",
}  # fmt: skip
"""Latin letters and the Cyrillic letters that look like them."""
_FOLD = str.maketrans({look: letter for letter, look in HOMOGLYPHS.items()})


def fold_homoglyphs(text: str) -> str:
    """Look-alikes made Latin letters again."""
    return text.translate(_FOLD)


def swap_homoglyphs(text: str, seed: int | torch.Generator) -> str:
    """One letter in some words replaced by a Cyrillic look-alike."""
    rng = _random(seed)
    words = [(s, e) for s, e in _words(text) if any(c in HOMOGLYPHS for c in text[s:e])]
    edits = []
    for start, end in _some(words, rng):
        at = rng.choice([place for place in range(start, end) if text[place] in HOMOGLYPHS])
        edits.append(((at, at + 1), HOMOGLYPHS[text[at]]))
    return _replace(text, edits)


PERTURBATIONS: Mapping[str, Perturbation] = {
    "case": change_case,
    "typo": add_typos,
    "whitespace": change_whitespace,
    "prefix": add_prefix,
    "suffix": add_suffix,
    "punctuation": change_punctuation,
    "paraphrase": paraphrase,
    "homoglyph": swap_homoglyphs,
}


def perturbation(name: str) -> Perturbation:
    """The perturbation of that name.

    Raises:
        AssuranceError: there is none; the message holds the nearest names.
    """
    return PERTURBATIONS[nearest("perturbation", name, tuple(PERTURBATIONS))]


def perturbed(text: str, seed: int, names: Sequence[str] = tuple(PERTURBATIONS)) -> dict[str, str]:
    """The text under each of ``names``; a name's result depends on text, seed and name alone.

    Raises:
        AssuranceError: an unknown name.
    """
    return {name: perturbation(name)(text, stream_seed(seed, text_seed(name))) for name in names}
