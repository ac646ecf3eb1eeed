"""A prover's interactive process: isolated start, reads with a deadline, sure death."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time

from modules.verification.sandbox import SandboxedCommand

MAX_REPLY_BYTES = 1 << 20


class ProcessDiedError(RuntimeError):
    """The process ended, overran its deadline or its output limit; it is gone when this is raised.

    timeout tells a missed deadline from the rest.
    """

    def __init__(self, message: str, timeout: bool = False) -> None:
        super().__init__(message)
        self.timeout = timeout


class InteractiveProcess:
    """Line-in, prompt-out conversation with a process whose stderr is joined to its stdout.

    Args:
        command: what to start, isolation included (`modules.verification.sandbox.sandbox_command`).
        prompt: pattern of the bytes after which the process waits for input. It must match at the end of a reply.
    """

    def __init__(self, command: SandboxedCommand, prompt: re.Pattern[bytes]) -> None:
        self._prompt = prompt
        self._process = subprocess.Popen(
            command.argv,
            env=command.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    def ask(self, line: str, timeout: float) -> tuple[str, re.Match[bytes]]:
        """Send one line and return (text before the prompt, match of the prompt). Raises ProcessDiedError."""
        if self._stdout.closed:
            raise self._died("the prover was closed")
        if self._pending():
            raise self._died("the prover spoke out of turn")
        try:
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        except OSError as error:
            raise self._died(f"the prover is gone ({error})") from None
        return self.read(timeout)

    def read(self, timeout: float) -> tuple[str, re.Match[bytes]]:
        """Read up to the next prompt. Raises ProcessDiedError on deadline, end of file or too much output."""
        deadline = time.monotonic() + timeout
        reply = bytearray()
        while True:
            wait = deadline - time.monotonic()
            if wait <= 0 or not select.select([self._stdout], [], [], wait)[0]:
                raise self._died(f"no answer within {timeout:g} s", timeout=True)
            chunk = self._stdout.read(65536)
            if not chunk:
                shown = bytes(reply[-300:]).decode(errors="replace").strip()
                raise self._died(f"the prover ended{f': {shown}' if shown else ''}")
            reply += chunk
            if len(reply) > MAX_REPLY_BYTES:
                raise self._died(f"reply longer than {MAX_REPLY_BYTES} bytes")
            matches = list(self._prompt.finditer(reply, max(0, len(reply) - len(chunk) - 4096)))
            if matches and matches[-1].end() == len(reply):
                if len(matches) > 1:
                    raise self._died("several prompts in one reply")
                return bytes(reply[: matches[0].start()]).decode(errors="replace"), matches[0]

    def _pending(self) -> bool:
        return bool(select.select([self._stdout], [], [], 0)[0])

    def _died(self, message: str, timeout: bool = False) -> ProcessDiedError:
        code = self.close()
        return ProcessDiedError(message if timeout else f"{message} (exit code {code})", timeout)

    def close(self) -> int | None:
        """End the process and everything it started; returns its exit code. May be called twice."""
        process = self._process
        with contextlib.suppress(OSError):
            self._stdin.close()
        for sig, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
            if process.poll() is None:
                # The supervisor of the sandbox turns SIGTERM into the death of the whole isolated tree.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sig)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
        self._stdout.close()
        return process.poll()

    @property
    def pid(self) -> int:
        return self._process.pid
