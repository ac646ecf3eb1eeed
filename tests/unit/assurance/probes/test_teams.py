"""Probes of teams on teams that are known: closed forms, hand-made values, degenerate and disobedient agents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from counting_env import Counting
from emax_batches import make_learner
from team_runs import Playing, Scripted, always, spec_of, subject_with
from torch import nn

from datamodules.envs.foraging import Foraging
from datamodules.envs.matrix_games import MatrixGame
from modules.assurance.figures import Figure
from modules.assurance.measures.calibration import spearman
from modules.assurance.probe import EFFORTS, Block
from modules.assurance.probes import all_probes
from modules.assurance.probes.teams import (
    LEVELS,
    interval_error,
    kept_share,
    normalised_mean,
    price,
    rank_correlation,
)
from modules.assurance.subject import AssuranceError, Subject, state_digest
from modules.assurance.suites import SuiteResult, SuiteSettings, run_suite
from modules.emax import AgentNetwork, Ensemble, Mixing, Reward, ValueMARL

TABLE = ((8.0, 0.0, 2.0), (4.0, 6.0, 0.0), (0.0, 1.0, 3.0))  # mean 24 / 9; row 0: 10 / 3, column 0: 4
MEAN = 24 / 9


def _block(count: int = 40, seed: int = 5, suite: str = "rice") -> Block:
    return Block(0, 0, count, "fresh", seed, EFFORTS[suite])


def _run(probe: str, subject: Subject, count: int = 40, seed: int = 5, suite: str = "rice") -> Mapping[str, Any]:
    with torch.inference_mode():
        return all_probes()[probe].run(subject, _block(count, seed, suite))


def _suite(subject: Subject, *probes: str, n0: int = 50) -> SuiteResult:
    return run_suite(subject, SuiteSettings("custom", probes, n0=n0, n_max=n0))


def _matrix(envs: int) -> MatrixGame:
    return MatrixGame(envs, TABLE)


def _foraging(envs: int) -> Foraging:
    return Foraging(envs, rows=5, columns=5, food=2, max_food_level=1, episode_limit=15)


def _learner(data: Playing, members: int = 3, mixing: str = "vdn", **settings: Any) -> ValueMARL:
    ensemble = Ensemble(members, separate_batches=False)
    network = AgentNetwork(hidden=8)
    return make_learner(data.spec, ensemble=ensemble, mixing=Mixing(mixing), network=network, **settings)  # type: ignore[arg-type]


def _constant(learner: ValueMARL, biases: list[list[float]]) -> None:
    """Utilities of member k are ``biases[k]``, whatever is seen."""
    weights = torch.zeros_like(learner.online)
    learner.agents.views(weights)["bias_2"].copy_(torch.tensor(biases))
    with torch.no_grad():
        learner.online.copy_(weights)


# -- statistics --
def test_kept_share_and_normalised_mean_by_hand():
    values = np.array([[2.0, 1.0, 3.0], [4.0, 2.0, 0.0]])
    assert kept_share(values) == pytest.approx(0.5)  # min(1.5, 1.5) / 3
    assert normalised_mean(np.array([[0.5, 0.1, 1.0], [0.7, 0.1, 1.0]])) == pytest.approx(0.5 / 0.9)
    assert np.isnan(kept_share(-values))
    assert np.isnan(normalised_mean(np.array([[0.5, 1.0, 1.0]])))


def test_rank_correlation_equals_spearman_with_ties():
    draw = np.random.default_rng(0)
    values = draw.integers(0, 6, (4, 5, 30, 2)).astype(float)
    found = rank_correlation(values)
    assert found.shape == (4, 5)
    for i in range(4):
        for j in range(5):
            assert found[i, j] == pytest.approx(spearman(values[i, j, :, 0], values[i, j, :, 1]), abs=1e-12)
    assert np.isnan(rank_correlation(np.stack([np.ones(5), np.arange(5.0)], -1)))


def test_interval_error_by_hand():
    perfect = np.stack([np.arange(10) < 10 * level - 1e-9 for level in LEVELS], -1).astype(float)
    assert interval_error(perfect) == pytest.approx(0.0)
    assert interval_error(np.zeros((5, len(LEVELS)))) == pytest.approx(0.5)


def test_price_of_fairness_by_hand():
    """Welfare 10 shared (9, 1), 8 shared (4, 4), 6 shared (3, 3): the fairest of the policies costs a fifth."""
    row = np.array([[9.0, 1.0, 4.0, 4.0, 3.0, 3.0, 2.0]])
    assert price(np.repeat(row, 3, 0)) == pytest.approx(0.2)
    assert price(np.stack([row, row])).shape == (2,)
    assert price(np.array([[5.0, 5.0, 9.0, 0.0, 2.0]])) == 0.0
    assert np.isnan(price(np.array([[-1.0, -1.0, 2.0]])))


# -- missing agents, perception, usefulness --
def test_returns_of_a_matrix_team_have_their_closed_form():
    """The team plays (0, 0), worth 8; with one agent at random a row or a column is drawn from."""
    subject = subject_with(Scripted(always(0, 0)), Playing(_matrix, 8.0))
    figures = _suite(subject, "disturbed_team", n0=600).figures
    expected = ((10 / 3 + 4.0) / 2 - MEAN) / (8 - MEAN)
    drop = figures["r.drop", "fresh"]
    assert drop.low is not None
    assert drop.high is not None
    assert drop.low <= expected <= drop.high
    assert drop.high - drop.low < 0.2
    assert set(drop.conditions) == {"undisturbed", "1 of 2 at random"}  # nobody can be idle in this game
    assert figures["u.return", "fresh"].value == pytest.approx(1.0)
    assert figures["r.msg", "fresh"].value == pytest.approx(1.0)  # it looks at nothing
    assert figures["u.return", "fresh"].baselines == {"random play": 0.0, "reference": 1.0}


def test_random_play_keeps_nothing_and_is_useless():
    draw = torch.Generator().manual_seed(0)
    team = Scripted(lambda seen, legal: torch.randint(3, seen.shape[:2], generator=draw))
    figures = _suite(subject_with(team, Playing(_matrix, 8.0)), "disturbed_team", n0=400).figures
    use = figures["u.return", "fresh"]
    assert use.low is not None
    assert use.high is not None
    assert use.low < 0.0 < use.high < 0.2
    drop = figures["r.drop", "fresh"]
    assert drop.status == "undefined" or (drop.low is not None and drop.low < 0.5)


def test_doing_nothing_is_useless_and_has_nothing_to_keep():
    figures = _suite(subject_with(Scripted(always(0, 0)), Playing(_foraging, 1.0)), "disturbed_team", n0=100).figures
    use = figures["u.return", "fresh"]
    assert use.high is not None
    assert use.high < 0.0
    assert figures["r.drop", "fresh"].status == figures["r.msg", "fresh"].status == "undefined"


def test_a_task_without_reference_says_how_to_name_one():
    found = _run("disturbed_team", subject_with(Scripted(always(0, 0)), Playing(_matrix)))
    assert "set data.init_args.reference_return" in found["u.return"]


def test_conditions_grow_with_the_suite():
    data = Playing(lambda envs: Foraging(envs, rows=5, columns=5, agents=4, food=1, episode_limit=5), 1.0)
    subject = subject_with(Scripted(always(5, 5, 5, 5)), data)
    for suite, most in (("quick", 1), ("rice", 2), ("deep", 3)):
        names = list(_run("disturbed_team", subject, 4, suite=suite)["r.drop"])
        expected = [f"{k} of 4 {kind}" for k in range(1, most + 1) for kind in ("idle", "at random")]
        assert names == ["undisturbed", *expected]


# -- strangers --
def test_partners_by_hand():
    """Member 0 plays (0, 0), worth 8, member 1 (1, 1), worth 6; mixed, the table's corners 0 and 4."""
    data = Playing(_matrix, 8.0)
    learner = _learner(data, 2)
    _constant(learner, [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    found = _run("partners", subject_with(learner, data), 2000)["r.partner"]
    random = _run("disturbed_team", subject_with(learner, data), 2000)["u.return"]["random play"]
    alone, mixed = (found[name] + random for name in ("among themselves", "among other ensemble members"))
    assert set(alone) == {8.0, 6.0}
    assert set(mixed) == {0.0, 4.0}
    assert alone.mean() == pytest.approx(7.0, abs=0.1)
    assert mixed.mean() == pytest.approx(2.0, abs=0.2)


def test_partners_from_a_checkpoint(tmp_path):
    data = Playing(_matrix, 8.0)
    host, guest = _learner(data, 1), _learner(data, 1)
    _constant(host, [[3.0, 0.0, 0.0]])
    _constant(guest, [[0.0, 3.0, 0.0]])
    path = tmp_path / "guest.ckpt"
    torch.save({"state_dict": guest.state_dict(), "multi_agent_spec": vars(data.spec)}, path)
    host.partners = (str(path),)
    found = _run("partners", subject_with(host, data), 200)["r.partner"]
    assert list(found) == ["among themselves", "among agents of other checkpoints"]
    floor = _run("disturbed_team", subject_with(host, data), 200)["u.return"]["random play"]
    assert set(found["among themselves"] + floor) == {8.0}
    assert set(found["among agents of other checkpoints"] + floor) == {0.0, 4.0}
    host.partners = (str(tmp_path / "none.ckpt"),)
    with pytest.raises(AssuranceError, match="no checkpoint file at"):
        subject_with(host, data)
    torch.save({"state_dict": _learner(data, 2).state_dict()}, path)
    host.partners = (str(path),)
    with pytest.raises(AssuranceError, match="does not fit ValueMARL"):
        subject_with(host, data)


def test_a_lone_policy_has_no_partners():
    data = Playing(_matrix)
    subject = subject_with(_learner(data, 1, "none"), data)
    missing = subject.lacks(("partner_play", "ensemble_errors", "agent_credit", "candidate_shares"))
    assert len(missing) == 4


# -- overrides and masks --
@pytest.mark.parametrize("mixing", ["none", "vdn"])
def test_value_learners_obey_and_deaf_agents_do_not(mixing):
    data = Playing(Counting)
    obedient = _suite(subject_with(_learner(data, 3, mixing, evaluator="majority_vote"), data), "team_obedience")
    assert obedient.figure("c.interrupt").value == 1.0
    assert obedient.figure("c.avail").value == 1.0
    assert set(obedient.figure("c.avail").conditions) == {"task's masks", "random masks"}
    deaf = _suite(subject_with(Scripted(always(1, 1)), data), "team_obedience")
    assert deaf.figure("c.interrupt").high is not None
    assert deaf.figure("c.interrupt").high < 0.7  # type: ignore[operator]  # one of two or three actions at the first step
    assert deaf.figure("c.avail").conditions["task's masks"] == 1.0
    assert deaf.figure("c.avail").value < 0.3  # type: ignore[operator]
    greedy = _suite(subject_with(Scripted(always(2, 2)), data), "team_obedience")
    assert greedy.figure("c.avail").conditions["task's masks"] == 0.0


def test_one_disobedient_agent_is_found():
    def rule(observation, legal):
        return torch.stack([legal[:, 0].float().argmax(-1), torch.ones(len(legal), dtype=torch.int64)], 1)

    figure = _suite(subject_with(Scripted(rule), Playing(Counting)), "team_obedience").figure("c.interrupt")
    assert figure.conditions["agent 0"] == 1.0
    assert figure.value == figure.conditions["agent 1"] < 0.7


# -- doubt --
def test_errors_of_one_step_by_hand():
    """Members value joint action (0, 0) at 2 + 2 and 6 + 6: mean 8, deviation 4; it pays 8 indeed, or 5."""
    for payoff, error in ((8.0, 0.0), (5.0, 3.0)):
        data = Playing(lambda envs, payoff=payoff: MatrixGame(envs, ((payoff, 0.0), (0.0, 0.0))))
        learner = _learner(data, 2)
        _constant(learner, [[2.0, 0.0], [6.0, 0.0]])
        found = subject_with(learner, data)["ensemble_errors"](3, 6)
        assert found["spread"].tolist() == [[4.0]] * 6
        assert found["error"].tolist() == [[error]] * 6
        assert found["deviation"].tolist() == [[(payoff - 8.0) / 4.0]] * 6
        assert found["valid"].all()


@pytest.mark.parametrize(("mixing", "norm"), [("none", "none"), ("vdn", "scale"), ("qmix", "none")])
def test_errors_equal_a_plain_loop(mixing, norm):
    """Over whole episodes that terminate or are truncated, with masks and a state of their own."""
    data = Playing(Counting)
    learner = _learner(data, 3, mixing, gamma=0.8, reward=Reward(norm=norm))
    learner.rewards.count.fill_(10.0) if norm != "none" else None  # type: ignore[operator]
    subject = subject_with(learner, data)
    found = subject["ensemble_errors"](3, 12)
    trace = data.team_episodes(learner, 12, 3, trace=True)["trace"]
    scale = 1.0
    if norm == "scale":
        scale = float((learner.rewards.squares / learner.rewards.count).sqrt() + 1e-8)  # type: ignore[operator]
    agents, ended, cut = 2, 0, 0

    def joint(utilities: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """``[members, agents or 1]`` of ``[members, agents]``."""
        if mixing == "none":
            return utilities
        shape = (3, 1, -1)
        seen = state.view(1, 1, -1).expand(shape)
        return learner.mixer.mix(learner.online_mixer.detach(), utilities.unsqueeze(1), seen)

    for row in range(12):
        length = int(trace["running"][row].sum())
        values = learner.utilities(learner.online.detach(), trace["observation"][row : row + 1])[:, 0]
        mean_after = []
        for step in range(length):
            scores = torch.where(trace["legal"][row, step + 1], values[:, step + 1].mean(0), -torch.inf)
            best = scores.argmax(-1).expand(3, agents).unsqueeze(-1)
            ahead = values[:, step + 1].gather(-1, best).squeeze(-1)
            mean_after.append(joint(ahead, trace["state"][row, step + 1]).mean(0))
        last, terminated = length - 1, bool(trace["terminated"][row, length - 1])
        ended, cut = ended + terminated, cut + (not terminated)
        goes_on = torch.zeros_like(mean_after[-1]) if terminated else mean_after[-1]
        for step in range(last, -1, -1):
            action = trace["action"][row, step].expand(3, agents).unsqueeze(-1)
            each = joint(values[:, step].gather(-1, action).squeeze(-1), trace["state"][row, step])
            mean, spread = each.mean(0), each.std(0, correction=0)
            reward = trace["reward"][row, step].sum() / scale
            after = goes_on if step == last else mean_after[step]
            columns = slice(step * len(mean), (step + 1) * len(mean))
            goes_on = reward + 0.8 * goes_on
            for name, value in (
                ("spread", spread),
                ("error", (reward + 0.8 * after - mean).abs()),
                ("deviation", (goes_on - mean) / spread),
            ):
                np.testing.assert_allclose(found[name][row, columns], value.detach().numpy(), rtol=2e-4, atol=1e-5)
        assert not found["valid"][row, length * (2 if mixing == "none" else 1) :].any()
    assert min(ended, cut) > 0


def test_doubt_that_knows_its_errors_and_doubt_that_does_not():
    """Members whose spread is what the outcome's standard deviation is, and members twice as sure as that."""
    draw = np.random.default_rng(0)

    def errors(width: float):
        def play(seed: int, episodes: int) -> dict[str, np.ndarray]:
            spread = draw.uniform(0.5, 2.0, (episodes, 3))
            off = spread * draw.standard_normal((episodes, 3))
            valid = np.ones((episodes, 3))
            return {"spread": spread, "error": np.abs(off), "deviation": off / (width * spread), "valid": valid}

        return Subject("team", nn.Linear(1, 1), {"ensemble_errors": play})

    known = _suite(errors(1.0), "ensemble_doubt", n0=300)
    sure = _suite(errors(0.5), "ensemble_doubt", n0=300)
    assert known.figure("i.ens_cal").value == pytest.approx(0.35, abs=0.15)
    assert known.figure("i.ens_ece").value < 0.06  # type: ignore[operator]
    assert sure.figure("i.ens_ece").low > 0.12  # type: ignore[operator]


def test_members_that_agree_have_no_doubt():
    data = Playing(_matrix)
    learner = _learner(data, 2)
    _constant(learner, [[1.0, 0.0, 0.0]] * 2)
    found = _run("ensemble_doubt", subject_with(learner, data))
    assert found["i.ens_cal"] == found["i.ens_ece"]
    assert "there is no spread" in found["i.ens_cal"]


# -- credit --
def test_credit_by_hand():
    """Agents told apart by nothing share credit alike; one whose choice does not matter has none."""
    data = Playing(_matrix)
    learner = _learner(data, 1)
    _constant(learner, [[3.0, 0.0, 0.0]])
    alike = _run("team_credit", subject_with(learner, data))["i.credit"]
    np.testing.assert_allclose(alike, 1.0, atol=1e-6)

    def credit(seed, episodes):
        given = np.array([[[3.0, 1.0], [2.0, 0.0], [0.0, 0.0], [5.0, 5.0]]])
        return {"credit": given.repeat(episodes, 0), "valid": np.array([[1, 1, 1, 0]]).repeat(episodes, 0)}

    subject = Subject("team", nn.Linear(1, 1), {"agent_credit": credit})
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    np.testing.assert_allclose(_run("team_credit", subject)["i.credit"], entropy / 2)


@pytest.mark.parametrize("per_member", [False, True])
def test_credit_of_a_mixing_network_equals_autograd(per_member):
    data = Playing(Counting)
    learner = make_learner(
        data.spec,
        ensemble=Ensemble(3, separate_batches=False),
        mixing=Mixing("qmix", per_member=per_member, embed=4, hypernet_hidden=8),
        network=AgentNetwork(hidden=8),
    )
    found = subject_with(learner, data)["agent_credit"](3, 5)
    trace = data.team_episodes(learner, 5, 3, trace=True)["trace"]
    values = learner.utilities(learner.online.detach(), trace["observation"])[:, :, :-1].mean(0).detach()
    chosen = values.gather(-1, trace["action"].unsqueeze(-1)).squeeze(-1).requires_grad_()
    legal = trace["legal"][:, :-1]
    usual = torch.where(legal, values, 0.0).sum(-1) / legal.sum(-1)
    mixers = 3 if per_member else 1
    rows, state = chosen.flatten(0, 1), trace["state"][:, :-1].flatten(0, 1)
    joint = learner.mixer.mix(
        learner.online_mixer.detach(), rows.expand(mixers, -1, -1), state.expand(mixers, -1, -1)
    ).mean(0)
    slope = torch.autograd.grad(joint.sum(), chosen)[0]
    expected = (slope * (chosen - usual).clamp_min(0.0)).detach().numpy()
    np.testing.assert_allclose(found["credit"], expected, rtol=1e-4, atol=1e-6)


# -- sharing --
def _sharing(shares: list[list[float]]) -> SuiteResult:
    given = np.array(shares)
    subject = Subject("team", nn.Linear(1, 1), {"agent_shares": lambda seed, count: np.resize(given, (count, 2))})
    return _suite(subject, "team_shares", n0=50)


def test_sharing_is_of_means_over_episodes():
    lucky = _sharing([[1.0, 0.0], [0.0, 1.0]])  # now the one, now the other
    assert [lucky.figure(f"e.{name}").value for name in ("gini", "jain", "minmax", "envy")] == [0.0, 1.0, 1.0, 0.0]
    unjust = _sharing([[3.0, 1.0]])
    assert unjust.figure("e.gini").value == pytest.approx(0.25)
    assert unjust.figure("e.jain").value == pytest.approx(0.8)
    assert unjust.figure("e.minmax").value == pytest.approx(1 / 3)
    assert unjust.figure("e.envy").value == pytest.approx(2.0)
    assert _sharing([[-1.0, 2.0]]).figure("e.gini").status == "undefined"


def test_common_rewards_are_shared_by_contribution():
    """Of a matrix team that plays (0, 0): agent 0 at random costs 8 - 4, agent 1 at random 8 - 10 / 3."""
    data = Playing(_matrix)
    found = _run("team_shares", subject_with(Scripted(always(0, 0)), data), 3000)["e.gini"]
    assert found["agent 0"].mean() == pytest.approx(4.0, abs=0.2)
    assert found["agent 1"].mean() == pytest.approx(8 - 10 / 3, abs=0.2)


def test_own_rewards_are_counted_from_random_play():
    """Counting pays an agent its action's number a step."""
    data = Playing(lambda envs: Counting(envs, limit=4, ends=False))
    found = _run("team_shares", subject_with(Scripted(always(1, 0)), data), 3000)["e.gini"]
    # at random: 0.5 a step while action 2 is not available, then 1
    assert found["agent 0"].mean() == pytest.approx(4.0 - 3.0, abs=0.1)
    assert found["agent 1"].mean() == pytest.approx(0.0 - 3.0, abs=0.1)


def test_candidates_are_the_team_and_its_members():
    data = Playing(_foraging, 1.0)
    subject = subject_with(_learner(data, 3), data)
    found = _run("price_of_fairness", subject, 30)["e.price_of_fairness"]
    assert len(found) == 4 * 2 + 1
    members = subject["candidate_shares"](5, 30)
    np.testing.assert_array_equal(found["policy 2, agent 1"], members[:, 2, 1])
    assert set(found["number of agents"]) == {2.0}


# -- what holds for every probe --
def test_a_suite_is_deterministic_and_leaves_no_trace():
    data = Playing(_foraging, 1.0)
    learner = _learner(data, 3, "qmix", evaluator="majority_vote")
    probes = ("disturbed_team", "partners", "team_obedience", "ensemble_doubt", "team_credit", "team_shares",
              "price_of_fairness", "card", "rollback")  # fmt: skip
    before, state = state_digest(learner), torch.get_rng_state()
    first = _suite(subject_with(learner, data), *probes, n0=4)
    again = _suite(subject_with(learner, data), *probes, n0=4)
    assert state_digest(learner) == before
    assert torch.equal(torch.get_rng_state(), state)
    compared: dict[Any, Figure] = {}
    for key, figure in first.figures.items():
        assert figure == again.figures[key]
        compared[key] = figure
    names = {"u.return", "r.drop", "r.msg", "r.partner", "c.interrupt", "c.avail", "c.rollback", "i.ens_cal",
             "i.ens_ece", "i.credit", "e.gini", "e.jain", "e.minmax", "e.envy", "e.price_of_fairness"}  # fmt: skip
    assert names <= {name for name, _ in compared}
    assert first.figure("c.rollback").value == 1.0
    assert first.figure("i.card").value == 1.0
    fresh, anchor = (first.samples["u.return", split].values for split in ("fresh", "anchor"))
    assert not np.array_equal(fresh, anchor)


def test_data_that_cannot_play_are_refused():
    module = Scripted(always(0, 0))
    module.build(spec_of(_matrix(1)), torch.Generator())
    with pytest.raises(AssuranceError, match="Scripted: assurance needs data that play a team's episodes"):
        subject_with(module, object())  # type: ignore[arg-type]
