"""Continued-pretraining corpora: a weighted, exactly resumable stream of packed windows; held-out text per source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.math_data import task_dataloaders
from datamodules.text.build import CorpusPlan, corpus_table, format_table, load_manifest, prepare, tokenizer_folder
from datamodules.text.decontamination import refuse_test_set
from datamodules.text.disturbance import Disturber
from datamodules.text.excerpts import MeasuredCorpus, licence_of
from datamodules.text.loader import (
    HeldOutLoader,
    StreamPosition,
    TrainLoader,
    align_batch_progress,
    check_epoch_length,
    first_difference,
    micro_batch_size,
    training_steps,
)
from datamodules.text.mixture import given_shares, mixture_weights
from datamodules.text.packing import HeldOutWindows, PackedSource
from datamodules.text.shards import TokenShard
from datamodules.text.specs import (
    DecontaminationSpec,
    DedupSpec,
    EvalSourceSpec,
    SourceSpec,
    TokenizerTraining,
    as_spec,
    check_fraction,
)
from datamodules.text.tasks import TaskItem, TaskSpec, load_tasks
from datamodules.text.tokenizer import TextTokenizer
from modules.contracts.corpora import DisturbsText, TextSplit
from modules.files import canonical_digest
from modules.seeds import global_seed

_COMPARED = ("seed", "seq_len", "shuffle", "weights", "perturbed_share", "perturbations", "sources", "tokenizer_hash")


class CorpusDataModule(MeasuredCorpus, LightningDataModule):
    """Token stream for causal language models (Azerbayev et al. 2024, section 2).

    Batches are TensorDicts of batch size [B]: ``input_ids`` int64 [B, T], ``labels`` int64 [B, T] (``labels[t]`` is the
    token after ``input_ids[t]``), ``source_id`` int64 [B] (index into ``source_names``), and with ``document_mask``
    ``document_ids`` int32 [B, T] (documents of a window counted from 0). Held-out batches mark missing targets -100.

    Which samples step s trains on is a pure function of s: the same for every number of ranks and of accumulated
    micro-batches, and after every resume.

    Args:
        sources: training sources.
        tokenizer: directory with ``tokenizer.json``, or how to train one on the sources.
        cache_dir: where shards are kept; shared by runs, safe to delete.
        seq_len: T, tokens per window.
        batch_size: sequences per optimiser step over all ranks and accumulated micro-batches.
        eval_batch_size: held-out windows per batch over all ranks; None = batch_size / accumulation.
        seed: shuffle seed (held-out documents do not depend on it); None = the run's.
        mixture: ratios of the sources that are not replayed, e.g. ``"2:4:1"``; None = the sources' weights.
        replay: source name -> share of the whole stream, e.g. ``{pile: 0.02, code: 0.03}``.
        shares: source name -> share of the whole stream, for every source; in place of ``weight`` and ``mixture``.
        perturbed_share: of the training windows, whose text is disturbed in one of the module's ways (slips, case,
            blanks, ...); 0 = none. Held-out text never is.
        perturbations: way -> its weight among the disturbed windows; None = all of the module's ways alike.
        holdout_fraction: documents of each source kept for validation, and as many again for test.
        eval_sources: text only measured on.
        selection_set: text on which mixtures are compared (the paper: MATH train); measured at validation.
            An evaluation test set is refused here.
        dedup: see ``DedupSpec``; exact deduplication is on by default.
        decontaminate: see ``DecontaminationSpec``; None = no report.
        max_epochs_per_source: warn, with a table, if the run repeats a source more often.
        document_mask: add ``document_ids``.
        shuffle: False = stored order (for tests and inspection).
        tasks: evaluation tasks served after the held-out text in validation and test, e.g. a few GSM8K items every
            validation; see ``TaskSpec``.
        tasks_batch_size: prompts per task batch over all ranks.
        data_dir: folder that holds ``math/``, for tasks without a ``path``.
        num_workers: loader processes; 0 is right for memory-mapped tokens on a local disk.
        allow_data_change: resume although seed, weights, sources or tokenizer differ from the checkpoint's.

    Raises:
        ValueError, FileNotFoundError: wrong arguments, missing or empty sources; one line, before any training.
    """

    def __init__(
        self,
        sources: list[SourceSpec],
        tokenizer: str | TokenizerTraining,
        cache_dir: str,
        seq_len: int,
        batch_size: int,
        eval_batch_size: int | None = None,
        seed: int | None = 0,
        mixture: str | None = None,
        replay: dict[str, float] | None = None,
        shares: dict[str, float] | None = None,
        perturbed_share: float = 0.0,
        perturbations: dict[str, float] | None = None,
        holdout_fraction: float = 0.005,
        eval_sources: list[EvalSourceSpec] | None = None,
        selection_set: EvalSourceSpec | None = None,
        dedup: DedupSpec | None = None,
        decontaminate: DecontaminationSpec | None = None,
        max_epochs_per_source: float | None = None,
        document_mask: bool = False,
        shuffle: bool = True,
        tasks: list[TaskSpec] | None = None,
        tasks_batch_size: int = 16,
        data_dir: str | None = None,
        num_workers: int = 0,
        allow_data_change: bool = False,
    ) -> None:
        super().__init__()
        training = [as_spec(SourceSpec, source) for source in sources]
        measured = [as_spec(EvalSourceSpec, source) for source in eval_sources or []]
        decontamination = as_spec(DecontaminationSpec, decontaminate) if decontaminate is not None else None
        if selection_set is not None:
            chosen = dataclasses.replace(as_spec(EvalSourceSpec, selection_set), split="validation")
            chosen.check()
            refuse_test_set(chosen, decontamination)
            measured.append(chosen)
        self.plan = CorpusPlan(
            sources=training,
            eval_sources=measured,
            tokenizer=tokenizer if isinstance(tokenizer, str) else as_spec(TokenizerTraining, tokenizer),
            cache_dir=Path(cache_dir),
            holdout_fraction=holdout_fraction,
            dedup=as_spec(DedupSpec, dedup or {}),
            decontaminate=decontamination,
        )
        self.seq_len, self.batch_size, self.eval_batch_size = seq_len, batch_size, eval_batch_size
        self.seed = global_seed() if seed is None else seed
        self.document_mask, self.shuffle = document_mask, shuffle
        self.num_workers, self.allow_data_change = num_workers, allow_data_change
        self.max_epochs_per_source = max_epochs_per_source
        self.tasks = [as_spec(TaskSpec, task) for task in tasks or []]
        self.tasks_batch_size, self.data_dir = tasks_batch_size, data_dir
        self._task_items: dict[str, list[TaskItem]] = {}
        self._mixture, self._replay, self._shares = mixture, dict(replay or {}), dict(shares or {})
        self.perturbed_share, self.perturbations = perturbed_share, dict(perturbations or {})
        self._check()
        self._weights_of([source.name for source in training])  # errors in the mixture show before anything is read
        self._manifest: dict[str, Any] | None = None
        self._packed: dict[str, PackedSource] = {}
        self._held_out: dict[str, dict[str, TokenShard]] = {}
        self._position: StreamPosition | None = None
        self._loaded: dict[str, Any] | None = None
        # Plain values only: checkpoints must load with weights_only=True.
        plain = dataclasses.asdict(self.plan)
        options = {
            "seq_len": seq_len, "batch_size": batch_size, "seed": self.seed, "mixture": mixture, "replay": self._replay,
            "document_mask": document_mask, "shuffle": shuffle, "shares": self._shares,
            "perturbed_share": perturbed_share, "perturbations": self.perturbations,
        }  # fmt: skip
        self.save_hyperparameters({**plain, **options, "cache_dir": str(cache_dir)}, logger=False)

    def _check(self) -> None:
        for key in ("seq_len", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"CorpusDataModule: {key} must be >= 1, got {getattr(self, key)}")
        if self.eval_batch_size is not None and self.eval_batch_size < 1:
            raise ValueError(f"CorpusDataModule: eval_batch_size must be >= 1, got {self.eval_batch_size}")
        if self.seed < 0 or self.num_workers < 0:
            raise ValueError(f"CorpusDataModule: seed, num_workers must be >= 0, got {self.seed}, {self.num_workers}")
        if not 0 <= self.perturbed_share <= 1:
            raise ValueError(f"CorpusDataModule: perturbed_share must be in [0, 1], got {self.perturbed_share}")
        if self._shares and (self._mixture is not None or self._replay):
            raise ValueError("CorpusDataModule: shares say all of the stream: leave mixture and replay out")
        check_fraction("CorpusDataModule: holdout_fraction", self.plan.holdout_fraction)
        if not self.plan.sources:
            raise ValueError("CorpusDataModule: sources is empty")
        names = [source.name for source in (*self.plan.sources, *self.plan.eval_sources)]
        for spec in (*self.plan.sources, *self.plan.eval_sources):
            spec.check()
            if names.count(spec.name) > 1:
                raise ValueError(f"CorpusDataModule: source name {spec.name!r} is used twice")
        for spec in (self.plan.tokenizer, self.plan.dedup, self.plan.decontaminate):
            if spec is not None and not isinstance(spec, str):
                spec.check()

    def _weights_of(self, names: list[str]) -> dict[str, float]:
        """Shares of the training sources ``names`` (those that are present)."""
        if self._shares:
            return given_shares(names, self._shares, [source.name for source in self.plan.sources])
        given = {source.name: source.weight for source in self.plan.sources}
        replay, mixture = self._replay, self._mixture
        absent = {name for name in given if name not in names}
        if absent:
            # Sources left out by `missing: skip`: the full mixture, rescaled to those that are there.
            full = mixture_weights(list(given), given, mixture, replay)
            total = sum(full[name] for name in names)
            return {name: full[name] / total for name in names}
        return mixture_weights(names, given, mixture, replay)

    # ---------------------------------------------------------------- preparation

    def prepare_data(self) -> None:
        """Build missing caches (one process per node; others on shared storage wait at a lock) and print a table."""
        manifest = prepare(self.plan, say=lambda line: print(f"corpus: {line}", flush=True))
        print(corpus_table(manifest), flush=True)

    def setup(self, stage: str | None = None) -> None:
        """Open the shards; cheap, and a second call only repeats the epoch check.

        Raises:
            FileNotFoundError: ``prepare_data`` has not run for this configuration.
            ShardError, TokenizerMismatchError, ValueError: unusable shards, a source shorter than a window.
        """
        if self._manifest is None:
            self._open()
        if stage in (None, "fit") and self.trainer is not None and self.max_epochs_per_source is not None:
            epochs = self.epochs_per_source(max(0, self.trainer.max_steps))
            over = [name for name, count in epochs.items() if count > self.max_epochs_per_source]
            if over:
                rank_zero_warn(
                    f"corpus: more than max_epochs_per_source={self.max_epochs_per_source:g} epochs of "
                    f"{', '.join(over)}\n{self.epoch_table(self.trainer.max_steps)}"
                )

    def _open(self) -> None:
        manifest = load_manifest(self.plan)
        expected = manifest["tokenizer_hash"]
        tokenizer = TextTokenizer(tokenizer_folder(self.plan, manifest))
        order_dir = self.plan.cache_dir / "order"

        def shard(name: str, split: str) -> TokenShard:
            folder = self.plan.cache_dir / manifest["sources"][name]["folder"] / split
            return TokenShard(folder, tokenizer_hash=expected, vocab_size=tokenizer.vocab_size)

        held_out: dict[str, dict[str, TokenShard]] = {"validation": {}, "test": {}}
        packed: dict[str, PackedSource] = {}
        for source in self.plan.sources:
            if source.name not in manifest["sources"]:
                continue
            packed[source.name] = PackedSource(
                shard(source.name, "train"), source.name, self.seq_len, self.seed, order_dir, self.shuffle
            )
            for split in held_out:
                if split in manifest["sources"][source.name]["splits"]:
                    held_out[split][source.name] = shard(source.name, split)
        for source in self.plan.eval_sources:
            if source.name in manifest["sources"]:
                for split in held_out if source.split == "both" else [source.split]:
                    held_out[split][source.name] = shard(source.name, "whole")
        self._tokenizer, self._packed, self._held_out = tokenizer, packed, held_out
        self.weights = self._weights_of(list(packed))
        self._position = StreamPosition(list(self.weights.values()), self.batch_size)
        self._manifest = manifest
        if self.tasks:
            self._task_items = load_tasks(
                self.tasks, self.data_dir, lambda text: len(tokenizer.encode_batch([text])[0])
            )

    def _need_setup(self) -> dict[str, Any]:
        if self._manifest is None:
            raise RuntimeError("CorpusDataModule: call prepare_data() and setup() first")
        return self._manifest

    # ---------------------------------------------------------------- what the corpus is

    @property
    def tokenizer(self) -> TextTokenizer:
        """The corpus' tokenizer (``directory``, ``hash``, ``vocab_size``, ``eod_id``)."""
        self._need_setup()
        return self._tokenizer

    @property
    def source_names(self) -> list[str]:
        """Names by ``source_id``: training sources first, then evaluation sources."""
        self._need_setup()
        extra = [s.name for s in self.plan.eval_sources if any(s.name in held for held in self._held_out.values())]
        return [*self._packed, *extra]

    @property
    def val_names(self) -> list[str]:
        """Source of each validation dataloader."""
        self._need_setup()
        return list(self._held_out["validation"])

    @property
    def test_names(self) -> list[str]:
        """Source of each test dataloader."""
        self._need_setup()
        return list(self._held_out["test"])

    @property
    def task_names(self) -> list[str]:
        """Task of each dataloader after the held-out text's."""
        return [task.name for task in self.tasks]

    @property
    def val_bytes_per_token(self) -> dict[str, float]:
        """UTF-8 bytes per token of each validation source: bits per byte = loss / ln 2 / this."""
        self._need_setup()
        return {name: shard.bytes_per_token for name, shard in self._held_out["validation"].items()}

    @property
    def test_bytes_per_token(self) -> dict[str, float]:
        """UTF-8 bytes per token of each test source."""
        self._need_setup()
        return {name: shard.bytes_per_token for name, shard in self._held_out["test"].items()}

    @property
    def contamination(self) -> dict[str, Any]:
        """Contamination report per training source (None where none was asked for)."""
        return {name: entry["contamination"] for name, entry in self._need_setup()["sources"].items()}

    def _shards(self, split: TextSplit) -> Mapping[str, TokenShard]:
        self._need_setup()
        if split == "train":
            return {name: packed.shard for name, packed in self._packed.items()}
        return self._held_out["test"]

    def stream_shares(self) -> Mapping[str, float]:
        """Training source -> its share of the tokens trained on."""
        self._need_setup()
        return dict(self.weights)

    def licences(self) -> Mapping[str, str]:
        """Training source -> licence of its text."""
        return {source.name: licence_of(source) for source in self.plan.sources if source.name in self._packed}

    def corpus_table(self) -> str:
        """Documents, drops and tokens per source, as text."""
        return corpus_table(self._need_setup())

    def epochs_per_source(self, steps: int) -> dict[str, float]:
        """How often ``steps`` optimiser steps go through each training source."""
        drawn = steps * self.batch_size
        return {name: drawn * self.weights[name] / packed.windows_per_epoch for name, packed in self._packed.items()}

    def epoch_table(self, steps: int) -> str:
        """Tokens, share of the stream and epochs per source, as text."""
        rows = [["source", "train tokens", "share", "epochs"]]
        for name, epochs in self.epochs_per_source(steps).items():
            tokens = self._packed[name].shard.meta["tokens"]
            rows.append([name, f"{tokens:,}", f"{self.weights[name]:.1%}", f"{epochs:.2f}"])
        return format_table(rows)

    def describe(self) -> dict[str, str]:
        """Keys, dtypes and shapes of a training batch on this rank."""
        rows = "B"
        if self.trainer is not None:
            rows = str(micro_batch_size(self.batch_size, self.trainer.world_size, self.trainer.accumulate_grad_batches))
        shape = f"[{rows}, {self.seq_len}]"
        keys = {"input_ids": f"int64 {shape}", "labels": f"int64 {shape}", "source_id": f"int64 [{rows}]"}
        return {**keys, "document_ids": f"int32 {shape}"} if self.document_mask else keys

    def digest(self) -> dict[str, str]:
        """What every rank must agree on before training."""
        state = self._identity()
        fields = {key: str(state[key]) for key in _COMPARED if key != "sources"}
        sources = {f"source {name}": digest for name, digest in state["sources"].items()}
        held_out = {
            f"held-out {split}": canonical_digest({name: shard.meta["sha256"] for name, shard in shards.items()})
            for split, shards in self._held_out.items()
        }
        return {**fields, "batch_size": str(self.batch_size), **sources, **held_out}

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> TrainLoader:
        """This rank's batches from the trainer's current optimiser step to ``max_steps``."""
        self._need_setup()
        trainer: Any = self.trainer
        steps = training_steps(trainer, "CorpusDataModule")
        assert self._position is not None
        loader = TrainLoader(
            list(self._packed.values()),
            self._position,
            max_steps=steps,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            accumulate=trainer.accumulate_grad_batches,
            steps_done=lambda: trainer.global_step,
            document_ids=self.document_mask,
            num_workers=self.num_workers,
            disturber=self._disturber(),
        )
        check_epoch_length(len(loader), trainer, "CorpusDataModule")
        if self._loaded is not None:
            align_batch_progress(trainer, self._loaded["accumulate_grad_batches"])
        return loader

    def _disturber(self) -> Disturber | None:
        if self.perturbed_share == 0:
            return None
        module = getattr(self.trainer, "lightning_module", None)
        if not isinstance(module, DisturbsText):
            raise ValueError(
                f"CorpusDataModule: {type(module).__name__} names no ways to disturb text: set perturbed_share to 0"
            )
        return Disturber(self.perturbed_share, module.disturbances(), self.tokenizer, self.seed, self.perturbations)

    def val_dataloader(self) -> list[Any]:
        """One loader per name in ``val_names``, then one per task."""
        return [*self._held_out_loaders("validation"), *self._task_loaders()]

    def test_dataloader(self) -> list[Any]:
        """One loader per name in ``test_names``, then one per task."""
        return [*self._held_out_loaders("test"), *self._task_loaders()]

    def _task_loaders(self) -> list[Any]:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return task_dataloaders(self._task_items, rank, world_size, self.tasks_batch_size) if self.tasks else []

    def _held_out_loaders(self, split: str) -> list[HeldOutLoader]:
        self._need_setup()
        trainer = self.trainer
        world_size, rank, accumulate = (
            (trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches) if trainer else (1, 0, 1)
        )
        ids = {name: number for number, name in enumerate(self.source_names)}
        return [
            HeldOutLoader(
                HeldOutWindows(shard, name, self.seq_len, self._tokenizer.eod_id),
                ids[name],
                batch_size=self.eval_batch_size or max(1, self.batch_size // accumulate),
                world_size=world_size,
                rank=rank,
                document_ids=self.document_mask,
                num_workers=self.num_workers,
            )
            for name, shard in self._held_out[split].items()
        ]

    # ---------------------------------------------------------------- position

    def _identity(self) -> dict[str, Any]:
        manifest = self._need_setup()
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "shuffle": self.shuffle,
            "weights": dict(self.weights),
            "perturbed_share": self.perturbed_share,
            "perturbations": self.perturbations if self.perturbed_share else {},
            "sources": {name: manifest["sources"][name]["digest"] for name in self._packed},
            "tokenizer_hash": manifest["tokenizer_hash"],
        }

    def state_dict(self) -> dict[str, Any]:
        """Exact position of the stream, in plain values.

        It counts the trainer's completed optimiser steps, not what a loader has read ahead.
        """
        if self._manifest is None or self._position is None:
            return {}
        step = self.trainer.global_step if self.trainer is not None else self._position.step
        blend = self._position.at(max(step, self._position.step))
        names = list(self._packed)
        offsets = dict(zip(names, self._position.offsets, strict=True))
        return {
            **self._identity(),
            "step": self._position.step,
            "consumed_samples": blend.index + sum(offsets.values()),
            "blend_index": blend.index,
            "blend_counts": dict(zip(names, blend.counts, strict=True)),
            "offsets": offsets,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches if self.trainer is not None else 1,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            ValueError: the data differ, naming the first field that does (unless ``allow_data_change``). With a
                tolerated change the blend starts afresh, and each source that is still the same goes on where it was.
        """
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            return  # validation and test read held-out text only
        now = self._identity()
        differs = first_difference(
            {"perturbed_share": 0.0, "perturbations": {}, **state_dict}, now, _COMPARED
        )  # older ones don't say
        if differs and not self.allow_data_change:
            raise ValueError(
                f"checkpoint was trained on other data: {differs}; restore the data, or set "
                f"allow_data_change: true to go on with the new"
            )
        assert self._position is not None
        counts, offsets = state_dict["blend_counts"], state_dict["offsets"]
        if not differs:
            ordered = [counts[name] for name in self._packed], [offsets[name] for name in self._packed]
            self._position.restore(state_dict["step"], state_dict["blend_index"], *ordered)
        else:
            rank_zero_warn(f"resuming on changed data: {differs}")
            same = [name for name in self._packed if state_dict["sources"].get(name) == now["sources"][name]]
            used = [counts[name] + offsets[name] if name in same else 0 for name in self._packed]
            self._position.restore(state_dict["step"], 0, [0] * len(used), used)
        self._loaded = dict(state_dict)
