"""Joins what this controller knows (registry) with the live calls (calls): who may speak, and then what the store says.

Pure, as all of the core: no socket and no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice

from kalium.controller.calls import Calls, Deferred, Evicted
from kalium.controller.registry import UNREGISTERED, AgentKey, Instance, Registry
from kalium.controller.status import reports_of, rows_of, sum_of
from kalium.protocol.frames import Answer, InstanceEnd, InstanceFinish, InstanceInvoke, InstanceStart, Register, StatusReport
from kalium.protocol.limits import ITEMS_MAX

INSTANCES_MAX = 1000  # given up in one `expire`, so that it stays short


class State:
    """A controller's whole state. `name` is the controller's own; `started_ms` is in milliseconds since 1970."""

    def __init__(self, registry: Registry, calls: Calls, *, name: str = "controller", started_ms: int = 0) -> None:
        self.registry = registry
        self.calls = calls
        self.name = name
        self.evicted: Counter[str] = Counter()  # by reason, since the start
        self.on_evicted: Callable[[Evicted], None] = lambda _evicted: None  # told of each
        self._started_ms = started_ms
        calls.on_instance_lost = registry.refuse

    # Instances

    def register(self, key: AgentKey, said: Register, *, now_ns: int) -> Answer | Deferred[Answer]:
        """Let `said.instance` speak on this connection. Registering again what is registered here changes nothing."""
        found = self.registry.register(key, said)
        if isinstance(found, Answer):
            return found
        return self.calls.adopt(found, now_ns=now_ns)

    def unregister(self, key: AgentKey, instance_id: str, *, now_ns: int) -> None:
        """The instance is gone; what it was doing ends. Nothing happens for an instance of another connection."""
        instance = self.registry.unregister(key, instance_id)
        if instance is not None:
            self._forget(instance, "unregistered", now_ns)

    def expire(self, *, now_ns: int) -> bool:
        """Remove what is over, a bounded portion. True: there is more, come again at once."""
        for instance in islice(self.registry.expire(now_ns=now_ns), INSTANCES_MAX):
            self._forget(instance, "agent_gone", now_ns)
        self._tell(self.calls.expire(now_ns=now_ns))
        return self.registry.has_due(now_ns=now_ns) or self.calls.has_due(now_ns=now_ns)

    def _forget(self, instance: Instance, why: str, now_ns: int) -> None:
        evicted = self.calls.forget(instance, why, now_ns=now_ns)
        if isinstance(evicted, Deferred):
            evicted.then(self._tell)
        else:
            self._tell(evicted)

    def _tell(self, evicted: list[Evicted]) -> None:
        for each in evicted:
            self.evicted[each.why] += 1
            self.on_evicted(each)

    # Steps

    def start(self, key: AgentKey, said: InstanceStart, *, now_ns: int) -> Answer | Deferred[Answer]:
        """May an invocation of the instance's function begin? Granted: it lives, and a token that was used is gone."""
        who = self.registry.speaking(key, said)
        if who is None:
            return UNREGISTERED
        if said.token:
            return self.calls.join(who, said.version, said.token, said.step, now_ns=now_ns)
        return self.calls.begin(who, said.version, said.step, now_ns=now_ns)

    def invoke(self, key: AgentKey, said: InstanceInvoke, *, now_ns: int) -> Answer | Deferred[Answer]:
        """May this invocation call `callee` now? Granted: its cursor has moved, and the answer holds the callee's token."""
        who = self.registry.speaking(key, said)
        if who is None:
            return UNREGISTERED
        return self.calls.invoke(who, said, now_ns=now_ns)

    def finish(self, key: AgentKey, said: InstanceEnd | InstanceFinish, *, now_ns: int) -> Answer | Deferred[Answer]:
        """The invocation is over: a fact and no decision."""
        who = self.registry.speaking(key, said)
        if who is None:
            return UNREGISTERED
        return self.calls.finish(who, said.call, said.invocation, said.outcome, now_ns=now_ns)

    def status(self) -> StatusReport:
        """What this controller holds, and what its agents have reported."""
        registry = self.registry
        calls, invocations = self.calls.counts()
        rows = rows_of(registry)
        reports = reports_of(registry)
        return StatusReport(
            policies={app: published.policy.version for app, published in list(registry.newest().items())[:ITEMS_MAX]},
            agents=len(registry.agents),
            calls=calls,
            invocations=invocations,
            controller=self.name,
            controllers=tuple(sorted({self.name, *self.calls.controllers()})[:ITEMS_MAX]),
            store=self.calls.kind,
            started_ms=self._started_ms,
            node=tuple(row[0] for row in rows),
            app=tuple(row[1] for row in rows),
            function=tuple(row[2] for row in rows),
            mode=tuple(row[3] for row in rows),
            version=tuple(row[4] for row in rows),
            asked=tuple(row[5] for row in rows),
            count=tuple(row[6] for row in rows),
            denied=sum_of(report.denied for report in reports),
            would_deny=sum_of(report.would_deny for report in reports),
            fail_modes=sum_of(report.fail_modes for report in reports),
            evicted=dict(self.evicted),
        )
