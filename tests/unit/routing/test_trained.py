"""Solvers taken from checkpoints: to evaluate, to solve files, to go on from."""

from __future__ import annotations

import json

import pytest
import torch
from population_runs import checkpoint

from modules.routing.solver import RoutingSolver, SolverSettings
from modules.routing.trained import load_solver, start_from

TSP = """NAME : small
TYPE : TSP
DIMENSION : 6
EDGE_WEIGHT_TYPE : EUC_2D
NODE_COORD_SECTION
1 0 0
2 100 0
3 200 0
4 200 100
5 100 100
6 0 100
EOF
"""


@pytest.fixture
def trained(cli, support_configs, tmp_path):
    for name in ("asp", "routing_pomo"):
        flags = ["--model.init_args.max_instances=40"] if name == "asp" else []
        assert cli("fit", "-c", support_configs / f"{name}.yaml", f"--experiment={name}", *flags) == 0
    return tmp_path / "runs"


def test_solvers_come_back_from_files_and_folders(trained):
    for name in ("asp", "routing_pomo"):
        folder = trained / name / "run-001"
        weights = checkpoint(folder)["state_dict"]
        for place in (folder, folder / "checkpoints" / "last.ckpt"):
            for key, value in load_solver(place).state_dict().items():
                assert torch.equal(value, weights[f"solver.{key}"])
    best = checkpoint(trained / "asp" / "run-001")["population"]["method"]["best"]["best_all"][1]
    for key, value in load_solver(trained / "asp" / "run-001", "best_all").state_dict().items():
        assert torch.equal(value, best[key])
    with pytest.raises(ValueError, match="has no best_all solver, only last"):
        load_solver(trained / "routing_pomo" / "run-001", "best_all")


def test_files_are_solved_by_the_predict_command(cli, trained, tmp_path, capsys):
    file = tmp_path / "small.tsp"
    file.write_text(TSP)
    solver = f"--vars.solver={trained / 'routing_pomo' / 'run-001'}"
    capsys.readouterr()
    assert cli("predict", "-c", "asp/predict", solver, f"--data.init_args.files=[{file}]", "--experiment=p") == 0
    assert "small" in capsys.readouterr().out
    (written,) = tmp_path.rglob("small.tour")
    tour = [int(line) for line in written.read_text().split("TOUR_SECTION")[1].split() if line.lstrip("-").isdigit()]
    assert sorted(tour[:6]) == [1, 2, 3, 4, 5, 6]
    (report,) = tmp_path.rglob("routes.json")
    (row,) = json.loads(report.read_text())["instances"]
    assert row["cost"] >= 600
    optima = tmp_path / "optima.csv"
    optima.write_text("name,optimum\nsmall,600\n")
    test = ["test", "-c", "asp/evaluate_lib", solver, f"--vars.files={file}", f"--vars.optima={optima}"]
    assert cli(*test, "--experiment=t") == 0
    assert "test/gap" in capsys.readouterr().out


def test_training_goes_on_from_a_solver(cli, support_configs, trained):
    start = trained / "routing_pomo" / "run-001"
    flags = [f"--model.init_args.initial={start}", "--trainer.max_steps=1", "--checkpoint.every_n_steps=1"]
    assert cli("fit", "-c", support_configs / "asp.yaml", *flags, "--experiment=on") == 0  # a generator's step
    first = checkpoint(trained / "on" / "run-001")["state_dict"]
    for key, value in load_solver(start).state_dict().items():
        assert torch.equal(first[f"solver.{key}"], value)


def test_what_is_no_solver_is_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere\.ckpt"):
        load_solver(tmp_path / "nowhere.ckpt")
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is no checkpoint, or is damaged"):
        load_solver(broken)
    torch.save({"state_dict": {}}, broken)
    with pytest.raises(ValueError, match="holds no routing solver"):
        load_solver(broken)
    solver = load_solver(trained / "routing_pomo" / "run-001")
    other = RoutingSolver(solver.spec, SolverSettings(dim=8, heads=2, layers=1, hidden=16))
    with pytest.raises(ValueError, match=r"set model\.solver to the same"):
        start_from(other, trained / "routing_pomo" / "run-001")
