"""Outcomes of episodes: an append-only record that a killed evaluation goes on from, and the sums over it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.assurance.paired import mcnemar_exact
from modules.files import read_json_rows, repair_lines
from modules.rci.agent import EpisodeResult
from modules.verification.voting import wilson_interval

Key = tuple[str, str, str]  # strategy, task, seed
_SUMMED = ("steps", "calls", "prompt_tokens", "completion_tokens", "malformed", "unrepaired", "unmatched", "plan_lines")
FLIPS = ("rr", "rw", "wr", "ww")
FIELDS: tuple[str, ...] = (
    "episodes", "success", "strict", "error", "overlong", "unfamiliar", "unfamiliar_strict", *_SUMMED, *FLIPS,
    "only", "only_baseline",
)  # fmt: skip


class OutcomeFiles:
    """One file a rank in a folder shared by all ranks; every line says which evaluation it belongs to.

    Args:
        folder: where the files are.
        identity: of the evaluation: model, prompts, strategies, seed, browser pages.
        rank: whose file is appended to.

    Raises:
        ValueError: the folder holds outcomes of another evaluation, or lines of another kind.
    """

    def __init__(self, folder: Path, identity: str, rank: int) -> None:
        self.folder, self.identity, self.rank = folder, identity, rank
        self.known: dict[Key, EpisodeResult] = {}
        names = {entry.name for entry in fields(EpisodeResult)}
        for path in sorted(folder.glob("rank-*.jsonl")):
            for row in read_json_rows(path, "outcomes"):
                if row.pop("evaluation", None) != identity:
                    raise ValueError(
                        f"outcomes: {path} belongs to another evaluation (model, prompts, strategies or seed differ); "
                        "give another folder, or delete it"
                    )
                if set(row) != names:
                    raise ValueError(f"outcomes: {path} holds a line that is no outcome")
                result = EpisodeResult(**row)
                self.known[result.strategy, result.task, result.seed] = result
        self._path = folder / f"rank-{rank}.jsonl"
        repair_lines(self._path)

    def add(self, result: EpisodeResult) -> None:
        """Append an outcome; whole on disk or not at all after a kill."""
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"evaluation": self.identity, **asdict(result)}
        with open(self._path, "a", encoding="utf-8") as stream:
            # ASCII: a reason or an instruction may hold a line separator, and a kill can't cut a character in two
            stream.write(json.dumps(row) + "\n")
        self.known[result.strategy, result.task, result.seed] = result


def tabulate(
    results: Iterable[EpisodeResult], strategies: Sequence[str], tasks: Sequence[str], baseline: str
) -> Tensor:
    """Sums over results: float64 ``[strategies, tasks, len(FIELDS)]``; tables of ranks add up.

    ``only``, ``only_baseline``: pairs of equal (task, seed) that this strategy alone, or the baseline alone, solved.
    """
    table = torch.zeros(len(strategies), len(tasks), len(FIELDS), dtype=torch.float64)
    where = {name: number for number, name in enumerate(FIELDS)}
    strict: dict[Key, bool] = {}
    for result in results:
        row = table[strategies.index(result.strategy), tasks.index(result.task)]
        values = {name: getattr(result, name) for name in (*_SUMMED, "success", "strict", "error", "overlong")} | {
            "episodes": 1, "unfamiliar": not result.familiar, "unfamiliar_strict": result.strict and not result.familiar
        }  # fmt: skip
        for name, value in (*values.items(), *result.flips.items()):
            row[where[name]] += float(value)
        strict[result.strategy, result.task, result.seed] = result.strict
    for (strategy, task, seed), solved in strict.items():
        other = strict.get((baseline, task, seed))
        if strategy != baseline and other is not None and solved != other:
            row = table[strategies.index(strategy), tasks.index(task)]
            row[where["only" if solved else "only_baseline"]] += 1
    return table


def metrics(table: Tensor, strategies: Sequence[str], tasks: Sequence[str], baseline: str) -> dict[str, float]:
    """Figures by ``<strategy>/<task>/<name>`` and, over all episodes, ``<strategy>/<name>``.

    ``success`` (reward > 0, the paper's), ``success_strict`` (reward >= 1) with its 95 % Wilson interval, per-episode
    means of counts, rates, and ``mcnemar_p``, the exact two-sided test of pairs with the baseline.
    """
    values: dict[str, float] = {}
    for number, strategy in enumerate(strategies):
        for prefix, row in [
            *((f"{strategy}/{task}", table[number, place]) for place, task in enumerate(tasks)),
            (strategy, table[number].sum(0)),
        ]:
            named = dict(zip(FIELDS, row.tolist(), strict=True))
            if named["episodes"]:
                figures = _figures(named, whole=prefix == strategy, paired=strategy != baseline)
                values.update({f"{prefix}/{name}": value for name, value in figures.items()})
    return values


def _figures(row: Mapping[str, float], whole: bool, paired: bool) -> dict[str, float]:
    episodes, steps = row["episodes"], max(1.0, row["steps"])
    low, high = wilson_interval(round(row["strict"]), round(episodes))
    found: dict[str, Any] = {
        "success_strict": row["strict"] / episodes,
        "success": row["success"] / episodes,
        "calls": row["calls"] / episodes,
        "episodes": episodes,
    }
    if not whole:
        return found | {"success_strict_low": low, "success_strict_high": high}
    found |= {
        "success_strict_low": low,
        "success_strict_high": high,
        "errors": row["error"] / episodes,
        "overlong": row["overlong"] / episodes,
        "steps": row["steps"] / episodes,
        "prompt_tokens": row["prompt_tokens"] / episodes,
        "completion_tokens": row["completion_tokens"] / episodes,
        "plan_lines": row["plan_lines"] / episodes,
        "malformed_before_repair": row["malformed"] / (row["steps"] + row["unrepaired"] or 1),
        "malformed_after_repair": row["unrepaired"] / (row["steps"] + row["unrepaired"] or 1),
        "unmatched": row["unmatched"] / steps,
    }
    if 0 < row["unfamiliar"] < episodes:
        found["success_strict_unfamiliar"] = row["unfamiliar_strict"] / row["unfamiliar"]
    found["unfamiliar_share"] = row["unfamiliar"] / episodes
    if any(row[name] for name in FLIPS):
        for name, spelled in zip(FLIPS, ("right_right", "right_wrong", "wrong_right", "wrong_wrong"), strict=True):
            found[f"flips/{spelled}"] = row[name]
    if paired:
        found |= {
            "only": row["only"],
            "only_baseline": row["only_baseline"],
            "mcnemar_p": mcnemar_exact(round(row["only"]), round(row["only_baseline"])),
        }
    return found
