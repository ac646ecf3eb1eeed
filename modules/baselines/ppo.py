"""PPO for continuous control and its robust relatives without an adversary: SA-PPO."""

from __future__ import annotations

from modules.control.module import ControlModule
from modules.control.perturbation import PerturbationSettings
from modules.control.policy import MemorySettings
from modules.control.ppo_settings import PPOSettings
from modules.control.regulariser import RegulariserSettings
from modules.control.suite import AttackSettings


class PPO(ControlModule):
    """Proximal policy optimisation (Schulman et al. 2017), without attack in training; with ``memory.kind: lstm``
    PPO-LSTM.

    Args:
        perturbation: what attacks in evaluation may do.
        ppo: its settings.
        total_frames: environment steps of the whole run, over all ranks.
        memory: what the policy sees of the past.
        hidden: widths of hidden layers.
        init_std: of the policy at the start, in the environment's units.
        attacks: the suite of evaluation.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        perturbation: PerturbationSettings = PerturbationSettings(),  # noqa: B008
        ppo: PPOSettings = PPOSettings(),  # noqa: B008
        total_frames: int = 2_000_000,
        memory: MemorySettings = MemorySettings(),  # noqa: B008
        hidden: tuple[int, ...] = (64, 64),
        init_std: float = 1.0,
        attacks: AttackSettings = AttackSettings(),  # noqa: B008
    ) -> None:
        super().__init__(perturbation, attacks, memory, hidden, init_std, ppo, total_frames)
        self.save_hyperparameters(logger=False)


class SAPPO(ControlModule):
    """SA-PPO (Zhang et al. 2020): PPO with a regulariser on how far the policy moves within the ball of observations.

    Args:
        regulariser: its weight, and how the inner maximum is taken.
        perturbation: the ball's radius is ``perturbation.eps``; its space must be ``state``.
        ppo, total_frames, memory, hidden, init_std, attacks: as in :class:`PPO`.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        regulariser: RegulariserSettings = RegulariserSettings(kappa=0.1),  # noqa: B008
        perturbation: PerturbationSettings = PerturbationSettings(),  # noqa: B008
        ppo: PPOSettings = PPOSettings(),  # noqa: B008
        total_frames: int = 2_000_000,
        memory: MemorySettings = MemorySettings(),  # noqa: B008
        hidden: tuple[int, ...] = (64, 64),
        init_std: float = 1.0,
        attacks: AttackSettings = AttackSettings(),  # noqa: B008
    ) -> None:
        super().__init__(perturbation, attacks, memory, hidden, init_std, ppo, total_frames, regulariser=regulariser)
        self.save_hyperparameters(logger=False)
