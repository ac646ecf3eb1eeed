"""BLEU and ROUGE rewards against direct calls of their reference packages and hand-worked values."""

from __future__ import annotations

import math
import random

import pytest

from modules.contracts import PromptSample
from modules.rlhf.rewards.base import Responses
from modules.rlhf.rewards.overlap import Bleu, Rouge, SacreBleu

sacrebleu = pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

_LINE = "the cat sat on a mat and saw two dogs run , then it slept . Why ?"
_WORDS = _LINE.split()


def _batch(count: int, seed: int) -> Responses:
    draw = random.Random(seed)
    texts, samples = [], []
    for _ in range(count):
        reference = draw.choices(_WORDS, k=draw.randint(1, 14))
        start = draw.randint(0, len(reference))
        texts.append(" ".join(reference[start:] + draw.choices(_WORDS, k=draw.randint(0, 5))))
        samples.append(PromptSample("", " ".join(reference)))
    return Responses(samples, texts, [[0]] * count, [[0]] * count, [True] * count)


def test_bleu_by_hand() -> None:
    # 1-grams 5 of 6, 2-grams 4 of 5, 3-grams 3 of 4, 4-grams 2 of 3; brevity exp(1 - 7/6).
    reward = Bleu()
    want = math.exp(1 - 7 / 6) * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert reward.score_pair("a b c d e x", "a b c d e f g") == pytest.approx(want, abs=1e-9)
    assert reward.score_pair("a b c", "a b c") == 0  # no 4-gram
    assert Bleu(max_order=3).score_pair("a b c", "a b c") == pytest.approx(1)


def test_bleu_equals_nltk_sentence_bleu() -> None:
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    reward = Bleu()
    batch = _batch(150, seed=4)
    positive = 0
    for text, sample, got in zip(batch.texts, batch.samples, reward.score(batch).tolist(), strict=True):
        if len(text.split()) < 4 or got == 0:
            continue  # nltk warns, and gives a tiny number, where an order has no match
        want = bleu_score.sentence_bleu([sample.reference.split()], text.split())
        assert got == pytest.approx(want, abs=1e-7)
        positive += 1
    assert positive > 40


def test_sacrebleu_equals_its_sentence_bleu() -> None:
    batch = _batch(100, seed=5)
    scores = SacreBleu().score(batch)
    want = [
        sacrebleu.sentence_bleu(text, [sample.reference]).score / 100
        for text, sample in zip(batch.texts, batch.samples, strict=True)
    ]
    assert scores.tolist() == pytest.approx(want, abs=1e-6)
    assert len(set(scores.tolist())) > 50


def test_rouge_by_hand_and_by_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    # Bigrams of "the cat sat on" shared with "the cat sat down": 2 of 3 each way.
    assert Rouge("rouge2").score_pair("the cat sat on", "the cat sat down") == pytest.approx(2 / 3)
    assert Rouge("rougeL").score_pair("a x b y c", "a b c") == pytest.approx(2 * 0.6 * 1 / 1.6)
    assert Rouge("rouge1", measure="recall").score_pair("a x b y c", "a b c") == 1
    batch = _batch(80, seed=6)
    for kind in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([kind], use_stemmer=True)
        want = [
            scorer.score(sample.reference, text)[kind].fmeasure
            for text, sample in zip(batch.texts, batch.samples, strict=True)
        ]
        assert Rouge(kind, stemmer=True).score(batch).tolist() == pytest.approx(want, abs=1e-6)
