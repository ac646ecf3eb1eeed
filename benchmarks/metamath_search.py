"""Metamath: how many sampled theorems of a database best-first search proves without a model.

    python benchmarks/metamath_search.py --database ql.mm --count 100
    python benchmarks/metamath_search.py --database hol.mm --count 138

Only what stands before a theorem may be used; every proof found is checked in normal and in compressed form.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from minif2f_coq import row, write_result

from modules.verification.proof_search import SearchLimits, best_first_search
from modules.verification.provers.metamath import Database
from modules.verification.provers.metamath_proposer import AssertionProposer
from modules.verification.provers.metamath_search import Library, MetamathProver


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", default="ql.mm", help="path, or a name under PLUMBLINE_DATA/math")
    parser.add_argument("--count", type=int, default=100, help="theorems to sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--expansions", type=int, default=100)
    parser.add_argument("--wall", type=float, default=20.0, help="seconds a theorem")
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    path = Path(args.database)
    if not path.exists() and os.environ.get("PLUMBLINE_DATA"):
        path = Path(os.environ["PLUMBLINE_DATA"]) / "math" / args.database
    library = Library(Database.load(path))
    database = library.database
    typecodes = library.grammar.typecodes
    theorems = [a for a in database.assertions.values() if a.kind == "$p" and a.expression[0] not in typecodes]
    chosen = random.Random(args.seed).sample(theorems, min(args.count, len(theorems)))
    budget = SearchLimits(args.expansions, args.wall, args.candidates)
    prover, rows = MetamathProver(library), []
    for theorem in chosen:
        result = best_first_search(prover, theorem, AssertionProposer(library, theorem), budget)
        if result.proof is not None:
            database.check(theorem, prover.compressed(theorem, result.proof))
        rows.append(row(theorem.label, result))
    settings = {**vars(args), "database": path.name, "out": None, "theorems": len(theorems)}
    out = args.out or Path(__file__).parent / "results" / f"metamath_{path.stem}.json"
    print(json.dumps(write_result(out, settings, rows), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
