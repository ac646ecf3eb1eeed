"""Create the virtual environments of the projects that Plumbline is measured against.

Each peer has its own environment (their pins contradict each other and ours) built from ``requirements/<peer>.txt``.
The environment's torch is held at exactly the version, build tag included, of the torch that runs this script: a
comparison between two torch builds would measure torch, not the loops. A peer whose requirements name no torch gets
none.

    python benchmarks/peers.py                      # all peers under .peers/
    python benchmarks/peers.py litgpt --root DIR    # one, elsewhere (or set PLUMBLINE_PEERS)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = ("hf_trainer", "litgpt", "lm_eval", "benchmarl", "trl", "rl4co", "sb3", "miniwob", "browsergym")
NO_DEPS_MARKER = "# [no-deps]"
STAMP = "peer.json"


def default_root() -> Path:
    """Folder of the peer environments: ``PLUMBLINE_PEERS`` or ``.peers`` in the checkout."""
    return Path(os.environ.get("PLUMBLINE_PEERS") or HERE.parent / ".peers")


def read_requirements(text: str) -> tuple[list[str], list[str]]:
    """Split a peer's requirement file at ``# [no-deps]``.

    Args: text: the file's content.
    Returns: (requirements installed with their dependencies, requirements installed without).
    Raises: ValueError if the marker occurs twice or a line is a pip option, which pip would not accept as an argument.
    """
    passes: tuple[list[str], list[str]] = ([], [])
    after = 0
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if line == NO_DEPS_MARKER:
            if after:
                raise ValueError(f"requirements: line {number}: second {NO_DEPS_MARKER!r}; keep one")
            after = 1
        elif line.startswith("-"):
            raise ValueError(f"requirements: line {number}: pip option {line!r}; pass it with --pip-option instead")
        elif line and not line.startswith("#"):
            passes[after].append(line)
    return passes


def torch_constraint() -> str:
    """``torch==<version of this interpreter's torch>``, local build tag included.

    Raises: RuntimeError if torch is not installed here.
    """
    try:
        return f"torch=={version('torch')}"
    except PackageNotFoundError as error:
        raise RuntimeError("peers: this interpreter has no torch; run with Plumbline's environment") from error


def peer_python(name: str, root: Path) -> Path:
    """Interpreter of the peer's environment (which may not exist yet)."""
    return root / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint(requirements: str, constraint: str) -> str:
    """Identifies what an environment was built from; a change makes ``ensure_peer`` install again."""
    text = f"{requirements}\0{constraint}\0{sys.version_info[:2]}"
    return hashlib.sha256(text.encode()).hexdigest()


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise RuntimeError(f"peers: {what} failed (exit {done.returncode}):\n{tail}")
    return done.stdout


def ensure_peer(name: str, root: Path, pip_options: list[str] | None = None) -> Path:
    """Create or reuse the environment of one peer.

    Args: name: one of ``PEERS``; root: folder of the environments; pip_options: extra words for ``pip install``,
        such as an index that holds the build of torch you use.
    Returns: the environment's interpreter.
    Raises: ValueError for an unknown peer; RuntimeError if an install fails or ends with another torch.
    """
    if name not in PEERS:
        raise ValueError(f"peers: unknown peer {name!r}; choose from {', '.join(PEERS)}")
    requirements = (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    constraint = torch_constraint()
    mark = fingerprint(requirements, constraint)
    home, python = root / name, peer_python(name, root)
    stamp = home / STAMP
    if python.exists() and stamp.exists() and json.loads(stamp.read_text(encoding="utf-8"))["fingerprint"] == mark:
        return python
    home.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(home)], f"creating {home}")
    constraints = home / "constraints.txt"
    constraints.write_text(constraint + "\n", encoding="utf-8")
    with_deps, without = read_requirements(requirements)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *(pip_options or [])]
    if with_deps:
        _run([*pip, *with_deps], f"installing {name}")
    if without:
        _run([*pip, "--no-deps", *without], f"installing {name} without dependencies")
    if "torch" in with_deps:
        found = _run([str(python), "-c", "import torch; print(torch.__version__)"], "importing torch").strip()
        if f"torch=={found}" != constraint:
            raise RuntimeError(f"peers: {name} ended with torch {found}, not {constraint}; a dependency replaced it")
    frozen = _run([str(python), "-m", "pip", "freeze"], "pip freeze").split()
    temporary = stamp.with_suffix(".tmp")
    temporary.write_text(json.dumps({"fingerprint": mark, "packages": frozen}, indent=1), encoding="utf-8")
    os.replace(temporary, stamp)
    return python


def installed_packages(name: str, root: Path) -> dict[str, str]:
    """Versions of the packages that the peer's requirement file names, from the stamp of a built environment."""
    packages = json.loads((root / name / STAMP).read_text(encoding="utf-8"))["packages"]
    found = dict(line.split("==", 1) for line in packages if "==" in line)
    with_deps, without = read_requirements((HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8"))
    named = {re.split(r"[\[<>=!~ ]", line, maxsplit=1)[0].lower().replace("_", "-") for line in (*with_deps, *without)}
    return {package: number for package, number in found.items() if package.lower().replace("_", "-") in named}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Create the peers' virtual environments.")
    parser.add_argument("names", nargs="*", default=list(PEERS), help=f"peers to build (default: {' '.join(PEERS)})")
    parser.add_argument("--root", type=Path, default=default_root(), help="where (default: PLUMBLINE_PEERS or .peers)")
    parser.add_argument("--pip-option", action="append", default=[], help="one more word for pip install; repeatable")
    args = parser.parse_args(argv)
    try:
        for name in args.names:
            print(f"{name}: {ensure_peer(name, args.root, args.pip_option)}", flush=True)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
