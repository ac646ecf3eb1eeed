"""Games as data: the game that a config names, and the episodes that a population module asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from torch.utils.data import DataLoader, Dataset

from datamodules.games.expand import expand
from datamodules.games.mixture_model import MixtureModelGame
from datamodules.games.normal_form import NormalFormGame
from datamodules.games.open_spiel_games import OpenSpielGame
from datamodules.games.play import PADDING, Policy, play
from datamodules.games.rules import Rules
from datamodules.games.sequence_form import SequenceFormGame
from datamodules.games.simulate import PolicyTables, TreeSimulator
from datamodules.games.symmetrized import SymmetrizedGame
from datamodules.games.tree import GameTree
from datamodules.rollout.loaders import evaluation_loader, training_loader
from modules.contracts import PlanGame, PlayRequest, RequestsPlay, RulesGame
from modules.seeds import global_seed, stream


class _Steps(Dataset):
    """One batch per step of an iteration, made when it is asked for: the policies that play are the newest.

    Which step it is the module knows, so that an epoch resumed in the middle takes what is left of it.
    """

    def __init__(self, data: GameDataModule, module: RequestsPlay) -> None:
        self.data, self.module = data, module

    def __len__(self) -> int:  # sized, or the loader would fetch one batch ahead, played by the policies before
        return self.module.steps_per_iteration

    def __getitem__(self, index: int) -> TensorDict:
        return self.data.batch(self.module.play_request())


class PlayedRules:
    """The :class:`~modules.contracts.RulesGame` of ``rules``."""

    def __init__(self, rules: Rules, symmetric: bool) -> None:
        self.name = rules.name
        self.num_players, self.num_actions = rules.num_players, rules.num_actions
        self.observation_size, self.max_moves = rules.observation_size, rules.max_moves
        self.zero_sum, self.symmetric = rules.zero_sum, symmetric

    def digest(self) -> Mapping[str, str]:
        extension = {"extension": "symmetric"} if self.symmetric else {}
        return {"game": self.name, "observation_size": str(self.observation_size), **extension}


def _padded(played: TensorDict, length: int) -> TensorDict:
    """``played`` with ``length`` moves."""
    for name, pad in zip(("observation", "legal", "action", "probability", "player"), PADDING, strict=True):
        value: torch.Tensor = played[name]
        shape = [len(value), length - value.shape[1], *value.shape[2:]]
        more = torch.full(shape, pad, dtype=value.dtype, device=value.device)
        played[name] = torch.cat([value, more], dim=1)
    return played


class GameDataModule(LightningDataModule):
    """Holds one game and plays it for the module in training.

    Extensive-form games are expanded into a tree and its sequence form once, in ``setup``; episodes are sampled on the
    tree by tensor gathers. Random streams depend on the run's seed, the step and the stream's number, and ranks share
    the streams out: any number of ranks plays the same episodes, and a resumed run the ones that it would have played.

    Args:
        game: rules of an extensive-form game, a normal-form or continuous game, or an OpenSpiel game.
        symmetrize: play a two-player zero-sum game from both seats with one population (its symmetric extension).
        max_nodes: largest game tree built.
        streams: independent random streams of a step's episodes; a multiple of the number of ranks.
        expand: build the tree; ``False``: play by the rules alone (``rules_game``), for modules that offer
            ``plays_rules``; ``game`` stays ``None``, and nothing about the game is known exactly.

    Raises:
        ValueError: a game tree larger than ``max_nodes``, ``streams`` that ranks cannot share equally, or a game or
            module that needs the tree, with ``expand: false``.
    """

    def __init__(
        self,
        game: Rules | NormalFormGame | MixtureModelGame | OpenSpielGame,
        symmetrize: bool = False,
        max_nodes: int = 5_000_000,
        streams: int = 4,
        expand: bool = True,
    ) -> None:
        super().__init__()
        if streams < 1:
            raise ValueError(f"GameDataModule: streams must be >= 1, got {streams}")
        if max_nodes < 2:
            raise ValueError(f"GameDataModule: max_nodes must be >= 2, got {max_nodes}")
        self.source = game
        self.symmetrize = symmetrize
        self.max_nodes = max_nodes
        self.streams = streams
        self.expand = expand
        self.rules: Rules | None = None
        self.rules_game: RulesGame | None = None
        self.game: PlanGame | None = None
        self.simulator: TreeSimulator | None = None

    def setup(self, stage: str) -> None:
        world = self.trainer.world_size if self.trainer is not None else 1
        if self.streams % world:
            raise ValueError(f"GameDataModule: streams must be a multiple of the {world} ranks, got {self.streams}")
        if not self.expand:
            self._setup_rules()
        if self.game is not None or self.rules is not None:
            return
        tree: GameTree | None = None
        game: PlanGame
        if isinstance(self.source, Rules):
            tree = expand(self.source, self.max_nodes)
        elif isinstance(self.source, OpenSpielGame):
            tree = self.source.tree(self.max_nodes)
        if tree is not None:
            game = SequenceFormGame(tree)
            self.simulator = TreeSimulator(tree)
        else:
            assert isinstance(self.source, NormalFormGame | MixtureModelGame)
            game = self.source
        if self.symmetrize and not game.symmetric:
            if not isinstance(game, SequenceFormGame):
                raise ValueError(
                    f"GameDataModule: symmetrize: only games in extensive form have seats, got {game.name}"
                )
            game = SymmetrizedGame(game)
        self.game = game

    def _setup_rules(self) -> None:
        module = self.trainer.lightning_module if self.trainer is not None else None
        if module is not None and not getattr(module, "plays_rules", False):
            raise ValueError(
                f"GameDataModule: expand: {type(module).__name__} needs the game tree, got expand: false: "
                "set expand: true, or use modules.psd_psro.SampledPSRO"
            )
        rules = self.source
        if not isinstance(rules, Rules):
            raise ValueError(
                f"GameDataModule: expand: only rules are played without a tree, got {type(rules).__name__}: set it true"
            )
        if self.symmetrize and (rules.num_players != 2 or not rules.zero_sum):
            raise ValueError(f"GameDataModule: symmetrize: needs two players and zero sum, got {rules.name}")
        self.rules, self.rules_game = rules, PlayedRules(rules, self.symmetrize)

    def digest(self) -> Mapping[str, str]:
        game = self.game or self.rules_game
        assert game is not None
        return {**game.digest(), "streams": str(self.streams)}

    def describe(self) -> Mapping[str, str]:
        return {
            "group": "[episodes] int64, group of the request",
            "returns": "[episodes, players] float64",
            "seats": "[episodes, players] int64, member per player",
            **(
                {"info_state": "[episodes, moves] int64, the mover's information state"}
                if self.expand
                else {
                    "observation": "[episodes, moves, features] float32, the mover's",
                    "legal": "[episodes, moves, actions] bool",
                }
            ),
            "action": "[episodes, moves] int64",
            "player": "[episodes, moves] int64, -1 past the end",
            "probability": "[episodes, moves] float32, of the action taken",
        }

    # an exact position would be empty: streams are functions of the step, and the step is the module's
    def state_dict(self) -> dict[str, Any]:
        return {"streams": self.streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["streams"] != self.streams:
            raise ValueError(
                f"GameDataModule: the checkpoint was written with streams: {state_dict['streams']}, the config has "
                f"{self.streams}: other episodes would be played; keep them equal"
            )

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        module = trainer.lightning_module
        if not isinstance(module, RequestsPlay):
            raise ValueError(
                f"GameDataModule: {type(module).__name__} is no population module: it asks for no episodes"
            )
        return training_loader(_Steps(self, module))

    def test_dataloader(self) -> DataLoader:
        return evaluation_loader([TensorDict({}, [0])])  # pyright: ignore[reportArgumentType]

    def batch(self, request: PlayRequest | None) -> TensorDict:
        """This rank's share of the episodes asked for; empty for ``None``.

        Raises:
            ValueError: episodes that the streams cannot share equally, or a game that is not played on a tree.
        """
        if request is None:
            return TensorDict({}, [0])
        if request.policy is not None and self.rules is None:
            raise ValueError("GameDataModule: expand: a policy plays by the rules, got a game tree: set expand: false")
        if request.policy is None and self.simulator is None:
            raise ValueError(f"GameDataModule: {self.source} has no game tree: use exact evaluation and responses")
        if request.episodes % self.streams:
            raise ValueError(
                f"GameDataModule: episodes per step must be a multiple of streams ({self.streams}), "
                f"got {request.episodes}"
            )
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        tables = self.simulator.prepare(request.tables) if self.simulator is not None else None
        played = [self._play(tables, request, number) for number in range(rank, self.streams, world)]
        if self.rules is not None and not request.returns_only:  # ranks that gather episodes need one shape
            length = self.rules.max_moves if world > 1 else max(one["player"].shape[1] for one in played)
            played = [_padded(one, length) for one in played]
        return TensorDict.cat(played)  # pyright: ignore[reportReturnType]

    def play_games(self, policy: Policy, seats: torch.Tensor, seed: int) -> TensorDict:
        """Games played by the rules apart from training; see :class:`modules.contracts.PlaysGames`.

        Raises:
            ValueError: a game on a tree (``expand: true``), or a policy that gives no distributions.
        """
        if self.rules is None:
            raise ValueError("GameDataModule: play_games: plays by the rules alone: set expand: false")
        return play(self.rules, policy, seats, stream(seed, device=seats.device))

    def _play(self, tables: PolicyTables | None, request: PlayRequest, number: int) -> TensorDict:
        device = self.simulator.device if self.simulator is not None else request.weights[0].device
        generator = stream(global_seed(), *request.key, number, device=device)
        count = request.episodes // self.streams
        groups = request.weights[0].shape[0]
        seats = torch.stack(
            [torch.multinomial(weights, count, replacement=True, generator=generator) for weights in request.weights],
            -1,
        ).flatten(0, 1)  # [groups * episodes, players]
        if self.simulator is None or tables is None:
            assert self.rules is not None
            assert request.policy is not None
            played = play(self.rules, request.policy, seats, generator)
            played = played.select("returns", "seats") if request.returns_only else played
        elif request.returns_only:
            returns = self.simulator.play(tables, seats, generator, returns_only=True)
            played = TensorDict({"returns": returns, "seats": seats}, [len(seats)])
        else:
            played = self.simulator.play(tables, seats, generator)
        played["group"] = torch.arange(groups, device=seats.device).repeat_interleave(count)
        played["stream"] = torch.full_like(played["group"], number)
        return played
