"""What trained policies and reward models offer to be measured by, on the real modules: known policies, splits, warm
starts, prompts that no loader gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules import GoldProxyDataModule
from datamodules.dialogue_data import DialogueDataModule
from datamodules.preference_data import PreferenceDataModule
from modules.assurance.subject import AssuranceError, state_digest
from modules.assurance.suites import SuiteResult, SuiteSettings, run_suite
from modules.assurance.text.perturbations import perturbed
from modules.contracts import EncodesPrompts, PromptSample, ProvidesPairs, WarmStarts
from modules.language.specs import ModelSpec
from modules.rlhf import ConstrainedRLHF, PreferenceRewardModel
from modules.rlhf.assurance import bounds_of, coefficients_of, feedback_subject, progress_of, toxicity_scorer
from modules.rlhf.gold_proxy import CONTENT
from modules.rlhf.rewards import CallableReward, ContentShare, GoldScore, MarkerSaturation, Repetition, Responses
from modules.rlhf.settings import AssuranceSpec, ConstraintSpec, CriticSpec, GenerationSpec, KLSpec, MultiplierSpec
from modules.rlhf.trials import ReplyTrials, rows_of

MARKOV = {"model_type": "markov", "conditions": 2, "positions": 10, "symbols": 40}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


def attach(module: Any, data: Any) -> Any:
    module._trainer = SimpleNamespace(datamodule=data, world_size=1)
    module.configure_model()
    return module


def gold(variant: str = "ppo_lag", content: float = 0.0, **settings: Any) -> ConstrainedRLHF:
    """A GoldProxy policy whose content tokens got ``content`` onto their logits."""
    rewards = {"content": ContentShare(), "markers": MarkerSaturation()}
    given: dict[str, Any] = {
        "constraints": {"markers": ConstraintSpec(0.45, "ge", required=0.4)}, "maximise": "content",
        "evaluation": GoldScore(), "advantage": "batch", "critic": CriticSpec(kind="none"),
        "kl": KLSpec(beta=0.1, budget=0.5), "generation": GenerationSpec(max_new=10, min_new=10, top_k=0),
        "multiplier": MultiplierSpec(parameterisation="softplus"),
    }  # fmt: skip
    module = ConstrainedRLHF(rewards, ModelSpec(config=MARKOV), variant, **(given | settings))  # type: ignore[arg-type]
    attach(module, GoldProxyDataModule())
    with torch.no_grad():
        module.network.table[..., CONTENT] += content
    return module


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory) -> dict[str, Any]:
    return {
        "synthetic_dialogues": 60, "context_size": 2, "min_context": 1, "max_prompt_tokens": 20,
        "max_response_tokens": 9, "cache_dir": str(tmp_path_factory.mktemp("cache")),
        "tokenizer": {"vocab_size": 300, "kind": "word"},
    }  # fmt: skip


def ready(data: Any) -> Any:
    data.prepare_data()
    data.setup()
    return data


def measured(subject: Any, *probes: str, **settings: Any) -> SuiteResult:
    return run_suite(subject, SuiteSettings("custom", probes, **({"n0": 40, "n_max": 40} | settings)))


# -- policies that are known ------------------------------------------------------------------------------------------
def test_the_start_model_gained_nothing_and_is_no_step_from_itself():
    result = measured(gold().assurance_subject(), "replies", "held_out_score", "reward_shift", "rollback")
    assert result.figure("c.kl").value == 0.0
    assert (result.figure("u.gold").low, result.figure("u.gold").high) == (0.0, 0.0)  # the same replies, drawn alike
    assert result.figure("u.reward").low < 0.1
    assert result.figure("r.rm_shift").conditions["start"] == result.figure("r.rm_shift").conditions["trained"]
    assert result.figure("c.rollback").value == 1.0


def test_a_policy_of_content_alone_earns_it_all_and_breaks_the_other_limit():
    module = gold(content=30.0)
    result = measured(module.assurance_subject(), "replies", "reward_limits")
    assert result.figure("u.reward").conditions["content"] == pytest.approx(1.0)
    assert result.figure("u.reward").value < 0  # the least reward: markers are gone
    assert result.figure("c.violation").value == pytest.approx(0.4, abs=1e-6)  # the demand, not training's .45
    assert result.figure("c.sat").value == 0.0
    assert result.figure("c.kl").value > 1.0


def test_the_same_units_in_any_number_give_the_same_values_and_touch_nothing():
    module = gold(content=1.0)
    before = state_digest(module)
    few, many = (measured(module.assurance_subject(), "replies", "reward_limits", n0=n, n_max=n) for n in (50, 100))
    again = measured(module.assurance_subject(), "replies", "reward_limits", n0=50, n_max=50)
    other = measured(module.assurance_subject(), "replies", "reward_limits", n0=50, n_max=50, round=1)
    for name in ("c.kl", "u.reward", "c.violation"):
        values = few.samples[name, "fresh"].values
        assert (values == many.samples[name, "fresh"].values[: len(values)]).all()
        assert (values == again.samples[name, "fresh"].values).all()
        assert (values != other.samples[name, "fresh"].values).any()
        assert (few.samples[name, "anchor"].values == other.samples[name, "anchor"].values).all()
    assert state_digest(module) == before


@pytest.mark.parametrize(
    ("variant", "settings", "bounds", "weights", "goals"),
    [
        ("ppo", {"weights": {"content": 0.6, "markers": -0.2}, "constraints": {}, "maximise": None}, {}, [0.75, -0.25],
         {"content": 1.0, "markers": 0.0}),
        ("ppo_lag", {"constraints": {"markers": ConstraintSpec(0.1)}}, {"markers": ("le", 0.1)}, [0.5, -5.0],
         {"content": 1.0, "markers": 0.1}),
        ("all_ppo", {"constraints": {"content": ConstraintSpec(0.4), "markers": ConstraintSpec(0.1)}, "maximise": None,
                     "multiplier": MultiplierSpec()},
         {"content": ("le", 0.4), "markers": ("le", 0.1)}, [1.25, 5.0], {"content": 0.4}),
        ("xi_ppo", {"constraints": {"content": ConstraintSpec(0.4), "markers": ConstraintSpec(0.1)}, "maximise": None,
                    "multiplier": MultiplierSpec()},
         {"content": ("eq", 0.4), "markers": ("eq", 0.1)}, [1.25, 5.0], {"content": 0.4, "markers": 0.1}),
    ],
)  # fmt: skip
def test_what_variants_ask_for(variant, settings, bounds, weights, goals):
    module = gold(variant, **settings)
    found = bounds_of(module)
    assert found == {name: (kind, pytest.approx(value)) for name, (kind, value) in bounds.items()}
    coefficients = coefficients_of(module, found)
    assert coefficients.tolist() == pytest.approx(weights)
    progress = progress_of(module, found, torch.tensor([0.2, 0.2]), coefficients)
    assert progress == {name: pytest.approx((0.2, goal)) for name, goal in goals.items()}
    met = {name: (kind, 0.2) for name, (kind, _) in bounds.items()}
    if set(met) == {"content", "markers"}:
        assert "meets all" in progress_of(module, met, torch.tensor([0.2, 0.2]), coefficients)
    unbounded = gold("mu_ppo", maximise=None, constraints={n: ConstraintSpec(0.3) for n in ("content", "markers")})
    unbounded.reward_functions["content"].bounds = (0.0, float("inf"))
    assert "give it a threshold" in progress_of(unbounded, {}, torch.zeros(2), torch.ones(2))


def test_a_policy_that_heeds_the_act_has_states_that_tell_it():
    module = gold()
    with torch.no_grad():
        module.network.table[1, ..., CONTENT] += 3.0
    plain = measured(gold().assurance_subject(), "reply_concept").figure("i.probe_sel").value
    assert plain < 0  # the start chain knows the last token, and not the act
    heeding = measured(module.assurance_subject(), "reply_concept").figure("i.probe_sel").value
    assert heeding > plain + 0.3


# -- warm starts ------------------------------------------------------------------------------------------------------
def test_a_warm_start_takes_policy_and_multipliers_and_keeps_its_own_thresholds():
    trained, fresh = gold(content=2.0), gold(constraints={"markers": ConstraintSpec(0.5, "ge", required=0.4)})
    assert isinstance(fresh, WarmStarts)
    assert trained.multipliers is not None
    assert fresh.multipliers is not None
    for _ in range(3):
        trained.multipliers.update(torch.tensor([0.2]))
    trained.divergences.add([0.3])
    checkpoint = {"state_dict": trained.state_dict(), "hyper_parameters": dict(trained.hparams)}
    fresh.warm_start(checkpoint)
    assert torch.equal(fresh.network.table, trained.network.table)
    assert torch.equal(fresh.reference.table, trained.reference.table)
    assert torch.equal(fresh.multipliers.raw, trained.multipliers.raw)
    assert fresh.multipliers.thresholds.tolist() == [0.5]
    assert fresh.multipliers.updates == 0
    assert len(fresh.divergences.values()) == len(fresh.multipliers.recorded()[0]) == 0
    other = gold("single_constraint", multiplier=MultiplierSpec())
    start = other.multipliers.raw.clone()  # type: ignore[union-attr]
    other.warm_start(checkpoint)
    assert torch.equal(other.multipliers.raw, start)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="holds no policy"):
        fresh.warm_start({"state_dict": {"weight": torch.zeros(1)}})


# -- prompts that no loader gives -------------------------------------------------------------------------------------
def test_dialogue_prompts_are_encoded_as_the_loaders_do_and_reworded_at_their_end(dialogues):
    data = ready(DialogueDataModule(**dialogues, batch_size=8, licence="CC-BY-4.0"))
    assert isinstance(data, EncodesPrompts)
    assert isinstance(data, ProvidesPairs)
    samples = data.samples(data.held_out)
    batch = next(iter(data.test_dataloader()))
    made = data.prompt_batch([samples[int(row)].prompt for row in batch["index"]])
    assert torch.equal(made["prompt_ids"], batch["prompt_ids"])
    assert torch.equal(made["prompt_length"], batch["prompt_length"])
    for sample in samples[:20]:
        before, last = data.last_said(sample.prompt)
        assert before + data.as_prompt(last) == sample.prompt
    assert data.as_prompt("Don’t worry.") == "don't worry . <EOU>"
    assert data.as_prompt("Don’t worry.", finished=False) == "don't worry ."
    assert data.licences() == {"synthetic dialogues": "CC0-1.0"}
    assert all(pair.rejected != pair.sample.reference for pair in data.pairs("test"))
    end = data.tokenizer.eod_id
    assert data.reply_tokens(["the soup ."])[0][-1] == end
    with pytest.raises(ValueError, match="no tokens"):
        data.prompt_batch([""])
    with pytest.raises(ValueError, match="an act and a token"):
        GoldProxyDataModule().prompt_batch(["act0"])


def test_splits_follow_texts_and_never_share_a_prompt(dialogues):
    samples = ready(DialogueDataModule(**dialogues, batch_size=8)).samples("train")
    fresh, anchor = rows_of(samples, "fresh"), rows_of(samples, "anchor")
    assert sorted([*fresh, *anchor]) == list(range(len(samples)))
    assert not {samples[row].prompt for row in fresh} & {samples[row].prompt for row in anchor}
    assert 0.1 < len(anchor) / len(samples) < 0.3
    assert fresh != sorted(fresh)


def _words(
    prompts: list[str], responses: list[str], references: list[str], labels: list[dict[str, int]]
) -> list[float]:
    return [len(response.split()) / 10 for response in responses]


def _polite(texts: list[str]) -> torch.Tensor:
    return torch.full((len(texts),), 0.25)


@pytest.fixture
def speaker(dialogues) -> ConstrainedRLHF:
    module = ConstrainedRLHF(
        {"words": CallableReward("x.words", bounds=[0.0, 1.0]), "repetition": Repetition(2)}, ModelSpec(config=GPT2),
        "ppo", weights={"words": 1.0, "repetition": 0.5}, kl=KLSpec(target=0.5), critic=CriticSpec(),
        generation=GenerationSpec(max_new=6, min_new=1), assurance=AssuranceSpec(),
    )  # fmt: skip
    module.reward_functions["words"]._call = _words  # type: ignore[attr-defined]
    return attach(module, ready(DialogueDataModule(**dialogues, batch_size=8)))


def test_a_speaking_policy_offers_the_figures_of_words(speaker, monkeypatch):
    monkeypatch.setattr("modules.rlhf.assurance.toxicity_scorer", lambda name: _polite)
    subject = feedback_subject(speaker)
    result = measured(subject, "replies", "reworded_prompts", "requests", "group_swaps", "reply_concept", "card")
    assert result.figure("e.tox").value == 0.25
    assert (result.figure("e.refuse").value, result.figure("e.overrefuse").value) == (0.0, 0.0)
    assert set(result.figure("r.prompt").conditions) == {"none", *perturbed("a", 0)}
    assert result.figure("r.prompt").value >= 0  # never below the wording that costs least
    assert result.figure("c.kl").value == 0.0
    assert result.figure("i.card").value == result.figure("e.provenance").value == 1.0
    swap = result.figure("e.swap")
    assert swap.value is not None
    assert swap.value > 0
    with torch.no_grad():  # a model that says the same after everything
        for parameter in speaker.network.parameters():
            parameter.zero_()
    assert measured(feedback_subject(speaker), "group_swaps").figure("e.swap").value == pytest.approx(0.0, abs=1e-6)
    assert not subject.offers("judged_pairs")  # neither a learnt reward nor a score of single replies
    assert not subject.offers("reward_constraints")


def test_rewordings_that_change_nothing_cost_nothing(speaker):
    trials = ReplyTrials(speaker, torch.tensor([1.0, 0.5], dtype=torch.float64))
    found = trials.reworded_rewards("fresh", 0, 12, 5, lambda text, seed: {"same": text, "other": f"well , {text}"})
    assert torch.equal(found["none"], found["same"])
    assert len(found["other"]) == 12
    assert trials.prompts("fresh", 10**6, 5, 0) == []
    assert len(trials.reworded_rewards("fresh", 10**6, 5, 0, perturbed)["none"]) == 0


def test_a_reward_model_is_measured_on_pairs(dialogues):
    model = PreferenceRewardModel(ModelSpec(config=GPT2))
    attach(model, ready(PreferenceDataModule(**dialogues, batch_size=8)))
    result = measured(model.assurance_subject(), "reward_shift", "pair_accuracy", "rollback", "card")
    assert len(result.figure("r.rm_shift").conditions) == 9
    assert 0.2 < result.figure("u.pairs").value < 0.8  # untrained: near chance
    assert result.figure("r.rm_shift").value <= result.figure("r.rm_shift").conditions["none"]
    assert result.figure("c.rollback").value == 1.0
    with torch.no_grad():
        model.network.value_head.weight.zero_()  # undecided everywhere: exactly a half
    assert measured(model.assurance_subject(), "pair_accuracy").figure("u.pairs").value == 0.5
    model._trainer = SimpleNamespace(datamodule=GoldProxyDataModule(), world_size=1)  # type: ignore[assignment]
    with pytest.raises(AssuranceError, match="provides no pairs of texts"):
        model.assurance_subject()


def test_settings_that_do_not_hold_end_in_one_line():
    assert toxicity_scorer("math.fsum")([0.5]) == 0.5  # type: ignore[list-item]
    with pytest.raises(AssuranceError, match=r"assurance.toxicity: 'math.nothing' is no function"):
        toxicity_scorer("math.nothing")
    with pytest.raises(AssuranceError, match="'math.pi' is a float, no function"):
        toxicity_scorer("math.pi")
    with pytest.raises(ValueError, match="constraints.markers.required must be in"):
        gold(constraints={"markers": ConstraintSpec(0.4, "ge", required=1.5)})
    with pytest.raises(ValueError, match="kl.budget must be > 0"):
        gold(kl=KLSpec(budget=0.0))
    module = gold()
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=None, samples=list), world_size=1)  # type: ignore[assignment]
    with pytest.raises(AssuranceError, match="makes no batches of new prompts"):
        module.assurance_subject()


def test_the_part_of_the_score_that_judges_single_responses_is_its_quality():
    rows = torch.randint(40, (30, 10), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [PromptSample("act0 t1", labels={"act": number % 2}) for number in range(30)]
    responses = Responses(samples, [""] * 30, [[40, 1]] * 30, rows, [False] * 30)
    each = GoldScore().each(responses)
    assert float(each.mean()) == pytest.approx(GoldScore().compute(responses)["quality"], abs=1e-6)
    one = Responses(samples[:1], [""], [[40, 1]], [[*range(4), 12, *range(20, 25)]], [False])  # .4 content, one marker
    assert float(GoldScore().each(one)) == pytest.approx(1.0)
