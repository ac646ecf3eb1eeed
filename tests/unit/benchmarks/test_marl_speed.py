"""Helpers of the multi-agent speed benchmarks: equal work, the clock, and loops that really step and restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


# -- training --
def test_benchmarl_is_pinned_and_leaves_torch_to_the_constraint(load):
    peers = load("peers")
    with_deps, without = peers.read_requirements((BENCHMARKS / "requirements" / "benchmarl.txt").read_text())
    assert "benchmarl" in peers.PEERS
    assert "torch" in with_deps
    assert not without
    assert all("==" in line for line in with_deps if line != "torch")


def test_every_option_of_a_setting_reaches_the_loop(load):
    driver, common = load("marl_train_speed"), load("marl_common")
    shared = {name: getattr(common.MarlArgs, name) + 1 for name in driver.SHARED}
    for setting in driver.SETTINGS.values():
        args = common.parse_marl_args(driver.loop_options(setting, "qmix", shared))
        assert args.algorithm == "qmix"
        assert args.threads == 1
        assert {name: getattr(args, name) for name in (*setting, *shared)} == {**setting, **shared}


def test_settings_are_the_published_ones(load):
    settings = load("marl_train_speed").SETTINGS
    assert settings["a"] == {"envs": 10, "frames": 1000, "updates": 50}
    assert settings["b"] == {"envs": 60, "frames": 6000, "updates": 50}
    assert settings["c"]["frames"] == 64 * settings["c"]["updates"]
    assert settings["c"]["envs"] == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "mappo"}, "algorithm: one of iql, vdn, qmix, got 'mappo'"),
        ({"environment": "atari"}, "environment: one of vmas, tensor, pettingzoo, lbf, got 'atari'"),
        ({"envs": 0}, "envs: must be >= 1, got 0"),
        ({"envs": 7, "frames": 1000}, r"frames: must be a multiple of envs \(7\), got 1000"),
    ],
)
def test_settings_that_make_no_sense_are_refused(load, change, message):
    with pytest.raises(ValueError, match=message):
        load("marl_common").MarlArgs(**change)


def test_result_line_skips_what_libraries_print(load):
    driver = load("marl_train_speed")
    output = 'hello {"loop"\n{"loop": "a", "frames": 1}\n[INFO] Initialized\n{"loop": "b", "frames": 2}\nbye\n'
    assert driver.result_line(output) == {"loop": "b", "frames": 2}
    assert driver.result_line("nothing\n") is None


def _line(frames: int, updates: int, rate: float = 1.0, parameters: int = 7) -> dict[str, float]:
    return {"frames": frames, "updates": updates, "frames_per_cpu_s": rate, "parameters": parameters}


def test_loops_that_did_other_work_are_not_compared(load):
    driver = load("marl_train_speed")
    short = driver.LOOPS["benchmarl_pettingzoo"].shorter
    assert short > 1
    results = {"benchmarl": _line(100 * short, 20 * short), "benchmarl_pettingzoo": _line(100, 20)}
    driver.check_equal_work(results, iterations=short)
    with pytest.raises(ValueError, match="different work"):
        driver.check_equal_work({**results, "benchmarl_pettingzoo": _line(100, 30)}, iterations=short)
    with pytest.raises(ValueError, match="different work"):
        driver.check_equal_work({**results, "plumbline": _line(100, 20)}, iterations=short)


def test_networks_on_the_same_task_must_be_of_one_size(load):
    driver = load("marl_train_speed")
    results = {"benchmarl": _line(10, 2), "plumbline": _line(10, 2, parameters=9), "plumbline_vmas": _line(10, 2)}
    driver.check_equal_work(results, iterations=1)  # plumbline is on another environment
    results["plumbline_vmas"] = _line(10, 2, parameters=8)
    with pytest.raises(ValueError, match="different numbers of parameters.*'plumbline_vmas': 8, 'benchmarl': 7"):
        driver.check_equal_work(results, iterations=1)


def test_pairs_name_known_loops(load):
    driver = load("marl_train_speed")
    assert {name for pair in driver.PAIRS for name in pair} == set(driver.LOOPS)


def test_ratios_are_taken_within_a_round(load):
    driver = load("marl_train_speed")
    speeds = [(10.0, 20.0), (1.0, 4.0), (100.0, 300.0)]  # the ratio of the medians would be 2
    rounds = [{"benchmarl": _line(1, 1, theirs), "plumbline": _line(1, 1, ours)} for theirs, ours in speeds]
    assert driver.pair_ratios(rounds, "frames_per_cpu_s") == {
        "plumbline / benchmarl": {"median": 3.0, "min": 2.0, "max": 4.0, "by_round": [2.0, 4.0, 3.0]}
    }
    assert driver.rates(rounds, "frames_per_cpu_s")["plumbline"] == {"median": 20.0, "min": 4.0, "max": 300.0}


def test_other_rules_are_not_compared(load, monkeypatch):
    driver = load("marl_train_speed")
    answers = iter(["same", "same", "same", "other"])
    monkeypatch.setattr(driver, "_last_line", lambda name, command: {"sha256": next(answers)})
    shared = {"agents": 3, "max_steps": 100}
    assert len(driver.check_same_rules(Path("python"), shared)) == 2
    with pytest.raises(ValueError, match="different rules"):
        driver.check_same_rules(Path("python"), shared)


def test_rules_are_read_from_seeds_and_actions(load):
    rules = load("spread_rules")

    class Env:
        """Shows the seed, pays the sum of all actions so far."""

        def reset(self, seed):
            self.seed, self.total = seed, 0
            return self._seen(), {}

        def step(self, actions):
            assert all(0 <= action < 5 for action in actions.values())
            self.total += sum(actions.values())
            ends = dict.fromkeys("ab", False)
            return self._seen(), dict.fromkeys("ab", float(self.total)), ends, ends, {}

        def _seen(self):
            return {name: np.full(2, self.seed, np.float32) for name in "ab"}

    first = rules.play(Env(), seed=1, agents=2, steps=9)
    assert len(first) == 1 + 2 * 9
    assert first == rules.play(Env(), seed=1, agents=2, steps=9)
    assert first != rules.play(Env(), seed=2, agents=2, steps=9)
    with pytest.raises(ValueError, match="2 agents, 3 asked"):
        rules.play(Env(), seed=1, agents=3, steps=9)


@pytest.mark.parametrize("environment", ["vmas", "tensor", "pettingzoo", "lbf"])
def test_every_environment_has_a_task(load, environment):
    loop, common = load("plumbline_marl_loop"), load("marl_common")
    data = loop.full_config(common.MarlArgs(environment=environment), Path("runs"))["data"]["init_args"]
    assert (data["task"], data["backend"], data["options"].get("episode_limit")) == {
        "vmas": ("vmas/simple_spread", "package", 100),
        "tensor": ("mpe/spread-3", "tensor", 100),
        "pettingzoo": ("mpe/spread-3", "package", 100),
        "lbf": ("lbf/8x8-2p-2f-coop", "tensor", None),
    }[environment]


def test_recorded_command_of_training_names_no_folder(load):
    driver = load("marl_train_speed")
    argv = ["--rounds", "3", "--root", "/somewhere", "--settings", "a", "--out", "/x.json"]
    assert driver.public_command(argv) == "python benchmarks/marl_train_speed.py --rounds 3 --settings a"


def test_clock_times_whole_iterations_after_warmup(load, monkeypatch):
    common = load("marl_common")
    now = [0.0]
    monkeypatch.setattr(common, "cpu_seconds", lambda: now[0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: 10.0 * now[0])
    clock = common.IterationClock(warmup=2, iterations=3)
    for collect, train in ((100.0, 200.0), (50.0, 60.0), (1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (70.0, 80.0)):
        now[0] += collect
        clock.collected()
        now[0] += train
        clock.trained()
    line = clock.line("x", common.MarlArgs(envs=10, frames=100, updates=5))
    assert (line["cpu_s"], line["wall_s"], line["collect_cpu_s"]) == (21.0, 210.0, 9.0)
    assert (line["frames"], line["updates"]) == (300, 15)
    assert line["frames_per_cpu_s"] == round(300 / 21, 1)


def test_clock_refuses_a_run_that_was_too_short(load):
    common = load("marl_common")
    clock = common.IterationClock(warmup=1, iterations=2)
    clock.trained()
    clock.trained()
    with pytest.raises(RuntimeError, match="2 iterations ran, 3 needed"):
        clock.line("x", common.MarlArgs())


# -- environments --
def _counting_env(limit: int):
    """A matrix game played ``limit`` times an episode that counts its restarts."""
    from datamodules.envs.matrix_games import MatrixGame

    class Counting(MatrixGame):
        restarted = 0

        def restart(self, rows=None):
            self.restarted += self.envs if rows is None else len(rows)
            super().restart(rows)

    return Counting(6, rounds=limit)


@pytest.mark.parametrize("way", ["direct_work", "torchrl_work"])
def test_batched_loops_restart_every_finished_episode(load, way):
    speed = load("marl_env_speed")
    env = _counting_env(limit=4)
    arguments = {"prepare": type(env).restart} if way == "torchrl_work" else {}
    work = getattr(speed, way)(env, 8, **arguments)
    env.restart()
    env.restarted = 0
    assert work() == 8 * 6  # units are steps of one environment
    assert env.restarted == 2 * 6  # 8 steps are two whole episodes of each of the six
    assert int(env.elapsed.max()) == 0


def test_staggered_episodes_end_at_different_steps(load):
    speed = load("marl_env_speed")
    env = _counting_env(limit=50)
    speed.stagger(env)
    assert len(set(env.elapsed.tolist())) > 1
    assert int(env.elapsed.min()) >= 0
    assert int(env.elapsed.max()) < 50


def test_actions_are_drawn_beforehand_and_cover_all(load):
    speed = load("marl_env_speed")
    env = _counting_env(limit=1)
    pool = speed.action_pool(env)
    first = [next(pool) for _ in range(speed.POOL)]
    again = next(pool)
    assert again is first[0]
    env.check_actions(first[0])
    assert torch.stack(first).unique().tolist() == [0, 1, 2]


def test_package_loop_starts_an_episode_where_one_ends(load):
    speed = load("marl_env_speed")
    log: list[str] = []

    def step(actions):
        assert len(actions) == 2
        assert all(0 <= a < 3 for a in actions)
        log.append("step")
        return log[-3:] == ["step"] * 3  # three steps an episode

    raw = speed.RawEnv(lambda: log.append("reset"), step, agents=2, actions=3, features=1)
    work = speed.raw_work(raw, steps=6)
    log.clear()
    assert work() == 6
    assert log == ["step"] * 3 + ["reset"] + ["step"] * 3 + ["reset"]


def test_sides_of_another_shape_are_not_compared(load):
    speed = load("marl_env_speed")
    env = _counting_env(limit=1)
    raw = speed.RawEnv(lambda: None, lambda _: True, agents=2, actions=3, features=1)
    speed.check_interface("matrix", raw, env)
    with pytest.raises(ValueError, match=r"matrix: agents, actions and features are \(2, 3, 1\) here, \(2, 3, 5\)"):
        speed.check_interface("matrix", speed.RawEnv(raw.reset, raw.step, 2, 3, 5), env)


def test_unknown_families_are_refused(load, capsys):
    speed = load("marl_env_speed")
    assert speed.main(["--tasks", "chess/8x8"]) == 2
    assert "families are lbf, rware, mpe, bpush, got chess/8x8" in capsys.readouterr().err
