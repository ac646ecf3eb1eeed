"""Run any external program in isolation: no network, a private read-only root, limits, no privileges, no environment.

``sandbox_command`` turns an argument vector into one that starts it isolated; ``run_command`` runs it to its end with
bounded output. Two back ends give the same walls, probed once per process and tried in this order:

  bubblewrap   ``bwrap`` where installed (it may hold rights that a bare user namespace lacks, e.g. under AppArmor);
  unshare      the same namespaces by system calls of our own (``isolate.py``), as root or as an ordinary user.

What every back end gives: user or uid separation, mount, pid, network, IPC and UTS namespaces; a root that holds only
the paths named; all capabilities dropped, no_new_privs; rlimits; a seccomp list against kernel-facing calls. Where
neither works, ``SandboxUnavailableError``, unless ``allow_unsafe_exec=True`` accepts rlimits and seccomp alone.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

LAUNCHER = Path(__file__).resolve().parent / "isolate.py"
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
DEFAULT_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent"}
EXIT_WALL, EXIT_ISOLATION = 124, 125
MIB = 1 << 20
_uid_counter = itertools.count()


class SandboxUnavailableError(RuntimeError):
    """No isolation back end works here, and ``allow_unsafe_exec`` was not given."""


@dataclass(frozen=True)
class Limits:
    """Limits of one sandboxed program; None leaves a limit as the caller's process has it.

    Attributes:
        wall_seconds: wall time; everything in the sandbox is then killed (exit code 124).
        cpu_seconds: CPU time of one process (whole seconds, at least 1).
        memory_bytes: address space of one process (RLIMIT_AS).
        file_size_bytes: size of any file written; 0 forbids writing to files.
        open_files: open file descriptors.
        processes: processes and threads of the sandbox's user. Where the kernel does not count them (root's, or all
            of a user's outside a sandbox), a program may then start none at all; None leaves them free.
        output_bytes: bytes of output kept by ``run_command``; more ends the program.
    """

    wall_seconds: float | None = 10.0
    cpu_seconds: float | None = 10.0
    memory_bytes: int | None = 1024 * MIB
    file_size_bytes: int | None = 0
    open_files: int | None = 64
    processes: int | None = 32
    output_bytes: int = 65_536

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (value < 0 or (value == 0 and name not in ("file_size_bytes", "processes"))):
                raise ValueError(f"Limits: {name} must be positive, got {value}")


@dataclass(frozen=True)
class Backend:
    """An isolation back end: ``name`` is bubblewrap, unshare or none; ``drop_uid``: root changes to an unused uid."""

    name: str
    drop_uid: bool


class SandboxedCommand(NamedTuple):
    """Arguments and environment for ``subprocess.Popen(argv, env=env)``; no preexec_fn, safe beside threads."""

    argv: list[str]
    env: dict[str, str]


@dataclass(frozen=True)
class CommandResult:
    """End of a sandboxed program. ``returncode``: its own, 128+n for signal n, 124 at the wall limit."""

    returncode: int
    stdout: str
    stderr: str
    timed_out: bool
    truncated: bool
    seconds: float


def package_folders() -> list[str]:
    """Folders of installed packages on this interpreter's path (not the project, not the working folder)."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and os.path.isdir(path)]


def python_paths() -> list[str]:
    """Read-only paths that this interpreter and its installed packages need inside a sandbox."""
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    paths.update(package_folders())
    if "/usr" in paths:  # a distribution's Python: its folders only, not all of /usr
        paths.discard("/usr")
        paths |= {"/usr/bin", "/usr/local/lib"}
    return sorted(path for path in paths if os.path.exists(path))


def _mount_plan(paths: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Real paths to bind, outermost only, and the symbolic links to recreate so that the given names work."""
    real: set[str] = set()
    links: dict[str, str] = {}
    queue = [os.path.abspath(path) for path in paths]
    while queue:
        path = queue.pop()
        # Any component may be a link (/lib -> usr/lib): walk from the top and recreate the first one met.
        parts, walked = Path(path).parts, Path("/")
        for index, part in enumerate(parts[1:], start=1):
            walked = walked / part
            if walked.is_symlink():
                links[str(walked)] = os.readlink(walked)
                target = Path(os.path.normpath(walked.parent / os.readlink(walked)))
                queue.append(str(target.joinpath(*parts[index + 1 :])))
                break
        else:
            if not os.path.exists(path):
                raise ValueError(f"sandbox: read-only path '{path}' does not exist")
            real.add(path)
    binds = sorted(path for path in real if not any(str(parent) in real for parent in Path(path).parents))
    kept = [(link, to) for link, to in sorted(links.items()) if not any(Path(link).is_relative_to(b) for b in binds)]
    return binds, kept


def _bubblewrap_prefix(spec: dict, backend: Backend) -> list[str]:
    """The bwrap command line up to and including the in-sandbox stage of the launcher."""
    prefix = [spec["bwrap"], "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    prefix += ["--unshare-cgroup-try", "--hostname", "sandbox"]
    if os.geteuid() != 0:
        prefix += ["--unshare-user"]
    elif backend.drop_uid:
        prefix += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
    else:
        prefix += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    # Parents made implicitly may come out as 0700, which the unprivileged uid could not pass.
    made = [link for link, _ in spec["symlinks"]] + [path for path, _ in spec["tmpfs"]]
    made += [*spec["read_only"], "/dev/null"]
    parents = {str(parent) for path in made for parent in Path(path).parents} - {"/"}
    for parent in sorted(parents):
        if not any(Path(parent).is_relative_to(path) for path in spec["read_only"]):
            prefix += ["--perms", "0755", "--dir", parent]
    for link, target in spec["symlinks"]:
        prefix += ["--symlink", target, link]
    for path in spec["read_only"]:
        prefix += ["--ro-bind", path, path]
    for name in ("null", "zero", "full", "random", "urandom"):
        prefix += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for path, size in spec["tmpfs"]:
        prefix += ["--perms", "1777", "--size", str(size), "--tmpfs", path]
    if spec["proc"]:
        prefix += ["--proc", "/proc"]
    inner = {**spec, "stage": "execute", "symlinks": [], "read_only": [], "tmpfs": []}
    return [*prefix, "--remount-ro", "/", "--", sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(inner), "--"]


def _build(
    argv: Sequence[str],
    backend: Backend,
    read_only_paths: Iterable[str],
    writable_tmpfs: Mapping[str, int],
    limits: Limits,
    env: Mapping[str, str] | None,
    cwd: str,
    seccomp: str | None,
    proc: bool,
) -> SandboxedCommand:
    program = shutil.which(argv[0])
    if program is None:
        raise ValueError(f"sandbox: program '{argv[0]}' not found")
    program = os.path.abspath(program)
    wanted = [*(p for p in SYSTEM_LIBRARIES if os.path.exists(p)), *(os.fspath(p) for p in read_only_paths), program]
    if backend.name == "bubblewrap":
        wanted += [*python_paths(), sys.executable, str(LAUNCHER)]
    binds, links = _mount_plan(wanted)
    # A uid that nothing else uses, per command: processes are then counted, and shielded, per sandbox.
    uid = 0x70000000 + (os.getpid() * 64 + next(_uid_counter) % 64) % 0x01000000
    # RLIMIT_NPROC does not bind root, in whatever user namespace: one that keeps root's uid must not fork at all.
    uncounted = backend.name == "none" or (os.geteuid() == 0 and not backend.drop_uid)
    if uncounted and limits.processes is not None and seccomp != "program":
        seccomp = "forkless"
    environment = {**DEFAULT_ENVIRONMENT, **(env or {})}
    spec = {
        "stage": "supervise",
        "backend": backend.name,
        "uid": uid if backend.drop_uid else None,
        "symlinks": links,
        "read_only": binds,
        "tmpfs": sorted(writable_tmpfs.items()),
        "proc": proc,
        "cwd": cwd,
        "env": environment,
        "limits": asdict(limits),
        "seccomp": seccomp,
    }
    if backend.name == "bubblewrap":
        spec["bwrap"] = shutil.which("bwrap")
        spec["bubblewrap"] = _bubblewrap_prefix(spec, backend)
    launcher = [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(spec), "--", program, *argv[1:]]
    return SandboxedCommand(launcher, environment)


_PROBE = """
import os, socket
left = [path for path in ("/etc/passwd", "/home", "/root/.ssh", "/var") if os.path.exists(path)]
names = [name for _, name in socket.if_nameindex()]
writable = os.access("/", os.W_OK)
print("isolated" if os.geteuid() and not left and names in (["lo"], []) and not writable else (left, names, writable))
"""


@functools.cache
def probe_backend(backend: Backend) -> str:
    """Run a small program under ``backend``: "ok" if it finds itself isolated, else the reason why not."""
    if backend.name == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    limits = Limits(wall_seconds=20.0, cpu_seconds=None, memory_bytes=None)
    argv = [sys.executable, "-I", "-S", "-c", _PROBE]
    try:
        command = _build(argv, backend, python_paths(), {}, limits, None, "/", "command", False)
        done = subprocess.run(
            command.argv, env=command.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    if done.returncode == 0 and done.stdout.strip() == "isolated":
        return "ok"
    return (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]


def candidate_backends() -> list[Backend]:
    """Back ends in order of preference. Root first tries to change its uid, then (few rights) a user namespace."""
    drops = (True, False) if os.geteuid() == 0 else (False,)
    return [Backend(name, drop) for name in ("bubblewrap", "unshare") for drop in drops]


def available_backends() -> dict[str, str]:
    """Name of each back end to "ok" or the reason why it cannot be used here."""
    report: dict[str, str] = {}
    for backend in candidate_backends():
        if report.get(backend.name) != "ok":
            report[backend.name] = probe_backend(backend)
    return report


def choose_backend(name: str | None = None, *, allow_unsafe_exec: bool = False) -> Backend:
    """The first back end that works, or the one named.

    Args:
        name: "bubblewrap", "unshare", "none" (needs ``allow_unsafe_exec``) or None for the first that works.
        allow_unsafe_exec: accept rlimits and seccomp without namespaces when nothing better works.

    Raises:
        ValueError: unknown name.
        SandboxUnavailableError: none works, or the named one does not.
    """
    if name not in (None, "bubblewrap", "unshare", "none"):
        raise ValueError(f"sandbox: backend must be bubblewrap, unshare or none, got '{name}'")
    reasons = []
    for backend in candidate_backends():
        if name in (None, backend.name):
            verdict = probe_backend(backend)
            if verdict == "ok":
                return backend
            reasons.append(f"{backend.name}{' (own uid)' if backend.drop_uid else ''}: {verdict}")
    if allow_unsafe_exec and name in (None, "none"):
        return Backend("none", drop_uid=False)
    raise SandboxUnavailableError(
        "no isolation to run untrusted code in: "
        + ("; ".join(reasons) or "backend 'none' isolates nothing")
        + ". Install bubblewrap or allow user namespaces, or accept the risk with allow_unsafe_exec=True"
    )


def sandbox_command(
    argv: Sequence[str],
    *,
    read_only_paths: Iterable[str | os.PathLike[str]] = (),
    writable_tmpfs: Mapping[str, int] | None = None,
    limits: Limits | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str = "/",
    backend: str | Backend | None = None,
    allow_unsafe_exec: bool = False,
    seccomp: str | None = "command",
    proc: bool = False,
) -> SandboxedCommand:
    """Arguments and environment that start ``argv`` in isolation.

    Args:
        argv: program (a path, or a name looked up on PATH) and its arguments.
        read_only_paths: files and folders visible inside, at the same names; the program itself and the system's
            library folders always are. ``python_paths()`` gives what this interpreter needs.
        writable_tmpfs: folder inside -> size in bytes; empty at start, gone at the end.
        limits: see ``Limits``; ``output_bytes`` binds in ``run_command`` only.
        env: environment of the program, on top of PATH, LANG and HOME; nothing of the caller's passes.
        cwd: working folder inside.
        backend: name or ``Backend``; None takes the first that works.
        seccomp: "command" refuses kernel-facing calls, "program" also processes, sockets and signals (this very
            program could then not be started, so it is for code that installs it itself), None installs no filter.
        proc: mount a /proc of the sandbox's own processes.

    Returns:
        ``(argv, env)`` for ``subprocess.Popen``. Its pid is a supervisor that forwards stdin, stdout and stderr and
        the exit code, and that kills all inside on SIGTERM, at the wall limit and when the caller's process dies.

    Raises:
        ValueError: unknown program or missing path.  SandboxUnavailableError: no isolation here.
    """
    chosen = backend if isinstance(backend, Backend) else choose_backend(backend, allow_unsafe_exec=allow_unsafe_exec)
    paths = [os.fspath(path) for path in read_only_paths]
    return _build(argv, chosen, paths, writable_tmpfs or {}, limits or Limits(), env, cwd, seccomp, proc)


def run_command(
    argv: Sequence[str], *, input_text: str = "", limits: Limits | None = None, **options: object
) -> CommandResult:
    """Run ``argv`` isolated until its end; ``options`` as ``sandbox_command``.

    Output beyond ``limits.output_bytes`` ends the program (``truncated``); the input is at most what a pipe or
    a temporary file holds and is not otherwise limited.
    """
    limits = limits or Limits()
    command = sandbox_command(argv, limits=limits, **options)  # pyright: ignore[reportArgumentType]
    started = time.monotonic()
    with tempfile.TemporaryFile() as stdin:
        stdin.write(input_text.encode())
        stdin.seek(0)
        process = subprocess.Popen(
            command.argv, env=command.env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err, truncated = _read_bounded(process, limits)
    returncode = process.wait()
    if returncode == EXIT_ISOLATION and err.startswith(b"isolate:"):
        raise SandboxUnavailableError(err.decode(errors="replace").strip())
    stdout, stderr = (part[: limits.output_bytes].decode(errors="replace") for part in (out, err))
    return CommandResult(returncode, stdout, stderr, returncode == EXIT_WALL, truncated, time.monotonic() - started)


def _read_bounded(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, bytes, bool]:
    import selectors

    assert process.stdout is not None
    assert process.stderr is not None
    parts: dict[int, bytearray] = {0: bytearray(), 1: bytearray()}
    truncated = False
    with selectors.DefaultSelector() as selector, process.stdout, process.stderr:
        selector.register(process.stdout, selectors.EVENT_READ, 0)
        selector.register(process.stderr, selectors.EVENT_READ, 1)
        while selector.get_map():
            for key, _ in selector.select():
                chunk = os.read(key.fd, 65_536)
                if not chunk:
                    selector.unregister(key.fileobj)
                    continue
                kept = parts[key.data]
                kept += chunk[: limits.output_bytes + 1 - len(kept)]
                if len(kept) > limits.output_bytes and not truncated:
                    truncated = True
                    process.terminate()
    return bytes(parts[0]), bytes(parts[1]), truncated


def without_wall(limits: Limits) -> Limits:
    """The same limits for a long-lived server process: no wall or CPU limit of its own."""
    return replace(limits, wall_seconds=None, cpu_seconds=None)
