"""An engine's side of a push, over a vLLM that only writes down what it is asked."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.drafter_state import RebuiltDrafter
from rollout_server.engine.weight_loading import AHEAD_LIMIT_S, SLICE_S, WeightLoading
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.errors import WeightCommitError
from shared.schemas.weights import TensorEntry, WeightManifest
from shared.types import DrafterRebuild, PauseMode

NUM_SLICES = 3


class NotedCore:
    """``AsyncLLM.engine_core``."""

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    async def pause_scheduler_async(self, **_: object) -> None:
        self._calls.append("pause")

    async def resume_scheduler_async(self) -> None:
        self._calls.append("resume")

    async def call_utility_async(self, name: str, *args: object) -> None:
        self._calls.append((name.removeprefix("slipstream_"), *args))


class NotedLLM:
    """``AsyncLLM`` with two ranks, of which one needs a slice more for its rebuild."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.engine_core = NotedCore(self.calls)
        self.fails_in_slice: int | None = None
        self._num_slices = 0

    async def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        match name:
            case "slipstream_load":
                self.calls.append("load")
                return [0.25, 0.5]
            case "slipstream_begin_ahead":
                self._num_slices = 0
                self.calls.append(("ahead", *args))
            case "slipstream_begin_rebuild":
                self._num_slices = 0
                self.calls.append(("begin", *args))
            case "slipstream_rebuild" | "slipstream_ahead":
                self._num_slices += 1
                if self._num_slices == self.fails_in_slice:
                    raise RuntimeError("out of memory")
                self.calls.append("slice")
                return [self._num_slices >= NUM_SLICES - 1, self._num_slices >= NUM_SLICES]
        return [None, None]


def loading(*, load_ahead_mib: int = 3, **drafter: object) -> WeightLoading:
    return WeightLoading(
        EngineSpec(
            engine_id="engine-0",
            index=0,
            model=ModelConfig(path="nowhere"),
            engine=EngineConfig(load_ahead_mib=load_ahead_mib),
            drafter=DrafterConfig.model_validate(drafter),
            speculation=SpeculationConfig(),
            device="cpu",
        )
    )


def manifest(version: int, *changed: str) -> WeightManifest:
    """Tensors a and b; those named have other bits than in any other version."""
    return WeightManifest(
        segment=f"slipstream-v{version}.safetensors",
        tensors=[
            TensorEntry(
                name=name,
                dtype="BF16",
                shape=[1],
                num_bytes=2,
                digest=f"{version if name in changed else 0:032x}",
            )
            for name in ("a", "b")
        ],
    )


async def load(weights: WeightLoading, llm: NotedLLM, version: int, *changed: str) -> None:
    weights._staged[version] = manifest(version, *changed)
    await weights.load(llm, version, PauseMode.KEEP, False)


async def test_generation_resumes_before_the_drafter_is_rebuilt() -> None:
    llm, weights = NotedLLM(), loading()
    await load(weights, llm, 1)
    await weights.resume(llm)
    assert (weights.version, weights.drafter_version) == (1, 0)
    rebuilt = await weights.rebuild_drafter(llm)
    assert (weights.version, weights.drafter_version, rebuilt.version) == (1, 1, 1)
    assert rebuilt.requantize_s > 0
    assert llm.calls == [
        "pause",
        "load",
        ("begin", None),
        ("set_weight_versions", 1, 0, True),
        "resume",
        *["slice"] * NUM_SLICES,
        ("set_weight_versions", 1, 1, False),
    ]
    assert await weights.rebuild_drafter(llm) == rebuilt, "there is nothing more to rebuild"
    assert len(llm.calls) == 9


async def test_in_the_pause_if_it_is_to_be_there() -> None:
    llm, weights = NotedLLM(), loading(rebuild=DrafterRebuild.IN_PAUSE)
    await load(weights, llm, 1)
    assert (weights.version, weights.drafter_version) == (1, 1)
    await weights.resume(llm)
    assert (await weights.rebuild_drafter(llm)).requantize_s > 0
    assert llm.calls[3:] == [
        *["slice"] * NUM_SLICES,
        ("set_weight_versions", 1, 1, False),
        "resume",
    ]


async def test_a_drafter_that_may_lag_is_left_alone_and_drafts_on() -> None:
    llm, weights = NotedLLM(), loading(requantize_every=2)
    await load(weights, llm, 1)
    assert await weights.rebuild_drafter(llm) == RebuiltDrafter(version=0, requantize_s=0.0)
    assert llm.calls == ["pause", "load", ("set_weight_versions", 1, 0, False)]


async def test_only_what_differs_from_the_drafters_own_weights_is_rebuilt() -> None:
    llm, weights = NotedLLM(), loading()
    for version, changed in ((1, []), (2, ["b"])):
        await load(weights, llm, version, *changed)
        await weights.resume(llm)
        await weights.rebuild_drafter(llm)
    assert [call for call in llm.calls if call[0] == "begin"] == [("begin", None), ("begin", ["b"])]


async def test_after_a_rebuild_that_was_not_ended_everything_is_rebuilt() -> None:
    llm, weights = NotedLLM(), loading(requantize_every=9)
    await load(weights, llm, 9)
    await weights.rebuild_drafter(llm)
    await load(weights, llm, 18, "a")
    # Back to a version that the drafter would not have to follow.
    await load(weights, llm, 10, "a")
    assert [call for call in llm.calls if call[0] == "begin"][1:] == [
        ("begin", ["a"]),
        ("begin", None),
    ]
    assert llm.calls[-1] == ("set_weight_versions", 10, 9, True)


async def stage(weights: WeightLoading, llm: NotedLLM, version: int, *changed: str) -> float:
    path = "/dev/shm/weights.safetensors"
    return await weights.stage(llm, version, path, manifest(version, *changed))


async def test_what_changed_is_made_ready_before_the_pause() -> None:
    llm, weights = NotedLLM(), loading(requantize_every=9)
    assert await stage(weights, llm, 1) > 0
    await weights.load(llm, 1, PauseMode.KEEP, False)
    await weights.resume(llm)
    await stage(weights, llm, 2, "b")
    await weights.load(llm, 2, PauseMode.KEEP, False)
    assert [call for call in llm.calls if call[0] != "set_weight_versions"] == [
        ("ahead", 1, None, 3 << 20),
        *["slice"] * NUM_SLICES,
        "pause",
        "load",
        "resume",
        ("ahead", 2, ["b"], 3 << 20),
        *["slice"] * NUM_SLICES,
        "pause",
        "load",
    ]


async def test_nothing_is_made_ready_inside_a_pause() -> None:
    llm, weights = NotedLLM(), loading()
    await stage(weights, llm, 1)
    await weights.load(llm, 1, PauseMode.KEEP, False)
    llm.calls.clear()
    await stage(weights, llm, 2)
    assert llm.calls == []


async def test_what_takes_too_long_is_left_for_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, weights = BusyLLM(step_s=0.05, work_s=3600.0, method="slipstream_ahead"), loading()
    monkeypatch.setattr("rollout_server.engine.weight_loading.time.perf_counter", lambda: llm.now_s)
    assert AHEAD_LIMIT_S <= await stage(weights, llm, 1) < AHEAD_LIMIT_S + 1
    assert set(llm.budgets_s) == {SLICE_S}, "no stop is longer than the others"
    await weights.load(llm, 1, PauseMode.KEEP, False)
    assert weights.version == 1


async def test_nothing_is_where_that_is_not_wanted() -> None:
    llm, weights = NotedLLM(), loading(load_ahead_mib=0)
    await stage(weights, llm, 1)
    assert llm.calls == []


class BusyLLM(NotedLLM):
    """Runs a step of ``step_s`` before each call, and needs ``work_s`` for a rebuild; a block of it
    at the least. Time is its own."""

    def __init__(self, *, step_s: float, work_s: float, method: str = "slipstream_rebuild") -> None:
        super().__init__()
        self._method = method
        self.now_s = 0.0
        self.budgets_s: list[float] = []
        self._step_s, self._left_s = step_s, work_s

    async def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if name != self._method:
            return await super().collective_rpc(name, args)
        (budget_s,) = args
        self.budgets_s.append(budget_s)
        self.now_s += self._step_s + min(budget_s, self._left_s)
        self._left_s -= budget_s
        return [self._left_s <= 0]


@pytest.mark.parametrize(("step_s", "limit_s"), [(0.01, 8.0), (1.0, 60.0), (5.0, 120.0)])
async def test_long_steps_do_not_make_a_rebuild_endless(
    monkeypatch: pytest.MonkeyPatch, step_s: float, limit_s: float
) -> None:
    llm, weights = BusyLLM(step_s=step_s, work_s=6.0), loading()
    await load(weights, llm, 1)
    monkeypatch.setattr("rollout_server.engine.weight_loading.time.perf_counter", lambda: llm.now_s)
    took_s = (await weights.rebuild_drafter(llm)).requantize_s
    assert took_s == pytest.approx(llm.now_s)
    assert took_s < limit_s
    assert llm.budgets_s[0] == SLICE_S, "generation hardly waits for a small one"
    assert max(llm.budgets_s) <= max(SLICE_S, 0.1 * took_s)


async def test_a_rebuild_that_fails_is_an_error_that_names_engine_and_version() -> None:
    llm, weights = NotedLLM(), loading()
    llm.fails_in_slice = 2
    await load(weights, llm, 1)
    with pytest.raises(WeightCommitError, match=r"engine-0 .* drafter for version 1: out of mem"):
        await weights.rebuild_drafter(llm)
    assert (weights.version, weights.drafter_version) == (1, 0)
