"""Answers found in model output, and official faults repeated only when asked for."""

from __future__ import annotations

import pytest

from modules.verification.extraction import (
    balanced_group,
    calculator_annotations,
    choice_letter,
    cleanse,
    extract_answer,
    first_number,
    gsm8k_answer,
    gsm8k_gold,
    last_boxed,
    minerva_answer,
    program_output,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right\}}", r"\left\{ x \right\}"),
        (r"\boxed{\text{a } b}", r"\text{a } b"),
        (r"\fbox{7}", "7"),
        (r"\boxed 7$", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{1", None),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{}", ""),
        (r"\boxedtimes{3}", None),
        ("no box", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def test_balanced_group_is_linear_on_hostile_text() -> None:
    assert balanced_group("{" * 100_000, 0) is None
    assert last_boxed("\\boxed{" * 20_000) is None


@pytest.mark.parametrize(
    ("text", "expected", "official"),
    [
        ("Final Answer: The final answer is $5$. I hope it is correct.", "$5$", "$5$"),
        ("Final answer: The final answer is 3.5. I hope it is correct.", "3.5", "3.5"),
        ("Final Answer: The final answer is 5.", "5", None),
        ("Final Answer: The final answer is $x$. ", "$x$", "$x$"),
        (
            "Final Answer: The final answer is A. I hope it is correct.\n"
            "Final Answer: The final answer is B. I hope it is correct.",
            "A",
            "A",
        ),
        ("FINAL ANSWER: the final answer is 7", "7", None),
        ("The answer is 5", None, None),
        ("Final Answer: The final answer is. I hope it is correct.", None, ""),
    ],
)
def test_minerva_answer(text: str, expected: str | None, official: str | None) -> None:
    assert minerva_answer(text) == expected
    assert minerva_answer(text, official_compat=True) == official


@pytest.mark.parametrize(
    ("text", "expected", "official"),
    [
        ("The answer is 18.", "18", "18"),
        ("The answer is 1,200.", "1200", "1"),
        ("The answer is -5.", "-5", None),
        ("The answer is \u22125.", "-5", None),
        ("The answer is $3.50.", "3.50", None),
        ("The answer is -$20", "-20", None),
        ("The answer is $-20", "-20", None),
        ("The answer is 50%.", "50", "50"),
        ("The answer is 3/4", "3/4", "3"),
        ("the answer is: 7", "7", None),
        ("The answer is about 12 apples", "12", None),
        ("The answer is 2.\nQ: next\nThe answer is 9.", "2", "2"),
        ("The answer is unknown", None, None),
        ("18", None, None),
    ],
)
def test_gsm8k_answer(text: str, expected: str | None, official: str | None) -> None:
    assert gsm8k_answer(text) == expected
    assert gsm8k_answer(text, official_compat=True) == official


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x-3", "3"),
        ("10-3", "10"),
        ("costs -3", "-3"),
        ("1,2", "1"),
        ("12,345.6", "12345.6"),
        ("--4", "4"),
        ("abc", None),
    ],
)
def test_first_number(text: str, expected: str | None) -> None:
    assert first_number(text) == expected


def test_gsm8k_gold() -> None:
    assert gsm8k_gold("work <<1+1=2>>\n#### 1,200") == "1200"
    with pytest.raises(ValueError, match="without '####'"):
        gsm8k_gold("no mark")


def test_calculator_annotations() -> None:
    assert calculator_annotations("a <<2*3=6>>6 b <<1+1=1+1=2>>") == [("2*3", "6"), ("1+1", "1+1=2")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Final Answer: The final answer is (C). I hope it is correct.", "C"),
        ("The answer is B.", "B"),
        ("The correct answer is: (D) because A is wrong", "D"),
        ("A dog barked, so the answer is E", "E"),
        ("A dog barked.", None),
        (r"The answer is \text{(B)}", "B"),
        ("(A)", "A"),
        ("I think it's C", "C"),
        ("none", None),
    ],
)
def test_choice_letter(text: str, expected: str | None) -> None:
    assert choice_letter(text) == expected


def test_choice_by_its_text() -> None:
    assert choice_letter("The answer is seven.", "ABCD", choices=["six", "seven", "eight", "nine"]) == "B"
    with pytest.raises(ValueError, match="5 choices but letters 'ABCD'"):
        choice_letter("x", "ABCD", choices=["a"] * 5)


def test_program_output() -> None:
    assert program_output("debug\n42\n\n") == "42"
    assert program_output(" \n") is None


def test_cleanse_few_shot_takes_the_last_candidate_without_a_mark() -> None:
    assert cleanse("3 apples and 5 pears", "number", few_shot=True) == "5"
    assert cleanse("2 is wrong. The answer is 7 or 8.", "number", few_shot=True) == "7"
    assert cleanse("A dog chose (B)", "choice") == "A"
    assert cleanse("A dog chose (B)", "choice", strict_choice=True) == "B"
    assert cleanse("Yes, it is", "yes_no") == "yes"
    assert cleanse("perhaps", "yes_no") is None


def test_extract_answer_styles() -> None:
    assert extract_answer(r"so \boxed{3}", "minerva") == "3"
    assert extract_answer(r"so \boxed{3}", "minerva", official_compat=True) is None
    assert extract_answer(r"so \boxed{3}", "boxed") == "3"
    assert extract_answer("The answer is 1,000", "gsm8k") == "1000"
    assert extract_answer("The answer is (D)", "choice") == "D"
    assert extract_answer("1\n2", "program") == "2"
    with pytest.raises(ValueError, match="unknown style 'latex'"):
        extract_answer("x", "latex")  # pyright: ignore[reportArgumentType]
