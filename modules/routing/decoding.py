"""Complete routes from decoding tables: all instances and rollouts step together, with a backward pass of their own.

The gradient of routes' log-likelihoods with regard to the tables is written out (:class:`_Rollout`): a step's backward
is two products and a softmax's, accumulated in place, where autograd would allocate tables of gradients at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.contracts import RoutingProblem
from modules.networks.attention_solver import DecoderTables

CLIP = 10.0
"""Logits are ``CLIP * tanh`` (Bello et al. 2016; Kool et al. 2019, eq. 7)."""
_CHUNK_BYTES = 1 << 20
"""Attention weights of one step of a chunk of instances: they should stay in a core's cache."""
_BELOW_ONE = 1.0 - 2.0**-20
_INFINITE = 1e30
_FOLD_BELOW = 64
"""Nodes up to which values, glimpse projection and logit keys are multiplied out: one product a step, not H + 1."""
_FOLD_BELOW_FORWARD = 40
"""The same without a backward pass, which gains more from it."""


@dataclass(frozen=True)
class Choice:
    """How a route's next node is chosen; one of three.

    Args:
        forced: ``[B, P, S]`` int64: the first S actions are these (all, to score given routes).
        seeds: ``[B, P]`` int64: sample, each rollout with its own counter-based random numbers; ``None``: greedily.
    """

    forced: Tensor | None = None
    seeds: Tensor | None = None


def uniforms(seeds: Tensor, step: int) -> Tensor:
    """Numbers in [0, 1), float32, one per seed (int64, any shape), functions of seed and step alone.

    Two rounds of a multiply-xorshift hash; float32 keeps the upper 24 bits.
    """
    x = seeds + ((step + 1) * 0x9E3779B97F4A7C15 + (1 << 63)) % (1 << 64) - (1 << 63)
    for multiplier in (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)):
        x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * multiplier
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24


def rollout_seeds(seed: int, index: Tensor, rollouts: int) -> Tensor:
    """``[B, rollouts]`` int64 seeds of instances number ``index`` ``[B]`` in the stream ``seed`` (63 bits).

    They do not depend on which instances share a batch or a rank.
    """
    lanes = torch.arange(rollouts, device=index.device)
    spread = index.unsqueeze(-1) * 0x2545F4914F6CDD1D + lanes * 0x369DEA0F31A53F85
    return (spread ^ (spread >> 29)) + seed


class _Readout:
    """From attention weights of all heads ``[B, P, H * N]`` to logits before clipping ``[B, P, N]``, and back.

    Logits are ``sum_h attention_h @ values_h @ keys_h^T``. Of few nodes the last two are one matrix per instance.
    """

    def __init__(self, values: Tensor, keys: Tensor, fold_below: int) -> None:
        self.batch, self.heads, self.nodes, self.width = values.shape
        self.values = values
        self.keys = keys.view(self.batch, self.nodes, self.heads, self.width).transpose(1, 2)  # [B, H, N, width]
        self.flat_keys = keys
        self.mix = self.d_mix = self.d_values = self.d_keys = None
        if self.nodes <= fold_below:
            self.mix = (values @ self.keys.transpose(2, 3)).reshape(self.batch, -1, self.nodes)

    def _split(self, attention: Tensor) -> Tensor:  # [B, H, P, N]
        return attention.view(self.batch, -1, self.heads, self.nodes).transpose(1, 2)

    def __call__(self, attention: Tensor) -> Tensor:
        if self.mix is not None:
            return torch.bmm(attention, self.mix)
        return torch.bmm(self.glimpse(attention), self.flat_keys.transpose(1, 2))

    def glimpse(self, attention: Tensor) -> Tensor:
        """``[B, P, dim]``."""
        return (self._split(attention) @ self.values).transpose(1, 2).reshape(self.batch, attention.shape[1], -1)

    def backward(self, attention: Tensor, d_logits: Tensor) -> Tensor:
        """Gradient ``[B, P, H * N]``; those of values and keys are added up."""
        if self.mix is not None:
            if self.d_mix is None:
                self.d_mix = torch.zeros_like(self.mix)
            self.d_mix.baddbmm_(attention.transpose(1, 2), d_logits)
            return torch.bmm(d_logits, self.mix.transpose(1, 2))
        if self.d_values is None or self.d_keys is None:
            self.d_values, self.d_keys = torch.zeros_like(self.values), torch.zeros_like(self.flat_keys)
        self.d_keys.baddbmm_(d_logits.transpose(1, 2), self.glimpse(attention))
        d_glimpse = torch.bmm(d_logits, self.flat_keys)
        d_glimpse = d_glimpse.view(self.batch, -1, self.heads, self.width).transpose(1, 2)
        self.d_values += self._split(attention).transpose(2, 3) @ d_glimpse
        return (d_glimpse @ self.values.transpose(2, 3)).transpose(1, 2).reshape(attention.shape)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of values ``[B, H, N, width]`` and keys ``[B, N, dim]``, after all calls of :meth:`backward`."""
        if self.d_mix is not None:
            d_mix = self.d_mix.view(self.batch, self.heads, self.nodes, self.nodes)
            d_keys = (d_mix.transpose(2, 3) @ self.values).transpose(1, 2)
            return d_mix @ self.keys, d_keys.reshape(self.flat_keys.shape)
        if self.d_values is None or self.d_keys is None:
            return torch.zeros_like(self.values), torch.zeros_like(self.flat_keys)
        return self.d_values, self.d_keys


class _Decisions:
    """Attention and logits of one decision after the other, from tables of ``batch`` instances."""

    def __init__(
        self,
        problem: RoutingProblem,
        readout: _Readout,
        last: Tensor,
        first: Tensor | None,
        start: Tensor | None,
        fixed: Tensor | None,
        context: Tensor | None,
        rollouts: int,
    ) -> None:
        self.problem, self.readout, self.first, self.start, self.context = problem, readout, first, start, context
        self.batch, self.nodes = last.shape[:2]
        self.heads = last.shape[2] // self.nodes
        self.rollouts = rollouts
        self.flat = last.reshape(self.batch * self.nodes, -1)
        self.offsets = torch.arange(self.batch, device=last.device).unsqueeze(-1) * self.nodes
        # 0, or minus a large number at nodes that a closed route has visited
        self.visited = last.new_zeros(self.batch, rollouts, self.nodes if problem.spec.closed else 0)
        # scores that every later decision of a rollout adds
        self.standing = None if fixed is None else fixed.unsqueeze(1).expand(-1, rollouts, -1)

    def decide(
        self, state: dict[str, Tensor], number: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Attention weights ``[B, P, H * N]``, tanh of logits and logits ``[B, P, N]``, rows of ``last``, context."""
        closed = self.problem.spec.closed
        if closed and number == 0:
            assert self.start is not None
            scores = self.start.unsqueeze(1).expand(-1, self.rollouts, -1)
            scores = scores + self.standing if self.standing is not None else scores.clone()
            row = None
        else:
            row = (state["current"] + self.offsets).view(-1)
            scores = self.flat.index_select(0, row).view(self.batch, self.rollouts, -1)
            if self.standing is not None:
                scores += self.standing
        features = self.problem.context(state)
        if features is not None:
            assert self.context is not None
            scores = torch.baddbmm(scores, features.to(scores.dtype), self.context)
        # masked fills are not vectorised; a large number serves as infinity
        blocked = self.visited if closed else state["allowed"].to(scores.dtype).sub_(1.0).mul_(_INFINITE)
        scores = scores.view(self.batch, self.rollouts, self.heads, self.nodes)
        if not closed:  # there, visited nodes stay -inf in ``standing``
            scores += blocked.unsqueeze(2)  # a third of the time of a masked fill over heads
        attention = scores.softmax(-1).view(self.batch, self.rollouts, -1)
        clipped = self.readout(attention).tanh_()
        return attention, clipped, torch.add(blocked, clipped, alpha=CLIP), row, features

    def advance(self, state: dict[str, Tensor], action: Tensor, number: int) -> None:
        """Step the problem, and add to the standing scores what ``action`` ``[B, P]`` changes for good."""
        self.problem.step(state, action)
        if number == 0 and self.first is not None:
            rows = self.first.gather(1, action.unsqueeze(-1).expand(-1, -1, self.first.shape[2]))
            self.standing = rows if self.standing is None else rows.add_(self.standing)
        if self.problem.spec.closed:
            assert self.standing is not None
            visited = action.view(self.batch, self.rollouts, 1, 1).expand(-1, -1, self.heads, 1)
            standing = self.standing.view(self.batch, self.rollouts, self.heads, self.nodes)
            standing.scatter_(-1, visited, -math.inf)
            self.visited.scatter_(-1, action.unsqueeze(-1), -_INFINITE)

    def finished(self, state: dict[str, Tensor], number: int) -> bool:
        return not self.problem.spec.closed and number > 0 and bool(self.problem.finished(state).all())


class _Steps:
    """What the backward pass needs of every step."""

    def __init__(self) -> None:
        self.attention: list[Tensor] = []  # [B, P, H * N]
        self.probability: list[Tensor] = []  # [B, P, N]
        self.slope: list[Tensor] = []  # [B, P, N], CLIP * (1 - tanh^2)
        self.action: list[Tensor] = []  # [B, P]
        self.row: list[Tensor | None] = []  # [B * P], rows of table ``last``; None: the start
        self.context: list[Tensor | None] = []  # [B, P, C]


class _Rollout(torch.autograd.Function):
    """(values, keys, last, first, start, fixed, context) -> (actions, log_likelihood); differentiable once in them."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        keys: Tensor,
        last: Tensor,
        first: Tensor | None,
        start: Tensor | None,
        fixed: Tensor | None,
        context: Tensor | None,
        problem: RoutingProblem,
        instances: TensorDict,
        rollouts: int,
        choice: Choice,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        steps = _Steps() if keep else None
        fold_below = _FOLD_BELOW if keep else min(_FOLD_BELOW, _FOLD_BELOW_FORWARD)
        decisions = _Decisions(
            problem, _Readout(values, keys, fold_below), last, first, start, fixed, context, rollouts
        )
        state = problem.begin(instances, rollouts)
        total = last.new_zeros(decisions.batch, rollouts)
        actions: list[Tensor] = []
        forced = choice.forced
        for number in range(problem.max_steps(decisions.nodes)):
            if decisions.finished(state, number):
                break
            action = forced[:, :, number] if forced is not None and number < forced.shape[2] else None
            # a start that was forced on the rollout costs no likelihood, a given route does
            if action is None or (forced is not None and forced.shape[2] > 1):
                attention, clipped, logits, row, features = decisions.decide(state, number)
                if action is None and choice.seeds is None:
                    action = logits.argmax(-1)
                if action is None or keep:
                    probability = logits.softmax(-1)
                    if action is None:
                        assert choice.seeds is not None
                        action = _sample(probability, uniforms(choice.seeds, number))
                    total += probability.gather(-1, action.unsqueeze(-1)).squeeze(-1).log()
                    if steps is not None:
                        steps.attention.append(attention)
                        steps.probability.append(probability)
                        steps.slope.append(clipped.square_().neg_().add_(1.0).mul_(CLIP))
                        steps.action.append(action)
                        steps.row.append(row)
                        steps.context.append(features)
                else:
                    total += logits.gather(-1, action.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
            actions.append(action)
            decisions.advance(state, action, number)
        route = torch.stack(actions, -1)
        ctx.mark_non_differentiable(route)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, keys, last)
        ctx.steps, ctx.first_action = steps, actions[0]
        ctx.shapes = tuple(None if table is None else table.shape for table in (first, start, fixed, context))
        return route, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 12
        values, keys, last = ctx.saved_tensors
        steps: _Steps | None = ctx.steps
        if steps is None:
            raise RuntimeError("decode: the backward pass runs once, and frees what it needed: decode again")
        first_shape, start_shape, fixed_shape, context_shape = ctx.shapes
        batch, nodes = last.shape[:2]
        rollouts = grad.shape[1]
        heads = last.shape[2] // nodes
        readout, d_last = _Readout(values, keys, _FOLD_BELOW), torch.zeros_like(last)
        flat = d_last.view(batch * nodes, -1)
        d_start = None if start_shape is None else last.new_zeros(start_shape)
        d_context = None if context_shape is None else last.new_zeros(context_shape)
        after_first = last.new_zeros(batch, rollouts, last.shape[2]) if first_shape or fixed_shape else None
        scale = grad.unsqueeze(-1)
        for number in reversed(range(len(steps.action))):
            attention, probability = steps.attention[number], steps.probability[number]
            # d log p / d logits = onehot - p
            d_logits = probability.mul_(scale).neg_()
            d_logits.scatter_add_(-1, steps.action[number].unsqueeze(-1), scale)
            d_logits.mul_(steps.slope[number])
            d_attention = readout.backward(attention, d_logits)
            split = (batch, rollouts, heads, nodes)
            d_scores = torch.ops.aten._softmax_backward_data(
                d_attention.view(split), attention.view(split), -1, attention.dtype
            ).view(batch, rollouts, -1)
            row, features = steps.row[number], steps.context[number]
            if features is not None:
                assert d_context is not None
                d_context.baddbmm_(features.transpose(1, 2), d_scores)
            if row is not None:
                flat.index_add_(0, row, d_scores.view(batch * rollouts, -1))
                if after_first is not None:
                    after_first += d_scores
            else:
                assert d_start is not None
                d_start += d_scores.sum(1)
            steps.attention[number] = steps.probability[number] = steps.slope[number] = attention.new_empty(0)
        d_first = d_fixed = None
        if after_first is not None:
            if first_shape is not None:
                index = ctx.first_action.unsqueeze(-1).expand(-1, -1, last.shape[2])
                d_first = last.new_zeros(first_shape).scatter_add_(1, index, after_first)
            if fixed_shape is not None:
                d_fixed = after_first.sum(1)
                if d_start is not None:
                    d_fixed = d_fixed + d_start
        ctx.steps = None
        return *readout.gradients(), d_last, d_first, d_start, d_fixed, d_context, None, None, None, None, None


def _sample(probability: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the distribution function ``[.., N]`` at ``uniform`` ``[..]``: nodes of probability 0 never come."""
    cumulative = probability.cumsum(-1)
    level = uniform.to(cumulative.dtype).unsqueeze(-1) * (_BELOW_ONE * cumulative[..., -1:])
    return (cumulative <= level).sum(-1)


def chunk_size(rollouts: int, scores: int, instances: int) -> int:
    """Instances to decode at once, of ``scores`` attention weights per rollout and step."""
    return max(1, min(instances, _CHUNK_BYTES * torch.get_num_threads() // (4 * rollouts * scores)))


def decode(
    problem: RoutingProblem,
    instances: TensorDict,
    tables: DecoderTables,
    rollouts: int,
    choice: Choice,
) -> tuple[Tensor, Tensor]:
    """Routes ``[B, P, T]`` int64 and their log-likelihoods ``[B, P]`` (a single forced action is not counted).

    Gradients flow from the likelihoods to the tables if they are recorded.
    """
    batch, nodes = tables.last.shape[:2]
    keep = torch.is_grad_enabled() and tables.last.requires_grad
    size = chunk_size(rollouts, tables.last.shape[2], batch) if tables.last.device.type == "cpu" else batch
    parts: dict[str, Any] = {
        field.name: [None] * math.ceil(batch / size) if value is None else value.split(size)
        for field in fields(DecoderTables)
        for value in (getattr(tables, field.name),)
    }
    routes, totals = [], []
    for number in range(math.ceil(batch / size)):
        chosen = slice(number * size, (number + 1) * size)
        part = DecoderTables(**{name: pieces[number] for name, pieces in parts.items()})
        own = Choice(*(None if value is None else value[chosen] for value in (choice.forced, choice.seeds)))
        route, total = _Rollout.apply(
            part.values, part.keys, part.last, part.first, part.start, part.fixed, part.context,
            problem, instances[chosen], rollouts, own, keep,
        )  # fmt: skip  # pyright: ignore[reportGeneralTypeIssues]
        routes.append(route)
        totals.append(total)
    longest = max(route.shape[-1] for route in routes)
    routes = [torch.nn.functional.pad(route, (0, longest - route.shape[-1])) for route in routes]  # waits at the depot
    return torch.cat(routes), torch.cat(totals)


def beam_search(
    problem: RoutingProblem, instances: TensorDict, tables: DecoderTables, width: int
) -> tuple[Tensor, Tensor]:
    """The likeliest of ``width`` partial routes kept at every step (Kool et al. 2019 leave it to Joshi et al. 2019).

    Routes ``[B, width, T]`` and log-likelihoods ``[B, width]``; slots that no route was left for repeat likelier ones.
    """
    batch, nodes = tables.last.shape[:2]
    with torch.no_grad():
        names = [field.name for field in fields(DecoderTables)]
        rest = {name: getattr(tables, name) for name in names if name not in ("values", "keys")}
        decisions = _Decisions(
            problem, _Readout(tables.values, tables.keys, _FOLD_BELOW_FORWARD), rollouts=width, **rest
        )
        state = problem.begin(instances, width)
        total = tables.last.new_full((batch, width), -_INFINITE)
        total[:, 0] = 0.0  # all beams are the same empty route
        routes = torch.zeros(batch, width, 0, dtype=torch.int64, device=total.device)
        for number in range(problem.max_steps(nodes)):
            if decisions.finished(state, number):
                break
            logits = decisions.decide(state, number)[2]
            candidates = (total.unsqueeze(-1) + logits.log_softmax(-1)).flatten(1)
            total, flat = candidates.topk(width, dim=-1)
            flat = torch.where(total > -_INFINITE / 2, flat, flat[:, :1])
            parent, action = flat // nodes, flat % nodes
            state = {name: _reordered(value, parent) for name, value in state.items()}
            if decisions.standing is not None:
                decisions.standing = _reordered(decisions.standing, parent)
            decisions.visited = _reordered(decisions.visited, parent)
            routes = torch.cat([_reordered(routes, parent), action.unsqueeze(-1)], -1)
            decisions.advance(state, action, number)
        return routes, total


@torch.no_grad()
def decisions(
    problem: RoutingProblem, instances: TensorDict, tables: DecoderTables, forced: Tensor | None, rollouts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy routes, and what every decision chose from; ``forced`` ``[B, P, S]`` are their first actions.

    Returns:
        routes ``[B, P, T]`` int64; the distribution of every decision ``[B, P, T, N]``; the nodes it was allowed
        ``[B, P, T, N]`` bool; the node it was taken at ``[B, P, T]`` int64, -1 before a closed route has one.
    """
    rest = {field.name: getattr(tables, field.name) for field in fields(DecoderTables)}
    readout = _Readout(rest.pop("values"), rest.pop("keys"), _FOLD_BELOW_FORWARD)
    steps = _Decisions(problem, readout, rollouts=rollouts, **rest)
    state = problem.begin(instances, rollouts)
    taken: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for number in range(problem.max_steps(steps.nodes)):
        if steps.finished(state, number):
            break
        logits = steps.decide(state, number)[2]
        action = forced[..., number] if forced is not None and number < forced.shape[2] else logits.argmax(-1)
        here = state["current"].clone()
        if problem.spec.closed and number == 0:
            here.fill_(-1)
        taken.append((action, logits.softmax(-1), state["allowed"].clone(), here))
        steps.advance(state, action, number)
    route, probability, allowed, here = (torch.stack(each, 2) for each in zip(*taken, strict=True))
    return route, probability, allowed, here


def _reordered(value: Tensor, parent: Tensor) -> Tensor:
    index = parent.view(*parent.shape, *[1] * (value.ndim - 2)).expand(-1, -1, *value.shape[2:])
    return value.gather(1, index)
