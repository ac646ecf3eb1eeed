"""Task files to items: every format, every kind of bad line, subsets, prompt budget."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.text.task_files import coq_statement, without_coq_comments
from datamodules.text.tasks import TaskSpec, load_task, load_tasks, seeded_order

GSM8K_ROW = {"question": "How many?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
MATH_ROW = {
    "problem": "Find $x$.",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "So $\\boxed{\\frac{1}{2}}$.",
    "idx": 0,
}
MATH500_ROW = {"problem": "Find $y$.", "solution": "\\boxed{3}", "answer": "3", "subject": "Algebra", "level": 2}
CHOICE_ROW = {"question": "Which?", "choices": ["one", "two", "three", "four"], "answer": 2, "type": "college_physics"}
COQ_ROW = {
    "name": "t1",
    "split": "test",
    "source": "Require Import ZArith.\n\nTheorem t1 : 1 = 1.\n\nProof.\nAdmitted.\n\nTheorem t1' : 2 = 2.\nProof.\n",
}
LEAN_ROW = {"full_name": "t2", "statement": "theorem t2 : 1 = 1", "split": "valid"}


def write(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "set.jsonl"


@pytest.mark.parametrize(
    ("style", "row", "gold", "gold_kind", "answer_kind", "meta"),
    [
        ("gsm8k", GSM8K_ROW, GSM8K_ROW["answer"], "hash_marks", "number", {"n_shot": 8}),
        ("math", MATH_ROW, MATH_ROW["solution"], "boxed_solution", "latex", {"type": "Algebra", "level": "Level 1"}),
        ("math500", MATH500_ROW, "3", "final", "latex", {"type": "Algebra", "level": 2}),
        ("ocw", MATH_ROW, MATH_ROW["solution"], "boxed_solution", "latex", {"n_shot": 4}),
        (
            "mmlu_stem",
            CHOICE_ROW,
            "C",
            "letter",
            "choice",
            {"type": "college_physics", "choices": CHOICE_ROW["choices"]},
        ),
        ("sat", {**CHOICE_ROW, "answer": "D"}, "D", "letter", "choice", {"n_shot": 4}),
        ("custom", {"question": "What?", "answer": "$7$"}, "$7$", "final", "latex", {"n_shot": 4}),
        ("minif2f_lean4", LEAN_ROW, LEAN_ROW["statement"], "statement", "theorem", {"prover": "lean4", "name": "t2"}),
    ],
)
def test_each_format_gives_raw_gold_and_kind(
    file: Path, style: str, row: dict, gold: str, gold_kind: str, answer_kind: str, meta: dict
) -> None:
    (item,) = load_task(TaskSpec("mine", like=style, path=write(file, row)))
    assert (item["gold"], item["gold_kind"], item["answer_kind"]) == (gold, gold_kind, answer_kind)
    assert meta.items() <= item["meta"].items()
    assert item["task"] == "mine"
    assert json.loads(json.dumps(item))["prompt"] == item["prompt"]  # plain values only


def test_choices_are_lettered_in_the_prompt(file: Path) -> None:
    (item,) = load_task(TaskSpec("mmlu_stem", path=write(file, CHOICE_ROW), n_shot=0))
    assert item["prompt"] == "Problem:\nWhich?\n(A) one\n(B) two\n(C) three\n(D) four\n\nSolution:"


def test_coq_item_is_the_named_statement_without_any_proof(file: Path) -> None:
    (item,) = load_task(TaskSpec("minif2f_coq", path=write(file, COQ_ROW)))
    assert item["prompt"] == "Require Import ZArith.\n\nTheorem t1 : 1 = 1.\n"
    assert item["item_id"] == "minif2f_coq/t1"
    assert item["meta"] == {"name": "t1", "split": "test", "prover": "coq", "n_shot": 0}
    assert "Proof" not in item["prompt"]


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("a (* b *) c", "a  c"),
        ("(* x (* y *) Theorem z. *)\nk", "k"),
        ("a *) b", "a *) b"),
        ("a (* open", "a "),
        ("no comment", "no comment"),
    ],
)
def test_coq_comments_are_removed(source: str, kept: str) -> None:
    assert without_coq_comments(source) == kept


def test_a_theorem_or_proof_in_a_comment_does_not_count() -> None:
    source = "(* Theorem b : 0=1.\nProof. *)\nTheorem b : 2=2. (*\nProof. *)\nProof.\nAdmitted."
    assert coq_statement(source, "b") == "Theorem b : 2=2.\n"


def test_coq_statement_keeps_proved_lemmas_before_the_theorem() -> None:
    source = "Lemma a : 1=1.\nProof. reflexivity. Qed.\nTheorem b : 2=2.\n  Proof.\nAdmitted."
    assert coq_statement(source, "b").endswith("Qed.\nTheorem b : 2=2.\n")
    with pytest.raises(ValueError, match="no theorem 'c'"):
        coq_statement(source, "c")
    with pytest.raises(ValueError, match="no line begins with 'Proof' after theorem 'b'"):
        coq_statement("Theorem b : 2=2.", "b")


@pytest.mark.parametrize(
    ("style", "line", "message"),
    [
        ("gsm8k", "{nope", "not JSON ("),
        ("gsm8k", "[1, 2]", "expected a JSON object, got list"),
        ("gsm8k", {"question": "q"}, "field 'answer' is missing; the line has ['question']"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "field 'question' must be non-empty text"),
        ("gsm8k", {"question": 3, "answer": "#### 1"}, "field 'question' must be non-empty text, got 3"),
        ("gsm8k", '{"question": "\\ud800", "answer": "#### 1"}', "half a surrogate pair"),
        ("gsm8k", "[" * 100_000, "not JSON ("),
        ("gsm8k", {"question": "q", "answer": "1"}, "must end in '#### <number>'"),
        ("math", {"problem": "p", "solution": "x"}, "has no \\boxed{} answer"),
        ("mmlu_stem", {**CHOICE_ROW, "answer": 4}, "index 0..3 or a letter of ABCD, got 4"),
        ("mmlu_stem", {**CHOICE_ROW, "answer": True}, "got True"),
        ("mmlu_stem", {**CHOICE_ROW, "answer": "E"}, "got 'E'"),
        ("mmlu_stem", {**CHOICE_ROW, "answer": "AB"}, "got 'AB'"),
        ("mmlu_stem", {**CHOICE_ROW, "choices": ["one"]}, "list of 2 to 8 texts"),
        ("mmlu_stem", {**CHOICE_ROW, "choices": [1, 2]}, "must hold texts only"),
        ("minif2f_coq", {**COQ_ROW, "name": "other"}, "no theorem 'other'"),
        ("minif2f_coq", {"name": "t1", "source": COQ_ROW["source"]}, "field 'split' is missing"),
    ],
)
def test_bad_line_is_named_with_file_and_line(file: Path, style: str, line: Any, message: str) -> None:
    good = {"gsm8k": GSM8K_ROW, "math": MATH_ROW, "mmlu_stem": CHOICE_ROW, "minif2f_coq": COQ_ROW}[style]
    path = write(file, good, "", line)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_task(TaskSpec("mine", like=style, path=path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_line_that_is_not_utf8_is_named(file: Path) -> None:
    file.write_bytes(json.dumps(GSM8K_ROW).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=re.escape(f"{file}:2: not UTF-8")):
        load_task(TaskSpec("gsm8k", path=str(file)))


def test_empty_missing_and_repeated(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="task 'gsm8k': no file .*set.jsonl"):
        load_task(TaskSpec("gsm8k", path=str(file)))
    with pytest.raises(FileNotFoundError, match="math/gsm8k_test.jsonl; check data_dir"):
        load_task(TaskSpec("gsm8k"), data_dir=tmp_path)
    with pytest.raises(ValueError, match="set data_dir to the folder that holds math/gsm8k_test.jsonl"):
        load_task(TaskSpec("gsm8k"))
    with pytest.raises(ValueError, match="holds no items"):
        load_task(TaskSpec("gsm8k", path=write(file, "", "  ")))
    with pytest.raises(ValueError, match="names 't1' more than once"):
        load_task(TaskSpec("minif2f_coq", path=write(file, COQ_ROW, COQ_ROW)))
    with pytest.raises(ValueError, match=r"name \['gsm8k'\] is used more than once"):
        load_tasks([TaskSpec("gsm8k"), TaskSpec("gsm8k", mode="program")])


def test_split_filter(file: Path) -> None:
    path = write(file, COQ_ROW, {**COQ_ROW, "name": "t1'", "split": "valid"})
    (item,) = load_task(TaskSpec("minif2f_coq", path=path, split="valid"))
    assert item["item_id"] == "minif2f_coq/t1'"
    with pytest.raises(ValueError, match=r"no item of split 'train' .* it has \['test', 'valid'\]"):
        load_task(TaskSpec("minif2f_coq", path=path, split="train"))


def many(file: Path, n: int = 40) -> str:
    return write(file, *({"question": f"Question {i}?", "answer": f"#### {i}"} for i in range(n)))


def test_subsets_are_deterministic_nested_and_differ_by_seed(file: Path) -> None:
    path = many(file)
    ids = {k: [item["item_id"] for item in load_task(TaskSpec("gsm8k", path=path, limit=k))] for k in (5, 17, 40, 99)}
    assert ids[17][:5] == ids[5]
    assert ids[40][:17] == ids[17]
    assert ids[99] == ids[40]
    everything = [item["item_id"] for item in load_task(TaskSpec("gsm8k", path=path))]
    assert everything == [f"gsm8k/{i}" for i in range(40)]
    assert sorted(ids[40]) == sorted(everything)
    other = [item["item_id"] for item in load_task(TaskSpec("gsm8k", path=path, limit=5, seed=1))]
    assert other != ids[5]


def test_subset_order_never_changes() -> None:
    # for i in 0..9: printf "0:$i" | sha256sum, sorted by digest
    assert seeded_order(10, 0) == [7, 4, 9, 3, 8, 2, 6, 0, 5, 1]


@given(st.integers(0, 200), st.integers(0, 2**40))
def test_seeded_order_is_a_permutation(n: int, seed: int) -> None:
    assert sorted(seeded_order(n, seed)) == list(range(n))


def test_item_keeps_its_id_and_question_whatever_the_subset(file: Path) -> None:
    path = many(file)
    full = {item["item_id"]: item for item in load_task(TaskSpec("gsm8k", path=path))}
    for item in load_task(TaskSpec("gsm8k", path=path, limit=7, seed=3)):
        assert item == full[item["item_id"]]


def test_prompt_budget_drops_examples_and_keeps_every_item(file: Path) -> None:
    words = lambda text: len(text.split())  # noqa: E731
    path = write(file, GSM8K_ROW, {"question": "word " * 300, "answer": "#### 1"})
    spec = TaskSpec("gsm8k", path=path, max_prompt_tokens=200)
    short, long = load_task(spec, count_tokens=words)
    assert 0 < short["meta"]["n_shot"] < 8
    assert words(short["prompt"]) <= 200
    assert short["prompt"] == load_task(TaskSpec("gsm8k", path=path, n_shot=short["meta"]["n_shot"]))[0]["prompt"]
    one_more = load_task(TaskSpec("gsm8k", path=path, n_shot=short["meta"]["n_shot"] + 1))[0]["prompt"]
    assert words(one_more) > 200
    assert long["meta"] == {"n_shot": 0, "overlong": True}
    assert "overlong" not in short["meta"]
    with pytest.raises(ValueError, match="max_prompt_tokens needs a tokenizer"):
        load_task(spec)


def test_settings_reach_the_item(file: Path) -> None:
    path = write(file, GSM8K_ROW)
    spec = TaskSpec("g", like="gsm8k", mode="program", path=path, k=3, temperature=0.5, top_p=0.7, max_new_tokens=9)
    (item,) = load_task(spec)
    assert (item["k"], item["temperature"], item["top_p"], item["max_new_tokens"]) == (3, 0.5, 0.7, 9)
    assert item["answer_kind"] == "program_number"
    assert item["stop"] == ("Q:", "\n\n\n")


def test_math_program_items_carry_the_import_block(file: Path) -> None:
    (item,) = load_task(TaskSpec("m", like="math", mode="program", path=write(file, MATH_ROW)))
    assert item["answer_kind"] == "program_latex"
    assert item["meta"]["imports"] in item["prompt"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompts_of_the_user(tmp_path: Path, suffix: str) -> None:
    texts = ["Let x = 2\x0bor 3. Then", "{braces} and \\frac{1}{2}", "über \u2028 line"]
    rows = texts if suffix == ".txt" else [{"prompt": text} for text in texts]
    path = write(tmp_path / f"prompts{suffix}", rows[0], "", *rows[1:])
    items = load_task(TaskSpec("predict", like="prompts", path=path))
    assert [item["prompt"] for item in items] == texts
    assert {(item["answer_kind"], item["gold_kind"], item["gold"]) for item in items} == {("text", "none", "")}
