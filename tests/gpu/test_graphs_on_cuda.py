"""``DraftLoopGraphs`` and its buffers with real CUDA graphs, without an engine."""

from __future__ import annotations

import pytest
import torch

from rollout_server.drafter.cuda_graphs import DraftLoopGraphs, LoopShape, cuda_graph_recorder
from rollout_server.drafter.loop_buffers import LoopBuffers, sample_drafts

pytestmark = pytest.mark.gpu

VOCABULARY = 64
SHAPE = LoopShape(4, 2)


class Loop:
    """A loop whose next token depends on the last one through a fixed table of logits."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.buffers = LoopBuffers(
            max_batch_size=4,
            max_draft_length=2,
            num_block_columns=2,
            block_size=16,
            max_model_len=32,
            probabilities=torch.zeros(4 * 2 * VOCABULARY, device="cuda"),
        )
        self.logits_VV = torch.randn(VOCABULARY, VOCABULARY, device="cuda")
        self.slots_KB = torch.zeros(2, 4, dtype=torch.int64, device="cuda")

    def run(self, shape: LoopShape) -> None:
        tables = self.buffers.step_tables(shape)
        self.slots_KB[: shape.draft_length, : shape.batch_size].copy_(tables.slots_KB)
        token_ids = self.buffers.first_token_ids_B[: shape.batch_size]
        for step in range(shape.draft_length):
            token_ids = sample_drafts(
                self.logits_VV[token_ids],
                self.buffers.temperature(shape),
                self.buffers.probabilities(shape, VOCABULARY)[step],
            )
            self.buffers.draft_token_ids(shape)[:, step].copy_(token_ids)

    def load(self, num_rows: int, temperature: float) -> None:
        self.buffers.load(
            next_token_ids_B=torch.arange(num_rows, device="cuda", dtype=torch.int32),
            seq_lens_B=torch.full((num_rows,), 3, device="cuda", dtype=torch.int32),
            num_rejected_B=None,
            block_table_BC=torch.ones(num_rows, 2, device="cuda", dtype=torch.int32),
            temperature_B=torch.full((num_rows,), temperature, device="cuda"),
        )


def captured() -> tuple[Loop, DraftLoopGraphs]:
    loop = Loop()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graphs = DraftLoopGraphs(cuda_graph_recorder(torch.cuda.graph_pool_handle()))
        graphs.capture((2, 4), (1, 2), loop.run)
    torch.cuda.synchronize()
    return loop, graphs


def test_a_replay_reads_the_inputs_of_the_moment() -> None:
    loop, graphs = captured()
    loop.load(3, temperature=0.0)
    graphs.replay(SHAPE)
    replayed = loop.buffers.draft_token_ids(SHAPE)[:3].clone()
    loop.run(SHAPE)
    assert torch.equal(replayed, loop.buffers.draft_token_ids(SHAPE)[:3])
    first_B = loop.logits_VV[:3].argmax(dim=-1)
    assert torch.equal(replayed[:, 0], first_B)
    assert torch.equal(replayed[:, 1], loop.logits_VV[first_B].argmax(dim=-1))


def test_random_numbers_differ_between_replays() -> None:
    loop, graphs = captured()
    drafts = []
    for _ in range(20):
        loop.load(4, temperature=1.0)
        graphs.replay(SHAPE)
        drafts.append(tuple(loop.buffers.draft_token_ids(SHAPE).flatten().tolist()))
    assert len(set(drafts)) > 10


def test_padding_rows_write_nowhere() -> None:
    loop, graphs = captured()
    loop.load(3, temperature=0.0)
    graphs.replay(SHAPE)
    assert loop.slots_KB[:, 3].tolist() == [-1, -1]
    assert loop.slots_KB[:, 0].tolist() == [16 + 3, 16 + 4]
