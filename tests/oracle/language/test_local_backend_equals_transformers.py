"""LocalBackend against transformers: greedy replies, chat templates, stop tokens of generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'rci'")

import transformers  # noqa: E402
from tiny_language import write_model  # noqa: E402

from modules.language.backends import LocalBackend, Request, Turn  # noqa: E402
from modules.language.backends.directory_tokenizer import DirectoryTokenizer  # noqa: E402

PROMPTS = ["click", "type the word into the field, then", "press enter\n\n", "the button and the field and the word"]
CHATS = [
    [Turn("user", "click the button")],
    [Turn("system", "Be brief."), Turn("user", " Which field? "), Turn("assistant", "the word"), Turn("user", "why\n")],
    [Turn("user", "type"), Turn("assistant", "the word in")],
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def theirs(directory: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


def expected_text(theirs: tuple[Any, Any], ids: list[int], new: int) -> str:
    model, tokenizer = theirs
    made = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=new, pad_token_id=1
    )
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


def test_greedy_replies_equal_transformers(directory: Path, theirs: tuple[Any, Any]) -> None:
    backend = LocalBackend(directory, batch_size=2)
    replies = backend.generate([Request((Turn("user", prompt),), max_new_tokens=24) for prompt in PROMPTS])
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = theirs[1](prompt)["input_ids"]
        assert ids[0] == 0  # the tokenizer opens a text with BOS, and so do we
        assert reply.text == expected_text(theirs, ids, 24)
        assert reply.prompt_tokens == len(ids)
    assert len({reply.text for reply in replies}) == len(PROMPTS)


@pytest.mark.parametrize("turns", CHATS)
def test_chat_ids_and_replies_equal_transformers(directory: Path, theirs: tuple[Any, Any], turns: list[Turn]) -> None:
    goes_on = turns[-1].role == "assistant"
    ids = theirs[1].apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns],
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        return_dict=True,
    )["input_ids"]
    assert DirectoryTokenizer(directory, "chat").encode_turns(turns) == ids
    reply = LocalBackend(directory, template="chat").generate([Request(tuple(turns), max_new_tokens=16)])[0]
    assert reply.text == expected_text(theirs, ids, 16)


def test_stop_tokens_of_the_generation_config_end_replies_as_in_transformers(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    free = LocalBackend(directory).load()
    ids = free.tokenizer.encode(PROMPTS[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    long = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24, pad_token_id=1)[0, len(ids) :]
    stop = int(long[7])
    assert stop not in long[:7].tolist()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop], "pad_token_id": 1}))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    short = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :]
    reply = LocalBackend(directory).generate([Request((Turn("user", PROMPTS[1]),), max_new_tokens=24)])[0]
    assert (reply.completion_tokens, reply.finish) == (len(short), "stop") == (8, "stop")
    assert reply.text == free.tokenizer.decode(short.tolist())
