"""Client side of the fork server: a pool of sandboxed zygotes, usable from any number of threads.

``ForkServerPool`` is the shared machinery; ``PythonSandbox`` runs model-written programs on it. Replies are plain
JSON of bounded size, never pickles.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from modules.verification.sandbox import (
    MIB,
    Backend,
    Limits,
    SandboxUnavailableError,
    choose_backend,
    package_folders,
    python_paths,
    sandbox_command,
    without_wall,
)

ZYGOTE = Path(__file__).resolve().parent / "zygote.py"
LAUNCHER = Path(__file__).resolve().parent / "isolate.py"
# One thread in numerical libraries: a program in the sandbox may start none.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
MAX_REPLY_BYTES = 64 * MIB
START_SECONDS = 120.0
PROGRAM_LIMITS = Limits(
    wall_seconds=10.0, cpu_seconds=10.0, memory_bytes=1024 * MIB, file_size_bytes=0, open_files=16, processes=0
)


class _Dead(Exception):
    """The fork server ended or did not answer in time."""


class _Server:
    """One zygote process and its two pipes. Not thread-safe: the pool hands it to one caller at a time."""

    def __init__(self, command: Any) -> None:
        self.process = subprocess.Popen(
            command.argv,
            env=command.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # the terminal's Ctrl-C is the trainer's to handle
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        try:
            greeting = self._receive(time.monotonic() + START_SECONDS)
        except _Dead as error:
            greeting = {"fatal": f"{self._error_text() or error}"}
        if not greeting.get("ready"):
            self.stop(0.0)
            raise SandboxUnavailableError(f"the sandbox's fork server did not start: {greeting.get('fatal')}")
        self.nested = bool(greeting["nested"])

    def _error_text(self) -> str:
        """What a server that did not start had to say. Only it writes there: its children's output is captured."""
        assert self.process.stderr is not None
        self.process.terminate()
        return self.process.stderr.read(65_536).decode(errors="replace").strip()[-2000:]

    def _receive(self, deadline: float) -> Any:
        assert self.process.stdout is not None
        fd, data, wanted = self.process.stdout.fileno(), bytearray(), 4
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while len(data) < wanted:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise _Dead("no answer in time")
                chunk = os.read(fd, min(1 << 16, wanted - len(data)))
                if not chunk:
                    raise _Dead("ended")
                data += chunk
                if wanted == 4 and len(data) == 4:
                    wanted = 4 + int.from_bytes(data, "big")
                    if wanted > MAX_REPLY_BYTES:
                        raise _Dead(f"reply of {wanted} bytes")
        return json.loads(bytes(data[4:]))

    def request(self, message: dict[str, Any], seconds: float) -> Any:
        assert self.process.stdin is not None
        payload = json.dumps(message).encode()
        try:
            view = memoryview(len(payload).to_bytes(4, "big") + payload)
            while view:
                view = view[self.process.stdin.write(view) :]
        except OSError as error:
            raise _Dead(f"pipe: {error}") from None
        return self._receive(time.monotonic() + seconds)

    def stop(self, grace: float = 2.0) -> None:
        """End-of-file ends the zygote; the supervisor kills what does not end, and is itself reaped here."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        for action in (None, signal.SIGTERM, signal.SIGKILL):
            if action is not None:
                self.process.send_signal(action)
            try:
                self.process.wait(grace if action is None else 5.0)
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.stdout.close()
        if self.process.stderr is not None:
            self.process.stderr.close()


def _stop_all(servers: set[_Server], owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the pool must not stop the original's servers
        while servers:
            servers.pop().stop()


class ForkServerPool:
    """Pool of sandboxed fork servers; servers start when first needed and are replaced when they die.

    Args:
        size: number of servers, i.e. of requests served at once.
        preload: modules imported once per server.
        handler: trusted file with ``handle(text) -> text`` for ``call``; None for ``run`` only.
        backend, allow_unsafe_exec: see ``modules.verification.sandbox.choose_backend``.
        read_only_paths: further paths visible inside.

    Raises:
        ValueError: size < 1.  SandboxUnavailableError: no isolation here.
    """

    def __init__(
        self,
        size: int = 1,
        *,
        preload: Sequence[str] = (),
        handler: Path | None = None,
        backend: str | Backend | None = None,
        allow_unsafe_exec: bool = False,
        read_only_paths: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        if size < 1:
            raise ValueError(f"{type(self).__name__}: size must be >= 1, got {size}")
        self.size = size
        self.backend = (
            backend if isinstance(backend, Backend) else choose_backend(backend, allow_unsafe_exec=allow_unsafe_exec)
        )
        config = {
            "preload": list(preload),
            "path": package_folders(),  # given, not found by `site`: no .pth file runs inside
            "handler": str(handler) if handler else None,
            "require_confinement": self.backend.name != "none",
        }
        self._command = lambda: sandbox_command(  # a new uid for each server
            [sys.executable, "-I", "-S", str(ZYGOTE), json.dumps(config)],
            read_only_paths=[
                *python_paths(), sys.executable, ZYGOTE, LAUNCHER, *([handler] if handler else []), *read_only_paths
            ],
            limits=without_wall(Limits(memory_bytes=None, open_files=256, processes=None)),
            env=ENVIRONMENT,
            backend=self.backend,
            seccomp=None,  # the zygote makes namespaces; its children install the filter
        )  # fmt: skip
        self.restarts = 0
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._idle: queue.LifoQueue[_Server | None] = queue.LifoQueue()
        for _ in range(self.size):
            self._idle.put(None)
        self._servers: set[_Server] = set()
        self._closed = False
        self._finalizer = weakref.finalize(self, _stop_all, self._servers, self._owner)

    def _request(self, message: dict[str, Any], seconds: float) -> Any:
        """Serve one request on the next idle server; a server that dies is replaced and the request tried once more.

        Raises:
            _Dead: died twice.  RuntimeError: the pool is closed.
        """
        if os.getpid() != self._owner:  # forked with the pool inside: start servers of our own
            self._finalizer.detach()
            self._lock = threading.Lock()
            self._reset()
        if self._closed:
            raise RuntimeError(f"{type(self).__name__}: the pool is closed")
        server = self._idle.get()
        try:
            for attempt in (0, 1):
                if server is None:
                    server = _Server(self._command())
                    with self._lock:
                        self._servers.add(server)
                try:
                    return server.request(message, seconds)
                except _Dead:
                    with self._lock:
                        self._servers.discard(server)
                        self.restarts += 1
                    server.stop(0.0)
                    server = None
                    if attempt:
                        raise
        finally:
            self._idle.put(server)
        raise AssertionError("unreachable")

    def call(
        self, items: Sequence[str], *, limits: Limits = PROGRAM_LIMITS, recycle: int = 1000
    ) -> list[dict[str, Any]]:
        """Answers of the handler to ``items``, in order: {"value": text} or {"error": reason}, both with "seconds".

        Each item has ``limits.wall_seconds``; reasons are timeout, memory, recursion, crashed.
        """
        assert limits.wall_seconds is not None
        message = {"op": "call", "items": list(items), "limits": asdict(limits), "recycle": recycle}
        try:
            return self._request(message, 30.0 + len(items) * (limits.wall_seconds + 1.0))["replies"]
        except _Dead:
            return [{"error": "crashed", "seconds": 0.0} for _ in items]

    def close(self) -> None:
        """Stop every server. Idempotent."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class ExecutionResult:
    """End of one program.

    Attributes:
        status: ok; error (it raised; ``error`` says what); timeout (wall or CPU); output (too much of it); killed
            (by a signal, e.g. a stack overflow or the out-of-memory killer); crashed (the server died twice).
        output: what it printed, stdout and stderr in order, cut at ``Limits.output_bytes``.
        value: the described value asked for (see ``zygote.describe``), None if none.
        error: one line, None if ok.
        seconds: wall time of the program.
    """

    status: str
    output: str
    value: dict[str, Any] | None
    error: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class PythonSandbox(ForkServerPool):
    """Runs model-written Python; one fork of a process with sympy imported per program.

    >>> with PythonSandbox(size=2) as sandbox:
    ...     sandbox.run("print(6 * 7)").output
    '42\\n'
    """

    def __init__(
        self,
        size: int = 1,
        *,
        preload: Sequence[str] = ("sympy", "math", "fractions", "itertools", "datetime", "statistics"),
        limits: Limits = PROGRAM_LIMITS,
        backend: str | Backend | None = None,
        allow_unsafe_exec: bool = False,
    ) -> None:
        super().__init__(size, preload=preload, backend=backend, allow_unsafe_exec=allow_unsafe_exec)
        if limits.wall_seconds is None:
            raise ValueError("PythonSandbox: limits.wall_seconds must be set")
        self.limits = limits

    def run(
        self, code: str, *, variable: str | None = None, call: str | None = None, limits: Limits | None = None
    ) -> ExecutionResult:
        """Execute ``code``; ``value`` is then that of the global ``variable``, or of the function ``call`` called."""
        if variable is not None and call is not None:
            raise ValueError("PythonSandbox.run: give variable or call, not both")
        limits = limits or self.limits
        if limits.wall_seconds is None:
            raise ValueError("PythonSandbox.run: limits.wall_seconds must be set")
        message = {"op": "run", "code": code, "variable": variable, "call": call, "limits": asdict(limits)}
        try:
            reply = self._request(message, limits.wall_seconds + 30.0)
        except _Dead as error:
            return ExecutionResult("crashed", "", None, f"fork server: {error}", 0.0)
        return ExecutionResult(reply["status"], reply["output"], reply["value"], reply["error"], reply["seconds"])

    def map(self, codes: Sequence[str], **options: Any) -> list[ExecutionResult]:
        """``run`` on each program, ``size`` at once, results in order."""
        with ThreadPoolExecutor(self.size) as executor:
            return list(executor.map(lambda code: self.run(code, **options), codes))
