"""Metamath parser and checker on a small hand-made system: every rule has a text that breaks it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.verification.contracts import Problem
from modules.verification.provers import metamath as metamath_module
from modules.verification.provers.base import StatementError
from modules.verification.provers.metamath import Database, MetamathError
from modules.verification.provers.metamath_proof import _number, compress, expand, theorem_text
from modules.verification.provers.verifiers import MetamathVerifier

HEAD = """
$c ( ) -> wff |- $.  $v p q r s $.
wp $f wff p $.  wq $f wff q $.  wr $f wff r $.  ws $f wff s $.
wi $a wff ( p -> q ) $.
"""
SYSTEM = (
    HEAD
    + """
ax1 $a |- ( p -> ( q -> p ) ) $.
ax2 $a |- ( ( p -> ( q -> r ) ) -> ( ( p -> q ) -> ( p -> r ) ) ) $.
${ min $e |- p $.  maj $e |- ( p -> q ) $.  mp $a |- q $. $}
${ a1i.1 $e |- p $.
   a1i $p |- ( q -> p ) $= wp wq wp wi a1i.1 wp wq ax1 mp $. $}
id $p |- ( p -> p ) $=
  ( wi ax1 ax2 mp ) AAABZBZFAACAFABBGFBAFCAFADEE $.
"""
)


def test_the_example_system_checks() -> None:
    database = Database.parse(SYSTEM)
    assert database.check_all() == 2
    mp = database.assertions["mp"]
    assert [h.label for h in mp.hypotheses] == ["wp", "wq", "min", "maj"]
    assert [h.label for h in mp.essential] == ["min", "maj"]
    assert database.assertions["id"].floating == {"wp", "wq", "wr", "ws"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("$c a $. $c a $.", "declared twice"),
        ("${ $c a $. $}", "inside a block"),
        ("$v x $. $v x $.", "declared twice"),
        ("$c a $. $v a $.", "declared twice"),
        ("x $f wff p", "ends inside"),
        ("$c w $. $v x $. f $f w x $. g $f w x $.", "two active"),
        ("$c w $. f $f w x $.", "active variable"),
        ("$c w $. $v x $. f $f x w $.", "needs a constant"),
        ("$c w $. $v x $. a $a w x $.", "neither a constant nor"),
        ("$c w $. $v x $. f $f w x $. a $a x w $.", "begin with a constant"),
        ("$c w $. a $a $.", "begin with a constant"),
        ("$c w $. a $a w $. a $a w $.", "used twice"),
        ("$c w $. a! $a w $.", "is not a label"),
        ("$c w $. $a w $.", "without a label"),
        ("$c w $. a b $a w $.", "followed by"),
        ("$c w $. a $v x $.", "with label a"),
        ("$c w $. a $p w $= $.", "has no proof"),
        ("$c w $. a $p w $.", "inside `a`"),
        ("$c w $. a", "at the end of the text"),
        ("${", "never closed"),
        ("$}", "without"),
        ("$( never", "comment is never closed"),
        ("$( $( $)", "inside a comment"),
        ("$[ other.mm $]", "includes"),
        ("$q", "not accepted"),
        ("$c \u00e9 $.", "outside printable ASCII"),
        ("$v x $. $d x x $.", "different variables"),
        ("$v x $. $d x $.", "two or more"),
        ("$v x $. $d x y $.", "no active variable"),
        ("${ $v x $. $} $v y $. $d x y $.", "no active variable"),
    ],
)
def test_malformed_databases_are_refused(text: str, why: str) -> None:
    with pytest.raises(MetamathError, match=why):
        Database.parse(text)


@pytest.mark.parametrize(
    ("proof", "why"),
    [
        ("wp", "ends in `wff p`"),
        ("wp wp", "leaves 2"),
        ("wp wi", "needs 2 expressions"),
        ("nothing", "no hypothesis in force and no assertion"),
        ("id", "no assertion stated before"),
        ("min", "no hypothesis in force"),
        ("wp ?", "incomplete"),
        ("wp wp wp wi ax1 mp", "needs 4 expressions"),
        ("wp wp wp ax1 wp wp wp ax1 mp", "step 9 .*variable `p` needs a wff|variable"),
        ("wp wq wp wp ax1 wp wp ax1 mp", "hypothesis maj needs|hypothesis min needs"),
        ("( wi", "without `\\)`"),
        ("( wp ) A", "mandatory hypothesis"),
        ("( wi ) Z", "misplaced `Z`"),
        ("( wi ) AZZ", "misplaced `Z`"),
        ("( wi ) AaB", "misplaced `a`"),
        ("( wi ) A?", "incomplete"),
        ("( wi ) C", "refers to entry 3, there are 2"),
        ("( wi ) AU", "inside a number"),
        ("( wi ) " + "Y" * 60 + "A", "too large"),
        ("( wi )", "leaves 0"),
    ],
)
def test_wrong_proofs_are_refused(proof: str, why: str) -> None:
    database = Database.parse(SYSTEM)
    with pytest.raises(MetamathError, match=why):
        database.check(database.assertions["id"], proof.split())


DISJOINT = (
    HEAD
    + """
${ $d p q $.  axd $a |- ( p -> q ) $. $}
"""
)


@pytest.mark.parametrize(
    ("theorem", "why"),
    [
        ("${ $d r s $. t $p |- ( r -> s ) $= wr ws axd $. $}", None),
        ("t $p |- ( r -> s ) $= wr ws axd $.", "which the theorem does not have"),
        ("t $p |- ( r -> r ) $= wr wr axd $.", "both contain `r`"),
        ("${ $d r s $. t $p |- ( ( r -> s ) -> s ) $= wr ws wi ws axd $. $}", "both contain `s`"),
        ("${ $d r s $. $d p s $. t $p |- ( ( r -> p ) -> s ) $= wr wp wi ws axd $. $}", None),
        ("${ $d r s $. t $p |- ( ( r -> p ) -> s ) $= wr wp wi ws axd $. $}", "needs `\\$d p s`"),
        ("${ ${ $d r s $. $} t $p |- ( r -> s ) $= wr ws axd $. $}", "does not have"),
    ],
)
def test_disjoint_variables(theorem: str, why: str | None) -> None:
    database = Database.parse(DISJOINT + theorem)
    if why is None:
        assert database.check_all() == 1
    else:
        with pytest.raises(MetamathError, match=why):
            database.check_all()


def test_hypotheses_of_other_blocks_are_out_of_force() -> None:
    text = SYSTEM + "${ h $e |- p $. $} bad $p |- p $= h $."
    with pytest.raises(MetamathError, match="no hypothesis in force"):
        Database.parse(text).check_all()


def test_forms_of_a_proof_agree() -> None:
    database = Database.parse(SYSTEM)
    theorem = database.assertions["id"]
    normal = expand(database, theorem)
    assert database.check(theorem, normal) == len(normal)
    compressed = compress(database, theorem, normal)
    assert compressed == list(theorem.proof)
    renamed = theorem_text(database.theorem("id2", "|- ( q -> q )"), [t.replace("wp", "wq") for t in normal])
    assert Database.parse(SYSTEM + renamed).check_all() == 3


@given(st.integers(0, 10_000))
def test_numbers_of_the_compressed_form(value: int) -> None:
    number = 0
    text = _number(value)
    for letter in text[:-1]:
        number = number * 5 + "UVWXY".index(letter) + 1
    assert number * 20 + "ABCDEFGHIJKLMNOPQRST".index(text[-1]) == value


def test_numbers_of_the_specification() -> None:
    # Metamath book, appendix B
    pairs = {1: "A", 20: "T", 21: "UA", 22: "UB", 40: "UT", 41: "VA", 120: "YT", 121: "UUA", 620: "YYT", 621: "UUUA"}
    assert {n: _number(n - 1) for n in pairs} == pairs


def test_exponential_proofs_end_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database.parse(SYSTEM)
    theorem = database.assertions["id"]
    # Each step doubles the expression: entry k is ( e(k-1) -> e(k-1) ).
    letters = "A" + "".join(f"Z{_number(2 + i)}B" for i in range(60))
    with pytest.raises(MetamathError, match="grows beyond"):
        database.check(theorem, ["(", "wi", ")", letters])
    monkeypatch.setattr(metamath_module, "MAX_PROOF_SYMBOLS", 1000)
    with pytest.raises(MetamathError, match="over 1000 symbols"):
        database.check(theorem, ["(", "wi", ")", letters])
    monkeypatch.setattr(metamath_module, "MAX_PROOF_STEPS", 50)
    with pytest.raises(MetamathError, match="more than 50 steps"):
        database.check(theorem, ["wp"] * 60)


def test_deep_proofs_do_not_exhaust_the_stack() -> None:
    database = Database.parse(SYSTEM)
    theorem = database.theorem("deep", "|- p", ["|- p"])
    proof = ["deep.1"]
    for _ in range(3000):  # modus ponens with p -> p, again and again
        proof = ["wp", "wp", *proof, *IDENTITY, "mp"]
    assert database.check(theorem, proof) == len(proof)
    assert database.check(theorem, compress(database, theorem, proof)) > 0
    assert expand(database, theorem, compress(database, theorem, proof)) == proof


IDENTITY = expand(Database.parse(SYSTEM), Database.parse(SYSTEM).assertions["id"])


def test_new_theorems_are_stated_at_the_end() -> None:
    database = Database.parse(SYSTEM)
    theorem = database.theorem("syl1", "|- ( p -> q )", ["|- q"], [("p", "q")])
    assert [h.label for h in theorem.hypotheses] == ["wp", "wq", "syl1.1"]
    assert theorem.disjoint == {("p", "q")}
    assert database.check(theorem, ["wq", "wp", "syl1.1", "a1i"]) == 4
    with pytest.raises(MetamathError, match="in use"):
        database.theorem("id", "|- p")
    with pytest.raises(MetamathError, match="neither a constant"):
        database.theorem("new", "|- zz")


def test_verifier_judges_proof_text() -> None:
    database = Database.parse(SYSTEM)
    verifier = MetamathVerifier(database)
    assert verifier.check(Problem("id"), " ".join(database.assertions["id"].proof)).ok
    refused = verifier.check(Problem("id"), "wp wp wi")
    assert not refused.ok
    assert "not in its statement" in refused.reason
    assert not verifier.check(Problem("id"), "").ok
    assert not verifier.check(Problem("id"), "wp " * 100_000).ok
    with pytest.raises(StatementError, match="no theorem 'ax1'"):
        verifier.check(Problem("ax1"), "wp")


_DATABASE_TOKENS = [
    "$c",
    "$v",
    "$f",
    "$e",
    "$a",
    "$p",
    "$d",
    "$.",
    "$=",
    "${",
    "$}",
    "$(",
    "$)",
    "wff",
    "p",
    "x",
    "lab",
]
_PROOF_TOKENS = ["wp", "wq", "wi", "ax1", "ax2", "mp", "a1i", "(", ")", "AZ", "BA", "C", "U", "?"]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(_DATABASE_TOKENS), max_size=25))
def test_any_text_parses_or_is_refused_cleanly(tokens: list[str]) -> None:
    try:
        database = Database.parse(" ".join(tokens))
        database.check_all()
    except MetamathError:
        return


@settings(max_examples=200)
@given(st.lists(st.sampled_from(_PROOF_TOKENS), max_size=14))
def test_any_proof_is_judged_without_a_crash(proof: list[str]) -> None:
    database = Database.parse(SYSTEM)
    try:
        database.check(database.assertions["id"], proof)
    except MetamathError:
        return
    pytest.fail("no sequence of at most 14 such tokens proves id")
