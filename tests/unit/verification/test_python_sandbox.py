"""PythonSandbox: hostile programs meet limits and walls, the pool survives them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from modules.verification.sandbox import Limits, SandboxUnavailableError, available_backends
from modules.verification.server import PROGRAM_LIMITS, ForkServerPool, PythonSandbox

SHORT = Limits(wall_seconds=0.5, cpu_seconds=5.0, open_files=16, processes=0)


@pytest.fixture(scope="module", params=["bubblewrap", "unshare"])
def box(request: pytest.FixtureRequest) -> Iterator[PythonSandbox]:
    verdict = available_backends()[request.param]
    if verdict != "ok":
        pytest.skip(f"{request.param} does not work on this machine: {verdict}")
    with PythonSandbox(preload=("math",), backend=request.param) as sandbox:
        yield sandbox


def test_output_and_value(box: PythonSandbox) -> None:
    result = box.run("print('hello')\nanswer = 6 * 7", variable="answer")
    assert result.ok
    assert result.output == "hello\n"
    assert result.value == {"kind": "rational", "text": "42/1"}


def test_each_program_starts_afresh(box: PythonSandbox) -> None:
    assert box.run("import math; math.pi = 3").ok
    assert box.run("import math; print(math.pi)").output.startswith("3.14")


def test_exceptions_are_reported(box: PythonSandbox) -> None:
    result = box.run("1 / 0")
    assert result.status == "error"
    assert result.error == "ZeroDivisionError: division by zero"
    assert box.run("def f(:").status == "error"
    assert box.run("x = '\ud800'\nprint(1)").status == "error"


def test_infinite_loops_are_killed(box: PythonSandbox) -> None:
    started = time.monotonic()
    assert box.run("while True: pass", limits=SHORT).status == "timeout"
    assert box.run("import time; time.sleep(60)", limits=SHORT).status == "timeout"
    deaf = "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, 1)\n  except (OSError, ValueError): pass\n"
    assert box.run(deaf + "while True: pass", limits=SHORT).status == "timeout"
    assert time.monotonic() - started < 12


def test_cpu_limit_is_a_timeout_too(box: PythonSandbox) -> None:
    limits = Limits(wall_seconds=20.0, cpu_seconds=1.0, processes=0)
    result = box.run("while True: pass", limits=limits)
    assert result.status == "timeout"
    assert result.seconds < 15


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/usr/bin/id'])",
        "import multiprocessing; p = multiprocessing.Process(target=print); p.start()",
        "import os; os.execv('/usr/bin/id', ['id'])",
        "import threading; threading.Thread(target=print).start()",
    ],
)
def test_no_second_process_or_thread(box: PythonSandbox, code: str) -> None:
    result = box.run(code)
    assert result.status == "error"
    assert "Operation not permitted" in str(result.error) or "can't start new thread" in str(result.error)


def test_huge_list_is_a_memory_error(box: PythonSandbox) -> None:
    assert box.run("[0] * 10**10").error == "MemoryError: memory limit exceeded"
    assert "Cannot allocate memory" in str(box.run("import mmap; mmap.mmap(-1, 2**31)").error)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc/shadow", "/root/.ssh", "/proc/self/environ", "/var/log", __file__]
)
def test_files_of_the_machine_are_absent(box: PythonSandbox, path: str) -> None:
    assert str(box.run(f"import os; os.stat({path!r})").error).startswith("FileNotFoundError")


def test_file_system_cannot_be_written(box: PythonSandbox) -> None:
    for path in ("/x", "/tmp/x", os.__file__, str(Path(sys.prefix) / "x"), "/dev/shm/x"):
        result = box.run(f"with open({path!r}, 'a') as f: f.write('x')")
        assert result.status == "error"
        assert str(result.error).split(":")[0] in ("OSError", "PermissionError", "FileNotFoundError")


def test_sockets_are_refused(box: PythonSandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        result = box.run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)")
        assert result.status == "error"
        with pytest.raises(TimeoutError):
            server.accept()


def test_environment_is_stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "t0ken-visible")
    with PythonSandbox(preload=()) as sandbox:
        assert "t0ken" not in sandbox.run("import os; print(os.environ)").output


def test_signals_reach_nobody_else(box: PythonSandbox) -> None:
    for target in ("1", "-1", "0", "os.getppid()"):
        assert box.run(f"import os; os.kill({target}, 9)").status == "error"
    assert box.run("print(1)").ok
    assert box.restarts == 0


def test_huge_output_is_capped(box: PythonSandbox) -> None:
    result = box.run("while True: print('x' * 10000)", limits=Limits(output_bytes=1000, processes=0))
    assert result.status == "output"
    assert len(result.output) == 1000
    result = box.run("answer = 'x' * 10**7", variable="answer")
    assert result.status == "output"


def test_only_the_pipes_are_open(box: PythonSandbox) -> None:
    code = "import os\nfor fd in range(300):\n  try: os.fstat(fd); print(fd, end=' ')\n  except OSError: pass"
    assert box.run(code).output.split() == ["0", "1", "2", "3"]


def test_limits_cannot_be_raised(box: PythonSandbox) -> None:
    code = "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
    assert "not allowed to raise" in str(box.run(code).error)


def test_crash_of_the_interpreter_is_a_result(box: PythonSandbox) -> None:
    assert box.run("import ctypes; ctypes.string_at(0)").status == "killed"
    deep = box.run("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", limits=SHORT)
    assert deep.status in ("killed", "error", "timeout")
    assert box.run("import os; os._exit(3)").status == "error"
    assert box.run("raise SystemExit(3)").ok


def test_forged_results_are_only_data(box: PythonSandbox) -> None:
    for forged in (b"[1, 2", b"[]", b'{"value": {"kind": 3}}', b"[" * 50_000, b"\xff\xfe"):
        result = box.run(f"import os; os.write(3, {forged!r}); os._exit(0)")
        assert result.status in ("ok", "error")
    assert box.run("print(1)").ok


def test_survives_many_runs_without_zombies(box: PythonSandbox) -> None:
    for i in range(150):
        assert box.run(f"print({i})").output == f"{i}\n"
    assert box.restarts == 0
    family = psutil.Process().children(recursive=True)
    assert psutil.STATUS_ZOMBIE not in [process.status() for process in family]


@pytest.mark.slow
def test_survives_thousands_of_runs(box: PythonSandbox) -> None:
    programs = ("print({})", "1 / 0", "import os; os.fork()", "[0] * 10**10", "import os; os._exit({} % 7)")
    for i in range(3000):
        result = box.run(programs[i % len(programs)].format(i))
        assert result.status == ("ok" if i % len(programs) == 0 else "error")
    assert box.restarts == 0


def test_killed_server_is_replaced(box: PythonSandbox) -> None:
    assert box.run("print(1)").ok
    before = box.restarts
    for process in psutil.Process(next(iter(box._servers)).process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the first one takes the others with it
            process.kill()
    assert box.run("print(2)").output == "2\n"
    assert box.restarts == before + 1


def test_server_killed_in_the_middle_of_a_run(box: PythonSandbox) -> None:
    assert box.run("print(1)").ok
    supervisor = next(iter(box._servers)).process.pid
    timer = threading.Timer(0.3, lambda: os.kill(supervisor, signal.SIGKILL))
    timer.start()
    result = box.run("import time; time.sleep(1.0); print('again')")
    timer.join()
    assert result.output == "again\n"  # tried once more on a new server


def test_threads_share_a_pool() -> None:
    with PythonSandbox(3, preload=()) as sandbox:
        results = sandbox.map([f"print({i})" for i in range(40)])
        assert [result.output for result in results] == [f"{i}\n" for i in range(40)]
        assert 1 <= len(sandbox._servers) <= 3
        started = time.monotonic()
        slow = sandbox.map(["import time; time.sleep(2)"] * 3)
        assert all(result.ok for result in slow)
        assert time.monotonic() - started < 5.5  # at once, not one after the other


def test_forked_process_uses_servers_of_its_own() -> None:
    with PythonSandbox(preload=()) as sandbox:
        assert sandbox.run("print(1)").ok
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if sandbox.run("print(2)").output == "2\n" else 1
                sandbox.close()
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert sandbox.run("print(3)").output == "3\n"
        assert sandbox.restarts == 0


def test_close_ends_all_processes() -> None:
    sandbox = PythonSandbox(2, preload=())
    sandbox.map(["print(1)"] * 4)
    family = [p for server in sandbox._servers for p in psutil.Process(server.process.pid).children(recursive=True)]
    assert family
    sandbox.close()
    sandbox.close()
    assert not psutil.wait_procs(family, timeout=5)[1]
    with pytest.raises(RuntimeError, match="the pool is closed"):
        sandbox.run("print(1)")


def test_interpreter_exit_leaves_nothing_behind() -> None:
    code = (
        "from modules.verification.server import PythonSandbox\nimport psutil\n"
        "s = PythonSandbox(preload=()); s.run('print(1)')\n"
        "print(*[p.pid for p in psutil.Process().children(recursive=True)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_unavailable_isolation_raises_early(monkeypatch: pytest.MonkeyPatch) -> None:
    from modules.verification import sandbox

    monkeypatch.setattr(sandbox, "probe_backend", lambda backend: "refused")
    with pytest.raises(SandboxUnavailableError, match="allow_unsafe_exec=True"):
        PythonSandbox()
    with PythonSandbox(preload=(), allow_unsafe_exec=True) as unsafe:
        assert unsafe.backend.name == "none"
        assert unsafe.run("print(1)").output == "1\n"
        assert unsafe.run("while True: pass", limits=SHORT).status == "timeout"
        assert unsafe.run("import os; os.fork()").status == "error"


def test_broken_server_names_its_reason() -> None:
    with (
        PythonSandbox(preload=("no_such_module_here",)) as sandbox,
        pytest.raises(SandboxUnavailableError, match="No module named 'no_such_module_here'"),
    ):
        sandbox.run("print(1)")


def test_trusted_handler_is_limited_and_replaced(tmp_path: Path) -> None:
    handler = tmp_path / "handler.py"
    handler.write_text(
        "import os, time\n"
        "def handle(text):\n"
        "    if text == 'loop': \n        while True: pass\n"
        "    if text == 'memory': return str(len([0] * 10**10))\n"
        "    if text == 'die': os._exit(1)\n"
        "    if text == 'deep': return handle(text)\n"
        "    return text.upper() + str(os.getpid())\n"
    )
    with ForkServerPool(handler=handler) as pool:
        replies = pool.call(["a", "loop", "b", "memory", "c", "die", "d", "deep", "e"], limits=SHORT)
        assert [reply.get("value", reply.get("error")) for reply in replies] == [
            "A1", "timeout", "B1", "memory", "C1", "crashed", "D1", "recursion", "E1",
        ]  # fmt: skip
        assert all(reply["seconds"] < 10 for reply in replies)
        assert pool.restarts == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PythonSandbox(0), "size must be >= 1, got 0"),
        (lambda: PythonSandbox(limits=Limits(wall_seconds=None)), "wall_seconds must be set"),
        (lambda: ForkServerPool(1, backend="chroot"), "must be bubblewrap, unshare or none"),
        (lambda: PythonSandbox().run("", variable="a", call="b"), "variable or call, not both"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_default_limits_are_those_of_the_sheet() -> None:
    assert PROGRAM_LIMITS.memory_bytes == 1 << 30
    assert PROGRAM_LIMITS.file_size_bytes == 0
    assert PROGRAM_LIMITS.open_files == 16
    assert PROGRAM_LIMITS.output_bytes == 65_536
