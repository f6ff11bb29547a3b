"""What the controller puts on record, and whether it still can."""

from __future__ import annotations

from typing import Any, Protocol


class AuditLog(Protocol):
    """Where the controller's decisions are put on record."""

    @property
    def healthy(self) -> bool:
        """Whether what is recorded gets onto the disk. While it does not, no step may be taken."""

    def record(self, event: str, **fields: Any) -> None:
        """Take one entry. It never waits."""


class NoAudit:
    """Of a site without an audit log."""

    healthy = True

    def record(self, event: str, **fields: Any) -> None:
        """Forget it."""
