"""Replies by rule; use counted and limited; the package's lazy names; configs that name backends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

import modules.language.backends as backends
from modules.language.backends import (
    Backend,
    BackendError,
    BudgetExceededError,
    MeteredBackend,
    Reply,
    Request,
    ScriptedBackend,
    Turn,
    Usage,
)

ROOT = Path(__file__).resolve().parents[4]


def ask(text: str, **options: Any) -> Request:
    return Request((Turn("user", text),), **options)


@pytest.mark.parametrize(
    "rules",
    [
        [{"pattern": "a.b", "reply": r"one \1`tail"}, {"pattern": "b", "reply": "two"}],
        [("a.b", r"one \1`tail"), ("b", "two")],
        {"a.b": r"one \1`tail", "b": "two"},
        lambda request: r"one \1`tail" if "a" in request.text else "two",
    ],
)
def test_the_first_rule_that_fits_answers(rules: Any) -> None:
    backend = ScriptedBackend(rules)
    assert isinstance(backend, Backend)
    assert [reply.text for reply in backend.generate([ask("xb"), ask("a\nb"), ask("a\nb", stop=("`",))])] == [
        "two",
        r"one \1`tail",
        r"one \1",
    ]
    assert backend.generate([ask("b c d")]) == [Reply("two", "stop", 3, 1)]
    assert backend.identity == "scripted (plumbing, not a result)"


def test_no_rule_and_bad_rules_are_named() -> None:
    with pytest.raises(BackendError, match="none of 1 rules fits the prompt that ends 'other'"):
        ScriptedBackend({"a": "b"}).generate([ask("other")])
    with pytest.raises(ValueError, match=r"rule 1: '\(' is no regular expression"):
        ScriptedBackend([("a", "b"), ("(", "b")])
    with pytest.raises(ValueError, match="rule 0 wants the keys pattern and reply, got"):
        ScriptedBackend([{"pattern": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="rule 0 wants a pattern and a reply, got"):
        ScriptedBackend([("a", "b", "c")])  # type: ignore[list-item]


class Slow:
    identity = "slow"

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        if requests[0].text == "broken":
            raise BackendError("down")
        time.sleep(0.02)
        return [Reply("x", "stop", 10, 3) for _ in requests]

    def close(self) -> None:
        self.identity = "closed"


def test_use_is_counted() -> None:
    backend = MeteredBackend(Slow())
    backend.generate([ask("a"), ask("b")])
    backend.generate([])
    with pytest.raises(BackendError, match="down"):
        backend.generate([ask("broken")])
    usage = backend.usage
    assert (usage.calls, usage.prompt_tokens, usage.completion_tokens, usage.tokens) == (3, 20, 6, 26)
    assert 0.02 <= usage.seconds < 2
    assert backend.identity == "slow"
    backend.close()
    assert backend.identity == "closed"


def test_usages_add_up_over_ranks() -> None:
    ranks = [Usage(2, 30, 5, 0.5), Usage(1, 10, 2, 0.25)]
    summed = [sum(column) for column in zip(*(usage.counts() for usage in ranks), strict=True)]
    assert Usage.from_counts(summed) == ranks[0] + ranks[1] == Usage(3, 40, 7, 0.75)


def test_a_batch_beyond_the_calls_is_not_made() -> None:
    backend = MeteredBackend(Slow(), max_calls=3)
    backend.generate([ask("a"), ask("b")])
    with pytest.raises(BudgetExceededError, match="2 more calls exceed the budget max_calls 3, of which 2 are used"):
        backend.generate([ask("a"), ask("b")])
    backend.generate([ask("a")])
    assert backend.usage.calls == 3
    resumed = MeteredBackend(Slow(), max_calls=3)
    resumed.usage = backend.usage
    with pytest.raises(BudgetExceededError):
        resumed.generate([ask("a")])


def test_tokens_and_seconds_run_out() -> None:
    tokens = MeteredBackend(Slow(), max_tokens=20)
    assert len(tokens.generate([ask("a")]) + tokens.generate([ask("a")])) == 2  # 13, then 26 tokens
    with pytest.raises(BudgetExceededError, match=r"max_tokens 20 is used up \(26 tokens in 2 calls\)"):
        tokens.generate([ask("a")])
    seconds = MeteredBackend(Slow(), max_seconds=0.01)
    seconds.generate([ask("a")])
    with pytest.raises(BudgetExceededError, match=r"max_seconds 0\.01 is used up \(0\.\d s in 1 calls\)"):
        seconds.generate([ask("a")])
    with pytest.raises(ValueError, match="max_calls must be >= 0, got -1"):
        MeteredBackend(Slow(), max_calls=-1)


def test_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, modules.language.backends as b\n"
        "b.HTTPBackend, b.ReplayBackend, b.ScriptedBackend, b.MeteredBackend\n"
        "print([m for m in ('torch', 'transformers', 'urllib3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there() -> None:
    assert [name for name in backends.__all__ if not hasattr(backends, name)] == []
    assert set(backends._HOMES) == set(backends.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        backends.Nothing  # noqa: B018


def test_a_config_builds_backends_inside_backends(tmp_path: Path) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--backend", type=Backend)
    values = parser.parse_object(
        {
            "backend": {
                "class_path": "modules.language.backends.MeteredBackend",
                "init_args": {
                    "max_calls": 1,
                    "backend": {
                        "class_path": "modules.language.backends.RecordingBackend",
                        "init_args": {
                            "path": str(tmp_path / "run.jsonl"),
                            "backend": {
                                "class_path": "modules.language.backends.ScriptedBackend",
                                "init_args": {"rules": [{"pattern": "a", "reply": "b"}]},
                            },
                        },
                    },
                },
            }
        }
    )
    backend = parser.instantiate_classes(values).backend
    assert backend.generate([ask("a")])[0].text == "b"
    with pytest.raises(BudgetExceededError):
        backend.generate([ask("a")])
    backend.close()
    with pytest.raises(jsonargparse.ArgumentError, match="modle"):
        parser.parse_object(
            {
                "backend": {
                    "class_path": "modules.language.backends.HTTPBackend",
                    "init_args": {"base_url": "http://127.0.0.1", "modle": "x"},
                }
            }
        )
