"""An engine's side of a push: stage, then inside one pause load, then resume and requantize.

Knows the versions of target and drafter. Calls reach vLLM's ranks through ``collective_rpc`` and
the scheduler through the plugin's core methods; both run between two engine steps.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

from rollout_server.drafter.lag import is_rebuild_due
from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.commit_window import CommitWindow
from rollout_server.engine.drafter_state import RebuiltDrafter
from rollout_server.weights.expectation import (
    changed_tensors,
    check_against_model,
    expected_tensors,
)
from shared.errors import EngineError, WeightCommitError
from shared.schemas.weights import EngineAudit, EngineCommitTimings, WeightManifest
from shared.types import DrafterRebuild, PauseMode

SLICE_S = 0.03
"""Generation waits for so long between two steps while weights are made ready beside it."""
SLICE_SHARE = 0.1
"""Or, for the drafter, for this share of the time that it has taken so far, if that is longer."""
AHEAD_LIMIT_S = 20.0
"""After this the rest is left for the pause: well below ``weights.stage_timeout_s``."""
MIB = 1 << 20
AUDIT_MODULES_PER_CALL = 2
"""Generation stands still for so many at a time."""


class WeightLoading:
    """One engine's weights. ``llm`` is its ``AsyncLLM`` (vLLM 0.32.0)."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self.window = CommitWindow()
        self.version = 0
        """Of the target; 0 is the model directory."""
        self.drafter_version = 0
        self._staged: dict[int, WeightManifest] = {}
        self._manifest: WeightManifest | None = None
        """Of what the target holds; None while that is the model directory."""
        self._drafter_manifest: WeightManifest | None = None
        self._is_rebuild_begun = False
        self._requantize_s = 0.0
        """Of the last rebuild."""

    async def stage(self, llm: Any, version: int, path: str, manifest: WeightManifest) -> float:
        """Check a verified file against the model and map it in every rank. Seconds.

        Raises:
            WeightVerificationError: names, shapes or dtypes do not fit.
        """
        started = time.perf_counter()
        check_against_model(manifest, expected_tensors(self._spec.model.path))
        await llm.collective_rpc("slipstream_stage", args=(version, path))
        self._staged[version] = manifest
        await self._load_ahead(llm, version, changed_tensors(self._manifest, manifest))
        return time.perf_counter() - started

    async def _load_ahead(self, llm: Any, version: int, changed: list[str] | None) -> None:
        """Do what can be done before the pause; a load in which nothing is ready is as good.

        Inside a pause (going back to the version before) there is nothing to win.
        """
        limit_bytes = self._spec.engine.load_ahead_mib * MIB
        if limit_bytes and not self.window.is_open:
            arguments = (version, changed, limit_bytes)
            await llm.collective_rpc("slipstream_begin_ahead", args=arguments)
            await _between_steps(llm, "slipstream_ahead", share=0.0, limit_s=AHEAD_LIMIT_S)

    async def stage_initial(self, llm: Any) -> float:
        """Stage the model directory the engine started from, as version 0. Seconds.

        Raises:
            EngineError: its weights are not there as safetensors files.
        """
        path = self._spec.model.path
        if expected_tensors(path) is None:
            raise EngineError(f"model.path {path} holds no safetensors files to go back to")
        started = time.perf_counter()
        await llm.collective_rpc("slipstream_stage", args=(0, path))
        return time.perf_counter() - started

    async def discard(self, llm: Any, version: int) -> None:
        """Forget a staged version."""
        self._staged.pop(version, None)
        await llm.collective_rpc("slipstream_discard", args=(version,))

    async def load(self, llm: Any, version: int, pause_mode: PauseMode, recompute_kv: bool) -> None:
        """Pause, load the target, set the version; stay paused. The drafter is requantized here or
        by ``rebuild_drafter`` (``drafter.rebuild``); until that is done, nothing is drafted.

        Args:
            recompute_kv: preempt what runs, so that its KV is computed again under these weights.

        Raises:
            WeightCommitError: the engine is left paused and poisoned; it must not be used again.
        """
        try:
            core = llm.engine_core
            await self.window.pause(core, pause_mode, recompute_kv)
            # Going back to an older version always rebuilds: the drafter may be of a later one.
            rebuild = version <= self.drafter_version or is_rebuild_due(
                version, self.drafter_version, self._spec.drafter.requantize_every
            )
            manifest = self._staged.pop(version, None)
            changed_for_drafter = changed_tensors(self._drafter_manifest, manifest)
            if self._is_rebuild_begun:  # and nobody knows how far it got
                rebuild, changed_for_drafter = True, None
            ranks = await llm.collective_rpc(
                "slipstream_load", args=(version, changed_tensors(self._manifest, manifest))
            )
            self.version, self._manifest = version, manifest
            self.window.add_load(ranks)
            self._is_rebuild_begun, self._requantize_s = rebuild, 0.0
            if rebuild:
                await llm.collective_rpc("slipstream_begin_rebuild", args=(changed_for_drafter,))
            if rebuild and self._spec.drafter.rebuild is DrafterRebuild.IN_PAUSE:
                await self._rebuild(llm)
            else:
                await self._set_versions(llm)
        except Exception as exc:
            # Anything in here may leave half-loaded weights behind: never resume, never reuse.
            raise WeightCommitError(
                f"engine {self._spec.engine_id} failed to load version {version}: {exc}"
            ) from exc

    async def rebuild_drafter(self, llm: Any) -> RebuiltDrafter:
        """End the rebuild of the drafter, if one has begun, between the steps of what runs.

        Returns:
            The drafter's version, and the seconds of the rebuild that belongs to the last load,
            wherever they were spent.

        Raises:
            WeightCommitError: the drafter is a mixture; the engine must not be used again.
        """
        try:
            if self._is_rebuild_begun:
                await self._rebuild(llm)
        except Exception as exc:
            # Boundary to vLLM: its calls raise anything.
            raise WeightCommitError(
                f"engine {self._spec.engine_id} failed to rebuild its drafter for version "
                f"{self.version}: {exc}"
            ) from exc
        return RebuiltDrafter(version=self.drafter_version, requantize_s=self._requantize_s)

    async def _rebuild(self, llm: Any) -> None:
        self._requantize_s = await _between_steps(llm, "slipstream_rebuild")
        self.drafter_version, self._drafter_manifest = self.version, self._manifest
        self._is_rebuild_begun = False
        await self._set_versions(llm)

    async def _set_versions(self, llm: Any) -> None:
        await llm.engine_core.call_utility_async(
            "slipstream_set_weight_versions",
            self.version,
            self.drafter_version,
            self._is_rebuild_begun,
        )

    async def audit(self, llm: Any, path: str) -> EngineAudit:
        """Compare what every rank computes with, and its drafter, with a file of this version.

        A few modules per call, so that generation goes on between them.

        Args:
            path: a safetensors file, or a model directory.
        """
        started = time.perf_counter()
        (modules, *_) = await llm.collective_rpc("slipstream_audit_modules")
        with_drafter = self.drafter_version == self.version and not self._is_rebuild_begun
        counts: Counter[str] = Counter()
        different: list[str] = []
        for first in range(0, len(modules), AUDIT_MODULES_PER_CALL):
            names = modules[first : first + AUDIT_MODULES_PER_CALL]
            ranks = await llm.collective_rpc("slipstream_audit", args=(path, names, with_drafter))
            for rank, findings in enumerate(ranks):
                for name, status in findings:
                    counts[status] += 1
                    if status == "different":
                        different.append(name if len(ranks) == 1 else f"{name} (rank {rank})")
        return EngineAudit(
            engine_id=self._spec.engine_id,
            version=self.version,
            num_equal=counts["equal"],
            num_skipped=counts["skipped"],
            different=different,
            audit_s=time.perf_counter() - started,
        )

    async def resume(self, llm: Any) -> EngineCommitTimings:
        """Generate again after ``load``, unless an operator paused; seconds of every part.

        Raises:
            WeightCommitError: the engine is still paused; it must not be used again.
        """
        try:
            return await self.window.resume(llm.engine_core, self._spec.engine_id)
        except Exception as exc:
            # Boundary to vLLM: an engine that cannot resume is of no use.
            raise WeightCommitError(
                f"engine {self._spec.engine_id} failed to resume: {exc}"
            ) from exc


async def _between_steps(
    llm: Any, method: str, *, share: float = SLICE_SHARE, limit_s: float = math.inf
) -> float:
    """Call a method of every rank with seconds to spend until all say that they are done.

    Args:
        share: slices are as long as this share of the time so far, if that is longer. However long
            steps are, the number of calls then grows with the logarithm of the work.
        limit_s: after which no other call is made.

    Returns:
        Seconds of all of it, the steps in between included.
    """
    started_s = time.perf_counter()
    elapsed_s = 0.0
    is_done = False
    while not is_done and elapsed_s < limit_s:
        budget_s = max(SLICE_S, share * elapsed_s)
        is_done = all(await llm.collective_rpc(method, args=(budget_s,)))
        elapsed_s = time.perf_counter() - started_s
    return elapsed_s
