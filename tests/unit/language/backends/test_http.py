"""HTTPBackend against a real server on this machine: every failure it names, what it sends, and what it hides."""

from __future__ import annotations

import copy
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("urllib3", reason="needs the extra 'rci'")

from modules.language.backends import BackendError, HTTPBackend, PromptTooLongError, Reply, Request, Turn  # noqa: E402

KEY = "sk-very-secret-0123456789"


def completion(text: str | None, finish: str = "stop") -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "text": text, "finish_reason": finish}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }


class Server:
    """Answers by ``answer(number of the request, its body)`` -> (status, headers, body)."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.under_way = self.most = 0
        self.answer: Callable[[int, dict[str, Any]], tuple[int, dict[str, str], Any]] = lambda *_: (
            200,
            {},
            completion("fine"),
        )
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    outer.times.append(time.monotonic())
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                try:
                    status, headers, content = outer.answer(number, body)
                finally:
                    with lock:
                        outer.under_way -= 1
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
                        self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    if headers.get("Content-Length"):
                        self.close_connection = True  # a length that is not the body's
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def backend(self, **options: Any) -> HTTPBackend:
        return HTTPBackend(self.url, "tiny", **{"backoff": 0.01, "timeout": 5.0, "retries": 2, **options})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Server()
    yield made
    made.server.shutdown()
    made.thread.join()
    made.server.server_close()


def ask(text: str = "click", **options: Any) -> Request:
    return Request((Turn("user", text),), **options)


def test_a_chat_request_holds_messages_and_sampling(server: Server) -> None:
    backend = server.backend(extra_body={"top_k": 5, "max_tokens": None, "max_completion_tokens": 9})
    turns = (Turn("system", "a"), Turn("user", "b"), Turn("user", "c"), Turn("assistant", "d"), Turn("user", "e"))
    request = Request(turns, max_new_tokens=12, temperature=0.5, top_p=0.9, stop=("`",), seed=2**40 + 5)
    assert backend.generate([request]) == [Reply("fine", "stop", 7, 3)]
    body = server.requests[0]
    assert body.pop("messages") == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "bc"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    seed = body.pop("seed")
    assert 0 <= seed < 2**31
    assert body == {
        "model": "tiny", "temperature": 0.5, "top_p": 0.9, "stop": ["`"], "top_k": 5, "max_completion_tokens": 9,
    }  # fmt: skip
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    backend.generate([Request(turns, seed=2**40 + 5), Request(turns, seed=2**40 + 6)])
    seeds = [body["seed"] for body in server.requests[1:]]
    assert sorted({*seeds, seed}) == sorted(set(seeds))
    assert len(set(seeds)) == 2
    backend.close()


def test_a_completion_request_holds_one_text(server: Server) -> None:
    backend = server.backend(api="completions", key_variable=None)
    request = Request((Turn("user", "Q: "), Turn("assistant", "A")), max_new_tokens=4)
    server.answer = lambda *_: (200, {}, completion("12 and so on", "length"))
    assert backend.generate([request])[0].finish == "length"
    assert server.requests[0]["prompt"] == "Q: A"
    assert server.requests[0]["max_tokens"] == 4
    assert server.paths == ["/v1/completions"]
    assert "Authorization" not in server.headers[0]


def test_a_reply_ends_at_a_stop_string_that_the_server_left_in(server: Server) -> None:
    server.answer = lambda *_: (200, {}, completion("click this`. And then", "length"))
    assert server.backend().generate([ask(stop=("`",))])[0] == Reply("click this", "stop", 7, 3)


@pytest.mark.parametrize("text", ["", None])
def test_an_empty_completion_is_an_empty_reply(server: Server, text: str | None) -> None:
    server.answer = lambda *_: (200, {}, completion(text))
    assert server.backend().generate([ask()])[0].text == ""


def test_a_batch_is_asked_at_once_and_answered_in_order(server: Server) -> None:
    barrier = threading.Barrier(3, timeout=5)

    def answer(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        text = body["messages"][0]["content"]
        barrier.wait()  # passes only if three are under way together
        time.sleep(0.02 * (5 - int(text)))
        return 200, {}, completion(f"reply {text}")

    server.answer = answer
    replies = server.backend(concurrency=3).generate([ask(str(number)) for number in range(6)])
    assert [reply.text for reply in replies] == [f"reply {number}" for number in range(6)]
    assert server.most == 3
    assert server.backend().generate([]) == []


def test_429_with_retry_after_is_waited_for(server: Server) -> None:
    server.answer = lambda number, _: (429, {"Retry-After": "1"}, {}) if number == 0 else (200, {}, completion("ok"))
    assert server.backend().generate([ask()])[0].text == "ok"
    assert len(server.requests) == 2
    assert 0.9 < server.times[1] - server.times[0] < 3


def test_retry_after_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.language.backends.http._LONGEST_WAIT", 0.05)
    dates = ["Wed, 21 Oct 2099 07:28:00 GMT", "1e9", "nonsense"]
    server.answer = lambda number, _: (503, {"Retry-After": dates[number]}, {}) if number < 3 else (
        200, {}, completion("ok"))  # fmt: skip
    assert server.backend(retries=3).generate([ask()])[0].text == "ok"
    assert server.times[-1] - server.times[0] < 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_tried_again_and_then_named(server: Server, status: int) -> None:
    server.answer = lambda *_: (status, {}, {"error": {"message": "no luck"}})
    with pytest.raises(BackendError, match=rf"HTTP {status}.*3 attempts") as caught:
        server.backend().generate([ask()])
    assert len(server.requests) == 3
    assert server.url in str(caught.value)
    assert "requests_per_minute" in str(caught.value) if status == 429 else "no luck" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, 'refuses the request (HTTP 400: \'{"error": "bad seed"}\')'),
        (401, "check the key in the environment variable OPENAI_API_KEY"),
        (403, "check the key in the environment variable OPENAI_API_KEY"),
        (404, "knows no model 'tiny'"),
        (301, "redirects (HTTP 301), which is refused; give the final address"),
        (307, "redirects (HTTP 307), which is refused; give the final address"),
    ],
)
def test_a_status_that_stays_is_not_tried_again(server: Server, status: int, words: str) -> None:
    headers = {"Location": f"{server.url}/elsewhere"} if status < 400 else {}
    server.answer = lambda *_: (status, headers, {"error": "bad seed"})
    with pytest.raises(BackendError) as caught:
        server.backend().generate([ask()])
    assert words in str(caught.value)
    assert server.url in str(caught.value)
    assert len(server.requests) == 1


def test_a_missing_key_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda *_: (401, {}, {})
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(BackendError, match="set the environment variable OPENAI_API_KEY"):
        server.backend().generate([ask()])
    assert "Authorization" not in server.headers[0]
    with pytest.raises(BackendError, match="set key_variable to the environment variable"):
        server.backend(key_variable=None).generate([ask()])


@pytest.mark.parametrize(
    "body",
    [
        b"<html>not json", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {}}]}',
        b'{"choices": [{"message": {"content": 5}}]}', b"\xff\xfe", b"", b"[" * 100_000,
        b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": Infinity}}',
    ],
)  # fmt: skip
def test_a_reply_that_is_no_completion_is_tried_again_and_then_named(server: Server, body: bytes) -> None:
    server.answer = lambda *_: (200, {}, body)
    with pytest.raises(BackendError, match="sent no chat completion but") as caught:
        server.backend(retries=1).generate([ask()])
    assert len(server.requests) == 2
    assert "\n" not in str(caught.value)
    server.answer = lambda number, _: (200, {}, completion("ok") if number == 3 else body)
    assert server.backend(retries=1).generate([ask()])[0].text == "ok"


def test_a_slow_reply_times_out_and_names_the_time(server: Server) -> None:
    gate = threading.Event()
    server.answer = lambda *_: (gate.wait(10), (200, {}, completion("late")))[1]
    start = time.monotonic()
    try:
        with pytest.raises(BackendError, match=r"did not answer within 0\.2 s"):
            server.backend(timeout=0.2, retries=1).generate([ask()])
        assert time.monotonic() - start < 3
        assert len(server.requests) == 2
    finally:
        gate.set()


def test_a_body_that_trickles_times_out(server: Server) -> None:
    """Each byte comes before the read time-out, all of them together do not."""
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            try:
                while not stop.wait(0.05):
                    connection.sendall(b" ")
            except OSError:
                pass

    thread = threading.Thread(target=trickle)
    thread.start()
    start = time.monotonic()
    try:
        backend = HTTPBackend(f"http://127.0.0.1:{listener.getsockname()[1]}", "tiny", timeout=0.4, retries=0)
        with pytest.raises(BackendError, match=r"did not answer within 0\.4 s"):
            backend.generate([ask()])
        assert time.monotonic() - start < 3
        backend.close()
    finally:
        stop.set()
        thread.join()
        listener.close()


def test_a_connection_refused_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    backend = HTTPBackend(f"http://127.0.0.1:{port}/v1", "tiny", retries=1, backoff=0.01)
    with pytest.raises(BackendError, match=rf"127\.0\.0\.1:{port}/v1 can't be connected to .*refused.*2 attempts"):
        backend.generate([ask()])


def test_a_body_cut_short_is_tried_again(server: Server) -> None:
    server.answer = lambda number, _: (200, {"Content-Length": "5000"} if number == 0 else {}, completion("ok"))
    assert server.backend().generate([ask()])[0].text == "ok"
    assert len(server.requests) == 2


def test_a_chunked_reply_is_read(server: Server) -> None:
    data = json.dumps(completion("in pieces")).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:20], data[20:])) + b"0\r\n\r\n"
    server.answer = lambda *_: (200, {"Transfer-Encoding": "chunked"}, chunks)
    assert [reply.text for reply in server.backend().generate([ask(), ask()])] == ["in pieces"] * 2


def test_an_endless_body_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.language.backends.http._LARGEST_BODY", 1 << 20)
    server.answer = lambda *_: (200, {}, b" " * (2 << 20))
    with pytest.raises(BackendError, match="a reply of more than 1 MiB"):
        server.backend().generate([ask()])


@pytest.mark.parametrize(
    "error",
    [
        {"code": "context_length_exceeded", "message": "maximum is 4097 tokens, your messages have 5000"},
        {"type": "exceed_context_size_error", "message": "too large", "n_prompt_tokens": 5000, "n_ctx": 4097},
        {"message": "This model's maximum context length is 4097 tokens, but 5000 were requested", "code": 400},
    ],
)
def test_a_prompt_too_long_is_named_with_its_tokens(server: Server, error: dict[str, Any]) -> None:
    server.answer = lambda *_: (400, {}, {"error": error})
    with pytest.raises(PromptTooLongError, match="exceeds the context of tiny") as caught:
        server.backend().generate([ask()])
    assert "4097" in str(caught.value)
    assert "5000" in str(caught.value)


def test_a_failing_request_ends_the_batch_at_once(server: Server) -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return (404, {}, {}) if body["messages"][0]["content"] == "1" else (503, {"Retry-After": "30"}, {})

    server.answer = answer
    start = time.monotonic()
    with pytest.raises(BackendError, match="HTTP 404"):
        server.backend(concurrency=2).generate([ask(str(number)) for number in range(20)])
    assert time.monotonic() - start < 5
    assert len(server.requests) < 5


def test_requests_are_spaced(server: Server) -> None:
    backend = server.backend(concurrency=4, requests_per_minute=600)
    backend.generate([ask() for _ in range(3)])
    backend.generate([ask()])  # of the backend, not of a batch
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert server.times[-1] - server.times[0] > 0.28
    assert min(gaps) > 0.05


def test_the_key_is_seen_nowhere(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    backend = server.backend(retries=1)
    shown = []
    for status in (200, 400, 401, 404, 500):
        server.answer = lambda number, _, status=status: (status, {}, {"error": f"your key {KEY} is no good"})
        with pytest.raises(BackendError) as caught:
            backend.generate([ask()])
        shown.append(str(caught.value))
    assert any("your key *** is no good" in text for text in shown)
    server.answer = lambda *_: (400, {}, {"error": {"code": "context_length_exceeded", "message": f"{KEY} asks much"}})
    with pytest.raises(PromptTooLongError) as too_long:
        backend.generate([ask()])
    shown += [str(too_long.value), backend.identity, repr(backend), str(vars(backend)), caplog.text]
    assert any("attempt 2 of 2" in text for text in shown)  # retries are logged
    assert all(KEY not in text for text in shown)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(BackendError, match="the value of OPENAI_API_KEY holds characters") as caught:
        backend.generate([ask()])
    assert KEY not in str(caught.value)


def test_the_key_is_not_sent_readable_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(BackendError, match="is not https") as caught:
        HTTPBackend("http://models.example/v1", "tiny").generate([ask()])
    assert KEY not in str(caught.value)


def test_a_copy_has_connections_of_its_own(server: Server) -> None:
    backend = server.backend(requests_per_minute=6000)
    backend.generate([ask()])
    twin = copy.deepcopy(backend)
    assert twin.generate([ask()]) == backend.generate([ask()])
    assert twin._pool is not backend._pool


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_url": "ftp://host"}, "base_url must be http"),
        ({"base_url": "http://host/v1?key=1"}, "base_url must be http"),
        ({"base_url": "https://me:secret@host/v1"}, "holds a user or password"),
        ({"api": "edits"}, "api must be chat or completions, got 'edits'"),
        ({"model": ""}, "model is empty"),
        ({"timeout": 0}, "want timeout > 0"),
        ({"retries": -1}, "want timeout > 0, retries >= 0"),
        ({"concurrency": 0}, "concurrency >= 1"),
        ({"requests_per_minute": 0}, "requests_per_minute must be > 0 or null, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="HTTPBackend") as caught:
        HTTPBackend(**{"base_url": "http://127.0.0.1/v1", "model": "tiny", **options})
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
