"""Llemma's evaluation: generate, extract, normalise; compare, execute or prove (Azerbayev et al. 2024, section 3)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from modules.networks.llama import Llama
from modules.seeds import text_seed

if TYPE_CHECKING:
    from modules.verification.equivalence import SymbolicEquivalence
    from modules.verification.extraction import AnswerStyle
    from modules.verification.programs import ProgramVerifier
    from modules.verification.proposers import Proposer
    from modules.verification.provers.coq import CoqProver

MAX_SHOWN = 8
STYLES: dict[str, AnswerStyle] = {"number": "gsm8k", "latex": "minerva", "choice": "choice"}


@dataclass
class ProofSettings:
    """Best-first proof search (the paper: 100 expansions, 32 candidates, 600 s a theorem).

    Args:
        proposer: who proposes tactics: the language ``model``, the ``fixed`` list of common tactics (the baseline that
            needs no model), or both (``union``).
        max_expansions: states expanded per theorem.
        candidates: tactics tried per state.
        wall_seconds: limit per theorem.
        tactic_seconds: limit per tactic, whole seconds.
        temperature: of sampled tactics.
        max_tactic_tokens: length of a sampled tactic.
    """

    proposer: Literal["model", "fixed", "union"] = "model"
    max_expansions: int = 100
    candidates: int = 32
    wall_seconds: float = 600.0
    tactic_seconds: int = 5
    temperature: float = 0.7
    max_tactic_tokens: int = 64


@dataclass
class EvaluationSettings:
    """How evaluation tasks are generated and judged.

    Args:
        seed: of sampled completions; a sample depends on it, its item and its number only.
        rows: sequences generated at once.
        official_compat: repeat the official scorers' extraction and normalisation, faults included, to reproduce
            published tables.
        wall_seconds: limit of one symbolic comparison or one program.
        workers: comparisons and programs judged at once.
        allow_unsafe_exec: run model-written programs although this machine offers no isolation.
        proof: proof-search settings.
    """

    seed: int = 0
    rows: int = 64
    official_compat: bool = False
    wall_seconds: float = 5.0
    workers: int = 1
    allow_unsafe_exec: bool = False
    proof: ProofSettings = field(default_factory=ProofSettings)

    def __post_init__(self) -> None:
        if isinstance(self.proof, Mapping):
            self.proof = ProofSettings(**self.proof)
        for name in ("rows", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"EvaluationSettings: {name} must be >= 1, got {getattr(self, name)}")
        if self.wall_seconds <= 0:
            raise ValueError(f"EvaluationSettings: wall_seconds must be > 0, got {self.wall_seconds}")


@dataclass
class TaskTally:
    """Sums over the items of one task; adding tallies, over batches or ranks, gives the whole task's.

    ``majority``: items whose voted answer is right (with one sample: maj@1). ``first``: items whose first sample is
    right. ``solved``: items with a right sample. ``right``, ``answered``, ``total``: right samples, samples with an
    answer, samples.
    """

    items: float = 0.0
    majority: float = 0.0
    first: float = 0.0
    solved: float = 0.0
    right: float = 0.0
    answered: float = 0.0
    total: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)

    FIELDS = ("items", "majority", "first", "solved", "right", "answered", "total")

    def __add__(self, other: TaskTally) -> TaskTally:
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.FIELDS}
        return TaskTally(**sums, samples=(self.samples + other.samples)[:MAX_SHOWN])

    def counts(self, device: torch.device) -> Tensor:
        """The sums as a float64 vector, to be reduced over ranks."""
        return torch.tensor([getattr(self, name) for name in self.FIELDS], dtype=torch.float64, device=device)

    @classmethod
    def from_counts(cls, counts: Tensor, samples: list[dict[str, Any]]) -> TaskTally:
        return cls(**dict(zip(cls.FIELDS, counts.tolist(), strict=True)), samples=samples)

    def metrics(self) -> dict[str, float]:
        """``maj<k>`` with its 95% Wilson interval, ``pass_rate`` over all, ``solved`` (any sample), ``answered``."""
        k = max(1, round(self.total / self.items))
        rate = self.majority / self.items
        low, high = _wilson(self.majority, self.items)
        values = {
            f"maj{k}": rate,
            f"maj{k}_low": low,
            f"maj{k}_high": high,
            "answered": self.answered / self.total,
            "items": self.items,
        }
        if k > 1:
            values |= {
                "maj1": self.first / self.items,
                "pass_rate": self.right / self.total,
                "solved": self.solved / self.items,
            }
        return values

    def as_markdown(self) -> str:
        """Up to eight items with a completion and its verdict, for TensorBoard's text tab."""
        blocks = []
        for row in self.samples:
            completion = row["completion"].replace("```", "'''")
            blocks.append(
                f"**{row['item_id']}** gold `{row['gold']}` answer `{row['answer']}` "
                f"{'right' if row['ok'] else 'wrong'} ({row['reason']})\n\n```\n{completion[-800:]}\n```"
            )
        return "\n\n---\n\n".join(blocks)


def _wilson(successes: float, trials: float) -> tuple[float, float]:
    from modules.verification.voting import wilson_interval

    return wilson_interval(round(successes), round(trials))


class TaskEvaluator:
    """Answers task items with a language model and judges the answers.

    Args:
        network: the model, on the device it is to generate on.
        tokenizer_directory: folder with ``tokenizer.json``.
        settings: see :class:`EvaluationSettings`.
        rows_folder: where every judged item is written, ``<task>.rank-<rank>.jsonl``; None: nowhere.
        rank: of this process.
    """

    def __init__(
        self,
        network: Llama,
        tokenizer_directory: Path,
        settings: EvaluationSettings,
        rows_folder: Path | None = None,
        rank: int = 0,
    ) -> None:
        from modules.optional import require

        self.network = network
        self.settings = settings
        self.rows_folder, self.rank = rows_folder, rank
        self.tokenizer = require("tokenizers", extra="llemma").Tokenizer.from_file(
            str(tokenizer_directory / "tokenizer.json")
        )
        stop = network.config.eos_token_id
        self._stop_ids = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        self._equivalence: SymbolicEquivalence | None = None
        self._programs: dict[str, ProgramVerifier] = {}
        self._prover: CoqProver | None = None

    # ------------------------------------------------------------------------------------------------------ generation

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _generate(self, prompts: list[str], item_ids: list[str], **options: Any) -> list[list[tuple[str, float]]]:
        """For each prompt its ``samples_per_prompt`` completions with their mean token log-probability.

        A prompt that fills the model's context gets empty completions: it counts as unanswered.
        """
        from modules.language.generation import cut_at_stop, generate

        k, context = options["samples_per_prompt"], self.network.config.max_position_embeddings
        encoded = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        fitting = [index for index, ids in enumerate(encoded) if 0 < len(ids) < context]
        results: list[list[tuple[str, float]]] = [[("", -math.inf)] * k for _ in prompts]
        if not fitting:
            return results
        output = generate(
            self.network,
            [encoded[index] for index in fitting],
            stop_token_ids=self._stop_ids,
            decode=self._decode,
            seeds=[text_seed(f"{self.settings.seed}/{item_ids[i]}/{sample}") for i in fitting for sample in range(k)],
            batch_size=self.settings.rows,
            **options,
        )
        for place, index in enumerate(fitting):
            chosen = range(place * k, (place + 1) * k)
            texts = [cut_at_stop(self._decode(output.tokens[row]), options["stop_strings"]) for row in chosen]
            scores = [math.fsum(output.logprobs[row]) / max(1, len(output.logprobs[row])) for row in chosen]
            results[index] = list(zip(texts, scores, strict=True))
        return results

    def complete(self, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Completions of task items or of a user's prompts.

        Args:
            batch: items with the keys of a task item (``prompt``, ``item_id``, ``k``, ``temperature``, ...).

        Returns:
            One row per item: ``item_id``, ``prompt``, ``completions`` (k texts, cut at the stop strings).
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, item in enumerate(batch):
            key = (item["max_new_tokens"], item["temperature"], item["top_p"], item["k"], tuple(item["stop"]))
            groups.setdefault(key, []).append(index)
        completions: list[list[str]] = [[] for _ in batch]
        for (length, temperature, top_p, k, stop), indices in groups.items():
            answers = self._generate(
                [batch[index]["prompt"] for index in indices],
                [batch[index]["item_id"] for index in indices],
                max_new_tokens=length,
                temperature=temperature,
                top_p=top_p,
                samples_per_prompt=k,
                stop_strings=stop,
            )
            for index, samples in zip(indices, answers, strict=True):
                completions[index] = [text for text, _ in samples]
        return [
            {"item_id": item["item_id"], "prompt": item["prompt"], "completions": texts}
            for item, texts in zip(batch, completions, strict=True)
        ]

    # --------------------------------------------------------------------------------------------------------- judging

    def run(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, TaskTally]:
        """Answer and judge a batch of task items; one tally per task in it."""
        tallies: dict[str, TaskTally] = {}
        questions = [item for item in batch if item["answer_kind"] != "theorem"]
        for item, row in zip(questions, self.complete(questions), strict=True):
            tally = self._judge(item, row["completions"])
            tallies[item["task"]] = tallies.get(item["task"], TaskTally()) + tally
        for item in batch:
            if item["answer_kind"] == "theorem":
                tallies[item["task"]] = tallies.get(item["task"], TaskTally()) + self._prove(item)
        return tallies

    def gold(self, item: Mapping[str, Any]) -> str:
        """The final answer of an item, extracted from its raw reference."""
        from modules.verification.extraction import gsm8k_gold, last_boxed

        raw, kind = item["gold"], item["gold_kind"]
        if kind == "boxed_solution":
            found = last_boxed(raw)
            if found is None:
                raise ValueError(f"evaluation: the reference of {item['item_id']} holds no \\boxed{{}}")
            return found
        return gsm8k_gold(raw) if kind == "hash_marks" else raw

    def _judge(self, item: Mapping[str, Any], completions: Sequence[str]) -> TaskTally:
        from modules.verification.voting import majority_vote

        kind = item["answer_kind"]
        if kind == "text":
            return TaskTally()
        gold = self.gold(item)
        judged = [self._judge_sample(kind, gold, text) for text in completions]
        answers = [answer for answer, _, _ in judged]
        vote = majority_vote(answers, (lambda a, b: a == b) if kind == "choice" else self.equivalence.equal)
        majority = vote.answer is not None and judged[answers.index(vote.answer)][1]
        self._record(item, gold=gold, answers=answers, right=[ok for _, ok, _ in judged], voted=vote.answer,
                     reasons=[reason for _, _, reason in judged], completions=list(completions))  # fmt: skip
        answer, ok, reason = judged[0]
        shown = {
            "item_id": item["item_id"], "gold": gold, "answer": answer, "ok": ok, "reason": reason,
            "completion": completions[0],
        }  # fmt: skip
        return TaskTally(
            items=1.0,
            majority=float(majority),
            first=float(ok),
            solved=float(any(ok for _, ok, _ in judged)),
            right=float(sum(ok for _, ok, _ in judged)),
            answered=float(vote.valid),
            total=float(len(judged)),
            samples=[shown],
        )

    def _record(self, item: Mapping[str, Any], **values: Any) -> None:
        if self.rows_folder is None:
            return
        self.rows_folder.mkdir(parents=True, exist_ok=True)
        row = {"item_id": item["item_id"], **values}
        with open(self.rows_folder / f"{item['task']}.rank-{self.rank}.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _judge_sample(self, kind: str, gold: str, text: str) -> tuple[str | None, bool, str]:
        """Answer of one completion, whether it is right, and by which rule."""
        from modules.verification.extraction import extract_answer

        if kind.startswith("program"):
            verifier = self._program_verifier("pal" if kind == "program_number" else "sympy")
            outcome = verifier.run(text)
            if outcome.answer is None:
                return None, False, outcome.execution.status
            return outcome.text, *verifier.judge(gold, outcome)
        answer = extract_answer(text, STYLES[kind], official_compat=self.settings.official_compat)
        if answer is None:
            return None, False, "no answer"
        if kind == "choice":
            return answer, answer == gold, "letter"
        verdict = self.equivalence.compare(gold, answer)
        return answer, verdict.ok, verdict.reason

    @property
    def equivalence(self) -> SymbolicEquivalence:
        """The symbolic comparer; started at first use."""
        if self._equivalence is None:
            from modules.verification.equivalence import SymbolicEquivalence

            self._equivalence = SymbolicEquivalence(
                workers=self.settings.workers,
                wall_seconds=self.settings.wall_seconds,
                official_compat=self.settings.official_compat,
            )
        return self._equivalence

    def _program_verifier(self, mode: Literal["pal", "sympy"]) -> ProgramVerifier:
        """The sandboxed executor of model-written programs; started at first use."""
        if mode not in self._programs:
            from modules.verification.programs import ProgramVerifier

            self._programs[mode] = ProgramVerifier(
                mode, equivalence=self.equivalence, allow_unsafe_exec=self.settings.allow_unsafe_exec
            )
        return self._programs[mode]

    # --------------------------------------------------------------------------------------------------------- proving

    def _prove(self, item: Mapping[str, Any]) -> TaskTally:
        from modules.verification.proof_search import SearchLimits, best_first_search
        from modules.verification.provers.coq import CoqProver
        from modules.verification.provers.coq_check import CoqLimits
        from modules.verification.provers.coq_statements import parse_statement

        settings = self.settings.proof
        if item["meta"].get("prover", "coq") != "coq":
            raise ValueError(
                f"evaluation: {item['task']}: only Coq statements can be searched here, got {item['meta']}"
            )
        if self._prover is None:
            self._prover = CoqProver(
                limits=CoqLimits(tactic_seconds=settings.tactic_seconds),
                allow_unsafe_exec=self.settings.allow_unsafe_exec,
            )
        limits = SearchLimits(settings.max_expansions, settings.wall_seconds, settings.candidates)
        statement = parse_statement(item["prompt"], item["meta"].get("name", item["item_id"]))
        result = best_first_search(self._prover, statement, self._proposer(item["item_id"]), limits)
        self._record(item, status=result.status, proof=list(result.proof or ()), expansions=result.expansions,
                     tactic_calls=result.tactic_calls, seconds=round(result.wall_seconds, 3))  # fmt: skip
        proved = float(result.proved)
        shown = {
            "item_id": item["item_id"], "gold": "", "answer": result.status, "ok": result.proved,
            "reason": f"{result.expansions} expansions, {result.wall_seconds:.0f} s",
            "completion": "\n".join(result.proof or ()),
        }  # fmt: skip
        return TaskTally(1.0, proved, proved, proved, proved, 1.0, 1.0, [shown])

    def _proposer(self, item_id: str) -> Proposer:
        from modules.verification.proposers import FixedListProposer, SampledProposer, UnionProposer

        settings = self.settings.proof
        if settings.proposer == "fixed":
            return FixedListProposer()
        calls = 0

        def propose(prompts: list[str], n: int) -> list[list[tuple[str, float]]]:
            nonlocal calls
            calls += 1
            return self._generate(
                prompts,
                [f"{item_id}#{calls}.{index}" for index in range(len(prompts))],
                max_new_tokens=settings.max_tactic_tokens,
                temperature=settings.temperature,
                top_p=1.0,
                samples_per_prompt=n,
                stop_strings=(sampled.stop,),
            )

        sampled = SampledProposer(propose)
        return sampled if settings.proposer == "model" else UnionProposer(sampled, FixedListProposer())

    def close(self) -> None:
        """Stop all worker processes."""
        for part in (*self._programs.values(), self._equivalence, self._prover):
            if part is not None:
                part.close()
        self._programs, self._equivalence, self._prover = {}, None, None
