"""METEOR's settings, edge cases, and the reader of WordNet's files (on a small database of the same format)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modules.contracts import PromptSample
from modules.rlhf.rewards import Meteor, Responses
from modules.rlhf.rewards.meteor import align, meteor
from modules.rlhf.rewards.wordnet import WordNetSynonyms

LICENCE = "  1 This is the licence\n"


def _data(*synsets: str) -> tuple[str, list[int]]:
    """The text of a data file and the offset of each synset, whose line lacks its offset only."""
    text, offsets = LICENCE, []
    for synset in synsets:
        offsets.append(len(text))
        text += f"{len(text):08d} {synset} | a gloss\n"
    return text, offsets


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    nouns, at = _data("06 n 02 car 0 automobile 0 000", "06 n 03 car 1 railcar 0 railway_car 0 000")
    adjectives, big = _data("00 s 02 big 0 large(p) 0 000")
    files = {
        "data.noun": nouns,
        "index.noun": f"{LICENCE}automobile n 1 0 1 1 {at[0]:08d}\ncar n 2 1 @ 2 1 {at[0]:08d} {at[1]:08d}  \n",
        "data.adj": adjectives,
        "index.adj": f"{LICENCE}big a 1 0 1 1 {big[0]:08d}\nlarge a 1 0 1 1 {big[0]:08d}\n",
        "noun.exc": "carren car\n",
    }
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (tmp_path / name).write_text(files.get(name, "" if name.endswith("exc") else LICENCE))
    return tmp_path


def test_synonyms_of_all_senses_and_inflected_forms(wordnet: Path) -> None:
    synonyms = WordNetSynonyms(wordnet)
    assert synonyms("car") == {"car", "automobile", "railcar"}  # no compound
    assert synonyms("cars") == synonyms("carren") == synonyms("car")
    assert synonyms("Automobile") == {"car", "automobile"}
    assert synonyms("large") == {"big", "large"}
    assert synonyms("cart") == frozenset()


def test_damaged_or_missing_wordnet_is_named(wordnet: Path) -> None:
    (wordnet / "index.noun").write_text("car n 1 0 1 1 00000003\n")
    with pytest.raises(ValueError, match=r"data\.noun has no synset at 3"):
        WordNetSynonyms(wordnet)("car")
    (wordnet / "index.noun").write_text("car n x\n")
    with pytest.raises(ValueError, match=r"index\.noun: the line of 'car' is damaged"):
        WordNetSynonyms(wordnet)("car")
    (wordnet / "verb.exc").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks verb\.exc"):
        WordNetSynonyms(wordnet)


def test_synonym_stage(wordnet: Path) -> None:
    reward = Meteor(["exact", "synonym"], wordnet=str(wordnet))
    assert reward.score_pair("a large automobile", "a big car") == pytest.approx(1 - 0.5 / 27)
    assert Meteor(["exact"]).score_pair("a large automobile", "a big car") == pytest.approx(0.5 / 3)
    before = reward.digest()
    (wordnet / "verb.exc").write_text("went go\n")
    assert Meteor(["exact", "synonym"], wordnet=str(wordnet)).digest() != before
    assert Meteor().digest() == ""


def test_stages_run_in_order_and_from_the_end() -> None:
    # "runs" is taken by the exact stage, so that "run" pairs with "running" in the next.
    stems = {"runs": "run", "running": "run"}
    assert align(["run", "runs"], ["runs", "running"], lambda word: stems.get(word, word)) == [(0, 1), (1, 0)]
    assert align(["a", "a"], ["a", "b", "a"]) == [(0, 0), (1, 2)]
    assert align(["a"], ["a", "a"]) == [(0, 1)]


def test_by_hand() -> None:
    # Three matches in two chunks: P 3/4, R 3/5.
    fmean = 0.75 * 0.6 / (0.9 * 0.75 + 0.1 * 0.6)
    assert meteor(list("abxc"), list("abcyz")) == pytest.approx(fmean * (1 - 0.5 * (2 / 3) ** 3))
    assert meteor(["a"], ["b"]) == meteor([], ["a"]) == meteor(["a"], []) == meteor([], []) == 0


def test_batch_scores_do_not_leak() -> None:
    texts = ["the cat sat", "", "nothing", "The Cats"]
    samples = [PromptSample("p", "the cat sat")] * 4
    batch = Responses(samples, texts, [[0]] * 4, [[0]] * 4, [True] * 4)
    scores = Meteor().score(batch)
    assert scores.dtype == torch.float32
    assert scores[0] == pytest.approx(1 - 0.5 / 27)
    assert scores[1] == scores[2] == 0
    assert 0 < scores[3] < scores[0]
    assert Meteor(lowercase=False, stages=["exact"]).score(batch)[3] == 0
    for row in range(4):
        one = Responses(samples[:1], texts[row : row + 1], [[0]], [[0]], [True])
        assert Meteor().score(one)[0] == scores[row]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ["exact", "stemm"]}, "unknown stage 'stemm'"),
        ({"stages": ["stem"]}, "must hold exact"),
        ({"stages": ["stem", "exact"]}, "in the order"),
        ({"stages": ["exact", "exact"]}, "in the order"),
        ({"stages": ["exact", "synonym"]}, "come together"),
        ({"wordnet": "somewhere"}, "come together"),
        ({"alpha": 1.5}, "alpha and gamma"),
        ({"beta": -1.0}, "beta >= 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Meteor(**settings)
