"""Fork server that runs inside the sandbox: packages are imported once, each sample costs one fork.

A *script*, started by ``modules.verification.server`` under ``sandbox_command``; standard library alone, apart from
the packages it is told to preload. Requests and replies are frames on stdin and stdout: four bytes of length
(big endian), then JSON. Two requests:

  run   execute untrusted Python in a fresh child and return its bounded output and one described value;
  call  hand texts, one after the other, to ``handle(text) -> text`` of a trusted handler file, in a child that is
        kept until it exceeds a limit. (Equivalence of formulas: the code is ours, the strings are not.)

Around each child, beyond the walls of the sandbox itself: a pid namespace of its own (killing the child kills all it
started; it sees no sibling to signal), no capability, rlimits, and a seccomp list without processes and sockets.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from types import ModuleType
from typing import Any

HEADER = struct.Struct(">I")
RESULT_FD = 3


def load_file(path: str) -> ModuleType:
    name = os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


isolate = load_file(os.path.join(os.path.dirname(os.path.abspath(__file__)), "isolate.py"))


# ------------------------------------------------------------------------------------------------------------- frames
def read_exactly(fd: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = os.read(fd, count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_frame(fd: int) -> Any:
    (length,) = HEADER.unpack(read_exactly(fd, HEADER.size))
    return json.loads(read_exactly(fd, length))


def write_frame(fd: int, message: Any) -> None:
    data = json.dumps(message).encode()
    write_all(fd, HEADER.pack(len(data)) + data)


# ----------------------------------------------------------------------------------------------------------- children
class Forker:
    """Forks children into pid namespaces of their own where the kernel allows it."""

    def __init__(self, nested: bool) -> None:
        self.own_pidfd = os.pidfd_open(os.getpid()) if nested else None
        self.devnull = os.open("/dev/null", os.O_RDWR)

    def fork(self) -> int:
        if self.own_pidfd is not None:
            # Each child wants a new namespace, but unshare(CLONE_NEWPID) works once: go back to our own first.
            isolate.setns(self.own_pidfd, isolate.CLONE_NEWPID)
            isolate.unshare(isolate.CLONE_NEWPID)
        return os.fork()

    def confine(self, limits: dict[str, Any]) -> bool:
        """In the child: session, limits, privileges, filter. True if the filter is in place."""
        os.setsid()
        isolate.prctl(isolate.PR_SET_PDEATHSIG, signal.SIGKILL)
        isolate.drop_privileges(None)
        isolate.set_limits(limits)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        return isolate.install_seccomp("program")

    def can_confine(self) -> bool:
        """Try it: whether a child can start no other, and is kept from its siblings by a namespace or the filter."""
        pid = self.fork()
        if pid == 0:
            filtered = self.confine({"processes": 0})
            try:
                if os.fork() == 0:
                    os._exit(0)
            except OSError:
                os._exit(0 if filtered or self.own_pidfd is not None else 1)
            os._exit(1)
        return os.waitpid(pid, 0)[1] == 0


def describe(value: Any, depth: int = 0) -> dict[str, Any]:
    """A program's value as plain JSON: exact numbers stay exact, formulas become LaTeX, the rest its text."""
    import fractions
    import numbers

    sympy: Any = sys.modules.get("sympy")
    anything: Any = value
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {"kind": "text", "text": str(value)}
    if isinstance(value, numbers.Integral):
        return {"kind": "rational", "text": f"{int(value)}/1"}
    if isinstance(value, fractions.Fraction):
        return {"kind": "rational", "text": f"{value.numerator}/{value.denominator}"}
    if isinstance(value, (list, tuple, set, frozenset)) and depth < 4:
        kind = "set" if isinstance(value, set | frozenset) else type(value).__name__
        return {"kind": kind, "items": [describe(item, depth + 1) for item in list(value)[:1000]]}
    if sympy is not None and isinstance(value, (sympy.Basic, sympy.MatrixBase)):
        if isinstance(value, sympy.Rational):
            return {"kind": "rational", "text": f"{anything.p}/{anything.q}"}
        if isinstance(value, sympy.Float):
            return {"kind": "float", "text": str(value)}
        return {"kind": "latex", "text": sympy.latex(value)}
    if hasattr(anything, "item") and hasattr(anything, "ndim"):  # a numpy scalar
        return describe(anything.item(), depth + 1) if anything.ndim == 0 and depth < 4 else describe(str(value))
    if isinstance(value, numbers.Real) or type(value).__name__ == "Decimal":
        return {"kind": "float", "text": str(value)}
    return {"kind": "text", "text": str(value)}


def run_program(request: dict[str, Any]) -> dict[str, Any]:
    """In the confined child: execute the code, then take the value asked for."""
    name, call = request.get("variable"), request.get("call")
    try:
        namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
        with contextlib.suppress(SystemExit):
            exec(compile(request["code"], "<program>", "exec"), namespace)
        wanted = call or name
        if not wanted:
            return {"value": None}
        if wanted not in namespace:
            return {"error": f"NameError: the program does not define '{wanted}'"}
        value = namespace[wanted]() if call else namespace[wanted]
        return {"value": describe(value)}
    except MemoryError:
        return {"error": "MemoryError: memory limit exceeded"}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def child_run(forker: Forker, request: dict[str, Any], output: int, result: int) -> None:
    """Body of a ``run`` child; never returns."""
    try:
        output, result = os.dup2(output, 60), os.dup2(result, 61)
        os.dup2(forker.devnull, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(result, RESULT_FD)
        os.closerange(RESULT_FD + 1, 256)
        forker.confine(request["limits"])
        reply = run_program(request)
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        data = json.dumps(reply).encode()
        write_all(RESULT_FD, data)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            write_all(RESULT_FD, json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode())
    os._exit(0)


def serve_run(forker: Forker, request: dict[str, Any]) -> dict[str, Any]:
    """Fork, watch, kill at the limits, reap."""
    limits = request["limits"]
    wall, cap = float(limits["wall_seconds"]), int(limits["output_bytes"])
    output_read, output_write = os.pipe()
    result_read, result_write = os.pipe()
    started = time.monotonic()
    pid = forker.fork()
    if pid == 0:
        child_run(forker, request, output_write, result_write)
    os.close(output_write)
    os.close(result_write)
    watch = os.pidfd_open(pid)
    data = {output_read: bytearray(), result_read: bytearray()}
    poller = select.poll()
    for fd in (output_read, result_read, watch):
        poller.register(fd, select.POLLIN)
    status, open_pipes = "ended", 2
    while status == "ended":
        left = started + wall - time.monotonic()
        events = poller.poll(max(0.0, left) * 1000) if left > 0 else []
        if not events:
            status = "timeout"
        for fd, _ in events:
            if fd == watch:
                continue
            chunk = os.read(fd, 65_536)
            data[fd] += chunk
            if not chunk:
                poller.unregister(fd)
                open_pipes -= 1
            elif len(data[fd]) > (cap if fd == output_read else cap + 65_536):
                status = "output"
        if {fd for fd, _ in events} == {watch}:  # dead, and nothing left to read
            break
    if status != "ended":
        os.kill(pid, signal.SIGKILL)
    _, code, usage = os.wait4(pid, 0)
    for fd in (output_read, result_read, watch):
        os.close(fd)
    reply: dict[str, Any] = {"seconds": time.monotonic() - started, "error": None, "value": None}
    reply["output"] = bytes(data[output_read][:cap]).decode(errors="replace")
    if status == "ended":
        status, detail = classify_end(code, usage.ru_utime + usage.ru_stime, limits, bytes(data[result_read]))
        reply.update(detail)
    reply["status"] = status
    return reply


def classify_end(code: int, cpu: float, limits: dict[str, Any], result: bytes) -> tuple[str, dict[str, Any]]:
    if os.WIFSIGNALED(code):
        spent = limits.get("cpu_seconds") is not None and cpu >= max(1, int(limits["cpu_seconds"])) - 0.2
        return ("timeout" if spent else "killed"), {"error": f"ended by signal {os.WTERMSIG(code)}"}
    try:
        detail = json.loads(result)
        detail = {"error": detail.get("error"), "value": detail.get("value")}
    except (ValueError, AttributeError, RecursionError):
        return "error", {"error": "the program ended without a result"}
    return ("ok" if detail["error"] is None else "error"), detail


# ---------------------------------------------------------------------------------------------------- trusted handler
class Caller:
    """A kept child that answers one text at a time; killed and replaced when it exceeds a limit."""

    def __init__(self, forker: Forker, handler: ModuleType) -> None:
        self.forker, self.handler = forker, handler
        self.pid: int | None = None
        self.channel: socket.socket | None = None
        self.used = 0

    def _start(self, limits: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        pid = self.forker.fork()
        if pid == 0:
            try:
                fd = os.dup2(theirs.fileno(), 60)
                for target in (0, 1, 2):
                    os.dup2(self.forker.devnull, target)
                os.dup2(fd, RESULT_FD)
                os.closerange(RESULT_FD + 1, 256)
                self.forker.confine(limits)
                while True:
                    write_frame(RESULT_FD, self._answer(read_frame(RESULT_FD)))
            except BaseException:
                os._exit(1)
        theirs.close()
        self.pid, self.channel, self.used = pid, ours, 0

    def _answer(self, text: str) -> dict[str, str]:
        try:
            return {"value": self.handler.handle(text)}
        except MemoryError:
            return {"error": "memory"}
        except RecursionError:
            return {"error": "recursion"}

    def stop(self) -> None:
        if self.pid is not None and self.channel is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.channel.close()
        self.pid = self.channel = None

    def call(self, text: str, limits: dict[str, Any], recycle: int) -> dict[str, Any]:
        started = time.monotonic()
        if self.pid is not None and self.used >= recycle:
            self.stop()
        if self.channel is None:
            self._start(limits)
        assert self.channel is not None
        self.used += 1
        self.channel.settimeout(float(limits["wall_seconds"]))
        try:
            self.channel.setblocking(True)
            write_frame(self.channel.fileno(), text)
            poller = select.poll()
            poller.register(self.channel, select.POLLIN)
            if not poller.poll(float(limits["wall_seconds"]) * 1000):
                self.stop()
                return {"error": "timeout", "seconds": time.monotonic() - started}
            reply = read_frame(self.channel.fileno())
        except (EOFError, OSError):
            self.stop()
            return {"error": "crashed", "seconds": time.monotonic() - started}
        if "error" in reply:
            self.stop()
        return {**reply, "seconds": time.monotonic() - started}


# --------------------------------------------------------------------------------------------------------------- main
def serve(config: dict[str, Any], nested: bool) -> None:
    forker = Forker(nested)
    if config["require_confinement"] and not forker.can_confine():
        write_frame(1, {"fatal": "neither nested pid namespaces nor seccomp work inside the sandbox"})
        return
    sys.path += config["path"]
    for name in config["preload"]:
        importlib.import_module(name)
    handler = load_file(config["handler"]) if config["handler"] else None
    caller = Caller(forker, handler) if handler is not None else None
    gc.collect()
    gc.freeze()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    write_frame(1, {"ready": True, "nested": nested})
    while True:
        try:
            request = read_frame(0)
        except EOFError:
            break
        if request["op"] == "run":
            write_frame(1, serve_run(forker, request))
        elif request["op"] == "call" and caller is not None:
            reply = [caller.call(text, request["limits"], request["recycle"]) for text in request["items"]]
            write_frame(1, {"replies": reply})
        else:
            write_frame(1, {"fatal": f"unknown request '{request['op']}'"})
    if caller is not None:
        caller.stop()


def main() -> None:
    config = json.loads(sys.argv[1])
    try:
        isolate.unshare(isolate.CLONE_NEWUSER | isolate.CLONE_NEWPID)
    except OSError:  # no nested user namespaces here: the children then rest on seccomp
        serve(config, nested=False)
        return
    pid = os.fork()
    if pid == 0:
        isolate.prctl(isolate.PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            serve(config, nested=True)
        except BaseException as error:
            os.write(2, f"zygote: {type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    os.close(0)
    os.close(1)
    sys.exit(isolate.exit_code(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()
