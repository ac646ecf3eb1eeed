"""Start one program in isolation: namespaces, private root, resource limits, dropped privileges, seccomp.

This file is a *script*, run by path as ``python -I -S isolate.py SPEC -- ARGV...`` from
``modules.verification.sandbox.sandbox_command``; it needs the standard library alone and imports nothing of ours.

Stages (each a process):
  supervisor  stays outside; forwards the exit code, kills everything at the wall limit, on SIGTERM or when the process
              that started it dies (a pidfd, not PR_SET_PDEATHSIG, which fires when the starting *thread* ends).
  init        pid 1 of the new pid namespace, no capability left; reaps orphans. (bubblewrap brings its own.)
  program     limits set, no_new_privs, seccomp filter, then execve(ARGV).

Exit codes: the program's own; 128+n if signal n killed it; 124 at the wall limit; 125 if isolation itself failed.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
ALL_NAMESPACES = 0x7E020080
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_MOUNT_SETATTR = 442
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
EXIT_WALL, EXIT_ISOLATION = 124, 125
NOBODY = 65534
DEVICES = ("null", "zero", "full", "random", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    _check(libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    _check(libc.setns(fd, flags), "setns")


def prctl(option: int, value: int = 0) -> None:
    _check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


# ------------------------------------------------------------------------------------------------------------ seccomp
# Numbers of the system calls refused (x86_64, aarch64); None where the architecture has no such call.
_ALWAYS = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "open_by_handle_at": (304, 265), "acct": (163, 89), "swapon": (167, 224), "reboot": (169, 142),
}  # fmt: skip
# No child and no thread.
_FORKLESS = {"clone": (56, 220), "fork": (57, None), "vfork": (58, None)}
# A single-process program needs none of these either: no other program, no socket, no signal to others, and no memory
# that RLIMIT_AS does not count.
_SINGLE_PROCESS = {
    **_FORKLESS, "execve": (59, 221), "execveat": (322, 281),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "pidfd_send_signal": (424, 424), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, AUDIT_ARCH, clone
_CLONE3 = 435


def seccomp_filter(mode: str) -> bytes | None:
    """BPF program refusing the calls of ``mode`` (command, forkless or program); None on an unknown architecture."""
    if platform.machine() not in _ARCHITECTURES or struct.calcsize("P") != 8:
        return None
    column, audit_arch, clone = _ARCHITECTURES[platform.machine()]
    load, jump_eq, jump_ge, jump_set, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    code = [(load, 0, 0, 4), (jump_eq, 1, 0, audit_arch), (ret, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:  # the x32 calls would slip past a list of x86_64 numbers
        code += [(jump_ge, 0, 1, 0x40000000), (ret, 0, 0, refuse)]
    # The flags of clone3 lie behind a pointer: "absent" makes libc fall back to clone, whose flags can be seen.
    code += [(jump_eq, 0, 1, _CLONE3), (ret, 0, 0, absent)]
    refused = {**_ALWAYS, **{"command": {}, "forkless": _FORKLESS, "program": _SINGLE_PROCESS}[mode]}
    for numbers in refused.values():
        if numbers[column] is not None:
            code += [(jump_eq, 0, 1, numbers[column]), (ret, 0, 0, refuse)]
    if mode == "command":
        code += [(jump_eq, 0, 3, clone), (load, 0, 0, 16), (jump_set, 0, 1, ALL_NAMESPACES), (ret, 0, 0, refuse)]
    code += [(ret, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def install_seccomp(mode: str) -> bool:
    """Install the filter for this process and its children; False where the kernel or architecture has none."""
    program = seccomp_filter(mode)
    if program is None:
        return False
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    block = ctypes.create_string_buffer(header, len(header))
    return libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(block)), 0, 0) == 0


# --------------------------------------------------------------------------------------------------------- privileges
def drop_privileges(uid: int | None) -> None:
    """Change to ``uid`` (root only), then give up every capability and the means to gain one by execve."""
    if uid is not None:
        for capability in range(64):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.setgroups([])
        for candidate in (uid, NOBODY):  # a container may map 65,536 ids only
            try:
                os.setresgid(candidate, candidate, candidate)
                os.setresuid(candidate, candidate, candidate)
                break
            except OSError:
                if candidate == NOBODY:
                    raise
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    libc.prctl(PR_CAP_AMBIENT, 4, 0, 0, 0)
    header, data = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(libc.capset(header, data), "capset")


def set_limits(limits: dict[str, Any]) -> None:
    """Hard resource limits of this process; keys as ``Limits``, a value None leaves the limit as it is."""
    names = {
        "memory_bytes": resource.RLIMIT_AS,
        "file_size_bytes": resource.RLIMIT_FSIZE,
        "open_files": resource.RLIMIT_NOFILE,
        "processes": resource.RLIMIT_NPROC,
    }
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for key, which in names.items():
        if limits.get(key) is not None:
            value = int(limits[key])
            _, hard = resource.getrlimit(which)
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            resource.setrlimit(which, (value, value))
    if limits.get("cpu_seconds") is not None:
        seconds = max(1, int(limits["cpu_seconds"]))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


# ------------------------------------------------------------------------------------------------------- private root
def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _check(libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def _mount_setattr(target: str, attributes: int, recursive: bool) -> None:
    block = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    _check(
        libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, block, ctypes.c_size_t(32)), "mount_setattr"
    )


def _bind_read_only(source: str, target: str, device: bool = False) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.exists(target):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, MS_BIND | MS_REC)
    _mount_setattr(target, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | (0 if device else MOUNT_ATTR_NODEV), True)


def build_root(spec: dict[str, Any]) -> None:
    """Replace / by a fresh tmpfs that holds the read-only paths, the writable tmpfs and five devices; nothing else."""
    os.umask(0o022)
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=0755")
    os.mkdir("/tmp/new", 0o755)
    os.mkdir("/tmp/old", 0o755)
    pivot_root = {"x86_64": 155, "aarch64": 41}.get(platform.machine())
    if pivot_root is None:
        raise OSError(errno.ENOSYS, f"pivot_root: unknown on {platform.machine()}; install bubblewrap")
    os.chdir("/tmp")
    _check(libc.syscall(pivot_root, b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    for link, destination in spec["symlinks"]:
        os.makedirs(os.path.dirname("/new" + link), exist_ok=True)
        os.symlink(destination, "/new" + link)
    for path in spec["read_only"]:
        _bind_read_only("/old" + path, "/new" + path)
    for name in DEVICES:
        _bind_read_only("/old/dev/" + name, "/new/dev/" + name, device=True)
    for path, size in spec["tmpfs"]:
        os.makedirs("/new" + path, exist_ok=True)
        _mount("tmpfs", "/new" + path, "tmpfs", MS_NOSUID | MS_NODEV, f"size={int(size)},mode=1777")
    if spec["proc"]:
        os.makedirs("/new/proc", exist_ok=True)
        _mount("proc", "/new/proc", "proc", MS_NOSUID | MS_NODEV)
    _mount_setattr("/new", MOUNT_ATTR_RDONLY, False)
    _check(libc.umount2(b"/old", MNT_DETACH), "umount /old")
    os.chdir("/new")
    _check(libc.syscall(pivot_root, b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount old root")
    os.chdir("/")


def _write(path: str, text: str) -> None:
    with open(path, "w") as stream:
        stream.write(text)


def enter_user_namespace(inner_uid: int | None = None) -> None:
    """New user namespace mapping this uid (to ``inner_uid``): an ordinary user may then make the other namespaces."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid if inner_uid is None else inner_uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid if inner_uid is None else inner_uid} {gid} 1")


# ---------------------------------------------------------------------------------------------------------- processes
def execute(spec: dict[str, Any], argv: list[str]) -> None:
    """Last stage: limits, privileges, filter, execve. Does not return."""
    uid = spec["uid"] if os.geteuid() == 0 else None
    drop_privileges(uid)
    if spec["backend"] == "none":  # the other back ends tie our life to the supervisor's by the pid namespace
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(spec["cwd"])
    set_limits(spec["limits"])
    if spec["seccomp"] and not install_seccomp(spec["seccomp"]) and spec["seccomp"] == "forkless":
        raise OSError(errno.ENOSYS, "the number of processes cannot be limited: no seccomp, and root is not counted")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # CPython ignores these; programs expect the default
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(argv[0], argv, spec["env"])


def guarded(action: Any, *arguments: Any) -> None:
    """Run ``action`` in a forked child that must never return into the supervisor's code."""
    try:
        action(*arguments)
    except BaseException as error:
        os.write(2, f"isolate: {type(error).__name__}: {error}\n".encode())
    os._exit(EXIT_ISOLATION)


def exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def run_init(spec: dict[str, Any], argv: list[str]) -> None:
    """pid 1: build the world, start the program in its own session, reap until the program ends."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET)
    build_root(spec)
    program = os.fork()
    if program == 0:
        os.setsid()
        guarded(execute, spec, argv)
    drop_privileges(spec["uid"] if os.geteuid() == 0 else None)
    for fd in (0, 1, 2):  # end-of-file must reach the program and its reader, not stop here
        os.close(fd)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == program:
            os._exit(exit_code(status))


def start_child(spec: dict[str, Any], argv: list[str]) -> int:
    """Fork the backend's child and return its pid."""
    if spec["backend"] == "unshare":
        if os.geteuid() == 0 and spec["uid"] is not None:
            unshare(CLONE_NEWPID)
        else:
            enter_user_namespace(NOBODY if os.geteuid() == 0 else None)
            unshare(CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if spec["backend"] == "unshare":
            guarded(run_init, spec, argv)
        elif spec["backend"] == "bubblewrap":
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            guarded(os.execve, spec["bubblewrap"][0], spec["bubblewrap"] + argv, spec["env"])
        else:
            guarded(execute, spec, argv)
    return pid


def reap_orphans() -> None:
    """Wait for what the child left behind; kill it first, for a program in back end "none" may have left its group."""
    children = f"/proc/self/task/{os.getpid()}/children"
    while True:
        try:
            if os.path.exists(children):
                with open(children) as stream:
                    for orphan in stream.read().split():
                        os.kill(int(orphan), signal.SIGKILL)
            os.waitpid(-1, 0)
        except ProcessLookupError:
            continue
        except ChildProcessError:
            return


def supervise(spec: dict[str, Any], argv: list[str]) -> int:
    """Start the child, then wait for its end, the wall limit, a signal or the death of our own parent."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans come to us: a container's pid 1 need not reap
    parent = os.pidfd_open(os.getppid())
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write_end)
    pid = start_child(spec, argv)
    child = os.pidfd_open(pid)
    for fd in (0, 1):
        os.close(fd)
    poller = select.poll()
    for fd in (parent, child, read_end):
        poller.register(fd, select.POLLIN)
    wall = spec["limits"].get("wall_seconds")
    ready = {fd for fd, _ in poller.poll(None if wall is None else max(1, int(wall * 1000)))}
    if child not in ready:
        # The child is a session leader: its group goes first, then (unshare, bubblewrap) its pid namespace with it.
        for kill in (lambda: os.killpg(pid, signal.SIGKILL), lambda: os.kill(pid, signal.SIGKILL)):
            try:
                kill()
            except ProcessLookupError:
                continue
    _, status = os.waitpid(pid, 0)
    reap_orphans()
    return exit_code(status) if ready else EXIT_WALL


def main() -> int:
    spec, separator, argv = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if separator != "--" or not argv:
        raise SystemExit("isolate: expected SPEC -- ARGV...")
    if spec["stage"] == "execute":  # inside bubblewrap
        guarded(execute, spec, argv)
    try:
        return supervise(spec, argv)
    except OSError as error:
        os.write(2, f"isolate: {error}\n".encode())
        return EXIT_ISOLATION


if __name__ == "__main__":
    sys.exit(main())
