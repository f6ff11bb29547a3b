"""A bound on what one source may put on record, so that it cannot fill a disk. What is beyond it is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

PER_SECOND = 100
BURST = 1000
SOURCES_MAX = 4096  # beyond them, all others share one allowance
TELL_MS = 1000


@dataclass
class _Source:
    tokens: float
    since_ms: int
    beyond: Counter[str] = field(default_factory=Counter)


class Rate:
    """An allowance for each source, by the clock that `now_ms` is of. Not shared between threads."""

    def __init__(self, *, per_second: int = PER_SECOND, burst: int = BURST, sources_max: int = SOURCES_MAX) -> None:
        self._per_second = per_second
        self._burst = burst
        self._sources_max = sources_max
        self._sources: dict[str, _Source] = {}
        self._told_ms: int | None = None

    def admits(self, source: str, reason: str, *, now_ms: int) -> bool:
        """Whether one more may be recorded. One that may not is counted under `reason`."""
        if source not in self._sources and len(self._sources) >= self._sources_max:
            source = ""
        found = self._sources.setdefault(source, _Source(self._burst, now_ms))
        found.tokens = min(self._burst, found.tokens + max(0, now_ms - found.since_ms) * self._per_second / 1000)
        found.since_ms = now_ms
        if found.tokens >= 1:
            found.tokens -= 1
            return True
        found.beyond[reason] += 1
        return False

    def suppressed(self, *, now_ms: int, is_last: bool = False) -> list[tuple[str, dict[str, int]]]:
        """Sources with what they were refused since the last time, by reason; once in TELL_MS. Forgets who has been quiet."""
        if not is_last and self._told_ms is not None and 0 <= now_ms - self._told_ms < TELL_MS:
            return []
        self._told_ms = now_ms
        told = []
        for source, found in list(self._sources.items()):
            if found.beyond:
                told.append((source, dict(sorted(found.beyond.items()))))
                found.beyond.clear()
            elif (now_ms - found.since_ms) * self._per_second / 1000 >= self._burst - found.tokens:
                del self._sources[source]
        return told
