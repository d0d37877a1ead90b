"""Groups, engines and a router in simulated time: the router's own choice against others.

An engine runs a batch as vLLM does: every running sequence gets a token per step, and a step takes
longer with more of them. Between two ends of sequences nothing changes, so time jumps from end to
end. Not modelled: prefill, preemption, speculation.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout_server.router.strategy import Demand, EngineLoad, choose_engine
from shared.types import EngineState


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedEngine:
    """One engine's speed, and when it is there."""

    step_s: float
    """With one running sequence."""
    step_s_per_sequence: float
    """What every further one adds."""
    max_num_seqs: int
    joins_at_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedGroup:
    """One prompt's samples."""

    arrives_at_s: float
    lengths: tuple[int, ...]
    """Tokens of each sample, which nobody knows beforehand."""
    max_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupLoad:
    """What a policy may know of an engine."""

    load: EngineLoad


class RoutingPolicy(Protocol):
    """Chooses an engine by its position, or None: the group waits at the head of the queue."""

    def choose(
        self, engines: Sequence[GroupLoad], group: SimulatedGroup, room: int
    ) -> int | None: ...


class FewestTokens:
    """What the server does: ``router.strategy.choose_engine``."""

    def choose(self, engines: Sequence[GroupLoad], group: SimulatedGroup, room: int) -> int | None:
        num_samples = len(group.lengths)
        demand = Demand(num_samples=num_samples, num_tokens=num_samples * group.max_tokens)
        decision = choose_engine([e.load for e in engines], demand, room)
        return None if decision.engine_id is None else int(decision.engine_id)


class FewestSamples:
    """By the number of samples that engines hold, whatever their length."""

    def choose(self, engines: Sequence[GroupLoad], group: SimulatedGroup, room: int) -> int | None:
        usable = [i for i, e in enumerate(engines) if _has_room(e.load, group, room)]
        return min(usable, key=lambda i: engines[i].load.num_reserved, default=None)


class RoundRobin:
    """The next engine in turn. ``blind``: whatever it holds already, as a load balancer before
    engines does; else the next one with room, from the same queue as the server's own."""

    def __init__(self, *, blind: bool) -> None:
        self._blind = blind
        self._turn = 0

    def choose(self, engines: Sequence[GroupLoad], group: SimulatedGroup, room: int) -> int | None:
        for offset in range(len(engines)):
            index = (self._turn + offset) % len(engines)
            load = engines[index].load
            if load.state is EngineState.SERVING and (self._blind or _has_room(load, group, room)):
                self._turn = index + 1
                return index
        return None


def _has_room(load: EngineLoad, group: SimulatedGroup, room: int) -> bool:
    if load.state is not EngineState.SERVING:
        return False
    return load.num_reserved == 0 or load.num_reserved + len(group.lengths) <= room


@dataclass(kw_only=True, slots=True)
class _Placed:
    group: SimulatedGroup
    engine: int
    num_unfinished: int


class _Engine:
    """``steps`` counts steps, whole or not; a sequence ends when it reaches its own number."""

    def __init__(self, spec: SimulatedEngine) -> None:
        self.spec = spec
        self.num_reserved = 0
        self.max_tokens_reserved = 0
        self._steps = 0.0
        self._now_s = 0.0
        self._waiting: deque[tuple[_Placed, int]] = deque()
        self._running: list[tuple[float, int, _Placed]] = []
        self._num_admitted = 0

    def add(self, placed: _Placed) -> None:
        self.num_reserved += len(placed.group.lengths)
        self.max_tokens_reserved += placed.group.max_tokens * len(placed.group.lengths)
        self._waiting.extend((placed, length) for length in placed.group.lengths)
        self._admit()

    def next_end_s(self) -> float:
        if not self._running:
            return float("inf")
        return self._now_s + (self._running[0][0] - self._steps) * self._step_s()

    def advance(self, now_s: float) -> None:
        if self._running:
            self._steps += (now_s - self._now_s) / self._step_s()
        self._now_s = now_s

    def take_ended(self) -> list[_Placed]:
        """Groups whose last sample has ended by now."""
        done = []
        while self._running and self._running[0][0] <= self._steps + 1e-6:
            _, _, placed = heapq.heappop(self._running)
            placed.num_unfinished -= 1
            if placed.num_unfinished == 0:
                self.num_reserved -= len(placed.group.lengths)
                self.max_tokens_reserved -= placed.group.max_tokens * len(placed.group.lengths)
                done.append(placed)
        self._admit()
        return done

    def kv_cache_usage(self) -> float:
        return len(self._running) / self.spec.max_num_seqs

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.spec.max_num_seqs:
            placed, length = self._waiting.popleft()
            self._num_admitted += 1
            heapq.heappush(self._running, (self._steps + length, self._num_admitted, placed))

    def _step_s(self) -> float:
        spec = self.spec
        return spec.step_s + spec.step_s_per_sequence * (len(self._running) - 1)


def simulate(
    groups: Sequence[SimulatedGroup],
    engines: Sequence[SimulatedEngine],
    policy: RoutingPolicy,
    *,
    dispatch_depth: int = 2,
) -> list[float]:
    """When each group was done, in seconds, in the order of ``groups``.

    Args:
        groups: in order of arrival.
        dispatch_depth: ``server.dispatch_depth``.
    """
    state = [_Engine(spec) for spec in engines]
    room = dispatch_depth * max(spec.max_num_seqs for spec in engines)
    done_s: dict[int, float] = {}
    queue: deque[int] = deque()
    arrivals = deque(enumerate(groups))
    joins = sorted(spec.joins_at_s for spec in engines if spec.joins_at_s > 0)
    numbers: dict[int, int] = {}
    now_s = 0.0
    while len(done_s) < len(groups):
        upcoming = [engine.next_end_s() for engine in state]
        if arrivals:
            upcoming.append(arrivals[0][1].arrives_at_s)
        upcoming += [joins_at_s for joins_at_s in joins if joins_at_s > now_s][:1]
        now_s = max(min(upcoming), now_s)
        for engine in state:
            engine.advance(now_s)
            for placed in engine.take_ended():
                done_s[numbers.pop(id(placed))] = now_s
        while arrivals and arrivals[0][1].arrives_at_s <= now_s:
            queue.append(arrivals.popleft()[0])
        while queue:
            group = groups[queue[0]]
            index = policy.choose(_loads(state, now_s), group, room)
            if index is None:
                break
            placed = _Placed(group=group, engine=index, num_unfinished=len(group.lengths))
            numbers[id(placed)] = queue.popleft()
            state[index].add(placed)
    return [done_s[number] for number in range(len(groups))]


def _loads(engines: Sequence[_Engine], now_s: float) -> list[GroupLoad]:
    return [
        GroupLoad(
            load=EngineLoad(
                engine_id=str(index),
                state=EngineState.SERVING
                if engine.spec.joins_at_s <= now_s
                else EngineState.STARTING,
                num_reserved=engine.num_reserved,
                num_reserved_tokens=engine.max_tokens_reserved,
                kv_cache_usage=engine.kv_cache_usage(),
            ),
        )
        for index, engine in enumerate(engines)
    ]
