"""Child commands of a driver: each its own process, forked from one that has imported everything.

A child command takes five seconds to import what it needs, which a cycle of short rounds would pay again and again.
The server is forked before the driver has computed anything, imports what a run imports, and forks a child for each
command: the child then is as fresh as a new interpreter, and starts at once. Where there is no fork, or where
``PLUMBLINE_FRESH_CHILDREN`` is set, children are started anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OWN_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "PLUMBLINE_RUN_FOLDER", "LOCAL_RANK")
FRESH_VARIABLE = "PLUMBLINE_FRESH_CHILDREN"  # any value: no fork
_PR_SET_PDEATHSIG = 1
_GRACE = 30.0  # seconds from SIGTERM to SIGKILL


class Children:
    """Runs commands ``python -m train <argv>`` one after another.

    Killing the driver kills the command that runs, at once: checkpoints and reports are whole at every instant.

    Args:
        keep: descriptors that children inherit.
    """

    def __init__(self, keep: Sequence[int] = ()) -> None:
        self._keep = list(keep)
        self._channel: socket.socket | None = None
        self._server = 0
        self._fork = hasattr(os, "fork") and not os.environ.get(FRESH_VARIABLE)

    def _start_server(self) -> None:
        mine, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        self._server = os.fork()
        if self._server == 0:
            code = 1
            try:
                mine.close()
                _end_with_parent()
                _serve(theirs)
                code = 0
            except BaseException:  # the child never returns into the driver's stack
                traceback.print_exc()
            finally:
                os._exit(code)
        theirs.close()
        self._channel = mine

    def run(self, argv: Sequence[str], log: Path) -> int:
        """Run one command, its output appended to ``log``, and return its exit code (negative: the signal's number).

        Raises:
            RuntimeError: the server died.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        if not self._fork:
            return self._run_fresh(argv, log)
        if self._channel is None:
            self._start_server()
        assert self._channel is not None
        self._channel.sendall(json.dumps({"argv": list(argv), "log": str(log)}).encode() + b"\n")
        pid = int(self._receive())
        try:
            return int(self._receive())
        except BaseException:
            _stop(pid)
            raise

    def close(self) -> None:
        """End the server."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._server, 0)

    def _receive(self) -> str:
        assert self._channel is not None
        line = b""
        while not line.endswith(b"\n"):
            part = self._channel.recv(64)
            if not part:
                raise RuntimeError("align: the process that starts child commands died; run the command again to go on")
            line += part
        return line.decode()

    def _run_fresh(self, argv: Sequence[str], log: Path) -> int:
        environment = {key: value for key, value in os.environ.items() if key not in OWN_VARIABLES}
        with open(log, "ab") as stream:
            child = subprocess.Popen(
                [sys.executable, "-m", "train", *argv],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=self._keep,
                preexec_fn=_end_with_parent,
            )
        try:
            return child.wait()
        except BaseException:
            _stop(child.pid)
            raise


def _stop(pid: int) -> None:
    """Ask a child to end; what does not listen is killed when the driver ends."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _end_with_parent() -> None:
    """Ask the kernel (Linux) for SIGKILL when the parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(channel: socket.socket) -> None:
    """The server: import everything once, then fork a child per request, until the driver hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what an interrupt means
    for name in OWN_VARIABLES:
        os.environ.pop(name, None)
    import train.cli  # noqa: F401

    with channel, channel.makefile("rb") as requests:
        for line in requests:
            request: dict[str, Any] = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _become(request["argv"], Path(request["log"]))
            channel.sendall(f"{pid}\n".encode())
            _, status = os.waitpid(pid, 0)
            channel.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(argv: list[str], log: Path) -> None:
    """The child: run the command as ``python -m train`` does, and end with its exit code."""
    code = 1
    try:
        _end_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (stream, 1), (stream, 2)):
            os.dup2(source, target)
        # the driver's own streams may be a notebook's or a test's, which are no files
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        import train

        code = train.main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
