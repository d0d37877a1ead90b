"""What is done about a push that failed.

Asking again is always safe: the server answers a version and tensors it has committed already with
the first answer, and takes no other tensors under that version. What decides is whether it helps.

| the answer                                | what it means                         | then       |
|:------------------------------------------|:--------------------------------------|:-----------|
| none: no connection, a broken one, a late | it may be committed, running, or lost | asked      |
| answer, 429, 503 (another push, no engine)| with a server that died               | again      |
| 500 of a push that was taken back         | an engine failed; the others went back| N times    |
| 409, 422, any other                       | it would be refused again             | raised     |

The first kind is repeated by ``RolloutClient`` with the same body, backing off, for as long as
``trainer.api_timeout_s``. A server that died meanwhile makes no difference: one that recorded the
version answers it again, one that did not runs the push, from the trainer's file, which lies there
until the answer. One that has forgotten the base version refuses: 409. Under ``ray`` and ``nccl``
the file may have gone with the server's receiver: ``Publisher`` then writes it once more.
"""

from __future__ import annotations

import logging
from enum import StrEnum

from shared.errors import SlipstreamError, UnavailableError, WeightTransferError
from shared.schemas.weights import PublishRequest, PublishResponse
from trainer.rollout_client import RolloutClient

LOGGER = logging.getLogger(__name__)


class PushFailure(StrEnum):
    """What an error says about the push."""

    UNANSWERED = "unanswered"
    """Nobody knows yet, or it was not its turn."""
    TAKEN_BACK = "taken_back"
    """Every engine that is left serves the version before."""
    REFUSED = "refused"
    """It contradicts what is committed or what the model is, or the server has a fault."""


def judge_failure(error: SlipstreamError) -> PushFailure:
    """Which of the three an error of ``RolloutClient.publish`` is."""
    if isinstance(error, UnavailableError):
        return PushFailure.UNANSWERED
    if isinstance(error, WeightTransferError):
        return PushFailure.TAKEN_BACK
    return PushFailure.REFUSED


def send_push(
    client: RolloutClient, request: PublishRequest, *, max_retries: int, answer_timeout_s: float
) -> PublishResponse:
    """Push until it is committed or there is no use in it.

    Args:
        max_retries: after a push that was taken back (``trainer.push_retries``).
        answer_timeout_s: for one answer; see ``WeightsConfig.longest_answer_s``.

    Raises:
        UnavailableError: no answer within ``trainer.api_timeout_s``, or a stop ended the waiting;
            whether the version is committed is not known.
        SlipstreamError: the push is refused, or was taken back too often.
    """
    num_taken_back = 0
    while True:
        try:
            return client.publish(request, answer_timeout_s=answer_timeout_s)
        except SlipstreamError as exc:
            if judge_failure(exc) is not PushFailure.TAKEN_BACK:
                raise
            num_taken_back += 1
            if num_taken_back > max_retries:
                raise WeightTransferError(
                    f"version {request.version} was taken back {num_taken_back} times "
                    f"(trainer.push_retries {max_retries}): {exc.message}"
                ) from exc
            LOGGER.warning("version %d is pushed again: %s", request.version, exc.message)
