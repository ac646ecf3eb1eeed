"""Our GPT-2 against transformers': checkpoints both ways, logits, gradients, decoding of left-padded batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.language.adapters import add_lora, quantize
from modules.language.checkpoint import export_hf, load_causal_lm
from modules.language.generation import generate, generate_batch
from modules.networks.causal_lm import CausalLM
from modules.networks.gpt2 import GPT2, GPT2Config
from modules.networks.llama import Llama

transformers = pytest.importorskip("transformers", reason="needs the extra 'rlhf'")

SHAPE: dict[str, Any] = {"vocab_size": 64, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 4}
TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 80,
}  # fmt: skip


def build(kind: str = "gpt2", **change: Any) -> Any:
    torch.manual_seed(0)
    shape = SHAPE if kind == "gpt2" else LLAMA
    config = transformers.AutoConfig.for_model(kind, **{**shape, **TOKENS, **change})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.25)  # the usual 0.02 would make every response one token repeated
    return model


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CausalLM]:
    hf = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(folder)
    model = load_causal_lm(folder)
    assert isinstance(model, {"gpt2": GPT2, "llama": Llama}[request.param])
    return hf, model


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False}, {"n_inner": 48, "layer_norm_epsilon": 1e-3}])
def test_saved_directory_gives_the_same_logits_and_comes_back_bit_identical(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    hf = build(**change)
    hf.save_pretrained(tmp_path / "in")
    model = load_causal_lm(tmp_path / "in")
    ids = torch.randint(0, 64, (3, 40))
    torch.testing.assert_close(model.logits(model(ids)), hf(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    export_hf(model, None, tmp_path / "out", max_shard_bytes=20_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(back) is type(hf)
    for (name, a), (other, b) in zip(hf.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    assert back.config.n_inner == hf.config.n_inner
    again = load_causal_lm(tmp_path / "out")
    assert again.config == model.config
    assert torch.equal(again.logits(again(ids)), model.logits(model(ids)))


def test_files_of_the_bare_model_with_mask_buffers_load(tmp_path: Path) -> None:
    """The layout of the first published GPT-2 files: no `transformer.` in front, the causal mask stored."""
    from safetensors.torch import save_file

    hf = build()
    weights = {name.removeprefix("transformer."): tensor.clone() for name, tensor in hf.state_dict().items()}
    del weights["lm_head.weight"]
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 80, 80).tril()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf.config.to_dict()))
    model = load_causal_lm(tmp_path)
    ids = torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(model.logits(model(ids)), hf(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_gradients_equal() -> None:
    hf = build()
    model = GPT2(GPT2Config.from_hf(hf.config.to_dict()))
    model.load_state_dict(model.from_hf_weights(hf.state_dict()))
    ids = torch.randint(0, 64, (2, 30))
    torch.nn.functional.cross_entropy(model.logits(model(ids))[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    hf(input_ids=ids, labels=ids).loss.backward()
    expected = model.from_hf_weights({name: p.grad for name, p in hf.named_parameters()})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_adapters_and_quantised_weights_are_exported_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    hf = build(n_embd=64)
    hf.save_pretrained(tmp_path / "in")
    model = add_lora(quantize(load_causal_lm(tmp_path / "in"), 4), r=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    export_hf(model, None, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 64, (2, 12))
    torch.testing.assert_close(back(input_ids=ids).logits, model.logits(model(ids)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("eod", [-1, 0, 41])
def test_greedy_equals_left_padded_transformers_token_for_token(pair: tuple[Any, CausalLM], eod: int) -> None:
    """eod 0: the token that ends a response is the padding token too."""
    hf, model = pair
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 19, 1, 19, 40, 12, 33, 2])
    prompts = [torch.randint(1, 64, (int(length),), generator=generator) for length in lengths]
    left = torch.stack([torch.cat((torch.zeros(40 - len(p)).long(), p)) for p in prompts])
    right = torch.stack([torch.cat((p, torch.zeros(40 - len(p)).long())) for p in prompts])
    mask = (torch.arange(40) >= 40 - lengths[:, None]).long()
    stop = None if eod < 0 else eod
    expected = hf.generate(
        left, attention_mask=mask, do_sample=False, max_new_tokens=30, eos_token_id=stop, pad_token_id=0
    )[:, 40:]
    ours = generate_batch(
        model, right, lengths, seeds=lengths, max_new_tokens=30, temperature=0.0, eod_id=eod, batch_size=5
    )
    assert torch.equal(ours.tokens[:, : expected.shape[1]], expected)
    assert ours.tokens[:, expected.shape[1] :].count_nonzero() == 0
    as_lists = generate(
        model, [p.tolist() for p in prompts], max_new_tokens=30, stop_token_ids=[] if stop is None else [stop]
    )
    for row, length, tokens, ended, reason in zip(
        ours.tokens.tolist(), ours.length, as_lists.tokens, ours.ended, as_lists.finish_reasons, strict=True
    ):
        assert row[: int(length)] == tokens
        assert (reason == "stop") == bool(ended) == (tokens[-1] == eod)
    if eod == 41:
        assert 0 < ours.ended.sum() < 8
    assert len({tuple(row) for row in ours.tokens.tolist()}) > 4


def test_minimum_length_equals_transformers(pair: tuple[Any, CausalLM]) -> None:
    hf, model = pair
    prompts = torch.arange(1, 61).view(6, 10)
    free = hf.generate(prompts, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)[:, 10:]
    eod = int(free[0, 1])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": eod, "pad_token_id": 0}
    expected = hf.generate(prompts, min_new_tokens=5, **options)[:, 10:]
    lengths = torch.full((6,), 10)
    ours = generate_batch(
        model, prompts, lengths, seeds=lengths, max_new_tokens=12, min_new_tokens=5, temperature=0.0, eod_id=eod
    )
    assert torch.equal(ours.tokens[:, : expected.shape[1]], expected)
    assert ours.length.min() >= 5
    assert hf.generate(prompts, **options)[0, 10:].tolist()[1] == eod  # without a minimum it ends at the second token
