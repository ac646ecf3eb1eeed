"""How a reasoning question is put, answered, criticised and read: one conversation per item and mode, as a loop.

The wordings of questions and triggers are those of the zero-shot chain-of-thought harness (Kojima et al. 2022), which
the RCI paper's reasoning tables were made with (Kim et al. 2023, section 4.1); the paper's own code is not public.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

import yaml

from modules.language.backends.base import Reply, Request, Turn
from modules.rci.driving import watched
from modules.rci.loop import Context, Outcome, RCIPrompts, Sampling, StopRule, check_rules, rci_loop, retry_loop
from modules.verification.extraction import AnswerKind, cleanse
from modules.verification.voting import majority_vote

PromptStyle = Literal["zero_shot", "zero_shot_cot", "few_shot_cot"]
Compare = Literal["string", "numeric"]
PROMPT_STYLES = ("zero_shot", "zero_shot_cot", "few_shot_cot")
EXEMPLARS = Path(__file__).parent / "exemplars"
TRIGGERS: dict[AnswerKind, str] = {
    "number": "The answer (arabic numerals) is",
    "choice": "Among A through E, the answer is",
    "yes_no": "The answer (Yes or No) is",
}
STEP_BY_STEP = "Let's think step by step."


def answer_line(kind: AnswerKind) -> str:
    """What asks for the answer behind a reasoning: ``Therefore, `` and the trigger, on a line of its own."""
    trigger = TRIGGERS[kind]
    return f"\nTherefore, {trigger[0].lower()}{trigger[1:]}"


def opening(question: str, kind: AnswerKind, style: PromptStyle, worked: str = "") -> str:
    """The prompt that an answer (``zero_shot``) or a reasoning goes on from.

    Args:
        worked: worked examples, for ``few_shot_cot``; see :func:`read_exemplars`.
    """
    if style == "few_shot_cot":
        return f"{worked}Q: {question}\nA:"
    return f"Q: {question}\nA: {TRIGGERS[kind] if style == 'zero_shot' else STEP_BY_STEP}"


def read_exemplars(folder: str | Path, kind: AnswerKind) -> str:
    """Worked examples of ``<folder>/<kind>.yaml`` as one text, each closed by ``The answer is ...``.

    Raises:
        ValueError: no such file, not YAML, no entries, or an entry without ``question``, ``reasoning`` and ``answer``.
    """
    path = Path(folder) / f"{kind}.yaml"
    if not path.is_file():
        raise ValueError(f"RCIReasoning: few_shot_cot needs worked examples and {path} is no file; check exemplars")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"RCIReasoning: {path} is not valid YAML ({' '.join(str(error).split())[:100]})") from None
    keys = {"question", "reasoning", "answer"}
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"RCIReasoning: {path} must hold a list of worked examples")
    for number, entry in enumerate(entries, 1):
        texts = isinstance(entry, dict) and all(isinstance(text, str) and text.strip() for text in entry.values())
        if not texts or set(entry) != keys:
            raise ValueError(f"RCIReasoning: {path}: example {number} must hold the texts {', '.join(sorted(keys))}")
    return "".join(
        f"Q: {entry['question'].strip()}\nA: {entry['reasoning'].strip()} The answer is {entry['answer']}.\n\n"
        for entry in entries
    )


def same_answer(compare: Compare, kind: AnswerKind) -> Callable[[str, str], bool]:
    """Equality of two answers: as strings (as the harness does), or numbers by value (``43`` = ``43.0``)."""
    if compare == "string" or kind != "number":
        return str.__eq__

    def equal(one: str, other: str) -> bool:
        try:
            return Decimal(one) == Decimal(other)
        except InvalidOperation:
            return one == other

    return equal


@dataclass
class ReasoningMode:
    """How every question is answered in one column of the results.

    Args:
        prompt: ``zero_shot``: the answer at once; ``zero_shot_cot``: a reasoning, then the answer is asked for
            (Kojima et al. 2022); ``few_shot_cot``: a reasoning after worked examples, which holds the answer (Wei et
            al. 2022).
        rounds: RCI rounds K, at most; 0: the first answer stands.
        explicit: sample the critique; False: ask for the better answer at once (implicit RCI).
        stop: of the rounds. ``fixed``: K rounds. ``oracle``: as soon as the answer is right, by the label: what the
            paper's tables use, and no self-correction. ``verifier``: as soon as an answer can be extracted.
            ``unchanged``: as soon as a round repeats the text before it.
        samples: self-consistency: independent samples, of whose answers the most frequent stands (Wang et al. 2023).
        retry: independent samples at most; the first one that an answer can be extracted from stands.
        temperature, top_p: of answers, reasonings and critiques. Answers asked for behind a reasoning are greedy.
        reasoning_tokens: length of a reasoning or critique, at most.
        answer_tokens: length of an answer, at most.
        strict_choice: pass over a capital A in prose when looking for a letter.
        against: mode that this one is tested against, item by item; None: the module's ``baseline``.
    """

    prompt: PromptStyle = "zero_shot"
    rounds: int = 0
    explicit: bool = True
    stop: StopRule = "fixed"
    samples: int = 1
    retry: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    reasoning_tokens: int = 256
    answer_tokens: int = 32
    strict_choice: bool = False
    against: str | None = None

    def check(self, name: str, prompts: RCIPrompts) -> None:
        """Raise a one-line ValueError, naming mode and field, for settings that can't be followed."""
        where = f"RCIReasoning: mode '{name}'"
        if self.prompt not in PROMPT_STYLES:
            raise ValueError(f"{where}: prompt must be one of {', '.join(PROMPT_STYLES)}, got {self.prompt!r}")
        try:
            check_rules(self.rounds, self.stop, True, prompts, self.explicit)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('RCI: ')}") from None
        for field_name in ("samples", "retry", "reasoning_tokens", "answer_tokens"):
            if getattr(self, field_name) < 1:
                raise ValueError(f"{where}: {field_name} must be >= 1, got {getattr(self, field_name)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"{where}: temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{where}: top_p must be in (0, 1], got {self.top_p}")
        used = [text for text, on in (("rounds", self.rounds), ("samples", self.samples > 1), ("retry", self.retry > 1))
                if on]  # fmt: skip
        if len(used) > 1:
            raise ValueError(f"{where}: {' and '.join(used)} are set; a mode takes one of rounds, samples and retry")
        for field_name in ("samples", "retry"):
            if getattr(self, field_name) > 1 and self.temperature == 0:
                raise ValueError(
                    f"{where}: {field_name} = {getattr(self, field_name)} at temperature 0 repeats one answer; set "
                    f"temperature > 0 or {field_name}: 1"
                )

    @property
    def uses_label(self) -> bool:
        """Whether the label ends the rounds: then no figure of this mode is an ``accuracy``."""
        return self.rounds > 0 and self.stop == "oracle"


@dataclass(frozen=True)
class Call:
    """One model call; ``extracts``: it only asked for the answer behind a reasoning."""

    request: Request
    reply: Reply
    extracts: bool = False


@dataclass
class Answered:
    """One item in one mode.

    Args:
        answer: what stands, None if no answer was found.
        tried: answers of all rounds, or of all samples, in order.
        right: for each of them whether it is the gold one.
        ok: whether ``answer`` is.
        stopped_by: see :class:`~modules.rci.loop.Outcome`; ``vote`` after self-consistency.
        calls: all model calls, extraction included, in order.
    """

    answer: str | None
    tried: list[str | None]
    right: list[bool]
    ok: bool
    stopped_by: str
    calls: list[Call] = field(default_factory=list)

    def round_right(self, number: int) -> bool:
        """Whether the answer after ``number`` rounds is right; rounds that were not needed leave it as it is."""
        return self.right[min(number, len(self.right) - 1)]

    @property
    def prompt_tokens(self) -> int:
        return sum(call.reply.prompt_tokens for call in self.calls)

    @property
    def completion_tokens(self) -> int:
        return sum(call.reply.completion_tokens for call in self.calls)


def answer_question(
    item: Mapping[str, Any],
    mode: ReasoningMode,
    *,
    prompts: RCIPrompts,
    worked: str = "",
    seed: int = 0,
    compare: Compare = "string",
    stop_strings: tuple[str, ...] = (),
) -> Generator[Any, Any, Answered]:
    """Answer one question in one mode: a loop that yields requests.

    A ``zero_shot`` answer is read as it is, and so are its improvements, whose prompt ends in the trigger again. After
    a ``zero_shot_cot`` reasoning the answer is asked for in a branch that the conversation never sees, so that what
    the model is shown stays append-only. A ``few_shot_cot`` reasoning holds its answer behind "The answer is".

    Args:
        item: with ``question``, ``gold`` and ``kind``.
        prompts: the wording of criticism and improvement.
        worked: worked examples, for ``few_shot_cot``.
        seed: of this conversation.
        compare: how answers are compared.
        stop_strings: end a reasoning or a ``zero_shot`` answer.
    """
    kind: AnswerKind = item["kind"]
    line, equal = answer_line(kind), same_answer(compare, kind)
    direct, few_shot = mode.prompt == "zero_shot", mode.prompt == "few_shot_cot"
    prompts = replace(prompts, improve=prompts.improve + (TRIGGERS[kind] if direct else "A:" if few_shot else ""))
    reasoning = Sampling(mode.reasoning_tokens, mode.temperature, mode.top_p, stop_strings)
    sampling = replace(reasoning, max_new_tokens=mode.answer_tokens) if direct else reasoning

    context = Context(seed=seed).say(opening(item["question"], kind, mode.prompt, worked))
    texts: list[str] = []
    ends: list[tuple[Turn, ...]] = []  # the conversation up to each answer, for the branches
    tried: list[str | None] = []

    def keep(text: str) -> str:
        # what opens a reply joins it to the prompt, for models that read the turns as one text: it stays
        texts.append(text.rstrip())
        ends.append(Context(context.turns).say(prompts.before + texts[-1], "assistant").turns)
        return texts[-1]

    def read(number: int) -> Generator[Request, Reply, str | None]:
        if number < len(tried):
            return tried[number]
        text = texts[number]
        if mode.prompt == "zero_shot_cot":
            branch = Context(ends[number], seed=seed * 31 + 1_000_003 * (number + 1)).say(line)
            text = (yield from branch.ask(Sampling(mode.answer_tokens))).text
        tried.append(cleanse(text, kind, few_shot=few_shot, strict_choice=mode.strict_choice))
        return tried[number]

    def is_answer(text: str) -> Generator[Any, Any, bool]:
        return (yield from read(len(texts) - 1)) is not None

    def is_right(text: str) -> Generator[Any, Any, bool]:
        answer = yield from read(len(texts) - 1)
        return answer is not None and equal(answer, item["gold"])

    def conversation() -> Generator[Any, Any, Outcome]:
        if mode.retry > 1 or mode.samples > 1:
            check = is_answer if mode.retry > 1 else None
            calls = max(mode.retry, mode.samples)
            outcome = yield from retry_loop(context, sampling, calls=calls, check=check, clean=keep)
        else:
            outcome = yield from rci_loop(
                context, sampling, prompts, rounds=mode.rounds, explicit=mode.explicit, stop=mode.stop,
                check=is_right if mode.stop == "oracle" else is_answer, critique_sampling=reasoning, clean=keep,
            )  # fmt: skip
        for number in range(len(texts)):  # rounds that the stop rule did not look at
            yield from read(number)
        return outcome

    calls: list[Call] = []

    def note(request: Request, reply: Reply) -> None:
        calls.append(Call(request, reply, request.turns[-1].text == line))

    outcome = yield from watched(conversation(), note)
    answer, stopped_by = tried[-1], outcome.stopped_by
    if mode.samples > 1:
        answer, stopped_by = majority_vote(tried, equal).answer, "vote"
    right = [found is not None and equal(found, item["gold"]) for found in tried]
    return Answered(answer, tried, right, answer is not None and equal(answer, item["gold"]), stopped_by, calls)
