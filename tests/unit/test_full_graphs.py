"""Which uniform batches of the target go to full CUDA graphs, and under which key."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from rollout_server.drafter.cuda_proposer import GraphedSelfDraftProposer
from rollout_server.drafter.proposer import SelfDraftProposer
from rollout_server.engine.vllm_plugin.compatibility import (
    CUDA_SYMBOLS,
    SUPPORTED_VLLM_VERSION,
    check_compatibility,
)
from rollout_server.engine.vllm_plugin.full_graphs import (
    MultiLengthCudagraphDispatcher,
    capture_each_query_length,
    dispatch_by_query_length,
    keep_full_graphs,
    request_counts,
)

CAPTURE_SIZES = [1, 2, 4, 8, 16, 24, 32]


def make_dispatcher(mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> Any:
    """For up to 16 sequences and drafts of up to 3 tokens."""
    config = SimpleNamespace(
        num_speculative_tokens=3,
        lora_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        compilation_config=SimpleNamespace(
            cudagraph_mode=mode,
            cudagraph_capture_sizes=CAPTURE_SIZES,
            max_cudagraph_capture_size=32,
            compile_sizes=[],
            is_attention_compiled_piecewise=lambda: True,
        ),
    )
    dispatcher = MultiLengthCudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(mode, 4)
    return dispatcher


def dispatch(dispatcher: Any, num_requests: int, query_len: int) -> tuple[Any, Any]:
    dispatcher.query_len = query_len
    return dispatcher.dispatch(num_tokens=num_requests * query_len, uniform_decode=True)


@pytest.mark.parametrize(
    ("query_len", "max_num_seqs", "max_num_tokens", "expected"),
    [
        (1, 16, 32, (1, 2, 4, 8, 16)),
        (4, 16, 32, (1, 2, 4, 8)),
        (5, 16, 20, (1, 2, 4)),
        (40, 16, 32, ()),
    ],
)
def test_request_counts_keep_within_sequences_and_tokens(
    query_len: int, max_num_seqs: int, max_num_tokens: int, expected: tuple[int, ...]
) -> None:
    counts = request_counts(
        CAPTURE_SIZES, query_len, max_num_seqs=max_num_seqs, max_num_tokens=max_num_tokens
    )
    assert counts == expected


@pytest.mark.parametrize("query_len", [1, 2, 3, 4])
def test_every_draft_length_has_full_graphs_padded_to_whole_requests(query_len: int) -> None:
    mode, descriptor = dispatch(make_dispatcher(), 3, query_len)
    assert mode == CUDAGraphMode.FULL
    assert descriptor == BatchDescriptor(num_tokens=4 * query_len, num_reqs=4, uniform=True)


def test_a_batch_too_large_for_its_query_length_runs_piecewise() -> None:
    mode, descriptor = dispatch(make_dispatcher(), 9, 3)
    assert mode == CUDAGraphMode.PIECEWISE
    assert descriptor.num_tokens == 32
    assert not descriptor.uniform


def test_a_mixed_batch_runs_piecewise_at_a_size_that_fits_it() -> None:
    dispatcher = make_dispatcher()
    mode, descriptor = dispatcher.dispatch(num_tokens=7, uniform_decode=False)
    assert mode == CUDAGraphMode.PIECEWISE
    assert descriptor.num_tokens == 8


def test_forbidden_full_graphs_are_not_chosen() -> None:
    dispatcher = make_dispatcher()
    dispatcher.query_len = 4
    mode, _ = dispatcher.dispatch(
        num_tokens=8, uniform_decode=True, invalid_modes={CUDAGraphMode.FULL}
    )
    assert mode == CUDAGraphMode.PIECEWISE


def test_every_key_is_captured_once_and_tells_its_query_length() -> None:
    descriptors = dict(make_dispatcher().get_capture_descs())[CUDAGraphMode.FULL]
    lengths = [descriptor.num_tokens // descriptor.num_reqs for descriptor in descriptors]
    assert {length: lengths.count(length) for length in lengths} == {1: 5, 2: 5, 3: 4, 4: 4}


def test_without_piecewise_graphs_mixed_batches_run_without_a_graph() -> None:
    dispatcher = make_dispatcher(CUDAGraphMode.FULL_DECODE_ONLY)
    assert dispatch(dispatcher, 2, 4)[0] == CUDAGraphMode.FULL
    assert dispatcher.dispatch(num_tokens=7, uniform_decode=False)[0] == CUDAGraphMode.NONE


def test_piecewise_mode_stays_what_vllm_makes_of_it() -> None:
    dispatcher = make_dispatcher(CUDAGraphMode.PIECEWISE)
    assert dispatch(dispatcher, 2, 4)[0] == CUDAGraphMode.PIECEWISE


def test_the_runner_takes_any_captured_query_length_for_uniform_and_gets_its_own_back() -> None:
    runner = SimpleNamespace(cudagraph_dispatcher=make_dispatcher(), uniform_decode_query_len=4)
    seen = []

    def determine(runner: Any, **kwargs: Any) -> None:
        seen.append((runner.uniform_decode_query_len, runner.cudagraph_dispatcher.query_len))

    wrapped = dispatch_by_query_length(determine)
    wrapped(runner, max_num_scheduled_tokens=2)
    wrapped(runner, max_num_scheduled_tokens=100)
    assert seen == [(2, 2), (4, 2)]
    assert runner.uniform_decode_query_len == 4


def test_a_uniform_graph_is_captured_at_its_own_query_length() -> None:
    runner = SimpleNamespace(uniform_decode_query_len=4)
    seen = []
    wrapped = capture_each_query_length(
        lambda runner, desc: seen.append(runner.uniform_decode_query_len)
    )
    wrapped(runner, BatchDescriptor(num_tokens=6, num_reqs=3, uniform=True))
    wrapped(runner, BatchDescriptor(num_tokens=6))
    assert seen == [2, 4]
    assert runner.uniform_decode_query_len == 4


def test_every_symbol_the_cuda_side_leans_on_is_where_it_is_expected() -> None:
    # The same Python code in the CPU package: a moved symbol is noticed without a GPU.
    check_compatibility(SUPPORTED_VLLM_VERSION, CUDA_SYMBOLS)
    assert issubclass(GraphedSelfDraftProposer, SelfDraftProposer)


def test_only_our_engines_keep_full_graphs_with_a_changing_draft_length() -> None:
    overridden = []
    wrapped = keep_full_graphs(overridden.append)
    ours = SimpleNamespace(additional_config={"slipstream": {}})
    other = SimpleNamespace(additional_config={})
    wrapped(ours)
    wrapped(other)
    assert overridden == [other]
