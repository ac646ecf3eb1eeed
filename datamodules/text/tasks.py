"""Evaluation tasks: file formats, prompts and sampling settings of the mathematics benchmarks.

A :class:`TaskSpec` (what a config names) and a data file become a list of :class:`TaskItem` (what a model is asked).
Items are plain dicts of plain values, so they travel through a DataLoader, Lightning's device transfer and JSON as they
are. Gold answers stay raw; ``gold_kind`` tells the scorer how to extract the final answer, and one extractor does it
for gold and model text alike.

Source: Azerbayev et al. 2024 (Llemma), section 3 and appendix; Lewkowycz et al. 2022 (Minerva) for MATH, OCW and
MMLU-STEM.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from datamodules.text import few_shot, task_files
from datamodules.text.few_shot import Template
from datamodules.text.task_files import Row, read_rows

Mode = Literal["cot", "program", "prove"]
AnswerKind = Literal["number", "latex", "choice", "program_number", "program_latex", "theorem", "text"]
GoldKind = Literal["final", "boxed_solution", "hash_marks", "letter", "statement", "none"]


class TaskItem(TypedDict):
    """One question put to a model.

    Keys:
        task: name of the :class:`TaskSpec`; metrics are logged under it.
        item_id: ``<task>/<row or theorem>``, unique within the task and independent of world size, limit and seed.
        prompt: text to complete. For ``theorem`` items the source of the statement, without its proof.
        gold: reference as the data file has it.
        gold_kind: how to read ``gold``: ``final`` (it is the answer), ``boxed_solution`` (answer in the last
            ``\\boxed{}``), ``hash_marks`` (answer after ``####``), ``letter``, ``statement`` (a theorem: proof search
            decides), ``none``.
        answer_kind: how to read the completion: ``number`` ("The answer is N."), ``latex`` / ``choice`` ("The final
            answer is X."), ``program_number`` (defines ``solution()``), ``program_latex`` (sets ``answer``),
            ``theorem``, ``text`` (free completion, not scored).
        stop: strings that end a completion.
        max_new_tokens: completion budget, in tokens.
        k, temperature, top_p: samples per item and how to draw them; temperature 0 is greedy.
        meta: further plain values: ``n_shot``, and ``type``, ``level``, ``split``, ``choices``, ``imports`` where they
            apply; ``overlong: True`` when even the bare question exceeds ``max_prompt_tokens``.
    """

    task: str
    item_id: str
    prompt: str
    gold: str
    gold_kind: GoldKind
    answer_kind: AnswerKind
    stop: tuple[str, ...]
    max_new_tokens: int
    k: int
    temperature: float
    top_p: float
    meta: dict[str, Any]


# ---------------------------------------------------------------------------------------------------- built-in tasks


@dataclass(frozen=True)
class Answering:
    """How a benchmark is asked in one mode, with the paper's settings as defaults.

    Args:
        template: prompt layout.
        answer_kind: see :class:`TaskItem`.
        n_shot: worked examples.
        max_new_tokens: completion budget. The longest MATH solution has 5,313 characters (mean 519), GSM8K's 1,070
            (292).
        majority: (k, temperature, top_p) of maj@k.
    """

    template: Template
    answer_kind: AnswerKind
    n_shot: int
    max_new_tokens: int
    majority: tuple[int, float, float] = (1, 0.0, 1.0)


@dataclass(frozen=True)
class TaskFormat:
    """A benchmark: its file, its reader and the modes it can be asked in.

    Args:
        read: row and ``<file>:<line>`` to (question, raw gold, extras).
        gold_kind: see :class:`TaskItem`.
        modes: by name; the first one is the default.
        file: path below the data folder; empty when the user must give one.
    """

    read: Callable[[Mapping[str, Any], str], Row]
    gold_kind: GoldKind
    modes: Mapping[str, Answering]
    file: str = ""


_MATH_MODES = {
    "cot": Answering(few_shot.MATH, "latex", 4, 1024, (256, 0.6, 0.95)),
    "program": Answering(few_shot.MATH_PROGRAM, "program_latex", 5, 512, (16, 0.6, 0.95)),
}
_GSM8K_MODES = {
    "cot": Answering(few_shot.GSM8K, "number", 8, 512, (100, 0.6, 0.95)),
    "program": Answering(few_shot.GSM8K_PROGRAM, "program_number", 8, 512, (16, 0.6, 0.95)),
}
_OCW_MODES = {"cot": Answering(few_shot.OCW, "latex", 4, 1024, (100, 0.6, 0.95))}
_MMLU_MODES = {"cot": Answering(few_shot.MMLU_STEM, "choice", 4, 512, (16, 0.3, 0.95))}
_SAT_MODES = {"cot": Answering(few_shot.SAT, "choice", 4, 512, (16, 0.3, 0.95))}
# The proof search sets its own number of samples; 128 tokens bound one tactic.
_PROVE_MODES = {"prove": Answering(few_shot.BARE, "theorem", 0, 128)}
_PROMPT_MODES = {"cot": Answering(few_shot.BARE, "text", 0, 256)}

#: Built-in tasks. ``gsm8k_sample`` is 64 items of the GSM8K test set that come with this package; ``sat`` is a format
#: without a file (the questions may not be redistributed); ``custom`` takes rows of ``question`` and final ``answer``;
#: ``prompts`` takes free prompts and is not scored.
TASKS: dict[str, TaskFormat] = {
    "math": TaskFormat(task_files.read_boxed, "boxed_solution", _MATH_MODES, "math/math_test.jsonl"),
    "math500": TaskFormat(task_files.read_math500, "final", _MATH_MODES, "math/math500_test.jsonl"),
    "gsm8k": TaskFormat(task_files.read_gsm8k, "hash_marks", _GSM8K_MODES, "math/gsm8k_test.jsonl"),
    "gsm8k_sample": TaskFormat(task_files.read_gsm8k, "hash_marks", _GSM8K_MODES),
    "ocw": TaskFormat(task_files.read_boxed, "boxed_solution", _OCW_MODES, "math/ocw_test.jsonl"),
    "mmlu_stem": TaskFormat(task_files.read_choice, "letter", _MMLU_MODES, "math/mmlu_stem_test.jsonl"),
    "sat": TaskFormat(task_files.read_choice, "letter", _SAT_MODES),
    "minif2f_coq": TaskFormat(task_files.read_coq, "statement", _PROVE_MODES, "math/minif2f_coq.jsonl"),
    "minif2f_lean4": TaskFormat(task_files.read_lean, "statement", _PROVE_MODES, "math/minif2f_lean4.jsonl"),
    "custom": TaskFormat(task_files.read_custom, "final", _MATH_MODES),
    "prompts": TaskFormat(task_files.read_prompt, "none", _PROMPT_MODES),
}


@dataclass
class TaskSpec:
    """What a config says about one evaluation task.

    Args:
        name: a built-in task (``math``, ``math500``, ``gsm8k``, ``gsm8k_sample``, ``ocw``, ``mmlu_stem``, ``sat``,
            ``minif2f_coq``, ``minif2f_lean4``), or any name of letters, digits, ``_`` and ``-`` together with ``like``
            or ``path``. Metrics are logged under it.
        like: built-in task whose file format, prompts and scoring are used; ``name`` itself by default, else ``custom``
            (rows of ``question`` and final ``answer``, asked and scored as MATH).
        path: data file (JSON lines; for ``like: prompts`` also .txt with one prompt a line); by default the built-in
            task's file below the data folder.
        mode: ``cot`` (chain of thought), ``program`` (a Python program gives the answer) or ``prove``; by default the
            first one the task has.
        split: keep only rows with this ``split`` (miniF2F: ``valid`` or ``test``); all by default.
        n_shot: worked examples in the prompt; the paper's number by default.
        limit: evaluate the first ``limit`` items of a seeded order. Subsets are nested: a smaller limit is a prefix of
            a larger one with the same seed. All items in file order by default.
        seed: seed of that order.
        k: samples per item for majority voting; 1 is maj@1; ``paper`` takes the paper's k for the task and mode.
        temperature: by default 0 (greedy) for k = 1, else the paper's for the task.
        top_p: nucleus mass in (0, 1]; by default the paper's for the task when sampling.
        max_new_tokens: completion budget in tokens; by default the task's.
        max_prompt_tokens: leave out worked examples, last one first, until the prompt has at most this many tokens. An
            item whose bare question is still longer stays in the set, with ``meta["overlong"]``: dropping it would
            change the denominator of the accuracy.

    """

    name: str
    like: str | None = None
    path: str | None = None
    mode: Mode | None = None
    split: str | None = None
    n_shot: int | None = None
    limit: int | None = None
    seed: int = 0
    k: int | Literal["paper"] = 1
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None

    def check(self) -> None:
        """Raise a one-line ValueError, naming field and rule, for what can be seen without touching a file."""
        if not re.fullmatch(r"[A-Za-z0-9_\-]+", self.name):
            raise ValueError(f"TaskSpec: name must be letters, digits, '_' or '-', got {self.name!r}")
        where = f"TaskSpec '{self.name}'"
        style = self.style
        if style not in TASKS:
            close = difflib.get_close_matches(style, TASKS, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            own = "" if self.like else "; a task of your own needs 'path', and 'like' for its format"
            raise ValueError(f"{where}: no built-in task '{style}'; {hint}built-in: {', '.join(TASKS)}{own}")
        if not self.path and not TASKS[style].file and style != "gsm8k_sample":
            raise ValueError(f"{where}: no file comes with '{style}', so 'path' must name one")
        if self.mode is not None and self.mode not in TASKS[style].modes:
            raise ValueError(f"{where}: mode must be one of {list(TASKS[style].modes)}, got '{self.mode}'")
        shots = self.answering.template.n_examples
        if self.n_shot is not None and not 0 <= self.n_shot <= shots:
            raise ValueError(f"{where}: n_shot must be in 0..{shots}, got {self.n_shot}")
        for field, least in (("limit", 1), ("k", 1), ("max_new_tokens", 1), ("max_prompt_tokens", 1), ("seed", 0)):
            value = getattr(self, field)
            if value not in (None, "paper") and value < least:
                raise ValueError(f"{where}: {field} must be >= {least}, got {value}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"{where}: top_p must be in (0, 1], got {self.top_p}")
        if self.temperature is not None and not (0 <= self.temperature < float("inf")):
            raise ValueError(f"{where}: temperature must be >= 0, got {self.temperature}")
        k, temperature, _ = self.sampling
        if k > 1 and temperature == 0:
            raise ValueError(
                f"{where}: k = {k} samples at temperature 0 are all the same; set temperature > 0 or k = 1"
            )

    @property
    def style(self) -> str:
        """Name of the built-in task that gives format, prompts and scoring."""
        return self.like or (self.name if self.name in TASKS or not self.path else "custom")

    @property
    def answering(self) -> Answering:
        """Prompt layout, answer kind and the paper's settings in the chosen mode."""
        modes = TASKS[self.style].modes
        return modes[self.mode] if self.mode else next(iter(modes.values()))

    @property
    def sampling(self) -> tuple[int, float, float]:
        """(k, temperature, top_p) with defaults filled in; greedy decoding has top_p 1."""
        paper_k, paper_temperature, paper_top_p = self.answering.majority
        k = paper_k if self.k == "paper" else self.k
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if k == 1 else paper_temperature or 0.6
        if temperature == 0:
            return k, 0.0, 1.0
        return k, float(temperature), float(self.top_p if self.top_p is not None else paper_top_p)

    def file(self, data_dir: str | Path | None) -> Path:
        """The data file: ``path`` as given, else the built-in file below ``data_dir``, else the packaged sample.

        Raises:
            ValueError: the task's file lives in the data folder and ``data_dir`` is not set.
            FileNotFoundError: there is no such file.
        """
        if self.path:
            path = Path(self.path)
        elif self.style == "gsm8k_sample":
            path = Path(__file__).parent / "samples" / "gsm8k_test_64.jsonl"
        elif data_dir:
            path = Path(data_dir) / TASKS[self.style].file
        else:
            raise ValueError(
                f"task '{self.name}': set data_dir to the folder that holds {TASKS[self.style].file}, or 'path' to the "
                "file; the task gsm8k_sample needs neither"
            )
        if not path.is_file():
            raise FileNotFoundError(f"task '{self.name}': no file {path}; check data_dir and path")
        return path


# ------------------------------------------------------------------------------------------------------ making items


def seeded_order(n: int, seed: int) -> list[int]:
    """Permutation of ``range(n)`` by SHA-256 of (seed, index): the same on every machine and library version."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


def load_task(
    spec: TaskSpec, data_dir: str | Path | None = None, count_tokens: Callable[[str], int] | None = None
) -> list[TaskItem]:
    """Items of one task, in evaluation order.

    Args:
        spec: the task.
        data_dir: folder that holds ``math/``; needed by built-in tasks other than ``gsm8k_sample``.
        count_tokens: text to number of tokens, of the model that will be asked; needed for ``max_prompt_tokens``.

    Raises:
        ValueError: a bad ``spec`` or line (``file:line``), no items, ``max_prompt_tokens`` without ``count_tokens``.
        FileNotFoundError: no data file.
    """
    spec.check()
    if spec.max_prompt_tokens is not None and count_tokens is None:
        raise ValueError(f"task '{spec.name}': max_prompt_tokens needs a tokenizer to count with")
    fmt, answering = TASKS[spec.style], spec.answering
    path = spec.file(data_dir)
    raw: list[tuple[str, str, str, dict[str, Any]]] = []
    for index, (where, row) in enumerate(read_rows(path)):
        question, gold, meta = fmt.read(row, where)
        raw.append((str(meta.get("name", index)), question, gold, meta))
    if not raw:
        raise ValueError(f"task '{spec.name}': {path} holds no items")
    repeated = [key for key, count in Counter(key for key, *_ in raw).items() if count > 1]
    if repeated:
        raise ValueError(f"task '{spec.name}': {path} names '{repeated[0]}' more than once")
    if spec.split is not None:
        kept = [entry for entry in raw if entry[3].get("split") == spec.split]
        if not kept:
            known = sorted({str(entry[3]["split"]) for entry in raw if "split" in entry[3]}) or "none"
            raise ValueError(f"task '{spec.name}': no item of split '{spec.split}' in {path}; it has {known}")
        raw = kept
    if spec.limit is not None:
        raw = [raw[i] for i in seeded_order(len(raw), spec.seed)[: spec.limit]]

    n_shot = answering.n_shot if spec.n_shot is None else spec.n_shot
    k, temperature, top_p = spec.sampling
    items: list[TaskItem] = []
    for key, question, gold, meta in raw:
        prompt, shots, overlong = _fit_prompt(
            answering.template, question, n_shot, spec.max_prompt_tokens, count_tokens
        )
        meta = {**meta, "n_shot": shots}
        if answering.answer_kind == "program_latex":
            meta["imports"] = few_shot.PROGRAM_IMPORTS
        if overlong:
            meta["overlong"] = True
        items.append(
            TaskItem(
                task=spec.name,
                item_id=f"{spec.name}/{key}",
                prompt=prompt,
                gold=gold,
                gold_kind=fmt.gold_kind,
                answer_kind=answering.answer_kind,
                stop=answering.template.stop,
                max_new_tokens=spec.max_new_tokens or answering.max_new_tokens,
                k=k,
                temperature=temperature,
                top_p=top_p,
                meta=meta,
            )
        )
    return items


def _fit_prompt(
    template: Template, question: str, n_shot: int, max_tokens: int | None, count_tokens: Callable[[str], int] | None
) -> tuple[str, int, bool]:
    """Prompt, number of worked examples in it, and whether it is too long even without any."""
    for shots in range(n_shot, -1, -1):
        prompt = template.render(question, shots)
        if max_tokens is None or count_tokens is None or count_tokens(prompt) <= max_tokens:
            return prompt, shots, False
    return template.render(question, 0), 0, True


def load_tasks(
    specs: Sequence[TaskSpec], data_dir: str | Path | None = None, count_tokens: Callable[[str], int] | None = None
) -> dict[str, list[TaskItem]]:
    """Items of several tasks by name, in the given order.

    Raises:
        ValueError: two specs share a name, or as :func:`load_task`.
        FileNotFoundError: as :func:`load_task`.
    """
    check_tasks(specs)
    return {spec.name: load_task(spec, data_dir, count_tokens) for spec in specs}


def check_tasks(specs: Sequence[TaskSpec]) -> None:
    """Raise a one-line ValueError for a bad spec or a name used twice, without touching a file."""
    for spec in specs:
        spec.check()
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"tasks: name {twice} is used more than once; give one of them another name and 'like: {twice[0]}'"
        )
