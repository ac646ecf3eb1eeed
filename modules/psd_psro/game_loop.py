"""What the population loop adds on a game, be it known exactly or by play alone: seats, sampled cells, figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import PlanGame, RulesGame
from modules.population.loop import ResponseOracleLoop
from modules.population.members import Members
from modules.population.payoff_table import PayoffTable


class GameLoop(ResponseOracleLoop):
    """Base of the modules of this folder. ``game`` is found at set-up.

    Attributes:
        simulations: games per payoff cell, if cells are sampled.
    """

    summary_metrics: ClassVar[tuple[str, ...]] = ()
    simulations: int
    _evaluation_steps: int

    def __init__(self) -> None:
        super().__init__()
        self.game: Any = None
        self._warm: Mapping[str, Any] | None = None

    @property
    def the_game(self) -> PlanGame | RulesGame:
        if self.game is None:
            raise RuntimeError(f"{type(self).__name__}: no game yet: it comes from the datamodule at setup")
        return self.game

    @property
    def symmetric(self) -> bool:
        """Whether one population plays both seats."""
        return self.the_game.symmetric

    @property
    def populations(self) -> int:
        return 1 if self.symmetric else self.the_game.num_players

    @property
    def evaluation_steps(self) -> int:
        return self._evaluation_steps

    def _per_player(self, by_population: list[Tensor]) -> list[Tensor]:
        return by_population * 2 if self.symmetric else by_population

    # -- starting from another run's population ------------------------------------------------------------------------
    def warm_start(self, checkpoint: dict[str, Any]) -> None:
        """Go on from another run's members and payoffs; iterations, frames, schedules and schemes start anew.

        Raises:
            ValueError: a checkpoint of another kind of module or game.
        """
        name, state = type(self).__name__, checkpoint.get("population")
        if state is None or "digest" not in state:
            raise ValueError(f"{name}: the checkpoint holds no population: name one that this module has trained")
        for field, mine in self.game_digest().items():
            if (theirs := state["digest"].get(field)) != mine:
                raise ValueError(f"{name}: its population plays {field} {theirs}, this run {mine}: make them equal")
        self._warm = state

    def _take_over(self) -> bool:
        """Whether members, payoffs and meta-strategies now are those of :meth:`warm_start`."""
        if self._warm is None:
            return False
        state, self._warm = self._warm, None
        self.members = []
        for saved in state["members"]:
            members = Members()
            members.load_state_dict(saved)
            self.members.append(members)
        self.payoff_table = PayoffTable.from_state_dict(state["payoff_table"])
        self.meta_strategies = []
        for members, sigma in zip(self.members, state["meta_strategies"], strict=True):
            unsolved = len(members) - len(sigma)  # members that joined after the last solution
            self.meta_strategies.append(torch.cat([sigma.double(), sigma.new_zeros(unsolved).double()]))
        return True

    # -- sampled payoff cells -----------------------------------------------------------------------------------------
    def cell_weights(self) -> tuple[list[Tensor], int]:
        """Who plays to estimate the missing cells: per player ``[groups, members]``, and the episodes of each group."""
        assert self.payoff_table is not None
        cells, weights = self.payoff_table.missing(self.simulations), []
        for player, members in enumerate(self.members * 2 if self.symmetric else self.members):
            chosen = cells[:, player] if len(cells) else torch.zeros(1, dtype=torch.int64)
            weights.append(torch.nn.functional.one_hot(chosen, len(members)).double())
        episodes = self.simulations // self.evaluation_steps
        if self.symmetric:  # each seating of a pair half of the games
            weights = [torch.cat([a, b]) for a, b in zip(weights, weights[::-1], strict=True)]
            episodes //= 2
        return weights, episodes

    def add_games(self, batch: TensorDict) -> None:
        """Put the games of :meth:`cell_weights` into the payoff table."""
        assert self.payoff_table is not None
        cells = self.payoff_table.missing(self.simulations)
        if len(cells):
            group = batch["group"].cpu()
            seating, cell = group // len(cells), group % len(cells)
            played = torch.where((seating == 1).unsqueeze(-1), cells[cell].flip(-1), cells[cell])
            self.payoff_table.add(played, batch["returns"], reduce=self.all_sum)
            self.episodes += len(cells) * (self.simulations // self.evaluation_steps)

    # -- figures ------------------------------------------------------------------------------------------------------
    def meta_figures(self) -> dict[str, float]:
        """Of the meta-strategies, averaged over populations."""
        mixtures, count = self.meta_strategies, self.populations
        return {
            "meta/entropy": sum(float(-torch.special.xlogy(s, s).sum()) for s in mixtures) / count,
            "meta/support": sum(float((s > 1e-6).sum()) for s in mixtures) / count,
            "meta/members": sum(len(members) for members in self.members) / count,
        }

    def largest_error(self) -> dict[str, float]:
        """The largest standard error of a payoff cell."""
        assert self.payoff_table is not None
        error = self.payoff_table.standard_error()
        return {"meta/standard_error": float(error[error.isfinite()].max())}

    def final_figures(self) -> dict[str, float]:
        """What the test verb reports."""
        raise NotImplementedError

    def test_step(self, batch: Any, batch_idx: int) -> None:
        if self.payoff_table is None:
            raise ValueError(f"{type(self).__name__}: test needs a trained population: give --ckpt_path")
        found = {f"test/{key.removeprefix('meta/')}": value for key, value in self.final_figures().items()}
        self.log_dict(found, batch_size=1)

    def summary_rows(self) -> Mapping[str, str]:
        rows = {}
        for key in self.summary_metrics:
            if points := self.history.get(key):
                rows[key] = f"{points[0][2]:.6g} -> {points[-1][2]:.6g}"
        return rows
