"""Extraction against counted facts of GSM8K and against the recorded extractor of the zero-shot-CoT tables."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from modules.verification.arithmetic import evaluate_arithmetic, parse_number
from modules.verification.extraction import AnswerKind, calculator_annotations, cleanse, gsm8k_answer, gsm8k_gold


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def raw_gold(row: dict) -> str:
    return row["answer"].split("####")[1].strip()


def test_gsm8k_gold_rewritten_is_extracted_1319_of_1319_and_officially_at_most_1303(data_dir: Path) -> None:
    data = rows(data_dir / "math" / "gsm8k_test.jsonl")
    texts = [f"The answer is {raw_gold(row)}." for row in data]
    golds = [gsm8k_gold(row["answer"]) for row in data]
    assert sum(gsm8k_answer(text) == gold for text, gold in zip(texts, golds, strict=True)) == 1319
    official = [gsm8k_answer(text, official_compat=True) for text in texts]
    assert sum(answer == gold for answer, gold in zip(official, golds, strict=True)) == 1303
    assert sum("," in raw_gold(row) for row in data) == 14
    assert sum(gold.startswith("-") for gold in golds) == 2
    assert not any("." in gold for gold in golds)


@pytest.mark.parametrize(("name", "count"), [("gsm8k_test", 4282), ("gsm8k_train", 23716)])
def test_calculator_annotations_are_counted_and_evaluate(data_dir: Path, name: str, count: int) -> None:
    found = [
        pair for row in rows(data_dir / "math" / f"{name}.jsonl") for pair in calculator_annotations(row["answer"])
    ]
    assert len(found) == count
    for left, right in found:
        value, stated = (text.replace(",", "").replace("$", "").replace("%", "") for text in (left, right))
        number = parse_number(stated)  # one right side, 3/4, is a fraction
        assert number is not None, (left, right)
        result = evaluate_arithmetic(value)
        assert abs(result - number) <= Fraction(5, 1000) * abs(result), (left, right)


def test_cleansing_equals_all_7587_recorded_extractions(data_dir: Path) -> None:
    kinds: dict[str, AnswerKind] = {"aqua": "choice", "commonsensqa": "choice", "strategyqa": "yes_no"}
    records = rows(data_dir / "reasoning" / "extraction_oracle.jsonl")
    assert len(records) == 7587
    wrong = [r for r in records if (cleanse(r["raw"], kinds.get(r["dataset"], "number")) or "") != r["extracted"]]
    assert wrong == []
