"""Deltas that must be refused: each kind damages a good one in one way, at a random place."""

from __future__ import annotations

import os

from shared.schemas.weights import PublishRequest
from shared.types import SegmentEncoding
from tests.chaos.bad_pushes import VERIFICATION, Damage, nan
from tests.chaos.push_draft import Draft


def flipped_delta_bit(draft: Draft) -> PublishRequest:
    """One bit of what changed."""
    request = draft.write_delta()
    with draft.path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        position = draft.generator.randrange(start, draft.path.stat().st_size)
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << draft.generator.randrange(8))]))
    return request


def truncated_delta(draft: Draft) -> PublishRequest:
    """What changed ends early."""
    request = draft.write_delta()
    os.truncate(draft.path, draft.generator.randrange(draft.path.stat().st_size))
    return request


def delta_on_other_tensors(draft: Draft) -> PublishRequest:
    """What changed since a file that is not the committed one."""
    other = draft.path.with_name("slipstream-other.safetensors")
    mine = draft.path
    name = draft.any_name()
    good = draft.tensors
    spec, data = good[name]
    draft.replace(name, spec, bytes([data[0] ^ 1]) + data[1:])
    draft.path = other
    draft.write()
    draft.path, draft.tensors = mine, good
    # It says one element, where the server's file differs in all of them.
    try:
        request = draft.write_delta(other)
    finally:
        other.unlink()
    return request


def nan_by_a_delta(draft: Draft) -> PublishRequest:
    """What changed leads to a NaN, digested as such."""
    nan(draft)
    return draft.write_delta()


def full_as_a_delta(draft: Draft) -> PublishRequest:
    """Every tensor, but said to be what changed."""
    request = draft.write()
    manifest = request.manifest.model_copy(update={"encoding": SegmentEncoding.DELTA})
    return request.model_copy(update={"manifest": manifest})


def delta_as_full(draft: Draft) -> PublishRequest:
    """What changed, but said to be every tensor."""
    request = draft.write_delta()
    manifest = request.manifest.model_copy(update={"encoding": SegmentEncoding.FULL})
    return request.model_copy(update={"manifest": manifest})


DELTA_KINDS: dict[str, tuple[Damage, tuple[type[Exception], ...]]] = {
    "flipped bit of a delta": (flipped_delta_bit, VERIFICATION),
    "truncated delta": (truncated_delta, VERIFICATION),
    "delta on other tensors": (delta_on_other_tensors, VERIFICATION),
    "NaN by a delta": (nan_by_a_delta, VERIFICATION),
    "full, said to be a delta": (full_as_a_delta, VERIFICATION),
    "delta, said to be full": (delta_as_full, VERIFICATION),
}
