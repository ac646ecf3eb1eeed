"""Supervised finetuning of a causal language model on responses to prompts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tensordict import TensorDict
from torch import Tensor

from modules.language.specs import LoraSpec, ModelSpec, Tuning, build_network
from modules.language.supervised import OptimizerSpec, SupervisedModule, check_length, tokenizer_directory
from modules.objectives.lm import lm_cross_entropy, perplexity


class FinetuningModule(SupervisedModule):
    """Cross-entropy on the tokens of a response given its prompt.

    ``L = -(1 / n) sum log p(response token | prompt, response so far)`` over the n response tokens of an optimiser
    step. The batch is a TensorDict ``[B]`` with ``input_ids`` and ``labels`` int64 ``[B, T]``: ``labels[t]`` is the
    token after ``input_ids[t]``, -100 where it does not count. Rows are padded on the right; where several examples
    share a row, ``document_ids`` int32 ``[B, T]`` keep them from seeing each other.

    Logged: ``train/loss`` and ``lr``; ``val/loss`` (nats per token) and ``val/ppl``; the same for test.

    Args:
        model: start weights.
        tuning: train all weights, or LoRA adapters on the full, 4-bit (QLoRA) or 8-bit base.
        lora: adapter settings.
        optimizer: optimiser and schedule.
        ce_chunk: tokens whose logits exist at once; ``null``: about 4 Mi logits.
        activation_checkpointing: recompute each layer in the backward pass.

    Raises:
        ValueError: a value out of range; one line that names it.
    """

    work_unit = "tokens"

    def __init__(
        self,
        model: ModelSpec,
        tuning: Tuning = "full",
        lora: LoraSpec | None = None,
        optimizer: OptimizerSpec | None = None,
        ce_chunk: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        spec = model if isinstance(model, ModelSpec) else ModelSpec(**model)
        adapters = lora if isinstance(lora, LoraSpec) else LoraSpec(**(lora or {}))
        options = {"tuning": tuning, "ce_chunk": ce_chunk, "activation_checkpointing": activation_checkpointing}
        super().__init__(optimizer, {"model": asdict(spec), "lora": asdict(adapters), **options})
        self.model_spec, self.lora = spec, adapters
        self.tuning: Tuning = tuning
        self.ce_chunk, self.activation_checkpointing = ce_chunk, activation_checkpointing
        self.model_spec.check(type(self).__name__)

    def configure_model(self) -> None:
        """Build or load the network (Lightning calls this after the data's setup)."""
        if self.network is None:
            self.network = build_network(
                self.model_spec, self.tuning, self.lora, self.data_tokenizer(), owner=type(self).__name__,
                activation_checkpointing=self.activation_checkpointing,
            )  # fmt: skip
            check_length(type(self).__name__, self.network, getattr(self._trainer, "datamodule", None))

    def measure(self, batch: TensorDict) -> tuple[dict[str, Tensor], Tensor]:
        hidden = self.network(batch["input_ids"], document_ids=batch.get("document_ids", None))
        loss, _, count = lm_cross_entropy(
            hidden, self.network.lm_head.weight, batch["labels"], self.ce_chunk, reduction="sum"
        )
        return {"loss": loss}, count

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        return {**means, "ppl": perplexity(means["loss"])}

    # ------------------------------------------------------------------------------------------------------- contracts

    def work_per_batch(self, batch: TensorDict) -> int:
        return batch["input_ids"].numel()

    def digest(self) -> dict[str, str]:
        return {"model": str(self.network.config), "vocab_size": str(self.network.config.vocab_size)}

    def summary_rows(self) -> dict[str, str]:
        trainable = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        return {"model": f"{sum(p.numel() for p in self.network.parameters()):,} parameters, {trainable:,} trained"}

    def export_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face directory (adapters merged) with the data's tokenizer."""
        from modules.language.checkpoint import export_hf

        export_hf(
            self.network, tokenizer_directory(type(self).__name__, self.data_tokenizer(), self.model_spec.path), folder
        )
