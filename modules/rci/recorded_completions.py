"""A language model that was recorded: completions published with the zero-shot chain-of-thought harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modules.files import read_json_rows
from modules.language.backends.base import BackendError, Reply, Request
from modules.rci.reasoning_modes import STEP_BY_STEP, TRIGGERS, answer_line, opening
from modules.verification.extraction import AnswerKind

_KINDS: dict[str, AnswerKind] = {
    "aqua": "choice",
    "commonsenseqa": "choice",
    "commonsensqa": "choice",
    "strategyqa": "yes_no",
}


class RecordedCompletions:
    """Answers ``zero_shot`` and ``zero_shot_cot`` prompts from a file of recorded completions.

    Records are JSON lines ``{dataset, method, question, completion, gold}``. A ``zero_shot`` completion is the trigger
    and the answer; a ``zero_shot_cot`` completion is "Let's think step by step.", the reasoning, the answer line and
    the answer, and is taken apart for the two calls of that mode. A prompt recorded twice gets its first reply, so
    that replies depend on the prompt alone. Token counts are words.

    Args:
        path: the file.

    Raises:
        BackendError: no such file; when first asked: a record that is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise BackendError(
                f"RecordedCompletions: {self.path} does not exist; name replay_completions.jsonl in the data folder's "
                "reasoning/ (--vars.data=<data folder> in the shipped config)"
            )
        self._replies: dict[str, str] | None = None

    @property
    def identity(self) -> str:
        return f"recorded completions ({self.path.name})"

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """See :class:`~modules.language.backends.base.Backend`. Raises BackendError for a prompt not recorded."""
        if self._replies is None:
            self._replies = self._read()
        replies = []
        for request in requests:
            prompt = request.text
            text = self._replies.get(prompt)
            if text is None:
                raise BackendError(
                    f"RecordedCompletions: {self.path} has no reply to the prompt that ends {prompt[-80:]!r}; it "
                    "answers the modes zero_shot and zero_shot_cot without rounds, of the questions recorded in it"
                )
            replies.append(Reply(text, "stop", len(prompt.split()), len(text.split())))
        return replies

    def close(self) -> None:
        """Forget the file."""
        self._replies = None

    def _read(self) -> dict[str, str]:
        replies: dict[str, str] = {}
        try:
            rows = read_json_rows(self.path, "RecordedCompletions")
        except ValueError as error:
            raise BackendError(str(error)) from None
        for number, row in enumerate(rows, 1):
            where = f"RecordedCompletions: {self.path}: line {number}"
            fields = [row.get(name) for name in ("dataset", "method", "question", "completion")]
            if not all(isinstance(field, str) for field in fields):
                raise BackendError(f"{where}: want the texts dataset, method, question and completion")
            dataset, method, question, completion = map(str, fields)
            kind = _KINDS.get(dataset, "number")
            if method == "zero_shot":
                lead, rest = TRIGGERS[kind], None
            elif method == "zero_shot_cot":
                lead, rest = STEP_BY_STEP, f" {answer_line(kind)}"  # the harness puts a blank before the line
            else:
                raise BackendError(f"{where}: method must be zero_shot or zero_shot_cot, got {method!r}")
            if not completion.startswith(lead) or (rest is not None and rest not in completion):
                raise BackendError(f"{where}: the completion must begin with {lead!r} and hold {rest or lead!r}")
            prompt = opening(question, kind, method)
            if prompt in replies:
                continue
            text = completion.removeprefix(lead)
            if rest is not None:
                text, _, answer = text.partition(rest)  # an answer may go on to repeat the line, without the blank
                replies[prompt + text.rstrip() + answer_line(kind)] = answer
            replies[prompt] = text
        return replies
