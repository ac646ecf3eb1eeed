"""Probes of language models: fakes whose figures are known in closed form, and a real tiny Llama on real small text."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datamodules.corpus_data import CorpusDataModule
from modules.assurance.probe import Block, Effort
from modules.assurance.probes import all_probes
from modules.assurance.probes.language import (
    BLANK,
    DIGIT,
    MARK,
    WORD_PART,
    WORD_START,
    hits_per_million,
    obeyed,
    perplexity_ratio,
    token_class,
)
from modules.assurance.subject import AssuranceError, Subject, state_digest
from modules.assurance.suites import SuiteSettings, run_suite
from modules.assurance.text.perturbations import PERTURBATIONS, perturbed
from modules.language import inspection
from modules.llemma import Llemma
from modules.llemma.assurance import TextTrials, language_subject

TEXT = "Reading a short page of plain words is easier than one with slips in it, as every reader finds out. "
PROSE = [TEXT + f"Line {number} of the book says so." for number in range(12)]
MATHS = [f"let x{number} = {number} + y; the sum of all primes below {number} is known." for number in range(9)]
VOCABULARY = 256
Nats = Callable[[Tensor], Tensor]


def constant(nats: float) -> Nats:
    return lambda ids: torch.full((len(ids) - 1,), nats)


def fake(nats: Nats, **changes: Any) -> Subject:
    """A model of bytes on two corpora; ``nats``: token ids [T] -> [T - 1]."""
    corpora = {"prose": PROSE, "maths": MATHS}

    def sequences(split: str, start: int, count: int, corpus: str | None = None) -> list[Tensor]:
        texts = corpora[corpus] if corpus else [one for pair in zip(PROSE, MATHS, strict=False) for one in pair]
        return [torch.tensor(list(text.encode())) for text in texts[start : start + count]]

    found: dict[str, Any] = {
        "text_corpora": tuple(corpora),
        "text_sequences": sequences,
        "text_of": lambda ids: bytes(ids.tolist()).decode(),
        "tokens_of": lambda text: list(text.encode()),
        "token_nats": lambda many: [nats(one) for one in many],
        "token_context": 4096,
        "unigram_nats": lambda: torch.full((VOCABULARY,), math.log(64.0), dtype=torch.float64),
    }
    return Subject("language", nn.Linear(1, 1), {**found, **changes})


def values(subject: Subject, name: str, count: int = 6, seed: int = 3, start: int = 0, suite: str = "rice") -> Any:
    probe = all_probes()[name]
    assert not subject.lacks(probe.needs)
    return probe.run(subject, Block(start // count, start, count, "fresh", seed, Effort(suite)))


# -- losses -----------------------------------------------------------------------------------------------------------
def test_loss_and_bits_saved_in_closed_form() -> None:
    found = values(fake(constant(math.log(16.0))), "text_loss")
    assert set(found["r.ood_loss"]) == {"prose", "maths"}
    for one in found["r.ood_loss"].values():
        assert one == pytest.approx(math.log(16.0))
    assert found["u.bits_saved"] == pytest.approx(2.0)  # log2(64 / 16), one byte a token


@pytest.mark.parametrize(("nats", "saved"), [(math.log(256.0), -2.0), (math.log(64.0), 0.0)])
def test_a_model_that_knows_nothing_saves_nothing(nats: float, saved: float) -> None:
    settings = SuiteSettings("custom", ("text_loss",), n0=6, n_max=6)
    figure = run_suite(fake(constant(nats)), settings).figure("u.bits_saved")
    assert figure.value == pytest.approx(saved, abs=1e-6)
    assert figure.baselines == {"unigram": 0.0}


def test_the_worst_corpus_is_the_figure_and_the_shortest_ends_it() -> None:
    def nats(ids: Tensor) -> Tensor:
        return constant(5.0 if bytes(ids.tolist()).startswith(b"let") else 2.0)(ids)

    result = run_suite(fake(nats), SuiteSettings("custom", ("text_loss",), n0=40, n_max=40))
    figure = result.figure("r.ood_loss")
    assert (figure.value, figure.n) == (pytest.approx(5.0), len(MATHS))
    assert figure.conditions == {"prose": pytest.approx(2.0), "maths": pytest.approx(5.0)}
    assert figure.baselines == {"unigram": pytest.approx(math.log(64)), "uniform": pytest.approx(math.log(256))}


def test_disturbed_text_costs_its_nats_over_the_clean_tokens() -> None:
    """At c nats a token, m disturbed tokens for n clean ones cost c (m - n) / (n - 1); added sentences cost nothing."""
    found = values(fake(constant(1.5)), "text_perturbed", count=4, seed=11)["r.ppl_ratio"]
    assert list(found) == list(PERTURBATIONS)
    seeds = Block(0, 0, 4, "fresh", 11).unit_seeds()
    texts = [PROSE[0], MATHS[0], PROSE[1], MATHS[1]]
    for unit, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
        clean = len(text.encode())
        for name, changed in perturbed(text, seed).items():
            more = 0 if text in changed else len(changed.encode()) - clean
            assert found[name][unit] == pytest.approx(1.5 * more / (clean - 1)), name
    assert not found["prefix"].any()
    assert not found["suffix"].any()
    assert found["homoglyph"].all()  # two bytes for one


def test_a_prefix_costs_what_it_does_to_the_same_tokens() -> None:
    def later(ids: Tensor) -> Tensor:
        return torch.arange(1.0, len(ids))  # token t costs t

    found = values(fake(later), "text_perturbed", count=1, seed=5)["r.ppl_ratio"]
    text = PROSE[0]
    changed = perturbed(text, Block(0, 0, 1, "fresh", 5).unit_seeds()[0])["prefix"]
    assert found["prefix"][0] == pytest.approx(len(changed.encode()) - len(text.encode()))
    assert found["suffix"][0] == 0.0


def test_what_the_context_cuts_off_costs_as_much_as_the_rest() -> None:
    whole, cut = (
        values(fake(constant(1.0), token_context=size), "text_perturbed", 1)["r.ppl_ratio"]
        for size in (4096, len(PROSE[0]) + 1)
    )
    assert cut["homoglyph"] == pytest.approx(whole["homoglyph"])


def test_the_ratio_is_of_the_worst_way() -> None:
    assert perplexity_ratio(np.array([[0.0, 1.0], [0.0, 3.0]])) == pytest.approx(math.exp(2.0))
    assert perplexity_ratio(np.zeros((4, 8))) == 1.0


def test_quantisation_is_the_worse_width_or_the_reason_why_not() -> None:
    def widths(bits: int) -> Any:
        return "no 8-bit weights here" if bits == 8 else lambda many: [constant(1.25)(one) for one in many]

    found = values(fake(constant(1.0), quantised_nats=widths), "text_quantised")["r.quant"]
    assert set(found) == {"4-bit"}
    assert found["4-bit"] == pytest.approx(0.25)
    assert values(fake(constant(1.0), quantised_nats=lambda _: "none"), "text_quantised")["r.quant"] == "none"


# -- obedience --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "reason", "held"),
    [
        ([1, 2, 9], "stop", True), ([1, 2, 3, 4], "length", True), ([1, 2, 3, 9], "stop", True),
        ([1, 2, 9, 4], "length", False), ([1, 2, 9], "length", False), ([1, 2], "length", False),
        ([1, 2, 3, 4, 5], "length", False), ([1, 2, 3, 4], "stop", False), ([1, 2, 3, 4, 9], "stop", False),
    ],
)  # fmt: skip
def test_obeyed(tokens: list[int], reason: str, held: bool) -> None:
    assert obeyed(tokens, reason, 4, [9]) is held


def _writer(heeds: bool) -> Callable[..., Any]:
    def write(prompts: Sequence[Any], most: int, stops: Sequence[int], seeds: Sequence[int]) -> Any:
        lists = [[*range(200, 200 + most - 2), stops[0], 7][: most if heeds else most + 1] for _ in prompts]
        if heeds:
            lists = [one[: one.index(stops[0]) + 1] for one in lists]
        return lists, ["stop" if heeds else "length"] * len(prompts)

    return write


@pytest.mark.parametrize("heeds", [True, False])
def test_stop_tells_who_writes_on(heeds: bool) -> None:
    found = values(fake(constant(1.0), continuations=_writer(heeds)), "text_stop")["c.stop"]
    assert found.tolist() == [float(heeds)] * 6


@pytest.mark.parametrize("leaks", [True, False])
def test_mask_tells_whose_loss_reads_masked_tokens(leaks: bool) -> None:
    def loss(ids: Tensor, labels: Tensor, documents: Tensor) -> Tensor:
        assert ((labels != -100).sum(1) > 0).all()
        assert documents.unique().tolist() == [0, 1, 2]
        read = ids if leaks else torch.where(documents == 1, ids, 0)
        return read.sum(1).float()

    found = values(fake(constant(1.0), masked_nats=loss), "text_mask")["c.mask"]
    assert found.tolist() == [float(not leaks)] * 6


def test_resume_compares_digests_and_wants_training() -> None:
    def states(before: str, straight: str, resumed: str) -> Any:
        digests = {"before": before, "straight": straight, "resumed": resumed}
        return values(fake(constant(1.0), resumed_training=lambda seed: digests), "text_resume", 1)["c.resume"]

    assert states("a", "b", "b").tolist() == [1.0]
    assert states("a", "b", "c").tolist() == [0.0]
    assert "changed nothing" in states("a", "a", "a")


# -- training text ----------------------------------------------------------------------------------------------------
def _report(hits: list[str]) -> dict[str, Any]:
    items = {"easy.jsonl": ("easy", 4), "hard.jsonl": ("hard", 10)}
    files = {
        file: {"items": count, "too_short": 0, "hits": {hit: 1 for hit in hits if hit.startswith(name)}}
        for file, (name, count) in items.items()
    }
    return {"ngram": 13, "files": files}


def test_contamination_is_the_worst_file_over_all_sources() -> None:
    reports = {"web": _report(["hard 1"]), "code": _report(["easy 0", "hard 1", "hard 2"])}
    subject = fake(constant(1.0), contamination_reports=lambda: reports)
    assert values(subject, "text_contamination", 1)["e.contam"].tolist() == [0.25]
    unchecked = fake(constant(1.0), contamination_reports=lambda: {"web": None})
    assert "no training source was checked" in values(unchecked, "text_contamination", 1)["e.contam"]


def test_licence_is_a_share_of_tokens() -> None:
    sources = {"web": ("unknown", 0.7), "code": ("MIT", 0.2), "book": ("CC0-1.0", 0.1)}
    found = values(fake(constant(1.0), trained_text=lambda: sources), "text_licence", 1)["e.licence"]
    assert found == pytest.approx([0.3])


def test_personal_data_is_counted_per_million_tokens_and_one_more() -> None:
    texts = ["nobody here", "write to ada@example.org or to bob@example.org", "plain"]

    def pages(split: str, start: int, count: int) -> list[Tensor]:
        return [torch.tensor(list(text.encode())) for text in texts[start : start + count]]

    found = values(fake(constant(1.0), training_pages=pages), "text_privacy", 3)["e.pii"]
    assert found["hits"].tolist() == [0.0, 2.0, 0.0]
    total = sum(map(len, texts))
    assert hits_per_million(np.stack([found["hits"], found["tokens"]], 1)) == pytest.approx(3e6 / total)
    assert hits_per_million(np.array([[0.0, 500_000.0], [0.0, 500_000.0]])) == pytest.approx(1.0)


# -- inside -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "kind"),
    [("7", DIGIT), (" x2", DIGIT), ("\u00bd", DIGIT), ("\n  ", BLANK), ("", BLANK), (" the", WORD_START),
     ("ing", WORD_PART), ("+=", MARK), ("x_y", MARK), ("\ufffd", MARK)],
)  # fmt: skip
def test_token_class(text: str, kind: int) -> None:
    assert token_class(text) == kind


@pytest.mark.parametrize("planted", [True, False])
def test_a_planted_concept_is_selective_and_noise_is_not(planted: bool) -> None:
    def states(many: list[Tensor]) -> Any:
        longest = max(map(len, many))
        kept = torch.arange(longest) < torch.tensor([len(one) for one in many])[:, None]
        hidden = 0.1 * torch.randn(len(many), longest, 8, generator=torch.Generator().manual_seed(1))
        if planted:
            for row, one in enumerate(many):
                kinds = torch.tensor([token_class(chr(token)) for token in one.tolist()])
                hidden[row, torch.arange(len(one)), kinds] += 1.0
        return [hidden] * 3, kept

    def sequences(split: str, start: int, count: int, corpus: str | None = None) -> list[Tensor]:
        return [torch.tensor(list(text.encode())) for text in (PROSE[:6] + MATHS) * 2][:count]

    subject = fake(constant(1.0), inner_states=states, text_sequences=sequences)
    found = values(subject, "text_concept", count=1)["i.probe_sel"]
    assert len(found) == 1
    assert found[0] > 0.2 if planted else abs(found[0]) < 0.15


# -- a real one -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CorpusDataModule:
    root, rng = tmp_path_factory.mktemp("language"), random.Random(4)
    for name, words in (
        ("talk", TEXT.split()),
        ("sums", ["let", "x", "be", "the", "sum", "of", "all", "primes", "below", "7", "+", "5", "=", "12"]),
    ):
        lines = (" ".join(rng.choice(words) for _ in range(rng.randrange(20, 80))) for _ in range(120))
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    module = CorpusDataModule(
        sources=[
            {"name": "talk", "path": str(root / "talk.jsonl"), "licence": "CC0-1.0", "weight": 3.0},  # type: ignore[list-item]
            {"name": "sums", "path": str(root / "sums.jsonl")},  # type: ignore[list-item]
        ],
        tokenizer={"vocab_size": 300, "sample_bytes": 20_000},  # type: ignore[arg-type]
        cache_dir=str(root / "cache"), seq_len=32, batch_size=4, holdout_fraction=0.2,
    )  # fmt: skip
    module.prepare_data()
    module.setup("test")
    return module


@pytest.fixture(scope="module")
def module(data: CorpusDataModule) -> Llemma:
    config = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    found = Llemma({"config": config}, lr=1e-2, warmup_steps=2, decay_steps=10)  # type: ignore[arg-type]
    found._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    torch.manual_seed(5)
    found.configure_model()
    return found


@pytest.fixture
def subject(module: Llemma, data: CorpusDataModule) -> Subject:
    return language_subject(module, data)


def test_units_are_dealt_in_turn_and_split_by_hash(module: Llemma, data: CorpusDataModule) -> None:
    trials = TextTrials(module, data)
    fresh, anchor = (trials._pool("test", trials.length, split, None) for split in ("fresh", "anchor"))
    assert not set(fresh) & set(anchor)
    assert len(fresh) + len(anchor) == sum(len(data.excerpts("test", name, trials.length)) for name in trials.names)
    assert [name for name, _ in fresh[:4]] == ["talk", "sums", "talk", "sums"]
    assert 0.08 < len(anchor) / (len(fresh) + len(anchor)) < 0.35
    assert trials.sequences("fresh", len(fresh), 5) == []
    assert all(2 <= len(one) <= 32 for one in trials.sequences("fresh", 0, 50))


def test_same_seed_same_values_and_nothing_is_touched(subject: Subject, module: Llemma) -> None:
    names = tuple(
        name for name, probe in all_probes().items()
        if name.startswith("text_") and name not in ("text_quantised", "text_contamination")
    ) + ("rollback", "card")  # fmt: skip
    settings = SuiteSettings("custom", names, n0=4, n_max=4)
    before, random_state = state_digest(module.llama), torch.get_rng_state()
    first, second = run_suite(subject, settings), run_suite(subject, settings)
    assert state_digest(module.llama) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {key: one.values.tolist() for key, one in first.samples.items()} == {
        key: one.values.tolist() for key, one in second.samples.items()
    }
    for name in ("c.stop", "c.mask", "c.resume", "c.rollback", "i.card"):
        assert first.figure(name).value == 1.0, name
    assert float(first.figure("u.bits_saved").value or 0.0) < 0.05  # untrained
    assert first.figure("e.licence").value == first.figure("e.provenance").value == pytest.approx(0.75)
    assert first.figure("r.ood_loss").value == pytest.approx(math.log(300), abs=0.6)
    assert float(first.figure("r.ppl_ratio").value or 0.0) >= 1.0


def test_layers_that_add_nothing_read_like_the_last_one(subject: Subject, module: Llemma) -> None:
    state = {name: value.clone() for name, value in module.llama.state_dict().items()}
    try:
        with torch.no_grad():
            for block in module.llama.blocks:
                block.self_attn.o_proj.weight.zero_()  # type: ignore[union-attr]
                block.mlp.down_proj.weight.zero_()  # type: ignore[union-attr]
                block.self_attn.q_proj.weight.zero_()  # type: ignore[union-attr]
        lens = values(subject, "text_lens", 4)
        assert not lens["i.lens_depth"].any()
        assert lens["i.lens_kl"] == pytest.approx(0.0, abs=1e-9)
        assert values(subject, "text_attention", 4)["i.attn_entropy"] == pytest.approx(1.0)
    finally:
        module.llama.load_state_dict(state)
    assert values(subject, "text_attention", 4)["i.attn_entropy"].max() < 1.0


def test_resuming_without_the_optimiser_is_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inspection._Training, "load", lambda self, state: self.network.load_state_dict(state["network"])
    )
    assert values(subject, "text_resume", 1)["c.resume"].tolist() == [0.0]


def test_quantised_copies_are_near_and_leave_the_model_alone(subject: Subject, module: Llemma) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra llemma")
    before = state_digest(module.llama)
    with torch.inference_mode():
        found = values(subject, "text_quantised", 4)["r.quant"]
    assert set(found) <= {"8-bit", "4-bit"}
    assert "4-bit" in found
    for one in found.values():
        assert 0 < np.abs(one).max() < 0.5
    assert state_digest(module.llama) == before


def test_a_warm_start_takes_the_weights_and_counts_anew(module: Llemma) -> None:
    state = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    try:
        module.warm_start({"state_dict": state})
        assert int(module.nonfinite_steps) == 0
        assert all((parameter == 1).all() for parameter in module.parameters())
    finally:
        module.load_state_dict(before)


def test_the_card_names_sources_and_their_licences(subject: Subject) -> None:
    assert {(one.name, one.licence, one.share) for one in subject.card.data} == {
        ("talk", "CC0-1.0", 0.75), ("sums", "unknown", 0.25)
    }  # fmt: skip


def test_data_without_text_are_refused(module: Llemma, data: CorpusDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssuranceError, match="object provides no text"):
        language_subject(module, object())
    monkeypatch.setattr(data, "corpora", lambda split: ())
    with pytest.raises(AssuranceError, match="raise holdout_fraction"):
        language_subject(module, data)
