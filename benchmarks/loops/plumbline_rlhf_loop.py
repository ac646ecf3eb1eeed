"""Plumbline's ``ConstrainedRLHF`` under Lightning's Trainer: equality-constrained PPO with a group baseline.

Off, as for the peer: evaluation, loggers and checkpoints.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from marl_common import cpu_seconds, print_line
from rlhf_common import (
    RlhfArgs,
    StepClock,
    even_share,
    mean_log_probability,
    parse_rlhf_args,
    probe_tokens,
    read_prompts,
)
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datamodules.text.tokenizer import TextTokenizer  # noqa: E402
from modules.contracts import PromptSample  # noqa: E402
from modules.language.specs import ModelSpec  # noqa: E402
from modules.rlhf import module as rlhf  # noqa: E402
from modules.rlhf.rewards.base import Responses, Reward  # noqa: E402
from modules.rlhf.settings import ConstraintSpec, CriticSpec, GenerationSpec, KLSpec, PPOSpec  # noqa: E402


class Prompts(LightningDataModule):
    """The benchmark's prompts in their order (contract ``ProvidesPrompts``)."""

    def __init__(self, args: RlhfArgs) -> None:
        super().__init__()
        self.args = args
        self.tokenizer = TextTokenizer(args.model)
        texts = read_prompts(args)
        self._samples = [PromptSample(text) for text in texts]
        encoded = self.tokenizer.encode_batch(texts)
        lengths = {len(tokens) for tokens in encoded}
        if lengths != {args.prompt_tokens}:
            raise RuntimeError(f"plumbline: prompts have {sorted(lengths)} tokens, {args.prompt_tokens} wanted")
        self._ids = torch.tensor(encoded)

    def samples(self, split: str) -> Sequence[PromptSample]:
        return self._samples

    def _batch(self, rows: list[int]) -> TensorDict:
        index = torch.tensor(rows)
        lengths = torch.full((len(rows),), self.args.prompt_tokens)
        return TensorDict({"prompt_ids": self._ids[index], "prompt_length": lengths, "index": index}, [len(rows)])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(len(self._samples)), self.args.prompts, collate_fn=self._batch)  # type: ignore[arg-type]


class EvenShare(Reward):
    """Share of even token ids, as the peer is rewarded."""

    bounds = (0.0, 1.0)

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def score(self, batch: Responses) -> Tensor:
        self.clock.responded([len(tokens) for tokens in batch.response_tokens])
        return torch.tensor([even_share(tokens) for tokens in batch.response_tokens])


class Timed(rlhf.ConstrainedRLHF):
    """The module, with the clock around its rollout."""

    clock: StepClock

    def collect(self, batch: TensorDict) -> TensorDict:
        start = cpu_seconds()
        rollout = super().collect(batch)
        self.clock.add("rollout", cpu_seconds() - start)
        return rollout


class Clock(Callback):
    """Ends the clock's steps, and looks at the model before and after."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.parameters, self.probe, self.moved, self.dtype = 0, 0.0, 0.0, ""
        self._before: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network: Any = pl_module.network
        self.parameters = sum(one.numel() for one in pl_module.parameters() if one.requires_grad)
        self.dtype = str(network.lm_head.weight.dtype)
        tokens = probe_tokens(network.config.vocab_size)
        with torch.no_grad():
            self.probe = mean_log_probability(network.logits(network(tokens)), tokens)
        self._before = network.embedding.weight.detach().clone()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.clock.ended(max(int(state["step"]) for state in trainer.optimizers[0].state.values()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network: Any = pl_module.network
        self.moved = float((network.embedding.weight.detach() - self._before).abs().max())


def build_module(args: RlhfArgs, clock: StepClock) -> rlhf.ConstrainedRLHF:
    """The method with the peer's settings: one epoch, one minibatch, no critic."""
    module = Timed(
        rewards={"even": EvenShare(clock)},
        policy=ModelSpec(path=str(args.model)),
        variant="xi_ppo",
        constraints={"even": ConstraintSpec(threshold=0.75)},
        advantage="group",
        group_size=args.group,
        leave_one_out=False,
        critic=CriticSpec(kind="none"),
        kl=KLSpec(beta=args.beta),
        ppo=PPOSpec(clip=args.clip, epochs=1, max_grad_norm=args.grad_norm),
        generation=GenerationSpec(max_new=args.new_tokens, min_new=args.new_tokens, top_k=args.top_k),
        lr=args.lr,
        weight_decay=args.weight_decay,
        betas=args.betas,
    )
    module.clock = clock
    return module


def main(args: RlhfArgs) -> None:
    """Train and print the result line.

    Raises:
        RuntimeError: a step did other work than asked.
    """
    warnings.simplefilter("ignore")
    seed_everything(args.seed, verbose=False)
    clock = StepClock(args)
    respond = rlhf.respond

    def timed(*given: Any, **named: Any) -> TensorDict:
        start = cpu_seconds()
        found = respond(*given, **named)
        clock.add("generate", cpu_seconds() - start)
        return found

    watch = Clock(clock)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=args.total_steps,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    with patch.object(rlhf, "respond", timed):
        trainer.fit(build_module(args, clock), datamodule=Prompts(args))
    more = {"parameters": watch.parameters, "dtype": watch.dtype, "probe": round(watch.probe, 6), "moved": watch.moved}
    print_line(clock.line("plumbline", **more))


if __name__ == "__main__":
    main(parse_rlhf_args())
