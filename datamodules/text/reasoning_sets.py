"""The eight reasoning sets of the RCI paper (Kim et al. 2023, section 4.1), and word problems made up on the spot.

Questions and gold answers are those of the zero-shot chain-of-thought harness (Kojima et al. 2022), which the paper's
tables were made with: bodies and questions joined by a blank, choices listed behind the question, numbers without a
trailing ``.0``. One difference: the harness left the commas in GSM8K's golds and took them out of replies, so that 14
of 1,319 items could not be right; here golds have none either.
"""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from datamodules.text.task_files import read_rows
from datamodules.text.tasks import seeded_order

AnswerKind = Literal["number", "choice", "yes_no"]
Rows = Iterator[tuple[str, dict[str, Any]]]
SYNTHETIC = "synthetic"
SYNTHETIC_ITEMS = 254
"""Word problems made where no ``limit`` says how many: as many as the paper evaluated of each set."""


class ReasoningItem(TypedDict):
    """One question.

    Keys: ``set`` its set; ``item_id`` ``<set>/<row>``, rows from 0; ``question`` as the model is asked it; ``gold`` the
    answer, normalised; ``kind`` what is to be found in a reply.
    """

    set: str
    item_id: str
    question: str
    gold: str
    kind: AnswerKind


@dataclass(frozen=True)
class SetFormat:
    """A set: its file below ``reasoning/``, its rows with ``<file>:<line>``, a row's (question, gold), answer kind."""

    file: str
    rows: Callable[[Path], Rows]
    read: Callable[[Mapping[str, Any], str], tuple[str, str]]
    kind: AnswerKind


# ------------------------------------------------------------------------------------------------------------ the files


def read_array(path: Path, key: str | None = None) -> Rows:
    """Objects of a JSON array, each with the ``<file>:<line>`` where it begins.

    Args:
        path: a file that is one array, or an object with an array under ``key``.

    Raises:
        ValueError: not UTF-8, not JSON, no such array, or an entry that is no object; naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8") from None
    start = re.search(r"\s*\[" if key is None else rf'"{re.escape(key)}"\s*:\s*\[', text)
    if start is None or (key is None and start.start() != 0):
        raise ValueError(f"{path}:1: want a JSON array{f' under {key!r}' if key else ''}")
    decoder, position, line, counted = json.JSONDecoder(), start.end(), 1, 0
    blank = re.compile(r"[\s,]*")
    while True:
        position = blank.match(text, position).end()  # pyright: ignore[reportOptionalMemberAccess]
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            row, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{line}: an entry must be a JSON object, got {text[position : position + 40]!r}")
        yield f"{path}:{line}", row
        position = end


def _field(row: Mapping[str, Any], name: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where}: field '{name}' is missing or of the wrong type, got {value!r}")
    return value.strip() if isinstance(value, str) else value


def _number(value: Any, where: str) -> str:
    """A gold number as a reply is read: text without commas and without ``.0`` at the end."""
    text = str(value).strip().replace(",", "").removesuffix(".0")
    if not re.fullmatch(r"-?\d*\.?\d+", text):
        raise ValueError(f"{where}: the answer must be a number, got {value!r}")
    return text


def _gsm8k(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    _, marks, gold = _field(row, "answer", where).rpartition("#### ")
    if not marks:
        raise ValueError(f"{where}: field 'answer' must end in '#### <number>'")
    return _field(row, "question", where), _number(gold, where)


def _mawps(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    solutions = _field(row, "lSolutions", where, list)
    if not solutions:
        raise ValueError(f"{where}: field 'lSolutions' is empty")
    return _field(row, "sQuestion", where), _number(solutions[0], where)


def _svamp(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    question = f"{_field(row, 'Body', where)} {_field(row, 'Question', where)}"
    return question, _number(_field(row, "Answer", where, (int, float, str)), where)


def _letter(value: str, count: int, where: str) -> str:
    letters = "ABCDE"[:count]
    if len(value) != 1 or value not in letters:
        raise ValueError(f"{where}: the answer must be one of {letters}, got {value!r}")
    return value


def _aqua(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    options = _field(row, "options", where, list)
    if not all(isinstance(option, str) for option in options):
        raise ValueError(f"{where}: field 'options' must hold texts")
    # "A)12" becomes "(A) 12"; brackets inside an option get blanks too, as in the harness
    listed = ("(" + "(".join(options)).replace("(", " (").replace(")", ") ")
    gold = _letter(_field(row, "correct", where), len(options), where)
    return f"{_field(row, 'question', where)} Answer Choices:{listed}", gold


def _commonsenseqa(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    question = _field(row, "question", where, dict)
    choices = _field(question, "choices", where, list)
    listed = "".join(f" ({_field(c, 'label', where)}) {_field(c, 'text', where)}" for c in choices)
    gold = _letter(_field(row, "answerKey", where), len(choices), where)
    return f"{_field(question, 'stem', where)} Answer Choices:{listed}", gold


def _strategyqa(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    scores = _field(row, "target_scores", where, dict)
    if set(scores) != {"Yes", "No"}:
        raise ValueError(f"{where}: field 'target_scores' must score Yes and No, got {sorted(scores)}")
    return _field(row, "input", where), "yes" if int(scores["Yes"]) == 1 else "no"


SETS: dict[str, SetFormat] = {
    "gsm8k": SetFormat("gsm8k_test.jsonl", read_rows, _gsm8k, "number"),
    "multiarith": SetFormat("multiarith.json", read_array, _mawps, "number"),
    "addsub": SetFormat("addsub.json", read_array, _mawps, "number"),
    "svamp": SetFormat("svamp.json", read_array, _svamp, "number"),
    "singleeq": SetFormat("singleeq.json", read_array, _mawps, "number"),
    "aqua": SetFormat("aqua_test.jsonl", read_rows, _aqua, "choice"),
    "commonsenseqa": SetFormat("commonsenseqa_dev.jsonl", read_rows, _commonsenseqa, "choice"),
    "strategyqa": SetFormat(
        "strategyqa.json", lambda path: read_array(path, "examples"), _strategyqa, "yes_no"
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- made-up problems

_NAMES = ("Ada", "Bruno", "Chiara", "Dario", "Edda", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Liam")
_THINGS = ("apples", "marbles", "stamps", "pencils", "shells", "buttons", "postcards", "coins", "ribbons", "tickets")
_BOXES = ("boxes", "bags", "jars", "baskets", "drawers", "crates")


def _one_step(draw: random.Random, name: str, other: str, thing: str, box: str) -> tuple[str, int]:
    a, b = draw.randint(12, 90), draw.randint(2, 11)
    return draw.choice(
        (
            (f"{name} has {a} {thing} and finds {b} more. How many {thing} does {name} have now?", a + b),
            (f"{name} has {a} {thing} and gives {b} of them to {other}. How many {thing} does {name} keep?", a - b),
            (f"There are {b} {box} with {a} {thing} in each. How many {thing} are there in all?", a * b),
            (f"{name} spreads {a * b} {thing} evenly over {b} {box}. How many {thing} are in each of them?", a),
            (f"{name} has {a} {thing}, {b} more than {other}. How many {thing} does {other} have?", a - b),
        )
    )


def _two_steps(draw: random.Random, name: str, other: str, thing: str, box: str) -> tuple[str, int]:
    a, b, c = draw.randint(12, 60), draw.randint(2, 11), draw.randint(2, 11)
    return draw.choice(
        (
            (
                f"{name} fills {b} {box} with {a} {thing} each and has {c} {thing} left over. "
                f"How many {thing} did {name} start with?",
                a * b + c,
            ),
            (
                f"{name} has {a} {thing}. {other} has {b} times as many. How many {thing} do they have together?",
                a + a * b,
            ),
            (
                f"{name} had {a + b + c} {thing}, lost {b} of them and gave {c} to {other}. "
                f"How many {thing} does {name} still have?",
                a,
            ),
            (
                f"{name} and {other} put {a * c - b} and {b} {thing} together and spread them evenly over {c} {box}. "
                f"How many {thing} are in each of them?",
                a,
            ),
            (
                f"A ticket costs {a} dollars and a drink costs {b} dollars. "
                f"How many dollars do {c} people pay who take one of each?",
                (a + b) * c,
            ),
        )
    )


def synthetic_problem(seed: int, index: int) -> tuple[str, str]:
    """Question and exact answer of word problem ``index``; one step for even, two steps for odd numbers.

    A problem depends on ``seed`` and ``index`` alone, so that fewer problems are a prefix of more.
    """
    draw = random.Random(f"plumbline-word-problem/{seed}/{index}")
    name, other = draw.sample(_NAMES, 2)
    make = (_one_step, _two_steps)[index % 2]
    question, answer = make(draw, name, other, draw.choice(_THINGS), draw.choice(_BOXES))
    return question, str(answer)


# ------------------------------------------------------------------------------------------------------------- loading


def check_sets(names: list[str]) -> None:
    """Raise a one-line ValueError for no set, an unknown one (naming the nearest) or one named twice."""
    known = [*SETS, SYNTHETIC]
    if not names:
        raise ValueError(f"reasoning sets: none is named; there are {', '.join(known)}")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ValueError(f"reasoning sets: no set '{name}'; {hint}there are {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"reasoning sets: a set is named twice in {names}")


def _folder(name: str, data_dir: str | Path | None) -> Path:
    mend = (
        f"set data_dir to the folder that holds reasoning/{SETS[name].file} (the file of that set in dataset/ of the "
        f"GitHub repository kojima-takeshi188/zero_shot_cot; README, 'Data'), or take the set '{SYNTHETIC}', which "
        "needs no file"
    )
    if data_dir is None:
        raise ValueError(f"reasoning set '{name}': data_dir is not set: {mend}")
    folder = Path(data_dir) / "reasoning"
    if not (folder / SETS[name].file).is_file():
        raise FileNotFoundError(f"reasoning set '{name}': no file {folder / SETS[name].file}: {mend}")
    return folder


def load_set(
    name: str, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[ReasoningItem]:
    """Items of one set, in evaluation order.

    Args:
        name: one of ``SETS``, or ``synthetic``.
        data_dir: folder that holds ``reasoning/``; not needed by ``synthetic``.
        limit: the first ``limit`` items of a seeded order; subsets are nested. None: all, in file order (``synthetic``:
            254).
        seed: of that order, and of the synthetic problems.

    Raises:
        ValueError: an unknown set, ``limit`` < 1, no items, or a bad row (``<file>:<line>``).
        FileNotFoundError: the set's file is missing; the message says where it comes from.
    """
    check_sets([name])
    if limit is not None and limit < 1:
        raise ValueError(f"reasoning set '{name}': limit (items) must be >= 1, got {limit}")
    if name == SYNTHETIC:
        problems = [synthetic_problem(seed, index) for index in range(limit or SYNTHETIC_ITEMS)]
        return [_item(name, index, *problem, "number") for index, problem in enumerate(problems)]
    form = SETS[name]
    path = _folder(name, data_dir) / form.file
    items = [
        _item(name, index, *form.read(row, where), form.kind) for index, (where, row) in enumerate(form.rows(path))
    ]
    if not items:
        raise ValueError(f"reasoning set '{name}': {path} holds no items")
    return items if limit is None else [items[index] for index in seeded_order(len(items), seed)[:limit]]


def _item(name: str, index: int, question: str, gold: str, kind: AnswerKind) -> ReasoningItem:
    return {"set": name, "item_id": f"{name}/{index}", "question": question, "gold": gold, "kind": kind}
