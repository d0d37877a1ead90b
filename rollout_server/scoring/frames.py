"""How pool and worker talk: JSON objects over a pipe, each behind its length in 8 bytes.

JSON and not pickle: nothing a reward function returns can run code in the API process.

A frame to a worker is a batch: what the samples of a prompt share, once, and their completions.
A frame from it is the answer for one sample. The answers come in order, each before the next sample
is begun; the last one says so. A batch that takes longer than ``SLICE_S`` ends early: the worker
never begins the samples after the one that was too slow, and the pool gives them to whoever is
idle. So a sample waits for at most one slow one while another worker is free, and without a batch
being called back: nothing has to be agreed on in two processes at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

LENGTH_NUM_BYTES = 8
MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Above any request body the API accepts; a longer frame is a broken pipe, not data."""

SLICE_S = 0.005
"""Seconds for which a worker goes on beginning samples of one batch. A frame costs about half a
millisecond, so more would save little, and keep samples from idle workers."""


def encode_frame(message: Mapping[str, Any]) -> bytes:
    """Serialize a message. Half a surrogate pair, which Python's text may hold, becomes "?": no
    answer of the API could have it, and one reward's text would fail the whole request.

    Raises:
        TypeError, ValueError: it holds something JSON has no form for (NaN and infinity included).
    """
    text = json.dumps(message, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    body = text.encode(errors="replace")
    return len(body).to_bytes(LENGTH_NUM_BYTES, "big") + body


def frame_num_bytes(prefix: bytes) -> int:
    """Length of the body behind a prefix.

    Raises:
        ValueError: longer than ``MAX_FRAME_BYTES``.
    """
    num_bytes = int.from_bytes(prefix, "big")
    if num_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {num_bytes} bytes is above the limit of {MAX_FRAME_BYTES}")
    return num_bytes


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one message, blocking; None at the end of the stream."""
    prefix = stream.read(LENGTH_NUM_BYTES)
    if len(prefix) < LENGTH_NUM_BYTES:
        return None
    num_bytes = frame_num_bytes(prefix)
    body = stream.read(num_bytes)
    return decode_body(body) if len(body) == num_bytes else None


def decode_body(body: bytes) -> dict[str, Any]:
    """Parse a frame's body.

    Raises:
        ValueError: not a JSON object.
    """
    message = json.loads(body)
    if not isinstance(message, dict):
        raise ValueError(f"frame holds a JSON {type(message).__name__}, not an object")
    return message
