"""Text-pair classifiers on disk, and what they are given to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.contracts import PromptSample
from modules.files import atomic_directory, read_json_object, sha256_file
from modules.language.checkpoint import TokenizerMismatchError
from modules.networks.text_classifier import BagOfTokensClassifier
from modules.optional import require

END_OF_UTTERANCE = "<EOU>"
_SETTINGS, _WEIGHTS = "classifier.json", "model.safetensors"
_KIND = "bag-of-tokens"
_CACHED_TEXTS = 200_000


def last_utterance(prompt: str) -> str:
    """The last utterance of a context whose utterances are joined (and perhaps ended) by ``<EOU>``.

    A space before it stays: pieces of words depend on it.
    """
    parts = [piece for piece in prompt.split(END_OF_UTTERANCE) if piece.strip()]
    return parts[-1].rstrip() if parts else ""


def label_of(sample: PromptSample, label: str, owner: str, index: int) -> int:
    """The sample's label.

    Raises:
        ValueError: the sample lacks it; names ``owner``, the sample's place in the batch and the labels it has.
    """
    if label not in sample.labels:
        have = ", ".join(sorted(sample.labels)) or "none"
        raise ValueError(
            f"{owner}: sample {index} has no label '{label}' (it has: {have}); prompt {sample.prompt[:60]!r}"
        )
    return int(sample.labels[label])


class PairInputs:
    """Turns contexts and replies into the arguments of :class:`BagOfTokensClassifier`, as its training data has them.

    Of the context only the last utterance counts (the paper's intent reward). Contexts return every epoch: their last
    utterances' tokens are kept by text.

    Args:
        tokenizer: has ``encode(text)``; see :class:`modules.contracts.ProvidesPrompts`.
        max_prompt_tokens: of the last utterance, its end is kept; ``None``: all.

    Raises:
        ValueError: max_prompt_tokens below 1.
    """

    def __init__(self, tokenizer: Any, max_prompt_tokens: int | None = None) -> None:
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}")
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self._known: dict[str, list[int]] = {}

    def _heard(self, prompt: str) -> list[int]:
        text = last_utterance(prompt)
        ids = self._known.get(text)
        if ids is None:
            ids = list(self.tokenizer.encode(text))
            ids = ids if self.max_prompt_tokens is None else ids[-self.max_prompt_tokens :]
            if len(self._known) < _CACHED_TEXTS:
                self._known[text] = ids
        return ids

    def __call__(
        self, prompts: Sequence[str], replies: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(prompt_ids [B, P], prompt_length [B], reply_ids [B, R], reply_length [B])``, int64, on ``device``.

        Args:
            prompts: whole contexts, as text.
            replies: token ids; the token that ended a reply may be among them.
        """
        return (*_padded([self._heard(prompt) for prompt in prompts], device), *_padded(replies, device))


def _padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = max((len(row) for row in rows), default=0)
    # One column at least: the network reads the first token, and masks it where there is none.
    ids = torch.tensor([[*row, *[0] * (max(width, 1) - len(row))] for row in rows], dtype=torch.int64)
    return ids.reshape(len(rows), max(width, 1)).to(device), lengths.to(device)


def save_classifier(
    folder: str | Path, network: BagOfTokensClassifier, tokenizer_hash: str, labels: Sequence[str]
) -> None:
    """Write ``classifier.json`` and ``model.safetensors`` into ``folder``, replacing an older classifier there.

    Args:
        folder: whole or absent at every instant.
        network: float32 copies of its weights are written.
        tokenizer_hash: of the tokenizer whose ids it was trained on.
        labels: the classes' names; the place in the list is the class, as in ``PromptSample.labels``.

    Raises:
        ValueError: as many labels as classes are wanted.
    """
    if len(labels) != network.sizes["classes"]:
        raise ValueError(f"save_classifier: {len(labels)} labels for {network.sizes['classes']} classes")
    weights = {
        name: value.detach().to("cpu", torch.float32).contiguous() for name, value in network.state_dict().items()
    }
    settings = {"kind": _KIND, "sizes": network.sizes, "labels": list(labels), "tokenizer_hash": tokenizer_hash}
    save_file = require("safetensors.torch", extra="rlhf").save_file
    with atomic_directory(folder) as target:
        (target / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        save_file(weights, target / _WEIGHTS, metadata={"format": "pt"})


def load_classifier(folder: str | Path, tokenizer_hash: str) -> tuple[BagOfTokensClassifier, list[str]]:
    """Read what :func:`save_classifier` wrote.

    Args:
        folder: the folder.
        tokenizer_hash: of the tokenizer that the caller will make token ids with.

    Returns:
        The network (evaluation mode, CPU, no gradients) and the classes' names.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: damaged files, or weights that do not fit the sizes.
        TokenizerMismatchError: it was trained with another tokenizer.
    """
    folder = Path(folder)
    for name in (_SETTINGS, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"classifier: {folder / name} does not exist; train one (IntentClassifier) first")
    settings = read_json_object(folder / _SETTINGS, "classifier")
    have, labels = settings.get("tokenizer_hash"), settings.get("labels")
    if settings.get("kind") != _KIND or not isinstance(have, str) or not isinstance(labels, list):
        raise ValueError(f"classifier: {folder / _SETTINGS} does not describe a {_KIND} classifier")
    if have != tokenizer_hash:
        raise TokenizerMismatchError(
            f"classifier: {folder} was trained with tokenizer {have[:12]}, the data's is {tokenizer_hash[:12]}: train "
            "the classifier again with the data's tokenizer"
        )
    safetensors = require("safetensors", extra="rlhf")
    load_file = require("safetensors.torch", extra="rlhf").load_file
    try:
        network = BagOfTokensClassifier(**settings["sizes"])
        network.load_state_dict(load_file(folder / _WEIGHTS))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"classifier: {folder} can't be read ({reason}); it is damaged: train it again") from None
    if len(labels) != network.sizes["classes"]:
        raise ValueError(
            f"classifier: {folder / _SETTINGS} has {len(labels)} labels for {network.sizes['classes']} classes"
        )
    return network.eval().requires_grad_(False), [str(label) for label in labels]


def classifier_digest(folder: str | Path) -> str:
    """Identity of a saved classifier: sha256 of its settings and of its weights."""
    return f"{sha256_file(Path(folder) / _SETTINGS)}:{sha256_file(Path(folder) / _WEIGHTS)}"
