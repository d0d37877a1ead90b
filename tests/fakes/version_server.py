"""The version rules of ``/v1/weights`` behind a mock transport.

What a trainer pushes may get lost on the way, arrive late, be answered to nobody; the server may be
started again and forget.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import httpx

from rollout_server.weights.protocol_state import PushAdmission, admit_push
from shared.errors import SlipstreamError
from shared.schemas.weights import PublishRequest, PublishResponse, WeightManifest


class Killed(BaseException):
    """The trainer's process ends here."""


class Fate(StrEnum):
    """What becomes of a push."""

    ANSWERED = "answered"
    LOST = "lost"
    """The connection breaks before the server has it."""
    UNANSWERED = "unanswered"
    """Committed, but the connection breaks before the answer."""
    KILLED_BEFORE = "killed_before"
    KILLED_AFTER = "killed_after"
    LATE = "late"
    """The trainer is killed, and the server has the push only after its next answer."""


class Restart(StrEnum):
    """How a server is started again."""

    REMEMBERS = "remembers"
    LOSES_WEIGHTS = "loses_weights"
    """``weights.lost_snapshot: model``."""
    FORGETS = "forgets"
    """``weights.keep_on_stop: false``, or another state directory."""


class VersionServer:
    """What it committed, over all its restarts, and what shall happen to the next pushes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.committed_version = 0
        self.last_version_used = 0
        self.commits: list[tuple[int, int]] = []
        """Version and base version."""
        self.contents: dict[int, str] = {}
        """Digest of the first tensor of every version there ever was."""
        self.posts: list[bytes] = []
        self.fates: list[Fate] = []
        """Of the next pushes; answered when there is none."""
        self.between: Callable[[], None] = lambda: None
        """Happens after a push that was lost or not answered."""
        self._manifest: WeightManifest | None = None
        self._late: list[PublishRequest] = []

    def restart(self, how: Restart) -> None:
        """End and begin again."""
        if how is Restart.REMEMBERS:
            return
        used = max(self.last_version_used, self.committed_version)
        self.last_version_used = used if how is Restart.LOSES_WEIGHTS else 0
        self.committed_version, self._manifest = 0, None

    def answer(self, request: httpx.Request) -> httpx.Response:
        """For ``httpx.MockTransport``."""
        response = self._post(request.content) if request.method == "POST" else self._status()
        while self._late:
            self._take(self._late.pop())
        return response

    def _status(self) -> httpx.Response:
        body = {"committed_version": self.committed_version, "engines": [], "history": []}
        used = max(self.last_version_used, self.committed_version)
        return httpx.Response(200, json=body | {"last_version_used": used})

    def _post(self, content: bytes) -> httpx.Response:
        self.posts.append(content)
        push = PublishRequest.model_validate_json(content)
        fate = self.fates.pop(0) if self.fates else Fate.ANSWERED
        assert (self.directory / push.manifest.segment).exists()
        if fate is Fate.KILLED_BEFORE:
            raise Killed
        if fate is Fate.LATE:
            self._late.append(push)
            raise Killed
        if fate is Fate.LOST:
            self.between()
            raise httpx.ConnectError("connection refused")
        response = self._take(push)
        if fate is Fate.KILLED_AFTER:
            raise Killed
        if fate is Fate.UNANSWERED:
            self.between()
            raise httpx.ReadError("connection reset")
        return response

    def _take(self, push: PublishRequest) -> httpx.Response:
        try:
            admission = admit_push(
                self.committed_version,
                self._manifest,
                push,
                last_version_used=self.last_version_used,
            )
        except SlipstreamError as exc:
            return refusal(exc.status, exc.code, exc.message)
        if admission is PushAdmission.PROCEED:
            digest = push.manifest.tensors[0].digest
            known = self.contents.setdefault(push.version, digest)
            assert known == digest, f"version {push.version} has stood for other weights"
            self.commits.append((push.version, push.base_version))
            self.committed_version, self._manifest = push.version, push.manifest
        body = PublishResponse(
            version=push.version, verify_s=0.0, total_s=0.0, num_bytes=0, engines=[]
        )
        return httpx.Response(200, content=body.model_dump_json())


def refusal(status: int, code: str, message: str = "no") -> httpx.Response:
    """An error as the server words it."""
    error = {"code": code, "type": "t", "message": message, "param": None}
    return httpx.Response(status, json={"error": error})
