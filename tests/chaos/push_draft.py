"""A good push in memory, which a test may damage before it is written."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from shared.delta_writer import write_delta
from shared.safetensors_file import TensorSpan, read_header
from shared.schemas.weights import PublishRequest
from shared.segment_writer import TensorSpec, write_segment
from shared.weights import SegmentKind, segment_name

Tensors = dict[str, tuple[TensorSpec, bytes]]


def read_tensors(path: Path) -> Tensors:
    """Everything of a safetensors file, in memory."""
    raw = path.read_bytes()

    def of(name: str, span: TensorSpan) -> tuple[TensorSpec, bytes]:
        return TensorSpec(name, span.dtype, span.shape), raw[span.start : span.end]

    return {name: of(name, span) for name, span in read_header(path).items()}


@dataclass(kw_only=True, slots=True)
class Draft:
    """A push in the making: what damages it changes the tensors, the file or the request."""

    tensors: Tensors
    path: Path
    generator: random.Random
    version: int
    base_version: int

    def write(self) -> PublishRequest:
        """The segment, and the request that fits it."""
        self.path.unlink(missing_ok=True)
        manifest = write_segment(
            self.path,
            [spec for spec, _ in self.tensors.values()],
            lambda spec: (self.tensors[spec.name][1],),
        )
        return PublishRequest(
            version=self.version, base_version=self.base_version, manifest=manifest
        )

    def write_delta(self, base_path: Path | None = None) -> PublishRequest:
        """What changed since the server's file of the base version (or another file), and the
        request that fits it."""
        self.path.unlink(missing_ok=True)
        name = segment_name(os.getpid(), self.base_version, SegmentKind.SERVER)
        manifest = write_delta(
            self.path,
            [spec for spec, _ in self.tensors.values()],
            lambda spec: (self.tensors[spec.name][1],),
            base_path=base_path or self.path.with_name(name),
            limit_bytes=2 * sum(len(data) for _, data in self.tensors.values()),
        )
        return PublishRequest(
            version=self.version, base_version=self.base_version, manifest=manifest
        )

    def any_name(self, min_bytes: int = 4) -> str:
        names = [n for n, (_, data) in self.tensors.items() if len(data) >= min_bytes]
        return self.generator.choice(sorted(names))

    def replace(self, name: str, spec: TensorSpec, data: bytes) -> None:
        self.tensors = {n: v for n, v in self.tensors.items() if n != name}
        self.tensors[spec.name] = (spec, data)


def make_draft(tensors: Tensors, directory: Path, version: int, seed: int) -> Draft:
    """A good push on top of ``version - 1``, to be damaged."""
    return Draft(
        tensors=tensors,
        path=directory / segment_name(os.getpid(), version),
        generator=random.Random(seed),
        version=version,
        base_version=version - 1,
    )
