"""Conversations as token ids, by a Hugging Face directory's tokenizer; nothing is fetched, no code is run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from modules.files import read_json_object
from modules.language.backends.base import BackendError, Turn
from modules.language.backends.texts import merge_turns
from modules.optional import require

Template = Literal["none", "chat"]
TEMPLATES = ("none", "chat")


class DirectoryTokenizer:
    """A model directory's ``tokenizer.json``.

    The texts of a conversation are data: one that spells a special token, as a page or a reply may, gets ordinary
    tokens, and can't end a turn or open another.

    Args:
        directory: the model's.
        template: ``none``: the turns' texts, joined; ``chat``: as the directory's chat template lays messages out.

    Attributes:
        eod_id: the directory's ``eos_token``; None: it names none.
        vocab_size: largest token id + 1, added tokens included.

    Raises:
        FileNotFoundError: no tokenizer.json. ValueError: it can't be loaded. BackendError: no chat template.
    """

    def __init__(self, directory: str | Path, template: Template = "none") -> None:
        self.directory = Path(directory)
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"LocalBackend: {file} does not exist; the tokenizer must lie beside the weights")
        library = require("tokenizers", extra="rci")
        try:
            self._special = library.Tokenizer.from_file(str(file))  # reads special tokens in what a template writes
            self._plain = library.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"LocalBackend: {file} can't be loaded ({str(error)[:160]})") from None
        for tokenizer in (self._special, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1
        self._lead = self._find_lead()
        self.eod_id = self._find_eod()
        self._chat = self._chat_tokenizer() if template == "chat" else None
        names = [token.content for token in self._plain.get_added_tokens_decoder().values() if token.special]
        names.sort(key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, names))) if names else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, behind what the tokenizer opens every text with (BOS); no EOS at its end."""
        return self._lead + self._plain.encode(text, add_special_tokens=False).ids

    def encode_turns(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a conversation, up to where the model is to go on.

        With a chat template that is the beginning of the assistant's message; or inside the last message, if the
        assistant's turn comes last.

        Raises:
            BackendError: the template refuses the conversation (a role it does not know, an order it does not take).
        """
        if self._chat is None:
            return self.encode("".join(turn.text for turn in turns))
        text, foreign = self._render(merge_turns(turns))
        ids: list[int] = []
        for number, piece in enumerate(re.split(foreign[0], text) if foreign[1] else [text]):
            if number % 2:
                ids += self._plain.encode(foreign[1][int(piece)], add_special_tokens=False).ids
            elif piece:
                ids += self._special.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._plain.decode(list(ids), skip_special_tokens=True)

    def _find_lead(self) -> list[int]:
        bare = self._plain.encode("a", add_special_tokens=False).ids
        full = self._plain.encode("a", add_special_tokens=True).ids
        at = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
        return full[:at]

    def _find_eod(self) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (self.directory / name).is_file():
                token = read_json_object(self.directory / name, "LocalBackend").get("eos_token")
                token = token.get("content") if isinstance(token, dict) else token
                if token is not None and (number := self._plain.token_to_id(token)) is not None:
                    return number
        return None

    def _chat_tokenizer(self) -> Any:
        transformers = require("transformers", extra="rci")
        found = transformers.PreTrainedTokenizerFast.from_pretrained(
            str(self.directory), local_files_only=True, trust_remote_code=False
        )
        if not found.chat_template:
            raise BackendError(
                f"LocalBackend: {self.directory} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); set template: none, or take a chat model"
            )
        return found

    def _render(self, messages: list[dict[str, str]]) -> tuple[str, tuple[str, list[str]]]:
        """The conversation as the template writes it; in place of each special token that a message spells a mark. And
        the marks' pattern, whose group is the number of a spelt token, with those tokens."""
        spelt: list[str] = []
        pattern = ""
        if self._specials is not None and any(self._specials.search(message["content"]) for message in messages):
            number = 0
            while any(f"\ue000{number}:" in message["content"] for message in messages):
                number += 1
            pattern = f"\ue000{number}:([0-9]+)\ue001"

            def mark(match: re.Match[str]) -> str:
                spelt.append(match[0])
                return f"\ue000{number}:{len(spelt) - 1}\ue001"

            messages = [{**message, "content": self._specials.sub(mark, message["content"])} for message in messages]
        goes_on = bool(messages) and messages[-1]["role"] == "assistant"
        assert self._chat is not None
        try:
            text = self._chat.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
            )
        except (require("jinja2", extra="rci").TemplateError, ValueError, IndexError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise BackendError(
                f"LocalBackend: the chat template of {self.directory} refuses messages of the roles {roles or 'none'} "
                f"({str(error)[:120]}); give it others, or set template: none"
            ) from None
        return text, (pattern, spelt)
