"""Pushes that must be refused: each kind damages a good push in one way, at a random place."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from shared.errors import ConflictError, InvalidRequestError, WeightVerificationError
from shared.safetensors_file import read_header
from shared.schemas.weights import PublishRequest, TensorEntry
from shared.segment_writer import TensorSpec
from tests.chaos.push_draft import Draft

EXPONENT = {"BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000)}

Damage = Callable[[Draft], PublishRequest]


def flipped_bit(draft: Draft) -> PublishRequest:
    """One bit of the data, after it was digested."""
    request = draft.write()
    entry = draft.generator.choice(request.manifest.tensors)
    span = read_header(draft.path)[entry.name]
    with draft.path.open("r+b") as file:
        position = draft.generator.randrange(span.start, span.end)
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << draft.generator.randrange(8))]))
    return request


def flipped_header_bit(draft: Draft) -> PublishRequest:
    """One bit of what describes the data."""
    request = draft.write()
    end = min(span.start for span in read_header(draft.path).values())
    raw = bytearray(draft.path.read_bytes())
    while True:
        position = draft.generator.randrange(end)
        flipped = raw[position] ^ (1 << draft.generator.randrange(8))
        # Blanks at the end of the header and in it may turn into others: no damage.
        if not (chr(raw[position]).isspace() and chr(flipped).isspace()):
            break
    raw[position] = flipped
    draft.path.write_bytes(raw)
    return request


def truncated(draft: Draft) -> PublishRequest:
    """The file ends early."""
    request = draft.write()
    os.truncate(draft.path, draft.generator.randrange(draft.path.stat().st_size))
    return request


def with_a_tail(draft: Draft) -> PublishRequest:
    """The file goes on after its last tensor."""
    request = draft.write()
    with draft.path.open("ab") as file:
        file.write(bytes(draft.generator.randrange(1, 64)))
    return request


def without_its_file(draft: Draft) -> PublishRequest:
    """The segment is gone when the server looks."""
    request = draft.write()
    draft.path.unlink()
    return request


def missing_tensor(draft: Draft) -> PublishRequest:
    """A tensor of the model is neither in the file nor in the manifest."""
    draft.tensors = dict(draft.tensors)
    del draft.tensors[draft.any_name()]
    return draft.write()


def missing_in_manifest(draft: Draft) -> PublishRequest:
    """The file has a tensor that the manifest does not name."""
    request = draft.write()
    left = list(request.manifest.tensors)
    left.remove(draft.generator.choice(left))
    return _with_tensors(request, left)


def missing_in_file(draft: Draft) -> PublishRequest:
    """The manifest names a tensor that the file does not have."""
    request = draft.write()
    entry = draft.generator.choice(request.manifest.tensors)
    extra = entry.model_copy(update={"name": f"{entry.name}.more"})
    return _with_tensors(request, [*request.manifest.tensors, extra])


def extra_tensor(draft: Draft) -> PublishRequest:
    """File and manifest have a tensor that the model does not."""
    spec, data = draft.tensors[draft.any_name()]
    draft.replace("", TensorSpec(f"{spec.name}.extra", spec.dtype, spec.shape), data)
    return draft.write()


def renamed_tensor(draft: Draft) -> PublishRequest:
    """A tensor comes under another name."""
    name = draft.any_name()
    spec, data = draft.tensors[name]
    draft.replace(
        name, TensorSpec(name.replace(".weight", ".wieght"), spec.dtype, spec.shape), data
    )
    return draft.write()


def swapped_names(draft: Draft) -> PublishRequest:
    """Two tensors of one shape under each other's digests."""
    request = draft.write()
    by_shape: dict[tuple[int, ...], list[TensorEntry]] = {}
    for entry in request.manifest.tensors:
        by_shape.setdefault(tuple(entry.shape), []).append(entry)
    pairs = [same for same in by_shape.values() if len({e.digest for e in same}) > 1]
    same = draft.generator.choice(pairs)
    one = same[0]
    other = next(entry for entry in same if entry.digest != one.digest)
    digests = {one.name: other.digest, other.name: one.digest}
    return _with_tensors(
        request,
        [
            e.model_copy(update={"digest": digests.get(e.name, e.digest)})
            for e in request.manifest.tensors
        ],
    )


def other_shape(draft: Draft) -> PublishRequest:
    """A tensor of as many elements in another shape."""
    name = draft.generator.choice(
        sorted(n for n, (spec, _) in draft.tensors.items() if len(spec.shape) == 2)
    )
    spec, data = draft.tensors[name]
    rows, columns = spec.shape
    shape = (rows // 2, columns * 2) if rows % 2 == 0 else (rows * columns, 1)
    draft.replace(name, TensorSpec(name, spec.dtype, shape), data)
    return draft.write()


def shorter_tensor(draft: Draft) -> PublishRequest:
    """A tensor with a row less."""
    name = draft.any_name()
    spec, data = draft.tensors[name]
    row_bytes = len(data) // spec.shape[0]
    shape = (spec.shape[0] - 1, *spec.shape[1:])
    draft.replace(name, TensorSpec(name, spec.dtype, shape), data[:-row_bytes])
    return draft.write()


def integer_dtype(draft: Draft) -> PublishRequest:
    """A tensor whose bytes are said to be integers."""
    name = draft.any_name()
    spec, data = draft.tensors[name]
    dtype = {"F32": "I32", "BF16": "I8"}[spec.dtype]
    factor = {"F32": 1, "BF16": 2}[spec.dtype]
    shape = (*spec.shape[:-1], spec.shape[-1] * factor)
    draft.replace(name, TensorSpec(name, dtype, shape), data)
    return draft.write()


def dtype_of_the_manifest_only(draft: Draft) -> PublishRequest:
    """The manifest says F16 where the file has another dtype of two bytes, or I32 for F32."""
    request = draft.write()
    chosen = draft.generator.choice(request.manifest.tensors)
    dtype = {"F32": "I32", "BF16": "F16"}[chosen.dtype]
    return _with_tensors(
        request,
        [
            e.model_copy(update={"dtype": dtype}) if e is chosen else e
            for e in request.manifest.tensors
        ],
    )


def _not_finite(draft: Draft, mantissa: int, sign: int) -> PublishRequest:
    name = draft.any_name()
    spec, data = draft.tensors[name]
    kind, exponent = EXPONENT[spec.dtype]
    values = np.frombuffer(bytearray(data), dtype=kind)
    sign_bit = sign << (8 * values.itemsize - 1)
    values[draft.generator.randrange(len(values))] = kind(exponent | mantissa | sign_bit)
    draft.replace(name, spec, values.tobytes())
    return draft.write()


def nan(draft: Draft) -> PublishRequest:
    """A NaN, digested as such."""
    return _not_finite(draft, draft.generator.randrange(1, 0x80), draft.generator.randrange(2))


def infinity(draft: Draft) -> PublishRequest:
    """An infinity, digested as such."""
    return _not_finite(draft, 0, draft.generator.randrange(2))


def wrong_base(draft: Draft) -> PublishRequest:
    """Built on a version that is not the committed one."""
    draft.base_version += draft.generator.choice([-2, -1, 1, 2, 5])
    draft.base_version = max(draft.base_version, 0)
    draft.version = draft.base_version + draft.generator.randrange(1, 4)
    return draft.write()


def old_version(draft: Draft) -> PublishRequest:
    """A version that is committed or was passed, with other tensors."""
    draft.version = draft.generator.randrange(1, draft.base_version + 1)
    draft.base_version = draft.version - 1
    name = draft.any_name()
    spec, data = draft.tensors[name]
    draft.replace(name, spec, bytes(len(data)))
    return draft.write()


def version_not_above_base(draft: Draft) -> PublishRequest:
    """A version equal to its own base, or below."""
    draft.version = draft.generator.randrange(1, draft.base_version + 1)
    return draft.write()


def _with_tensors(request: PublishRequest, tensors: list[TensorEntry]) -> PublishRequest:
    manifest = request.manifest.model_copy(update={"tensors": tensors})
    return request.model_copy(update={"manifest": manifest})


VERIFICATION = (WeightVerificationError,)
CONFLICT = (ConflictError, InvalidRequestError)
KINDS: dict[str, tuple[Damage, tuple[type[Exception], ...]]] = {
    "flipped bit": (flipped_bit, VERIFICATION),
    "flipped header bit": (flipped_header_bit, VERIFICATION),
    "truncated file": (truncated, VERIFICATION),
    "file with a tail": (with_a_tail, VERIFICATION),
    "file gone": (without_its_file, VERIFICATION),
    "missing tensor": (missing_tensor, VERIFICATION),
    "not in the manifest": (missing_in_manifest, VERIFICATION),
    "not in the file": (missing_in_file, VERIFICATION),
    "extra tensor": (extra_tensor, VERIFICATION),
    "renamed tensor": (renamed_tensor, VERIFICATION),
    "swapped tensors": (swapped_names, VERIFICATION),
    "other shape": (other_shape, VERIFICATION),
    "a row less": (shorter_tensor, VERIFICATION),
    "integer dtype": (integer_dtype, VERIFICATION),
    "dtype of the manifest": (dtype_of_the_manifest_only, VERIFICATION),
    "NaN": (nan, VERIFICATION),
    "infinity": (infinity, VERIFICATION),
    "wrong base": (wrong_base, CONFLICT),
    "old version, other tensors": (old_version, CONFLICT),
    "version not above its base": (version_not_above_base, CONFLICT),
}
