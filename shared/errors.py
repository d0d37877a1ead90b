"""The one error tree. Each class names the boundary that was crossed.

::

    SlipstreamError
    ├── ConfigurationError          before anything starts; exit code 2
    ├── RequestError                the caller's fault: 4xx, never retried
    │   ├── InvalidRequestError     400  a value is wrong
    │   ├── AuthenticationError     401  no API key, or one that this server does not know
    │   ├── ForbiddenError          403  the API key lacks the scope
    │   ├── UnknownResourceError    404  an id that does not exist
    │   │   └── ModelNotFoundError  404  a model this server does not serve
    │   ├── ConflictError           409  version or idempotency conflict
    │   └── TooLargeError           413  over a configured limit of size
    ├── UnavailableError            503  nothing can serve it now; retry after ``retry_after_s``
    │   └── OverloadedError         429  the queue is full
    ├── EngineError                 500  an engine failed
    │   └── EngineDeadError         503  the engine is gone
    ├── WeightTransferError         a push could not be staged or committed
    │   ├── WeightVerificationError 422  digest, shape, dtype, name or finiteness is wrong
    │   └── WeightCommitError       500  an engine failed inside the commit window
    └── ScoringError                500  the scoring pool itself failed

Instances survive pickling (Ray carries them between processes): ``__reduce__`` rebuilds them from
their fields. The HTTP edge maps them once, in ``rollout_server/api/errors.py``.
"""

from __future__ import annotations


class SlipstreamError(Exception):
    """Base of every error of ours.

    Args:
        message: what is wrong, with the value, the limit and the knob to turn.
        param: the request field or configuration key at fault.
    """

    status: int = 500
    code: str = "internal_error"
    retry_after_s: float | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[type[SlipstreamError], tuple[str, str | None]]:
        return type(self), (self.message, self.param)


class ConfigurationError(SlipstreamError):
    """A setting is unknown, of the wrong type or impossible. Raised before anything starts."""

    code = "configuration_error"


class RequestError(SlipstreamError):
    """The caller's request cannot be served as it is. Do not retry it unchanged."""

    status = 400
    code = "invalid_request"


class InvalidRequestError(RequestError):
    """A field of the request has a wrong value."""


class AuthenticationError(RequestError):
    """The request carries no API key, or one that the server does not know."""

    status = 401
    code = "unauthenticated"


class ForbiddenError(RequestError):
    """The API key is good, but not for this."""

    status = 403
    code = "forbidden"


class UnknownResourceError(RequestError):
    """The id in the path does not exist."""

    status = 404
    code = "not_found"


class ModelNotFoundError(UnknownResourceError):
    """The named model is not the one this server serves."""

    code = "model_not_found"


class ConflictError(RequestError):
    """The request contradicts state: another body under the same id, or a wrong base version."""

    status = 409
    code = "conflict"


class TooLargeError(RequestError):
    """The request is larger than a configured limit."""

    status = 413
    code = "too_large"


class UnavailableError(SlipstreamError):
    """Nothing can serve the request now. Retry after ``retry_after_s``."""

    status = 503
    code = "unavailable"
    retry_after_s = 1.0


class OverloadedError(UnavailableError):
    """The bounded queue is full. Retry after ``retry_after_s``."""

    status = 429
    code = "overloaded"


class EngineError(SlipstreamError):
    """An engine failed on a request."""

    code = "engine_error"


class EngineDeadError(EngineError):
    """The engine that held the request is gone. The router tries another one."""

    status = 503
    code = "engine_dead"
    retry_after_s = 1.0


class WeightTransferError(SlipstreamError):
    """A weight push could not be staged or committed; the old version keeps serving."""

    code = "weight_transfer_error"


class WeightVerificationError(WeightTransferError):
    """The pushed bytes are not what the manifest says, or not what the model needs."""

    status = 422
    code = "weight_verification_failed"


class WeightCommitError(WeightTransferError):
    """An engine failed inside the commit window and was taken out."""

    code = "weight_commit_failed"


class ScoringError(SlipstreamError):
    """The scoring pool failed (a failing reward function is data, not this)."""

    code = "scoring_error"


def first_error(group: BaseExceptionGroup[SlipstreamError]) -> SlipstreamError:
    """The first leaf of what ``except* SlipstreamError`` caught: one request answers one error."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SlipstreamError)
    return error


def error_codes() -> frozenset[str]:
    """Code of every error in the tree: the values that labels and documents may hold."""

    def below(kind: type[SlipstreamError]) -> frozenset[str]:
        return frozenset({kind.code}).union(*(below(child) for child in kind.__subclasses__()))

    return below(SlipstreamError)


def error_of_code(code: str, message: str, param: str | None) -> SlipstreamError:
    """An error that was noted by its code; of the base class where the code is not known."""
    kinds: list[type[SlipstreamError]] = [SlipstreamError]
    for kind in kinds:  # grows: parents before their children, who share a code with them
        if kind.code == code:
            return kind(message, param)
        kinds.extend(kind.__subclasses__())
    return SlipstreamError(message, param)
