"""Llemma: continued pretraining of a Llama-family language model on mathematics (Azerbayev et al. 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tensordict import TensorDict
from torch import Tensor

from modules.contracts.corpora import Disturbance
from modules.language.specs import LoraSpec, ModelSpec, build_network
from modules.llemma.evaluation import EvaluationSettings, TaskEvaluator, TaskTally
from modules.networks.causal_lm import CausalLM
from modules.networks.llama import Llama
from modules.objectives.lm import bits_per_byte, lm_cross_entropy, perplexity

if TYPE_CHECKING:
    from modules.assurance.subject import Subject


class NonFiniteGradientError(RuntimeError):
    """Training met more non-finite gradients in a row than allowed."""


class Llemma(LightningModule):
    """Next-token training on packed windows, perplexity per source, and mathematical evaluation.

    The training batch is a TensorDict ``[B]`` with ``input_ids`` and ``labels`` int64 ``[B, T]``, ``source_id`` int64
    ``[B]`` and, with a document mask, ``document_ids`` int32 ``[B, T]``. Evaluation loaders yield such batches
    (perplexity) or lists of task items (generation, see :mod:`modules.llemma.evaluation`).

    Args:
        model: start weights.
        rope_theta: RoPE base to continue with; ``None`` keeps the checkpoint's (the paper: 1e4 for 7B, kept for 34B).
        tuning: train all weights, LoRA adapters, or LoRA adapters on a 4-bit NF4 base (QLoRA).
        lora: adapter settings for ``lora`` and ``qlora``.
        optimizer: ``adamw`` (fused), or a bitsandbytes 8-bit one: ``adamw8bit``, ``paged_adamw8bit``, ``lion8bit``.
        lr: peak learning rate.
        min_lr_ratio: floor of the schedule as a fraction of ``lr`` (the paper: 1/30).
        warmup_steps: linear warm-up, optimiser steps.
        decay_steps: length of the cosine, optimiser steps from step 0; afterwards the floor holds.
        betas: AdamW betas.
        eps: AdamW epsilon.
        weight_decay: on matrices only (norms and biases are exempt, as in GPT-NeoX).
        ce_chunk: tokens whose logits exist at once; ``None``: about 4 Mi logits.
        activation_checkpointing: recompute each layer in the backward pass.
        compile: ``torch.compile`` the network; pays after minutes on a GPU, rarely on a CPU.
        max_nonfinite_steps: steps in a row with a non-finite gradient that are skipped before training stops.
        evaluation: generation and verification settings of the evaluation tasks.

    Raises:
        ValueError: a value out of range; one line that names it.
    """

    work_unit = "tokens"

    def __init__(
        self,
        model: ModelSpec,
        rope_theta: float | None = None,
        tuning: Literal["full", "lora", "qlora"] = "full",
        lora: LoraSpec | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-4,
        min_lr_ratio: float = 0.033,
        warmup_steps: int = 500,
        decay_steps: int = 48_000,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        ce_chunk: int | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        max_nonfinite_steps: int = 3,
        evaluation: EvaluationSettings | None = None,
    ) -> None:
        super().__init__()
        self.model_spec = model if isinstance(model, ModelSpec) else ModelSpec(**model)
        self.lora = lora if isinstance(lora, LoraSpec) else LoraSpec(**(lora or {}))
        self.settings = (
            evaluation if isinstance(evaluation, EvaluationSettings) else EvaluationSettings(**(evaluation or {}))
        )
        options = {
            "rope_theta": rope_theta, "tuning": tuning, "optimizer": optimizer, "lr": lr,
            "min_lr_ratio": min_lr_ratio, "warmup_steps": warmup_steps, "decay_steps": decay_steps,
            "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "ce_chunk": ce_chunk,
            "activation_checkpointing": activation_checkpointing, "compile": compile,
            "max_nonfinite_steps": max_nonfinite_steps,
        }  # fmt: skip
        nested = {"model": self.model_spec, "lora": self.lora, "evaluation": self.settings}
        # plain values only: checkpoints load with weights_only=True
        self.save_hyperparameters({**{k: dataclasses.asdict(v) for k, v in nested.items()}, **options})
        self.options = options
        self._check()
        self.network: Llama | None = None
        self._compiled: Any = None
        self.rope_change: tuple[float, float] | None = None
        self._nonfinite_in_a_row = 0
        self.register_buffer("nonfinite_steps", torch.zeros((), dtype=torch.long))
        self._step_sums: Tensor | None = None
        self._eval_sums: dict[int, Tensor] = {}
        self._tallies: dict[str, TaskTally] = {}
        self._evaluator: TaskEvaluator | None = None
        self._rows_folder: Path | None = None

    def _check(self) -> None:
        options = self.options
        self.model_spec.check("Llemma")
        for name, low in (("lr", 0.0), ("eps", 0.0)):
            if not options[name] > low:
                raise ValueError(f"Llemma: {name} must be > {low:g}, got {options[name]}")
        if not 0 <= options["min_lr_ratio"] <= 1:
            raise ValueError(f"Llemma: min_lr_ratio must be in [0, 1], got {options['min_lr_ratio']}")
        if not 0 <= options["warmup_steps"] <= options["decay_steps"]:
            raise ValueError(
                f"Llemma: warmup_steps must be in [0, decay_steps], got {options['warmup_steps']} of "
                f"{options['decay_steps']}"
            )
        if options["max_nonfinite_steps"] < 0:
            raise ValueError(f"Llemma: max_nonfinite_steps must be >= 0, got {options['max_nonfinite_steps']}")

    # ------------------------------------------------------------------------------------------------------- the model

    def configure_model(self) -> None:
        """Build or load the network (Lightning calls this inside the strategy's context, after the data's setup)."""
        if self.network is not None:
            return
        from modules.language.checkpoint import read_config

        options, spec = self.options, self.model_spec
        network = build_network(
            spec,
            options["tuning"],
            self.lora,
            self._data_tokenizer(),
            owner="Llemma",
            rope_theta=options["rope_theta"],
            activation_checkpointing=options["activation_checkpointing"],
        )
        if not isinstance(network, Llama):
            raise ValueError(f"Llemma: wants a Llama-family model, got {type(network).__name__}")
        self.network = network
        if spec.path is not None:
            self.rope_change = (read_config(spec.path).rope_theta, self.network.config.rope_theta)
        length = getattr(getattr(self._trainer, "datamodule", None), "seq_len", None)
        limit = self.network.config.max_position_embeddings
        if length is not None and length > limit:
            raise ValueError(f"Llemma: seq_len {length} exceeds max_position_embeddings {limit}; shorten one")
        self._compiled = torch.compile(self.network) if options["compile"] else None

    @property
    def llama(self) -> Llama:
        """The network; built by ``configure_model``."""
        if self.network is None:
            raise RuntimeError("Llemma: the network is built by configure_model(); call it or use the Trainer")
        return self.network

    def setup(self, stage: str) -> None:
        folder = self.trainer.log_dir  # a collective: asked on all ranks
        if stage in ("validate", "test") and folder is not None:
            self._rows_folder = Path(folder) / "items"

    def configure_optimizers(self) -> Any:
        return self.optimizer_of(self.llama)

    def optimizer_of(self, network: CausalLM) -> dict[str, Any]:
        """A fresh optimiser and schedule for ``network``, this module's or a copy."""
        from modules.language.optim import build_optimizer
        from modules.language.schedule import lr_lambda

        options = self.options
        optimizer = build_optimizer(
            network,
            options["optimizer"],
            lr=options["lr"],
            betas=options["betas"],
            eps=options["eps"],
            weight_decay=options["weight_decay"],
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lr_lambda(options["warmup_steps"], options["decay_steps"], options["min_lr_ratio"])
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -------------------------------------------------------------------------------------------------------- training

    def _token_losses(self, batch: TensorDict) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss, per-token losses ``[B, T]`` (detached) and the number of counted tokens."""
        network = self.llama if self._compiled is None else self._compiled
        hidden = network(batch["input_ids"], document_ids=batch.get("document_ids", None))
        return lm_cross_entropy(hidden, self.llama.lm_head.weight, batch["labels"], self.options["ce_chunk"])

    def training_step(self, batch: TensorDict, batch_idx: int) -> Tensor:
        """``L = -(1 / BT) sum log p(x[t+1] | x[<=t])``: mean over tokens, no mask, no padding (Llemma, section 2)."""
        loss, token_losses, count = self._token_losses(batch)
        self._add_training_losses(batch, token_losses)
        targets = batch.get("step_targets", None)
        if targets is not None:
            # masked targets: normalise by the whole optimiser step's targets, not by each micro-batch's own
            parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
            loss = loss * count * parts / targets[0]
        return loss

    def on_fit_start(self) -> None:
        if self.device.type != "cpu":
            return
        from modules.language.cpu import bf16_speedup, keep_freed_memory

        keep_freed_memory()
        if "bf16" in str(self.trainer.precision) and (ratio := bf16_speedup()) < 1:
            rank_zero_warn(
                f"bf16 products run at {ratio:.2f} times the speed of fp32 on this CPU: use --trainer.precision=32"
            )

    def on_train_start(self) -> None:
        if self.rope_change is not None:
            self.logger_metrics({"rope/theta_from": self.rope_change[0], "rope/theta_to": self.rope_change[1]})
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        rank_zero_info(f"{trainable:,} trainable of {sum(p.numel() for p in self.parameters()):,} parameters")

    def logger_metrics(self, metrics: dict[str, float]) -> None:
        """Write metrics to all loggers at the current step, outside Lightning's step bookkeeping."""
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=self.global_step)

    def _source_names(self) -> list[str]:
        return list(getattr(getattr(self.trainer, "datamodule", None), "source_names", []))

    def _add_training_losses(self, batch: TensorDict, token_losses: Tensor) -> None:
        """Sum losses and counts per source over the accumulation window; no host sync."""
        names = self._source_names()
        sources = max(1, len(names))
        if self._step_sums is None:
            self._step_sums = torch.zeros(sources, 2, dtype=torch.float64, device=self.device)
        counted = (batch["labels"] != -100).sum(1).double()
        rows = torch.stack((token_losses.double().sum(1), counted), 1)
        self._step_sums.index_add_(0, batch["source_id"].clamp(max=sources - 1), rows)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step's loss, over the whole accumulation window and all ranks."""
        sums, self._step_sums = self._step_sums, None
        if sums is None or not self._logs_now():
            return
        sums = self.all_ranks_sum(sums)
        names = self._source_names() or ["all"]
        values: dict[str, Tensor | float] = {"lr": optimizer.param_groups[0]["lr"]}
        if len(names) > 1:
            for index, name in enumerate(names):
                if sums[index, 1] > 0:
                    values[f"train/loss_{name}"] = sums[index, 0] / sums[index, 1]
        self.log("train/loss", (sums[:, 0].sum() / sums[:, 1].sum()).float(), prog_bar=True, rank_zero_only=True)
        self.log_dict({key: torch.as_tensor(value).float() for key, value in values.items()}, rank_zero_only=True)

    def _logs_now(self) -> bool:
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return (self.global_step + 1) % every == 0

    def all_ranks_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor of sums and counts over ranks."""
        return self.trainer.strategy.reduce(values, reduce_op="sum") if self.trainer.world_size > 1 else values

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, log the norm, and skip the step if the norm is not finite (the 7B run of the paper died of NaNs)."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"Llemma: gradient_clip_algorithm must be 'norm', got {gradient_clip_algorithm!r}")
        limit = float("inf") if gradient_clip_val is None else float(gradient_clip_val)
        sharded_clip = getattr(self.trainer.model, "clip_grad_norm_", None)  # FSDP: each rank holds a part of the norm
        if sharded_clip is not None:
            norm = sharded_clip(limit)
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        if hasattr(norm, "full_tensor"):  # FSDP2: a sharded norm
            norm = norm.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        if self._logs_now():
            self.log("train/grad_norm", norm.detach().float(), rank_zero_only=True)
        if torch.isfinite(norm):
            self._nonfinite_in_a_row = 0
            return
        # gradients are already reduced, so all ranks see the same norm and skip the same step
        self.nonfinite_steps += 1
        self._nonfinite_in_a_row += 1
        for parameter in parameters:
            parameter.grad = None
        if self._nonfinite_in_a_row > self.options["max_nonfinite_steps"]:
            raise NonFiniteGradientError(
                f"Llemma: the gradient was not finite in {self._nonfinite_in_a_row} steps in a row up to step "
                f"{self.global_step + 1}; the last checkpoint is good: resume from it with a lower lr"
            )
        rank_zero_info(f"step {self.global_step + 1}: gradient norm is {norm.item()}, step skipped")

    # ------------------------------------------------------------------------------------------------------ evaluation

    def _evaluate(self, batch: Any, index: int) -> None:
        if isinstance(batch, list):
            evaluator = self._task_evaluator()
            for task, tally in evaluator.run(batch).items():
                self._tallies[task] = self._tallies[task] + tally if task in self._tallies else tally
            return
        _, token_losses, count = self._token_losses(batch)
        sums = torch.stack((token_losses.double().sum(), count.double()))
        self._eval_sums[index] = self._eval_sums[index] + sums if index in self._eval_sums else sums

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: Literal["val", "test"]) -> None:
        data = getattr(self.trainer, "datamodule", None)
        names = list(getattr(data, f"{stage}_names", []))
        bytes_per_token: Mapping[str, float] = getattr(data, f"{stage}_bytes_per_token", {})
        losses = []
        for index in range(len(names)):
            sums = self._eval_sums.get(index, torch.zeros(2, dtype=torch.float64, device=self.device))
            total, count = self.all_ranks_sum(sums).tolist()
            if count == 0:
                continue
            name, loss = names[index], total / count
            losses.append(loss)
            self.log(f"{stage}/loss_{name}", loss, sync_dist=True)
            self.log(f"{stage}/ppl_{name}", perplexity(loss), sync_dist=True)
            if name in bytes_per_token:
                bits = bits_per_byte(loss * 1e9, max(1, round(bytes_per_token[name] * 1e9)))
                self.log(f"{stage}/bits_per_byte_{name}", bits, sync_dist=True)
        if losses:
            self.log(f"{stage}/loss", sum(losses) / len(losses), prog_bar=True, sync_dist=True)
        self._eval_sums.clear()
        for task in list(getattr(data, "task_names", [])):
            tally = self._tallies.pop(task, None) or TaskTally()
            tally = TaskTally.from_counts(self.all_ranks_sum(tally.counts(self.device)), tally.samples)
            if tally.items:
                self.log_dict({f"eval/{task}_{key}": value for key, value in tally.metrics().items()}, sync_dist=True)
                self._log_samples(task, tally)
        self._tallies.clear()

    def _log_samples(self, task: str, tally: TaskTally) -> None:
        for logger in self.trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if self.trainer.is_global_zero and writer is not None and hasattr(writer, "add_text"):
                writer.add_text(f"eval/{task}", tally.as_markdown(), self.global_step)

    def _task_evaluator(self) -> TaskEvaluator:
        if self._evaluator is None:
            self._evaluator = TaskEvaluator(
                self.llama, self._tokenizer_directory(), self.settings, self._rows_folder, self.global_rank
            )
        return self._evaluator

    def _data_tokenizer(self) -> Any:
        """The datamodule's tokenizer (``directory``, ``hash``, ``vocab_size``), or None where it brings none."""
        tokenizer = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        return tokenizer if hasattr(tokenizer, "vocab_size") else None

    def _tokenizer_directory(self) -> Path:
        directory = getattr(self._data_tokenizer(), "directory", None) or self.model_spec.path
        if directory is None:
            raise ValueError("Llemma: generation needs a tokenizer: give model.path or data with a tokenizer")
        return Path(directory)

    def predict_step(
        self, batch: list[dict[str, Any]], batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Complete prompts; rows ``{item_id, prompt, completions, ...}``."""
        return self._task_evaluator().complete(batch)

    def teardown(self, stage: str) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
            self._evaluator = None

    # -------------------------------------------------------------------------------------------------------- contracts

    def assurance_subject(self) -> Subject:
        """What assurance probes may ask of this model, on the held-out text of the run's data."""
        from modules.llemma.assurance import language_subject

        return language_subject(self, getattr(self.trainer, "datamodule", None))

    def warm_start(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint's weights; skipped steps are counted from 0."""
        self.load_state_dict(checkpoint["state_dict"])
        self.get_buffer("nonfinite_steps").zero_()

    def disturbances(self) -> Mapping[str, Disturbance]:
        """The ways to disturb training text: those that robustness is measured under, with other draws."""
        from modules.assurance.text.perturbations import PERTURBATIONS

        return PERTURBATIONS

    def work_per_batch(self, batch: TensorDict) -> int:
        return batch["input_ids"].numel()

    def flops_per_work_unit(self) -> float:
        from modules.language.flops import training_flops_per_token

        length = getattr(getattr(self.trainer, "datamodule", None), "seq_len", 0)
        return training_flops_per_token(self.llama.config, length)

    def digest(self) -> dict[str, str]:
        return {"vocab_size": str(self.llama.config.vocab_size), "model": str(self.llama.config)}

    def summary_rows(self) -> dict[str, str]:
        config = self.llama.config
        size = sum(parameter.numel() for parameter in self.llama.parameters())
        rows = {"model": f"{size:,} parameters, {config.num_hidden_layers} layers of {config.hidden_size}"}
        if self.nonfinite_steps > 0:
            rows["skipped steps"] = f"{int(self.nonfinite_steps)} (non-finite gradient)"
        return rows

    def export_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face directory (adapters merged) that ``AutoModelForCausalLM`` loads with the same loss."""
        from modules.language.checkpoint import export_hf

        export_hf(self.llama, self._tokenizer_directory(), folder)
