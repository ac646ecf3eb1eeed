"""Training tokens per second: Plumbline against the Hugging Face Trainer and litgpt.

Every loop trains the same Llama (16.9M parameters unless sizes are given) on the same token file with the same batch,
optimiser, clipping and thread count, in its own process and its own environment. Runs are interleaved, A B C A B C ...,
and compared round by round, so that a busy machine slows all loops of a round alike; the CPU-second figures take the
waiting out. See README.md beside this file.

    python benchmarks/train_tokens.py --precision bf16 --rounds 5
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from peers import default_root, ensure_peer, installed_packages

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "loops"), str(HERE.parent)]

from corpus import prepare_corpus  # noqa: E402

LOOPS = {  # loop -> (script, peer environment or None for this interpreter, extra arguments)
    "hf_trainer": ("hf_trainer_loop.py", "hf_trainer", ()),
    "litgpt": ("litgpt_loop.py", "litgpt", ()),
    "plumbline": ("plumbline_loop.py", None, ()),
    "plumbline_bare": ("plumbline_loop.py", None, ("--mode", "bare")),
}
SIZES = ("vocab", "dim", "layers", "heads", "ff", "seq_len", "batch")
OUR_PACKAGES = ("torch", "lightning", "tensordict", "torchrl", "numpy")


def summarise(rounds: list[dict[str, dict]], reference: str, key: str) -> dict[str, dict[str, float]]:
    """Speed of each loop and its ratio to the reference loop of the same round.

    Args: rounds: one mapping loop -> result line per round; reference: loop to divide by; key: the rate to compare.
    Returns: loop -> {median, min, max of the rate; ratio_median, ratio_min, ratio_max}.
    """
    table = {}
    for loop in rounds[0]:
        rates = [one[loop][key] for one in rounds]
        ratios = [one[loop][key] / one[reference][key] for one in rounds]
        table[loop] = {
            "median": round(statistics.median(rates), 1),
            "min": min(rates),
            "max": max(rates),
            "ratio_median": round(statistics.median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "ratio_max": round(max(ratios), 4),
        }
    return table


def machine() -> dict[str, object]:
    """Processor model, core count, memory, the instruction sets that decide bf16 speed, and the load at the start."""
    model, flags = platform.processor(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.system(),
        "bf16_instructions": [name for name in ("avx512_bf16", "amx_bf16") if name in flags.split()],
        "load_1m": round(os.getloadavg()[0], 2),
    }


def run_loop(name: str, python: Path, options: list[str]) -> dict:
    """Run one loop script to its end and return its JSON line.

    Raises: RuntimeError with the script's last lines if it fails or prints no result.
    """
    script, _, extra = LOOPS[name]
    threads = options[options.index("--threads") + 1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [str(python), str(HERE / "loops" / script), *options, *extra],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"loop"')]
    if done.returncode or not lines:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"train_tokens: {name} failed (exit {done.returncode}):\n{tail}")
    return {**json.loads(lines[-1]), "loop": name}


def print_table(table: dict[str, dict[str, float]], title: str) -> None:
    print(f"\n{title}\n{'loop':<16}{'median':>9}{'min':>9}{'max':>9}{'ratio':>9}{'min':>8}{'max':>8}")
    for loop, row in table.items():
        print(
            f"{loop:<16}{row['median']:>9.0f}{row['min']:>9.0f}{row['max']:>9.0f}"
            f"{row['ratio_median']:>9.3f}{row['ratio_min']:>8.3f}{row['ratio_max']:>8.3f}"
        )


def print_profiles(profiles: dict[str, dict[str, float]]) -> None:
    """Milliseconds a step by op group, one column a loop."""
    tables = profiles.values()
    groups = sorted({group for table in tables for group in table}, key=lambda g: -max(t.get(g, 0.0) for t in tables))
    print(f"\nms per step by op group (torch.profiler, self time)\n{'':<40}" + "".join(f"{n:>16}" for n in profiles))
    for group in groups:
        print(f"{group:<40}" + "".join(f"{1e3 * p.get(group, 0.0):>16.1f}" for p in tables))
    print(f"{'sum':<40}" + "".join(f"{1e3 * sum(p.values()):>16.1f}" for p in tables))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Training tokens per second against peers, interleaved.")
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=list(LOOPS), help="order of a round")
    parser.add_argument("--reference", default="litgpt", help="loop that ratios divide by (default: litgpt)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast, fp32 weights")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each loop")
    parser.add_argument("--cpus", default="", help="cores to pin to, such as 0 or 0,1 (default: not pinned)")
    parser.add_argument("--compile", action="store_true", help="torch.compile in every loop")
    parser.add_argument("--steps", type=int, default=20, help="timed optimiser steps a run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--profile", action="store_true", help="one profiled run a loop, op groups; no timing")
    defaults = {"vocab": 8192, "dim": 384, "layers": 6, "heads": 6, "ff": 1024, "seq_len": 512, "batch": 4}
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])
    parser.add_argument("--seed", type=int, default=0, help="order of the windows and start weights")
    parser.add_argument("--root", type=Path, default=default_root(), help="peer environments (see peers.py)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, help="result file (default: results/train_tokens_<precision>....json)")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    if args.reference not in args.loops:
        print(f"train_tokens: --reference {args.reference} is not among --loops {args.loops}", file=sys.stderr)
        return 2
    tag = "_compile" * args.compile + "_profile" * args.profile
    out = args.out or HERE / "results" / f"train_tokens_{args.precision}_{args.threads}t{tag}.json"
    try:
        peers = sorted({LOOPS[loop][1] for loop in args.loops} - {None})
        pythons = {peer: ensure_peer(peer, args.root) for peer in peers}
        start = machine()
        cache = args.root / f"corpus-{args.vocab}"
        tokens = prepare_corpus(cache, args.vocab, args.seq_len, args.batch, args.seed)
        options = ["--tokens", str(tokens), "--cache", str(cache), "--precision", args.precision]
        for name in (*SIZES, "steps", "warmup", "threads", "seed"):
            options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        options += ["--cpus", args.cpus] if args.cpus else []
        options += ["--compile"] * args.compile + ["--profile"] * args.profile
        rounds = []
        for number in range(1 if args.profile else args.rounds):
            results = {}
            for loop in args.loops:
                peer = LOOPS[loop][1]
                results[loop] = run_loop(loop, pythons[peer] if peer else Path(sys.executable), options)
                print(
                    f"round {number + 1} {loop}: {results[loop]['tok_per_cpu_s']:.0f} tokens/CPU-s, "
                    f"{results[loop]['tok_per_wall_s']:.0f} tokens/s",
                    flush=True,
                )
            rounds.append(results)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    record = {
        "benchmark": "train_tokens",
        "command": _public_command(argv),
        "date": args.date,
        "machine": start,
        "reference": args.reference,
        "sizes": {name: getattr(args, name) for name in SIZES},
        "versions": {peer: installed_packages(peer, args.root) for peer in peers} | {"plumbline": _own_versions()},
    }
    if args.profile:
        record["profile_s_per_step"] = {loop: line["profile_s_per_step"] for loop, line in rounds[0].items()}
        print_profiles(record["profile_s_per_step"])
    else:
        for key, title in (("tok_per_cpu_s", "tokens per CPU-second"), ("tok_per_wall_s", "tokens per wall second")):
            record[key] = summarise(rounds, args.reference, key)
            print_table(record[key], f"{title} ({args.precision}; ratio to {args.reference} in the same round)")
        record["rounds"] = rounds
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)
    print(f"\nwritten: {out}")
    return 0


def _public_command(argv: list[str]) -> str:
    """The command without the options that name folders of this machine."""
    kept, skip = [], False
    for word in argv:
        if not skip and word not in ("--root", "--out"):
            kept.append(word)
        skip = word in ("--root", "--out")
    return " ".join(["python benchmarks/train_tokens.py", *kept])


def _own_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in OUR_PACKAGES}


if __name__ == "__main__":
    sys.exit(main())
