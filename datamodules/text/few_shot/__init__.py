"""Few-shot prompts for the evaluation tasks: worked examples in YAML files, laid out by :class:`Template`.

The layouts follow Lewkowycz et al. 2022 (Minerva, appendix: ``Problem: / Solution: / Final Answer:``), Wei et al. 2022
(``Q: / A: ... The answer is N.``), Gao et al. 2023 (a ``solution()`` function in Python) and Azerbayev et al. 2024
(Llemma, sections 3.1 and 3.2: numbers of examples, sympy programs with a separate import block). Every example and
every sentence of the prompts was written for this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

LETTERS = "ABCDEFGH"

#: What a program of the MATH prompts may use without importing it; shown at the top of the prompt and to be run, by the
#: executor, before the program. It is ours, hence trusted; the program is the model's and is not.
PROGRAM_IMPORTS = "import math\nfrom fractions import Fraction\nfrom sympy import *"


@dataclass(frozen=True)
class Example:
    """One worked example.

    Args:
        question: problem text; for choice questions the lettered choices are already appended.
        answer: final answer as the prompt states it (a number, LaTeX, or a letter).
        solution: chain of thought, without the closing sentence; empty where the file has none.
        program: Python text that computes the answer; empty where the file has none.
    """

    question: str
    answer: str
    solution: str = ""
    program: str = ""


@dataclass(frozen=True)
class Template:
    """Layout of a prompt: ``header``, then n worked examples, then the open question.

    Args:
        examples: stem of the YAML file with the worked examples; empty when the prompt is the bare question.
        query: text around ``{question}``, up to where the model takes over.
        reply: what a worked example puts there, around ``{solution}``, ``{program}`` and ``{answer}``.
        stop: strings that end the model's reply.
        header: text before the first example, shown with any number of examples.
        separator: text between examples.
    """

    examples: str
    query: str
    reply: str = ""
    stop: tuple[str, ...] = ()
    header: str = ""
    separator: str = "\n\n"

    @property
    def n_examples(self) -> int:
        """Worked examples at hand."""
        return len(load_examples(self.examples)) if self.examples else 0

    def render(self, question: str, n_shot: int) -> str:
        """Prompt for ``question`` after the first ``n_shot`` worked examples.

        Raises:
            ValueError: ``n_shot`` is negative or more than the file holds.
        """
        shots = load_examples(self.examples) if self.examples else ()
        if not 0 <= n_shot <= len(shots):
            raise ValueError(f"few-shot prompt '{self.examples}': n_shot must be in 0..{len(shots)}, got {n_shot}")
        parts = [
            self.query.format(question=shot.question)
            + self.reply.format(solution=shot.solution, program=shot.program, answer=shot.answer)
            for shot in shots[:n_shot]
        ]
        return self.header + self.separator.join([*parts, self.query.format(question=question)])


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question followed by its choices, one a line, lettered ``(A)``, ``(B)``, ..."""
    return "\n".join([question, *(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))])


@cache
def load_examples(name: str) -> tuple[Example, ...]:
    """Worked examples of ``few_shot/<name>.yaml``, in file order.

    Raises:
        FileNotFoundError: there is no such file.
    """
    import yaml

    text = (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
    examples = []
    for row in yaml.load(text, Loader=yaml.BaseLoader):  # plain strings only: 3.98e-19 and 11 stay as written
        choices = row.pop("choices", None)
        if choices:
            row["question"] = with_choices(row["question"], choices)
        examples.append(Example(**row))
    return tuple(examples)


_MINERVA_STOP = ("I hope it is correct.", "Problem:")

MATH = Template(
    examples="math",
    query="Problem:\n{question}\n\nSolution:",
    reply="\n{solution}\nFinal Answer: The final answer is ${answer}$. I hope it is correct.",
    stop=_MINERVA_STOP,
)
# OCWCourses differs from MATH in the small "a" of "answer" and in bare answers (numbers such as 4.5e33, formulas).
OCW = Template(
    examples="ocw",
    query="Problem:\n{question}\n\nSolution:",
    reply="\n{solution}\nFinal answer: The final answer is {answer}. I hope it is correct.",
    stop=_MINERVA_STOP,
)
_CHOICE_REPLY = "\n{solution}\nFinal Answer: The final answer is ({answer}). I hope it is correct."
MMLU_STEM = Template("mmlu_stem", "Problem:\n{question}\n\nSolution:", _CHOICE_REPLY, _MINERVA_STOP)
SAT = Template("sat", "Problem:\n{question}\n\nSolution:", _CHOICE_REPLY, _MINERVA_STOP)
GSM8K = Template("gsm8k", "Q: {question}\nA:", " {solution} The answer is {answer}.", ("Q:",))
GSM8K_PROGRAM = Template(
    examples="gsm8k",
    query="Q: {question}\n\n# The same as a Python function that returns the answer:\n",
    reply="{program}",
    stop=("Q:", "\n\n\n"),
    separator="\n\n\n",
)
MATH_PROGRAM = Template(
    examples="math_program",
    query="Problem:\n{question}\n\nProgram:\n",
    reply="{program}",
    stop=("Problem:", "\n\n\n"),
    header=f"These imports hold for every program below. Each program stores its result in `answer`.\n\n"
    f"Imports:\n{PROGRAM_IMPORTS}\n\n\n",
    separator="\n\n\n",
)
#: The text itself: theorem statements (the proof search builds its own prompts) and prompts of the user.
BARE = Template(examples="", query="{question}")
