"""Plumbline's own runs.

``full``: ``python -m train fit`` in process, with its default callbacks and loggers and the real corpus DataModule.
``bare``: our network and loss in a plain loop, to split the network's cost from the framework's.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import LoopArgs, Meter, Windows, parse_loop_args
from corpus import corpus_arguments
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.networks.llama import Llama, LlamaConfig  # noqa: E402
from modules.objectives.lm import lm_cross_entropy  # noqa: E402


def run_bare(args: LoopArgs) -> None:
    """Network, loss, clipping and fused AdamW; nothing else."""
    model = Llama(
        LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.dim,
            intermediate_size=args.ff,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            max_position_embeddings=args.seq_len,
        )
    )
    meter = Meter(args, "plumbline_bare", sum(p.numel() for p in model.parameters()), lambda x: model.logits(model(x)))
    decay = [p for p in model.parameters() if p.ndim >= 2]
    keep = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": keep, "weight_decay": 0.0}],
        lr=args.lr,
        betas=args.betas,
        eps=args.eps,
        fused=True,
    )
    forward = torch.compile(model) if args.compile else model
    context = torch.autocast("cpu", torch.bfloat16) if args.precision == "bf16" else contextlib.nullcontext()
    for batch in DataLoader(Windows(args, "shifted"), batch_size=args.batch):
        meter.tick()
        with context:
            loss, _, _ = lm_cross_entropy(forward(batch["input_ids"]), model.lm_head.weight, batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
    meter.report()


def full_config(args: LoopArgs, runs: Path) -> dict[str, Any]:
    """The experiment file of the ``full`` run; whatever is not here is the command line's default."""
    return {
        "seed_everything": args.seed,
        "runs": str(runs),
        "experiment": "benchmark",
        "model": {
            "class_path": "modules.llemma.Llemma",
            "init_args": {
                "model": {
                    "config": {
                        "vocab_size": args.vocab,
                        "hidden_size": args.dim,
                        "intermediate_size": args.ff,
                        "num_hidden_layers": args.layers,
                        "num_attention_heads": args.heads,
                        "max_position_embeddings": args.seq_len,
                        "rms_norm_eps": 1e-5,
                    }
                },
                "lr": args.lr,
                "min_lr_ratio": 1.0,
                "warmup_steps": 0,
                "decay_steps": args.total_steps,
                "betas": list(args.betas),
                "eps": args.eps,
                "weight_decay": args.weight_decay,
                "compile": args.compile,
            },
        },
        "data": {
            "class_path": "datamodules.corpus_data.CorpusDataModule",
            "init_args": corpus_arguments(args.cache, args.vocab, args.seq_len, args.batch, args.seed),
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": args.total_steps,
            "gradient_clip_val": args.clip,
            "precision": "bf16-mixed" if args.precision == "bf16" else "32-true",
            "log_every_n_steps": args.log_every,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "plumbline_clock.Clock"}],
        },
    }


def run_full(args: LoopArgs) -> None:
    """The command line, its trainer, callbacks, loggers and data.

    Raises: RuntimeError if the command fails.
    """
    from plumbline_clock import Clock

    import train

    Clock.args = args
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "benchmark.yaml"
        config.write_text(json.dumps(full_config(args, Path(folder))), encoding="utf-8")  # JSON is YAML
        with contextlib.redirect_stdout(sys.stderr):
            code = train.main(["fit", "-c", str(config)])
    if code or Clock.meter is None:
        raise RuntimeError(f"plumbline: python -m train fit ended with exit code {code}")
    Clock.meter.report()


def main(args: LoopArgs) -> None:
    if args.mode == "full":
        run_full(args)
    else:
        run_bare(args)


if __name__ == "__main__":
    main(parse_loop_args())
