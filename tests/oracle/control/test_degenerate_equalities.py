"""Settings under which one control method is another, bit for bit, and what must hold of every rollout.

Every method is trained by Lightning, on rollouts that begin a few episodes each; references are PPO through Lightning,
or its learner stepped by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tensordict import TensorDict
from torch import Tensor

from datamodules import ControlDataModule
from modules.baselines import ATLA, PPO, SAPPO, ActionRobust, WocaR
from modules.contracts import RolloutRequest
from modules.control.learner import PPOLearner
from modules.control.module import ADVERSARY, AGENT, stream_key
from modules.control.perturbation import PerturbationSettings
from modules.control.players import AdversarySettings
from modules.control.policy import MemorySettings
from modules.control.ppo_settings import PPOSettings
from modules.control.regulariser import RegulariserSettings
from modules.grad import GRAD
from modules.grad.settings import PSROSettings
from modules.population import meta_solvers

pytestmark = pytest.mark.filterwarnings("ignore:.*two standard errors.*")  # responses of two updates fail

FRAMES = 32
SETTINGS = PPOSettings(lr=1e-2, value_lr=1e-2, epochs=2, minibatches=4)
NETS: dict[str, Any] = {"hidden": (8,), "ppo": SETTINGS}
STATE = PerturbationSettings(space="state", eps=0.1, eps_bar=0.02)
PUSH = PerturbationSettings(space="action", eps=0.5, eps_bar=0.1, first_step="zero")
ADVERSARY_NETS = AdversarySettings(kind="temporal_delta", hidden=(8,))
MEMORIES = {
    "none": MemorySettings(),
    "stack": MemorySettings(kind="stack", k=2),
    "lstm": MemorySettings(kind="lstm", history=4),
}


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")


def _data(task: str = "pendulum") -> ControlDataModule:
    """Rollouts of 8 steps of 4 environments; episodes end after 5."""
    return ControlDataModule(task, options={"horizon": 5}, envs=4, frames_per_batch=FRAMES)


def _fit(module: Any, task: str = "pendulum") -> Any:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=_data(task))
    return module


def _by_hand(module: Any, task: str = "pendulum") -> tuple[Any, ControlDataModule]:
    """A module with its networks, and its data, but no trainer."""
    data = _data(task)
    data.setup("fit")
    module._attach(data.spec)
    return module, data


def _assert_same_player(one: PPOLearner, other: PPOLearner) -> None:
    """Weights of policy and critic, statistics of observations and of returns."""
    mine, theirs = one.member(), other.member()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
    assert torch.equal(one.returns.squares, other.returns.squares)


def _update(
    module: Any, data: ControlDataModule, actor: Any, name: str, key: tuple[int, ...], total: int
) -> TensorDict:
    """One rollout and the named player's update, by hand."""
    learner = module.learner if name == "agent" else module.opponent
    batch = data.rollout(RolloutRequest(actor, name, key, learner.updates, learner.settings.gamma))
    learner.update(batch, (*key, learner.updates), total, 0, batch.numel())
    return batch


# -- methods without an adversary -------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", ["none", "stack", "lstm"])
@pytest.mark.parametrize("method", ["sgld", "ibp"])
def test_sappo_without_weight_is_ppo(method, memory):
    kwargs = {"perturbation": STATE, "total_frames": 3 * FRAMES, "memory": MEMORIES[memory], **NETS}
    plain = _fit(PPO(**kwargs))
    smooth = _fit(SAPPO(regulariser=RegulariserSettings(kappa=0.0, method=method), **kwargs))
    _assert_same_player(plain.learner, smooth.learner)


@pytest.mark.parametrize("memory", ["none", "stack"])
@pytest.mark.parametrize("schedule", ["linear", "exp"])
def test_wocar_without_weights_is_ppo(schedule, memory):
    """Its worst-case critic learns, but nobody listens."""
    kwargs = {"perturbation": STATE, "total_frames": 3 * FRAMES, "memory": MEMORIES[memory], **NETS}
    plain = _fit(PPO(**kwargs))
    unweighted = RegulariserSettings(kappa=0.0)
    worst = _fit(WocaR(w_max=0.0, schedule=schedule, q_minibatches=4, inner_steps=3, regulariser=unweighted, **kwargs))
    _assert_same_player(plain.learner, worst.learner)
    assert not torch.equal(worst.slow, worst.q_learner.flat)


@pytest.mark.parametrize(
    "make",
    [
        lambda kwargs: SAPPO(regulariser=RegulariserSettings(kappa=0.3, ramp=0.0), **kwargs),
        lambda kwargs: WocaR(
            w_max=0.8, q_minibatches=4, inner_steps=3, regulariser=RegulariserSettings(kappa=0.0), **kwargs
        ),
    ],
    ids=["sappo", "wocar"],
)
def test_with_weight_they_are_not(make):
    """So that the equalities above say something."""
    kwargs = {"perturbation": STATE, "total_frames": 3 * FRAMES, **NETS}
    plain, other = _fit(PPO(**kwargs)).learner.member(), _fit(make(kwargs)).learner.member()
    assert not torch.equal(plain["policy.weight_0"], other["policy.weight_0"])


# -- mixed actions ----------------------------------------------------------------------------------------------------
def _mixing(kind: str, alpha: float, agent_steps: int, adversary_steps: int, updates: int) -> ActionRobust:
    return ActionRobust(
        adversary=AdversarySettings(kind=kind, alpha=alpha, hidden=(8,), observe_previous=False),  # pyright: ignore[reportArgumentType]
        perturbation=PUSH,
        agent_steps=agent_steps,
        adversary_steps=adversary_steps,
        adversary_ppo=SETTINGS,
        total_frames=updates * FRAMES,
        hidden=(8,),
        ppo=PPOSettings(lr=1e-2, value_lr=1e-2, epochs=2, minibatches=4, anneal=agent_steps > 100),
    )


@pytest.mark.parametrize("kind", ["nr", "pr"])
def test_action_robust_without_the_adversarys_share_is_ppo(kind):
    """Only the agent trains; its rates are annealed as PPO's are."""
    plain = _fit(PPO(perturbation=PUSH, total_frames=3 * FRAMES, **NETS))
    _assert_same_player(plain.learner, _fit(_mixing(kind, 0.0, 10**6, 1, 3)).learner)


@pytest.mark.parametrize("turns", [(1, 1), (2, 1), (1, 2)])
def test_action_robusts_turns_leave_the_agent_alone_without_share(turns):
    """The adversary's turns use environments of their own: after as many of its own updates the agent is PPO's."""
    agent_steps, adversary_steps = turns
    mixed = _fit(_mixing("nr", 0.0, agent_steps, adversary_steps, 2 * (agent_steps + adversary_steps)))
    steady = PPOSettings(lr=1e-2, value_lr=1e-2, epochs=2, minibatches=4, anneal=False)
    plain = _fit(PPO(perturbation=PUSH, total_frames=2 * agent_steps * FRAMES, hidden=(8,), ppo=steady))
    _assert_same_player(plain.learner, mixed.learner)
    assert (mixed.learner.updates, mixed.opponent.updates) == (2 * agent_steps, 2 * adversary_steps)


@pytest.mark.parametrize("kind", ["nr", "pr"])
def test_with_a_share_it_is_not(kind):
    plain = _fit(_mixing(kind, 0.0, 10**6, 1, 2)).learner.member()
    mixed = _fit(_mixing(kind, 0.5, 10**6, 1, 2)).learner.member()
    assert not torch.equal(plain["policy.weight_0"], mixed["policy.weight_0"])


# -- GRAD -------------------------------------------------------------------------------------------------------------
def _grad(epochs: int, perturbation: PerturbationSettings, solver: Any = None, **kwargs: Any) -> GRAD:
    plan = {"init_frames": 3 * FRAMES, "br_frames": 2 * FRAMES, "eval_episodes": 2, **kwargs.pop("psro", {})}
    psro = PSROSettings(epochs=epochs, **plan)
    return GRAD(perturbation, ADVERSARY_NETS, psro, adversary_ppo=SETTINGS, meta_solver=solver, **NETS, **kwargs)


NOTHING = PerturbationSettings(space="action", eps=0.0, eps_bar=0.0)


@pytest.mark.parametrize("task", ["pendulum", "integrator"])
@pytest.mark.parametrize("memory", ["none", "stack", "lstm"])
def test_grad_without_epochs_is_ppo(memory, task):
    """One agent, one adversary that does nothing."""
    grad = _fit(_grad(0, PUSH, memory=MEMORIES[memory]), task)
    plain = _fit(PPO(perturbation=PUSH, total_frames=3 * FRAMES, memory=MEMORIES[memory], **NETS), task)
    _assert_same_player(plain.learner, grad.learner)
    stored = grad.members[0].stacked()
    for name, value in plain.learner.member().items():
        assert torch.equal(stored[name][0], value), name
    assert [sigma.tolist() for sigma in grad.meta_strategies] == [[1.0], [1.0]]


@pytest.mark.parametrize("warm_start", ["latest", "scratch"])
@pytest.mark.parametrize("first", ["null", "random"])
def test_grad_without_a_budget_is_ppo_all_along(first, warm_start):
    """The first agent, and every response: PPO that goes on from the agent before, or from new weights."""
    grad = _fit(_grad(2, NOTHING, psro={"initial_adversary": first, "warm_start": warm_start}))
    plain, data = _by_hand(PPO(perturbation=NOTHING, total_frames=3 * FRAMES, **NETS))
    agents = grad.members[0].stacked()
    assert len(agents["mean"]) == 3
    start = None
    for iteration, updates in enumerate((3, 2, 2)):
        plain.learner.begin(stream_key(iteration, AGENT), start if warm_start == "latest" else None)
        for _ in range(updates):
            _update(plain, data, plain.training_actor(AGENT), "agent", stream_key(iteration, AGENT), updates)
        start = plain.learner.member()
        for name, value in start.items():
            assert torch.equal(agents[name][iteration], value), (iteration, name)
    fitted = _fit(PPO(perturbation=NOTHING, total_frames=3 * FRAMES, **NETS)).learner.member()
    for name, value in fitted.items():
        assert torch.equal(agents[name][0], value), name


def test_grad_with_a_budget_is_not():
    """In the response to the first adversary that has learned (iteration 2); before, nobody perturbs."""
    one, other = (
        _fit(_grad(2, perturbation, meta_solvers.Last(), psro={"adversary_warm_start": "scratch"})).members[0].stacked()
        for perturbation in (NOTHING, PUSH)
    )
    for name in ("policy.weight_0", "value.weight_0"):
        assert torch.equal(one[name][:2], other[name][:2])
        assert not torch.equal(one[name][2], other[name][2])


def test_the_newest_alone_and_responses_of_one_update_are_alternate_training():
    """A hand-written schedule without any population: in turn one update of each player against the other's newest.

    That is the schedule of ATLA in spirit, not bit for bit. GRAD's responses begin with Adam's moments at zero and with
    environments started afresh; both answer the players of the iteration before, where ATLA's adversary meets the agent
    already updated; and GRAD's adversaries train against agents that act by their means.
    """
    grad = _fit(_grad(3, PUSH, meta_solvers.Last(), psro={"br_frames": FRAMES}))
    for sigma in grad.meta_strategies:
        assert sigma.tolist() == [0.0, 0.0, 0.0, 1.0]
    plain, data = _by_hand(ATLA(PUSH, ADVERSARY_NETS, adversary_ppo=SETTINGS, total_frames=FRAMES, **NETS))
    plain.learner.begin(stream_key(0, AGENT))
    for _ in range(3):  # the first agent
        _update(plain, data, plain.game(plain.agent(plain.learner.stacked()), None, None, "agent"), "agent",
                stream_key(0, AGENT), 3)  # fmt: skip
    agent, adversary = plain.learner.member(), None

    def stacked(member: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.unsqueeze(0) for name, value in member.items()}

    for iteration in range(1, 4):
        budget = plain.budget()
        nets = plain.opponent.networks
        attacker = None
        if adversary is not None:
            attacker = plain.attacker(nets, stacked(adversary), ADVERSARY_NETS, budget, sampled=True)
        plain.learner.begin(stream_key(iteration, AGENT), agent)
        acting = plain.game(plain.agent(plain.learner.stacked()), attacker, budget, "agent")
        _update(plain, data, acting, "agent", stream_key(iteration, AGENT), 1)
        plain.opponent.begin(stream_key(iteration, ADVERSARY), adversary)
        plain.opponent.take_statistics(stacked(agent), torch.ones(1, dtype=torch.float64))
        learning = plain.attacker(nets, plain.opponent.stacked(), ADVERSARY_NETS, budget, sampled=True)
        frozen = plain.agent(stacked(agent), sampled=False)
        batch = _update(plain, data, plain.game(frozen, learning, budget, "adversary"), "adversary",
                        stream_key(iteration, ADVERSARY), 1)  # fmt: skip
        assert float(batch["perturbation"].abs().max()) > 0
        agent, adversary = plain.learner.member(), plain.opponent.member()
        for members, mine in zip(grad.members, (agent, adversary), strict=True):
            for name, value in members.stacked().items():
                assert torch.equal(value[iteration], mine[name]), (iteration, name)


@pytest.mark.parametrize(
    "solver",
    [
        meta_solvers.NashLP,
        meta_solvers.RegretMatching,
        meta_solvers.FictitiousPlay,
        meta_solvers.ProjectedReplicator,
        meta_solvers.Uniform,
        meta_solvers.Last,
        meta_solvers.SoftmaxPayoff,
    ],
)
def test_a_population_of_one_plays_its_member(solver):
    for sigma in solver()(torch.tensor([[[-3.7]], [[3.7]]], dtype=torch.float64)):
        assert sigma.tolist() == [1.0]


# -- bookkeeping ------------------------------------------------------------------------------------------------------
def test_the_payoff_table_is_zero_sum():
    table = _fit(_grad(2, PUSH)).payoff_table.state_dict()
    assert (table["counts"] == 2).all()
    assert float(table["sums"].abs().min()) > 0
    assert torch.equal(table["sums"][0], -table["sums"][1])


MYOPIC = PPOSettings(gamma=0.0, normalise_rewards=False, normalise_observations=False)


def test_the_adversarys_rewards_are_the_agents_negated_on_one_rollout():
    """Without discounting, targets are rewards."""
    module, data = _by_hand(ATLA(PUSH, ADVERSARY_NETS, ppo=MYOPIC, adversary_ppo=MYOPIC, hidden=(8,)))
    for player, learner in ((AGENT, module.learner), (ADVERSARY, module.opponent)):
        learner.begin(stream_key(0, player))
    batches = [
        data.rollout(RolloutRequest(module.training_actor(player), "both", (1, player), 0))
        for player in (AGENT, ADVERSARY)
    ]
    for sign, learner, batch in zip((1.0, -1.0), (module.learner, module.opponent), batches, strict=True):
        target = learner.prepare(batch, None).target.view_as(batch["reward"])
        torch.testing.assert_close(target, sign * batch["reward"], atol=1e-5, rtol=1e-6)
        assert float(batch["reward"].abs().min()) > 0


@pytest.mark.parametrize("player", [AGENT, ADVERSARY], ids=["agent", "adversary"])
@pytest.mark.parametrize("memory", ["none", "stack", "lstm"])
@pytest.mark.parametrize("space", ["state", "action"])
def test_ratios_of_the_first_minibatch_are_one(space, memory, player):
    """Over the third rollout of a stream, whose normalisers and carries are past their beginnings.

    One minibatch of one epoch: what it reports was computed before the first step. ``approximate_kl`` is at least a
    quarter of a small log-ratio's square, so that 1e-10 bounds the root mean square of log-ratios by 2e-5.
    """
    whole = PPOSettings(lr=1e-2, epochs=1, minibatches=1, anneal=False)
    module, data = _by_hand(
        ATLA(
            STATE if space == "state" else PUSH,
            ADVERSARY_NETS,
            ppo=whole,
            adversary_ppo=whole,
            memory=MEMORIES[memory],
            hidden=(8,),
        )
    )
    for number, learner in ((AGENT, module.learner), (ADVERSARY, module.opponent)):
        learner.begin(stream_key(0, number))
    learner = module.learner if player == AGENT else module.opponent
    name, key = ("agent", "adversary")[player], stream_key(0, player)
    for number in range(3):
        batch = data.rollout(RolloutRequest(module.training_actor(player), name, key, number, learner.settings.gamma))
        before = learner.member()
        metrics = learner.update(batch, (*key, number), 3, 0, batch.numel())
        if player == ADVERSARY:
            module.learner._absorb(batch, None)
            learner.moments.load_state_dict(module.learner.moments.state_dict())
        assert bool(batch["fresh"].any())
        assert abs(metrics["kl"]) < 1e-10
        assert metrics["clip_fraction"] == 0.0
        assert abs(metrics["policy_loss"]) < 1e-5  # minus the mean of standardised advantages
        assert not torch.equal(before["policy.log_std"], learner.member()["policy.log_std"])
