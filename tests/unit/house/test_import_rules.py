"""Who may import whom (README, "The house"), walked over the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
EVERYONE = {"modules.contracts", "modules.optional", "modules.files", "modules.seeds"}
SHARED = {"marl", "control", "routing", "population", "objectives", "networks", "language", "verification", "assurance"}
PLAIN = {"torch", "tensordict", "torchrl"}
PACKAGES = ("train", "modules", "datamodules", "callbacks")


def _files() -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Dotted names of everything imported, functions' bodies included; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _ours(names: set[str]) -> set[str]:
    mine = {name for name in names if name.split(".")[0] in PACKAGES}
    return {name for name in mine if not any(name == free or name.startswith(f"{free}.") for free in EVERYONE)}


def violations(path: Path, names: set[str]) -> list[str]:
    """Wrong arrows of a file at ``path`` (relative to the root) that imports ``names``."""
    package, wrong = path.parts[0], []
    for name in _ours(names):
        target = name.split(".")
        if name == "modules" or name in {f"modules.{n}" for n in ("contracts", "optional", "files", "seeds")}:
            continue
        if package == "train":
            continue  # the command may use everything
        if package == "callbacks" and target[:2] == ["modules", "assurance"]:
            continue  # statistics of results: plain functions
        if target[0] != package:  # no package imports another, and none imports train
            wrong.append(name)
        elif package == "modules" and len(path.parts) > 2 and len(target) > 1:
            home, other = path.parts[1], target[1]
            method_to_method = other not in SHARED and other != home
            shared_to_method = home in SHARED and other not in SHARED
            plain_to_more = home in ("networks", "objectives") and other not in ("networks", "objectives")
            if method_to_method or shared_to_method or plain_to_more:
                wrong.append(name)
    if package == "modules" and path.parts[1] in ("networks", "objectives", "optional.py", "files.py"):
        foreign = (
            {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - PLAIN - {"modules", "__future__"}
        )
        wrong += sorted(foreign)
    if path.parts[:2] == ("modules", "assurance"):  # callbacks lean on it, so it knows no trainer
        wrong += sorted(name for name in names if name.split(".")[0] == "lightning")
    return wrong


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_rules(path):
    assert violations(path.relative_to(ROOT), _imports(path)) == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("modules/llemma/module.py", "datamodules.corpus_data"),
        ("datamodules/corpus_data.py", "modules.llemma"),
        ("callbacks/summary.py", "modules.llemma.module"),
        ("modules/llemma/module.py", "modules.rci.loop"),
        ("modules/language/generation.py", "modules.llemma.module"),
        ("modules/networks/llama.py", "modules.language.checkpoint"),
        ("modules/objectives/lm.py", "transformers"),
        ("modules/llemma/module.py", "train"),
        ("modules/llemma/module.py", "callbacks.study.plan"),
        ("callbacks/study/pool.py", "train"),
        ("callbacks/study/pool.py", "train.arguments"),
        ("datamodules/game_data.py", "train.folders"),
        ("callbacks/study/report.py", "modules.population.payoff_table"),
        ("callbacks/study/report.py", "modules.assurance_of_another_kind"),
        ("datamodules/game_data.py", "modules.assurance.intervals"),
        ("modules/assurance/intervals.py", "lightning.pytorch"),
        ("modules/assurance/intervals.py", "modules.llemma.module"),
    ],
)
def test_a_wrong_arrow_is_seen(path, name):
    assert violations(Path(path), {name})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("callbacks/study/report.py", "modules.assurance.intervals"),
        ("callbacks/study/report.py", "modules.assurance.intervals.aggregate"),
        ("callbacks/study/report.py", "modules.files"),
        ("train/cli.py", "callbacks.checkpoint"),
        ("train/cli.py", "modules.llemma.module"),
        ("modules/assurance/intervals.py", "numpy"),
        ("modules/llemma/module.py", "modules.assurance.intervals"),
    ],
)
def test_a_right_arrow_is_none(path, name):
    assert violations(Path(path), {name}) == []


def test_no_file_is_longer_than_500_lines():
    long = {str(p.relative_to(ROOT)): n for p in _files() if (n := len(p.read_text("utf-8").splitlines())) > 500}
    assert long == {}


def test_importing_the_packages_is_light():
    """Importing the packages must not load torch or transformers: a mistake in the arguments would pay for them."""
    code = f"import sys, {', '.join(PACKAGES)}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
