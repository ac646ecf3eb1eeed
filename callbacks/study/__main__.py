"""``python -m callbacks.study run|report``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from callbacks.study.plan import find_layer, load_study, plan_runs, read_state, save_study, selected
from modules.assurance.intervals import REPLICATES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m callbacks.study", description="Run a grid of tasks, algorithms and seeds, and compare them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is not done yet; the same command goes on after a kill")
    run.add_argument("study", help="study file, or the name of a shipped one, e.g. emax/study_laptop")
    run.add_argument("--out", type=Path, required=True, help="the study's folder")
    run.add_argument("--workers", type=int, default=2, help="processes at once (default 2)")
    run.add_argument("--threads", type=int, default=1, help="torch threads of each (default 1)")
    run.add_argument("--resume", action="store_true", help="go on from unfinished runs' checkpoints, not from 0")
    for key, kind in (("tasks", str), ("algorithms", str), ("seeds", int)):
        run.add_argument(f"--{key}", nargs="+", type=kind, default=[], help=f"some of the study's {key}")
    run.add_argument("--dry-run", action="store_true", help="print each run's state and command line instead")
    report = commands.add_parser("report", help="compare the finished runs; writes tables and figures")
    report.add_argument("out", type=Path, help="the study's folder")
    report.add_argument("--last", type=int, default=3, help="evaluations whose mean is the final score (default 3)")
    report.add_argument("--replicates", type=int, default=REPLICATES, help="of the bootstrap (default %(default)s)")
    report.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default 0.95)")
    report.add_argument("--bootstrap-seed", type=int, default=0, help="of the draws (default 0)")
    report.add_argument("--markdown", action="store_true", help="print Markdown tables")
    report.add_argument("--no-figures", action="store_true", help="tables only; needs no matplotlib")
    return parser


def _run(options: argparse.Namespace) -> int:
    study, content = load_study(find_layer(options.study))
    runs = selected(plan_runs(study, options.out), options.tasks, options.algorithms, options.seeds)
    if options.dry_run:
        for run in runs:
            print(f"{read_state(run).get('state', 'new'):<8} python -m train {shlex.join(run.arguments)}")
        return 0
    from callbacks.study.pool import Pool, run_study

    pool = Pool(options.out, options.workers, options.threads, options.resume)
    save_study(content, options.out)
    code = run_study(study, runs, pool)
    if code == 0:
        print(f"compare with: python -m callbacks.study report {shlex.quote(str(options.out))}")
    return code


def _report(options: argparse.Namespace) -> int:
    from callbacks.study.report import Settings, report_study, text

    settings = Settings(options.last, options.replicates, options.confidence, options.bootstrap_seed)
    study, results = report_study(options.out, settings, not options.no_figures)
    print(text(study, results, options.markdown))
    print(f"\nwritten: {options.out / 'report'}", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 done, 1 after errors (one line each), 2 wrong command, 130 interrupted."""
    options = build_parser().parse_args(argv)
    try:
        return _run(options) if options.command == "run" else _report(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
