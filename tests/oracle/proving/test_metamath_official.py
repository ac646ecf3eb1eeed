"""Metamath against the databases' own proofs and against the official `metamath` program."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from modules.verification.proof_search import SearchLimits, best_first_search
from modules.verification.provers.metamath import Assertion, Database, MetamathError
from modules.verification.provers.metamath_proof import compress, expand, theorem_text
from modules.verification.provers.metamath_proposer import AssertionProposer
from modules.verification.provers.metamath_search import Library, MetamathProver

THEOREMS = {"demo0.mm": 1, "ql.mm": 1138, "hol.mm": 138}
_LOADED: dict[Path, Database] = {}


def load(data_dir: Path, name: str) -> Database:
    path = data_dir / "math" / name
    if path not in _LOADED:
        _LOADED[path] = Database.load(path)
    return _LOADED[path]


@pytest.fixture
def metamath() -> str:
    program = shutil.which("metamath")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("the official checker is missing: install the Debian package metamath")
        pytest.skip("the official checker is missing: install the Debian package metamath")
    return program


def theorems(database: Database) -> list[Assertion]:
    return [a for a in database.assertions.values() if a.kind == "$p"]


def official_verdicts(program: str, folder: Path, text: str, labels: list[str]) -> dict[str, bool]:
    """True for each label whose proof the official program accepts in a database of this text."""
    (folder / "db.mm").write_text(text)
    commands = ["set scroll continuous", "read db.mm", *(f"verify proof {label}" for label in labels), "exit"]
    done = subprocess.run(
        [program], input="\n".join(commands) + "\n", capture_output=True, text=True, cwd=folder, timeout=120
    )
    answers = done.stdout.split("MM> ")[3:-1]  # after the banner, the setting and the reading; before the exit
    assert len(answers) == len(labels), done.stdout[-2000:]
    assert all(answer.startswith(label) for label, answer in zip(labels, answers, strict=True))
    accepted = ["?Error" not in answer and "?Warning" not in answer for answer in answers]
    return dict(zip(labels, accepted, strict=True))


def database_text(data_dir: Path, name: str) -> str:
    return (data_dir / "math" / name).read_text(encoding="ascii")


def append(text: str, theorem: Assertion, proof: list[str], label: str) -> str:
    """The database with a copy of `theorem`, under another label and with `proof`, at its end."""
    hypotheses = " ".join(f"{label}.{h.label} $e {' '.join(h.expression)} $." for h in theorem.essential)
    renamed = {h.label: f"{label}.{h.label}" for h in theorem.essential}
    disjoint = " ".join(f"$d {x} {y} $." for x, y in sorted(theorem.scope_disjoint))
    body = theorem_text(theorem, [renamed.get(step, step) for step in proof]).split(" ", 1)[1]
    return f"{text}\n${{ {disjoint} {hypotheses} {label} {body} $}}\n"


@pytest.mark.parametrize("name", THEOREMS)
def test_every_theorem_of_the_database_is_accepted(data_dir: Path, name: str) -> None:
    assert load(data_dir, name).check_all() == THEOREMS[name]


@pytest.mark.parametrize("name", THEOREMS)
def test_own_compression_is_accepted_and_round_trips(data_dir: Path, name: str) -> None:
    database = load(data_dir, name)
    for theorem in theorems(database)[:: 5 if name == "ql.mm" else 1]:
        normal = expand(database, theorem)
        if len(normal) > 3000:
            continue
        compressed = compress(database, theorem, normal)
        database.check(theorem, normal)
        database.check(theorem, compressed)
        assert expand(database, theorem, compressed) == normal


def frame(assertion: Assertion) -> tuple[object, ...]:
    """Statement and hypotheses with variables numbered: equal for two assertions that say the same."""
    names = {h.expression[1]: i for i, h in enumerate(assertion.variables)}
    expressions = (assertion.expression, *(h.expression for h in assertion.essential))
    lines = [tuple(names.get(s, s) for s in expression) for expression in expressions]
    disjoint = frozenset(tuple(sorted((names[x], names[y]))) for x, y in assertion.disjoint)
    return (*lines, tuple(h.kind for h in assertion.hypotheses), disjoint)


@pytest.mark.parametrize(("name", "count"), [("demo0.mm", 1), ("hol.mm", 60), ("ql.mm", 120)])
def test_one_replaced_label_is_rejected_unless_it_says_the_same(data_dir: Path, name: str, count: int) -> None:
    """Oracle 6.12: mutate one label of a normal proof, to one of the same kind and arity where there is one."""
    database = load(data_dir, name)
    rng = random.Random(7)
    accepted = tried = 0
    for theorem in rng.sample(theorems(database), count):
        proof = expand(database, theorem)
        if len(proof) > 1500:
            continue
        earlier = [a for a in database.assertions.values() if a.index < theorem.index]
        own = {h.label: h.expression for h in theorem.hypotheses if h.kind == "$e"}
        for position in rng.sample(range(len(proof)), min(4, len(proof))):
            old = database.assertions.get(proof[position])
            if old is None:  # a hypothesis: any other one
                others = [label for label in [*sorted(theorem.floating), *own] if label != proof[position]]
                new = rng.choice(others)
                same = False
            else:
                alike = [a for a in earlier if a is not old and len(a.hypotheses) == len(old.hypotheses)]
                if not alike:
                    continue
                chosen = rng.choice(alike)
                new, same = chosen.label, frame(chosen) == frame(old)
            tried += 1
            try:
                database.check(theorem, [*proof[:position], new, *proof[position + 1 :]])
            except MetamathError:
                assert not same, f"{theorem.label}: {new} says the same as {proof[position]}, yet it is rejected"
            else:
                accepted += 1
                assert same, f"{theorem.label}, label {position}: {proof[position]} replaced by {new} is accepted"
    assert tried >= count
    assert accepted < tried


def test_type_identical_labels_may_be_swapped(data_dir: Path) -> None:
    """The exception of oracle 6.12 does occur: ql.mm states some laws twice, and either label is accepted."""
    database = load(data_dir, "ql.mm")
    by_frame: dict[tuple[object, ...], list[Assertion]] = {}
    for assertion in database.assertions.values():
        by_frame.setdefault(frame(assertion), []).append(assertion)
    twins = {a.label: group[0].label for group in by_frame.values() for a in group[1:]}
    assert twins
    swapped = 0
    for theorem in theorems(database):
        proof = list(theorem.proof)
        if theorem.proof[0] != "(" or not any(label in twins for label in proof):
            continue
        database.check(theorem, [twins.get(label, label) for label in proof])
        swapped += 1
    assert swapped


@pytest.mark.parametrize("name", ["ql.mm", "hol.mm"])
def test_mutated_proofs_get_the_official_verdict(data_dir: Path, tmp_path: Path, metamath: str, name: str) -> None:
    database, text = load(data_dir, name), database_text(data_dir, name)
    rng = random.Random(11)
    mine: dict[str, bool] = {}
    everything = [*database.assertions, *database.hypotheses]
    for number, theorem in enumerate(rng.sample(theorems(database), 60)):
        proof = expand(database, theorem)
        if len(proof) > 400:
            continue
        if number % 4:  # a quarter stays correct
            kind = number % 4
            position = rng.randrange(len(proof))
            if kind == 1:
                proof[position] = rng.choice(everything[: theorem.index])
            elif kind == 2:
                del proof[position]
            else:
                other = rng.randrange(len(proof))
                proof[position], proof[other] = proof[other], proof[position]
        label = f"copy{number}"
        try:
            database.check(theorem, proof)
            mine[label] = True
        except MetamathError:
            mine[label] = False
        text = append(text, theorem, proof, label)
    assert set(mine.values()) == {True, False}
    assert official_verdicts(metamath, tmp_path, text, list(mine)) == mine


def test_found_proofs_are_accepted_by_the_official_program(data_dir: Path, tmp_path: Path, metamath: str) -> None:
    library = Library(load(data_dir, "ql.mm"))
    text = database_text(data_dir, "ql.mm")
    expected: dict[str, bool] = {}
    for label in ("cm", "le0", "wa2", "ska14", "3tr1"):
        theorem = library.database.assertions[label]
        prover = MetamathProver(library)
        result = best_first_search(prover, theorem, AssertionProposer(library, theorem), SearchLimits(100, 60))
        assert result.proof is not None, (label, result.reason)
        text = append(text, theorem, prover.replay(theorem, result.proof), f"{label}-normal")
        expected[f"{label}-normal"] = True
        if not theorem.essential:
            text = append(text, theorem, prover.compressed(theorem, result.proof), f"{label}-short")
            expected[f"{label}-short"] = True
    assert official_verdicts(metamath, tmp_path, text, list(expected)) == expected
