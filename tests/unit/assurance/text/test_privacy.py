"""Personal data: found by shape and check, counted, masked. All data here are made up or published as examples."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modules.assurance.subject import AssuranceError
from modules.assurance.text.privacy import (
    KINDS,
    Hit,
    PiiCounter,
    find_pii,
    luhn,
    mask_secrets,
    pii_per_million,
    valid_card,
    valid_iban,
)

DIGITS = "0123456789"
# put together here, so that no scanner takes this file for a leak
KEY = "AKIA" + "IOSFODNN7" + "EXAMPLE"
TOKEN = "gh" + "p_" + "a1B2" * 9
JWT = "ey" + "JhbGciOiJIUzI1NiJ9.ey" + "JzdWIiOiIxMjM0In0." + "dBjftJeZ4CVPmB92K27u"
PEM = "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIB0000\nAAAA==\n-----END RSA PRIVATE " + "KEY-----"
FOUND = [
    ("email", "write to jane.doe+news@mail.example.co.uk.", "jane.doe+news@mail.example.co.uk"),
    ("email", "<a@b.org>", "a@b.org"),
    ("iban", "pay to DE89 3704 0044 0532 0130 00 today", "DE89 3704 0044 0532 0130 00"),
    ("iban", "BE68 5390 0754 7034 WITH thanks", "BE68 5390 0754 7034"),
    ("iban", "(GB82WEST12345698765432)", "GB82WEST12345698765432"),
    ("iban", "NO93 8601 1117 947", "NO93 8601 1117 947"),
    ("card", "card 4111 1111 1111 1111 123", "4111 1111 1111 1111"),
    ("card", "12 4111-1111-1111-1111.", "4111-1111-1111-1111"),
    ("card", "amex 3782 822463 10005", "3782 822463 10005"),
    ("card", "5555555555554444", "5555555555554444"),
    ("ipv4", "host 192.0.2.17:80", "192.0.2.17"),
    ("phone", "call +49 (0)30 1234567 now", "+49 (0)30 1234567"),
    ("phone", "+4915112345678", "+4915112345678"),
    ("phone", "(555) 010-1234", "(555) 010-1234"),
    ("phone", "555-234-0199.", "555-234-0199"),
    ("phone", "030 1234 5678", "030 1234 5678"),
    ("secret", f"key {KEY}", KEY),
    ("secret", f"token={TOKEN};", TOKEN),
    ("secret", f"Authorization: Bearer {JWT}", JWT),
    ("secret", f"x\n{PEM}\ny", PEM),
    ("secret", PEM[:45], PEM[:45]),  # cut short
    ("secret", "password: hunter2!", "hunter2!"),
    ("secret", 'DB_PASSWORD = "correct-horse"', "correct-horse"),
    ("secret", "postgres://bob:s3cret@db/x", "s3cret"),
    ("secret", "sk-" + "proj-abc123def456ghi789", "sk-" + "proj-abc123def456ghi789"),
]
CLEAN = [
    "3 + 4 = 7 and 12 - 5 = 7",
    "Pi is 3.14159265358979 and e is 2.718281828459045",
    "In 2024-01-02 the 1,234,567 people of 10.5.2024",
    "version 10.2.33.4 and section 2.1.3.4 and v10.2.3.4",
    "127.0.0.1 0.0.0.0 256.300.1.1 1.2.3 10.1.2.3.4",
    "4111 1111 1111 1112",
    "1234 5678 9012 3456",
    "DE88 3704 0044 0532 0130 00",
    "the sequence 12 15 18 21 24 27 30 33 36 39 42",
    "+1000000 and +12345",
    "name@home, @media, a @ b.org, logo@2x.png",
    "password: required, password = getpass(), password=${PASSWORD}, password: ********, secret: [secret]",
    "token sk-learn-is-a-nice-package-for-you",
    "10000000000000000000000000",
    "0000000000000000",
]


@pytest.mark.parametrize(("kind", "text", "hit"), FOUND)
def test_a_shape_is_found_and_masked(kind, text, hit):
    assert [(found.kind, text[found.start : found.end]) for found in find_pii(text)] == [(kind, hit)]
    assert mask_secrets(text) == text.replace(hit, f"[{kind}]")


@pytest.mark.parametrize("text", CLEAN)
def test_what_only_looks_like_it_is_left(text):
    assert find_pii(text) == []
    assert mask_secrets(text) == text


def _with_check_digit(digits: str) -> str:
    return next(digits + check for check in DIGITS if luhn(digits + check))


@given(st.text(DIGITS, min_size=1, max_size=18), st.data())
@settings(deadline=None, max_examples=100)
def test_luhn_sees_a_wrong_digit_and_most_swaps(digits, data):
    whole = _with_check_digit(digits)
    at = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.sampled_from([d for d in DIGITS if d != whole[at]]))
    assert not luhn(whole[:at] + other + whole[at + 1 :])
    pair = whole[at : at + 2]
    if len(set(pair)) == 2 and set(pair) != {"0", "9"}:  # the one pair that Luhn cannot tell apart
        assert not luhn(whole[:at] + pair[::-1] + whole[at + 2 :])


@given(st.text(DIGITS, min_size=18, max_size=18), st.data())
@settings(deadline=None, max_examples=100)
def test_an_iban_with_its_check_digits_is_valid_and_with_any_other_digit_is_not(account, data):
    check = 98 - int(f"{account}131400") % 97  # ISO 7064 for DE: D = 13, E = 14
    iban = f"DE{check:02d}{account}"
    assert valid_iban(iban)
    assert valid_iban(" ".join(iban[at : at + 4] for at in range(0, 22, 4)))
    at = data.draw(st.integers(2, 21))
    other = data.draw(st.sampled_from([d for d in DIGITS if d != iban[at]]))
    assert not valid_iban(iban[:at] + other + iban[at + 1 :])
    assert not valid_iban(iban + "0")
    assert [hit.kind for hit in find_pii(f"to {iban}, please")] == ["iban"]


@given(st.text(DIGITS, min_size=14, max_size=14))
@settings(deadline=None, max_examples=60)
def test_a_card_of_a_known_issuer_is_found(digits):
    number = _with_check_digit("4" + digits)
    assert valid_card(number)
    assert [hit.kind for hit in find_pii(number)] == ["card"]
    assert not valid_card(_with_check_digit("9" + digits))  # nobody's range


PIECES = st.sampled_from([text for _, text, _ in FOUND] + CLEAN + ["password=", "[", "]", "@", ":", "\n", "a.b", "+1 "])


@example(["secret: [secret]", "<a@b.org>", "sk-proj-abc123def456ghi789"], "", {"secret"})
@given(st.lists(PIECES, max_size=6), st.sampled_from(["", " ", ", "]), st.sets(st.sampled_from(KINDS), min_size=1))
@settings(deadline=None, max_examples=150)
def test_masking_leaves_nothing_and_is_idempotent(pieces, joint, kinds):
    text = joint.join(pieces)
    masked = mask_secrets(text, kinds)
    assert find_pii(masked, kinds) == []
    assert mask_secrets(masked, kinds) == masked
    hits = find_pii(text)
    assert all(one.end <= two.start for one, two in zip(hits, hits[1:], strict=False))


def test_masking_some_kinds_leaves_the_others():
    text = "a@b.org has card 4111 1111 1111 1111"
    assert mask_secrets(text, ("email",)) == "[email] has card 4111 1111 1111 1111"
    assert mask_secrets(text, ("phone",)) == text  # a card is no phone where only phones count
    with pytest.raises(AssuranceError, match="unknown kind of personal data 'e-mail'; did you mean email"):
        mask_secrets(text, ("e-mail",))


@pytest.mark.parametrize(
    "piece", ["a", "1", "a.", "1 ", "1.", "+1", "AB12", "@", "a@a.", "eyJ", "password=", "-----BEGIN "]
)
def test_time_is_linear_on_hostile_texts(piece):
    """A pattern that goes back over 200 kB for each character would end in the suite's time limit, not here."""
    text = piece * (200_000 // len(piece)) + "\na@b.org"
    assert find_pii(text)[-1] == Hit("email", len(text) - 7, len(text))


def test_rates_are_per_million_tokens():
    texts = ["a@b.org and c@d.org", "nothing at all here", "192.0.2.17"]
    rates = pii_per_million(texts)
    assert rates["email"] == pytest.approx(2e6 / 8)
    assert rates["ipv4"] == pytest.approx(1e6 / 8)
    assert rates["total"] == pytest.approx(3e6 / 8)
    assert pii_per_million(iter(texts), len)["email"] == pytest.approx(2e6 / sum(map(len, texts)))
    assert pii_per_million(["clean"])["total"] == 0.0


def test_counters_add_up():
    parts = [text for _, text, _ in FOUND]
    random.Random(0).shuffle(parts)
    whole, left, right = PiiCounter(), PiiCounter(), PiiCounter()
    for number, text in enumerate(parts):
        whole.add(text, 7)
        (left if number % 2 else right).add(text, 7)
    assert left + right == whole
    assert whole.tokens == 7 * len(FOUND)
    assert sum(whole.hits.values()) == len(FOUND)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(AssuranceError, match="no tokens"):
        pii_per_million([])
    with pytest.raises(AssuranceError, match="must not be negative"):
        PiiCounter().add("x", -1)
