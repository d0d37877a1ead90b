"""Clients that post groups all the time and look at every token that comes back.

Every version of the weights has one of two contents, by its parity, so that a greedy sample tells
which weights it was made with.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from shared.client import RolloutClient, rollout_request
from shared.errors import SlipstreamError
from shared.schemas.rollouts import RolloutGroup, RolloutRequest, SamplingOptions
from tests.chaos.slow_link import SlowLink
from tests.support.server_process import START_TIMEOUT_S

NUM_CLIENTS = 3
"""The last of them has a bad network."""
NUM_TOKENS = 160
NUM_PROMPTS = 4
"""Of a request; greedy sampling makes one sample of each."""
HANG_S = 60.0
"""Longest a request may take while the service can serve; outages are not counted in."""


@dataclass(kw_only=True, slots=True)
class SampleCounts:
    """What came back."""

    checked: int = 0
    lost: int = 0
    duplicated: int = 0
    mixed_version: int = 0
    """Samples whose spans do not cover every token once, in order of versions."""
    wrong_tokens: int = 0
    hangs: int = 0
    connections_cut: int = 0
    """In the middle of an answer."""
    causes: list[str] = field(default_factory=list)
    """Why requests failed, in words."""


class CheckedClients:
    """Threads; they go on from ``start`` to ``finish``, over every outage."""

    def __init__(self, url: str, prompts: list[list[int]], expected: list[list[list[int]]]) -> None:
        """``expected``: by parity of the version, the tokens that every prompt leads to."""
        self._url = url
        self._link = SlowLink(urlsplit(url).port or 80, seed=NUM_CLIENTS)
        self._prompts = prompts
        self._expected = expected
        self.counts = SampleCounts()
        self._outage_s = 0.0
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._client, args=(number,), daemon=True)
            for number in range(NUM_CLIENTS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def excuse(self, outage_s: float) -> None:
        """So long nobody could have served; requests that were under way may take longer by it."""
        with self._lock:
            self._outage_s += outage_s

    def end(self) -> None:
        """No more requests; those under way go on."""
        self._is_over.set()

    def finish(self) -> None:
        """Let every client have what it has asked for."""
        self.end()
        for thread in self._threads:
            thread.join(START_TIMEOUT_S)
            self.counts.hangs += thread.is_alive()
        self._link.close()
        self.counts.connections_cut += self._link.num_cut

    def _client(self, number: int) -> None:
        choose = random.Random(number)
        has_bad_network = number == NUM_CLIENTS - 1
        url = f"http://127.0.0.1:{self._link.port}" if has_bad_network else self._url
        client = RolloutClient(url, timeout_s=START_TIMEOUT_S)
        for serial in itertools.count():
            if self._is_over.is_set():
                break
            indices = choose.sample(range(len(self._prompts)), NUM_PROMPTS)
            request = rollout_request(
                [self._prompts[index] for index in indices],
                request_id=f"c{number}-{serial}-{os.getpid()}",
                n=1,
                sampling=SamplingOptions(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
                reward="exact_match",
            )
            self._one(client, request, indices)
        client.close()

    def _one(self, client: RolloutClient, request: RolloutRequest, indices: list[int]) -> None:
        started, outage_s = time.monotonic(), self._outage_s
        try:
            groups = client.rollout(request).groups
        except SlipstreamError as exc:
            print(f"request {request.request_id} failed: {exc}", file=sys.stderr)
            with self._lock:
                self.counts.lost += len(indices)
                self.counts.causes.append(str(exc))
            return
        took_s = time.monotonic() - started - (self._outage_s - outage_s)
        with self._lock:
            self.counts.hangs += took_s > HANG_S
            for index, group in zip(indices, groups, strict=True):
                self._check(index, group)

    def _check(self, index: int, group: RolloutGroup) -> None:
        self.counts.lost += not group.samples
        self.counts.duplicated += max(len(group.samples) - 1, 0)
        for sample in group.samples:
            self.counts.checked += 1
            spans = sample.weight_versions
            covered = [i for span in spans for i in range(span.start, span.end)]
            versions = [span.version for span in spans]
            if covered != list(range(NUM_TOKENS)) or versions != sorted(set(versions)):
                self.counts.mixed_version += 1
            # Up to the end of its first span a sample is that version's, token for token.
            expected = self._expected[versions[0] % 2][index]
            if sample.token_ids[: spans[0].end] != expected[: spans[0].end]:
                self.counts.wrong_tokens += 1


def unaccounted(metrics: dict[str, Any], num_checked: int) -> int:
    """Samples that the server's books do not tell of as the clients do, when all have finished.

    Args:
        metrics: the server's, of all its lives (``rollout_checks.metrics_of``).
        num_checked: samples that clients have got.
    """
    ended = sum(metrics[f"samples_{end}_total"] for end in ("delivered", "failed", "cancelled"))
    return int(
        abs(metrics["samples_accepted_total"] - ended)
        + abs(metrics["samples_delivered_total"] - num_checked)
        + abs(metrics["samples_unaccounted"])
        + metrics["pending_samples"]
    )
