"""The intent classifier: which dialogue act a reply is, given the utterance it answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from modules.language.supervised import OptimizerSpec, SupervisedModule
from modules.networks.text_classifier import BagOfTokensClassifier
from modules.rlhf.classifier_files import save_classifier

_IGNORED = -100


class IntentClassifier(SupervisedModule):
    """Trains the reward model of intent (Moskovitz et al. 2024: a RoBERTa classifier of the last utterance and reply).

    Ours is a bag of tokens with a two-layer perceptron, which needs no pretrained weights. The batch is a TensorDict
    ``[B]`` with ``prompt_ids``, ``prompt_length`` (the last utterance), ``reply_ids``, ``reply_length`` and ``label``
    int64 ``[B]`` (-100: not counted).

    Logged: ``train/loss``, ``train/accuracy``, ``lr``; ``val/loss``, ``val/accuracy``; the same for test.

    Args:
        labels: names of the classes, in the order of their numbers.
        width: of the token embedding.
        hidden: units of the perceptron.
        dropout: of the features and the hidden units.
        optimizer: optimiser and schedule.
    """

    task = "intent"

    def __init__(
        self,
        labels: Sequence[str] = ("inform", "question", "directive", "commissive"),
        width: int = 48,
        hidden: int = 64,
        dropout: float = 0.3,
        optimizer: OptimizerSpec | None = None,
    ) -> None:
        sizes: dict[str, Any] = {"width": width, "hidden": hidden, "dropout": dropout}
        super().__init__(optimizer, {"labels": list(labels), **sizes})
        if len(labels) < 2:
            raise ValueError(f"IntentClassifier: labels must name at least two classes, got {list(labels)}")
        self.labels, self.sizes = list(labels), sizes

    def configure_model(self) -> None:
        """Build the network for the data's vocabulary, from the run's seed alone."""
        if self.network is not None:
            return
        tokenizer = self.data_tokenizer()
        if tokenizer is None:
            raise ValueError("IntentClassifier: the data brings no tokenizer; use DialogueDataModule with task: intent")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            self.network = BagOfTokensClassifier(tokenizer.vocab_size, len(self.labels), **self.sizes)
        self.tokenizer_hash = tokenizer.hash

    def measure(self, batch: TensorDict) -> tuple[dict[str, Tensor], Tensor]:
        label = batch["label"]
        logits = self.network(
            batch["prompt_ids"], batch["prompt_length"], batch["reply_ids"], batch["reply_length"]
        ).float()
        loss = F.cross_entropy(logits, label, ignore_index=_IGNORED, reduction="sum")
        return {"loss": loss, "accuracy": (logits.argmax(-1) == label).sum()}, (label != _IGNORED).sum()

    def digest(self) -> dict[str, str]:
        return {"sizes": str(self.network.sizes), "labels": ", ".join(self.labels)}

    def export_pretrained(self, folder: str | Path) -> None:
        """Write the classifier's folder; see :func:`modules.rlhf.classifier_files.save_classifier`."""
        if self.trainer.is_global_zero:
            save_classifier(folder, self.network, self.tokenizer_hash, self.labels)
