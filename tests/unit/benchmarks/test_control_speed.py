"""The control benchmark: equal settings and work, turns within a round, ratios, and our own side on a tiny run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def line(rate: float, **changes: object) -> dict[str, object]:
    return {
        "environment": "Hopper-v5", "frames": 1000, "updates": 20, "parameters": 7, "cpu_s": 1000 / rate,
        "collect_cpu_s": 250 / rate, "frames_per_cpu_s": rate, "frames_per_wall_s": rate / 2, **changes,
    }  # fmt: skip


def test_sb3_is_pinned_and_leaves_torch_to_the_constraint(load):
    peers = load("peers")
    with_deps, without = peers.read_requirements((BENCHMARKS / "requirements" / "sb3.txt").read_text())
    assert "sb3" in peers.PEERS
    assert {"torch", "stable-baselines3==2.9.2", "gymnasium==1.4.0"} <= set(with_deps)
    assert not without
    assert all("==" in line for line in with_deps if line != "torch")


def test_the_settings_are_the_published_ones_and_every_one_reaches_both_sides(load):
    worker = load("sb3_worker")
    run = worker.PPOArgs()
    assert (run.environment, run.envs, run.frames // run.envs) == ("Hopper-v5", 8, 256)
    assert (run.epochs, run.frames // run.minibatches, run.updates) == (10, 64, 320)
    other = worker.PPOArgs(
        "Walker2d-v5", 4, 16, 3, 2, 1e-3, 0.9, 0.8, 0.1, 0.7, warmup=1, iterations=5, threads=1, seed=9
    )
    changed = [one.name for one in dataclasses.fields(run) if getattr(run, one.name) == getattr(other, one.name)]
    assert changed == ["threads"]
    assert worker.parse_ppo_args(other.options()) == other


def test_our_side_is_told_the_same(load):
    driver, worker = load("control_speed"), load("sb3_worker")
    run = worker.PPOArgs(envs=4, frames=64, epochs=3, minibatches=2, lr=1e-3, gamma=0.9, warmup=1, iterations=5)
    config = driver.full_config(run, "runs")
    ppo = config["model"]["init_args"]["ppo"]
    assert (ppo["lr"], ppo["value_lr"], ppo["anneal"]) == (1e-3, 1e-3, False)
    same = ("epochs", "minibatches", "gamma", "gae_lambda", "clip", "max_grad_norm")
    assert {name: ppo[name] for name in same} == {name: getattr(run, name) for name in same}
    assert config["data"]["init_args"] == {"task": "mujoco/Hopper-v5", "envs": 4, "frames_per_batch": 64}
    assert config["model"]["init_args"]["total_frames"] == 64 * 6
    assert config["trainer"]["max_steps"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [({"envs": 0}, "envs: must be >= 1, got 0"), ({"frames": 2044}, r"a multiple of envs \(8\), got 2044"),
     ({"frames": 2056}, r"a multiple of minibatches \(32\), got 2056")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(load, change, message):
    with pytest.raises(ValueError, match=message):
        load("sb3_worker").PPOArgs(**change)


def test_sides_take_turns_in_going_first(load):
    order = load("control_speed").order_of
    assert [order(("sb3", "plumbline"), number)[0] for number in range(4)] == ["sb3", "plumbline", "sb3", "plumbline"]
    assert sorted(order(("sb3", "plumbline"), 1)) == ["plumbline", "sb3"]


@pytest.mark.parametrize("key", ["environment", "frames", "updates", "parameters"])
def test_sides_that_did_other_work_are_not_compared(load, key):
    check = load("control_speed").check_equal_work
    check({"sb3": line(1.0), "plumbline": line(2.0)})
    with pytest.raises(ValueError, match=f"differ in {key}"):
        check({"sb3": line(1.0), "plumbline": line(2.0, **{key: "other"})})


def test_ratios_are_taken_within_a_round(load):
    rounds = [{"sb3": line(100.0), "plumbline": line(300.0)}, {"sb3": line(1000.0), "plumbline": line(1500.0)},
              {"sb3": line(200.0), "plumbline": line(400.0)}]  # fmt: skip
    found = load("control_speed").summarise(rounds)
    assert found["ratio"] == {"median": 2.0, "min": 1.5, "max": 3.0, "by_round": [3.0, 1.5, 2.0]}
    assert found["frames_per_cpu_s"]["plumbline"] == {"median": 400.0, "min": 300.0, "max": 1500.0}
    assert found["collect_us_per_frame"]["sb3"]["median"] == 1250.0  # a quarter of 5000
    assert found["update_us_per_frame"]["sb3"]["median"] == 3750.0


def test_a_run_writes_every_round_and_no_folder_of_this_machine(load, tmp_path, monkeypatch):
    driver = load("control_speed")
    ran: list[tuple[str, list[str]]] = []

    def run_loop(name: str, command: list[str]) -> dict[str, object]:
        ran.append((name, command))
        return {**line(100.0 if name == "sb3" else 150.0), "last_return": 20.0}

    monkeypatch.setattr(driver, "run_loop", run_loop)
    monkeypatch.setattr(driver, "ensure_peer", lambda name, root: root / name / "python")
    monkeypatch.setattr(driver, "installed_packages", lambda name, root: {name: "1"})
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"benchmark": "control_speed", "tensor": {"kept": True}}))
    argv = ["--parts", "ppo", "--rounds", "2", "--root", str(tmp_path), "--date", "2026-01-02", "--out", str(out)]
    assert driver.main(argv) == 0
    record = json.loads(out.read_text())
    assert record["tensor"] == {"kept": True}
    ppo = record["ppo"]
    assert ppo["command"] == "python benchmarks/control_speed.py --parts ppo --rounds 2 --date 2026-01-02"
    assert (ppo["date"], len(ppo["rounds"]), ppo["ratio"]["by_round"]) == ("2026-01-02", 2, [1.5, 1.5])
    assert str(tmp_path) not in out.read_text()
    assert [name for name, _ in ran] == ["sb3", "plumbline", "plumbline", "sb3"]
    assert [command[-1] for _, command in ran] == ["0", "0", "1", "1"]  # the seed
    assert ran[0][1][0] == str(tmp_path / "sb3" / "python")
    assert ran[1][1][2] == driver.LOOP


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_our_side_counts_whole_iterations_of_the_real_command(load):
    pytest.importorskip("mujoco")
    driver, worker = load("control_speed"), load("sb3_worker")
    run = worker.PPOArgs(envs=2, frames=64, epochs=2, minibatches=4, warmup=1, iterations=2)
    found = driver.run_ours(run)
    assert (found["frames"], found["updates"], found["parameters"]) == (128, 16, 10119)
    assert 0 < found["collect_cpu_s"] < found["cpu_s"]


def test_collection_goes_on_from_rollout_to_rollout(load):
    work = load("control_speed").collection_work("integrator", 8, 5)
    assert [work(), work()] == [40, 40]
