"""A journal with a thread: entries are taken without waiting, and written in batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kalium.audit.chain import Place
from kalium.audit.journal import RETRY_MS, Journal

BATCH_S = 0.02  # from the first entry of a batch to its write
PENDING_BYTES_MAX = 1024 * 1024  # of entries in no file; beyond it they are counted and lost


def wall_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class AuditWriter:
    """Takes entries from any thread. `on_failed` and `on_well` are called on the writing one, once for each change."""

    def __init__(
        self,
        journal: Journal,
        *,
        on_failed: Callable[[OSError], None],
        on_well: Callable[[int], None],
        clock_ms: Callable[[], int] = wall_ms,
        batch_s: float = BATCH_S,
    ) -> None:
        """`on_well` is told how many entries were lost, which may also be for want of room while the disk is slow.

        The journal is written once before this returns, or has failed.
        """
        self._journal = journal
        self._on_failed = on_failed
        self._on_well = on_well
        self._clock_ms = clock_ms
        self._batch_s = batch_s
        self._lock = threading.Lock()  # of the chain, and of what follows
        self._lost = 0
        self._taken_bytes = 0  # that have left the chain and are in no file
        self._healthy = True
        self._is_behind = False  # an entry was lost since the last write
        self._news = threading.Event()
        self._closing = threading.Event()
        self._flush(is_last=False)
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the last write, and the last sync, have succeeded, and nothing was lost since."""
        return self._healthy and not self._is_behind

    @property
    def durable(self) -> Place:
        """The last entry that is in the file for good, as far as the policy of `fsync` goes."""
        return self._journal.durable

    def record(self, event: str, fields: Mapping[str, Any]) -> bool:
        """Take one entry. False: there is no room for it, and it is counted.

        Raises:
            ValueError: the entry is too long.
        """
        with self._lock:
            if self._journal.chain.waiting + self._taken_bytes >= PENDING_BYTES_MAX:
                self._lost += 1
                self._is_behind = True
                return False
            self._journal.chain.append(event, fields, now_ms=self._clock_ms())
        if not self._news.is_set():
            self._news.set()
        return True

    def close(self) -> int:
        """Write what was taken, and a head, and end. Returns the bytes that a failure kept out of the file, which are lost."""
        self._closing.set()
        self._news.set()
        self._thread.join()
        self._journal.close()
        return self._journal.unwritten_bytes

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    due_ms = self._journal.due_ms(now_ms=self._clock_ms())
                self._news.wait(None if due_ms is None else due_ms / 1000)
                if self._news.is_set():
                    # A batch fills meanwhile. A disk that fails is not asked again for every entry.
                    self._closing.wait(self._batch_s if self._healthy else RETRY_MS / 1000)
                self._news.clear()
                is_last = self._closing.is_set()
                self._flush(is_last=is_last)
                if is_last:
                    return
        finally:
            self._healthy = False  # whatever ended the thread: nothing is written any more

    def _flush(self, *, is_last: bool) -> None:
        now_ms = self._clock_ms()
        was_healthy = self._healthy
        try:
            is_moved = self._journal.is_moved()
            with self._lock:
                place = self._journal.flush_begin(now_ms=now_ms, is_last=is_last, is_moved=is_moved)
                self._taken_bytes = self._journal.unwritten_bytes
            self._journal.flush_end(place, now_ms=now_ms, is_last=is_last)
        except OSError as error:
            self._journal.failed(now_ms=now_ms)
            self._healthy = False
            if was_healthy:
                self._on_failed(error)
        else:
            self._healthy = True
        with self._lock:
            self._taken_bytes = self._journal.unwritten_bytes
            lost, self._lost = (self._lost, 0) if self._healthy else (0, self._lost)
            self._is_behind = self._is_behind and not self._healthy
        if self._healthy and (lost or not was_healthy):
            self._on_well(lost)
