"""The response-oracle loop (Lanctot et al. 2017, algorithm 1) as a LightningModule: respond, evaluate, solve.

A Lightning epoch is one iteration and a training step is one unit of its work. All state advances inside the training
step, so that a checkpoint taken after any step resumes there exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.population.members import Members
from modules.population.payoff_table import PayoffTable
from modules.population.ranks import RankModule


class Clock(torch.optim.Optimizer):
    """Steps once per training step and changes nothing: it makes Lightning's ``global_step`` count work done.

    Responses own their optimisers, several or none, and Lightning counts the steps of all that it knows of.
    """

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        super().__init__([parameter], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return closure() if closure is not None else None


class ResponseOracleLoop(RankModule):
    """Grows populations by responding to the meta-game's solution. Subclasses say what a response is.

    One iteration is ``response_steps`` calls of :meth:`response_step`, then ``evaluation_steps`` calls of
    :meth:`evaluation_step`, then :meth:`solve`; every rank takes the same number of steps.

    Attributes:
        members: one growing store per population.
        payoff_table: estimated payoffs of all profiles.
        meta_strategies: per population ``[members]`` float64, the meta-game's solution.
        iteration: iterations completed.
        cursor: steps completed in the current iteration.
        frames: moves played to train responses, by all ranks, chance not counted.
        episodes: episodes played by all ranks, those that estimate payoffs included.
        history: metric -> list of (iteration, frames, value).
    """

    work_unit = "frames"

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.clock = torch.nn.Parameter(torch.zeros(()))
        self.members: list[Members] = []
        self.payoff_table: PayoffTable | None = None
        self.meta_strategies: list[Tensor] = []
        self.iteration = 0
        self.cursor = 0
        self.frames = 0
        self.episodes = 0
        self.history: dict[str, list[list[float]]] = {}
        self._latest: dict[str, float] = {}  # metrics of this iteration's last response step
        self._restored = False

    # -- what a method adds -------------------------------------------------------------------------------------------
    @property
    def response_steps(self) -> int:
        raise NotImplementedError

    @property
    def evaluation_steps(self) -> int:
        return 1

    def initialise(self) -> None:
        """Make the first members, the payoff table and the first meta-strategies (a run that starts afresh)."""
        raise NotImplementedError

    def begin_iteration(self) -> None:
        """Choose learners and opponents from the meta-strategies."""

    def response_step(self, batch: Any, step: int) -> Mapping[str, Any]:
        """One update of all responses in training; returns metrics."""
        raise NotImplementedError

    def end_response(self) -> None:
        """Freeze the responses into the populations."""

    def evaluation_step(self, batch: Any, step: int) -> Mapping[str, Any]:
        """One share of the missing payoff cells; returns metrics."""
        raise NotImplementedError

    def solve(self) -> Mapping[str, float]:
        """Solve the meta-game, replace :attr:`meta_strategies`, and return the iteration's metrics."""
        raise NotImplementedError

    def method_state(self) -> dict[str, Any]:
        """What else a checkpoint needs: learners in training, their optimisers, schemes."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Put back :meth:`method_state`."""

    # -- the loop -----------------------------------------------------------------------------------------------------
    @property
    def steps_per_iteration(self) -> int:
        """Batches that a datamodule yields per epoch."""
        return self.response_steps + self.evaluation_steps

    @property
    def responding(self) -> bool:
        """Whether the next step trains responses (else it estimates payoffs)."""
        return self.cursor < self.response_steps

    def configure_optimizers(self) -> Clock:
        return Clock(self.clock)

    def on_train_start(self) -> None:
        if not self._restored:
            self.initialise()
            self.begin_iteration()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.responding:
            metrics = dict(self.response_step(batch, self.cursor))
            if self.cursor + 1 == self.response_steps:
                self.end_response()
        else:
            metrics = dict(self.evaluation_step(batch, self.cursor - self.response_steps))
        self.cursor += 1
        if metrics:
            self._latest = {key: float(value) for key, value in metrics.items()}
        if self._latest:  # again while payoffs are estimated: a run resumed there logs the same rows
            self.log_dict({key: torch.tensor(value, dtype=torch.float32) for key, value in self._latest.items()})
        if self.cursor == self.steps_per_iteration:
            self._finish_iteration()
        self.optimizers().step()  # pyright: ignore[reportAttributeAccessIssue]

    def _finish_iteration(self) -> None:
        metrics = {key: float(value) for key, value in self.solve().items()}
        self.iteration += 1
        self.cursor = 0
        self._latest = {}
        for key, value in metrics.items():
            self.history.setdefault(key, []).append([float(self.iteration), float(self.frames), value])
        self.log_dict(metrics, logger=False)  # for callbacks; loggers get every iteration, see below
        counts = {"iteration": self.iteration, "frames": self.frames, "episodes": self.episodes}
        row = {**metrics, **{key: float(value) for key, value in counts.items()}}
        for logger in self.loggers:
            logger.log_metrics(row, step=self.trainer.global_step)  # whatever log_every_n_steps is
        self.begin_iteration()

    def check_shares(self, seats: int, **episodes: int) -> None:
        """Whether the datamodule's random streams can share out each of ``episodes`` over so many seats.

        Raises:
            ValueError: naming the setting.
        """
        share = int(getattr(getattr(self.trainer, "datamodule", None), "streams", 1)) * seats
        for field, count in episodes.items():
            if count % share:
                both = f" times the {seats} seats" if seats > 1 else ""
                raise ValueError(
                    f"{type(self).__name__}: {field} must be a multiple of {share}, the datamodule's streams{both}, "
                    f"got {count}"
                )

    # -- ranks --------------------------------------------------------------------------------------------------------
    def gather_episodes(self, batch: TensorDict) -> TensorDict:
        """The episodes of all ranks, ordered by random stream: the same on any number of ranks."""
        batch = self.gather(batch)
        return batch[batch["stream"].argsort(stable=True)]

    def check_agreement(self) -> None:
        """Stop if ranks' payoff tables have come apart.

        Raises:
            RuntimeError: naming the rank.
        """
        if self.trainer.world_size == 1 or self.payoff_table is None:
            return
        digests: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(digests, self.payoff_table.digest())
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise RuntimeError(
                    f"{type(self).__name__}: payoff table of rank {rank} differs from rank 0's in iteration "
                    f"{self.iteration}: resume from the last checkpoint"
                )

    # -- state --------------------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.payoff_table is None:
            return
        checkpoint["population"] = {
            "members": [members.state_dict() for members in self.members],
            "payoff_table": self.payoff_table.state_dict(),
            "meta_strategies": [sigma.clone() for sigma in self.meta_strategies],
            "iteration": self.iteration,
            "cursor": self.cursor,
            "frames": self.frames,
            "episodes": self.episodes,
            "history": {key: [list(point) for point in points] for key, points in self.history.items()},
            "latest": dict(self._latest),
            "steps": [self.response_steps, self.evaluation_steps],
            "digest": dict(self.game_digest()),
            "method": self.method_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("population")
        if state is None:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint holds no population: it was written by another kind of module"
            )
        self.check_digest(state["digest"])
        self.check_steps(state["steps"])
        self.members = [Members() for _ in state["members"]]
        for members, saved in zip(self.members, state["members"], strict=True):
            members.load_state_dict(saved)
        self.payoff_table = PayoffTable.from_state_dict(state["payoff_table"])
        self.meta_strategies = [sigma.to(torch.float64) for sigma in state["meta_strategies"]]
        for key in ("iteration", "cursor", "frames", "episodes"):
            setattr(self, key, int(state[key]))
        self.history = {key: [list(point) for point in points] for key, points in state["history"].items()}
        self._latest = dict(state["latest"])
        self.load_method_state(state["method"])
        self._restored = True

    def check_digest(self, saved: Mapping[str, str]) -> None:
        """Refuse a checkpoint that was written for another game."""
        for field, mine in self.game_digest().items():
            theirs = saved.get(field)
            if theirs != mine:
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint was written for {field} {theirs}, the config names {mine}: "
                    "resume with the run's own config"
                )

    def check_steps(self, saved: list[int]) -> None:
        """Refuse a checkpoint whose iterations have other numbers of response and evaluation steps.

        Lightning counts batches of the old length. A subclass whose iterations differ in length overrides this.
        """
        if saved != [self.response_steps, self.evaluation_steps]:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint's iterations have {saved} response and evaluation "
                f"steps, the config has {[self.response_steps, self.evaluation_steps]}: keep them equal"
            )

    def digest(self) -> Mapping[str, str]:
        """What must be the same on all ranks and in a resumed run."""
        return {}

    def game_digest(self) -> Mapping[str, str]:
        """What a checkpoint must have been written for to be resumed here: the part of :meth:`digest` that stays."""
        return self.digest()

    def population_report(self) -> Mapping[str, Any]:
        """What the population callbacks draw and write."""
        assert self.payoff_table is not None
        return {
            "iteration": self.iteration,
            "payoffs": self.payoff_table.mean(),
            "meta_strategies": list(self.meta_strategies),
            "history": self.history,
        }

    def work_per_batch(self, batch: Any) -> int:
        """Moves of this rank's episodes in ``batch``."""
        moves = batch.get("player", None) if hasattr(batch, "get") else None
        return 0 if moves is None else int((moves >= 0).sum())
