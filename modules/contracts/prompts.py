"""Where modules that answer prompts and data of prompts meet beyond batches: prompts that no loader gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tensordict import TensorDict

if TYPE_CHECKING:
    from modules.contracts import PromptSample


@dataclass(frozen=True)
class ReplyPair:
    """A prompt with its better reply, ``sample.reference``, and a worse one."""

    sample: PromptSample
    rejected: str


@runtime_checkable
class EncodesPrompts(Protocol):
    """A datamodule of prompts (``ProvidesPrompts``) that makes batches of prompts that it does not hold.

    ``natural_language``: prompts are sentences, which may be reworded and which people may ask with. ``endless``:
    held-out prompts are drawn from ``samples`` again and again, so that there are as many as one asks for.
    """

    natural_language: bool
    endless: bool
    tokenizer: Any

    @property
    def held_out(self) -> str:
        """The split that neither training nor model selection reads where there are two held-out ones."""
        ...

    def samples(self, split: str) -> Sequence[PromptSample]: ...

    def as_prompt(self, text: str, finished: bool = True) -> str:
        """A text of anybody's in the form of the data's prompts; ``finished``: what follows is a reply to it."""
        ...

    def last_said(self, prompt: str) -> tuple[str, str]:
        """A prompt in two: what stands before, and the text that the reply is to."""
        ...

    def prompt_batch(self, prompts: Sequence[str]) -> TensorDict:
        """``prompt_ids`` and ``prompt_length`` of prompts, as the loaders' batches have them.

        Raises:
            ValueError: a prompt without tokens.
        """
        ...

    def reply_tokens(self, replies: Sequence[str]) -> list[list[int]]:
        """Token ids of replies, each ended as the data end them."""
        ...

    def licences(self) -> Mapping[str, str]:
        """Source of prompts -> its licence; ``unknown`` where nobody said."""
        ...


@runtime_checkable
class ProvidesPairs(Protocol):
    """A datamodule that knows better and worse replies to held-out prompts."""

    def pairs(self, split: str) -> Sequence[ReplyPair]:
        """Pairs of ``split``; empty where it has none."""
        ...
