"""Fresh instances of a datamodule's kinds: functions of the seed, independent of each other, with references."""

from __future__ import annotations

import pytest
import torch

from datamodules import RoutingDataModule
from datamodules.routing.distributions import make_distribution
from datamodules.routing.kinds import FILE, InstanceKind
from datamodules.routing.tsp import TSP
from modules.contracts import DrawsRoutingInstances

SETS = {
    "uniform": {"sizes": [5, 8], "count": 4},
    "boxed": {"distribution": "mixture_file", "sizes": [8], "count": 4, "normalize": "unit_box"},
}


def _data(**changed) -> RoutingDataModule:
    return RoutingDataModule(**{"problem": "tsp", "size": 8, "eval_sets": SETS, "oracle": "exact", **changed})


def test_instances_are_functions_of_seed_and_kind_alone():
    data = _data()
    assert isinstance(data, DrawsRoutingInstances)
    names = ["uniform/8", "boxed/8", "uniform/5", "explosion/6"]
    found = data.fresh_instances(names, 7, 11)
    again = data.fresh_instances(names[::-1][:2], 7, 11)
    for name, batch in again.items():
        assert torch.equal(batch["locs"], found[name]["locs"])
        assert torch.equal(batch["reference"], found[name]["reference"])
    assert [found[name]["locs"].shape[1] for name in names] == [8, 8, 5, 6]
    assert not torch.equal(data.fresh_instances(["uniform/8"], 7, 12)["uniform/8"]["locs"], found["uniform/8"]["locs"])
    held_out = data.held_out("uniform/8")["locs"]
    assert not any(torch.equal(one, other) for one in held_out for other in found["uniform/8"]["locs"])


def test_references_are_the_oracles_and_measured_in_original_coordinates():
    found = _data().fresh_instances(["boxed/8", "uniform/8"], 5, 3)
    for name, batch in found.items():
        cost = TSP().cost(batch, batch["reference_route"][:, :8].unsqueeze(1))[:, 0].double()
        assert torch.allclose(cost, batch["reference"], atol=1e-5), name
    boxed = found["boxed/8"]
    assert torch.allclose((boxed["locs"].amax(1) - boxed["locs"].amin(1)).amax(-1), torch.ones(()))
    assert float((boxed["original"].amax(1) - boxed["original"].amin(1)).amax()) < 1
    plain = _data(oracle=None).fresh_instances(["uniform/8"], 2, 3)  # by the best oracle at hand
    assert plain["uniform/8"]["reference"].isfinite().all()
    assert "reference" not in _data().fresh_instances(["uniform/8"], 2, 3, references=False)["uniform/8"]


def test_instances_of_a_set_made_as_a_whole_come_from_sets_of_their_own():
    distribution = make_distribution("mixture_file")
    assert distribution.joint
    assert make_distribution({"uniform": 1.0, "mixture_file": 1.0}).joint
    assert not make_distribution({"uniform": 1.0, "cluster": 1.0}).joint
    batch = InstanceKind("m", distribution, 10).fresh(TSP(), 200, 5)
    assert batch["locs"].shape == (200, 10, 2)
    centres = batch["locs"].mean((1, 2))
    one_set = distribution.sample(FILE, 10, torch.Generator().manual_seed(1)).mean((1, 2))
    assert float(centres.std()) > 1.5 * float(one_set.std())  # means of one set share its components


def test_kept_references_are_found_again(tmp_path):
    data = _data(cache_dir=str(tmp_path))
    first = data.fresh_instances(["uniform/8"], 4, 9)
    assert not list(tmp_path.rglob("*.npz"))  # fresh ones never come again
    kept = data.fresh_instances(["uniform/8"], 4, 9, keep=True)
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    again = data.fresh_instances(["uniform/8"], 4, 9, keep=True)
    for other in (kept, again):
        assert torch.equal(first["uniform/8"]["reference"], other["uniform/8"]["reference"])


def test_shares_of_training_and_unknown_kinds():
    mixed = _data(distribution={"uniform": 3.0, "cluster(clusters=2,std=0.05,background=0)": 1.0})
    assert mixed.training_shares() == {"uniform": 0.75, "cluster(clusters=2, std=0.05, background=0.0)": 0.25}
    assert _data().training_shares() == {"uniform": 1.0}
    assert _data().reference_name(8) == "exact"
    with pytest.raises(ValueError, match="nearest: uniform/8"):
        _data().fresh_instances(["uniform"], 1, 1)
    with pytest.raises(ValueError, match="unknown name 'unifrom'"):
        _data().fresh_instances(["unifrom/8"], 1, 1)
