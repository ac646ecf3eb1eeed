"""Agents that train against an adversary by turns: ATLA, PA-ATLA, RARL, action-robust PR and NR."""

from __future__ import annotations

from modules.control.module import ControlModule
from modules.control.perturbation import PerturbationSettings
from modules.control.players import AdversarySettings
from modules.control.policy import MemorySettings
from modules.control.ppo_settings import PPOSettings
from modules.control.regulariser import RegulariserSettings
from modules.control.suite import AttackSettings


class ATLA(ControlModule):
    """Alternating training with a learned adversary (Zhang et al. 2021): each meets the newest of the other.

    With ``adversary.kind: pa_ad`` and a regulariser it is PA-ATLA (Sun et al. 2022); in the space of actions, AC-PPO;
    with many steps a turn, RARL (Pinto et al. 2017).

    Args:
        perturbation: what the adversary may do.
        adversary: how its output becomes a perturbation.
        ppo, adversary_ppo: of both players.
        agent_steps, adversary_steps: consecutive updates of each player's turn.
        regulariser: as in :class:`~modules.baselines.ppo.SAPPO`.
        total_frames: environment steps of both players, over all ranks.
        memory, hidden, init_std, attacks: as in :class:`~modules.baselines.ppo.PPO`.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        perturbation: PerturbationSettings = PerturbationSettings(),  # noqa: B008
        adversary: AdversarySettings = AdversarySettings(),  # noqa: B008
        ppo: PPOSettings = PPOSettings(),  # noqa: B008
        adversary_ppo: PPOSettings = PPOSettings(),  # noqa: B008
        agent_steps: int = 1,
        adversary_steps: int = 1,
        regulariser: RegulariserSettings = RegulariserSettings(),  # noqa: B008
        total_frames: int = 5_000_000,
        memory: MemorySettings = MemorySettings(),  # noqa: B008
        hidden: tuple[int, ...] = (64, 64),
        init_std: float = 1.0,
        attacks: AttackSettings = AttackSettings(),  # noqa: B008
    ) -> None:
        if adversary.mixes:
            raise ValueError(
                f"ATLA: adversary.kind: {adversary.kind} mixes actions: use modules.baselines.ActionRobust"
            )
        super().__init__(
            perturbation,
            attacks,
            memory,
            hidden,
            init_std,
            ppo,
            total_frames,
            adversary,
            adversary_ppo,
            agent_steps,
            adversary_steps,
            regulariser,
        )
        self.save_hyperparameters(logger=False)


class ActionRobust(ControlModule):
    """Action-robust PPO (Tessler et al. 2019): the executed action is mixed with an adversary's (``nr``), or is the
    adversary's with probability alpha (``pr``).

    Args:
        adversary: ``kind`` ``nr`` or ``pr``, and ``alpha``; the other settings of its network.
        perturbation: what attacks in evaluation may do; its space must be ``action``.
        ppo, adversary_ppo, agent_steps, adversary_steps, total_frames, memory, hidden, init_std, attacks: as in
            :class:`ATLA`.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        adversary: AdversarySettings = AdversarySettings(kind="nr", observe_previous=False),  # noqa: B008
        perturbation: PerturbationSettings = PerturbationSettings(space="action"),  # noqa: B008
        ppo: PPOSettings = PPOSettings(),  # noqa: B008
        adversary_ppo: PPOSettings = PPOSettings(),  # noqa: B008
        agent_steps: int = 10,
        adversary_steps: int = 1,
        total_frames: int = 5_000_000,
        memory: MemorySettings = MemorySettings(),  # noqa: B008
        hidden: tuple[int, ...] = (64, 64),
        init_std: float = 1.0,
        attacks: AttackSettings = AttackSettings(),  # noqa: B008
    ) -> None:
        if not adversary.mixes:
            raise ValueError(f"ActionRobust: adversary.kind: must be nr or pr, got {adversary.kind}")
        super().__init__(
            perturbation,
            attacks,
            memory,
            hidden,
            init_std,
            ppo,
            total_frames,
            adversary,
            adversary_ppo,
            agent_steps,
            adversary_steps,
        )
        self.save_hyperparameters(logger=False)
