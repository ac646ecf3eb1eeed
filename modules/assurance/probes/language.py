"""Probes of causal language models on held-out text: what disturbed text, other corpora and quantised weights cost, how
layers come to a prediction, obedience to limits and masks, and where the training text is from.

A unit is a sequence: a piece of a document, the same in every round; what is drawn on it (slips, masks, limits) is new.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from modules.assurance.figures import Measure, largest_mean
from modules.assurance.measures.concept_probe import probe_selectivity
from modules.assurance.measures.lens import attention_entropy_rows, logit_lens
from modules.assurance.probe import Block, Probe, Values
from modules.assurance.subject import AssuranceError, Subject
from modules.assurance.text.contamination import contaminated_items
from modules.assurance.text.perturbations import PERTURBATIONS, perturbed
from modules.assurance.text.privacy import find_pii
from modules.seeds import stream_seed

CAPABILITIES: dict[str, str] = {
    "text_corpora": "tuple of names: corpora with held-out text",
    "text_sequences": "(split, start, count, corpus=None) -> [token ids [T] int64, T >= 2]: fewer where the text ends;"
    " of one corpus, or of all in turn",
    "text_of": "(token ids) -> str",
    "tokens_of": "(str) -> list of token ids, without special ones",
    "token_nats": "([token ids [T]]) -> [float32 [T - 1]]: -log p of every token but the first",
    "token_context": "int: the longest sequence that the model takes",
    "unigram_nats": "() -> [vocabulary] float64: -log share of each token in the training text, smoothed",
    "quantised_nats": "(bits) -> as token_nats, of a copy with weights of so many bits, or why there is none",
    "inner_states": "([token ids [T]]) -> (layers + 1 hidden states [B, T, H] before the final norm,"
    " which are tokens [B, T] bool)",
    "final_reading": "(final norm, output layer): [rows, H] -> [rows, H], [rows, H] -> [rows, vocabulary]",
    "attention_maps": "([token ids [T]]) -> (a layer's weights [B, heads, T, T] each, mask [B, 1, T, T] bool of keys)",
    "continuations": "(prompts, most new tokens, stop ids, seeds) -> (token lists, stop token included; 'stop' or"
    " 'length' each), sampled",
    "masked_nats": "(ids, labels, documents [B, T]) -> [B]: the training loss's sum; label -100: masked; a document"
    " sees itself alone",
    "resumed_training": "(seed) -> digests of the training state: 'before', 'straight' (two steps) and 'resumed' (saved"
    " and loaded after each)",
    "contamination_reports": "() -> training corpus -> report of the corpus build, or None",
    "trained_text": "() -> training corpus -> (licence, share of the tokens)",
    "training_pages": "(split, start, count) -> [token ids [T]]: stretches of training text",
}
WIDTHS = (8, 4)  # bits
GROUP = 16  # sequences that one linear probe is fitted on
PENALTY = 1e-2  # on the linear probe's weights
PROMPT, LONGEST = 16, 24  # tokens of a prompt, and of its continuation at most
BESIDE = 32  # masked tokens on either side
STOPS = 3  # most frequent tokens, taken for stop tokens
DIGIT, BLANK, WORD_START, WORD_PART, MARK = range(5)


def token_class(text: str) -> int:
    """What kind of token a text is: with a digit, blank, a word's beginning (behind a blank), letters, or a mark."""
    if any(unicodedata.category(character).startswith("N") for character in text):
        return DIGIT
    if not text.strip():
        return BLANK
    if text.strip().isalpha():
        return WORD_START if text[0].isspace() else WORD_PART
    return MARK


# -- losses -----------------------------------------------------------------------------------------------------------
def _by_corpus(subject: Subject, block: Block) -> Mapping[str, list[Tensor]]:
    """As many sequences of every corpus: where one ends, all do."""
    draw: Callable[..., list[Tensor]] = subject["text_sequences"]
    found = {name: draw(block.split, block.start, block.count, name) for name in subject["text_corpora"]}
    fewest = min(len(one) for one in found.values())
    return {name: one[:fewest] for name, one in found.items()}


def _means(losses: Sequence[Tensor]) -> np.ndarray:
    return np.array([float(one.double().mean()) for one in losses])


def _unigram_losses(subject: Subject, sequences: Sequence[Tensor]) -> list[Tensor]:
    table = subject["unigram_nats"]()
    return [table[one[1:]] for one in sequences]


def _losses(subject: Subject, block: Block) -> Values:
    loss, saved = {}, []
    for name, sequences in _by_corpus(subject, block).items():
        nats = subject["token_nats"](sequences)
        loss[name] = _means(nats)
        size = [len(subject["text_of"](one[1:]).encode()) for one in sequences]
        before = [float(one.sum()) for one in _unigram_losses(subject, sequences)]
        gained = [old - float(new.double().sum()) for old, new in zip(before, nats, strict=True)]
        saved.append([gain / (math.log(2) * max(1, count)) for gain, count in zip(gained, size, strict=True)])
    return {"r.ood_loss": loss, "u.bits_saved": np.array(saved).mean(0)}


def _loss_baselines(subject: Subject) -> Mapping[str, Mapping[str, float]]:
    draw = subject["text_sequences"]
    worst = max(
        (float(_means(_unigram_losses(subject, found)).mean()) for name in subject["text_corpora"]
         if (found := draw("fresh", 0, 100, name))), default=math.nan,
    )  # fmt: skip
    uniform = math.log(len(subject["unigram_nats"]()))
    known = {} if math.isnan(worst) else {"unigram": worst}
    return {"r.ood_loss": {**known, "uniform": uniform}, "u.bits_saved": {"unigram": 0.0}}


def perplexity_ratio(values: np.ndarray) -> np.ndarray:
    """``exp`` of the largest of the conditions' mean losses of nats per token."""
    return np.exp(largest_mean(values))


def _perturbed(subject: Subject, block: Block) -> Values:
    """Nats that a disturbed text costs beyond the clean one, per token of the clean one.

    All tokens of the disturbed text count, however many they are; of added sentences none does: there it is what the
    same tokens cost behind them.
    """
    sequences = subject["text_sequences"](block.split, block.start, block.count)
    asked: list[list[int]] = []
    scored: list[list[tuple[int, int]]] = []  # per unit and way: number in `asked`, first token that counts
    clean: list[list[int]] = []
    encode, context = subject["tokens_of"], subject["token_context"]
    for ids, seed in zip(sequences, block.unit_seeds(), strict=False):
        text = subject["text_of"](ids)
        tokens = encode(text)
        if len(tokens) < 2:  # nothing that could be read disturbed
            continue
        clean.append(tokens)
        asked.append(tokens)
        ways = []
        for changed in perturbed(text, seed).values():
            before, found, _ = changed.partition(text)
            if found:  # the text stands in it: what follows cannot touch it
                lead = encode(before) if before else []
                if not lead:
                    ways.append((-1, 0))
                    continue
                asked.append([*lead, *tokens])
                ways.append((len(asked) - 1, len(lead)))
            else:
                asked.append(encode(changed))
                ways.append((len(asked) - 1, 0))
        scored.append(ways)
    nats = subject["token_nats"]([torch.tensor(one[:context]) for one in asked]) if asked else []
    values = np.zeros((len(clean), len(PERTURBATIONS)))
    own = 0
    for unit, (tokens, ways) in enumerate(zip(clean, scored, strict=True)):
        while asked[own] is not tokens:
            own += 1
        base = float(nats[own].double().sum())
        for column, (number, lead) in enumerate(ways):
            if number < 0:
                continue
            kept = nats[number][lead:].double()
            # what a context cut off is taken to cost as much as the rest
            total = float(kept.mean()) * (len(asked[number]) - lead - 1) if len(kept) else base
            values[unit, column] = (total - base) / (len(tokens) - 1)
    return {"r.ppl_ratio": {name: values[:, column] for column, name in enumerate(PERTURBATIONS)}}


def _quantised(subject: Subject, block: Block) -> Values:
    sequences = subject["text_sequences"](block.split, block.start, block.count)
    full = _means(subject["token_nats"](sequences))
    found, refused = {}, []
    for bits in WIDTHS:
        reading = subject["quantised_nats"](bits)
        if isinstance(reading, str):
            refused.append(reading)
        else:
            found[f"{bits}-bit"] = _means(reading(sequences)) - full
    return {"r.quant": found or refused[0]}


# -- inside -----------------------------------------------------------------------------------------------------------
def _lens(subject: Subject, block: Block) -> Values:
    sequences = subject["text_sequences"](block.split, block.start, block.count)
    norm, unembed = subject["final_reading"]
    depth, kl = [], []
    if sequences:
        hidden, kept = subject["inner_states"](sequences)
        for unit in range(len(sequences)):
            rows = slice(unit, unit + 1)
            lens = logit_lens([one[rows] for one in hidden], norm, unembed, mask=kept[rows])
            layers = len(hidden) - 1
            depth.append(float(lens.depth[kept[rows]].double().mean()) / layers)
            kl.append(float(lens.kl[:-1].mean()))
    return {"i.lens_depth": np.array(depth), "i.lens_kl": np.array(kl)}


def _attention(subject: Subject, block: Block) -> Values:
    sequences = subject["text_sequences"](block.split, block.start, block.count)
    if not sequences:
        return {"i.attn_entropy": np.empty(0)}
    maps, mask = subject["attention_maps"](sequences)
    rows = torch.stack([attention_entropy_rows(one, mask).flatten(1).nanmean(1) for one in maps])
    return {"i.attn_entropy": rows.mean(0).cpu().numpy()}


def _concept(subject: Subject, block: Block) -> Values:
    """One linear probe a unit, on sequences of its own."""
    found = []
    for unit in range(block.start, block.start + block.count):
        sequences = subject["text_sequences"](block.split, unit * GROUP, GROUP)
        if len(sequences) < GROUP:
            break
        hidden, kept = subject["inner_states"](sequences)
        types = torch.cat(sequences)
        kinds, of_type = types.unique(return_inverse=True)
        labels = torch.tensor([token_class(subject["text_of"](kind[None])) for kind in kinds])[of_type]
        features = hidden[len(hidden) // 2][kept].float().cpu()
        try:
            seed = stream_seed(block.seed, unit)
            fitted = probe_selectivity(features, labels, types, seeds=1, seed=seed, l2=PENALTY)
        except (ValueError, RuntimeError) as error:  # one kind of token alone, say
            return {"i.probe_sel": str(error)}
        found.append(float(fitted.selectivity))
    return {"i.probe_sel": np.array(found)}


# -- obedience --------------------------------------------------------------------------------------------------------
def obeyed(tokens: Sequence[int], reason: str, most: int, stops: Sequence[int]) -> bool:
    """Whether a continuation ends at its first stop token, else at its limit, and says so."""
    stopped = [place for place, token in enumerate(tokens) if token in stops]
    if stopped:
        return stopped[0] == len(tokens) - 1 < most and reason == "stop"
    return len(tokens) == most and reason == "length"


def _stop(subject: Subject, block: Block) -> Values:
    sequences = subject["text_sequences"](block.split, block.start, block.count)
    if not sequences:
        return {"c.stop": np.empty(0)}
    frequent = Counter(torch.cat(sequences).tolist())
    stops = sorted(frequent, key=lambda token: (-frequent[token], token))[:STOPS]
    most = int(torch.randint(LONGEST // 4, LONGEST + 1, (), generator=block.generator()))
    most = min(most, subject["token_context"] - 1)
    prompts = [one[: min(PROMPT, subject["token_context"] - most)].tolist() for one in sequences]
    seeds = block.unit_seeds()[: len(prompts)]
    tokens, reasons = subject["continuations"](prompts, most, stops, seeds)
    held = [obeyed(made, reason, most, stops) for made, reason in zip(tokens, reasons, strict=True)]
    return {"c.stop": np.array(held, dtype=np.float64)}


def _mask(subject: Subject, block: Block) -> Values:
    """Each sequence stands between two documents whose targets are masked: what they hold must not change a bit."""
    sequences = subject["text_sequences"](block.split, block.start, block.count)
    if not sequences:
        return {"c.mask": np.empty(0)}
    room = max(1, min(BESIDE, subject["token_context"] // 4))
    sequences = [one[: subject["token_context"] - 2 * room] for one in sequences]
    vocabulary, longest = len(subject["unigram_nats"]()), max(len(one) for one in sequences)
    shape = (len(sequences), room + longest + room)
    labels = torch.full(shape, -100)
    documents = torch.zeros(shape, dtype=torch.int32)
    fillings = [torch.randint(vocabulary, shape, generator=block.generator(which)) for which in range(2)]
    for row, one in enumerate(sequences):
        inside = slice(room, room + len(one))
        labels[row, room : room + len(one) - 1] = one[1:]
        documents[row, inside], documents[row, room + len(one) :] = 1, 2
        for ids in fillings:
            ids[row, inside] = one
    first, second = (subject["masked_nats"](ids, labels, documents) for ids in fillings)
    return {"c.mask": ((first == second) & (first > 0)).double().numpy()}


def _resume(subject: Subject, block: Block) -> Values:
    try:
        found = subject["resumed_training"](block.seed)
    except AssuranceError as error:
        return {"c.resume": str(error)}
    if found["before"] == found["straight"]:
        return {"c.resume": "two optimiser steps changed nothing: there is no training to resume"}
    return {"c.resume": np.array([float(found["straight"] == found["resumed"])])}


# -- training text ----------------------------------------------------------------------------------------------------
def _contamination(subject: Subject, block: Block) -> Values:
    try:
        items = contaminated_items(subject["contamination_reports"]())
    except AssuranceError as error:
        return {"e.contam": str(error)}
    shares = [float(found.double().mean()) for found in items.values() if len(found)]
    return {"e.contam": np.array([max(shares)]) if shares else "no evaluation item is long enough to be looked for"}


def _licences(subject: Subject, block: Block) -> Values:
    shares = subject["trained_text"]().values()
    total = sum(share for _, share in shares)
    known = sum(share for licence, share in shares if licence not in ("", "unknown"))
    return {"e.licence": np.array([known / total]) if total > 0 else "no training text"}


def hits_per_million(values: np.ndarray) -> np.ndarray:
    """``1e6 (hits + 1) / tokens`` of ``[..., units, (hits, tokens)]``: one hit more than was found.

    Text without a hit does not show that there is none; without the one more, its interval would be a point at 0.
    """
    sums = values.sum(-2)
    return 1e6 * (sums[..., 0] + 1.0) / np.maximum(sums[..., 1], 1.0)


def _privacy(subject: Subject, block: Block) -> Values:
    pages = subject["training_pages"](block.split, block.start, block.count)
    hits = [float(len(find_pii(subject["text_of"](page)))) for page in pages]
    return {"e.pii": {"hits": np.array(hits), "tokens": np.array([float(len(page)) for page in pages])}}


def _share(name: str, title: str) -> Measure:
    return Measure(name, title, "up", "proportion", "share")


_SHARE = (0.0, 1.0)
_TEXT = ("text_sequences",)
PROBES: tuple[Probe, ...] = (
    Probe(
        "text_loss",
        (
            Measure("u.bits_saved", "Bits saved per byte of new text against token frequencies", "up", "mean", "bits"),
            Measure(
                "r.ood_loss", "Loss per token of the corpus that is read worst", "down", "bootstrap", "nats",
                statistic=largest_mean,
            ),
        ),
        needs=(*_TEXT, "text_corpora", "text_of", "token_nats", "unigram_nats"),
        run=_losses,
        block=20,
        baselines=_loss_baselines,
    ),
    Probe(
        "text_perturbed",
        (
            Measure(
                "r.ppl_ratio", "Perplexity of disturbed text over that of clean text, worst way (ways: nats per token)",
                "down", "bootstrap", statistic=perplexity_ratio,
            ),
        ),
        needs=(*_TEXT, "text_of", "tokens_of", "token_nats", "token_context"),
        run=_perturbed,
        block=20,
        units={"quick": 20, "rice": 100, "deep": 400},
        limit={"rice": 1600},
    ),
    Probe(
        "text_quantised",
        (
            Measure(
                "r.quant", "Loss added by weights of 8 or 4 bits, the worse of them", "down", "bootstrap", "nats",
                statistic=largest_mean,
            ),
        ),
        needs=(*_TEXT, "token_nats", "quantised_nats"),
        run=_quantised,
        suites=("rice", "deep"),
        block=20,
        units={"rice": 100},
    ),
    Probe(
        "text_lens",
        (
            Measure(
                "i.lens_depth", "Depth at which a layer first reads as the last (logit lens, top 1)", "down", "mean",
                "share", span=_SHARE,
            ),
            Measure(
                "i.lens_kl", "Divergence of the layers' readings from the last (logit lens)", "down", "mean", "nats",
                span=(0.0, math.inf),
            ),
        ),
        needs=(*_TEXT, "inner_states", "final_reading"),
        run=_lens,
        block=10,
        units={"quick": 20, "rice": 100},
    ),
    Probe(
        "text_attention",
        (
            Measure(
                "i.attn_entropy", "Entropy of attention over its largest possible value", "down", "mean", "share",
                span=_SHARE,
            ),
        ),
        needs=(*_TEXT, "attention_maps"),
        run=_attention,
        block=10,
        units={"quick": 20, "rice": 100},
    ),
    Probe(
        "text_concept",
        (
            Measure(
                "i.probe_sel", "Selectivity of a linear probe for the kind of token, middle layer (task minus control)",
                "up", "mean", "share", span=(-1.0, 1.0),
            ),
        ),
        needs=(*_TEXT, "inner_states", "text_of"),
        run=_concept,
        suites=("rice", "deep"),
        block=1,
        units={"rice": 5, "deep": 5},
        limit={"rice": 20, "deep": 20},
    ),
    Probe(
        "text_stop",
        (_share("c.stop", "Continuations that end at a stop token, else at their limit, and nowhere else"),),
        needs=(*_TEXT, "token_context", "continuations"),
        run=_stop,
        block=50,
    ),
    Probe(
        "text_mask",
        (_share("c.mask", "Sequences whose loss no masked token changes by a bit"),),
        needs=(*_TEXT, "token_context", "unigram_nats", "masked_nats"),
        run=_mask,
        block=20,
        limit={"quick": 40, "rice": 400},
    ),
    Probe(
        "text_resume",
        (Measure("c.resume", "Training goes on bit for bit from what was saved", "up", "exact"),),
        needs=("resumed_training",),
        run=_resume,
        suites=("rice", "deep"),
        autograd=True,
    ),
    Probe(
        "text_contamination",
        (Measure("e.contam", "Evaluation items found in the training text, worst file", "down", "exact", "share"),),
        needs=("contamination_reports",),
        run=_contamination,
    ),
    Probe(
        "text_licence",
        (Measure("e.licence", "Share of the tokens trained on whose licence is known", "up", "exact", "share"),),
        needs=("trained_text",),
        run=_licences,
    ),
    Probe(
        "text_privacy",
        (
            Measure(
                "e.pii", "Personal data and secrets per 1e6 training tokens, one more than found", "down", "bootstrap",
                statistic=hits_per_million,
            ),
        ),
        needs=("training_pages", "text_of"),
        run=_privacy,
        block=20,
        units={"quick": 40, "rice": 200},
    ),
)  # fmt: skip
