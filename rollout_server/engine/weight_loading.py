"""An engine's side of a push: stage, then inside one pause load and requantize, then resume.

Knows the versions of target and drafter. Calls reach vLLM's ranks through ``collective_rpc`` and
the scheduler through the plugin's core methods; both run between two engine steps.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from rollout_server.drafter.lag import is_rebuild_due
from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.commit_window import CommitWindow
from rollout_server.weights.expectation import (
    changed_tensors,
    check_against_model,
    expected_tensors,
)
from shared.errors import EngineError, WeightCommitError
from shared.schemas.weights import EngineAudit, EngineCommitTimings, WeightManifest
from shared.types import PauseMode

AUDIT_MODULES_PER_CALL = 2
"""Generation stands still for so many at a time."""


class WeightLoading:
    """One engine's weights. ``llm`` is its ``AsyncLLM`` (vLLM 0.32.0)."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._window = CommitWindow()
        self.version = 0
        """Of the target; 0 is the model directory."""
        self.drafter_version = 0
        self._staged: dict[int, WeightManifest] = {}
        self._manifest: WeightManifest | None = None
        """Of what the target holds; None while that is the model directory."""
        self._drafter_manifest: WeightManifest | None = None

    async def stage(self, llm: Any, version: int, path: str, manifest: WeightManifest) -> float:
        """Check a verified file against the model and map it in every rank. Seconds.

        Raises:
            WeightVerificationError: names, shapes or dtypes do not fit.
        """
        started = time.perf_counter()
        check_against_model(manifest, expected_tensors(self._spec.model.path))
        await llm.collective_rpc("slipstream_stage", args=(version, path))
        self._staged[version] = manifest
        return time.perf_counter() - started

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
        """Pause, load the target, requantize the drafter, set both versions; stay paused.

        Args:
            recompute_kv: preempt what runs, so that its KV is computed again under these weights.

        Raises:
            WeightCommitError: the engine is left paused and poisoned; it must not be used again.
        """
        try:
            core = llm.engine_core
            await self._window.pause(core, pause_mode, recompute_kv)
            # Going back to an older version always rebuilds: the drafter may be of a later one.
            rebuild = version <= self.drafter_version or is_rebuild_due(
                version, self.drafter_version, self._spec.drafter.requantize_every
            )
            manifest = self._staged.pop(version, None)
            ranks = await llm.collective_rpc(
                "slipstream_load",
                args=(
                    version,
                    rebuild,
                    changed_tensors(self._manifest, manifest),
                    changed_tensors(self._drafter_manifest, manifest),
                ),
            )
            drafter_version = version if rebuild else self.drafter_version
            await core.call_utility_async(
                "slipstream_set_weight_versions", version, drafter_version
            )
            self.version, self.drafter_version = version, drafter_version
            self._manifest = manifest
            if rebuild:
                self._drafter_manifest = manifest
            self._window.add_load(ranks)
        except Exception as exc:
            # Anything in here may leave half-loaded weights behind: never resume, never reuse.
            raise WeightCommitError(
                f"engine {self._spec.engine_id} failed to load version {version}: {exc}"
            ) from exc

    async def audit(self, llm: Any, path: str) -> EngineAudit:
        """Compare what every rank computes with, and its drafter, with a file of this version.

        A few modules per call, so that generation goes on between them.

        Args:
            path: a safetensors file, or a model directory.
        """
        started = time.perf_counter()
        (modules, *_) = await llm.collective_rpc("slipstream_audit_modules")
        with_drafter = self.drafter_version == self.version
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

    async def resume(self, llm: Any, *, stay_paused: bool) -> EngineCommitTimings:
        """Generate again after ``load``, unless an operator paused; seconds of every part.

        Raises:
            WeightCommitError: the engine is still paused; it must not be used again.
        """
        try:
            return await self._window.resume(
                llm.engine_core, self._spec.engine_id, stay_paused=stay_paused
            )
        except Exception as exc:
            # Boundary to vLLM: an engine that cannot resume is of no use.
            raise WeightCommitError(
                f"engine {self._spec.engine_id} failed to resume: {exc}"
            ) from exc
