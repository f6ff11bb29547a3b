"""Every bound of the controller's tables and waits, and what happens there."""

from __future__ import annotations

from dataclasses import dataclass

from kalium.policy.limits import INFLIGHT_MAX
from kalium.protocol.limits import LEASE_MS

INVOCATIONS_PER_CALL_MAX = 256  # the place of one is a byte of its id
STARTS_PER_INFLIGHT = 2  # remembered for each invocation that an instance may have at a time: the one, and the one before it


@dataclass(frozen=True)
class Limits:
    """A step beyond a bound of a table is denied with `overloaded` and moves nothing; the other rules are beside each."""

    calls: int = 1_000_000
    invocations: int = 2_000_000  # live ones of all calls
    tokens: int = 2_000_000  # pending ones of all calls
    invocations_per_call: int = INVOCATIONS_PER_CALL_MAX
    tokens_per_call: int = 256
    tokens_per_instance: int = 4096  # that it was granted, whatever its calls, so that one instance cannot fill the table of the site
    invocations_per_instance: int = 256  # so that one instance cannot fill the table of calls alone
    # Remembered answers, in memory fewer of a function with a small max_inflight; the oldest is forgotten, and asked again it is a new step.
    starts_per_instance: int = INFLIGHT_MAX
    duplicate_heard_ms: int = 3_000  # another run of an agent is refused while this one was heard within this; it pings when idle
    agents: int = 1024  # beyond it the welcome says no
    # Of its node, those included that a new connection has not registered again: an agent has half as many, and as many before a restart.
    instances_per_agent: int = 2048
    versions_per_app: int = 8  # beyond it the oldest one is dropped before its drain ends
    token_ms: int = 30_000
    token_late_ms: int = 600_000  # of asynchronous edges, which wait in the gateway's queue, and of callbacks
    invocation_grace_ms: int = 30_000  # an invocation whose END got lost lives for its timeout and this
    agent_gone_ms: int = LEASE_MS  # instances of an agent that is away are kept so long; their guards decide no longer either
    drain_ms: int = 60_000  # a version that is not the newest any more lives so long; then its calls are denied


LIMITS = Limits()
assert LIMITS.agent_gone_ms >= LEASE_MS  # evicting earlier would end invocations whose guards still hold a lease
assert LIMITS.invocations_per_call <= INVOCATIONS_PER_CALL_MAX
assert LIMITS.starts_per_instance >= INFLIGHT_MAX  # after a lost connection a guard repeats every question that was open
assert LIMITS.calls <= LIMITS.invocations
assert LIMITS.instances_per_agent * LIMITS.invocations_per_instance < LIMITS.calls  # one node's key leaves room for the calls of others
