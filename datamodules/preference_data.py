"""Preferences between two responses, for training reward models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from datamodules.dialogue_data import SPLITS, DialogueDataModule, Split
from datamodules.text.dialogue_tokens import Batches, Ragged, encode_prompts, encode_replies
from datamodules.text.permutation import Permutation, derive_keys
from datamodules.text.preferences import PreferencePair, pairs_from_replies, read_preferences
from datamodules.text.tokenizer import TextTokenizer
from modules.contracts import PromptSample, ReplyPair


class EncodedPairs:
    """Prompts with their better and worse responses as token ids."""

    def __init__(
        self, pairs: list[PreferencePair], tokenizer: TextTokenizer, max_prompt_tokens: int, max_response_tokens: int
    ) -> None:
        self.eod_id = tokenizer.eod_id
        prompts = encode_prompts([pair.prompt for pair in pairs], tokenizer, max_prompt_tokens)

        def texts(responses: list[str]) -> Ragged:
            replies = encode_replies(responses, tokenizer, max_response_tokens)
            return Ragged([prompt + reply for prompt, reply in zip(prompts, replies, strict=True)])

        self.chosen, self.rejected = texts([pair.chosen for pair in pairs]), texts([pair.rejected for pair in pairs])
        self.margin = np.array([pair.margin for pair in pairs], dtype=np.float32)

    def __len__(self) -> int:
        return len(self.margin)

    def targets(self, rows: np.ndarray) -> int | None:
        return None

    def batch(self, rows: np.ndarray) -> TensorDict:
        """The rows as a batch; numbers past the end give rows that are not ``counted``."""
        present = rows < len(self)
        inside = np.where(present, rows, 0)
        content: dict[str, Any] = {"margin": self.margin[inside], "counted": present}
        content["chosen_ids"], content["chosen_length"] = self.chosen.padded(inside, self.eod_id)
        content["rejected_ids"], content["rejected_length"] = self.rejected.padded(inside, self.eod_id)
        return TensorDict({name: torch.from_numpy(value) for name, value in content.items()}, batch_size=[rows.size])


class PreferenceDataModule(DialogueDataModule):
    """Pairs of a better and a worse response to the same prompt.

    A batch is a TensorDict ``[B]``: ``chosen_ids``, ``rejected_ids`` int64 ``[B, T]`` (prompt and response, padded on
    the right; two widths), ``chosen_length``, ``rejected_length`` int64 ``[B]``, ``margin`` float32 ``[B]`` and
    ``counted`` bool ``[B]`` (False: the row only fills a held-out batch up).

    Args:
        pairs: JSON Lines file of training pairs, objects with ``prompt``, ``chosen``, ``rejected`` and perhaps
            ``margin``; ``null``: pairs made from the dialogues, in which the human reply is better than another
            dialogue's, or than itself spoilt. With a file, ``tokenizer`` must be a directory (the policy's), and the
            dialogues are not read.
        val_pairs, test_pairs: such files of held-out pairs; without ``val_pairs``, ``val_fraction`` of the training
            pairs is kept for validation.
        pairs_seed: of the pairs made from dialogues.
        dialogues: everything that :class:`DialogueDataModule` takes, but ``task``.

    Raises:
        ValueError, FileNotFoundError: wrong arguments, missing or damaged files; one line, before any training.
    """

    def __init__(
        self,
        pairs: str | None = None,
        val_pairs: str | None = None,
        test_pairs: str | None = None,
        pairs_seed: int = 0,
        **dialogues: Any,
    ) -> None:
        super().__init__(task="preference", **dialogues)  # type: ignore[arg-type]
        self.files: dict[Split, str | None] = {"train": pairs, "val": val_pairs, "test": test_pairs}
        self.pairs_seed = pairs_seed
        self._pairs: dict[Split, list[PreferencePair]] = {}
        if pairs is None and (val_pairs is not None or test_pairs is not None):
            raise ValueError("PreferenceDataModule: val_pairs and test_pairs need pairs")
        if pairs is not None and not isinstance(self.tokenizer_spec, str):
            raise ValueError("PreferenceDataModule: with pairs, tokenizer must be a directory: the policy's")
        if pairs is not None and val_pairs is None and not 0 < self.options["val_fraction"] < 1:
            raise ValueError("PreferenceDataModule: without val_pairs, val_fraction must be in (0, 1)")
        if pairs_seed < 0:
            raise ValueError(f"PreferenceDataModule: pairs_seed must be >= 0, got {pairs_seed}")
        files = {"pairs": pairs, "val_pairs": val_pairs, "test_pairs": test_pairs, "pairs_seed": pairs_seed}
        self.save_hyperparameters({**self.hparams, **files}, logger=False)

    def _find_samples(self) -> tuple[dict[Split, list[PromptSample]], list[str]]:
        if self.files["train"] is None:
            return super()._find_samples()
        pairs: dict[Split, list[PreferencePair]] = {
            split: [] if file is None else read_preferences(Path(file)) for split, file in self.files.items()
        }
        if self.files["val"] is None:
            size = len(pairs["train"])
            order = Permutation(size, derive_keys("preferences", "validation"))(np.arange(size))
            kept = order >= max(1, round(self.options["val_fraction"] * size))
            pairs["val"] = [pair for pair, keep in zip(pairs["train"], kept, strict=True) if not keep]
            pairs["train"] = [pair for pair, keep in zip(pairs["train"], kept, strict=True) if keep]
            if not pairs["train"]:
                raise ValueError(f"PreferenceDataModule: {self.files['train']} has too few pairs to keep some back")
        for split in ("val", "test"):
            pairs[split] = pairs[split][: self.options[f"{split}_samples"]]
        self._pairs = pairs
        return {split: [PromptSample(pair.prompt, pair.chosen) for pair in pairs[split]] for split in SPLITS}, []

    def _encode(self, split: Split, samples: list[PromptSample]) -> tuple[Batches, Any]:
        pairs = self._pairs.get(split) or pairs_from_replies(samples, f"{self.pairs_seed}/{split}")
        if not pairs:
            raise ValueError(f"PreferenceDataModule: no {split} reply can be made worse")
        options = self.options
        encoded = EncodedPairs(pairs, self._tokenizer, options["max_prompt_tokens"], options["max_response_tokens"])
        return encoded, [list(astuple(pair)) for pair in pairs]

    @property
    def seed_of_pairs(self) -> int:  # type: ignore[override]
        """Of the pairs made from dialogues."""
        return self.pairs_seed

    def pairs(self, split: str) -> Sequence[ReplyPair]:
        """Those of the files, or else made from the dialogues: what the loaders' batches hold."""
        if self.files["train"] is None:
            return super().pairs(split)
        samples = self.samples(split)
        return [ReplyPair(one, pair.rejected) for one, pair in zip(samples, self._pairs[split], strict=True)]  # type: ignore[index]

    def licences(self) -> Mapping[str, str]:
        """Source of the pairs -> its licence."""
        if self.files["train"] is None:
            return super().licences()
        return {f"pairs in {Path(self.files['train']).name}": self.options["licence"]}

    def describe(self) -> dict[str, str]:
        """Keys, dtypes and shapes of a training batch on this rank."""
        row = super().describe()["prompt_length"]
        text = f"{row[:-1]}, <={self.seq_len}]"
        margin = {"margin": row.replace("int64", "float32"), "counted": row.replace("int64", "bool")}
        return {"chosen_ids": text, "chosen_length": row, "rejected_ids": text, "rejected_length": row, **margin}
