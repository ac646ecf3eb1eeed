"""Memory of the corpus DataModule over the corpus size: reading 1x and 10x tokens, preparing 1x and 10x text.

Each measurement is a fresh process. Reading: a small corpus is prepared in the ordinary way, its training shard is
replaced by a synthetic one of the wanted size (the format is documented in ``datamodules/text/shards.py``), and
shuffled batches come through ``CorpusDataModule.train_dataloader()``. RssAnon is the process's own memory; RssFile are
pages of mapped files, the shard's among them, that the kernel can take back at any time.

    python benchmarks/corpus_memory.py --tokens-mb 20 --factor 10 --batches 400
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

SEQ_LEN, BATCH_SIZE, DOCUMENT_TOKENS = 512, 8, 600


class MemoryWatch:
    """Highest RssAnon, RssFile and VmRSS of this process, sampled every 5 ms (MB)."""

    def __init__(self) -> None:
        self.peak: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @staticmethod
    def now() -> dict[str, float]:
        fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {f[0][:-1]: int(f[1]) / 1024 for f in fields if f[0] in ("RssAnon:", "RssFile:", "VmRSS:")}

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            for key, value in self.now().items():
                self.peak[key] = max(self.peak.get(key, 0.0), value)

    def __enter__(self) -> MemoryWatch:
        self.peak = self.now()
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop.set()
        self._thread.join()


def write_text(path: Path, megabytes: float, seed: int = 0) -> None:
    """Lines of pseudo-words, about 2.4 kB each, streamed to disk."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(2, 9))) for _ in range(5000)]
    left = megabytes * 1e6
    with open(path, "w", encoding="utf-8") as stream:
        while left > 0:
            line = json.dumps({"text": " ".join(rng.choices(words, k=400))}) + "\n"
            stream.write(line)
            left -= len(line)


def data_module(folder: Path) -> Any:
    from datamodules.corpus_data import CorpusDataModule

    return CorpusDataModule(
        sources=[{"name": "text", "path": str(folder / "text.jsonl")}],
        tokenizer={"vocab_size": 2048, "sample_bytes": 500_000},
        cache_dir=str(folder / "cache"),
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        holdout_fraction=0.01,
    )


def prepare(folder: Path) -> dict[str, Any]:
    """Child: prepare the corpus of ``folder``."""
    data = data_module(folder)
    with MemoryWatch() as watch:
        start = watch.now()
        began = time.perf_counter()
        data.prepare_data()
        seconds = time.perf_counter() - began
    text = (folder / "text.jsonl").stat().st_size
    return {"text_mb": text / 1e6, "seconds": seconds, "start_mb": start, "peak_mb": watch.peak}


def read(folder: Path, tokens: int, batches: int) -> dict[str, Any]:
    """Child: read shuffled batches from a training shard of ``tokens`` tokens."""
    data = data_module(folder)
    trainer = {"world_size": 1, "global_rank": 0, "accumulate_grad_batches": 1, "max_steps": batches}
    data.trainer = SimpleNamespace(**trainer, global_step=0, limit_train_batches=1.0)
    with MemoryWatch() as watch:
        start = watch.now()
        began = time.perf_counter()
        data.setup("fit")
        checksum = count = 0
        for batch in data.train_dataloader():
            if not count:
                ready = time.perf_counter()
                after_first = watch.now()
            count += 1
            checksum += int(batch["input_ids"].sum())
        seconds = time.perf_counter() - ready
    shard = data._packed["text"].shard.meta
    if shard["tokens"] != tokens or count != batches:
        raise RuntimeError(f"read {count} batches of a shard of {shard['tokens']} tokens, wanted {batches} of {tokens}")
    return {
        "tokens": tokens,
        "documents": shard["documents"],
        "shard_mb": shard["tokens"] * 2 / 1e6,
        "batches": batches,
        "first_batch_seconds": ready - began,
        "ms_per_batch": 1000 * seconds / (batches - 1),
        "start_mb": start,
        "after_first_batch_mb": after_first,
        "peak_mb": watch.peak,
        "checksum": checksum,
    }


def enlarge(folder: Path, tokens: int) -> None:
    """Replace the prepared training shard by a synthetic one with the same identity."""
    import numpy as np

    from datamodules.text.shards import TokenShard, write_shard

    (path,) = (folder / "cache" / "corpus").glob("text-*/train")
    meta = TokenShard(path).meta
    identity = {key: meta[key] for key in ("vocab_size", "tokenizer_hash", "source_digest")}
    rng = np.random.default_rng(0)
    with write_shard(path, eod_id=0, **identity) as writer:
        while writer.tokens < tokens:
            left = tokens - writer.tokens
            lengths = rng.integers(DOCUMENT_TOKENS // 2, DOCUMENT_TOKENS * 3 // 2, 1000)
            lengths = lengths[: int(np.searchsorted(np.cumsum(lengths + 1), left))]
            lengths = lengths if lengths.size else np.array([left - 1])
            writer.append([rng.integers(1, meta["vocab_size"], n).tolist() for n in lengths], 3 * int(lengths.sum()))


def child(mode: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", mode, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{mode} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(label: str, small: dict[str, Any], large: dict[str, Any]) -> dict[str, float]:
    ratios = {}
    for key in ("RssAnon", "VmRSS"):
        one, ten = small["peak_mb"][key], large["peak_mb"][key]
        grown = [part["peak_mb"][key] - part["start_mb"][key] for part in (small, large)]
        ratios[key] = ten / one
        print(
            f"{label:8s} peak {key:8s} {one:8.1f} MB -> {ten:8.1f} MB  (x{ten / one:.3f}; above the process at start: "
            f"{grown[0]:.1f} -> {grown[1]:.1f} MB)"
        )
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-mb", type=float, default=20, help="size of the small token file in MB (uint16)")
    parser.add_argument("--text-mb", type=float, default=4, help="size of the small text for preparing; 0 = leave out")
    parser.add_argument("--factor", type=int, default=10, help="how much larger the large one is")
    parser.add_argument("--batches", type=int, default=400, help=f"batches of {BATCH_SIZE} x {SEQ_LEN} tokens to read")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "corpus_memory.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        mode, folder, *rest = args.child
        result = prepare(Path(folder)) if mode == "prepare" else read(Path(folder), *map(int, rest))
        print(json.dumps(result))
        return
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/corpus_memory.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "python": platform.python_version()},
    }
    root = Path(tempfile.mkdtemp(prefix="corpus-memory-"))
    try:
        write_text(root / "text.jsonl", 2)
        child("prepare", root)
        reads = []
        for factor in (1, args.factor):
            tokens = int(args.tokens_mb * 1e6 * factor / 2)
            enlarge(root, tokens)
            reads.append(child("read", root, tokens, args.batches))
        report["read"] = reads
        report["read_ratio"] = show("reading", *reads)
        if args.text_mb:
            builds = []
            for factor in (1, args.factor):
                folder = root / f"build{factor}"
                folder.mkdir()
                write_text(folder / "text.jsonl", args.text_mb * factor)
                builds.append(child("prepare", folder))
            report["prepare"] = builds
            report["prepare_ratio"] = show("preparing", *builds)
    finally:
        shutil.rmtree(root)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
