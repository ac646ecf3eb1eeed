"""Outcomes: the record that a killed evaluation goes on from, and figures worked out by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.assurance.paired import mcnemar_exact
from modules.rci.agent import EpisodeResult
from modules.rci.outcomes import FIELDS, OutcomeFiles, metrics, tabulate
from modules.verification.voting import wilson_interval

STRATEGIES, TASKS = ["direct", "rci"], ["a", "b"]


def result(strategy: str = "direct", task: str = "a", seed: str = "1", **values: Any) -> EpisodeResult:
    if values.get("strict"):
        values.setdefault("success", True)
    return EpisodeResult(strategy, task, seed, **values)


def drawn(number: int) -> list[EpisodeResult]:
    """Results of both strategies on ``number`` episodes of each task."""
    generator = random.Random(number)
    found = []
    for strategy in STRATEGIES:
        for task in TASKS:
            for seed in range(number):
                counts = {name: generator.randrange(9) for name in ("steps", "calls", "malformed", "plan_lines")}
                found.append(
                    result(
                        strategy, task, str(seed), strict=generator.random() < 0.5, familiar=generator.random() < 0.5,
                        error=generator.random() < 0.1, flips={"wr": generator.randrange(3)}, **counts,
                    )
                )  # fmt: skip
    return found


# ----------------------------------------------------------------------------------------------------------- the record


def test_outcomes_are_read_back_by_every_rank(tmp_path):
    rows = [result(seed=str(seed), history=["type é\u2028'\"\ud800"], reason="a\x85b", reward=0.5) for seed in range(3)]
    first, second = OutcomeFiles(tmp_path / "new", "id", 0), OutcomeFiles(tmp_path / "new", "id", 1)
    first.add(rows[0])
    second.add(rows[1])
    first.add(rows[2])
    for rank in (0, 1, 2):
        known = OutcomeFiles(tmp_path / "new", "id", rank).known
        assert known == {("direct", "a", row.seed): row for row in rows}
    assert first.known[("direct", "a", "2")] is rows[2]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["rank-0.jsonl", "rank-1.jsonl"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000))
def test_a_line_cut_by_a_kill_is_dropped_and_its_episode_played_again(tmp_path, cut):
    for path in tmp_path.glob("*"):
        path.unlink()
    rows = [result(seed=f"é{seed}", history=["type €"]) for seed in range(4)]
    files = OutcomeFiles(tmp_path, "id", 0)
    for row in rows:
        files.add(row)
    path = tmp_path / "rank-0.jsonl"
    whole = path.read_bytes()
    at = cut % (len(whole) + 1)
    path.write_bytes(whole[:at])
    again = OutcomeFiles(tmp_path, "id", 0)
    assert list(again.known.values()) == rows[: whole[:at].count(b"\n")]
    for row in rows:
        if ("direct", "a", row.seed) not in again.known:
            again.add(row)
    assert path.read_bytes() == whole


def test_the_file_of_another_rank_is_read_and_left_as_it_is(tmp_path):
    OutcomeFiles(tmp_path, "id", 1).add(result())
    cut = (tmp_path / "rank-1.jsonl").read_text() + '{"evaluat'
    (tmp_path / "rank-1.jsonl").write_text(cut)
    assert len(OutcomeFiles(tmp_path, "id", 0).known) == 1
    assert (tmp_path / "rank-1.jsonl").read_text() == cut  # it may be writing this line now


def test_other_evaluations_and_foreign_lines_are_refused(tmp_path):
    OutcomeFiles(tmp_path, "id", 0).add(result())
    with pytest.raises(ValueError, match="rank-0.jsonl belongs to another evaluation .*give another folder"):
        OutcomeFiles(tmp_path, "other", 0)
    path: Path = tmp_path / "rank-0.jsonl"
    row = json.loads(path.read_text())
    for line, message in (
        (json.dumps({key: value for key, value in row.items() if key != "steps"}), "holds a line that is no outcome"),
        (json.dumps({**row, "more": 1}), "holds a line that is no outcome"),
        (json.dumps({key: value for key, value in row.items() if key != "evaluation"}), "another evaluation"),
        ("[1]", "line 1 must be a JSON object"),
        ("not json", "line 1 must be a JSON object"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            OutcomeFiles(tmp_path, "id", 0)
        assert path.read_text() == line + "\n"


# ---------------------------------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize("ranks", [2, 3])
def test_tables_of_ranks_add_up_to_that_of_one(ranks):
    results = drawn(7)
    whole = tabulate(results, STRATEGIES, TASKS, "direct")
    parts = [[r for r in results if int(r.seed) % ranks == rank] for rank in range(ranks)]  # pairs stay together
    tables = [tabulate(part, STRATEGIES, TASKS, "direct") for part in parts]
    assert whole.dtype == torch.float64
    assert whole.shape == (2, 2, len(FIELDS))
    assert torch.equal(sum(tables), whole)
    assert torch.equal(tabulate(results[::-1], STRATEGIES, TASKS, "direct"), whole)
    assert whole[..., FIELDS.index("episodes")].tolist() == [[7, 7], [7, 7]]


def test_figures_worked_out_by_hand():
    results = [
        # direct on a: solved, half solved, failed by the browser, failed; on b: solved
        result(seed="1", strict=True, steps=2, calls=2, prompt_tokens=10, completion_tokens=4, familiar=True),
        result(seed="2", success=True, reward=0.5, steps=4, calls=4, malformed=1, unmatched=1),
        result(seed="3", error=True, steps=0, calls=1, malformed=1, unrepaired=1),
        result(seed="4", steps=2, calls=2, unmatched=2),
        result(task="b", seed="1", strict=True, steps=2, calls=2, familiar=True),
        # rci: solves what direct did not, and fails where it did not
        result("rci", seed="1", calls=6, plan_lines=3, flips={"rw": 1, "rr": 1}, steps=2),
        result("rci", seed="2", strict=True, calls=6, plan_lines=1, flips={"wr": 2}, steps=2),
        result("rci", seed="3", strict=True, calls=6, steps=2),
        result("rci", seed="4", strict=True, calls=6, steps=2),
        result("rci", task="b", seed="1", strict=True, calls=6, steps=2),
        result("rci", task="b", seed="2", strict=True, calls=6, steps=2),  # the baseline has not played it: no pair
    ]  # fmt: skip
    found = metrics(tabulate(results, STRATEGIES, TASKS, "direct"), STRATEGIES, TASKS, "direct")
    low, high = wilson_interval(2, 5)
    expected = {
        "direct/episodes": 5, "direct/success_strict": 2 / 5, "direct/success": 3 / 5, "direct/errors": 1 / 5,
        "direct/steps": 10 / 5, "direct/calls": 11 / 5, "direct/prompt_tokens": 10 / 5,
        "direct/completion_tokens": 4 / 5, "direct/plan_lines": 0.0,
        # 10 instructions carried out and one that was not: 11 in all
        "direct/malformed_before_repair": 2 / 11, "direct/malformed_after_repair": 1 / 11, "direct/unmatched": 3 / 10,
        "direct/success_strict_low": low, "direct/success_strict_high": high,
        "direct/unfamiliar_share": 3 / 5, "direct/success_strict_unfamiliar": 0 / 3,
        "direct/a/success_strict": 1 / 4, "direct/a/success": 2 / 4, "direct/a/calls": 9 / 4, "direct/a/episodes": 4,
        "direct/b/success_strict": 1.0, "direct/b/episodes": 1,
        "rci/episodes": 6, "rci/success_strict": 5 / 6, "rci/calls": 6.0, "rci/plan_lines": 4 / 6,
        "rci/flips/right_right": 1, "rci/flips/right_wrong": 1, "rci/flips/wrong_right": 2, "rci/flips/wrong_wrong": 0,
        "rci/only": 3, "rci/only_baseline": 1, "rci/mcnemar_p": 2 * (1 + 4) / 16,
        "rci/unfamiliar_share": 1.0, "rci/b/success_strict": 1.0, "rci/a/success_strict": 3 / 4,
    }  # fmt: skip
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key
    assert (found["direct/a/success_strict_low"], found["direct/a/success_strict_high"]) == wilson_interval(1, 4)
    # nothing to compare the baseline with; no share where all is unfamiliar; no flips where nothing was compared
    for absent in ("direct/only", "direct/mcnemar_p", "direct/flips/right_right", "rci/success_strict_unfamiliar"):
        assert absent not in found
    assert "rci/a/steps" not in found


def test_mcnemar_pairs_by_task_and_seed():
    results = drawn(40)
    table = tabulate(results, STRATEGIES, TASKS, "direct")
    found = metrics(table, STRATEGIES, TASKS, "direct")
    strict = {(r.strategy, r.task, r.seed): r.strict for r in results}
    pairs = [(strict["direct", r.task, r.seed], r.strict) for r in results if r.strategy == "rci"]
    only, only_baseline = pairs.count((False, True)), pairs.count((True, False))
    assert (found["rci/only"], found["rci/only_baseline"]) == (only, only_baseline)
    assert found["rci/mcnemar_p"] == mcnemar_exact(only, only_baseline)
    assert only != only_baseline
    other = metrics(tabulate(results, STRATEGIES, TASKS, "rci"), STRATEGIES, TASKS, "rci")
    assert (other["direct/only"], other["direct/only_baseline"]) == (only_baseline, only)
    assert "rci/mcnemar_p" not in other


def test_what_was_not_played_has_no_figures():
    table = tabulate([result()], STRATEGIES, TASKS, "direct")
    found = metrics(table, STRATEGIES, TASKS, "direct")
    assert {key.rsplit("/", 1)[0] for key in found} == {"direct", "direct/a"}
    assert found["direct/unmatched"] == found["direct/malformed_before_repair"] == 0.0
    assert metrics(tabulate([], STRATEGIES, TASKS, "direct"), STRATEGIES, TASKS, "direct") == {}
