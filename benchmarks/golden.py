"""Golden generations: model-like texts whose verdict is known because they were made from the gold answer.

Right variants restate the gold answer, wrong ones change its value. Two scorers that disagree on such a text can be
told apart: the truth is part of the row.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

MATH_VARIANTS = ("gold", "no_dollars", "rewritten", "scaled", "plus_one", "other_item", "no_answer", "empty")
GSM8K_VARIANTS = ("gold", "no_comma", "dollars", "plus_one", "off_by_half", "no_answer", "empty")
TASKS = {"math500": MATH_VARIANTS, "gsm8k": GSM8K_VARIANTS}

# What makes an answer more than one formula, so that 2(a)/2 is no rewriting: tuples, relations, text, units, number
# bases, mixed numbers.
_NOT_A_FORMULA = re.compile(
    r"[,=<>%:&\[\]_]|\\(?:text|mbox|in\b|le|ge|begin|circ|cup|infty|pm|ne|mathrm|%|\$|!)|\d\s*\\d?frac"
)
_INTEGER = re.compile(r"-?\d+")
_FRACTION = re.compile(r"(-?)\\d?frac\{(-?\d+)\}\{(\d+)\}")


@dataclass(frozen=True)
class Golden:
    """One text to score.

    Args: task: ``math500`` or ``gsm8k``; doc_id: row of the data file; variant: how the text was made; truth: the
        verdict a correct scorer gives; answer: what the text states; gold: the reference; generation: the text.
    """

    task: str
    doc_id: int
    variant: str
    truth: bool
    answer: str
    gold: str
    generation: str


def value_of(answer: str) -> Fraction | None:
    """Exact value of a plain integer, decimal or ``\\frac{a}{b}``; None for everything else.

    A bare denominator of zero has no value.
    """
    text = answer.strip().replace(",\\!", "").replace("{,}", "").replace("$", "")
    match = _FRACTION.fullmatch(text)
    if match:
        top, bottom = int(match[2]), int(match[3])
        return None if bottom == 0 else Fraction(-top if match[1] else top, bottom)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    return Fraction(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else None


def rewritten(answer: str) -> str:
    """The same value in other LaTeX: integers and fractions become a fraction with both parts doubled.

    Other plain numbers stay; the rest gets a space after each comma, which changes no value.
    """
    if _INTEGER.fullmatch(answer):
        return f"\\frac{{{2 * int(answer)}}}{{2}}"
    match = _FRACTION.fullmatch(answer)
    if match:
        return f"{match[1]}\\frac{{{2 * int(match[2])}}}{{{2 * int(match[3])}}}"
    return answer if value_of(answer) is not None else re.sub(r",\s*(?!\\!)", ", ", answer)


def scaled(answer: str) -> str | None:
    """``2(a)/2`` for an answer that is one formula but not a plain number; None for everything else."""
    words = re.sub(r"\\[A-Za-z]+", "", answer)
    if value_of(answer) is not None or _NOT_A_FORMULA.search(answer) or re.search(r"[A-Za-z]{2,}", words):
        return None
    return f"\\frac{{2({answer})}}{{2}}"


def plus_one(answer: str) -> str:
    """An answer that differs by one: computed for plain numbers, written out as ``+1`` otherwise."""
    if _INTEGER.fullmatch(answer):
        return str(int(answer) + 1)
    return f"{answer}+1"


def math_golden(rows: list[dict[str, str]]) -> list[Golden]:
    """All variants of MATH-500 rows (``solution`` and ``answer``); text and answer in the Minerva final sentence."""

    def text(row: dict[str, str], stated: str) -> str:
        return f"{row['solution']}\nFinal Answer: The final answer is {stated}. I hope it is correct."

    made = []
    for index, row in enumerate(rows):
        gold = row["answer"]
        others = [
            other["answer"]
            for other in rows[index + 1 :] + rows[:index]
            if value_of(other["answer"]) is not None and value_of(other["answer"]) != value_of(gold)
        ]
        stated = {
            "gold": (True, gold, text(row, f"${gold}$")),
            "no_dollars": (True, gold, text(row, gold)),
            "rewritten": (True, rewritten(gold), text(row, f"${rewritten(gold)}$")),
            "plus_one": (False, plus_one(gold), text({"solution": "We count."}, f"${plus_one(gold)}$")),
            "no_answer": (False, "", "We could begin with the first equation, but it does not lead anywhere."),
            "empty": (False, "", ""),
        }
        same = scaled(gold)
        if same is not None:
            stated["scaled"] = (True, same, text(row, f"${same}$"))
        if others:
            stated["other_item"] = (False, others[0], text({"solution": "We count."}, f"${others[0]}$"))
        made += [Golden("math500", index, name, *_pick(stated[name], gold)) for name in MATH_VARIANTS if name in stated]
    return made


def gsm8k_golden(rows: list[dict[str, str]]) -> list[Golden]:
    """All variants of GSM8K rows (``answer`` with ``####``), ending in "The answer is N."."""
    made = []
    for index, row in enumerate(rows):
        worked, gold = (part.strip() for part in row["answer"].rsplit("####", 1))
        worked = re.sub(r"<<[^>]*>>", "", worked)
        number = int(gold.replace(",", ""))
        stated = {
            "gold": (True, gold),
            "no_comma": (True, str(number)),
            "dollars": (True, f"${gold}"),
            "plus_one": (False, str(number + 1)),
            "off_by_half": (False, f"{number}.5"),
        }
        for name in GSM8K_VARIANTS:
            if name == "no_answer":
                line = (False, "", "One would have to know the price first.")
            elif name == "empty":
                line = (False, "", "")
            else:
                truth, answer = stated[name]
                line = (truth, answer, f"{worked} The answer is {answer}.")
            made.append(Golden("gsm8k", index, name, *_pick(line, gold)))
    return made


def _pick(line: tuple[bool, str, str], gold: str) -> tuple[bool, str, str, str]:
    truth, answer, generation = line
    return truth, answer, gold, generation


def read_rows(data: Path, task: str, limit: int) -> list[dict[str, str]]:
    """First ``limit`` rows of a task's file.

    Raises: ValueError for an unknown task; FileNotFoundError if the data folder lacks the file.
    """
    if task not in TASKS:
        raise ValueError(f"golden: unknown task {task!r}; choose from {', '.join(TASKS)}")
    lines = (data / "math" / f"{task}_test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def golden(data: Path, task: str, limit: int) -> list[Golden]:
    """Golden texts of the first ``limit`` items of a task."""
    rows = read_rows(data, task, limit)
    return math_golden(rows) if task == "math500" else gsm8k_golden(rows)


def write_golden(rows: list[Golden], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
