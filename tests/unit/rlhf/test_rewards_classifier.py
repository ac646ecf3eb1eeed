"""The bag-of-tokens classifier: features, files, and the intent reward that reads with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modules.contracts import PromptSample
from modules.language.checkpoint import TokenizerMismatchError
from modules.networks.text_classifier import BagOfTokensClassifier
from modules.rlhf.classifier_files import PairInputs, last_utterance, load_classifier, save_classifier
from modules.rlhf.rewards import IntentReward, Responses

END = 9
ACTS = ["inform", "question", "directive"]


class Letters:
    """One token a letter: a is 0, b is 1, ...; spaces are none."""

    hash, vocab_size, eod_id = "letters", 10, END

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text if letter != " "]


@pytest.fixture
def network() -> BagOfTokensClassifier:
    torch.manual_seed(0)
    return BagOfTokensClassifier(10, 3, width=5, hidden=7, dropout=0.5, end_id=END)


@pytest.fixture
def folder(tmp_path: Path, network: BagOfTokensClassifier) -> Path:
    save_classifier(tmp_path / "intent", network, "letters", ACTS)
    return tmp_path / "intent"


def _responses(*rows: tuple[str, list[int], dict]) -> Responses:
    size = len(rows)
    samples = [PromptSample(prompt, labels=labels) for prompt, _, labels in rows]
    return Responses(samples, [""] * size, [[0]] * size, [ids for _, ids, _ in rows], [True] * size)


def test_features_are_means_and_ends(network: BagOfTokensClassifier) -> None:
    network.eval()
    table = network.embedding.weight
    got = network(torch.tensor([[1, 2, 7, 7]]), torch.tensor([2]), torch.tensor([[3, 4, 5, END, 8]]), torch.tensor([4]))
    features = [table[[1, 2]].mean(0), table[[3, 4, 5]].mean(0), table[3], table[5]]
    torch.testing.assert_close(got, network.head(torch.cat(features))[None])
    # A reply that was cut, and one of nothing but its end.
    cut = network(torch.tensor([[1, 2]]), torch.tensor([2]), torch.tensor([[3, 4, 5]]), torch.tensor([3]))
    torch.testing.assert_close(cut, got)
    nothing = network(torch.tensor([[1]]), torch.tensor([0]), torch.tensor([[END]]), torch.tensor([1]))
    torch.testing.assert_close(nothing, network.head(torch.zeros(20))[None])


def test_padding_changes_nothing(network: BagOfTokensClassifier) -> None:
    network.eval()
    prompts, replies = torch.randint(9, (6, 4)), torch.randint(9, (6, 5))
    heard, said = torch.tensor([4, 1, 2, 3, 0, 4]), torch.tensor([5, 1, 0, 2, 3, 4])
    together = network(prompts, heard, replies, said)
    for row in range(6):
        alone = network(
            prompts[row : row + 1, : max(int(heard[row]), 1)], heard[row : row + 1],
            replies[row : row + 1, : max(int(said[row]), 1)], said[row : row + 1],
        )  # fmt: skip
        torch.testing.assert_close(alone[0], together[row])


def test_learns_to_tell_questions_by_their_last_token() -> None:
    torch.manual_seed(1)
    network = BagOfTokensClassifier(10, 2, width=8, hidden=16, end_id=END)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(150):
        reply, length = torch.randint(9, (64, 6)), torch.randint(1, 6, (64,))
        label = (reply[torch.arange(64), length - 1] < 4).long()
        reply[torch.arange(64), length] = END
        loss = torch.nn.functional.cross_entropy(network(reply, length, reply, length + 1), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_saved_and_loaded_network_is_the_same(folder: Path, network: BagOfTokensClassifier) -> None:
    loaded, labels = load_classifier(folder, "letters")
    assert labels == ACTS
    assert not loaded.training
    assert loaded.sizes == network.sizes
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_files_that_do_not_fit(folder: Path, network: BagOfTokensClassifier) -> None:
    with pytest.raises(TokenizerMismatchError, match=r"trained with tokenizer letters, the data's is other"):
        load_classifier(folder, "other")
    with pytest.raises(FileNotFoundError, match=r"classifier\.json does not exist"):
        load_classifier(folder / "none", "letters")
    with pytest.raises(ValueError, match="2 labels for 3 classes"):
        save_classifier(folder, network, "letters", ACTS[:2])
    settings = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(settings | {"labels": ["one"]}))
    with pytest.raises(ValueError, match="1 labels for 3 classes"):
        load_classifier(folder, "letters")
    settings["sizes"]["width"] = 6
    (folder / "classifier.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="can't be read"):
        load_classifier(folder, "letters")
    (folder / "classifier.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe"):
        load_classifier(folder, "letters")


@pytest.mark.parametrize("sizes", [{"classes": 1}, {"width": 0}, {"dropout": 1.0}])
def test_wrong_sizes(sizes: dict) -> None:
    with pytest.raises(ValueError, match="BagOfTokensClassifier"):
        BagOfTokensClassifier(**({"vocab_size": 4, "classes": 2} | sizes))


def test_last_utterance() -> None:
    assert last_utterance("how are you ? <EOU> fine . <EOU>") == " fine ."
    assert last_utterance("how are you ? <EOU> fine .") == " fine ."
    assert last_utterance("fine .") == last_utterance("fine . <EOU>") == "fine ."
    assert last_utterance("") == last_utterance(" <EOU> ") == ""


def test_inputs_keep_the_last_utterance_only() -> None:
    inputs = PairInputs(Letters(), max_prompt_tokens=2)
    prompt, heard, reply, said = inputs(["aa <EOU> b c d", "a <EOU>", ""], [[5, END], [], [1, 2, 3]])
    assert heard.tolist() == [2, 1, 0]
    assert prompt[0].tolist() == [2, 3]
    assert prompt[1, 0] == 0
    assert said.tolist() == [2, 0, 3]
    assert reply[2].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        PairInputs(Letters(), max_prompt_tokens=0)


def test_intent_reward(folder: Path, network: BagOfTokensClassifier) -> None:
    network.eval()
    rows = [("aa <EOU> bcd <EOU>", [1, 2, END], {"act": 1}), ("e <EOU>", [3], {"act": 0}), ("f", [END], {"act": 2})]
    batch = _responses(*rows)
    reward = IntentReward(str(folder), mode="prob", batch_size=2)
    reward.setup(Letters(), torch.device("cpu"))
    probability = reward.score(batch)
    want = network(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([[1, 2]]), torch.tensor([2])).softmax(-1)
    assert probability[0] == pytest.approx(want[0, 1].item(), abs=1e-6)
    accuracy = IntentReward(str(folder))
    accuracy.setup(Letters(), torch.device("cpu"))
    every = torch.stack(
        [accuracy.score(_responses(*[(prompt, ids, {"act": act}) for prompt, ids, _ in rows])) for act in range(3)]
    )
    assert every.sum(0).tolist() == [1, 1, 1]  # one act is the most probable one
    assert every.argmax(0)[0] == want.argmax()
    for row in range(3):
        torch.testing.assert_close(reward.score(_responses(rows[row]))[0], probability[row])


def test_intent_reward_names_what_is_wrong(folder: Path) -> None:
    reward = IntentReward(str(folder))
    with pytest.raises(RuntimeError, match="setup"):
        reward.score(_responses(("a", [1], {"act": 0})))
    reward.setup(Letters(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"sample 1 has no label 'act' \(it has: emotion\); prompt 'b'"):
        reward.score(_responses(("a", [1], {"act": 0}), ("b", [1], {"emotion": 0})))
    with pytest.raises(ValueError, match="label act=3 is none of 0 inform, 1 question, 2 directive"):
        reward.score(_responses(("a", [1], {"act": 3})))
    before = reward.digest()
    save_classifier(folder, BagOfTokensClassifier(10, 3), "letters", ACTS)
    assert IntentReward(str(folder)).digest() != before
    with pytest.raises(ValueError, match="batch_size"):
        IntentReward(str(folder), batch_size=0)
