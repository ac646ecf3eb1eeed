"""Rewards from Hugging Face classifiers, preference models and functions of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.contracts import PromptSample
from modules.rlhf import reward_model
from modules.rlhf.rewards import CallableReward, HFClassifier, PreferenceReward, Responses, RewardError, score_all

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "good", "bad", "fine", "day", "a", "not", "very"]
TEXTS = ["a good day", "bad", "not a very very very good day", "", "fine {prompt} day"]
CPU = torch.device("cpu")


def _batch(texts: Sequence[str], labels: Sequence[int] | None = None) -> Responses:
    size = len(texts)
    samples = [PromptSample(f"very {i}", "ref", {} if labels is None else {"act": labels[i]}) for i in range(size)]
    return Responses(samples, list(texts), [[0]] * size, [[1]] * size, [True] * size)


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, num_labels=3, id2label={0: "sad", 1: "glad", 2: "calm"}, initializer_range=0.8,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with one output, which must find each text's last token."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=1, initializer_range=0.8,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _ready(*args: Any, **settings: Any) -> HFClassifier:
    reward = HFClassifier(*args, **settings)
    reward.setup(None, CPU)
    return reward


def test_modes_agree_with_the_model_itself(bert: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    batch = _batch(TEXTS)
    with torch.no_grad():
        logits = torch.cat(
            [
                model(**tokenizer(f"{sample.prompt} : {text}", return_tensors="pt")).logits
                for sample, text in zip(batch.samples, TEXTS, strict=True)
            ]
        )
    settings = {"template": "{prompt} : {response}", "batch_size": 2}
    scores = _ready(str(bert), label="glad", **settings).score(batch)
    torch.testing.assert_close(scores, logits.softmax(-1)[:, 1])
    assert scores.unique().numel() == len(TEXTS)
    torch.testing.assert_close(_ready(str(bert), label_index=2, mode="logit", **settings).score(batch), logits[:, 2])
    most = [_ready(str(bert), label_index=index, mode="argmax", **settings).score(batch) for index in range(3)]
    assert torch.equal(torch.stack(most).argmax(0), logits.argmax(-1))
    own = _ready(str(bert), label_key="act", **settings).score(_batch(TEXTS, [0, 1, 2, 1, 0]))
    torch.testing.assert_close(own, logits.softmax(-1)[torch.arange(5), torch.tensor([0, 1, 2, 1, 0])])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_score_does_not_depend_on_its_neighbours(kind: str, request: pytest.FixtureRequest) -> None:
    settings: dict = {"label": "glad"} if kind == "bert" else {}
    reward = _ready(str(request.getfixturevalue(kind)), template="{response}", **settings)
    together = reward.score(_batch(TEXTS))
    assert together.unique().numel() >= len(TEXTS) - 1
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(reward.score(_batch([text]))[0], together[row])
    assert reward.score(_batch([])).shape == (0,)
    assert ((together > 0) & (together < 1)).all()


def test_long_texts_keep_their_end(bert: Path) -> None:
    reward = _ready(str(bert), label="glad", template="{response}", mode="logit")
    assert reward.max_length == 12
    ending = "not a very good day not a very bad day a day"
    scores = reward.score(_batch(["bad " * 40 + ending, ending, ending + " bad" * 40]))
    torch.testing.assert_close(scores[0], scores[1])
    assert scores[2] != scores[1]


def test_digest_follows_the_weights(bert: Path, gpt2: Path) -> None:
    assert HFClassifier(str(bert)).digest() == HFClassifier(str(bert)).digest() != HFClassifier(str(gpt2)).digest()


def test_wrong_classifiers_are_refused(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label 'happy' is none of the model's: sad, glad, calm"):
        _ready(str(bert), label="happy")
    with pytest.raises(ValueError, match=r"label_index must be in \[0, 3\)"):
        _ready(str(bert), label_index=3)
    with pytest.raises(ValueError, match="3 classes: give label"):
        _ready(str(bert))
    with pytest.raises(ValueError, match="only one of"):
        HFClassifier(str(bert), label="sad", label_index=0)
    with pytest.raises(ValueError, match="template"):
        HFClassifier(str(bert), template="{prompt}")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        _ready(str(tmp_path))
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match="no safetensors weights"):
        _ready(str(tmp_path))
    with pytest.raises(ValueError, match="sample 1: label act=3 is none of the 3 classes"):
        _ready(str(bert), label_key="act").score(_batch(TEXTS[:2], [0, 3]))
    with pytest.raises(RuntimeError, match="setup"):
        HFClassifier(str(bert), label="sad").score(_batch(TEXTS))


def test_a_language_model_is_no_classifier(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1, num_labels=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    _tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no trained classifier: it has no score\.weight"):
        _ready(str(tmp_path))


def word_count(prompts: list, responses: list, references: list, labels: list, factor: float = 1.0) -> list[float]:
    assert len(prompts) == len(responses) == len(references) == len(labels)
    return [factor * len(text.split()) for text in responses]


def too_few(prompts: list, responses: list, references: list, labels: list) -> list[float]:
    return [0.0]


def not_numbers(prompts: list, responses: list, references: list, labels: list) -> list:
    return ["much"] * len(responses)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> str:
    import sys
    import types

    module = types.ModuleType("my_rewards")
    for name, value in {"word_count": word_count, "few": too_few, "words": not_numbers, "number": 3}.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return "my_rewards"


def test_callable(mine: str) -> None:
    reward = CallableReward(f"{mine}.word_count", {"factor": 0.5}, bounds=[0, 10])
    assert reward.bounds == (0, 10)
    assert reward.score(_batch(TEXTS[:3])).tolist() == [1.5, 0.5, 3.5]
    assert CallableReward(f"{mine}.word_count").bounds == (-float("inf"), float("inf"))


def test_wrong_callables_are_named(mine: str) -> None:
    with pytest.raises(RewardError, match=r"rewards\.length: .*my_rewards\.few gave 1 scores for 2 responses"):
        score_all({"length": CallableReward(f"{mine}.few")}, _batch(TEXTS[:2]))
    with pytest.raises(ValueError, match="must give a float a response"):
        CallableReward(f"{mine}.words").score(_batch(TEXTS[:2]))
    for name, message in (
        ("no_such_package.reward", "no module 'no_such_package'"),
        (f"{mine}.nothing", "module 'my_rewards' has no 'nothing'"),
    ):
        with pytest.raises(ImportError, match=message):
            CallableReward(name).setup()
    with pytest.raises(ValueError, match="is a int, no function"):
        CallableReward(f"{mine}.number").setup()
    with pytest.raises(ValueError, match="dotted name"):
        CallableReward("reward")
    with pytest.raises(ValueError, match="bounds"):
        CallableReward("a.b", bounds=[1, 0])


class _Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def score(self, prompt_tokens: Sequence[Sequence[int]], response_tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        self.sizes.append(len(prompt_tokens))
        pairs = zip(prompt_tokens, response_tokens, strict=True)
        return torch.tensor([float(sum(prompt) - 2 * sum(response)) for prompt, response in pairs])


def test_preference_reward_scores_in_batches_of_similar_length(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _Network()

    def load(folder: str, tokenizer_hash: str) -> _Network:
        assert (folder, tokenizer_hash) == ("somewhere", "abc")
        return network

    monkeypatch.setattr(reward_model, "load_reward_model", load)
    reward = PreferenceReward("somewhere", batch_size=2)

    class _Named:
        hash = "abc"

    reward.setup(_Named(), CPU)
    prompts, responses = [[1], [2, 2, 2], [3, 3], [4], [5]], [[1], [1, 2], [7, 7], [0], [2, 2, 2]]
    batch = Responses([PromptSample("")] * 5, [""] * 5, prompts, responses, [True] * 5)
    assert reward.score(batch).tolist() == [-1, 0, -22, 4, -7]
    assert network.sizes == [2, 2, 1]
    with pytest.raises(ValueError, match="batch_size"):
        PreferenceReward("somewhere", batch_size=0)
    with pytest.raises(RuntimeError, match="setup"):
        PreferenceReward("somewhere").score(batch)
