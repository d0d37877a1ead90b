"""The CUDA quantizers, run by Triton's interpreter, against the reference: not a bit differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    # Triton reads the variable when it is imported, and other tests have imported it already.
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_quantization"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_and_scales_are_the_references(report: dict[str, Any], dtype: str) -> None:
    assert report[f"int8-{dtype}"] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_int4_words_scales_and_zero_codes_are_the_references(
    report: dict[str, Any], kind: str, group_size: int, dtype: str
) -> None:
    assert report[f"int4-{kind}-{group_size}-{dtype}"] == []


def test_odd_sizes_are_refused_as_the_reference_refuses_them(report: dict[str, Any]) -> None:
    not_dividing, not_of_eight, not_a_power = report["refusals"]
    assert "int4 groups of 64 do not divide a layer's 96 input channels" in not_dividing
    assert "int4 groups of 12 do not divide" in not_of_eight
    assert "powers of two" in not_a_power
