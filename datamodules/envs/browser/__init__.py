"""MiniWoB++ in a real Chromium."""

from datamodules.envs.browser.env import MiniWoBEnv
from datamodules.envs.browser.pool import MiniWoBPool
from datamodules.envs.browser.tasks import PAPER_TASKS, TaskPages

__all__ = ["PAPER_TASKS", "MiniWoBEnv", "MiniWoBPool", "TaskPages"]
