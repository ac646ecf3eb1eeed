"""One live page: loads a task, starts episodes, carries out instructions with a trusted mouse and keyboard.

What the page asks for over the network is answered from the packaged files, or refused: it has no other network, and
a navigation that is not ours changes nothing, its address included.
"""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import re
from collections import deque
from dataclasses import replace
from importlib import resources
from typing import Any

from datamodules.envs.browser.cdp import Browser, BrowserError
from datamodules.envs.browser.tasks import Task, TaskPages
from modules.contracts.browsing import ActionStatus, EpisodeSpec, GrammarError, Instruction, PageView, parse_instruction

# name: (key, code, Windows key code, text)
_KEYS = {
    "enter": ("Enter", "Enter", 13, "\r"),
    "backspace": ("Backspace", "Backspace", 8, ""),
    "space": (" ", "Space", 32, " "),
    "arrowleft": ("ArrowLeft", "ArrowLeft", 37, ""),
    "arrowup": ("ArrowUp", "ArrowUp", 38, ""),
    "arrowright": ("ArrowRight", "ArrowRight", 39, ""),
    "arrowdown": ("ArrowDown", "ArrowDown", 40, ""),
}
_MAX_ALL = 32  # matches that one instruction clicks, at most
LOST = PageView("", "", "", done=True, reward=0.0, reason="browser error", status="error")


class Page:
    """A page in a window of its own.

    Args:
        browser: started.
        pages: what can be loaded.
        episode_ms: time limit of an episode, milliseconds, in place of the page's own 10 to 30 s.
        settle_ms: how long moving parts are waited for after an instruction.
        mode: ``train`` or ``test``, a split that few tasks have.
    """

    def __init__(self, browser: Browser, pages: TaskPages, episode_ms: int, settle_ms: int, mode: str) -> None:
        self.browser, self.pages = browser, pages
        self.episode_ms, self.settle_ms, self.mode = episode_ms, settle_ms, mode
        self.task: Task | None = None
        self.view = LOST
        self.refused: deque[str] = deque(maxlen=100)  # the last addresses that the page wanted and did not get
        self._session = self._target = self._context = self._frame = ""
        self._helper: str | None = None
        self._loaded: asyncio.Event = asyncio.Event()
        self._navigating = False
        self._fresh = True
        self._stateful = False

    async def open(self) -> None:
        """Make the window."""
        browser = self.browser
        self._context = (await browser.call("Target.createBrowserContext", disposeOnDetach=True))["browserContextId"]
        created = await browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)
        self._target = created["targetId"]
        attached = await browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        browser.listen(self._session, self._event)
        tree = await self._call("Page.getFrameTree")
        self._frame = tree["frameTree"]["frame"]["id"]
        for future in (
            self._send("Page.enable"),
            self._send("Inspector.enable"),
            self._send("Fetch.enable", patterns=[{"urlPattern": "*"}]),
            self._send("Emulation.setFocusEmulationEnabled", enabled=True),
        ):
            await asyncio.wait_for(future, browser.timeout)

    async def close(self) -> None:
        self.browser.forget(self._session)
        if self._context and self.browser.alive:
            self._send_free("Target.disposeBrowserContext", browserContextId=self._context)
        self._context = ""

    # ---------------------------------------------------------------------------------------------------------- events

    def _send(self, method: str, **params: Any) -> asyncio.Future[dict[str, Any]]:
        return self.browser.send(method, self._session, **params)

    def _send_free(self, method: str, **params: Any) -> None:
        self.browser.send(method, None, **params)

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        return await self.browser.call(method, self._session, **params)

    def _event(self, method: str, params: dict[str, Any]) -> None:
        if method == "Fetch.requestPaused":
            self._answer(params)
        elif method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Page.javascriptDialogOpening":
            self._send("Page.handleJavaScriptDialog", accept=params.get("type") == "beforeunload")
        elif method == "Inspector.targetCrashed":
            self._helper = None

    def _answer(self, params: dict[str, Any]) -> None:
        """Serve a file of the pages; refuse the rest, and any navigation of the window that is not ours."""
        url, number = params["request"]["url"], params["requestId"]
        document = params.get("resourceType") == "Document"
        leaves = document and params.get("frameId") == self._frame and not self._navigating
        body = None if leaves else self.pages.read(url)
        if body is None:
            if not url.endswith("/favicon.ico"):
                self.refused.append(url[:200])
            if document:  # "no content": what was there stays, under its address
                self._send("Fetch.fulfillRequest", requestId=number, responseCode=204)
            else:
                self._send("Fetch.failRequest", requestId=number, errorReason="BlockedByClient")
            return
        kind = mimetypes.guess_type(url.split("?")[0])[0] or "text/plain"
        headers = [
            {"name": "Content-Type", "value": f"{kind}; charset=utf-8"},
            {"name": "Cache-Control", "value": "max-age=86400"},
        ]
        self._send(
            "Fetch.fulfillRequest", requestId=number, responseCode=200, responseHeaders=headers,
            body=base64.b64encode(body).decode(),
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------------------- episodes

    async def _load(self, task: Task) -> None:
        self._loaded.clear()
        self._navigating = True
        try:
            result = await self._call("Page.navigate", url=task.url)
            if result.get("errorText"):
                raise BrowserError(f"browser: {task.name} did not load ({result['errorText']})")
            await asyncio.wait_for(self._loaded.wait(), self.browser.timeout)
        finally:
            self._navigating = False
        script = resources.files("datamodules.envs.browser").joinpath("page.js").read_text(encoding="utf-8")
        result = await self._call("Runtime.evaluate", expression=script)
        self._helper = result["result"]["objectId"]
        await self._ask("preload")
        self.task, self._fresh = task, True

    async def _ask(self, function: str, *arguments: Any) -> Any:
        """Call a function of ``page.js``; arguments travel as data."""
        if self._helper is None:
            raise BrowserError("browser: the page has no task loaded")
        answer = await self._call(
            "Runtime.callFunctionOn", objectId=self._helper, awaitPromise=True, returnByValue=True,
            functionDeclaration=f"function(...a) {{ return this.{function}(...a); }}",
            arguments=[{"value": argument} for argument in arguments],
        )  # fmt: skip
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            text = details.get("exception", {}).get("description") or details.get("text", "")
            raise BrowserError(f"browser: the page failed ({text.splitlines()[0][:200]})")
        return answer["result"].get("value")

    async def reset(self, task: Task, spec: EpisodeSpec) -> PageView:
        """Start the episode ``spec``; equal specs start equal episodes.

        Raises:
            BrowserError, TimeoutError: the page can't be used any more.
        """
        if self.task != task or self._helper is None or (self._stateful and not self._fresh):
            await self._load(task)
        self._fresh = False
        # A whole number seeds the page as the package would; any other text is a seed of its own.
        seed = int(spec.seed) if re.fullmatch(r"0|[1-9][0-9]{0,14}", spec.seed) else spec.seed
        seen = await self._ask("reset", seed, self.mode, self.episode_ms, self.settle_ms)
        # jQuery UI numbers its elements from the page's load on: such pages are loaded anew for every episode.
        self._stateful = "ui-id-" in str(seen.get("html")) or task.name in RELOADED
        self.view = self._seen(seen, "ok")
        if self.view.done:
            raise BrowserError(f"browser: {task.name} with seed {spec.seed!r} was over at its start")
        return self.view

    def _seen(self, seen: dict[str, Any], status: ActionStatus) -> PageView:
        assert self.task is not None
        if "lost" in seen or seen.get("url", "").split("#")[0] != self.task.url:
            self._helper = None  # whatever is there now, the next episode loads its page again
            return replace(LOST, status="left_page", reason="the page was left")
        return PageView(
            utterance=seen["utterance"] if not seen["done"] else self.view.utterance,
            html=seen["html"], page=seen["page"], done=seen["done"], reward=float(seen["reward"] or 0.0),
            reason=seen["reason"] or ("done" if seen["done"] else ""), status=status,
        )  # fmt: skip

    async def probe(self, text: str) -> ActionStatus:
        """What would become of an instruction."""
        try:
            instruction = parse_instruction(text)
        except GrammarError:
            return "malformed"
        if instruction.kind in ("type", "press"):
            return "ok"
        return await self._ask("probe", instruction.argument)

    async def step(self, text: str) -> PageView:
        """Carry out an instruction; one that can't be leaves the page as it is and says so by its status.

        Raises:
            BrowserError, TimeoutError: the page can't be used any more.
        """
        if self.view.done:
            return self.view
        try:
            instruction = parse_instruction(text)
        except GrammarError:
            self.view = replace(self.view, status="malformed")
            return self.view
        try:
            status = await self._act(instruction)
            seen = await self._ask("after", self.settle_ms) if status == "ok" else None
        except BrowserError:
            tree = await self._call("Page.getFrameTree")  # what is left where the script's world is gone?
            seen, status = {"lost": "", "url": tree["frameTree"]["frame"]["url"]}, "left_page"
            if self.task is not None and seen["url"].split("#")[0] == self.task.url:
                raise
        self.view = replace(self.view, status=status) if seen is None else self._seen(seen, status)
        return self.view

    async def _act(self, instruction: Instruction) -> ActionStatus:
        if instruction.kind == "type":
            await self._keys([_character(c) for c in instruction.argument])
            return "ok"
        if instruction.kind == "press":
            await self._keys([_KEYS[instruction.argument]])
            return "ok"
        aim = await self._ask("aim", instruction.kind, instruction.argument)
        if aim["status"] != "ok" or aim.get("handled") or aim.get("finished"):
            return aim["status"]
        if aim.get("enter"):
            await self._keys([_KEYS["enter"]])
        elif "count" in aim:
            for index in range(min(aim["count"], _MAX_ALL)):
                if (point := await self._ask("aimAt", instruction.argument, index)) is not None:
                    await self._mouse(point, press=True)
        else:
            await self._mouse(aim, press=instruction.kind == "clickxpath")
        return "ok"

    async def _mouse(self, point: dict[str, float], press: bool) -> None:
        place = {"x": point["x"], "y": point["y"]}
        last = self._send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        if press:
            for kind in ("mousePressed", "mouseReleased"):
                last = self._send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
        await asyncio.wait_for(last, self.browser.timeout)

    async def _keys(self, keys: list[tuple[str, str, int, str]]) -> None:
        last = None
        for key, code, number, text in keys:
            common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "nativeVirtualKeyCode": number}
            if text:
                last = self._send("Input.dispatchKeyEvent", type="keyDown", text=text, unmodifiedText=text, **common)
            else:
                last = self._send("Input.dispatchKeyEvent", type="rawKeyDown", **common)
            last = self._send("Input.dispatchKeyEvent", type="keyUp", **common)
        if last is not None:
            await asyncio.wait_for(last, self.browser.timeout)

    async def screenshot(self) -> bytes:
        """PNG of the task area."""
        task = self.task
        width, height = (task.width, task.height) if task else (160, 210)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        result = await self._call("Page.captureScreenshot", format="png", clip=clip)
        return base64.b64decode(result["data"])


#: Tasks whose pages keep something of an episode for the next one (found by comparing with a fresh load).
RELOADED = frozenset((
    "book-flight", "book-flight-nodelay", "drag-cube", "drag-items", "drag-items-grid", "drag-sort-numbers",
    "form-sequence", "search-engine", "use-slider", "use-slider-2",
))  # fmt: skip


def _character(character: str) -> tuple[str, str, int, str]:
    upper = character.upper()
    if "A" <= upper <= "Z":
        return character, f"Key{upper}", ord(upper), character
    if character.isdecimal() and character.isascii():
        return character, f"Digit{character}", ord(character), character
    return (*_KEYS["space"],) if character == " " else (character, "", 0, character)
