"""The verb ``assure``: measure a trained module, judge it, write the signed report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from callbacks.assurance import log_report, ranks_of, subject_of
from callbacks.checkpoint import MANIFEST_KEY, AtomicCheckpointIO
from modules.assurance.subject import AssuranceError, Subject, mapping_digest
from modules.assurance.suites import SuiteResult, SuiteSettings, run_suite
from modules.assurance.verdict import EXIT_CODES, Limit


class Assuring(Trainer):
    """A Trainer with the verb ``assure``."""

    _assurance: SuiteRun | None = None

    def assure(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        suite: str = "rice",
        probes: list[str] | None = None,
        limits: list[Limit] | None = None,
        n0: int | None = None,
        n_max: int | None = None,
        alpha: float = 0.05,
        anchor_share: float = 0.2,
        root_seed: int = 20231030,
        round: int = 0,
        effort: dict[str, int] | None = None,
        siblings: list[str] | None = None,
        objectives: str | None = None,
        parent: str = "",
        out: str | None = None,
    ) -> int:
        """Measure Robustness, Interpretability, Controllability and Ethicality of a trained module; write a report.

        Exit code 0: all gates pass (or none is set); 3: a gate fails; 4: a gate stays uncertain at ``n_max`` units.

        Args:
            model: the module.
            datamodule: its data.
            ckpt_path: the checkpoint to measure; none: the module as the config builds it.
            suite: ``quick`` (seconds), ``rice`` (the default), ``deep`` or ``custom`` (the probes named).
            probes: names of probes, for ``custom``.
            limits: gates and watches.
            n0: units (episodes, prompts, instances) of the first look.
            n_max: no figure takes more units.
            alpha: level of intervals and of the verdict.
            anchor_share: anchor units per unit of all.
            root_seed: of all units; not that of training.
            round: of the cycle, from which fresh units are drawn.
            effort: ``attack_steps``, ``restarts`` in place of the suite's.
            siblings: report folders of runs with other training seeds, for ``r.seed``.
            objectives: the objectives layer that this round was trained with, for the report.
            parent: sha256 of the last round's report.
            out: the report's folder; default: the run's.
        """
        settings = SuiteSettings(
            suite, tuple(probes or ()), n0, n_max, alpha, anchor_share, root_seed, round, dict(effort or {})
        )
        self._assurance = SuiteRun(
            settings, tuple(limits or ()), tuple(siblings or ()), objectives, parent, out, ckpt_path
        )
        try:
            code = self.test(model, ckpt_path=ckpt_path, verbose=False, datamodule=datamodule)
        finally:
            self._assurance = None
        assert isinstance(code, int)
        return code

    def _run_stage(self) -> object:
        """The suite in place of a loop: by now data, weights and ranks stand as they do for ``test``."""
        if self._assurance is None:
            return super()._run_stage()
        self.strategy.barrier("run-stage")
        return self._assurance(self)


class SuiteRun:
    """One suite on a trainer's module, and its report.

    Args:
        settings, limits: what is measured and demanded.
        siblings: report folders of other training seeds.
        objectives: a YAML layer, or none.
        parent: sha256 of the last round's report.
        out: the report's folder; default: the trainer's.
        checkpoint: the file that is measured, or none.
    """

    def __init__(
        self,
        settings: SuiteSettings,
        limits: tuple[Limit, ...],
        siblings: tuple[str, ...],
        objectives: str | None,
        parent: str,
        out: str | None,
        checkpoint: str | None,
    ) -> None:
        self.settings, self.limits, self.siblings = settings, limits, siblings
        self.objectives, self.parent, self.out, self.checkpoint = objectives, parent, out, checkpoint

    def __call__(self, trainer: Assuring) -> int:
        from modules.assurance.report import write
        from modules.assurance.signature import CARD

        subject = self._with_siblings(subject_of(trainer.lightning_module))
        result = run_suite(subject, self.settings, self.limits, ranks_of(trainer))
        if trainer.is_global_zero:
            folder = Path(self.out or trainer.default_root_dir)
            layer = Path(self.objectives).read_text("utf-8") if self.objectives else None
            lineage = {"checkpoint_digest": checkpoint_digest(self.checkpoint)} if self.checkpoint else {}
            report = write(folder, result, objectives=layer, parent=self.parent, lineage=lineage)
            log_report(trainer, report, (folder / CARD).read_text("utf-8"), self.settings.round)
            print("\n".join(lines(result)) + f"\nreport: {folder / 'report.html'}", flush=True)
        return EXIT_CODES[result.verdict]

    def _with_siblings(self, subject: Subject) -> Subject:
        if not self.siblings:
            return subject
        from modules.assurance.report import read, usefulness

        values = [usefulness(read(Path(folder))) for folder in self.siblings]
        if missing := [folder for folder, value in zip(self.siblings, values, strict=True) if value is None]:
            raise AssuranceError(f"siblings: {missing[0]} holds no usefulness figure: assure it with one that does")
        return replace(subject, capabilities={**subject.capabilities, "seed_values": lambda: values})


_VOLATILE = {
    MANIFEST_KEY,  # files of ranks: random states, environments, replay
    "callbacks",
    "hyper_parameters",
    "loops",
    "lr_schedulers",
    "optimizer_states",
    "pytorch-lightning_version",
}


def checkpoint_digest(path: str | Path) -> str:
    """Digest of what was learnt: a checkpoint's content without trainer state (timings, loops, optimisers)."""
    content = AtomicCheckpointIO().load_checkpoint(path)
    learnt = {
        name: value
        for name, value in content.items()
        if name not in _VOLATILE and not name.startswith(("hparams", "datamodule"))
    }
    return mapping_digest(learnt)


def lines(result: SuiteResult) -> list[str]:
    """The figures as a plain table, the gates first."""
    judged = {one.limit.figure: one for one in result.judgements}
    rows = []
    for (name, split), figure in result.figures.items():
        if split != "fresh":
            continue
        if figure.status == "not_applicable" and name not in judged:
            continue
        if not figure.measured:
            rows.append((name, "-", "", f"{figure.status.replace('_', ' ')}: {figure.reason}"))
            continue
        limit = ""
        if name in judged:
            one = judged[name]
            limit = f"{one.limit.kind} {'>=' if figure.direction == 'up' else '<='} {one.limit.tau:g}: {one.ruling}"
        rows.append((name, f"{figure.value:.4g}", f"[{figure.low:.4g}, {figure.high:.4g}] n={figure.n}", limit))
    elsewhere = sum(one.status == "not_applicable" for one in result.figures.values())
    rows.sort(key=lambda row: (row[0] not in judged, row[1] == "-", "ruice".index(row[0][0]), row[0]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[3]] for row in rows)
    rest = [f"{elsewhere} figures do not apply to the {result.subject.family} family"] if elsewhere else []
    return [*("  ".join(cells).rstrip() for cells in padded), *rest, f"verdict: {result.verdict}"]
