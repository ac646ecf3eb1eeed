"""``python -m train``: parser settings, verbs, run folders, one-line errors and exit codes; nothing else."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent
if sys.path[:1] != [str(ROOT)]:
    sys.path.insert(0, str(ROOT))  # `-m` puts the working folder first; ours must win over a stranger's modules/

# Waiting threads sleep instead of spinning, unless told otherwise: on two cores of which another program takes one,
# training ran at 3,500 tokens per second this way and at 800 with the default. Must stand before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CONFIGS = ROOT / "configs"
RUN_FOLDER_VARIABLE = "PLUMBLINE_RUN_FOLDER"  # tells ranks that Lightning spawns which folder rank 0 claimed
EXIT_ERROR, EXIT_CONFIG, EXIT_INTERRUPT = 1, 2, 130
PACKAGES = ("modules", "datamodules", "callbacks")


class ConfigError(Exception):
    """A command line or config file that does not parse; the message is one line."""


def _guard_packages() -> None:
    import importlib.util

    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        origin = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if origin != ROOT / package:
            raise ConfigError(
                f"package '{package}' was found at {origin}, not beside {ROOT / 'train.py'}: another distribution or "
                f"folder of that name shadows it; rename it or run from another folder"
            )


def _quieten() -> None:
    for message in (
        r".*torch\.jit\.script_method.* is deprecated.*",
        r".*isinstance\(treespec, LeafSpec\).* is deprecated.*",
        r".*WeightUpdaterBase is deprecated.*",
        r".*`torch\.distributed\.nn\.functional\.all_gather` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # the number of loader workers is a deliberate choice: a memory-mapped slice takes microseconds
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers.*")
    tips = logging.Filter()
    tips.filter = lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.logger_connector"):
        logging.getLogger(name).addFilter(tips)


def _expand_config_names(argv: list[str]) -> list[str]:
    """Let ``-c llemma/laptop`` mean ``<plumbline>/configs/llemma/laptop.yaml`` where no such file exists."""
    expanded = list(argv)
    for index, token in enumerate(argv):
        flag, sep, value = token.partition("=")
        if flag in ("-c", "--config") and sep:
            expanded[index] = f"{flag}={_find_config(value)}"
        elif flag in ("-c", "--config") and index + 1 < len(argv):
            expanded[index + 1] = _find_config(argv[index + 1])
    return expanded


def _find_config(name: str) -> str:
    if Path(name).is_file():
        return name
    for candidate in (CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if candidate.is_file():
            return str(candidate)
    known = [str(path.relative_to(CONFIGS).with_suffix("")) for path in sorted(CONFIGS.rglob("*.yaml"))]
    near = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=3, cutoff=0.4)
    hint = f"; nearest shipped configs: {', '.join(near)}" if near else f"; shipped configs: {', '.join(known)}"
    raise ConfigError(f"config file '{name}' not found{hint}")


def _build_cli() -> type:
    """Define the CLI classes late, so that argument mistakes above cost no import of torch."""
    import torch
    from jsonargparse import set_parsing_settings
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities import rank_zero_only

    from callbacks.agreement import RankAgreement
    from callbacks.checkpoint import AtomicCheckpointIO, CheckpointError, RunCheckpoint, newest_whole_checkpoint
    from callbacks.jsonl_logger import JsonlLogger
    from callbacks.progress import StepProgressBar
    from callbacks.rng import RankSeeds
    from callbacks.run_record import RunRecord
    from callbacks.summary import RunSummary
    from callbacks.throughput import Throughput

    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)

    class OneLineParser(LightningArgumentParser):
        """Turns parse errors into :class:`ConfigError` with the nearest valid key, without the usage text."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(_one_line(message, _known_keys(getattr(ex, "subcommand_parser", None) or self))) from ex

    class PlumblineTrainer(Trainer):
        """Lightning's Trainer with one more verb; no default is changed behind the user's back."""

        def prepare(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
            """Build the data (corpora, tokeniser, caches) that a config names, without training."""
            if datamodule is None:
                raise ValueError("prepare: the config names no datamodule, there is nothing to build")
            datamodule.prepare_data()

    class PlumblineCLI(LightningCLI):
        run_folder: Path
        resume_from: Path | None = None

        def __init__(self) -> None:
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
                    "prog": "python -m train",
                    **{
                        verb: {**parsing, "default_config_files": [str(CONFIGS / "base.yaml")]}
                        for verb in self.subcommands()
                    },
                },
                auto_configure_optimizers=False,
            )

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            with _merged_vars(sys.argv[1:]) as arguments:
                self.config = parser.parse_args(arguments)

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {**LightningCLI.subcommands(), "prepare": {"model", "datamodule"}}

        def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
            if subcommand in ("validate", "test"):
                parser.set_defaults({"verbose": False})  # the run's summary is the table
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
            parent = Path(config.runs) / (config.experiment or _experiment_name(verb))
            wanted = config.get("ckpt_path")
            if wanted:
                self.resume_from = self._resolve_checkpoint(parent, str(wanted))
                config.ckpt_path = str(self.resume_from)
            source = self.resume_from.parent.parent if verb == "fit" and self.resume_from else None
            if source is not None and source.parent == parent.resolve():
                self.run_folder = parent / source.name  # the run goes on in its own folder
            elif RUN_FOLDER_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
                self.run_folder = Path(os.environ[RUN_FOLDER_VARIABLE])
            elif verb == "prepare" or config.trainer.fast_dev_run:
                self.run_folder = parent / verb
            elif rank_zero_only.rank in (0, None):
                self.run_folder = _claim_folder(parent, "run" if verb == "fit" else verb)
                os.environ[RUN_FOLDER_VARIABLE] = str(self.run_folder)
            else:
                self.run_folder = parent / f"rank-{rank_zero_only.rank}"  # never written: loggers live on rank 0

        @staticmethod
        def _resolve_checkpoint(parent: Path, wanted: str) -> Path:
            if wanted not in ("last", "best"):
                path = Path(wanted)
                if path.is_dir():
                    path = newest_whole_checkpoint(path if path.name == "checkpoints" else path / "checkpoints") or path
                if not path.is_file():
                    raise CheckpointError(f"--ckpt_path {wanted}: no such checkpoint file")
                return path.resolve()
            folders = sorted(parent.glob("run-*/checkpoints"), key=lambda f: int(f.parent.name.split("-")[1]))
            for folder in reversed(folders):
                found = folder / "best.ckpt" if wanted == "best" else newest_whole_checkpoint(folder)
                if found is not None and found.exists():
                    return found.resolve()
            raise CheckpointError(
                f"--ckpt_path {wanted}: no whole checkpoint under {parent}/run-*/checkpoints; start without --ckpt_path"
            )

        def before_fit(self) -> None:
            if type(self.datamodule).state_dict is not LightningDataModule.state_dict:
                # Lightning looks for a position in the loader; ours is in the datamodule
                warnings.filterwarnings("ignore", message=r".*your dataloader is not resumable.*")

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            config = self._get(self.config_init, "trainer")
            resume_step = None
            if self.subcommand == "fit" and self.resume_from is not None:
                resume_step = _checkpoint_step(self.resume_from)
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

    torch.set_float32_matmul_precision("high")  # TF32 on tensor cores; no effect on CPU
    return PlumblineCLI


def _config_files(argv: list[str]) -> list[Path]:
    """The files given with ``-c``, in order."""
    found = [token.partition("=")[2] for token in argv if re.match(r"(-c|--config)=", token)]
    found += [argv[i + 1] for i, token in enumerate(argv[:-1]) if token in ("-c", "--config")]
    return [Path(name) for name in found]


@contextlib.contextmanager
def _merged_vars(argv: list[str]) -> Iterator[list[str]]:
    """Arguments with one more ``-c`` file behind the last, holding the ``vars`` of all layers merged.

    The parser merges what it knows the keys of; of a free dictionary the last layer would be all that is left.
    """
    import yaml

    merged: dict[str, Any] = {}
    layers = 0
    for path in _config_files(argv):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the parser names what is wrong with the file
        if isinstance(content, dict) and isinstance(content.get("vars"), dict):
            merged.update(content["vars"])
            layers += 1
    if layers < 2:
        yield argv
        return
    last = max(
        i + (token in ("-c", "--config")) for i, token in enumerate(argv) if re.match(r"(-c|--config)(=|$)", token)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vars.yaml"
        path.write_text(yaml.safe_dump({"vars": merged}), encoding="utf-8")
        yield [*argv[: last + 1], "-c", str(path), *argv[last + 1 :]]


def _experiment_name(subcommand: str) -> str:
    paths = _config_files(sys.argv[1:])
    if not paths:
        return subcommand
    first = paths[0]
    if CONFIGS in first.resolve().parents:
        return "-".join(first.resolve().relative_to(CONFIGS).with_suffix("").parts)
    return first.stem


def _claim_folder(parent: Path, prefix: str) -> Path:
    """Make ``<parent>/<prefix>-<n>`` with the next free number; ``mkdir`` decides between concurrent starts."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(m.group(1)) for p in parent.iterdir() if (m := re.fullmatch(rf"{prefix}-(\d+)", p.name))]
    number = max(taken, default=0) + 1
    while True:
        folder = parent / f"{prefix}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return folder


def _checkpoint_step(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
    if match:
        return int(match.group(1))
    from callbacks.checkpoint import AtomicCheckpointIO

    return int(AtomicCheckpointIO().load_checkpoint(path)["global_step"])


def _known_keys(parser: Any) -> list[str]:
    keys = []
    for action in parser._actions:
        keys.append(action.dest)
        for sub in (getattr(action, "_name_parser_map", None) or {}).values():
            keys.extend(a.dest for a in sub._actions)
    return [key for key in keys if key and key != "help"]


def _class_parameters() -> dict[str, set[str]]:
    """Parameters of every class that the command line and its config files name, nested dataclass fields included."""
    import dataclasses
    import importlib
    import inspect
    import typing

    text = " ".join(sys.argv) + "\n".join(f.read_text("utf-8") for f in _config_files(sys.argv[1:]) if f.is_file())
    found: dict[str, set[str]] = {}

    def walk(annotation: Any, names: set[str]) -> None:
        if dataclasses.is_dataclass(annotation):
            hints = typing.get_type_hints(annotation)
            fresh = set(hints) - names
            names.update(hints)
            for name in fresh:
                walk(hints[name], names)
        for inner in typing.get_args(annotation):
            walk(inner, names)

    for path in sorted(set(re.findall(r"\b((?:\w+\.)+[A-Z]\w*)\b", text))):
        module, name = path.rsplit(".", 1)
        try:
            signature = inspect.signature(getattr(importlib.import_module(module), name), eval_str=True)
        except (ImportError, AttributeError, ValueError, TypeError, NameError):
            continue
        names = set(signature.parameters)
        for parameter in signature.parameters.values():
            walk(parameter.annotation, names)
        found[path] = names
    return found


_UNKNOWN_KEY = (
    r"Option '([\w.+]+)' is not accepted",
    r"Key '?\"?([\w.+]+)'?\"? is not expected",
    r"[Uu]nrecognized arguments?:\s*-*([\w.+]+)",
    r"unexpected keyword argument '(\w+)'",
)


def _one_line(message: str, known: list[str]) -> str:
    text = " ".join(message.split())
    inner = re.search(r"unknown (?:key|class) '[^']+'(?: in '[^']+')?(?:; did you mean '[^']+'\?)?", text)
    parent = re.search(r'[Pp]arser key "([\w.]+)"', text)
    if inner:  # raised by a nested parser: it knew the key, this level knows where
        key = inner.group(0)
        return key if " in '" in key or not parent else re.sub(r"^(unknown \w+ '[^']+')", rf"\1 in '{parent[1]}'", key)
    unknown = next((match for pattern in _UNKNOWN_KEY if (match := re.search(pattern, text))), None)
    if unknown is None:
        return _unknown_class(text, parent) or (text if len(text) <= 600 else text[:600] + " ...")
    key = unknown.group(1)
    place = f" in '{parent.group(1)}'" if parent and parent.group(1) not in key else ""
    by_class = _class_parameters()
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if parent or not near:
        leaves = {name for names in by_class.values() for name in names} | {k.rsplit(".", 1)[-1] for k in known}
        near = difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.6) or near
    if near:
        return f"unknown key '{key}'{place}; did you mean '{near[0]}'?"
    valid = next((f"; {path} takes {', '.join(sorted(names))}" for path, names in by_class.items()), "")
    return f"unknown key '{key}'{place}{valid}"


def _unknown_class(text: str, parent: re.Match[str] | None) -> str | None:
    """The class path that leads nowhere and the nearest one that leads somewhere, out of a parser's report."""
    pattern = r"class_path '([\w.]+)': (?:module '[\w.]+' has no attribute|No module named)|import path string: (\w+)"
    match = re.search(pattern, text)
    if match is None:
        return None
    path = match[1] or match[2]
    ours = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in PACKAGES]
    known = {f"{module.__name__}.{name}" for module in ours for name in getattr(module, "__all__", ())}
    near = difflib.get_close_matches(path, sorted(known), n=1, cutoff=0.8)
    if not near:  # right name, wrong module, or no module
        leaves = {name.rsplit(".", 1)[-1]: name for name in sorted(known)}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(path.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.7)]
    place = f" in '{parent[1]}'" if parent else ""
    return f"unknown class '{path}'{place}" + (f"; did you mean '{near[0]}'?" if near else "")


def _constructor_refusal(text: str) -> str | None:
    """What a class's ``__init__`` said to its arguments, out of the parser's report on every type it tried."""
    if "Does not validate against any of the Union subtypes" not in text:
        return None
    tried = re.findall(r"^\s*- (.*?)(?=^\s*- |^\s*Given value|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    # unions may nest, and a class is tried as each of their types
    noise = r"Does not validate|Expected a <class 'NoneType'>|Import path \S+ does not correspond to a subclass"
    said = [" ".join(part.split()) for part in tried if not re.match(noise, part)]
    return said[0][:600] if said else None


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it on purpose: then its message is the whole story."""
    if type(error).__module__.split(".")[0] in PACKAGES:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not isinstance(error, ValueError | OSError | ImportError):
        return False
    path = Path(frames[-1].filename).resolve()
    return path == ROOT / "train.py" or any((ROOT / package) in path.parents for package in PACKAGES)


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 error, 2 bad config, 130 interrupted.

    Args:
        argv: arguments after ``python -m train``; default: the process's own.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    own_folder = RUN_FOLDER_VARIABLE not in os.environ
    saved_argv = sys.argv
    try:
        _guard_packages()
        arguments = _expand_config_names(arguments)
        _quieten()
        sys.argv = [saved_argv[0], *arguments]  # Lightning re-runs this very command line for further local ranks
        _build_cli()()
    except ConfigError as error:
        return _fail(str(error), EXIT_CONFIG)
    except KeyboardInterrupt:
        return _fail("interrupted; resume with --ckpt_path last", EXIT_INTERRUPT)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else EXIT_ERROR
    except Exception as error:  # the boundary: everything else keeps its traceback
        if type(error).__module__.startswith("omegaconf") or type(error).__name__ == "MisconfigurationException":
            return _fail(" ".join(str(error).split())[:400], EXIT_CONFIG)
        refusal = _constructor_refusal(str(error))
        if refusal is not None:
            return _fail(refusal, EXIT_CONFIG)
        if not _is_ours(error) or os.environ.get("PLUMBLINE_DEBUG"):
            traceback.print_exc()
            return EXIT_ERROR
        return _fail(f"{type(error).__name__}: {' '.join(str(error).split())}", EXIT_ERROR)
    finally:
        sys.argv = saved_argv
        if own_folder:
            os.environ.pop(RUN_FOLDER_VARIABLE, None)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
