"""Control runs through the command line, and runs that kill themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from killed import Killed
from population_runs import checkpoint

from modules.baselines import ATLA, PPO, ActionRobust, WocaR
from modules.grad import GRAD


class KilledGRAD(Killed, GRAD):
    """GRAD that ends by SIGKILL."""


class KilledPPO(Killed, PPO):
    """PPO that ends by SIGKILL."""


class KilledATLA(Killed, ATLA):
    """ATLA that ends by SIGKILL."""


class KilledWocaR(Killed, WocaR):
    """WocaR that ends by SIGKILL."""


class KilledActionRobust(Killed, ActionRobust):
    """Action-robust PPO that ends by SIGKILL."""


def control(folder: Path) -> dict[str, Any]:
    """The control part of a run's last checkpoint."""
    return checkpoint(folder)["control"]
