"""TRL's ``GRPOTrainer``, untouched but for a clock around its own phases.

``bf16`` and gradient checkpointing, which it turns on by default, are off as for the other side, and so is dropout;
AdamW is torch's fused one.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from marl_common import cpu_seconds, print_line
from rlhf_common import (
    RlhfArgs,
    StepClock,
    even_share,
    mean_log_probability,
    parse_rlhf_args,
    probe_tokens,
    read_prompts,
)


def config_options(args: RlhfArgs, folder: str) -> dict[str, Any]:
    """Arguments of ``GRPOConfig``."""
    return {
        "output_dir": folder,
        "max_steps": args.total_steps,
        "per_device_train_batch_size": args.responses,
        "generation_batch_size": args.responses,
        "num_generations": args.group,
        "num_iterations": 1,
        "max_completion_length": args.new_tokens,
        "generation_kwargs": {"min_new_tokens": args.new_tokens},
        "top_k": args.top_k,
        "temperature": 1.0,
        "beta": args.beta,
        "epsilon": args.clip,
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": args.betas[0],
        "adam_beta2": args.betas[1],
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.grad_norm,
        "shuffle_dataset": False,
        "disable_dropout": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": args.seed,
    }


def main(args: RlhfArgs) -> None:
    """Train and print the result line.

    Raises:
        RuntimeError: a step did other work than asked.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = StepClock(args)

    class Clock(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **given: Any) -> None:
            counts = [int(one["step"]) for one in given["optimizer"].state.values() if "step" in one]
            clock.ended(max(counts, default=0))

    class Timed(GRPOTrainer):
        def _generate(self, *given: Any, **named: Any) -> Any:
            start = cpu_seconds()
            found = super()._generate(*given, **named)
            clock.add("generate", cpu_seconds() - start)
            return found

        def _generate_and_score_completions(self, *given: Any, **named: Any) -> Any:
            start = cpu_seconds()
            found = super()._generate_and_score_completions(*given, **named)
            clock.add("rollout", cpu_seconds() - start)
            return found

    def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
        clock.responded([len(tokens) for tokens in completion_ids])
        return [even_share(tokens) for tokens in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_prompts(args)
    lengths = {len(tokens) for tokens in tokenizer(texts)["input_ids"]}
    if lengths != {args.prompt_tokens}:
        raise RuntimeError(f"trl: prompts have {sorted(lengths)} tokens, {args.prompt_tokens} wanted")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=str(args.model),
            reward_funcs=even,
            args=GRPOConfig(**config_options(args, folder)),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        model: Any = trainer.model
        probe = probe_tokens(model.config.vocab_size)
        with torch.no_grad():
            agreed = mean_log_probability(model.eval()(input_ids=probe).logits, probe)
        before = model.get_input_embeddings().weight.detach().clone()
        trainer.train()
    moved = float((model.get_input_embeddings().weight.detach() - before).abs().max())
    parameters = sum(one.numel() for one in model.parameters() if one.requires_grad)
    dtype = str(next(model.parameters()).dtype)
    print_line(clock.line("trl", parameters=parameters, dtype=dtype, probe=round(agreed, 6), moved=moved))


if __name__ == "__main__":
    main(parse_rlhf_args())
