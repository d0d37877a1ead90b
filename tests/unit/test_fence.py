"""Once an engine is given up, nothing it answers counts, and nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from rollout_server.engine.arguments import EngineSpec
from rollout_server.engine.fence import Fence, FencedOffError
from rollout_server.engine.handle import RayEngineHandle
from rollout_server.engine.protocol import GenerateDelta, GenerateRequest
from shared.config.engine import DrafterConfig, EngineConfig, ModelConfig
from shared.config.speculation import SpeculationConfig
from shared.config.weights import WeightsConfig
from shared.errors import EngineDeadError, EngineError, WeightCommitError
from shared.schemas.rollouts import SamplingOptions
from shared.types import EngineState

REQUEST = GenerateRequest(
    request_id="r", prompt_token_ids=[1], n=1, sampling=SamplingOptions(max_tokens=4)
)


async def test_an_answer_in_time_passes() -> None:
    async def answer() -> int:
        return 7

    assert await Fence().answer(answer(), 5.0) == 7


async def test_an_error_passes_too() -> None:
    async def answer() -> int:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await Fence().answer(answer(), 5.0)


async def test_waiting_ends_with_the_timeout() -> None:
    with pytest.raises(TimeoutError):
        await Fence().answer(asyncio.Event().wait(), 0.01)


async def test_waiting_ends_when_the_fence_closes() -> None:
    fence = Fence()
    waits = [asyncio.create_task(fence.answer(asyncio.Event().wait(), 60.0)) for _ in range(3)]
    await asyncio.sleep(0)
    fence.close()
    fence.close()
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(result) for result in results] == [FencedOffError] * 3


async def test_behind_a_closed_fence_nothing_passes_however_soon_it_comes() -> None:
    async def answer() -> int:
        return 7

    fence = Fence()
    fence.close()
    with pytest.raises(FencedOffError):
        await fence.answer(answer(), 5.0)


async def test_an_answer_that_comes_in_the_same_moment_is_dropped() -> None:
    fence = Fence()
    arrival: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    wait = asyncio.create_task(fence.answer(arrival, 60.0))
    await asyncio.sleep(0.01)
    arrival.set_result(7)
    fence.close()
    with pytest.raises(FencedOffError):
        await wait


async def test_a_caller_that_goes_away_ends_the_call() -> None:
    ended = asyncio.Event()

    async def answer() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    wait = asyncio.create_task(Fence().answer(answer(), 60.0))
    await asyncio.sleep(0.01)
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    await asyncio.wait_for(ended.wait(), 5.0)


class Method:
    """``actor.method``: ``remote`` gives what the test set, an answer it may hold back."""

    def __init__(self) -> None:
        self.answers: list[asyncio.Future[Any]] = []

    def options(self, **options: object) -> Method:
        return self

    def remote(self, *arguments: object) -> Awaitable[Any]:
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]


class Deltas:
    """A stream whose next item never comes."""

    def options(self, **options: object) -> Deltas:
        return self

    async def remote(self, *arguments: object) -> AsyncIterator[object]:
        await asyncio.Event().wait()
        yield object()


class FakeActor:
    """Every method there is, answered by hand."""

    def __init__(self) -> None:
        self.methods: dict[str, Method] = {}
        self.generate_stream = Deltas()

    def __getattr__(self, name: str) -> Method:
        return self.methods.setdefault(name, Method())


class FakeHost:
    def __init__(self, actor: FakeActor) -> None:
        self.actor = actor
        self.num_removed = 0

    async def create(self) -> FakeActor:
        return self.actor

    def remove(self) -> None:
        self.num_removed += 1


@pytest.fixture
def actor() -> FakeActor:
    return FakeActor()


@pytest.fixture
def handle(actor: FakeActor) -> RayEngineHandle:
    spec = EngineSpec(
        engine_id="engine-3",
        index=0,
        model=ModelConfig(path="/models/policy"),
        engine=EngineConfig(),
        drafter=DrafterConfig(),
        speculation=SpeculationConfig(),
        device="cpu",
    )
    host: Any = FakeHost(actor)
    handle = RayEngineHandle(spec, host, WeightsConfig())
    handle._actor = actor
    handle.serve()
    return handle


async def next_delta(handle: RayEngineHandle) -> GenerateDelta:
    async for delta in handle.generate_stream(REQUEST):
        return delta
    raise AssertionError("the stream ended")


CALLS: dict[str, Callable[[RayEngineHandle], Awaitable[Any]]] = {
    "generate": lambda handle: handle.generate(REQUEST),
    "generate_stream": next_delta,
    "speculation": lambda handle: handle.speculation(0),
    "vllm_metrics": lambda handle: handle.vllm_metrics(),
    "audit": lambda handle: handle.audit("/weights"),
}


@pytest.mark.parametrize("name", CALLS)
async def test_condemning_an_engine_ends_every_wait_for_it(
    name: str, handle: RayEngineHandle
) -> None:
    wait = asyncio.ensure_future(CALLS[name](handle))
    await asyncio.sleep(0.01)
    assert not wait.done()
    handle.condemn("it hangs")
    with pytest.raises(EngineDeadError, match="engine-3 is dead: it hangs"):
        await wait


async def test_the_result_of_a_condemned_engine_is_dropped_when_it_comes_after_all(
    handle: RayEngineHandle, actor: FakeActor
) -> None:
    wait = asyncio.create_task(handle.generate(REQUEST))
    await asyncio.sleep(0.01)
    actor.methods["generate"].answers[0].set_result("tokens of a replaced engine")
    handle.condemn("it was replaced")
    with pytest.raises(EngineDeadError):
        await wait


async def test_a_commit_that_a_condemned_engine_acknowledges_late_does_not_count(
    handle: RayEngineHandle, actor: FakeActor
) -> None:
    wait = asyncio.create_task(handle.load_weights(5))
    await asyncio.sleep(0.01)
    assert handle.state is EngineState.SYNCING
    handle.condemn("another part of the push failed")
    actor.methods["load_weights"].answers[0].set_result(None)
    with pytest.raises(WeightCommitError):
        await wait
    assert handle.committed_version == 0
    assert handle.error == "another part of the push failed"


async def test_an_engine_that_hangs_is_killed_without_being_asked_to_shut_down(
    handle: RayEngineHandle, actor: FakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_server.engine.actor_calls.FOOTPRINT_TIMEOUT_S", 0.01)
    await handle.stop("it hangs")
    host: Any = handle.host
    assert host.num_removed == 1
    assert "shutdown" not in actor.methods


async def test_an_engine_that_was_never_placed_can_be_stopped(handle: RayEngineHandle) -> None:
    handle._actor = None
    await handle.stop("no node had room")
    host: Any = handle.host
    assert (host.num_removed, handle.error) == (1, "no node had room")


async def test_a_call_that_takes_too_long_names_the_setting(handle: RayEngineHandle) -> None:
    settings = handle.spec.engine.model_copy(update={"generate_timeout_s": 0.01})
    object.__setattr__(handle.spec, "engine", settings)
    with pytest.raises(EngineError, match=r"0\.01 s to generate r \(engine\.generate_timeout_s\)"):
        await handle.generate(REQUEST)
    assert handle.state is EngineState.SERVING
