"""Lexing of Coq text: sentences of a file, and the rule for what may count as one proof step.

Untrusted (model) text is accepted by whitelist: one sentence, whose first word is a known tactic. Everything that
starts a command of the vernacular is thereby refused (`Redirect`, `Load`, `Extraction`, `Declare ML Module`, `Cd`,
`Axiom`, `Admitted`, `Qed`, `Set`, `Unset Guard Checking`, ...), and the few tactics that cheat or start programs
are refused wherever they occur, however deeply nested. The kernel stays the judge (`coq_check`); this layer keeps
text from reaching a process that would obey it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from modules.verification.provers.base import RefusedTacticError

MAX_TACTIC_CHARS = 4096
MAX_NESTING = 128

_TACTIC_WORDS = """
    intro intros apply eapply rapply lapply exact eexact refine notypeclasses simple assumption eassumption
    reflexivity symmetry transitivity etransitivity split esplit left right eleft eright exists eexists constructor
    econstructor destruct edestruct induction einduction elim eelim case ecase case_eq inversion inversion_clear
    inversion_sigma dependent discriminate ediscriminate injection einjection simplify_eq esimplify_eq subst rewrite
    erewrite rewrite_strat setoid_rewrite setoid_replace setoid_reflexivity setoid_symmetry setoid_transitivity
    replace unfold fold simpl cbn cbv lazy compute vm_compute hnf red pattern change auto eauto trivial tauto
    intuition dintuition dtauto firstorder rtauto btauto congruence easy now contradiction absurd exfalso contradict
    assert eassert enough eenough cut pose epose set eset remember eremember specialize especialize generalize
    revert clear clearbody rename move instantiate lia lra nia nra psatz ring ring_simplify field field_simplify
    field_simplify_eq zify nsatz decide f_equal fix cofix functional repeat try do progress first solve once
    exactly_once tryif match lazymatch multimatch let idtac fail gfail abstract timeout time unshelve only cycle
    swap revgoals stepl stepr autorewrite autounfold typeclasses over under have suff suffices wlog by congr
    split_Rabs split_Rmult prove_sup0 reg discrR auto_derive rewrite_all destruct_all destruct_one_pair
    destruct_pairs destruct_one_ex destruct_exists program_simpl order nzsimpl assert_succeeds assert_fails
"""
TACTICS: frozenset[str] = frozenset(_TACTIC_WORDS.split())
"""First words a step may have: the tactics of Coq 8.16's manual and of the libraries miniF2F imports."""

FORBIDDEN: dict[str, str] = {
    "admit": "leaves the goal unproved",
    "give_up": "leaves the goal unproved",
    "Admitted": "leaves the theorem unproved",
    "shelve": "hides the goal",
    "shelve_unifiable": "hides the goal",
    "native_compute": "starts an external compiler",
    "native_cast_no_check": "starts an external compiler",
    "par": "starts worker processes",
    "ltac2": "is not Ltac",
    "optimize_heap": "acts on the process",
    "restart_timer": "acts on the process",
    "finish_timing": "acts on the process",
}
"""Words refused anywhere in a step, with the reason given."""

# Flanked by ASCII word characters only: a neighbour Python calls a letter but Coq does not must not hide the word.
_FORBIDDEN_RE = re.compile(r"(?<![A-Za-z0-9_'])(" + "|".join(FORBIDDEN) + r")(?![A-Za-z0-9_'])")
_SELECTOR_RE = re.compile(
    r"(?:all|!|\d+(?:\s*-\s*\d+)?(?:\s*,\s*\d+(?:\s*-\s*\d+)?)*|\[\s*[A-Za-z_][\w']*\s*\])\s*:(?!=)\s*"
)
_WORD_RE = re.compile(r"[^\W\d][\w']*")
_BULLET_RE = re.compile(r"-+|\++|\*+")
_BRACE_RE = re.compile(r"(?:(?:\d+|\[\s*[A-Za-z_][\w']*\s*\])\s*:\s*)?\{|\}")
_OPEN, _CLOSE = "([{", ")]}"

SentenceKind = Literal["sentence", "bullet", "brace"]


@dataclass(frozen=True)
class Sentence:
    """One sentence of a Coq file: source[start:end] is its text (surrounding comments and blanks left out)."""

    text: str
    kind: SentenceKind
    start: int
    end: int

    @property
    def first_word(self) -> str:
        """First identifier of the sentence, "" when it has none."""
        match = _WORD_RE.search(self.text)
        return match.group(0) if match else ""


class CoqSyntaxError(ValueError):
    """Text that cannot be cut into sentences (unclosed comment or string, unfinished sentence)."""


def _skip_comment(text: str, position: int) -> int:
    """Index after the comment that opens at `position`; comments nest and strings inside them are opaque."""
    depth, i = 0, position
    while i < len(text):
        if text.startswith("(*", i):
            depth, i = depth + 1, i + 2
        elif text.startswith("*)", i):
            depth, i = depth - 1, i + 2
            if depth == 0:
                return i
        elif text[i] == '"':
            i = _skip_string(text, i)
        else:
            i += 1
    raise CoqSyntaxError(f"Coq text: comment opened at character {position} is never closed")


def _skip_string(text: str, position: int) -> int:
    """Index after the string that opens at `position` (a doubled quote stands for itself)."""
    i = position + 1
    while True:
        i = text.find('"', i)
        if i < 0:
            raise CoqSyntaxError(f"Coq text: string opened at character {position} is never closed")
        if not text.startswith('""', i):
            return i + 1
        i += 2


def _skip_blank(text: str, position: int) -> int:
    i = position
    while i < len(text):
        if text[i].isspace():
            i += 1
        elif text.startswith("(*", i):
            i = _skip_comment(text, i)
        else:
            break
    return i


def sentences(text: str, *, focus: bool = True) -> Iterator[Sentence]:
    """Cut Coq text into sentences.

    A sentence ends at a full stop followed by blank or end of text, outside comments and strings. With `focus`,
    bullets and braces at the start of a sentence are sentences of their own (proof mode).

    Raises:
        CoqSyntaxError: unclosed comment or string, or text after the last full stop.
    """
    position = 0
    while (start := _skip_blank(text, position)) < len(text):
        if focus:
            for pattern, kind in ((_BULLET_RE, "bullet"), (_BRACE_RE, "brace")):
                if match := pattern.match(text, start):
                    yield Sentence(match.group(0), kind, start, match.end())  # type: ignore[arg-type]
                    position = match.end()
                    break
            else:
                match = None
            if match:
                continue
        i = start
        while i < len(text):
            if text.startswith("(*", i):
                i = _skip_comment(text, i)
            elif text[i] == '"':
                i = _skip_string(text, i)
            elif text[i] == "." and (i + 1 == len(text) or text[i + 1].isspace()) and text[i - 1 : i] != ".":
                break
            elif text.startswith("...", i) and (i + 3 == len(text) or text[i + 3].isspace()):
                i += 2
                break
            else:
                i += 1
        else:
            raise CoqSyntaxError(f"Coq text: sentence starting at character {start} has no final full stop")
        yield Sentence(text[start : i + 1], "sentence", start, i + 1)
        position = i + 1


def strip_comments(text: str) -> str:
    """Replace every comment outside strings by one space."""
    parts, i, kept = [], 0, 0
    while i < len(text):
        if text.startswith("(*", i):
            parts.append(text[kept:i])
            i = kept = _skip_comment(text, i)
            parts.append(" ")
        elif text[i] == '"':
            i = _skip_string(text, i)
        else:
            i += 1
    return "".join([*parts, text[kept:]])


def check_tactic(text: str) -> str:
    """Canonical form of one proof step, or a refusal.

    Returns the step without comments, blanks collapsed, with its final full stop; a bullet or brace as it is. A missing
    final full stop is supplied.

    Raises:
        RefusedTacticError: not exactly one sentence, unknown first word, forbidden word, string, control character,
            more than MAX_TACTIC_CHARS characters or MAX_NESTING brackets deep.
    """
    if len(text) > MAX_TACTIC_CHARS:
        raise RefusedTacticError(f"step of {len(text)} characters, at most {MAX_TACTIC_CHARS} are accepted")
    if '"' in text:
        # In a tactic a string serves messages only, and those could imitate the prover's own output.
        raise RefusedTacticError("strings are refused in a proof step")
    if bad := next((c for c in text if not c.isprintable() and c not in "\n\t\r"), None):
        raise RefusedTacticError(f"character {bad!r} is refused in a proof step")
    try:
        step = " ".join(strip_comments(text).split())
    except CoqSyntaxError as error:
        raise RefusedTacticError(str(error)) from None
    if not step:
        raise RefusedTacticError("empty proof step")
    if _BULLET_RE.fullmatch(step) or _BRACE_RE.fullmatch(step):
        return step
    if step.endswith(".."):
        raise RefusedTacticError("`..` at the end of a step is refused")
    if not step.endswith("."):
        step += "."
    if re.search(r"\.\s|\.\.", step):
        raise RefusedTacticError("more than one sentence in a proof step")
    if "prompt>" in step or "infomsg>" in step:
        raise RefusedTacticError("text that imitates the prover's markers is refused")
    if "<<:" in step:
        raise RefusedTacticError("`<<:` is refused: it starts an external compiler")
    if match := _FORBIDDEN_RE.search(step):
        word = match.group(1)
        raise RefusedTacticError(f"`{word}` is refused: it {FORBIDDEN[word]}")
    depth = deepest = 0
    for c in step:
        depth += (c in _OPEN) - (c in _CLOSE)
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise RefusedTacticError(f"brackets nested {deepest} deep, at most {MAX_NESTING} are accepted")
    body = _SELECTOR_RE.sub("", step, count=1) if _SELECTOR_RE.match(step) else step
    body = body.lstrip("([> ")
    word = _WORD_RE.match(body)
    if word is None or word.group(0) not in TACTICS:
        shown = word.group(0) if word else body[:20]
        raise RefusedTacticError(f"`{shown}` is not a known tactic: a step must start with one")
    return step


def check_proof(proof: Sequence[str]) -> list[str]:
    """Canonical steps of a whole proof. Raises RefusedTacticError naming the step's number (from 1)."""
    steps = []
    for number, tactic in enumerate(proof, 1):
        try:
            steps.append(check_tactic(tactic))
        except RefusedTacticError as error:
            raise RefusedTacticError(f"step {number}: {error}") from None
    return steps


def split_proof(text: str) -> list[str]:
    """Cut a proof script (`Proof.` ... `Qed.` optional) into steps for `check_proof`. Raises RefusedTacticError."""
    try:
        steps = [s.text for s in sentences(text)]
    except CoqSyntaxError as error:
        raise RefusedTacticError(str(error)) from None
    if steps and re.fullmatch(r"Proof\s*\.", steps[0]):
        steps = steps[1:]
    if steps and steps[-1] == "Qed.":
        steps = steps[:-1]
    return steps
