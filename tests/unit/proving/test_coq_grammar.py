"""Which text may reach a Coq process: the lexer and the whitelist."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.verification.provers.base import RefusedTacticError
from modules.verification.provers.coq_grammar import (
    FORBIDDEN,
    MAX_NESTING,
    MAX_TACTIC_CHARS,
    TACTICS,
    CoqSyntaxError,
    check_proof,
    check_tactic,
    sentences,
    split_proof,
)


def texts(source: str, focus: bool = True) -> list[str]:
    return [s.text for s in sentences(source, focus=focus)]


def test_sentences_end_at_a_full_stop_before_a_blank() -> None:
    assert texts("rewrite Nat.add_comm.\nnow   auto. lia.") == ["rewrite Nat.add_comm.", "now   auto.", "lia."]


def test_comments_nest_and_hide_full_stops_and_strings_hide_comments() -> None:
    source = '(* a. (* b. *) "*)" *) Notation "x (* y" := 1. (* end *)'
    assert texts(source, focus=False) == ['Notation "x (* y" := 1.']


def test_doubled_quotes_stay_inside_the_string() -> None:
    assert texts('idtac "say ""a. b"" now". lia.') == ['idtac "say ""a. b"" now".', "lia."]


def test_bullets_and_braces_are_sentences_in_proof_mode() -> None:
    assert texts("split. - lia. -- { auto. } 2: { ring. }") == [
        "split.", "-", "lia.", "--", "{", "auto.", "}", "2: {", "ring.", "}",
    ]  # fmt: skip


@pytest.mark.parametrize("source", ["lia", "(* open. lia.", 'idtac "open. ', "intros. lia"])
def test_unfinished_text_is_a_syntax_error(source: str) -> None:
    with pytest.raises(CoqSyntaxError):
        texts(source)


@pytest.mark.parametrize(
    ("given_text", "canonical"),
    [
        ("lia", "lia."),
        ("  intros   x\n y. ", "intros x y."),
        ("(* first *) nra.", "nra."),
        ("2: apply (f_equal S)", "2: apply (f_equal S)."),
        ("all: try lia.", "all: try lia."),
        ("[main]: exact I.", "[main]: exact I."),
        ("(intros; lia)", "(intros; lia)."),
        ("[> lia | lra ]", "[> lia | lra ]."),
        ("match goal with [ H : _ /\\ _ |- _ ] => destruct H end", None),
        ("rewrite <- Rmult_1_l at 1.", None),
        ("exact (ltac:(lia))", "exact (ltac:(lia))."),
        ("-", "-"),
        ("**", "**"),
        ("}", "}"),
        ("2: {", "2: {"),
    ],
)
def test_tactics_are_accepted_in_canonical_form(given_text: str, canonical: str | None) -> None:
    accepted = check_tactic(given_text)
    if canonical is not None:
        assert accepted == canonical
    assert check_tactic(accepted) == accepted


@pytest.mark.parametrize(
    "text",
    [
        "Admitted.", "Abort.", "Qed.", "Defined.", "Save foo.", "Axiom cheat : False.", "Parameter x : nat.",
        "Hypothesis h : False.", "Redirect \"out\" Print nat.", "Load \"file\".", "Extraction \"file\" nat.",
        "Recursive Extraction nat.", "Declare ML Module \"unix\".", "Cd \"/\".", "Pwd.", "Unset Guard Checking.",
        "Set Bypass Stuff.", "Unset Universe Checking.", "#[bypass_check(guard)] Fixpoint f (n : nat) := f n.",
        "Local Unset Guard Checking.", "Require Import ClassicalFacts.", "Add LoadPath \"/\" as x.", "Drop.", "Quit.",
        "BackTo 1.", "Undo.", "Restart.", "Reset Initial.", "Show Proof.", "Time lia.", "Fail lia.", "Timeout 9 lia.",
        "Ltac cheat := admit.", "Goal False.", "Proof.", "Print Assumptions foo.", "Obligation Tactic := idtac.",
    ],
)  # fmt: skip
def test_commands_are_refused(text: str) -> None:
    with pytest.raises(RefusedTacticError):
        check_tactic(text)


@pytest.mark.parametrize(
    "text",
    [
        "admit.", "give_up", "idtac; admit", "first [admit | lia].", "try (solve [give_up])", "all: admit.",
        "2: give_up.", "(admit)", "exact (ltac:(admit))", "refine (ltac:(give_up))", "let x := admit in x",
        "let t := ltac:(admit) in exact t", "match goal with |- _ => admit end", "Coq.Init.Prelude.admit",
        "idtac;admit", "assert (H : False) by admit", "shelve", "unshelve (shelve)", "native_compute", "par: lia",
        "cut False; [ | give_up ]", "\u00b2admit", "lia; (* x *) admit", "lia; adm(* x *)it; admit",
    ],
)  # fmt: skip
def test_cheats_are_refused_however_nested(text: str) -> None:
    with pytest.raises(RefusedTacticError):
        check_tactic(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("(* only *)", "empty"),
        ("intros. lia.", "more than one sentence"),
        ("lia). Admitted. (", "more than one sentence"),
        ("lia...", "`..`"),
        ("intros .. x.", "more than one sentence"),
        ('idtac "No more goals."', "strings"),
        ("lia (* open", "never closed"),
        ("foo bar", "not a known tactic"),
        ("idtac <prompt>", "markers"),
        ("lia\x00", "character"),
        ("lia\x1b[2J", "character"),
        ("x" * (MAX_TACTIC_CHARS + 1), "characters"),
        ("exact " + "(" * (MAX_NESTING + 1) + "0" + ")" * (MAX_NESTING + 1), "nested"),
        ("- lia", "not a known tactic"),
        ("exact (eq_refl <<: 1 = 1)", "external compiler"),
    ],
)
def test_refusals_say_why(text: str, why: str) -> None:
    with pytest.raises(RefusedTacticError, match=why):
        check_tactic(text)


def test_words_that_merely_contain_a_forbidden_one_are_fine() -> None:
    assert check_tactic("apply admit_lemma'") == "apply admit_lemma'."
    assert check_tactic("destruct parity") == "destruct parity."


def test_proof_errors_name_the_step() -> None:
    with pytest.raises(RefusedTacticError, match="step 2: `admit`"):
        check_proof(["intros", "admit"])


def test_proof_script_loses_its_frame_only() -> None:
    assert split_proof("Proof.\n intros n.\n - lia.\nQed.") == ["intros n.", "-", "lia."]
    assert split_proof("intros n. Qed. Axiom x : False.")[1] == "Qed."  # kept, so that it is refused
    with pytest.raises(RefusedTacticError):
        split_proof("intros n")


def test_no_whitelisted_word_is_forbidden() -> None:
    assert not TACTICS & FORBIDDEN.keys()
    assert all(word[0].islower() for word in TACTICS)  # commands of the vernacular begin with a capital


_PIECES = st.sampled_from(
    [*sorted(TACTICS)[:20], *FORBIDDEN, "Qed", "Axiom", "Set", "x", "\u03b1", "\u00b2", "all:", "2:"]
    + [".", ". ", "..", ";", "(", ")", "[", "|", "]", "{", "}", '"', "(*", "*)", "\n", "-", "#["]
)


@given(st.lists(_PIECES, max_size=12).map("".join) | st.text(max_size=40))
def test_whatever_passes_is_one_sentence_without_forbidden_words(text: str) -> None:
    try:
        step = check_tactic(text)
    except RefusedTacticError:
        return
    assert len(texts(step)) == 1
    assert "\n" not in step
    assert '"' not in step
    assert not set(step.replace(".", " ").replace(";", " ").replace("(", " ").split()) & FORBIDDEN.keys()
    assert check_tactic(step) == step
