"""Runs many loops at once: what all of them wait for is done together, in one batch per kind."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

# Effects of one kind, with the number of the slot that each waits in -> their results, in order.
Handler = Callable[[Sequence[tuple[int, Any]]], Sequence[Any]]


def drive(
    loops: Iterable[Generator[Any, Any, Any]], width: int, handlers: Mapping[type, Handler]
) -> Iterator[tuple[int, Any]]:
    """Run ``loops``, at most ``width`` at a time, and yield ``(number of the loop, what it returned)`` as each ends.

    Every round takes one effect from each live loop, groups them by type and has each group done by its handler; a loop
    that ended leaves its slot to the next one. Results do not depend on ``width`` where handlers treat their effects
    apart from each other.

    Args:
        loops: generators that yield effects.
        width: live loops, at most.
        handlers: by the effects' type; slot numbers count from 0 to ``width - 1``.

    Raises:
        ValueError: width < 1.
        TypeError: an effect that no handler is for.
    """
    if width < 1:
        raise ValueError(f"RCI: live loops must be >= 1, got {width}")
    source = enumerate(loops)
    live: dict[int, tuple[int, Generator[Any, Any, Any]]] = {}
    inbox: dict[int, Any] = {}
    free = list(reversed(range(width)))
    exhausted = False
    try:
        while True:
            while free and not exhausted:
                entry = next(source, None)
                if entry is None:
                    exhausted = True
                    break
                slot = free.pop()
                live[slot] = entry
                inbox[slot] = None
            if not live:
                return
            waiting: dict[type, list[tuple[int, Any]]] = {}
            for slot in sorted(inbox):
                number, loop = live[slot]
                try:
                    effect = loop.send(inbox[slot])
                except StopIteration as end:
                    del live[slot]
                    free.append(slot)
                    yield number, end.value
                    continue
                waiting.setdefault(type(effect), []).append((slot, effect))
            inbox = {}
            for kind, effects in waiting.items():
                if kind not in handlers:
                    raise TypeError(f"RCI: a loop yielded {kind.__name__}, which nothing here does")
                results = handlers[kind](effects)
                inbox.update({slot: result for (slot, _), result in zip(effects, results, strict=True)})
    finally:
        for _, loop in live.values():
            loop.close()


def watched(loop: Generator[Any, Any, Any], watch: Callable[[Any, Any], None]) -> Generator[Any, Any, Any]:
    """The same loop, with ``watch(effect, result)`` called for each of its effects: for logs and counts."""
    result = None
    try:
        while True:
            effect = loop.send(result)
            result = yield effect
            watch(effect, result)
    except StopIteration as end:
        return end.value
    finally:
        loop.close()
