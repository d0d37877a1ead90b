"""The client of the rollout service, for any trainer: no torch, no ray, no server code.

::

    from shared.client import RolloutClient, rollout_request

``calls`` names the routes, ``connection`` and ``async_connection`` make one attempt over HTTP,
``attempts`` decides whether there is another, ``tracking`` gives out every group once.
``sync_client`` and ``async_client`` put them together; the trainer and the commands use the same.
"""

from shared.client.async_client import AsyncRolloutClient
from shared.client.headers import WireFormat
from shared.client.requests import rollout_request
from shared.client.sync_client import RolloutClient
from shared.client.tracking import RolloutProgress
from shared.client.weight_push import WeightPush

__all__ = [
    "AsyncRolloutClient",
    "RolloutClient",
    "RolloutProgress",
    "WeightPush",
    "WireFormat",
    "rollout_request",
]
