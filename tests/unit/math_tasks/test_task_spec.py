"""TaskSpec: defaults of the paper, checks of every field, use from a config."""

from __future__ import annotations

import re

import pytest
from jsonargparse import ArgumentParser

from datamodules.text.tasks import TASKS, TaskSpec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "maht"}, "no built-in task 'maht'; did you mean 'math'?"),
        ({"name": "x", "path": "f", "like": "gms8k"}, "did you mean 'gsm8k'?"),
        ({"name": "a/b"}, "name must be letters"),
        ({"name": ""}, "name must be letters"),
        ({"name": "sat"}, "'path' must name one"),
        ({"name": "mine", "like": "custom"}, "'path' must name one"),
        ({"name": "gsm8k", "mode": "prove"}, "mode must be one of ['cot', 'program']"),
        ({"name": "ocw", "mode": "program"}, "mode must be one of ['cot']"),
        ({"name": "math", "n_shot": 5}, "n_shot must be in 0..4, got 5"),
        ({"name": "math", "n_shot": -1}, "n_shot must be in 0..4, got -1"),
        ({"name": "minif2f_coq", "n_shot": 1}, "n_shot must be in 0..0, got 1"),
        ({"name": "math", "limit": 0}, "limit must be >= 1, got 0"),
        ({"name": "math", "seed": -1}, "seed must be >= 0, got -1"),
        ({"name": "math", "k": 0}, "k must be >= 1, got 0"),
        ({"name": "math", "max_new_tokens": 0}, "max_new_tokens must be >= 1"),
        ({"name": "math", "max_prompt_tokens": 0}, "max_prompt_tokens must be >= 1"),
        ({"name": "math", "top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
        ({"name": "math", "top_p": float("nan")}, "top_p must be in (0, 1]"),
        ({"name": "math", "temperature": -0.1}, "temperature must be >= 0"),
        ({"name": "math", "temperature": float("nan")}, "temperature must be >= 0"),
        ({"name": "math", "k": 4, "temperature": 0.0}, "k = 4 samples at temperature 0 are all the same"),
    ],
)
def test_bad_field_gives_one_line_that_names_it(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        TaskSpec(**fields).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("math", "cot", (256, 0.6, 0.95)),
        ("math", "program", (16, 0.6, 0.95)),
        ("gsm8k", "cot", (100, 0.6, 0.95)),
        ("ocw", "cot", (100, 0.6, 0.95)),
        ("mmlu_stem", "cot", (16, 0.3, 0.95)),
        ("sat", "cot", (16, 0.3, 0.95)),
    ],
)
def test_paper_settings_of_majority_voting(name: str, mode: str, expected: tuple[int, float, float]) -> None:
    assert TaskSpec(name, path="f", mode=mode, k="paper").sampling == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "mode", "shots"),
    [("math", "cot", 4), ("gsm8k", "cot", 8), ("ocw", "cot", 4), ("gsm8k", "program", 8), ("math", "program", 5)],
)
def test_paper_number_of_worked_examples(name: str, mode: str, shots: int) -> None:
    answering = TaskSpec(name, mode=mode).answering  # type: ignore[arg-type]
    assert answering.n_shot == shots == answering.template.n_examples


def test_sampling_is_greedy_for_one_sample_and_explicit_values_win() -> None:
    assert TaskSpec("math").sampling == (1, 0.0, 1.0)
    assert TaskSpec("math", temperature=0.8, top_p=0.9).sampling == (1, 0.8, 0.9)
    assert TaskSpec("math", k=4).sampling == (4, 0.6, 0.95)
    assert TaskSpec("mmlu_stem", k=4, temperature=1.0).sampling == (4, 1.0, 0.95)


def test_name_with_a_path_is_a_custom_task_unless_it_is_built_in_or_like_says_otherwise() -> None:
    assert TaskSpec("mine", path="f").style == "custom"
    assert TaskSpec("math", path="f").style == "math"
    assert TaskSpec("mine", path="f", like="sat").style == "sat"


def test_every_built_in_task_has_modes_and_examples_for_its_default_prompt() -> None:
    for name, fmt in TASKS.items():
        spec = TaskSpec(name, path="f")
        assert next(iter(fmt.modes.values())) == spec.answering
        spec.check()
        assert spec.answering.n_shot <= spec.answering.template.n_examples


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", type=list[TaskSpec])
    return parser


def test_specs_parse_from_a_config(parser: ArgumentParser) -> None:
    text = "[{name: gsm8k, limit: 8, k: paper}, {name: gsm8k_program, like: gsm8k, mode: program, k: 4}]"
    specs = parser.instantiate_classes(parser.parse_args(["--tasks", text])).tasks
    assert specs == [
        TaskSpec("gsm8k", limit=8, k="paper"),
        TaskSpec("gsm8k_program", like="gsm8k", mode="program", k=4),
    ]


@pytest.mark.parametrize("text", ["[{name: gsm8k, limits: 8}]", "[{name: gsm8k, k: many}]", "[{name: gsm8k, mode: x}]"])
def test_a_config_with_an_unknown_key_or_value_is_refused(parser: ArgumentParser, text: str) -> None:
    with pytest.raises(Exception, match="tasks"):
        parser.parse_args(["--tasks", text])
