"""Whole draft loops as CUDA graphs: one graph per padded batch size and draft length.

A draft step of a small batch is hundreds of kernels of a few microseconds; launched one by one, the
host is the bottleneck. Replaying all steps of a loop as one graph leaves the memory traffic.

A graph bakes in addresses and sizes, so the loop reads its inputs from buffers that stay where they
are (``loop_buffers.py``) and a batch is padded up to a captured size. Random numbers still differ
from replay to replay: capturing registers the device's default generator with the graph, which
advances its offset at each replay. Requests with seeds of their own need other generators and are
drafted without a graph. Weights may change between replays, because packing writes in place.

Pure torch, and what is CUDA in it is one function; the rest is tested on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

MAX_GRAPH_BATCH_SIZE = 64
"""Larger batches keep the hardware busy without drafts, and without graphs."""
MAX_PROBABILITIES_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, order=True, slots=True)
class LoopShape:
    """What a graph was captured for."""

    batch_size: int
    """Rows, padding included."""
    draft_length: int


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> None: ...


def graph_batch_sizes(
    max_batch_size: int, *, bytes_per_row: int, limit_bytes: int = MAX_PROBABILITIES_BYTES
) -> tuple[int, ...]:
    """Batch sizes worth a graph, ascending: powers of two, and the largest batch there may be.

    Padding costs next to nothing: a draft step of a small batch takes the time of its weights.

    Args:
        max_batch_size: sequences the engine runs at once.
        bytes_per_row: memory one row of the batch keeps for good (its draft probabilities).
        limit_bytes: what the largest batch may keep.

    Example: 20 sequences -> 1, 2, 4, 8, 16, 20.
    """
    largest = min(max_batch_size, MAX_GRAPH_BATCH_SIZE, limit_bytes // bytes_per_row)
    powers = {2**exponent for exponent in range(largest.bit_length())}
    return tuple(sorted(powers | ({largest} if largest > 0 else set())))


class DraftLoopGraphs:
    """The captured loops of one worker."""

    def __init__(self, record: Callable[[Callable[[], None]], Replayable]) -> None:
        """``record`` runs a function once while capturing it (``cuda_graph_recorder``)."""
        self._record = record
        self._graphs: dict[LoopShape, Replayable] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(
        self,
        batch_sizes: Iterable[int],
        draft_lengths: Iterable[int],
        run_loop: Callable[[LoopShape], None],
    ) -> None:
        """Capture every combination, the largest first so that smaller ones fit into its memory.

        Args:
            run_loop: runs a whole loop of the shape over the persistent buffers. Called once to
                warm up (compiling and allocating are not allowed in a capture), once captured.
        """
        lengths = tuple(draft_lengths)
        shapes = [LoopShape(size, length) for size in batch_sizes for length in lengths]
        for shape in sorted(shapes, reverse=True):
            run_loop(shape)
            self._graphs[shape] = self._record(lambda shape=shape: run_loop(shape))  # type: ignore[misc]

    def shape_for(self, batch_size: int, draft_length: int) -> LoopShape | None:
        """The smallest captured shape a batch fits into; None when there is none."""
        fitting = [
            shape
            for shape in self._graphs
            if shape.draft_length == draft_length and shape.batch_size >= batch_size
        ]
        return min(fitting, default=None)

    def replay(self, shape: LoopShape) -> None:
        """Run a captured loop over what the buffers hold now.

        Raises:
            KeyError: the shape was not captured.
        """
        self._graphs[shape].replay()


def cuda_graph_recorder(pool: Any) -> Callable[[Callable[[], None]], Replayable]:
    """Records on the current stream into a memory pool shared with other graphs.

    Sharing is safe because graphs of one worker never run at the same time, and what a loop hands
    over lives in buffers outside the pool.
    """

    def record(run: Callable[[], None]) -> Replayable:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            run()
        return graph

    return record
