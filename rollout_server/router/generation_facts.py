"""What a generation went through, for metrics and traces; the same for whole and streamed ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rollout_server.engine.protocol import GenerateDelta, GenerateResult, GenerateTimings


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationFacts:
    """One group that an engine finished."""

    engine_id: str
    queue_s: float
    """In the router, attempts on engines that died included."""
    generate_s: float
    """On the engine that finished it."""
    timings: GenerateTimings | None

    @classmethod
    def of(cls, result: GenerateResult, queue_s: float) -> GenerationFacts:
        """Of a group that came back whole."""
        return cls(
            engine_id=result.engine_id,
            queue_s=queue_s,
            generate_s=result.generate_s,
            timings=result.timings,
        )

    @property
    def first_token_s(self) -> float | None:
        """From acceptance to the first token."""
        return None if self.timings is None else self.queue_s + self.timings.first_token_s

    @property
    def per_output_token_s(self) -> float | None:
        """Seconds between tokens; None with fewer than two."""
        if self.timings is None or self.timings.num_tokens < 2:
            return None
        return self.timings.decode_s / (self.timings.num_tokens - 1)

    def span_durations_s(self) -> dict[str, float]:
        """Its seconds as consecutive spans. Waiting inside the engine counts as prefill."""
        if self.timings is None:
            return {"queue": self.queue_s}
        return {
            "queue": self.queue_s,
            "prefill": self.timings.first_token_s,
            "decode": self.timings.decode_s,
        }


class StreamTimer:
    """Times a stream as it passes: there is no final record of it from the engine."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = clock()
        self._first_s: float | None = None
        self._last_s = self._began_s
        self._num_tokens: Counter[int] = Counter()  # by sample

    def note(self, delta: GenerateDelta) -> None:
        """One delta has come."""
        if not delta.token_ids:
            return
        self._last_s = self._clock()
        if self._first_s is None:
            self._first_s = self._last_s
        self._num_tokens[delta.sample_index] += len(delta.token_ids)

    def facts(self, engine_id: str, queue_s: float) -> GenerationFacts:
        """At the end of the stream."""
        timings = None
        if self._first_s is not None:
            timings = GenerateTimings(
                first_token_s=self._first_s - self._began_s,
                decode_s=self._last_s - self._first_s,
                num_tokens=max(self._num_tokens.values()),
            )
        return GenerationFacts(
            engine_id=engine_id,
            queue_s=queue_s,
            generate_s=self._clock() - self._began_s,
            timings=timings,
        )
