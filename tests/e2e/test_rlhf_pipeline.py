"""The whole RLHF chain as `make rlhf-demo` runs it, on generated dialogues and a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--data.init_args.synthetic_dialogues=80", "--data.init_args.tokenizer={vocab_size: 300}",
    "--data.init_args.batch_size=16", "--trainer.max_steps=6", "--trainer.val_check_interval=2",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_chain_ends_with_a_constrained_run_at_fitted_thresholds(tmp_path):
    flags = " ".join(f"'{flag}'" for flag in SMALL)
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", "setup", f"BIN={Path(sys.executable).parent}", "rlhf-demo"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, f"RLHF_FLAGS={flags}"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    fitted = json.loads((tmp_path / "runs" / "proxy_points.json").read_text())["thresholds"]
    logged = [
        json.loads(line)
        for line in (tmp_path / "runs" / "rlhf-xi" / "run-001" / "metrics.jsonl").read_text().splitlines()
    ]
    held = [row for row in logged if "constraint/meteor/threshold" in row][-1]
    assert held["constraint/meteor/threshold"] == pytest.approx(fitted["meteor"], rel=1e-5)
    assert held["constraint/intent/threshold"] == pytest.approx(fitted["intent"], rel=1e-5)
    assert (tmp_path / "runs" / "rlhf_score.png").stat().st_size > 0
    assert (tmp_path / "runs" / "rlhf-reward-model" / "model" / "reward_model.json").is_file()
