"""RoutingDataModule: batches by step, ranks, resume, a module's own requests, held-out sets, refusals."""

from __future__ import annotations

import math
import sys
import threading
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

import datamodules
from datamodules.routing.distributions import Explosion, unit_box
from datamodules.routing.problem import Problem
from datamodules.routing.tsp import TSP
from datamodules.routing_data import EvalSet, RoutingDataModule
from modules.contracts import DescribesBatch, HasDigest, InstanceRequest, ProvidesRoutingInstances

EVAL_SETS: Any = {"uniform": {"sizes": [6, 8], "count": 11}, "mixture_file": {"sizes": [6], "count": 10}}


class InOrder:
    """Stand-in for an oracle: the cost of the nodes in order. Counts what it was asked for."""

    calls: list[tuple[Any, Any, int]] = []

    def __init__(self, oracle: Any, cache_dir: Any, workers: int) -> None:
        self.oracle, self.cache_dir = oracle, cache_dir

    def costs(self, problem: Problem, instances: TensorDict) -> torch.Tensor:
        InOrder.calls.append((self.oracle, self.cache_dir, len(instances)))
        nodes = instances["locs"].shape[1]
        order = torch.arange(nodes).expand(len(instances), 1, nodes)
        return problem.cost(instances, order)[:, 0].double()


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    InOrder.calls = []
    oracles = SimpleNamespace(References=InOrder, default_oracle=lambda name, size: f"{name}-{size}")
    monkeypatch.setitem(sys.modules, "datamodules.routing.oracles", oracles)
    if find_spec("datamodules.routing.problems") is None:  # until the registry of problems is in the tree
        problems = SimpleNamespace(make_problem=lambda name, **options: {"tsp": TSP}[name](**options))
        monkeypatch.setitem(sys.modules, "datamodules.routing.problems", problems)


def trainer(done: int = 0, rank: int = 0, world: int = 1, module: Any = None, fn: str = "fit", **more: Any) -> Any:
    counts = SimpleNamespace(completed=done, ready=done, started=done, processed=done)
    progress = SimpleNamespace(total=counts, current=SimpleNamespace(**vars(counts)))
    settings = {
        "global_rank": rank, "world_size": world, "accumulate_grad_batches": 1, "max_steps": 12,
        "limit_train_batches": 1.0, "limit_val_batches": 1.0, "state": SimpleNamespace(fn=fn),
        "fit_loop": SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)), "lightning_module": module,
    }  # fmt: skip
    return SimpleNamespace(**{**settings, **more})


def made(at: Any = None, **options: Any) -> RoutingDataModule:
    data = RoutingDataModule("tsp", **{"size": 6, "batch_size": 8, **options})
    data.trainer = trainer() if at is None else at
    return data


def batches(at: Any = None, **options: Any) -> list[TensorDict]:
    return list(made(at, **options).train_dataloader())


def same(one: TensorDict, two: TensorDict) -> bool:
    return set(one.keys()) == set(two.keys()) and all(torch.equal(one[key], two[key]) for key in one.keys())  # noqa: SIM118


class Asks:
    """A module that says what it wants, as its next step comes."""

    def __init__(self, *requests: InstanceRequest | None) -> None:
        self.requests = list(requests)

    def instance_request(self) -> InstanceRequest | None:
        return self.requests.pop(0)


def squeezed(noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return noise * (0.2 + 0.6 * torch.rand(len(noise), 1, 1, generator=generator))


# -- training batches -------------------------------------------------------------------------------------------------
def test_contracts_and_package_attribute():
    data = made(eval_sets=EVAL_SETS)
    assert isinstance(data, ProvidesRoutingInstances)
    assert isinstance(data, HasDigest)
    assert isinstance(data, DescribesBatch)
    assert datamodules.RoutingDataModule is RoutingDataModule


def test_batches_are_as_described():
    first = batches()[0]
    assert first["locs"].shape == (8, 6, 2)
    assert first["index"].tolist() == list(range(8))
    assert "reference" not in first.keys()  # noqa: SIM118
    described = made().describe()
    assert described == {"index": "int64 [8], number within the step", "locs": "float32 [8, 6, 2]"}
    assert made(size=[6, 9]).describe()["locs"] == "float32 [8, N, 2]"
    assert made(trainer(module=Asks())).describe()["locs"] == "float32 [B, N, 2]"


def test_every_step_is_new_and_sizes_take_turns():
    drawn = batches(size=[6, 9, 7])
    assert [batch["locs"].shape[1] for batch in drawn] == [6, 9, 7] * 4
    assert len({float(batch["locs"][0, 0, 0]) for batch in drawn}) == 12


@pytest.mark.parametrize(
    "distribution", ["uniform", "mixture_file", {"uniform": 1, "cluster(std=0.02)": 1}, Explosion(1)]
)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one_rank(distribution, world):
    whole = batches(distribution=distribution)
    parts = [batches(trainer(rank=rank, world=world), distribution=distribution) for rank in range(world)]
    for step, batch in enumerate(whole):
        joined: Any = TensorDict.cat([part[step] for part in parts])
        assert same(joined, batch)
        assert len(parts[0][step]) == 8 // world


def test_micro_batches_share_it_too():
    whole = batches()
    parts = [batches(trainer(rank=rank, world=2, accumulate_grad_batches=2)) for rank in range(2)]
    assert len(parts[0]) == 24
    for step, batch in enumerate(whole):
        joined: Any = TensorDict.cat([parts[rank][2 * step + micro] for micro in range(2) for rank in range(2)])
        assert same(joined, batch)


def test_seed_of_the_run_decides(monkeypatch):
    first = batches()[0]
    assert same(first, batches()[0])
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not same(first, batches()[0])


def test_resume_goes_on_where_the_trainer_stands():
    whole = batches(size=[6, 9])
    before = made(size=[6, 9], at=trainer(5)).state_dict()
    after = made(size=[6, 9], at=trainer(5))
    after.load_state_dict(before)
    left = list(after.train_dataloader())
    assert len(left) == 7
    assert len(after.train_dataloader()) == 12  # Lightning counts batches from the start of the run
    assert all(same(one, two) for one, two in zip(left, whole[5:], strict=True))


def test_resume_with_other_micro_batches_goes_on_at_a_whole_step():
    whole = batches()
    state = made(at=trainer(10, accumulate_grad_batches=2)).state_dict()
    again = made(at=trainer(10, accumulate_grad_batches=1))
    again.load_state_dict(state)
    left = list(again.train_dataloader())
    assert len(left) == 7
    assert same(left[0], whole[5])


def test_epochs_go_on_with_the_stream():
    at = trainer(max_steps=-1)
    data = made(at, steps_per_epoch=4)
    first = list(data.train_dataloader())
    at.fit_loop.epoch_loop.batch_progress.total.completed = 4
    second = list(data.train_dataloader())
    assert [len(first), len(second)] == [4, 4]
    assert all(same(one, two) for one, two in zip(first + second, batches()[:8], strict=True))


# -- requests ---------------------------------------------------------------------------------------------------------
def test_requests_are_served_as_they_come():
    data = made(eval_sets=EVAL_SETS)
    module = Asks(
        None,
        InstanceRequest(9, 4, (1, 2)),
        InstanceRequest(6, 4, (1, 3), coordinates=squeezed, references=True),
        InstanceRequest(6, 3, (1, 4), held_out="mixture_file/6", references=True),
    )
    data.trainer = trainer(module=module)
    loader = data.train_dataloader()
    assert len(loader) == 12
    steps = iter(loader)
    assert len(module.requests) == 4  # nothing is asked for ahead
    assert len(next(steps)) == 0
    assert len(module.requests) == 3
    own, ordered, fixed = (next(steps) for _ in range(3))
    assert own["locs"].shape == (4, 9, 2)
    assert set(own.keys()) == {"locs", "index"}
    assert set(ordered.keys()) == {"locs", "index", "noise", "reference"}
    scale = ordered["locs"] / ordered["noise"]
    assert torch.allclose(scale, scale[:, :1, :1].expand_as(scale))
    assert ordered["reference"].dtype == torch.float64
    assert same(fixed, data.held_out("mixture_file/6")[:3])  # pyright: ignore[reportArgumentType]
    assert [call for call in InOrder.calls if call[2] == 4] == [("tsp-6", None, 4)]


@pytest.mark.parametrize(
    "request_", [
        InstanceRequest(6, 8, (3, 1)),
        InstanceRequest(6, 8, (3, 1), coordinates=squeezed, references=True),
        InstanceRequest(6, 8, (3, 1), held_out="uniform/6", references=True),
    ],
)  # fmt: skip
def test_requests_are_shared_by_ranks(request_):
    whole = made(eval_sets=EVAL_SETS).batch(request_)
    parts = [made(trainer(rank=rank, world=2), eval_sets=EVAL_SETS).batch(request_) for rank in range(2)]
    joined: Any = TensorDict.cat(parts)
    assert same(joined, whole)
    assert len(parts[1]) == 4
    assert not same(whole, made(eval_sets=EVAL_SETS, seed=1).batch(InstanceRequest(6, 8, (3, 2))))


def test_a_request_without_references_has_none():
    batch = made(eval_sets=EVAL_SETS).batch(InstanceRequest(6, 2, (0,), held_out="uniform/6"))
    assert set(batch.keys()) == {"locs", "index"}


@pytest.mark.parametrize(
    ("request_", "message"), [
        (InstanceRequest(6, 7, (0,)), "multiple of the 2 ranks, got 7"),
        (InstanceRequest(6, 0, (0,)), "multiple of the 2 ranks, got 0"),
        (InstanceRequest(6, 2, (0,), held_out="unifrm/6"), "no 'unifrm/6'; nearest: uniform/6"),
        (InstanceRequest(6, 12, (0,), held_out="uniform/6"), "uniform/6 has 11 instances of size 6, asked for were 12"),
        (InstanceRequest(9, 2, (0,), held_out="uniform/6"), "of size 6, asked for were 2 of size 9"),
        (InstanceRequest(6, 2, (0,), coordinates=lambda noise, _: noise[:1]), r"must be \[2, 6, 2\] like the noise"),
        (InstanceRequest(6, 2, (0,), coordinates=lambda noise, _: noise * math.nan), "finite and in"),
        (InstanceRequest(6, 2, (0,), coordinates=lambda noise, _: noise + 1), "finite and in"),
    ],
)  # fmt: skip
def test_wrong_requests(request_, message):
    with pytest.raises(ValueError, match=message):
        made(trainer(world=2), eval_sets=EVAL_SETS).batch(request_)


# -- held-out sets ----------------------------------------------------------------------------------------------------
def test_held_out_sets_depend_on_their_own_seed_alone(monkeypatch):
    one = made(eval_sets=EVAL_SETS).held_out("mixture_file/6")
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    other = {"far": {"sizes": [8, 6], "count": 10, "distribution": "mixture_file"}}
    assert same(one, made(eval_sets=other, batch_size=2).held_out("far/6"))  # nor on names and neighbours
    assert not same(one, made(eval_sets=EVAL_SETS, seed=1).held_out("mixture_file/6"))
    six, eight = (made(eval_sets=EVAL_SETS).held_out(f"uniform/{size}")["locs"] for size in (6, 8))
    assert not torch.equal(six[:, 0], eight[:, 0])
    assert not torch.equal(six[:8, 0], batches()[0]["locs"][:, 0])  # nor is training on them


def test_held_out_loaders_share_by_rank():
    data = made(eval_sets=EVAL_SETS, eval_batch_size=4)
    assert data.evaluation_sets == ["uniform/6", "uniform/8", "mixture_file/6"]
    assert data.instance_name(2, 7) == "mixture_file/6/7"
    for number, loader in enumerate(data.val_dataloader()):
        whole: Any = TensorDict.cat(list(loader))
        assert same(whole, data.held_out(data.evaluation_sets[number]))
        assert len(loader) == 3
    parts = []
    for rank in range(3):
        shared = made(trainer(rank=rank, world=3), eval_sets=EVAL_SETS, eval_batch_size=4)
        parts.append(list(shared.test_dataloader()[0]))
    assert [[len(batch) for batch in part] for part in parts] == [[2, 2, 1]] * 3
    rows: Any = TensorDict.cat([batch for part in parts for batch in part])
    real = rows[rows["index"] >= 0]
    assert same(real[real["index"].argsort()], data.held_out("uniform/6"))
    padding = rows[rows["index"] < 0]
    assert len(padding) == 15 - 11
    assert bool((padding["locs"] == data.held_out("uniform/6")["locs"][0]).all())


def test_ranks_share_the_oracles_work(monkeypatch):
    ranks, parts, barrier = 3, {}, threading.Barrier(3)

    def all_gather(gathered: list[Any], mine: Any) -> None:
        rank = int(threading.current_thread().name)
        parts[rank] = mine
        barrier.wait()
        gathered[:] = [parts[number] for number in range(ranks)]
        barrier.wait()

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    sets: Any = {"uniform": {"sizes": [6], "count": 10}, "cluster": {"sizes": [6], "count": 2}}
    shared: dict[int, RoutingDataModule] = {}

    def work(rank: int) -> None:
        shared[rank] = made(trainer(rank=rank, world=ranks), eval_sets=sets)
        shared[rank].setup("test")

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(call[2] for call in InOrder.calls) == [1, 1, 3, 3, 4]
    alone = made(eval_sets=sets)
    for name in alone.evaluation_sets:
        assert all(same(shared[rank].held_out(name), alone.held_out(name)) for rank in range(ranks))


def test_references_and_cache_folder(tmp_path):
    data = made(eval_sets=EVAL_SETS, cache_dir=str(tmp_path), oracle="mine")
    data.setup("test")
    assert InOrder.calls == [("mine", str(tmp_path), count) for count in (11, 11, 10)]
    instances = data.held_out("uniform/6")
    order = torch.arange(6).expand(11, 1, 6)
    assert torch.allclose(instances["reference"], TSP().cost(instances, order)[:, 0].double())
    InOrder.calls = []
    data.prepare_data()  # in a run, setup spreads the work over ranks
    alone = RoutingDataModule("tsp", 6, eval_sets=EVAL_SETS, cache_dir=str(tmp_path))
    alone.prepare_data()
    assert [call[1] for call in InOrder.calls] == [str(tmp_path)] * 3


def test_without_an_oracle_references_are_unknown():
    data = made(eval_sets=EVAL_SETS, oracle=None)
    assert bool(data.held_out("uniform/6")["reference"].isnan().all())
    assert len(data.held_out("uniform/6")) == 11
    assert bool(data.batch(InstanceRequest(6, 4, (0,), references=True))["reference"].isnan().all())
    assert InOrder.calls == []


def test_instances_without_a_gap_are_dropped(monkeypatch):
    def some_zero(self: InOrder, problem: Problem, instances: TensorDict) -> torch.Tensor:
        return torch.arange(len(instances), dtype=torch.float64) // 3

    monkeypatch.setattr(InOrder, "costs", some_zero)
    data = made(eval_sets={"uniform": EvalSet([6], 11)})
    with pytest.warns(UserWarning, match="uniform/6: 3 of 11 instances dropped"):
        instances = data.held_out("uniform/6")
    assert data.dropped == {"uniform/6": 3}
    assert instances["reference"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3]
    assert instances["index"].tolist() == list(range(8))
    with pytest.raises(ValueError, match="uniform/6: every instance has cost 0"):
        made(eval_sets={"uniform": EvalSet([6], 2)}).held_out("uniform/6")


def test_unit_box_changes_what_solvers_see_and_no_cost():
    sets: Any = {
        "mixture_file": {"sizes": 6, "count": 10},
        "boxed": {"sizes": 6, "count": 10, "distribution": "mixture_file", "normalize": "unit_box"},
    }
    data = made(eval_sets=sets)
    raw, boxed = data.held_out("mixture_file/6"), data.held_out("boxed/6")
    assert torch.equal(boxed["locs"], unit_box(raw["locs"]))
    assert torch.equal(boxed["original"], raw["locs"].double())
    assert torch.allclose(boxed["reference"], raw["reference"])
    order = torch.randperm(6).expand(10, 1, 6)
    assert torch.allclose(TSP().cost(boxed, order), TSP().cost(raw, order).double())


# -- settings ---------------------------------------------------------------------------------------------------------
def test_digest_names_every_setting():
    digest = made(eval_sets=EVAL_SETS).digest()
    assert digest["distribution"] == "uniform"
    changed = made(eval_sets=EVAL_SETS, distribution="grid", seed=2, size=9).digest()
    assert {key for key in digest if digest[key] != changed[key]} == {"distribution", "seed", "size"}


@pytest.mark.parametrize(
    ("options", "field"), [
        ({"size": 7}, "size"), ({"batch_size": 4}, "batch_size"), ({"distribution": "grid"}, "distribution"),
        ({"distribution": "uniform", "seed": 1}, "seed"), ({"oracle": None}, "oracle"),
        ({"eval_sets": EVAL_SETS}, "eval_sets"),
    ],
)  # fmt: skip
def test_resume_with_other_data_is_refused(options, field):
    state = made().state_dict()
    other = made(**options)
    with pytest.raises(ValueError, match=f"trained on other data: {field} was"):
        other.load_state_dict(state)
    other.trainer = trainer(fn="test")
    other.load_state_dict(state)  # a checkpoint may be tested on anything


def test_resume_with_another_seed_of_the_run_is_refused(monkeypatch):
    state = made().state_dict()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    with pytest.raises(ValueError, match="seed_everything was 0, is 7"):
        made().load_state_dict(state)


def test_hyperparameters_are_plain():
    data = made(distribution=Explosion(rounds=2), eval_sets={"uniform": EvalSet([6], 3)})
    assert data.hparams["distribution"] == "explosion(rounds=2, smallest=0.1, largest=0.4, rate=10.0)"
    assert data.hparams["eval_sets"]["uniform"]["count"] == 3
    again = RoutingDataModule(**data.hparams)
    assert again.digest() == data.digest()


@pytest.mark.parametrize(
    ("options", "message"), [
        ({"size": 0}, r"size must be numbers >= 1, got \[0\]"),
        ({"size": []}, "size must be numbers >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be >= 1, got 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be >= 1 or null, got 0"),
        ({"oracle_workers": -1}, "oracle_workers must be >= 0, got -1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"distribution": "unform"}, "nearest: uniform"),
        ({"eval_sets": {"uniform": {"counts": 3}}}, "EvalSet: unknown key 'counts'"),
        ({"eval_sets": {"mine": {}}}, "unknown name 'mine'"),
        ({"eval_sets": {"uniform": {"count": 0}}}, r"eval_sets.uniform.count must be >= 1, got 0"),
        ({"eval_sets": {"uniform": {"sizes": []}}}, r"eval_sets.uniform.sizes must be numbers >= 1"),
        ({"eval_sets": {"uniform": {"sizes": [6, 6]}}}, r"eval_sets.uniform.sizes: each size once"),
        ({"eval_sets": {"uniform": {"normalize": "box"}}}, "normalize must be none or unit_box, got 'box'"),
    ],
)  # fmt: skip
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_unequal_shares_and_missing_length_are_refused():
    with pytest.raises(ValueError, match="batch_size must be a multiple of ranks x accumulate_grad_batches = 3, got 8"):
        made(trainer(world=3)).setup("fit")
    made(trainer(world=3, module=Asks())).setup("fit")  # its requests have counts of their own
    with pytest.raises(ValueError, match="training length must be given as trainer.max_steps"):
        batches(trainer(max_steps=-1))
