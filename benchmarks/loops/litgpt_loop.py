"""litgpt's own pretraining loop: ``litgpt.pretrain.fit`` (Fabric, chunked cross entropy) on ``litgpt.GPT``.

Two things differ from ``litgpt pretrain``, both in its favour: AdamW is fused on the CPU too, and compilation is an
option, so that compiled runs are compared with compiled runs.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from common import LoopArgs, Meter, Windows, parse_loop_args
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.model import GPT
from torch.utils.data import DataLoader


class Ticking(torch.utils.data.Sampler[int]):
    """File order; ticks when the loop asks for the first sample of a batch (litgpt has no callbacks)."""

    def __init__(self, length: int, batch: int) -> None:
        self.length, self.batch, self.meter = length, batch, None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for index in range(self.length):
            if self.meter is not None and index % self.batch == 0:
                self.meter.tick()
            yield index


def main(args: LoopArgs) -> None:
    config = Config(
        name="peer",
        block_size=args.seq_len,
        vocab_size=args.vocab,
        padded_vocab_size=args.vocab,
        n_layer=args.layers,
        n_head=args.heads,
        n_query_groups=args.heads,
        n_embd=args.dim,
        intermediate_size=args.ff,
        bias=False,
        rotary_percentage=1.0,
        parallel_residual=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
    )
    precision = "bf16-mixed" if args.precision == "bf16" else "32-true"
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    pretrain.initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    parameters = sum(p.numel() for p in model.parameters())
    wrapped = fabric.setup(torch.compile(model) if args.compile else model)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(
            wrapped.parameters(),
            lr=args.lr,
            betas=args.betas,
            eps=args.eps,
            weight_decay=args.weight_decay,
            fused=True,
        )
    )
    meter = Meter(args, "litgpt", parameters, lambda x: model(x))
    data = Windows(args, "window")
    sampler = Ticking(len(data), args.batch)
    train_data, val_data = fabric.setup_dataloaders(
        DataLoader(data, batch_size=args.batch, sampler=sampler),
        DataLoader(data, batch_size=args.batch),
        use_distributed_sampler=False,
    )
    sampler.meter = meter
    state = {"model": wrapped, "optimizer": optimizer, "train_dataloader": train_data, "iter_num": 0, "step_count": 0}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        pretrain.fit(
            fabric=fabric,
            devices=1,
            state=state,
            train_dataloader=train_data,
            val_dataloader=val_data,
            out_dir=Path(folder),
            tokenizer_dir=None,
            train=TrainArgs(
                save_interval=None,
                log_interval=args.log_every,
                global_batch_size=args.batch,
                micro_batch_size=args.batch,
                max_tokens=args.total_steps * args.batch * args.seq_len,
                max_norm=args.clip,
                min_lr=args.lr,
                lr_warmup_steps=0,
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        )
    meter.report()


if __name__ == "__main__":
    main(parse_loop_args())
