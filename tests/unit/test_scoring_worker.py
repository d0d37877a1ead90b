"""What a worker makes of whatever a reward function does, without a process around it."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json, to_json

from rollout_server.scoring.frames import MAX_FRAME_BYTES, encode_frame, read_frame
from rollout_server.scoring.worker import MAX_DETAIL_BYTES, MAX_DETAIL_DEPTH, run_job


def nested(num_levels: int) -> dict[str, Any]:
    detail: dict[str, Any] = {}
    for level in range(num_levels - 1):
        detail = {"x": [detail] if level == 1 else detail}
    return detail


def run(returned: object) -> dict[str, Any]:
    job = {
        "name": "r",
        "params": {},
        "prompt": "",
        "completion": "",
        "answer": None,
        "metadata": {},
    }
    return run_job({"r": lambda *_: returned}, job)


@pytest.mark.parametrize(
    ("returned", "reward", "detail"),
    [
        (1, 1.0, {}),
        (True, 1.0, {}),
        (Fraction(1, 4), 0.25, {}),
        (np.float32(0.5), 0.5, {}),
        ((0.5, {"why": "half"}), 0.5, {"why": "half"}),
        ((0.5, nested(MAX_DETAIL_DEPTH - 1)), 0.5, nested(MAX_DETAIL_DEPTH - 1)),
    ],
)
def test_numbers_with_and_without_detail_are_rewards(
    returned: object, reward: float, detail: dict[str, Any]
) -> None:
    assert run(returned) == {"reward": reward, "detail": detail}


@pytest.mark.parametrize(
    "returned",
    [
        None,
        "1.0",
        math.nan,
        math.inf,
        10**400,
        (1.0, {"x": math.nan}),
        (1.0, {"x": object()}),
        (1.0, "text"),
        (1.0, {"x": "y" * MAX_DETAIL_BYTES}),
        (1.0, nested(MAX_DETAIL_DEPTH)),
        (1.0, nested(10_000)),
        (None, {}),
        [1.0],
    ],
)
def test_anything_else_is_an_error_and_not_a_reward(returned: object) -> None:
    assert set(run(returned)) == {"error"}


@pytest.mark.parametrize("raised", [ValueError("bad"), SystemExit(3), RecursionError()])
def test_what_a_reward_raises_is_reported_with_its_place(raised: BaseException) -> None:
    def reward(*_: object) -> float:
        raise raised

    job = {"name": "r", "params": {}} | dict.fromkeys(
        ("prompt", "completion", "answer", "metadata")
    )
    error = run_job({"r": reward}, job)["error"]
    assert type(raised).__name__ in error
    assert "test_scoring_worker.py" in error


def test_an_unknown_reward_is_an_error() -> None:
    assert "KeyError" in run_job({}, {"name": "r"})["error"]


def test_a_worker_imports_nothing_heavy() -> None:
    code = (
        "import sys, rollout_server.scoring.worker\n"
        "print(*{'torch', 'ray', 'vllm', 'fastapi', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.split() == []


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_every_message_survives_the_pipe(message: dict[str, Any]) -> None:
    assert read_frame(io.BytesIO(encode_frame(message))) == message


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80\ud83d"])
def test_half_a_surrogate_pair_becomes_text_that_any_answer_can_have(text: str) -> None:
    message = read_frame(io.BytesIO(encode_frame({"error": text, "detail": {text: [text]}})))
    assert message is not None
    assert len(message["error"]) == len(text)
    assert from_json(to_json(message)) == message


@pytest.mark.parametrize("num_bytes", [0, 4, 9])
def test_a_pipe_that_ends_early_is_the_end_of_the_stream(num_bytes: int) -> None:
    assert read_frame(io.BytesIO(encode_frame({"a": 1})[:num_bytes])) is None


def test_a_frame_above_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="above the limit"):
        read_frame(io.BytesIO((MAX_FRAME_BYTES + 1).to_bytes(8, "big")))
