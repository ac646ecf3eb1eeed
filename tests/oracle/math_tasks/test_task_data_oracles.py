"""Evaluation items against the real files: counts, golds, and worked examples that occur in none of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

import datamodules.text.tasks
from datamodules.text import few_shot
from datamodules.text.few_shot import load_examples
from datamodules.text.tasks import TASKS, TaskSpec, load_task

SAMPLES = Path(datamodules.text.tasks.__file__).parent / "samples"
COUNTS = {
    "math": 5000,
    "math500": 500,
    "gsm8k": 1319,
    "ocw": 272,
    "mmlu_stem": 3018,
    "minif2f_coq": 488,
    "minif2f_lean4": 488,
}


def last_box(solution: str) -> str:
    """Content of the last ``\\boxed{...}`` by counting braces (of ``\\boxed x``: the next word)."""
    start = solution.rindex("\\boxed") + len("\\boxed")
    if solution[start] != "{":
        return solution[start:].split("$")[0].strip()
    depth = 0
    for end in range(start, len(solution)):
        depth += (solution[end] == "{") - (solution[end] == "}")
        if depth == 0:
            return solution[start + 1 : end]
    raise AssertionError(f"unbalanced braces in {solution!r}")


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_item_counts_equal_the_published_set_sizes(data_dir: Path, name: str, count: int) -> None:
    items = load_task(TaskSpec(name, n_shot=0), data_dir)
    assert len(items) == count
    assert len({item["item_id"] for item in items}) == count
    assert all(item["prompt"].strip() and item["gold"].strip() for item in items)


@pytest.mark.parametrize("name", ["minif2f_coq", "minif2f_lean4"])
def test_minif2f_has_244_items_a_split(data_dir: Path, name: str) -> None:
    assert [len(load_task(TaskSpec(name, split=split), data_dir)) for split in ("valid", "test")] == [244, 244]


def test_every_math_and_ocw_gold_has_a_box_with_an_answer(data_dir: Path) -> None:
    for name in ("math", "ocw"):
        for item in load_task(TaskSpec(name, n_shot=0), data_dir):
            assert last_box(item["gold"]).strip(), item["item_id"]


def test_math500_answers_equal_the_last_box_of_the_same_math_solution(data_dir: Path) -> None:
    """The answer column of MATH-500 and the solutions of MATH are two sources of the same gold."""
    solutions = {item["prompt"]: item["gold"] for item in load_task(TaskSpec("math", n_shot=0), data_dir)}
    items = load_task(TaskSpec("math500", n_shot=0), data_dir)
    squeeze = re.compile(r"\s|\\!")
    differing = [
        item["item_id"]
        for item in items
        if squeeze.sub("", last_box(solutions[item["prompt"]])) != squeeze.sub("", item["gold"])
    ]
    assert differing == []


def test_gsm8k_golds_are_integers_14_with_commas_and_2_negative(data_dir: Path) -> None:
    """Figures counted on the published test set."""
    finals = [item["gold"].rsplit("####", 1)[1].strip() for item in load_task(TaskSpec("gsm8k", n_shot=0), data_dir)]
    assert all(re.fullmatch(r"-?\d[\d,]*", final) for final in finals)
    assert sum("," in final for final in finals) == 14
    assert sum(final.startswith("-") for final in finals) == 2


def test_mmlu_stem_has_the_18_subjects_of_the_published_subset(data_dir: Path) -> None:
    items = load_task(TaskSpec("mmlu_stem", n_shot=0), data_dir)
    assert len({item["meta"]["type"] for item in items}) == 18
    letters = Counter(item["gold"] for item in items)
    assert set(letters) == set("ABCD")
    assert min(letters.values()) > 600


def test_coq_statements_end_the_named_theorem_and_hold_no_admitted_proof(data_dir: Path) -> None:
    for item in load_task(TaskSpec("minif2f_coq"), data_dir):
        statement = item["prompt"]
        assert statement.endswith(".\n"), item["item_id"]
        assert not re.search(r"\b(Proof|Admitted|Qed)\b", statement), item["item_id"]
        names = re.findall(r"^\s*(?:Theorem|Lemma)\s+([\w']+)", statement, re.MULTILINE)
        assert names[-1] == item["meta"]["name"]


def test_packaged_sample_is_the_seeded_subset_of_the_gsm8k_test_file(data_dir: Path) -> None:
    sample = load_task(TaskSpec("gsm8k_sample"))
    subset = load_task(TaskSpec("gsm8k", limit=64), data_dir)
    assert len(sample) == 64
    assert [(item["prompt"], item["gold"]) for item in sample] == [(item["prompt"], item["gold"]) for item in subset]


def test_only_the_gsm8k_sample_and_its_licence_are_packaged() -> None:
    assert sorted(path.name for path in SAMPLES.iterdir()) == ["LICENSE-gsm8k.txt", "gsm8k_test_64.jsonl"]
    assert "MIT License" in (SAMPLES / "LICENSE-gsm8k.txt").read_text(encoding="utf-8")


def example_texts() -> list[str]:
    names = sorted({answering.template.examples for fmt in TASKS.values() for answering in fmt.modes.values()} - {""})
    assert len(names) == 6
    examples = [example for name in names for example in load_examples(name)]
    return [text for example in examples for text in (example.question, example.solution, example.program) if text]


def test_no_worked_example_shares_8_words_with_an_evaluation_item(data_dir: Path) -> None:
    """No 8-gram of words (lower case), hence no 30-gram either, of any example occurs in questions or solutions."""
    ours: dict[tuple[str, ...], str] = {}
    for text in example_texts():
        words = text.lower().split()
        # A text of less than 8 words must not occur whole: those are programs only.
        for i in range(len(words) - 7):
            ours[tuple(words[i : i + 8])] = text
    assert len(ours) > 500
    files = [data_dir / fmt.file for fmt in TASKS.values() if fmt.file]
    assert len(files) == len(COUNTS)
    checked, shared = 0, []
    for path in files:
        for line in path.read_text(encoding="utf-8").split("\n"):
            for text in texts_of(json.loads(line)) if line else ():
                words = text.lower().split()
                checked += len(words)
                shared += [
                    (path.name, gram) for gram in zip(*(words[i:] for i in range(8)), strict=False) if gram in ours
                ]
    assert shared == []
    assert checked > 500_000


def texts_of(row: dict) -> list[str]:
    parts = [value for value in row.values() if isinstance(value, str)]
    return [*parts, " ".join(row["choices"])] if "choices" in row else parts


RUNNER = """
import json, sys
results = []
for text, expression in json.load(sys.stdin):
    scope = {}
    exec(text, scope)
    results.append(str(eval(expression, scope)))
print(json.dumps(results))
"""


def run_programs(programs: list[tuple[str, str]]) -> list[str]:
    """Runs our own example programs (not model text) in a fresh interpreter; returns the results as text."""
    command = [sys.executable, "-I", "-c", RUNNER]
    done = subprocess.run(command, input=json.dumps(programs), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_gsm8k_programs_return_the_stated_answers_when_python_runs_them() -> None:
    examples = load_examples("gsm8k")
    results = run_programs([(example.program, "solution()") for example in examples])
    assert [Fraction(result) for result in results] == [Fraction(example.answer) for example in examples]


def test_math_programs_leave_the_stated_answers_when_sympy_runs_them() -> None:
    examples = load_examples("math_program")
    results = run_programs([(f"{few_shot.PROGRAM_IMPORTS}\n{example.program}", "answer") for example in examples])
    stated = [re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", example.answer) for example in examples]
    assert results == stated == ["70/9", "96", "53/2", "6048", "1/4"]
    # the same values without sympy
    assert Fraction(10, 3) ** 2 - 2 * Fraction(5, 3) == Fraction(70, 9)
    assert 499 // 6 + 499 // 14 - 2 * (499 // 42) == 96
    assert Fraction(7 * 8 - 3 * 1, 2) == Fraction(53, 2)
    assert 21 * 2**5 * 3**2 == 6048
