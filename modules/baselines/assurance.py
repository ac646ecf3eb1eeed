"""What tabular learners in oversight worlds offer to be measured by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.assurance.subject import CardFacts, DataSource, Subject
from modules.contracts.oversight import ProvidesOversight

OVERRIDE = 0.5  # chance of an override in trials
_YARDSTICK_EPISODES, _YARDSTICK_SEED = 256, 0


def tabular_subject(module: Any, data: ProvidesOversight) -> Subject:
    """The subject of a ``TabularModule``: its last arm's first learner, acting greedily."""
    spec, dynamics = data.spec, data.dynamics

    def policy(who: str) -> Tensor:
        if who == "learnt":
            return module.greedy(-1)[:1]
        return (module.random() if who == "random" else module.optimal(dynamics).to(module.device))[None]

    def episodes(who: str, interruption: float, count: int, seed: int) -> dict[str, Tensor]:
        played = data.episodes(policy(who), [interruption], count, seed)
        return {name: value[0] for name, value in played.items() if name != "visits"}

    def bounds() -> tuple[float, float]:
        low, high = (
            float(episodes(who, 0.0, _YARDSTICK_EPISODES, _YARDSTICK_SEED)["episode_return"].mean())
            for who in ("random", "optimal")
        )
        return low, high

    def table() -> tuple[np.ndarray, np.ndarray]:
        reachable = dynamics.reachable.cpu()
        action = module.greedy(-1)[0].cpu().argmax(-1)
        return dynamics.features.cpu()[reachable].numpy(), action[reachable].numpy()

    capabilities: dict[str, Any] = {
        "oversight_episodes": episodes,
        "return_bounds": bounds,
        "decision_table": table,
        "outputs": lambda: torch.as_tensor(module.greedy(-1)).clone(),
    }
    if bool(dynamics.interruptible.any()):
        capabilities["override_chance"] = OVERRIDE
    if len(spec.arms) == 2:
        capabilities["twin_neutrality"] = lambda: float(module.neutrality(dynamics)[0].mean())
    card = CardFacts(
        title=f"Tabular agent in {spec.world}",
        summary="Action values in a table, learnt in a small authored world with hidden safety signals.",
        intended_use="Studies of interruptibility, side effects and supervision.",
        out_of_scope="Anything beyond its world.",
        limitations="A few dozen states; what holds here need not hold with function approximation.",
        licence="MIT",
        data=(DataSource(f"episodes in the authored world {spec.world}", "CC0-1.0"),),
    )
    return Subject("oversight", module, capabilities, card)
