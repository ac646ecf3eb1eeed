"""The report: canonical bytes, what it refuses, what it holds, and reading it back."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from assurance_runs import LIMITS, toy_result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modules.assurance import probes, report, suites
from modules.assurance.canonical import canonical_bytes, canonical_line, plain
from modules.assurance.figures import Measure, rounded
from modules.assurance.probe import Probe
from modules.assurance.signature import SIGNATURE
from modules.assurance.subject import AssuranceError, Subject, state_digest
from modules.assurance.suites import Ranks, SuiteSettings, run_suite
from modules.assurance.verdict import Limit

DIGEST = "ab" * 32
LAYER = "# round 1\nmodel:\n  init_args:\n    attack: {eps: 0.15}\n    weights: [0.25, 0.75]\n"


def _build(result=None, **changed):
    return report.build(result or toy_result(units=40), **({"subject_digest": DIGEST} | changed))


def test_dict_order_changes_no_byte():
    result = toy_result(units=40)
    turned = replace(
        result,
        figures={
            key: replace(
                figure,
                conditions=dict(reversed(figure.conditions.items())),
                baselines=dict(reversed(figure.baselines.items())),
            )
            for key, figure in reversed(result.figures.items())
        },
        samples=dict(reversed(result.samples.items())),
        judgements=result.judgements[::-1],
        limits=result.limits[::-1],
    )
    layer = {"model": {"init_args": {"attack": {"eps": 0.15}, "weights": [0.25, 0.75]}}}
    first = _build(result, objectives={"seed": 1, **layer}, lineage={"a": 1, "b": 2})
    second = _build(turned, objectives={**layer, "seed": 1}, lineage={"b": 2, "a": 1})
    assert canonical_bytes(first) == canonical_bytes(second)
    assert canonical_bytes(first) != canonical_bytes(_build(toy_result(1, units=40), objectives={"seed": 1, **layer}))


def test_seconds_looks_and_place_change_no_byte(tmp_path):
    result = toy_result(units=40)
    report.write(tmp_path / "a", result)
    report.write(tmp_path / "b" / "c", replace(result, seconds={"perturbed_returns": 99.0}, looks=4))
    for name in ("report.json", "samples.jsonl", "card.md", "report.html", SIGNATURE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / "c" / name).read_bytes()
    timing = json.loads((tmp_path / "b" / "c" / "timing.json").read_text())
    assert (timing["seconds"], timing["looks"]) == ({"perturbed_returns": 99.0}, 4)
    assert str(tmp_path) not in (tmp_path / "a" / "report.json").read_text()


def test_one_rank_and_two_give_the_same_bytes(monkeypatch):
    def toss(subject, block):
        heads = torch.rand(block.count, 2, generator=block.generator()) < torch.tensor([0.5, 0.3])
        return {"r.coin": {"fair": heads[:, 0].double(), "bent": heads[:, 1].double()}}

    coin = Measure("r.coin", "worse coin", "up", "worst_proportion", "share")
    monkeypatch.setattr(suites, "all_probes", lambda: {"coins": Probe("coins", (coin,), (), toss, block=10)})
    monkeypatch.setattr(probes, "known_capabilities", dict)
    made: dict[tuple[int, int], bytes] = {}

    def run(rank, world, gather):
        torch.manual_seed(0)
        subject = Subject("coins", nn.Linear(1, 1, bias=False), {})
        nn.init.zeros_(subject.model.weight)
        found = run_suite(subject, SuiteSettings(n0=40, n_max=80), [Limit("r.coin", 0.25)], Ranks(rank, world, gather))
        made[world, rank] = canonical_bytes(report.build(found, subject_digest=state_digest(subject.model)))

    run(0, 1, lambda mine: [mine])
    barrier, parts = threading.Barrier(2), {}

    def gather(rank, mine):
        parts[rank] = mine
        barrier.wait(20)
        found = [parts[0], parts[1]]
        barrier.wait(20)
        return found

    threads = [threading.Thread(target=run, args=(r, 2, lambda mine, r=r: gather(r, mine))) for r in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[1, 0] == made[2, 0] == made[2, 1]


def test_it_holds_every_figure_of_both_splits():
    result = toy_result(2, 0.5, units=40)
    made = _build(result, lineage={"parent_report": "cd" * 32}, objectives=LAYER)
    assert len(made["figures"]) == len(result.figures)
    for entry in made["figures"]:
        figure = result.figures[entry["name"], entry["split"]]
        assert (entry["status"], entry["reason"], entry["n"]) == (figure.status, figure.reason, figure.n)
        assert entry["principle"] == figure.principle
        if figure.measured:
            for name in ("value", "low", "high", "se"):
                assert entry[name] == rounded(getattr(figure, name))
            assert entry["conditions"] == {name: rounded(value) for name, value in figure.conditions.items()}
            assert entry["baselines"] == dict(figure.baselines)
        else:
            assert entry["value"] is None
    by_figure = {one.limit.figure: one for one in result.judgements}
    assert [one["figure"] for one in made["judgements"]] == sorted(by_figure)
    for one in made["judgements"]:
        judged = by_figure[one["figure"]]
        assert (one["raw"], one["ruling"], one["tau"]) == (judged.raw, judged.ruling, judged.limit.tau)
        assert one["p_holm"] == rounded(judged.p_holm)
        assert one["deficit"] == (None if judged.deficit is None else rounded(judged.deficit))
    assert made["lineage"] == {"model_digest": DIGEST, "parent_report": "cd" * 32}
    assert made["objectives"] == {
        "sha256": hashlib.sha256(LAYER.encode()).hexdigest(),
        "values": {"model.init_args.attack.eps": 0.15, "model.init_args.weights": [0.25, 0.75]},
    }
    assert (made["round"], made["verdict"], made["family"]) == (2, result.verdict, "toy")
    assert made["suite"]["n_max"] == 40
    assert made["card"]["data"][1] == {"name": "operator's recordings", "licence": "unknown", "share": 0.1}


def test_samples_are_the_units_that_were_measured(tmp_path):
    result = toy_result(units=40)
    made = report.write(tmp_path, result)
    content = (tmp_path / "samples.jsonl").read_bytes()
    assert made["samples"] == {"sha256": hashlib.sha256(content).hexdigest(), "lines": content.count(b"\n")}
    rows = [json.loads(line) for line in content.splitlines()]
    assert len(rows) == sum(sample.units for sample in result.samples.values())
    worst = [row for row in rows if (row["figure"], row["split"]) == ("r.worst_return", "anchor")]
    sample = result.samples["r.worst_return", "anchor"]
    assert [row["unit"] for row in worst] == list(range(10))
    found = np.array([[row["values"][name] for name in sample.conditions] for row in worst])
    assert np.allclose(found, sample.values, rtol=1e-11)
    assert [row["values"] for row in rows if row["figure"] == "i.card"] == [{"value": rounded(6 / 7)}]
    assert content.splitlines()[0] + b"\n" == canonical_line(rows[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_what_is_no_number_is_refused_by_name(bad):
    result = toy_result(units=40)
    key = ("u.return", "fresh")
    result.figures[key] = replace(result.figures[key], baselines={"random": bad})
    with pytest.raises(AssuranceError, match=r"figure u\.return \(fresh\)\.baselines\.random is -?(nan|inf)"):
        _build(result)
    with pytest.raises(AssuranceError, match=r"report\.objectives\.values\.model\.eps is"):
        _build(objectives={"model": {"eps": bad}})


def test_what_json_does_not_know_is_refused():
    with pytest.raises(AssuranceError, match=r"report\.lineage\.where is a PosixPath: give numbers"):
        _build(lineage={"where": Path("/somewhere")})
    with pytest.raises(AssuranceError, match="has the key 1: keys must be text"):
        plain({1: 2})


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("- 1\n- 2\n", "mapping of keys to values, got a list"),
        ("a: &x [1]\nb: *x\n", "YAML alias"),
        ("a: " + "1" * 70_000, "more than 64 KiB"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_hostile_objectives_are_refused(layer, said):
    with pytest.raises(AssuranceError, match=said) as caught:
        _build(objectives=layer)
    assert "\n" not in str(caught.value)


def test_no_objectives_and_an_empty_layer():
    assert _build()["objectives"] is None
    assert _build(objectives="# nothing moved\n")["objectives"]["values"] == {}


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=12,
    )
)  # fmt: skip
def test_canonical_bytes_are_a_fixed_point(value):
    first = canonical_bytes(value)
    assert canonical_bytes(json.loads(first)) == first
    assert json.loads(canonical_line(value)) == json.loads(first)
    assert b"-0.0" not in first or "-0.0" in repr(value)


def test_sums_in_another_order_give_the_same_bytes():
    one, other = (0.1 + 0.2) + 0.3, 0.1 + (0.2 + 0.3)
    assert one != other
    assert canonical_bytes(one) == canonical_bytes(other) == b"0.6\n"


def test_reading_back(tmp_path):
    made = report.write(tmp_path, toy_result(units=40), objectives=LAYER, parent="cd" * 32)
    assert report.read(tmp_path) == made
    assert made["lineage"]["parent_report"] == "cd" * 32
    assert report.usefulness(made) == rounded(toy_result(units=40).figure("u.return").value)
    without = {**made, "figures": [one for one in made["figures"] if one["name"][0] != "u"]}
    assert report.usefulness(without) is None


def _sealed_with(folder, **changed):
    """The folder's report with other fields, sealed again as a newer or foreign program would."""
    from modules.assurance.signature import seal

    made = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_bytes(canonical_bytes({**made, **changed}))
    seal(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": 2}, "has schema version 2, this code reads 1"),
        ({"version": None}, "has schema version None"),
        ({"schema": "another.report"}, "its schema must be 'plumbline.assurance.report'"),
    ],
)
def test_unknown_and_newer_schemas_are_refused_in_one_line(tmp_path, changed, said):
    report.write(tmp_path, toy_result(units=40))
    _sealed_with(tmp_path, **changed)
    with pytest.raises(AssuranceError, match=said) as caught:
        report.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_signature_is_unfinished(tmp_path, monkeypatch):
    report.write(tmp_path, toy_result(units=40))
    (tmp_path / SIGNATURE).unlink()
    with pytest.raises(AssuranceError, match="unfinished"):
        report.read(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    report.write(tmp_path, toy_result(units=40))
    monkeypatch.setattr(report.page, "report_page", killed)
    with pytest.raises(KeyboardInterrupt):  # writing anew: the old signature no longer vouches
        report.write(tmp_path, toy_result(1, units=40))
    with pytest.raises(AssuranceError, match="unfinished"):
        report.read(tmp_path)
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_changed_report_is_not_read(tmp_path):
    report.write(tmp_path, toy_result(units=40))
    path = tmp_path / "report.json"
    path.write_bytes(path.read_bytes().replace(b'"fail"', b'"pass"'))
    with pytest.raises(AssuranceError, match="was changed"):
        report.read(tmp_path)


def test_the_declared_digest_knows_the_limits_and_not_their_order():
    first = _build()["limits"]
    assert first["digest"] == _build(toy_result(units=40, limits=LIMITS[::-1]))["limits"]["digest"]
    looser = (replace(LIMITS[0], tau=0.3), *LIMITS[1:])
    assert first["digest"] != _build(toy_result(units=40, limits=looser))["limits"]["digest"]
    whole = (replace(LIMITS[5], tau=1, scale=1), *LIMITS[:5], *LIMITS[6:])  # a config's 1 is a program's 1.0
    assert first["digest"] == _build(toy_result(units=40, limits=whole))["limits"]["digest"]
