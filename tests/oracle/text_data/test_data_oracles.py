"""Data core against independent truths: greedy reference, plain token stream, transformers, counts from the sheet."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from datamodules.text.decontamination import EvaluationIndex, contamination
from datamodules.text.mixture import Blend, mixture_weights
from datamodules.text.packing import PackedSource
from datamodules.text.readers import iterate_documents, list_files
from datamodules.text.shards import TokenShard, write_shard
from datamodules.text.specs import DecontaminationSpec, ReadSpec
from datamodules.text.tokenizer import TextTokenizer, tokenizer_hash, train_tokenizer

PAPER_MIXTURES = ["2:4:1", "2:4:2", "4:2:1", "4:2:2", "4:4:1", "4:4:2"]


def greedy(weights: list[float], amount: int) -> list[int]:
    """The rule as the sheet states it, argmax by numpy (lowest index among equals)."""
    share = np.array(weights) / math.fsum(weights)
    counts = np.zeros(len(weights))
    drawn = []
    for i in range(amount):
        chosen = int(np.argmax(share * max(i, 1) - counts))
        counts[chosen] += 1
        drawn.append(chosen)
    return drawn


def paper_weights(mixture: str) -> list[float]:
    names = ["arxiv", "web", "code", "pile", "github"]
    shares = mixture_weights(names, {}, mixture, {"pile": 0.02, "github": 0.03})
    return list(shares.values())


def test_blend_equals_greedy_reference_for_1e5_draws() -> None:
    weights = paper_weights("2:4:1")
    assert Blend(weights).take(100_000)[0].tolist() == greedy(weights, 100_000)


def farthest(weights: list[float]) -> tuple[float, float]:
    """Largest lead and largest lag of any source against its target over all prefixes of 20,000 draws."""
    source, _ = Blend(weights).take(20_000)
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    error = counts - np.arange(1, 20_001)[:, None] * np.array(weights)
    return error.max(), -error.min()


@pytest.mark.parametrize("mixture", PAPER_MIXTURES)
def test_blend_counts_stay_within_one_of_target_for_all_prefixes(mixture: str) -> None:
    names = ["arxiv", "web", "code"]
    assert max(farthest(list(mixture_weights(names, {}, mixture).values()))) <= 1
    # With the two replay sources the greedy rule itself lets a big source lag by up to 1.18 items.
    lead, lag = farthest(paper_weights(mixture))
    assert lead <= 1
    assert lag <= 1.2


def test_extreme_ratio_gives_the_other_source_only() -> None:
    # The rule's max(i, 1) makes the first two draws look alike, so a vanishing source may get one early item.
    assert Blend([1.0, 1e-12]).take(10_000)[0][2:].sum() == 0


@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_packing_reproduces_the_token_stream(tmp_path: Path, seq_len: int) -> None:
    rng = random.Random(0)
    documents = [[rng.randrange(1, 50_000) for _ in range(rng.randrange(0, 90))] for _ in range(60)]
    with write_shard(tmp_path / "s", vocab_size=50_000, eod_id=0, tokenizer_hash="h") as writer:
        writer.append(documents, 1)
    stream = np.array([token for document in documents for token in [*document, 0]])
    packed = PackedSource(TokenShard(tmp_path / "s"), "s", seq_len, shuffle=False)
    tokens, _ = packed.fetch(np.arange(packed.windows_per_epoch))
    whole = packed.windows_per_epoch * seq_len
    assert len(stream) - 1 - whole < seq_len  # only a tail shorter than T is left
    np.testing.assert_array_equal(tokens[:, :-1].ravel(), stream[:whole])
    np.testing.assert_array_equal(tokens[:, 1:].ravel(), stream[1 : whole + 1])  # every token but the first, once


def test_shuffled_epoch_trains_on_every_document_token_once(tmp_path: Path) -> None:
    documents = [[1000 * d + i + 1 for i in range(1 + d % 9)] for d in range(60)]  # all tokens different
    with write_shard(tmp_path / "s", vocab_size=1 << 17, eod_id=0, tokenizer_hash="h") as writer:
        writer.append(documents, 1)
    packed = PackedSource(TokenShard(tmp_path / "s"), "s", 8, seed=3, cache_dir=tmp_path)
    for epoch in range(3):
        items = np.arange(packed.windows_per_epoch) + epoch * packed.windows_per_epoch
        targets = Counter(packed.fetch(items)[0][:, 1:].ravel().tolist())
        del targets[0]
        assert set(targets.values()) == {1}
        assert sum(targets.values()) >= sum(map(len, documents)) - 1 - 8


def questions(data_dir: Path, name: str) -> list[str]:
    return [json.loads(line)["question"] for line in (data_dir / "math" / name).read_text().splitlines()]


@pytest.mark.parametrize(("ngram", "hits"), [(30, 0), (13, 3)])
def test_gsm8k_contamination_equals_the_counts_of_the_sheet(data_dir: Path, ngram: int, hits: int) -> None:
    spec = DecontaminationSpec([str(data_dir / "math" / "gsm8k_test.jsonl")], ngram, fields=["question"])
    report = contamination(EvaluationIndex.from_spec(spec), questions(data_dir, "gsm8k_train.jsonl"))
    assert report["files"]["gsm8k_test.jsonl"]["items"] == 1319
    assert report["files"]["gsm8k_test.jsonl"]["hit_items"] == hits


def test_contamination_equals_a_set_of_word_tuples(data_dir: Path) -> None:
    train, test = questions(data_dir, "gsm8k_train.jsonl")[:1500], questions(data_dir, "gsm8k_test.jsonl")[:400]

    def grams(text: str, n: int) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    for n in (5, 8):
        index = EvaluationIndex(n)
        for number, text in enumerate(test):
            index.add("f", number, {"question": text})
        found = {int(item) for item in contamination(index, train)["files"]["f"]["hits"]}
        union = set(itertools.chain.from_iterable(grams(text, n) for text in train))
        assert found == {number for number, text in enumerate(test) if grams(text, n) & union}
        assert found


def test_planted_math_problem_is_found_at_30_words_and_not_at_29(data_dir: Path) -> None:
    path = data_dir / "math" / "math_test.jsonl"
    index = EvaluationIndex.from_spec(DecontaminationSpec([str(path)]))
    problems = [json.loads(line)["problem"] for line in path.read_text().splitlines()]
    number, problem = next((i, p) for i, p in enumerate(problems) if len(p.split()) >= 60)
    words = problem.split()
    assert index.hits(f"some text {problem.upper()}\n more text") >= {("math_test.jsonl", number, "problem")}
    assert ("math_test.jsonl", number, "problem") in index.hits("x " + "\n".join(words[10:40]) + " y")
    assert index.hits("x " + " ".join(words[10:39]) + " y") == set()
    assert index.hits("x " + " ".join([*words[10:25], "other", *words[25:40]]) + " y") == set()


def test_calculator_marks_of_gsm8k_are_all_removed(data_dir: Path) -> None:
    path = data_dir / "math" / "gsm8k_train.jsonl"
    raw = "".join(json.loads(line)["answer"] for line in path.read_text().splitlines())
    assert len(re.findall("<<", raw)) == 23_716  # counted in the sheet, 6.11
    spec = ReadSpec(name="s", path=str(path), field="answer", strip_calculator_marks=True)
    clean = "".join(document.text for document in iterate_documents(spec, list_files(spec), Counter()))
    assert "<<" not in clean
    assert ">>" not in clean
    assert clean.count("####") == 7473


def test_tokenizer_equals_transformers_fast_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sample = [document.text for document in itertools.islice(_json_package(), 20)]
    ours = train_tokenizer(sample, 500, tmp_path / "tok")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "tok")
    for text in [*sample, "Größe ∑ 1,234.5\t\n  x  "]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eod_id
    assert len(theirs) == ours.vocab_size
    theirs.save_pretrained(tmp_path / "again")
    assert tokenizer_hash(tmp_path / "again") == ours.hash
    assert TextTokenizer(tmp_path / "again").eod_id == ours.eod_id


def _json_package() -> itertools.chain:
    specs = [ReadSpec(name="s", package=name) for name in ("json", "email")]
    return itertools.chain.from_iterable(iterate_documents(spec, list_files(spec), Counter()) for spec in specs)
