"""Verification: every way a segment can differ from its manifest is refused by tensor name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.weights.verify import verify_segment
from shared.errors import WeightVerificationError
from shared.safetensors_file import CHUNK_BYTES, read_header
from shared.schemas.weights import WeightManifest
from shared.weights import build_manifest, write_safetensors

NAME = "slipstream-weights-1-v1.safetensors"


def bf16(values: list[float]) -> np.ndarray[Any, Any]:
    """The upper halves of float32: exact for the values used here."""
    return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_model(directory: Path, **changed: tuple[str, tuple[int, ...], Any] | None) -> Path:
    tensors: dict[str, tuple[str, tuple[int, ...], Any]] = {
        "embed": ("F32", (2, 3), np.arange(6, dtype=np.float32)),
        "layer": ("BF16", (4,), bf16([0.0, -1.0, 3.3895313892515355e38, 1e-38])),
        "norm": ("F16", (2,), np.array([65504, -65504], np.float16)),
        "steps": ("I64", (1,), np.array([-1], np.int64)),
    }
    for name, tensor in changed.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    path = directory / NAME
    write_safetensors(path, [(name, *tensor) for name, tensor in tensors.items()])
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> WeightManifest:
    return build_manifest(write_model(tmp_path))


def test_a_segment_that_is_what_its_manifest_says_passes(
    tmp_path: Path, manifest: WeightManifest
) -> None:
    verify_segment(tmp_path / NAME, manifest)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"norm": None}, "'norm': expected the tensor of the manifest"),
        ({"bias": ("F32", (1,), bytes(4))}, "'bias': expected only tensors of the manifest"),
        ({"norm": ("BF16", (2,), bytes(4))}, "'norm': expected dtype F16, found dtype BF16"),
        (
            {"embed": ("F32", (3, 2), np.arange(6, dtype=np.float32))},
            r"'embed': expected shape \[2, 3\], found shape \[3, 2\]",
        ),
        (
            {"embed": ("F32", (2, 3), np.array([0, 1, 2, 3, 4, 6], np.float32))},
            "'embed': expected digest",
        ),
    ],
)
def test_a_difference_is_refused_by_the_name_of_the_tensor(
    tmp_path: Path, manifest: WeightManifest, changed: dict[str, Any], text: str
) -> None:
    with pytest.raises(WeightVerificationError, match=text):
        verify_segment(write_model(tmp_path, **changed), manifest)


def test_a_renamed_tensor_is_refused(tmp_path: Path, manifest: WeightManifest) -> None:
    norm = ("F16", (2,), np.array([65504, -65504], np.float16))
    with pytest.raises(WeightVerificationError, match="'norm'"):
        verify_segment(write_model(tmp_path, norm=None, normal=norm), manifest)


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_tensor_is_found(
    tmp_path: Path, manifest: WeightManifest, bit: int
) -> None:
    path = tmp_path / NAME
    content = bytearray(path.read_bytes())
    content[read_header(path)["layer"].start + 3] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(WeightVerificationError, match="'layer': expected digest"):
        verify_segment(path, manifest)


@pytest.mark.parametrize("num_bytes", [0, 7, 60, -1])
def test_a_truncated_file_is_refused(
    tmp_path: Path, manifest: WeightManifest, num_bytes: int
) -> None:
    path = tmp_path / NAME
    os.truncate(path, num_bytes if num_bytes >= 0 else path.stat().st_size + num_bytes)
    with pytest.raises(WeightVerificationError, match=NAME):
        verify_segment(path, manifest)


NOT_FINITE = [float("nan"), float("-nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("index", [0, 5, CHUNK_BYTES])
def test_nan_and_infinity_are_refused_wherever_they_are(
    tmp_path: Path, dtype: str, value: float, index: int
) -> None:
    numpy_types = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    values = np.zeros(CHUNK_BYTES + 1, numpy_types.get(dtype, np.float32))
    values[index] = value
    data = values if dtype in numpy_types else (values.view(np.uint32) >> 16).astype(np.uint16)
    path = tmp_path / NAME
    write_safetensors(path, [("w", dtype, data.shape, data)])
    with pytest.raises(WeightVerificationError, match=f"NaN or infinity at element {index}"):
        verify_segment(path, build_manifest(path))


def test_integers_with_the_bits_of_a_nan_pass(tmp_path: Path) -> None:
    path = tmp_path / NAME
    write_safetensors(path, [("w", "I32", (2,), b"\xff" * 8), ("u", "U8", (2,), b"\xff\x7f")])
    verify_segment(path, build_manifest(path))


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_exactly_the_finite_float32_tensors_pass(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    path = tmp_path_factory.mktemp("w") / NAME
    array = np.array(values, np.float32)
    write_safetensors(path, [("w", "F32", array.shape, array)])
    if np.isfinite(array).all():
        verify_segment(path, build_manifest(path))
    else:
        with pytest.raises(WeightVerificationError, match="'w'"):
            verify_segment(path, build_manifest(path))


def test_a_manifest_that_contradicts_itself_is_refused(
    tmp_path: Path, manifest: WeightManifest
) -> None:
    first = manifest.tensors[0]
    lying = first.model_copy(update={"num_bytes": first.num_bytes + 1})
    for tensors in (
        [lying, *manifest.tensors[1:]],
        [*manifest.tensors, first],
        [first.model_copy(update={"dtype": "F12"}), *manifest.tensors[1:]],
        [first.model_copy(update={"shape": [-1]}), *manifest.tensors[1:]],
    ):
        with pytest.raises(WeightVerificationError, match=repr(first.name)):
            verify_segment(tmp_path / NAME, manifest.model_copy(update={"tensors": tensors}))


def test_a_digest_in_capitals_is_the_same_digest(tmp_path: Path, manifest: WeightManifest) -> None:
    tensors = [
        tensor.model_copy(update={"digest": tensor.digest.upper()}) for tensor in manifest.tensors
    ]
    verify_segment(tmp_path / NAME, manifest.model_copy(update={"tensors": tensors}))


def test_a_symbolic_link_is_refused_whatever_it_points_to(
    tmp_path: Path, manifest: WeightManifest
) -> None:
    link = tmp_path / "slipstream-link.safetensors"
    link.symlink_to(tmp_path / NAME)
    with pytest.raises(WeightVerificationError, match="regular file"):
        verify_segment(link, manifest)
