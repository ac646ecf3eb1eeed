"""The judge of Coq proofs: one fresh, isolated `coqc` on statement + proof + `Print Assumptions`.

The file is built here from the statement's own text, byte for byte, and the canonical steps; nothing of a search
session is reused. A proof counts when coqc exits 0 and the theorem rests on no axiom but the allowed ones.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.verification.contracts import Verdict
from modules.verification.provers.base import ProverUnavailableError, RefusedTacticError
from modules.verification.provers.coq_grammar import check_proof
from modules.verification.provers.coq_statements import CoqStatement
from modules.verification.sandbox import MIB, Limits, SandboxedCommand, run_command, sandbox_command

REALS_AXIOMS: tuple[str, ...] = (
    "ClassicalDedekindReals.sig_not_dec",
    "ClassicalDedekindReals.sig_forall_dec",
    "FunctionalExtensionality.functional_extensionality_dep",
    "Classical_Prop.classic",
)
"""What Coq 8.16's own Reals library rests on, hence any theorem about real numbers."""

TACTIC_LIBRARIES: tuple[str, ...] = ("Lia", "Lra", "Psatz", "Field", "Ring")
"""Libraries of tactics opened inside the proof, after the statement has been read: they cannot change its meaning."""

DEBIAN_PACKAGES = {
    "Coquelicot": "libcoq-coquelicot",
    "mathcomp": "libcoq-mathcomp",
    "Stdlib": "coq",
    "Coq": "coq",
}
FINDLIB_SETTINGS = ("/etc/ocamlfind.conf", "/etc/ocamlfind.conf.d")
MAX_STEPS = 1000
_MISSING_RE = re.compile(
    r"Cannot find a physical path bound to logical path\s+(?:matching suffix\s+)?(\S+)"
    r"|Unable to locate library\s+(\S+)|library file .* not found|Can't find file\s+(\S+)"
)


def missing_library(message: str) -> str | None:
    """One line naming the library a Coq error misses and its Debian package; None for any other error."""
    match = _MISSING_RE.search(" ".join(message.split()))
    if match is None:
        return None
    library = next((group for group in match.groups() if group), "(unnamed)").rstrip(".")
    package = DEBIAN_PACKAGES.get(library.split(".")[0])
    mend = f"install the Debian package {package}" if package else "no Debian package is known for it"
    return f"library {library} is not installed ({mend})"


@dataclass(frozen=True)
class CoqLimits:
    """Resources of Coq processes.

    tactic_seconds: `Timeout` of one tactic, whole seconds. grace_seconds: further wall time before the process is
    killed (some tactics ignore `Timeout`). replay_seconds: limit of a tactic known to work, run again.
    load_seconds: per command of the statement. check_seconds: wall time of the final coqc. memory_mib: address
    space of one process. cpu_seconds: CPU time of one process in all.
    """

    tactic_seconds: int = 5
    grace_seconds: float = 5.0
    replay_seconds: float = 20.0
    load_seconds: float = 60.0
    check_seconds: float = 120.0
    memory_mib: int = 3072
    cpu_seconds: int = 3600

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"CoqLimits: {name} must be > 0, got {value}")
        if self.tactic_seconds != int(self.tactic_seconds):
            raise ValueError(f"CoqLimits: tactic_seconds must be whole, got {self.tactic_seconds} (Coq counts so)")


@dataclass(frozen=True)
class CoqTools:
    """The programs, found once.

    coqtop, coqc: absolute paths. library: Coq's library folder. version: e.g. "8.16.1".
    """

    coqtop: str
    coqc: str
    library: str
    version: str
    allow_unsafe_exec: bool = False

    @classmethod
    def find(cls, coqtop: str | None = None, coqc: str | None = None, *, allow_unsafe_exec: bool = False) -> CoqTools:
        """Locate Coq on PATH or at the given paths.

        Raises:
            ProverUnavailableError: a program is missing or does not run.
        """
        found = []
        for name, given in (("coqtop", coqtop), ("coqc", coqc)):
            path = shutil.which(given or name)
            if path is None:
                where = f"at '{given}'" if given else "on PATH"
                raise ProverUnavailableError(
                    f"CoqTools: {name} not found {where}; install the Debian packages coq and libcoq-coquelicot, "
                    f"or give the path as `{name}`"
                )
            found.append(os.path.abspath(path))
        library, version = _describe(found[1])
        return cls(found[0], found[1], library, version, allow_unsafe_exec)

    def _isolation(self) -> dict[str, Any]:
        """What Coq must see: its library, its plugins beside it, and where findlib looks for plugins."""
        settings = os.environ.get("OCAMLFIND_CONF")
        wanted = [f"{self.library}/../coq-core", *([settings] if settings else FINDLIB_SETTINGS)]
        return {
            "read_only_paths": [self.coqtop, self.coqc, self.library, *filter(os.path.exists, wanted)],
            "env": {"OCAMLFIND_CONF": settings} if settings else {},
            "allow_unsafe_exec": self.allow_unsafe_exec,
        }

    def session_command(self, limits: CoqLimits) -> SandboxedCommand:
        """Isolated interactive coqtop: nothing writable, no wall limit of its own."""
        return sandbox_command(
            [self.coqtop, "-q", "-emacs", "-set", "Silent", "-w", "none"],
            limits=_process_limits(limits, None),
            **self._isolation(),
        )

    def compile(self, folder: Path, file: str, limits: CoqLimits) -> tuple[int, str, bool]:
        """Run coqc on folder/file, output folder discarded. Returns (exit code, output, wall limit hit)."""
        isolation = self._isolation()
        isolation["read_only_paths"].append(str(folder))
        result = run_command(
            [self.coqc, "-q", "-noglob", "-w", "none", "-o", f"/out/{Path(file).stem}.vo", str(folder / file)],
            writable_tmpfs={"/out": 64 * MIB},
            limits=_process_limits(limits, limits.check_seconds),
            **isolation,
        )
        text = result.stdout + ("\n[output cut]" if result.truncated else "") + result.stderr
        return result.returncode, text, result.timed_out


def _process_limits(limits: CoqLimits, wall_seconds: float | None) -> Limits:
    return Limits(
        wall_seconds=wall_seconds,
        cpu_seconds=limits.cpu_seconds,
        memory_bytes=limits.memory_mib * MIB,
        file_size_bytes=64 * MIB,
        open_files=256,
    )


@functools.cache
def _describe(coqc: str) -> tuple[str, str]:
    answers = []
    for option in ("-where", "-print-version"):
        try:
            done = subprocess.run([coqc, option], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise ProverUnavailableError(
                f"CoqTools: '{coqc} {option}' fails ({error}); reinstall the Debian package coq"
            ) from None
        answers.append(done.stdout.strip())
    return os.path.realpath(answers[0]), answers[1].split()[0]


def tactic_import(libraries: Sequence[str]) -> list[str]:
    """The command, given inside the proof, that makes tactic libraries of Coq available; [] for none."""
    for library in libraries:
        if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*", library, re.ASCII):
            raise ValueError(f"tactic_libraries: '{library}' is not the name of a Coq library")
    return [f"From Coq Require Import {' '.join(libraries)}."] if libraries else []


def foreign_axioms(assumptions: str, allowed: Sequence[str]) -> list[str]:
    """Names in the output of `Print Assumptions` that are not allowed; every unknown line counts as one."""
    text = assumptions.strip()
    if text == "Closed under the global context":
        return []
    lines = [line for line in text.splitlines() if line and not line[0].isspace()]
    if not lines or lines[0].strip() != "Axioms:":
        return [f"unexpected output of Print Assumptions: {text[:200]!r}"]
    foreign = []
    for line in lines[1:]:
        match = re.fullmatch(r"([^\s:]+)(?:\s*:.*)?", line)
        if match is None or match.group(1) not in allowed:
            foreign.append(match.group(1) if match else line[:100])
    return foreign


class CoqChecker:
    """Final check of Coq proofs.

    Args:
        tools: programs. limits: check_seconds and memory_mib are used.
        allowed_axioms: None for REALS_AXIOMS. A statement's own axioms are allowed beside them.
        tactic_libraries: see TACTIC_LIBRARIES.
    """

    def __init__(
        self,
        tools: CoqTools,
        limits: CoqLimits,
        allowed_axioms: Sequence[str] | None = None,
        tactic_libraries: Sequence[str] = TACTIC_LIBRARIES,
    ) -> None:
        self.tools, self.limits = tools, limits
        self.imports = tactic_import(tactic_libraries)
        self.allowed_axioms = tuple(REALS_AXIOMS if allowed_axioms is None else allowed_axioms)

    def source(self, statement: CoqStatement, steps: Sequence[str], marker: str) -> str:
        """The file to compile: the statement verbatim, its proof, and the question about assumptions after `marker`."""
        script = "\n".join(["Proof.", *self.imports, *steps, "Qed."])
        # The marker is drawn after the proof is fixed, so nothing the proof prints can pass for our question's answer.
        audit = f'Goal True. idtac "{marker}". Abort.\nPrint Assumptions {statement.name}.'
        return f"{statement.text}\n{script}\n{audit}\n"

    def check(self, statement: CoqStatement, proof: Sequence[str]) -> Verdict:
        """Verdict on a proof given as steps. Never raises on bad proofs.

        Raises:
            SandboxUnavailableError: no isolation, so no verdict.
        """
        started = time.monotonic()

        def verdict(ok: bool, reason: str) -> Verdict:
            return Verdict(ok, reason, time.monotonic() - started)

        if len(proof) > MAX_STEPS:
            return verdict(False, f"proof of {len(proof)} steps, at most {MAX_STEPS} are checked")
        try:
            steps = check_proof(proof)
        except RefusedTacticError as error:
            return verdict(False, f"refused: {error}")
        marker = f"assumptions-{secrets.token_hex(16)}"
        source = self.source(statement, steps, marker)
        with tempfile.TemporaryDirectory(prefix="plumbline-coq-") as name:
            folder = Path(name)
            folder.chmod(0o755)  # the isolated process has another uid
            (folder / "Problem.v").write_text(source, encoding="utf-8")
            (folder / "Problem.v").chmod(0o644)
            code, output, timed_out = self.tools.compile(folder, "Problem.v", self.limits)
        if timed_out:
            return verdict(False, f"coqc did not finish within {self.limits.check_seconds:g} s")
        if code != 0:
            library = missing_library(output)
            shown = library or " ".join(output.split("Error:")[-1].split())[:300]
            return verdict(False, f"coqc refuses it (exit code {code}): {shown}")
        _, found, assumptions = output.partition(marker)
        if not found:
            return verdict(False, "coqc did not report the assumptions")
        if foreign := foreign_axioms(assumptions, [*self.allowed_axioms, *statement.axioms]):
            return verdict(False, f"rests on axioms that are not allowed: {', '.join(foreign)}")
        return verdict(True, f"accepted by coqc {self.tools.version}")
