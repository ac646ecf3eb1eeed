"""What an update does besides its target: padding, bootstrap bits, clipping, target copies, figures and guards."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch
from emax_batches import adam, make_batch, make_learner, make_spec, update
from tensordict import TensorDict
from torch import Tensor

from modules.emax import AgentNetwork, Clip, DivergenceError, Ensemble, Explorer, Mixing, Reward, Target, ValueMARL

MIXINGS = ("none", "vdn", "qmix")
EMAX: dict[str, Any] = {
    "explorer": Explorer(kind="ucb"),
    "target": Target(kind="mean_target", double_q=False),
    "evaluator": "majority_vote",
}


def _gradients(learner: ValueMARL, part: TensorDict) -> tuple[Tensor, ...]:
    """Losses and gradients of one update, all parameters in one vector."""
    learner.zero_grad()
    losses = learner.losses(part)[0]
    losses.sum().backward()
    grads = [p.grad.flatten() for p in learner.parameters() if p.grad is not None]
    return losses.detach(), torch.cat(grads)


def _with_garbage(part: TensorDict, size: float) -> TensorDict:
    """Other contents wherever nothing is filled: steps, and what is seen after the last of them."""
    part, draw = part.clone(), torch.Generator().manual_seed(99)
    steps = part["filled"].shape[-1]
    length = part["filled"].sum(-1, keepdim=True)
    empty, unseen = torch.arange(steps) >= length, torch.arange(steps + 1) > length

    def noise(name: str) -> Tensor:
        return size * torch.randn(part[name].shape, generator=draw)

    def rows(mask: Tensor, name: str) -> Tensor:
        return mask.view(*mask.shape, *[1] * (part[name].ndim - mask.ndim))

    for name in ("observation", "state"):
        part[name] = torch.where(rows(unseen, name), noise(name), part[name])
    part["reward"] = torch.where(rows(empty, "reward"), noise("reward"), part["reward"])
    part["legal"] = torch.where(rows(unseen, "legal"), noise("legal") > 0, part["legal"])
    flipped = torch.randint(4, part["action"].shape, generator=draw)
    part["action"] = torch.where(rows(empty, "action"), flipped, part["action"])
    part["terminated"] = torch.where(empty, torch.rand(empty.shape, generator=draw) < 0.5, part["terminated"])
    assert bool(empty.any())
    return part


@pytest.mark.parametrize(("mixing", "separate", "kind"), list(product(MIXINGS, (False, True), ("mean", "own"))))
def test_padding_changes_neither_loss_nor_gradient_nor_reward_moments(mixing, separate, kind):
    spec = make_spec(restricts_actions=True, own_state=True, state_size=6)
    part = make_batch(spec, 3 if separate else 1, items=6, steps=5, members=3)
    results = []
    for size in (0.0, 1.0, 1e4):
        learner = make_learner(
            spec,
            ensemble=Ensemble(3, separate_batches=separate, bootstrap_p=0.5),
            target=Target(kind="mean_target" if kind == "mean" else "own_target"),
            mixing=Mixing(mixing, embed=4, hypernet_hidden=8),
            network=AgentNetwork(hidden=8, recurrent=True),
            reward=Reward("none" if mixing == "none" else "sum", norm="standardise"),
        )
        batch = _with_garbage(part, size) if size else part
        results.append((*_gradients(learner, batch), learner.rewards.get_buffer("squares").clone()))
    for losses, gradient, squares in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])
        assert torch.equal(squares, results[0][2])


def test_a_filled_step_does_change_the_loss():
    """The guard above can fail: garbage in the terminal step itself is learnt from."""
    spec = make_spec()
    part, learner = make_batch(spec, steps=5), make_learner(spec, network=AgentNetwork(recurrent=True))
    before = learner.losses(part)[0]
    part["reward"][0, 0, -1] += 1.0
    assert not torch.equal(before, learner.losses(part)[0])


def test_loss_is_a_mean_over_filled_steps():
    """Equal to the errors of each item, cut where it ends, pooled and averaged."""
    spec = make_spec()
    learner = make_learner(spec, network=AgentNetwork(hidden=8, recurrent=True), mixing=Mixing("none"))
    part = make_batch(spec, items=5, steps=4)
    pooled = []
    for item in range(5):
        length = int(part["filled"][0, item].sum())
        one = part[:, item : item + 1].clone()
        whole = {key: value[:, :, : length + (key == "observation")] for key, value in one.items()}
        pooled += [learner.losses(TensorDict(whole, [1, 1]))[0]] * length
    torch.testing.assert_close(learner.losses(part)[0], torch.stack(pooled).mean(0))


def test_bootstrap_bits_choose_who_learns_from_an_item():
    """Each member's loss and gradient are those of a batch of its own items alone."""
    spec = make_spec()
    for separate in (False, True):
        settings = {"ensemble": Ensemble(3, separate_batches=separate, bootstrap_p=0.5), "mixing": Mixing("none")}
        learner = make_learner(spec, **settings)
        part = make_batch(spec, 3 if separate else 1, items=20, members=3)
        losses, gradient = _gradients(learner, part)
        plain = make_learner(spec, ensemble=Ensemble(3, separate_batches=False), mixing=Mixing("none"))
        for member in range(3):
            minibatch = member if separate else 0
            mine = part["member_mask"][minibatch, :, member]
            assert 0 < int(mine.sum()) < 20
            alone, own = _gradients(plain, part[minibatch : minibatch + 1, mine].exclude("member_mask"))
            torch.testing.assert_close(losses[member], alone[member])
            torch.testing.assert_close(gradient.view(3, -1)[member], own.view(3, -1)[member])


def test_a_member_without_any_item_stands_still():
    spec = make_spec()
    learner = make_learner(spec, ensemble=Ensemble(3, bootstrap_p=0.5), mixing=Mixing("vdn"))
    part = make_batch(spec, 3, members=3)
    part["member_mask"][1, :, 1] = False
    losses, gradient = _gradients(learner, part)
    assert float(losses[1]) == 0.0
    assert not gradient.view(3, -1)[1].any()
    assert bool(gradient.isfinite().all())


def _set_gradients(learner: ValueMARL) -> None:
    draw = torch.Generator().manual_seed(5)
    for parameter in (learner.online, learner.online_mixer):
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=draw) * torch.arange(1, len(parameter) + 1).view(
                -1, 1
            )


@pytest.mark.parametrize("scope", ["member", "global"])
@pytest.mark.parametrize(("mixing", "per_member"), [("vdn", False), ("qmix", False), ("qmix", True)])
def test_clipping_equals_torch_on_each_part(scope, mixing, per_member):
    """torch's own ``clip_grad_norm_`` on what is clipped together."""
    learner = make_learner(
        make_spec(),
        ensemble=Ensemble(3),
        mixing=Mixing(mixing, per_member=per_member),
        clip=Clip(2.0, scope),
    )
    _set_gradients(learner)
    agents = [torch.nn.Parameter(row.clone()) for row in learner.online.detach()]
    mixers = [torch.nn.Parameter(row.clone()) for row in learner.online_mixer.detach()] if mixing == "qmix" else []
    for copies, whole in ((agents, learner.online), (mixers, learner.online_mixer)):
        for row, copy in enumerate(copies):
            assert whole.grad is not None
            copy.grad = whole.grad[row].clone()
    if scope == "global":
        groups = [agents + mixers]
    elif per_member:
        groups = [[agent, mixer] for agent, mixer in zip(agents, mixers, strict=True)]
    else:
        groups = [*([agent] for agent in agents), *([mixer] for mixer in mixers)]
    norms = [torch.nn.utils.clip_grad_norm_(group, 2.0) for group in groups]
    learner.clip_gradients_of_members()
    for copies, whole in ((agents, learner.online), (mixers, learner.online_mixer)):
        for row, copy in enumerate(copies):
            assert whole.grad is not None
            torch.testing.assert_close(whole.grad[row], copy.grad)
    assert learner._gradient_norm is not None
    torch.testing.assert_close(learner._gradient_norm, torch.stack(norms[:3] if scope == "member" else norms * 3))


def test_small_gradients_and_no_limit_are_left_alone():
    for clip in (Clip(1e6), Clip(None)):
        learner = make_learner(make_spec(), ensemble=Ensemble(3), mixing=Mixing("qmix"), clip=clip)
        _set_gradients(learner)
        before = [p.grad.clone() for p in (learner.online, learner.online_mixer) if p.grad is not None]
        learner.clip_gradients_of_members()
        assert len(before) == 2
        for kept, parameter in zip(before, (learner.online, learner.online_mixer), strict=True):
            assert parameter.grad is not None
            assert torch.equal(kept, parameter.grad)


@pytest.mark.parametrize("kind", ["own_target", "mean_target"])
def test_hard_copies_at_their_updates_only(kind):
    spec = make_spec()
    rule = Target(kind=kind, update_every=3)
    learner = make_learner(spec, ensemble=Ensemble(2), target=rule, mixing=Mixing("qmix"), learning_rate=1e-2)
    optimizer = adam(learner)
    history, mixers = [learner.online.detach().clone()], [learner.online_mixer.detach().clone()]
    for number in range(8):
        update(learner, optimizer, make_batch(spec, 2, seed=number), number)
        copied = number // 3 * 3  # before updates 3 and 6: the weights after as many updates
        assert torch.equal(learner.get_buffer("lagged"), history[copied])
        assert torch.equal(learner.get_buffer("lagged_mixer"), mixers[copied])
        history.append(learner.online.detach().clone())
        mixers.append(learner.online_mixer.detach().clone())
    assert not torch.equal(history[0], history[3])


def test_soft_copies_by_hand():
    spec = make_spec()
    learner = make_learner(spec, target=Target(kind="own_target", update_every=1, tau=0.25))
    learner.get_buffer("lagged").zero_()
    learner._update_targets(1)
    torch.testing.assert_close(learner.get_buffer("lagged"), 0.25 * learner.online.detach())
    learner._update_targets(2)
    torch.testing.assert_close(learner.get_buffer("lagged"), (0.25 + 0.75 * 0.25) * learner.online.detach())


def test_target_free_kinds_keep_no_copy():
    for kind in ("mean_online", "own_online"):
        learner = make_learner(make_spec(), target=Target(kind=kind), mixing=Mixing("qmix"))
        assert [name for name, _ in learner.named_buffers() if "lagged" in name] == []
        assert not any("lagged" in name for name in learner.state_dict())


# -- figures ----------------------------------------------------------------------------------------------------------
def _logged(learner: ValueMARL, part: TensorDict) -> dict[str, float]:
    """What ``_log_training`` logs of an update's part."""
    found: dict[str, Any] = {}
    learner._trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        world_size=1, datamodule=SimpleNamespace(frames=40), strategy=None
    )
    learner.log_dict = lambda values, **_: found.update(values)  # pyright: ignore[reportAttributeAccessIssue]
    losses, target, values = learner.losses(part)
    learner._log_training(part, losses.sum().detach(), target, values.detach())
    return {name: float(value) for name, value in found.items()}


def _clone_members(learner: ValueMARL) -> None:
    with torch.no_grad():
        learner.online.copy_(learner.online[:1].clone().expand_as(learner.online))
        if learner.target.lagged:
            learner.get_buffer("lagged").copy_(learner.online)


@pytest.mark.parametrize("recurrent", [False, True])
def test_members_are_compared_on_the_same_steps(recurrent):
    """Equal members with minibatches of their own still agree on everything."""
    spec = make_spec(restricts_actions=True)
    learner = make_learner(spec, ensemble=Ensemble(5), network=AgentNetwork(recurrent=recurrent), **EMAX)
    part = make_batch(spec, 5, items=16, steps=3 if recurrent else 1)
    assert _logged(learner, part)["q/std"] > 0.01
    _clone_members(learner)
    found = _logged(learner, part)
    assert found["q/std"] == pytest.approx(0.0, abs=1e-6)
    assert found["ucb/disagree"] == 0.0
    assert found["vote/agreement"] == 1.0


@pytest.mark.parametrize("separate", [False, True])
def test_figures_leave_padding_out(separate):
    spec = make_spec(restricts_actions=True, own_state=True, state_size=6)
    part = make_batch(spec, 3 if separate else 1, items=6, steps=5)
    found = []
    for batch in (part, _with_garbage(part, 1e3)):
        network = AgentNetwork(hidden=8, recurrent=True)
        learner = make_learner(spec, ensemble=Ensemble(3, separate_batches=separate), network=network, **EMAX)
        found.append((_logged(learner, batch), float(learner.get_buffer("largest_reward"))))
    assert found[0] == found[1]


def test_figures_by_hand():
    spec = make_spec()
    learner = make_learner(spec, ensemble=Ensemble(3, separate_batches=False), **EMAX)
    part = make_batch(spec, items=32)
    found = _logged(learner, part)
    utilities = learner.agents.apply(learner.online.detach(), part["observation"][0, :, 0])
    mean, std = utilities.mean(0), utilities.std(0, correction=0)
    bold = (mean + std).argmax(-1) != mean.argmax(-1)
    votes = torch.nn.functional.one_hot(utilities.argmax(-1), 4).sum(0).amax(-1) / 3
    for name, value in {
        "q/mean": mean.mean(),
        "q/std": std.mean(),
        "ucb/disagree": bold.float().mean(),
        "vote/agreement": votes.mean(),
        "target/mean": learner.targets(part).mean(),
        "train/epsilon": torch.tensor(learner.explorer.epsilon(40)),
    }.items():
        assert found[name] == pytest.approx(float(value), abs=1e-6), name
    assert found["frames"] == 40.0
    assert 0.0 < found["ucb/disagree"] < 1.0


@pytest.mark.parametrize("episodes", [1, 3, 4, 10, 101])
def test_interquartile_mean_equals_scipy(episodes):
    learner = make_learner(make_spec())
    learner._trainer = SimpleNamespace(datamodule=SimpleNamespace(frames=7))  # pyright: ignore[reportAttributeAccessIssue]
    found: dict[str, Any] = {}
    learner.log_dict = lambda values, **_: found.update(values)  # pyright: ignore[reportAttributeAccessIssue]
    returns = torch.randn(episodes, generator=torch.Generator().manual_seed(episodes)).exp()
    length = torch.arange(episodes)
    learner.validation_step(TensorDict({"episode_return": returns, "episode_length": length}, [episodes]), 0)
    assert float(found["val/return"]) == pytest.approx(float(returns.mean()))
    assert float(found["val/return_iqm"]) == pytest.approx(scipy.stats.trim_mean(returns.numpy(), 0.25), rel=1e-6)
    assert float(found["val/length"]) == pytest.approx((episodes - 1) / 2)
    assert found["frames"] == 7.0


# -- guards -----------------------------------------------------------------------------------------------------------
def _with_values(size: float, spec: Any, **settings: Any) -> ValueMARL:
    """A learner whose utilities are all ``size``."""
    learner = make_learner(spec, target=Target(kind="mean_online"), gamma=0.9, divergence_limit=2.0, **settings)
    with torch.no_grad():
        learner.online.zero_()
        learner.agents.views(learner.online)["bias_2"].fill_(size)
    return learner


@pytest.mark.parametrize("common", [False, True])
def test_divergence_stops_where_targets_exceed_any_return(common):
    """Largest team reward 1, gamma 0.9: no return is over 10; twice that is the limit set."""
    spec = make_spec(agents=4, common_reward=common)
    part = make_batch(spec)
    part["terminated"] = torch.zeros(1, 8, 1, dtype=torch.bool)
    part["reward"] = torch.full((1, 8, 1, 4), 1.0 if common else 0.25)
    # targets: 1 + 0.9 * 4 * value
    _logged(_with_values(18.0 / 3.6, spec), part)
    with pytest.raises(DivergenceError, match=r"mean \|target\| is 21, over 2 times .* allow \(10\): resume with"):
        _logged(_with_values(20.0 / 3.6, spec), part)


def test_divergence_is_not_looked_for_where_it_means_nothing():
    spec, part = make_spec(agents=4), make_batch(make_spec(agents=4))
    _logged(_with_values(1e6, spec, reward=Reward(norm="scale")), part)
    part["reward"] = torch.zeros_like(part["reward"])
    _logged(_with_values(1e6, spec), part)  # no reward seen yet: no bound either


def test_a_loss_that_is_not_finite_stops_training():
    spec = make_spec()
    learner, part = make_learner(spec), make_batch(make_spec())
    part["reward"][0, 0] = float("inf")
    optimizer = SimpleNamespace(optimizer=adam(learner), step=lambda: None)
    learner.optimizers = lambda: optimizer  # pyright: ignore[reportAttributeAccessIssue]
    learner.manual_backward = lambda loss: loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
    learner._trainer = SimpleNamespace(world_size=1, global_step=1, log_every_n_steps=10)  # pyright: ignore
    with pytest.raises(DivergenceError, match="the loss is no longer finite: resume from the last checkpoint"):
        learner.training_step(part.unsqueeze(0), 0)


def test_one_step_makes_every_update_of_the_batch():
    """A training step of three minibatches equals three updates, target copies counted by updates."""
    spec = make_spec()
    settings = {"target": Target(update_every=5), "learning_rate": 1e-2, "mixing": Mixing("qmix")}
    one, other = make_learner(spec, **settings), make_learner(spec, **settings)
    parts = [make_batch(spec, seed=number) for number in range(12)]
    optimizer = adam(other)
    for number, part in enumerate(parts):
        update(other, optimizer, part, number)
    steps = adam(one)
    one.optimizers = lambda: SimpleNamespace(optimizer=steps, step=steps.step)  # pyright: ignore
    one.manual_backward = lambda loss: loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
    for number in range(4):
        one._trainer = SimpleNamespace(world_size=1, global_step=number, log_every_n_steps=10**9)  # pyright: ignore
        one._logs_now = lambda: False  # pyright: ignore[reportAttributeAccessIssue]
        one.training_step(torch.stack(parts[3 * number : 3 * number + 3]), number)  # pyright: ignore
    assert torch.equal(one.online, other.online)
    assert torch.equal(one.get_buffer("lagged"), other.get_buffer("lagged"))
    assert not torch.equal(one.online, make_learner(spec, **settings).online)
