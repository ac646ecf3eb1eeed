"""Sampling speed: our `generate_batch` against transformers' `generate`, same weights, prompts and options.

Both generate from one GPT-2 shape in one process, on this interpreter's packages. Runs alternate, ours, theirs, ours,
theirs, and each pair gives one ratio of CPU seconds, so that a busy machine slows both alike. With `--ends`, the token
that ends a response is likely enough that rows finish at different times, as in training. Prompts have one length and
no padding, transformers' best case; with `--ragged` they differ, and transformers pads them on the left.

    python benchmarks/generation_speed.py --shape tiny --rounds 15
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

# vocabulary, positions, width, layers, heads; responses at once, prompt tokens, new tokens
SHAPES = {
    "tiny": ((1500, 64, 96, 2, 4), (64, 24, 12)),
    "gpt2": ((50257, 1024, 768, 12, 12), (16, 32, 32)),
}


def build(sizes: tuple[int, ...], end_bias: float) -> tuple[Any, Any]:
    """transformers' GPT-2 with random weights, and ours with the same; token 0 ends a response."""
    import transformers

    from modules.networks.gpt2 import GPT2, GPT2Config

    transformers.logging.set_verbosity_error()
    vocab, positions, width, layers, heads = sizes
    config = transformers.GPT2Config(
        vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=None,
        eos_token_id=None, pad_token_id=0, tie_word_embeddings=not end_bias,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    if end_bias:  # the final state's first entry becomes a constant that only token 0's logit sees
        norm, head = theirs.transformer.ln_f, theirs.lm_head
        norm.weight.data[0], norm.bias.data[0] = 0.0, end_bias
        head.weight.data[:, 0] = 0.0
        head.weight.data[0, 0] = 1.0
    ours = GPT2(GPT2Config.from_hf(config.to_dict()))
    ours.load_state_dict(ours.from_hf_weights(theirs.state_dict()))
    return theirs, ours


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, int]:
    """CPU seconds of a call, and the tokens it generated."""
    start = time.process_time()
    tokens = run()
    return time.process_time() - start, tokens


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from modules.language.generation import generate_batch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    sizes, (batch, width, new) = SHAPES[args.shape]
    theirs, ours = build(sizes, args.ends)
    ids = torch.randint(1, sizes[0], (batch // args.samples, width))
    lengths = torch.full((len(ids),), width)
    if args.ragged:
        lengths = torch.randint(width // 2, width + 1, (len(ids),))
        lengths[0] = width
    shift = (torch.arange(width) - (width - lengths)[:, None]) % width  # left-padded: row moved to the right
    left = ids.gather(1, shift)
    mask = (torch.arange(width) >= (width - lengths)[:, None]).long()
    seeds = torch.arange(batch)
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": 2, "top_k": 20}

    def run_ours() -> int:
        out = generate_batch(ours, ids, lengths, seeds=seeds, eod_id=0, samples_per_prompt=args.samples, **options)
        return int(out.length.sum())

    def run_theirs() -> int:
        out = theirs.generate(
            left, attention_mask=mask, do_sample=True, eos_token_id=0, pad_token_id=0,
            num_return_sequences=args.samples, **options,
        )  # fmt: skip
        generated = out[:, width:]
        return int(((generated != 0).sum(1) + (generated == 0).any(1)).sum())  # 0 ends a response, then pads it

    greedy = {
        **options,
        "seeds": seeds,
        "eod_id": 0,
        "samples_per_prompt": args.samples,
        "temperature": 0.0,
        "top_k": 0,
    }
    expected = theirs.generate(
        left, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=2, eos_token_id=0, pad_token_id=0
    )[:, width:]
    same = generate_batch(ours, ids, lengths, **greedy).tokens[:: args.samples, : expected.shape[1]]
    agreement = float((same == expected).float().mean())
    if agreement < 0.98:  # random weights: a near tie may fall either way
        raise RuntimeError(f"generation_speed: greedy tokens agree in {agreement:.3f} of the places only")
    for run in (run_ours, run_theirs):
        run()
    rounds = []
    for _ in range(args.rounds):
        (own, own_tokens), (peer, peer_tokens) = cpu_seconds(run_ours), cpu_seconds(run_theirs)
        rounds.append(
            {
                "plumbline_s": own, "transformers_s": peer, "plumbline_tokens": own_tokens,
                "transformers_tokens": peer_tokens, "ratio": (own_tokens / own) / (peer_tokens / peer),
            }
        )  # fmt: skip
    return {
        "greedy_agreement": agreement,
        "tok_per_cpu_s": {
            name: round(statistics.median(one[f"{name}_tokens"] / one[f"{name}_s"] for one in rounds), 1)
            for name in ("plumbline", "transformers")
        },
        "ratio_median": round(statistics.median(one["ratio"] for one in rounds), 3),
        "ratio_min": round(min(one["ratio"] for one in rounds), 3),
        "ratio_max": round(max(one["ratio"] for one in rounds), 3),
        "rounds": [{key: round(value, 5) for key, value in one.items()} for one in rounds],
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Sampling speed against transformers' generate, interleaved.")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny", help="2 layers x 96, or GPT-2 small (124M)")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1, help="responses to each prompt; the batch stays as large")
    parser.add_argument("--ragged", action="store_true", help="prompts of half to full length")
    parser.add_argument("--ends", type=float, default=0.0, help="logit added to the token that ends a response")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, help="result file (default: results/generation_speed/<options>.json)")
    return parser


def main(argv: list[str] | None = None) -> int:
    from train_tokens import machine

    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    if args.rounds < 1 or args.samples < 1 or SHAPES[args.shape][1][0] % args.samples:
        print("generation_speed: --rounds and --samples must be >= 1, and samples divide the batch", file=sys.stderr)
        return 2
    tag = f"_s{args.samples}" * (args.samples > 1) + "_ragged" * args.ragged + f"_ends{args.ends:g}" * bool(args.ends)
    out = args.out or HERE / "results" / "generation_speed" / f"{args.shape}_{args.threads}t{tag}.json"
    start = machine()
    try:
        result = measure(args)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    kept = [word for i, word in enumerate(argv) if word != "--out" and (i == 0 or argv[i - 1] != "--out")]
    record = {
        "benchmark": "generation_speed",
        "command": " ".join(["python benchmarks/generation_speed.py", *kept]),
        "date": args.date,
        "machine": start,
        "sizes": dict(
            zip(
                ("vocab", "positions", "width", "layers", "heads", "responses", "prompt", "new"),
                (*SHAPES[args.shape][0], *SHAPES[args.shape][1]),
                strict=True,
            )
        ),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        **result,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)
    speeds = result["tok_per_cpu_s"]
    print(
        f"{args.shape}{tag}: {speeds['plumbline']:.0f} against {speeds['transformers']:.0f} tokens per CPU-second, "
        f"ratio {result['ratio_median']} ({result['ratio_min']} to {result['ratio_max']})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
