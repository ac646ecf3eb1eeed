"""The corpus figures of the evaluation score against reference packages."""

from __future__ import annotations

import random

import pytest

from modules.contracts import PromptSample
from modules.rlhf.rewards.base import Responses
from modules.rlhf.rewards.evaluation import DialogueEvaluation, corpus_bleu

sacrebleu = pytest.importorskip("sacrebleu")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
_LINE = "the cat sat on a mat and saw two dogs run , then it slept . Why ? Because I like-it !"
_WORDS = _LINE.split()


def _corpus(seed: int, shortest: int, longest: int = 20, count: int = 120) -> tuple[list[list[str]], list[list[str]]]:
    draw = random.Random(seed)
    hypotheses, references = [], []
    for _ in range(count):
        reference = draw.choices(_WORDS, k=draw.randint(shortest, longest))
        kept = [word if draw.random() < 0.7 else draw.choice(_WORDS) for word in reference]
        hypotheses.append(kept[: draw.randint(shortest, len(kept))])
        references.append(reference)
    return hypotheses, references


@pytest.mark.parametrize("seed", range(5))
def test_corpus_bleu_equals_nltk(seed: int) -> None:
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    hypotheses, references = _corpus(seed, shortest=4)
    got = corpus_bleu(hypotheses, references)
    assert got == pytest.approx(bleu_score.corpus_bleu([[one] for one in references], hypotheses), abs=1e-9)
    assert 0.05 < got < 1


@pytest.mark.parametrize("shortest", [0, 1, 4])
def test_corpus_bleu_equals_sacrebleu_without_tokenizer(shortest: int) -> None:
    """Hypotheses shorter than an n-gram count nothing for it (nltk would count one)."""
    hypotheses, references = _corpus(7, shortest, longest=6)
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    want = metric.corpus_score([" ".join(one) for one in hypotheses], [[" ".join(one) for one in references]]).score
    assert corpus_bleu(hypotheses, references) == pytest.approx(want / 100, abs=1e-9)
    assert want > 0


def test_longer_hypotheses_pay_no_brevity_penalty() -> None:
    assert corpus_bleu([["a", "b", "c", "d"]], [["a", "b", "c", "d"]]) == pytest.approx(1)
    # 4/5, 3/4, 2/3, 1/2
    assert corpus_bleu([list("abcde")], [list("abcd")]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 / 2) ** 0.25)
    assert corpus_bleu([["a", "b"]], [["a", "b"]]) == 0
    assert corpus_bleu([[]], [["a"]]) == 0


def test_figures_equal_the_packages() -> None:
    hypotheses, references = _corpus(11, shortest=0)
    texts, wanted = [" ".join(one) for one in hypotheses], [" ".join(one) for one in references]
    size = len(texts)
    batch = Responses([PromptSample("", one) for one in wanted], texts, [[0]] * size, [[0]] * size, [True] * size)
    figures = DialogueEvaluation().compute(batch)
    assert figures["sacrebleu"] == pytest.approx(
        sacrebleu.corpus_bleu(texts, [wanted], force=True).score / 100, abs=1e-9
    )
    scorer = rouge_scorer.RougeScorer(["rouge2"])
    rouge = [scorer.score(one, text)["rouge2"].fmeasure for text, one in zip(texts, wanted, strict=True)]
    assert figures["rouge2"] == pytest.approx(sum(rouge) / size, abs=1e-12)
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    assert figures["bleu"] == pytest.approx(metric.corpus_score(texts, [wanted]).score / 100, abs=1e-9)
