"""What every causal language model of ours offers, and the parts of attention that do not depend on its kind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.networks import fused
from modules.networks.kv_cache import KVCache


class CausalConfig(Protocol):
    """Sizes that a causal language model's configuration states, whatever it calls them in a file."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    def to_hf(self) -> dict[str, Any]: ...


def use_fused(x: Tensor) -> bool:
    """True where the hand-written operations of `modules.networks.fused` serve."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def context_limit(model: Any) -> int:
    """The longest sequence a causal language model takes, in tokens."""
    window = getattr(model.config, "sliding_window", None)
    limit = model.config.max_position_embeddings
    return limit if window is None else min(limit, window)


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions that restart at each document. document_ids [B, T], a document being one run -> int64 [B, T]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.zeros_like(index)
    starts[:, 1:] = torch.where(document_ids[:, 1:] != document_ids[:, :-1], index[:, 1:], 0)
    return index - starts.cummax(dim=1).values


@dataclass(frozen=True)
class AttentionPlan:
    """Who attends to whom in one forward pass, and the tokens' positions.

    Attributes:
        positions: int64 [B, T]; None: 0..T-1.
        documents: int [B, T], for `attend`, where no mask stands for them; None: one document.
        mask: for scaled_dot_product_attention, broadcastable to [B, H, T, K]; None: causal.
    """

    positions: Tensor | None = None
    documents: Tensor | None = None
    mask: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """Softmax attention. query [B, H, T, D]; key, value [B, KV, K, D], H a multiple of KV -> [B, T, H, D]."""
    length = query.shape[2]
    # On one thread the blockwise kernel is faster, from more than one block on. On several, its many small operations
    # are as many barriers, which torch's kernel does not have; but with documents that one would need a [T, T] mask.
    blockwise = plan.documents is not None or (length > fused.QUERY_BLOCK and torch.get_num_threads() == 1)
    if plan.mask is None and length > 1 and use_fused(query) and blockwise:
        return fused.causal_attention(query, key, value, 1 / math.sqrt(query.shape[3]), plan.documents)
    return F.scaled_dot_product_attention(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        attn_mask=plan.mask,
        is_causal=plan.mask is None and length > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)


class CausalLM(nn.Module, ABC):
    """A causal language model: tokens to hidden states, hidden states to logits, and a cache for decoding.

    Attributes:
        config: sizes (`CausalConfig`).
        lm_head: the output head; weight [vocab_size, hidden_size], the embedding's where they are tied.
        linear_names: last names of the linear maps in a decoder layer: what adapters and quantisation can act on.
        embedding_name: full name of the token embedding.
    """

    config: CausalConfig
    lm_head: nn.Linear
    activation_checkpointing: bool = False
    linear_names: ClassVar[tuple[str, ...]] = ()
    embedding_name: ClassVar[str] = ""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The decoder layers."""

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        embedding = self.get_submodule(self.embedding_name)
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def tie_weights(self) -> None:
        """Share the embedding with the output head, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    def new_cache(self, rows: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty key/value cache for this model's shape, device and (unless given) dtype."""
        config, weight = self.config, self.lm_head.weight
        return KVCache(
            config.num_hidden_layers,
            rows,
            config.kv_heads,
            capacity,
            config.head_size,
            dtype=dtype or weight.dtype,
            device=weight.device,
        )

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_pattern: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: int64 [B, T].
            position_ids: int64 [B, T]; default 0..T-1, restarting per document or after padding, or after the cache's
                tokens.
            document_ids: int [B, T]; attention stays inside a document (block-diagonal mask). One contiguous run each.
            attention_mask: [B, T], 1 for tokens and 0 for padding on the left or right, as Hugging Face. Right padding
                needs no mask at all: causality already hides it.
            attention_pattern: bool [B, T, T], True where a row's token (second dimension) attends to a column's
                (third), at least one in each row; replaces the causal mask, and needs position_ids.
            cache: keys and values of earlier tokens; extended in place. Its rows are this batch's rows.

        Returns: [B, T, hidden_size]; under autocast in the autocast dtype.

        Raises:
            ValueError: a sequence longer than a sliding window or a cache, or options that exclude each other.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., vocab_size] of hidden states [..., hidden_size]."""
        return self.lm_head(hidden)

    def to_hf_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors under the names and in the shapes of a Hugging Face checkpoint."""
        return dict(weights)

    def from_hf_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A Hugging Face checkpoint's tensors under this model's names and in its shapes."""
        return dict(weights)

    def _plan(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        attention_mask: Tensor | None,
        attention_pattern: Tensor | None,
        cache: KVCache | None,
    ) -> AttentionPlan:
        """Check `forward`'s options and turn them into positions and a mask."""
        name, length = type(self).__name__, input_ids.shape[1]
        if attention_pattern is not None:
            if position_ids is None or not (cache is None and document_ids is None and attention_mask is None):
                raise ValueError(
                    f"{name}: attention_pattern needs position_ids and excludes cache, document_ids and attention_mask"
                )
            if attention_pattern.shape != (*input_ids.shape, length):
                raise ValueError(
                    f"{name}: attention_pattern {tuple(attention_pattern.shape)} does not fit input_ids "
                    f"{tuple(input_ids.shape)}; want [B, T, T]"
                )
            # added to the scores: converted once here, and not in every layer
            dtype = fused.compute_dtype(self.embedding.weight)
            mask = torch.zeros(attention_pattern.shape, dtype=dtype, device=input_ids.device)
            return AttentionPlan(position_ids, mask=mask.masked_fill_(~attention_pattern, float("-inf"))[:, None])
        if attention_mask is not None:
            if document_ids is not None:
                raise ValueError(f"{name}: give document_ids or attention_mask, not both")
            document_ids = attention_mask.to(torch.int64)  # padding becomes a document of its own
        if cache is not None:
            if document_ids is not None or position_ids is not None:
                raise ValueError(
                    f"{name}: a cache needs plain right-padded prompts: no attention_mask, document_ids, position_ids"
                )
            if cache.extent + length > cache.capacity:
                raise ValueError(f"{name}: {cache.extent + length} tokens exceed the cache's capacity {cache.capacity}")
            if cache.extent:
                return AttentionPlan(cache.positions(length), mask=cache.mask(length))
            return AttentionPlan()
        if document_ids is None:
            return AttentionPlan(position_ids)
        if position_ids is None:
            position_ids = document_positions(document_ids)
        if use_fused(input_ids) and length > fused.QUERY_BLOCK:
            return AttentionPlan(position_ids, documents=document_ids)
        mask = (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()
        return AttentionPlan(position_ids, mask=mask)
