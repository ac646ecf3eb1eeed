"""Prompts of the GoldProxy problem: an act and a first token, drawn without end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from torch.utils.data import Dataset

from datamodules.text.loader import (
    HeldOutLoader,
    StreamPosition,
    TrainLoader,
    check_epoch_length,
    micro_batch_size,
    training_steps,
)
from datamodules.text.ngrams import mix64
from datamodules.text.permutation import derive_keys
from modules.contracts import PromptSample
from modules.files import canonical_digest

ACTS, SYMBOLS = 2, 40


class SymbolTokenizer:
    """Symbols ``t0`` to ``t39`` (ids 0 to 39), ``act0`` (40) and ``act1`` (41); no token ends a response."""

    vocab_size = SYMBOLS + ACTS
    eod_id = -1

    def __init__(self) -> None:
        self._names = [f"t{symbol}" for symbol in range(SYMBOLS)] + [f"act{act}" for act in range(ACTS)]
        self.hash = canonical_digest(self._names)

    def encode(self, text: str) -> list[int]:
        """Ids of space-separated names. Raises: ValueError for a name that is none."""
        ids = []
        for word in text.split():
            if word not in self._names:
                raise ValueError(f"SymbolTokenizer: {word!r} is none of t0 to t{SYMBOLS - 1}, act0, act1")
            ids.append(self._names.index(word))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self._names[int(token)] for token in ids)


class GoldProxyDataModule(LightningDataModule):
    """Random prompts ``[act, first token]`` for :class:`modules.networks.markov_lm.MarkovLM`.

    Batches follow the contract ``ProvidesPrompts``: ``prompt_ids`` ``[B, 2]``, ``prompt_length`` (2), ``index`` into
    the table of all 80 prompts, which ``samples`` gives for every split; ``labels`` hold the ``act``. The prompts of
    step s are a pure function of the seed and s: the same for every number of ranks and after every resume.

    Args:
        batch_size: prompts per step over all ranks.
        val_samples: prompts of a validation (and of a test), the same at each.
        eval_batch_size: held-out prompts per batch over all ranks; ``null``: ``batch_size``.
        seed: of the training prompts; held-out ones do not depend on it.

    Raises:
        ValueError: a size below 1, a negative seed.
    """

    def __init__(
        self, batch_size: int = 256, val_samples: int = 1024, eval_batch_size: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.batch_size, self.val_samples, self.seed = batch_size, val_samples, seed
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        for key in ("batch_size", "val_samples", "eval_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"GoldProxyDataModule: {key} must be >= 1, got {getattr(self, key)}")
        if seed < 0:
            raise ValueError(f"GoldProxyDataModule: seed must be >= 0, got {seed}")
        self.tokenizer = SymbolTokenizer()
        self._position = StreamPosition([1.0], batch_size)
        self._samples = [
            PromptSample(prompt=f"act{act} t{first}", labels={"act": act})
            for act in range(ACTS)
            for first in range(SYMBOLS)
        ]
        self.save_hyperparameters(logger=False)

    natural_language, endless = False, True
    held_out = "test"

    @property
    def seq_len(self) -> int:
        """Tokens of a prompt."""
        return 2

    def samples(self, split: str) -> Sequence[PromptSample]:
        """All 80 prompts, whatever the split. Raises: ValueError for an unknown split."""
        if split not in ("train", "val", "test"):
            raise ValueError(f"GoldProxyDataModule: no split {split!r}; there are train, val, test")
        return self._samples

    def as_prompt(self, text: str, finished: bool = True) -> str:
        """``text`` as it is: prompts are names of tokens."""
        return text

    def last_said(self, prompt: str) -> tuple[str, str]:
        """A prompt is one piece."""
        return "", prompt

    def prompt_batch(self, prompts: Sequence[str]) -> TensorDict:
        """``prompt_ids`` ``[B, 2]`` and ``prompt_length``. Raises: ValueError for a prompt of another length."""
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        if wrong := [prompt for prompt, row in zip(prompts, ids, strict=True) if len(row) != 2]:
            raise ValueError(f"GoldProxyDataModule: a prompt is an act and a token, got {wrong[0]!r:.60}")
        content = {"prompt_ids": torch.tensor(ids).view(-1, 2), "prompt_length": torch.full((len(ids),), 2)}
        return TensorDict(content, batch_size=[len(ids)])

    def reply_tokens(self, replies: Sequence[str]) -> list[list[int]]:
        """Token ids; no token ends a reply."""
        return [self.tokenizer.encode(reply) for reply in replies]

    def licences(self) -> Mapping[str, str]:
        """Prompts are drawn from the seed."""
        return {"prompts drawn from the run's seed": "CC0-1.0"}

    def describe(self) -> dict[str, str]:
        """Keys, dtypes and shapes of a training batch on this rank."""
        rows = "B"
        if self.trainer is not None:
            rows = str(micro_batch_size(self.batch_size, self.trainer.world_size, self.trainer.accumulate_grad_batches))
        return {"prompt_ids": f"int64 [{rows}, 2]", "prompt_length": f"int64 [{rows}]", "index": f"int64 [{rows}]"}

    def digest(self) -> dict[str, str]:
        """What every rank must agree on before training."""
        sizes = {key: str(getattr(self, key)) for key in ("batch_size", "val_samples", "eval_batch_size")}
        return {"seed": str(self.seed), "tokenizer_hash": self.tokenizer.hash, **sizes}

    def train_dataloader(self) -> TrainLoader:
        """This rank's batches from the trainer's current step to ``max_steps``."""
        trainer: Any = self.trainer
        loader = _PromptLoader(
            self.seed,
            self._position,
            max_steps=training_steps(trainer, "GoldProxyDataModule"),
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            accumulate=trainer.accumulate_grad_batches,
            steps_done=lambda: trainer.global_step,
        )
        check_epoch_length(len(loader), trainer, "GoldProxyDataModule")
        return loader

    def val_dataloader(self) -> HeldOutLoader:
        """The same prompts at each validation; every rank has as many rows."""
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return _HeldOutPrompts(self.val_samples, batch_size=self.eval_batch_size, world_size=world_size, rank=rank)

    test_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Exact position, in plain values."""
        step = self.trainer.global_step if self.trainer is not None else self._position.step
        blend = self._position.at(max(step, self._position.step))
        return {"seed": self.seed, "step": self._position.step, "consumed_samples": blend.index}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken. Raises: ValueError for another seed."""
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            return
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"checkpoint was trained on other data: seed was {state_dict['seed']}, is {self.seed}; restore it, or "
                "start anew from the checkpoint's weights"
            )
        consumed = state_dict["consumed_samples"]
        self._position.restore(state_dict["step"], consumed, [consumed], [0])


def _draw(items: np.ndarray, *keys: int | str) -> np.ndarray:
    """Prompt numbers int64 of running draw numbers: one fixed random function per key."""
    key = derive_keys(*keys)
    hashed = mix64(mix64(items.astype(np.uint64) + key[0]) ^ key[1])
    return (hashed % np.uint64(ACTS * SYMBOLS)).astype(np.int64)


def _batch(index: np.ndarray) -> TensorDict:
    act, first = np.divmod(np.maximum(index, 0), SYMBOLS)
    content = {
        "prompt_ids": torch.from_numpy(np.stack([SYMBOLS + act, first], axis=1)),
        "prompt_length": torch.full((index.size,), 2, dtype=torch.int64),
        "index": torch.from_numpy(index),
    }
    return TensorDict(content, batch_size=[index.size])


class _Prompts(Dataset):
    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __getitem__(self, index: tuple[np.ndarray, np.ndarray]) -> TensorDict:
        return _batch(_draw(index[1], self._seed, "gold proxy"))


class _PromptLoader(TrainLoader):
    def __init__(self, seed: int, position: StreamPosition, **options: Any) -> None:
        super().__init__([], position, **options)
        self._windows = _Prompts(seed)


class _FixedPrompts(Dataset):
    def __init__(self, count: int) -> None:
        self.windows = range(count)

    def __getitem__(self, rows: np.ndarray) -> TensorDict:
        batch = _batch(np.where(rows < len(self.windows), _draw(rows, "gold proxy held out"), -1))
        batch["row"] = torch.from_numpy(np.asarray(rows, dtype=np.int64))  # prompts repeat
        return batch


class _HeldOutPrompts(HeldOutLoader):
    def __init__(self, count: int, **options: Any) -> None:
        super().__init__(range(count), 0, **options)  # type: ignore[arg-type]
        self._dataset = _FixedPrompts(count)
