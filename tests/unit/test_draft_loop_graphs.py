"""Captured draft loops: which are captured, which is chosen, and what the loop's buffers say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rollout_server.drafter.cuda_graphs import DraftLoopGraphs, LoopShape, graph_batch_sizes
from rollout_server.drafter.loop_buffers import PADDING_SLOT, LoopBuffers, sample_drafts

BLOCK_SIZE = 4
VOCABULARY = 6


class RecordedRun:
    """Stands for a CUDA graph: runs the recorded function again."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
        run()


@pytest.mark.parametrize(
    ("max_batch_size", "limit_bytes", "expected"),
    [
        (1, 1000, (1,)),
        (3, 1000, (1, 2, 3)),
        (20, 1000, (1, 2, 4, 8, 16, 20)),
        (500, 10**6, (1, 2, 4, 8, 16, 32, 64)),
        (64, 90, (1, 2, 4, 8, 9)),
        (64, 9, ()),
    ],
)
def test_graphs_are_captured_for_small_batches_within_the_memory_limit(
    max_batch_size: int, limit_bytes: int, expected: tuple[int, ...]
) -> None:
    sizes = graph_batch_sizes(max_batch_size, bytes_per_row=10, limit_bytes=limit_bytes)
    assert sizes == expected


def test_every_loop_is_warmed_up_before_it_is_captured_and_the_largest_come_first() -> None:
    runs: list[LoopShape] = []
    recorded: list[int] = []

    def record(run: Callable[[], None]) -> RecordedRun:
        recorded.append(len(runs))
        return RecordedRun(run)

    graphs = DraftLoopGraphs(record)
    graphs.capture((1, 8), (1, 2), runs.append)
    shapes = [LoopShape(8, 2), LoopShape(8, 1), LoopShape(1, 2), LoopShape(1, 1)]
    assert runs == [shape for shape in shapes for _ in range(2)]
    assert recorded == [1, 3, 5, 7]
    assert len(graphs) == 4


def test_a_batch_is_padded_to_the_next_captured_size_of_its_draft_length() -> None:
    graphs = DraftLoopGraphs(RecordedRun)
    graphs.capture((1, 4, 8), (2, 3), lambda shape: None)
    assert graphs.shape_for(1, 2) == LoopShape(1, 2)
    assert graphs.shape_for(2, 3) == LoopShape(4, 3)
    assert graphs.shape_for(8, 3) == LoopShape(8, 3)
    assert graphs.shape_for(9, 3) is None
    assert graphs.shape_for(1, 4) is None


def test_a_replay_runs_the_loop_of_its_own_shape() -> None:
    runs: list[LoopShape] = []
    graphs = DraftLoopGraphs(RecordedRun)
    graphs.capture((1, 2), (1, 2), runs.append)
    runs.clear()
    graphs.replay(LoopShape(2, 1))
    assert runs == [LoopShape(2, 1)]


def loaded_buffers(seq_lens: list[int], rejected: list[int] | None = None) -> LoopBuffers:
    """Buffers of 4 rows; row r has blocks 10r, 10r + 1, 10r + 2."""
    buffers = LoopBuffers(
        max_batch_size=4,
        max_draft_length=3,
        num_block_columns=3,
        block_size=BLOCK_SIZE,
        max_model_len=10,
        probabilities=torch.zeros(4 * 3 * VOCABULARY),
    )
    rows = torch.arange(len(seq_lens), dtype=torch.int32)
    buffers.load(
        next_token_ids_B=rows,
        seq_lens_B=torch.tensor(seq_lens, dtype=torch.int32),
        num_rejected_B=None if rejected is None else torch.tensor(rejected, dtype=torch.int32),
        block_table_BC=rows[:, None] * 10 + torch.arange(3, dtype=torch.int32),
        temperature_B=None,
    )
    return buffers


def test_each_step_writes_the_slot_after_the_last_and_reads_up_to_it() -> None:
    tables = loaded_buffers([3, 7]).step_tables(LoopShape(2, 3))
    assert tables.positions_KB.tolist() == [[3, 7], [4, 8], [5, 9]]
    assert tables.seq_lens_KB.tolist() == [[4, 8], [5, 9], [6, 10]]
    # Row 0 crosses from block 0 to block 1, row 1 from block 11 to block 12.
    assert tables.slots_KB.tolist() == [[3, 47], [4, 48], [5, 49]]
    assert tables.seq_lens_KB.dtype == torch.int32
    assert all(table.is_contiguous() for table in (tables.positions_KB, tables.slots_KB))


def test_rejected_drafts_are_written_over() -> None:
    tables = loaded_buffers([7], rejected=[4]).step_tables(LoopShape(1, 1))
    assert tables.slots_KB.tolist() == [[3]]


def test_padding_rows_write_nothing_and_attend_to_one_token() -> None:
    buffers = loaded_buffers([3, 7, 2, 2])
    buffers = reloaded_with_one_row(buffers)
    tables = buffers.step_tables(LoopShape(4, 2))
    assert tables.slots_KB[:, 1:].unique().tolist() == [PADDING_SLOT]
    assert tables.seq_lens_KB[:, 1:].unique().tolist() == [1]
    assert tables.slots_KB[:, 0].tolist() == [5, 6]


def reloaded_with_one_row(buffers: LoopBuffers) -> LoopBuffers:
    """What was in the other rows stays behind in the buffers."""
    buffers.load(
        next_token_ids_B=torch.zeros(1, dtype=torch.int32),
        seq_lens_B=torch.tensor([5], dtype=torch.int32),
        num_rejected_B=None,
        block_table_BC=torch.tensor([[0, 1, 2]], dtype=torch.int32),
        temperature_B=None,
    )
    return buffers


def test_steps_past_the_context_limit_write_nothing() -> None:
    tables = loaded_buffers([9]).step_tables(LoopShape(1, 3))
    assert tables.slots_KB.tolist() == [[9], [PADDING_SLOT], [PADDING_SLOT]]
    assert tables.positions_KB.tolist() == [[9], [0], [0]]
    assert tables.seq_lens_KB.tolist() == [[10], [1], [1]]


def test_outputs_of_a_smaller_shape_are_contiguous() -> None:
    buffers = loaded_buffers([3])
    shape = LoopShape(3, 2)
    assert buffers.draft_token_ids(shape).shape == (3, 2)
    assert buffers.probabilities(shape, VOCABULARY).shape == (2, 3, VOCABULARY)
    assert buffers.probabilities(shape, VOCABULARY).is_contiguous()


def test_greedy_rows_take_the_most_likely_token_beside_sampled_rows() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.9]]).repeat(2000, 1)
    temperature = torch.tensor([0.0, 2.0]).repeat(1000)
    probabilities = torch.empty(2000, 4)
    token_ids = sample_drafts(logits, temperature, probabilities)
    assert token_ids[0::2].unique().tolist() == [1]
    counts = torch.bincount(token_ids[1::2], minlength=4) / 1000
    expected = (logits[1] / 2).softmax(dim=-1)
    assert torch.allclose(probabilities[1], expected)
    # Five standard deviations of a fraction of a thousand draws.
    assert (counts - expected).abs().max() < 5 * 0.5 / 1000**0.5
