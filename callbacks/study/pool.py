"""Runs of a study in a few processes at once: finished ones are skipped, failed ones reported, a kill loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from callbacks.metrics_file import read_metric
from callbacks.study.plan import Run, Study, attempts, read_state, write_state

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5.0
"""Seconds that a worker gets to leave before it is killed."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``error`` is None or one line; ``seconds`` of wall time."""

    seconds: float
    error: str | None = None


class Worker:
    """One worker process.

    Args:
        entry: ``module:function`` that runs a command line.
        threads: torch threads.
        log: file for what the process says outside of runs.
    """

    def __init__(self, entry: str, threads: int, log: Path) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **dict.fromkeys(_THREADS, str(threads))}
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with open(log, "w", encoding="utf-8") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "callbacks.study.worker", entry],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                text=True,
                start_new_session=True,  # Ctrl-C is for the study, which then ends its workers
            )

    def run(self, arguments: Sequence[str], log: Path, append: bool) -> Outcome | None:
        """Run one command line; None if the process is gone, with the run or before it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        start = time.monotonic()
        try:
            request = {"arguments": list(arguments), "log": str(log), "append": append}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError):  # a broken pipe, or closed by stop()
            line = ""
        if not line.endswith("\n"):
            return None
        reply = json.loads(line)
        if reply["code"] == 0:
            return Outcome(reply["seconds"])
        return Outcome(time.monotonic() - start, f"exit {reply['code']}: {last_line(log)}")

    def stop(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Release the pipes, once no thread reads them any more."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                assert pipe is not None
                pipe.close()

    def last_words(self) -> str:
        """How a process that is gone ended."""
        self.stop()
        return f"the worker process ended with code {self._process.returncode}: {last_line(self._log)}"


def last_line(log: Path) -> str:
    """The last ``error:`` line of a log, or its last line."""
    if not log.is_file():
        return "(no output)"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["(no output)"])[-1][:400]


def _checkpointed(run: Run, state: Mapping[str, Any]) -> Path | None:
    """The newest run folder of an unfinished attempt with these settings that holds a whole checkpoint."""
    from callbacks.checkpoint import newest_whole_checkpoint

    ours = attempts(run)[state["earlier"] :] if state else []
    return next((path for path in reversed(ours) if newest_whole_checkpoint(path / "checkpoints")), None)


class Pool:
    """Runs jobs in worker processes and keeps each run's ``state.json``.

    Args:
        out: the study's folder.
        workers: processes at once.
        threads: torch threads of each.
        resume: go on from an unfinished run's last checkpoint where there is one, else start it again.
        entry: ``module:function`` that runs a command line.
    """

    def __init__(
        self, out: Path, workers: int, threads: int = 1, resume: bool = False, entry: str = "train:main"
    ) -> None:
        for name, value in (("workers", workers), ("threads", threads)):
            if value < 1:
                raise ValueError(f"study: --{name}: must be at least 1, got {value}")
        self.out, self.workers = out, workers
        self._threads, self._resume, self._entry = threads, resume, entry
        self._started: list[Worker] = []
        self._lock = threading.Lock()
        self._stopping = False

    def outcomes(self, runs: Sequence[Run]) -> Generator[tuple[Run, Outcome], None, None]:
        """Run all, yielding each as it ends; leaving the loop early ends the workers and keeps what is on disk."""
        todo: queue.SimpleQueue[Run] = queue.SimpleQueue()
        ended: queue.SimpleQueue[tuple[Run, Outcome] | Exception] = queue.SimpleQueue()
        for run in runs:
            todo.put(run)
        serving = [
            threading.Thread(target=self._serve, args=(number, todo, ended), daemon=True)
            for number in range(min(self.workers, len(runs)))
        ]
        try:
            for thread in serving:
                thread.start()
            for _ in runs:
                one = ended.get()
                if isinstance(one, Exception):
                    raise one
                yield one
        finally:
            with self._lock:
                self._stopping = True
            for worker in self._started:
                worker.stop()
            for thread in serving:
                if thread.ident is not None:
                    thread.join(GRACE)
            for worker in self._started:
                worker.close()

    def _serve(self, number: int, todo: queue.SimpleQueue[Run], ended: queue.SimpleQueue) -> None:
        worker: Worker | None = None
        while True:
            try:
                run = todo.get_nowait()
            except queue.Empty:
                return
            try:
                with self._lock:
                    if self._stopping:
                        return
                    if worker is None:
                        worker = Worker(self._entry, self._threads, self.out / "logs" / f"worker-{number}.txt")
                        self._started.append(worker)
                outcome = self._one(worker, run)
                if outcome is None:
                    if self._stopping:
                        return
                    outcome = Outcome(0.0, worker.last_words())
                    worker = None
                if outcome.error is not None:
                    write_state(run, "failed", earlier=read_state(run).get("earlier", 0), error=outcome.error)
                ended.put((run, outcome))
            except Exception as error:  # such as a full disk: the study's, not a run's
                ended.put(error)
                return

    def _one(self, worker: Worker, run: Run) -> Outcome | None:
        state = read_state(run)
        resumed = _checkpointed(run, state) if self._resume and state.get("state") in ("started", "failed") else None
        earlier = state["earlier"] if resumed else len(attempts(run))
        write_state(run, "started", earlier=earlier)
        more = [f"--ckpt_path={resumed}"] if resumed else []
        outcome = worker.run([*run.arguments, *more], run.folder / "log.txt", append=resumed is not None)
        if outcome is None or outcome.error is not None:
            return outcome
        folders = attempts(run)[earlier:]
        if not folders:
            return Outcome(outcome.seconds, f"exit 0, but no run folder in {run.folder}")
        write_state(
            run,
            "done",
            earlier=earlier,
            run_folder=folders[-1].name,
            seconds=outcome.seconds,
            arguments=list(run.arguments),
        )
        return outcome


# -- the command --
def _clock(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def expected_seconds(todo: Sequence[Run], times: Mapping[tuple[str, str], Sequence[float]], workers: int) -> float:
    """Seconds until all of ``todo`` have ended, from runs that have: the same cell's, else the mean of all.

    Args:
        times: seconds of ended runs by task and algorithm; at least one.
    """
    everything = [one for some in times.values() for one in some]
    overall = sum(everything) / len(everything)
    cells = ((run.task, run.algorithm) for run in todo)
    each = [sum(times[cell]) / len(times[cell]) if cell in times else overall for cell in cells]
    return max(sum(each) / workers, max(each, default=0.0))


def run_study(study: Study, runs: Sequence[Run], pool: Pool) -> int:
    """Run what is not done yet, with a line for each run that ends.

    Returns:
        0, 1 if a run failed, 130 if interrupted.

    Raises:
        ValueError: another study is running in the pool's folder.
        OSError: the folder can't be written.
    """
    pool.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(pool.out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"study: another study is running in {pool.out}: wait for it or choose another --out"
        ) from None
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        _interrupt_on_termination(stack)
        states = {run: read_state(run) for run in runs}
        todo = [run for run in runs if states[run].get("state") != "done"]
        times: dict[tuple[str, str], list[float]] = {}
        for run in runs:
            if run not in todo:
                times.setdefault((run.task, run.algorithm), []).append(states[run]["seconds"])
        done = len(runs) - len(todo)
        print(f"{len(runs)} runs, {done} of them done before", flush=True)
        failed: list[tuple[Run, str]] = []
        left = list(todo)
        outcomes = stack.enter_context(contextlib.closing(pool.outcomes(todo)))
        try:
            for run, outcome in outcomes:
                done += 1
                left.remove(run)
                text, error = _described(study, run, outcome)
                if error:
                    failed.append((run, error))
                if outcome.error is None:
                    times.setdefault((run.task, run.algorithm), []).append(outcome.seconds)
                eta = f"; ETA {_clock(expected_seconds(left, times, pool.workers))}" if left and times else ""
                print(f"[{done}/{len(runs)}] {run}: {text}{eta}", flush=True)
        except KeyboardInterrupt:
            print(f"interrupted: {done} of {len(runs)} runs ended; the same command goes on", file=sys.stderr)
            return 130
    for run, error in failed:
        print(f"failed: {run}: {error}\n  log: {run.folder / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


def _described(study: Study, run: Run, outcome: Outcome) -> tuple[str, str | None]:
    """What to say of a run that ended, and what was wrong with it."""
    if outcome.error is not None:
        return "FAILED", outcome.error
    folder = run.folder / read_state(run)["run_folder"]
    try:
        value = read_metric(folder, study.metric, study.x)[-1, 1]
    except (OSError, ValueError) as error:  # the run is whole; what the study asks of it is not there
        return f"done in {_clock(outcome.seconds)}, but there is nothing to compare", str(error)
    return f"{study.metric} {value:.4g} in {_clock(outcome.seconds)}", None


def _interrupt_on_termination(stack: contextlib.ExitStack) -> None:
    """Let SIGTERM end the study as Ctrl-C does, where the process allows it."""
    if threading.current_thread() is not threading.main_thread():
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, interrupt))
