"""Distance of a strategy to a population's policy hull (Yao et al. 2023, eq. 6), in plan space.

With ``w`` the probability that chance and the others lead to a terminal history of an own sequence (``game.reach``),
the chain rule of the KL divergence turns the per-state sum of the paper into one over own sequences::

    sum_s w(s) KL(pi(.|s) || pi_sigma(.|s)) = sum_z w[z] p[z] ln(p[z] / (sigma @ Q)[z])

``p`` is the plan, ``Q`` the members' plans: ``p`` and ``Q`` weighted by ``w`` are probability vectors. The minimum over
``sigma`` is the maximum-likelihood problem of mixture proportions, convex, with the certificate
``value - minimum <= max_k g_k - 1``, where ``g_k = sum_z w p Q[k] / (sigma @ Q)``. A normal-form game is the case
``w = 1``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

HullKind = Literal["mixture", "vertices"]
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks; it must give every rank the same bits."""

_WARM_STEPS, _NEWTON_STEPS = 8, 40
_NEWTON_BYTES = 2**27  # of Hessians; more learners than this holds are left to EM


class HullDistance(NamedTuple):
    """``value`` ``[...]`` in nats, differentiable in the plan; ``sigma`` ``[..., k]``; ``gap`` ``[...]``: error."""

    value: Tensor
    sigma: Tensor
    gap: Tensor


class StateActionBonus(NamedTuple):
    """What :func:`state_action_bonus` returns.

    ``bonus`` ``[episodes]`` (no gradient): summed divergence of each episode; ``nearest``: index of the nearest member,
    scalar int64; ``direct``: this rank's share of the mean divergence over all ranks' states, scalar, differentiable in
    the learner; ``sums`` ``[k]``: batch sums over all ranks, by which the nearest was chosen.
    """

    bonus: Tensor
    nearest: Tensor
    direct: Tensor
    sums: Tensor


def _check_kind(kind: str) -> None:
    if kind not in ("mixture", "vertices"):
        raise ValueError(f"hull: kind: must be 'mixture' or 'vertices', got {kind!r}")


def divergence(plan: Tensor, other: Tensor, reach: Tensor) -> Tensor:
    """``sum reach * p * ln(p / q)``, the KL divergence of plans weighted by reach.

    Args:
        plan: ``p`` ``[..., sequences]``.
        other: ``q``, broadcastable with ``plan``.
        reach: ``[sequences]``, at least 0.

    Returns:
        ``[...]`` in nats; ``0 ln 0 = 0``, and infinite where ``q`` is 0 on a sequence that ``p`` plays. The derivative
        by an entry that is exactly 0 (minus infinity) is taken as 0: smooth first where that matters.
    """
    plan, other = torch.broadcast_tensors(plan, other)
    live = (plan > 0) & (reach > 0)
    p = torch.where(live, plan, 1.0)
    q = torch.where(live, other, 1.0)
    return (torch.where(live, reach * p, 0.0) * (p.log() - q.log())).sum(-1)


def smooth(plan: Tensor, eps: float, reach: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """``plan + eps * base``, rescaled so that ``sum(reach * result) = 1``.

    With ``reach`` and ``base`` all ones this is "add eps, renormalise", as published; with ``base`` the plan of
    uniformly random play it is playing that with probability ``eps / (1 + eps)``, decided once per episode. Both are
    linear on plans, so a mixture of members stays in the hull of the smoothed members.

    Args:
        plan: ``[..., sequences]``.
        eps: weight of ``base``, at least 0.
        reach: ``[sequences]``, ones if left out.
        base: ``[sequences]``, positive wherever reach is, ones if left out.
    """
    if eps < 0:
        raise ValueError(f"smooth: eps: must be at least 0, got {eps}")
    mixed = plan + (eps if base is None else eps * base)
    mass = mixed if reach is None else mixed * reach
    return mixed / mass.sum(-1, keepdim=True)


def smooth_table(table: Tensor, legal: Tensor, eps: float) -> Tensor:
    """Behaviour mixed with uniform legal play in every state: ``(1 - eps) table + eps / legal actions``.

    Unlike :func:`smooth` this is not linear on plans: a mixture's smoothed table is not in the smoothed members' hull.

    Args:
        table: ``[..., states, actions]`` probabilities.
        legal: ``[states, actions]`` bool.
        eps: in ``[0, 1]``.
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"smooth_table: eps: must lie in [0, 1], got {eps}")
    uniform = legal.to(table.dtype)
    return (1 - eps) * table + eps * uniform / uniform.sum(-1, keepdim=True).clamp(min=1)


def hull_distance(
    plan: Tensor,
    member_plans: Tensor,
    reach: Tensor,
    kind: HullKind = "mixture",
    iterations: int = 2000,
    tolerance: float = 1e-10,
    newton: bool = True,
) -> HullDistance:
    """``min_sigma sum reach * p * ln(p / (sigma @ Q))`` over mixtures or over single members.

    Mixtures: a few monotone EM steps from the uniform interior point, an interior-point Newton finish, and EM again
    from the better of the two where the Newton steps did not reach ``tolerance``; stops by the duality gap. ``value``
    is differentiable in ``plan`` by the envelope theorem (``sigma`` held fixed).

    Args:
        plan: ``[sequences]`` or ``[learners, sequences]``.
        member_plans: ``Q`` ``[k, sequences]``, no gradient is passed to them.
        reach: ``[sequences]``.
        kind: ``"mixture"``: the hull; ``"vertices"``: the nearest member (never less than the hull's value).
        iterations: bound on EM steps.
        tolerance: duality gap to stop at, in nats.
        newton: whether to take Newton steps; EM alone is cheaper for many learners and a coarse tolerance.

    Returns:
        :class:`HullDistance`; the value is infinite where the plan plays what no member plays.

    Raises:
        ValueError: no members, shapes that do not fit, unknown kind.
    """
    _check_kind(kind)
    if member_plans.ndim != 2 or not len(member_plans):
        raise ValueError(
            f"hull_distance: member_plans: must be [k, sequences], k > 0, got shape {tuple(member_plans.shape)}"
        )
    if plan.ndim not in (1, 2) or plan.shape[-1] != member_plans.shape[1] or reach.shape != plan.shape[-1:]:
        raise ValueError(
            f"hull_distance: plan, reach: must have {member_plans.shape[1]} sequences as the members do, "
            f"got shapes {tuple(plan.shape)}, {tuple(reach.shape)}"
        )
    members = member_plans.detach()
    with torch.no_grad():
        rows = plan.detach().reshape(-1, plan.shape[-1]) * reach
        used = (rows > 0).any(0)
        rows, columns = rows[:, used], members[:, used]
        if kind == "vertices":
            sigma, gap = _nearest(rows, columns)
        else:
            sigma, gap = mixture_weights(rows, columns, iterations, tolerance, newton=newton)
    sigma, gap = sigma.reshape(*plan.shape[:-1], -1), gap.reshape(plan.shape[:-1])
    return HullDistance(divergence(plan, sigma @ members, reach), sigma, gap)


def _cross(weights: Tensor, members: Tensor) -> Tensor:
    """``-sum_s weights[l, s] ln members[k, s]`` as ``[learners, k]``, infinite where a needed entry is 0."""
    zero = members <= 0
    cost = -(weights @ torch.where(zero, 1.0, members).log().T)
    missed = (weights > 0).to(weights.dtype) @ zero.to(weights.dtype).T
    return torch.where(missed > 0, torch.inf, cost)


def _nearest(weights: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    best = _cross(weights, members).argmin(-1)
    sigma = torch.nn.functional.one_hot(best, len(members)).to(weights.dtype)
    return sigma, weights.new_zeros(len(weights))


def mixture_weights(
    weights: Tensor,
    members: Tensor,
    iterations: int,
    tolerance: float,
    reduce: Reduce | None = None,
    newton: bool = True,
) -> tuple[Tensor, Tensor]:
    """Maximise ``sum_s weights[s] ln(sigma @ members)[s]`` over the simplex, for each row of weights.

    Args:
        weights: ``[learners, samples]``, at least 0. Samples that no member covers are left out of the likelihood.
        members: ``[k, samples]``, at least 0.
        iterations: bound on EM steps.
        tolerance: duality gap, per unit of weight, to stop at.
        reduce: sums over ranks, where samples are spread over them.
        newton: whether to take Newton steps.

    Returns:
        ``sigma`` ``[learners, k]`` and the certified gap ``[learners]`` per unit of weight.
    """
    reduce = reduce or (lambda value: value)
    scale = members.amax(0)
    covered = scale > 0
    weights, members = weights[:, covered], members[:, covered] / scale[covered]
    mass = reduce(weights.sum(-1))
    empty = mass <= 0
    weights = weights / torch.where(empty, 1.0, mass)[:, None]
    learners, k = len(weights), len(members)
    best = weights.new_full((learners, k), 1 / k)
    best_gap = torch.where(empty | (k == 1), 0.0, weights.new_full((learners,), torch.inf))

    def gains(rows: Tensor, sigma: Tensor) -> Tensor:
        return reduce((weights[rows] / (sigma @ members)) @ members.T)

    def offer(rows: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        """Keep what is better for learners ``rows`` than what they have; which of them are not done yet."""
        gap = torch.nan_to_num((gain.amax(-1) - 1).clamp(min=0), nan=torch.inf)
        better = gap < best_gap[rows]
        best[rows] = torch.where(better[:, None], sigma, best[rows])
        best_gap[rows] = torch.minimum(gap, best_gap[rows])
        return best_gap[rows] > tolerance

    def climb(steps: int) -> Tensor:
        """EM from the best so far, for the learners that are not done; returns those that still are not."""
        rows = (best_gap > tolerance).nonzero()[:, 0]
        sigma = best[rows]
        for _ in range(steps):
            if not len(rows):
                break
            gain = gains(rows, sigma)
            going = offer(rows, sigma, gain)
            rows, sigma = rows[going], (sigma * gain)[going]
            sigma = sigma / sigma.sum(-1, keepdim=True)
        return rows

    warm = min(_WARM_STEPS, iterations)
    rows = climb(warm)
    if newton and len(rows) and len(rows) * k * k * 8 <= _NEWTON_BYTES:
        _newton(rows, best[rows], members, weights[rows], offer, reduce)
    climb(iterations - warm)
    return best, best_gap


def _newton(
    rows: Tensor,
    start: Tensor,
    members: Tensor,
    weights: Tensor,
    offer: Callable[[Tensor, Tensor, Tensor], Tensor],
    reduce: Reduce,
) -> None:
    """Primal-dual interior point for ``min_x sum(x) - sum weights ln(x @ members)``, ``x >= 0``.

    Its solution sums to 1 by itself (the objective's homogeneity), so no equality constraint is carried.
    """

    def gains(x: Tensor) -> Tensor:
        return reduce((weights / (x @ members)) @ members.T)

    x = 0.9 * start + 0.1 / start.shape[1]
    gain = gains(x)
    z = (1 - gain).clamp(min=0.1)
    chunk = max(1, _NEWTON_BYTES // (8 * members.numel() + 1))
    for _ in range(_NEWTON_STEPS):
        curvature = (weights / (x @ members).square())[:, None]
        hessian = reduce(torch.cat([(members * part) @ members.T for part in curvature.split(chunk)]))
        target = 0.1 * (x * z).mean(-1, keepdim=True) / x
        factor, _ = torch.linalg.cholesky_ex(hessian + torch.diag_embed(z / x + 1e-14))
        dx = torch.cholesky_solve((target - 1 + gain)[..., None], factor)[..., 0]
        dz = target - z - z * dx / x
        fine = (torch.isfinite(dx) & torch.isfinite(dz)).all(-1, keepdim=True)
        x = torch.where(fine, x + _step(x, dx) * dx, x)
        z = torch.where(fine, z + _step(z, dz) * dz, z)
        total = x.sum(-1, keepdim=True)
        gain = gains(x)
        if not bool((offer(rows, x / total, gain * total) & fine[:, 0]).any()):
            return


def _step(x: Tensor, dx: Tensor) -> Tensor:
    """Largest step in ``(0, 1]`` that keeps ``x`` positive, ``[learners, 1]``."""
    limit = torch.where(dx < 0, -x / torch.where(dx < 0, dx, -1.0), torch.inf).amin(-1, keepdim=True)
    return (0.99 * limit).clamp(max=1.0)


def sampled_hull(
    log_likelihood: Tensor,
    member_log_likelihood: Tensor,
    kind: HullKind = "mixture",
    iterations: int = 2000,
    tolerance: float = 1e-6,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """The hull distance from the learner's own trajectories.

    Args:
        log_likelihood: ``[episodes]`` sum of the learner's log-probabilities of its own actions.
        member_log_likelihood: ``[k, episodes]`` the same under every member; minus infinity where impossible.
        kind: ``"mixture"`` or ``"vertices"``.
        iterations: bound on EM steps.
        tolerance: duality gap to stop at, in nats.
        reduce: sums a tensor over ranks; every rank must then call this together.

    Returns:
        ``bonus`` ``[episodes]``, ``ln r_pi - ln sum_k sigma_k r_k``, whose mean over all ranks estimates the distance
        (differentiable in ``log_likelihood``, ``sigma`` held fixed), and ``sigma`` ``[k]``.
    """
    _check_kind(kind)
    if member_log_likelihood.ndim != 2 or member_log_likelihood.shape[1:] != log_likelihood.shape:
        raise ValueError(
            f"sampled_hull: member_log_likelihood: must be [k, {log_likelihood.shape[0]}], "
            f"got shape {tuple(member_log_likelihood.shape)}"
        )
    members = member_log_likelihood.detach().double()
    if not len(members):
        raise ValueError("sampled_hull: member_log_likelihood: must hold at least one member, got 0")
    with torch.no_grad():
        if kind == "vertices":
            cost = -members.sum(-1)
            cost = cost if reduce is None else reduce(cost)
            sigma = torch.nn.functional.one_hot(cost.argmin(), len(members)).double()
        else:
            top = members.amax(0)
            ratio = (members - torch.where(top > -torch.inf, top, 0.0)).exp()
            sigma = mixture_weights(torch.ones_like(ratio[:1]), ratio, iterations, tolerance, reduce)[0][0]
    mixture = torch.logsumexp(members + sigma.log()[:, None], 0)
    return log_likelihood - mixture.to(log_likelihood.dtype), sigma


def state_action_bonus(
    logits: Tensor,
    member_logits: Tensor,
    legal: Tensor,
    episode: Tensor,
    num_episodes: int,
    eps: float = 0.0,
    reduce: Reduce | None = None,
) -> StateActionBonus:
    """The paper's practical estimator: KL to the nearest member on visited states.

    Args:
        logits: ``[states, actions]`` of the learner at the states it visited; log-probabilities will do.
        member_logits: ``[k, states, actions]`` of the members there; no gradient is passed to them.
        legal: ``[states, actions]`` bool; other actions are masked in both policies.
        episode: ``[states]`` int64, in which episode the state was visited.
        num_episodes: episodes on this rank.
        eps: both policies are mixed with ``eps`` of uniform legal play; needed if members may be deterministic.
        reduce: sums a tensor over ranks; every rank must then call this together, with or without states.

    Returns:
        :class:`StateActionBonus`.
    """
    if member_logits.ndim != 3 or not len(member_logits) or member_logits.shape[1:] != logits.shape:
        raise ValueError(
            f"state_action_bonus: member_logits: must be [k, *{tuple(logits.shape)}], k > 0, "
            f"got shape {tuple(member_logits.shape)}"
        )
    own = _log_policy(logits, legal, eps)
    members = _log_policy(member_logits.detach(), legal, eps)
    played = legal & (own > -torch.inf)
    own = torch.where(played, own, 0.0)

    def kl(log_member: Tensor) -> Tensor:
        return torch.where(played, own.exp() * (own - torch.where(played, log_member, 0.0)), 0.0).sum(-1)

    with torch.no_grad():
        sums = torch.cat([kl(members).sum(-1).double(), own.new_full((1,), len(own), dtype=torch.float64)])
        sums = sums if reduce is None else reduce(sums)
        nearest = sums[:-1].argmin()
    divergences = kl(members.index_select(0, nearest[None])[0])
    bonus = divergences.new_zeros(num_episodes).index_add(0, episode, divergences.detach())
    direct = divergences.sum() / sums[-1].clamp(min=1).to(divergences.dtype)
    return StateActionBonus(bonus, nearest, direct, sums[:-1])


def _log_policy(logits: Tensor, legal: Tensor, eps: float) -> Tensor:
    if not 0 <= eps <= 1:
        raise ValueError(f"state_action_bonus: eps: must lie in [0, 1], got {eps}")
    log_policy = logits.masked_fill(~legal, -torch.inf).log_softmax(-1)
    if eps == 0:
        return log_policy
    mixed = (1 - eps) * log_policy.exp() + eps / legal.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(legal, mixed, 1.0).log().masked_fill(~legal, -torch.inf)
