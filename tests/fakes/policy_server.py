"""A rollout server without engines: a Hugging Face model behind the real routes, over real HTTP.

Takes weight pushes from the trainer's own safetensors files, samples with the weights it was given
last, and scores against the answer. Sampling depends on the prompts and the weights alone, so a run
can be repeated. Under a request id there is one result, as on the real server.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.schemas.rollouts import (
    PromptItem,
    RolloutGroup,
    RolloutRequest,
    RolloutUsage,
    StreamLine,
)
from shared.schemas.speculation import SpeculationResponse
from shared.schemas.weights import (
    EngineCommitTimings,
    PublishRequest,
    PublishResponse,
    WeightsResponse,
)
from shared.types import FinishReason
from shared.weights import build_manifest
from tests.fakes.rollouts import rollout_group, rollout_sample
from tests.fakes.speculation_answers import speculation_answer

PAUSED_S = 0.002


class PolicyServer:
    """State of the server, and knobs to misbehave."""

    def __init__(self, model_path: Path, segment_directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.segment_directory = segment_directory
        self.committed_version = 0
        self.url = ""
        self.requests: list[RolloutRequest] = []
        self.kept: dict[str, list[RolloutGroup]] = {}
        """By request id: asked for again, groups are the same."""
        self._bodies: dict[str, RolloutRequest] = {}
        self.refuse_rollouts: Callable[[RolloutRequest], tuple[int, str] | None] = lambda _: None
        """Called with each request; status and code, or None to answer it."""
        self.pushes: list[PublishRequest] = []
        self.aborted: list[str] = []
        self.hold = threading.Event()
        """Clear it, and streams stop after their first group until the request is aborted."""
        self.hold.set()
        self.first_group_sent = threading.Event()
        self.refuse_push: tuple[int, str] | None = None
        self.before_commit: Callable[[PublishRequest], None] = lambda push: None
        self.after_commit: Callable[[PublishRequest], None] = lambda push: None
        """Before its answer. Either may raise ``ConnectionError``: then there is no answer."""
        self._lock = threading.Lock()
        self._num_polls = 0

    def refusal(self, request: RolloutRequest) -> tuple[int, str] | None:
        """Why it is not answered: it shall not be, or its id belongs to another body."""
        is_new = self._bodies.setdefault(str(request.request_id), request) == request
        return self.refuse_rollouts(request) or (None if is_new else (409, "conflict"))

    def groups(self, request: RolloutRequest) -> Iterator[RolloutGroup]:
        """Sample and score every prompt that is not kept."""
        kept = self.kept.setdefault(str(request.request_id), [])
        for index, item in enumerate(request.prompts):
            with self._lock:
                if index == len(kept):
                    kept.append(self._sample(request, index, item))
            yield kept[index]

    def publish(self, request: PublishRequest) -> PublishResponse:
        """Load the pushed file into the model, after checking it as the server would."""
        path = self.segment_directory / request.manifest.segment
        assert build_manifest(path) == request.manifest
        with self._lock:
            assert request.base_version == self.committed_version
            missing, unexpected = self.model.load_state_dict(load_file(path), strict=False)
            assert set(missing) <= {"lm_head.weight"}
            assert not unexpected
            self.model.tie_weights()
            self.committed_version = request.version
            self.pushes.append(request)
        timings = EngineCommitTimings(
            engine_id="engine-0",
            stage_s=0.001,
            pause_s=0.0,
            load_s=0.001,
            requantize_s=0.001,
            resume_s=0.0,
            paused_s=PAUSED_S,
        )
        num_bytes = sum(entry.num_bytes for entry in request.manifest.tensors)
        return PublishResponse(
            version=request.version,
            verify_s=0,
            total_s=0.01,
            num_bytes=num_bytes,
            engines=[timings],
        )

    def speculation(self, since_step: int) -> SpeculationResponse:
        """One more decision per poll, and counters that grow with it."""
        self._num_polls += 1
        return speculation_answer(self._num_polls, since_step)

    def _sample(self, request: RolloutRequest, index: int, item: PromptItem) -> RolloutGroup:
        prompt_ids = self.tokenizer.encode(item.prompt)
        generator = torch.Generator().manual_seed(zlib.crc32(str(item.prompt).encode()))
        ids_BT = torch.tensor([prompt_ids] * request.n)
        logprobs_BT = torch.zeros(request.n, 0)
        temperature = request.sampling.temperature
        with torch.no_grad():
            for _ in range(request.sampling.max_tokens):
                logits_BV = self.model(input_ids=ids_BT).logits[:, -1] / (temperature or 1.0)
                logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
                if temperature == 0:
                    next_B1 = logprobs_BV.argmax(dim=-1, keepdim=True)
                else:
                    next_B1 = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)
                ids_BT = torch.cat([ids_BT, next_B1], dim=1)
                logprobs_BT = torch.cat([logprobs_BT, logprobs_BV.gather(1, next_B1)], dim=1)
        samples = []
        for row in range(request.n):
            completion = ids_BT[row, len(prompt_ids) :].tolist()
            is_stopped = self.tokenizer.eos_token_id in completion
            length = len(completion)
            if is_stopped:
                length = completion.index(self.tokenizer.eos_token_id) + 1
            text = self.tokenizer.decode(completion[:length], skip_special_tokens=True)
            samples.append(
                rollout_sample(
                    row,
                    reward=self.reward(text, item),
                    token_ids=completion[:length],
                    logprobs=logprobs_BT[row, :length].tolist(),
                    text=text,
                    finish_reason=FinishReason.STOP if is_stopped else FinishReason.LENGTH,
                    version=self.committed_version,
                )
            )
        return rollout_group(
            samples=samples, prompt_index=index, prompt_token_ids=prompt_ids, answer=item.answer
        )

    def reward(self, text: str, item: PromptItem) -> float:
        """The more of the completion is the digit 1, the better: learnt in a few steps."""
        return text.count("1") / max(1, len(text))


@contextmanager
def serve_policy(model_path: Path, segment_directory: Path) -> Iterator[PolicyServer]:
    """Run a server on a free port of 127.0.0.1."""
    state = PolicyServer(model_path, segment_directory)
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.hold.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: PolicyServer

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/readyz":
            self._json({"ready": True})
        elif path == "/v1/weights":
            version = self.state.committed_version
            body = WeightsResponse(committed_version=version, engines=[], history=[])
            self._json(body.model_dump(mode="json"))
        elif path == "/v1/speculation":
            response = self.state.speculation(int(query.partition("=")[2] or 0))
            self._json(response.model_dump(mode="json"))
        else:
            self._error(404, "not_found")

    def do_DELETE(self) -> None:
        self.state.aborted.append(self.path.removeprefix("/v1/rollouts/"))
        self.state.hold.set()
        self._json({})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/weights":
            if self.state.refuse_push is not None:
                self._error(*self.state.refuse_push)
                return
            self._push(PublishRequest.model_validate_json(raw))
            return
        request = RolloutRequest.model_validate_json(raw)
        self.state.requests.append(request)
        refusal = self.state.refusal(request)
        if refusal is not None:
            self._error(*refusal)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Connection", "close")
        self.end_headers()
        for group in self.state.groups(request):
            self._line(StreamLine(type="group", request_id=str(request.request_id), group=group))
            self.state.first_group_sent.set()
            self.state.hold.wait(20)
            if request.request_id in self.state.aborted:
                break
        usage = RolloutUsage(
            num_prompt_tokens=0, num_completion_tokens=0, num_draft_tokens=0, num_accepted_tokens=0
        )
        self._line(StreamLine(type="done", request_id=str(request.request_id), usage=usage))
        self.close_connection = True

    def _push(self, push: PublishRequest) -> None:
        try:
            self.state.before_commit(push)
            response = self.state.publish(push)
            self.state.after_commit(push)
        except ConnectionError:
            self.close_connection = True
            return
        self._json(response.model_dump(mode="json"))

    def _line(self, line: StreamLine) -> None:
        self.wfile.write(line.model_dump_json().encode() + b"\n")
        self.wfile.flush()

    def _json(self, body: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: int, code: str) -> None:
        error = {"code": code, "type": "error", "message": f"refused with {code}", "param": None}
        self._json({"error": error}, status)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
