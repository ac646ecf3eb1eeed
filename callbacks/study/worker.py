"""A process that runs one command line after another, so that imports are paid once.

``python -m callbacks.study.worker module:function`` reads one JSON request a line from stdin and answers each with one
JSON line on stdout. ``function`` takes a list of arguments and returns an exit code, as ``train:main`` does. When stdin
closes the process leaves at once, in the middle of a run too: a study that dies takes its workers with it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any


def _listen(requests: IO[str], todo: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in requests:
        todo.put(json.loads(line))
    os._exit(0)


@contextlib.contextmanager
def _output_to(path: Path, mode: str) -> Iterator[None]:
    """Standard output and error, of native code too, into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = os.dup(1), os.dup(2)
    with open(path, mode, encoding="utf-8") as log:
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


def main(argv: Sequence[str]) -> None:
    """Serve requests ``{"arguments": [...], "log": path, "append": bool}`` with ``{"code": int, "seconds": float}``."""
    module, _, function = argv[0].partition(":")
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # no run reads the requests
    os.dup2(2, 1)  # nor writes into the replies
    todo: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, todo), daemon=True).start()
    run = getattr(importlib.import_module(module), function)
    while True:
        request = todo.get()
        start = time.monotonic()
        with _output_to(Path(request["log"]), "a" if request["append"] else "w"):
            try:
                code = run(request["arguments"])
            except BaseException:  # the boundary: the next run goes on
                traceback.print_exc()
                code = 1
        gc.collect()  # modules and trainers refer to each other
        replies.write(json.dumps({"code": code, "seconds": time.monotonic() - start}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
