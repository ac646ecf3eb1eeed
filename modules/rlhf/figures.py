"""What training logs: KL, the policy's change, advantage streams and value heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.objectives.lagrangian import reward_unit_multipliers
from modules.objectives.ppo import approximate_kl
from modules.rlhf.multipliers import Multipliers
from modules.rlhf.rollout import rollout_mask

Sum = Callable[[Tensor], Tensor]


def rollout_figures(rollout: TensorDict, all_sum: Sum) -> dict[str, float]:
    """Of a rollout on all ranks: KL to the reference per token and per response, length, entropy estimate.

    ``kl/k3`` estimates the same KL per token without negative terms (Schulman 2020); ``ppo/entropy`` is the mean
    surprise of the sampled tokens under the full softmax.
    """
    mask = rollout_mask(rollout)
    log_ratio = torch.where(mask, rollout["log_probability"] - rollout["reference_log_probability"], 0.0).double()
    surprise = torch.where(mask, -rollout["log_probability"], 0.0).double().sum()
    parts = [
        mask.sum().double(),
        log_ratio.sum(),
        torch.where(mask, approximate_kl(-log_ratio), 0.0).sum(),
        surprise,
        rollout["ended"].sum().double(),
        torch.tensor(float(rollout["length"].numel()), dtype=torch.float64, device=mask.device),
    ]
    tokens, kl, k3, surprise, ended, responses = all_sum(torch.stack(parts)).tolist()
    return {
        "kl/per_token": kl / tokens,
        "kl/sequence": kl / responses,
        "kl/k3": k3 / tokens,
        "ppo/entropy": surprise / tokens,
        "rollout/length": tokens / responses,
        "rollout/ended": ended / responses,
    }


def update_figures(parts: dict[str, Tensor], all_sum: Sum) -> dict[str, Tensor]:
    """Of the last minibatch: policy loss, change of the policy, share of clipped ratios."""
    return {f"ppo/{key}": all_sum(parts[key].double()) for key in ("policy_loss", "approximate_kl", "clip_fraction")}


def stream_figures(
    rollout: TensorDict, parts: dict[str, Tensor], names: Sequence[str], all_sum: Sum
) -> dict[str, Tensor]:
    """Over all ranks' tokens: deviation of each stream's advantages, and with a critic each head's fit.

    A head's explained variance is ``1 - Var(target - value) / Var(target)``; 0 where the target is constant.
    """
    mask, count = rollout_mask(rollout), len(names)
    with_critic = "value_loss" in parts
    columns = rollout["advantage"]
    if with_critic:
        columns = torch.cat([columns, rollout["target"] - rollout["values"], rollout["target"]], -1)
    variance = _variances(columns[mask].double(), all_sum)
    found = {f"adv_std/{name}": value.sqrt() for name, value in zip(names, variance, strict=False)}
    if with_critic:
        left, whole = variance[count : 2 * count], variance[2 * count :]
        explained = torch.where(whole > 1e-12, 1.0 - left / whole.clamp_min(1e-12), 0.0)
        error = all_sum(parts["value_loss"].double())
        for i, name in enumerate(names):
            found |= {f"value/{name}_explained_variance": explained[i], f"value/{name}_loss": error[i]}
    return found


def _variances(rows: Tensor, all_sum: Sum) -> Tensor:
    """Variance of each column of ``[rows, columns]`` over all ranks, in two passes."""
    total = all_sum(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
    mean = total[:-1] / total[-1]
    return all_sum((rows - mean).square().sum(0)) / total[-1]


def reward_unit_figures(multipliers: Multipliers, shown: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """``multiplier/<c>/mu``: effective multipliers of the rewards themselves, where streams have unit deviation.

    Args:
        shown: holds ``adv_std/<name>`` of every stream, as :func:`stream_figures` gives them.
    """
    spread = torch.stack([torch.as_tensor(shown[f"adv_std/{name}"]) for name in multipliers.names])
    mu = reward_unit_multipliers(multipliers.effective().cpu(), torch.as_tensor(shown["adv_std/kl"]), spread.cpu())
    return {f"multiplier/{name}/mu": value for name, value in zip(multipliers.names, mu, strict=True)}
