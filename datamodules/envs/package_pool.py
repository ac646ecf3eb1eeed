"""Copies of a third-party environment stepped one by one, in this process or split over others.

Free of torch, so that a worker starts quickly; what goes in and out are numpy arrays.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


class Seen(NamedTuple):
    """What one copy shows after a reset or a step; ``None`` where the package has no such thing."""

    observation: Sequence[Any] | npt.NDArray[Any]  # [agents, features]
    legal: Sequence[Any] | npt.NDArray[Any] | None = None  # [agents, actions]
    state: npt.NDArray[Any] | None = None  # [state_features]


class Copy(Protocol):
    """One copy of a package's environment, deterministic given the seed of its reset and the actions since."""

    num_agents: int
    num_actions: int
    observation_size: int
    state_size: int  # 0: no state
    masked: bool  # whether actions can be unavailable

    def reset(self, seed: int) -> Seen:
        """Start an episode that ``seed`` decides."""
        ...

    def step(self, actions: list[int]) -> tuple[Sequence[float], bool, Seen]:
        """Each agent's reward, whether the episode terminated (its time limit aside), and what is seen then."""
        ...

    def close(self) -> None:
        """Free what the package holds."""
        ...


class Frames(NamedTuple):
    """What ``n`` copies show; legal and state have no columns where the package has none."""

    observation: Floats  # [n, agents, features]
    legal: Bools  # [n, agents, actions or 0]
    state: Floats  # [n, state_features or 0]


class LocalPool:
    """Copies in this process.

    Args:
        factory: makes one copy.
        count: how many.
    """

    def __init__(self, factory: Callable[[], Copy], count: int) -> None:
        self.copies = [factory() for _ in range(count)]
        one = self.copies[0]
        self.frames = Frames(
            np.zeros((count, one.num_agents, one.observation_size), np.float32),
            np.zeros((count, one.num_agents, one.num_actions if one.masked else 0), np.bool_),
            np.zeros((count, one.state_size), np.float32),
        )
        self._reward = np.zeros((count, one.num_agents), np.float32)
        self._terminated = np.zeros(count, np.bool_)

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> Frames:
        """Start episodes in ``rows``, each from its seed; what all copies show."""
        for row, seed in zip(rows, seeds, strict=True):
            self._keep(row, self.copies[row].reset(seed))
        return self.frames

    def step(self, actions: Integers, live: Bools) -> tuple[Floats, Bools, Frames]:
        """Step the ``live`` ``[n]`` copies with their ``actions`` ``[n, agents]``.

        Returns:
            Rewards ``[n, agents]`` (0 where not live), terminated ``[n]`` (likewise false), what all copies show.
        """
        self._reward[:] = 0.0
        self._terminated[:] = False
        for row, (joint, alive) in enumerate(zip(actions.tolist(), live.tolist(), strict=True)):
            if alive:
                self._reward[row], self._terminated[row], seen = self.copies[row].step(joint)
                self._keep(row, seen)
        return self._reward, self._terminated, self.frames

    def replay(self, rows: Sequence[int], seeds: Sequence[int], histories: Sequence[Integers]) -> Frames:
        """Bring ``rows`` to where the actions ``[steps, agents]`` after a reset from their seeds lead."""
        for row, seed, history in zip(rows, seeds, histories, strict=True):
            copy = self.copies[row]
            seen = copy.reset(seed)
            for joint in history.tolist():
                _, _, seen = copy.step(joint)
            self._keep(row, seen)
        return self.frames

    def close(self) -> None:
        """Close every copy; once is enough."""
        for copy in self.copies:
            copy.close()
        self.copies = []

    def _keep(self, row: int, seen: Seen) -> None:
        self.frames.observation[row] = seen.observation
        if seen.legal is not None:
            self.frames.legal[row] = seen.legal
        if seen.state is not None:
            self.frames.state[row] = seen.state


def _serve(pipe: Connection, factory: Callable[[], Copy], count: int) -> None:
    """A worker: a pool of its own, driven through ``pipe`` until told to close or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes its workers
    pool: LocalPool | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            command, arguments = pipe.recv()
            try:
                if command == "open":
                    pool, answer = LocalPool(factory, count), None
                elif command == "close" or pool is None:
                    break
                else:
                    answer = getattr(pool, command)(*arguments)
            except Exception as error:
                pipe.send((f"{type(error).__name__}: {' '.join(str(error).split())}", None))
            else:
                pipe.send((None, answer))
    if pool is not None:
        pool.close()


class WorkerPool:
    """Copies split over processes, in blocks of consecutive copies; behaves as :class:`LocalPool`.

    Args:
        factory: makes one copy; picklable.
        count: copies in all.
        workers: processes.
        owner: whose name errors carry.

    Raises:
        ValueError: for more workers than copies.
        RuntimeError: one line, when a worker fails or dies; here or in any other call.
    """

    def __init__(self, factory: Callable[[], Copy], count: int, workers: int, owner: str) -> None:
        if workers > count:
            raise ValueError(f"{owner}: workers must be <= envs, got {workers} for {count}")
        self.owner = owner
        bounds = [count * worker // workers for worker in range(workers + 1)]
        self.blocks = list(zip(bounds[:-1], bounds[1:], strict=True))
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        context = multiprocessing.get_context("spawn")  # forking a process that runs threads can deadlock
        try:
            for first, last in self.blocks:
                mine, its = context.Pipe()
                process = context.Process(target=_serve, args=(its, factory, last - first), daemon=True)
                process.start()
                its.close()
                self.pipes.append(mine)
                self.processes.append(process)
            self._ask("open", [()] * workers)
        except BaseException:
            self.close()
            raise

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> Frames:
        """As :meth:`LocalPool.reset`."""
        return self._join(self._ask("reset", self._split(rows, seeds)))

    def step(self, actions: Integers, live: Bools) -> tuple[Floats, Bools, Frames]:
        """As :meth:`LocalPool.step`."""
        answers = self._ask("step", [(actions[first:last], live[first:last]) for first, last in self.blocks])
        rewards, terminated, frames = zip(*answers, strict=True)
        return np.concatenate(rewards), np.concatenate(terminated), self._join(frames)

    def replay(self, rows: Sequence[int], seeds: Sequence[int], histories: Sequence[Integers]) -> Frames:
        """As :meth:`LocalPool.replay`."""
        return self._join(self._ask("replay", self._split(rows, seeds, histories)))

    def close(self) -> None:
        """End the workers: kindly, and after five seconds not."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(("close", ()))
        for process in self.processes:
            process.join(5.0)
            if process.is_alive():
                process.terminate()
                process.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes, self.processes = [], []

    def _split(self, rows: Sequence[int], *values: Sequence[Any]) -> list[tuple[list[Any], ...]]:
        """Each worker's share of ``rows``, numbered from its first copy, and of the ``values`` that go with them."""
        shares = []
        for first, last in self.blocks:
            chosen = [at for at, row in enumerate(rows) if first <= row < last]
            shares.append(([rows[at] - first for at in chosen], *([value[at] for at in chosen] for value in values)))
        return shares

    @staticmethod
    def _join(parts: Sequence[Frames]) -> Frames:
        return Frames(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _ask(self, command: str, shares: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send every worker its share and wait for all answers, so that an error leaves no answer in a pipe."""
        if not self.pipes:
            raise RuntimeError(f"{self.owner}: its workers are closed")
        answers, problems = [], []
        for pipe, share in zip(self.pipes, shares, strict=True):
            with contextlib.suppress(OSError):  # a dead worker is reported below
                pipe.send((command, share))
        for worker, (pipe, process) in enumerate(zip(self.pipes, self.processes, strict=True)):
            try:
                problem, answer = pipe.recv()
            except (EOFError, OSError):
                process.join(1.0)
                problem, answer = f"died with exit code {process.exitcode}", None
            if problem is not None:
                problems.append(f"worker {worker}: {problem}")
            answers.append(answer)
        if problems:
            raise RuntimeError(f"{self.owner}: {problems[0]}")
        return answers
