"""Thresholds found within one run: Nelder-Mead over them, the policy training on (NM-PPO; paper, section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from modules.rlhf.multipliers import Multipliers
from modules.rlhf.nelder_mead import NelderMead, random_simplex
from modules.rlhf.settings import ConstraintSpec, NelderMeadSpec, Problem
from modules.seeds import global_seed


class ThresholdSearch(nn.Module):
    """Proposes thresholds, waits until training has reached them or patience is over, and reports the score.

    Each validation counts one step of patience. All state is in the module's state dict, so that a checkpoint after any
    validation goes on with the same vertex. Decisions depend on figures that are equal on all ranks.

    Args:
        spec: the search's settings. problem: gives names and order. constraints: each with ``init`` and ``max``.
    """

    def __init__(self, spec: NelderMeadSpec, problem: Problem, constraints: Mapping[str, ConstraintSpec]) -> None:
        super().__init__()
        self.spec, self.names = spec, problem.names
        ranges = [(float(constraints[n].init or 0.0), float(constraints[n].max or 0.0)) for n in problem.names]
        starts, limits = [low for low, _ in ranges], [high for _, high in ranges]
        self.simplex_method = NelderMead(
            random_simplex(starts, limits, global_seed()),
            tolerance=spec.std_tolerance,
            contraction=spec.contraction,
            bounds=[(min(pair), max(pair)) for pair in ranges],
            cache_tolerance=spec.cache_tolerance,
            cache_ttl=spec.cache_ttl,
        )
        self.waited = 0
        self.reached = 0
        """Vertices whose thresholds were all reached before they were scored."""

    def begin(self, multipliers: Multipliers) -> None:
        """Set the first vertex' thresholds."""
        multipliers.set_thresholds(self.thresholds())

    def thresholds(self) -> Tensor:
        """``[N]`` float64: of the vertex under way, or the best ones once the search has converged."""
        method = self.simplex_method
        return method.best[0] if method.converged else method.ask()

    def observe(self, means: Tensor, score: float, multipliers: Multipliers) -> None:
        """Take a validation's component means ``[N]`` and evaluation score; move on where the vertex is done.

        Raises:
            ValueError: a score that is not a number.
        """
        if not math.isfinite(score):
            raise ValueError(f"ConstrainedRLHF: the evaluation score is {score}; nm_ppo cannot search by it")
        if self.simplex_method.converged:
            return
        self.waited += 1
        goal = multipliers.thresholds.cpu()
        reached = bool(((means - goal).abs() <= self.spec.tolerance * goal.abs()).all())
        if not reached and self.waited < self.spec.patience:
            return
        self.reached += reached
        self.waited = 0
        self.simplex_method.tell(-score)
        multipliers.set_thresholds(self.thresholds())

    def figures(self) -> dict[str, float]:
        """What the log shows: best score, vertices scored and reached, the simplex' size, current thresholds."""
        method = self.simplex_method
        best, value = method.best
        found = {"nm/evaluations": float(method.evaluations), "nm/reached": float(self.reached)}
        spread = method.simplex.amax(0) - method.simplex.amin(0)
        for i, name in enumerate(self.names):
            found[f"nm/threshold_{name}"] = float(self.thresholds()[i])
            found[f"nm/best_{name}"] = float(best[i])
            found[f"nm/simplex_{name}"] = float(spread[i])
        if math.isfinite(value):
            found["nm/best"] = -value
        found["nm/converged"] = float(method.converged)
        return found

    def get_extra_state(self) -> dict[str, Any]:
        return {"method": self.simplex_method.state_dict(), "waited": self.waited, "reached": self.reached}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.simplex_method.load_state_dict(state["method"])
        self.waited, self.reached = int(state["waited"]), int(state["reached"])


def search_or_none(
    spec: NelderMeadSpec, problem: Problem, constraints: Mapping[str, ConstraintSpec], multipliers: Multipliers | None
) -> ThresholdSearch | None:
    """A search, its first thresholds set, where the problem asks for one."""
    if not problem.search or multipliers is None:
        return None
    search = ThresholdSearch(spec, problem, constraints)
    search.begin(multipliers)
    return search
