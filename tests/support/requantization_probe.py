"""Worker extension of test engines (vLLM 0.32.0): requantizes the drafter and looks at the result.

Called through ``tests.support.engine.probe``; nothing may be running. A digest stands for a layer's
packed weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open

from rollout_server.drafter.proposer import SelfDraftProposer
from rollout_server.drafter.requantization import (
    requantize,
    requantize_by_block,
    requantize_changed,
)
from rollout_server.drafter.sharing import draft_linear_methods
from rollout_server.engine.vllm_plugin.checkpoint import OpenCheckpoint, iterate_safetensors
from rollout_server.engine.vllm_plugin.worker_extension import SlipstreamWorkerExtension

SCRIBBLE = 0x5A
"""In every byte of a buffer that nothing has written since."""
RESET_PEAK = "5"


class RequantizationProbe(SlipstreamWorkerExtension):
    """All names carry the ``probe_`` prefix."""

    def probe_collect_layers(self) -> None:
        """From now on layers are collected before they are packed, as if split between ranks."""
        for method in draft_linear_methods(drafter()).values():
            method._is_whole_layer = False

    def probe_digests(self) -> dict[str, str]:
        """Layer name to digest."""
        return {
            name: "".join(xxhash.xxh3_64_hexdigest(bytes_of(t).numpy().tobytes()) for t in tensors)
            for name, tensors in packed_tensors().items()
        }

    def probe_requantize(self, path: str) -> dict[str, str]:
        """Digests after a whole push."""
        requantize(drafter(), iterate_safetensors(path))
        return self.probe_digests()

    def probe_requantize_by_block(self, path: str, names: list[str] | None) -> int:
        """How many steps it took."""
        with OpenCheckpoint(path) as checkpoint:
            return sum(1 for _ in requantize_by_block(drafter(), checkpoint.read, names))

    def probe_requantize_changed(self, path: str, names: list[str]) -> tuple[int, str]:
        """Feed only these tensors: number of layers repacked, and the error if it was refused."""
        weights = {name: tensor for name, tensor in iterate_safetensors(path) if name in names}
        try:
            return requantize_changed(drafter(), weights), ""
        except ValueError as exc:
            return 0, str(exc)

    def probe_scribble(self) -> None:
        """Spoil the packed weights of every layer: what is rewritten from here on can be told."""
        for tensors in packed_tensors().values():
            for tensor in tensors:
                bytes_of(tensor).fill_(SCRIBBLE)

    def probe_rewritten(self) -> dict[str, float]:
        """Share of each layer's output channels (or blocks of 32) written since the scribbling."""
        shares = {}
        for name, tensors in packed_tensors().items():
            # int8 and int4 on CPU have rows first; fp8 keeps a transposed view, written as a whole.
            rows = bytes_of(tensors[0]).flatten(1)
            shares[name] = float((rows != SCRIBBLE).any(dim=1).float().mean())
        return shares

    def probe_requantize_peak(self, path: str) -> int:
        """Resident memory that a whole push takes at its worst moment beyond that before it.

        Every page of the file is touched first, so that the file's own pages do not count.
        """
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            requantize(drafter(), weights.items())
            for tensor in weights.values():
                tensor.view(torch.uint8).amax()
            with peak_resident_bytes() as peak:
                requantize(drafter(), weights.items())
        return peak[0]


def drafter() -> torch.nn.Module:
    proposer = SelfDraftProposer.active
    assert proposer is not None
    return proposer.model


def packed_tensors() -> dict[str, list[torch.Tensor]]:
    """By layer name; the first one holds the codes."""
    return {
        name: method._kernel.matmul.tensors()
        for name, method in draft_linear_methods(drafter()).items()
    }


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's own memory, row by row as it lies there."""
    return (tensor if tensor.is_contiguous() else tensor.t()).view(torch.uint8)


@contextmanager
def peak_resident_bytes() -> Iterator[list[int]]:
    """Filled in at the end: how far this process's resident memory rose above that at the start."""
    # What the allocator keeps for later use would hide what is taken from it inside.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    peak: list[int] = []
    yield peak
    peak.append(_status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
