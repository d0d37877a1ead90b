"""Where the time of a draft-verify cycle goes, measured inside vLLM's worker process.

``ProfilingWorkerExtension`` is given to vLLM in place of the production extension. Between
``profile_start`` and ``profile_stop`` it wraps the calls a cycle is made of with a clock; outside
of a profile nothing is wrapped. Timings are wall-clock on CPU, where nothing runs asynchronously.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from rollout_server.drafter import draft_sampling
from rollout_server.drafter.proposer import SelfDraftProposer
from rollout_server.engine.vllm_plugin import speculative_steps
from rollout_server.engine.vllm_plugin.worker_extension import SlipstreamWorkerExtension

PROFILING_EXTENSION = "benchmarks.harness.cycle_profile.ProfilingWorkerExtension"


class Stopwatch:
    """Seconds and calls per part. Parts do not nest, except in ``step``, which holds them all."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._undo: list[Callable[[], None]] = []

    def wrap(self, owner: Any, attribute: str, part: str) -> None:
        """Time every call of ``owner.attribute`` as ``part`` until ``unwrap``."""
        original = getattr(owner, attribute)
        had_own = attribute in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - started
                self.calls[part] += 1

        setattr(owner, attribute, timed)
        self._undo.append(
            lambda: setattr(owner, attribute, original) if had_own else delattr(owner, attribute)
        )

    def unwrap(self) -> None:
        while self._undo:
            self._undo.pop()()


class ProfilingWorkerExtension(SlipstreamWorkerExtension):
    """The production extension, with a profiler."""

    _stopwatch: Stopwatch

    def profile_start(self) -> None:
        watch = self._stopwatch = Stopwatch()
        runner = self.model_runner
        watch.wrap(runner, "execute_model", "step")
        watch.wrap(runner, "sample_tokens", "step")
        watch.wrap(runner, "_update_states", "bookkeeping")
        watch.wrap(runner, "_prepare_inputs", "target metadata")
        watch.wrap(runner, "_build_attention_metadata", "target metadata")
        watch.wrap(runner, "_bookkeeping_sync", "bookkeeping")
        watch.wrap(runner.model, "forward", "target forward")
        watch.wrap(runner.model, "compute_logits", "target LM head")
        watch.wrap(runner.sampler, "forward", "plain sampling")
        watch.wrap(speculative_steps, "verify", "rejection")
        proposer = SelfDraftProposer.active
        if proposer is not None:
            watch.wrap(proposer, "_before_first_pass", "draft metadata")
            watch.wrap(proposer, "_update_positions_dependent_metadata", "draft metadata")
            watch.wrap(proposer, "build_per_group_and_layer_attn_metadata", "draft metadata")
            watch.wrap(proposer.model, "forward", "draft forward")
            watch.wrap(proposer.model, "compute_logits", "draft LM head")
            watch.wrap(draft_sampling.DraftSampler, "__init__", "draft sampling")
            watch.wrap(draft_sampling.DraftSampler, "sample", "draft sampling")

    def profile_stop(self) -> dict[str, tuple[float, int]]:
        """Seconds and calls of each part since ``profile_start``."""
        watch = self._stopwatch
        watch.unwrap()
        return {part: (watch.seconds[part], watch.calls[part]) for part in watch.seconds}
