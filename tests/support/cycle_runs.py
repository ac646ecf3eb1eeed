"""A cycle without training: a launcher whose model is a file with a number, and whose suite is a coin."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from torch import nn

from modules.assurance.objectives import Knob
from modules.assurance.report import write
from modules.assurance.subject import Subject
from modules.assurance.suites import SuiteSettings, run_suite
from modules.assurance.verdict import Limit

GATE = Limit("u.coin", 0.9, scale=0.1)


def knob(**changed) -> Knob:
    """The chance of heads: the cycle's one knob."""
    given = {
        "path": "model.init_args.chance", "rule": "mult", "start": 0.5, "gain": 0.5, "max_ratio": 1.5,
        "bounds": [0.0, 1.0], "driven_by": ["u.coin"],
    }  # fmt: skip
    return Knob(**(given | changed))


class Killed(Exception):
    """Plays a kill."""


class CoinLauncher:
    """Trains in no time. ``kill_at`` plays a kill before (``fit 1``) or after (``after fit 1``) a step."""

    def __init__(self, suite: SuiteSettings, kill_at: str = "") -> None:
        self.suite, self.kill_at = suite, kill_at
        self.done: list[str] = []

    def _step(self, name: str) -> None:
        if self.kill_at == name:
            raise Killed(name)
        self.done.append(name)

    def config(self):
        return {"model": {"init_args": {"chance": 0.5}}}

    def fit(self, folder: Path, objectives: Path, seed: int, warm_start: Path | None) -> Path:
        number = int(folder.name.split("_")[1])
        self._step(f"fit {number}")
        chance = yaml.safe_load(objectives.read_text())["model"]["init_args"]["chance"]
        path = folder / "fit" / "model.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"chance": chance, "warm": bool(warm_start)}))
        self._step(f"after fit {number}")
        return path

    def assure(self, folder: Path, objectives: Path, checkpoint: Path, round_number: int, parent: str) -> None:
        from dataclasses import replace

        self._step(f"assure {round_number}")
        model = nn.Linear(1, 1)
        nn.init.constant_(model.weight, json.loads(checkpoint.read_text())["chance"])
        nn.init.zeros_(model.bias)
        subject = Subject("coins", model, {"chance": lambda: float(model.weight)})
        found = run_suite(subject, replace(self.suite, round=round_number), [GATE])
        write(
            folder,
            found,
            objectives=objectives.read_text(),
            parent=parent,
            lineage={"checkpoint_digest": self.digest(checkpoint)},
        )
        self._step(f"after assure {round_number}")

    def digest(self, checkpoint: Path) -> str:
        import hashlib

        return hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def toss(subject: Subject, block):
    """The probe: heads with the model's chance."""
    noise = torch.rand(block.count, generator=block.generator(), dtype=torch.float64)
    return {"u.coin": (noise < subject["chance"]()).double().numpy()}
