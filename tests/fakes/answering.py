"""A local HTTP server that gives prepared answers in order, and a clock that waits for nobody."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import BaseModel

from tests.fakes.rollouts import rollout_group, rollout_sample

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def answering(*answers: Answer) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server that gives one answer per request, in order; yields its URL and what it got."""
    queue = list(answers)
    received: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            received.append((f"{self.command} {self.path}", body))
            queue.pop(0)(self)

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
    assert queue == []


def status(code: int, retry_after: str | None = None, error: str = "some_code") -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = {"error": {"code": error, "type": "t", "message": "no", "param": None}}
        content = json.dumps(body).encode()
        handler.send_response(code)
        if retry_after is not None:
            handler.send_header("Retry-After", retry_after)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def weights(version: int) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = {"committed_version": version, "engines": [], "history": []}
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(json.dumps(body).encode())

    return answer


def stream(
    *prompt_indices: int, end: str | None = "done", error_code: str = "engine_error"
) -> Answer:
    """A line per group; without ``end`` the connection closes in the middle."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for index in prompt_indices:
            group = rollout_group(samples=[rollout_sample(0, reward=1.0)], prompt_index=index)
            line = {"type": "group", "request_id": "r", "group": group.model_dump(mode="json")}
            handler.wfile.write(json.dumps(line).encode() + b"\n")
        if end == "error":
            error = {"code": error_code, "type": "t", "message": "burnt", "param": None}
            line = {"type": "error", "request_id": "r", "error": error}
            handler.wfile.write(json.dumps(line).encode() + b"\n")
        elif end == "done":
            handler.wfile.write(b'{"type": "done", "request_id": "r"}\n')

    return answer


class FakeTime:
    """Pausing moves the clock and is remembered."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses_s: list[float] = []
        self.stop = False

    def clock(self) -> float:
        return self.now_s

    def pause(self, delay_s: float) -> bool:
        self.pauses_s.append(delay_s)
        self.now_s += delay_s
        return self.stop


def answer_with(body: BaseModel) -> Answer:
    """200 with a body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body.model_dump_json().encode())

    return answer


def silence(released: threading.Event) -> Answer:
    """Nothing, until the test lets go."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        released.wait(20)

    return answer
