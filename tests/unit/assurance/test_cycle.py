"""The cycle's driver: stop rules, arms, lineage, and kills at every step, on a launcher that trains in no time."""

from __future__ import annotations

import json

import pytest
from cycle_runs import GATE, CoinLauncher, Killed, knob, toss

from modules.assurance import probes, suites
from modules.assurance.cycle import AlignSettings, Cycle, overfit_alarms
from modules.assurance.figures import Measure
from modules.assurance.ledger import entries, verify_path
from modules.assurance.probe import Probe
from modules.assurance.subject import AssuranceError
from modules.assurance.suites import SuiteSettings

SUITE = SuiteSettings(suite="custom", probes=("coins",), n0=100, n_max=400)


@pytest.fixture(autouse=True)
def _coin_suite(monkeypatch):
    coin = Measure("u.coin", "heads", "up", "proportion", "share")
    probe = Probe("coins", (coin,), needs=("chance",), run=toss, block=100)
    monkeypatch.setattr(suites, "all_probes", lambda: {"coins": probe})
    monkeypatch.setattr(probes, "known_capabilities", lambda: {"chance": "() -> float"})


def _cycle(folder, kill_at="", limits=(GATE,), **changed):
    given = {"max_rounds": 5, "knobs": [knob()]} | changed
    launcher = CoinLauncher(SUITE, kill_at)
    return Cycle(folder, AlignSettings(**given), SUITE, limits, launcher, say=lambda line: None), launcher


def _knob_values(folder):
    return [json.loads(path.read_text())["knobs"] for path in sorted(folder.glob("round_*/objectives.json"))]


def test_findings_move_the_knob_until_the_gate_passes(tmp_path):
    cycle, launcher = _cycle(tmp_path)
    assert cycle.run() == 0
    values = [one["model.init_args.chance"] for one in _knob_values(tmp_path)]
    assert values[0] == 0.5
    assert values == sorted(values)
    assert values[-1] > 0.9
    kinds = [(entry["kind"], entry["round"]) for entry in entries(tmp_path / "ledger.jsonl")]
    assert kinds[0] == ("declared", 0)
    assert kinds[1:5] == [("objectives", 0), ("model", 0), ("report", 0), ("decision", 0)]
    last = entries(tmp_path / "ledger.jsonl")[-1]["payload"]
    assert (last["outcome"], last["verdict"], last["arm"]) == ("passed", "pass", "findings")
    assert verify_path(tmp_path) == []
    assert json.loads((tmp_path / "round_01/fit/model.json").read_text())["warm"]
    assert not json.loads((tmp_path / "round_00/fit/model.json").read_text())["warm"]
    assert (tmp_path / "summary.html").is_file()
    again, relaunched = _cycle(tmp_path)
    assert again.run() == 0  # finished: nothing is done twice
    assert relaunched.done == []


def test_fixed_objectives_stall(tmp_path):
    cycle, _ = _cycle(tmp_path, arm="fixed", patience=2)
    assert cycle.run() == 3
    assert {one["model.init_args.chance"] for one in _knob_values(tmp_path)} == {0.5}
    assert entries(tmp_path / "ledger.jsonl")[-1]["payload"]["outcome"] == "stalled"


def test_rounds_run_out(tmp_path):
    cycle, _ = _cycle(tmp_path, max_rounds=2)
    assert cycle.run() == 3
    assert entries(tmp_path / "ledger.jsonl")[-1]["payload"]["outcome"] == "rounds exhausted"


def test_random_moves_stay_within_bounds_and_differ_by_seed(tmp_path):
    for seed in (1, 2):
        _cycle(tmp_path / str(seed), arm="random", seed=seed, stop=False, max_rounds=4)[0].run()
    first, second = (_knob_values(tmp_path / str(seed)) for seed in (1, 2))
    assert first != second
    assert all(0.0 <= one["model.init_args.chance"] <= 1.0 for one in first + second)


def test_all_rounds_run_where_stopping_is_off(tmp_path):
    cycle, launcher = _cycle(tmp_path, stop=False, max_rounds=5, knobs=[knob(start=0.99)])
    assert cycle.run() == 0
    assert launcher.done[-1] == "after assure 4"


STEPS = [f"{when}{what} {number}" for number in (0, 1) for what in ("fit", "assure") for when in ("", "after ")]


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_leaves_the_same_ledger(tmp_path, step):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _cycle(whole)[0].run()
    with pytest.raises(Killed):
        _cycle(broken, kill_at=step)[0].run()
    assert _cycle(broken)[0].run() == 0
    assert (broken / "ledger.jsonl").read_bytes() == (whole / "ledger.jsonl").read_bytes()
    assert verify_path(broken) == []


@pytest.mark.parametrize("length", [0, 1, 40, 400])
def test_a_ledger_cut_by_a_kill_is_mended(tmp_path, length):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _cycle(whole)[0].run()
    with pytest.raises(Killed):
        _cycle(broken, kill_at="assure 1")[0].run()
    content = (whole / "ledger.jsonl").read_bytes()
    (broken / "ledger.jsonl").write_bytes(content[:length])
    assert _cycle(broken)[0].run() == 0
    assert (broken / "ledger.jsonl").read_bytes() == content


def test_another_cycle_in_the_same_folder_is_refused(tmp_path):
    _cycle(tmp_path)[0].run()
    with pytest.raises(AssuranceError, match="declared with other settings"):
        _cycle(tmp_path, max_rounds=9)[0].run()


def test_objectives_changed_by_hand_are_refused(tmp_path):
    with pytest.raises(Killed):
        _cycle(tmp_path, kill_at="assure 1")[0].run()
    layer = tmp_path / "round_01/objectives.yaml"
    layer.write_text(layer.read_text().replace("chance: ", "chance: 9"))
    with pytest.raises(AssuranceError, match="changed by hand"):
        _cycle(tmp_path)[0].run()


def test_a_cycle_without_gates_is_refused(tmp_path):
    from dataclasses import replace

    with pytest.raises(AssuranceError, match="no limit is a gate"):
        _cycle(tmp_path, limits=[replace(GATE, kind="watch")])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_rounds": 0}, "align.max_rounds must be at least 1"),
        ({"min_gain": float("nan")}, "align.min_gain"),
        ({"arm": "finding"}, "align.arm must be one of findings, fixed, random"),
        ({"start": "cold"}, "align.start must be one of"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(AssuranceError, match=message):
        AlignSettings(**wrong)


def _report(fresh, anchor, se=0.01):
    base = {"name": "r.x", "status": "measured", "direction": "up", "se": se}
    return {
        "figures": [base | {"split": "fresh", "value": fresh}, base | {"split": "anchor", "value": anchor}],
        "judgements": [{"figure": "r.x", "kind": "gate", "deficit": 1.0}],
    }


def test_gain_on_fresh_units_alone_raises_the_alarm():
    assert overfit_alarms(_report(0.5, 0.5), _report(0.7, 0.5)) == ("r.x",)
    assert overfit_alarms(_report(0.5, 0.5), _report(0.7, 0.69)) == ()
    assert overfit_alarms(_report(0.5, 0.5), _report(0.53, 0.5)) == ()  # within two standard errors (0.04)
