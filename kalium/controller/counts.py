"""What the controller has counted: plain integers that whoever does the work adds to, so a step pays one addition.

What a step takes is measured a batch at a time, from readings of the clock that the shell makes anyway: a histogram of
single steps would cost more than many a step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import Any

from kalium.controller.log import LogLine

QUESTIONS = ("register", "start", "invoke", "finish")
BATCH_SECONDS = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1.0)
_BATCH_NS = tuple(int(bound * 1e9) for bound in BATCH_SECONDS)


class Counts:
    """Plain integers since the start of the process. Keys of the maps are written by our own code alone."""

    __slots__ = (
        "audit_failures", "batch_ns", "batches", "closed", "evicted", "leases", "policies_refused", "refused", "steps", "store_round_trips",
    )  # fmt: skip

    def __init__(self) -> None:
        self.steps: dict[str, defaultdict[str, int]] = {question: defaultdict(int) for question in QUESTIONS}  # question -> reason -> answers
        self.evicted: defaultdict[str, int] = defaultdict(int)
        self.refused: defaultdict[str, int] = defaultdict(int)  # connections that did not come about
        self.closed: defaultdict[str, int] = defaultdict(int)
        self.policies_refused = 0
        self.audit_failures = 0
        self.leases = 0
        self.batches = [0] * (len(_BATCH_NS) + 1)  # by the bound that the batch did not exceed; the last: none
        self.batch_ns = 0
        self.store_round_trips = 0  # steps whose answer a shared store owes or has given: each is one

    def batch(self, ns: int) -> None:
        """What was read from a connection, or a turn's share of it, has been worked on, and answered, in `ns` nanoseconds."""
        self.batches[bisect_left(_BATCH_NS, ns)] += 1
        self.batch_ns += ns

    def logging(self, log: LogLine) -> LogLine:
        """`log`, whose lines about connections, policies and evictions are also counted: a line and its counter cannot differ."""
        tables = {"connection_refused": self.refused, "connection_closed": self.closed, "invocation_evicted": self.evicted}

        def counted(event: str, **fields: Any) -> None:
            table = tables.get(event)
            if table is not None:
                table[str(fields.get("reason"))] += 1
            elif event == "policy_refused":
                self.policies_refused += 1
            elif event == "audit_failed":
                self.audit_failures += 1
            log(event, **fields)

        return counted
