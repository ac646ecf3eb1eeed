"""Games: normal-form and continuous ones, rules of extensive-form games, and the trees and plans made of them."""

from datamodules.games.generated import (
    battle_of_sexes,
    blotto,
    chicken,
    disc,
    elo,
    elo_plus_noise,
    prisoners_dilemma,
    random_game_of_skill,
    rock_paper_scissors,
    transitive,
    triangular,
)
from datamodules.games.goofspiel import Goofspiel
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.leduc import LeducPoker
from datamodules.games.liars_dice import LiarsDice
from datamodules.games.mixture_model import MixtureModelGame
from datamodules.games.negotiation import Negotiation
from datamodules.games.normal_form import NormalFormGame
from datamodules.games.open_spiel_games import OpenSpielGame
from datamodules.games.payoff_files import load_payoffs

__all__ = [
    "Goofspiel",
    "KuhnPoker",
    "LeducPoker",
    "LiarsDice",
    "MixtureModelGame",
    "Negotiation",
    "NormalFormGame",
    "OpenSpielGame",
    "battle_of_sexes",
    "blotto",
    "chicken",
    "disc",
    "elo",
    "elo_plus_noise",
    "load_payoffs",
    "prisoners_dilemma",
    "random_game_of_skill",
    "rock_paper_scissors",
    "transitive",
    "triangular",
]
