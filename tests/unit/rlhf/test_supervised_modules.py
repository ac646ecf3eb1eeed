"""SFT, IntentClassifier and PreferenceRewardModel: what they minimise, what they write, what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tensordict import TensorDict

from datamodules.text.dialogue_tokens import train_word_tokenizer
from modules.contracts import CountsWork, Exports, HasDigest
from modules.language.checkpoint import TokenizerMismatchError
from modules.language.specs import LoraSpec, ModelSpec, build_network
from modules.language.supervised import OptimizerSpec
from modules.rlhf.intent import IntentClassifier
from modules.rlhf.reward_model import PreferenceRewardModel, RewardModel, load_reward_model, save_reward_model
from modules.rlhf.sft import SFT

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12},
    "llama": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 12,
    },
}  # fmt: skip


def config(kind: str = "gpt2") -> dict[str, Any]:
    return {**CONFIGS[kind], "vocab_size": 30}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_word_tokenizer([" ".join(f"w{number}" for number in range(27))], 30, folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sft_loss_is_the_mean_over_counted_tokens(kind):
    torch.manual_seed(0)
    module = SFT(model=ModelSpec(config=config(kind)))
    module.configure_model()
    ids, labels = torch.randint(30, (3, 7)), torch.randint(30, (3, 7))
    labels[:, :3] = -100
    labels[1, 5:] = -100
    sums, count = module.measure(TensorDict({"input_ids": ids, "labels": labels}, [3]))
    logits = module.network.logits(module.network(ids))
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert int(count) == 10
    torch.testing.assert_close(sums["loss"] / count, want)
    assert module.finish({"loss": 2.0})["ppl"] == pytest.approx(7.389056)
    for contract in (CountsWork, Exports, HasDigest):
        assert isinstance(module, contract)


def test_start_weights_depend_on_the_seed_alone():
    def weights(draws: int) -> torch.Tensor:
        torch.manual_seed(5)
        torch.rand(draws)
        module = SFT(model=ModelSpec(config=config()))
        module.configure_model()
        return torch.cat([parameter.flatten() for parameter in module.parameters()])

    assert torch.equal(weights(0), weights(7))


@pytest.mark.parametrize("tuning", ["lora", "qlora", "int8"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_adapters_are_trained_alone(tuning):
    module = SFT(model=ModelSpec(config={**config(), "n_embd": 64}), tuning=tuning, lora=LoraSpec(r=2))
    module.configure_model()
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    sums, _ = module.measure(TensorDict({name: torch.randint(30, (2, 5)) for name in ("input_ids", "labels")}, [2]))
    sums["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


class TestOptimizer:
    def test_schedule(self):
        module = SFT(
            model=ModelSpec(config=config()),
            optimizer=OptimizerSpec(lr=1.0, schedule="cosine", warmup_steps=2, decay_steps=6, min_lr_ratio=0.1),
        )
        module.configure_model()
        setup = module.configure_optimizers()
        rates = []
        for _ in range(8):
            rates.append(setup["optimizer"].param_groups[0]["lr"])
            setup["optimizer"].step()
            setup["lr_scheduler"]["scheduler"].step()
        assert rates[:3] == pytest.approx([0.5, 1.0, 0.55 + 0.45 * 2**-0.5])
        assert rates[5:] == pytest.approx([0.1] * 3)

    def test_constant_after_warm_up(self):
        module = SFT(model=ModelSpec(config=config()), optimizer=OptimizerSpec(lr=1.0, warmup_steps=2, decay_steps=4))
        module.configure_model()
        setup = module.configure_optimizers()
        ratio = setup["lr_scheduler"]["scheduler"].lr_lambdas[0]
        assert [ratio(step) for step in (0, 1, 2, 50)] == pytest.approx([0.5, 1.0, 1.0, 1.0])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"lr": 0.0}, "optimizer.lr must be > 0"),
            ({"schedule": "linear"}, "optimizer.schedule must be"),
            ({"warmup_steps": 5, "decay_steps": 4}, "optimizer.warmup_steps <= optimizer.decay_steps"),
            ({"min_lr_ratio": 1.5}, "optimizer.min_lr_ratio in"),
            ({"betas": [0.9]}, "optimizer.betas wants two numbers"),
        ],
    )
    def test_wrong_values(self, options, words):
        with pytest.raises(ValueError, match=f"SFT: .*{words}"):
            SFT(model=ModelSpec(config=config()), optimizer=OptimizerSpec(**options))


def test_wrong_models():
    with pytest.raises(ValueError, match="SFT: model needs exactly one of path and config"):
        SFT(model=ModelSpec())
    with pytest.raises(ValueError, match="no vocab_size and the data brings no tokenizer"):
        build_network(ModelSpec(config=CONFIGS["gpt2"]), "full", LoraSpec(), None, owner="SFT")
    with pytest.raises(ValueError, match="SFT: tuning must be one of full, lora, qlora, int8"):
        build_network(ModelSpec(config=config()), "half", LoraSpec(), None, owner="SFT")  # type: ignore[arg-type]


def test_intent_counts_labelled_rows():
    module = IntentClassifier()
    with pytest.raises(ValueError, match="the data brings no tokenizer"):
        module.configure_model()
    from modules.networks.text_classifier import BagOfTokensClassifier

    module.network = BagOfTokensClassifier(30, 4)
    batch = TensorDict(
        {
            "prompt_ids": torch.randint(30, (3, 5)), "prompt_length": torch.tensor([5, 2, 1]),
            "reply_ids": torch.randint(30, (3, 4)), "reply_length": torch.tensor([4, 1, 1]),
            "label": torch.tensor([2, 0, -100]),
        },
        [3],
    )  # fmt: skip
    sums, count = module.measure(batch)
    logits = module.network(*(batch[key] for key in list(batch.keys())[:4]))
    assert int(count) == 2
    torch.testing.assert_close(sums["loss"] / count, F.cross_entropy(logits[:2], batch["label"][:2]))
    assert int(sums["accuracy"]) == int((logits[:2].argmax(-1) == batch["label"][:2]).sum())


def reward_model(kind: str = "gpt2") -> RewardModel:
    torch.manual_seed(1)
    return RewardModel(build_network(ModelSpec(config=config(kind)), "full", LoraSpec(), None, owner="test")).eval()


class TestRewardModel:
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_a_score_depends_on_its_own_text_alone(self, kind):
        model = reward_model(kind)
        prompts, replies = [[1, 2, 3], [4], [5, 6]], [[7], [8, 9, 10, 11, 12], []]
        together = model.score(prompts, replies)
        alone = torch.cat([model.score([prompt], [reply]) for prompt, reply in zip(prompts, replies, strict=True)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
        assert together.unique().numel() == 3
        hidden = model.trunk(torch.tensor([[1, 2, 3, 7]]))[0, -1]
        torch.testing.assert_close(together[0], model.value_head.weight[0] @ hidden, rtol=1e-5, atol=1e-6)

    def test_texts_without_tokens_or_too_long(self):
        with pytest.raises(ValueError, match="text 1 has 0 tokens; want 1 to 12"):
            reward_model().score([[1], []], [[2], []])
        with pytest.raises(ValueError, match="text 0 has 13 tokens"):
            reward_model().score([[1] * 12], [[2]])

    def test_comes_back_from_disk_with_the_same_scores(self, tokenizer_dir, tmp_path):
        from datamodules.text.tokenizer import tokenizer_hash

        model = reward_model()
        save_reward_model(model, tokenizer_dir, tmp_path / "rm")
        again = load_reward_model(tmp_path / "rm", tokenizer_hash(tokenizer_dir))
        assert torch.equal(again.score([[1, 2]], [[3]]), model.score([[1, 2]], [[3]]))
        assert not again.training
        assert not any(parameter.requires_grad for parameter in again.parameters())
        assert load_file(tmp_path / "rm" / "value_head.safetensors")["weight"].shape == (1, 16)
        with pytest.raises(TokenizerMismatchError, match="was trained with tokenizer"):
            load_reward_model(tmp_path / "rm", "other")
        (tmp_path / "rm" / "value_head.safetensors").write_bytes(b"cut")
        with pytest.raises(ValueError, match="value_head.safetensors can't be read"):
            load_reward_model(tmp_path / "rm", tokenizer_hash(tokenizer_dir))
        with pytest.raises(FileNotFoundError, match="train one"):
            load_reward_model(tmp_path / "none", "hash")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("tuning", ["full", "lora"])
    def test_head_and_trunk_are_trained_and_everything_has_a_gradient(self, tuning):
        module = PreferenceRewardModel(model=ModelSpec(config=config("llama")), tuning=tuning)
        module.configure_model()
        batch = TensorDict(
            {
                "chosen_ids": torch.randint(30, (3, 6)), "chosen_length": torch.tensor([6, 4, 1]),
                "rejected_ids": torch.randint(30, (3, 4)), "rejected_length": torch.tensor([2, 4, 1]),
                "margin": torch.tensor([0.0, 0.5, 0.0]), "counted": torch.tensor([True, True, False]),
            },
            [3],
        )  # fmt: skip
        sums, count = module.measure(batch)
        sums["loss"].backward()
        scores = [
            module.network.score([batch[f"{name}_ids"][row, : batch[f"{name}_length"][row]].tolist()], [[]])
            for row in range(2)
            for name in ("chosen", "rejected")
        ]
        ahead = torch.cat([scores[0] - scores[1], scores[2] - scores[3]])
        assert float(count) == 2
        torch.testing.assert_close(sums["margin"], ahead.sum(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums["loss"], -F.logsigmoid(ahead - torch.tensor([0.0, 0.5])).sum())
        assert float(sums["accuracy"]) == float((ahead > 0).sum())
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert "network.value_head.weight" in trained
        assert all(p.grad is not None for p in trained.values())  # DDP would wait for one that has none
