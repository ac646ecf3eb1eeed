"""Oracles: reference solutions of routing instances, from packages or built in."""

from datamodules.routing.oracles.base import Instance, Oracle, instances_of
from datamodules.routing.oracles.exact import Exact
from datamodules.routing.oracles.heuristics import Insertion, RuinRecreate, TwoOpt
from datamodules.routing.oracles.packages import Elkai, ORTools, PrizeCollecting, PyVRP
from datamodules.routing.oracles.references import References, default_oracle, make_oracle

__all__ = [
    "Elkai",
    "Exact",
    "Insertion",
    "Instance",
    "ORTools",
    "Oracle",
    "PrizeCollecting",
    "PyVRP",
    "References",
    "RuinRecreate",
    "TwoOpt",
    "default_oracle",
    "instances_of",
    "make_oracle",
]
