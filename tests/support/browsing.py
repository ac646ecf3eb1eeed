"""A pool of browser pages for tests, or a skip that says what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from datamodules.envs.browser.cdp import find_browser
from datamodules.envs.browser.pool import MiniWoBPool
from modules.contracts.browsing import EpisodeSpec, PageView

PAGES = Path(__file__).parent / "pages"


def needs_browser() -> None:
    """Skip where no Chromium is installed."""
    try:
        find_browser()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@contextmanager
def browser_pool(**options: Any) -> Iterator[MiniWoBPool]:
    needs_browser()
    with MiniWoBPool(**options) as pool:
        yield pool


def start(pool: MiniWoBPool, task: str, seed: str = "1") -> PageView:
    """An episode on page 0."""
    return pool.reset_pages({0: EpisodeSpec(task, seed)})[0]


def act(pool: MiniWoBPool, *instructions: str) -> PageView:
    """Instructions on page 0, one after the other; the last view."""
    view = None
    for text in instructions:
        view = pool.step_pages({0: text})[0]
    assert view is not None
    return view
