"""What a language model says during training, as text in TensorBoard and as a file in the run folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from modules.contracts import ReportsSamples
from modules.files import atomic_write


class TextSamples(Callback):
    """Writes the module's sample texts after every validation: TensorBoard's text tab and ``samples.jsonl``.

    A resumed run drops the lines that it is about to write again.

    Args:
        count: texts at a time.
    """

    def __init__(self, count: int = 4) -> None:
        if count < 1:
            raise ValueError(f"TextSamples: count must be >= 1, got {count}")
        self.count = count
        self._folder = Path()
        self._opened = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, ReportsSamples):
            raise ValueError(f"TextSamples: {type(pl_module).__name__} has no sample_texts()")
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: on all ranks

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, ReportsSamples) or not trainer.is_global_zero:
            return
        texts = list(pl_module.sample_texts())[: self.count]
        if not texts:
            return
        step = trainer.global_step
        if not self._opened:
            self._open(step)
        with open(self._folder / "samples.jsonl", "a", encoding="utf-8") as stream:
            for text in texts:
                stream.write(json.dumps({"step": step, **text}, ensure_ascii=False) + "\n")
        keys = list(texts[0])
        lines = [" | ".join(keys), " | ".join("---" for _ in keys)]
        lines += [" | ".join(_cell(text.get(key, "")) for key in keys) for text in texts]
        for logger in trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if writer is not None and hasattr(writer, "add_text"):
                writer.add_text("samples", "\n".join(f"| {line} |" for line in lines), step)

    def _open(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "samples.jsonl"
        if path.exists():
            whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # a last line cut by a kill is left out
            with atomic_write(path, "w") as stream:
                stream.writelines(line + "\n" for line in whole if json.loads(line)["step"] < step)
        self._opened = True


def plain_markdown(text: str) -> str:
    """Untrusted text as Markdown that shows it as it is: no mark-up, HTML or link in it comes to life.

    Letters and digits stay; every other ASCII character becomes a character reference, which Markdown never reads as
    mark-up. Line ends become line breaks, spaces are kept, other control characters are replaced.
    """
    lines = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "<br>".join(_MARKS.sub(_reference, line) for line in lines)


_MARKS = re.compile(r"[\x00-\x1f\x7f-\x9f]|[!-/:-@\[-`{-~]|^ | (?= )| $")


def _reference(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code == 0x20:
        code = 0xA0  # a blank at an end or beside another would be lost
    elif code < 0x20 or 0x7F <= code <= 0x9F:
        code = 0xA0 if code == 0x09 else 0xFFFD
    return f"&#{code};"


def _cell(text: str) -> str:
    """Text in one cell of a Markdown table."""
    return plain_markdown(" ".join(text.splitlines()))
