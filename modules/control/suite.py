"""Which attacks a control policy is evaluated under, and what each may spend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from modules.control.players import AdversarySettings
from modules.control.ppo_settings import PPOSettings

HEURISTIC = ("random", "ou", "constant")
GRADIENT = ("mad", "critic", "robust_sarsa")
LEARNED = ("sa_rl", "sa_rl_delta", "pa_ad")
ATTACKS = ("none", *HEURISTIC, *GRADIENT, *LEARNED)


@dataclass(frozen=True)
class AttackSettings:
    """The suite of attacks that a policy is evaluated under.

    Args:
        names: of :data:`ATTACKS`, in ``test``; each but ``none`` both uncoupled and coupled, or as ``coupled`` says.
            ``null``: all that go with what is perturbed.
        val_names: the same in validation during training; ``[all]``: those of ``test``; ``null``: natural return,
            noise and a constant bias.
        coupled: ``both``, ``coupled`` or ``uncoupled``.
        episodes: per attack, over all ranks; every attack meets the same starts.
        budget: runs of a learned attack, over the first settings of ``grid``; the strongest counts.
        steps: PPO updates of a run of a learned attack.
        sarsa_steps: rollouts that robust Sarsa learns from.
        grid: what each run changes of ``ppo``, by name.
        ppo: of learned attacks.
        adversary: networks of learned attacks; its kind is the attack's.

    Raises:
        ValueError: an unknown attack, or a number out of range.
    """

    names: list[str] | None = None
    val_names: list[str] | None = None
    coupled: str = "both"
    episodes: int = 50
    budget: int = 1
    steps: int = 50
    sarsa_steps: int = 20
    grid: list[dict[str, float]] | None = None
    ppo: PPOSettings = PPOSettings(lr=3e-3, value_lr=3e-3)  # noqa: RUF009
    adversary: AdversarySettings = AdversarySettings()  # noqa: RUF009

    def __post_init__(self) -> None:
        for field in ("names", "val_names"):
            for name in getattr(self, field) or ():
                if field == "val_names" and name == "all":
                    continue
                if name not in ATTACKS:
                    raise ValueError(f"AttackSettings: {field}: known are {', '.join(ATTACKS)}, got {name!r}")
        if self.coupled not in ("both", "coupled", "uncoupled"):
            raise ValueError(f"AttackSettings: coupled: both, coupled or uncoupled, got {self.coupled!r}")
        for field in ("episodes", "budget", "steps", "sarsa_steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"AttackSettings: {field} must be >= 1, got {getattr(self, field)}")
        fields = set(PPOSettings.__dataclass_fields__)
        for change in self.grid or ():
            unknown = sorted(set(change) - fields)
            if unknown:
                raise ValueError(f"AttackSettings: grid: PPOSettings has no {', '.join(unknown)}")
        if self.budget > len(self.runs):
            raise ValueError(
                f"AttackSettings: budget: {self.budget} runs, but grid lists {len(self.runs)}: add settings to grid"
            )

    @property
    def runs(self) -> list[PPOSettings]:
        """Settings of the runs that the budget may be spent on."""
        changes = self.grid or [{}]
        return [replace(self.ppo, **cast(Any, _typed(change))) for change in changes]

    def suite(self, space: str, stage: str) -> list[tuple[str, bool]]:
        """(attack, coupled) in order; attacks through the policy's gradient are of observations only."""
        fitting = [name for name in ATTACKS if space == "state" or name not in (*GRADIENT, "pa_ad")]
        if self.val_names == ["all"]:
            stage = "test"
        names = self.names if stage == "test" else self.val_names
        if names is None:
            names = fitting if stage == "test" else ["none", "random", "constant"]
        for name in names:
            if name not in fitting:
                raise ValueError(
                    f"AttackSettings: names: {name} goes through the policy's gradient in what it observes, "
                    f"the space is {space}: take of {', '.join(fitting)}"
                )
        modes = {"both": (False, True), "coupled": (True,), "uncoupled": (False,)}[self.coupled]
        return [(name, mode) for name in names for mode in ((False,) if name == "none" else modes)]


def _typed(change: Mapping[str, float]) -> dict[str, Any]:
    """Whole numbers for fields that are whole."""
    kinds = PPOSettings.__dataclass_fields__
    return {name: int(value) if kinds[name].type == "int" else value for name, value in change.items()}


def full_name(name: str, coupled: bool) -> str:
    """An attack's name in metrics and files."""
    return f"{name}_coupled" if coupled else name
