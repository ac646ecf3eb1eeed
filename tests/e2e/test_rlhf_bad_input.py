"""What constrained RLHF refuses: one line that names the culprit and the mend."""

from __future__ import annotations

import pytest


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
    ("flags", "says"),
    [
        (["--model.init_args.variant=zi_ppo"], ["zi_ppo"]),
        (["--model.init_args.constraints={content: {threshold: 0.3}}"], ["constraints.markers.threshold is missing"]),
        (["--model.init_args.constraints={contnt: {threshold: 0.3}}"], ["contnt", "did you mean 'content'"]),
        (["--model.init_args.constraints={content: {threshold: 3.0}, markers: {threshold: 0.4}}"],
         ["constraints.content.threshold", "[0, 1]", "3"]),
        (["--model.init_args.rewards={}"], ["rewards is empty"]),
        (["--model.init_args.multiplier.parameterisation=projected"], ["projected", "eq"]),
        (["--model.init_args.variant=ppo", "--model.init_args.weights={content: 1.0}"], ["needs weights.markers"]),
        (["--model.init_args.variant=fixed_lambda", "--model.init_args.weights={content: 1.5, markers: 0.1}"],
         ["weights.content", "1.5"]),
        (["--model.init_args.variant=nm_ppo", "--model.init_args.evaluation=null"], ["nm_ppo needs an evaluation"]),
        (["--model.init_args.advantage=gae"], ["advantage gae goes with critic.kind shared or separate"]),
        (["--model.init_args.advantage=group"], ["group_size must be >= 1, and >= 2"]),
        (["--model.init_args.kl.target=0.5"], ["kl.target is for variants ppo and ppo_sat"]),
        (["--model.init_args.kl.beta=-1"], ["kl.beta must be >= 0, got -1"]),
        (["--model.init_args.ppo.clip=0"], ["ppo.clip must be > 0"]),
        (["--model.init_args.generation.min_new=11"], ["generation.min_new must be in [0, max_new], got 11"]),
        (["--model.init_args.generation={max_new: 11, min_new: 10, top_k: 0}"], ["max_new 11", "12 positions"]),
        (["--model.init_args.thresholds_file=nowhere.json", "--model.init_args.constraints={}"],
         ["thresholds_file nowhere.json does not exist"]),
        (["--data.class_path=datamodules.GameDataModule", "--data.init_args.game=datamodules.games.KuhnPoker"],
         ["needs a datamodule of prompts"]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:discarding init_args")
def test_settings_are_refused(refused, flags, says):
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
    assert cli("fit", "-c", support_configs / "rlhf_text.yaml", "--trainer.max_steps=1", export) == 0
    line = refused(
        "rlhf_text", "--model.init_args.policy={path: exported}", "--data.init_args.tokenizer.vocab_size=200"
    )
    assert "tokenizer" in line
    assert "exported" in line or "expects" in line


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
