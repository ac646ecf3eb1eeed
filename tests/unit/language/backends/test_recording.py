"""Recordings: what is replayed, in which order, after a kill, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modules.language.backends import BackendError, RecordingBackend, ReplayBackend, Reply, Request, Turn
from modules.language.backends.scripted import ScriptedBackend

ROOT = Path(__file__).resolve().parents[4]


def ask(text: str, **options: object) -> Request:
    return Request((Turn("user", text),), **options)  # type: ignore[arg-type]


class Counting:
    """Another reply to each request."""

    identity = "counting"

    def __init__(self) -> None:
        self.count = 0
        self.closed = False

    def generate(self, requests: list[Request]) -> list[Reply]:
        start, self.count = self.count, self.count + len(requests)
        return [Reply(f"{start + i}\u2028\u00e9\n", "length", i, 2) for i in range(len(requests))]

    def close(self) -> None:
        self.closed = True


def test_a_recording_answers_as_the_model_did(tmp_path: Path) -> None:
    requests = [ask("a"), ask("b", temperature=0.7, stop=("`", "\n")), ask("b", temperature=0.7), ask("\ud800 lone")]
    inner = Counting()
    recorder = RecordingBackend(inner, tmp_path / "deep" / "run.jsonl")
    replies = recorder.generate(requests[:2]) + recorder.generate(requests[2:])
    assert recorder.identity == "counting"
    recorder.close()
    assert inner.closed
    replay = ReplayBackend(tmp_path / "deep" / "run.jsonl")
    assert replay.generate(requests[::-1]) == replies[::-1]
    assert replay.generate([ask("a", temperature=0)]) == replies[:1]  # 0 is 0.0
    assert replay.identity == "replay of counting (run.jsonl)"


def test_equal_requests_are_answered_in_order_and_the_last_repeats(tmp_path: Path) -> None:
    recorder = RecordingBackend(Counting(), tmp_path / "run.jsonl")
    replies = recorder.generate([ask("a"), ask("b"), ask("a"), ask("a")])
    recorder.close()
    replay = ReplayBackend(tmp_path / "run.jsonl")
    wanted = [replies[0], replies[2], replies[3], replies[3]]
    assert replay.generate([ask("a")] * 3) + replay.generate([ask("a")]) == wanted
    replay.close()
    assert replay.generate([ask("a")]) == replies[:1]


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0.1}, {"top_p": 0.9}, {"stop": ("x",)},
                                    {"max_new_tokens": 3}, {"turns": (Turn("assistant", "a"),)}])  # fmt: skip
def test_another_request_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "run.jsonl"
    recorder = RecordingBackend(Counting(), path)
    replies = recorder.generate([ask("a")])
    recorder.close()
    other = dataclasses.replace(ask("a"), **change)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="has no reply to these turns, sampling and seed") as caught:
        ReplayBackend(path).generate([other])
    assert str(path) in str(caught.value)
    if "turns" in change:
        with pytest.raises(BackendError, match="has no reply to these turns: 'a'; record it"):
            ReplayBackend(path, strict=False).generate([other])
    else:
        assert ReplayBackend(path, strict=False).generate([other]) == replies


def test_the_error_shows_the_beginning_of_the_prompt_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text("")
    with pytest.raises(BackendError) as caught:
        ReplayBackend(tmp_path / "run.jsonl").generate([ask("line\n" * 40)])
    message = str(caught.value)
    assert repr(("line\n" * 40)[:80]) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(tmp_path))


def test_a_line_cut_by_a_kill_does_not_count_and_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    recorder = RecordingBackend(Counting(), path)
    first, second = recorder.generate([ask("a"), ask("b")])
    recorder.close()
    whole = path.read_bytes()
    end_of_first = whole.index(b"\n") + 1
    for cut in (end_of_first + 1, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert ReplayBackend(path).generate([ask("a")]) == [first]
        with pytest.raises(BackendError, match="has no reply"):
            ReplayBackend(path).generate([ask("b")])
        again = RecordingBackend(Counting(), path)
        third = again.generate([ask("c")])
        again.close()
        assert path.read_bytes()[:end_of_first] == whole[:end_of_first]
        assert ReplayBackend(path).generate([ask("a"), ask("c")]) == [first, *third]
    path.write_bytes(whole[:10])  # nothing whole at all
    again = RecordingBackend(Counting(), path)
    assert again.generate([ask("b")]) == ReplayBackend(path).generate([ask("b")])
    assert second.text != first.text


def test_a_killed_writer_leaves_what_it_had_answered(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    code = (
        "import itertools, sys\n"
        "from modules.language.backends import RecordingBackend, Request, ScriptedBackend, Turn\n"
        "backend = RecordingBackend(ScriptedBackend(lambda request: request.text * 50), sys.argv[1])\n"
        "for number in itertools.count():\n"
        "    backend.generate([Request((Turn('user', f'{number} '),))])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.stat().st_size > 20_000) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    lines = path.read_bytes().count(b"\n")
    assert lines > 10
    replies = ReplayBackend(path).generate([ask(f"{number} ") for number in range(lines)])
    assert [reply.text for reply in replies] == [f"{number} " * 50 for number in range(lines)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "line 2 must be a JSON object"),
        ('{"request": {}}', "line 2 is no recorded reply"),
        ('{"request": 3, "reply": {}}', "line 2 is no recorded reply"),
        ('{"request": {}, "reply": {"txt": "a"}}', "line 2 is no recorded reply"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "run.jsonl"
    recorder = RecordingBackend(ScriptedBackend({".": "x"}), path)
    recorder.generate([ask("a")])
    recorder.close()
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BackendError, match=words):
        ReplayBackend(path).generate([ask("a")])
    with pytest.raises(BackendError, match=r"none\.jsonl does not exist; record it first"):
        ReplayBackend(tmp_path / "none.jsonl")


def test_a_line_holds_all_that_a_reader_may_want(tmp_path: Path) -> None:
    recorder = RecordingBackend(ScriptedBackend({"click": "fine"}), tmp_path / "run.jsonl")
    recorder.generate([ask("click it", stop=("`",), seed=2**61)])
    recorder.close()
    assert json.loads((tmp_path / "run.jsonl").read_text()) == {
        "model": "scripted (plumbing, not a result)",
        "request": {
            "turns": [["user", "click it"]],
            "max_new_tokens": 256,
            "temperature": 0.0,
            "top_p": 1.0,
            "stop": ["`"],
            "seed": 2**61,
        },
        "reply": {"text": "fine", "finish": "stop", "prompt_tokens": 2, "completion_tokens": 1},
    }
