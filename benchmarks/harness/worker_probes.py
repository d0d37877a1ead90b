"""Functions that a benchmark or a GPU test runs inside vLLM's worker (``collective_rpc``).

They are sent as functions, which vLLM allows only with ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``: set
by the benchmark for the engines it starts itself, never in serving.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from rollout_server.drafter.cuda_graphs import LoopShape
from rollout_server.drafter.proposer import SelfDraftProposer
from rollout_server.drafter.sharing import draft_linear_methods
from rollout_server.drafter.target_packing import pack_from_target
from rollout_server.drafter.verification import NO_TOKEN, verify
from rollout_server.engine.vllm_plugin import speculative_steps

SERIALIZATION_VARIABLE = "VLLM_ALLOW_INSECURE_SERIALIZATION"
_draft_events: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []


async def in_worker(engine: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(worker, *arguments)`` in the first worker of an ``EngineActor``."""
    results = await engine._llm.collective_rpc(function, args=arguments)
    return results[0]


def accept_synthetically(worker: Any, acceptance: float | None) -> None:
    """Keep each draft with this probability instead of by the two models; None: for real.

    Turned at run time, so that one engine measures both. The real verification runs all the same;
    its verdict is replaced afterwards, which costs a few small kernels more. vLLM's own switch
    (``rejection_sample_method="synthetic"``, refused in serving) would measure vLLM's sampler.
    """
    del worker
    steps: Any = speculative_steps
    if acceptance is None:
        steps.verify = verify
        return

    def verify_synthetically(
        logits_TV: torch.Tensor, draft_token_ids_D: torch.Tensor, num_drafts: Any, *rest: Any
    ) -> Any:
        output = verify(logits_TV, draft_token_ids_D, num_drafts, *rest)
        if len(set(num_drafts)) == 1:
            output.sampled_token_ids = synthetic_tokens(
                draft_token_ids_D.view(len(num_drafts), -1), output.sampled_token_ids, acceptance
            )
        return output

    steps.verify = verify_synthetically


def synthetic_tokens(
    drafts_BN: torch.Tensor, verified_BN1: torch.Tensor, acceptance: float
) -> torch.Tensor:
    """A random number of each request's drafts, one more token, and -1 after it: [B, N + 1].

    Args:
        verified_BN1: what verification really said; its first token, which is always there, serves
            as the one more.
    """
    num_drafts = drafts_BN.shape[1]
    is_kept_BN = torch.rand(drafts_BN.shape, device=drafts_BN.device) < acceptance
    num_kept_B1 = is_kept_BN.to(torch.int64).cumprod(dim=1).sum(dim=1, keepdim=True)
    positions = torch.arange(num_drafts + 1, device=drafts_BN.device)
    last_B1 = verified_BN1[:, :1]
    tokens_BN1 = torch.cat((drafts_BN.to(verified_BN1.dtype), last_B1), dim=1)
    tokens_BN1 = torch.where(positions == num_kept_B1, last_B1, tokens_BN1)
    return torch.where(positions > num_kept_B1, NO_TOKEN, tokens_BN1)


def time_drafting(worker: Any) -> None:
    """From now on note the device time of every draft loop."""
    del worker
    proposer: Any = SelfDraftProposer.active
    propose = proposer.propose

    def timed(num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if num_speculative_tokens == 0:
            return propose(num_speculative_tokens, *args, **kwargs)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        drafts = propose(num_speculative_tokens, *args, **kwargs)
        end.record()
        _draft_events.append((start, end, num_speculative_tokens))
        return drafts

    proposer.propose = timed


def take_draft_times_ms(worker: Any) -> list[float]:
    """Milliseconds of every draft loop since the last call."""
    del worker
    torch.cuda.synchronize()
    times_ms = [start.elapsed_time(end) for start, end, _ in _draft_events]
    _draft_events.clear()
    return times_ms


def graph_counts(worker: Any) -> dict[str, int]:
    """Captured graphs of the drafter and of the target."""
    proposer = SelfDraftProposer.active
    loops = getattr(proposer, "loop_graphs", None)
    wrapper = worker.model_runner.model
    entries = getattr(wrapper, "concrete_cudagraph_entries", {})
    return {
        "draft_loops": 0 if loops is None else len(loops),
        "target_full": sum(entry.cudagraph is not None for entry in entries.values()),
    }


def time_requantization(worker: Any, repeats: int) -> dict[str, Any]:
    """Rebuild the drafter from the target's parameters; median, spread and bytes."""
    proposer = SelfDraftProposer.active
    assert proposer is not None
    target = worker.model_runner.get_model()
    times_ms = []
    num_layers = pack_from_target(proposer.model, target)
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        pack_from_target(proposer.model, target)
        torch.cuda.synchronize()
        times_ms.append((time.perf_counter() - started) * 1000)
    methods = draft_linear_methods(proposer.model)
    modules = dict(target.named_modules())
    read = sum(
        modules[name].weight.numel() * modules[name].weight.element_size() for name in methods
    )
    written = sum(method.num_bytes() for method in methods.values())
    median_ms = statistics.median(times_ms)
    return {
        "num_layers": num_layers,
        "ms": median_ms,
        "ms_min": min(times_ms),
        "ms_max": max(times_ms),
        "bytes_read": read,
        "bytes_written": written,
        "bytes_per_s": (read + written) / (median_ms / 1000),
    }


def packed_addresses(worker: Any, repack: bool) -> list[int]:
    """Addresses of every packed tensor of the drafter, after packing it again if asked to."""
    proposer = SelfDraftProposer.active
    assert proposer is not None
    if repack:
        pack_from_target(proposer.model, worker.model_runner.get_model())
    return [
        tensor.data_ptr()
        for method in draft_linear_methods(proposer.model).values()
        for tensor in method._kernel.matmul.tensors()
    ]


@torch.inference_mode()
def replay_and_eager_drafts(
    worker: Any, batch_size: int, num_rows: int, draft_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy drafts of made-up requests from a captured loop, and from the same loop uncaptured.

    Row r has 5 + r tokens in block r + 1 of the KV cache: call it in an idle engine only.
    """
    proposer: Any = SelfDraftProposer.active
    shape = LoopShape(batch_size, draft_length)
    device = worker.device
    table_BC = torch.zeros(num_rows, 1, dtype=torch.int32, device=device)
    table_BC[:, 0] = torch.arange(1, num_rows + 1, device=device)
    both = []
    for run in (proposer.loop_graphs.replay, proposer.run_loop):
        proposer.loop_buffers.load(
            next_token_ids_B=torch.arange(3, 3 + num_rows, dtype=torch.int32, device=device),
            seq_lens_B=torch.arange(5, 5 + num_rows, dtype=torch.int32, device=device),
            num_rejected_B=None,
            block_table_BC=table_BC,
            temperature_B=None,
        )
        run(shape)
        both.append(proposer.loop_buffers.draft_token_ids(shape)[:num_rows].tolist())
    return both[0], both[1]
