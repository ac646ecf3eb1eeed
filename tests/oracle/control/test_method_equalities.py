"""Methods that must be another method at the end of a setting's range: the same weights, bit for bit."""

from __future__ import annotations

import pytest
import torch
from control_runs import control
from population_runs import population, rows


def _fit(cli, support_configs, name, *flags, config="control"):
    assert cli("fit", "-c", support_configs / f"{config}.yaml", f"--experiment={name}", *flags) == 0


def _weights(tmp_path, name, player="agent"):
    state = control(tmp_path / "runs" / name / "run-001")[player]
    return state["policy"]["flat"], state["value"]["flat"]


def _same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)


def test_sa_ppo_without_weight_is_ppo(cli, support_configs, tmp_path):
    _fit(cli, support_configs, "ppo")
    flags = ["--model=modules.baselines.SAPPO", "--model.init_args.regulariser.kappa=0", *_settings(support_configs)]
    _fit(cli, support_configs, "sa", *flags)
    _same(_weights(tmp_path, "ppo"), _weights(tmp_path, "sa"))
    _fit(cli, support_configs, "weighed", *flags, "--model.init_args.regulariser.kappa=0.5")
    assert not torch.equal(_weights(tmp_path, "ppo")[0], _weights(tmp_path, "weighed")[0])


def test_wocar_without_weights_is_ppo(cli, support_configs, tmp_path):
    _fit(cli, support_configs, "ppo")
    flags = ["--model=modules.baselines.WocaR", "--model.init_args.regulariser.kappa=0", *_settings(support_configs)]
    _fit(cli, support_configs, "wocar", *flags, "--model.init_args.w_max=0", "--model.init_args.inner_steps=3")
    _same(_weights(tmp_path, "ppo"), _weights(tmp_path, "wocar"))


def _settings(support_configs):
    """The file's arguments that another class shares, again: a new class on the command line may drop them."""
    return [
        "--model.init_args.perturbation={space: state, eps: 0.1, eps_bar: 0.02}",
        "--model.init_args.hidden=[8]",
        "--model.init_args.total_frames=384",
        "--model.init_args.ppo={epochs: 2, minibatches: 4, lr: 1.0e-3}",
    ]


def test_action_robust_with_no_share_is_ppo(cli, support_configs, tmp_path):
    """All turns are the agent's; the adversary's share of an action is 0."""
    action = "--model.init_args.perturbation={space: action, eps: 0.1, eps_bar: 0.02}"
    _fit(cli, support_configs, "ppo", action)
    flags = ["--model=modules.baselines.ActionRobust", *_settings(support_configs)[1:], action]
    mixing = "--model.init_args.adversary={kind: nr, alpha: 0.0, observe_previous: false}"
    _fit(cli, support_configs, "ar", *flags, mixing, "--model.init_args.agent_steps=100")
    _same(_weights(tmp_path, "ppo"), _weights(tmp_path, "ar"))


def test_grads_first_agent_is_ppo(cli, support_configs, tmp_path):
    """A population of one against an adversary that does nothing: its mixture is [1]."""
    _fit(cli, support_configs, "grad", "--model.init_args.psro.epochs=0", config="grad")
    state = population(tmp_path / "runs" / "grad" / "run-001")
    assert [sigma.tolist() for sigma in state["meta_strategies"]] == [[1.0], [1.0]]
    flags = [
        "--model=modules.baselines.PPO",
        "--model.init_args.perturbation.space=action",
        "--model.init_args.perturbation.clip_executed=false",
        "--model.init_args.memory={kind: stack, k: 1}",
        "--model.init_args.hidden=[8]",
        "--model.init_args.total_frames=128",
        "--model.init_args.ppo={epochs: 2, minibatches: 4, lr: 1.0e-3}",
    ]
    _fit(cli, support_configs, "ppo", *flags, config="grad")
    _same(_weights(tmp_path, "ppo"), [state["method"]["agent"][part]["flat"] for part in ("policy", "value")])


@pytest.mark.filterwarnings("ignore:.*below 0 by more than two standard errors.*")
def test_without_budget_an_attacked_response_is_an_unattacked_one(cli, support_configs, tmp_path):
    """eps = 0: the agent's response to adversaries equals its response to none, and payoffs do not see them."""
    nothing = ["--model.init_args.perturbation.eps=0", "--model.init_args.perturbation.eps_bar=0"]
    _fit(cli, support_configs, "none", *nothing, config="grad")
    _fit(cli, support_configs, "noise", *nothing, "--model.init_args.psro.initial_adversary=random", config="grad")
    one, other = (population(tmp_path / "runs" / name / "run-001") for name in ("none", "noise"))
    for name, value in one["members"][0]["members"].items():
        assert torch.equal(value, other["members"][0]["members"][name]), name
    payoffs = one["payoff_table"]["sums"][0]
    assert torch.equal(payoffs, payoffs[:, :1].expand_as(payoffs))


@pytest.mark.parametrize("memory", ["{kind: stack, k: 1}", "{kind: lstm, history: 4}", "{kind: none}"])
def test_the_first_minibatch_has_ratio_one(cli, support_configs, tmp_path, memory):
    """With one epoch of one minibatch the policy that learns is the one that acted: divergence and clipping are 0."""
    flags = ["--model.init_args.ppo={epochs: 1, minibatches: 1}", f"--model.init_args.memory={memory}"]
    _fit(cli, support_configs, "ratio", *flags)
    for row in rows(tmp_path / "runs" / "ratio" / "run-001"):
        if "agent/kl" in row:
            assert abs(row["agent/kl"]) < 1e-6
            assert row["agent/clip_fraction"] == 0.0
