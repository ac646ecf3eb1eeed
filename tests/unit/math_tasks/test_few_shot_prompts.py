"""Worked examples: right answers, right layout."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest

from datamodules.text import few_shot
from datamodules.text.few_shot import load_examples

GSM8K_ANSWERS = [
    6 * 14 - 59,
    38 - 12 + 9,
    3 * (5 * 24 + 2 * 40),
    Fraction(90 - 15, 3),
    5 * 1250 * Fraction(96, 100),
    20 - 3 * 4 - 2 * Fraction(3, 2),
    3 * Fraction(60 - 16, 4),
    18 * Fraction(5, 2) + 12,
]


def test_gsm8k_answers() -> None:
    assert [Fraction(example.answer) for example in load_examples("gsm8k")] == GSM8K_ANSWERS


def test_every_equation_in_the_gsm8k_solutions_holds() -> None:
    equations = []
    for example in load_examples("gsm8k"):
        equations += re.findall(r"(\d[\d.]*(?: [-+*/] \d[\d.]*)+) = (\d[\d.]*\d|\d)", example.solution)
    assert len(equations) == 24
    for left, right in equations:
        assert arithmetic(left) == Fraction(right), (left, right)


def arithmetic(text: str) -> Fraction:
    """Value of + - * / over decimal numbers, with the usual precedence (no eval)."""
    tokens = re.findall(r"\d+\.?\d*|[-+*/]", text)

    def total() -> Fraction:
        value = product()
        while tokens and tokens[0] in "+-":
            value = value + product() if tokens.pop(0) == "+" else value - product()
        return value

    def product() -> Fraction:
        value = Fraction(tokens.pop(0))
        while tokens and tokens[0] in "*/":
            operator, number = tokens.pop(0), Fraction(tokens.pop(0))
            value = value * number if operator == "*" else value / number
        return value

    value = total()
    assert not tokens
    return value


def test_math_answers() -> None:
    line, tiles, cone, interval = load_examples("math")
    assert Fraction(11 - -1, 6 - 2) * (Fraction(line.answer) - 2) - 1 == 26
    assert Fraction(5 * 4, math.comb(9, 2)) == Fraction(5, 9)
    assert tiles.answer == r"\frac{5}{9}"
    assert Fraction(5**2 * math.isqrt(13**2 - 5**2), 3) == int(cone.answer.removesuffix(r"\pi"))
    low, high = map(int, interval.answer.strip("[]").split(","))
    solutions = [x for x in range(-400, 401) if abs(2 * Fraction(x, 10) - 5) <= 9]
    assert (10 * low, 10 * high) == (solutions[0], solutions[-1])


def test_ocw_answers() -> None:
    parallax, ode, photon, entropy = load_examples("ocw")
    assert 1 / Fraction("0.020") * Fraction("3.26") == Fraction(parallax.answer)
    assert ode.answer == "2+3e^{-3t}"
    for t in (0.0, 0.4, 1.3):
        y, slope = 2 + 3 * math.exp(-3 * t), -9 * math.exp(-3 * t)
        assert slope + 3 * y == pytest.approx(6)
    assert 2 + 3 * math.exp(0) == 5
    assert f"{6.626e-34 * 3.00e8 / 500e-9:.2e}" == photon.answer
    assert -sum(p * math.log2(p) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 8)) == float(entropy.answer)


def choice(example: few_shot.Example) -> str:
    """Text of the choice that the answer's letter names."""
    found = re.search(rf"^\({example.answer}\) (.*)$", example.question, re.MULTILINE)
    assert found
    assert f"choice ({example.answer})" in example.solution
    return found.group(1)


def test_mmlu_stem_answers() -> None:
    braking, plants, hexadecimal, order = load_examples("mmlu_stem")
    assert choice(braking) == f"{(30 + 0) // 2 * 6} m"
    offspring = [a + b for a in "Tt" for b in "Tt"]
    tall = [pair for pair in offspring if "T" in pair]
    assert Fraction(choice(plants)) == Fraction(sum(set(pair) == {"T", "t"} for pair in tall), len(tall))
    assert int(choice(hexadecimal), 16) == 0b101101
    assert int(choice(order)) == next(n for n in range(1, 11) if 4 * n % 10 == 0)
    assert len({example.answer for example in load_examples("mmlu_stem")}) == 4


def test_sat_answers() -> None:
    linear, parabola, coat, circle = (int(re.sub(r"[$\\]", "", choice(example))) for example in load_examples("sat"))
    assert 3 * (linear - 4) == 2 * linear + 7
    assert (-6) ** 2 - 4 * parabola == 0
    assert coat * Fraction(8, 10) * Fraction(9, 10) == 54
    assert circle**2 == 8 + 4**2 + 1**2
    assert len({example.answer for example in load_examples("sat")}) == 4


def test_math_prompt_layout() -> None:
    prompt = few_shot.MATH.render("What is {x}?", 4)
    assert prompt.count("Problem:\n") == 5
    assert prompt.count("Solution:") == 5
    finals = re.findall(r"Final Answer: The final answer is \$(.+)\$\. I hope it is correct\.", prompt)
    assert finals == [example.answer for example in load_examples("math")]
    assert prompt.endswith("I hope it is correct.\n\nProblem:\nWhat is {x}?\n\nSolution:")


def test_ocw_writes_answer_with_a_small_a() -> None:
    prompt = few_shot.OCW.render("q", 4)
    assert prompt.count("\nFinal answer: The final answer is ") == 4
    assert "Final Answer" not in prompt


def test_gsm8k_prompt_layout() -> None:
    prompt = few_shot.GSM8K.render("How many?", 8)
    assert prompt.count("Q: ") == 9
    assert re.findall(r"The answer is (\S+)\.\n", prompt) == [example.answer for example in load_examples("gsm8k")]
    assert prompt.endswith("\n\nQ: How many?\nA:")


@pytest.mark.parametrize("template", [few_shot.MMLU_STEM, few_shot.SAT])
def test_choice_prompt_layout(template: few_shot.Template) -> None:
    prompt = template.render("q", 4)
    letters = re.findall(r"Final Answer: The final answer is \(([A-D])\)\. I hope it is correct\.", prompt)
    assert letters == [example.answer for example in load_examples(template.examples)]


def test_program_prompts_end_where_the_program_begins() -> None:
    gsm8k = few_shot.GSM8K_PROGRAM.render("How many?", 8)
    assert gsm8k.count("def solution():") == 8
    assert gsm8k.endswith("Q: How many?\n\n# The same as a Python function that returns the answer:\n")
    maths = few_shot.MATH_PROGRAM.render("Find $x$.", 5)
    assert maths.count("\nanswer = ") == 5
    assert maths.count("from sympy import *") == 1
    assert maths.endswith("Problem:\nFind $x$.\n\nProgram:\n")
    assert few_shot.MATH_PROGRAM.render("p", 0).startswith(few_shot.MATH_PROGRAM.header)


ALL = [few_shot.MATH, few_shot.OCW, few_shot.MMLU_STEM, few_shot.SAT, few_shot.GSM8K]
ALL += [few_shot.GSM8K_PROGRAM, few_shot.MATH_PROGRAM]


@pytest.mark.parametrize("template", ALL)
def test_no_worked_reply_is_cut_short_by_a_stop_string(template: few_shot.Template) -> None:
    """A model that repeats a worked reply word for word is stopped at its end, not inside it."""
    for example in load_examples(template.examples):
        fields = {"solution": example.solution, "program": example.program, "answer": example.answer}
        reply = template.reply.format(**fields)
        ends = [reply.find(stop) + len(stop) for stop in template.stop if stop in reply]
        assert all(end == len(reply) for end in ends)


@pytest.mark.parametrize("template", ALL)
def test_fewer_shots_are_the_first_ones(template: few_shot.Template) -> None:
    full = template.render("q", template.n_examples)
    for n in range(template.n_examples):
        query = template.query.format(question="q")
        assert full.startswith(template.render("q", n).removesuffix(query))
    with pytest.raises(ValueError, match=f"n_shot must be in 0..{template.n_examples}"):
        template.render("q", template.n_examples + 1)


def test_missing_example_file_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        load_examples("nothing")
