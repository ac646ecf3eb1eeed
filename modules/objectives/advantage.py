"""Returns and advantages of trajectories; every recurrence over time is one logarithmic scan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def reverse_scan(addend: Tensor, factor: Tensor, dim: int = 1) -> Tensor:
    """Solve ``x[t] = addend[t] + factor[t] * x[t + 1]`` along ``dim``, with 0 after the last step.

    Recursive doubling (Kogge and Stone 1973): ``log2(time)`` tensor operations in place of ``time``.

    Args:
        addend: any shape.
        factor: the same shape; 0 cuts the recurrence, as at the end of an episode.

    Returns:
        ``x``, shaped like ``addend``.
    """
    addend, factor = addend.movedim(dim, -1), factor.movedim(dim, -1)
    steps, span = addend.shape[-1], 1
    while span < steps:
        head, tail = addend[..., :-span], addend[..., span:]
        joined = factor[..., :-span]
        addend = torch.cat([head + joined * tail, addend[..., -span:]], dim=-1)
        # Past the end x is 0: a factor that reaches there has nothing left to multiply.
        factor = torch.cat([joined * factor[..., span:], torch.zeros_like(factor[..., -span:])], dim=-1)
        span *= 2
    return addend.movedim(-1, dim)


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lambda_: float,
    dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the value targets that go with them (Schulman et al. 2016, eq. 16).

    ``delta[t] = reward[t] + gamma * next_value[t] * (1 - terminated[t]) - value[t]``,
    ``advantage[t] = delta[t] + gamma * lambda_ * (1 - done[t]) * advantage[t + 1]``.

    An episode that the world ended (``terminated``) is worth nothing more. One that was only cut off (``done`` but not
    ``terminated``) still bootstraps from ``next_value``, while the sum of deltas stops there.

    Args:
        reward: ``[envs, time, ...]``, time at ``dim``.
        value: values of the observations acted on, same shape.
        next_value: values of the observations that followed, the last one of an episode included (not the first one
            of the next); same shape.
        terminated, done: bool, same shape; ``done`` holds at the end of each episode, however it ended.
        gamma: discount per step, in [0, 1].
        lambda_: 0 for one-step differences, 1 for discounted returns minus values.

    Returns:
        ``(advantage, target)``, same shape; ``target = advantage + value`` is the lambda-return.
    """
    alive = (~terminated).to(reward.dtype)
    delta = reward + gamma * next_value * alive - value
    advantage = reverse_scan(delta, gamma * lambda_ * (~done).to(reward.dtype), dim)
    return advantage, advantage + value


def discounted_returns(
    reward: Tensor, done: Tensor, gamma: float, bootstrap: Tensor | None = None, dim: int = 1
) -> Tensor:
    """``return[t] = reward[t] + gamma * (1 - done[t]) * return[t + 1]``, ``[envs, time, ...]``.

    Args:
        reward: ``[envs, time, ...]``, time at ``dim``.
        done: bool, same shape.
        gamma: discount per step, in [0, 1].
        bootstrap: value after each step ``[envs, time, ...]``, added discounted where the trajectory was cut short:
            give 0 where the episode terminated. Also read at the last step of the window, ``None`` is 0 throughout.
    """
    going_on = ~done
    if bootstrap is not None:
        last = torch.zeros_like(done)
        last.movedim(dim, -1)[..., -1] = True
        reward = reward + gamma * bootstrap * (done | last).to(reward.dtype)
    return reverse_scan(reward, gamma * going_on.to(reward.dtype), dim)


def standardise(
    advantage: Tensor,
    weights: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    epsilon: float = 1e-8,
    floor: float = 0.0,
) -> Tensor:
    """Advantages with mean 0 and variance 1 over the last dimension, each leading row by its own moments.

    Args:
        advantage: ``[..., rows]``.
        weights: ``[..., rows]``, 0 for padding; ``None`` counts every row once.
        reduce: adds (or averages) a flat float64 tensor over ranks, so that all ranks use the moments of all rows;
            ``None`` for one rank.
        epsilon: added to the standard deviation.
        floor: least standard deviation to divide by, so that rows that are nearly constant are not blown up.

    Returns:
        ``[..., rows]``; rows of weight 0 hold 0.
    """
    wide = advantage.double()
    weight = torch.ones_like(wide) if weights is None else weights.double()

    def totals(rows: Tensor) -> Tensor:
        sums = torch.stack([weight.sum(-1), (weight * rows).sum(-1)])
        return (sums if reduce is None else reduce(sums.reshape(-1))).view_as(sums)

    count, total = totals(wide)
    centred = wide - (total / count.clamp_min(torch.finfo(torch.float64).tiny)).unsqueeze(-1)
    count, total = totals(centred.square())  # a second pass: squares of uncentred rows cancel badly
    scale = (total / count.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().unsqueeze(-1).clamp_min(floor) + epsilon
    return torch.where(weight > 0, centred / scale, 0.0).to(advantage.dtype)
