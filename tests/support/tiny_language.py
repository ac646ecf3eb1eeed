"""A model directory small enough to test backends on: a Llama with random weights and a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch

from modules.language.checkpoint import build_causal_lm, export_hf

SPECIALS = ("<|bos|>", "<|eos|>", "<|start|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write_tokenizer(directory: Path, *, chat: bool = True) -> None:
    """A tokenizer of 64 entries more than bytes; ids 0 to 3 are special, text begins with ``<|bos|>``."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["click the button and type the word into the field, then press enter"] * 3, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    backend.save(str(directory / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    if chat:
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_model(directory: Path, *, chat: bool = True, context: int = 160, width: int = 128) -> Path:
    """A model directory; ``width`` is of the feed-forward layers.

    Weights are large enough that greedy decoding does not fall into one token at once.
    """
    torch.manual_seed(0)
    model = build_causal_lm(
        {
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    write_tokenizer(directory / "tokenizer-files", chat=chat)
    export_hf(model, directory / "tokenizer-files", directory / "model")
    return directory / "model"
