"""The state-adversarial regulariser (SA-PPO, Zhang et al. 2020): how far a policy moves in a ball of observations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.control.attacks import policy_divergence, sgld_worst_case
from modules.control.bounds import interval_bounds
from modules.control.learner import Rows
from modules.control.players import PlayerNetworks


@dataclass(frozen=True)
class RegulariserSettings:
    """``kappa * max over ||p|| <= eps of D(pi(.|s), pi(.|s + p))``, D the squared change of the mean in standard
    deviations.

    Args:
        kappa: weight; 0: none.
        method: of the inner maximum: ``sgld``, noisy signed ascent (a lower bound), or ``ibp``, interval bounds.
        steps: of the ascent.
        ramp: share of training over which ``eps`` grows from 0 to its value; 0: at once.

    Raises:
        ValueError: an unknown method, or a number out of range.
    """

    kappa: float = 0.0
    method: Literal["sgld", "ibp"] = "sgld"
    steps: int = 10
    ramp: float = 0.75

    def __post_init__(self) -> None:
        if self.method not in ("sgld", "ibp"):
            raise ValueError(f"RegulariserSettings: method: sgld or ibp, got {self.method!r}")
        if not self.kappa >= 0:
            raise ValueError(f"RegulariserSettings: kappa must be >= 0, got {self.kappa}")
        if self.steps < 1:
            raise ValueError(f"RegulariserSettings: steps must be >= 1, got {self.steps}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"RegulariserSettings: ramp must be in [0, 1], got {self.ramp}")

    def share(self, done: int, total: int) -> float:
        """Of ``eps``, after ``done`` of ``total`` updates."""
        return 1.0 if self.ramp == 0 else min(1.0, (done + 1) / max(1.0, self.ramp * total))


class StateRegulariser:
    """A :data:`~modules.control.learner.Regulariser` for one update.

    Args:
        networks: the agent's.
        settings: as above.
        eps: ``[observation_size]`` radius in normalised units, as ramped.
        generator: random starts of the ascent.
    """

    def __init__(
        self, networks: PlayerNetworks, settings: RegulariserSettings, eps: Tensor, generator: torch.Generator
    ) -> None:
        if networks.recurrent and settings.method == "ibp":
            raise ValueError("RegulariserSettings: method: ibp has no bounds for an LSTM: use sgld, or another memory")
        self.networks, self.settings, self.eps, self.generator = networks, settings, eps, generator

    def __call__(self, policy: Mapping[str, Tensor], rows: Rows, mean: Tensor) -> Tensor:
        size, net = self.networks.observation_size, self.networks.policy
        std = policy["log_std"][0].exp()
        flat = rows.features.flatten(0, -2)
        if self.settings.method == "ibp":
            reach = torch.zeros_like(flat)
            reach[:, :size] = self.eps
            low, high = interval_bounds(net.mlp, policy, (flat - reach).unsqueeze(0), (flat + reach).unsqueeze(0))
            widest = torch.maximum((high[0] - mean).abs(), (mean - low[0]).abs())
            return self.settings.kappa * (widest / std).square().sum(-1).mean()
        frozen = {name: value.detach() for name, value in policy.items()}
        shape = (*rows.features.shape[:-1], size)

        def mean_under(params: Mapping[str, Tensor], seen: Tensor) -> Tensor:
            whole = torch.cat([seen.view(shape), rows.features[..., size:]], -1).unsqueeze(0)
            if net.lstm is None:
                return net.step(params, whole, None)[0][0]
            assert rows.fresh is not None
            assert rows.state is not None
            return net.lstm.sequence(params, whole, rows.fresh, rows.state.unsqueeze(0))[0].flatten(0, 1)

        seen = rows.features[..., :size].reshape(-1, size)
        count = len(seen)
        drawn = torch.randn(self.settings.steps + 1, count, size, generator=self.generator).to(seen.device)
        p = sgld_worst_case(
            lambda other: mean_under(frozen, other),
            seen,
            std.detach(),
            self.eps,
            drawn[0],
            drawn[1:],
            self.settings.steps,
        )
        moved = mean_under(policy, seen + p)
        return self.settings.kappa * policy_divergence(mean.reshape(moved.shape), moved, std).mean()
