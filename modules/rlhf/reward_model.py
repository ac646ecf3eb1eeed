"""Reward models trained on preferences between two responses (Bradley and Terry 1952; Ouyang et al. 2022)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from modules.assurance.subject import Subject
from modules.files import atomic_directory, read_json_object
from modules.language.checkpoint import TokenizerMismatchError, export_hf, hash_tokenizer
from modules.language.specs import LoraSpec, ModelSpec, Tuning, build_network
from modules.language.supervised import OptimizerSpec, SupervisedModule, check_length, tokenizer_directory
from modules.objectives.preference import bradley_terry_loss
from modules.optional import require

_SETTINGS, _HEAD, _TRUNK = "reward_model.json", "value_head.safetensors", "trunk"


class RewardModel(nn.Module):
    """A causal language model whose last real token's hidden state gives one number: the text's score.

    Args:
        trunk: the language model; its output head is not used.
    """

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        # drawn small: fresh scores are close to one another, as no text is preferred yet
        self.value_head = nn.Linear(trunk.config.hidden_size, 1, bias=False)
        nn.init.normal_(self.value_head.weight, std=(trunk.config.hidden_size + 1) ** -0.5)

    def forward(self, input_ids: Tensor, length: Tensor) -> Tensor:
        """Scores ``[B]`` of texts int64 ``[B, T]``, padded on the right, of ``length`` int64 ``[B]`` (at least 1)."""
        hidden = self.trunk(input_ids)
        rows = torch.arange(len(length), device=hidden.device)
        return self.value_head(hidden[rows, length - 1])[:, 0].float()

    def score(self, prompt_tokens: Sequence[Sequence[int]], response_tokens: Sequence[Sequence[int]]) -> Tensor:
        """Scores ``[B]`` of responses to prompts, as token ids; each depends on its own prompt and response alone.

        Raises:
            ValueError: a pair without tokens, or longer than the trunk's context.
        """
        device, limit = self.value_head.weight.device, self.trunk.config.max_position_embeddings
        texts = [[*prompt, *reply] for prompt, reply in zip(prompt_tokens, response_tokens, strict=True)]
        for index, text in enumerate(texts):
            if not 1 <= len(text) <= limit:
                raise ValueError(f"RewardModel: text {index} has {len(text)} tokens; want 1 to {limit}")
        longest = max(map(len, texts), default=1)
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device).view(-1, longest)
        return self(ids, torch.tensor([len(text) for text in texts], device=device, dtype=torch.int64))


class PreferenceRewardModel(SupervisedModule):
    """Fits a score to preferences: ``L = -log sigmoid(r(chosen) - r(rejected) - margin)``, mean over pairs.

    The batch is a TensorDict ``[B]``: ``chosen_ids`` and ``rejected_ids`` int64 ``[B, T]`` (prompt and response, padded
    on the right), ``chosen_length`` and ``rejected_length`` int64 ``[B]``, ``margin`` float32 ``[B]`` and ``counted``
    bool ``[B]`` (False: the row only fills the batch up).

    Logged: ``train/loss``, ``train/accuracy`` (share of pairs whose chosen response scores higher), ``train/margin``
    (mean difference of scores), ``lr``; the same for val and test.

    Args:
        model: start weights of the trunk.
        tuning: train all weights, or LoRA adapters on the full, 4-bit (QLoRA) or 8-bit base, besides the head.
        lora: adapter settings.
        optimizer: optimiser and schedule.
        activation_checkpointing: recompute each layer in the backward pass.

    Raises:
        ValueError: a value out of range; one line that names it.
    """

    work_unit = "tokens"
    task = "preference"

    def __init__(
        self,
        model: ModelSpec,
        tuning: Tuning = "full",
        lora: LoraSpec | None = None,
        optimizer: OptimizerSpec | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        spec = model if isinstance(model, ModelSpec) else ModelSpec(**model)
        adapters = lora if isinstance(lora, LoraSpec) else LoraSpec(**(lora or {}))
        options = {"tuning": tuning, "activation_checkpointing": activation_checkpointing}
        super().__init__(optimizer, {"model": asdict(spec), "lora": asdict(adapters), **options})
        self.model_spec, self.lora = spec, adapters
        self.tuning: Tuning = tuning
        self.activation_checkpointing = activation_checkpointing
        self.model_spec.check("PreferenceRewardModel")

    def configure_model(self) -> None:
        """Build or load the trunk (Lightning calls this after the data's setup)."""
        if self.network is not None:
            return
        owner = "PreferenceRewardModel"
        trunk = build_network(
            self.model_spec, self.tuning, self.lora, self.data_tokenizer(), owner=owner,
            activation_checkpointing=self.activation_checkpointing,
        )  # fmt: skip
        check_length(owner, trunk, getattr(self._trainer, "datamodule", None))
        if not trunk.config.tie_word_embeddings:
            trunk.lm_head.requires_grad_(False)  # not used: no gradient, which DDP would wait for
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            self.network = RewardModel(trunk)

    def measure(self, batch: TensorDict) -> tuple[dict[str, Tensor], Tensor]:
        # one pass over both: each row's score is its own
        width = max(batch["chosen_ids"].shape[1], batch["rejected_ids"].shape[1])
        ids = torch.cat(
            [
                nn.functional.pad(batch[name], (0, width - batch[name].shape[1]))
                for name in ("chosen_ids", "rejected_ids")
            ]
        )
        scores = self.network(ids, torch.cat([batch["chosen_length"], batch["rejected_length"]]))
        chosen, rejected = scores.chunk(2)
        counted = batch["counted"].float()
        losses = bradley_terry_loss(chosen, rejected, batch["margin"]) * counted
        sums = {
            "loss": losses.sum(),
            "accuracy": ((chosen > rejected) * counted).sum(),
            "margin": ((chosen - rejected) * counted).sum(),
        }
        return sums, counted.sum()

    # ------------------------------------------------------------------------------------------------------- contracts

    def assurance_subject(self) -> Subject:
        """What assurance probes may ask of this reward model, on held-out pairs of the run's data."""
        from modules.rlhf.assurance import judge_subject

        return judge_subject(self)

    def work_per_batch(self, batch: TensorDict) -> int:
        return batch["chosen_ids"].numel() + batch["rejected_ids"].numel()

    def digest(self) -> dict[str, str]:
        return {"model": str(self.network.trunk.config)}

    def export_pretrained(self, folder: str | Path) -> None:
        """Write what :func:`load_reward_model` reads."""
        tokenizer = tokenizer_directory("PreferenceRewardModel", self.data_tokenizer(), self.model_spec.path)
        save_reward_model(self.network, tokenizer, folder, writes=self.trainer.is_global_zero)


def save_reward_model(model: RewardModel, tokenizer_dir: str | Path, folder: str | Path, writes: bool = True) -> None:
    """Write ``trunk/`` (a Hugging Face directory), ``value_head.safetensors`` and ``reward_model.json``.

    Args:
        folder: whole or absent at every instant.
        writes: False on all ranks but the first; adapters and shards are merged on all.
    """
    save_file = require("safetensors.torch", extra="rlhf").save_file
    settings = {
        "kind": "bradley-terry",
        "hidden_size": model.trunk.config.hidden_size,
        "tokenizer_hash": hash_tokenizer(tokenizer_dir),
    }
    if not writes:
        export_hf(model.trunk, tokenizer_dir, folder)  # rank 0 alone writes
        return
    with atomic_directory(folder) as target:
        export_hf(model.trunk, tokenizer_dir, target / _TRUNK)
        save_file({"weight": model.value_head.weight.detach().cpu().float().contiguous()}, target / _HEAD)
        (target / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_reward_model(folder: str | Path, tokenizer_hash: str) -> RewardModel:
    """Read what :func:`save_reward_model` wrote.

    Args:
        tokenizer_hash: of the tokenizer that the caller will make token ids with.

    Returns:
        The model (evaluation mode, CPU, no gradients).

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: damaged files, or a head that does not fit the trunk.
        TokenizerMismatchError: it was trained with another tokenizer.
    """
    folder = Path(folder)
    for name in (_SETTINGS, _HEAD):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"reward model: {folder / name} does not exist; train one (PreferenceRewardModel) first"
            )
    settings = read_json_object(folder / _SETTINGS, "reward model")
    have = settings.get("tokenizer_hash")
    if settings.get("kind") != "bradley-terry" or not isinstance(have, str):
        raise ValueError(f"reward model: {folder / _SETTINGS} does not describe one")
    if have != tokenizer_hash:
        raise TokenizerMismatchError(
            f"reward model: {folder} was trained with tokenizer {have[:12]}, the data's is {tokenizer_hash[:12]}: "
            "train it again with the data's tokenizer"
        )
    safetensors = require("safetensors", extra="rlhf")
    load_file = require("safetensors.torch", extra="rlhf").load_file
    trunk = build_network(ModelSpec(path=str(folder / _TRUNK)), "full", LoraSpec(), None, owner="reward model")
    model = RewardModel(trunk)
    try:
        model.value_head.load_state_dict(load_file(folder / _HEAD))
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"reward model: {folder / _HEAD} can't be read ({reason}); train it again") from None
    return model.eval().requires_grad_(False)
