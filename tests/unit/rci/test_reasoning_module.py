"""RCIReasoning in a Trainer: figures, item files, ranks' sums, refusals; and the recorded completions as a backend."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from datamodules.reasoning_data import ReasoningDataModule
from modules.assurance.paired import mcnemar_exact
from modules.contracts import HasDigest, Summarises
from modules.language.backends.base import BackendError, Reply, Request, Turn
from modules.language.backends.scripted import ScriptedBackend
from modules.rci.loop import RCIPrompts
from modules.rci.reasoning import RCIReasoning
from modules.rci.reasoning_modes import Answered, Call, ReasoningMode
from modules.rci.reasoning_tally import FIELDS, ReasoningTally
from modules.rci.recorded_completions import RecordedCompletions
from modules.verification.voting import wilson_interval

CRITIQUE = RCIPrompts().critique


def solver(request: Request) -> str:
    """Right or wrong by a hash of all that was said; knows the synthetic problems' numbers, not their sense."""
    if request.text.endswith(CRITIQUE):
        return "It may be wrong."
    question = request.text.split("\nA:")[0]
    numbers = [int(n) for n in re.findall(r"\d+", question)][:2]
    choice = hashlib.sha256(f"{request.text}{request.seed if request.temperature else 0}".encode()).digest()[0] % 4
    return [f" {numbers[0] + numbers[1]}.", f" {numbers[0] - numbers[1]}.", f" {numbers[0] * numbers[1]}.", " none"][
        choice
    ]


MODES: dict[str, ReasoningMode] = {
    "direct": ReasoningMode(),
    "fixed": ReasoningMode(rounds=2),
    "oracle": ReasoningMode(rounds=2, stop="oracle"),
    "cot": ReasoningMode("zero_shot_cot"),
    "vote": ReasoningMode(samples=3, temperature=0.7, against="fixed"),
    "retry": ReasoningMode(retry=3, temperature=0.7),
}


def module(modes: dict[str, Any] | None = None, **options: Any) -> RCIReasoning:
    return RCIReasoning(options.pop("backend", ScriptedBackend(solver)), modes or MODES, **options)


def run(model: RCIReasoning, folder: Path, verb: str = "test", batch_size: int = 16) -> Any:
    trainer = Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False,
    )  # fmt: skip
    data = ReasoningDataModule(sets=["synthetic"], limit=40, batch_size=batch_size)
    options = {} if verb in ("fit", "predict") else {"verbose": False}
    result = getattr(trainer, verb)(model, datamodule=data, **options)
    return result if verb == "predict" else {key: float(value) for key, value in trainer.callback_metrics.items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    text = next(folder.rglob("synthetic.rank-0.jsonl")).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_figures_are_those_of_the_items_written(tmp_path: Path) -> None:
    """All figures are computed again from the item files."""
    metrics = run(module(), tmp_path)
    whole = json.loads(next(tmp_path.rglob("reasoning_test.json")).read_text())["figures"]
    for key, value in metrics.items():
        assert whole[key] == pytest.approx(value, rel=1e-6)
    by_mode: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in MODES}
    for row in rows(tmp_path):
        by_mode[row["mode"]][row["item_id"]] = row
    for name, items in by_mode.items():
        assert len(items) == 40
        start = f"test/synthetic/{name}/"
        right = {key: row["ok"] for key, row in items.items()}
        accuracy = f"{start}accuracy" + "_oracle_stop" * (name == "oracle")
        assert whole[accuracy] == sum(right.values()) / 40
        assert (whole[f"{accuracy}_low"], whole[f"{accuracy}_high"]) == wilson_interval(sum(right.values()), 40)
        assert all(row["ok"] == (row["answer"] == row["gold"]) for row in items.values())
        assert whole[f"{start}answered"] == sum(row["answer"] is not None for row in items.values()) / 40
        assert whole[f"{start}calls"] == sum(len(row["calls"]) for row in items.values()) / 40
        tokens = [call["tokens"] for row in items.values() for call in row["calls"]]
        assert whole[f"{start}prompt_tokens"] == sum(prompt for prompt, _ in tokens) / 40
        assert whole[f"{start}completion_tokens"] == sum(completion for _, completion in tokens) / 40
        assert whole[f"{start}items"] == 40
        other = by_mode[MODES[name].against or "direct"]
        suffix = "_oracle_stop" * (name == "oracle")
        if name == "direct":
            assert f"{start}mcnemar_p" not in whole
        else:
            only = sum(right[key] and not other[key]["ok"] for key in right)
            only_other = sum(other[key]["ok"] and not right[key] for key in right)
            assert whole[f"{start}only_mode{suffix}"] == only
            assert whole[f"{start}mcnemar_p{suffix}"] == mcnemar_exact(only, only_other)
    fixed = by_mode["fixed"].values()
    for number in range(3):
        share = sum(row["tried"][number] == row["gold"] for row in fixed) / 40
        assert whole[f"test/synthetic/fixed/accuracy_round_{number}"] == share
    flips = {
        name: sum((row["tried"][0] == row["gold"], row["ok"]) == pair for row in fixed)
        for name, pair in (
            ("right_to_right", (True, True)), ("right_to_wrong", (True, False)),
            ("wrong_to_right", (False, True)), ("wrong_to_wrong", (False, False)),
        )
    }  # fmt: skip
    assert {name: whole[f"test/synthetic/fixed/{name}"] for name in flips} == flips
    assert all(flips.values())


def test_an_oracle_stop_is_never_called_accuracy(tmp_path: Path) -> None:
    run(module(), tmp_path)
    whole = json.loads(next(tmp_path.rglob("reasoning_test.json")).read_text())["figures"]
    names = {key.rsplit("/", 1)[1] for key in whole if "/oracle/" in key}
    plain = {"calls", "answered", "extraction_calls", "prompt_tokens", "completion_tokens", "items", "stopped_early"}
    assert {name for name in names if "oracle_stop" not in name} == plain
    assert {"accuracy_oracle_stop", "accuracy_oracle_stop_round_0", "mcnemar_p_oracle_stop"} <= names
    start = "test/synthetic/"
    assert whole[f"{start}oracle/accuracy_oracle_stop"] == whole[f"{start}fixed/any_round_right"]  # the identity
    rounds = [whole[f"{start}oracle/accuracy_oracle_stop_round_{number}"] for number in range(3)]
    assert rounds == sorted(rounds)
    assert rounds[0] == whole[f"{start}direct/accuracy"]
    assert whole[f"{start}oracle/right_to_wrong_oracle_stop"] == 0
    model = module()
    run(model, tmp_path / "again")
    assert "oracle stop: uses the label" in model.summary_rows()["synthetic oracle"]
    assert "oracle stop" not in model.summary_rows()["synthetic fixed"]


def test_replies_do_not_depend_on_batch_or_width(tmp_path: Path) -> None:
    one = run(module(), tmp_path / "one")
    other = run(module(width=1), tmp_path / "other", batch_size=7)
    assert one == other
    key = {(row["mode"], row["item_id"]): row for row in rows(tmp_path / "one")}
    assert key == {(row["mode"], row["item_id"]): row for row in rows(tmp_path / "other")}
    assert run(module(seed=1), tmp_path / "seed")["test/synthetic/vote/accuracy"] != one["test/synthetic/vote/accuracy"]


def test_item_rows_hold_the_conversation(tmp_path: Path) -> None:
    run(module({"cot": ReasoningMode("zero_shot_cot", rounds=1)}), tmp_path)
    row = rows(tmp_path)[0]
    assert row["prompt"].endswith("\nA: Let's think step by step.")
    added = [call["added"] for call in row["calls"]]
    # all of a fixed number of rounds is said first, then each reasoning's answer is asked for
    assert [call["extracts"] for call in row["calls"]] == [False, False, False, True, True]
    assert added[0] == ""
    assert added[1] == row["calls"][0]["reply"] + CRITIQUE
    assert added[3] == row["calls"][0]["reply"] + "\nTherefore, the answer (arabic numerals) is"


def test_validate_and_predict(tmp_path: Path) -> None:
    metrics = run(module(), tmp_path / "val", "validate")
    assert (
        metrics["val/synthetic/direct/accuracy"] == run(module(), tmp_path / "test")["test/synthetic/direct/accuracy"]
    )
    assert next((tmp_path / "val").rglob("reasoning_val.json")).is_file()
    batches = run(module(), tmp_path / "predict", "predict")
    predicted = [row for batch in batches for row in batch]
    assert [row["item_id"] for row in predicted] == [f"synthetic/{number}" for number in range(40)]
    written = {(row["item_id"], row["mode"]): row["answer"] for row in rows(tmp_path / "predict")}
    assert written == {(row["item_id"], mode): answer for row in predicted for mode, answer in row["answers"].items()}


def test_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RCIReasoning: the backend \(scripted.*frozen.*test, validate and predict$"):
        run(module(), tmp_path, "fit")
    assert module().configure_optimizers() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": {"a": ReasoningMode(samples=2)}}, r"mode 'a': samples = 2 at temperature 0"),
        ({"modes": {"a b": ReasoningMode()}}, r"no blank and no '/', got 'a b'"),
        ({"modes": {"a": ReasoningMode(against="b")}}, r"mode 'a': against 'b' is none of a"),
        ({"baseline": "dirct"}, r"baseline 'dirct' is none of the modes direct, "),
        ({"width": 0}, r"width must be >= 1"),
        ({"compare": "fuzzy"}, r"compare must be string or numeric"),
        ({"prompts": RCIPrompts(critique="")}, r"mode 'fixed': rounds > 0 needs a critique prompt"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)
    with pytest.raises(ValueError, match="modes is empty"):
        RCIReasoning(ScriptedBackend([]), {})


def test_contracts_and_hyperparameters() -> None:
    model = module({"direct": {"prompt": "zero_shot_cot"}})  # as a checkpoint's plain values
    assert model.modes == {"direct": ReasoningMode("zero_shot_cot")}
    assert isinstance(model, HasDigest)
    assert isinstance(model, Summarises)
    assert model.hparams["backend"] == model.backend.identity
    assert model.digest() != module({"direct": {"prompt": "zero_shot"}}).digest()


def test_tallies_of_parts_add_up() -> None:
    """Counts of two ranks, summed, are the counts of one: figures are made of sums only."""
    mode = ReasoningMode(rounds=1)
    call = Call(Request((Turn("user", "q"),)), Reply("a", "stop", 3, 1))
    seen = [
        Answered(*parts, "rounds", [call] * 3)
        for parts in (("1", ["1", "1"], [True, True], True), ("2", ["1", "2"], [True, False], False),
                      ("1", [None, "1"], [False, True], True), (None, ["3", None], [False, False], False))
    ]  # fmt: skip
    wrong, right = Answered(None, [None], [False], False, "rounds"), Answered("1", ["1"], [True], True, "rounds")
    whole, parts = ReasoningTally(1), [ReasoningTally(1), ReasoningTally(1)]
    for number, (answered, other) in enumerate(zip(seen, (wrong, right, wrong, wrong), strict=True)):
        whole.add(answered, other)
        parts[number % 2].add(answered, other)
    together = ReasoningTally(1, [sum(counts) for counts in zip(*(part.counts for part in parts), strict=True)])
    assert together.metrics(mode) == whole.metrics(mode)
    assert dict(zip(FIELDS, whole.counts, strict=False)) == {
        "items": 4, "right": 2, "answered": 3, "calls": 12, "extraction_calls": 0, "prompt_tokens": 36,
        "completion_tokens": 12, "right_to_right": 1, "right_to_wrong": 1, "wrong_to_right": 1, "wrong_to_wrong": 1,
        "any_right": 3, "stopped_early": 0, "only_mode": 2, "only_other": 1,
    }  # fmt: skip
    main, rest = whole.metrics(mode)
    assert main == {"accuracy": 0.5, "calls": 3.0, "mcnemar_p": 1.0}
    assert (rest["accuracy_round_0"], rest["accuracy_round_1"], rest["any_round_right"]) == (0.5, 0.5, 0.75)
    assert ReasoningTally(0).metrics(mode) == ({}, {})
    with pytest.raises(ValueError, match="2 rounds want"):
        ReasoningTally(2, [0.0])


RECORDS = [
    {"dataset": "addsub", "method": "zero_shot", "question": "1 + 1 ?",
     "completion": "The answer (arabic numerals) is 2.", "gold": "2"},
    {"dataset": "aqua", "method": "zero_shot_cot", "question": "Which? Answer Choices: (A) 1 (B) 2",
     "completion": "Let's think step by step. It is 2. \nTherefore, among A through E, the answer is B. \n\nTherefore, "
                   "among A through E, the answer is", "gold": "B"},
    {"dataset": "aqua", "method": "zero_shot_cot", "question": "Which? Answer Choices: (A) 1 (B) 2",
     "completion": "Let's think step by step. No. \nTherefore, among A through E, the answer is A.", "gold": "B"},
]  # fmt: skip


def recorded(path: Path, records: list[dict[str, Any]]) -> RecordedCompletions:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return RecordedCompletions(path)


def asked(backend: RecordedCompletions, *texts: str) -> list[str]:
    return [reply.text for reply in backend.generate([Request((Turn("user", text),)) for text in texts])]


def test_recorded_completions_are_taken_apart(tmp_path: Path) -> None:
    backend = recorded(tmp_path / "r.jsonl", RECORDS)
    assert asked(backend, "Q: 1 + 1 ?\nA: The answer (arabic numerals) is") == [" 2."]
    prompt = "Q: Which? Answer Choices: (A) 1 (B) 2\nA: Let's think step by step."
    line = "\nTherefore, among A through E, the answer is"
    assert asked(backend, prompt, f"{prompt} It is 2.{line}") == [" It is 2.", f" B. \n{line}"]
    backend.close()
    assert asked(backend, prompt) == [" It is 2."]  # recorded twice: the first one, whatever was asked before
    with pytest.raises(BackendError, match=r"no reply to the prompt that ends '.*other.*without rounds"):
        asked(backend, "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "few_shot"}, "line 2: method must be zero_shot or zero_shot_cot, got 'few_shot'"),
        ({"completion": "42"}, "line 2: the completion must begin with"),
        ({"question": None}, "line 2: want the texts dataset, method, question and completion"),
    ],
)
def test_bad_recordings_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    backend = recorded(tmp_path / "r.jsonl", [RECORDS[0], {**RECORDS[1], **change}])
    with pytest.raises(BackendError, match=message):
        asked(backend, "Q")
    with pytest.raises(BackendError, match=r"none\.jsonl does not exist"):
        RecordedCompletions(tmp_path / "none.jsonl")
