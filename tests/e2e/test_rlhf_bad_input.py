"""What constrained RLHF refuses: one line that names the culprit and the mend."""

from __future__ import annotations

from typing import Any

import pytest

from modules.language.specs import LoraSpec, ModelSpec
from modules.rlhf import ConstrainedRLHF
from modules.rlhf.rewards import ContentShare, GoldScore, MarkerSaturation
from modules.rlhf.settings import ConstraintSpec, CriticSpec, GenerationSpec, KLSpec, MultiplierSpec, PPOSpec

BOTH = {"content": ConstraintSpec(0.3), "markers": ConstraintSpec(0.45)}


@pytest.fixture
def refused(cli, capfd, support_configs):
    """Runs a tiny config with flags that must be refused; returns the one line."""

    def run(config: str, *flags: object) -> str:
        code = cli("fit", "-c", support_configs / f"{config}.yaml", *flags)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code in (1, 2)
        assert len(lines) == 1, lines
        assert len(lines[0]) < 600
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rewards": {}}, ["rewards is empty"]),
        ({"constraints": {"content": ConstraintSpec(0.3)}}, ["constraints.markers.threshold is missing"]),
        ({"constraints": {"contnt": ConstraintSpec(0.3)}}, ["constraints.contnt", "did you mean 'content'"]),
        ({"constraints": {**BOTH, "content": ConstraintSpec(3.0)}}, ["constraints.content.threshold", "[0, 1]", "3"]),
        ({"multiplier": MultiplierSpec(parameterisation="projected")}, ["multiplier.parameterisation", "eq"]),
        ({"multiplier": MultiplierSpec(momentum=1.0)}, ["multiplier.momentum must be in [0, 1), got 1.0"]),
        ({"variant": "ppo", "weights": {"content": 1.0}}, ["variant ppo needs weights.markers"]),
        ({"variant": "fixed_lambda", "weights": {"content": 1.5, "markers": 0.1}}, ["weights.content", "1.5"]),
        ({"variant": "nm_ppo", "constraints": {name: ConstraintSpec(init=0.2, max=0.4) for name in BOTH}},
         ["nm_ppo needs an evaluation"]),
        ({"variant": "nm_ppo", "evaluation": GoldScore()}, ["nm_ppo needs constraints.content.init and .max"]),
        ({"advantage": "batch"}, ["advantage batch goes with critic.kind none"]),
        ({"critic": CriticSpec("none")}, ["advantage gae goes with critic.kind shared or separate"]),
        ({"advantage": "group", "critic": CriticSpec("none")}, ["group_size must be >= 1, and >= 2"]),
        ({"kl": KLSpec(target=0.5)}, ["kl.target is for variants ppo and ppo_sat"]),
        ({"kl": KLSpec(beta=-1.0)}, ["kl.beta must be >= 0, got -1"]),
        ({"ppo": PPOSpec(clip=0.0)}, ["ppo.clip must be > 0"]),
        ({"lr": 0.0}, ["lr must be > 0"]),
        ({"tuning": "lora", "lora": LoraSpec(dropout=0.1)}, ["lora.dropout must be 0"]),
        ({"generation": GenerationSpec(max_new=10, min_new=11)}, ["generation.min_new must be in [0, max_new]"]),
        ({"thresholds_file": "nowhere.json", "constraints": {}}, ["thresholds_file nowhere.json does not exist"]),
    ],
)  # fmt: skip
def test_settings_are_refused(settings: dict[str, Any], says: list[str]):
    arguments = {
        "rewards": {"content": ContentShare(), "markers": MarkerSaturation()}, "constraints": BOTH,
        "policy": ModelSpec(config={"model_type": "markov"}),
    }  # fmt: skip
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        ConstrainedRLHF(**(arguments | settings))
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in says), error.value


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model.init_args.variant=zi_ppo"], ["zi_ppo"]),
        (["--model.init_args.evaluation=null", "--model.init_args.variant=nm_ppo"], ["nm_ppo needs an evaluation"]),
        (["--model.init_args.generation={max_new: 11, min_new: 10, top_k: 0}", "--trainer.num_sanity_val_steps=0"],
         ["a prompt of 2 tokens", "max_new 11", "12 positions"]),
        (["--model.init_args.rewards={content: {class_path: modules.rlhf.rewards.ContentShar}}"], ["ContentShar"]),
        (["--data.class_path=rlhf_runs.EmptyPrompts", "--trainer.num_sanity_val_steps=0"], ["index", "has no tokens"]),
        (["--data.class_path=datamodules.GameDataModule", "--data.init_args.game=datamodules.games.KuhnPoker"],
         ["needs a datamodule of prompts", "GameDataModule"]),
    ],
    ids=["variant", "evaluation", "positions", "reward class", "empty prompt", "datamodule"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:discarding init_args")
def test_runs_are_refused_in_one_line(refused, flags, says):
    line = refused("rlhf_gold", *flags)
    assert all(part in line for part in says), line


@pytest.mark.parametrize(
    ("reward", "says"),
    [("NaNReward", ["rewards.bad", "nan"]), ("ShortReward", ["rewards.bad", "31", "32"])],
)
def test_a_reward_that_misbehaves_is_named(refused, reward, says):
    rewards = (
        f"{{bad: {{class_path: rlhf_runs.{reward}}}, markers: {{class_path: modules.rlhf.rewards.MarkerSaturation}}}}"
    )
    line = refused(
        "rlhf_gold", f"--model.init_args.rewards={rewards}", "--trainer.num_sanity_val_steps=0",
        "--model.init_args.constraints={bad: {threshold: 0.5}, markers: {threshold: 0.5}}",
        "--model.init_args.weights=null",
    )  # fmt: skip
    assert all(part in line for part in says), line


def test_a_model_with_another_tokenizer_is_refused(cli, refused, support_configs, tmp_path):
    export = "--trainer.callbacks+={class_path: callbacks.export.ExportModel, init_args: {folder: exported}}"
    config = support_configs / "rlhf_text.yaml"
    assert cli("fit", "-c", config, "--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0", export) == 0
    line = refused(
        "rlhf_text", "--model.init_args.policy={path: exported, config: null}",
        "--data.init_args.tokenizer.vocab_size=150",
    )  # fmt: skip
    assert "tokenizer" in line
    assert "exported" in line


def test_missing_dialogues_say_what_is_expected(refused):
    line = refused("rlhf_text", "--data.init_args.path=nowhere")
    assert "nowhere" in line
    assert "null" in line


def test_a_checkpoint_of_other_data_is_refused(cli, support_configs, capfd, tmp_path):
    config = support_configs / "rlhf_gold.yaml"
    assert cli("fit", "-c", config, "--experiment=one", "--trainer.max_steps=2") == 0
    last = tmp_path / "runs" / "one" / "run-001" / "checkpoints" / "last.ckpt"
    assert cli("fit", "-c", config, "--ckpt_path", last, "--data.init_args.seed=7") == 1
    assert "seed was 0, is 7" in capfd.readouterr().err
