"""Rewards counted on words: ranges, empty texts, settings."""

from __future__ import annotations

import pytest
import torch

from modules.contracts import PromptSample
from modules.rlhf.rewards import Bleu, DistinctNgrams, Repetition, ResponseLength, Responses, Reward, Rouge, SacreBleu


def _batch(*pairs: tuple[str, str]) -> Responses:
    tokens = [list(range(len(text.split()) + 1)) for text, _ in pairs]
    size = len(pairs)
    return Responses(
        [PromptSample("p", reference) for _, reference in pairs], [text for text, _ in pairs], [[0]] * size, tokens,
        [True] * size,
    )  # fmt: skip


@pytest.mark.parametrize("reward", [Bleu(), Bleu(smoothing="exp"), SacreBleu(), Rouge(), Rouge("rougeL")])
def test_overlap_is_0_for_nothing_and_1_for_the_reference(reward: Reward) -> None:
    text = "is this the same sentence ?"
    scores = reward.score(_batch((text, text), ("", text), (text, ""), ("", ""), ("x y z w", text)))
    assert scores.dtype == torch.float32
    assert scores[0] == pytest.approx(1)
    assert scores[1:].tolist() == [0, 0, 0, 0]
    assert reward.bounds == (0, 1)
    assert scores.max() <= 1


def test_scores_do_not_depend_on_the_batch() -> None:
    pairs = [("a b c d e", "a b c d x"), ("x y", "a b c d"), ("a b c d", "a b c d e f g")]
    for reward in (Bleu(), SacreBleu(), Rouge("rouge1")):
        together = reward.score(_batch(*pairs))
        assert [reward.score(_batch(pair)).item() for pair in pairs] == together.tolist()


def test_response_length() -> None:
    batch = _batch(("a", ""), ("a b", ""), ("a b c d", ""), ("a b c d e f g h i", ""), ("", ""))
    assert ResponseLength(target=4).score(batch).tolist() == [0.25, 0.5, 1, 0, 0]
    assert ResponseLength(minimum=2).score(batch).tolist() == [0.5, 1, 1, 1, 0]
    assert ResponseLength(maximum=6).score(batch).tolist() == [1, 1, 1, 0.5, 1]
    # The token that ends the response does not count.
    assert ResponseLength(target=4, unit="tokens").score(batch).tolist() == [0.25, 0.5, 1, 0, 0]
    cut = Responses(batch.samples, batch.texts, batch.prompt_tokens, batch.response_tokens, [False] * 5)
    assert ResponseLength(target=4, unit="tokens").score(cut).tolist() == [0.5, 0.75, 0.75, 0, 0.25]


@pytest.mark.parametrize(
    "settings", [{}, {"target": 3, "minimum": 2}, {"target": 0}, {"minimum": 5, "maximum": 3}, {"maximum": 0}]
)
def test_response_length_settings(settings: dict) -> None:
    with pytest.raises(ValueError, match="ResponseLength"):
        ResponseLength(**settings)


def test_repetition_and_distinct() -> None:
    batch = _batch(("a b a b a", ""), ("a b c d", ""), ("a", ""), ("", ""))
    assert Repetition(2).score(batch).tolist() == [-0.5, 0, 0, 0]  # ab ba ab ba
    assert DistinctNgrams(2).score(batch).tolist() == [0.5, 1, 0, 0]
    assert DistinctNgrams(1).score(batch)[0] == pytest.approx(0.4)
    for kind in (Repetition, DistinctNgrams):
        with pytest.raises(ValueError, match="order must be at least 1"):
            kind(0)
    with pytest.raises(ValueError, match="max_order"):
        Bleu(max_order=0)
