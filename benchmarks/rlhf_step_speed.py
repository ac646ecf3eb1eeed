"""Speed of a whole RLHF step: Plumbline's ``ConstrainedRLHF`` against TRL's ``GRPOTrainer`` on one thread.

Both load the same GPT-2-shaped model (124M parameters unless sizes are given) and tokenizer from one Hugging Face
directory, in fp32, and do the same: respond to prompts in groups, score the responses, compute the reference's
log-probabilities, make one update. Each runs in a process of its own; runs alternate, A B A B ..., and ratios are taken
within a round. CPU seconds are counted over whole steps after warm-up. See README.md beside this file.

    python benchmarks/rlhf_step_speed.py --rounds 3
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peers import default_root, ensure_peer, installed_packages

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "loops"), str(HERE.parent)]

from marl_train_speed import command_of, result_line, write_record  # noqa: E402
from rlhf_common import PROMPTS_FILE, RlhfArgs  # noqa: E402
from train_tokens import _own_versions, machine  # noqa: E402

from modules.files import atomic_directory  # noqa: E402

PEER = "trl"
RESULTS = HERE / "results" / "rlhf_step_speed"


class Loop(NamedTuple):
    """A script, and the peer environment that runs it (``None``: this interpreter)."""

    script: str
    peer: str | None


LOOPS: dict[str, Loop] = {"trl": Loop("trl_loop.py", PEER), "plumbline": Loop("plumbline_rlhf_loop.py", None)}
REFERENCE = "trl"
SETTINGS: dict[str, dict[str, int]] = {
    "4x4": {"prompts": 4, "group": 4},
    "16x4": {"prompts": 16, "group": 4},
}
SHARED = ("prompt_tokens", "new_tokens", "top_k", "warmup", "steps", "seed")
SIZES = {"vocab": 50_257, "dim": 768, "layers": 12, "heads": 12}
PROMPTS = 2048
"""Prompts that the model's folder holds."""


def loop_options(model: Path, setting: Mapping[str, int], shared: Mapping[str, int]) -> list[str]:
    """Command line of a loop script, the same for every loop."""
    options = ["--model", str(model), "--threads", "1"]
    for name, value in (*setting.items(), *shared.items()):
        options += [f"--{name.replace('_', '-')}", str(value)]
    return options


def run_loop(name: str, python: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run one loop script to its end.

    Raises:
        RuntimeError: with the script's last lines if it fails or prints no result.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    command = [str(python), str(HERE / "loops" / LOOPS[name].script), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = result_line(done.stdout)
    if done.returncode or found is None:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"rlhf_step_speed: {name} failed (exit {done.returncode}):\n{tail}")
    return {**found, "loop": name}


def prepare_model(folder: Path, sizes: Mapping[str, int], prompt_tokens: int, seed: int) -> Path:
    """Random weights, a word tokenizer of the whole vocabulary, and prompts, made once.

    Args:
        folder: where they are kept.
        sizes: as :data:`SIZES`. prompt_tokens: words of a prompt, each a token.

    Returns:
        The Hugging Face directory.
    """
    target = folder / ("rlhf-" + "-".join(str(value) for value in (*sizes.values(), prompt_tokens, seed)))
    if target.exists():
        return target
    import torch

    from datamodules.text.dialogue_tokens import train_word_tokenizer
    from modules.language.checkpoint import build_causal_lm, export_hf

    words = [f"w{number}" for number in range(sizes["vocab"] - 3)]  # three special tokens
    torch.manual_seed(seed)
    model = build_causal_lm(
        {
            "model_type": "gpt2",
            "vocab_size": sizes["vocab"],
            "n_embd": sizes["dim"],
            "n_layer": sizes["layers"],
            "n_head": sizes["heads"],
            "bos_token_id": sizes["vocab"] - 1,
            "eos_token_id": sizes["vocab"] - 1,
        }
    )
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(words, k=prompt_tokens)) for _ in range(PROMPTS)]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_directory(target) as made:
        train_word_tokenizer([" ".join(words)], sizes["vocab"], made / "tokenizer")
        export_hf(model, made / "tokenizer", made / "model")
        (made / "model" / PROMPTS_FILE).write_text(json.dumps(texts), encoding="utf-8")
    return target


def check_equal_work(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises: ValueError if loops differ in steps, tokens, updates, parameters, precision or start weights, or one of
    them did not learn."""
    for key in ("steps", "tokens", "updates", "parameters", "dtype"):
        found = {name: line[key] for name, line in results.items()}
        if len(set(found.values())) != 1:
            raise ValueError(f"rlhf_step_speed: loops differ in {key}: {found}")
    probes = {name: line["probe"] for name, line in results.items()}
    if max(probes.values()) - min(probes.values()) > 1e-3:
        raise ValueError(f"rlhf_step_speed: the start models differ, log-probability of a fixed text: {probes}")
    for name, line in results.items():
        if not line["moved"] > 0:
            raise ValueError(f"rlhf_step_speed: {name} made updates that changed nothing")


def summarise(rounds: Sequence[Mapping[str, Mapping[str, Any]]], key: str) -> dict[str, dict[str, Any]]:
    """Each loop's rate over the rounds, and its ratio to :data:`REFERENCE` in the same round where that ran.

    Args:
        rounds: loop -> result line, per round. key: the rate.
    """
    table: dict[str, dict[str, Any]] = {}
    for loop in rounds[0]:
        values = [one[loop][key] for one in rounds]
        table[loop] = {"median": round(statistics.median(values), 2), "min": min(values), "max": max(values)}
        if REFERENCE in rounds[0] and loop != REFERENCE:
            ratios = [round(one[loop][key] / one[REFERENCE][key], 4) for one in rounds]
            table[loop]["ratio"] = {
                "median": round(statistics.median(ratios), 4),
                "min": min(ratios),
                "max": max(ratios),
                "by_round": ratios,
            }
    return table


public_command = functools.partial(command_of, "rlhf_step_speed.py")


def print_table(found: Mapping[str, Any], title: str) -> None:
    heads = (("loop", -12), ("tokens/CPU-s", 14), ("CPU-s/step", 12), ("generate", 10), ("score", 8), ("update", 8))
    print(f"\n{title}\n" + "".join(f"{name:<{-n}}" if n < 0 else f"{name:>{n}}" for name, n in (*heads, ("ratio", 8))))
    for loop, row in found["tokens_per_cpu_s"].items():
        lines = [one[loop] for one in found["rounds"]]
        step, generate, rollout = (
            statistics.median(values)
            for values in (
                [line["cpu_s_per_step"] for line in lines],
                [line["phases_cpu_s"]["generate"] for line in lines],
                [line["phases_cpu_s"]["rollout"] for line in lines],
            )
        )
        ratio = f"{row['ratio']['median']:.2f}" if "ratio" in row else ""
        print(
            f"{loop:<12}{row['median']:>14.1f}{step:>12.2f}{generate:>10.2f}{rollout - generate:>8.2f}"
            f"{step - rollout:>8.2f}{ratio:>8}",
            flush=True,
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Whole RLHF steps against TRL's GRPOTrainer, interleaved.")
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=list(LOOPS), help="order of a round")
    parser.add_argument("--settings", nargs="+", default=["4x4"], choices=list(SETTINGS), help="prompts x group")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--profile", action="store_true", help="one profiled run a loop, op groups; no timing")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in SHARED:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(RlhfArgs, name))
    parser.add_argument("--root", type=Path, default=default_root(), help="peer environments (see peers.py)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results, one file a setting")
    return parser


def compare(
    args: argparse.Namespace, setting: str, pythons: Mapping[str, Path], model: Path, shared: Mapping[str, int]
) -> Iterator[list[dict[str, dict[str, Any]]]]:
    """Run the rounds of one setting; after each, the result lines of all so far.

    Raises:
        RuntimeError: a loop fails. ValueError: the loops did different work.
    """
    rounds: list[dict[str, dict[str, Any]]] = []
    options = loop_options(model, SETTINGS[setting], shared) + ["--profile"] * args.profile
    for number in range(1 if args.profile else args.rounds):
        results: dict[str, dict[str, Any]] = {}
        for loop in args.loops:
            results[loop] = run_loop(loop, pythons[loop], options)
            line = results[loop]
            print(
                f"{setting} round {number + 1} {loop}: {line['tokens_per_cpu_s']:.1f} tokens/CPU-s, "
                f"{line['cpu_s_per_step']:.2f} CPU-s a step",
                flush=True,
            )
        check_equal_work(results)
        rounds.append(results)
        yield rounds


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    shared = {name: getattr(args, name) for name in SHARED}
    sizes = {name: getattr(args, name) for name in SIZES}
    try:
        peers = {peer for loop in args.loops if (peer := LOOPS[loop].peer) is not None}
        built = {peer: ensure_peer(peer, args.root) for peer in peers}
        pythons = {loop: built.get(LOOPS[loop].peer or "", Path(sys.executable)) for loop in args.loops}
        model = prepare_model(args.root, sizes, args.prompt_tokens, args.seed) / "model"
        versions = {peer: installed_packages(peer, args.root) for peer in peers} | {"plumbline": _own_versions()}
        for setting in args.settings:
            made = {"command": public_command(argv), "machine": machine(), "date": args.date}
            name = setting + "_profile" * args.profile
            found: dict[str, Any] = {
                "benchmark": "rlhf_step_speed", "made": made, "threads": 1, "sizes": sizes,
                "setting": SETTINGS[setting], "shared": shared, "versions": versions,
            }  # fmt: skip
            for rounds in compare(args, setting, pythons, model, shared):
                if not args.profile:
                    for key in ("tokens_per_cpu_s", "tokens_per_wall_s"):
                        found[key] = summarise(rounds, key)
                found["rounds"] = rounds
                write_record(found, args.out / f"{name}.json")  # after each: an interrupted run keeps what it has
            if args.profile:
                for loop, line in found["rounds"][0].items():
                    print(f"\n{loop}: seconds a step by op group (torch.profiler, self time)")
                    for group, seconds in line["profile_s_per_step"].items():
                        print(f"{group:<40}{seconds:>10.3f}")
            else:
                print_table(found, f"{setting}: {SETTINGS[setting]}, medians of CPU seconds a step")
            print(f"\nwritten: {args.out / f'{name}.json'}")
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
