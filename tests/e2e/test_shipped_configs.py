"""Every shipped config parses: unknown keys and wrong types show here, without training."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from callbacks.study.plan import load_study
from modules.assurance.objectives import check_knobs, first_objectives
from modules.assurance.suites import chosen_probes
from train.align import parser

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STUDIES = sorted(CONFIGS.rglob("study_*.yaml"))
EXPERIMENTS = sorted(
    p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("hardware", "configs", "cycle") and p not in STUDIES
)
CYCLES = sorted((CONFIGS / "cycle").glob("*.yaml"))
CYCLE_LAYERS = {"planted_mlp": "planted"}
LAYERS = {
    "llemma/control": "laptop", "llemma/paper_34b": "paper_7b", "emax/paper_iql": "paper",
    "rlhf/gold_proxy_nm": "gold_proxy", "rlhf/dailydialog": "dialogue", "rlhf/dialogue_nm": "dialogue",
}  # fmt: skip
FOLDERS = {"variant": "skill300", "neural": "leduc_neural", "nmm": "nmm"}  # of layers in configs/psd_psro
OTHERS = {"variant/anytime": "leduc", "variant/xdo": "leduc"}


def layers(path: Path) -> list[object]:
    """The flags that name an experiment, with the one that it is a layer over before it."""
    below: Path | None = None
    method, *rest = path.relative_to(CONFIGS).with_suffix("").parts
    if method == "emax" and len(rest) == 2:
        below = CONFIGS / method / "laptop.yaml"
    elif method == "asp" and len(rest) == 2:
        below = CONFIGS / method / "tsp.yaml"
    elif method == "grad" and len(rest) == 2:
        observed = (
            ["-c", CONFIGS / method / "attack" / "state.yaml"] if rest[1] in ("sa_ppo", "pa_atla", "wocar") else []
        )
        return ["-c", CONFIGS / method / "pendulum.yaml", *observed, "-c", path]
    elif method == "grad" and path.stem == "hopper_action":
        below = path.with_stem("hopper")
    elif method == "grad" and path.stem.startswith("paper_") and path.stem != "paper_hopper_state":
        action = ["-c", path.with_stem("paper_hopper_action")] if path.stem == "paper_ar_ppo_hopper" else []
        return ["-c", path.with_stem("paper_hopper_state"), *action, "-c", path]
    elif method == "psd_psro" and len(rest) == 2:
        below = CONFIGS / method / f"{OTHERS.get('/'.join(rest), FOLDERS[rest[0]])}.yaml"
    elif f"{method}/{path.stem}" in LAYERS:
        below = path.with_stem(LAYERS[f"{method}/{path.stem}"])
    return [*(["-c", below] if below else []), "-c", path]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_experiment_parses(cli, capsys, path):
    only_test = path.parent.name == "rci" and not path.stem.startswith(("laptop", "critic"))
    verb = "test" if only_test or path.stem.startswith(("evaluate", "predict", "prove", "proxy_fit")) else "fit"
    assert cli(verb, *layers(path), "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"]


@pytest.mark.parametrize("path", sorted((CONFIGS / "hardware").glob("*.yaml")), ids=lambda p: p.stem)
def test_hardware_layer_parses_over_an_experiment(cli, capsys, path):
    assert cli("fit", "-c", "llemma/laptop", "-c", path, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    layer = yaml.safe_load(path.read_text())["trainer"]
    assert {key: printed["trainer"][key] for key in layer if key != "strategy"} == {
        key: value for key, value in layer.items() if key != "strategy"
    }


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_run_of_a_study_parses(cli, capsys, path):
    """One run of each task and each algorithm: layers and flags exist and fit together."""
    study, _ = load_study(path)
    algorithms, tasks = list(study.algorithms.values()), list(study.tasks.values())
    for number in range(max(len(algorithms), len(tasks))):
        task, algorithm = tasks[number % len(tasks)], algorithms[number % len(algorithms)]
        files = [part for layer in (*study.base, *task.layers, *algorithm.layers) for part in ("-c", layer)]
        assert cli("fit", *files, *study.flags, *task.flags, *algorithm.flags, "--print_config") == 0
        assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"]


@pytest.mark.parametrize("path", CYCLES, ids=lambda p: p.stem)
def test_cycle_parses_and_fits_its_layers(cli, capsys, path):
    """Knobs lie in the resolved config, limits and probes exist, the layers parse with the cycle's arguments."""
    below = CYCLE_LAYERS.get(path.stem)
    given = ["-c", path.with_stem(below)] if below else []
    own = parser()
    cycle = own.instantiate_classes(own.parse_args([str(part) for part in (*given, "-c", path)]))
    files = [part for layer in cycle.layers for part in ("-c", layer)]
    flags = [f"--{key}={value}" for key, value in {**cycle.arguments, **cycle.fit_arguments}.items()]
    assert cli("fit", *files, *flags, "--print_config") == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    check_knobs(cycle.align.knobs, resolved, [limit.figure for limit in cycle.assure.limits])
    first_objectives(cycle.align.knobs, resolved)
    measured = {measure.name for probe in chosen_probes(cycle.assure.settings()) for measure in probe.measures}
    assert {limit.figure for limit in cycle.assure.limits} <= measured
    assert any(limit.figure.startswith("u.") for limit in cycle.assure.limits if limit.kind == "gate")


def test_every_key_of_an_experiment_has_a_header_with_claim_and_time():
    for path in [*EXPERIMENTS, *STUDIES, *CYCLES]:
        header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
        assert "Time" in header or "Cost" in header or "Expected" in header, path
