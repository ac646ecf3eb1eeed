"""Looking into a causal language model: nats per token, the residual stream, attention maps; outside of training."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from modules.networks.causal_lm import CausalLM
from modules.networks.llama import Llama, LlamaAttention, rotated
from modules.objectives.lm import lm_cross_entropy
from modules.seeds import stream_seed

TOKENS_AT_ONCE = 8192


def padded(sequences: Sequence[Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids ``[B, T]`` int64, padded on the right with 0, and which of them are tokens ``[B, T]`` bool."""
    ids = torch.nn.utils.rnn.pad_sequence([one.long() for one in sequences], batch_first=True)
    lengths = torch.tensor([len(one) for one in sequences])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def token_nats(network: CausalLM, sequences: Sequence[Tensor]) -> list[Tensor]:
    """``-log p`` of every token but the first given those before it: float32 ``[tokens - 1]`` a sequence, on the CPU.

    Sequences of about equal length share a forward pass; causality hides the padding.

    Raises:
        ValueError: a sequence of fewer than two tokens.
    """
    if short := next((len(one) for one in sequences if len(one) < 2), None):
        raise ValueError(f"token_nats: a sequence needs at least two tokens, got {short}")
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    while order:
        rows = max(1, TOKENS_AT_ONCE // len(sequences[order[-1]]))  # the longest first
        chosen, order = order[-rows:], order[:-rows]
        ids, kept = padded([sequences[number] for number in chosen], network.lm_head.weight.device)
        labels = torch.where(kept[:, 1:], ids[:, 1:], -100)
        for number, row in zip(chosen, labelled_nats(network, ids[:, :-1], labels).cpu(), strict=True):
            found[number] = row[: len(sequences[number]) - 1]
    return found


def labelled_nats(network: CausalLM, ids: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:
    """``-log p(labels[b, t] | ids[b, <=t])`` float32 ``[B, T]`` as in training; 0 where the label is -100.

    Args:
        ids, labels: int64 ``[B, T]``, labels already shifted.
        documents: int ``[B, T]``; attention stays inside a document.
    """
    with torch.no_grad():
        hidden = network(ids, document_ids=documents)
        return lm_cross_entropy(hidden, network.lm_head.weight, labels)[1].float()


@torch.no_grad()
def residual_stream(network: CausalLM, ids: Tensor) -> list[Tensor]:
    """``layers + 1`` hidden states ``[B, T, H]``: what enters the first decoder layer, and what each layer leaves.

    All are before the final norm.
    """
    kept: list[Tensor] = []

    def enters(_: Any, arguments: tuple[Any, ...]) -> None:
        kept.append(arguments[0])

    def leaves(_: Any, __: Any, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    handles = [network.blocks[0].register_forward_pre_hook(enters)]
    handles += [block.register_forward_hook(leaves) for block in network.blocks]
    try:
        network(ids)
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.no_grad()
def attention_maps(network: Llama, ids: Tensor) -> list[Tensor]:
    """Per layer the causal attention weights ``[B, heads, T, T]`` float32, recomputed from what enters each layer.

    Sequences begin at position 0 and are one document each.
    """
    maps: list[Tensor] = []

    def look(attention: Any, arguments: tuple[Any, ...]) -> None:
        maps.append(attention_weights(attention, arguments[0], arguments[1]))

    attentions = [module for module in network.blocks.modules() if isinstance(module, LlamaAttention)]
    handles = [module.register_forward_pre_hook(look) for module in attentions]
    try:
        network(ids)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def attention_weights(attention: LlamaAttention, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """``softmax(q k' / sqrt(d))`` under the causal mask, float32 ``[B, heads, T, T]``; x ``[B, T, H]`` is normed."""
    batch, length, _ = x.shape
    query, key = (
        rotated(project(x).view(batch, length, heads, attention.width).transpose(1, 2).float(), *rope)
        for project, heads in ((attention.q_proj, attention.heads), (attention.k_proj, attention.kv_heads))
    )
    key = key.repeat_interleave(attention.heads // attention.kv_heads, 1)
    scores = query @ key.transpose(2, 3) / attention.width**0.5
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Gradients and in-place work on copies, also where the caller runs in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def trained_states(
    network: CausalLM, optimizers: Callable[[CausalLM], Any], batches: Sequence[tuple[Tensor, Tensor]], seed: int
) -> dict[str, dict[str, Any]]:
    """What training on ``batches`` leaves, straight and with a save and a load behind every step; on copies.

    Args:
        network: copied, never changed.
        optimizers: network -> what a LightningModule's ``configure_optimizers`` returns, with one schedule of steps.
        batches: one a step: token ids and labels ``[B, T]`` int64.
        seed: of dropout.

    Returns:
        ``before``, ``straight`` and ``resumed``: states of network, optimiser and schedule.
    """
    with plain_tensors():
        ready = _Training(network, optimizers)
        before = ready.state()
        for number, batch in enumerate(batches):
            ready.step(batch, stream_seed(seed, number))
        straight = ready.state()
        resumed = _Training(network, optimizers)
        for number, batch in enumerate(batches):
            resumed.step(batch, stream_seed(seed, number))
            saved = io.BytesIO()
            torch.save(resumed.state(), saved)
            saved.seek(0)
            resumed = _Training(network, optimizers)
            resumed.load(torch.load(saved, weights_only=True))
        return {"before": before, "straight": straight, "resumed": resumed.state()}


class _Training:
    """A copy of a network with a fresh optimiser."""

    def __init__(self, network: CausalLM, optimizers: Callable[[CausalLM], Any]) -> None:
        self.network = copy.deepcopy(network).train()
        made = optimizers(self.network)
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]

    def step(self, batch: tuple[Tensor, Tensor], seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = self.network(batch[0])
        loss, _, _ = lm_cross_entropy(hidden, self.network.lm_head.weight, batch[1])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def state(self) -> dict[str, Any]:
        parts = {"network": self.network, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, part in (("network", self.network), ("optimizer", self.optimizer), ("schedule", self.schedule)):
            part.load_state_dict(state[name])
