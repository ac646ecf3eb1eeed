"""Reasoning through `python -m train`: recorded completions, a local model, two ranks, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "rci"
PUBLISHED = {"multiarith": (17.67, 78.67), "addsub": (72.15, 69.62), "singleeq": (74.61, 77.95), "aqua": (22.44, 33.46)}


def figures(folder: Path, stage: str = "test") -> dict[str, float]:
    return json.loads((folder / f"reasoning_{stage}.json").read_text())["figures"]


def items(folder: Path, name: str) -> list[dict[str, Any]]:
    files = sorted((folder / "items").glob(f"{name}.rank-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_replay_gives_the_published_accuracies(cli, data_dir, tmp_path):
    assert cli("test", "-c", "rci/reasoning_replay", f"--vars.data={data_dir}") == 0
    folder = tmp_path / "runs" / "rci-reasoning-replay" / "test-001"
    found = figures(folder)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {key: value for row in logged for key, value in row.items()}
    for name, published in PUBLISHED.items():
        for mode, accuracy in zip(("zero_shot", "zero_shot_cot"), published, strict=True):
            key = f"test/{name}/{mode}/accuracy"
            assert round(100 * found[key], 2) == accuracy
            assert logged[key] == pytest.approx(found[key], rel=1e-6)
            assert logged[f"{key}_low"] == pytest.approx(found[f"{key}_low"], rel=1e-6)
        assert len(items(folder, name)) == 2 * found[f"test/{name}/zero_shot/items"]
    assert "17.67 % [14.8, 20.9]" in (folder / "summary_test.txt").read_text()


@pytest.mark.ddp
def test_two_ranks_equal_one(cli, cli_process, data_dir, tmp_path):
    command = ["test", "-c", CONFIGS / "reasoning_replay.yaml", f"--vars.data={data_dir}"]
    command += ["--data.sets=[addsub, aqua]", "--data.limit=101"]
    assert cli(*command, "--experiment", "one") == 0
    done = cli_process(*command, "--experiment", "two", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (tmp_path / "runs" / name / "test-001" for name in ("one", "two"))
    assert figures(one) == figures(two)
    assert len(list((two / "items").iterdir())) == 4
    for name in ("addsub", "aqua"):
        rows = [{(row["item_id"], row["mode"]): row for row in items(folder, name)} for folder in (one, two)]
        assert rows[0] == rows[1]
        assert len(items(two, name)) == 202  # no item twice


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A Hugging Face directory with random weights and a byte-level tokenizer."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'rci'")
    pytest.importorskip("safetensors", reason="needs the extra 'rci'")
    from modules.language.checkpoint import export_hf
    from modules.networks.llama import Llama, LlamaConfig

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eod|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    export_hf(Llama(config), folder, tmp_path / "model")
    return tmp_path / "model"


def test_local_model_in_all_modes_and_the_seed_decides(cli, tiny_model, tmp_path):
    """The shipped laptop config on a random model: calls follow the formulas, a second run is the same."""
    modes = yaml.safe_load((CONFIGS / "reasoning.yaml").read_text())["model"]["init_args"]["modes"]
    small = {name: {**mode, "answer_tokens": 4, "reasoning_tokens": 6} for name, mode in modes.items()}
    layer = tmp_path / "small.yaml"
    layer.write_text(yaml.safe_dump({"model": {"init_args": {"modes": small}}, "data": {"init_args": {"limit": 4}}}))
    for experiment in ("one", "again"):
        command = ["-c", "rci/reasoning", "-c", layer, f"--vars.model={tiny_model}", "--trainer.accelerator=cpu"]
        assert cli("test", *command, "--experiment", experiment) == 0
    one, again = (tmp_path / "runs" / name / "test-001" for name in ("one", "again"))
    assert items(one, "synthetic") == items(again, "synthetic")
    found = figures(one)
    calls = {name: found[f"test/synthetic/{name}/calls"] for name in modes}
    retry, oracle = calls.pop("zero_shot_retry"), calls.pop("cot_rci_oracle")
    assert calls == {"zero_shot": 1, "zero_shot_rci": 3, "zero_shot_vote": 3, "cot": 2, "cot_rci": 5}
    assert 1 <= retry <= 3
    assert 2 <= oracle <= 5
    samples = [row["calls"] for row in items(one, "synthetic") if row["mode"] == "zero_shot_vote"]
    assert any(len({call["reply"] for call in three}) > 1 for three in samples)
    assert all(0 < call["tokens"][1] <= 4 for three in samples for call in three)


def test_paper_config_asks_for_no_more_than_it_says():
    """The header's number of calls, counted from the modes; and modes that the module accepts."""
    from modules.rci.loop import RCIPrompts
    from modules.rci.reasoning_modes import ReasoningMode

    text = (CONFIGS / "paper_reasoning.yaml").read_text()
    config = yaml.safe_load(text)
    total = 0
    for name, values in config["model"]["init_args"]["modes"].items():
        mode = ReasoningMode(**values)
        mode.check(name, RCIPrompts())
        answers = (2 if mode.prompt == "zero_shot_cot" else 1) * (mode.rounds + 1) * max(mode.samples, mode.retry)
        total += answers + mode.rounds
    data = config["data"]["init_args"]
    total *= data["limit"] * len(data["sets"])
    assert f"at most {total:,} calls" in text
    assert total <= config["model"]["init_args"]["backend"]["init_args"]["max_calls"]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_replay", "paper_reasoning"])
def test_configs_parse_with_the_verb_test(cli, capsys, name):
    assert cli("test", "-c", f"rci/{name}", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "modules.rci.RCIReasoning"


def test_errors_are_one_line(cli, capsys, tmp_path):
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text("")
    replay = ["-c", "rci/reasoning_replay", f"--model.backend.path={recorded}"]
    assert cli("fit", *replay, "--data.sets=[synthetic]") != 0
    assert "is frozen, so fit has nothing to train; the verbs that work are test, validate and predict" in error(capsys)
    assert cli("test", *replay, f"--vars.data={tmp_path}") != 0
    assert "no file" in (line := error(capsys))
    assert "take the set 'synthetic'" in line
    assert cli("test", *replay, "--data.sets=[multiarth]") != 0
    assert "did you mean 'multiarith'?" in error(capsys)
    assert cli("test", *replay, "--data.sets=[synthetic]") != 0
    assert "has no reply to the prompt that ends" in error(capsys)
    assert cli("test", "-c", "rci/reasoning_replay", "--vars.data=nowhere") != 0
    assert "replay_completions.jsonl does not exist" in error(capsys)
    layer = tmp_path / "layer.yaml"
    layer.write_text("model: {init_args: {modes: {vote: {samples: 3}}}}\n")
    assert cli("test", *replay, "-c", layer, "--data.sets=[synthetic]") != 0
    assert "mode 'vote': samples = 3 at temperature 0 repeats one answer" in error(capsys)
    layer.write_text("model: {init_args: {modes: {vote: {sample: 3}}}}\n")
    assert cli("test", *replay, "-c", layer) != 0
    assert "unknown key 'sample'" in (line := error(capsys))
    assert "did you mean 'samples'?" in line
