"""A model behind an OpenAI-compatible HTTP interface: OpenAI's own, vLLM, llama.cpp and others."""

from __future__ import annotations

import email.utils
import json
import logging
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

from modules.language.backends.base import BackendError, PromptTooLongError, Reply, Request
from modules.language.backends.texts import excerpt, merge_turns, stopped
from modules.optional import require

_log = logging.getLogger(__name__)
_RETRIED = (429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0  # seconds between two attempts, whatever Retry-After asks for
_LARGEST_BODY = 8 << 20  # bytes
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PATHS = {"chat": "/chat/completions", "completions": "/completions"}


class _Again(Exception):
    """An attempt failed in a way that may pass. The text is the error, should it not."""

    def __init__(self, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.wait = wait  # seconds, as the server asks


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class _Gate:
    """Spaces attempts evenly and holds all of them back while a server asks for it."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._lock = threading.Lock()
        self._free_at = 0.0

    def delay(self) -> float:
        """Take the next place; seconds until it."""
        with self._lock:
            now = time.monotonic()
            at = max(now, self._free_at)
            self._free_at = at + self._gap if self._gap else self._free_at
            return at - now

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() + seconds)


class HTTPBackend:
    """Asks a server; the requests of a batch go out at the same time, up to ``concurrency``.

    The key is read from the environment when it is needed. It is kept nowhere: not in ``identity``, errors, logs or
    hyperparameters, and it is sent over https or to this machine only. Redirects are refused.

    Args:
        base_url: up to and without ``/chat/completions``, e.g. ``https://api.openai.com/v1``.
        model: as the server calls it.
        api: ``chat`` (messages; neighbouring turns of one role are joined) or ``completions`` (one text).
        key_variable: environment variable that holds the key; unset or null: none is sent.
        timeout: seconds, of the connection, of each silence of the server, and of the reply's body as a whole.
        retries: attempts after the first, on 429, 500, 502, 503, 504, broken connections, time-outs and replies that
            are no JSON or lack fields.
        backoff: seconds before the second attempt, doubled with each; a server's Retry-After counts if it is longer.
            No wait is longer than 60 s.
        concurrency: requests under way at once.
        requests_per_minute: of this backend, retries included; null: no limit.
        extra_body: further keys of the request's body, which replace ours; null removes a key.

    The seed is sent folded to 31 bits, which all servers take; whether it fixes the reply is the server's affair.

    Raises:
        ValueError: a value out of range; a base_url that is no http(s) address, or has a user, query or fragment.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api: Literal["chat", "completions"] = "chat",
        key_variable: str | None = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 4,
        requests_per_minute: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        if api not in _PATHS:
            raise ValueError(f"HTTPBackend: api must be chat or completions, got {api!r}")
        if not model:
            raise ValueError("HTTPBackend: model is empty; give the server's name of it")
        if not timeout > 0 or retries < 0 or backoff < 0 or concurrency < 1:
            raise ValueError(
                "HTTPBackend: want timeout > 0, retries >= 0, backoff >= 0, concurrency >= 1, got "
                f"{timeout}, {retries}, {backoff}, {concurrency}"
            )
        if requests_per_minute is not None and not requests_per_minute > 0:
            raise ValueError(f"HTTPBackend: requests_per_minute must be > 0 or null, got {requests_per_minute}")
        self._host, self._secure = _checked_url(base_url)
        self.base_url, self.model, self.api, self.key_variable = base_url.rstrip("/"), model, api, key_variable
        self.timeout, self.retries, self.backoff, self.concurrency = timeout, retries, backoff, concurrency
        self.requests_per_minute, self.extra_body = requests_per_minute, dict(extra_body or {})
        self._open()

    @property
    def identity(self) -> str:
        return f"{self.model} at {self.base_url} ({self.api})"

    def __repr__(self) -> str:
        return f"HTTPBackend({self.identity})"

    def __getstate__(self) -> dict[str, Any]:
        # copies and other processes get connections of their own
        return {name: value for name, value in self.__dict__.items() if name not in ("_gate", "_jitter", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._gate = _Gate(self.requests_per_minute)
        self._jitter = random.Random()  # its own: the run's random state is not to depend on the network
        self._pool: Any = None

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """See :class:`~modules.language.backends.base.Backend`. The first request that fails ends the batch."""
        if not requests:
            return []
        headers, cancelled = self._headers(), threading.Event()
        if self._pool is None:
            self._pool = self._new_pool()
        with ThreadPoolExecutor(min(self.concurrency, len(requests)), thread_name_prefix="http-backend") as threads:
            futures = [threads.submit(self._ask, request, headers, cancelled) for request in requests]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future.done() and future.exception() is not None:
                        future.result()  # raises
                return [future.result() for future in futures]
            finally:
                cancelled.set()
                for future in futures:
                    future.cancel()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.clear()
            self._pool = None

    def _new_pool(self) -> Any:
        urllib3 = require("urllib3", extra="rci")
        timeout = urllib3.Timeout(connect=self.timeout, read=self.timeout)
        return urllib3.PoolManager(maxsize=self.concurrency, retries=False, timeout=timeout, cert_reqs="CERT_REQUIRED")

    # ------------------------------------------------------------------------------------------------------- requests

    def _key(self) -> str | None:
        """The key, or None where there is none to send."""
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if not key:
            return None
        if not (key.isascii() and key.isprintable()):
            raise BackendError(
                f"HTTPBackend: the value of {self.key_variable} holds characters that no key has; set it again"
            )
        if not self._secure and self._host not in _LOOPBACK:
            raise BackendError(
                f"HTTPBackend: {self.base_url} is not https, so the key in {self.key_variable} would travel readable "
                "by others; use https, or set key_variable: null if the server wants none"
            )
        return key

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        key = self._key()
        return headers if key is None else {**headers, "Authorization": f"Bearer {key}"}

    def _body(self, request: Request) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": (request.seed ^ (request.seed >> 31)) & 0x7FFFFFFF,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if self.api == "chat":
            body["messages"] = merge_turns(request.turns)
        else:
            body["prompt"] = request.text
        body.update(self.extra_body)
        return json.dumps({key: value for key, value in body.items() if value is not None}).encode()

    def _ask(self, request: Request, headers: Mapping[str, str], cancelled: threading.Event) -> Reply:
        body = self._body(request)
        for attempt in range(self.retries + 1):
            if cancelled.wait(self._gate.delay()):
                raise BackendError(f"HTTPBackend: {self.base_url}: another request of this batch failed")
            try:
                return self._reply(self._post(body, headers), request)
            except _Again as failure:
                if attempt == self.retries:
                    tries = f" ({self.retries + 1} attempts)" if self.retries else ""
                    raise BackendError(f"{failure}{tries}") from None
                pause = min(self.backoff * 2.0**attempt, _LONGEST_WAIT) * self._jitter.uniform(0.75, 1.0)
                if failure.wait is not None:
                    pause = max(pause, min(failure.wait, _LONGEST_WAIT))
                    self._gate.hold(pause)
                _log.warning("%s; attempt %d of %d follows in %.1f s", failure, attempt + 2, self.retries + 1, pause)
                if cancelled.wait(pause):
                    raise BackendError(f"HTTPBackend: {self.base_url}: another request of this batch failed") from None
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: bytes, headers: Mapping[str, str]) -> _Answer:
        errors = require("urllib3", extra="rci").exceptions
        where = f"HTTPBackend: {self.base_url}"
        try:
            response = self._pool.request(
                "POST",
                self.base_url + _PATHS[self.api],
                body=body,
                headers=dict(headers),
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                return _Answer(response.status, dict(response.headers), self._read(response))
            finally:
                response.release_conn()
        except errors.NameResolutionError:  # one of the next kind, which is one of time-outs
            raise _Again(f"{where}: the host {self._host} is not known; check base_url") from None
        except errors.NewConnectionError as error:
            reason = str(error.__cause__ or error)[:80]
            raise _Again(f"{where} can't be connected to ({reason}); is the server running?") from None
        except (errors.TimeoutError, TimeoutError):
            raise _Again(
                f"{where} did not answer within {self.timeout:g} s; raise timeout or lower concurrency"
            ) from None
        except errors.SSLError as error:
            raise BackendError(f"{where}: no secure connection ({str(error)[:160]}); check base_url") from None
        except (errors.HTTPError, OSError) as error:
            reason = f"{type(error).__name__}: {str(error)[:80]}"
            raise _Again(f"{where} broke the connection off ({reason}); is the server running?") from None

    def _read(self, response: Any) -> bytes:
        """The body, no larger and no slower than allowed."""
        pieces, size, deadline = [], 0, time.monotonic() + self.timeout
        while piece := response.read1(1 << 16):
            size += len(piece)
            if size > _LARGEST_BODY:
                response.close()
                raise BackendError(
                    f"HTTPBackend: {self.base_url} sends a reply of more than {_LARGEST_BODY >> 20} MiB, which is "
                    "no completion; check base_url"
                )
            if time.monotonic() > deadline:
                response.close()
                raise TimeoutError
            pieces.append(piece)
        return b"".join(pieces)

    # -------------------------------------------------------------------------------------------------------- replies

    def _reply(self, answer: _Answer, request: Request) -> Reply:
        if answer.status != 200:
            self._refuse(answer)
        try:
            content = json.loads(answer.body)
            choice = content["choices"][0]
            text = choice["message"]["content"] if self.api == "chat" else choice["text"]
            text = "" if text is None else text
            if not isinstance(text, str):
                raise TypeError
            usage = content.get("usage") or {}
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
            raise _Again(
                f"HTTPBackend: {self.base_url} sent no {self.api} completion but {self._shown(answer.body)}; check "
                "base_url and api"
            ) from None
        text, cut = stopped(text, request.stop)
        finish = "length" if choice.get("finish_reason") == "length" and not cut else "stop"
        return Reply(text, finish, *counts)

    def _refuse(self, answer: _Answer) -> NoReturn:
        """Raise what a status other than 200 means."""
        status, where = answer.status, f"HTTPBackend: {self.base_url}"
        if status in (401, 403):
            if self.key_variable is None:
                mend = "it wants a key: set key_variable to the environment variable that holds one"
            elif not os.environ.get(self.key_variable, "").strip():
                mend = f"it wants a key: set the environment variable {self.key_variable}"
            else:
                mend = f"check the key in the environment variable {self.key_variable}"
            raise BackendError(f"{where} refuses access to {self.model} (HTTP {status}); {mend}")
        if status == 404:
            raise BackendError(
                f"{where} knows no model {self.model!r}, or has no {_PATHS[self.api]} (HTTP 404); check model and "
                "base_url"
            )
        if 300 <= status < 400:
            raise BackendError(f"{where} redirects (HTTP {status}), which is refused; give the final address")
        if status in _RETRIED:
            wait = _seconds(answer.headers)
            if status == 429:
                raise _Again(f"{where} limits the rate (HTTP 429); lower concurrency or set requests_per_minute", wait)
            raise _Again(f"{where} fails (HTTP {status}: {self._shown(answer.body)}); see the server's log", wait)
        too_long = _context_error(answer.body)
        if too_long is not None:
            raise PromptTooLongError(f"{where}: the prompt exceeds the context of {self.model}: {self._hide(too_long)}")
        raise BackendError(f"{where} refuses the request (HTTP {status}: {self._shown(answer.body)})")

    def _shown(self, body: bytes) -> str:
        """The beginning of a body for messages."""
        return excerpt(self._hide(body[:4096].decode("utf-8", "replace")), 160) if body else "an empty body"

    def _hide(self, text: str) -> str:
        """A server may repeat the key it was sent."""
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        return text.replace(key, "***") if key else text


def _checked_url(url: str) -> tuple[str, bool]:
    """Host of a base URL, and whether it is https."""
    parts = urlsplit(url)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if parts.username is not None or parts.password is not None:
        # not shown: it may be a secret
        raise ValueError("HTTPBackend: base_url holds a user or password; put the key into an environment variable")
    if not valid or parts.query or parts.fragment:
        raise ValueError(f"HTTPBackend: base_url must be http(s)://host[:port][/path], got {url!r}")
    return str(parts.hostname), parts.scheme == "https"


def _seconds(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds, be it a number or a date."""
    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), None)
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _context_error(body: bytes) -> str | None:
    """What a server says of a prompt that is too long; None: its error is another one."""
    try:
        error = json.loads(body)["error"]
        kinds, message = (error.get("code"), error.get("type")), str(error.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if "context_length_exceeded" in kinds or "exceed_context_size_error" in kinds or "context length" in message:
        numbers = [f"{name} {error[name]}" for name in ("n_prompt_tokens", "n_ctx") if name in error]
        return " ".join([message[:300], *numbers])
    return None
