"""MAVEN: generated last layers against plain ones, every term of the loss by hand, and what goes into replay."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from emax_batches import adam, make_batch, make_spec, update
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional

from datamodules.envs.matrix_games import MatrixGame
from datamodules.envs.tasks import make_env
from datamodules.rollout.episodes import EpisodeBuilder, steps_as_items
from datamodules.rollout.replay import Replay
from datamodules.rollout.stream import CollectorStream, TensorStream
from modules.contracts import ActsMultiAgent, LearnsFromReplay, MultiAgentSpec, StoresCarry
from modules.emax import MAVEN, AgentNetwork, Clip, Ensemble, Explorer, Latent, Mixing, Reward, ValueMARL
from modules.emax.maven import LatentAgents, _joined, one_hot
from modules.marl import MultiAgentPolicy


def _maven(spec: MultiAgentSpec, latent: Latent | None = None, seed: int = 0, **settings: Any) -> MAVEN:
    settings = {"network": AgentNetwork(hidden=8), **settings}
    learner = MAVEN(latent=latent or Latent(size=4, discriminator_hidden=8, policy_hidden=8), **settings)
    learner.build(spec, torch.Generator().manual_seed(seed))
    return learner


def _batch(spec: MultiAgentSpec, latents: int = 4, items: int = 8, steps: int = 6, seed: int = 0) -> TensorDict:
    """Whole episodes with what was carried; latents were drawn from an even distribution."""
    part, draw = make_batch(spec, items=items, steps=steps, seed=seed), torch.Generator().manual_seed(seed + 1)
    part["carry_latent"] = torch.randint(latents, (1, items), generator=draw)
    part["carry_latent_log_prob"] = torch.full((1, items), -math.log(latents))
    part["carry_latent_frames"] = torch.zeros(1, items, dtype=torch.int64)
    return part


# -- utilities ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("recurrent", [True, False])
def test_utilities_equal_plain_layers_with_generated_weights(recurrent, share):
    """Each agent's history through torch's own layers, then ``W_z + W_i + W_0`` of the table."""
    agents = LatentAgents(3, 5, 4, latents=2, hidden=6, recurrent=recurrent, share_agents=share)
    flat = agents.init(torch.Generator().manual_seed(0))
    params, table = agents.views(flat), agents.table(flat).view(2 + 3 + 1, 6, 4)
    observation, latent = torch.randn(7, 9, 3, 5), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    got = agents.sequence(flat, _joined(observation, latent))
    assert got.shape == (1, 7, 9, 3, 4)
    for i in range(3):
        row = 0 if share else i
        rows = torch.cat([observation[:, :, i], torch.eye(3)[i].expand(7, 9, 3)], -1)
        if recurrent:
            gru = nn.GRU(6, 6, batch_first=True)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(gru, f"{name}_l0").data.copy_(params[name][row])
            features = gru(torch.relu(rows @ params["weight_in"][row] + params["bias_in"][row]))[0]
        else:
            features = torch.relu(rows @ params["weight_0"][row] + params["bias_0"][row])
            features = torch.relu(features @ params["weight_1"][row] + params["bias_1"][row])
        for item in range(7):
            weight = table[latent[item]] + table[2 + i] + table[-1]
            torch.testing.assert_close(got[0, item, :, i], features[item] @ weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("recurrent", [True, False])
def test_acting_equals_learning(recurrent, share):
    agents = LatentAgents(3, 5, 4, latents=2, hidden=6, recurrent=recurrent, share_agents=share)
    flat = agents.init(torch.Generator().manual_seed(0))
    seen = _joined(torch.randn(7, 9, 3, 5), torch.tensor([0, 1, 1, 0, 1, 0, 0]))
    whole, hidden = agents.sequence(flat, seen), torch.zeros(7, 1, 3, 6)
    for step in range(9):
        if recurrent:
            values, hidden = agents.step(flat, seen[:, step], hidden)
        else:
            values = agents.apply(flat, seen[:, step])
        torch.testing.assert_close(values, whole[:, :, step], atol=1e-6, rtol=1e-5)


def test_generated_layers_start_as_wide_as_linear_ones():
    agents = LatentAgents(3, 5, 40, latents=16, hidden=64, output_gain=0.5)
    table = agents.table(agents.init(torch.Generator().manual_seed(0)))
    made = table[:16].unsqueeze(1) + table[16:19] + table[-1]
    linear = nn.Linear(64, 40).weight.detach()
    assert float(made.std()) == pytest.approx(0.5 * float(linear.std()), rel=0.05)


def test_only_latents_of_the_batch_move():
    spec = make_spec()
    learner = _maven(spec, Latent(size=4, information_weight=0.0))
    part = _batch(spec)
    part["carry_latent"][:] = 2
    learner.losses(part)[0].sum().backward()
    moved = cast(LatentAgents, learner.agents).table(cast(Tensor, learner.online.grad)).abs().sum(1) > 0.0
    assert moved.tolist() == [False, False, True, False, True, True, True, True]


def test_mixer_reads_the_latent():
    spec = make_spec()
    learner, part = _maven(spec), _batch(spec)
    part["observation"] = _joined(part["observation"], part["carry_latent"])
    state = learner._state(part, slice(None, -1))
    assert state is not None
    assert state.shape == (1, 8, 6, spec.state_size + 4)
    torch.testing.assert_close(state[0, 3, 2, :15], part["observation"][0, 3, 2, :, :5].flatten())
    assert state[0, 3, 2, 15:].tolist() == one_hot(part["carry_latent"][0, 3], 4).tolist()
    assert _maven(spec, mixing=Mixing(kind="vdn"))._state(part, slice(None)) is None


# -- acting ------------------------------------------------------------------------------------------------------------
def _biased(learner: MAVEN, probabilities: list[float]) -> None:
    """Make the hierarchical policy's distribution the same everywhere."""
    with torch.no_grad():
        weights = learner.latent_policy.weights
        weights["weight_1"].zero_()
        weights["bias_1"].copy_(torch.tensor([probabilities]).log())


def test_latent_is_drawn_from_the_policy():
    spec = make_spec()
    learner, wanted = _maven(spec), [0.5, 0.1, 0.3, 0.1]
    _biased(learner, wanted)
    draw, rows = torch.Generator().manual_seed(0), 20_000
    observation, state = torch.randn(rows, 3, 5), torch.randn(rows, 15)
    carry = learner.begin(observation, state, draw, 123)
    shares = torch.bincount(carry["latent"], minlength=4) / rows
    assert torch.allclose(shares, torch.tensor(wanted), atol=0.015)  # four standard deviations
    torch.testing.assert_close(carry["latent_log_prob"].exp(), torch.tensor(wanted)[carry["latent"]])
    assert carry["latent_frames"].unique().tolist() == [123]
    assert learner.begin(observation, state, draw, None)["latent"].unique().tolist() == [0]  # greedy
    sampled = _maven(spec, Latent(size=4, evaluation="sampled"))
    _biased(sampled, wanted)
    shares = torch.bincount(sampled.begin(observation, state, draw, None)["latent"], minlength=4) / rows
    assert torch.allclose(shares, torch.tensor(wanted), atol=0.015)


def test_policy_starts_near_uniform_and_baseline_at_zero():
    learner, state = _maven(make_spec(), Latent()), torch.randn(50, 15)
    with torch.no_grad():
        assert float((learner.latent_policy(state).softmax(-1) - 1 / 16).abs().max()) < 0.01
        assert float(learner.baseline(state).abs().max()) == 0.0


@pytest.mark.parametrize("recurrent", [True, False])
def test_actions_follow_the_latent(recurrent):
    """Greedy actions of acting are those of the utilities under the carried latent."""
    spec = make_spec()
    learner = _maven(spec, network=AgentNetwork(hidden=8, recurrent=recurrent))
    draw, observation = torch.Generator().manual_seed(0), torch.randn(64, 3, 5)
    carry = learner.begin(observation, observation.flatten(1), draw, 0)
    carry["latent"] = torch.arange(64) % 4
    action, after = learner.act(observation, None, carry, draw, None)
    values = learner.utilities(learner.online.detach(), _joined(observation, carry["latent"]).unsqueeze(1))
    assert torch.equal(action, values[0, :, 0].argmax(-1))
    assert torch.equal(after["latent"], carry["latent"])
    other, _ = learner.act(observation, None, {**carry, "latent": (carry["latent"] + 1) % 4}, draw, None)
    assert not torch.equal(action, other)


# -- learning ----------------------------------------------------------------------------------------------------------
def _weights(network: Any) -> list[Tensor]:
    return [network.weights[name][0] for name in ("weight_0", "bias_0", "weight_1", "bias_1")]


def _perceptron(network: Any, rows: Tensor) -> Tensor:
    first, first_bias, second, second_bias = _weights(network)
    return torch.relu(rows @ first + first_bias) @ second + second_bias


@pytest.mark.parametrize("common", [True, False])
def test_latent_policy_loss_by_hand(common):
    """REINFORCE episode by episode: ratios, two of them cut, advantages over the baseline, entropy."""
    spec = make_spec(common_reward=common)
    setting = Latent(size=4, policy_hidden=8, entropy_weight=0.3, max_ratio=1.5, information_weight=0.0)
    learner, part = _maven(spec, setting), _batch(spec)
    with torch.no_grad():
        for network in (learner.latent_policy, learner.baseline):
            network.weights["weight_1"].normal_(generator=torch.Generator().manual_seed(1))
    part["carry_latent_log_prob"] = torch.linspace(-2.5, -0.5, 8).view(1, 8)
    joined = part.clone()
    joined["observation"] = _joined(part["observation"], part["carry_latent"])
    loss = learner._latent_policy_loss(joined)

    wanted, ratios = torch.zeros(()), []
    for item in range(8):
        first = part["observation"][0, item, 0].flatten()
        logits = _perceptron(learner.latent_policy, first)
        expected = _perceptron(learner.baseline, first)[0]
        steps = range(int(part["filled"][0, item].sum()))
        reward = part["reward"][0, item]
        paid = sum(float(reward[t, 0] if common else reward[t].sum()) for t in steps)
        chosen = logits.log_softmax(0)[part["carry_latent"][0, item]]
        ratios.append(math.exp(float(chosen.detach()) - float(part["carry_latent_log_prob"][0, item])))
        advantage = min(ratios[-1], 1.5) * (paid - float(expected.detach()))
        probabilities = logits.softmax(0)
        entropy = -(probabilities * probabilities.log()).sum()
        wanted = wanted + (0.5 * (paid - expected) ** 2 - advantage * chosen - 0.3 * entropy) / 8
    assert any(ratio > 1.5 for ratio in ratios)
    assert any(ratio < 1.5 for ratio in ratios)
    torch.testing.assert_close(loss, wanted)
    owned = [*learner.latent_policy.parameters(), *learner.baseline.parameters()]
    got = torch.autograd.grad(loss, owned)
    for one, other in zip(got, torch.autograd.grad(wanted, owned), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_old_episodes_train_only_the_entropy(monkeypatch):
    spec = make_spec()
    learner, part = _maven(spec, Latent(size=4, policy_window=100)), _batch(spec)
    joined = part.clone()
    joined["observation"] = _joined(part["observation"], part["carry_latent"])
    joined["carry_latent_frames"] = torch.tensor([[0, 100, 899, 900, 950, 1000, 20, 30]])
    monkeypatch.setattr(MAVEN, "_frames", 1000)
    monkeypatch.setattr(learner, "_trainer", object())
    monkeypatch.setattr(MAVEN, "_world", 1)
    loss = learner._latent_policy_loss(joined).detach()
    assert float(learner._latent_metrics["latent/recent"]) == pytest.approx(3 / 8)
    monkeypatch.setattr(learner, "_trainer", None)
    bonus = 0.01 * float(learner._latent_metrics["latent/entropy"])
    some = learner._latent_policy_loss(joined[:, 3:6]).detach()
    some_bonus = 0.01 * float(learner._latent_metrics["latent/entropy"])
    assert float(loss) + bonus == pytest.approx(float(some) + some_bonus, rel=1e-4)
    # none within the window: no return is learnt from, and all parameters still take part
    joined["carry_latent_frames"] = torch.zeros(1, 8, dtype=torch.int64)
    monkeypatch.setattr(learner, "_trainer", object())
    loss = learner._latent_policy_loss(joined)
    assert float(loss.detach()) == pytest.approx(-0.01 * float(learner._latent_metrics["latent/entropy"]))
    loss.backward()
    assert all(p.grad is not None for p in (*learner.latent_policy.parameters(), *learner.baseline.parameters()))
    assert all(float(p.grad.abs().max()) == 0.0 for p in learner.baseline.parameters())  # pyright: ignore


@pytest.mark.parametrize("restricts", [True, False])
@pytest.mark.parametrize("kind", ["trajectory", "step"])
def test_discriminator_loss_by_hand(kind, restricts):
    spec = make_spec(restricts_actions=restricts)
    learner = _maven(spec, Latent(size=4, discriminator=kind, discriminator_hidden=8))
    part = _batch(spec)
    joined = part.clone()
    joined["observation"] = _joined(part["observation"], part["carry_latent"])
    values = learner.utilities(learner.online, joined["observation"][0])[:, :, :-1]
    got = learner._discriminator_loss(joined, values)
    total, count = 0.0, 0
    for item in range(8):
        length = int(part["filled"][0, item].sum())
        softmax = values[0, item, :length]
        if restricts:
            softmax = softmax.masked_fill(~part["legal"][0, item, :length], -torch.inf)
        states = part["observation"][0, item, :length].flatten(1)
        seen = torch.cat([softmax.softmax(-1).flatten(1), states], 1)
        logits = (
            learner.discriminator(seen.unsqueeze(0))[0, -1:] if kind == "trajectory" else learner.discriminator(seen)
        )
        wrong = functional.cross_entropy(logits, part["carry_latent"][0, item].expand(len(logits)), reduction="sum")
        total, count = total + float(wrong.detach()), count + len(logits)
    assert float(got.detach()) == pytest.approx(total / count, rel=1e-5)
    information = float(learner._latent_metrics["latent/information"])
    assert information == pytest.approx(math.log(4) - total / count, rel=1e-4, abs=1e-5)
    (slope,) = torch.autograd.grad(got, learner.online)
    assert float(slope.abs().max()) > 0.0  # agents are told apart, not only the guesser trained


@pytest.mark.parametrize("mixing", ["qmix", "vdn"])
@pytest.mark.parametrize("kind", ["trajectory", "step"])
@pytest.mark.parametrize("recurrent", [True, False])
def test_loss_is_the_weighted_sum_and_padding_never_enters(recurrent, kind, mixing):
    spec = make_spec(restricts_actions=True, own_state=True, state_size=3)
    setting = Latent(size=4, discriminator=kind, information_weight=0.2, value_weight=0.7, policy_hidden=8)
    learner = _maven(
        spec, setting, mixing=Mixing(kind=mixing), network=AgentNetwork(hidden=8, recurrent=recurrent),
        reward=Reward(norm="none"),
    )  # fmt: skip
    part = _batch(spec)
    part["legal"][0, 2] = False  # an agent that is out throughout: nothing is available
    joined = part.clone()
    joined["observation"] = _joined(part["observation"], part["carry_latent"])
    loss, _, values = learner.losses(part)
    value = ValueMARL.losses(learner, joined)[0]
    wanted = 0.7 * value + 0.2 * learner._discriminator_loss(joined, values) + learner._latent_policy_loss(joined)
    torch.testing.assert_close(loss, wanted)
    loss.sum().backward()
    for name, parameter in learner.named_parameters():
        if not parameter.requires_grad:  # VDN's mixer has none
            continue
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    spoilt = part.clone()
    padded = ~part["filled"]
    assert bool(padded.any())
    for name in ("reward", "action"):
        spoilt[name][padded] = 3
    # what follows the last step is seen by the target, what follows that by nobody
    behind = torch.cat([torch.zeros_like(padded[..., :1]), padded], -1) & torch.cat(
        [torch.zeros_like(padded[..., :1]), torch.zeros_like(padded[..., :1]), padded[..., :-1]], -1
    )
    for name in ("observation", "state"):
        spoilt[name][behind] = 50.0
    torch.testing.assert_close(learner.losses(spoilt)[0], loss)


def test_clipping_bounds_every_network():
    spec = make_spec()
    learner, part = _maven(spec, clip=Clip(norm=1e-3)), _batch(spec)
    part["reward"] *= 100.0
    learner.losses(part)[0].sum().backward()
    learner.clip_gradients_of_members()
    for network in (learner.discriminator, learner.latent_policy, learner.baseline):
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
        assert 0.0 < norm <= 1.001e-3
    assert float(learner.online.grad.norm()) <= 1.001e-3  # pyright: ignore[reportOptionalMemberAccess]


def test_everything_learnt_is_in_the_checkpoint():
    spec = make_spec()
    learner, other = _maven(spec, seed=0), _maven(spec, seed=1)
    optimizer = adam(learner)
    for number in range(3):
        update(learner, optimizer, _batch(spec, seed=number), number)
    other.load_state_dict(learner.state_dict())
    part = _batch(spec, seed=9)
    assert torch.equal(learner.losses(part)[0], other.losses(part)[0])
    assert sum(p.numel() for p in learner.parameters()) == sum(
        p.numel() for group in optimizer.param_groups for p in group["params"]
    )


# -- what it is for ----------------------------------------------------------------------------------------------------
def _information(learner: MAVEN, observation: Tensor) -> float:
    """Mutual information, nats, of an evenly drawn latent and the joint action of agents that each draw from the
    softmax of their utilities at one ``observation`` ``[2, features]``."""
    size = learner.latent.size
    seen = _joined(observation.expand(size, *observation.shape), torch.arange(size))
    each = learner.agents.apply(learner.online.detach(), seen)[0].double().softmax(-1)
    joint = (each[:, 0, :, None] * each[:, 1, None, :]).flatten(1)
    return float((joint * (joint / joint.mean(0)).log()).sum(1).mean())


@pytest.mark.parametrize("kind", ["trajectory", "step"])
def test_information_term_makes_latents_distinct(kind):
    """Nobody is paid and all latents start nearly alike: the information term alone tells them apart."""
    spec = make_spec(agents=2, actions=3, features=1, common_reward=True, episode_limit=1)
    observation, part = torch.ones(2, 1), _batch(spec, items=64, steps=1)
    part["observation"], part["reward"] = torch.ones(1, 64, 2, 2, 1), torch.zeros(1, 64, 1, 2)
    found = {}
    for weight in (0.0, 1.0):
        setting = Latent(
            size=4, discriminator=kind, discriminator_hidden=32, information_weight=weight, value_weight=0.0
        )
        learner = _maven(spec, setting, learning_rate=1e-2)
        with torch.no_grad():
            cast(LatentAgents, learner.agents).table(learner.online)[:4] *= 0.1
        assert _information(learner, observation) < 1e-4
        optimizer, bounds, draw = adam(learner), [], torch.Generator().manual_seed(0)
        for number in range(120):
            part["carry_latent"] = torch.randint(4, (1, 64), generator=draw)
            update(learner, optimizer, part, number)
            bounds.append(float(learner._latent_metrics["latent/information"]))
        found[weight] = (_information(learner, observation), sum(bounds[-10:]) / 10)
    behaviour, bound = found[1.0]
    assert behaviour > math.log(2)  # at most log 4
    assert bound > math.log(2)
    behaviour, bound = found[0.0]
    assert behaviour < 1e-3
    assert abs(bound) < 0.1  # the guesser stays at chance


def test_policy_finds_the_latent_that_pays():
    """A bandit over latents: the third pays 1, the others 0."""
    spec = make_spec(agents=2, actions=3, features=1, common_reward=True, episode_limit=1)
    learner = _maven(spec, Latent(size=4, policy_hidden=16, entropy_weight=0.01), learning_rate=1e-2)
    optimizer, draw = adam(learner), torch.Generator().manual_seed(0)
    first, state = torch.ones(32, 2, 1), torch.ones(32, 2)
    for number in range(150):
        carry = learner.begin(first, state, draw, 0)
        part = _batch(spec, items=32, steps=1, seed=number)
        for name in learner.carried:
            part[f"carry_{name}"] = carry[name].unsqueeze(0)
        part["observation"] = torch.ones(1, 32, 2, 2, 1)
        part["reward"] = (carry["latent"] == 2).float().view(1, 32, 1, 1).expand(1, 32, 1, 2)
        update(learner, optimizer, part, number)
    assert float(learner.latent_policy(state[:1]).detach().softmax(-1)[0, 2]) > 0.8
    assert learner.begin(first, state, draw, None)["latent"].unique().tolist() == [2]
    assert float(learner.baseline(state[:1]).detach()) > 0.7


# -- what goes into replay ---------------------------------------------------------------------------------------------
class _Counter:
    """Acts at random, and carries how often it has acted in the episode and a number drawn at its start."""

    carried = ("acted", "drawn")
    device = torch.device("cpu")

    def begin(self, observation: Tensor, state: Tensor, generator: torch.Generator, frames: int | None) -> dict:
        rows = len(observation)
        return {
            "acted": torch.zeros(rows, dtype=torch.int64),
            "drawn": torch.rand(rows, 2, generator=generator),
            "private": torch.zeros(rows),
        }

    def act(self, observation: Tensor, legal: Any, carry: dict, generator: torch.Generator, frames: Any) -> Any:
        action = torch.randint(2, observation.shape[:2], generator=generator)
        return action, {**carry, "acted": carry["acted"] + 1}


class _Plain(_Counter):
    carried = ()


def _streams(actor: Any, steps: int) -> dict[str, Any]:
    def game(seed: int = 3) -> Any:
        return make_env("lbf/5x5-2p-1f-coop", 4, seed=seed, options={"episode_limit": 5})

    generator = torch.Generator().manual_seed(0)
    tensor = TensorStream(game(), actor, generator.clone_state())
    policy = MultiAgentPolicy(actor)
    return {
        "tensor": tensor,
        "torchrl": CollectorStream(game(), policy, generator.clone_state(), steps, carried=actor.carried),
    }


def test_chunks_hold_the_carry_as_it_was_when_acting():
    assert isinstance(_Counter(), StoresCarry)
    assert isinstance(_Counter(), ActsMultiAgent)
    streams = _streams(_Counter(), 4)
    counts = {name: torch.zeros(4, dtype=torch.int64) for name in streams}
    for _ in range(4):
        chunks = {name: stream.collect(4, 0) for name, stream in streams.items()}
        for key in chunks["tensor"].keys():  # noqa: SIM118 - a TensorDict
            assert torch.equal(chunks["tensor"][key], chunks["torchrl"][key]), key
        for name, chunk in chunks.items():
            assert chunk["carry_drawn"].shape == (4, 4, 2)
            assert "carry_private" not in chunk
            for step in range(4):
                counts[name][chunk["first"][:, step]] = 0
                assert torch.equal(chunk["carry_acted"][:, step], counts[name])
                counts[name] += 1
    for stream in streams.values():
        stream.close()


def test_items_hold_the_carry_of_their_first_step():
    stream = _streams(_Counter(), 4)["tensor"]
    builder, episodes, chunks = EpisodeBuilder(4, 5), [], []
    for _ in range(5):
        chunk = stream.collect(4, 0)
        chunks.append(chunk)
        single = steps_as_items(chunk)
        assert torch.equal(single["carry_acted"], chunk["carry_acted"].flatten())
        found = builder.items(chunk)
        if found is not None:
            episodes.append(found)
        builder_again = EpisodeBuilder(4, 5)
        builder_again.load_state_dict(builder.state_dict())
        builder = builder_again
    whole = cast(TensorDict, torch.cat(episodes))
    assert whole["carry_acted"].shape == (len(whole),)
    assert len(whole) >= 12
    assert bool((whole["carry_acted"] == 0).all())
    together = cast(TensorDict, torch.cat(chunks, 1))
    drawn = together["carry_drawn"][together["first"]]
    for row in whole["carry_drawn"]:  # each episode's own draw, not that of the one before
        assert bool((drawn == row).all(-1).any())
    assert len(whole["carry_drawn"].unique(dim=0)) == len(whole)
    replay = Replay(64, seed=0)
    replay.extend(whole)
    sample = replay.sample(16)
    assert sample["carry_drawn"].shape == (16, 2)
    assert sample["carry_acted"].shape == (16,)


def test_nothing_carried_nothing_stored():
    stream = _streams(_Plain(), 4)["tensor"]
    chunk = stream.collect(4, 0)
    builder = EpisodeBuilder(4, 5)
    items = builder.items(stream.collect(4, 0))
    found = {str(key) for part in (chunk, steps_as_items(chunk), items) if part is not None for key in part.keys()}  # noqa: SIM118
    assert "action" in found
    assert not [key for key in found if key.startswith("carry")]
    assert ValueMARL().carried == ()


def test_episodes_begin_just_before_they_are_acted_in():
    """Weights that change between chunks count from an episode's first step on, though it was set up before."""
    seen: list[tuple[int | None, int]] = []

    class Watched(_Counter):
        def begin(self, observation: Tensor, state: Tensor, generator: Any, frames: int | None) -> dict:
            seen.append((frames, len(observation)))
            return super().begin(observation, state, generator, frames)

    stream = TensorStream(MatrixGame(3, rounds=2), Watched(), torch.Generator().manual_seed(0))
    stream.collect(2, 0)
    assert seen == [(0, 3)]  # all three ended with the chunk; none has been begun anew
    stream.collect(1, 60)
    assert seen == [(0, 3), (60, 3)]


# -- errors ------------------------------------------------------------------------------------------------------------
def test_settings_out_of_range_are_named():
    for settings, message in (
        ({"size": 1}, "Latent: size must be >= 2, got 1"),
        ({"max_ratio": 0.5}, "Latent: max_ratio must be >= 1, got 0.5"),
        ({"information_weight": -1.0}, "Latent: information_weight must be >= 0, got -1.0"),
        ({"policy_window": 0}, "Latent: policy_window must be >= 1, got 0"),
        ({"discriminator": "none"}, "Latent: discriminator must be one of trajectory, step, got 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            Latent(**cast(Any, settings))
    with pytest.raises(ValueError, match="MAVEN: ensemble must be one member .* got size 3 and bootstrap_p 1.0"):
        MAVEN(ensemble=Ensemble(3))
    with pytest.raises(ValueError, match="MAVEN: mixing.kind must be qmix or vdn"):
        MAVEN(mixing=Mixing(kind="none"), explorer=Explorer())


def test_batch_without_latents_is_refused():
    spec = make_spec()
    learner = _maven(spec)
    assert isinstance(learner, LearnsFromReplay)
    assert learner.sequences
    updates = cast(TensorDict, torch.stack(cast(Any, [_batch(spec)])))
    learner._check_batch(updates)
    learner._checked = False
    with pytest.raises(ValueError, match=r"MAVEN: batch: 'carry_latent_log_prob' must be \[1, 1, 8\], got nothing"):
        learner._check_batch(cast(TensorDict, updates.exclude("carry_latent_log_prob")))
    updates["carry_latent"] = updates["carry_latent"].unsqueeze(-1)
    with pytest.raises(ValueError, match=r"'carry_latent' must be \[1, 1, 8\], got \[1, 1, 8, 1\]"):
        learner._check_batch(updates)
