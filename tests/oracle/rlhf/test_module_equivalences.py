"""Identities that constrained RLHF must obey, on the module itself: tiny networks, fixed rollouts, no trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import PromptSample
from modules.language.responses import response_states
from modules.language.specs import LoraSpec, ModelSpec
from modules.networks.text_classifier import BagOfTokensClassifier
from modules.objectives.lagrangian import weights_of_fixed
from modules.objectives.ppo import approximate_kl
from modules.rlhf import ConstrainedRLHF
from modules.rlhf.building import build_networks
from modules.rlhf.classifier_files import save_classifier
from modules.rlhf.figures import rollout_figures
from modules.rlhf.rewards import Bleu, DistinctNgrams, IntentReward, Meteor, ResponseLength, Responses, Reward, Rouge
from modules.rlhf.rollout import reference_log_probabilities, respond, response_seeds, rollout_mask
from modules.rlhf.settings import ConstraintSpec, CriticSpec, GenerationSpec, KLSpec, MultiplierSpec, PPOSpec

VOCABULARY, END = 30, 29
LENGTHS = torch.tensor([3, 7, 1, 5])


class Letters:
    """One token a letter; what networks and classifiers need of a tokenizer."""

    hash, vocab_size, eod_id = "letters", VOCABULARY, END

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text if letter.isalpha()]


class Nothing(Reward):
    """Scores are put into rollouts by hand."""

    bounds = (0.0, 1.0)

    def score(self, batch: Responses) -> Tensor:
        raise AssertionError


def build(variant: str = "xi_ppo", names: tuple[str, ...] = ("a", "b"), **settings: Any) -> ConstrainedRLHF:
    """A module of a one-layer GPT-2 whose weights have moved away from the reference's; equal at every call."""
    arguments: dict[str, Any] = {
        "constraints": {} if variant in ("ppo", "fixed_lambda") else {name: ConstraintSpec(0.5) for name in names},
        "kl": KLSpec(beta=0.3), "ppo": PPOSpec(gamma=0.9, lambda_=0.8), "critic": CriticSpec("shared"),
        "generation": GenerationSpec(max_new=6, min_new=1, top_k=0),
    }  # fmt: skip
    shape = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    module = ConstrainedRLHF({name: Nothing() for name in names}, ModelSpec(config=shape), variant,
                             **(arguments | settings))  # type: ignore[arg-type]  # fmt: skip
    streams = 1 if module.problem.single_stream else len(names) + 1
    module.network, module.reference, module.critic = build_networks(
        module.policy_spec, "full", LoraSpec(), module.critic_spec, streams, Letters()
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    module.network.eval()
    return module


def prompts(count: int = 4) -> TensorDict:
    ids = torch.randint(0, VOCABULARY - 1, (4, 7), generator=torch.Generator().manual_seed(7))
    index = torch.arange(4)
    return TensorDict({"prompt_ids": ids, "prompt_length": LENGTHS, "index": index}, batch_size=[4])[:count]  # type: ignore[return-value]


def roll(module: ConstrainedRLHF, batch: TensorDict, rows: Tensor | None = None, samples: int = 1) -> TensorDict:
    """What ``collect`` does, with scores that depend on the prompt's index alone."""
    rows = batch["index"] if rows is None else rows
    seeds = response_seeds(11, rows, samples)
    rollout = respond(module.network, batch, seeds, module.generation, END, samples)
    names = len(module.problem.names)
    scores = torch.rand(8, 4, names, generator=torch.Generator().manual_seed(3))
    rollout["scores"] = scores[batch["index"]][:, :samples]
    reference_log_probabilities(rollout, module.reference, None)
    if module.critic is not None:
        with torch.no_grad():
            rollout["values"] = module.critic.values(rollout, states(module.network, rollout).hidden)
    return module.prepare_rollout(rollout)


def states(network: Any, rollout: TensorDict) -> Any:
    return response_states(
        network, rollout["prompt_ids"], rollout["prompt_length"], rollout["tokens"].flatten(0, 1),
        rollout["length"].flatten(),
    )  # fmt: skip


def tokens(rollout: TensorDict) -> Tensor:
    return rollout["length"].sum().float()


def gradients(module: ConstrainedRLHF, loss: Tensor) -> dict[str, Tensor]:
    module.network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.network.named_parameters() if p.grad is not None}


def policy_gradient(module: ConstrainedRLHF, rollout: TensorDict) -> dict[str, Tensor]:
    return gradients(module, module.losses(rollout, module.mixed_advantage(rollout), tokens(rollout))["loss"])


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor], scale: float = 1.0) -> None:
    assert one.keys() == other.keys()
    assert max(float(value.abs().max()) for value in one.values()) > 1e-4  # there is something to compare
    for name, value in one.items():
        torch.testing.assert_close(value, scale * other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalise", ["mixture", "none"])
@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_fixed_multipliers_equal_ppo_with_the_weights_they_stand_for(advantage, normalise):
    """The paper's code calls it fixed_lagrange: A is linear in rewards, so w = N alpha / (1 + sum alpha) is PPO."""
    alpha = torch.tensor([0.5, 0.25])
    weights = dict(zip("ab", weights_of_fixed(alpha.double()).tolist(), strict=True))
    assert weights["a"] == pytest.approx(2 * 0.5 / 1.75)
    settings: dict[str, Any] = {"ppo": PPOSpec(gamma=0.9, lambda_=0.8, normalise=normalise)}  # type: ignore[arg-type]
    if advantage == "group":
        settings |= {"advantage": "group", "group_size": 3, "critic": CriticSpec("none")}
    lagrangian = build("fixed_lambda", weights=weights, **settings)
    ppo = build("ppo", weights={"a": 0.5, "b": 0.25}, **settings)
    samples = 3 if advantage == "group" else 1
    mine, theirs = roll(lagrangian, prompts(), samples=samples), roll(ppo, prompts(), samples=samples)
    assert mine["advantage"].shape[-1] == 3
    assert theirs["advantage"].shape[-1] == 1
    assert mine["tokens"].equal(theirs["tokens"])
    factor = 1.0 if normalise == "mixture" else 2 / 1.75
    torch.testing.assert_close(
        lagrangian.mixed_advantage(mine), factor * ppo.mixed_advantage(theirs), rtol=1e-5, atol=1e-6
    )
    for module in (lagrangian, ppo):
        module.critic_spec.reward_weight = module.critic_spec.kl_weight = 0.0  # of the shared trunk's gradient
    assert_equal(policy_gradient(lagrangian, mine), policy_gradient(ppo, theirs), factor)


def test_without_a_multiplier_only_the_kl_to_the_reference_counts():
    module = build(names=("a",), advantage="batch", critic=CriticSpec("none"), ppo=PPOSpec(normalise="none"))
    assert module.coefficients().tolist() == [0.0, 1.0]  # w = tanh(0)
    moved = policy_gradient(module, roll(module, prompts()))
    assert max(float(value.abs().max()) for value in moved.values()) > 1e-3
    module.network.load_state_dict(module.reference.state_dict())
    rollout = roll(module, prompts())
    still = policy_gradient(module, rollout)
    assert float(rollout["scores"].std()) > 0.1  # rewards there are, and they do not count
    assert max(float(value.abs().max()) for value in still.values()) < 1e-6


def test_the_first_gradient_is_reinforces():
    module = build(variant="mu_ppo", advantage="batch", critic=CriticSpec("none"))
    rollout = roll(module, prompts())
    advantage = module.mixed_advantage(rollout)
    ppo = policy_gradient(module, rollout)
    loss = torch.zeros(())
    for row in range(4):  # by hand: one sequence at a time, without padding, softmax over all logits
        start, length = int(rollout["prompt_length"][row]), int(rollout["length"][row, 0])
        spoken = rollout["tokens"][row, 0, :length]
        whole = torch.cat([rollout["prompt_ids"][row, :start], spoken])[None]
        logits = module.network.logits(module.network(whole))[0, start - 1 : -1]
        loss = loss - (logits.log_softmax(-1)[torch.arange(length), spoken] * advantage[row, 0, :length]).sum()
    assert_equal(ppo, gradients(module, loss / tokens(rollout)))


def test_state_and_episode_estimates_agree_for_equal_lengths_only():
    episode, state = (build(multiplier=MultiplierSpec(estimator=one)) for one in ("episode", "state"))  # type: ignore[arg-type]
    scores = torch.tensor([[0.2, 1.0], [0.6, 0.0], [0.1, 0.5], [0.9, 0.5]])
    rows = TensorDict({"scores": scores[:, None], "length": torch.tensor([[5], [5], [5], [5]])}, batch_size=[4])
    torch.testing.assert_close(episode._returns(rows), scores.double().mean(0))
    torch.testing.assert_close(state._returns(rows), episode._returns(rows))
    rows["length"] = torch.tensor([[1], [2], [3], [4]])
    torch.testing.assert_close(episode._returns(rows), scores.double().mean(0))
    by_hand = torch.tensor([0.2 + 2 * 0.6 + 3 * 0.1 + 4 * 0.9, 1.0 + 0.0 + 3 * 0.5 + 4 * 0.5], dtype=torch.float64) / 10
    torch.testing.assert_close(state._returns(rows), by_hand, rtol=1e-6, atol=1e-7)


def test_no_gradient_passes_between_policy_and_multipliers():
    module = build()
    rollout = roll(module, prompts())
    assert module.multipliers is not None
    assert not list(module.multipliers.parameters())
    module.multipliers.raw.requires_grad_()
    policy_gradient(module, rollout)
    assert module.multipliers.raw.grad is None
    module.multipliers.raw.requires_grad_(False)
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    module.network.zero_grad()
    returns = module._returns(rollout).clone().requires_grad_()
    module.multipliers.update(returns[list(module.problem.constrained)])
    assert returns.grad is None
    assert all(parameter.grad is None for parameter in module.network.parameters())
    assert all(value.equal(before[name]) for name, value in module.network.state_dict().items())
    # too little reward pushes up, too much down
    up = (module.multipliers.thresholds > returns).tolist()
    assert [value > 0 for value in module.multipliers.weights().tolist()] == up


def test_two_prompts_equal_two_batches_of_one():
    module = build()
    with torch.no_grad():
        assert module.critic is not None
        module.critic.heads.weight.normal_(generator=torch.Generator().manual_seed(2))
    together = roll(module, prompts(2))
    for row in range(2):
        alone = roll(module, prompts(2)[row : row + 1])  # type: ignore[arg-type]
        length = int(alone["length"])
        assert length == int(together["length"][row])
        assert alone["tokens"][0, 0, :length].equal(together["tokens"][row, 0, :length])
        for key in ("log_probability", "reference_log_probability", "values", "advantage", "target"):
            torch.testing.assert_close(
                alone[key][0, :, :length], together[key][row, :, :length], rtol=1e-5, atol=1e-5, msg=key
            )


def test_padding_of_prompts_changes_nothing():
    module, batch = build(), prompts()
    wide = batch.clone()
    junk = torch.randint(0, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([batch["prompt_ids"], junk], 1)
    outside = torch.arange(12) >= LENGTHS[:, None]
    wide["prompt_ids"] = torch.where(outside, (padded + 3) % VOCABULARY, padded)
    one, other = roll(module, batch), roll(module, wide)
    assert one["tokens"].equal(other["tokens"])
    for key in ("log_probability", "reference_log_probability", "advantage", "target"):
        torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-6)
    assert_equal(policy_gradient(module, one), policy_gradient(module, other))


def test_kl_is_exactly_zero_between_equal_models_and_k3_never_negative():
    module = build()
    rollout = roll(module, prompts(), samples=1)
    rollout["log_probability"] = states(module.network, rollout).logprobs.detach().view_as(rollout["log_probability"])
    log_ratio = (rollout["log_probability"] - rollout["reference_log_probability"])[rollout_mask(rollout)].double()
    assert bool((log_ratio < 0).any())
    assert float(approximate_kl(-log_ratio).min()) >= 0.0
    assert rollout_figures(rollout, lambda x: x)["kl/k3"] > 0.0
    module.network.load_state_dict(module.reference.state_dict())
    rollout["log_probability"] = states(module.network, rollout).logprobs.detach().view_as(rollout["log_probability"])
    same = rollout_figures(rollout, lambda x: x)
    assert (same["kl/per_token"], same["kl/sequence"], same["kl/k3"]) == (0.0, 0.0, 0.0)


def test_estimates_of_the_kl_to_the_reference_agree_with_its_exact_value():
    """Mean log-ratio and k3 over 4,000 responses of one token, against the sum over the vocabulary."""
    module = build(generation=GenerationSpec(max_new=1, min_new=0, top_k=0))
    batch = prompts(1)
    rollout = respond(module.network, batch, response_seeds(0, batch["index"], 4000), module.generation, END, 4000)
    reference_log_probabilities(rollout, module.reference, None)
    logs = [
        network.logits(network(batch["prompt_ids"][:, :3]))[0, -1].double().log_softmax(-1)
        for network in (module.network, module.reference)
    ]
    exact = float((logs[0].exp() * (logs[0] - logs[1])).detach().sum())
    ratio = (rollout["log_probability"] - rollout["reference_log_probability"]).double()
    figures = rollout_figures(rollout, lambda x: x)
    assert exact > 0.01
    assert figures["kl/per_token"] == pytest.approx(exact, abs=5 * float(ratio.std()) / math.sqrt(4000))
    assert figures["kl/k3"] == pytest.approx(exact, abs=5 * float(approximate_kl(-ratio).std()) / math.sqrt(4000))


def test_streams_that_hardly_vary_are_not_blown_up():
    length = torch.full((40, 1), 2)
    streams = torch.zeros(40, 1, 2, 3)
    streams[..., 0] = 0.7  # constant: 0
    streams[3, 0, 1, 1] = 1.0  # one of 80: sqrt(80) deviations, clipped
    # rounding noise: floored
    streams[..., 2] = 1e-6 * torch.randn(40, 1, 2, generator=torch.Generator().manual_seed(0))
    rows = TensorDict({"advantage": streams, "length": length, "tokens": torch.zeros(40, 1, 2)}, batch_size=[40])
    module = build("mu_ppo", ppo=PPOSpec(normalise="stream", std_floor=1e-3, advantage_clip=5.0))
    base, first, second = (module.coefficients()[i] for i in (2, 0, 1))
    mixed = module.mixed_advantage(rows)
    assert bool(mixed.isfinite().all())
    assert float(first) > 0
    assert float(mixed[3, 0, 1]) == pytest.approx(float(second) * 5.0, abs=0.01 * float(base))
    rest = mixed.flatten()[torch.arange(80) != 7]
    assert float((rest - rest.mean()).abs().max()) < 0.01 * float(base)


def _rewards(folder: Path) -> dict[str, Reward]:
    torch.manual_seed(0)
    network = BagOfTokensClassifier(VOCABULARY, 3, width=6, hidden=8, end_id=END)
    save_classifier(folder / "intent", network, "letters", ["inform", "question", "directive"])
    return {
        "meteor": Meteor(), "bleu": Bleu(max_order=2, smoothing="floor"), "rouge": Rouge(),
        "length": ResponseLength(target=6), "distinct": DistinctNgrams(),
        "intent": IntentReward(str(folder / "intent"), "prob"),
    }  # fmt: skip


def test_a_response_scores_the_same_whatever_its_neighbours(tmp_path):
    """The official code's METEOR of response k is the mean over responses 1 to k."""
    for package in ("nltk", "sacrebleu", "rouge_score"):
        pytest.importorskip(package)
    texts = ["a cat sat on a mat", "the dog", "", "a cat", "cats sat on mats and mats", "the cat sat on the mat"]
    pairs = [("is it so", "the cat sat on the mat"), ("go on", "a dog sat there")] * 3
    samples = [PromptSample(prompt, reference, {"act": row % 3}) for row, (prompt, reference) in enumerate(pairs)]
    ids = [[*Letters().encode(text), END] for text in texts]

    def batch(rows: list[int]) -> Responses:
        prompt_ids = [Letters().encode(samples[i].prompt) for i in rows]
        return Responses(
            [samples[i] for i in rows], [texts[i] for i in rows], prompt_ids, [ids[i] for i in rows], [True] * len(rows)
        )

    for name, reward in _rewards(tmp_path).items():
        reward.setup(Letters(), torch.device("cpu"))
        together = reward.score(batch(list(range(6))))
        assert together.unique().numel() > 1, name
        backwards = reward.score(batch(list(range(5, -1, -1))))
        alone = torch.cat([reward.score(batch([row])) for row in range(6)])
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(backwards.flip(0), together, rtol=1e-5, atol=1e-6, msg=name)
