"""Segments: the file format, what a broken header is told apart by, names, sweeping, room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from shared.errors import WeightTransferError, WeightVerificationError
from shared.safetensors_file import CHUNK_BYTES, open_regular_file, read_range
from shared.weights import (
    DTYPE_NUM_BYTES,
    SegmentKind,
    build_manifest,
    read_header,
    segment_name,
    sweep_stale_segments,
    write_safetensors,
)


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_the_reference_implementation_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = {
        "small": np.array([1, -2, 3], dtype=np.int8),
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(2.5, dtype=np.float64),
        "empty": np.zeros((0, 4), dtype=np.float16),
    }
    names = {"int8": "I8", "float32": "F32", "float64": "F64", "float16": "F16"}
    size = write_safetensors(
        path, ((name, names[str(a.dtype)], a.shape, a) for name, a in tensors.items())
    )
    assert size == path.stat().st_size
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_what_the_reference_implementation_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    save_file({"a": array, "b": np.zeros(5, np.uint8)}, path, metadata={"format": "pt"})
    spans = read_header(path)
    assert (spans["a"].dtype, spans["a"].shape) == ("I32", (3, 4))
    assert path.read_bytes()[spans["a"].start : spans["a"].end] == array.tobytes()


def test_a_manifest_digests_each_tensor_across_chunks(tmp_path: Path) -> None:
    path = tmp_path / "slipstream-weights-1-v1.safetensors"
    data = np.random.default_rng(0).bytes(2 * CHUNK_BYTES + 6)
    write_safetensors(path, [("big", "BF16", (CHUNK_BYTES + 3,), data), ("e", "F32", (0,), b"")])
    manifest = build_manifest(path)
    assert manifest.segment == path.name
    by_name = {tensor.name: tensor for tensor in manifest.tensors}
    assert by_name["big"].digest == xxhash.xxh3_128_hexdigest(data)
    assert by_name["big"].num_bytes == len(data)
    assert by_name["e"].digest == xxhash.xxh3_128_hexdigest(b"")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(DTYPE_NUM_BYTES)), st.lists(st.integers(0, 4), max_size=3)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_layout_is_read_back_and_aligned(
    tmp_path_factory: pytest.TempPathFactory, layout: list[tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    sources = []
    for index, (dtype, shape) in enumerate(layout):
        num_bytes = DTYPE_NUM_BYTES[dtype] * int(np.prod(shape, dtype=int))
        sources.append((f"t{index}", dtype, tuple(shape), bytes([index]) * num_bytes))
    write_safetensors(path, sources)
    content = path.read_bytes()
    spans = read_header(path)
    assert len(spans) == len(sources)
    for name, dtype, shape, data in sources:
        span = spans[name]
        assert (span.dtype, span.shape) == (dtype, shape)
        assert content[span.start : span.end] == data
        assert span.start % DTYPE_NUM_BYTES[dtype] == 0


A = entry("F32", [1], 0, 4)


@pytest.mark.parametrize(
    ("header", "data", "length", "text"),
    [
        ({"a": A}, b"1234", 10**9, "header length"),
        ({"a": A}, b"1234", 2**63, "header length"),
        (b"{}", b"", 3, "header length"),
        (b"{", b"", None, "not JSON"),
        (b"\xff\xfe", b"", None, "not JSON"),
        (b"[" * 100_000, b"", None, "not JSON"),
        ([], b"", None, "not an object"),
        (b'{"a": 1, "a": 2}', b"", None, "duplicate key a"),
        ({"a": 3}, b"", None, "'a'"),
        ({"a": {**A, "extra": 1}}, b"1234", None, "'a'"),
        ({"a": entry("F32", [1.0], 0, 4)}, b"1234", None, "'a'"),
        ({"a": entry("F32", [True], 0, 4)}, b"1234", None, "'a'"),
        ({"a": entry("F8_E4M3", [4], 0, 4)}, b"1234", None, "F8_E4M3"),
        ({"a": entry("F32", [-1], 0, -4)}, b"1234", None, "not supported"),
        ({"a": entry("F32", [2], 0, 4)}, b"1234", None, "needs 8 bytes"),
        ({"a": entry("F32", [1], 4, 0)}, b"1234", None, "needs 4 bytes"),
        ({"a": A, "b": A}, b"1234", None, "overlaps"),
        ({"a": A, "b": entry("F32", [1], 2, 6)}, b"123456", None, "overlaps"),
        ({"a": A, "b": entry("F32", [1], 8, 12)}, b"1" * 12, None, "gap"),
        ({"a": entry("F32", [1], -4, 0)}, b"1234", None, "overlaps"),
        ({"a": A}, b"123", None, "the file at byte"),
        ({"a": A}, b"12345", None, "the file at byte"),
    ],
)
def test_an_unsound_header_is_refused_with_its_fault(
    tmp_path: Path, header: object, data: bytes, length: int | None, text: str
) -> None:
    path = raw_file(tmp_path / "w.safetensors", header, data, length)
    with pytest.raises(WeightVerificationError, match=text):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_too_short_for_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightVerificationError, match="cannot hold"):
        read_header(path)


def test_a_file_truncated_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"1234")
    descriptor = open_regular_file(tmp_path / "w")
    try:
        with pytest.raises(WeightVerificationError, match="ends at byte 4, expected 8: truncated"):
            list(read_range(descriptor, 0, 8, "w"))
    finally:
        os.close(descriptor)


@given(st.binary(max_size=200), st.integers(0, 100))
def test_no_damage_to_a_file_gets_past_with_another_error(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, position: int
) -> None:
    path = raw_file(tmp_path_factory.mktemp("w") / "w", {"a": A}, b"1234")
    content = bytearray(path.read_bytes())
    content[position : position + len(noise)] = noise
    path.write_bytes(content)
    try:
        spans = read_header(path)
    except WeightVerificationError:
        return
    assert all(span.end <= len(content) for span in spans.values())


def test_links_pipes_and_directories_are_no_segments(tmp_path: Path) -> None:
    raw_file(tmp_path / "real", {"a": A}, b"1234")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("link", "fifo", "directory", "missing"):
        with pytest.raises(WeightVerificationError, match="regular file"):
            build_manifest(tmp_path / name)


def test_the_header_of_a_model_file_is_read_through_a_link(tmp_path: Path) -> None:
    raw_file(tmp_path / "real", {"a": A}, b"1234")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_header(tmp_path / "link") == read_header(tmp_path / "real")


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([("a", "F32", (2,), b"1234")], "needs 8 contiguous bytes"),
        ([("a", "F8", (4,), b"1234")], "'a'"),
        ([("a", "F32", (1,), b"1234"), ("a", "F32", (1,), b"1234")], "twice"),
        ([("__metadata__", "F32", (1,), b"1234")], "reserved"),
        ([("a", "F32", (2, 2), np.zeros((2, 4), np.float32)[:, ::2])], "contiguous"),
    ],
)
def test_a_tensor_that_does_not_fit_is_not_written(
    tmp_path: Path, tensors: list[Any], text: str
) -> None:
    with pytest.raises(WeightTransferError, match=text):
        write_safetensors(tmp_path / "w.safetensors", tensors)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 5})()
    monkeypatch.setattr("shared.segment_writer.shutil.disk_usage", lambda _: usage)
    with pytest.raises(WeightTransferError, match=r"needs \d+ bytes, .* has 5 free") as caught:
        write_safetensors(tmp_path / "w.safetensors", [("a", "U8", (64,), bytes(64))])
    assert str(tmp_path) in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_a_transfer_error(tmp_path: Path) -> None:
    with pytest.raises(WeightTransferError, match="shared_memory_dir"):
        write_safetensors(tmp_path / "none" / "w.safetensors", [("a", "U8", (1,), b"1")])


def test_a_file_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.segment_writer.os.write", no_space)
    with pytest.raises(WeightTransferError, match="No space left"):
        write_safetensors(tmp_path / "w.safetensors", [("a", "U8", (1,), b"1")])
    assert list(tmp_path.iterdir()) == []


def test_only_segments_of_dead_owners_are_swept(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = [
        segment_name(child.pid, 3),
        segment_name(child.pid, 4, SegmentKind.SERVER),
        segment_name(child.pid, 5) + ".partial",
    ]
    child.communicate(b"\n", timeout=60)
    own = segment_name(os.getpid(), 1)
    owner, version = own.rsplit("-", 1)
    pid, _, namespace, boot = owner.rsplit("-", 1)[1].split(".")
    reused = f"slipstream-weights-{pid}.1.{namespace}.{boot}-{version}"
    elsewhere = f"slipstream-weights-{pid}.1.{int(namespace) + 1}.{boot}-{version}"
    other_host = f"slipstream-weights-{pid}.1.{namespace}.{int(boot, 16) ^ 1:08x}-{version}"
    plain = f"slipstream-weights-{pid}-v1.safetensors"
    kept = {own, own + ".partial", elsewhere, other_host, plain}
    kept |= {"slipstream-other.safetensors", "model"}
    for name in [*dead, reused, *kept]:
        (tmp_path / name).touch()
    assert sorted(sweep_stale_segments(tmp_path)) == sorted([*dead, reused])
    assert {path.name for path in tmp_path.iterdir()} == kept
