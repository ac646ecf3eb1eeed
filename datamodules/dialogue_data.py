"""Dialogues as prompts to reply to, as replies to imitate, and as utterances to classify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from tensordict import TensorDict

from datamodules.text.dialogue_tokens import (
    TASKS,
    Batches,
    DialogueHeldOutLoader,
    DialogueTokenizer,
    DialogueTrainLoader,
    EncodedSamples,
    Ragged,
    Task,
    encode_prompts,
    encode_replies,
    prepare_tokenizer,
    tokenizer_folder,
)
from datamodules.text.dialogues import (
    END_OF_UTTERANCE,
    Dialogue,
    drop_duplicates,
    last_utterance,
    normalise_utterance,
    prompt_text,
    read_dialogues,
    reply_samples,
)
from datamodules.text.loader import (
    StreamPosition,
    align_batch_progress,
    check_epoch_length,
    micro_batch_size,
    position_state,
    restore_position,
    training_steps,
)
from datamodules.text.permutation import Permutation, derive_keys
from datamodules.text.preferences import pairs_from_replies
from datamodules.text.specs import as_spec
from datamodules.text.synthetic_dialogues import SyntheticDialogue
from datamodules.text.tokenizer import TextTokenizer
from modules.contracts import PromptSample, ReplyPair
from modules.files import canonical_digest

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class DialogueDataModule(LightningDataModule):
    """DailyDialog (Li et al. 2017) or synthetic dialogues (Moskovitz et al. 2024, appendix: last utterances, reply).

    A batch is a TensorDict ``[B]``, int64 throughout, padded on the right to its longest row:

    - ``task: prompts`` (contract ``ProvidesPrompts``): ``prompt_ids`` ``[B, P]``, ``prompt_length`` ``[B]``, ``index``
      ``[B]`` into ``samples(split)``.
    - ``task: sft``: ``input_ids`` and ``labels`` ``[B, T]``: ``labels[t]`` is the token after ``input_ids[t]``, -100 on
      prompt and padding; training batches also ``step_targets`` ``[B]``, counted labels of the whole optimiser step.
    - ``task: intent``: ``prompt_ids``, ``prompt_length`` (the last utterance only), ``reply_ids`` ``[B, R]``,
      ``reply_length`` ``[B]``, ``label`` ``[B]``: the reply's act.

    Rows that only fill a held-out batch up have ``index`` -1, labels of -100. Which rows step s trains on is a pure
    function of s: the same for every number of ranks and after every resume. A dialogue of a test split that also
    occurs in a validation or training split is left out there, likewise one of a validation split in training.

    Args:
        path: folder of splits, each with ``dialogues.txt``, ``dialogues_act.txt``, ``dialogues_emotion.txt``; ``null``:
            :class:`SyntheticDialogue`, which needs no files and has the splits train, validation and test.
        train_splits, val_splits, test_splits: names of split folders, as a list or with commas between them. Without
            ``val_splits``, ``val_fraction`` of the training dialogues are kept for validation.
        val_fraction: see ``val_splits``; chosen by a fixed key, the same for every ``seed``.
        context_size: utterances of a prompt, at most.
        min_context: utterances before a reply, at least; ``null``: ``context_size``.
        max_prompt_tokens: a longer prompt loses its beginning.
        max_response_tokens: end of reply included; a longer reply is cut.
        tokenizer: one to train on the training dialogues, or a Hugging Face directory.
        cache_dir: where trained tokenizers are kept; safe to delete.
        batch_size: samples per optimiser step over all ranks and accumulated micro-batches.
        eval_batch_size: held-out samples per batch over all ranks; ``null``: ``batch_size``.
        val_samples, test_samples: a fixed part of the held-out samples, the same for every ``seed``; ``null``: all.
        task: what a batch holds.
        seed: of the order of samples in each epoch; synthetic dialogues and held-out samples do not depend on it.
        synthetic_dialogues: number of synthetic training dialogues; an eighth as many for validation, and for test.
        synthetic_seed: of the synthetic dialogues.
        mismatched: a line with another number of utterances than of labels is an error, or is skipped.
        lowercase: lower-case all text.
        licence: of the dialogues at ``path``, for the model's card; synthetic ones are CC0-1.0.
        num_workers: loader processes; 0 is right for tokens in memory.

    Raises:
        ValueError, FileNotFoundError: wrong arguments, missing or damaged files; one line, before any training.
    """

    def __init__(
        self,
        path: str | None = None,
        train_splits: str | list[str] = "train",
        val_splits: str | list[str] = "validation",
        test_splits: str | list[str] = "test",
        val_fraction: float = 0.1,
        context_size: int = 5,
        min_context: int | None = None,
        max_prompt_tokens: int = 128,
        max_response_tokens: int = 20,
        tokenizer: str | DialogueTokenizer = DialogueTokenizer(),  # noqa: B008  (frozen)
        cache_dir: str = ".cache/rlhf",
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_samples: int | None = None,
        test_samples: int | None = None,
        task: Literal["prompts", "sft", "intent"] = "prompts",
        seed: int = 0,
        synthetic_dialogues: int = 3000,
        synthetic_seed: int = 0,
        mismatched: Literal["error", "skip"] = "error",
        lowercase: bool = True,
        licence: str = "unknown",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        options = {
            "path": path, "train_splits": _names(train_splits), "val_splits": _names(val_splits),
            "test_splits": _names(test_splits), "val_fraction": val_fraction, "context_size": context_size,
            "min_context": context_size if min_context is None else min_context,
            "max_prompt_tokens": max_prompt_tokens, "max_response_tokens": max_response_tokens,
            "batch_size": batch_size, "eval_batch_size": eval_batch_size or batch_size, "val_samples": val_samples,
            "test_samples": test_samples, "task": task, "seed": seed, "synthetic_dialogues": synthetic_dialogues,
            "synthetic_seed": synthetic_seed, "mismatched": mismatched, "lowercase": lowercase, "licence": licence,
        }  # fmt: skip
        self.options: dict[str, Any] = options
        self.tokenizer_spec = tokenizer if isinstance(tokenizer, str) else as_spec(DialogueTokenizer, tokenizer)
        self.task: Task = task
        self.cache_dir, self.batch_size, self.seed, self.num_workers = Path(cache_dir), batch_size, seed, num_workers
        self._check()
        self._samples: dict[Split, list[PromptSample]] = {}
        self._encoded: dict[str, Batches] = {}
        self._digests: dict[str, str] = {}
        self._accumulated: int | None = None
        spec = tokenizer if isinstance(tokenizer, str) else asdict(self.tokenizer_spec)  # type: ignore[arg-type]
        # Plain values only: checkpoints must load with weights_only=True.
        self.save_hyperparameters({**options, "tokenizer": spec}, logger=False)

    def _check(self) -> None:
        options = self.options
        for key in ("max_prompt_tokens", "max_response_tokens", "batch_size", "eval_batch_size", "synthetic_dialogues"):
            if options[key] < 1:
                raise ValueError(f"DialogueDataModule: {key} must be >= 1, got {options[key]}")
        for key in ("val_samples", "test_samples"):
            if options[key] is not None and options[key] < 1:
                raise ValueError(f"DialogueDataModule: {key} must be >= 1, got {options[key]}")
        if not 1 <= options["min_context"] <= options["context_size"]:
            raise ValueError(
                f"DialogueDataModule: want 1 <= min_context <= context_size, got {options['min_context']} and "
                f"{options['context_size']}"
            )
        if options["seed"] < 0 or options["synthetic_seed"] < 0 or self.num_workers < 0:
            raise ValueError("DialogueDataModule: seed, synthetic_seed and num_workers must be >= 0")
        if self.task not in TASKS:
            raise ValueError(f"DialogueDataModule: task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if options["mismatched"] not in ("error", "skip"):
            raise ValueError(f"DialogueDataModule: mismatched must be 'error' or 'skip', got {options['mismatched']!r}")
        if not options["train_splits"]:
            raise ValueError("DialogueDataModule: train_splits is empty")
        if not options["val_splits"] and not 0 < options["val_fraction"] < 1:
            raise ValueError(
                f"DialogueDataModule: without val_splits, val_fraction must be in (0, 1), got {options['val_fraction']}"
            )
        for key in ("val_splits", "test_splits"):
            shared = sorted(set(options["train_splits"]) & set(options[key]))
            if shared:
                raise ValueError(f"DialogueDataModule: split {shared[0]!r} is in train_splits and in {key}")
        if options["path"] is None:
            for name in options["train_splits"] + options["val_splits"] + options["test_splits"]:
                if name not in SyntheticDialogue.splits:
                    raise ValueError(
                        f"DialogueDataModule: synthetic dialogues (path: null) have no split {name!r}; there are "
                        f"{', '.join(SyntheticDialogue.splits)}"
                    )
        if not isinstance(self.tokenizer_spec, str):
            self.tokenizer_spec.check()

    # ---------------------------------------------------------------- preparation

    def _read(self, names: Sequence[str]) -> list[Dialogue]:
        options, found = self.options, []
        for name in names:
            if options["path"] is not None:
                found += read_dialogues(
                    options["path"], name, mismatched=options["mismatched"], lowercase=options["lowercase"]
                )
            else:
                count = options["synthetic_dialogues"]
                count = count if name == "train" else max(1, count // 8)
                found += SyntheticDialogue(options["synthetic_seed"]).dialogues(name, count)
        return found

    def dialogues(self) -> dict[Split, list[Dialogue]]:
        """The dialogues of each split, duplicates between splits dropped."""
        options = self.options
        test = self._read(options["test_splits"])
        val = self._read([name for name in options["val_splits"] if name not in options["test_splits"]])
        val = drop_duplicates(val, known=test)
        both = self._read([name for name in options["val_splits"] if name in options["test_splits"]])
        train = drop_duplicates(self._read(options["train_splits"]), known=[*test, *val])
        if not options["val_splits"]:
            order = Permutation(len(train), derive_keys("dialogues", "validation"))(np.arange(len(train)))
            kept = order >= max(1, round(options["val_fraction"] * len(train)))
            val = [dialogue for dialogue, keep in zip(train, kept, strict=True) if not keep]
            train = [dialogue for dialogue, keep in zip(train, kept, strict=True) if keep]
        return {"train": train, "val": both + val, "test": test}

    def prepare_data(self) -> None:
        """Train the tokenizer once (one process per node; others on shared storage wait at a lock)."""
        if not isinstance(self.tokenizer_spec, str):
            prepare_tokenizer(self.tokenizer_spec, _texts(self.dialogues()["train"]), self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the dialogues; a second call does nothing.

        Raises:
            FileNotFoundError: ``prepare_data`` has not run for this configuration.
            ValueError: a split without samples.
        """
        if self._samples:
            return
        samples, texts = self._find_samples()
        if isinstance(self.tokenizer_spec, str):
            self._tokenizer = TextTokenizer(self.tokenizer_spec)
        else:
            folder = tokenizer_folder(self.tokenizer_spec, texts, self.cache_dir)
            if not folder.is_dir():
                raise FileNotFoundError(f"DialogueDataModule: {folder} does not exist; call prepare_data() first")
            self._tokenizer = TextTokenizer(folder)
        for split, found in samples.items():
            if found:
                self._encoded[split], content = self._encode(split, found)
                self._digests[split] = canonical_digest(content)
        self._position = StreamPosition([1.0], self.batch_size)
        self._samples = dict(samples)
        sizes = ", ".join(f"{len(samples[split])} {split}" for split in SPLITS)
        rank_zero_info(f"dialogues: {sizes} samples, {self._tokenizer.vocab_size} tokens in the vocabulary")

    def _find_samples(self) -> tuple[dict[Split, list[PromptSample]], list[str]]:
        """Samples of each split, and the texts that a tokenizer is trained on."""
        options, dialogues = self.options, self.dialogues()
        samples: dict[Split, list[PromptSample]] = {}
        for split in SPLITS:
            found = reply_samples(dialogues[split], options["context_size"], options["min_context"])
            if not found and (split != "test" or options["test_splits"]):
                raise ValueError(
                    f"DialogueDataModule: no {split} dialogue has {options['min_context']} utterances before another; "
                    "lower min_context"
                )
            limit = options.get(f"{split}_samples")
            if limit is not None and limit < len(found):
                order = Permutation(len(found), derive_keys("dialogues", split))(np.arange(limit))
                found = [found[row] for row in sorted(order.tolist())]
            samples[split] = found
        return samples, _texts(dialogues["train"])

    def _encode(self, split: Split, samples: list[PromptSample]) -> tuple[Batches, Any]:
        """Rows to make batches of, and what identifies their content, in plain values."""
        encoded = EncodedSamples(
            samples, self._tokenizer, self.task, self.options["max_prompt_tokens"], self.options["max_response_tokens"]
        )
        return encoded, [[one.prompt, one.reference, *one.labels.values()] for one in samples]

    def _need_setup(self) -> None:
        if not self._samples:
            raise RuntimeError("DialogueDataModule: call prepare_data() and setup() first")

    # ---------------------------------------------------------------- what the data are

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer in use (``directory``, ``hash``, ``vocab_size``, ``eod_id``)."""
        self._need_setup()
        return self._tokenizer

    @property
    def seq_len(self) -> int:
        """Most tokens of a prompt and its reply."""
        return self.options["max_prompt_tokens"] + self.options["max_response_tokens"]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that go once through all training samples, rounded up."""
        return -(-len(self.samples("train")) // self.batch_size)

    def samples(self, split: str) -> Sequence[PromptSample]:
        """Prompt, human reply and labels (``act``, ``emotion``, from 0) of every sample of train, val or test.

        Raises:
            ValueError: another split.
        """
        self._need_setup()
        if split not in SPLITS:
            raise ValueError(f"DialogueDataModule: no split {split!r}; there are {', '.join(SPLITS)}")
        return self._samples[split]

    natural_language, endless = True, False
    seed_of_pairs = 0

    @property
    def held_out(self) -> str:
        """``test``, or ``val`` where there is no test split."""
        return "test" if self.samples("test") else "val"

    def as_prompt(self, text: str, finished: bool = True) -> str:
        """``text`` written as the dialogues are; ``finished``: as an utterance, so that what follows is a reply."""
        plain = normalise_utterance(text, self.options["lowercase"])
        return prompt_text([plain]) if finished else plain

    def last_said(self, prompt: str) -> tuple[str, str]:
        """What stands before the last utterance, and that utterance."""
        last = last_utterance(prompt)
        before = prompt.removesuffix(f" {END_OF_UTTERANCE}").removesuffix(last)
        return f"{before} " if before else "", last.strip()

    def prompt_batch(self, prompts: Sequence[str]) -> TensorDict:
        """``prompt_ids`` and ``prompt_length`` of prompts, cut at the beginning as the data's own.

        Raises:
            ValueError: a prompt without tokens.
        """
        encoded = Ragged(encode_prompts(prompts, self.tokenizer, self.options["max_prompt_tokens"]))
        ids, length = encoded.padded(np.arange(len(prompts)), self.tokenizer.eod_id)
        content = {"prompt_ids": torch.from_numpy(ids), "prompt_length": torch.from_numpy(length)}
        return TensorDict(content, batch_size=[len(prompts)])

    def reply_tokens(self, replies: Sequence[str]) -> list[list[int]]:
        """Token ids of replies, each ended where that fits."""
        return encode_replies(replies, self.tokenizer, self.options["max_response_tokens"])

    def licences(self) -> Mapping[str, str]:
        """Source of the dialogues -> its licence."""
        if self.options["path"] is None:
            return {"synthetic dialogues": "CC0-1.0"}
        return {f"dialogues in {Path(self.options['path']).name}": self.options["licence"]}

    def pairs(self, split: str) -> Sequence[ReplyPair]:
        """For every reply that can be made worse, the human one and another (:func:`pairs_from_replies`)."""
        samples = self.samples(split)
        known = {(one.prompt, one.reference): one for one in samples}
        made = pairs_from_replies(samples, f"{self.seed_of_pairs}/{split}")
        return [ReplyPair(known[pair.prompt, pair.chosen], pair.rejected) for pair in made]

    def describe(self) -> dict[str, str]:
        """Keys, dtypes and shapes of a training batch on this rank."""
        rows, options = "B", self.options
        if self.trainer is not None:
            rows = str(micro_batch_size(self.batch_size, self.trainer.world_size, self.trainer.accumulate_grad_batches))
        row, prompt = f"int64 [{rows}]", f"int64 [{rows}, <={options['max_prompt_tokens']}]"
        if self.task == "sft":
            tokens = f"int64 [{rows}, <={self.seq_len - 1}]"
            return {"input_ids": tokens, "labels": tokens, "step_targets": row}
        keys = {"prompt_ids": prompt, "prompt_length": row}
        if self.task == "prompts":
            return {**keys, "index": row}
        reply = f"int64 [{rows}, <={options['max_response_tokens']}]"
        return {**keys, "reply_ids": reply, "reply_length": row, "label": row}

    def digest(self) -> dict[str, str]:
        """What every rank must agree on before training."""
        held_out = {f"{split}_data": self._digests.get(split, "") for split in ("val", "test")}
        fields = {**self._identity(), **held_out, "batch_size": self.batch_size}
        return {key: str(value) for key, value in fields.items()}

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> DialogueTrainLoader:
        """This rank's batches from the trainer's current optimiser step to ``max_steps``."""
        self._need_setup()
        trainer: Any = self.trainer
        steps = training_steps(trainer, f"DialogueDataModule ({self.steps_per_epoch} steps are one epoch)")
        loader = DialogueTrainLoader(
            self._encoded["train"],
            self.seed,
            self._position,
            max_steps=steps,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            accumulate=trainer.accumulate_grad_batches,
            steps_done=lambda: trainer.global_step,
            num_workers=self.num_workers,
        )
        check_epoch_length(len(loader), trainer, "DialogueDataModule")
        if self._accumulated is not None:
            align_batch_progress(trainer, self._accumulated)
        return loader

    def val_dataloader(self) -> DialogueHeldOutLoader:
        """Validation samples in their order; every rank has as many rows."""
        return self._held_out("val")

    def test_dataloader(self) -> DialogueHeldOutLoader:
        """Test samples in their order; every rank has as many rows."""
        return self._held_out("test")

    def _held_out(self, split: Split) -> DialogueHeldOutLoader:
        self._need_setup()
        if split not in self._encoded:
            raise ValueError(f"DialogueDataModule: {split}_splits is empty")
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return DialogueHeldOutLoader(
            self._encoded[split],
            batch_size=self.options["eval_batch_size"],
            world_size=world_size,
            rank=rank,
            num_workers=self.num_workers,
        )

    # ---------------------------------------------------------------- position

    def _identity(self) -> dict[str, Any]:
        self._need_setup()
        return {
            "task": self.task,
            "seed": self.seed,
            "tokenizer_hash": self._tokenizer.hash,
            "data": self._digests["train"],
            "max_prompt_tokens": self.options["max_prompt_tokens"],
            "max_response_tokens": self.options["max_response_tokens"],
        }

    def state_dict(self) -> dict[str, Any]:
        """Exact position: the trainer's completed optimiser steps and the samples they took, in plain values."""
        if not self._samples:
            return {}
        return position_state(self._position, self.trainer, self._identity())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            ValueError: the data differ, naming the first field that does.
        """
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            return  # validation and test read held-out samples only
        self._accumulated = restore_position(self._position, state_dict, self._identity(), "trained")


def _names(splits: str | Sequence[str]) -> list[str]:
    names = splits.split(",") if isinstance(splits, str) else splits
    return [name.strip() for name in names if name.strip()]


def _texts(dialogues: Sequence[Dialogue]) -> list[str]:
    return [text for dialogue in dialogues for text in dialogue.utterances]
