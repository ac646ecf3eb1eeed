"""Personal data and secrets in texts: found by shape, counted per million tokens (``e.pii``), masked for reports.

Shapes that carry a check are checked: IBAN (ISO 13616, modulo 97 of ISO 7064), card numbers (issuer's range, length and
Luhn, ISO/IEC 7812-1), IPv4. What has no shape (names, street addresses) is not found: 0 hits is no proof of privacy.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from modules.assurance.subject import AssuranceError
from modules.assurance.text.assets import nearest


def luhn(digits: str) -> bool:
    """Whether a text of digits passes the check of Luhn."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


# Lengths of the IBAN registry, by country.
_IBAN_LENGTHS: Mapping[str, int] = {
    code: length
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip


def valid_iban(text: str) -> bool:
    """Whether a text, blanks left out, is an IBAN: a country's length, and 1 modulo 97."""
    flat = text.replace(" ", "").upper()
    if not (flat.isascii() and flat.isalnum()) or _IBAN_LENGTHS.get(flat[:2]) != len(flat) or not flat[2:4].isdigit():
        return False
    return int("".join(str(int(character, 36)) for character in flat[4:] + flat[:4])) % 97 == 1


# Issuers' ranges: first digits, and lengths.
_CARDS = (
    (re.compile(r"4"), (13, 16, 19)),
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"30[0-5]|3[689]"), (14, 15, 16, 17, 18, 19)),
    (re.compile(r"352[89]|35[3-8]"), (16, 17, 18, 19)),
    (re.compile(r"6011|64[4-9]|65|62"), (16, 17, 18, 19)),
)


def valid_card(text: str) -> bool:
    """Whether a text, blanks and dashes left out, is a card number: an issuer's range and length, and Luhn."""
    digits = re.sub(r"[ -]", "", text)
    if not (digits.isascii() and digits.isdigit()):
        return False
    known = any(start.match(digits) is not None and len(digits) in lengths for start, lengths in _CARDS)
    return known and luhn(digits)


# -- how much of a match counts: its first so many characters; 0: nothing --
def _iban_length(text: str) -> int:
    """A word behind an IBAN may look like its next group, so the country's length decides."""
    wanted, seen = _IBAN_LENGTHS.get(text[:2].upper(), 0), 0
    for place, character in enumerate(text, 1):
        seen += character != " "
        if seen == wanted:
            return place if valid_iban(text[:place]) and not text[place : place + 1].isalnum() else 0
    return 0


def _if(valid: Callable[[str], bool]) -> Callable[[str], int]:
    return lambda text: len(text) * valid(text)


def _is_secret(value: str) -> bool:
    """Whether what stands behind ``password =`` is one: no placeholder, no call, and not just a word."""
    if re.fullmatch(r"[*xX.\u2022]+|<.*>|\[.*\]|\{.*\}|[$%].*", value) or "(" in value:
        return False
    return re.search(r"[\d!@#%^&*+~?-]", value) is not None


def _is_email(text: str) -> bool:
    return ".." not in text and not re.search(r"\.(?:png|jpe?g|gif|svg|webp|css|js|py)$", text, re.IGNORECASE)


def _is_ipv4(text: str) -> bool:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    # loopback names nobody, and 2.1.3.4 is a section or a version far more often than a host
    return not (address.is_loopback or address.is_unspecified) and any(len(part) > 1 for part in text.split("."))


def _is_phone(text: str) -> bool:
    count = sum(character.isdigit() for character in text)
    return (10 if text[1:].isdigit() else 7) <= count <= 15  # ITU-T E.164; +1000000 is a number


# In the order of precedence: what one kind has taken is gone for the next. A group with a name is what is checked and
# masked. All repetitions are bounded or begin where no other can: the time is linear in the text.
_KEY_NAME = r"(?:[A-Z]{1,10}\ ){0,3}PRIVATE\ KEY"
_KINDS: Mapping[str, tuple[tuple[str, Callable[[str], int]], ...]] = {
    "secret": (
        (
            rf"-----BEGIN\ {_KEY_NAME}-----(?:\s*[A-Za-z-]{{1,30}}:[^\n]{{0,200}}\n){{0,5}}[A-Za-z0-9+/=\s]*"
            rf"(?:-----END\ {_KEY_NAME}-----)?",
            len,
        ),
        (
            r"""\b(?:AKIA|ASIA)[0-9A-Z]{16}\b
            | \bgh[pousr]_[A-Za-z0-9]{36,255}\b | \bgithub_pat_[A-Za-z0-9_]{22,255}\b | \bglpat-[A-Za-z0-9_-]{20,64}
            | \bsk-(?=[A-Za-z_-]{0,100}\d)[A-Za-z0-9_-]{20,200} | \b[rs]k_(?:live|test)_[A-Za-z0-9]{16,200}\b
            | \bxox[abeprs]-[A-Za-z0-9-]{10,200} | \bAIza[A-Za-z0-9_-]{35} | \bhf_[A-Za-z0-9]{30,64}\b
            | \bnpm_[A-Za-z0-9]{36}\b | \bpypi-[A-Za-z0-9_-]{50,300}
            | \beyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,2000}   # JSON web token""",
            len,
        ),
        (r"(?i:\bbearer\ {1,3})(?P<bearer>[A-Za-z0-9._~+/-]{20,2000}={0,2})", _if(_is_secret)),
        (
            r"""(?i:(?:\b|_)(?:password|passwd|passphrase|pwd|secret|api[ _-]?key|access[ _-]?token|auth[ _-]?token))
            ["']?\ {0,3}[:=]\ {0,3}["']?(?P<value>[^\s"',;]{6,200})""",
            _if(_is_secret),
        ),
        (
            r"""(?i:\b(?:https?|ftp|ssh|postgres(?:ql)?|mysql|redis|mongodb))://[^\s:/@]{1,64}:
            (?P<login>[^\s/@]{3,200})(?=@)""",
            lambda text: len(text) * (text[0] not in "[<{$"),
        ),
    ),
    "email": (
        (
            r"""(?<![\w.+%-])[A-Za-z0-9_%+-][\w.%+-]{0,63}@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}
            (?![\w-])""",
            _if(_is_email),
        ),
    ),
    "iban": ((r"(?<!\w)[A-Za-z]{2}\d{2}(?:\ ?[A-Za-z0-9]){10,32}", _iban_length),),
    "card": tuple(
        (rf"(?<![\w.,+-]){shape}(?![\w-]|[.,]\d)", _if(valid_card))
        for shape in (
            r"\d{4}(?P<gap>[ -])\d{4}(?P=gap)\d{4}(?P=gap)\d{4}(?P=gap)\d{3}",
            r"\d{4}(?P<gap>[ -])\d{4}(?P=gap)\d{4}(?P=gap)\d{4}",
            r"\d{4}(?P<gap>[ -])\d{6}(?P=gap)\d{4,5}",
            r"\d{13,19}",
        )
    ),
    "ipv4": ((r"(?<![\w.])(?<!ersion\ )\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)", _if(_is_ipv4)),),
    "phone": (
        (
            r"""(?<![\w.,+/-])(?<!\d\ )(?:
              \+\d{1,3}[ ]?(?:\(0?\d{1,4}\))?(?:[ ./-]?\d{2,4}){2,5}           # international
            | \(\d{3}\)[ ]?\d{3}[ .-]\d{4}                                     # (area) exchange-line
            | (?:1[ .-])?[2-9]\d{2}(?P<gap>[.-])[2-9]\d{2}(?P=gap)\d{4}        # area-exchange-line
            | \(?0\d{2,4}\)?[ /-]\d{3,4}(?:[ -]?\d{2,4}){1,2}                  # national with a leading 0
            )(?![\w/-]|[.,]\d)""",
            _if(_is_phone),
        ),
    ),
}
KINDS: tuple[str, ...] = tuple(_KINDS)
_COMPILED = [
    (kind, re.compile(pattern, re.VERBOSE), length) for kind, parts in _KINDS.items() for pattern, length in parts
]


@dataclass(frozen=True)
class Hit:
    """A piece of personal data or a secret: its kind and its place ``[start, end)`` in the text."""

    kind: str
    start: int
    end: int


def _scan(text: str, pattern: re.Pattern[str], length: Callable[[str], int]) -> Iterator[tuple[int, int]]:
    """Places of what counts; after a match that does not, the search goes on one character behind its beginning."""
    at = 0
    while (match := pattern.search(text, at)) is not None:
        group = next((name for name, value in match.groupdict().items() if value is not None and name != "gap"), 0)
        start, end = match.span(group)
        if counted := length(text[start:end]):
            yield start, start + counted
            at = start + counted
        else:
            at = match.start() + 1


def find_pii(text: str, kinds: Collection[str] = KINDS) -> list[Hit]:
    """All hits in order of place; none overlap.

    Args:
        text: to look through.
        kinds: that are returned. All are looked for: a card number is no phone where only phones count.

    Raises:
        AssuranceError: an unknown kind.
    """
    for kind in kinds:
        nearest("kind of personal data", kind, KINDS)
    found: list[Hit] = []
    for kind, pattern, length in _COMPILED:
        spans = list(_scan(text, pattern, length))
        found += [Hit(kind, start, end) for start, end in spans]
        if spans:
            text = _rewritten(text, [(start, end, "\0" * (end - start)) for start, end in spans])
    hits: list[Hit] = []
    for hit in sorted((hit for hit in found if hit.kind in kinds), key=lambda hit: (hit.start, -hit.end)):
        if hits and hit.start < hits[-1].end:  # one pattern's hit stands within a longer one of another pattern
            hits[-1] = Hit(hits[-1].kind, hits[-1].start, max(hits[-1].end, hit.end))
        else:
            hits.append(hit)
    return hits


def _rewritten(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    """Replace spans, which come in order."""
    parts, at = [], 0
    for start, end, new in edits:
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])


def mask_secrets(text: str, kinds: Collection[str] = KINDS) -> str:
    """The text with every hit replaced by ``[<kind>]``; masking twice changes nothing.

    Mask before cutting a text to length: a secret cut in two has lost its shape, and half of it would stay.

    Raises:
        AssuranceError: an unknown kind.
    """
    while hits := find_pii(text, kinds):  # again: what stood beside a hit may have a shape now
        text = _rewritten(text, [(hit.start, hit.end, f"[{hit.kind}]") for hit in hits])
    return text


@dataclass
class PiiCounter:
    """Hits over a stream of texts; counters of ranks or files add up.

    Args:
        hits: by kind.
        tokens: of all texts.
    """

    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    tokens: int = 0

    def add(self, text: str, tokens: int) -> None:
        """Count a text of so many tokens.

        Raises:
            AssuranceError: a negative number of tokens.
        """
        if tokens < 0:
            raise AssuranceError(f"PiiCounter: tokens: must not be negative, got {tokens}")
        self.tokens += tokens
        for hit in find_pii(text):
            self.hits[hit.kind] += 1

    def __add__(self, other: PiiCounter) -> PiiCounter:
        return PiiCounter({kind: self.hits[kind] + other.hits[kind] for kind in KINDS}, self.tokens + other.tokens)

    def rates(self) -> dict[str, float]:
        """Hits per 1e6 tokens: by kind, and under ``total``.

        Raises:
            AssuranceError: no tokens counted.
        """
        if self.tokens == 0:
            raise AssuranceError("PiiCounter: no tokens counted; a rate needs at least one")
        counts = {**self.hits, "total": sum(self.hits.values())}
        return {kind: 1e6 * count / self.tokens for kind, count in counts.items()}


def pii_per_million(texts: Iterable[str], tokens: Callable[[str], int] | None = None) -> dict[str, float]:
    """Hits per 1e6 tokens over a stream of texts: by kind, and under ``total``.

    Args:
        texts: read once.
        tokens: number of tokens of a text; None: its words.

    Raises:
        AssuranceError: no tokens at all.
    """
    counter = PiiCounter()
    for text in texts:
        counter.add(text, tokens(text) if tokens is not None else len(text.split()))
    return counter.rates()
