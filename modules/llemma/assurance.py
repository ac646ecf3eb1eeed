"""What a Llama-family language model and its text offer to be measured by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules.assurance.subject import AssuranceError, CardFacts, DataSource, Subject, mapping_digest
from modules.contracts.corpora import Excerpts, ProvidesExcerpts, ReportsContamination, TextSplit
from modules.language.adapters import quantize
from modules.language.generation import generate
from modules.language.inspection import (
    attention_maps,
    labelled_nats,
    padded,
    plain_tensors,
    residual_stream,
    token_nats,
    trained_states,
)
from modules.networks.causal_lm import context_limit
from modules.seeds import text_seed

if TYPE_CHECKING:
    from modules.llemma.module import Llemma

LENGTH = 128  # tokens of a sequence, at most
ROOM = 4  # a sequence takes this part of the context at most: disturbed text takes more tokens than clean text
PAGE = 1024  # tokens of training text that are searched together
SMOOTHING = 1e-3  # weight of the uniform distribution in the unigram model
FEWEST = 8  # tokens
Unit = tuple[str, int]
_BLOCKS: tuple[type[BaseException], ...] = (ImportError, RuntimeError, ValueError, NotImplementedError, AttributeError)


class TextTrials:
    """The capabilities of a language model, see ``modules/assurance/probes/language.py`` for what each one means.

    Sequences are pieces of documents of the test text. A fifth of them, by the hash of where they stand, are the
    anchor. Corpora take turns, so that a small one weighs as much as a large one until it is used up.

    Args:
        module: its network built.
        data: its datamodule, set up.

    Raises:
        AssuranceError: data without held-out text.
    """

    def __init__(self, module: Llemma, data: ProvidesExcerpts) -> None:
        self.module, self.data = module, data
        self.network, self.tokenizer = module.llama, data.tokenizer
        self.device = self.network.lm_head.weight.device
        self.context = context_limit(self.network)
        self.length = max(FEWEST, min(LENGTH, data.seq_len, self.context // ROOM))
        self.names = data.corpora("test")
        if not self.names:
            raise AssuranceError("no corpus keeps text for test: raise holdout_fraction, or name eval_sources")
        self._pieces: Callable[[TextSplit, str, int], Excerpts] = cache(data.excerpts)
        self._pool = cache(self._pooled)
        self._quantised = cache(self._quantise)
        self.unigram = cache(self._unigram)

    # -- text ---------------------------------------------------------------------------------------------------------
    def _pooled(self, text: TextSplit, length: int, split: str, corpus: str | None) -> list[Unit]:
        """Which piece each unit of a split is."""
        names = self.data.corpora(text) if corpus is None else (corpus,)
        queues = []
        for name in names:
            found = self._pieces(text, name, length)
            keys = [(text_seed(found.key(number)), number) for number in range(len(found))]
            queues.append([(name, number) for key, number in sorted(keys) if (key % 5 == 0) == (split == "anchor")])
        return [unit for turn in zip_longest(*queues) for unit in turn if unit is not None]

    def sequences(self, split: str, start: int, count: int, corpus: str | None = None) -> list[Tensor]:
        chosen = self._pool("test", self.length, split, corpus)[start : start + count]
        return [torch.from_numpy(self._pieces("test", name, self.length)[number]) for name, number in chosen]

    def pages(self, split: str, start: int, count: int) -> list[Tensor]:
        chosen = self._pool("train", PAGE, split, None)[start : start + count]
        return [torch.from_numpy(self._pieces("train", name, PAGE)[number]) for name, number in chosen]

    def text(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.tolist())

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def _unigram(self) -> Tensor:
        size = self.network.config.vocab_size
        seen = torch.from_numpy(self.data.token_counts())
        shares = torch.zeros(size, dtype=torch.float64)
        shares[: len(seen)] = seen
        return -((1 - SMOOTHING) * shares + SMOOTHING / size).log()

    # -- the model ----------------------------------------------------------------------------------------------------
    def nats(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        return token_nats(self.network, sequences)

    def quantised_nats(self, bits: int) -> Callable[[Sequence[Tensor]], list[Tensor]] | str:
        found = self._quantised(bits)
        return found if isinstance(found, str) else lambda sequences: token_nats(found, sequences)

    def _quantise(self, bits: int) -> Any:
        if self.module.options["tuning"] == "qlora":
            return "the weights are quantised already: nothing full to compare with"
        try:
            with plain_tensors(), torch.no_grad():
                found = quantize(copy.deepcopy(self.network).eval(), bits=bits)  # type: ignore[arg-type]
                token_nats(found, [torch.zeros(2, dtype=torch.int64)])  # some widths are refused only when used
        except _BLOCKS as error:
            said = " ".join(str(error).split())[:160]
            return f"{bits}-bit weights cannot be made here ({type(error).__name__}: {said})"
        return found

    def inner_states(self, sequences: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        ids, kept = padded(sequences, self.device)
        return residual_stream(self.network, ids), kept

    def attention(self, sequences: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        ids, kept = padded(sequences, self.device)
        length = ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        return attention_maps(self.network, ids), earlier & kept[:, None, :, None]

    def continuations(
        self, prompts: Sequence[Sequence[int]], most: int, stop_ids: Sequence[int], seeds: Sequence[int]
    ) -> tuple[list[list[int]], list[str]]:
        made = generate(
            self.network, prompts, max_new_tokens=most, temperature=1.0, stop_token_ids=stop_ids, seeds=list(seeds)
        )
        return made.tokens, list(made.finish_reasons)

    def masked_nats(self, ids: Tensor, labels: Tensor, documents: Tensor) -> Tensor:
        moved = (one.to(self.device) for one in (ids, labels, documents))
        return labelled_nats(self.network, *moved).sum(1).cpu()

    def resumed_training(self, seed: int) -> dict[str, str]:
        pieces = self.pages("fresh", 0, 4)
        if len(pieces) < 2:
            raise AssuranceError("c.resume: fewer than two pieces of training text: give the corpus more of it")
        batches = []
        for part in (pieces[::2], pieces[1::2]):
            ids, kept = padded([one[: self.length] for one in part], self.device)
            batches.append((ids[:, :-1], torch.where(kept[:, 1:], ids[:, 1:], -100)))
        found = trained_states(self.network, self.module.optimizer_of, batches, seed)
        return {name: mapping_digest(state) for name, state in found.items()}

    def outputs(self) -> Tensor:
        ids = torch.arange(2 * FEWEST, device=self.device).view(2, FEWEST) % self.network.config.vocab_size
        with torch.no_grad():
            return self.network.logits(self.network(ids))

    # -- the data -----------------------------------------------------------------------------------------------------
    def trained_on(self) -> dict[str, tuple[str, float]]:
        """Training corpus -> licence, and share of the tokens."""
        licences = self.data.licences()
        return {name: (licences[name], share) for name, share in self.data.stream_shares().items()}

    def capabilities(self) -> Mapping[str, Any]:
        found = {
            "text_corpora": self.names,
            "text_sequences": self.sequences,
            "text_of": self.text,
            "tokens_of": self.tokens,
            "token_nats": self.nats,
            "token_context": self.context,
            "unigram_nats": self.unigram,
            "quantised_nats": self.quantised_nats,
            "inner_states": self.inner_states,
            "final_reading": (self.network.model.norm, self.network.logits),
            "attention_maps": self.attention,
            "continuations": self.continuations,
            "masked_nats": self.masked_nats,
            "resumed_training": self.resumed_training,
            "trained_text": self.trained_on,
            "training_pages": self.pages,
            "outputs": self.outputs,
        }
        if isinstance(self.data, ReportsContamination):
            data = self.data
            found["contamination_reports"] = lambda: data.contamination
        return found


def language_subject(module: Llemma, data: Any) -> Subject:
    """The subject of a ``Llemma``.

    Args:
        module: its network built.
        data: set up; see :class:`modules.contracts.corpora.ProvidesExcerpts`.

    Raises:
        AssuranceError: data that provide no text to measure on.
    """
    if not isinstance(data, ProvidesExcerpts):
        raise AssuranceError(
            f"{type(data).__name__} provides no text to measure on: use CorpusDataModule or SFTDataModule"
        )
    trials = TextTrials(module, data)
    config, size = module.llama.config, sum(parameter.numel() for parameter in module.llama.parameters())
    start = module.model_spec.path
    sources = tuple(DataSource(name, licence, share) for name, (licence, share) in trials.trained_on().items())
    if start is not None:
        # what the start weights were trained on is not known here
        sources = (*sources, DataSource("training data of the start weights", "unknown", 1.0))
    card = CardFacts(
        title="Llemma: a language model trained on a mixture of corpora",
        summary=f"Continues text; {size:,} parameters in {config.num_hidden_layers} layers, trained on "
        f"{', '.join(source.name for source in sources)}.",
        intended_use="Research on language models: continued pretraining, mixtures, evaluation; a base for finetuning.",
        out_of_scope="Advice to people, and any decision about them: it was not trained to follow instructions.",
        limitations="It repeats what its corpora hold, errors included; text unlike them is continued badly.",
        licence="as the start weights'"
        if start is not None
        else f"no terms of its own; of its text: {', '.join(sorted({source.licence for source in sources}))}",
        data=sources,
    )
    return Subject("language", module.llama, trials.capabilities(), card)
