"""Coq proving against the real coqtop and coqc: what is proved is proved, and nothing else ever is."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.verification.contracts import Problem
from modules.verification.proof_search import SearchLimits, best_first_search
from modules.verification.proposers import FixedListProposer, SampledProposer, ScriptedProposer
from modules.verification.provers.base import MissingLibraryError, Prover, StatementError
from modules.verification.provers.coq import _PROMPT_RE, CoqProver
from modules.verification.provers.coq_check import CoqChecker, CoqLimits
from modules.verification.provers.coq_statements import CoqStatement, load_minif2f, parse_statement
from modules.verification.provers.process import InteractiveProcess
from modules.verification.provers.verifiers import CoqVerifier

FALSE = parse_statement("Theorem zero_only : forall n : nat, n = 0.")
SUM = parse_statement("Require Import Arith.\nTheorem sum : forall a b : nat, a + b = b + a /\\ a <= a + b.")
REAL = parse_statement("Require Import Reals.\nOpen Scope R_scope.\nTheorem pos : forall x, 0 < x -> exp (ln x) = x.")
HOSTILE = [
    "admit", "give_up", "Admitted", "Qed", "Axiom cheat : forall n : nat, n = 0", "Unset Guard Checking",
    "idtac; admit", "first [admit | lia]", "exact (ltac:(give_up))", "intros; shelve", "Abort", "Restart",
    "fix loop 1; exact loop", "cofix loop; exact loop", "intro n; exact_no_check (eq_refl n)",
    "intro n; vm_cast_no_check (eq_refl n)", "intro n; change_no_check (n = n); reflexivity",
    "unshelve eexists", "intros; assert False by (clear; tauto)", "idtac No more goals", "abstract (fix f 1; exact f)",
    "lia). Admitted. (", 'Redirect "x" Print nat', "induction n; [reflexivity | apply IHn]", "intros; congruence",
    "lia",
    "exact (fun n => match n with O => eq_refl end)", "refine (fix f (n : nat) : n = 0 := f n)", "refine (fun n => _)",
    "exact proof_admitted", "BackTo 1", "Timeout 5 admit", "par: admit",
]  # fmt: skip


@pytest.fixture(scope="module")
def coq() -> Iterator[CoqProver]:
    missing = [name for name in ("coqtop", "coqc") if shutil.which(name) is None]
    if missing:
        message = f"{missing[0]} is missing: install the Debian packages coq and libcoq-coquelicot"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    # One small tactic library: each coqc run then takes a fraction of what it takes with those over the reals.
    limits = CoqLimits(tactic_seconds=2, grace_seconds=4)
    with CoqProver(limits=limits, tactic_libraries=["Lia"]) as prover:
        yield prover


def test_prover_meets_the_protocol(coq: CoqProver) -> None:
    assert isinstance(coq, Prover)


def test_scripted_search_finds_a_proof_that_coqc_accepts(coq: CoqProver) -> None:
    script = {
        "forall": ["admit", "lra", "intros a b"],
        "a + b = b + a /\\": ["reflexivity", "split"],
        "goal 2": ["apply Nat.add_comm"],
        "<=": ["apply Nat.le_add_r"],
    }
    result = best_first_search(coq, SUM, ScriptedProposer(script))
    assert result.proof == ("intros a b", "split", "apply Nat.add_comm", "apply Nat.le_add_r")
    assert result.verdict is not None
    assert result.verdict.ok
    assert result.verdict.reason.startswith("accepted by coqc 8.")
    assert result.outcomes["refused"] == 1
    assert coq.check(SUM, result.proof).ok  # once more, from nothing


def test_model_text_is_read_and_its_proof_checked(coq: CoqProver) -> None:
    def generate(prompts: list[str], n: int) -> list[list[tuple[str, float]]]:
        assert "============================" in prompts[0].rsplit("Goals:", 1)[1]
        return [[("Admitted.\n---", -0.1), ("lia.\n---\nGoals:", -0.4), ("intros.\n", -0.3)]]

    result = best_first_search(coq, SUM, SampledProposer(generate), SearchLimits(5, 60))
    assert result.proof in {("lia.",), ("intros.", "lia.")}


def test_hostile_proposals_never_prove_a_false_lemma(coq: CoqProver) -> None:
    result = best_first_search(coq, FALSE, ScriptedProposer(HOSTILE), SearchLimits(2, 90, len(HOSTILE)))
    assert not result.proved
    assert result.outcomes.get("rejected", 0) >= 1  # some cheats do empty the goal list (fix), and only Qed stops them
    assert result.outcomes["refused"] >= 12


@pytest.mark.parametrize(
    ("cheat", "why"),
    [
        ("fix loop 1; exact loop", "ill-formed"),
        ("intro n; exact_no_check (eq_refl n)", "refused|not a known|coqc refuses"),
        ("cofix loop; exact loop", "coqc refuses"),
        ("exact (ltac:(give_up))", "refused"),
        ("lia). Admitted. (", "refused"),
        ("Axiom cheat : forall n : nat, n = 0", "refused"),
    ],
)
def test_hostile_proofs_are_refused_by_the_check_alone(coq: CoqProver, cheat: str, why: str) -> None:
    verdict = coq.check(FALSE, [cheat])
    assert not verdict.ok
    assert re.search(why, verdict.reason), verdict.reason


@pytest.mark.parametrize("ending", ["False", "0 = 1", "forall P : Prop, P"])
def test_impossible_goals_are_not_proved_by_the_fixed_list(coq: CoqProver, ending: str) -> None:
    statement = parse_statement(f"Require Import Reals Lia Lra.\nTheorem t : {ending}.")
    result = best_first_search(coq, statement, FixedListProposer(), SearchLimits(3, 60))
    assert not result.proved
    assert "rejected" not in result.outcomes


def test_goals_replaced_by_false_are_not_proved(coq: CoqProver, data_dir: Path) -> None:
    """Oracle 6.13 on real statements: keep the file, replace the theorem by False."""
    for statement in list(load_minif2f(data_dir / "math" / "minif2f_coq.jsonl", "valid", 61)):
        head = statement.text[: -len(statement.commands()[-1])]
        false = CoqStatement(statement.name, f"{head}Theorem {statement.name} : False.", statement.axioms)
        result = best_first_search(
            coq, false, ScriptedProposer([*HOSTILE, "intuition", "nra", "congruence"]), SearchLimits(3, 30, 50)
        )
        assert result.status in ("exhausted", "max_expansions", "wall"), result
        assert not result.proved


def test_axioms_beyond_the_allowed_are_found_by_print_assumptions(coq: CoqProver) -> None:
    assert coq.check(REAL, ["intros x positive", "apply exp_ln", "exact positive"]).ok
    strict = CoqChecker(coq.tools, coq.limits, allowed_axioms=())
    verdict = strict.check(REAL, ["intros x positive", "apply exp_ln", "exact positive"])
    assert not verdict.ok
    assert "sig_forall_dec" in verdict.reason
    library = parse_statement("Require Import Coq.Compat.AdmitAxiom.\nTheorem t : forall n : nat, n = 0.")
    verdict = coq.check(library, ["intros", "exfalso", "exact proof_admitted"])
    assert not verdict.ok
    assert "proof_admitted" in verdict.reason


def test_a_statement_may_use_its_own_axioms(coq: CoqProver) -> None:
    own = parse_statement("Parameter f : nat -> nat.\nAxiom f_up : forall n, f n = S n.\nTheorem t : f 1 = 2.")
    assert coq.check(own, ["apply f_up"]).ok


@pytest.mark.parametrize(
    ("proof", "why"),
    [
        ([], "incomplete"),
        (["intros"], "incomplete"),
        (["intros", "lia", "lia"], "No such goal"),
        (["intros. Qed. Theorem x : True. exact I"], "more than one sentence"),
        (["lia"] * 1001, "at most 1000"),
        (["intros", "{", "lia"], "incomplete|focused|not finished|bullet|proof"),
    ],
)
def test_check_says_why_not(coq: CoqProver, proof: list[str], why: str) -> None:
    verdict = coq.check(SUM, proof)
    assert not verdict.ok
    assert re.search(why, verdict.reason), verdict.reason


def test_states_of_several_branches_live_together(coq: CoqProver) -> None:
    root = coq.start(SUM)
    intro = coq.apply(root, "intros a b").state
    split = coq.apply(intro, "split").state
    induction = coq.apply(intro, "induction a").state
    assert "2 goals" in coq.goals(split)
    # Both goals carry their hypotheses, so that states differing in the second only are told apart.
    assert coq.goals(induction).count("============================") == 2
    assert "IHa" in coq.goals(induction)
    for _ in range(3):
        left = coq.apply(split, "apply Nat.add_comm")
        assert left.status == "open"
        assert "a <= a + b" in coq.goals(left.state)
        assert coq.apply(left.state, "lia").status == "proved"
        assert coq.apply(induction, "- split; lia").status == "refused"
        focused = coq.apply(induction, "-").state
        done = coq.apply(focused, "lia")
        assert coq.goals(done.state).startswith("This subproof is complete")
        assert coq.apply(root, "intros x").status == "open"
    assert coq.restarts == 0
    assert "(ID" not in coq.goals(split)


@pytest.mark.parametrize(
    ("tactic", "status"),
    [
        ("apply nothing_of_the_kind", "error"),
        ("exact (1 +", "error"),
        ("exact ) lia (", "error"),
        ("discriminate", "error"),
        ("give_up", "refused"),
        ("repeat (pose 0)", "timeout"),
    ],
)
def test_tactic_outcomes(coq: CoqProver, tactic: str, status: str) -> None:
    root = coq.start(SUM)
    step = coq.apply(root, tactic)
    assert (step.status, step.state) == (status, None)
    assert step.message
    assert coq.apply(root, "intros").status == "open"  # the session is still in step


def test_output_of_tactics_is_not_taken_for_goals(coq: CoqProver) -> None:
    root = coq.start(SUM)
    noisy = coq.apply(root, "match goal with |- ?goal => idtac goal end; intros x")
    assert noisy.status == "open"
    assert coq.goals(noisy.state) == coq.goals(coq.apply(root, "intros x").state)
    assert coq.goals(noisy.state).startswith("1 goal\n")


def test_a_killed_process_is_replaced_and_its_states_replayed(coq: CoqProver) -> None:
    root = coq.start(SUM)
    split = coq.apply(coq.apply(root, "intros a b").state, "split").state
    assert coq._session is not None
    assert coq._session._process is not None
    coq._session._process.close()
    assert coq.apply(split, "lia").status == "died"
    again = coq.apply(split, "lia")
    assert again.status == "open"
    assert coq.restarts == 1
    assert coq.apply(again.state, "lia").status == "proved"


@pytest.mark.usefixtures("coq")
def test_memory_is_bounded_and_the_session_survives() -> None:
    big = parse_statement("Theorem big : exists n : nat, n * n = 25.")
    limits = CoqLimits(tactic_seconds=20, grace_seconds=10, memory_mib=700)
    with CoqProver(limits=limits, tactic_libraries=()) as prover:
        root = prover.start(big)
        began = time.monotonic()
        step = prover.apply(root, "assert (Nat.pow 10 8 = 3) by (vm_compute; reflexivity)")
        assert step.status in ("error", "died", "timeout"), step
        assert time.monotonic() - began < 35
        assert prover.apply(root, "exists 5; reflexivity").status == "proved"


def test_coq_itself_sees_no_file_of_the_host_and_writes_none(coq: CoqProver, tmp_path: Path) -> None:
    """Behind the whitelist stands the sandbox: commands that reach Coq regardless find nothing."""
    secret = tmp_path / "secret.v"
    secret.write_text("Definition leaked := 1.\n")
    process = InteractiveProcess(coq.tools.session_command(coq.limits), _PROMPT_RE)
    try:
        process.read(60)
        for command in (
            f'Load "{secret.with_suffix("")}".',
            f'Redirect "{tmp_path}/out" Print nat.',
            'Redirect "/tmp/out" Print nat.',
            f'Cd "{tmp_path}".',
        ):
            text, _ = process.ask(command, 30)
            assert "Error" in text or "Can't find" in text, (command, text)
        assert "not a defined object" in process.ask("Print leaked.", 30)[0]
    finally:
        process.close()
    assert [path.name for path in tmp_path.iterdir()] == ["secret.v"]


def test_missing_libraries_and_bad_statements_are_no_failures_of_proof(coq: CoqProver) -> None:
    missing = parse_statement("Require Import Nowhere.Library.\nTheorem t : True.")
    with pytest.raises(MissingLibraryError, match=r"library Nowhere.Library is not installed"):
        coq.start(missing)
    assert best_first_search(coq, missing, FixedListProposer()).status == "missing_library"
    with pytest.raises(StatementError, match="Coq refuses `Theorem t : undefined_thing.`"):
        coq.start(parse_statement("Theorem t : undefined_thing."))
    assert "is not installed" in coq.check(missing, ["exact I"]).reason


def test_tactic_libraries_do_not_touch_the_statement(coq: CoqProver) -> None:
    """They are opened after the theorem has been read: a name they bring cannot be meant by it."""
    ambiguous = parse_statement("Theorem t : forall n : nat, n = n.")
    source = coq.checker.source(ambiguous, ["lia."], "marker")
    assert source.startswith(ambiguous.text)
    assert source.index("Proof.") < source.index("From Coq Require Import Lia") < source.index("lia.")
    assert coq.check(ambiguous, ["lia"]).ok


def test_verifier_judges_whole_proofs(coq: CoqProver) -> None:
    verifier = CoqVerifier(coq)
    problem = Problem(SUM.text + "\nProof.\nAdmitted.")
    assert verifier.check(problem, "Proof. intros a b. split.\n- lia.\n- lia.\nQed.").ok
    assert not verifier.check(problem, "Proof. Admitted.").ok
    assert not verifier.check(problem, "intros").ok
    assert not verifier.check(problem, "x" * 300_000).ok


@pytest.mark.slow
@pytest.mark.usefixtures("coq")
def test_fixed_list_proves_known_minif2f_statements(data_dir: Path) -> None:
    known = {"mathd_algebra_104", "mathd_numbertheory_252", "amc12_2001_p2"}
    for statement in load_minif2f(data_dir / "math" / "minif2f_coq.jsonl", "valid"):
        if statement.name in known:
            result = best_first_search(CoqProver(), statement, FixedListProposer(), SearchLimits(12, 60))
            assert result.proved, statement.name
