"""Deltas: what they lead to is bit for bit the full push, and nothing else is ever accepted."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.weights.delta import apply_delta
from rollout_server.weights.snapshot import CommittedSnapshot
from shared.delta_writer import DeltaTooLargeError, write_delta
from shared.errors import WeightTransferError, WeightVerificationError
from shared.safetensors_file import read_header
from shared.schemas.weights import WeightManifest
from shared.segment_writer import TensorSpec
from shared.types import SegmentEncoding
from shared.weight_delta import BLOCK_ELEMENTS, PIECE_ELEMENTS
from shared.weights import build_manifest, write_safetensors

BASE = "slipstream-weights-1-v1.safetensors"
DELTA = "slipstream-weights-1-v2.safetensors"
TARGET = "slipstream-server-1-v2.safetensors"
Tensors = dict[str, tuple[str, np.ndarray[Any, Any]]]


def write(path: Path, tensors: Tensors) -> WeightManifest:
    write_safetensors(path, [(n, dtype, t.shape, t) for n, (dtype, t) in tensors.items()])
    return build_manifest(path)


def write_changes(
    directory: Path, new: Tensors, *, piece_bytes: int = 1 << 20, limit_bytes: int = 1 << 30
) -> WeightManifest:
    def produce(spec: TensorSpec) -> list[memoryview]:
        data = new[spec.name][1].tobytes()
        return [memoryview(data[i : i + piece_bytes]) for i in range(0, len(data), piece_bytes)]

    return write_delta(
        directory / DELTA,
        [TensorSpec(name, dtype, tensor.shape) for name, (dtype, tensor) in new.items()],
        produce,
        base_path=directory / BASE,
        limit_bytes=limit_bytes,
    )


def apply(directory: Path, base: WeightManifest, manifest: WeightManifest, **options: Any) -> Path:
    snapshot = CommittedSnapshot(version=1, path=str(directory / BASE), manifest=base)
    target = directory / TARGET
    apply_delta(
        snapshot,
        directory / DELTA,
        manifest,
        target,
        options.get("is_given_up", lambda: False),
        is_durable=False,
    )
    return target


def changed_copy(tensor: np.ndarray[Any, Any], share: float, seed: int) -> np.ndarray[Any, Any]:
    """Other bits in about this share of the elements; never an exponent of all ones."""
    generator = np.random.default_rng(seed)
    new = tensor.copy().reshape(-1)
    where = generator.random(new.size) < share
    new[where] ^= new.dtype.type(1)
    return new.reshape(tensor.shape)


def model(seed: int = 0) -> Tensors:
    generator = np.random.default_rng(seed)

    def half(*shape: int) -> np.ndarray[Any, Any]:
        return generator.integers(0, 0x7F80, shape, dtype=np.uint16)

    return {
        # More than a piece, and a last block that is not whole.
        "embed": ("BF16", half(3, PIECE_ELEMENTS // 2 + 11)),
        "layer": ("BF16", half(300, 300)),
        "norm": ("F32", generator.random(257, dtype=np.float32).view(np.uint32)),
        "empty": ("BF16", half(0, 4)),
        "frozen": ("BF16", half(40)),
    }


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.4, 1.0])
@pytest.mark.parametrize("piece_bytes", [1 << 20, 1_000_002])
def test_a_delta_leads_to_the_very_bytes_of_the_full_segment(
    tmp_path: Path, share: float, piece_bytes: int
) -> None:
    old = model()
    base = write(tmp_path / BASE, old)
    new = {
        name: (dtype, tensor if name == "frozen" else changed_copy(tensor, share, 7))
        for name, (dtype, tensor) in old.items()
    }
    manifest = write_changes(tmp_path, new, piece_bytes=piece_bytes)
    assert manifest.encoding is SegmentEncoding.DELTA
    full = write(tmp_path / "slipstream-full.safetensors", new)
    by_name = {entry.name: entry for entry in manifest.tensors}
    assert by_name == {entry.name: entry for entry in full.tensors}
    target = apply(tmp_path, base, manifest)
    assert target.read_bytes() == (tmp_path / "slipstream-full.safetensors").read_bytes()
    assert "frozen" not in read_header(tmp_path / DELTA)


@pytest.mark.parametrize(
    "where",
    [[0], [BLOCK_ELEMENTS - 1], [BLOCK_ELEMENTS], [PIECE_ELEMENTS - 1, PIECE_ELEMENTS], [-1]],
)
def test_elements_at_the_edges_of_blocks_and_pieces_change(
    tmp_path: Path, where: list[int]
) -> None:
    old = {"w": ("BF16", np.zeros(2 * PIECE_ELEMENTS + 5, np.uint16))}
    base = write(tmp_path / BASE, old)
    tensor = old["w"][1].copy()
    tensor[where] = 3
    manifest = write_changes(tmp_path, {"w": ("BF16", tensor)})
    target = apply(tmp_path, base, manifest)
    assert np.array_equal(np.fromfile(target, np.uint16)[-len(tensor) :], tensor)


def test_one_changed_element_in_a_hundred_takes_two_hundredths_of_the_bytes(
    tmp_path: Path,
) -> None:
    old = {"w": ("BF16", np.zeros((1024, 1024), np.uint16))}
    write(tmp_path / BASE, old)
    write_changes(tmp_path, {"w": ("BF16", changed_copy(old["w"][1], 0.01, 1))})
    share = (tmp_path / DELTA).stat().st_size / (tmp_path / BASE).stat().st_size
    assert 0.018 < share < 0.022


def test_a_delta_above_its_limit_is_given_up_and_leaves_nothing(tmp_path: Path) -> None:
    old = model()
    write(tmp_path / BASE, old)
    new = {name: (dtype, changed_copy(t, 0.5, 3)) for name, (dtype, t) in old.items()}
    with pytest.raises(DeltaTooLargeError, match="longer than 1000 bytes"):
        write_changes(tmp_path, new, limit_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == [BASE]


def test_a_base_with_other_tensors_gives_no_delta(tmp_path: Path) -> None:
    old = model()
    write(tmp_path / BASE, old)
    del old["layer"]
    with pytest.raises(DeltaTooLargeError, match="other tensors"):
        write_changes(tmp_path, old)


def test_a_producer_that_makes_too_few_bytes_is_found_out(tmp_path: Path) -> None:
    write(tmp_path / BASE, {"w": ("BF16", np.zeros(10, np.uint16))})
    spec = TensorSpec("w", "BF16", (10,))
    for made in (bytes(18), bytes(22)):
        with pytest.raises(WeightTransferError, match="20 bytes expected"):
            write_delta(
                tmp_path / DELTA,
                [spec],
                lambda _, made=made: [made],
                base_path=tmp_path / BASE,
                limit_bytes=1000,
            )


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WeightManifest, WeightManifest]:
    """A base and a delta on it."""
    directory = tmp_path_factory.mktemp("delta")
    old: Tensors = {
        "a": ("BF16", np.arange(3000, dtype=np.uint16)),
        "b": ("F32", np.arange(500, dtype=np.uint32)),
    }
    base = write(directory / BASE, old)
    new = {name: (dtype, changed_copy(t, 0.03, 5)) for name, (dtype, t) in old.items()}
    return directory, base, write_changes(directory, new)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damaged_delta_is_accepted(
    pushed: tuple[Path, WeightManifest, WeightManifest], data: st.DataObject
) -> None:
    directory, base, manifest = pushed
    good = (directory / DELTA).read_bytes()
    damaged = bytearray(good)
    header_end = 8 + int.from_bytes(good[:8], "little")
    match data.draw(st.sampled_from(["flip", "cut", "grow", "swap"])):
        case "flip":
            # Behind the header: in it, a flipped blank may still be JSON's blank.
            at = data.draw(st.integers(header_end, len(good) - 1))
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del damaged[data.draw(st.integers(0, len(good) - 1)) :]
        case "grow":
            damaged += data.draw(st.binary(min_size=1, max_size=20))
        case "swap":
            at = data.draw(st.integers(header_end, len(good) - 3))
            damaged[at : at + 2] = damaged[at : at + 2][::-1]
    if damaged == good:
        return
    (directory / DELTA).write_bytes(damaged)
    try:
        with pytest.raises(WeightVerificationError):
            apply(directory, base, manifest)
    finally:
        (directory / DELTA).write_bytes(good)
    assert sorted(path.name for path in directory.iterdir()) == [BASE, DELTA]


def test_a_delta_on_another_base_is_refused(
    tmp_path: Path, pushed: tuple[Path, WeightManifest, WeightManifest]
) -> None:
    directory, base, manifest = pushed
    other = bytearray((directory / BASE).read_bytes())
    other[-1] ^= 1
    (tmp_path / BASE).write_bytes(other)
    (tmp_path / DELTA).write_bytes((directory / DELTA).read_bytes())
    with pytest.raises(WeightVerificationError, match="'a': expected digest"):
        apply(tmp_path, base, manifest)


def test_a_delta_that_leads_to_a_nan_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / BASE, {"w": ("BF16", np.zeros(900, np.uint16))})
    tensor = np.zeros(900, np.uint16)
    tensor[321] = 0x7FC0
    manifest = write_changes(tmp_path, {"w": ("BF16", tensor)})
    with pytest.raises(WeightVerificationError, match="NaN or infinity at element 321"):
        apply(tmp_path, base, manifest)
    assert not (tmp_path / TARGET).exists()


def test_tensors_that_no_manifest_has_are_refused(
    tmp_path: Path, pushed: tuple[Path, WeightManifest, WeightManifest]
) -> None:
    directory, base, manifest = pushed
    (tmp_path / BASE).write_bytes((directory / BASE).read_bytes())
    write_safetensors(tmp_path / DELTA, [("c", "U8", (4,), bytes(4))])
    with pytest.raises(WeightVerificationError, match="'c' is no tensor of the manifest"):
        apply(tmp_path, base, manifest)


@pytest.mark.parametrize(("extra", "text"), [(4, "4 bytes too long"), (-4, "4 bytes too short")])
def test_pieces_that_are_not_those_of_the_tensor_are_refused(
    tmp_path: Path, pushed: tuple[Path, WeightManifest, WeightManifest], extra: int, text: str
) -> None:
    directory, base, manifest = pushed
    (tmp_path / BASE).write_bytes((directory / BASE).read_bytes())
    raw = (directory / DELTA).read_bytes()
    entries = {
        name: (raw[span.start : span.end] + bytes(4))[: span.num_bytes + extra]
        for name, span in read_header(directory / DELTA).items()
    }
    sources = [(name, "U8", (len(data),), data) for name, data in entries.items()]
    write_safetensors(tmp_path / DELTA, sources)
    with pytest.raises(WeightVerificationError, match=text):
        apply(tmp_path, base, manifest)


def test_work_that_nobody_waits_for_ends_and_leaves_nothing(
    pushed: tuple[Path, WeightManifest, WeightManifest],
) -> None:
    directory, base, manifest = pushed
    with pytest.raises(WeightTransferError, match="given up"):
        apply(directory, base, manifest, is_given_up=lambda: True)
    assert sorted(path.name for path in directory.iterdir()) == [BASE, DELTA]


def test_neither_side_holds_more_than_a_few_pieces(tmp_path: Path) -> None:
    tensor = np.zeros((64, 1 << 18), np.uint16)
    base = write(tmp_path / BASE, {"w": ("BF16", tensor)})
    new = changed_copy(tensor, 0.01, 2)

    def produce(_: TensorSpec) -> Any:
        return (row.data for row in new)

    tracemalloc.start()
    try:
        manifest = write_delta(
            tmp_path / DELTA,
            [TensorSpec("w", "BF16", tensor.shape)],
            produce,
            base_path=tmp_path / BASE,
            limit_bytes=1 << 25,
        )
        apply(tmp_path, base, manifest)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 << 20, f"{peak_bytes} bytes for a tensor of {tensor.nbytes}"
