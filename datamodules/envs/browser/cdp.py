"""A headless Chromium of our own, driven through a pipe.

The browser inherits two ends of a pipe and ends when they close: a trainer that dies, by ``kill -9`` too, leaves no
browser behind, and there is no port that somebody else could connect to. Messages are those of the Chrome DevTools
Protocol, each ended by a zero byte.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
VARIABLE = "PLUMBLINE_CHROMIUM"
_PROFILE = "plumbline-browser-"
_FLAGS = (
    "--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-default-apps", "--disable-quic", "--mute-audio", "--hide-scrollbars", "--deny-permission-prompts",
    "--disable-background-timer-throttling", "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows", "--disable-features=Translate",
    # An input event waits for a frame: at 60 a second that would be most of a click's time.
    "--disable-frame-rate-limit", "--disable-gpu-vsync",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1",
)  # fmt: skip
# What a browser may know of our environment: no keys, no credentials.
_PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "FONTCONFIG_PATH")


class BrowserError(RuntimeError):
    """The browser or a page of it can't be used any more."""


def find_browser(path: str | None = None) -> str:
    """The Chromium to start: ``path``, else the variable ``PLUMBLINE_CHROMIUM``, else the first one on PATH.

    Raises:
        FileNotFoundError: there is none; names the package to install.
    """
    given = path or os.environ.get(VARIABLE)
    if given:
        found = shutil.which(given)
        if found is None:
            raise FileNotFoundError(f"browser: {given} is no program that can be started; check {VARIABLE}")
        return found
    for name in BINARIES:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(
        "browser: no Chromium found; install it (Debian, Ubuntu: apt-get install chromium), or set "
        f"{VARIABLE} to its program"
    )


class Browser:
    """One browser process and its connection; all methods belong to one asyncio loop.

    Args:
        path: see :func:`find_browser`.
        sandbox: use Chromium's own sandbox, which refuses to run as root.
        window: width and height of new windows, pixels.
        timeout: seconds to wait for an answer.
    """

    def __init__(
        self,
        path: str | None = None,
        sandbox: bool = False,
        window: tuple[int, int] = (500, 320),
        timeout: float = 20.0,
    ) -> None:
        self.path, self.sandbox, self.window, self.timeout = find_browser(path), sandbox, window, timeout
        self.pid: int | None = None
        self.version = ""
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._listeners: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        self._buffer: list[bytes] = []
        self._profile: Path | None = None
        self._read_end: asyncio.ReadTransport | None = None
        self._write_fd = -1

    @property
    def alive(self) -> bool:
        return self.pid is not None

    async def start(self) -> None:
        """Start the process and connect.

        Raises:
            BrowserError: it ended at once or did not answer.
        """
        _remove_stale_profiles()
        self._profile = Path(tempfile.mkdtemp(prefix=f"{_PROFILE}{os.getpid()}-"))
        child_read, self._write_fd = os.pipe()
        read_fd, child_write = os.pipe()
        # Above any number that the spawn itself writes to, so that 3 and 4 are free to be taken.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in (child_read, child_write)]
        quiet = os.open(os.devnull, os.O_RDWR)
        flags = [*_FLAGS, f"--window-size={self.window[0]},{self.window[1]}", f"--user-data-dir={self._profile}"]
        if not self.sandbox:
            flags.append("--no-sandbox")
        environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
        environment["TMPDIR"] = str(self._profile)  # all that it leaves behind goes with the profile
        try:
            self.pid = os.posix_spawn(
                self.path, [self.path, *flags, "about:blank"], environment,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, quiet, 0), (os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2),
                    (os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4),
                ],
                setsid=True,
            )  # fmt: skip
        finally:
            for fd in (child_read, child_write, quiet, *ends):
                os.close(fd)
        loop = asyncio.get_running_loop()
        self._read_end, _ = await loop.connect_read_pipe(lambda: _Reader(self), os.fdopen(read_fd, "rb", 0))
        try:
            self.version = (await self.call("Browser.getVersion"))["product"]
            await self.call("Browser.setDownloadBehavior", behavior="deny")
            self._listeners[""] = self._window_event
            await self.call("Target.setDiscoverTargets", discover=True)
        except (BrowserError, TimeoutError) as error:
            self.kill()
            raise BrowserError(f"browser: {self.path} did not start ({error}); start it by hand") from None

    async def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result.

        Raises:
            BrowserError: the browser refused it or is gone. TimeoutError: no answer in time.
        """
        return await asyncio.wait_for(self.send(method, session, **params), self.timeout)

    def send(self, method: str, session: str | None = None, **params: Any) -> asyncio.Future[dict[str, Any]]:
        """Send a command; its result comes through the future, which nobody has to await."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_seen)
        if not self.alive:
            future.set_exception(BrowserError("browser: the process has ended"))
            return future
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._waiting[number] = future
        try:
            data = json.dumps(message).encode() + b"\0"
            while data:
                data = data[os.write(self._write_fd, data) :]
        except OSError:
            self.kill()
        return future

    def _window_event(self, method: str, params: dict[str, Any]) -> None:
        """Windows that a page opened are closed; they had no network to load anything from."""
        if method == "Target.targetCreated" and params["targetInfo"].get("openerId"):
            self.send("Target.closeTarget", targetId=params["targetInfo"]["targetId"])

    def listen(self, session: str, listener: Callable[[str, dict[str, Any]], None]) -> None:
        """Have ``listener(method, params)`` called for the events of a session."""
        self._listeners[session] = listener

    def forget(self, session: str) -> None:
        self._listeners.pop(session, None)

    def received(self, data: bytes) -> None:
        """Bytes from the browser: whole messages among them are acted on."""
        if b"\0" not in data:
            self._buffer.append(data)
            return
        *whole, rest = b"".join([*self._buffer, data]).split(b"\0")
        self._buffer = [rest] if rest else []
        for text in whole:
            message = json.loads(text)
            number = message.get("id")
            if number is None:
                listener = self._listeners.get(message.get("sessionId", ""))
                if listener is not None:
                    listener(message["method"], message.get("params", {}))
                continue
            future = self._waiting.pop(number, None)
            if future is None or future.done():
                continue
            if "error" in message:
                future.set_exception(BrowserError(f"browser: {message['error'].get('message', 'refused')}"))
            else:
                future.set_result(message.get("result", {}))

    def kill(self) -> None:
        """End the process with all its children and remove its profile; a second call does nothing."""
        pid, self.pid = self.pid, None
        if pid is not None:
            os.close(self._write_fd)
            with _ignored():
                os.killpg(pid, signal.SIGKILL)
            with _ignored():
                os.waitpid(pid, 0)
        if self._read_end is not None:
            self._read_end.close()
            self._read_end = None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(BrowserError("browser: the process has ended"))
        self._waiting.clear()
        if self._profile is not None:
            shutil.rmtree(self._profile, ignore_errors=True)
            self._profile = None


class _Reader(asyncio.Protocol):
    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def data_received(self, data: bytes) -> None:
        self.browser.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.browser.kill()


def _remove_stale_profiles() -> None:
    """Profiles whose owner was killed before it could remove them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PROFILE}*"):
        owner = folder.name.removeprefix(_PROFILE).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _seen(future: asyncio.Future[Any]) -> None:
    """Take note of a failure that nobody awaits, or asyncio would report it when the future goes."""
    if not future.cancelled():
        future.exception()


class _ignored:
    """The process or its group is gone already."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, OSError)
