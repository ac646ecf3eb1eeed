"""Coq statements: a theorem with the commands before it, as miniF2F-rocq ships them (one file a problem)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modules.verification.provers.base import StatementError
from modules.verification.provers.coq_grammar import CoqSyntaxError, Sentence, sentences, strip_comments

MAX_STATEMENT_CHARS = 100_000

_THEOREM_RE = re.compile(
    r"(?:Local\s+|Global\s+)?(?:Theorem|Lemma|Fact|Remark|Corollary|Proposition|Example)\s+([^\W\d][\w']*)"
)
# Commands a statement file may hold. Data sets are not trusted either: nothing here writes files, loads code or changes
# what the kernel checks.
_COMMAND_WORDS = """
    Require From Import Export Open Close Definition Fixpoint CoFixpoint Function Inductive CoInductive Variant
    Record Structure Class Instance Notation Infix Reserved Theorem Lemma Fact Remark Corollary Proposition Example
    Parameter Parameters Axiom Axioms Conjecture Let Arguments Implicit Coercion Canonical Delimit Bind Declare Set
    Unset Generalizable Local Global Module
"""
_COMMANDS: frozenset[str] = frozenset(_COMMAND_WORDS.split())
_AXIOM_RE = re.compile(r"(?:Local\s+|Global\s+)?(?:Parameters?|Axioms?|Conjecture)\s+(.*)", re.DOTALL)
_SETTING_RE = re.compile(r"(?:Local\s+|Global\s+|Export\s+)?(?:Set|Unset)\s+(.*)", re.DOTALL)
_SAFE_SETTINGS = ("Implicit Arguments", "Strict Implicit", "Contextual Implicit", "Printing", "Asymmetric Patterns")


@dataclass(frozen=True)
class CoqStatement:
    """A Coq theorem to prove.

    text is the source verbatim up to (not including) the theorem's proof and is what the final check compiles; axioms
    names what the statement itself assumes, which its proofs may therefore use.
    """

    name: str
    text: str
    axioms: tuple[str, ...] = ()
    split: str = ""

    def commands(self) -> list[str]:
        """The sentences of the statement, the theorem last."""
        return [s.text for s in sentences(self.text, focus=False)]


def _refuse_command(name: str, sentence: Sentence) -> None:
    flat = " ".join(strip_comments(sentence.text).split())
    if sentence.first_word not in _COMMANDS or not flat.startswith(sentence.first_word):
        raise StatementError(f"CoqStatement {name}: command `{flat[:40]}` is not allowed in a statement")
    if flat.startswith("Declare") and not flat.startswith("Declare Scope"):
        raise StatementError(f"CoqStatement {name}: only `Declare Scope` is allowed of `Declare`, got `{flat[:40]}`")
    if flat.startswith("Module") and not re.match(r"Module\s+\w+\s*:=", flat):
        raise StatementError(f"CoqStatement {name}: only `Module X := ...` is allowed of `Module`, got `{flat[:40]}`")
    setting = _SETTING_RE.match(flat)
    if setting and not setting.group(1).startswith(_SAFE_SETTINGS):
        raise StatementError(f"CoqStatement {name}: setting `{flat[:60]}` is not allowed in a statement")


def parse_statement(source: str, name: str = "", split: str = "") -> CoqStatement:
    """Cut a Coq file at the proof of its first theorem.

    `From Stdlib` (newer than Coq 8.16) becomes `From Coq`; a file without `Proof` is taken whole.

    Raises:
        StatementError: no theorem, a command outside the allowed ones, or text Coq could not cut into sentences.
    """
    shown = name or "(unnamed)"
    if len(source) > MAX_STATEMENT_CHARS:
        raise StatementError(f"CoqStatement {shown}: {len(source)} characters, at most {MAX_STATEMENT_CHARS} accepted")
    found: list[Sentence] = []
    try:
        for sentence in sentences(source, focus=False):
            if sentence.first_word in ("Proof", "Admitted", "Abort"):
                break
            found.append(sentence)
            _refuse_command(shown, sentence)
            if _THEOREM_RE.match(sentence.text):
                break
    except CoqSyntaxError as error:
        raise StatementError(f"CoqStatement {shown}: {error}") from None
    theorem = _THEOREM_RE.match(found[-1].text) if found else None
    if theorem is None:
        raise StatementError(f"CoqStatement {shown}: no theorem before the first `Proof`")
    text = re.sub(r"\bFrom\s+Stdlib\b", "From Coq", source[: found[-1].end])
    axioms: list[str] = []
    for sentence in found[:-1]:
        if declared := _AXIOM_RE.match(strip_comments(sentence.text)):
            axioms += re.findall(r"[^\W\d][\w']*", declared.group(1).split(":")[0])
    return CoqStatement(theorem.group(1), text, tuple(axioms), split)


def load_minif2f(path: str | Path, split: str = "test", stride: int = 1) -> Iterator[CoqStatement]:
    """Statements of a miniF2F-rocq jsonl file (keys name, split, source), every `stride`-th of one split, in file
    order.

    Raises StatementError for a row that is not as described, naming file and line.
    """
    if stride < 1:
        raise ValueError(f"load_minif2f: stride must be >= 1, got {stride}")
    seen = 0
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                row_split, name, source = row["split"], row["name"], row["source"]
            except (ValueError, KeyError, TypeError) as error:
                raise StatementError(
                    f"load_minif2f: {path}:{number}: not a row with name, split, source ({error})"
                ) from None
            if row_split != split:
                continue
            if seen % stride == 0:
                yield parse_statement(source, name, split)
            seen += 1
