"""Bodies and whole requests that no client of ours would send. Pure: a seed gives the same ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from shared.msgpack_bodies import pack

JSON_TYPE = "application/json"
MSGPACK_TYPE = "application/msgpack"
ROUTES = (
    ("POST", "/v1/rollouts"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/weights"),
    ("PUT", "/v1/engines"),
    ("PATCH", "/v1/speculation"),
)
VALID: dict[str, dict[str, Any]] = {
    "/v1/rollouts": {
        "request_id": "r",
        "prompts": [{"prompt": "2+3=", "answer": "5", "metadata": {"row": 1}}],
        "n": 2,
        "sampling": {"temperature": 1.0, "max_tokens": 4, "stop": ["x"], "logit_bias": {"5": 1.5}},
        "reward": {"name": "exact_match", "params": {}},
        "max_policy_lag": 3,
        "stream": False,
    },
    "/v1/completions": {"model": "modelled", "prompt": ["a", "b"], "n": 2, "max_tokens": 4},
    "/v1/chat/completions": {
        "model": "modelled",
        "messages": [{"role": "user", "content": "2+3?"}],
        "max_tokens": 4,
    },
    "/v1/weights": {
        "version": 1,
        "base_version": 0,
        "manifest": {
            "segment": "slipstream-1-1.safetensors",
            "tensors": [
                {"name": "w", "dtype": "F32", "shape": [1], "num_bytes": 4, "digest": "00"}
            ],
        },
    },
    "/v1/engines": {"count": 2},
    "/v1/speculation": {"mode": "adaptive", "kv_cache_threshold": 0.5},
}
STRANGE: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.0, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), "", " ", "\x00", "\ud800", "\U0001f600", "a" * 5000, "../../etc",
    "1e5", "null", [], {}, [[]], [None], {"": {}}, {"a" * 300: 1}, [1] * 300,
)  # fmt: skip
KEYS = ("prompts", "prompt", "n", "stream", "sampling", "reward", "manifest", "count", "mode",
        "messages", "stop", "seed", "__proto__", "request_id", "engine_ids", "")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRequest:
    """A method, a path and a body of some kind."""

    method: str
    path: str
    content_type: str
    body: bytes


def raw_requests(seed: int) -> Iterator[RawRequest]:
    """Without end."""
    draw = random.Random(seed)
    while True:
        method, path = draw.choice(ROUTES)
        make = draw.choice(_MAKERS)
        body = make(draw, path)
        content_type = MSGPACK_TYPE if make in _MSGPACK_MAKERS else JSON_TYPE
        if draw.random() < 0.05:
            content_type = draw.choice(
                ["", "text/plain", "application/json; charset=utf-16", MSGPACK_TYPE, JSON_TYPE]
            )
        yield RawRequest(method=method, path=path, content_type=content_type, body=body)


def _noise(draw: random.Random, path: str) -> bytes:
    return draw.randbytes(draw.choice([0, 1, 2, 10, 100, 2000]))


def _json_noise(draw: random.Random, path: str) -> bytes:
    pieces = ['{"', "[", "]", "}", ":", ",", "null", "1e999", '"\\ud800"', "-", "tru", "\\u00"]
    return "".join(draw.choices(pieces, k=draw.randint(1, 30))).encode()


def _deep(draw: random.Random, path: str) -> bytes:
    depth = draw.choice([50, 200, 1000, 50_000])
    opening, closing = draw.choice([("[", "]"), ('{"prompts":', "}"), ('{"metadata":', "}")])
    return (opening * depth + "1" + closing * draw.choice([depth, depth - 1, 0])).encode()


def _strange(draw: random.Random, path: str) -> bytes:
    """A valid body with one to three values replaced, added or removed."""
    return _dumped(_mutated(draw, path))


def _strange_msgpack(draw: random.Random, path: str) -> bytes:
    try:
        return pack(_mutated(draw, path))
    except (ValueError, OverflowError, UnicodeError, TypeError):
        return pack(VALID[path])


def _broken(draw: random.Random, path: str) -> bytes:
    """A valid body with bytes flipped, cut out or repeated."""
    return _damaged(draw, _dumped(_mutated(draw, path) if draw.random() < 0.3 else VALID[path]))


def _broken_msgpack(draw: random.Random, path: str) -> bytes:
    return _damaged(draw, pack(VALID[path]))


def _repeated_keys(draw: random.Random, path: str) -> bytes:
    inside = json.dumps(VALID[path])[1:-1]
    return ("{" + ",".join([inside] * draw.randint(2, 5)) + "}").encode()


def _damaged(draw: random.Random, body: bytes) -> bytes:
    damaged = bytearray(body)
    for _ in range(draw.randint(1, 4)):
        where = draw.randrange(len(damaged) + 1)
        kind = draw.randrange(4)
        if kind == 0 and where < len(damaged):
            damaged[where] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del damaged[where : where + draw.randint(1, 20)]
        elif kind == 2:
            damaged[where:where] = draw.randbytes(draw.randint(1, 8))
        else:
            damaged[where:where] = damaged[max(0, where - 20) : where]
    return bytes(damaged)


def _mutated(draw: random.Random, path: str) -> Any:
    body = json.loads(json.dumps(VALID[path]))
    for _ in range(draw.randint(1, 3)):
        holder, key = draw.choice(list(_places(body)) or [(body, draw.choice(KEYS))])
        kind = draw.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            holder[draw.choice(KEYS)] = copy.deepcopy(draw.choice(STRANGE))
        elif kind == 1 and isinstance(holder, dict):
            holder.pop(key, None)
        else:
            holder[key] = copy.deepcopy(draw.choice(STRANGE))
    return body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list)
        else ()
    )  # fmt: skip
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


_MSGPACK_MAKERS = (_strange_msgpack, _broken_msgpack)
_MAKERS: tuple[Callable[[random.Random, str], bytes], ...] = (
    _noise,
    _json_noise,
    _deep,
    _strange,
    _strange,
    _broken,
    _broken,
    _repeated_keys,
    *_MSGPACK_MAKERS,
)


def raw_streams(seed: int) -> Iterator[bytes]:
    """Whole requests as bytes, wrong in what comes before the body: heads, lengths, chunks."""
    draw = random.Random(seed)
    body = _dumped(VALID["/v1/completions"])
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    while True:
        yield draw.choice(
            [
                draw.randbytes(draw.randint(1, 200)),
                _with_length(head, draw.choice(["-1", "x", "1e3", "9" * 30])) + body,
                _with_length(head, len(body) - draw.randint(1, 20)) + body,
                f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()
                + draw.choice([b"zz\r\n", b"5\r\nabc", b"ffffffffffffffffff\r\n", b"\r\n\r\n"]),
                f"{head}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),
                _with_length(f"{head}X: {'a' * draw.choice([10, 70_000])}\r\n", 2) + b"{}",
                b"GET /" + draw.randbytes(30).replace(b"\n", b"") + b" HTTP/1.1\r\nHost: x\r\n\r\n",
                b"GET /v1/rollouts/%ff%00%2e%2e%2f HTTP/1.1\r\nHost: x\r\n\r\n",
                head.encode()[: draw.randint(1, len(head))],
            ]
        )


def _with_length(head: str, length: int | str) -> bytes:
    return f"{head}Content-Length: {length}\r\n\r\n".encode()
