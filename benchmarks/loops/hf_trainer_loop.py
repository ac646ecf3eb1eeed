"""Hugging Face ``Trainer`` on ``LlamaForCausalLM`` (sdpa attention, fused AdamW): the peer's own loop, untouched."""

from __future__ import annotations

import tempfile

from common import LoopArgs, Meter, Windows, parse_loop_args
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


def main(args: LoopArgs) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.dim,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            intermediate_size=args.ff,
            max_position_embeddings=args.seq_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    meter = Meter(args, "hf_trainer", sum(p.numel() for p in model.parameters()), lambda x: model(input_ids=x).logits)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            meter.tick()

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=args.total_steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta1=args.betas[0],
            adam_beta2=args.betas[1],
            adam_epsilon=args.eps,
            weight_decay=args.weight_decay,
            max_grad_norm=args.clip,
            bf16=args.precision == "bf16",
            torch_compile=args.compile,
            use_cpu=True,
            logging_steps=args.log_every,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        Trainer(model=model, args=options, train_dataset=Windows(args, "hugging_face"), callbacks=[Clock()]).train()
    meter.report()


if __name__ == "__main__":
    main(parse_loop_args())
