"""``python -m train``: verbs, run folders, one-line errors and exit codes; nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from train.arguments import expand_config_names
from train.errors import (
    EXIT_CONFIG,
    EXIT_ERROR,
    EXIT_INTERRUPT,
    ConfigError,
    constructor_refusal,
    fail,
    is_ours,
)
from train.folders import PACKAGES, ROOT, RUN_FOLDER_VARIABLE

__all__ = ["DRIVERS", "main"]

if sys.path[:1] != [str(ROOT)]:
    sys.path.insert(0, str(ROOT))  # `-m` puts the working folder first; ours must win over a stranger's modules/

# Waiting threads sleep instead of spinning, unless told otherwise: on two cores of which another program takes one,
# training ran at 3,500 tokens per second this way and at 800 with the default. Must stand before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Verbs that are plain functions, not runs of one Trainer: name -> "module:function", imported when called. The function
# takes the arguments behind the name, with config names already replaced by files, and returns an exit code.
DRIVERS: dict[str, str] = {
    "align": "train.align:main",
    "verify": "train.evidence:verify",
    "card": "train.evidence:card",
}


def _guard_packages() -> None:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        origin = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if origin != ROOT / package:
            raise ConfigError(
                f"package '{package}' was found at {origin}, not beside {ROOT / 'train'}: another distribution or "
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


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 error, 2 bad config, 130 interrupted.

    A verb that ends well may return a code of its own, which is passed on.

    Args:
        argv: arguments after ``python -m train``; default: the process's own.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    own_folder = RUN_FOLDER_VARIABLE not in os.environ
    saved_argv = sys.argv
    try:
        _guard_packages()
        arguments = expand_config_names(arguments)
        _quieten()
        sys.argv = [saved_argv[0], *arguments]  # Lightning re-runs this very command line for further local ranks
        if arguments and arguments[0] in DRIVERS:
            module, _, function = DRIVERS[arguments[0]].partition(":")
            return getattr(importlib.import_module(module), function)(arguments[1:])
        from train.cli import PlumblineCLI

        return PlumblineCLI(tuple(DRIVERS)).exit_code
    except ConfigError as error:
        return fail(str(error), EXIT_CONFIG)
    except KeyboardInterrupt:
        driver = bool(arguments) and arguments[0] in DRIVERS
        how = "the same command goes on from here" if driver else "resume with --ckpt_path last"
        return fail(f"interrupted; {how}", EXIT_INTERRUPT)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else EXIT_ERROR
    except Exception as error:  # the boundary: everything else keeps its traceback
        if type(error).__module__.startswith("omegaconf") or type(error).__name__ == "MisconfigurationException":
            return fail(" ".join(str(error).split())[:400], EXIT_CONFIG)
        if type(error).__name__ == "AssuranceError":  # limits, knobs or settings that do not fit
            return fail(" ".join(str(error).split()), EXIT_CONFIG)
        refusal = constructor_refusal(str(error))
        if refusal is not None:
            return fail(refusal, EXIT_CONFIG)
        if not is_ours(error) or os.environ.get("PLUMBLINE_DEBUG"):
            traceback.print_exc()
            return EXIT_ERROR
        return fail(f"{type(error).__name__}: {' '.join(str(error).split())}", EXIT_ERROR)
    finally:
        sys.argv = saved_argv
        if own_folder:
            os.environ.pop(RUN_FOLDER_VARIABLE, None)
