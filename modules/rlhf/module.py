"""Constrained RLHF: PPO on several reward models with learnt multipliers (Moskovitz et al. 2024)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from tensordict import TensorDict
from torch import Tensor, nn

from modules.assurance.subject import Subject
from modules.contracts import ProvidesPrompts
from modules.language.adapters import adapters_disabled
from modules.language.checkpoint import export_hf
from modules.language.optim import build_optimizer, decay_groups
from modules.language.responses import response_states
from modules.language.specs import LoraSpec, ModelSpec, Tuning
from modules.networks.markov_lm import MarkovLM
from modules.objectives.advantage import standardise
from modules.objectives.lagrangian import mix_advantages, stream_coefficients
from modules.objectives.ppo import approximate_kl, clipped_surrogate
from modules.rlhf.building import build_multipliers, build_networks, start_from
from modules.rlhf.critic import Critic
from modules.rlhf.evaluating import ResponseEvaluator
from modules.rlhf.figures import reward_unit_figures, rollout_figures, stream_figures, update_figures
from modules.rlhf.history import History
from modules.rlhf.multipliers import Multipliers
from modules.rlhf.rewards.base import Evaluation, Reward
from modules.rlhf.rollout import (
    NonFiniteError,
    groups,
    reference_log_probabilities,
    respond,
    response_batch,
    response_rows,
    response_seeds,
    rollout_mask,
    score_rollout,
)  # fmt: skip
from modules.rlhf.search import search_or_none
from modules.rlhf.settings import (
    AssuranceSpec,
    ConstraintSpec,
    CriticSpec,
    GenerationSpec,
    KLSpec,
    MultiplierSpec,
    NelderMeadSpec,
    PPOSpec,
    Variant,
    check_ranges,
    resolve,
)  # fmt: skip
from modules.rlhf.streams import Baseline, advantage_streams, reward_streams
from modules.seeds import global_seed, stream, stream_seed

_SAMPLING, _ORDER, _EVALUATION = 51, 52, 54  # keep random streams of one run apart


class ConstrainedRLHF(LightningModule):
    """Fine-tunes a causal language model on several reward models, each held at (or above, or below) a threshold.

    One training step is one iteration: respond to a batch of prompts, score the responses, estimate one advantage
    stream per reward and one for KL, then ``ppo.epochs`` passes of clipped policy updates on the streams' mixture, and
    of gradient steps on the multipliers that mix them. Batches follow the contract
    :class:`~modules.contracts.ProvidesPrompts`.

    Args:
        rewards: component rewards by name; the order is that of constraints, multipliers and value heads.
        policy: start weights, which are the reference too; ``config: {model_type: markov}`` is the tabular toy.
        variant: ``ppo`` (fixed ``weights``), ``ppo_sat`` (squared distance from thresholds), ``mu_ppo``, ``xi_ppo``,
            ``all_ppo`` (constraints >=, =, <=), ``fixed_lambda`` (mu with multiplier weights held at ``weights``),
            ``single_constraint`` (``maximise`` one reward, constrain the others), ``nm_ppo`` (thresholds found by
            Nelder-Mead in this run), ``ppo_lag`` (``maximise`` one, the others are costs; Ray et al. 2019).
        constraints: by reward. thresholds_file: JSON of ``rlhf/proxy_fit``, for thresholds that are not given here.
        weights: by reward, of ``ppo``, ``ppo_sat`` and ``fixed_lambda``.
        maximise: the reward that ``single_constraint`` and ``ppo_lag`` maximise.
        evaluation: held-out judgement; ``null``: component means only.
        advantage: ``gae`` with a critic, or without one ``group`` (``group_size`` responses per prompt) or ``batch``.
        group_size: responses per prompt.
        leave_one_out: group baseline of the others (RLOO) or of all (GRPO).
        tuning: all weights, or adapters on the start model, which without them is the reference (``int8``, ``qlora``:
            on a quantised base).
        lora: adapters; its dropout must be 0, as rollout and update must use one policy.
        critic, multiplier, kl, ppo, generation, nelder_mead, assurance: see their classes.
        optimizer, lr, weight_decay, betas: as :func:`modules.language.optim.build_optimizer`.

    Raises:
        ValueError: a setting that is out of range, unknown, missing, or at odds with the variant.
    """

    work_unit = "tokens"

    def __init__(
        self,
        rewards: dict[str, Reward],
        policy: ModelSpec,
        variant: Variant = "xi_ppo",
        constraints: dict[str, ConstraintSpec] | None = None,
        thresholds_file: str | None = None,
        weights: dict[str, float] | None = None,
        maximise: str | None = None,
        evaluation: Evaluation | None = None,
        advantage: Baseline = "gae",
        group_size: int = 1,
        leave_one_out: bool = True,
        tuning: Tuning = "full",
        lora: LoraSpec | None = None,
        critic: CriticSpec | None = None,
        multiplier: MultiplierSpec | None = None,
        kl: KLSpec | None = None,
        ppo: PPOSpec | None = None,
        generation: GenerationSpec | None = None,
        nelder_mead: NelderMeadSpec | None = None,
        assurance: AssuranceSpec | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-6,
        weight_decay: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.reward_functions = dict(rewards)  # no submodules: reward models are neither trained nor saved
        self.evaluation = evaluation
        self.policy_spec, self.lora = policy, lora or LoraSpec()
        self.critic_spec, self.kl, self.ppo = critic or CriticSpec(), kl or KLSpec(), ppo or PPOSpec()
        self.multiplier_spec = multiplier or MultiplierSpec()
        self.generation = generation or GenerationSpec()
        self.search_spec, self.assurance_spec = nelder_mead or NelderMeadSpec(), assurance or AssuranceSpec()
        self.variant = variant
        self.tuning: Tuning = tuning
        self.advantage: Baseline = advantage
        self.group_size, self.leave_one_out = group_size, leave_one_out
        self.optimizer_options = {"name": optimizer, "lr": lr, "weight_decay": weight_decay, "betas": tuple(betas)}
        self.constraint_specs = dict(constraints or {})
        self.problem = resolve(
            variant, list(rewards), [one.bounds for one in rewards.values()], self.constraint_specs, weights or {},
            maximise, self.search_spec, thresholds_file,
        )  # fmt: skip
        self._check()
        nested = {
            "policy": policy, "lora": self.lora, "critic": self.critic_spec, "kl": self.kl, "ppo": self.ppo,
            "multiplier": self.multiplier_spec, "generation": self.generation, "nelder_mead": self.search_spec,
            "assurance": self.assurance_spec,
        }  # fmt: skip
        self.save_hyperparameters({
            **{key: dataclasses.asdict(value) for key, value in nested.items()},
            "rewards": {name: type(one).__name__ for name, one in rewards.items()}, "variant": variant,
            "advantage": advantage, "group_size": group_size, "tuning": tuning, "lr": lr, "optimizer": optimizer,
            "thresholds": list(self.problem.thresholds),
        })  # fmt: skip
        self.multipliers: Multipliers | None = build_multipliers(self.multiplier_spec, self.problem)
        self.search = search_or_none(self.search_spec, self.problem, self.constraint_specs, self.multipliers)
        self.register_buffer("beta", torch.tensor(self.kl.beta, dtype=torch.float64))
        self.divergences = History(1)  # KL per token of every iteration
        self.evaluations = History(0 if evaluation is None else len(rewards) + 1)  # score and component means
        self.network: Any = None
        self.reference: Any = None
        self.critic: Critic | None = None
        self._evaluator = ResponseEvaluator(self.reward_functions, self.evaluation, self.generation)
        self._reward_digests: dict[str, str] = {}
        self._tokens_of_batch = 0
        self._iteration = 0  # of the step under way; Lightning's count moves within it

    def _check(self) -> None:
        check_ranges(self.kl, self.ppo, self.generation, self.multiplier_spec, self.critic_spec)
        owner = type(self).__name__
        if not self.optimizer_options["lr"] > 0:
            raise ValueError(f"{owner}: lr must be > 0, got {self.optimizer_options['lr']}")
        if self.group_size < 1 or (self.advantage == "group" and self.group_size < 2):
            raise ValueError(f"{owner}: group_size must be >= 1, and >= 2 for advantage group, got {self.group_size}")
        if (self.advantage == "gae") == (self.critic_spec.kind == "none"):
            want = "shared or separate" if self.advantage == "gae" else "none"
            raise ValueError(f"{owner}: advantage {self.advantage} goes with critic.kind {want}")
        if self.lora.dropout > 0 and self.tuning != "full":
            raise ValueError(f"{owner}: lora.dropout must be 0: rollout and update must use one policy")
        if self.kl.target is not None and self.variant not in ("ppo", "ppo_sat"):
            raise ValueError(f"{owner}: kl.target is for variants ppo and ppo_sat; constrained ones keep beta")
        if self.problem.search and self.evaluation is None:
            raise ValueError(f"{owner}: variant nm_ppo needs an evaluation, whose score it searches by")

    # -- the networks -------------------------------------------------------------------------------------------------
    @property
    def data(self) -> ProvidesPrompts:
        """The datamodule of prompts."""
        found = getattr(self.trainer, "datamodule", None)
        if not isinstance(found, ProvidesPrompts):
            raise ValueError(
                f"ConstrainedRLHF: needs a datamodule of prompts (datamodules.DialogueDataModule), got "
                f"{type(found).__name__}"
            )
        return found

    def configure_model(self) -> None:
        """Load or build policy, reference and critic (Lightning calls this after the data's setup)."""
        if self.network is None:
            streams = 1 if self.problem.single_stream else len(self.problem.names) + 1
            self.network, self.reference, self.critic = build_networks(
                self.policy_spec, self.tuning, self.lora, self.critic_spec, streams, self.data.tokenizer
            )

    def setup(self, stage: str) -> None:
        tokenizer = self.data.tokenizer
        for reward in self.reward_functions.values():
            reward.setup(tokenizer, self.device)
        # taken once: reward models are whole folders to hash, and every checkpoint names them
        self._reward_digests = {name: one.digest() for name, one in self.reward_functions.items()}
        if self.evaluation is not None:
            self.evaluation.setup(tokenizer, self.device)

    @contextmanager
    def _reference_policy(self) -> Iterator[Any]:
        """The start model: a frozen copy, or the policy with its adapters off as long as the context lasts."""
        if self.reference is not None:
            yield self.reference
            return
        with adapters_disabled(self.network):
            yield self.network

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = dict(self.optimizer_options)
        optimizer = build_optimizer(self.network, **cast(Any, options))
        if self.critic is not None:
            lr = self.critic_spec.lr or options["lr"]
            for group in decay_groups(self.critic.parameters(), cast(float, options["weight_decay"])):
                optimizer.add_param_group({**group, "lr": lr})
        return optimizer

    def on_train_start(self) -> None:
        self.network.eval()  # no dropout anywhere: rollout and update use one policy
        if self.critic is not None:
            self.critic.eval()

    # -- ranks --------------------------------------------------------------------------------------------------------
    @property
    def _world(self) -> int:
        return self.trainer.world_size if self._trainer is not None else 1

    def _sum(self, value: Tensor) -> Tensor:
        """``value`` summed over ranks; equal on all of them."""
        if self._world == 1:
            return value
        return cast(Tensor, self.trainer.strategy.reduce(value.clone(), reduce_op="sum"))

    # -- rollout ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def collect(self, batch: TensorDict) -> TensorDict:
        """Responses to a batch of prompts with scores, values and log-probabilities (:mod:`modules.rlhf.rollout`)."""
        data, prompts = self.data, len(batch["index"])
        rows = torch.arange(prompts) + self.global_rank * prompts
        seeds = response_seeds(stream_seed(global_seed(), _SAMPLING, self._iteration), rows, self.group_size)
        rollout = respond(self.network, batch, seeds, self.generation, data.tokenizer.eod_id, self.group_size)
        score_rollout(rollout, self.reward_functions, response_batch(rollout, data.samples("train"), data.tokenizer))
        micro = self.ppo.micro_batch
        with self._reference_policy() as reference:
            reference_log_probabilities(rollout, reference, micro)
        if self.critic is not None:
            values = []
            for part in groups(rollout, micro):
                hidden = self._states(part).hidden if self.critic.trunk is None else None
                values.append(self.critic.values(part, hidden).float())
            rollout["values"] = torch.cat(values)
        return rollout

    def _states(self, rows: TensorDict, entropy: bool = False) -> Any:
        return response_states(self.network, *response_rows(rows), with_entropy=entropy)

    @torch.no_grad()
    def prepare_rollout(self, rollout: TensorDict) -> TensorDict:
        """Add ``advantage`` and ``target`` ``[P, S, R, streams]``."""
        log_ratio = rollout["log_probability"] - rollout["reference_log_probability"]
        rewards = reward_streams(self.problem, rollout["scores"], log_ratio, rollout["length"], float(self.beta))
        rollout["advantage"], rollout["target"] = advantage_streams(
            rewards, rollout.get("values", None), rollout["length"], self.advantage, gamma=self.ppo.gamma,
            lambda_=self.ppo.lambda_, leave_one_out=self.leave_one_out, reduce=self._sum,
        )  # fmt: skip
        return rollout

    def _minibatches(self, rollout: TensorDict) -> Iterator[TensorDict]:
        """Whole prompts in a new order every epoch; equally many minibatches on every rank."""
        prompts, wanted = len(rollout), self.ppo.minibatch_responses
        share = prompts if wanted is None else max(1, wanted // (self._world * self.group_size))
        count = max(1, prompts // share)
        for epoch in range(self.ppo.epochs):
            if count == 1:
                yield rollout
                continue
            order = stream(global_seed(), _ORDER, self._iteration, epoch, self.global_rank)
            for rows in torch.randperm(prompts, generator=order).tensor_split(count):
                yield cast(TensorDict, rollout[rows.to(rollout["length"].device)])

    # -- learning -----------------------------------------------------------------------------------------------------
    def coefficients(self) -> Tensor:
        """float64 ``[streams]``: what each advantage stream counts in the mixture now."""
        problem = self.problem
        if problem.single_stream or self.multipliers is None:
            return torch.ones(1, dtype=torch.float64, device=self.device)
        return stream_coefficients(
            self.multipliers.weights(), self.multipliers.kinds, problem.objective, len(problem.names),
            problem.maximise or 0, problem.constrained, self.multipliers.bounded,
        )  # fmt: skip

    def mixed_advantage(self, rows: TensorDict) -> Tensor:
        """``[P, S, R]`` from the streams, normalised over all ranks' rows as ``ppo.normalise`` says."""
        ppo, mask = self.ppo, rollout_mask(rows)
        streams = rows["advantage"]
        if ppo.normalise == "stream":
            streams = self._standardised(streams, mask).clamp(-ppo.advantage_clip, ppo.advantage_clip)
        mixed = mix_advantages(streams, self.coefficients())
        if ppo.normalise == "mixture" or (ppo.normalise == "stream" and self.problem.single_stream):
            mixed = self._standardised(mixed.unsqueeze(-1), mask).squeeze(-1)
        if ppo.normalise != "none":
            mixed = mixed.clamp(-ppo.advantage_clip, ppo.advantage_clip)
        return mixed

    def _standardised(self, streams: Tensor, mask: Tensor) -> Tensor:
        rows = streams.flatten(0, -2).T
        weights = mask.flatten().expand_as(rows)
        reduce = self._sum if self._world > 1 else None
        return standardise(rows, weights, reduce, floor=self.ppo.std_floor).T.reshape(streams.shape)

    def losses(self, rows: TensorDict, advantage: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Sums over this rank's tokens, divided by ``tokens`` of all ranks: the loss and its parts."""
        ppo, mask = self.ppo, rollout_mask(rows)
        states = self._states(rows, entropy=ppo.entropy_weight > 0)
        log_ratio = states.logprobs.view_as(advantage) - rows["log_probability"]
        log_ratio = torch.where(mask, log_ratio, 0.0)
        surrogate = torch.where(mask, clipped_surrogate(log_ratio, advantage, ppo.clip), 0.0).sum() / tokens
        loss, parts = surrogate, {"policy_loss": surrogate.detach()}
        if ppo.entropy_weight > 0:
            spread = torch.where(mask, states.entropy.view_as(advantage), 0.0).sum() / tokens
            loss, parts["entropy"] = loss - ppo.entropy_weight * spread, spread.detach()
        if self.critic is not None:
            error = (self.critic.values(rows, states.hidden) - rows["target"]).square()
            per_head = torch.where(mask.unsqueeze(-1), error, 0.0).flatten(0, -2).sum(0) / tokens
            loss = loss + (per_head * self._head_weights(per_head)).sum()
            parts["value_loss"] = per_head.detach()
        with torch.no_grad():
            parts["approximate_kl"] = torch.where(mask, approximate_kl(log_ratio), 0.0).sum() / tokens
            outside = ((log_ratio.exp() - 1.0).abs() > ppo.clip) & mask
            parts["clip_fraction"] = outside.sum() / tokens
        return {"loss": loss, **parts}

    def _head_weights(self, like: Tensor) -> Tensor:
        weights = torch.full_like(like, self.critic_spec.reward_weight)
        if len(weights) > 1:
            weights[-1] = self.critic_spec.kl_weight
        return weights

    def training_step(self, batch: TensorDict, batch_idx: int) -> Tensor:
        optimizer = cast(LightningOptimizer, self.optimizers())
        inner = optimizer.optimizer
        self._iteration = self.global_step
        rollout = self.prepare_rollout(self.collect(batch))
        returns = self._returns(rollout)
        parameters = [p for group in inner.param_groups for p in group["params"]]
        parts: dict[str, Tensor] = {}
        minibatches = list(self._minibatches(rollout))
        parted, warming_up = len(minibatches) > self.ppo.epochs, self._iteration < self.critic_spec.warmup
        multipliers, constrained = None if warming_up else self.multipliers, list(self.problem.constrained)
        for number, rows in enumerate(minibatches):
            tokens = self._sum(rollout_mask(rows).sum().double()).float()
            rows["mixed"] = self.mixed_advantage(rows)
            inner.zero_grad()
            parts = {}
            for part in groups(rows, self.ppo.micro_batch):
                found = self.losses(part, part["mixed"], tokens)
                self.manual_backward(found.pop("loss") * self._world)  # DDP averages; these are shares of a sum
                parts = {key: parts[key] + value if parts else value for key, value in found.items()}
            if warming_up:
                self.network.zero_grad()  # the optimiser passes over what has no gradient: no value loss, no decay
            norm = nn.utils.clip_grad_norm_(parameters, self.ppo.max_grad_norm, foreach=True)
            if not math.isfinite(float(norm)):
                raise NonFiniteError(
                    f"ConstrainedRLHF: the gradient of iteration {self._iteration + 1} is not finite; resume from the "
                    "last checkpoint with a lower lr"
                )
            # Lightning counts the last one: its steps are iterations
            inner.step() if number < len(minibatches) - 1 else optimizer.step()
            if multipliers is not None and self.multiplier_spec.update == "per_minibatch":
                multipliers.update((self._returns(rows) if parted else returns)[constrained])
        if multipliers is not None and self.multiplier_spec.update == "per_iteration":
            multipliers.update(returns[constrained])
        self._finish(rollout, returns, parts)
        return parts["policy_loss"]

    def _returns(self, rows: TensorDict) -> Tensor:
        """Undiscounted episode returns of the components, float64 ``[N]``, mean over all ranks (paper, section 4)."""
        scores, length = cast(Tensor, rows["scores"]).double().flatten(0, 1), cast(Tensor, rows["length"])
        state = self.multiplier_spec.estimator == "state"
        weights = length.flatten().double() if state else torch.ones_like(scores[:, 0])
        sums = self._sum(torch.cat([weights @ scores, weights.sum().unsqueeze(0)]))
        return sums[:-1] / sums[-1]

    def _finish(self, rollout: TensorDict, returns: Tensor, parts: dict[str, Tensor]) -> None:
        """KL controller, and the iteration's figures."""
        self._tokens_of_batch = int(rollout["length"].sum())
        figures = rollout_figures(rollout, self._sum)
        self.divergences.add([figures["kl/per_token"]])
        if self.kl.target is not None:
            error = (figures["kl/per_token"] - self.kl.target) / self.kl.target
            self.beta *= 1.0 + self.kl.gain * min(max(error, -self.kl.error_clip), self.kl.error_clip)
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self.global_step % every:
            return
        names, single = self.problem.names, self.problem.single_stream
        shown: dict[str, float | Tensor] = {**figures, "kl/beta": self.beta}
        shown |= {f"reward/{name}": value for name, value in zip(names, returns, strict=True)}
        shown |= update_figures(parts, self._sum)
        shown |= stream_figures(rollout, parts, ["all"] if single else [*names, "kl"], self._sum)
        if self.multipliers is not None:
            shown |= self.multipliers.figures()
            if self.problem.objective == "kl" and self.ppo.normalise == "stream":
                shown |= reward_unit_figures(self.multipliers, shown)
        self.log_dict({key: torch.as_tensor(value).float() for key, value in shown.items()})

    def work_per_batch(self, batch: TensorDict) -> int:
        """Response tokens that this rank generated for the batch."""
        return self._tokens_of_batch

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def _evaluate(self, batch: TensorDict, split: str) -> None:
        base, data = stream_seed(global_seed(), _EVALUATION), self.data
        self._evaluator.add(self.network, self._reference_policy(), batch, base, data.samples(split), data.tokenizer)

    def validation_step(self, batch: TensorDict, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: TensorDict, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        self._evaluator.clear()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        figures = self._evaluator.figures("val", self._world)
        resumed = self.trainer.sanity_checking and self.global_step > 0  # these figures are on record
        if self.evaluation is not None and self.trainer.state.fn == "fit" and not resumed:
            keys = ("score", *map("reward/{}".format, self.problem.names))
            self.evaluations.add([figures[f"val/{key}"] for key in keys])
        if self.trainer.sanity_checking:
            # the start model's figures: Lightning logs nothing of a sanity check
            for logger in self.trainer.loggers if self.trainer.is_global_zero else ():
                logger.log_metrics(figures, step=self.global_step)
            return
        if self.search is not None and self.multipliers is not None and self.trainer.state.fn == "fit":
            means = torch.tensor([figures[f"val/reward/{name}"] for name in self.problem.names], dtype=torch.float64)
            self.search.observe(means, figures["val/score"], self.multipliers)
            figures |= self.search.figures()
        self.log_dict(figures, rank_zero_only=False)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self._evaluator.figures("test", self._world))

    def sample_texts(self) -> list[dict[str, str]]:
        """The last evaluation's first responses: ``prompt``, ``response``, ``reference`` and the scores as text."""
        return self._evaluator.texts

    def assurance_subject(self) -> Subject:
        """What assurance probes may ask of this policy, on held-out prompts of the run's data."""
        from modules.rlhf.assurance import feedback_subject

        return feedback_subject(self)

    def warm_start(self, checkpoint: dict[str, Any]) -> None:
        """Policy, reference, critic and learnt multipliers of another run; thresholds and all else as configured."""
        start_from(checkpoint, self)

    # -- files --------------------------------------------------------------------------------------------------------
    def export_pretrained(self, folder: str | Path) -> None:
        """Write the policy as a Hugging Face directory, adapters merged (:class:`~modules.contracts.Exports`)."""
        if isinstance(self.network, MarkovLM):
            raise ValueError("ConstrainedRLHF: the tabular policy has no Hugging Face form; leave ExportModel out")
        export_hf(self.network, getattr(self.data.tokenizer, "directory", None), folder)

    def digest(self) -> Mapping[str, str]:
        total = sum((parameter.detach().double().sum() for parameter in self.parameters()), torch.zeros(()))
        scores = {f"rewards.{name}": value for name, value in self._reward_digests.items()}
        return {"weights": f"{float(total):.17g}", "problem": str(self.problem), **scores}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["reward_digests"] = dict(self._reward_digests)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("reward_digests", {})
        for name, value in self._reward_digests.items():
            if name in saved and saved[name] != value:
                raise ValueError(
                    f"ConstrainedRLHF: rewards.{name} is not the one this checkpoint was trained with (its weights or "
                    "word lists differ); restore them, or start anew from the checkpoint's exported model"
                )
