"""miniF2F in Coq: how many statements the fixed tactic list proves. The floor under every model's score.

    python benchmarks/minif2f_coq.py --stride 4                       # every 4th test statement, about 10 minutes
    python benchmarks/minif2f_coq.py --rank 0 --world 2 --out a.json  # one shard of two (index mod world)
    python benchmarks/minif2f_coq.py --merge a.json b.json --out all.json

Needs Debian's coq and libcoq-coquelicot. Statements whose libraries are missing are counted apart, not as failures.
The result file holds one row per statement with its proof, so that any claim can be checked again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.verification.proof_search import SearchLimits, SearchResult, best_first_search
from modules.verification.proposers import COQ_TACTICS, FixedListProposer
from modules.verification.provers.coq import CoqProver
from modules.verification.provers.coq_check import CoqLimits
from modules.verification.provers.coq_statements import load_minif2f


def row(name: str, result: SearchResult) -> dict[str, Any]:
    """One statement's line in the result file."""
    return {
        "name": name,
        "status": result.status,
        "reason": result.reason,
        "proof": list(result.proof) if result.proof is not None else None,
        "expansions": result.expansions,
        "tactic_calls": result.tactic_calls,
        "wall_seconds": round(result.wall_seconds, 2),
        "outcomes": result.outcomes,
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals of a set of rows. The rate counts every statement, those without their library included."""
    statuses = Counter(r["status"] for r in rows)
    outcomes: Counter[str] = Counter()
    for r in rows:
        outcomes.update(r["outcomes"])
    count = max(1, len(rows))
    return {
        "statements": len(rows),
        "proved": statuses["proved"],
        "rate": round(statuses["proved"] / count, 4),
        "statuses": dict(statuses),
        "outcomes": dict(outcomes),
        "tactic_calls_mean": round(sum(r["tactic_calls"] for r in rows) / count, 1),
        "wall_seconds_mean": round(sum(r["wall_seconds"] for r in rows) / count, 2),
    }


def write_result(path: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write settings, machine, totals and rows; returns the totals."""
    totals = summary(rows)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]},
        "settings": settings,
        "summary": totals,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(record, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    return totals


def merge(paths: Iterable[Path], out: Path) -> dict[str, Any]:
    """Join shard files made with the same settings. Raises ValueError for differing settings or doubled rows."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    shared = [{k: v for k, v in record["settings"].items() if k != "rank"} for record in records]
    if any(settings != shared[0] for settings in shared):
        raise ValueError("minif2f_coq: the shards were made with different settings")
    rows = [r for record in records for r in record["rows"]]
    if doubled := [name for name, count in Counter(r["name"] for r in rows).items() if count > 1]:
        raise ValueError(f"minif2f_coq: statement '{doubled[0]}' is in several shards")
    return write_result(out, shared[0], rows)


def default_data() -> Path | None:
    folder = os.environ.get("PLUMBLINE_DATA")
    return Path(folder) / "math" / "minif2f_coq.jsonl" if folder else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data(), help="jsonl file; default under PLUMBLINE_DATA")
    parser.add_argument("--split", default="test", choices=("test", "valid"))
    parser.add_argument("--stride", type=int, default=4, help="every n-th statement of the split")
    parser.add_argument("--limit", type=int, help="at most so many statements")
    parser.add_argument("--expansions", type=int, default=12)
    parser.add_argument("--wall", type=float, default=40.0, help="seconds a statement")
    parser.add_argument("--tactic-seconds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", "0")))
    parser.add_argument("--world", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    parser.add_argument("--merge", type=Path, nargs="+", help="join result files instead of searching")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "minif2f_coq.json")
    args = parser.parse_args(argv)
    if args.merge:
        print(json.dumps(merge(args.merge, args.out), indent=1))
        return 0
    if args.data is None:
        parser.error("give --data or set PLUMBLINE_DATA")
    if not 0 <= args.rank < args.world:
        parser.error(f"--rank must be in [0, {args.world}), got {args.rank}")

    limits = CoqLimits(tactic_seconds=args.tactic_seconds)
    budget = SearchLimits(args.expansions, args.wall, len(COQ_TACTICS))
    prover, proposer = CoqProver(limits=limits), FixedListProposer()
    statements = list(load_minif2f(args.data, args.split, args.stride))[: args.limit]
    rows = []
    for statement in statements[args.rank :: args.world]:
        result = best_first_search(prover, statement, proposer, budget)
        rows.append(row(statement.name, result))
        shown = " ".join(f"{t}." for t in result.proof) if result.proof else result.reason[:80]
        print(f"{len(rows):4d} {statement.name}: {result.status} {result.wall_seconds:.1f} s  {shown}", flush=True)
    settings = {
        "coq": prover.tools.version,
        "split": args.split,
        "stride": args.stride,
        "limit": args.limit,
        "expansions": args.expansions,
        "wall_seconds": args.wall,
        "tactic_seconds": args.tactic_seconds,
        "tactics": [tactic for tactic, _ in COQ_TACTICS],
        "rank": args.rank,
        "world": args.world,
    }
    print(json.dumps(write_result(args.out, settings, rows), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
