"""The coordinator with an ear for its audits, also for those it starts by itself after a push."""

from __future__ import annotations

from collections.abc import Callable

from rollout_server.weights.coordinator import WeightCoordinator
from shared.schemas.weights import AuditResponse


class ObservedCoordinator(WeightCoordinator):
    """What the service is given (``collaborators.Coordinator``)."""

    _on_audit: Callable[[AuditResponse], None] | None = None

    def observe_audits(self, observer: Callable[[AuditResponse], None]) -> None:
        """Tell ``observer`` of every audit from now on."""
        self._on_audit = observer

    async def audit(self) -> AuditResponse:
        """As ``WeightCoordinator.audit``."""
        report = await super().audit()
        if self._on_audit is not None:
            self._on_audit(report)
        return report
