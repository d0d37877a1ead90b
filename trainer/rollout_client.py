"""The trainer's client of the rollout server: ``shared.client``, in the words of its settings."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep

import httpx

from shared.client import sync_client
from shared.client.attempts import FIRST_RETRY_DELAY_S, MAX_RETRY_DELAY_S
from shared.client.failures import Wording
from shared.credentials import ClientCredentials

__all__ = ["FIRST_RETRY_DELAY_S", "MAX_RETRY_DELAY_S", "RolloutClient"]


class RolloutClient(sync_client.RolloutClient):
    """One server, one pool of connections. Safe to use from several threads."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        credentials: ClientCredentials | None = None,
        transport: httpx.BaseTransport | None = None,
        pause: Callable[[float], object] = sleep,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """
        Args:
            timeout_s: longest wait without any progress (``trainer.api_timeout_s``).
            credentials: API key and certificates, for a server that wants them.
            pause: waits the given seconds; returning True (an event that was set) ends the retries.
        """
        super().__init__(
            url,
            timeout_s=timeout_s,
            credentials=credentials,
            transport=transport,
            pause=pause,
            clock=clock,
            wording=Wording(
                timeout_setting="trainer.api_timeout_s",
                authority_setting="trainer.ca_file or SLIPSTREAM_CA_FILE",
            ),
        )
