"""Hosts one vLLM ``AsyncLLM``. A plain class; ``engine/cluster.py`` makes it a Ray actor.

Calls that change the engine (stage, commit) are serialized by the weight coordinator; generation,
status and speculation calls run concurrently on the actor's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from rollout_server.engine.arguments import EngineSpec, vllm_arguments
from rollout_server.engine.arrivals import Arrivals
from rollout_server.engine.calibration_key import calibration_key
from rollout_server.engine.drafter_state import RebuiltDrafter
from rollout_server.engine.facts import EngineFacts
from rollout_server.engine.footprint import Footprint, own_footprint
from rollout_server.engine.footprint_record import FootprintRecord
from rollout_server.engine.host_sweep import sweep_host
from rollout_server.engine.outputs import (
    generate_timings,
    sampling_arguments,
    to_generated_sample,
    token_logprobs,
    version_spans,
)
from rollout_server.engine.progress import read_progress
from rollout_server.engine.protocol import (
    GenerateDelta,
    GenerateRequest,
    GenerateResult,
    KnownTokens,
    SampleProgress,
)
from rollout_server.engine.quick_start import rare_collections, spawning_lightly
from rollout_server.engine.scratch import ScratchDirectory
from rollout_server.engine.start_calibration import calibrate_at_start
from rollout_server.engine.vllm_metrics import MetricText, vllm_metrics
from rollout_server.engine.weight_loading import WeightLoading
from rollout_server.speculation.calibration import CalibrationKey, SelfCalibration
from rollout_server.speculation.cost_model import CostModel
from rollout_server.speculation.steps import StepShape
from shared.errors import EngineDeadError, EngineError, InvalidRequestError
from shared.schemas.rollouts import SamplingOptions
from shared.schemas.speculation import EngineSpeculation, SpeculationPatch
from shared.schemas.weights import EngineAudit, EngineCommitTimings, WeightManifest
from shared.types import DrafterScheme, FinishReason, PauseMode

LOGGER = logging.getLogger(__name__)

WARM_UP_TOKENS = 8


class EngineActor:
    """One rollout engine. ``start`` returns only after a warm-up generation."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._llm: Any = None
        self._weights = WeightLoading(spec)
        self._record = FootprintRecord()
        self._scratch = ScratchDirectory()
        self._arrivals = Arrivals()

    async def start(self) -> EngineFacts:
        """Load the model, build the drafter, warm up.

        Raises:
            EngineError: with vLLM's reason.
        """
        # Here as well as in the server: no server of ours may ever run on this node.
        await asyncio.to_thread(sweep_host)
        self._record.write()  # before vLLM is imported, and OpenMP with it
        with rare_collections():
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

        started = time.perf_counter()
        try:
            arguments = AsyncEngineArgs(**vllm_arguments(self._spec))
            own = self._scratch.of_child_processes()
            with self._record.kept_up(), own, spawning_lightly():
                # Building blocks for seconds: off the event loop: the actor stays reachable.
                self._llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
            await self._core("slipstream_set_weight_versions", 0, 0)
            await self._warm_up()
            drafters = await self._llm.collective_rpc("slipstream_drafter")
            scheme = DrafterScheme(drafters[0]["drafter_scheme"])
            calibration = await self._calibrate(scheme)
        except Exception as exc:
            # Boundary to vLLM: whatever stopped the start is reported as one error of ours.
            raise EngineError(f"engine {self._spec.engine_id} did not start: {exc}") from exc
        config = self._llm.vllm_config
        return EngineFacts(
            pid=os.getpid(),
            num_kv_blocks=int(config.cache_config.num_gpu_blocks or 0),
            block_size=int(config.cache_config.block_size),
            max_model_len=int(config.model_config.max_model_len),
            vocab_size=int(config.model_config.get_vocab_size()),
            start_up_s=time.perf_counter() - started,
            drafter_scheme=scheme,
            drafter_bytes=sum(rank["drafter_bytes"] for rank in drafters),
            self_calibration=calibration,
        )

    async def _warm_up(self) -> None:
        """The first requests after a start compile kernels; nobody's rollout should be among them.

        Once alone and once as a group, because vLLM compiles for both kinds of shapes.
        """
        sampling = SamplingOptions(max_tokens=WARM_UP_TOKENS, ignore_eos=True)
        for n in (1, 2):
            request = GenerateRequest(
                request_id=f"warm-up-{n}", prompt_token_ids=[0], n=n, sampling=sampling
            )
            await self.generate(request)

    async def _calibrate(self, scheme: DrafterScheme) -> SelfCalibration | None:
        if not self._spec.drafter.enabled:
            return None
        model_config = self._llm.vllm_config.model_config
        return await calibrate_at_start(
            self,
            self._spec,
            self.calibration_key(scheme),
            vocab_size=int(model_config.get_vocab_size()),
            max_model_len=int(model_config.max_model_len),
        )

    def calibration_key(self, scheme: DrafterScheme) -> CalibrationKey:
        """What this engine's step times depend on."""
        return calibration_key(self._spec, self._llm.vllm_config, scheme)

    async def set_cost_model(self, model: CostModel, name: str) -> None:
        """Predict step times with this model from the next step on."""
        await self._core("slipstream_set_cost_model", model.model_dump_json(), name)

    async def begin_sweep(self, draft_lengths: Sequence[int], steps_each: int) -> None:
        """Measure steps over these draft lengths in turn until ``end_sweep``."""
        await self._core("slipstream_begin_sweep", list(draft_lengths), steps_each)

    async def end_sweep(self) -> list[tuple[StepShape, float]]:
        """The measured steps' shapes and seconds."""
        steps = await self._core("slipstream_end_sweep")
        return [(StepShape(**shape), seconds) for shape, seconds in steps]

    def footprint(self) -> Footprint:
        """Processes and shared memory of this engine, as of now."""
        return own_footprint()

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """All samples of one prompt."""
        started = time.perf_counter()
        final: Any = None
        async for output in self._outputs(request, streaming=False):
            final = output
        assert final is not None, "vLLM ended a request without an output"
        samples = [to_generated_sample(output, self._weights.version) for output in final.outputs]
        return GenerateResult(
            engine_id=self._spec.engine_id,
            samples=sorted(samples, key=lambda sample: sample.sample_index),
            generate_s=time.perf_counter() - started,
            timings=generate_timings(final.metrics),
        )

    async def generate_stream(self, request: GenerateRequest) -> AsyncIterator[GenerateDelta]:
        """The same, token by token."""
        async for output in self._outputs(request, streaming=True):
            for completion in output.outputs:
                finish = completion.finish_reason
                token_ids = list(completion.token_ids)
                yield GenerateDelta(
                    engine_id=self._spec.engine_id,
                    sample_index=completion.index,
                    token_ids=token_ids,
                    logprobs=token_logprobs(completion.logprobs, len(token_ids)),
                    text=completion.text,
                    finish_reason=None if finish is None else FinishReason(finish),
                    weight_versions=None
                    if finish is None
                    else version_spans(completion, self._weights.version),
                )

    async def _outputs(self, request: GenerateRequest, streaming: bool) -> AsyncIterator[Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        kind = RequestOutputKind.DELTA if streaming else RequestOutputKind.FINAL_ONLY
        try:
            arguments = sampling_arguments(request.sampling, request.n)
            parameters = SamplingParams(**arguments, output_kind=kind)
            name, prompt = request.request_id, {"prompt_token_ids": request.prompt_token_ids}
            outputs = self._llm.generate(prompt, parameters, name)
            async for output in self._arrivals.follow(name, outputs):
                yield output
        except VllmEngineDeadError as exc:
            raise EngineDeadError(f"engine {self._spec.engine_id} died: {exc}") from exc
        except ValueError as exc:  # vLLM's own validation, for what ours does not know
            raise InvalidRequestError(str(exc)) from exc

    async def progress(self, known: Mapping[str, KnownTokens]) -> dict[str, list[SampleProgress]]:
        """What running requests have that the caller does not; costs generation nothing."""
        return read_progress(self._running().output_processor, known, self._weights.version)

    async def abort(self, request_id: str) -> None:
        """End a request; its ``generate`` returns what there is."""
        await self._arrivals.until_registered(request_id, self._running().output_processor)
        await self._llm.abort(request_id)

    async def load(self) -> dict[str, Any]:
        """Load and counters, straight from the engine core."""
        return await self._core("slipstream_load")

    async def speculation(self, since_step: int) -> EngineSpeculation:
        report = await self._core("slipstream_speculation", since_step)
        return EngineSpeculation.model_validate_json(report)

    async def set_speculation(self, patch: SpeculationPatch) -> None:
        await self._core("slipstream_patch_speculation", patch.model_dump_json())

    async def vllm_metrics(self) -> tuple[MetricText, ...]:
        """vLLM's own Prometheus metrics, which it keeps in this process."""
        return vllm_metrics(self._spec.engine_id)

    async def stage(self, version: int, path: str, manifest: WeightManifest) -> float:
        """Check a verified file against the model and map it in every rank. Seconds."""
        return await self._weights.stage(self._running(), version, path, manifest)

    async def stage_initial(self) -> float:
        """Stage the model directory the engine started from, as version 0. Seconds."""
        return await self._weights.stage_initial(self._running())

    async def discard(self, version: int) -> None:
        """Forget a staged version."""
        await self._weights.discard(self._running(), version)

    async def load_weights(
        self, version: int, pause_mode: PauseMode, recompute_kv: bool = False
    ) -> None:
        """Pause, load the target, set the version; stay paused."""
        await self._weights.load(self._running(), version, pause_mode, recompute_kv)

    async def resume(self) -> EngineCommitTimings:
        """Generate again after ``load_weights``, or stay as an operator paused it; seconds."""
        return await self._weights.resume(self._running())

    async def rebuild_drafter(self) -> RebuiltDrafter:
        """After ``resume``: end the rebuild of the drafter between steps."""
        return await self._weights.rebuild_drafter(self._running())

    async def pause_generation(self, mode: PauseMode) -> None:
        """An operator's pause, between two steps."""
        await self._weights.window.pause_by_operator(self._running().engine_core, mode)

    async def resume_generation(self) -> None:
        """End it."""
        await self._weights.window.resume_by_operator(self._running().engine_core)

    async def audit(self, path: str) -> EngineAudit:
        """Compare live weights and drafter with the file they should be of."""
        return await self._weights.audit(self._running(), path)

    async def commit(
        self, version: int, pause_mode: PauseMode, recompute_kv: bool = False
    ) -> EngineCommitTimings:
        """``load_weights``, ``resume`` and ``rebuild_drafter``, for a single engine."""
        await self.load_weights(version, pause_mode, recompute_kv)
        timings = await self.resume()
        drafter = await self.rebuild_drafter()
        return timings.model_copy(update={"requantize_s": drafter.requantize_s})

    async def shutdown(self) -> None:
        """Stop vLLM's processes."""
        if self._llm is not None:
            # On the event loop: vLLM cancels its output handler, which lives there, first.
            self._llm.shutdown()
            self._llm = None
        self._scratch.remove()
        self._record.remove()

    async def _core(self, method: str, *args: Any) -> Any:
        return await self._running().engine_core.call_utility_async(method, *args)

    def _running(self) -> Any:
        # An idle engine's death is seen here or nowhere (vLLM 0.32.0: ``AsyncLLM.errored``).
        if self._llm is None or self._llm.errored:
            raise EngineDeadError(f"engine {self._spec.engine_id} is not running")
        return self._llm
