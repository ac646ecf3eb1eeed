"""Many live pages over a few browsers, asked all at once."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.envs.browser.cdp import Browser, BrowserError
from datamodules.envs.browser.page import LOST, Page
from datamodules.envs.browser.tasks import TaskPages
from modules.contracts.browsing import ActionStatus, EpisodeSpec, PageView

LONGEST_EPISODE = 2_000_000_000  # ms; beyond 2^31 a page's timer fires at once


class MiniWoBPool:
    """Live MiniWoB++ pages, numbered from 0, spread evenly over browsers.

    Browsers start when first needed. A page that fails is replaced by a new one, a browser that died is started again;
    what happened in the episode then is told by its view and never raises. Safe to use from one thread at a time.

    Args:
        browsers: processes.
        pages: live pages in each; ``slots`` is the product.
        episode_ms: time limit of an episode in place of the page's own, milliseconds.
        settle_ms: how long moving parts are waited for after a reset or an instruction.
        timeout: seconds that one reset or instruction may take, waiting for it included, before its page is given up.
        mode: ``train`` or ``test``, a split that few tasks have.
        folder: own pages beside the package's; see :class:`~datamodules.envs.browser.tasks.TaskPages`.
        browser: the program; None: see :func:`~datamodules.envs.browser.cdp.find_browser`.
        sandbox: Chromium's own sandbox; not as root.

    Raises:
        ValueError: a value out of range. ImportError, FileNotFoundError: no package, no browser, no page.
    """

    def __init__(
        self,
        browsers: int = 1,
        pages: int = 1,
        episode_ms: int = 1_000_000,
        settle_ms: int = 500,
        timeout: float = 20.0,
        mode: Literal["train", "test"] = "train",
        folder: str | Path | None = None,
        browser: str | None = None,
        sandbox: bool = False,
    ) -> None:
        if browsers < 1 or pages < 1:
            raise ValueError(f"MiniWoBPool: browsers and pages must be >= 1, got {browsers} and {pages}")
        if not 1 <= episode_ms <= LONGEST_EPISODE:
            raise ValueError(f"MiniWoBPool: episode_ms must be in [1, {LONGEST_EPISODE}], got {episode_ms}")
        if settle_ms < 0 or timeout <= settle_ms / 1000:
            raise ValueError(f"MiniWoBPool: want 0 <= settle_ms < 1000 * timeout, got {settle_ms} and {timeout}")
        self.tasks = TaskPages(folder)
        self.slots, self.episode_ms = browsers * pages, episode_ms
        self.restarts = 0
        """Browsers and pages that had to be replaced."""
        window = (420, 760) if any(name.startswith("flight.") for name in self.tasks.tasks) else (500, 320)
        self._options = {"path": browser, "sandbox": sandbox, "window": window, "timeout": timeout}
        self._page_options = {"episode_ms": episode_ms, "settle_ms": settle_ms, "mode": mode}
        self._timeout = timeout
        self._browsers = [Browser(**self._options) for _ in range(browsers)]
        self._pages: list[Page | None] = [None] * self.slots
        self._starting = [asyncio.Lock() for _ in range(browsers)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------ the event loop

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="browsers", daemon=True)
            self._thread.start()
            atexit.register(self.close)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End all browsers; the next use starts them again."""
        if self._loop is None or self._thread is None:
            return
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        atexit.unregister(self.close)

        async def end() -> None:
            for browser in self._browsers:
                browser.kill()
            await asyncio.sleep(0.01)  # transports close their files in the loop's next rounds

        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        self._pages = [None] * self.slots

    def __enter__(self) -> MiniWoBPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------------- one page

    async def _page(self, slot: int) -> Page:
        """The page of a slot, made where there is none."""
        number = slot % len(self._browsers)
        async with self._starting[number]:
            browser = self._browsers[number]
            if not browser.alive:
                for other in range(number, self.slots, len(self._browsers)):
                    self._pages[other] = None
                await browser.start()
        page = self._pages[slot]
        if page is None:
            page = Page(browser, self.tasks, **self._page_options)
            await page.open()
            self._pages[slot] = page
        return page

    async def _drop(self, slot: int) -> None:
        self.restarts += 1
        page, self._pages[slot] = self._pages[slot], None
        if page is not None:
            await page.close()

    async def _reset(self, slot: int, spec: EpisodeSpec) -> PageView:
        failure = ""
        for _ in range(2):  # a page or browser may have died in the episode before
            try:
                page = await self._page(slot)
                return await asyncio.wait_for(page.reset(self.tasks[spec.task], spec), self._timeout)
            except (BrowserError, TimeoutError) as error:
                failure = str(error) or f"no answer within {self._timeout:g} s"
                await self._drop(slot)
        return PageView("", "", "", done=True, reason=failure, status="error")

    async def _step(self, slot: int, text: str) -> PageView:
        page = self._pages[slot]
        if page is None:
            return LOST
        try:
            return await asyncio.wait_for(page.step(text), self._timeout)
        except (BrowserError, TimeoutError) as error:
            await self._drop(slot)
            reason = str(error) or f"no answer within {self._timeout:g} s"
            return PageView(page.view.utterance, "", "", done=True, reason=reason, status="error")

    async def _probe(self, slot: int, text: str) -> ActionStatus:
        page = self._pages[slot]
        if page is None:
            return "error"
        try:
            return await asyncio.wait_for(page.probe(text), self._timeout)
        except (BrowserError, TimeoutError):
            return "error"

    async def _screenshot(self, slot: int) -> bytes:
        page = self._pages[slot]
        if page is None:
            return b""
        try:
            return await asyncio.wait_for(page.screenshot(), self._timeout)
        except (BrowserError, TimeoutError):
            return b""

    # ------------------------------------------------------------------------------------------------------- all pages

    def _all(self, work: Mapping[int, Coroutine[Any, Any, Any]]) -> dict[int, Any]:
        async def together() -> list[Any]:
            return await asyncio.gather(*work.values())

        return dict(zip(work, self._run(together()), strict=True))

    def reset_pages(self, episodes: Mapping[int, EpisodeSpec]) -> dict[int, PageView]:
        """Start an episode on each of some slots.

        Raises:
            ValueError: an unknown task or slot.
        """
        self._check(episodes)
        self.tasks.check(spec.task for spec in episodes.values())
        return self._all({slot: self._reset(slot, spec) for slot, spec in episodes.items()})

    def step_pages(self, instructions: Mapping[int, str]) -> dict[int, PageView]:
        """Carry out an instruction on each of some slots; see :class:`~modules.contracts.browsing.ProvidesPages`."""
        self._check(instructions)
        return self._all({slot: self._step(slot, text) for slot, text in instructions.items()})

    def probe_pages(self, instructions: Mapping[int, str]) -> dict[int, ActionStatus]:
        """What would become of instructions; changes nothing."""
        self._check(instructions)
        return self._all({slot: self._probe(slot, text) for slot, text in instructions.items()})

    def screenshots(self, slots: Sequence[int]) -> dict[int, bytes]:
        """PNG images of the task area; empty where there is no page."""
        self._check(slots)
        return self._all({slot: self._screenshot(slot) for slot in slots})

    @property
    def version(self) -> str:
        """The browser's name and version; empty before it was started."""
        return self._browsers[0].version

    @property
    def refused(self) -> list[str]:
        """The last addresses that pages wanted and did not get, cut to 200 characters."""
        return [url for page in self._pages if page is not None for url in page.refused]

    def _check(self, slots: Mapping[int, Any] | Sequence[int]) -> None:
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise ValueError(f"MiniWoBPool: no slot {slot}; there are {self.slots}")
