"""The verbs ``verify`` and ``card``: whether evidence was changed, and the model card of a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from modules.assurance.ledger import inspect_path
from modules.assurance.report import read
from modules.assurance.signature import CARD
from train.errors import ConfigError

CHANGED = 3


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise ConfigError(f"{self.prog}: {message}; see --help")


def verify(argv: Sequence[str]) -> int:
    """``verify PATH``: exit code 0: nothing was changed; 3: something was, named on standard error."""
    parser = _OneLine(
        prog="python -m train verify",
        description="Check hashes, links and signatures of a report folder, a cycle's folder or a ledger. With "
        "PLUMBLINE_SIGNING_KEY (or PLUMBLINE_SIGNING_KEY_FILE) set, what is not signed with that key is refused too. "
        "Exit code 0: nothing was changed; 3: something was.",
        allow_abbrev=False,
    )
    parser.add_argument("path", help="A folder with report.json, a cycle's folder, or a ledger.jsonl.")
    path = Path(parser.parse_args(list(argv)).path)
    found = inspect_path(path)
    for note in found.notes:
        print(f"note: {note}", flush=True)
    for problem in found.problems:
        print(f"changed: {problem}", file=sys.stderr, flush=True)
    if not found.problems:
        print(f"verified: {path}", flush=True)
    return CHANGED if found.problems else 0


def card(argv: Sequence[str]) -> int:
    """``card PATH``: print the model card of a report folder, or of a cycle's last round."""
    parser = _OneLine(
        prog="python -m train card",
        description="Print the model card (Hugging Face format) of a report folder, or of the last round of a cycle.",
        allow_abbrev=False,
    )
    parser.add_argument("path", help="A folder with report.json, or a cycle's folder.")
    path = Path(parser.parse_args(list(argv)).path)
    rounds = sorted(path.glob("round_*/assurance/signature.json"))
    folder = rounds[-1].parent if rounds else path
    read(folder)  # refuses what is unfinished or was changed
    print((folder / CARD).read_text("utf-8"), end="", flush=True)
    return 0
