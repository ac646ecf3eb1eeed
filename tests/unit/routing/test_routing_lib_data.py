"""RoutingLibDataModule: what batches hold, sets and names, ranks, and what is refused before anything is solved."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

import datamodules
from datamodules.routing.lib_files import LibInstance, write_instance
from datamodules.routing_lib_data import RoutingLibDataModule
from modules.contracts import DescribesBatch, ProvidesRoutingInstances

SIZES = {"big": 7, "small": 3, "middle": 5}


def points(nodes: int, side: float = 10.0) -> torch.Tensor:
    return torch.rand(nodes, 2, generator=torch.Generator().manual_seed(nodes), dtype=torch.float64) * side - side / 3


@pytest.fixture
def folder(tmp_path):
    for name, nodes in SIZES.items():
        write_instance(tmp_path / "tsp" / f"{name}.tsp", LibInstance("tsp", f"{name}-by-name", points(nodes)))
        demand = torch.arange(1, nodes)
        write_instance(tmp_path / "vrp" / "A" / f"{name}.vrp", LibInstance("cvrp", name, points(nodes), demand, 9))
    write_instance(
        tmp_path / "vrp" / "B" / "small.vrp", LibInstance("cvrp", "b", points(4), torch.tensor([1, 2, 0]), 3)
    )
    (tmp_path / "optima.csv").write_text("name,optimum\nsmall,20\nmiddle-by-name,30\n")
    return tmp_path


def made(*args: Any, rank: int = 0, world: int = 1, **options: Any) -> RoutingLibDataModule:
    data = RoutingLibDataModule(*args, **options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # pyright: ignore[reportAttributeAccessIssue]
    data.setup("test")
    return data


def rows(data: RoutingLibDataModule) -> list[list[TensorDict]]:
    return [list(loader) for loader in data.test_dataloader()]


def test_batches_of_tsp(folder):
    data = made("tsp", [str(folder / "tsp")], str(folder / "optima.csv"))
    assert isinstance(data, ProvidesRoutingInstances)
    assert isinstance(data, DescribesBatch)
    assert data.evaluation_sets == ["tsp"]
    (batches,) = rows(data)
    assert [data.instance_name(0, int(batch["index"])) for batch in batches] == ["small", "middle", "big"]
    assert [batch["locs"].shape for batch in batches] == [(1, n, 2) for n in (3, 5, 7)]
    references = torch.cat([batch["reference"] for batch in batches]).tolist()
    assert references[:2] == [20.0, 30.0]  # by the file's name, by its NAME
    assert math.isnan(references[2])
    described = data.describe()
    for batch in batches:
        data.problem.begin(batch, 2)
        assert set(batch.keys()) == set(described)
        for key, value in batch.items():
            assert described[key].startswith(str(value.dtype).removeprefix("torch."))  # pyright: ignore
        original, locs = batch["original"][0], batch["locs"][0].double()
        assert torch.equal(original, points(len(locs)))
        assert bool(batch["rounded"])
        assert locs.amin(0).abs().max() == 0
        assert locs.amax() == 1
        side = (original.amax(0) - original.amin(0)).max()
        torch.testing.assert_close(locs * side, original - original.amin(0), rtol=0, atol=1e-5)


def test_batches_of_cvrp(folder):
    data = made("cvrp", [str(folder / "vrp")])
    assert data.evaluation_sets == ["A", "B"]
    first, second = rows(data)
    assert [len(first), len(second)] == [3, 1]
    assert [data.instance_name(0, i) for i in range(3)] == ["A/small", "middle", "big"]
    assert data.instance_name(1, 0) == "B/small"
    batch = first[2]
    assert set(batch.keys()) == set(data.describe())
    assert batch["capacity"].tolist() == [9]
    assert (batch["demand"].double() * 9).round().tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["demand"].dtype == torch.float32
    assert bool(batch["reference"].isnan())
    assert data.describe().keys() - made("tsp", [str(folder / "tsp")]).describe().keys() == {"demand", "capacity"}


def test_files_folders_and_patterns(folder, monkeypatch):
    one = folder / "tsp" / "small.tsp"
    data = made("tsp", [str(one), str(folder / "tsp" / "*i*.tsp"), str(folder / "tsp" / ".." / "tsp" / "small.tsp")])
    assert [data.instance_name(0, i) for i in range(len(rows(data)[0]))] == ["small", "middle", "big"]
    monkeypatch.chdir(folder / "tsp")
    assert made("tsp", ["."]).evaluation_sets == ["tsp"]
    (folder / "tsp" / "small.tsp").rename(folder / "other.txt")
    assert len(rows(made("tsp", [str(folder / "other.txt")]))[0]) == 1  # a file that is named may be called anything


def test_folders_of_one_name_are_told_apart(folder):
    for parent in ("x", "y"):
        write_instance(folder / parent / "C" / "s.tsp", LibInstance("tsp", "", points(3)))
    data = made("tsp", [str(folder / "x"), str(folder / "y"), str(folder / "tsp")])
    assert data.evaluation_sets == ["x/C", "y/C", "tsp"]
    assert data.instance_name(1, 0) == "y/C/s"


def test_max_size_leaves_larger_ones_out(folder):
    assert [batch["locs"].shape[1] for batch in rows(made("tsp", [str(folder / "tsp")], max_size=5))[0]] == [3, 5]
    data = made("cvrp", [str(folder / "vrp")], max_size=2)  # customers: 3 nodes
    assert data.evaluation_sets == ["A"]
    assert len(rows(data)[0]) == 1
    with pytest.raises(ValueError, match="max_size: all 3 instances have more than 2 customers"):
        made("tsp", [str(folder / "tsp")], max_size=2)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_ranks_share_each_set_and_have_as_many_batches(folder, world):
    whole = rows(made("cvrp", [str(folder / "vrp")]))
    parts = [rows(made("cvrp", [str(folder / "vrp")], rank=rank, world=world)) for rank in range(world)]
    for number, expected in enumerate(whole):
        shares = [part[number] for part in parts]
        assert len({len(share) for share in shares}) == 1
        loader = made("cvrp", [str(folder / "vrp")], world=world).val_dataloader()[number]
        assert len(loader) == len(shares[0])
        indices = sorted(int(batch["index"]) for share in shares for batch in share)
        assert [index for index in indices if index >= 0] == list(range(len(expected)))
        for rank, share in enumerate(shares):
            for place, batch in enumerate(share):
                index = int(batch["index"])
                assert index in (rank + place * world, -1)
                # rows that fill up are whole instances too
                assert torch.equal(batch["locs"], expected[max(index, 0)]["locs"])


def test_batches_are_copies(folder):
    data = made("tsp", [str(folder / "tsp")])
    rows(data)[0][0]["locs"].zero_()
    assert rows(data)[0][0]["locs"].abs().sum() > 0


def test_without_normalisation(folder):
    write_instance(folder / "unit" / "u.tsp", LibInstance("tsp", "", points(4, 1.0) + 1 / 3))
    batch = rows(made("tsp", [str(folder / "unit")], normalize="none", rounded=False))[0][0]
    assert torch.equal(batch["locs"], batch["original"].float())
    assert not bool(batch["rounded"])
    with pytest.raises(
        ValueError, match=r"small\.tsp has coordinates from .* outside \[0, 1\]: set normalize to unit_box"
    ):
        made("tsp", [str(folder / "tsp")], normalize="none", rounded=False)


def test_exact_distances(folder):
    length = 0.0
    for rounded in (False, True):
        data = made("tsp", [str(folder / "tsp" / "small.tsp")], rounded=rounded)
        nodes = points(3)
        sides = [float((nodes[i] - nodes[i - 1]).norm()) for i in range(3)]
        length = sum(map(round, sides)) if rounded else sum(sides)
        assert float(data.problem.cost(rows(data)[0][0], torch.tensor([[[0, 1, 2]]]))) == pytest.approx(length)
    assert length == int(length)


def test_nodes_in_one_place(folder):
    write_instance(folder / "dot" / "d.tsp", LibInstance("tsp", "", torch.full((3, 2), 7.0, dtype=torch.float64)))
    assert rows(made("tsp", [str(folder / "dot")]))[0][0]["locs"].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem": "pctsp"}, "problem must be tsp or cvrp, got 'pctsp'"),
        ({"files": []}, r"files must be a list of files, folders or patterns, got \[\]"),
        ({"files": "tsp"}, "files must be a list"),
        ({"max_size": 0}, "max_size must be >= 1 or null, got 0"),
        ({"normalize": "none"}, "rounded must be false with normalize none"),
        ({"normalize": "box"}, "normalize must be unit_box or none, got 'box'"),
    ],
)
def test_options_are_checked_early(options, message):
    with pytest.raises(ValueError, match=f"RoutingLibDataModule: {message}"):
        RoutingLibDataModule(**{"problem": "tsp", "files": ["x"], **options})


def test_refusals_at_setup(folder):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*none\.tsp"):
        made("tsp", [str(folder / "none.tsp")])
    with pytest.raises(FileNotFoundError, match=r"no file matches .*none\*"):
        made("tsp", [str(folder / "none*")])
    with pytest.raises(ValueError, match=r"no \.tsp file in folder .*vrp"):
        made("tsp", [str(folder / "vrp")])
    with pytest.raises(ValueError, match=r"small\.vrp is of TYPE CVRP: set data\.problem to cvrp"):
        made("tsp", [str(folder / "vrp" / "B" / "small.vrp")])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv does not exist"):
        made("tsp", [str(folder / "tsp")], str(folder / "nowhere.csv"))
    (folder / "others.csv").write_text("name,optimum\nelse,1\n")
    with pytest.raises(ValueError, match=r"optima: .*others\.csv names none of the 3 instances"):
        made("tsp", [str(folder / "tsp")], str(folder / "others.csv"))
    (folder / "tsp" / "broken.tsp").write_text("TYPE : TSP\n")
    with pytest.raises(ValueError, match=r"broken\.tsp.*EDGE_WEIGHT_TYPE is missing"):
        made("tsp", [str(folder / "tsp")])
    (folder / "tsp" / "broken.tsp").rename(folder / "broken.txt")
    write_instance(folder / "tsp" / "small.TSP", LibInstance("tsp", "", points(3)))
    with pytest.raises(ValueError, match="two instances are called tsp/small: leave one out"):
        made("tsp", [str(folder / "tsp")])


def test_training_is_refused(folder):
    data = datamodules.RoutingLibDataModule("tsp", [str(folder / "tsp")])
    for call in (lambda: data.setup("fit"), data.train_dataloader):
        with pytest.raises(ValueError, match=r"validate, test and predict: train on datamodules\.RoutingDataModule"):
            call()


def test_settings_are_plain_and_saved(folder):
    data = made("tsp", [str(folder / "tsp")], str(folder / "optima.csv"), max_size=5)
    assert dict(data.hparams) == {
        "problem": "tsp",
        "files": [str(folder / "tsp")],
        "optima": str(folder / "optima.csv"),
        "max_size": 5,
        "normalize": "unit_box",
        "rounded": True,
    }
