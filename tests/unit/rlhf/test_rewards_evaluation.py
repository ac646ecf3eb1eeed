"""The evaluation score: its formula, its diversity figures, its constants."""

from __future__ import annotations

import pytest

from modules.contracts import PromptSample
from modules.rlhf.rewards import DialogueEvaluation, Responses
from modules.rlhf.rewards.evaluation import DIVERSITY, LEXICAL, PAPER_CONSTANTS, diversity, words_without_punctuation

PAIRS = [
    ("I like the red car .", "I like the red bus ."),
    ("I like the red bus !", "Do you ?"),
    ("Yes , of course I do .", "Yes , of course ."),
]


def _batch(pairs: list[tuple[str, str]]) -> Responses:
    size = len(pairs)
    samples = [PromptSample("p", reference) for _, reference in pairs]
    return Responses(samples, [text for text, _ in pairs], [[0]] * size, [[0]] * size, [True] * size)


def test_diversity_by_hand() -> None:
    assert words_without_punctuation("Well , it's ... fine !") == ["well", "it's", "fine"]
    found = diversity([text for text, _ in PAIRS])
    # twice: "i like the", "like the red"; once: "the red car", "the red bus", "yes of course", "of course i",
    # "course i do"
    assert found == {"unique_3": 5, "vocab_3": 7, "distinct_3": 7 / 9, "max_length": 5, "mean_length": 5}
    assert diversity(["a", ""])["vocab_3"] == 0
    assert diversity(["", ""]) == {
        "unique_3": 0, "vocab_3": 0, "distinct_3": 0, "max_length": 0, "mean_length": 0
    }  # fmt: skip


def test_score_is_the_papers_formula() -> None:
    constants = {"max_length": [1.0, 6.0], "unique_3": [0.0, 10.0], "bleu": [0.1, 0.9]}
    found = DialogueEvaluation(constants).compute(_batch(PAIRS))
    used = PAPER_CONSTANTS | constants
    assert set(LEXICAL) | set(DIVERSITY) == set(PAPER_CONSTANTS)
    scaled = {name: (found[name] - low) / (high - low) for name, (low, high) in used.items()}
    lexical = (scaled["sacrebleu"] + scaled["rouge2"] + scaled["bleu"]) / 3
    varied = (scaled["unique_3"] + scaled["vocab_3"] + scaled["max_length"]) / 3
    assert found["lexical"] == pytest.approx(lexical)
    assert found["diversity"] == pytest.approx(varied)
    assert found["score"] == pytest.approx((lexical + varied) / 2)
    assert found["rouge2"] > 0.1  # far above the paper's greatest: the score is not clipped
    assert found["lexical"] > 1


def test_clip_holds_each_figure() -> None:
    found = DialogueEvaluation(clip=True).compute(_batch(PAIRS))
    assert found["lexical"] == pytest.approx(1)
    assert found["diversity"] == 0


def test_counts_per_response_do_not_grow_with_copies_of_other_words() -> None:
    other = [tuple(" ".join(f"{word}x" for word in text.split()) for text in pair) for pair in PAIRS]
    constants = {"unique_3": [0.0, 5.0], "vocab_3": [0.0, 5.0]}
    single = DialogueEvaluation(constants, per="response").compute(_batch(PAIRS[:2]))
    double = DialogueEvaluation(constants, per="response").compute(_batch(PAIRS[:2] + other[:2]))  # type: ignore
    assert single["vocab_3"] == 2
    # With an x at the end the punctuation marks are words: one trigram more in each text.
    assert double["vocab_3"] == pytest.approx((4 + 6) / 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constants": {"rouge": [0.0, 1.0]}}, r"constants\.rouge: no such figure"),
        ({"constants": {"bleu": [1.0, 1.0]}}, "min < max"),
        ({"constants": {"bleu": [0.0]}}, "min < max"),
        ({"constants": {"bleu": [0.0, float("inf")]}}, "min < max"),
        ({"per": "response", "constants": {"unique_3": [0.0, 1.0]}}, r"needs constants\.vocab_3"),
    ],
)
def test_wrong_constants_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DialogueEvaluation(**settings)


def test_nothing_to_evaluate() -> None:
    with pytest.raises(ValueError, match="no responses"):
        DialogueEvaluation().compute(_batch([]))
    assert DialogueEvaluation().compute(_batch([("", "")]))["bleu"] == 0
