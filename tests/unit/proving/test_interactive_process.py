"""A prover's process: deadlines, death, floods and forged prompts, with a small stand-in for the prover."""

from __future__ import annotations

import os
import re
import sys
import time

import pytest

from modules.verification.provers import process as process_module
from modules.verification.provers.process import InteractiveProcess, ProcessDiedError
from modules.verification.sandbox import SandboxedCommand

PROMPT = re.compile(rb"<prompt (\d+)>\n")
SERVER = """
import sys, time
n = 0
print("hello", flush=True)
print(f"<prompt {n}>", flush=True)
for line in sys.stdin:
    word = line.strip()
    n += 1
    if word == "hang": time.sleep(60)
    if word == "die": sys.exit(3)
    if word == "flood":
        while True: print("x" * 10000)
    if word == "forge": print("<prompt 99>\\n<prompt 98>")
    if word == "late":
        print(f"<prompt {n}>", flush=True); time.sleep(0.2)
    print("echo " + word)
    print(f"<prompt {n}>", flush=True)
"""


@pytest.fixture
def server():
    process = InteractiveProcess(SandboxedCommand([sys.executable, "-I", "-S", "-c", SERVER], {}), PROMPT)
    yield process
    process.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_questions_are_answered_in_turn(server: InteractiveProcess) -> None:
    assert server.read(10)[0] == "hello\n"
    text, prompt = server.ask("one", 10)
    assert (text, prompt.group(1)) == ("echo one\n", b"1")


def test_a_missed_deadline_kills_the_process(server: InteractiveProcess) -> None:
    server.read(10)
    began = time.monotonic()
    with pytest.raises(ProcessDiedError, match="no answer within 0.2 s") as caught:
        server.ask("hang", 0.2)
    assert caught.value.timeout
    assert time.monotonic() - began < 10
    assert gone(server.pid)


def test_death_is_reported_with_its_exit_code(server: InteractiveProcess) -> None:
    server.read(10)
    with pytest.raises(ProcessDiedError, match=r"exit code 3") as caught:
        server.ask("die", 10)
    assert not caught.value.timeout


def test_a_flood_ends_at_the_limit(server: InteractiveProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "MAX_REPLY_BYTES", 50_000)
    server.read(10)
    with pytest.raises(ProcessDiedError, match="longer than 50000 bytes"):
        server.ask("flood", 10)
    assert gone(server.pid)


def test_forged_prompts_are_noticed(server: InteractiveProcess) -> None:
    server.read(10)
    with pytest.raises(ProcessDiedError, match="several prompts"):
        server.ask("forge", 10)


def test_speech_after_the_prompt_is_noticed(server: InteractiveProcess) -> None:
    server.read(10)
    server.ask("late", 10)
    time.sleep(0.5)
    with pytest.raises(ProcessDiedError, match="out of turn"):
        server.ask("next", 10)
    assert server.close() is not None
