"""Every shipped config parses: unknown keys and wrong types show here, without training."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("hardware", "configs"))
LAYERS = {"control": "laptop", "paper_34b": "paper_7b"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_experiment_parses(cli, capsys, path):
    below = ["-c", path.with_stem(LAYERS[path.stem])] if path.stem in LAYERS else []
    verb = "test" if path.stem.startswith(("evaluate", "prove")) else "fit"
    assert cli(verb, *below, "-c", path, "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"]


@pytest.mark.parametrize("path", sorted((CONFIGS / "hardware").glob("*.yaml")), ids=lambda p: p.stem)
def test_hardware_layer_parses_over_an_experiment(cli, capsys, path):
    assert cli("fit", "-c", "llemma/laptop", "-c", path, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    layer = yaml.safe_load(path.read_text())["trainer"]
    assert {key: printed["trainer"][key] for key in layer if key != "strategy"} == {
        key: value for key, value in layer.items() if key != "strategy"
    }


def test_every_key_of_an_experiment_has_a_header_with_claim_and_time():
    for path in EXPERIMENTS:
        header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
        assert "Time" in header or "Cost" in header or "Expected" in header, path
