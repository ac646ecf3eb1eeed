"""The computer agent through the command line, in a real browser."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from browsing import needs_browser
from expert_backend import write_prompts
from population_runs import assert_same, checkpoint, rows

pytestmark = pytest.mark.xdist_group("browser")

PLUMBING_TASKS = (
    "click-button", "click-link", "click-test-2", "click-tab", "enter-text", "click-checkboxes", "login-user",
    "choose-list", "click-option", "enter-password",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _browser():
    needs_browser()


def outcomes(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("rank-*.jsonl")) for line in path.read_text().splitlines()]


def figures(folder: Path) -> dict[str, float]:
    """Last value of each metric of a run that does not measure time."""
    found: dict[str, float] = {}
    for row in rows(folder):
        found.update(row)
    return {key: value for key, value in found.items() if not key.endswith(("_ms", "per_second", "time", "step"))}


# ----------------------------------------------------------------------------------------------- plumbing, not a result


def _plumbing(support_configs, tmp_path, *flags):
    prompts = tmp_path / "prompts"
    if not prompts.exists():
        write_prompts(prompts, PLUMBING_TASKS)
    return ["test", "-c", support_configs / "rci_plumbing.yaml", f"--vars.prompts={prompts}", *flags]


def test_a_perfect_script_solves_everything_and_a_broken_one_is_repaired(cli, support_configs, tmp_path):
    tasks = f"--data.init_args.tasks=[{','.join(PLUMBING_TASKS)}]"
    assert cli(*_plumbing(support_configs, tmp_path, tasks, "--experiment=whole", "--data.init_args.episodes=3")) == 0
    run = tmp_path / "runs" / "whole" / "test-001"
    whole = figures(run)
    assert whole["test/direct/success_strict"] == whole["test/repaired/success_strict"] == 1.0
    assert whole["test/direct/episodes"] == 30
    assert whole["test/direct/calls"] == whole["test/direct/steps"]
    steps = Counter()
    for row in outcomes(run / "outcomes"):
        if row["strategy"] == "direct":
            steps[row["steps"]] += 1
    # the third draft is no instruction: episodes that come to it fail without repairs, and all are solved with one
    broken = "--model.init_args.backend.init_args.broken_step=3"
    assert cli(*_plumbing(support_configs, tmp_path, tasks, broken, "--experiment=broken",
                          "--data.init_args.episodes=3")) == 0  # fmt: skip
    found = figures(tmp_path / "runs" / "broken" / "test-001")
    long = sum(count for length, count in steps.items() if length >= 3)
    assert 0 < long < 30
    assert found["test/direct/success_strict"] == pytest.approx(1 - long / 30)
    assert found["test/repaired/success_strict"] == 1.0
    assert found["test/repaired/only"] == long
    assert found["test/repaired/calls"] == pytest.approx(whole["test/direct/calls"] + long / 30)


def test_an_endpoint_that_goes_down_loses_nothing(cli, support_configs, tmp_path, capsys):
    kept = tmp_path / "outcomes"
    run = _plumbing(support_configs, tmp_path, f"--vars.outcomes={kept}")
    assert cli(*run, "--model.init_args.backend.init_args.fail_after=9") == 1
    assert "experts: the endpoint is down" in capsys.readouterr().err
    half = {(row["strategy"], row["task"], row["seed"]) for row in outcomes(kept)}
    assert 0 < len(half) < 12
    assert cli(*run, "--experiment=again") == 0
    played = outcomes(kept)
    assert len(played) == len({(row["strategy"], row["task"], row["seed"]) for row in played}) == 12
    assert figures(tmp_path / "runs" / "again" / "test-001")["test/direct/success_strict"] == 1.0
    # other settings are another evaluation
    assert cli(*run, "--model.init_args.backend.init_args.broken_step=1") == 1
    assert "belongs to another evaluation" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- an agent of its own, training


def _tiny(support_configs, tmp_path, verb, *flags):
    cache = tmp_path / "cache"
    return [verb, "-c", support_configs / "rci_tiny.yaml", f"--data.init_args.cache_dir={cache}", *flags]


def test_training_killed_goes_on_bitwise(cli, cli_process, support_configs, tmp_path):
    assert cli(*_tiny(support_configs, tmp_path, "fit", "--experiment=whole")) == 0
    run = _tiny(support_configs, tmp_path, "fit", "--experiment=killed")
    killed = cli_process(*run, "--model.init_args.kill_at=4")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cli(*run, "--ckpt_path", "last") == 0
    whole, again = tmp_path / "runs" / "whole" / "run-001", tmp_path / "runs" / "killed" / "run-001"
    assert_same(checkpoint(whole)["state_dict"], checkpoint(again)["state_dict"])
    mine, theirs = rows(whole, 5), rows(again, 5)
    assert mine
    assert_same(mine, theirs)
    first = [row["train/loss"] for row in rows(whole) if "train/loss" in row]
    assert first[-1] < first[0]
    assert {"val/loss", "val/exact", "val/token_accuracy"} <= set(figures(whole))


def test_an_evaluation_killed_goes_on_without_repeating_and_ranks_agree(cli, cli_process, support_configs, tmp_path):
    assert cli(*_tiny(support_configs, tmp_path, "fit", "--experiment=agent")) == 0
    trained = tmp_path / "runs" / "agent" / "run-001" / "checkpoints"
    tokenizer = next((tmp_path / "cache").glob("tokenizer-*"))
    last = sorted(trained.glob("step-*.ckpt"))[-1]
    kept = tmp_path / "outcomes"
    flags = ["--ckpt_path", last, f"--data.init_args.tokenizer={tokenizer}"]
    run = _tiny(support_configs, tmp_path, "test", *flags, f"--model.init_args.outcomes={kept}")
    killed = cli_process(*run, "--model.init_args.kill_after=11", "--experiment=killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half = outcomes(kept)
    assert len(half) == 11
    assert cli(*run, "--experiment=again") == 0
    everything = outcomes(kept)
    assert everything[:11] == half
    keys = [(row["strategy"], row["task"], row["seed"]) for row in everything]
    assert len(keys) == len(set(keys)) == 3 * 2 * 5
    again = figures(tmp_path / "runs" / "again" / "test-001")
    # the same in one go, and on two ranks that share the episodes out
    assert cli(*_tiny(support_configs, tmp_path, "test", *flags, "--experiment=one")) == 0
    one = figures(tmp_path / "runs" / "one" / "test-001")
    done = cli_process(*_tiny(support_configs, tmp_path, "test", *flags, "-c", "hardware/ddp2", "--experiment=two"))
    assert done.returncode == 0, done.stderr[-3000:]
    two = figures(tmp_path / "runs" / "two" / "test-001")
    assert again == one == two
    assert one["test/rci/episodes"] == 10
    shared = [len(path.read_text().splitlines()) for path in (tmp_path / "runs" / "two").rglob("rank-*.jsonl")]
    assert sum(shared) == 30
    assert len(shared) == 2


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.init_args.tasks=[click-buton]"], "no task 'click-buton'; did you mean click-button"),
        (["--data.init_args.tasks=[]"], "tasks is empty"),
        (["--data.init_args.tasks=[chase-circle]"], "no expert for task 'chase-circle'"),
        (["--data.init_args.seed_prefix=tr"], "seeds that begin with 'tr'"),
        (["--data.init_args.browser=/nowhere/chromium"], "PLUMBLINE_CHROMIUM"),
        (["--data.init_args.drafts=[nowhere/*.jsonl]"], "'nowhere/*.jsonl' matches no file"),
        (["--model.init_args.baseline=best"], "baseline 'best' is none of the strategies"),
        (["--model.init_args.strategies={direct: {irci: -1}}"], "irci must be >= 0"),
        (["--model.init_args.strategies={direct: {retry: 3}}"], "temperature"),
        (["--model.init_args.prompts=long"], "prompts must be 'default' or 'compact'"),
        (["--model.init_args.prompt_folder=nowhere"], "prompt_folder nowhere does not exist"),
        (["--model.init_args.backend=expert_backend.ExpertBackend"], "exactly one of model"),
    ],
)
def test_bad_input_is_named(cli, capsys, support_configs, tmp_path, flags, message):
    assert cli(*_tiny(support_configs, tmp_path, "fit", *flags)) != 0
    assert message in capsys.readouterr().err


def test_a_backend_has_nothing_to_train(cli, capsys, support_configs, tmp_path):
    run = _plumbing(support_configs, tmp_path)
    assert cli("fit", *run[1:], "--data.init_args.demonstrations=1", f"--data.init_args.cache_dir={tmp_path}") == 1
    assert "only asked and has nothing to train" in capsys.readouterr().err
