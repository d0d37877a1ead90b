"""How a tensor's rows are spread over ranks, and what one rank alone can be asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.gathering import elements_per_rank, rounded_pieces


@given(num_rows=st.integers(0, 40), width=st.integers(0, 5), num_ranks=st.integers(1, 9))
def test_every_rank_has_what_torch_chunk_gives_it(
    num_rows: int, width: int, num_ranks: int
) -> None:
    tensor = torch.zeros(num_rows, width)
    chunks = [chunk.numel() for chunk in tensor.chunk(num_ranks)] if num_rows else []
    expected = chunks + [0] * (num_ranks - len(chunks))
    assert elements_per_rank(tensor.shape, num_ranks) == expected


@pytest.mark.parametrize("piece_bytes", [1, 2, 6, 7, 1000])
def test_pieces_are_the_rounded_tensor_in_order(piece_bytes: int) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(5, 7)
    pieces = list(rounded_pieces(tensor, torch.bfloat16, piece_bytes))
    assert max(piece.nbytes for piece in pieces) <= max(piece_bytes, 2)
    assert torch.equal(torch.cat(pieces), tensor.bfloat16().reshape(-1))
