"""EMAX through the command line: it trains, is tested from its checkpoint, and learns where learning is easy."""

from __future__ import annotations

import pytest
from population_runs import rows


@pytest.mark.parametrize("mixing", ["none", "vdn", "qmix"])
def test_learns_a_matrix_game(cli, tmp_path, mixing):
    """Two agents that are paid only when both choose action 1 or, better, both action 2."""
    payoffs = "[[0, 0, 0], [0, 0.5, 0], [0, 0, 1]]"
    flags = [
        f"--model.init_args.mixing.kind={mixing}",
        f"--data.init_args.options={{payoffs: {payoffs}}}",
        "--vars.total_frames=4000",
        "--vars.epsilon_frames=2000",
        "--trainer.val_check_interval=5",
        "--trainer.log_every_n_steps=5",
        "--trainer.enable_progress_bar=false",
    ]
    assert cli("fit", "-c", "emax/laptop", "-c", "emax/task/matrix", "-c", "emax/ensemble/emax", *flags) == 0
    run = tmp_path / "runs" / "emax-laptop" / "run-001"
    returns = [row["val/return"] for row in rows(run) if "val/return" in row]
    assert returns[-1] == 1.0
    assert cli("test", "-c", "emax/laptop", "-c", "emax/task/matrix", "-c", "emax/ensemble/emax", *flags,
               "--ckpt_path", run / "checkpoints" / "last.ckpt") == 0  # fmt: skip
    tested = rows(tmp_path / "runs" / "emax-laptop" / "test-001")
    assert tested[-1]["test/return"] == 1.0


def test_package_and_tensor_environments_train_alike(cli, support_configs, tmp_path):
    """The same module on the original package, in this process and in two workers of its own."""
    config = support_configs / "emax_tiny.yaml"
    for name, flags in (("here", []), ("workers", ["--data.init_args.workers=2"])):
        run = ["fit", "-c", config, "--data.init_args.backend=package", *flags, f"--experiment={name}"]
        assert cli(*run, "--data.init_args.total_frames=240") == 0
    here, workers = (rows(tmp_path / "runs" / name / "run-001") for name in ("here", "workers"))
    assert here == workers
