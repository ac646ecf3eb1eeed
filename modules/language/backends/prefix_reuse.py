"""Growing conversations prefilled by their new tokens only: recent prompts' keys and values, found by their tokens."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.networks.causal_lm import CausalLM
from modules.networks.kv_cache import KVCache

# A shorter common beginning costs more to copy than to compute.
_SHORTEST = 16
# Rows are prefilled together if none computes more than so many tokens anew for it.
_SPREAD = 64


class PrefixReuse:
    """A network as :func:`modules.language.generation.generate` uses it, whose prompts begin where an earlier one was
    the same.

    An answer, its criticism and its improvement share a growing context, and the calls of a computer agent share their
    page and examples, so most of what would be prefilled was computed before. Results are the network's own up to
    floating-point rounding. Recent prompts are kept, the least recently used are dropped; replies are not kept.

    Args:
        network: its weights must not change in between.
        max_bytes: of the keys and values kept.

    Attributes:
        computed, reused: prompt tokens prefilled and found, padding left out.
    """

    def __init__(self, network: CausalLM, max_bytes: int) -> None:
        self.network, self.max_bytes = network, max_bytes
        self.config, self.lm_head = network.config, network.lm_head
        self.computed = self.reused = self.bytes = 0
        self._entries: OrderedDict[bytes, tuple[np.ndarray, Tensor]] = OrderedDict()
        self._shared: list[int] = []  # tokens of the last prefill, if of one row: others may go on from it

    @staticmethod
    def serves(network: CausalLM) -> bool:
        """False where keys depend on the cache's capacity (dynamic NTK scaling of RoPE)."""
        return getattr(network.config, "rope_type", "default") != "dynamic"

    @property
    def training(self) -> bool:
        return self.network.training

    def eval(self) -> PrefixReuse:
        self.network.eval()
        return self

    def train(self, mode: bool = True) -> PrefixReuse:
        self.network.train(mode)
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        return self.network.logits(hidden)

    def new_cache(self, rows: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        return self.network.new_cache(rows, capacity, dtype)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, *, cache: KVCache) -> Tensor:
        """Hidden states [B, T, hidden_size] as the network's; where a prompt's were found and not computed, zeros.

        Only the last token's hidden state of a prompt is ever read, and that one is always computed.
        """
        start, length = cache.extent, input_ids.shape[1]
        if start and (length == 1 or start != len(self._shared)):
            return self.network(input_ids, cache=cache)
        opening = self._shared if start else []
        prompts = [np.array([*opening, *row]) for row in input_ids.tolist()]
        # Padding is zeros, at the end; taking a real zero for padding reuses less, and does no harm.
        lengths = [int(np.max(np.flatnonzero(prompt), initial=-1)) + 1 for prompt in prompts]
        found = [self._find(prompt[:end], cache, start) for prompt, end in zip(prompts, lengths, strict=True)]
        self.reused += sum(max(0, reuse - start) for reuse, _ in found)
        self.computed += sum(max(0, end - max(reuse, start)) for end, (reuse, _) in zip(lengths, found, strict=True))
        if all(reuse <= start for reuse, _ in found):
            hidden = self.network(input_ids, cache=cache)
        else:
            hidden = self._prefill(input_ids, cache, found)
        for row, (prompt, end) in enumerate(zip(prompts, lengths, strict=True)):
            self._keep(prompt[:end], cache.states[:, :, row, :, :end])
        if not start:
            self._shared = prompts[0].tolist() if len(prompts) == 1 else []
        return hidden

    def _prefill(self, input_ids: Tensor, cache: KVCache, found: list[tuple[int, Tensor | None]]) -> Tensor:
        start, length = cache.extent, input_ids.shape[1]
        total = start + length
        hidden = self.lm_head.weight.new_zeros((*input_ids.shape, self.config.hidden_size))
        for group in _groups([reuse for reuse, _ in found]):
            rows = torch.tensor(group, device=input_ids.device)
            known = min(found[row][0] for row in group)
            part = self.network.new_cache(len(group), total, cache.states.dtype)
            for place, row in enumerate(group):
                states = found[row][1]
                part.states[:, :, place, :, :known] = (cache.states[:, :, row] if states is None else states)[
                    ..., :known, :
                ]
            if known:
                part.advance(known)
            out = self.network(input_ids[rows, known - start :], cache=part)
            hidden[rows, known - start :] = out.to(hidden.dtype)
            cache.states[:, :, rows, :, start:total] = part.states[..., start:, :]
        cache.advance(length)
        return hidden

    def _find(self, prompt: np.ndarray, cache: KVCache, start: int) -> tuple[int, Tensor | None]:
        """Tokens of the prompt, not all, that are known, and their keys and values [layers, 2, kv_heads, n, head_dim];
        None: the cache's own."""
        best, key = max(start, _SHORTEST - 1), b""
        for name, (tokens, states) in self._entries.items():
            if states.dtype == cache.states.dtype and (common := _common(tokens, prompt[:-1])) > best:
                best, key = common, name
        if not key:
            return start, None
        self._entries.move_to_end(key)
        return best, self._entries[key][1]

    def _keep(self, prompt: np.ndarray, states: Tensor) -> None:
        key = prompt.tobytes()
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        size = states.numel() * states.element_size()
        if len(prompt) < _SHORTEST or size > self.max_bytes:
            return
        for name, (tokens, _) in list(self._entries.items()):
            if _common(tokens, prompt) == len(tokens):  # what the new one contains
                self._drop(name)
        while self.bytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = (prompt, states.clone())
        self.bytes += size

    def _drop(self, key: bytes) -> None:
        states = self._entries.pop(key)[1]
        self.bytes -= states.numel() * states.element_size()


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the common beginning."""
    limit = min(len(first), len(second))
    differ = first[:limit] != second[:limit]
    return int(differ.argmax()) if differ.any() else limit


def _groups(reuse: list[int]) -> list[list[int]]:
    """Rows in groups of similar reuse."""
    groups: list[list[int]] = []
    for row in sorted(range(len(reuse)), key=lambda row: -reuse[row]):
        if groups and reuse[groups[-1][0]] - reuse[row] <= _SPREAD:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def reusing(network: CausalLM, max_bytes: int) -> Any:
    """The network with reuse of prefixes, or the network itself where that does not serve."""
    return PrefixReuse(network, max_bytes) if max_bytes > 0 and PrefixReuse.serves(network) else network
