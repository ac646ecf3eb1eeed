"""What modules of RLHF offer to be measured by: a policy that learnt from rewards, and a reward model."""

from __future__ import annotations

import glob
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from modules.assurance.subject import AssuranceError, CardFacts, DataSource, Subject
from modules.assurance.text.toxicity import LexiconScorer, ToxicityScorer
from modules.contracts import EncodesPrompts, ProvidesPairs
from modules.files import read_json_rows
from modules.objectives.lagrangian import effective_multipliers
from modules.rlhf.multipliers import Multipliers
from modules.rlhf.rewards.base import Evaluation, Responses
from modules.rlhf.trials import HeldOutPairs, ReplyTrials, prompt_lists

if TYPE_CHECKING:
    from modules.rlhf.module import ConstrainedRLHF
    from modules.rlhf.reward_model import PreferenceRewardModel

_FAR = 0.02  # a component whose start lies nearer to its goal, in shares of the goal, has no way to go
_NO_BUDGET = "no KL budget: set model.init_args.kl.budget, nats a token"
_NO_RUNS = "no runs at other thresholds: name their folders in model.init_args.assurance.steering_runs"


def bounds_of(module: ConstrainedRLHF) -> dict[str, tuple[str, float]]:
    """Component -> (kind, bound) of those with a threshold; ``required`` where training's threshold is another."""
    problem = module.problem
    if problem.frozen or problem.objective == "fixed" or module.multipliers is None:
        return {}
    found = {}
    for place, threshold in enumerate(module.multipliers.thresholds.tolist()):
        name = problem.names[problem.constrained[place]]
        spec = module.constraint_specs.get(name)
        found[name] = (problem.kinds[place], threshold if spec is None or spec.required is None else spec.required)
    return found


def coefficients_of(module: ConstrainedRLHF, bounds: Mapping[str, tuple[str, float]]) -> Tensor:
    """``[components]`` float64: what each counts in the one reward: its fixed weight, or 1 / its bound, costs negative.

    Sums of sizes of fixed weights are 1, and so are numbers of components, so that units are comparable.
    """
    problem = module.problem
    if problem.weights:
        weights = torch.tensor(problem.weights, dtype=torch.float64)
        return weights / weights.abs().sum().clamp_min(1e-12)
    found = []
    for name in problem.names:
        kind, bound = bounds.get(name, ("ge", 1.0))
        costs = kind == "le" and problem.objective != "all"  # All-PPO raises rewards up to their bounds
        found.append((-1.0 if costs else 1.0) / (abs(bound) or 1.0))
    return torch.tensor(found, dtype=torch.float64) / len(found)


def progress_of(
    module: ConstrainedRLHF, bounds: Mapping[str, tuple[str, float]], starts: Tensor, coefficients: Tensor
) -> dict[str, tuple[float, float]] | str:
    """``reward_progress``; without a bound the goal is the end of the reward's range that training pushes it to."""
    found: dict[str, tuple[float, float]] = {}
    for name, start, weight in zip(module.problem.names, starts.tolist(), coefficients.tolist(), strict=True):
        low, high = module.reward_functions[name].bounds
        kind, goal = bounds.get(name, ("ge", high) if weight > 0 else ("le", low))
        if name not in bounds and weight == 0:
            continue
        if not math.isfinite(goal):
            return f"rewards.{name} has neither a threshold nor a greatest value: give it a threshold"
        ahead = start - goal if kind == "le" and weight < 0 else goal - start
        if (abs(ahead) if kind == "eq" else ahead) > _FAR * max(abs(goal), 1e-9):
            found[name] = (start, goal)
    return found or "the start model meets all that is asked for"


def multiplier_record(multipliers: Multipliers | None) -> dict[str, Tensor] | str:
    """``multiplier_record`` of a module's multipliers."""
    if multipliers is None or multipliers.frozen:
        return "the rewards have fixed weights"
    weights, gap = multipliers.recorded()
    cap = 1.0 if multipliers.bounded else multipliers.lambda_max or math.inf
    thresholds = multipliers.thresholds.cpu()
    return {
        "weights": weights,
        "multipliers": effective_multipliers(weights, multipliers.kinds, multipliers.bounded),
        "gap": gap,
        "cap": torch.full_like(thresholds, multipliers.saturation * cap),
        "tolerance": multipliers.tolerance * thresholds.abs(),
        "equality": torch.tensor([kind == "eq" for kind in multipliers.kinds]),
    }


def steered_runs(patterns: list[str], names: list[str]) -> dict[str, tuple[Tensor, Tensor]] | str:
    """Component -> last thresholds and last validations' mean rewards of runs, of components whose thresholds differ.

    Raises:
        AssuranceError: a pattern without a run; a run that logged no threshold or no validation.
    """
    if not patterns:
        return _NO_RUNS
    folders: list[Path] = []
    for pattern in patterns:
        here = [Path(path) for path in sorted(glob.glob(pattern)) if (Path(path) / "metrics.jsonl").is_file()]
        if not here:
            raise AssuranceError(f"assurance.steering_runs: '{pattern}' matches no folder with a metrics.jsonl")
        folders += [one for one in here if one not in folders]
    table = [_last_figures(folder) for folder in folders]
    found = {}
    for name in names:
        keys = (f"constraint/{name}/threshold", f"val/reward/{name}")
        if not any(keys[0] in row for row in table):
            continue
        for folder, row in zip(folders, table, strict=True):
            if missing := [key for key in keys if key not in row]:
                raise AssuranceError(f"assurance.steering_runs: {folder} logged no {missing[0]}: leave it out")
        wanted, reached = (torch.tensor([row[key] for row in table], dtype=torch.float64) for key in keys)
        if len(wanted.unique()) > 1:
            found[name] = (wanted, reached)
    if len(folders) < 3 or not found:
        return f"{len(folders)} runs at {'equal' if not found else 'other'} thresholds: c.steer needs three that differ"
    return found


def _last_figures(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in read_json_rows(folder / "metrics.jsonl", "assurance.steering_runs"):
        found.update({key: float(value) for key, value in row.items() if isinstance(value, int | float)})
    return found


def toxicity_scorer(name: str | None) -> ToxicityScorer:
    """The function of that dotted name; the shipped lexicon for None.

    Raises:
        AssuranceError: there is no such function.
    """
    if name is None:
        return LexiconScorer()
    path, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise AssuranceError(
            f"assurance.toxicity: '{name}' is no function ({error}): give package.module.name"
        ) from None
    if not callable(found):
        raise AssuranceError(f"assurance.toxicity: '{name}' is a {type(found).__name__}, no function")
    return cast(ToxicityScorer, found)


def feedback_subject(module: ConstrainedRLHF) -> Subject:
    """The subject of a policy that was trained on rewards.

    Raises:
        AssuranceError: data that make no batches of new prompts; settings of ``assurance`` that do not hold.
    """
    bounds = bounds_of(module)
    trials = ReplyTrials(module, coefficients_of(module, bounds))
    spec, budget = module.assurance_spec, module.kl.budget or module.kl.target
    runs = steered_runs(spec.steering_runs, list(module.problem.names))

    def score_record() -> tuple[Tensor, Tensor]:
        rows = module.evaluations.values()
        return rows[:, 0], rows[:, 1:] @ trials.coefficients

    capabilities: dict[str, Any] = {
        "replies": trials.replies,
        "reward_progress": lambda: progress_of(module, bounds, trials.start_means, trials.coefficients),
        "divergence_budget": _NO_BUDGET if budget is None else budget,
        "divergence_record": lambda: module.divergences.values()[:, 0],
        "multiplier_record": lambda: multiplier_record(module.multipliers),
        "steered_runs": lambda: runs,
        "labelled_states": trials.labelled_states,
        "outputs": lambda: _outputs(trials),
    }
    if bounds:
        capabilities["reward_constraints"] = bounds
    if module.evaluation is not None:
        capabilities |= {"score_of_sets": trials.score_of_sets, "score_record": score_record}
    learnt = any(one.learnt for one in module.reward_functions.values()) and isinstance(trials.data, ProvidesPairs)
    scored = module.evaluation is not None and type(module.evaluation).each is not Evaluation.each
    if learnt or scored:
        capabilities["judged_pairs"] = trials.judged_pairs
    if trials.data.natural_language:
        capabilities |= {
            "reworded_rewards": trials.reworded_rewards,
            "toxicity_scorer": toxicity_scorer(spec.toxicity),
            "replies_to": trials.replies_to,
            "continuations_after": trials.continuations_after,
        }
    return Subject("feedback", module, capabilities, _card(module, trials.data))


def _outputs(trials: ReplyTrials) -> Tensor:
    """``[prompts, vocabulary]``: logits behind some prompts."""
    batch = trials.batch([sample.prompt for sample in trials.samples[:16]])
    hidden = trials.module.network(batch["prompt_ids"])
    at = (batch["prompt_length"] - 1)[:, None, None].expand(-1, -1, hidden.shape[-1])
    return trials.module.network.logits(hidden.gather(1, at).squeeze(1)).float()


def _card(module: ConstrainedRLHF, data: EncodesPrompts) -> CardFacts:
    rewards = ", ".join(f"{name} ({type(one).__name__})" for name, one in module.reward_functions.items())
    return CardFacts(
        title=f"Policy trained on rewards ({module.variant})",
        summary=f"Replies to prompts; trained from a start model on the rewards {rewards}.",
        intended_use="Research on learning from several imperfect rewards; replies in the domain of its prompts.",
        out_of_scope="Advice to people, and any use in which a wrong or unkind reply does harm.",
        limitations="Rewards are proxies of what is wanted: beyond their thresholds more of them makes replies worse. "
        "The model knows the language of its training prompts only.",
        licence="the start model's" if module.policy_spec.path else "MIT",
        data=_sources(data),
    )


def _sources(data: EncodesPrompts) -> tuple[DataSource, ...]:
    licences = data.licences()
    return tuple(DataSource(name, licence, 1.0 / len(licences)) for name, licence in licences.items())


def judge_subject(module: PreferenceRewardModel) -> Subject:
    """The subject of a reward model trained on pairs.

    Raises:
        AssuranceError: data that have no pairs of texts.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    if not (isinstance(data, EncodesPrompts) and isinstance(data, ProvidesPairs)):
        raise AssuranceError(
            f"PreferenceRewardModel: {type(data).__name__} provides no pairs of texts: use PreferenceDataModule"
        )
    held = HeldOutPairs(data)

    def judge(responses: Responses) -> Tensor:
        return module.network.score(responses.prompt_tokens, responses.response_tokens).double()

    def judged_pairs(split: Any, start: int, count: int, seed: int, reword: Any) -> dict[str, Tensor]:
        return held.judged(judge, split, start, count, seed, reword)

    def outputs() -> Tensor:
        some = held.pairs[:16]
        prompts = prompt_lists(data, [pair.sample.prompt for pair in some])
        return module.network.score(prompts, data.reply_tokens([pair.sample.reference for pair in some]))

    card = CardFacts(
        title="Reward model",
        summary="Scores replies to prompts, so that the better one of two scores higher (Bradley and Terry 1952).",
        intended_use="A reward for training a policy in the domain of its pairs.",
        out_of_scope="Grading of people's texts.",
        limitations="Its scores mean nothing far from the replies that it was trained on, where policies go.",
        licence="the start model's" if module.model_spec.path else "MIT",
        data=_sources(data),
    )
    capabilities = {"judged_pairs": judged_pairs, "judges_pairs": True, "outputs": outputs}
    return Subject("reward model", module, capabilities, card)
