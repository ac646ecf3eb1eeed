"""What every reward is: a named function of whole responses, each scored by itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from modules.contracts import PromptSample


@dataclass(frozen=True)
class Responses:
    """Responses to score, as text and as tokens; every list has one entry per response.

    Args:
        samples: prompt, reference and labels.
        texts: the response, decoded, without the token that ended it.
        prompt_tokens, response_tokens: token ids; the response's include the token that ended it.
        ended: whether the response ended by itself, not by the limit on new tokens.
    """

    samples: Sequence[PromptSample]
    texts: Sequence[str]
    prompt_tokens: Sequence[Sequence[int]]
    response_tokens: Sequence[Sequence[int]]
    ended: Sequence[bool]

    def __post_init__(self) -> None:
        sizes = {one.name: len(getattr(self, one.name)) for one in fields(self)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Responses: want as many entries in each list, got {sizes}")

    def __len__(self) -> int:
        return len(self.texts)


class Reward(ABC):
    """A component reward. Pure: a response's score does not depend on the other responses of the batch.

    ``bounds``: least and greatest possible score; thresholds outside them are refused. ``learnt``: a trained model
    judges, whose judgement may fail where its training data did not reach.
    """

    bounds: tuple[float, float] = (-math.inf, math.inf)
    learnt: bool = False

    def setup(self, tokenizer: Any, device: torch.device) -> None:  # noqa: B027  (most rewards need nothing)
        """Called once, before training, with the datamodule's tokenizer (contract ``ProvidesPrompts``) and the device.

        Reward models load their weights here and check that they fit the tokenizer.
        """

    @abstractmethod
    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]`` of the batch's responses."""

    def digest(self) -> str:
        """Identity of what the score depends on besides the config (weights, word lists), for checkpoints."""
        return ""


class Evaluation(ABC):
    """A held-out judgement of a whole set of responses, never used as a reward."""

    def setup(self, tokenizer: Any, device: torch.device) -> None:  # noqa: B027
        """As :meth:`Reward.setup`."""

    @abstractmethod
    def compute(self, batch: Responses) -> dict[str, float]:
        """Figures by name; ``score`` (higher is better) is the one that runs are compared by."""

    def each(self, batch: Responses) -> Tensor | None:
        """Of ``score`` the part that judges single responses, float64 ``[B]``; None where there is none."""
        return None
