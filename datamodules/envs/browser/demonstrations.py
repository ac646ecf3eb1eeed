"""Demonstrations by scripted experts, and the training examples that are made of them.

A demonstration is an episode as an agent sees it: the task in words, a compact page and an instruction, step by step.
Files are JSON lines, one episode each, appended as episodes end, so that a killed recording goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datamodules.envs.browser.experts import EXPERTS, NoMoveError
from datamodules.envs.browser.pool import MiniWoBPool
from modules.contracts.browsing import (
    ActionPrompts,
    ActionStatus,
    EpisodeSpec,
    GrammarError,
    PageView,
    is_instruction,
    parse_instruction,
)
from modules.contracts.page_edits import PlantedInstruction, add_lines, new_word
from modules.files import fsync_path, read_json_rows, repair_lines
from modules.optional import require
from modules.seeds import stream_seed

_WORD = re.compile(r"[A-Za-z]+|[0-9]+")
_LITERAL = re.compile(r"'[^']*'")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_LINE = re.compile(r"(?P<tag>[\w-]+)(?:#(?P<id>[^\s\[]+)|\.(?P<classes>[^\s\[]+))?(?:\[\w+\])?(?: (?P<text>.*))?")
_KINDS = ("type", "press", "clickxpath", "clickoption", "movemouse")
OK = "ok"
#: Counts the ways in which training rows were made of steps; rows made another way are not reused.
AUGMENTATION = 2


@dataclass(frozen=True)
class Step:
    """One decision: what was seen, what had been done, and what the expert does.

    ``draft``, ``status``: what a model did instead, and what became of it; empty in a demonstration.
    """

    task: str
    seed: str
    goal: str
    page: str
    history: tuple[str, ...]
    action: str
    draft: str = ""
    status: str = OK


@dataclass
class Episode:
    """One recorded episode; ``solved``: the raw reward was at least 1."""

    task: str
    seed: str
    solved: bool = False
    steps: list[dict[str, str]] = field(default_factory=list)

    def decisions(self) -> Iterator[Step]:
        past: list[str] = []
        for step in self.steps:
            yield Step(self.task, self.seed, step["goal"], step["page"], tuple(past), step["action"])
            past.append(step["action"])


def page_key(goal: str, page: str) -> str:
    """Identity of an episode's first page, to tell whether an agent was trained on it."""
    return hashlib.sha256(f"{goal}\n{page}".encode()).hexdigest()[:16]


def check_experts(tasks: Iterable[str]) -> None:
    """Raise ValueError naming a task without an expert, and the tasks that have one."""
    for task in tasks:
        if task not in EXPERTS:
            raise ValueError(f"demonstrations: no expert for task '{task}'; there are {', '.join(sorted(EXPERTS))}")


def record(
    pool: MiniWoBPool, specs: Sequence[EpisodeSpec], path: Path, max_steps: int = 25, attempts: int = 2
) -> list[Episode]:
    """Have experts play ``specs`` on all pages at once; append the episodes to ``path``, those in it left out.

    Returns:
        All episodes of ``specs``, in their order.

    Raises:
        ValueError: no expert for a task; a file that isn't of this kind.
        RuntimeError: the browser failed in an episode ``attempts`` times.
    """
    check_experts({spec.task for spec in specs})
    done = load_episodes(path) if path.is_file() else {}
    todo = [(spec, 0) for spec in reversed(specs) if (spec.task, spec.seed) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    repair_lines(path)
    live: dict[int, tuple[Episode, PageView, int]] = {}
    with open(path, "a", encoding="utf-8") as stream:
        while todo or live:
            starts: dict[int, tuple[EpisodeSpec, int]] = {}
            for slot in range(pool.slots):
                if slot not in live and todo:
                    starts[slot] = todo.pop()
            for slot, view in pool.reset_pages({slot: spec for slot, (spec, _) in starts.items()}).items():
                spec, attempt = starts[slot]
                live[slot] = (Episode(spec.task, spec.seed), view, attempt)
            moves: dict[int, str] = {}
            for slot, (episode, view, attempt) in list(live.items()):
                move = None if view.done or len(episode.steps) >= max_steps else _move(episode, view)
                if move is not None:
                    episode.steps.append({"goal": view.utterance, "page": view.page, "action": move})
                    moves[slot] = move
                    continue
                del live[slot]
                if view.status in ("error", "left_page"):
                    if attempt + 1 >= attempts:
                        raise RuntimeError(
                            f"demonstrations: {episode.task}, seed {episode.seed!r}: the browser failed {attempts} "
                            f"times ({view.reason})"
                        )
                    todo.append((EpisodeSpec(episode.task, episode.seed), attempt + 1))
                    continue
                episode.solved = view.done and view.reward >= 1
                done[episode.task, episode.seed] = episode
                # ASCII: no page's text can hold a line separator, and a kill can't cut a character in two
                stream.write(json.dumps(asdict(episode)) + "\n")
                stream.flush()
            for slot, view in pool.step_pages(moves).items():
                live[slot] = (live[slot][0], view, live[slot][2])
    fsync_path(path)
    return [done[spec.task, spec.seed] for spec in specs]


def _move(episode: Episode, view: PageView) -> str | None:
    return expert_move(episode.task, view, [step["action"] for step in episode.steps])


def expert_move(task: str, view: PageView, history: Sequence[str]) -> str | None:
    """What the expert of ``task`` does here; None: it doesn't know, or there is none."""
    if task not in EXPERTS or view.done:
        return None
    try:
        return EXPERTS[task](view, history)
    except (NoMoveError, IndexError, KeyError, ValueError):
        return None  # pages that a wrong instruction has led to


def load_episodes(path: Path) -> dict[tuple[str, str], Episode]:
    """Episodes of a file by (task, seed).

    Raises:
        ValueError: a line of another kind, named by file and line.
    """
    found = {}
    for number, row in enumerate(read_json_rows(path, "demonstrations"), 1):
        try:
            episode = Episode(**row)
        except TypeError:
            raise ValueError(f"demonstrations: {path}: line {number} is no episode") from None
        found[episode.task, episode.seed] = episode
    return found


def load_drafts(path: Path) -> list[Step]:
    """Steps with a model's drafts, as the agent's evaluation writes them (``drafts`` there).

    Raises:
        ValueError: a line of another kind, named by file and line.
    """
    steps = []
    for number, row in enumerate(read_json_rows(path, "drafts"), 1):
        try:
            steps.append(Step(**{**row, "history": tuple(row["history"])}))
        except (TypeError, KeyError):
            raise ValueError(f"drafts: {path}: line {number} is no step with a draft") from None
    return steps


# ------------------------------------------------------------------------------------------------------- augmentation


class Renamer:
    """Replaces the names in a step by made-up ones, consistently in goal, page and instructions.

    What a small model has to learn is to copy names, not to know them: the words of the task's own language, those in
    more than ``common`` of its steps, stay, as does what is grammar in an instruction. Different words get different
    names. A step whose instruction says a word that is not to be read anywhere in it (a date written another way, a
    sum) would not follow from renamed text and stays as it is.

    Args:
        steps: of all tasks.
        common: share of a task's steps from which on a word belongs to the task.
    """

    def __init__(self, steps: Sequence[Step], common: float = 0.2) -> None:
        counts: dict[str, Counter[str]] = {}
        totals: Counter[str] = Counter()
        for step in steps:
            words = set(_WORD.findall(f"{step.goal}\n{step.page}\n{step.action}"))
            counts.setdefault(step.task, Counter()).update(words)
            totals[step.task] += 1
        self.kept = {
            task: {word for word, count in words.items() if count > common * totals[task]}
            for task, words in counts.items()
        }
        names = {word for task, words in counts.items() for word in words if word not in self.kept[task]}
        self._names = sorted({word.lower() for word in names if word.isalpha() and len(word) > 1})

    def __call__(self, step: Step, generator: random.Random) -> Step:
        """A renamed copy."""
        kept = self.kept[step.task].union(*map(_frame, (*step.history, step.action, step.draft)))
        seen = set(_WORD.findall("\n".join((step.goal, step.page, *step.history))))
        if not kept.union(seen).issuperset(_WORD.findall(step.action)):
            return step
        names: dict[str, str] = {}
        taken = set(kept)

        def name(match: re.Match[str]) -> str:
            word = match[0]
            if word in kept or word.lower() in _KINDS:
                return word
            if word not in names:
                names[word] = _unused(word, self._names, taken, generator)
                taken.add(names[word])
            return names[word]

        def renamed(text: str) -> str:
            return _WORD.sub(name, text)

        history = tuple(renamed(line) for line in step.history)
        return Step(
            step.task, step.seed, renamed(step.goal), renamed(step.page), history, renamed(step.action),
            renamed(step.draft), step.status,
        )  # fmt: skip


def _frame(instruction: str) -> set[str]:
    """Words of an instruction that are its grammar and no names: its kind, a key, an XPath without its strings."""
    if not is_instruction(instruction):
        return set()
    kind, _, argument = instruction.partition(" ")
    return set(_WORD.findall(kind if kind.lower() == "type" else f"{kind} {_QUOTED.sub(' ', argument)}"))


def _unused(word: str, known: Sequence[str], taken: set[str], generator: random.Random) -> str:
    """A word of the ``known`` or a made-up one, not ``taken``; longer than ``word`` where all short ones are."""
    if known and word.isalpha() and len(word) > 1 and generator.random() < 0.5:
        found = _cased(generator.choice(known), word)
        if found not in taken:
            return found
    longer = word
    while True:
        for _ in range(20):
            if (found := _made_up(longer, generator)) not in taken:
                return found
        longer += word[-1]


def _cased(letters: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return letters.upper()
    return letters.capitalize() if like[0].isupper() else letters


def _made_up(word: str, generator: random.Random) -> str:
    """A word of the same kind: as many digits, or letters in the same case and of about the same number."""
    if word.isdigit():
        first = generator.choice("123456789" if word[0] != "0" else "0")
        return first + "".join(generator.choice("0123456789") for _ in word[1:])
    length = max(1, len(word) + generator.randint(-2, 3)) if len(word) > 1 else 1
    vowels, others = "aeiou", "bcdfghjklmnpqrstvwxyz"
    at = generator.randint(0, 1)
    letters = "".join(generator.choice((vowels, others)[(at + i) % 2]) for i in range(length))
    return _cased(letters, word)


# --------------------------------------------------------------------------------------------------- critique turns


def corrupt(step: Step, generator: random.Random) -> tuple[str, ActionStatus]:
    """A wrong draft for ``step`` and what would become of it: a kind of mistake that models make.

    Another name of the page (40 %), a wrong verb (20 %), a broken XPath (20 %), a wrong tag (20 %).
    """
    draft, claimed = _mistake(step, generator)
    return draft, _becomes(step, draft, claimed)


def _mistake(step: Step, generator: random.Random) -> tuple[str, ActionStatus]:
    action, draw = step.action, generator.random()
    lines = _lines(step.page)
    names = [line["text"] for line in lines if line["text"]]
    literals = _LITERAL.findall(action)
    if draw < 0.4 and names:
        other = generator.choice(names).replace("'", "")
        if literals:
            return action.replace(literals[-1], f"'{other}'", 1), OK
        if action.startswith("type "):
            return f"type {other}", OK
    if draw < 0.6:
        kind, _, argument = action.partition(" ")
        others = [verb for verb in ("click", "type", "press", "select", "clickoption") if verb != kind]
        return f"{generator.choice(others)} {argument}", OK
    if draw < 0.8 and "'" in action:
        at = action.rindex("'")
        return action[:at] + action[at + 1 :], "bad_xpath"
    tag = re.search(r"//(\w+|\*)", action)
    if tag:
        others = [name for name in ("button", "a", "div", "span", "input", "label") if name != tag[1]]
        if tag[1] == "*":  # any element: a tag that the page has might be the right one
            others = [name for name in others if name not in {line["tag"] for line in lines}] or ["form"]
        return action[: tag.start(1)] + generator.choice(others) + action[tag.end(1) :], "no_match"
    return action + "x", OK


def _lines(page: str) -> list[dict[str, str]]:
    """Elements of a compact page: ``tag``, ``id``, ``classes`` and ``text``, without the state that a line ends in."""
    found = []
    for line in page.splitlines():
        if match := _LINE.fullmatch(line):
            parts = {key: value or "" for key, value in match.groupdict().items()}
            parts["text"] = parts["text"].removesuffix("*").rstrip()
            if parts["tag"] in ("input", "textarea", "select"):
                parts["text"] = ""
            elif parts["tag"] == "option":
                parts["text"] = parts["text"].removesuffix(" on")
            found.append(parts)
    return found


def _becomes(step: Step, draft: str, claimed: ActionStatus) -> ActionStatus:
    """What would become of ``draft``, as far as the compact page tells; else ``claimed``."""
    try:
        instruction = parse_instruction(draft)
    except GrammarError:
        return "malformed"
    if instruction.kind in ("type", "press"):
        return OK
    etree = require("lxml.etree", extra="rci")
    root = etree.Element("div")

    def matches(xpath: str) -> bool:
        return bool(root.xpath(xpath))

    try:
        etree.XPath(instruction.argument)
    except etree.XPathSyntaxError:
        return "bad_xpath"
    try:
        for line in _lines(step.page):
            child = etree.SubElement(root, line["tag"], {"id": line["id"], "class": line["classes"].replace(".", " ")})
            child.text = line["text"]
        right = parse_instruction(step.action)
        if right.kind in ("type", "press") or matches(right.argument):
            return OK if matches(instruction.argument) else "no_match"
    except (ValueError, etree.XPathError):  # a character that XML has not, an XPath that selects no elements
        pass
    return claimed


def fault(draft: str, action: str, status: str) -> str:
    """The fault of a draft in a few words, given what the expert does: the critique that a model learns to give."""
    if draft == action:
        return OK
    try:
        given = parse_instruction(draft)
    except GrammarError:
        return "not an instruction"
    if status == "bad_xpath":
        return "broken XPath"
    if status in ("no_match", "not_clickable"):
        return "no such element"
    wanted = parse_instruction(action)
    if given.kind != wanted.kind:
        return f"not the time to {given.kind}"
    return "wrong text" if given.kind == "type" else "wrong key" if given.kind == "press" else "wrong element"


def examples(step: Step, prompts: ActionPrompts, generator: random.Random | None = None) -> list[dict[str, str]]:
    """Prompt and response pairs of one step.

    Always the act itself. With a draft (the step's own, or with ``generator`` a correct one in 40 % and a corrupted one
    in 60 %) also its critique, and the improvement after it.
    """
    start = prompts.acting(step.goal, step.page, step.history)
    rows = [{"kind": "act", "prompt": start, "response": f" {step.action}"}]
    draft, status = step.draft, step.status
    if not draft and generator is not None:
        draft, status = (step.action, OK) if generator.random() < 0.4 else corrupt(step, generator)
    if draft:
        said = f"{start} {draft}{prompts.critique}"
        found = fault(draft, step.action, status)
        rows.append({"kind": "critique", "prompt": said, "response": f" {found}"})
        rows.append({"kind": "improve", "prompt": f"{said} {found}{prompts.improve}", "response": f" {step.action}"})
    return rows


def training_rows(
    steps: Sequence[Step],
    prompts: ActionPrompts,
    *,
    renamed: int,
    critiques: bool,
    seed: int,
    only: Mapping[str, bool] | None = None,
    planted: float = 0.0,
    instructions: Sequence[PlantedInstruction] = (),
) -> Iterator[dict[str, str]]:
    """Examples of all steps as they are, and of ``renamed`` renamed copies of each; an epoch apart from another order.

    Args:
        critiques: add critique and improvement turns, on drafts of the steps or on corrupted actions.
        only: kinds to keep (``act``, ``critique``, ``improve``), all by default.
        planted: share of the steps' copies whose page also holds one of ``instructions``, which the expert ignores.
    """
    renamer = Renamer(steps)
    for number, step in enumerate(steps):
        generator = random.Random(stream_seed(seed, number))
        for copy in range(renamed + 1):
            changed = step if copy == 0 else renamer(step, generator)
            # a stream of its own: which copies are planted changes nothing else in any of them
            plants = random.Random(stream_seed(seed, number, copy, 1))
            if instructions and plants.random() < planted:
                changed = plant(changed, instructions, plants)
            for row in examples(changed, prompts, generator if critiques else None):
                if only is None or only.get(row["kind"], False):
                    yield row


def plant(step: Step, instructions: Sequence[PlantedInstruction], draw: random.Random) -> Step:
    """The step on a page that tries to instruct the agent; what the expert does there is what it did without.

    The text, its place among the page's lines (before or behind all others) and the thing that it asks for are drawn.
    """
    shown = [one for one in instructions if one.pieces("x")[0].listed]
    if not shown:
        return step
    target = new_word(draw, "\n".join((step.goal, step.page, step.action, *step.history)))
    pieces = draw.choice(shown).pieces(target)
    return replace(step, page=add_lines(step.page, pieces, draw.choice(("start", "end"))))


def summary(episodes: Iterable[Episode]) -> dict[str, Any]:
    """Episodes, solved ones and steps by task."""
    table: dict[str, dict[str, int]] = {}
    for episode in episodes:
        row = table.setdefault(episode.task, {"episodes": 0, "solved": 0, "steps": 0})
        row["episodes"] += 1
        row["solved"] += episode.solved
        row["steps"] += len(episode.steps)
    return table
