"""Agents that kill themselves, for tests of exact resume and of evaluations that go on."""

from __future__ import annotations

import os
import signal
from typing import Any

from killed import Killed

from modules.rci.agent import Record
from modules.rci.module import RCIAgent


class KilledAgent(Killed, RCIAgent):
    """Args:
    kill_after: episodes played when it kills itself in a test, 0: never.
    """

    def __init__(self, kill_after: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kill_after, self.played = kill_after, 0

    def _keep(self, record: Record) -> None:
        super()._keep(record)
        self.played += 1
        if self.played == self.kill_after > 0:
            os.kill(os.getpid(), signal.SIGKILL)
