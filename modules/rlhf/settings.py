"""Settings of constrained RLHF, and what each named variant makes of them."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modules.objectives.lagrangian import Kind, Parameterisation

Variant = Literal[
    "ppo", "ppo_sat", "mu_ppo", "xi_ppo", "all_ppo", "fixed_lambda", "single_constraint", "nm_ppo", "ppo_lag"
]
_OWNER = "ConstrainedRLHF"


@dataclass
class ConstraintSpec:
    """One constraint ``v_i >= threshold`` (``ge``), ``<=`` (``le``) or ``=`` (``eq``).

    Args:
        threshold: of the component's mean score; ``null``: read from ``thresholds_file``, or found by ``nm_ppo``.
        kind: ``null``: the variant's own (mu: ``ge``, xi: ``eq``, All: ``le``).
        init, max: ``nm_ppo`` draws the simplex uniformly between these.
        required: what assurance demands of held-out responses, where training aims elsewhere (a threshold backed off so
            that the requirement holds with certainty); ``null``: the threshold.
    """

    threshold: float | None = None
    kind: Kind | None = None
    init: float | None = None
    max: float | None = None
    required: float | None = None


@dataclass
class CriticSpec:
    """Value heads, one per stream.

    Args:
        kind: ``shared``: linear heads on the policy's last hidden state; ``separate``: a trunk of their own, a copy of
            the start model (the paper); ``none``: for ``advantage`` group and batch.
        detach: shared: let no value gradient into the policy's trunk.
        warmup: first iterations in which only the critic learns, and multipliers rest.
        lr: learning rate of heads and separate trunk; ``null``: the policy's.
        reward_weight, kl_weight: loss coefficients of a reward's head and of the KL head.
    """

    kind: Literal["shared", "separate", "none"] = "shared"
    detach: bool = False
    warmup: int = 0
    lr: float | None = None
    reward_weight: float = 0.5
    kl_weight: float = 0.2


@dataclass
class MultiplierSpec:
    """How multipliers are kept and learnt; see :class:`modules.rlhf.multipliers.Multipliers`.

    Args:
        parameterisation: ``bounded`` (sigmoid or tanh, the paper), ``projected``, ``softplus``, ``exp`` or ``free``.
        lr, momentum, clip: of the SGD step on the raw multipliers; ``clip`` bounds the gradient's norm.
        init: start value, ``null``: 0 (bounded) or 0.5. init_std: deviation of a draw added to it, one for all.
        lambda_max: greatest multiplier of ``exp``. lambda_clip: greatest absolute raw value.
        relative: violations in shares of the threshold, for rewards of unlike scales.
        update: after every minibatch (the paper's code) or once per iteration.
        estimator: mean over episodes (what the constraint says), or over states, so that long responses count more
            (the paper's code).
        window: updates over which returns are averaged (Safe RLHF: 128 episodes).
    """

    parameterisation: Parameterisation = "bounded"
    lr: float = 0.1
    momentum: float = 0.1
    clip: float | None = 0.5
    init: float | None = None
    init_std: float = 0.0
    lambda_max: float | None = None
    lambda_clip: float | None = None
    relative: bool = False
    update: Literal["per_minibatch", "per_iteration"] = "per_minibatch"
    estimator: Literal["episode", "state"] = "episode"
    window: int = 1


@dataclass
class KLSpec:
    """The KL reward ``-beta * (log pi - log pi_0)`` of every token.

    Args:
        beta: its coefficient. target: KL per token that an adaptive controller steers to (fixed-weight PPO only);
            ``null``: beta stays.
        gain, error_clip: the controller's ``beta *= 1 + gain * clip((KL - target) / target, -error_clip, error_clip)``.
        budget: KL per token that assurance measures against; ``null``: the target. Training does not read it.
    """

    beta: float = 0.2
    target: float | None = None
    gain: float = 0.1
    error_clip: float = 0.2
    budget: float | None = None


@dataclass
class PPOSpec:
    """The surrogate's constants (Schulman et al. 2017).

    Args:
        clip: half-width of the ratio's interval. gamma, lambda_: discount and GAE's lambda.
        epochs: passes over a rollout. minibatch_responses: responses over all ranks in a minibatch; ``null``: all.
        micro_batch: responses of one forward pass; ``null``: the rank's whole minibatch. Gradients are the same.
        normalise: ``stream``: each advantage stream to mean 0 and deviation 1 (the paper; with group baselines TRL's
            normalize_then_sum); ``mixture``: only their mixture (sum_then_normalize); ``none``.
        std_floor: least deviation that is divided by; a stream that is nearly constant is not blown up.
        advantage_clip: greatest absolute advantage, after normalisation.
        entropy_weight: of an entropy bonus.
        max_grad_norm: of policy and critic together.
    """

    clip: float = 0.2
    gamma: float = 0.99
    lambda_: float = 0.95
    epochs: int = 4
    minibatch_responses: int | None = None
    micro_batch: int | None = None
    normalise: Literal["stream", "mixture", "none"] = "mixture"
    std_floor: float = 1e-8
    advantage_clip: float = 10.0
    entropy_weight: float = 0.0
    max_grad_norm: float = 0.5


@dataclass
class GenerationSpec:
    """Sampling, the same in training and evaluation.

    Args:
        max_new, min_new: tokens of a response, the one that ends it included.
        temperature, top_k, top_p: of the sampling distribution; ratios use the full softmax (as the paper's code).
        batch_size: responses generated at once; ``null``: all of the rank's.
    """

    max_new: int = 20
    min_new: int = 2
    temperature: float = 1.0
    top_k: int = 20
    top_p: float = 1.0
    batch_size: int | None = None


@dataclass
class NelderMeadSpec:
    """The search for thresholds within one run (paper, section 5).

    Args:
        base: which problem the thresholds belong to.
        tolerance: a threshold counts as reached within this share of it.
        patience: validations after which a vertex is scored whether reached or not.
        std_tolerance: the search ends when the simplex' scores deviate less.
        contraction: ``scipy`` (outside and inside) or ``inside`` (the paper's code).
        cache_tolerance: difference per threshold up to which a cached score counts (the paper's code: 5e-3); take less
            where the range from ``init`` to ``max`` is not many times as wide.
        cache_ttl: evaluations after which a cached score is stale; ``null``: never (the paper).
    """

    base: Literal["mu", "xi"] = "xi"
    tolerance: float = 0.05
    patience: int = 10
    std_tolerance: float = 0.01
    contraction: Literal["scipy", "inside"] = "scipy"
    cache_tolerance: float = 5e-3
    cache_ttl: int | None = None


@dataclass
class AssuranceSpec:
    """What assurance is told beside the task; training does not read it.

    Args:
        steering_runs: run folders of the same task at other thresholds, for ``c.steer``, as shell patterns.
        toxicity: dotted name of a function from texts to scores in [0, 1] (``package.module.function``); importing it
            runs that module's code. ``null``: the shipped lexicon.
    """

    steering_runs: list[str] = field(default_factory=list)
    toxicity: str | None = None


@dataclass(frozen=True)
class Problem:
    """What a variant comes to.

    ``streams``: one advantage stream per reward and one for KL, or all in one (``single_stream``). ``objective``: how
    streams are mixed, see :func:`modules.objectives.lagrangian.stream_coefficients`.
    """

    objective: Literal["kl", "all", "single", "fixed", "ppo_lag"]
    names: tuple[str, ...]
    kinds: tuple[Kind, ...] = ()
    thresholds: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    maximise: int | None = None
    frozen: bool = False
    single_stream: bool = False
    saturating: bool = False
    search: bool = False
    targets: tuple[float, ...] = field(default=())

    @property
    def constrained(self) -> tuple[int, ...]:
        """Numbers of the rewards that have a constraint."""
        if self.objective == "fixed":
            return ()
        return tuple(i for i in range(len(self.names)) if i != self.maximise)


_OBJECTIVES: dict[str, Any] = {
    "mu_ppo": ("kl", "ge"), "xi_ppo": ("kl", "eq"), "all_ppo": ("all", "le"), "fixed_lambda": ("kl", "ge"),
    "single_constraint": ("single", "ge"), "ppo_lag": ("ppo_lag", "le"),
}  # fmt: skip


def resolve(
    variant: str,
    names: Sequence[str],
    bounds: Sequence[tuple[float, float]],
    constraints: Mapping[str, ConstraintSpec],
    weights: Mapping[str, float],
    maximise: str | None,
    search: NelderMeadSpec,
    thresholds_file: str | None = None,
) -> Problem:
    """Check the settings of a variant and say what problem they state.

    Args:
        names, bounds: the rewards in their order, and the least and greatest score of each.

    Raises:
        ValueError: one line naming the key that is wrong, unknown, missing, or too much.
    """
    if not names:
        raise ValueError(f"{_OWNER}: rewards is empty; name at least one")
    for key, given in (("constraints", constraints), ("weights", weights)):
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1, 0.5)
                hint = f"did you mean '{near[0]}'?" if near else f"rewards has {', '.join(names)}"
                raise ValueError(f"{_OWNER}: {key}.{name}: there is no such reward; {hint}")
    if variant in ("ppo", "ppo_sat"):
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"{_OWNER}: variant {variant} needs weights.{missing[0]}")
        alpha = tuple(_finite(f"weights.{name}", weights[name]) for name in names)
        if variant == "ppo":
            return Problem("fixed", tuple(names), weights=alpha, single_stream=True)
        read = _thresholds(names, bounds, constraints, thresholds_file)
        return Problem("fixed", tuple(names), weights=alpha, single_stream=True, saturating=True, targets=read)
    if variant == "nm_ppo":
        return _search_problem(names, bounds, constraints, search, thresholds_file)
    objective, kind = _OBJECTIVES[variant]
    single = objective in ("single", "ppo_lag")
    if single:
        if maximise not in names:
            raise ValueError(f"{_OWNER}: variant {variant} needs maximise, one of {', '.join(names)}; got {maximise!r}")
        if len(names) < 2:
            raise ValueError(f"{_OWNER}: variant {variant} needs a second reward to constrain")
        if maximise in constraints:
            raise ValueError(f"{_OWNER}: constraints.{maximise}: this reward is maximised; leave its constraint out")
    constrained = [name for name in names if not (single and name == maximise)]
    frozen = variant == "fixed_lambda"
    if frozen:
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"{_OWNER}: variant fixed_lambda needs weights.{missing[0]}, the multiplier's weight")
        held = tuple(_finite(f"weights.{name}", weights[name]) for name in names)
        return Problem("kl", tuple(names), ("ge",) * len(names), (0.0,) * len(names), held, frozen=True)
    ranges = [bounds[list(names).index(name)] for name in constrained]
    return Problem(
        objective,
        tuple(names),
        tuple(constraints[name].kind or kind if name in constraints else kind for name in constrained),
        _thresholds(constrained, ranges, constraints, thresholds_file),
        maximise=list(names).index(str(maximise)) if single else None,
    )


def _search_problem(
    names: Sequence[str],
    bounds: Sequence[tuple[float, float]],
    constraints: Mapping[str, ConstraintSpec],
    search: NelderMeadSpec,
    thresholds_file: str | None,
) -> Problem:
    if thresholds_file is not None:
        raise ValueError(f"{_OWNER}: thresholds_file: nm_ppo finds the thresholds itself; leave it out")
    middle: list[float] = []
    for name, (low, high) in zip(names, bounds, strict=True):
        spec = constraints.get(name)
        if spec is None or spec.init is None or spec.max is None:
            raise ValueError(f"{_OWNER}: nm_ppo needs constraints.{name}.init and .max, the range of its simplex")
        for key, value in (("init", spec.init), ("max", spec.max)):
            if not low <= value <= high:
                raise ValueError(f"{_OWNER}: constraints.{name}.{key} must be in [{low:g}, {high:g}], got {value:g}")
        if spec.init == spec.max:
            raise ValueError(f"{_OWNER}: constraints.{name}: init and max must differ, both are {spec.init:g}")
        middle.append((spec.init + spec.max) / 2)
    kind: Kind = "eq" if search.base == "xi" else "ge"
    return Problem("kl", tuple(names), (kind,) * len(names), tuple(middle), search=True)


def _finite(key: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{_OWNER}: {key} must be finite, got {value}")
    return float(value)


def _thresholds(
    names: Sequence[str],
    bounds: Sequence[tuple[float, float]],
    constraints: Mapping[str, ConstraintSpec],
    file: str | None,
) -> tuple[float, ...]:
    read: Mapping[str, float] = {} if file is None else read_thresholds(file)
    found: list[float] = []
    for name, (low, high) in zip(names, bounds, strict=True):
        spec = constraints.get(name, ConstraintSpec())
        value = spec.threshold if spec.threshold is not None else read.get(name)
        if value is None:
            source = f"{file} has none for it" if file is not None else "give it, or thresholds_file"
            raise ValueError(f"{_OWNER}: constraints.{name}.threshold is missing: {source}")
        for key, number in (("threshold", value), ("required", spec.required)):
            if number is not None and not low <= number <= high:
                raise ValueError(f"{_OWNER}: constraints.{name}.{key} must be in [{low:g}, {high:g}], got {number:g}")
        found.append(float(value))
    return tuple(found)


def read_thresholds(file: str | Path) -> dict[str, float]:
    """``{component: threshold}`` of a proxy-point file, as ``rlhf/proxy_fit`` writes it.

    Raises:
        FileNotFoundError, ValueError: no such file, or not of that form.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{_OWNER}: thresholds_file {path} does not exist; rlhf/proxy_fit writes it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["thresholds"]
        return {str(name): float(value) for name, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{_OWNER}: thresholds_file {path} must hold {{"thresholds": {{name: number}}}}') from None


def check_ranges(
    kl: KLSpec, ppo: PPOSpec, generation: GenerationSpec, multiplier: MultiplierSpec, critic: CriticSpec
) -> None:
    """Refuse numbers out of range.

    Raises:
        ValueError: one line naming the key.
    """
    rules: list[tuple[str, float | None, bool, str]] = [
        ("kl.beta", kl.beta, kl.beta >= 0, ">= 0"),
        ("kl.target", kl.target, kl.target is None or kl.target > 0, "> 0"),
        ("kl.budget", kl.budget, kl.budget is None or kl.budget > 0, "> 0"),
        ("ppo.clip", ppo.clip, ppo.clip > 0, "> 0"),
        ("ppo.gamma", ppo.gamma, 0 <= ppo.gamma <= 1, "in [0, 1]"),
        ("ppo.lambda_", ppo.lambda_, 0 <= ppo.lambda_ <= 1, "in [0, 1]"),
        ("ppo.epochs", ppo.epochs, ppo.epochs >= 1, ">= 1"),
        ("ppo.micro_batch", ppo.micro_batch, ppo.micro_batch is None or ppo.micro_batch >= 1, ">= 1"),
        ("ppo.std_floor", ppo.std_floor, ppo.std_floor > 0, "> 0"),
        ("ppo.advantage_clip", ppo.advantage_clip, ppo.advantage_clip > 0, "> 0"),
        ("ppo.entropy_weight", ppo.entropy_weight, ppo.entropy_weight >= 0, ">= 0"),
        ("ppo.max_grad_norm", ppo.max_grad_norm, ppo.max_grad_norm > 0, "> 0"),
        ("generation.max_new", generation.max_new, generation.max_new >= 1, ">= 1"),
        ("generation.min_new", generation.min_new, 0 <= generation.min_new <= generation.max_new, "in [0, max_new]"),
        ("generation.temperature", generation.temperature, generation.temperature > 0, "> 0"),
        ("generation.top_k", generation.top_k, generation.top_k >= 0, ">= 0 (0: all)"),
        ("generation.top_p", generation.top_p, 0 < generation.top_p <= 1, "in (0, 1]"),
        ("multiplier.lr", multiplier.lr, multiplier.lr >= 0, ">= 0"),
        ("multiplier.momentum", multiplier.momentum, 0 <= multiplier.momentum < 1, "in [0, 1)"),
        ("critic.warmup", critic.warmup, critic.warmup >= 0, ">= 0"),
        ("critic.lr", critic.lr, critic.lr is None or critic.lr > 0, "> 0"),
    ]
    for key, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{_OWNER}: {key} must be {rule}, got {value}")
