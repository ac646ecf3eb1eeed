"""Population games: members, payoff table, meta-solvers, exploitability and the response-oracle loop."""

from modules.population.alpha_rank import AlphaRank
from modules.population.meta_solvers import (
    FictitiousPlay,
    Last,
    MetaSolver,
    NashLP,
    ProjectedReplicator,
    RegretMatching,
    SoftmaxPayoff,
    Uniform,
)
from modules.population.neural import DQNResponse, NeuralResponse, PPOResponse

__all__ = [
    "AlphaRank",
    "DQNResponse",
    "FictitiousPlay",
    "Last",
    "MetaSolver",
    "NashLP",
    "NeuralResponse",
    "PPOResponse",
    "ProjectedReplicator",
    "RegretMatching",
    "SoftmaxPayoff",
    "Uniform",
]
