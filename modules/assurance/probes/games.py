"""Probes of solutions of games: mixtures of members for every seat, known exactly or by play alone.

Where payoffs and best responses are exact so are the figures, and one look serves both splits. Where a game is only
played, a unit is one game of every seat or member that a probe looks at, and best responses are trained: r.nashconv is
then a lower bound, as good as the response that its condition names. NashConv is the sum over players of what a best
response gains (Lanctot et al. 2017); exploitability is half of it for two players.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from modules.assurance.figures import Measure, largest_mean
from modules.assurance.probe import Block, Probe, Values
from modules.assurance.subject import Subject

CAPABILITIES: dict[str, str] = {
    "nash_gains": "() -> (how best responses are found, [players]): what each player could gain, all others playing on",
    "member_gains": "() -> [players]: what each player could gain by one of its population's own members",
    "population_nashconv": "() -> float: least NashConv that mixtures of the members have; two players, zero-sum",
    "meta_strategies": "() -> per population [members]: who plays how often",
    "hull_distances": "() -> [members of all populations] in nats, to mixtures of its population's others; empty: none",
    "illegal_states": "() -> (information states in which a member gives illegal actions probability, all of them)",
    "probability_departures": "() -> what -> its largest distance from being a distribution",
    "solution_payoffs": "() -> [players]",
    "random_play": "() -> (gains [players] against uniformly random play, its payoffs [players])",
    "value_of_play": "() -> payoffs against uniformly random opponents, summed over seats: of the solution, of random "
    "play, of best responses",
    "joint_gain": "() -> (which seats and how it was found, what they gain by playing together)",
    "response_gains": "(seed, count, suite) -> (how responses were trained, [count]: their gains, summed over seats)",
    "games_against_random": "(seed, count, suite) -> solution, random, response -> [count] returns summed over seats",
    "solution_games": "(seed, count) -> returns [count, players]; illegal [count] bool: an illegal action had mass",
    "member_games": "(seed, count) -> gains [count, members] on NashConv's scale, [count, 0]: no shared population; "
    "distances [count] in nats to mixtures of others, mean over members, empty: a member has no others",
}
FLAT = 1e-9
"""Payoffs closer than this, relative to the larger of 1 and the payoffs, are the same."""
SUPPORT = 1e-6
"""Members played less often are not counted."""


NOISE = 1e-12
"""Exact figures closer to 0 are what rounding left of it."""


def _settled(value: float) -> float:
    return 0.0 if abs(value) < NOISE else value


def _exactly(name: str, value: float, condition: str = "") -> Values:
    one = np.array([_settled(value)])
    return {name: {condition: one} if condition else one}


# -- exact games --
def _nashconv(subject: Subject, block: Block) -> Values:
    how, gains = subject["nash_gains"]()
    return _exactly("r.nashconv", float(gains.sum()), how)


def _nashconv_baselines(subject: Subject) -> Mapping[str, Mapping[str, float]]:
    known = {"equilibrium": 0.0}
    if subject.offers("random_play"):
        known["uniformly random play"] = float(subject["random_play"]()[0].sum())
    return {"r.nashconv": known}


def _restricted(subject: Subject, block: Block) -> Values:
    return _exactly("r.pop_ex", float(subject["member_gains"]().sum()))


def _hull(subject: Subject, block: Block) -> Values:
    return _exactly("r.pe", subject["population_nashconv"]())


def _distances(subject: Subject, block: Block) -> Values:
    distances: Tensor = subject["hull_distances"]()
    alone = "a population of one member has no others to be told apart from"
    return _exactly("i.div", float(distances.mean())) if len(distances) else {"i.div": alone}


def _legal(subject: Subject, block: Block) -> Values:
    wrong, total = subject["illegal_states"]()
    return {"c.seat": np.array([wrong / total])}


def _welfare(subject: Subject, block: Block) -> Values:
    return _exactly("e.welfare", float(subject["solution_payoffs"]().sum()))


def _welfare_baselines(subject: Subject) -> Mapping[str, Mapping[str, float]]:
    return {"e.welfare": {"uniformly random play": _settled(float(subject["random_play"]()[1].sum()))}}


def _value(subject: Subject, block: Block) -> Values:
    solution, random, best = subject["value_of_play"]()
    if abs(best - random) <= FLAT * max(1.0, abs(best), abs(random)):
        return {"u.value": "nobody gains from uniformly random opponents in this game: no scale to measure on"}
    return _exactly("u.value", (solution - random) / (best - random))


def _value_baselines(subject: Subject) -> Mapping[str, Mapping[str, float]]:
    return {"u.value": {"uniformly random play": 0.0, "best response": 1.0}}


# -- exact or played --
def _mixture(subject: Subject, block: Block) -> Values:
    sigmas: list[Tensor] = [sigma.double() for sigma in subject["meta_strategies"]()]
    entropies = [float(-(sigma * sigma.clamp(min=1e-300).log()).sum()) for sigma in sigmas]
    return {
        "i.support": np.array([np.mean([float((sigma > SUPPORT).sum()) for sigma in sigmas])]),
        "i.support_entropy": np.array([np.mean(entropies)]),
    }


def _departure(subject: Subject, block: Block) -> Values:
    departures = subject["probability_departures"]()
    worst = max(departures, key=lambda name: departures[name])
    return _exactly("c.mix", departures[worst], worst)


def _joint(subject: Subject, block: Block) -> Values:
    which, gain = subject["joint_gain"]()
    return _exactly("e.collude", gain, which)


# -- played games --
def _response(subject: Subject, block: Block) -> Values:
    how, gains = subject["response_gains"](block.seed, block.count, block.effort.suite)
    return {"r.nashconv": {how: gains.cpu().numpy()}}


def share_of_best(values: np.ndarray) -> np.ndarray:
    """Where the first condition's mean stands between the second's (0) and the third's (1); NaN: those are one."""
    means = values.mean(-2)
    below = means[..., 2] - means[..., 1]
    flat = np.abs(below) <= FLAT * np.maximum(1.0, np.abs(means).max(-1))
    return np.where(flat, np.nan, (means[..., 0] - means[..., 1]) / np.where(flat, 1.0, below))


def _played_value(subject: Subject, block: Block) -> Values:
    found = subject["games_against_random"](block.seed, block.count, block.effort.suite)
    names = {"solution": "the solution", "random": "random play", "response": "response trained by PPO"}
    return {"u.value": {title: found[name].cpu().numpy() for name, title in names.items()}}


def _played_conduct(subject: Subject, block: Block) -> Values:
    found = subject["solution_games"](block.seed, block.count)
    return {
        "c.seat": found["illegal"].double().cpu().numpy(),
        "e.welfare": found["returns"].sum(1).cpu().numpy(),
    }


def _played_members(subject: Subject, block: Block) -> Values:
    found = subject["member_games"](block.seed, block.count)
    gains = found["gains"].cpu().numpy()
    apart = "players have populations of their own: by games only a shared one is compared with its members"
    alone = "a population of one member has no others to be told apart from"
    return {
        "r.pop_ex": {f"member {k}": gains[:, k] for k in range(gains.shape[1])} if gains.shape[1] else apart,
        "i.div": found["distances"].cpu().numpy() if len(found["distances"]) else alone,
    }


def _exact(name: str, title: str, direction: str, unit: str = "") -> Measure:
    return Measure(name, title, direction, "exact", unit)  # type: ignore[arg-type]


_NASHCONV = "What best responses gain against the solution, summed over players (NashConv)"
_POP_EX = "What members of the populations gain against the solution, summed over players"
_DIV = "Distance of a member to the mixtures of its population's others (policy-space diversity), mean over members"
_WELFARE = "Payoff of all players together"
_VALUE = "Payoff against uniformly random opponents, from random play (0) to the best response (1)"
_SLOW = ("rice", "deep")
_MEMBERS_BLOCK = 200
"""Games of a member from which a mixture of the others is fitted: fewer would flatter the mixture."""

PROBES: tuple[Probe, ...] = (
    Probe(
        "exploitability",
        (_exact("r.nashconv", _NASHCONV, "down", "payoff"),),
        needs=("nash_gains",),
        run=_nashconv,
        baselines=_nashconv_baselines,
    ),
    Probe(
        "restricted_game",
        (_exact("r.pop_ex", _POP_EX, "down", "payoff"),),
        needs=("member_gains",),
        run=_restricted,
    ),
    Probe(
        "population_hull",
        (_exact("r.pe", "Least NashConv of mixtures of the members (population exploitability)", "down", "payoff"),),
        needs=("population_nashconv",),
        run=_hull,
        suites=_SLOW,
    ),
    Probe(
        "population_diversity",
        (_exact("i.div", _DIV, "up", "nats"),),
        needs=("hull_distances",),
        run=_distances,
        suites=_SLOW,
    ),
    Probe(
        "meta_strategy",
        (
            _exact("i.support", "Members that the meta-strategy plays, mean over populations", "down", "members"),
            _exact("i.support_entropy", "Entropy of the meta-strategy, mean over populations", "down", "nats"),
        ),
        needs=("meta_strategies",),
        run=_mixture,
    ),
    Probe(
        "legal_play",
        (_exact("c.seat", "Information states in which a member gives illegal actions probability", "down", "share"),),
        needs=("illegal_states",),
        run=_legal,
    ),
    Probe(
        "distributions",
        (_exact("c.mix", "Largest departure of a mixture or policy from a distribution, or of what it pays", "down"),),
        needs=("probability_departures",),
        run=_departure,
    ),
    Probe(
        "joint_play",
        (_exact("e.collude", "What two seats gain by playing together, others as before", "down", "payoff"),),
        needs=("joint_gain",),
        run=_joint,
        suites=_SLOW,
    ),
    Probe(
        "welfare",
        (_exact("e.welfare", _WELFARE, "up", "payoff"),),
        needs=("solution_payoffs", "random_play"),
        run=_welfare,
        baselines=_welfare_baselines,
    ),
    Probe(
        "value_against_random",
        (_exact("u.value", _VALUE, "up", "share"),),
        needs=("value_of_play",),
        run=_value,
        baselines=_value_baselines,
    ),
    Probe(
        "trained_exploiter",
        (Measure("r.nashconv", f"{_NASHCONV}, by responses trained: at least", "down", "mean", "payoff"),),
        needs=("response_gains",),
        run=_response,
        suites=_SLOW,  # a response trained in seconds gains little, and would flatter
        block=500,
        units={"rice": 2000, "deep": 5000},
        limit={"rice": 16000, "deep": 64000},
        baselines=_nashconv_baselines,
        autograd=True,
    ),
    Probe(
        "played_value",
        (Measure("u.value", _VALUE, "up", "bootstrap", "share", statistic=share_of_best),),
        needs=("games_against_random",),
        run=_played_value,
        block=500,
        units={"quick": 1000, "rice": 2000, "deep": 5000},
        limit={"quick": 1000, "rice": 8000, "deep": 32000},
        baselines=_value_baselines,
        autograd=True,
    ),
    Probe(
        "played_conduct",
        (
            Measure("c.seat", "Games in which an illegal action had probability", "down", "proportion", "share"),
            Measure("e.welfare", _WELFARE, "up", "mean", "payoff"),
        ),
        needs=("solution_games",),
        run=_played_conduct,
        block=500,
        units={"quick": 500, "rice": 1000, "deep": 5000},
        limit={"quick": 1000, "rice": 16000, "deep": 64000},
    ),
    Probe(
        "played_members",
        (
            Measure("r.pop_ex", f"{_POP_EX}: the best member", "down", "bootstrap", "payoff", statistic=largest_mean),
            Measure("i.div", _DIV, "up", "mean", "nats"),
        ),
        needs=("member_games",),
        run=_played_members,
        suites=_SLOW,
        block=_MEMBERS_BLOCK,
        units={"rice": 2 * _MEMBERS_BLOCK, "deep": 5 * _MEMBERS_BLOCK},
        limit={"rice": 1000, "deep": 4000},
    ),
)  # fmt: skip
