"""A small text-pair classifier that needs no pretrained weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def masked_mean(values: Tensor, length: Tensor) -> Tensor:
    """Mean over the first ``length`` positions.

    Args:
        values: ``[B, T, D]``.
        length: int64 ``[B]``, at most T; 0 gives a mean of 0.

    Returns:
        ``[B, D]``.
    """
    inside = torch.arange(values.shape[1], device=values.device) < length[:, None]
    return (values * inside[..., None]).sum(1) / length.clamp(min=1)[:, None]


class BagOfTokensClassifier(nn.Module):
    """Classifies a reply in the light of the utterance before it, by which tokens they hold.

    Features, each ``width`` wide: mean embedding of the prompt's tokens, mean embedding of the reply's, embeddings of
    the reply's first and last token (a question often shows only there). A two-layer perceptron maps them to classes.

    Args:
        vocab_size: token ids are in ``[0, vocab_size)``.
        classes: outputs.
        width: of the embedding, which prompt and reply share.
        hidden: units of the perceptron.
        dropout: of the features and the hidden units, in training mode.
        end_id: token that ends a reply and is no part of it (or the last token would be this one every time); -1: none.

    Raises:
        ValueError: a size below 1 (classes: below 2), or a dropout outside [0, 1).
    """

    def __init__(
        self,
        vocab_size: int,
        classes: int,
        width: int = 48,
        hidden: int = 64,
        dropout: float = 0.0,
        end_id: int = -1,
    ) -> None:
        super().__init__()
        if min(vocab_size, width, hidden) < 1 or classes < 2:
            raise ValueError(
                "BagOfTokensClassifier: want vocab_size, width and hidden >= 1 and classes >= 2, "
                f"got {vocab_size}, {width}, {hidden} and {classes}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"BagOfTokensClassifier: dropout must be in [0, 1), got {dropout}")
        self.sizes = {
            "vocab_size": vocab_size, "classes": classes, "width": width, "hidden": hidden, "dropout": dropout,
            "end_id": end_id,
        }  # fmt: skip
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(4 * width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    def forward(self, prompt_ids: Tensor, prompt_length: Tensor, reply_ids: Tensor, reply_length: Tensor) -> Tensor:
        """Logits ``[B, classes]``.

        Args:
            prompt_ids, reply_ids: int64 ``[B, P]`` and ``[B, R]``, padded on the right with any token id.
            prompt_length, reply_length: int64 ``[B]``; an empty text has features of 0. Widths P and R are at least 1.
        """
        prompt, reply = self.embedding(prompt_ids), self.embedding(reply_ids)
        rows = torch.arange(reply.shape[0], device=reply.device)
        ended = reply_ids[rows, (reply_length - 1).clamp(min=0)] == self.sizes["end_id"]
        reply_length = (reply_length - ended.long()).clamp(min=0)
        last = (reply_length - 1).clamp(min=0)
        spoken = (reply_length > 0)[:, None]
        features = (
            masked_mean(prompt, prompt_length),
            masked_mean(reply, reply_length),
            reply[:, 0] * spoken,
            reply[rows, last] * spoken,
        )
        return self.head(torch.cat(features, -1))
