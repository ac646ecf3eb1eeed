"""The RLHF step benchmark: equal settings, equal work, the clock, and our own loop on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
TINY = {"vocab": 60, "dim": 16, "layers": 1, "heads": 2}


def test_trl_is_pinned_and_leaves_torch_to_the_constraint(load):
    peers = load("peers")
    with_deps, without = peers.read_requirements((BENCHMARKS / "requirements" / "trl.txt").read_text())
    assert "trl" in peers.PEERS
    assert "torch" in with_deps
    assert not without
    assert all("==" in line for line in with_deps if line != "torch")


def test_every_option_of_an_rlhf_setting_reaches_the_loop(load):
    driver, common = load("rlhf_step_speed"), load("rlhf_common")
    shared = {name: getattr(common.RlhfArgs, name) + 1 for name in driver.SHARED}
    for setting in driver.SETTINGS.values():
        args = common.parse_rlhf_args(driver.loop_options(Path("folder"), setting, shared))
        assert (args.model, args.threads, args.profile) == (Path("folder"), 1, False)
        assert {name: getattr(args, name) for name in (*setting, *shared)} == {**setting, **shared}


def test_published_setting_makes_512_tokens_a_step(load):
    driver, common = load("rlhf_step_speed"), load("rlhf_common")
    args = common.RlhfArgs(**driver.SETTINGS["4x4"])
    assert args.responses * args.new_tokens == 512
    assert driver.SIZES == {"vocab": 50_257, "dim": 768, "layers": 12, "heads": 12}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"group": 1}, "group: must be >= 2"), ({"steps": 0}, "steps: must be >= 1, got 0"),
     ({"warmup": 0}, "warmup: must be >= 1, got 0")],
)  # fmt: skip
def test_rlhf_settings_that_make_no_sense_are_refused(load, change, message):
    with pytest.raises(ValueError, match=message):
        load("rlhf_common").RlhfArgs(**change)


def test_both_sides_are_told_the_same(load):
    common, trl, ours = load("rlhf_common"), load("trl_loop"), load("plumbline_rlhf_loop")
    args = common.RlhfArgs(
        prompts=3, group=5, new_tokens=7, top_k=11, beta=0.3, clip=0.4, lr=2e-5, weight_decay=0.02, betas=(0.8, 0.9),
        grad_norm=0.6,
    )  # fmt: skip
    theirs = trl.config_options(args, "folder")
    module = ours.build_module(args, common.StepClock(args))
    assert theirs["per_device_train_batch_size"] == theirs["generation_batch_size"] == 15
    assert theirs["num_generations"] == module.group_size == 5
    assert theirs["num_iterations"] == module.ppo.epochs == 1
    assert module.ppo.minibatch_responses is None
    assert theirs["max_completion_length"] == theirs["generation_kwargs"]["min_new_tokens"] == 7
    assert (module.generation.min_new, module.generation.max_new) == (7, 7)
    assert theirs["top_k"] == module.generation.top_k == 11
    assert theirs["beta"] == module.kl.beta == float(module.beta) == 0.3
    assert theirs["epsilon"] == module.ppo.clip == 0.4
    assert theirs["max_grad_norm"] == module.ppo.max_grad_norm == 0.6
    adam = module.optimizer_options
    assert (adam["name"], adam["lr"], adam["weight_decay"]) == ("adamw", 2e-5, 0.02)
    assert (theirs["learning_rate"], theirs["weight_decay"]) == (2e-5, 0.02)
    assert (theirs["adam_beta1"], theirs["adam_beta2"]) == adam["betas"] == (0.8, 0.9)
    assert module.critic_spec.kind == "none"


# -- the clock --
def _clock(load, monkeypatch, *, steps: int = 3, **change):
    """A clock of 2 x 2 responses of 5 tokens, and the time that it reads."""
    common = load("rlhf_common")
    now = [0.0]
    monkeypatch.setattr(common, "cpu_seconds", lambda: now[0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: 10.0 * now[0])
    args = common.RlhfArgs(prompts=2, group=2, new_tokens=5, warmup=2, steps=steps, **change)
    return common.StepClock(args), now


def _step(clock, now, cost: float, update: int, lengths=(5, 5, 5, 5)) -> None:
    clock.add("generate", 0.1 * cost)
    clock.add("generate", 0.2 * cost)
    clock.responded(lengths)
    now[0] += cost
    clock.ended(update)


def test_clock_times_whole_steps_after_warmup(load, monkeypatch):
    clock, now = _clock(load, monkeypatch)
    for number, cost in enumerate((100.0, 50.0, 1.0, 2.0, 6.0)):
        _step(clock, now, cost, number + 1)
    line = clock.line("x", parameters=7)
    assert (line["cpu_s"], line["wall_s"], line["cpu_s_per_step"]) == (9.0, 90.0, 3.0)
    assert line["step_cpu_s"] == [1.0, 2.0, 6.0]
    assert (line["tokens"], line["updates"], line["parameters"]) == (60, 3, 7)
    assert (line["tokens_per_cpu_s"], line["tokens_per_wall_s"]) == (round(60 / 9, 2), round(60 / 90, 2))
    assert line["phases_cpu_s"] == {"generate": pytest.approx(0.3 * 3.0)}


@pytest.mark.parametrize(
    ("last", "message"),
    [((5, (5, 5, 5, 4)), r"\[19, 20\] tokens a step and 3 updates were made, 20 and 3 wanted"),
     ((6, (5, 5, 5, 5)), r"\[20\] tokens a step and 4 updates were made, 20 and 3 wanted"), (None, "4 steps and 4")],
)  # fmt: skip
def test_clock_refuses_a_run_that_did_other_work(load, monkeypatch, last, message):
    clock, now = _clock(load, monkeypatch)
    for number in range(4):
        _step(clock, now, 1.0, number + 1)
    if last is not None:
        _step(clock, now, 1.0, *last)
    with pytest.raises(RuntimeError, match=message):
        clock.line("x")


# -- the comparison --
def _line(rate: float = 1.0, **change) -> dict:
    line = {"steps": 2, "tokens": 10, "updates": 2, "parameters": 7, "dtype": "torch.float32", "probe": -1.0}
    return {**line, "moved": 1e-6, "tokens_per_cpu_s": rate, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [({key: 9}, f"loops differ in {key}: .*'plumbline': 9") for key in ("steps", "tokens", "updates", "parameters")]
    + [({"dtype": "torch.bfloat16"}, "loops differ in dtype"), ({"probe": -1.01}, "the start models differ"),
       ({"moved": 0.0}, "plumbline made updates that changed nothing")],
)  # fmt: skip
def test_rlhf_loops_that_did_other_work_are_not_compared(load, change, message):
    driver = load("rlhf_step_speed")
    driver.check_equal_work({"trl": _line(), "plumbline": _line(2.0, probe=-1.0005)})
    with pytest.raises(ValueError, match=message):
        driver.check_equal_work({"trl": _line(), "plumbline": _line(**change)})


def test_rlhf_ratios_are_taken_within_a_round(load):
    driver = load("rlhf_step_speed")
    speeds = [(10.0, 20.0), (1.0, 4.0), (100.0, 300.0)]  # the ratio of the medians would be 2
    rounds = [{"trl": _line(theirs), "plumbline": _line(ours)} for theirs, ours in speeds]
    table = driver.summarise(rounds, "tokens_per_cpu_s")
    assert table["trl"] == {"median": 10.0, "min": 1.0, "max": 100.0}
    assert table["plumbline"]["ratio"] == {"median": 3.0, "min": 2.0, "max": 4.0, "by_round": [2.0, 4.0, 3.0]}
    alone = driver.summarise([{"plumbline": _line(5.0)}], "tokens_per_cpu_s")
    assert alone == {"plumbline": {"median": 5.0, "min": 5.0, "max": 5.0}}


def test_recorded_command_of_rlhf_names_no_folder(load):
    driver = load("rlhf_step_speed")
    argv = ["--rounds", "2", "--root", "/somewhere", "--out", "/x", "--steps", "4"]
    assert driver.public_command(argv) == "python benchmarks/rlhf_step_speed.py --rounds 2 --steps 4"


def _driver_with(load, monkeypatch, answers):
    """The driver, whose loops give ``answers`` in turn, without environments or weights."""
    driver = load("rlhf_step_speed")
    given = iter(answers)

    def run_loop(name, python, options):
        answer = next(given)
        if isinstance(answer, Exception):
            raise answer
        return {**answer, "loop": name}

    monkeypatch.setattr(driver, "ensure_peer", lambda name, root: Path("python"))
    monkeypatch.setattr(driver, "installed_packages", lambda name, root: {name: "1"})
    monkeypatch.setattr(driver, "prepare_model", lambda *given: Path("folder"))
    monkeypatch.setattr(driver, "run_loop", run_loop)
    return driver


def _timed(rate: float) -> dict:
    phases = {"generate": 1.0, "rollout": 3.0}
    return _line(rate, tokens_per_wall_s=rate, cpu_s_per_step=10 / rate, phases_cpu_s=phases)


def test_result_says_how_it_was_made_and_keeps_every_round(load, monkeypatch, tmp_path, capsys):
    driver = _driver_with(load, monkeypatch, [_timed(1.0), _timed(2.0), _timed(1.0), _timed(3.0)])
    argv = ["--rounds", "2", "--out", str(tmp_path), "--date", "2000-01-01"]
    assert driver.main(argv) == 0
    found = json.loads((tmp_path / "4x4.json").read_text())
    assert found["made"]["command"] == "python benchmarks/rlhf_step_speed.py --rounds 2 --date 2000-01-01"
    assert found["made"]["date"] == "2000-01-01"
    assert found["made"]["machine"]["cores"] >= 1
    assert (len(found["rounds"]), found["tokens_per_cpu_s"]["plumbline"]["ratio"]["median"]) == (2, 2.5)
    assert "plumbline" in capsys.readouterr().out


def test_interrupted_comparison_keeps_the_rounds_it_has(load, monkeypatch, tmp_path, capsys):
    driver = _driver_with(load, monkeypatch, [_timed(1.0), _timed(2.0), RuntimeError("trl failed")])
    assert driver.main(["--rounds", "2", "--out", str(tmp_path)]) == 1
    assert "trl failed" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "4x4.json").read_text())["rounds"]) == 1


# -- the model and our loop --
@pytest.fixture
def tiny(load, tmp_path, monkeypatch):
    driver = load("rlhf_step_speed")
    monkeypatch.setattr(driver, "PROMPTS", 6)
    return driver, driver.prepare_model(tmp_path, TINY, 4, 0)


def test_prompts_have_the_tokens_that_were_asked_for(load, tiny):
    from transformers import AutoTokenizer

    driver, folder = tiny
    texts = json.loads((folder / "model" / load("rlhf_common").PROMPTS_FILE).read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert {len(tokens) for tokens in tokenizer(texts)["input_ids"]} == {4}
    assert len(set(texts)) == 6
    assert tokenizer.eos_token_id == 59
    weights = folder / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert driver.prepare_model(folder.parent, TINY, 4, 0) == folder
    assert weights.stat().st_mtime_ns == before
    assert driver.prepare_model(folder.parent, TINY, 4, 1) != folder


def test_plumbline_loop_does_the_work_it_reports(load, tiny, capsys, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored afterwards
    common, loop = load("rlhf_common"), load("plumbline_rlhf_loop")
    driver, folder = tiny
    args = common.RlhfArgs(
        model=folder / "model", prompts=2, group=2, prompt_tokens=4, new_tokens=3, warmup=1, steps=2, lr=1e-3
    )
    loop.main(args)
    line = driver.result_line(capsys.readouterr().out)
    assert (line["steps"], line["tokens"], line["updates"]) == (2, 24, 2)
    assert set(line["phases_cpu_s"]) == {"generate", "rollout"}
    assert line["dtype"] == "torch.float32"
    vocab, dim = TINY["vocab"], TINY["dim"]
    assert line["parameters"] == (vocab + 1024) * dim + 12 * dim**2 + 13 * dim + 2 * dim  # one layer, tied head
    assert line["moved"] > 1e-4
    driver.check_equal_work({"plumbline": line})
    with pytest.raises(ValueError, match="4 steps need 8 prompts, prompts.json has 6"):
        common.read_prompts(common.RlhfArgs(model=folder / "model", prompts=2, warmup=1, steps=3))


def test_reward_and_probe_are_what_they_say(load):
    common = load("rlhf_common")
    assert common.even_share([2, 3, 4, 8]) == 0.75
    assert common.even_share([]) == 0.0
    logits = torch.tensor([[[0.0, 0.0], [9.0, 9.0]]])
    assert common.mean_log_probability(logits, torch.tensor([[0, 1]])) == pytest.approx(-0.6931, abs=1e-4)
