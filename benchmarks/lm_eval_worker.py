"""The half of ``lm_eval_client.py`` that runs inside lm-eval's environment: one JSON request in, one JSON answer out.

Requests (standard input): ``{"do": "evaluate", "model": DIR, "tasks": [...], "limit": n, "max_new_tokens": n}``;
``{"do": "verdicts", "task": NAME, "generations": [[...], ...]}`` scores given texts, one list per document;
``{"do": "loglikelihood", "model": DIR, "texts": [...]}`` sums token log-probabilities.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"


class Replay(LM):
    """A "model" that answers document ``i`` with the ``i``-th given text: lm-eval then scores exactly those texts."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self.texts[request.doc_id] for request in requests]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError("Replay answers generation tasks only")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("Replay answers generation tasks only")


def _evaluate(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
    result = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    assert result is not None  # None on ranks other than 0 only
    return result


def _hf_model(folder: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    """Generate with the model in a directory and score; per-task metrics and every generation."""
    options: dict[str, Any] = {"limit": request["limit"]}
    if request.get("max_new_tokens"):
        options["gen_kwargs"] = {"max_gen_toks": request["max_new_tokens"]}
    result = _evaluate(_hf_model(request["model"]), request["tasks"], **options)
    return {
        "metrics": {
            task: {name: value for name, value in row.items() if isinstance(value, (int, float))}
            for task, row in result["results"].items()
        },
        "samples": {
            task: [
                {
                    "doc_id": one["doc_id"],
                    "prompt": one["arguments"][0][0],
                    "generation": one["resps"][0][0],
                    "exact_match": one["exact_match"],
                }
                for one in samples
            ]
            for task, samples in result["samples"].items()
        },
    }


def verdicts(request: dict[str, Any]) -> dict[str, Any]:
    """Score given texts: ``generations[v][i]`` is variant ``v`` of document ``i``. Returns a like-shaped list."""
    answers, seconds = [], 0.0
    for texts in request["generations"]:
        start = time.process_time()
        result = _evaluate(Replay(texts), [request["task"]], limit=len(texts), num_fewshot=0)
        seconds += time.process_time() - start
        samples = sorted(result["samples"][request["task"]], key=lambda one: one["doc_id"])
        answers.append(
            [{name: bool(one[name]) for name in ("exact_match", "math_verify") if name in one} for one in samples]
        )
    return {"verdicts": answers, "cpu_s": seconds}


def loglikelihood(request: dict[str, Any]) -> dict[str, Any]:
    """Sum over each text of log p(token | prefix), first token conditioned on the prefix token (EOS or BOS)."""
    model = _hf_model(request["model"])
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(request["texts"])]
    return {
        "logprobs": [float(value) for value in model.loglikelihood_rolling(requests, disable_tqdm=True)],
        "token_ids": [model.tok_encode(text) for text in request["texts"]],
        "prefix_token": model.prefix_token_id,
        "max_length": model.max_length,
    }


def main() -> int:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    request = json.load(sys.stdin)
    actions = {"evaluate": evaluate, "verdicts": verdicts, "loglikelihood": loglikelihood}
    with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints; standard output carries the answer alone
        answer = actions[request["do"]](request)
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
