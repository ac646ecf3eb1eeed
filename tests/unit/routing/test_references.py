"""References: the cache on disk, worker processes, names, missing packages."""

from __future__ import annotations

import importlib.util
import io
import logging
import multiprocessing
import os

import numpy as np
import pytest
import torch

from datamodules.routing.oracles import Exact, References, default_oracle, make_oracle, references
from datamodules.routing.oracles.base import Oracle
from datamodules.routing.problems import make_problem


class Counting(Oracle):
    """Visits nodes as they come."""

    def __init__(self, name="counting"):
        self.name = name
        self.calls = 0

    def route(self, instance):
        self.calls += 1
        return list(range(instance.nodes))


def batch_of(count=5, seed=0, size=6):
    problem = make_problem("tsp")
    generator = torch.Generator().manual_seed(seed)
    return problem, problem.generate(torch.rand(count, size, 2, generator=generator), generator)


def test_a_hit_is_not_solved_again_and_other_settings_miss(tmp_path):
    problem, batch = batch_of()
    oracle = Counting()
    first = References(oracle, tmp_path).costs(problem, batch)
    again = References(oracle, tmp_path).costs(problem, batch[2:])  # known one by one
    assert oracle.calls == 5
    assert torch.equal(again, first[2:])
    References(oracle, tmp_path).costs(*batch_of(seed=1))
    assert oracle.calls == 10
    other = Counting("counting(2)")
    References(other, tmp_path).costs(problem, batch)
    assert other.calls == 5
    References(oracle).costs(problem, batch)  # no cache
    assert oracle.calls == 15
    oracle.version = 2
    References(oracle, tmp_path).costs(problem, batch)
    assert oracle.calls == 20


def saved(save, *args, **arrays):
    stream = io.BytesIO()
    save(stream, *args, **arrays)
    return stream.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"PK\x03\x04 half a file",
        b"not a zip at all",
        saved(np.save, np.zeros(3)),
        saved(np.savez, keys=np.zeros(5), routes=np.zeros(5), lengths=np.zeros(5)),
        saved(np.savez, keys=np.array(["a"]), routes=np.zeros((2, 3), np.int32), lengths=np.zeros(1, np.int32)),
    ],
    ids=["empty", "half", "text", "one array", "other arrays", "other lengths"],
)
def test_a_damaged_file_is_left_out_and_said(tmp_path, caplog, damage):
    problem, batch = batch_of()
    oracle = Counting()
    expected = References(oracle, tmp_path).costs(problem, batch)
    (file,) = tmp_path.rglob("*.npz")
    file.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(References(oracle, tmp_path).costs(problem, batch), expected)
    assert "is damaged and left out" in caplog.text
    assert oracle.calls == 10
    References(oracle, tmp_path).costs(problem, batch)  # the file was written anew
    assert oracle.calls == 10


def test_a_changed_byte_anywhere_gives_the_same_costs(tmp_path):
    problem, batch = batch_of()
    expected = References(Counting(), tmp_path).costs(problem, batch)
    (file,) = tmp_path.rglob("*.npz")
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        assert torch.equal(References(Counting(), tmp_path).costs(problem, batch), expected), place


def test_kept_routes_that_break_a_rule_are_solved_anew_and_said(tmp_path, caplog):
    problem, batch = batch_of()
    oracle = Counting()
    expected = References(oracle, tmp_path).costs(problem, batch)
    (file,) = tmp_path.rglob("*.npz")
    with np.load(file) as content:
        arrays = dict(content)
    arrays["routes"][3] = 0
    np.savez(file, **arrays)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(References(oracle, tmp_path).costs(problem, batch), expected)
    assert "break a rule, all are computed anew: TSP: instance 3" in caplog.text
    assert oracle.calls == 10
    References(oracle, tmp_path).costs(problem, batch)
    assert oracle.calls == 10


def test_equal_instances_are_solved_once(tmp_path):
    problem, batch = batch_of(3)
    oracle = Counting()
    costs = References(oracle).costs(problem, batch[[0, 1, 2, 1, 2]])
    assert oracle.calls == 3
    assert torch.equal(costs[3:], costs[1:3])


def test_a_run_that_is_stopped_keeps_the_parts_it_finished(tmp_path, monkeypatch):
    class Stopped(Counting):
        def route(self, instance):
            if self.calls == 40:
                raise KeyboardInterrupt
            return super().route(instance)

    monkeypatch.setattr(references, "_SAVED", 1)
    problem, batch = batch_of(50)
    with pytest.raises(KeyboardInterrupt):
        References(Stopped(), tmp_path).costs(problem, batch)
    oracle = Counting()
    References(oracle, tmp_path).costs(problem, batch)
    assert oracle.calls == 50 - 32  # two parts of 16 were whole


def _solve(folder):
    References("two_opt", folder).costs(*batch_of(20, size=12))


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_solve, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".npz"]


def test_worker_processes_find_the_same():
    problem, batch = batch_of(40, size=8)
    here, there = References("two_opt").routes(problem, batch), References("two_opt", workers=2).routes(problem, batch)
    assert torch.equal(here, there)


def test_routes_that_break_a_rule_are_refused():
    class Broken(Counting):
        def route(self, instance):
            return [0] * instance.nodes

    with pytest.raises(ValueError, match="every node must be visited exactly once"):
        References(Broken()).costs(*batch_of())


def test_names():
    assert make_oracle("elkai(3)").name == "elkai(runs=3)"
    assert make_oracle("exact").exact
    for name in ("lkh", "elkai(x)", "elkai(", "elkai(-1)"):
        with pytest.raises(ValueError, match="unknown oracle"):
            make_oracle(name)
    with pytest.raises(ValueError, match="has no setting"):
        make_oracle("exact(3)")
    with pytest.raises(ValueError, match="iterations must be >= 1, got 0"):
        make_oracle("pyvrp(0)")


def test_without_packages_built_in_ones_are_taken(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert [default_oracle("tsp", n).name for n in (10, 50)] == ["exact", "ruin_recreate(1000)"]
    for problem in ("cvrp", "pctsp", "spctsp", "op", "sdvrp"):
        assert default_oracle(problem, 50).name == "ruin_recreate(1000)"
    assert isinstance(default_oracle("op", 10), Exact)


def test_the_log_names_a_package_that_would_do_better_once(caplog, monkeypatch):
    monkeypatch.setattr(references, "_told", set())
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with caplog.at_level(logging.INFO):
        for size in (10, 50):
            default_oracle("tsp", size)
    assert caplog.text.count("elkai is not installed, another oracle is used: pip install 'plumbline[lkh]'") == 1


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    from modules import optional

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"plumbline\[lkh\]"):
        make_oracle("elkai")
    with pytest.raises(ImportError, match=r"plumbline\[routing\]"):
        make_oracle("pyvrp")


def test_the_log_names_the_oracle_once_and_says_what_it_is(caplog, monkeypatch):
    monkeypatch.setattr(references, "_told", set())
    problem, batch = batch_of()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            References("two_opt").costs(problem, batch)
        References("exact").costs(problem, batch)
    assert caplog.text.count("reference costs of tsp by two_opt (a heuristic: gaps to it can be negative)") == 1
    assert caplog.text.count("by exact (proven optima)") == 1


def test_sizes_beyond_exact_are_refused():
    with pytest.raises(ValueError, match="tsp is solved up to size 12, got 20"):
        References("exact").costs(*batch_of(1, size=20))


def test_wrong_routes_are_not_kept(tmp_path):
    class Broken(Counting):
        def route(self, instance):
            return [0] * instance.nodes

    with pytest.raises(ValueError, match="every node must be visited exactly once"):
        References(Broken(), tmp_path).costs(*batch_of())
    assert not list(tmp_path.rglob("*.npz"))


def test_instances_that_cannot_be_solved_are_refused_before_the_oracle():
    problem, batch = batch_of()
    batch["locs"][1, 0] = torch.nan
    oracle = Counting()
    with pytest.raises(ValueError, match="TSP: instance 1: locs must be finite"):
        References(oracle).costs(problem, batch)
    assert oracle.calls == 0


def test_no_instances_have_no_costs():
    problem, batch = batch_of()
    assert References(Counting()).costs(problem, batch[:0]).shape == (0,)
    assert References(Counting()).routes(problem, batch[:0]).shape[0] == 0


class Dying(Counting):
    def route(self, instance):
        os._exit(9)


def test_a_dead_worker_is_said():
    with pytest.raises(RuntimeError, match="a process of counting died .* fewer workers than 2"):
        References(Dying(), workers=2).costs(*batch_of(40))
    with pytest.raises(ValueError, match="workers must be >= 0, got -1"):
        References("two_opt", workers=-1)
