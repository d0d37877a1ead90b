"""A push beside other work: its states, and blocks that end before it."""

from __future__ import annotations

import threading

import pytest

from shared.errors import ConflictError
from trainer.background_push import BackgroundPush, PushState
from trainer.publish import PushReport

REPORT = PushReport(version=3, num_bytes=1, sent_bytes=1, push_s=0.1, paused_s=0.0)
LIMIT_S = 20.0


class GatedPush:
    """Ends when it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.gate = threading.Event()
        self.has_ended = False
        self._error = error

    def __call__(self) -> PushReport:
        assert self.gate.wait(LIMIT_S)
        self.has_ended = True
        if self._error is not None:
            raise self._error
        return REPORT


def test_it_runs_until_it_is_committed(caplog: pytest.LogCaptureFixture) -> None:
    publish = GatedPush()
    with BackgroundPush(publish) as push:
        assert push.state is PushState.RUNNING
        publish.gate.set()
        assert push.wait() == REPORT
        assert push.state is PushState.COMMITTED
    assert caplog.text == ""


def test_its_failure_is_raised_where_it_is_waited_for() -> None:
    publish = GatedPush(ConflictError("wrong base"))
    publish.gate.set()
    with BackgroundPush(publish) as push:
        with pytest.raises(ConflictError, match="wrong base"):
            push.wait()
        assert push.state is PushState.FAILED


@pytest.mark.parametrize("error", [None, ConflictError("wrong base")])
def test_a_block_that_fails_first_still_ends_after_the_push(
    error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    publish = GatedPush(error)
    threading.Timer(0.05, publish.gate.set).start()
    with pytest.raises(OSError, match="disk is full"), BackgroundPush(publish):
        raise OSError("disk is full")
    assert publish.has_ended
    assert ("failed" if error else "committed") in caplog.text
