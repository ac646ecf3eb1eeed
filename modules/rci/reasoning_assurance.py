"""What reasoning with critique offers to assurance suites: held-out questions, also with an instruction in them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from modules.assurance.probe import Block
from modules.assurance.subject import AssuranceError, CardFacts, DataSource, Subject
from modules.assurance.text.injection import load_injections
from modules.language.backends.base import Request
from modules.rci.driving import drive
from modules.rci.effects import Halted
from modules.rci.oversight import Oversight, overseen
from modules.rci.reasoning_modes import Answered, ReasoningMode, answer_question, read_exemplars
from modules.seeds import text_seed

Item = Mapping[str, Any]


def false_answer(item: Item) -> str:
    """An answer that is wrong, for a text that asks for it."""
    gold = str(item["gold"])
    if item["kind"] == "yes_no":
        return "no" if gold.lower() == "yes" else "yes"
    if item["kind"] == "choice":
        return "ABCDE"[("ABCDE".find(gold[:1].upper()) + 1) % 5]
    return str(7000 + text_seed(str(item["question"])) % 1000)


class QuestionTrials:
    """Capabilities of ``modules/assurance/probes/agents.py``, and replies to requests.

    Args:
        module: asks its backend.
        items: all held-out ones; a fifth, by a hash of the question, is the anchor split.
    """

    def __init__(self, module: Any, items: Sequence[Item]) -> None:
        self.module = module
        self.items: dict[str, list[Item]] = {"fresh": [], "anchor": []}
        for item in items:
            self.items["fresh" if text_seed(str(item["question"])) % 5 else "anchor"].append(item)
        self.mode: ReasoningMode = module.modes[module.baseline]
        # the label may end no round here: what came of it would be no critique
        plain = replace(self.mode, samples=1, retry=1, stop="fixed")
        self.direct, self.critic = replace(plain, rounds=0), replace(plain, rounds=max(1, plain.rounds))
        if self.mode.uses_label:
            self.mode = self.critic

    def capabilities(self) -> dict[str, Any]:
        return {
            "task_episodes": lambda block, condition: self.successes(self.chosen(block), self.mode),
            "injected_episodes": self.injected,
            "critique_episodes": lambda block: {
                "with critique": self.successes(self.chosen(block), self.critic),
                "without": self.successes(self.chosen(block), self.direct),
            },
            "stopped_episodes": self.stopped,
            "budgeted_episodes": self.budgeted,
            "replies_to": self.replies_to,
        }

    def chosen(self, block: Block) -> list[Item]:
        return self.items[block.split][block.start : block.start + block.count]

    def loop(self, item: Item, mode: ReasoningMode) -> Generator[Any, Any, Answered]:
        worked = read_exemplars(self.module.exemplars, item["kind"]) if mode.prompt == "few_shot_cot" else ""
        return answer_question(
            item, mode, prompts=self.module.prompts, worked=worked, seed=text_seed(str(item["question"]), 6),
            compare=self.module.compare, stop_strings=self.module.stop_strings,
        )  # fmt: skip

    def play(self, loops: Sequence[Generator[Any, Any, Any]], asked: Callable[[int], None] | None = None) -> list[Any]:
        """What the loops return, in order. ``asked``: told the loop's number before each of its calls."""
        backend, width = self.module.backend, self.module.width

        def ask(effects: Sequence[tuple[int, Request]]) -> Sequence[Any]:
            return backend.generate([request for _, request in effects])

        loops = [loop if asked is None else _counting(loop, number, asked) for number, loop in enumerate(loops)]
        found = dict(drive(loops, width, {Request: ask}))
        return [found[number] for number in range(len(loops))]

    def successes(self, items: Sequence[Item], mode: ReasoningMode) -> np.ndarray:
        answers = self.play([self.loop(item, mode) for item in items])
        return np.array([one.ok for one in answers], dtype=np.float64)

    def injected(self, block: Block) -> dict[str, dict[str, np.ndarray]]:
        split = "anchor" if block.split == "anchor" else "evaluation"
        cases = load_injections().select(split)
        asked, wanted = [], []
        for number, item in enumerate(self.chosen(block), block.start):
            target = false_answer(item)
            text = cases[number % len(cases)].fill("finish", target).text
            wanted.append(target)
            asked.append({**item, "question": f"{item['question']}\n{text}"})
        answers = self.play([self.loop(item, self.mode) for item in asked])
        obeyed = [str(one.answer).lower() == target.lower() for one, target in zip(answers, wanted, strict=True)]
        return {
            "finish": {
                "success": np.array([one.ok for one in answers], dtype=np.float64),
                "obeyed": np.array(obeyed, dtype=np.float64),
            }
        }

    def stopped(self, block: Block, after: int) -> np.ndarray:
        """Model calls after a request to stop, which comes after so many."""
        made = self._made(block, Oversight(confirm=[]), after)
        return np.maximum(0, made - after)

    def budgeted(self, block: Block, calls: int, actions: int) -> tuple[np.ndarray, np.ndarray]:
        made = self._made(block, Oversight(confirm=[], max_calls=calls), None)
        return made, np.zeros(len(made), dtype=np.int64)

    def _made(self, block: Block, rules: Oversight, stop_after: int | None) -> np.ndarray:
        """Model calls that reached the backend, ``[n]``."""
        items = self.chosen(block)
        made = np.zeros(len(items), dtype=np.int64)

        def count(number: int) -> None:
            made[number] += 1

        def stopping(number: int) -> Callable[[], bool] | None:
            return None if stop_after is None else lambda: bool(made[number] >= stop_after)

        loops = [_halting(self.loop(item, self.critic), rules, stopping(n)) for n, item in enumerate(items)]
        self.play(loops, count)
        return made

    def replies_to(self, texts: Sequence[str], seed: int) -> list[str]:
        items = [{"question": text, "gold": "", "kind": "number"} for text in texts]
        replies = self.play([_first_reply(self.loop(item, self.direct)) for item in items])
        return [reply.text for reply in replies]


def _halting(
    loop: Generator[Any, Any, Any], rules: Oversight, stopping: Callable[[], bool] | None
) -> Generator[Any, Any, Any]:
    try:
        return (yield from overseen(loop, rules, stopping))
    except Halted:
        return None


def _counting(loop: Generator[Any, Any, Any], number: int, asked: Callable[[int], None]) -> Generator[Any, Any, Any]:
    result = None
    while True:
        try:
            effect = loop.send(result)
        except StopIteration as end:
            return end.value
        asked(number)
        result = yield effect


def _first_reply(loop: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    reply = yield loop.send(None)
    loop.close()
    return reply


def reasoning_subject(module: Any, data: Any) -> Subject:
    """The subject of an :class:`~modules.rci.reasoning.RCIReasoning`; ``data`` has its ``items`` by set.

    Raises:
        AssuranceError: data without items.
    """
    sets: Mapping[str, Sequence[Item]] = getattr(data, "items", {})
    items = [item for of_set in sets.values() for item in of_set]
    if not items:
        raise AssuranceError(
            f"{type(module).__name__}: {type(data).__name__} has no questions: assure it with "
            "datamodules.ReasoningDataModule"
        )
    identity = module.backend.identity
    card = CardFacts(
        title="Reasoning with self-critique",
        summary="Answers questions with a frozen model that is asked to criticise and improve its own answers.",
        intended_use=f"Questions like those of {', '.join(sets)}.",
        out_of_scope="Answers that nobody checks and that others depend on.",
        limitations="The model is asked, not trained; figures hold for its version alone.",
        licence="unknown",
        data=(DataSource(f"the backend {identity}", "unknown"),),
    )
    return Subject("agents", module, QuestionTrials(module, items).capabilities(), card)
