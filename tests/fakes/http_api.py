"""A rollout server with canned answers over real HTTP, for tests of clients."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from shared.types import FinishReason
from tests.fakes.rollouts import rollout_sample

ENGINE: dict[str, Any] = {
    "engine_id": "engine-0",
    "state": "serving",
    "error": None,
    "pid": 1,
    "cpu_cores": "0",
    "target_version": 3,
    "drafter_version": 3,
    "drafter_scheme": "int8",
    "num_running_reqs": 2,
    "num_waiting_reqs": 0,
    "kv_cache_usage": 0.25,
    "num_kv_blocks": 64,
    "block_size": 16,
    "max_model_len": 256,
    "num_generation_tokens": 10,
    "num_prompt_tokens": 5,
    "num_preemptions": 0,
    "num_reserved": 2,
    "start_up_s": 1.0,
    "uptime_s": 9.0,
}

POLICY: dict[str, Any] = {
    "mode": "kv_gate",
    "num_speculative_tokens": 3,
    "kv_cache_threshold": 0.5,
    "kv_cache_hysteresis": 0.05,
    "min_dwell_steps": 8,
}

SPECULATION: dict[str, Any] = {
    "engine_id": "engine-0",
    "enabled": True,
    "num_speculative_tokens": 3,
    "reason": "predicted_faster",
    "kv_cache_usage": 0.25,
    "num_steps": 10,
    "num_steps_on": 8,
    "num_switches": 1,
    "num_drafts": 8,
    "num_draft_tokens": 24,
    "num_accepted_tokens": 20,
    "num_accepted_tokens_per_pos": [8, 7, 5],
    "mean_acceptance_length": 3.5,
    "acceptance_per_pos": [0.95, 0.9, 0.81],
    "cost_model": "self",
    "history": [
        {
            "step": 10,
            "time_s": 1.0,
            "kv_cache_usage": 0.25,
            "num_running_reqs": 2,
            "num_waiting_reqs": 0,
            "num_speculative_tokens": 3,
            "reason": "predicted_faster",
            "predicted_tokens_per_s": 100.0,
            "predicted_speedup": 1.42,
        }
    ],
}


class HttpApi:
    """State of the fake: what it was asked, and how it shall misbehave."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, str, Any]] = []
        self.engine_count = 1
        self.starting_polls = 0
        """How many more engine lists show the last engine as starting."""
        self.policy = dict(POLICY)
        self.damaged: list[str] = []
        """What an audit finds different."""
        self.cut_stream_after: int | None = None
        """Groups after which the next streamed answer breaks off, once."""
        self.hang_stream_after: int | None = None
        """Groups after which streamed answers say nothing more, until ``go_on`` is set."""
        self.go_on = threading.Event()
        self.num_aborted_streams = 0
        """Streamed answers whose samples end before their time, from the next one on."""
        self.kept_state: str | None = None
        """State of every rollout request that is asked for; None: it is not known."""
        self.refusal: tuple[int, dict[str, Any]] | None = None
        """Status and error body of every answer, while set."""

    def answer(self, method: str, path: str, body: Any) -> dict[str, Any] | None:
        """JSON for a request; None for an unknown route."""
        if path == "/v1/engines":
            if method == "PUT":
                self.engine_count = body["count"]
            return self.engines()
        if path.partition("?")[0] == "/v1/speculation":
            return self.speculation(body if method == "PATCH" else {})
        if path == "/v1/weights":
            versions = {"engine_id": "engine-0", "target_version": 3, "drafter_version": 3}
            push = {"version": 3, "committed": True, "total_s": 0.5, "error": None}
            running = {"version": 4, "phase": "loading"}
            return {
                "committed_version": 3,
                "push": running,
                "engines": [versions],
                "history": [push],
            }
        if (method, path) == ("POST", "/v1/weights/audit"):
            report = {"engine_id": "engine-0", "version": 3, "num_equal": 40, "num_skipped": 0}
            report |= {"different": self.damaged, "audit_s": 1.5}
            removed = ["engine-0"] if self.damaged else []
            return {
                "version": 3,
                "is_intact": not self.damaged,
                "engines": [report],
                "engines_removed": removed,
            }
        if path.startswith("/v1/rollouts/"):
            return self.rollouts(path.removeprefix("/v1/rollouts/"))
        return None

    def rollouts(self, request_id: str) -> dict[str, Any] | None:
        """Answer of ``GET`` and ``DELETE /v1/rollouts/{request_id}``."""
        if self.kept_state is None:
            return None
        bodies = [body for _, path, body in self.requests if path == "/v1/rollouts"]
        body = next(body for body in bodies if body["request_id"] == request_id)
        groups = [self.group(index, item) for index, item in enumerate(body["prompts"])]
        counts = ("prompt", "completion", "draft", "accepted")
        usage = {f"num_{name}_tokens": 0 for name in counts}
        result = {"request_id": request_id, "groups": groups, "usage": usage}
        return {
            "request_id": request_id,
            "state": self.kept_state,
            "num_groups": len(groups),
            "num_finished_groups": 0,
            "result": result if self.kept_state == "finished" else None,
        }

    def speculation(self, change: dict[str, Any]) -> dict[str, Any]:
        """Answer of ``/v1/speculation``; a change for one engine shows as its own settings."""
        fields = {name: value for name, value in change.items() if name != "engine_ids"}
        overrides = dict.fromkeys(change.get("engine_ids", ()), self.policy | fields)
        if not overrides:
            self.policy.update(fields)
        return {
            "policy": self.policy,
            "overrides": overrides,
            "max_num_speculative_tokens": 4,
            "engines": [SPECULATION],
        }

    def engines(self) -> dict[str, Any]:
        """Answer of ``/v1/engines``."""
        engines = [{**ENGINE, "engine_id": f"engine-{i}"} for i in range(self.engine_count)]
        if self.starting_polls and engines:
            self.starting_polls -= 1
            engines[-1]["state"] = "starting"
        return {"target_count": self.engine_count, "engines": engines}

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Groups in reverse order of the prompts, as a busy server may finish them."""
        request_id = body["request_id"]
        order = list(enumerate(body["prompts"]))[::-1]
        for number, (index, prompt) in enumerate(order):
            if self.cut_stream_after == number:
                self.cut_stream_after = None
                return
            if self.hang_stream_after == number:
                self.go_on.wait(20)
            group = self.group(index, prompt)
            if self.num_aborted_streams > 0:
                sample = rollout_sample(0, reward=None, finish_reason=FinishReason.ABORT)
                group["samples"] = [sample.model_dump(mode="json")]
            yield {"type": "group", "request_id": request_id, "group": group}
        self.num_aborted_streams -= 1
        yield {"type": "done", "request_id": request_id}

    def group(self, index: int, prompt: dict[str, Any]) -> dict[str, Any]:
        """One prompt's result."""
        return {
            "group_id": f"group={index}",
            "prompt_index": index,
            "prompt_token_ids": [1],
            "answer": prompt.get("answer"),
            "metadata": {"text": prompt.get("prompt")},
            "samples": [],
        }


@contextmanager
def running_api() -> Iterator[HttpApi]:
    """The fake on a free loopback port, for the time of the block."""
    api = HttpApi()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            api.requests.append((self.command, self.path, body))
            if api.refusal is not None:
                self.send(api.refusal[0], {"error": api.refusal[1]})
            elif self.path == "/v1/rollouts":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for line in api.stream(body):
                        self.wfile.write(json.dumps(line).encode() + b"\n")
            else:
                answer = api.answer(self.command, self.path, body)
                self.send(404 if answer is None else 200, answer or {})

        do_GET = do_PUT = do_PATCH = do_POST = do_DELETE = handle_any

        def send(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status in (429, 503):
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield api
    finally:
        api.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
