"""What a language model is to those who only ask it: a batch of conversations in, a batch of replies out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Turn:
    """One piece of a conversation; a chat model sees neighbouring turns of one role as one message."""

    role: Role
    text: str


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Args:
        turns: the conversation so far. A completion model reads their texts joined, with nothing between.
        max_new_tokens: length of the reply, at most.
        temperature: 0: the most likely token; top_p: nucleus, in (0, 1].
        stop: strings that end the reply and are not part of it.
        seed: of the sampling, where the backend can be seeded; replies depend on it and not on batch neighbours.
    """

    turns: tuple[Turn, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    @property
    def text(self) -> str:
        """The conversation as one text, for completion models and for logs."""
        return "".join(turn.text for turn in self.turns)


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    Args:
        text: without the stop string.
        finish: ``stop`` (it ended by itself or by a stop string) or ``length`` (cut).
        prompt_tokens, completion_tokens: as the backend counts them.
    """

    text: str
    finish: Finish = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class BackendError(RuntimeError):
    """A model could not be asked: one line that names the endpoint or file and the mend."""


class PromptTooLongError(ValueError):
    """A prompt exceeds the model's context; prompts are never cut silently."""


@runtime_checkable
class Backend(Protocol):
    """A model that can be asked. ``identity`` names it in logs and checkpoints and never holds a secret."""

    @property
    def identity(self) -> str: ...

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order.

        Raises:
            BackendError: the model can't be asked (endpoint down, refused key, no recording), after bounded retries.
            PromptTooLongError: naming tokens and limit.
        """
        ...

    def close(self) -> None: ...
