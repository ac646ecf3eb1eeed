"""A linear or small neural classifier trained against an attack, on groups that differ."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import softplus

from modules.assurance.subject import Subject
from modules.objectives.adversarial import linear_worst_margin, pgd
from modules.objectives.shift import ShiftObjective, irm_slopes
from modules.planted.assurance import planted_subject


class PlantedClassifier(LightningModule):
    """Adversarial training (Madry et al. 2018, arXiv 1706.06083, eq. 2.1) of the logistic loss ``log(1 + exp(-y f))``.

    The inner maximum is PGD within the Linf ball of radius ``eps``, on the negative margin ``-y f``, which has the
    same worst case as the loss and keeps its gradient where the loss is flat; the outer minimum is a
    :class:`modules.objectives.shift.ShiftObjective` over the groups' mean losses. Data: see
    ``datamodules.planted_data.PlantedData``.

    Evaluation logs, under ``val/`` and ``test/``: ``clean_accuracy``, ``robust_accuracy`` (PGD within ``eval_eps``),
    ``loss`` (clean) and, of a linear model, ``exact_robust_accuracy``, the closed form. With several groups also each
    group's (``robust_accuracy/group_0``) and the least (``worst_group_robust_accuracy``).

    Args:
        features: of a sample; the data's.
        hidden: width of the hidden layer (ReLU); 0: a linear classifier.
        eps: Linf budget of training, in units of the features; 0: no attack.
        attack_steps: PGD steps in training.
        objective: over groups; ``null``: the mean.
        lr: of Adam.
        eval_eps: Linf budget of evaluation.
        eval_steps: PGD steps in evaluation.

    Raises:
        ValueError: a value out of range.
    """

    work_unit = "samples"

    def __init__(
        self,
        features: int = 20,
        hidden: int = 0,
        eps: float = 0.0,
        attack_steps: int = 5,
        objective: ShiftObjective | None = None,
        lr: float = 5e-3,
        eval_eps: float = 0.3,
        eval_steps: int = 40,
    ) -> None:
        super().__init__()
        for key, value, low in (
            ("features", features, 1), ("hidden", hidden, 0), ("attack_steps", attack_steps, 1),
            ("eval_steps", eval_steps, 1), ("eps", eps, 0.0), ("eval_eps", eval_eps, 0.0),
        ):  # fmt: skip
            if not low <= value < math.inf:
                raise ValueError(f"PlantedClassifier: {key} must be >= {low} and finite, got {value}")
        if not 0 < lr < math.inf:
            raise ValueError(f"PlantedClassifier: lr must be > 0 and finite, got {lr}")
        if isinstance(objective, dict):  # the hyperparameters of a checkpoint
            objective = ShiftObjective(**objective)
        self.objective = ShiftObjective() if objective is None else objective
        self.features, self.hidden, self.eps, self.attack_steps = features, hidden, eps, attack_steps
        self.lr, self.eval_eps, self.eval_steps = lr, eval_eps, eval_steps
        self.network = nn.Linear(features, 1)
        if hidden:
            self.network = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        # plain values only: checkpoints load with weights_only=True
        self.save_hyperparameters({
            "features": features, "hidden": hidden, "eps": eps, "attack_steps": attack_steps,
            "objective": self.objective.settings(), "lr": lr, "eval_eps": eval_eps, "eval_steps": eval_steps,
        })  # fmt: skip
        self._sums: Tensor | None = None

    def work_per_batch(self, batch: TensorDict) -> int:
        return len(batch)

    def setup(self, stage: str) -> None:
        """Raises: ValueError for data with another number of features or groups."""
        data: Any = getattr(self.trainer, "datamodule", None)
        found = {"features": getattr(data, "features", None), "groups": len(getattr(data, "groups", ()))}
        for key, want in (("features", self.features), ("objective.groups", self.objective.groups)):
            have = found[key.rsplit(".", 1)[-1]]
            if have and have != want:
                raise ValueError(f"PlantedClassifier: {key} is {want}, the data's is {have}: make them equal")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B]`` of label 1, of samples ``[B, features]``."""
        return self.network(x).squeeze(-1)

    def assurance_subject(self) -> Subject:
        """What assurance probes may ask of this classifier, on fresh samples of the run's data."""
        return planted_subject(self, self.trainer.datamodule)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=self.lr)

    # -------------------------------------------------------------------------------------------------------- training

    def attacked(self, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
        """The samples ``[B, features]`` of least margin ``y f`` that PGD finds, from ``x``."""
        return pgd(lambda moved: -y * self(moved), x, eps, steps=steps)

    def training_step(self, batch: TensorDict, batch_idx: int) -> Tensor:
        """Raises: FloatingPointError where the loss is not finite."""
        x, y, group = batch["x"], batch["y"], batch["group"]
        if self.eps > 0:
            x = self.attacked(x, y, self.eps, self.attack_steps)
        margin = y * self(x)
        counts = self._all_ranks(margin.new_zeros(self.objective.groups).index_add(0, group, torch.ones_like(margin)))

        def losses(scale: Tensor | None = None) -> Tensor:
            each = softplus(-margin if scale is None else -margin * scale[group])
            return margin.new_zeros(self.objective.groups).index_add(0, group, each) / counts

        found = self._over_ranks(losses())
        slopes = None
        if self.objective.needs_slopes:
            slopes = self._over_ranks(irm_slopes(losses, self.objective.groups, margin))
        loss = self.objective(found, slopes)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"PlantedClassifier: the loss is {loss.item()} at step {self.global_step + 1}; lower lr or eps"
            )
        self.log("train/loss", loss.detach())
        if self.objective.groups > 1:
            self.log_dict({f"train/loss/group_{number}": each for number, each in enumerate(found.detach())})
            if self.objective.kind == "dro":
                self.log_dict({f"train/q/group_{number}": each for number, each in enumerate(self.objective.q.float())})
        return loss

    def _all_ranks(self, values: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        if self.trainer.world_size == 1:
            return values.detach()
        return self.trainer.strategy.reduce(values.detach().clone(), reduce_op="sum")  # type: ignore[return-value]

    def _over_ranks(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, with the gradient of this rank's: the strategy averages gradients over ranks."""
        world = self.trainer.world_size
        return part if world == 1 else self._all_ranks(part) + world * (part - part.detach())

    # ------------------------------------------------------------------------------------------------------ evaluation

    def validation_step(self, batch: TensorDict, batch_idx: int) -> None:
        x, y = batch["x"], batch["y"]
        margin = y * self(x)
        worst = y * self(self.attacked(x, y, self.eval_eps, self.eval_steps))
        columns = [torch.ones_like(margin), softplus(-margin), margin > 0, worst > 0]
        if not self.hidden:
            columns.append(linear_worst_margin(margin, self.network.weight, self.eval_eps) > 0)  # type: ignore[arg-type]
        each = torch.stack([column.double() for column in columns], -1) * batch["weight"].double().unsqueeze(-1)
        sums = each.new_zeros(self.objective.groups, len(columns)).index_add(0, batch["group"], each)
        self._sums = sums if self._sums is None else self._sums + sums

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        if self._sums is None:
            return
        sums, self._sums = self._all_ranks(self._sums).cpu(), None
        names = ["loss", "clean_accuracy", "robust_accuracy"] + ["exact_robust_accuracy"] * (not self.hidden)
        total = sums.sum(0)
        found = dict(zip(names, (total[1:] / total[0]).tolist(), strict=True))
        if self.objective.groups > 1:
            by_group = sums[:, 1:] / sums[:, :1]
            for number, row in enumerate(by_group.tolist()):
                found |= {f"{name}/group_{number}": value for name, value in zip(names, row, strict=True)}
            found["worst_group_robust_accuracy"] = float(by_group[:, 2].min())
        self.log_dict({f"{stage}/{name}": value for name, value in found.items()}, sync_dist=True)  # equal on all ranks
