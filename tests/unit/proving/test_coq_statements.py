"""Statements cut out of Coq files, and what the check reads from Coq's answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modules.verification.provers.base import ProverUnavailableError, StatementError
from modules.verification.provers.coq_check import (
    REALS_AXIOMS,
    CoqLimits,
    CoqTools,
    foreign_axioms,
    missing_library,
    tactic_import,
)
from modules.verification.provers.coq_statements import load_minif2f, parse_statement

SOURCE = """(* A Theorem in a comment. Proof. *)
From Stdlib Require Import Lia.
Axiom a b : nat.
Definition double (n : nat) := n + n.

Theorem even_more : forall n, double n = 2 * n.

Proof.
Admitted.
Theorem second : False.
"""


def test_statement_is_cut_verbatim_before_its_proof() -> None:
    statement = parse_statement(SOURCE, "x", "test")
    assert statement.name == "even_more"
    assert statement.axioms == ("a", "b")
    assert statement.text == SOURCE.split("\n\nProof")[0].replace("From Stdlib", "From Coq")
    assert statement.commands()[-1] == "Theorem even_more : forall n, double n = 2 * n."


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("Definition x := 1. Proof.", "no theorem"),
        ("", "no theorem"),
        ("Theorem t : True", "no final full stop"),
        ('Redirect "f" Print nat. Theorem t : True.', "command `Redirect"),
        ('Load "f". Theorem t : True.', "command `Load"),
        ('Declare ML Module "m". Theorem t : True.', "Declare Scope"),
        ("Unset Guard Checking. Theorem t : True.", "setting `Unset Guard"),
        ("Local Set Universe Polymorphism. Theorem t : True.", "setting"),
        ("#[local] Unset Guard Checking. Theorem t : True.", "command"),
        ("Section S. Theorem t : True.", "command `Section"),
        ("Module M. Theorem t : True.", "Module X :="),
        ("Ltac x := idtac. Theorem t : True.", "command `Ltac"),
        ("Theorem t : True." + " " * 100_000, "characters"),
    ],
)
def test_statement_errors_name_the_culprit(source: str, why: str) -> None:
    with pytest.raises(StatementError, match=why):
        parse_statement(source, "bad")


def test_minif2f_rows_are_strided_within_their_split(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    splits = ["valid", "test"]
    rows = [{"name": f"t{i}", "split": splits[i % 2], "source": f"Theorem t{i} : True."} for i in range(9)]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [s.name for s in load_minif2f(file, "valid", 2)] == ["t0", "t4", "t8"]
    file.write_text('{"name": 1}')
    with pytest.raises(StatementError, match=r"rows.jsonl:1: not a row"):
        list(load_minif2f(file))
    with pytest.raises(ValueError, match="stride must be >= 1"):
        list(load_minif2f(file, stride=0))


def test_every_minif2f_statement_parses_under_its_own_name(data_dir: Path) -> None:
    file = data_dir / "math" / "minif2f_coq.jsonl"
    names = [json.loads(line)["name"] for line in file.read_text(encoding="utf-8").splitlines()]
    parsed = [*load_minif2f(file, "test"), *load_minif2f(file, "valid")]
    assert len(parsed) == 488
    assert {s.name for s in parsed} == set(names)
    assert [s.name for s in parsed if s.axioms] == ["amc12a_2016_p3"]


CLASSIC = "Axioms:\nClassical_Prop.classic : forall P : Prop, P \\/ ~ P\n"


@pytest.mark.parametrize(
    ("answer", "foreign"),
    [
        ("\nClosed under the global context\n", []),
        (CLASSIC, []),
        ("Axioms:\nClassicalDedekindReals.sig_forall_dec\n  : forall P : nat -> Prop,\n    x\n", []),
        (CLASSIC + "cheat : False\n", ["cheat"]),
        ("Axioms:\nbar is assumed to be guarded.\n", ["bar is assumed to be guarded."]),
        ("Section Variables:\nx : False\n", ["unexpected"]),
        ("", ["unexpected"]),
        ("Closed under the global context\nAxioms:\ncheat : False\n", ["unexpected"]),
        ("Axioms:\nMy.Classical_Prop.classic : False\n", ["My.Classical_Prop.classic"]),
    ],
)
def test_assumptions_other_than_the_allowed_are_found(answer: str, foreign: list[str]) -> None:
    found = foreign_axioms(answer, REALS_AXIOMS)
    assert len(found) == len(foreign)
    assert all(name in given for name, given in zip(foreign, found, strict=True))


def test_missing_libraries_are_told_from_errors() -> None:
    line = missing_library("Error: Cannot find a physical path bound to logical path\nCoquelicot.Coquelicot.")
    assert line == "library Coquelicot.Coquelicot is not installed (install the Debian package libcoq-coquelicot)"
    assert missing_library("Error: The reference foo was not found.") is None


def test_no_coq_is_one_line_naming_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProverUnavailableError, match="Debian packages coq and libcoq-coquelicot"):
        CoqTools.find()
    with pytest.raises(ProverUnavailableError, match="not found at '/nowhere/coqtop'"):
        CoqTools.find("/nowhere/coqtop")


def test_limits_and_library_names_are_checked() -> None:
    with pytest.raises(ValueError, match="tactic_seconds must be > 0, got 0"):
        CoqLimits(tactic_seconds=0)
    with pytest.raises(ValueError, match="must be whole"):
        CoqLimits(tactic_seconds=1.5)  # pyright: ignore[reportArgumentType]
    assert tactic_import(["Lia", "micromega.Lra"]) == ["From Coq Require Import Lia micromega.Lra."]
    assert tactic_import([]) == []
    with pytest.raises(ValueError, match="not the name of a Coq library"):
        tactic_import(["Lia. Axiom x : False"])
