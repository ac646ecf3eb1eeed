"""The verbs that Lightning runs, their arguments, and the loggers and callbacks under every run.

Imported late, so that a mistake in the arguments costs no import of torch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.agreement import RankAgreement
from callbacks.checkpoint import AtomicCheckpointIO, RunCheckpoint
from callbacks.jsonl_logger import JsonlLogger
from callbacks.progress import StepProgressBar
from callbacks.rng import RankSeeds
from callbacks.run_record import RunRecord
from callbacks.summary import RunSummary
from callbacks.throughput import Throughput
from callbacks.warm_start import WarmStart
from train.arguments import class_parameters, experiment_name, merged_vars
from train.assuring import Assuring
from train.errors import ConfigError, known_keys, one_line
from train.folders import CONFIGS, checkpoint_step, choose_run_folder, resolve_checkpoint


class OneLineParser(LightningArgumentParser):
    """Turns parse errors into :class:`ConfigError` with the nearest valid key, without the usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = known_keys(getattr(ex, "subcommand_parser", None) or self)
        raise ConfigError(one_line(message, known, class_parameters)) from ex


class PlumblineTrainer(Assuring):
    """Lightning's Trainer with two more verbs; no default is changed behind the user's back."""

    def prepare(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Build the data (corpora, tokeniser, caches) that a config names, without training."""
        if datamodule is None:
            raise ValueError("prepare: the config names no datamodule, there is nothing to build")
        datamodule.prepare_data()


class PlumblineCLI(LightningCLI):
    """Runs the verb that ``sys.argv`` names.

    Attributes:
        run_folder: what this process writes into.
        resume_from: the checkpoint that ``--ckpt_path`` led to.
        exit_code: what the verb returned, if that is an int; else 0. Only global rank 0 keeps it: a launcher takes any
            other rank's code for a crash and kills the rest.

    Args:
        drivers: verbs outside this parser, which its help names.
    """

    run_folder: Path
    resume_from: Path | None = None
    exit_code: int = 0

    def __init__(self, drivers: Sequence[str] = ()) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        torch.set_float32_matmul_precision("high")  # TF32 on tensor cores; no effect on CPU
        more = {"epilog": f"Further verbs, each with --help: {', '.join(drivers)}"} if drivers else {}
        parsing = {"parser_mode": "omegaconf+", "allow_abbrev": False}
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=PlumblineTrainer,
            save_config_callback=RunRecord,
            seed_everything_default=1,
            parser_class=OneLineParser,
            parser_kwargs={
                **parsing,
                **more,
                "prog": "python -m train",
                **{
                    verb: {**parsing, "default_config_files": [str(CONFIGS / "base.yaml")]}
                    for verb in self.subcommands()
                },
            },
            auto_configure_optimizers=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with merged_vars(sys.argv[1:]) as arguments:
            self.config = parser.parse_args(arguments)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        own = {"prepare": {"model", "datamodule"}, "assure": {"model", "datamodule"}}
        return {**LightningCLI.subcommands(), **own}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the run's summary is the table
        if subcommand == "fit":
            parser.add_argument(
                "--warm_start",
                type=str | None,
                default=None,
                help="Checkpoint (or run folder) whose weights training starts from, everything else fresh.",
            )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--vars",
            type=dict[str, int | float | bool | str | None],
            default={},
            help="Values shared within the config, referenced as ${vars.name}.",
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder that holds all run folders.")
        parser.add_argument(
            "--experiment",
            type=str | None,
            default=None,
            help="Name of the run folder's parent; default: the first config file's name.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Throughput, "throughput")

    def _parse_ckpt_path(self) -> None:
        """Lightning would lay the checkpoint's hyperparameters over the config and over explicit flags: don't."""

    def before_instantiate_classes(self) -> None:
        verb = str(self.subcommand)
        config = self.config[verb]
        parent = Path(config.runs) / (config.experiment or experiment_name(verb))
        wanted = config.get("ckpt_path")
        if wanted:
            self.resume_from = resolve_checkpoint(parent, str(wanted))
            config.ckpt_path = str(self.resume_from)
        if config.get("warm_start"):
            config.warm_start = str(resolve_checkpoint(parent, str(config.warm_start), "--warm_start"))
        unnumbered = verb == "prepare" or bool(config.trainer.fast_dev_run)
        self.run_folder = choose_run_folder(parent, verb, self.resume_from, unnumbered)

    def _run_subcommand(self, subcommand: str) -> None:
        """Lightning drops what a verb returns; keep it if it is an exit code."""
        run = getattr(self, subcommand, None) or getattr(self.trainer, subcommand)

        def keep_code(**arguments: Any) -> None:
            code = run(**arguments)
            if isinstance(code, int) and self.trainer.is_global_zero:
                self.exit_code = code

        setattr(self, subcommand, keep_code)  # where Lightning looks first
        super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        if type(self.datamodule).state_dict is not LightningDataModule.state_dict:
            # Lightning looks for a position in the loader; ours is in the datamodule
            warnings.filterwarnings("ignore", message=r".*your dataloader is not resumable.*")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        resume_step = None
        if self.subcommand == "fit" and self.resume_from is not None:
            resume_step = checkpoint_step(self.resume_from)
        purge: dict[str, Any] = {} if resume_step is None else {"purge_step": resume_step}
        if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            kwargs["logger"] = [
                TensorBoardLogger(
                    save_dir=str(self.run_folder.parent.parent),
                    name=self.run_folder.parent.name,
                    version=self.run_folder.name,
                    default_hp_metric=False,
                    **purge,
                ),
                JsonlLogger(self.run_folder, resume_step),
            ]
        plugins = config.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        kwargs.setdefault("default_root_dir", config.get("default_root_dir") or str(self.run_folder))
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        seed = self.config[str(self.subcommand)].get("seed_everything")
        callbacks = [RankSeeds(int(seed)), RankAgreement(), RunSummary(), *callbacks]
        if warm := self.config[str(self.subcommand)].get("warm_start"):
            callbacks.append(WarmStart(warm))
        given = config.get("callbacks") or []
        if config.get("enable_progress_bar") is not False and not any(
            isinstance(callback, ProgressBar) for callback in (given if isinstance(given, list) else [given])
        ):
            callbacks.append(StepProgressBar())
        if self.subcommand != "fit":  # only fit writes checkpoints, so the reader lacks their callback on purpose
            warnings.filterwarnings("ignore", message=r".*callbacks used to create the checkpoint need to be.*")
        if config.get("fast_dev_run") or config.get("enable_checkpointing") is False or self.subcommand != "fit":
            callbacks = [callback for callback in callbacks if not isinstance(callback, RunCheckpoint)]
            if self.subcommand != "fit":
                config["enable_checkpointing"] = False
        return super()._instantiate_trainer(config, callbacks)
