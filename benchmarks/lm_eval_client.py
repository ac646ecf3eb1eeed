"""lm-eval as a client of Plumbline's exports: accuracy, verdicts and log-likelihoods beside ours. See README.md.

This script runs with Plumbline's environment; lm-eval runs in its own, behind ``lm_eval_worker.py``, offline.

    python benchmarks/lm_eval_client.py evaluate --model DIR --data DATA --limit 50
    python benchmarks/lm_eval_client.py verdicts --data DATA --limit 100
    python benchmarks/lm_eval_client.py loglikelihood --model DIR
    python benchmarks/lm_eval_client.py tiny-model --out DIR
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import TASKS, Golden, golden, write_golden
from peers import default_root, ensure_peer, installed_packages

HERE = Path(__file__).resolve().parent
PREFIX = "plumbline_"
TEXTS = (
    "The sum of 17 and 25 is 42.",
    "Let $x^2 - 5x + 6 = 0$. Then $(x-2)(x-3) = 0$, so $x = 2$ or $x = 3$.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "Problem:\nFind the remainder when $7^{100}$ is divided by $5$.\n\nSolution: Since $7 \\equiv 2 \\pmod 5$ and $2^4 "
    "\\equiv 1$, the remainder is $1$.",
    " naïve café — Größe ≤ 10 µm; 数学",
)
LOGPROB_TOLERANCE = 1e-4
MAX_SHOWN = 8


def ask(request: dict[str, Any], root: Path, data: Path | None) -> dict[str, Any]:
    """Send one request to lm-eval's environment and return its answer.

    Raises: RuntimeError with the worker's last lines if it fails.
    """
    python = ensure_peer("lm_eval", root)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(root / "lm_eval" / "hf_home"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if data is not None:
        environment["PLUMBLINE_DATA"] = str(data)
    done = subprocess.run(
        [str(python), str(HERE / "lm_eval_worker.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise RuntimeError(f"lm_eval_client: lm-eval failed (exit {done.returncode}):\n{tail}")
    return json.loads(done.stdout)


def write_tiny_model(folder: Path, seed: int = 0) -> None:
    """A random two-layer Llama with a byte-level BPE tokenizer, as a Hugging Face directory (about 0.5 MB)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of an exported model by lm-eval."""
    request = {
        "do": "evaluate",
        "model": str(args.model),
        "tasks": [PREFIX + task for task in args.tasks],
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
    }
    answer = ask(request, args.root, args.data)
    for task, metrics in answer["metrics"].items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "stderr" not in name)
        print(f"{task} (first {args.limit}): {shown}")
    return answer


def our_verdicts(rows: list[Golden]) -> list[tuple[bool, str]]:
    """(right, reason) of each text by our extraction and equivalence, the calls that evaluation makes."""
    from modules.verification.equivalence import SymbolicEquivalence
    from modules.verification.extraction import extract_answer, gsm8k_gold

    verdicts = []
    with SymbolicEquivalence() as equivalence:
        for row in rows:
            gold = gsm8k_gold(f"#### {row.gold}") if row.task == "gsm8k" else row.gold
            answer = extract_answer(row.generation, "gsm8k" if row.task == "gsm8k" else "minerva")
            verdict = equivalence.compare(gold, answer)
            verdicts.append((verdict.ok, "no answer" if answer is None else verdict.reason))
    return verdicts


def explain(row: Golden, theirs: bool) -> str:
    """Why lm-eval and the truth differ on a text."""
    if row.task == "gsm8k" and row.variant == "dollars":
        return "its strict pattern knows no currency sign"
    if row.truth and not theirs:
        return "normalised strings differ, and its LaTeX parser cannot compare this notation"
    if not row.truth and theirs:
        return "its LaTeX parser reads only the beginning of this notation, so the rest may differ"
    return ""


def verdicts(args: argparse.Namespace) -> dict[str, Any]:
    """Both scorers on the same golden texts; ``wrong`` lists the texts that ours misjudges."""
    report: dict[str, Any] = {"tasks": {}, "wrong": [], "disagreements": []}
    for task in args.tasks:
        rows = golden(args.data, task, args.limit)
        if args.golden:
            write_golden(rows, args.golden / f"golden_{task}.jsonl")
        started = _cpu_seconds()
        ours = our_verdicts(rows)
        our_seconds = _cpu_seconds() - started
        by_variant = {name: [row for row in rows if row.variant == name] for name in TASKS[task]}
        count = max(row.doc_id for row in rows) + 1
        texts = [_in_order(chosen, count) for chosen in by_variant.values()]
        answer = ask({"do": "verdicts", "task": PREFIX + task, "generations": texts}, args.root, args.data)
        theirs = {
            (name, doc_id): verdict
            for name, line in zip(by_variant, answer["verdicts"], strict=True)
            for doc_id, verdict in enumerate(line)
        }
        table: dict[str, Counter[str]] = {name: Counter() for name in by_variant}
        for row, (ok, reason) in zip(rows, ours, strict=True):
            other = theirs[row.variant, row.doc_id]
            line = table[row.variant]
            line["texts"] += 1
            line["ours_right"] += ok == row.truth
            line["lm_eval_right"] += other["exact_match"] == row.truth
            line["agree"] += ok == other["exact_match"]
            line["math_verify_right"] += other.get("math_verify", other["exact_match"]) == row.truth
            entry = {
                "task": task,
                "doc_id": row.doc_id,
                "variant": row.variant,
                "truth": row.truth,
                "gold": row.gold,
                "answer": row.answer,
                "ours": ok,
                "reason": reason,
                "lm_eval": other,
            }
            if ok != row.truth:
                report["wrong"].append(entry)
            if ok != other["exact_match"]:
                why = explain(row, other["exact_match"])
                report["disagreements"].append({**entry, "explanation": why or "ours is wrong"})
        report["tasks"][task] = {
            "variants": {name: dict(line) for name, line in table.items()},
            "our_cpu_s": round(our_seconds, 2),
            "lm_eval_cpu_s": round(answer["cpu_s"], 2),
        }
        _print_verdicts(task, table, our_seconds, answer["cpu_s"])
    found: Counter[str] = Counter()
    kept = []
    for entry in report["disagreements"]:
        kind = f"{entry['task']} {entry['variant']}"
        found[kind] += 1
        if found[kind] > MAX_SHOWN:
            continue
        kept.append(entry)
        print(
            f"  {entry['task']} {entry['doc_id']} {entry['variant']}: gold {entry['gold']!r}, "
            f"answer {entry['answer']!r}, truth {entry['truth']}, ours {entry['ours']} ({entry['reason']}), lm-eval "
            f"{entry['lm_eval']['exact_match']}: {entry['explanation']}"
        )
    for kind, count in found.items():
        if count > MAX_SHOWN:
            print(f"  {kind}: {count - MAX_SHOWN} more like these")
    total = len(report["disagreements"])
    report |= {"disagreements": kept, "disagreement_counts": dict(found)}
    print(f"{total} disagreements with lm-eval; ours is wrong on {len(report['wrong'])} texts")
    return report


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children, which our symbolic workers are by then."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _in_order(rows: list[Golden], count: int) -> list[str]:
    """One text per document; a document without this variant gets an empty one, whose verdict is not read."""
    texts = [""] * count
    for row in rows:
        texts[row.doc_id] = row.generation
    return texts


def _print_verdicts(task: str, table: dict[str, Counter[str]], ours: float, theirs: float) -> None:
    print(f"\n{task:<14}{'texts':>7}{'agree':>7}{'right: ours':>13}{'lm-eval':>9}{'math-verify':>13}")
    for name, line in table.items():
        print(
            f"{name:<14}{line['texts']:>7}{line['agree']:>7}{line['ours_right']:>13}{line['lm_eval_right']:>9}"
            f"{line['math_verify_right']:>13}"
        )
    print(f"CPU-seconds: ours {ours:.1f}, lm-eval {theirs:.1f} (it runs math-verify as well on MATH)")


def loglikelihood(args: argparse.Namespace) -> dict[str, Any]:
    """Log-likelihood of fixed texts by lm-eval and by ours, from the same directory."""
    import torch

    from modules.language.checkpoint import load_llama
    from modules.language.scoring import continuation_logprobs

    answer = ask({"do": "loglikelihood", "model": str(args.model), "texts": list(TEXTS)}, args.root, None)
    torch.set_num_threads(1)
    model = load_llama(args.model).model.eval()
    ids = answer["token_ids"]
    ours = continuation_logprobs(model, [[answer["prefix_token"]]] * len(ids), ids)
    rows = []
    for text, tokens, mine, theirs in zip(TEXTS, ids, ours, answer["logprobs"], strict=True):
        rows.append(
            {
                "text": text[:40],
                "tokens": len(tokens),
                "ours": sum(mine),
                "lm_eval": theirs,
                "difference_per_token": abs(sum(mine) - theirs) / len(tokens),
            }
        )
        print(
            f"{rows[-1]['tokens']:>5} tokens  ours {sum(mine):>12.5f}  lm-eval {theirs:>12.5f}  "
            f"difference a token {rows[-1]['difference_per_token']:.1e}"
        )
    return {"texts": rows, "largest": max(row["difference_per_token"] for row in rows)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="lm-eval beside Plumbline: accuracy, verdicts, log-likelihoods.")
    parser.add_argument("--root", type=Path, default=default_root(), help="peer environments (see peers.py)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, help="result file (JSON); default: none")
    verbs = parser.add_subparsers(dest="verb", required=True)
    data = os.environ.get("PLUMBLINE_DATA")
    for name in ("evaluate", "verdicts"):
        verb = verbs.add_parser(name)
        verb.add_argument("--data", type=Path, default=Path(data) if data else None, help="folder that holds math/")
        verb.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
        verb.add_argument("--limit", type=int, default=50, help="items of each task, in file order")
    verbs.choices["evaluate"].add_argument("--max-new-tokens", type=int, help="completion budget (default: lm-eval's)")
    verbs.choices["verdicts"].add_argument("--golden", type=Path, help="folder to write the golden texts to")
    likelihood = verbs.add_parser("loglikelihood")
    for verb in (verbs.choices["evaluate"], likelihood):
        verb.add_argument("--model", type=Path, required=True, help="Hugging Face directory (Plumbline's export)")
    verbs.add_parser("tiny-model").add_argument("--out", dest="folder", type=Path, required=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if getattr(args, "data", args) is None:
        print("lm_eval_client: give --data or set PLUMBLINE_DATA to the folder that holds math/", file=sys.stderr)
        return 2
    if args.verb == "tiny-model":
        write_tiny_model(args.folder)
        return 0
    model = getattr(args, "model", None)
    if model is not None and not (model / "config.json").is_file():
        print(f"lm_eval_client: {model} has no config.json; give a Hugging Face model directory", file=sys.stderr)
        return 2
    try:
        report = {"evaluate": evaluate, "verdicts": verdicts, "loglikelihood": loglikelihood}[args.verb](args)
    except (RuntimeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    failed = bool(report.get("wrong")) or report.get("largest", 0.0) > LOGPROB_TOLERANCE
    if args.out:
        record = {
            "benchmark": f"lm_eval_{args.verb}",
            "date": args.date,
            "limit": getattr(args, "limit", None),
            "versions": installed_packages("lm_eval", args.root),
            **report,
        }
        temporary = args.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, args.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
