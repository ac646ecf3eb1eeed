"""Data and scoring functions of the local lm-eval tasks. lm-eval loads this file; it runs in lm-eval's environment.

The prompt, the extraction and the equivalence of MATH are lm-eval's own, re-exported, so that what is measured is
lm-eval and not a copy of it. Data files come from the folder that ``PLUMBLINE_DATA`` names; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml
from datasets import Dataset
from lm_eval.tasks.minerva_math.utils import (
    doc_to_text,
    list_fewshot_samples,
    process_docs,
    process_results,
)

__all__ = [
    "doc_to_text",
    "gsm8k_dataset",
    "gsm8k_shots",
    "list_fewshot_samples",
    "math500_dataset",
    "process_docs",
    "process_results",
]

FEW_SHOT = Path(__file__).resolve().parents[2] / "datamodules" / "text" / "few_shot"


def _rows(name: str) -> dict[str, Dataset]:
    folder = os.environ.get("PLUMBLINE_DATA")
    if not folder:
        raise ValueError("lm-eval tasks: set PLUMBLINE_DATA to the folder that holds math/")
    lines = (Path(folder) / "math" / name).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines if line.strip()])}


def math500_dataset(**_: object) -> dict[str, Dataset]:
    """MATH-500: ``problem`` and ``solution`` (its last box is the gold answer)."""
    return _rows("math500_test.jsonl")


def gsm8k_dataset(**_: object) -> dict[str, Dataset]:
    """GSM8K test: ``question`` and ``answer`` (gold after ``####``)."""
    return _rows("gsm8k_test.jsonl")


def gsm8k_shots() -> list[dict[str, str]]:
    """The worked examples of this project's own GSM8K prompt, in lm-eval's form."""
    shots = yaml.safe_load((FEW_SHOT / "gsm8k.yaml").read_text(encoding="utf-8"))
    return [
        {"question": shot["question"], "target": f"{shot['solution'].strip()} The answer is {shot['answer']}."}
        for shot in shots
    ]
