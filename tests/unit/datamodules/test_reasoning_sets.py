"""Readers of the reasoning sets on small files, the made-up word problems, and the datamodule over them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from datamodules.math_data import ItemShardSampler
from datamodules.reasoning_data import ReasoningDataModule
from datamodules.text.reasoning_sets import SETS, load_set, read_array, synthetic_problem

ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": ({"question": " How many? ", "answer": "So <<1+1=2>>\n#### 1,200"}, "How many?", "1200"),
    "multiarith": ({"sQuestion": " How many? ", "lSolutions": [39.0]}, "How many?", "39"),
    "addsub": ({"sQuestion": "How many ? ", "lSolutions": ["4.5"]}, "How many ?", "4.5"),
    "svamp": ({"Body": "He had 3 ", "Question": " How many?", "Answer": 51.0}, "He had 3 How many?", "51"),
    "singleeq": ({"sQuestion": "How far?", "lSolutions": [0.7]}, "How far?", "0.7"),
    "aqua": (
        {"question": "Which? ", "options": ["A)5(x + 1)", "B)6"], "correct": "B"},
        "Which? Answer Choices: (A) 5 (x + 1)  (B) 6",
        "B",
    ),
    "commonsenseqa": (
        {
            "question": {
                "stem": "Where?",
                "choices": [{"label": "A", "text": "bank"}, {"label": "B", "text": "new york"}],
            },
            "answerKey": "A",
        },
        "Where? Answer Choices: (A) bank (B) new york",
        "A",
    ),
    "strategyqa": ({"input": "Is it?", "target_scores": {"Yes": 0, "No": 1}}, "Is it?", "no"),
}


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    """A file in the set's own layout, one row a line."""
    path = folder / "reasoning" / SETS[name].file
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".jsonl":
        text = "\n".join(lines) + "\n"
    else:
        text = "[\n" + ",\n".join(lines) + "\n]\n"
        text = f'{{"canary": "[",\n"examples": {text}}}' if name == "strategyqa" else text
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", SETS)
def test_questions_and_golds_are_the_harness_s(tmp_path: Path, name: str) -> None:
    row, question, gold = ROWS[name]
    write(tmp_path, name, [row, row])
    items = load_set(name, tmp_path)
    assert [item["item_id"] for item in items] == [f"{name}/0", f"{name}/1"]
    assert [(item["question"], item["gold"]) for item in items] == [(question, gold)] * 2
    kinds = {"aqua": "choice", "commonsenseqa": "choice", "strategyqa": "yes_no"}
    assert {item["kind"] for item in items} == {kinds.get(name, "number")}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gsm8k", {"answer": "no marks"}),
        ("multiarith", {"lSolutions": []}),
        ("addsub", {"sQuestion": " "}),
        ("svamp", {"Answer": None}),
        ("singleeq", {"lSolutions": ["many"]}),
        ("aqua", {"correct": "C"}),
        ("commonsenseqa", {"answerKey": "AB"}),
        ("strategyqa", {"target_scores": {"Yes": 1}}),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    row = ROWS[name][0]
    path = write(tmp_path, name, [row, {**row, **change}])
    line = {".jsonl": 2, ".json": 3 + (name == "strategyqa")}[path.suffix]
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:{line}: ") as caught:
        load_set(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a": }]', ":2: not valid JSON"),
        ('[{"a": 1},\n 5]', ":2: an entry must be a JSON object, got '5]'"),
        ('{"a": 1}', ":1: want a JSON array"),
        ('[{"a": 1}\n', ":2: not valid JSON"),
    ],
)
def test_a_broken_array_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        list(read_array(path))


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no set 'gsm8'; did you mean 'gsm8k'\?"):
        load_set("gsm8")
    with pytest.raises(ValueError, match=r"svamp.*data_dir is not set.*reasoning/svamp\.json.*set 'synthetic'"):
        load_set("svamp")
    with pytest.raises(FileNotFoundError, match=r"svamp.*no file .*zero_shot_cot.*set 'synthetic'"):
        load_set("svamp", tmp_path)
    write(tmp_path, "svamp", [])
    with pytest.raises(ValueError, match=r"'svamp': .*svamp\.json holds no items"):
        load_set("svamp", tmp_path)
    with pytest.raises(ValueError, match="none is named"):
        ReasoningDataModule(sets=[])
    with pytest.raises(ValueError, match="named twice"):
        ReasoningDataModule(sets=["synthetic", "synthetic"])
    with pytest.raises(ValueError, match=r"limit must be >= 1, got 0"):
        ReasoningDataModule(sets=["synthetic"], limit=0)


def test_limits_are_nested_and_seeded(tmp_path: Path) -> None:
    row = ROWS["svamp"][0]
    write(tmp_path, "svamp", [{**row, "Answer": n} for n in range(40)])
    few, more, other = (
        [i["item_id"] for i in load_set("svamp", tmp_path, n, seed)] for n, seed in ((5, 1), (20, 1), (20, 2))
    )
    assert more[:5] == few
    assert len(set(more)) == 20
    assert more != other
    assert load_set("synthetic", limit=7, seed=3) == load_set("synthetic", limit=30, seed=3)[:7]
    assert load_set("synthetic", limit=30, seed=3) != load_set("synthetic", limit=30, seed=4)
    assert len(load_set("synthetic")) == 254


# what each kind of synthetic problem says, and the answer that its numbers give
TEMPLATES = (
    (r"has (\d+) \w+ and finds (\d+) more", lambda a, b: a + b),
    (r"has (\d+) \w+ and gives (\d+) of them", lambda a, b: a - b),
    (r"There are (\d+) \w+ with (\d+) \w+ in each", lambda a, b: a * b),
    (r"spreads (\d+) \w+ evenly over (\d+) \w+\.", lambda a, b: a / b),
    (r"has (\d+) \w+, (\d+) more than", lambda a, b: a - b),
    (r"fills (\d+) \w+ with (\d+) \w+ each and has (\d+) \w+ left over", lambda a, b, c: a * b + c),
    (r"has (\d+) \w+\. \w+ has (\d+) times as many", lambda a, b: a + a * b),
    (r"had (\d+) \w+, lost (\d+) of them and gave (\d+) to", lambda a, b, c: a - b - c),
    (r"put (\d+) and (\d+) \w+ together and spread them evenly over (\d+) \w+", lambda a, b, c: (a + b) / c),
    (r"costs (\d+) dollars and a drink costs (\d+) dollars\. .* do (\d+) people", lambda a, b, c: (a + b) * c),
)


def test_synthetic_answers_follow_from_the_text() -> None:
    """Every problem is read again by rules of the test's own; all ten templates turn up, answers are positive."""
    met = set()
    for index in range(400):
        question, answer = synthetic_problem(11, index)
        fits = [
            (number, rule, found)
            for number, (pattern, rule) in enumerate(TEMPLATES)
            if (found := re.search(pattern, question))
        ]
        assert len(fits) == 1, question
        number, rule, found = fits[0]
        assert rule(*map(int, found.groups())) == int(answer) > 0, question
        assert (number >= 5) == index % 2
        met.add(number)
    assert met == set(range(10))


def test_batches_hold_items_of_one_set_and_ranks_share_them_out(tmp_path: Path) -> None:
    write(tmp_path, "svamp", [{**ROWS["svamp"][0], "Answer": n} for n in range(5)])
    data = ReasoningDataModule(sets=["synthetic", "svamp"], data_dir=str(tmp_path), limit=5, batch_size=2)
    data.setup("test")
    batches = [list(loader) for loader in data.test_dataloader()]
    assert [[len(batch) for batch in loader] for loader in batches] == [[2, 2, 1]] * 2
    assert [item for batch in batches[1] for item in batch] == data.items["svamp"]
    assert data.describe()["set svamp"].startswith("5 items, number, ")
    assert data.describe()["question"] == "str"
    digest = data.digest()
    assert set(digest) == {"batch_size", "set synthetic", "set svamp"}
    again = ReasoningDataModule(sets=["synthetic"], limit=5, batch_size=2, seed=1).digest()
    assert again["set synthetic"] != digest["set synthetic"]
    shares = [[i for batch in ItemShardSampler(5, 2, rank, 2) for i in batch] for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == [0, 1, 2, 3, 4]
