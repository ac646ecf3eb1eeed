"""METEOR against nltk's `single_meteor_score`, without and with WordNet."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.rlhf.rewards.meteor import Meteor
from modules.rlhf.rewards.wordnet import WordNetSynonyms

nltk_meteor = pytest.importorskip("nltk.translate.meteor_score")

# Words that share stems, so that the stem stage has work, and repeat, so that the order of matching shows.
_STEMS = (
    "the The a cat cats run runs running ran ponies pony caress caresses happy happily happiness relate relational "
    "relation , . ? I'm don't agreed agree plastered motoring sky skies dying die lying news"
)
_WORDS = _STEMS.split()
_WORDNET = Path(os.environ.get("PLUMBLINE_WORDNET", "/usr/share/wordnet"))
# The fixed list of lexicographer files (lexnames(5WN)), which some distributions of WordNet leave out.
_FILES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
)
_LEXNAMES = _FILES.split()


class _NoSynsets:
    def synsets(self, word: str) -> list:
        return []


class _SameStem:
    def stem(self, word: str) -> str:
        return word


def _pairs(words: list[str], count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    draw = random.Random(seed)
    return [tuple(draw.choices(words, k=draw.randint(0, 14)) for _ in range(2)) for _ in range(count)]  # type: ignore


def test_equal_to_nltk_on_random_pairs() -> None:
    reward = Meteor()
    scores = []
    for hypothesis, reference in _pairs(_WORDS, 400, seed=1):
        want = nltk_meteor.single_meteor_score(reference, hypothesis, wordnet=_NoSynsets())
        scores.append(reward.score_pair(" ".join(hypothesis), " ".join(reference)))
        assert scores[-1] == want, (hypothesis, reference)
    assert len(set(scores)) > 150


@pytest.mark.parametrize(("alpha", "beta", "gamma"), [(0.5, 1.0, 0.2), (1.0, 0.0, 1.0), (0.0, 2.5, 0.0)])
def test_equal_to_nltk_with_other_constants(alpha: float, beta: float, gamma: float) -> None:
    reward = Meteor(["exact"], alpha=alpha, beta=beta, gamma=gamma, lowercase=False)
    constants = {"alpha": alpha, "beta": beta, "gamma": gamma}
    for hypothesis, reference in _pairs(_WORDS, 60, seed=2):
        want = nltk_meteor.single_meteor_score(
            reference, hypothesis, preprocess=str, stemmer=_SameStem(), wordnet=_NoSynsets(), **constants
        )
        assert reward.score_pair(" ".join(hypothesis), " ".join(reference)) == want


_TEXT = st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=6), max_size=8).map(" ".join)
_REWARD = Meteor()


@settings(max_examples=150, deadline=None)
@given(_TEXT, _TEXT, st.booleans())
def test_equal_to_nltk_on_any_text(hypothesis: str, reference: str, mixed: bool) -> None:
    if mixed:
        reference = f"{reference} {hypothesis}"
    want = nltk_meteor.single_meteor_score(reference.split(), hypothesis.split(), wordnet=_NoSynsets())
    assert _REWARD.score_pair(hypothesis, reference) == want


@pytest.mark.skipif(not (_WORDNET / "index.noun").is_file(), reason="no WordNet files (PLUMBLINE_WORDNET)")
@pytest.mark.parametrize(
    ("reference", "hypothesis", "want"),
    [
        ("the cat sat on the mat", "the cat was sitting on the mat", 0.79344),
        ("a big car", "a large automobile", 0.16667),
        ("good old time", "good old time", 0.98148),
        ("the the the", "the cat", 0.17241),
        ("dogs run", "a dog running", 0.89286),
    ],
)
def test_values_with_wordnet(reference: str, hypothesis: str, want: float, wordnet_reward: Meteor) -> None:
    assert wordnet_reward.score_pair(hypothesis, reference) == pytest.approx(want, abs=5e-6)


@pytest.fixture(scope="module")
def wordnet_reward() -> Meteor:
    return Meteor(["exact", "stem", "synonym"], str(_WORDNET))


@pytest.mark.slow
@pytest.mark.skipif(not (_WORDNET / "index.noun").is_file(), reason="no WordNet files (PLUMBLINE_WORDNET)")
def test_equal_to_nltk_with_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wordnet_reward: Meteor) -> None:
    """Synonyms of thousands of words, and whole scores, are those of nltk's own reader of the same files."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    folder = tmp_path / "corpora" / "wordnet"
    shutil.copytree(_WORDNET, folder)
    if not (folder / "lexnames").is_file():
        kinds = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
        lines = [f"{i:02d}\t{name}\t{kinds[name.split('.')[0]]}\n" for i, name in enumerate(_LEXNAMES)]
        (folder / "lexnames").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.warns(UserWarning, match="multilingual"):
        reader = WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)

    known = [
        line.split(" ", 1)[0]
        for part in ("adj", "adv", "noun", "verb")
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines()
        if not line.startswith(" ")
    ]
    draw = random.Random(3)
    words = [word for word in draw.sample(known, 3000) if "_" not in word]
    words += [
        f"{word}{ending}" for word, ending in zip(words, ["s", "es", "ed", "ing", "er", "est"] * 100, strict=False)
    ]
    words += ["men", "geese", "better", "went", "Washington", "unheard-of-word", "galore", "afraid"]
    synonyms = WordNetSynonyms(_WORDNET)
    assert "goose" in synonyms("geese")
    for word in words:
        lemmas = {lemma.name() for synset in reader.synsets(word) for lemma in synset.lemmas()}
        assert synonyms(word) == {name for name in lemmas if "_" not in name}, word

    # Sentences of words and of their synonyms, which the third stage must pair.
    matched = 0
    for _ in range(250):
        hypothesis = draw.choices(words, k=draw.randint(1, 12))
        reference = [
            draw.choice([*sorted(synonyms(word)), word]) if draw.random() < 0.5 else word for word in hypothesis
        ]
        draw.shuffle(reference)
        want = nltk_meteor.single_meteor_score(reference, hypothesis, wordnet=reader)
        got = wordnet_reward.score_pair(" ".join(hypothesis), " ".join(reference))
        assert got == want, (hypothesis, reference)
        plain = Meteor().score_pair(" ".join(hypothesis), " ".join(reference))
        matched += got > plain
    assert matched > 50
