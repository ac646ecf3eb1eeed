"""RCI on reasoning questions: modes of answering compared on the same items (Kim et al. 2023, section 4.1)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch import LightningModule

from modules.assurance.subject import Subject
from modules.files import canonical_digest, write_json
from modules.language.backends.base import Backend, Reply, Request
from modules.rci.driving import drive
from modules.rci.loop import RCIPrompts
from modules.rci.reasoning_modes import (
    EXEMPLARS,
    Answered,
    Compare,
    ReasoningMode,
    answer_question,
    read_exemplars,
)
from modules.rci.reasoning_tally import ReasoningTally
from modules.seeds import text_seed
from modules.verification.extraction import AnswerKind

Stage = Literal["test", "val"]


class RCIReasoning(LightningModule):
    """Answers reasoning questions in several modes with a frozen model and compares them item by item.

    A batch is a list of items (dicts with ``set``, ``item_id``, ``question``, ``gold``, ``kind``); the verbs are
    ``test``, ``validate`` and ``predict``. Figures are logged as ``<test|val>/<set>/<mode>/<figure>``, see
    :meth:`modules.rci.reasoning_tally.ReasoningTally.metrics`, and written to ``reasoning_<test|val>.json`` in the run
    folder. Every judged item is appended to ``items/<set>.rank-<k>.jsonl`` there, with prompts and replies.

    Args:
        backend: the model that is asked.
        modes: columns of the results, by name.
        baseline: mode that those without ``against`` of their own are tested against (McNemar, exact); None: the first.
        prompts: wording of criticism and improvement; the paper's by default.
        exemplars: folder with worked examples (``number.yaml``, ``choice.yaml``, ``yes_no.yaml``) for
            ``few_shot_cot``; None: those that come with Plumbline.
        compare: ``string``: answers as texts, as the paper's harness; ``numeric``: numbers by value.
        stop_strings: end a reasoning or a direct answer; a completion model would go on to invent questions.
        seed: of sampled replies; a reply depends on it, on its item and mode, not on rank or batch.
        width: conversations that wait for the model at the same time.

    Raises:
        ValueError: no modes, an unknown baseline, or a mode that can't be followed; one line that names it.
    """

    def __init__(
        self,
        backend: Backend,
        modes: dict[str, ReasoningMode],
        baseline: str | None = None,
        prompts: RCIPrompts | None = None,
        exemplars: str | None = None,
        compare: Compare = "string",
        stop_strings: list[str] | None = None,
        seed: int = 0,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.modes = {name: m if isinstance(m, ReasoningMode) else ReasoningMode(**m) for name, m in modes.items()}
        self.prompts = prompts or RCIPrompts()
        self.exemplars = Path(exemplars) if exemplars is not None else EXEMPLARS
        self.stop_strings = ("\nQ:",) if stop_strings is None else tuple(stop_strings)
        self.compare: Compare = compare
        self.seed, self.width = seed, width
        if not self.modes:
            raise ValueError("RCIReasoning: modes is empty; name at least one, e.g. {direct: {prompt: zero_shot}}")
        for name, mode in self.modes.items():
            if not name or set(name) & set("/ \t\n"):
                raise ValueError(f"RCIReasoning: a mode's name must hold no blank and no '/', got {name!r}")
            mode.check(name, self.prompts)
        self.baseline = next(iter(self.modes)) if baseline is None else baseline
        if self.baseline not in self.modes:
            raise ValueError(f"RCIReasoning: baseline '{baseline}' is none of the modes {', '.join(self.modes)}")
        self._against = {name: mode.against or self.baseline for name, mode in self.modes.items()}
        for name, other in self._against.items():
            if other not in self.modes:
                raise ValueError(f"RCIReasoning: mode '{name}': against '{other}' is none of {', '.join(self.modes)}")
        if compare not in ("string", "numeric"):
            raise ValueError(f"RCIReasoning: compare must be string or numeric, got {compare!r}")
        for name, value, least in (("width", width, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"RCIReasoning: {name} must be >= {least}, got {value}")
        # neither the backend nor anything that it may hold goes into a checkpoint
        self.save_hyperparameters(
            {"modes": {name: asdict(mode) for name, mode in self.modes.items()}, "baseline": self.baseline,
             "compare": compare, "seed": seed, "backend": backend.identity}, logger=False,
        )  # fmt: skip
        self._worked: dict[AnswerKind, str] = {}
        self._tallies: dict[tuple[str, str], ReasoningTally] = {}
        self._results: dict[tuple[str, str], ReasoningTally] = {}
        self._folder: Path | None = None

    # ---------------------------------------------------------------------------------------------------- not training

    def configure_optimizers(self) -> None:
        """Nothing is trained."""

    def training_step(self, *_: Any) -> NoReturn:
        self._refuse_to_train()

    def _refuse_to_train(self) -> NoReturn:
        raise ValueError(
            f"RCIReasoning: the backend ({self.backend.identity}) is frozen, so fit has nothing to train; the verbs "
            "that work are test, validate and predict"
        )

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._refuse_to_train()
        folder = self.trainer.log_dir  # a collective: asked on all ranks
        self._folder = None if folder is None else Path(folder)
        if any(mode.prompt == "few_shot_cot" for mode in self.modes.values()):
            self._worked = {kind: read_exemplars(self.exemplars, kind) for kind in ("number", "choice", "yes_no")}

    # ------------------------------------------------------------------------------------------------------- answering

    def answer(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Answered]]:
        """Answer every item in every mode; what is waited for is asked in one batch.

        Returns:
            Per item the outcomes by mode, in the order of ``modes``.
        """
        pairs = [(index, name) for index in range(len(items)) for name in self.modes]
        loops = (
            answer_question(
                items[index],
                self.modes[name],
                prompts=self.prompts,
                worked=self._worked.get(items[index]["kind"], ""),
                seed=text_seed(f"{self.seed}/{items[index]['item_id']}/{name}", 6),
                compare=self.compare,
                stop_strings=self.stop_strings,
            )
            for index, name in pairs
        )
        found: dict[tuple[int, str], Answered] = {}
        for number, outcome in drive(loops, self.width, {Request: self._ask}):
            found[pairs[number]] = outcome
        return [{name: found[index, name] for name in self.modes} for index in range(len(items))]

    def _ask(self, effects: Sequence[tuple[int, Request]]) -> list[Reply]:
        return self.backend.generate([request for _, request in effects])

    def _judge(self, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Answered]]:
        outcomes = self.answer(batch)
        for item, by_mode in zip(batch, outcomes, strict=True):
            for name, answered in by_mode.items():
                tally = self._tallies.setdefault((item["set"], name), ReasoningTally(self.modes[name].rounds))
                tally.add(answered, by_mode[self._against[name]])
        self._record(batch, outcomes)
        return outcomes

    def _record(self, batch: Sequence[Mapping[str, Any]], outcomes: Sequence[dict[str, Answered]]) -> None:
        """Append the items to the run folder, each batch at once."""
        if self._folder is None:
            return
        lines: dict[str, list[str]] = {}
        for item, by_mode in zip(batch, outcomes, strict=True):
            for name, answered in by_mode.items():
                row = item_row(item, name, answered)
                lines.setdefault(item["set"], []).append(json.dumps(row, ensure_ascii=False) + "\n")
        for name, rows in lines.items():
            path = self._folder / "items" / f"{name}.rank-{self.global_rank}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as stream:
                stream.write("".join(rows))

    def test_step(self, batch: list[dict[str, Any]], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._judge(batch)

    def validation_step(self, batch: list[dict[str, Any]], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._judge(batch)

    def predict_step(
        self, batch: list[dict[str, Any]], batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Rows ``{item_id, question, answers}``, ``answers`` by mode; written to ``items/`` as well."""
        return [
            {
                "item_id": item["item_id"],
                "question": item["question"],
                "answers": {name: answered.answer for name, answered in by_mode.items()},
            }
            for item, by_mode in zip(batch, self._judge(batch), strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------- reporting

    def on_test_start(self) -> None:
        self._tallies.clear()

    def on_validation_start(self) -> None:
        self._tallies.clear()

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def _report(self, stage: Stage) -> None:
        self._results = self._over_ranks()
        main: dict[str, float] = {}
        rest: dict[str, float] = {}
        accuracies: dict[str, list[float]] = {}
        for (dataset, name), tally in self._results.items():
            mode = self.modes[name]
            shown, further = tally.metrics(mode, tested=self._against[name] != name)
            main |= {f"{stage}/{dataset}/{name}/{key}": value for key, value in shown.items()}
            rest |= {f"{stage}/{dataset}/{name}/{key}": value for key, value in further.items()}
            accuracy = "accuracy_oracle_stop" if mode.uses_label else "accuracy"
            accuracies.setdefault(f"{stage}/mean/{name}/{accuracy}", []).append(shown[accuracy])
        if len({dataset for dataset, _ in self._results}) > 1:
            main |= {key: sum(values) / len(values) for key, values in accuracies.items()}
        # equal on all ranks by now; a mean over ranks leaves them as they are
        self.log_dict(main, sync_dist=True)
        if not self.trainer.is_global_zero:
            return
        for logger in self.trainer.loggers:
            logger.log_metrics(rest, step=self.global_step)
        if self._folder is not None:
            write_json(
                self._folder / f"reasoning_{stage}.json",
                {"backend": self.backend.identity, "against": self._against, "compare": self.compare,
                 "modes": {name: asdict(mode) for name, mode in self.modes.items()}, "figures": {**main, **rest}},
            )  # fmt: skip

    def _over_ranks(self) -> dict[tuple[str, str], ReasoningTally]:
        """Counts of all ranks by (set, mode), in one sum; sets without items are left out."""
        names = list(getattr(self.trainer.datamodule, "set_names", []))  # pyright: ignore[reportAttributeAccessIssue]
        names = names or sorted({dataset for dataset, _ in self._tallies})
        keys = [(dataset, name) for dataset in names for name in self.modes]
        rounds = [self.modes[name].rounds for _, name in keys]
        mine = [self._tallies.get(key) or ReasoningTally(k) for key, k in zip(keys, rounds, strict=True)]
        counts = torch.tensor([n for tally in mine for n in tally.counts], dtype=torch.float64, device=self.device)
        if self.trainer.world_size > 1:
            counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
        parts = counts.split([ReasoningTally.size(k) for k in rounds])  # pyright: ignore[reportAttributeAccessIssue]
        whole = [ReasoningTally(k, part.tolist()) for k, part in zip(rounds, parts, strict=True)]
        self._tallies.clear()
        return {key: tally for key, tally in zip(keys, whole, strict=True) if tally["items"]}

    def teardown(self, stage: str) -> None:
        self.backend.close()

    # ------------------------------------------------------------------------------------------------------- contracts

    def digest(self) -> dict[str, str]:
        """What every rank must agree on."""
        modes = {name: asdict(mode) for name, mode in self.modes.items()}
        return {"backend": self.backend.identity, "modes": canonical_digest(modes), "seed": str(self.seed)}

    def assurance_subject(self) -> Subject:
        from modules.rci.reasoning_assurance import reasoning_subject

        return reasoning_subject(self, getattr(self.trainer, "datamodule", None))

    def summary_rows(self) -> dict[str, str]:
        rows = {"backend": self.backend.identity, "tested against": self.baseline}
        return rows | {
            f"{dataset} {name}": tally.summary(self.modes[name]) for (dataset, name), tally in self._results.items()
        }


def item_row(item: Mapping[str, Any], name: str, answered: Answered) -> dict[str, Any]:
    """One item in one mode as JSON: ``prompt`` opens all its calls, each of which adds its ``added`` to it."""
    prompt = answered.calls[0].request.text
    calls = [
        {
            "added": call.request.text.removeprefix(prompt),
            "reply": call.reply.text,
            "finish": call.reply.finish,
            "extracts": call.extracts,
            "tokens": [call.reply.prompt_tokens, call.reply.completion_tokens],
        }
        for call in answered.calls
    ]
    return {
        "item_id": item["item_id"], "mode": name, "gold": item["gold"], "answer": answered.answer, "ok": answered.ok,
        "tried": answered.tried, "stopped_by": answered.stopped_by, "prompt": prompt, "calls": calls,
    }  # fmt: skip
