"""RouteFiles: files of routes that others read, tables, pictures, ranks, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensordict import TensorDict

import callbacks.routes as routes
from callbacks.routes import RouteFiles, solution_text, tour_text, trips
from datamodules.routing.lib_files import LibInstance, read_solution, read_tour, write_instance
from datamodules.routing_lib_data import RoutingLibDataModule

SQUARE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0], [0.0, 4.0]], dtype=torch.float64)
NAN = float("nan")


class InOrder(LightningModule):
    """Visits nodes in the order of their numbers: routes and costs that can be told in advance."""

    def __init__(self, actions: list[int] | None = None) -> None:
        super().__init__()
        self.actions = actions

    def test_step(self, batch: TensorDict, batch_idx: int, dataloader_idx: int = 0) -> Any:
        problem = self.trainer.datamodule.problem  # pyright: ignore[reportAttributeAccessIssue]
        depot, nodes = int(problem.spec.depot), batch["locs"].shape[1]
        order = torch.arange(depot, nodes) if self.actions is None else torch.tensor(self.actions)
        actions = order.expand(len(batch), -1)
        cost = problem.cost(batch, actions.unsqueeze(1))[:, 0]
        gap = 100 * (cost - batch["reference"]) / batch["reference"]
        return TensorDict(
            {"index": batch["index"], "actions": actions, "cost": cost, "reference": batch["reference"], "gap": gap},
            [len(batch)],
        )

    predict_step = test_step


def tsp_folder(folder: Any) -> Any:
    """Three instances in two folders: square (14), large (two squares' nodes), and another square in ``b``."""
    for name in ("a", "b"):
        (folder / name).mkdir()
    write_instance(folder / "a" / "square.tsp", LibInstance("tsp", "square", SQUARE))
    write_instance(folder / "a" / "large.tsp", LibInstance("tsp", "large", torch.cat([SQUARE, SQUARE + 10])))
    write_instance(folder / "b" / "square.tsp", LibInstance("tsp", "square", 2 * SQUARE))
    (folder / "optima.csv").write_text("name,optimum\nlarge,40\n")
    return folder


def cvrp_folder(folder: Any) -> Any:
    demand = torch.tensor([2, 1, 2])
    write_instance(folder / "depot.vrp", LibInstance("cvrp", "depot", SQUARE, demand, 3))
    return folder


def quiet(folder: Any, callback: RouteFiles, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, use_distributed_sampler=False, callbacks=[callback], **{"logger": False, **options},
    )  # fmt: skip


def test_predict_writes_tours_tables_and_lines(tmp_path, capsys):
    data = RoutingLibDataModule("tsp", [str(tsp_folder(tmp_path))], str(tmp_path / "optima.csv"))
    run = tmp_path / "run"
    quiet(run, RouteFiles(draw=0)).predict(InOrder(), data)
    assert read_tour(run / "routes" / "a" / "square.tour", 4).tolist() == [0, 1, 2, 3]
    assert read_tour(run / "routes" / "large.tour").tolist() == list(range(8))
    assert (run / "routes" / "b" / "square.tour").is_file()
    # both squares, sides 5 -> 0: 3 + 4 + 3 + 10 (10.44 rounded), then 3 + 4 + 3, and back over 17 (17.20 rounded)
    large = 3 + 4 + 3 + round(math.hypot(10, 6)) + 3 + 4 + 3 + round(math.hypot(10, 14))
    rows = list(csv.DictReader((run / "routes.csv").read_text().splitlines()))
    assert rows == [
        {"set": "a", "name": "a/square", "size": "4", "cost": "14.0", "reference": "", "gap": ""},
        {"set": "a", "name": "large", "size": "8", "cost": f"{large}.0", "reference": "40.0", "gap": rows[1]["gap"]},
        {"set": "b", "name": "b/square", "size": "4", "cost": "28.0", "reference": "", "gap": ""},
    ]
    assert float(rows[1]["gap"]) == pytest.approx(100 * (large / 40 - 1))
    written = json.loads((run / "routes.json").read_text())
    assert [row["name"] for row in written["instances"]] == ["a/square", "large", "b/square"]
    assert written["instances"][0]["gap"] is None
    assert [one["worst"] for one in written["sets"]] == ["large", None]
    lines = [line for line in capsys.readouterr().out.splitlines() if "cost" in line]
    assert lines == [
        f"a/square: cost 14, {run / 'routes' / 'a' / 'square.tour'}",
        f"large: cost {large}, gap {100 * (large / 40 - 1):.2f} %, {run / 'routes' / 'large.tour'}",
        f"b/square: cost 28, {run / 'routes' / 'b' / 'square.tour'}",
    ]
    assert not list(run.rglob("*.png"))


def test_test_prints_a_line_for_each_set(tmp_path, capsys):
    data = RoutingLibDataModule("tsp", [str(tsp_folder(tmp_path))], str(tmp_path / "optima.csv"))
    quiet(tmp_path / "run", RouteFiles(draw=0)).test(InOrder(), data, verbose=False)
    out = capsys.readouterr().out
    large = json.loads((tmp_path / "run" / "routes.json").read_text())["instances"][1]
    mean = (14 + large["cost"]) / 2
    gap = f"{large['gap']:.2f} %"
    assert f"a: 2 instances, mean cost {mean:g}, mean gap of 1 {gap}, largest {gap} (large)\n" in out
    assert "b: 1 instances, mean cost 28\n" in out
    assert f"routes: {tmp_path / 'run' / 'routes'}" in out


def test_cvrp_solutions_and_pictures(tmp_path):
    data = RoutingLibDataModule("cvrp", [str(cvrp_folder(tmp_path))])
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    quiet(tmp_path, RouteFiles(draw=1), logger=logger).test(InOrder([1, 2, 0, 3]), data, verbose=False)
    solution = read_solution(tmp_path / "run" / "routes" / "depot.sol", 3)
    assert solution.routes == [[1, 2], [3]]
    assert solution.cost == 3 + 4 + 5 + 4 + 4
    assert (tmp_path / "run" / "routes" / "depot.png").read_bytes().startswith(b"\x89PNG")
    assert any("events" in path.name for path in (tmp_path / "run").iterdir())


def test_pictures_take_the_sets_in_turn(tmp_path):
    data = RoutingLibDataModule("tsp", [str(tsp_folder(tmp_path))])
    quiet(tmp_path / "run", RouteFiles(draw=2)).predict(InOrder(), data)
    drawn = sorted(str(path.relative_to(tmp_path / "run" / "routes")) for path in (tmp_path / "run").rglob("*.png"))
    assert drawn == ["a/square.png", "b/square.png"]


def test_a_route_that_breaks_the_rules_is_not_written(tmp_path):
    data = RoutingLibDataModule("cvrp", [str(cvrp_folder(tmp_path))])
    with pytest.raises(ValueError, match="CVRP: instance 0, route 0: .*capacity"):
        quiet(tmp_path / "run", RouteFiles()).predict(InOrder([1, 2, 3]), data)
    assert not (tmp_path / "run" / "routes").exists()


def test_a_kill_leaves_the_routes_solved_before_it(tmp_path):
    class Killed(InOrder):
        def predict_step(self, batch: TensorDict, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if batch_idx == 1:
                raise KeyError("killed")
            return super().test_step(batch, batch_idx)

    data = RoutingLibDataModule("tsp", [str(tsp_folder(tmp_path) / "a")])
    with pytest.raises(KeyError, match="killed"):
        quiet(tmp_path / "run", RouteFiles()).predict(Killed(), data)
    written = [str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written == ["routes/square.tour"]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="draw must be >= 0, got -1"):
        RouteFiles(-1)
    loader: Any = torch.utils.data.DataLoader([torch.zeros(1)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="RouteFiles: needs a datamodule of routing instances"):
        quiet(tmp_path, RouteFiles()).predict(InOrder(), loader)

    class Silent(InOrder):
        def test_step(self, batch: TensorDict, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return None

    data = RoutingLibDataModule("tsp", [str(tsp_folder(tmp_path))])
    with pytest.raises(ValueError, match=r"Silent\.test_step must return a TensorDict with index, .* got NoneType"):
        quiet(tmp_path, RouteFiles()).test(Silent(), data, verbose=False)


def test_missing_matplotlib_is_told_before_solving(tmp_path, monkeypatch):
    def missing(package: str, *, extra: str) -> Any:
        raise ImportError(f"package '{package}' is needed here but not installed: pip install 'plumbline[{extra}]'")

    monkeypatch.setattr(routes, "require", missing)
    data = RoutingLibDataModule("tsp", [str(tsp_folder(tmp_path))])

    class Unreached(InOrder):
        def predict_step(self, batch: TensorDict, batch_idx: int, dataloader_idx: int = 0) -> Any:
            raise AssertionError("solved before the complaint")

    with pytest.raises(ImportError, match=r"plumbline\[routing\]"):
        quiet(tmp_path, RouteFiles()).predict(Unreached(), data)
    quiet(tmp_path, RouteFiles(draw=0)).predict(InOrder(), data)
    assert (tmp_path / "routes.csv").is_file()


class Named:
    """A datamodule of two instances with names that must not leave the run folder."""

    evaluation_sets = ["s"]

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.problem: Any = SimpleNamespace(spec=SimpleNamespace(depot=False), check=lambda instances, actions: None)

    def instance_name(self, dataloader: int, index: int) -> str:
        return self.names[index]


def collected(callback: RouteFiles, trainer: Any, index: list[int], cost: float) -> None:
    rows = len(index)
    batch = TensorDict({"locs": torch.rand(rows, 3, 2)}, [rows])
    fields = {key: torch.full((rows,), NAN, dtype=torch.float64) for key in ("reference", "gap")}
    actions = torch.tensor([[2, 0, 1]]).expand(rows, 3)
    fields |= {"index": torch.tensor(index), "actions": actions, "cost": torch.full((rows,), cost)}
    callback.on_test_batch_end(trainer, None, TensorDict(fields, [rows]), batch, 0)


def test_rows_that_fill_up_are_dropped_and_ranks_are_joined(tmp_path, monkeypatch):
    data = Named(["x", "y", "z"])
    others = RouteFiles(draw=0)
    here = RouteFiles(draw=0)
    fake: Any = SimpleNamespace(datamodule=data, world_size=2, is_global_zero=True, loggers=[], log_dir=str(tmp_path))
    for callback in (here, others):
        callback.setup(fake, None, "test")  # pyright: ignore[reportArgumentType]
    collected(here, fake, [2, 0], 1.5)
    collected(others, fake, [1, -1, 0], 2.5)

    def all_gather_object(parts: list[Any], mine: Any) -> None:
        parts[:] = [mine, others._solved]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    here.on_test_end(fake, None)  # pyright: ignore[reportArgumentType]
    rows = json.loads((tmp_path / "routes.json").read_text())["instances"]
    assert [(row["name"], row["cost"]) for row in rows] == [("x", 1.5), ("y", 2.5), ("z", 1.5)]
    assert here._solved == []


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("../../up", "%2E./%2E./up.tour"),
        ("/etc/x", "%/etc/x.tour"),
        (".hidden", "%2Ehidden.tour"),
        ("a b\n", "a b%0A.tour"),
        ("50%", "50%25.tour"),
        ("uniform/20/3", "uniform/20/3.tour"),
    ],
)
def test_names_stay_inside_the_run_folder(tmp_path, name, path):
    callback = RouteFiles()
    trainer: Any = SimpleNamespace(datamodule=Named([name]), log_dir=str(tmp_path))
    callback.setup(trainer, None, "test")  # pyright: ignore[reportArgumentType]
    assert callback._path(trainer.datamodule, name) == tmp_path / "routes" / path


def test_costs_are_written_in_full():
    assert solution_text(torch.tensor([1, 0, 2, 0, 0]), 784.0) == "Route #1: 1\nRoute #2: 2\nCost 784\n"
    assert solution_text(torch.tensor([1]), 1 / 3).endswith(f"Cost {1 / 3!r}\n")


@given(st.permutations(range(7)), st.text(max_size=20))
def test_tours_read_back(tmp_path_factory, order, name):
    path = tmp_path_factory.mktemp("tours") / "x.tour"
    path.write_text(tour_text(name, torch.tensor(order), name), encoding="utf-8")
    assert read_tour(path, 7).tolist() == list(order)


@given(st.permutations(range(1, 7)), st.lists(st.integers(0, 6), max_size=8), st.integers(0, 3))
def test_solutions_read_back(tmp_path_factory, order, cuts, tail):
    actions = list(order)
    for cut in cuts:
        actions.insert(cut, 0)
    actions += [0] * tail
    path = tmp_path_factory.mktemp("solutions") / "x.sol"
    path.write_text(solution_text(torch.tensor(actions), 12.25))
    solution = read_solution(path, 6)
    assert solution.routes == trips(torch.tensor(actions))
    assert [node for route in solution.routes for node in route] == list(order)
    assert solution.cost == 12.25
