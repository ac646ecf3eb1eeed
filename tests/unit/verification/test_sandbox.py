"""sandbox_command and run_command: each back end's walls, as seen from inside."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.verification import sandbox
from modules.verification.sandbox import (
    MIB,
    Backend,
    Limits,
    SandboxUnavailableError,
    available_backends,
    choose_backend,
    probe_backend,
    python_paths,
    run_command,
    sandbox_command,
)

BACKENDS = [pytest.param(backend, id=f"{backend.name}-{backend.drop_uid}") for backend in sandbox.candidate_backends()]


@pytest.fixture(params=BACKENDS)
def every_backend(request: pytest.FixtureRequest) -> Backend:
    """Each way of each back end: root with a uid of its own, and the user namespace that ordinary users get."""
    verdict = probe_backend(request.param)
    if verdict != "ok":
        pytest.skip(f"{request.param} does not work on this machine: {verdict}")
    return request.param


@pytest.fixture(params=["bubblewrap", "unshare"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """The preferred way of each back end."""
    verdict = available_backends()[request.param]
    if verdict != "ok":
        pytest.skip(f"{request.param} does not work on this machine: {verdict}")
    return choose_backend(request.param)


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def python(code: str, backend: Backend | str, **options: object) -> sandbox.CommandResult:
    argv = [sys.executable, "-I", "-S", "-c", code]
    return run_command(argv, read_only_paths=python_paths(), backend=backend, **options)


def test_some_backend_works_here() -> None:
    assert choose_backend().name in ("bubblewrap", "unshare")


def test_own_unshare_backend_needs_no_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None if name == "bwrap" else name)
    probe_backend.cache_clear()
    try:
        assert choose_backend().name == "unshare"
    finally:
        probe_backend.cache_clear()


def test_exit_code_and_streams_pass_through(backend: Backend) -> None:
    done = python(
        "import sys; print(sys.stdin.read()); print('e', file=sys.stderr); sys.exit(7)", backend, input_text="in"
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\n", "e\n")
    assert not done.timed_out
    assert not done.truncated


def test_inside_nothing_of_the_machine_is_left(
    every_backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    monkeypatch.setenv("HF_TOKEN", "t0ken")
    code = f"""
import json, os
def tries(action):
    try: action(); return "done"
    except OSError as error: return type(error).__name__
print(json.dumps({{
    "passwd": tries(lambda: open("/etc/passwd")), "secret": tries(lambda: open({str(secret)!r})),
    "write_root": tries(lambda: open("/x", "w")), "write_tmp": tries(lambda: open("/tmp/x", "w")),
    "write_package": tries(lambda: open(os.__file__, "a")), "proc": os.path.exists("/proc/self"),
    "environment": "HF_TOKEN" in os.environ, "uid": os.geteuid(), "pid": os.getpid(),
}}))
"""
    seen = json.loads(python(code, every_backend).stdout)
    assert seen.pop("uid") != 0
    assert seen.pop("pid") < 10  # a pid namespace of its own
    assert seen.pop("write_package") in ("OSError", "PermissionError")
    for refused in ("write_root", "write_tmp"):
        assert seen.pop(refused) in ("OSError", "PermissionError", "FileNotFoundError")
    assert seen == {"passwd": "FileNotFoundError", "secret": "FileNotFoundError", "proc": False, "environment": False}


def test_network_is_unreachable_even_on_loopback(every_backend: Backend, listener: int) -> None:
    with socket.create_connection(("127.0.0.1", listener), timeout=5):  # the listener is alive
        pass
    code = f"import socket\nsocket.create_connection(('127.0.0.1', {listener}), timeout=5)"
    done = python(code, every_backend)
    assert done.returncode == 1
    assert "Error" in done.stderr


def test_read_only_path_is_visible_and_read_only(backend: Backend, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    (tmp_path / "data.txt").write_text("hello")
    code = f"print(open({str(tmp_path / 'data.txt')!r}).read()); open({str(tmp_path / 'data.txt')!r}, 'w')"
    argv = [sys.executable, "-I", "-S", "-c", code]
    done = run_command(argv, read_only_paths=[*python_paths(), tmp_path], backend=backend)
    assert done.stdout == "hello\n"
    assert done.returncode == 1
    assert (tmp_path / "data.txt").read_text() == "hello"


def test_writable_tmpfs_is_bounded_and_gone_afterwards(backend: Backend) -> None:
    code = """
open("/scratch/a", "wb").write(b"x" * 100_000); print("small")
with open("/scratch/b", "wb", buffering=0) as stream:
    for _ in range(100): stream.write(b"x" * 100_000)
"""
    limits = Limits(file_size_bytes=100 * MIB)
    done = python(code, backend, writable_tmpfs={"/scratch": MIB}, limits=limits, cwd="/scratch")
    assert done.stdout == "small\n"
    assert "No space left" in done.stderr
    assert not Path("/scratch").exists()


def test_file_size_limit_is_zero_by_default(backend: Backend) -> None:
    code = "with open('/scratch/a', 'w') as stream: stream.write('x')"
    done = python(code, backend, writable_tmpfs={"/scratch": MIB})
    assert "File too large" in done.stderr


def test_wall_limit_kills_everything(backend: Backend) -> None:
    started = time.monotonic()
    done = python(
        "import os, time\ntry:\n  if os.fork() == 0: os.setsid()\nexcept OSError: pass\ntime.sleep(60)",
        backend,
        limits=Limits(wall_seconds=0.5),
    )
    assert done.timed_out
    assert done.returncode == 124
    assert time.monotonic() - started < 10


# Bounded on purpose: should containment ever fail, 60 sleepers are no harm. An open-ended bomb is never a test.
FORKS = """
import os, time
made = 0
try:
    for made in range(60):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
except OSError:
    print(made)
else:
    print("not contained")
"""


def test_processes_are_bounded(every_backend: Backend) -> None:
    done = python(FORKS, every_backend, limits=Limits(processes=16, wall_seconds=15.0))
    assert int(done.stdout) < 16
    if every_backend.drop_uid or os.geteuid() != 0:
        assert int(done.stdout) > 0  # counted; where the kernel does not count root's processes, none may be made


def test_memory_limit(backend: Backend) -> None:
    done = python("[0] * 10**10", backend, limits=Limits(memory_bytes=512 * MIB))
    assert "MemoryError" in done.stderr


def test_output_is_capped(backend: Backend) -> None:
    done = python("while True: print('x' * 1000)", backend, limits=Limits(output_bytes=5000))
    assert done.truncated
    assert len(done.stdout) == 5000


def test_new_namespaces_and_ptrace_are_refused(every_backend: Backend) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print([(call(), ctypes.get_errno()) for call in (lambda: libc.unshare(0x10000000), lambda: libc.ptrace(0, 0, 0, 0),
       lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))])
"""
    assert python(code, every_backend).stdout.strip() == "[(-1, 1), (-1, 1), (-1, 1)]"


def test_supervisor_terminates_the_program(backend: Backend) -> None:
    argv = [sys.executable, "-I", "-S", "-c", "print('up', flush=True)\nwhile True: pass"]
    command = sandbox_command(argv, read_only_paths=python_paths(), backend=backend)
    process = subprocess.Popen(command.argv, env=command.env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.stdout.read() == ""  # end-of-file: nobody holds the pipe any more
    assert process.wait(10) == 137


def test_program_dies_with_the_process_that_started_it(backend: Backend) -> None:
    argv = [sys.executable, "-I", "-S", "-c", "print('up', flush=True)\nwhile True: pass"]
    command = sandbox_command(argv, read_only_paths=python_paths(), backend=backend, limits=Limits(wall_seconds=60.0))
    parent = (
        "import subprocess, sys, json, time\na, e = json.loads(sys.argv[1])\nsubprocess.Popen(a, env=e)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, json.dumps(command)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "up\n"
        process.kill()
        process.wait()
        assert process.stdout.read() == ""


def test_starting_thread_may_end_before_the_program(backend: Backend) -> None:
    argv = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(0.5); print('alive')"]
    command = sandbox_command(argv, read_only_paths=python_paths(), backend=backend)
    started: list[subprocess.Popen[str]] = []
    thread = threading.Thread(
        target=lambda: started.append(
            subprocess.Popen(command.argv, env=command.env, stdout=subprocess.PIPE, text=True)
        )
    )
    thread.start()
    thread.join()
    assert started[0].communicate(timeout=20)[0] == "alive\n"


def test_unavailable_isolation_is_an_error_unless_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "probe_backend", lambda backend: "refused by the kernel")
    with pytest.raises(SandboxUnavailableError, match="refused by the kernel.*allow_unsafe_exec=True"):
        choose_backend()
    assert choose_backend(allow_unsafe_exec=True).name == "none"


def test_where_the_kernel_refuses_namespaces_programs_are_refused_and_formulas_still_compared() -> None:
    """A container without rights, made by our own filter."""
    root = Path(__file__).parents[3]
    code = """
from modules.verification.equivalence import SymbolicEquivalence
from modules.verification.sandbox import SandboxUnavailableError
from modules.verification.server import PythonSandbox
try: PythonSandbox()
except SandboxUnavailableError as error: print(error)
with SymbolicEquivalence() as checker: print(checker.compare(r"\\sqrt{8}", r"2\\sqrt{2}").reason)
with PythonSandbox(preload=(), allow_unsafe_exec=True) as box:
    programs = ("print(1)", "import os; os.fork()", "import os; os.kill(1, 0)")
    print(*[box.run(program).status for program in programs])
"""
    done = run_command(
        [sys.executable, "-c", code],
        backend="none",
        allow_unsafe_exec=True,
        env={"PYTHONPATH": str(root)},
        limits=Limits(wall_seconds=200.0, cpu_seconds=None, memory_bytes=None, open_files=None, processes=None),
    )
    lines = done.stdout.split("\n")
    assert "no isolation to run untrusted code in" in lines[0], done.stderr
    assert "unshare" in lines[0]
    assert lines[1] == "symbolic"
    assert lines[2] == "ok error error"


def test_unsafe_backend_still_limits() -> None:
    with pytest.raises(SandboxUnavailableError, match="'none' isolates nothing"):
        choose_backend("none")
    done = python(
        "import os\ntry: os.fork()\nexcept OSError: print('refused', flush=True)\nwhile True: pass",
        "none",
        allow_unsafe_exec=True,
        limits=Limits(wall_seconds=2.0),
    )
    assert done.timed_out
    assert done.stdout == "refused\n"  # nothing would count its processes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"argv": ["no-such-program"]}, "program 'no-such-program' not found"),
        ({"argv": ["cat"], "read_only_paths": ["/no/such/path"]}, "'/no/such/path' does not exist"),
        ({"argv": ["cat"], "backend": "docker"}, "must be bubblewrap, unshare or none, got 'docker'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sandbox_command(**arguments)


def test_bad_limits() -> None:
    with pytest.raises(ValueError, match="wall_seconds must be positive, got 0"):
        Limits(wall_seconds=0)


def test_no_zombie_is_left(backend: Backend) -> None:
    import psutil

    for _ in range(3):
        python("import os\nif os.fork() == 0: os._exit(0)", backend)
        python("while True: pass", backend, limits=Limits(wall_seconds=0.2))
    statuses = [child.status() for child in psutil.Process().children(recursive=True)]
    assert psutil.STATUS_ZOMBIE not in statuses
