"""RCI for computer tasks (Kim, Baldi, McAleer 2023): trains a small agent on demonstrations, evaluates in a browser."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from tensordict import TensorDict
from torch import Tensor

from modules.assurance.subject import AssuranceError, Subject
from modules.contracts.browsing import EpisodeSpec, ProvidesPages
from modules.contracts.episodes import EpisodeSample
from modules.contracts.page_edits import PlantedInstruction
from modules.files import canonical_digest, repair_lines
from modules.language.backends.base import Backend, PromptTooLongError, Reply, Request
from modules.language.finetuning import FinetuningModule
from modules.language.specs import LoraSpec, ModelSpec, Tuning
from modules.language.supervised import OptimizerSpec
from modules.rci.agent import Act, Agent, Film, Probe, Record, Reset, Strategy
from modules.rci.driving import drive
from modules.rci.effects import Confirm
from modules.rci.outcomes import FIELDS, Key, OutcomeFiles, metrics, tabulate
from modules.rci.oversight import Oversight
from modules.rci.prompting import PromptLibrary
from modules.seeds import global_seed

_SHOWN = 12


def answered(backend: Backend, requests: Sequence[Request]) -> list[Reply | PromptTooLongError]:
    """Replies to requests; in place of one that is too long for the model, the error, and the others all the same."""
    try:
        return list(backend.generate(requests))
    except PromptTooLongError as error:
        if len(requests) == 1:
            return [error]
        return [answered(backend, [request])[0] for request in requests]


class RCIAgent(FinetuningModule):
    """A language model that works on web pages by keyboard and mouse, and criticises what it is about to do.

    ``fit`` trains ``model`` on demonstrations with critique and improvement turns (cross-entropy on the tokens of the
    responses; the batch is that of :class:`~modules.language.finetuning.FinetuningModule`). ``test`` lets every
    strategy play every (task, seed) of the data in a browser. A test batch is a list of ``{"task", "seed"}``.

    Logged in training: ``train/loss``, ``lr``; ``val/loss``, ``val/ppl``, ``val/token_accuracy`` and ``val/exact``
    (share of held-out responses that are most likely token by token, given their beginnings). In tests see
    :func:`modules.rci.outcomes.metrics`; also ``episodes_per_second``, ``generate_ms`` and ``browser_ms`` per episode.

    Args:
        model: the agent's own network; this or ``backend``.
        backend: a frozen or remote model that is only asked; nothing can be trained then.
        strategies: how instructions are come to, by name; evaluated side by side on the same episodes.
        baseline: the strategy that the others are paired with.
        prompts: ``compact`` for a model trained on demonstrations, ``default`` for one that follows instructions.
        prompt_folder: own prompt files over the packaged ones.
        outcomes: folder of outcomes. A test that finds its own outcomes there goes on from them; None: a new one in the
            run folder.
        drafts: folder for the baseline's drafts beside the experts' moves (needs ``experts`` of the data), from which a
            critic learns; None: not kept.
        oversight: what the agent may touch and do in an episode, and what it must ask :meth:`approve` for; None: it is
            left alone, which is for sealed pages only.
        films: episodes per strategy whose screenshots are kept for film strips.
        rows: sequences generated at once by the own network.
        tuning, lora, optimizer, ce_chunk, activation_checkpointing: see the base class.

    Raises:
        ValueError: neither or both of model and backend, a bad strategy, an unknown baseline.
    """

    task = "browser"

    def __init__(
        self,
        model: ModelSpec | None = None,
        backend: Backend | None = None,
        strategies: dict[str, Strategy] | None = None,
        baseline: str = "direct",
        prompts: str = "compact",
        prompt_folder: str | None = None,
        outcomes: str | None = None,
        drafts: str | None = None,
        oversight: Oversight | None = None,
        films: int = 0,
        rows: int = 64,
        tuning: Tuning = "full",
        lora: LoraSpec | None = None,
        optimizer: OptimizerSpec | None = None,
        ce_chunk: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        if (model is None) == (backend is None):
            raise ValueError("RCIAgent: needs exactly one of model (trained here) and backend (only asked)")
        if model is None:
            model = ModelSpec(config={})  # never built
        super().__init__(model, tuning, lora, optimizer, ce_chunk, activation_checkpointing)
        given = strategies or {"direct": Strategy(erci=-1, irci=0, state_grounding=False)}
        self.strategies = {name: one if isinstance(one, Strategy) else Strategy(**one) for name, one in given.items()}
        for name, strategy in self.strategies.items():
            strategy.check(name)
        if baseline not in self.strategies:
            raise ValueError(f"RCIAgent: baseline '{baseline}' is none of the strategies {', '.join(self.strategies)}")
        if films < 0 or rows < 1:
            raise ValueError(f"RCIAgent: want films >= 0 and rows >= 1, got {films} and {rows}")
        self.oversight = Oversight(**oversight) if isinstance(oversight, dict) else oversight
        if self.oversight is not None:
            self.oversight.check("RCIAgent")
        self.backend, self.baseline, self.films, self.rows = backend, baseline, films, rows
        self.library = PromptLibrary(prompts, prompt_folder)
        self._outcome_folder = None if outcomes is None else Path(outcomes)
        self._drafts = None if drafts is None else Path(drafts)
        self._files: OutcomeFiles | None = None
        self._table: Tensor | None = None
        self._samples: list[EpisodeSample] = []
        self._exact = [0.0, 0.0, 0.0, 0.0]
        self._seconds = {"generate": 0.0, "browser": 0.0, "all": 0.0}
        self._asked: Backend | None = None
        # plain values only, and nothing that a backend may hold (a key)
        self.hparams["strategies"] = {name: asdict(one) for name, one in self.strategies.items()}
        self.hparams["oversight"] = None if self.oversight is None else asdict(self.oversight)
        self.hparams["baseline"], self.hparams["prompts"] = baseline, prompts
        self.hparams["backend"] = None if backend is None else backend.identity

    # ------------------------------------------------------------------------------------------------------- life cycle

    def configure_callbacks(self) -> list[Any]:
        """Refuse to train a backend: asked before the data are prepared, so that nothing is recorded in vain."""
        if self.backend is not None and self.trainer.state.fn == "fit":
            raise ValueError(
                f"RCIAgent: the backend {self.backend.identity} is only asked and has nothing to train; use the verb "
                "test, or give 'model' in place of 'backend' to train one"
            )
        return []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            return
        if not isinstance(self.trainer.datamodule, ProvidesPages):  # type: ignore[attr-defined]
            raise ValueError("RCIAgent: the data have no browser pages; use datamodules.BrowserDataModule")
        folder = self.trainer.log_dir  # a collective: asked on all ranks
        if self._outcome_folder is None:
            self._outcome_folder = Path(folder or self.trainer.default_root_dir) / "outcomes"

    @property
    def pages(self) -> Any:
        """The datamodule, as :class:`~modules.contracts.browsing.ProvidesPages`."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        if self.backend is None:
            super().configure_model()

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.backend is None else None

    # -------------------------------------------------------------------------------------------------------- training

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss, and whether each response is what the model would most likely say, given its beginning."""
        super().validation_step(batch, batch_idx)
        hidden = self.network(batch["input_ids"], document_ids=batch.get("document_ids", None))
        labels = batch["labels"]
        counted = labels != -100
        right = torch.zeros_like(counted)
        right[counted] = self.network.logits(hidden[counted]).argmax(-1) == labels[counted]
        whole = (right | ~counted).all(1) & counted.any(1)
        found = (right.sum(), counted.sum(), whole.sum(), counted.any(1).sum())
        self._exact = [mine + float(more) for mine, more in zip(self._exact, found, strict=True)]

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        sums = torch.tensor(self._exact, dtype=torch.float64, device=self.device)
        self._exact = [0.0, 0.0, 0.0, 0.0]
        tokens, counted, whole, rows = self.all_ranks_sum(sums).tolist()
        if rows:
            self.log("val/token_accuracy", tokens / counted, sync_dist=True)
            self.log("val/exact", whole / rows, prog_bar=True, sync_dist=True)

    # ------------------------------------------------------------------------------------------------------ evaluation

    def on_test_epoch_start(self) -> None:
        self._samples, self._table = [], None
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._asked = self.backend if self.backend is not None else self._own_backend()
        tasks = list(self.pages.tasks)
        identity = canonical_digest(
            {
                "backend": self._asked.identity,
                "strategies": {name: asdict(one) for name, one in sorted(self.strategies.items())},
                "prompts": self.library.digest(tasks, self.pages.action_prompts),
                "seed": global_seed(),
                "pages": dict(self.pages.digest()),
                **({} if self.oversight is None else {"oversight": asdict(self.oversight)}),
            }
        )[:16]
        assert self._outcome_folder is not None
        self._files = OutcomeFiles(self._outcome_folder, identity, self.global_rank)
        if self._drafts is not None:
            repair_lines(self._drafts / f"rank-{self.global_rank}.jsonl")
        self.trainer.strategy.barrier("outcomes read")  # before any rank appends to them
        if self._files.known:
            rank_zero_info(f"{len(self._files.known)} outcomes in {self._outcome_folder} stand; the rest is played")
        self._agent = Agent(self.library, self.pages.action_prompts, global_seed(), self.oversight)
        self._mine: set[Key] = set()

    def _own_backend(self) -> Backend:
        from modules.language.backends.local import NetworkBackend

        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        tokenizer = self.data_tokenizer()
        if tokenizer is None:
            raise ValueError("RCIAgent: the data bring no tokenizer; give data.tokenizer, the model's own folder")
        return NetworkBackend(self.network, tokenizer, self.rows, identity=f"network {digest.hexdigest()[:16]}")

    def test_step(self, batch: Sequence[Mapping[str, str]], batch_idx: int) -> None:
        """Play the episodes of a batch that have no outcome yet, with every strategy."""
        files = self._files
        assert files is not None
        specs = [EpisodeSpec(item["task"], item["seed"]) for item in batch]
        start = time.perf_counter()
        for name, strategy in self.strategies.items():
            todo = []
            for spec in specs:
                self._mine.add((name, spec.task, spec.seed))
                if (name, spec.task, spec.seed) not in files.known:
                    todo.append(spec)
            filmed = max(0, self.films - sum(sample.title.startswith(f"{name} ") for sample in self._samples))
            loops = (
                self._agent.episode(name, strategy, spec, film=number < filmed) for number, spec in enumerate(todo)
            )
            for _, record in drive(loops, self.pages.slots, self._handlers()):
                self._keep(record)
        self._seconds["all"] += time.perf_counter() - start

    def _handlers(self) -> dict[type, Any]:
        pages, asked = self.pages, self._asked
        assert asked is not None

        def timed(kind: str, work: Any) -> Any:
            def run(effects: Any) -> Any:
                start = time.perf_counter()
                found = work(effects)
                self._seconds[kind] += time.perf_counter() - start
                return found

            return run

        def by_slot(work: Any, value: Any) -> Any:
            def run(effects: Any) -> list[Any]:
                found = work({slot: value(effect) for slot, effect in effects})
                return [found[slot] for slot, _ in effects]

            return timed("browser", run)

        return {
            Request: timed("generate", lambda effects: answered(asked, [request for _, request in effects])),
            Reset: by_slot(pages.reset_pages, lambda effect: effect.spec),
            Act: by_slot(pages.step_pages, lambda effect: effect.instruction),
            Probe: by_slot(pages.probe_pages, lambda effect: effect.instruction),
            Confirm: lambda effects: [self.approve(effect) for _, effect in effects],
            Film: by_slot(lambda slots: pages.screenshots(list(slots)), lambda effect: effect),
        }

    def approve(self, asked: Confirm) -> bool:
        """Whether an irreversible instruction may be carried out; override it to ask a person."""
        return self.oversight is None or self.oversight.approve

    def _keep(self, record: Record) -> None:
        """Drafts first: an outcome on disk says that all of its episode is."""
        result = record.result
        if self._drafts is not None and result.strategy == self.baseline and record.drafts:
            self._drafts.mkdir(parents=True, exist_ok=True)
            with open(self._drafts / f"rank-{self.global_rank}.jsonl", "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in record.drafts)
        assert self._files is not None
        self._files.add(result)
        shown = sum(sample.title.startswith(f"{result.strategy} ") for sample in self._samples)
        if record.frames or shown < _SHOWN:
            verdict = "solved" if result.strict else f"reward {result.reward:g} ({result.reason})"
            title = f"{result.strategy} {result.task} {result.seed}: {verdict}"
            self._samples.append(EpisodeSample(title, "\n\n".join(record.transcript), tuple(record.frames)))

    def on_test_epoch_end(self) -> None:
        """Sum over ranks, once, and log."""
        assert self._files is not None
        names, tasks = list(self.strategies), list(self.pages.tasks)
        mine = [self._files.known[key] for key in sorted(self._mine)]
        table = tabulate(mine, names, tasks, self.baseline).to(self.device)
        self._table = self.all_ranks_sum(table).cpu()
        for name, value in metrics(self._table, names, tasks, self.baseline).items():
            self.log(f"test/{name}", value, sync_dist=True)
        played = sum(self._seconds.values())
        if played and mine:
            for kind in ("generate", "browser"):
                self.log(f"test/{kind}_ms", 1e3 * self._seconds[kind] / len(mine), sync_dist=True)
            self.log("test/episodes_per_second", len(mine) / max(self._seconds["all"], 1e-9), sync_dist=True)

    def teardown(self, stage: str) -> None:
        if self.backend is not None:
            self.backend.close()

    # ------------------------------------------------------------------------------------------------------- contracts

    def assurance_subject(self) -> Subject:
        from modules.rci.assurance import assurance_subject

        backend = self.backend
        if backend is None:
            from modules.language.backends.local import NetworkBackend

            tokenizer = self.data_tokenizer()
            if tokenizer is None:
                raise AssuranceError(
                    "RCIAgent: the data bring no tokenizer; give data.tokenizer, the model's own folder"
                )
            backend = NetworkBackend(self.network, tokenizer, self.rows)
        asked = backend
        return assurance_subject(self, self.pages, asked, lambda requests: answered(asked, requests))

    def training_instructions(self) -> Sequence[PlantedInstruction]:
        """Of the injection cases' training split; nothing is measured by them."""
        from modules.rci.assurance import training_instructions

        return training_instructions()

    def work_per_batch(self, batch: Any) -> int:
        return batch["input_ids"].numel() if isinstance(batch, TensorDict) else 0

    def digest(self) -> dict[str, str]:
        return super().digest() if self.backend is None else {"backend": self.backend.identity}

    def summary_rows(self) -> dict[str, str]:
        rows = super().summary_rows() if self.backend is None else {"model": self.backend.identity}
        if self._table is not None:
            for name, row in zip(self.strategies, self._table.sum(1).tolist(), strict=True):
                named = dict(zip(FIELDS, row, strict=True))
                rows[name] = (
                    f"{named['strict'] / max(1, named['episodes']):.1%} of {named['episodes']:.0f} episodes solved, "
                    f"{named['calls'] / max(1, named['episodes']):.1f} calls each"
                )
        return rows

    def episode_rates(self) -> dict[str, dict[str, tuple[int, int]]]:
        if self._table is None:
            return {}
        strict, episodes = FIELDS.index("strict"), FIELDS.index("episodes")
        return {
            task: {
                name: (int(self._table[number, place, strict]), int(self._table[number, place, episodes]))
                for number, name in enumerate(self.strategies)
            }
            for place, task in enumerate(self.pages.tasks)
        }

    def episode_samples(self) -> list[EpisodeSample]:
        return sorted(self._samples, key=lambda sample: not sample.frames)
