"""The calls of two or more controllers, in a Redis or Valkey that they share: one atomic script a step (redis_calls.lua).

`RedisCalls` gives the answers that `MemoryCalls` gives. What differs: time is the server's; a step is answered later
(Deferred); `controller_unavailable` when the store did not answer; the bound of live calls is one for each app. Beside the
calls the store holds what controllers have to agree on: which node an instance belongs to, which run of an agent is the one
that is heard, the newest policies, and who is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgpack  # type: ignore[import-untyped]  # no package of stubs exists for it
import msgspec

from kalium.controller.calls import FINISHED, Deferred, Evicted
from kalium.controller.limits import LIMITS, Limits
from kalium.controller.redis_link import Away, Link, Refused, Reply
from kalium.controller.registry import REGISTERED, UNREGISTERED, Instance, denied, full
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.limits import TIMEOUT_MS_MAX
from kalium.policy.message import Reason
from kalium.protocol.frames import Answer, InstanceInvoke

KEEP_MS = 2 * 60 * 60 * 1000  # the life of keys that nobody touches
CLAIM_MS = 60_000  # an instance's id is its node's for so long after the last word of a controller
CLAIM_EVERY_S = 15.0
BEAT_MS = 3_000  # a controller that was not heard for so long is away; the same for an agent
BEAT_EVERY_S = 1.0
EVICTIONS_MAX = 1000  # of one sweep
CFG_FIELDS_MAX = 500  # of one HSET
assert TIMEOUT_MS_MAX + LIMITS.invocation_grace_ms + LIMITS.token_late_ms < KEEP_MS

_packed = msgspec.msgpack.Encoder().encode
_unpacked = msgspec.msgpack.Decoder().decode
_UNAVAILABLE = denied(Reason.CONTROLLER_UNAVAILABLE, "the store did not answer")
_FAULTY = denied(Reason.OVERLOADED, "the store could not do it")
_LATE = denied(Reason.CONTROLLER_UNAVAILABLE, "the instance speaks over a newer connection of its agent by now")

_CLAIMED_ELSEWHERE = denied(Reason.UNREGISTERED, "the instance is registered as another function or on another node")
_DETAILS = {
    Reason.UNKNOWN_CALL: "no such invocation of this instance is live",
    Reason.BAD_TOKEN: "the token is not pending for this function",
    Reason.MALFORMED: "the step id has been used for another question",
}


class _Place:
    """What this store has for an instance: over which connection of its agent it speaks here, whether its id is claimed for its node,
    the steps that wait for the answer to that, and what they are told when there was none.
    """

    __slots__ = ("fault", "is_claimed", "speaker", "waiting")

    def __init__(self) -> None:
        self.speaker = ""
        self.is_claimed = False
        self.fault = _UNAVAILABLE
        self.waiting: list[Callable[[Answer | None], None]] | None = []  # None: it was answered


Versions = Callable[[str, int], Iterable[CompiledPolicy]]  # versions(app, now_ns): those by which steps may be taken


class RedisCalls:
    """As kalium.controller.calls.Calls. `run` of the link and `beat` have to be kept going by the shell."""

    kind = "redis"

    def __init__(
        self,
        link: Link,
        *,
        name: str,
        versions: Versions,
        mint: Callable[[], str],
        limits: Limits = LIMITS,
        clock_ms: Callable[[], int] = lambda: 0,
    ) -> None:
        """`name` is this controller's. `clock_ms` is for tests: a time in place of the server's, 0 for the server's."""
        self._link = link
        self._name = name
        self._versions = versions
        self._mint = mint
        self._limits = limits
        self._clock_ms = clock_ms
        self._me = mint()  # two controllers of one name are still two
        self._bases: dict[str, str] = {}
        self._graphs: dict[tuple[str, int], tuple[CompiledPolicy, _Graph]] = {}
        self._uploading: dict[str, list[Callable[[Reply], None]]] = {}  # by the key that it becomes
        self._instances: dict[str, Instance] = {}  # that speak here
        self._agents: dict[str, str] = {}  # node -> run, of those that are connected here
        self._connections: dict[str, int] = {}  # node -> which connection of that run it is
        self._controllers: Sequence[str] = (name,)
        self._evicted: list[Evicted] = []
        self._counts: dict[str, tuple[int, int]] = {}
        self._sweeping: set[str] = set()
        self._has_more: set[str] = set()
        self.on_agent_lost: Callable[[str], None] = lambda _node: None  # another run of this node's agent has its name
        self.on_instance_lost: Callable[[Instance], None] = lambda _instance: None  # its id is another node's
        link.joined = self._joined

    # Steps

    def begin(self, who: Instance, version: int, step: str, *, now_ns: int) -> Answer | Deferred[Answer]:
        """As Calls.begin."""
        held = self._held(who.app, now_ns)
        graph = held.get(version)
        refusal = ""
        if graph is None:
            refusal = Reason.POLICY_MISMATCH.value
        elif who.function not in graph.policy.functions:
            refusal = Reason.UNKNOWN_FUNCTION.value
        elif who.function not in graph.policy.entries:
            refusal = Reason.NOT_AN_ENTRY.value
        arguments = (
            *self._asking(who, step, f"{version} "), who.function, refusal, version, graph.sha if graph is not None else "",
            self._limits.calls, self._mint(), self._mint(),
        )  # fmt: skip
        return self._ask(who, "begin", arguments, version, held)

    def join(self, who: Instance, version: int, token: str, step: str, *, now_ns: int) -> Answer | Deferred[Answer]:
        """As Calls.join."""
        held = self._held(who.app, now_ns)
        arguments = (
            *self._asking(who, step, f"{version} {token}"), who.function, version, _flat(held), self._limits.invocations_per_call, token,
            self._mint(),
        )  # fmt: skip
        return self._ask(who, "join", arguments, version, held)

    def _asking(self, who: Instance, step: str, question: str) -> tuple[int | str, ...]:
        """What every start begins with. Memory is not scarce here, and after a fail-over guards repeat what they have given up, too."""
        limits = self._limits
        return (
            self._clock_ms(), _instance(who), _speaker(who), step, question, limits.invocations_per_instance, limits.starts_per_instance, KEEP_MS,
            limits.invocations,
        )  # fmt: skip

    def invoke(self, who: Instance, said: InstanceInvoke, *, now_ns: int) -> Answer | Deferred[Answer]:
        """As Calls.invoke."""
        held = self._held(who.app, now_ns)
        limits = self._limits
        key = _key(said.callee, said.asynchronous, said.callback)
        arguments = (
            self._clock_ms(), _instance(who), _speaker(who), said.step, limits.tokens_per_call, limits.tokens_per_instance, limits.tokens,
            KEEP_MS, said.call, said.invocation, said.version, _flat(held), key, said.callee, said.callback, said.retry, self._mint(),
            self._mint() if said.callback else "", limits.token_late_ms if said.asynchronous else limits.token_ms, limits.token_late_ms,
        )  # fmt: skip
        return self._ask(who, "invoke", arguments, said.version, held, said)

    def finish(self, who: Instance, call: str, invocation: str, outcome: str, *, now_ns: int) -> Answer | Deferred[Answer]:  # noqa: ARG002
        """As Calls.finish."""
        arguments = (self._clock_ms(), _instance(who), call, invocation, outcome, self._limits.starts_per_instance, KEEP_MS)
        return self._ask(who, "finish", arguments, 0, {})

    def _ask(
        self, who: Instance, operation: str, arguments: Sequence[Any], version: int, held: dict[int, _Graph], said: InstanceInvoke | None = None
    ) -> Answer | Deferred[Answer]:
        place: _Place | None = who.calls
        if place is None:
            return UNREGISTERED
        deferred: Deferred[Answer] = Deferred()
        packed = _packed(arguments)
        base = self._base(who.app)
        is_again = False

        def run(refusal: Answer | None) -> None:
            if refusal is not None:
                deferred.resolve(refusal)
            else:
                self._link.run_script(base, operation, packed, take)

        def take(reply: Reply) -> None:
            nonlocal is_again
            if isinstance(reply, Exception):
                deferred.resolve(_fault(reply))
                return
            raw = _unpacked(reply)
            if raw[0] == "cfg" and not is_again:
                is_again = True
                graph = next(graph for graph in held.values() if graph.sha == raw[1])  # versions may share one
                self._upload(base, graph, again)
                return
            deferred.resolve(_answer(raw, who, version, held, said))

        def again(uploaded: Reply) -> None:
            if isinstance(uploaded, Exception):
                deferred.resolve(_fault(uploaded))
            else:
                run(None)

        if place.is_claimed:
            run(None)
        elif place.waiting is not None:
            place.waiting.append(run)  # an agent that comes from another controller asks at once
        else:
            return place.fault  # the store was away when the instance was registered, or had no room
        return deferred

    def _base(self, app: str) -> str:
        base = self._bases.get(app)
        if base is None:
            base = self._bases[app] = f"{self._link.prefix}{{app/{app}}}:"
        return base

    def _held(self, app: str, now_ns: int) -> dict[int, _Graph]:
        """The versions by which steps may be taken, each with what the script steps by."""
        held = {}
        for policy in self._versions(app, now_ns):
            known = self._graphs.get((app, policy.version))
            if known is None or known[0] is not policy:
                known = self._graphs[app, policy.version] = policy, _Graph(policy, self._limits)
            held[policy.version] = known[1]
        return held

    def _upload(self, base: str, graph: _Graph, then: Callable[[Reply], None]) -> None:
        """Put a policy's graph where the script looks for it, whole at once."""
        key = f"{base}cfg:{graph.sha}"  # apps may have the same graph
        waiting = self._uploading.get(key)
        if waiting is not None:
            waiting.append(then)
            return
        waiting = self._uploading[key] = [then]
        part = f"{base}part:{self._me}:{graph.sha}"
        rows = list(graph.rows().items())
        portions = [rows[start : start + CFG_FIELDS_MAX] for start in range(0, len(rows), CFG_FIELDS_MAX)]
        replies: list[Reply] = []

        def take(reply: Reply) -> None:
            del self._uploading[key]
            for each in waiting:
                each(reply)

        def put(reply: Reply) -> None:
            replies.append(reply)
            if len(replies) < len(portions):
                return
            # A server without memory may take one portion and refuse the next: without it edges, or their joins, would be missing.
            fault = next((reply for reply in replies if isinstance(reply, Exception)), None)
            if fault is None:
                self._link.send(("RENAME", part, key), take)
            else:
                self._link.send(("DEL", part), _ignore)
                take(fault)

        self._link.send(("DEL", part), _ignore)
        for portion in portions:
            self._link.send(("HSET", part, *(item for row in portion for item in row)), put)
        self._link.send(("PEXPIRE", part, KEEP_MS), _ignore)

    # Instances and agents

    def adopt(self, who: Instance, *, now_ns: int) -> Answer | Deferred[Answer]:  # noqa: ARG002
        """As Calls.adopt. Where the store is away, the instance waits for it, and its steps are unavailable so long."""
        deferred: Deferred[Answer] = Deferred()
        if who.calls is None:
            who.calls = _Place()
        self._instances[who.id] = who
        run = self._agents.get(who.node, "")
        who.calls.speaker = f"{run}:{self._connections.get(who.node, 0)}"
        self._claim(who, run, deferred.resolve)
        return deferred

    def _claim(self, who: Instance, run: str, then: Callable[[Answer], None]) -> None:
        """Claim the instance's id for its node; and behind that, only then, tell other controllers that it speaks here."""
        place: _Place = who.calls

        def take(reply: Reply) -> None:
            answer = REGISTERED
            if isinstance(reply, Exception):
                answer = place.fault = _fault(reply)
            elif who.calls is not place:  # it was forgotten meanwhile; another controller may have it, so its id stays claimed for a while
                answer = UNREGISTERED
            elif not _unpacked(reply)[0]:
                answer = _CLAIMED_ELSEWHERE
                place.is_claimed = False
                who.calls = None
                self._instances.pop(who.id, None)
            else:
                place.is_claimed = True
                arguments = _packed((0, _instance(who), self._me, KEEP_MS, place.speaker))
                self._link.run_script(self._base(who.app), "adopt", arguments, _ignore)
            waiting, place.waiting = place.waiting or [], None
            for step in waiting:
                step(None if answer.allowed else answer)
            then(answer)

        self._site("claim", (who.id, _owner(who), CLAIM_MS, who.node, run), take)

    def forget(self, who: Instance, why: str, *, now_ns: int) -> list[Evicted] | Deferred[list[Evicted]]:  # noqa: ARG002
        """As Calls.forget."""
        if who.calls is None:
            return []
        who.calls = None
        self._instances.pop(who.id, None)
        deferred: Deferred[list[Evicted]] = Deferred()

        def take(reply: Reply) -> None:
            evicted: list[Evicted] = []
            if not isinstance(reply, Exception):
                was_mine, raw = _unpacked(reply)
                evicted = [_evicted(who.app, each, why) for each in raw]
                if was_mine and who.id not in self._instances:  # the next one of its id may be there already
                    self._site("unclaim", (who.id, _owner(who)), _ignore)
            deferred.resolve(evicted)

        self._link.run_script(self._base(who.app), "forget", _packed((0, _instance(who), self._me)), take)
        return deferred

    def agent_here(self, node: str, run: str, connection: int = 0) -> None:
        """The agent of `node` has connected. `on_agent_lost` is called when another run of it is heard by another controller."""
        before = self._agents.get(node, run)
        if before != run:
            self.agent_gone(node)
        self._agents[node] = run
        self._connections[node] = connection
        self._site("agent", (node, run, self._me, BEAT_MS), lambda reply: self._judge_agent(node, run, reply))

    def _judge_agent(self, node: str, run: str, reply: Reply) -> None:
        if not isinstance(reply, Exception) and not _unpacked(reply)[0] and self._agents.get(node) == run:
            self.on_agent_lost(node)

    def agent_gone(self, node: str) -> None:
        """The connection of the agent is over, and its name is free."""
        run = self._agents.pop(node, None)
        self._connections.pop(node, None)
        if run is not None:
            self._site("leave", (node, run, self._me), _ignore)

    # Time

    def expire(self, *, now_ns: int) -> list[Evicted]:
        """As Calls.expire: what the sweeps have found since the last call. Begins the next ones."""
        self._has_more.clear()
        for app in self._bases:
            if app not in self._sweeping:
                self._sweeping.add(app)
                arguments = _packed((self._clock_ms(), EVICTIONS_MAX, KEEP_MS))
                self._link.run_script(self._base(app), "sweep", arguments, lambda reply, app=app: self._swept(app, reply))  # type: ignore[misc]
        for key in [key for key, (policy, _) in self._graphs.items() if policy not in self._versions(key[0], now_ns)]:
            del self._graphs[key]
        return self.take_evicted()

    def take_evicted(self) -> list[Evicted]:
        """What the sweeps have evicted that was not taken yet."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _swept(self, app: str, reply: Reply) -> None:
        self._sweeping.discard(app)
        if not isinstance(reply, Exception):
            has_more, calls, invocations, evicted = _unpacked(reply)
            self._counts[app] = (calls, invocations)
            self._evicted += [_evicted(app, each, "timeout") for each in evicted]
            if has_more:
                self._has_more.add(app)

    def has_due(self, *, now_ns: int) -> bool:  # noqa: ARG002
        """As Calls.has_due, as far as the last sweep has said."""
        return bool(self._has_more)

    def fault(self) -> str:
        """As Calls.fault."""
        return "" if self._link.is_up else "the store is away"

    def counts(self) -> tuple[int, int]:
        """As Calls.counts, at the last sweep."""
        return sum(calls for calls, _ in self._counts.values()), sum(invocations for _, invocations in self._counts.values())

    # What controllers tell each other

    def controllers(self) -> Sequence[str]:
        """As Calls.controllers."""
        return self._controllers

    def beat(self, heard: Iterable[str]) -> None:
        """Say that this controller is here, and which nodes' agents it has heard within BEAT_MS. To be called every BEAT_EVERY_S."""
        agents = [word for node in heard if node in self._agents for word in (node, self._agents[node])]
        arguments = (self._clock_ms(), self._name, BEAT_MS, self._me, BEAT_MS, agents)
        self._site("beat", arguments, self._beaten)

    def _beaten(self, reply: Reply) -> None:
        if isinstance(reply, Exception):
            return
        controllers, lost = _unpacked(reply)
        self._controllers = tuple(sorted(controllers))
        for node in lost:
            if node in self._agents:
                self.on_agent_lost(node)

    def renew_claims(self) -> None:
        """Claim again what is claimed, before its time is over. To be called every CLAIM_EVERY_S."""
        for who in list(self._instances.values()):
            self._claim(who, "", lambda answer, who=who: self._judge_claim(who, answer))  # type: ignore[misc]

    def _judge_claim(self, who: Instance, answer: Answer) -> None:
        if answer.reason == Reason.UNREGISTERED.value:
            self.on_instance_lost(who)

    def _joined(self) -> None:
        """A connection is there, perhaps to a server that has forgotten everything: steps wait until it knows the instances again."""
        for who in self._instances.values():
            place: _Place = who.calls
            place.is_claimed = False
            place.waiting = place.waiting or []
        for node, run in self._agents.items():
            self._site("agent", (node, run, self._me, BEAT_MS), lambda reply, node=node, run=run: self._judge_agent(node, run, reply))  # type: ignore[misc]
        self.renew_claims()

    def offer_policy(self, policy: CompiledPolicy, envelope: bytes, *, bad: str = "") -> None:
        """Share a verified policy. `bad` is the SHA-1 of one that does not verify and is replaced whatever its version says."""
        # As a text: the script's msgpack is of before there was a type for bytes. Whatever verifies is JSON.
        self._site("offer", (policy.app, policy.version, envelope.decode(), bad), _ignore)

    def ask_policies(self, held: Mapping[str, int], then: Callable[[dict[str, bytes], list[str]], None]) -> None:
        """Ask for the policies that are newer than those of `held`, and which of these the store lacks.

        `then` gets the signed bytes by app, which nobody has verified yet, and apps; nothing of both when the store is away.
        """

        def take(reply: Reply) -> None:
            if isinstance(reply, Exception):
                then({}, [])
                return
            newer, lacking = msgpack.unpackb(reply, raw=True)  # whatever bytes somebody has put there
            apps = (app.decode(errors="replace") for app in newer[::2])
            then(dict(zip(apps, newer[1::2], strict=True)), [app.decode() for app in lacking])

        self._site("news", [item for pair in held.items() for item in pair], take)

    def _site(self, operation: str, arguments: Sequence[Any], then: Callable[[Reply], None]) -> None:
        self._link.run_script(self._link.site, operation, _packed(arguments), then)


class _Graph:
    """A policy's app CFG as fields of a Redis hash, one for each question that a step asks.

    FUNCTION: the lifetime of an invocation in ms, and its first states. FUNCTION 0 STATE 0 KEY: the lowest label with that key
    that leaves the state, its retries, its group, and the states behind it. FUNCTION 0 STATE: the barriers that leave it, as a
    flat list of group and state. No name has a byte 0.
    """

    def __init__(self, policy: CompiledPolicy, limits: Limits) -> None:
        self.policy = policy
        self._grace_ms = limits.invocation_grace_ms
        digest = hashlib.sha256()
        for name, row in self.rows().items():
            digest.update(len(name).to_bytes(4, "big") + name.encode() + len(row).to_bytes(4, "big") + row)
        self.sha = digest.hexdigest()

    def rows(self) -> dict[str, bytes]:
        """The fields, sorted by name."""
        rows: dict[str, bytes] = {}
        for function, graph in self.policy.app_cfg.items():
            rows[function] = _packed((self.policy.functions[function].invocation_timeout_ms + self._grace_ms, sorted(graph.start)))
            leaving: dict[str, tuple[int, list[int]]] = {}
            barriers: dict[str, list[int]] = {}
            for source, number, target in graph.edges:
                label = graph.labels[number]
                if label.barrier:
                    barriers.setdefault(f"{function}\0{source}", []).extend((label.barrier, target))
                    continue
                name = f"{function}\0{source}\0{_key(*label.key)}"
                first, targets = leaving.setdefault(name, (number, []))
                if number == first:  # edges rise by source and label
                    targets.append(target)
            for name, (number, targets) in leaving.items():
                rows[name] = _packed((number, graph.labels[number].retries, graph.labels[number].join, targets))
            rows.update((name, _packed(flat)) for name, flat in barriers.items())
        return dict(sorted(rows.items()))


def _key(callee: str, asynchronous: bool, callback: str) -> str:
    """What an INVOKE says of its invocation, in one text."""
    return f"{callee}\0{int(asynchronous)}\0{callback}"


def _flat(held: dict[int, _Graph]) -> list[int | str]:
    return [item for version, graph in held.items() for item in (version, graph.sha)]


def _instance(who: Instance) -> str:
    """The instance's name in the store. A node's name has no space: it comes from a certificate."""
    return f"{who.node} {who.id}"


def _speaker(who: Instance) -> str:
    """By which the store knows a question that is not late."""
    place: _Place | None = who.calls
    return place.speaker if place is not None else ""


def _owner(who: Instance) -> str:
    return f"{who.node} {who.app} {who.function}"


def _ignore(_reply: Reply) -> None:
    """Whatever it was: nothing depends on it, or it is asked again."""


def _fault(reply: Exception) -> Answer:
    """Why there is no decision. Only a store that is away may be forgiven by a fail mode."""
    if isinstance(reply, Away) or (isinstance(reply, Refused) and reply.is_away):
        return _UNAVAILABLE
    return _FAULTY


def _answer(raw: list[Any], who: Instance, version: int, held: dict[int, _Graph], said: InstanceInvoke | None) -> Answer:
    """What the script says, as a frame."""
    kind = raw[0]
    if kind == "granted":
        assert said is not None
        answer = Answer(True, Reason.ALLOWED.value, said.call, said.invocation, raw[1], callback=raw[2])
    elif kind == "started":
        answer = Answer(True, Reason.ALLOWED.value, raw[1], raw[2], hold=raw[3])
    elif kind == "finished":
        answer = FINISHED
    elif kind == "full":
        answer = full(raw[1], raw[2])
    elif kind == "late":
        answer = _LATE
    elif kind == "no":
        answer = _denial(raw, who, version, held, said)
    else:
        answer = _FAULTY  # a graph that is gone again while the step was repeated
    return answer


def _denial(raw: list[Any], who: Instance, version: int, held: dict[int, _Graph], said: InstanceInvoke | None) -> Answer:
    reason = Reason(raw[1])
    expected: tuple[str, ...] = ()
    if reason is Reason.EDGE_NOT_ALLOWED:
        assert said is not None
        is_retry = raw[2]
        detail = f"{who.function} may not invoke {said.callee} {'once more' if is_retry else 'now'}"
        graph = None if is_retry else held.get(raw[3])
        if graph is not None:
            expected = tuple(graph.policy.expected(who.function, frozenset(raw[4]), raw[5][::2]))
    elif reason is Reason.POLICY_MISMATCH:
        detail = f"version {version} of {who.app}, or the one that the call began with, is not held any more or not yet"
    elif reason is Reason.UNKNOWN_FUNCTION:
        detail = f"version {version} of {who.app} has no function {who.function}"
    elif reason is Reason.NOT_AN_ENTRY:
        detail = f"{who.function} starts only with the token of a granted invoke"
    elif len(raw) > 2:
        detail = "the invocation whose result this would take is not over"
    else:
        detail = _DETAILS[reason]
    return denied(reason, detail, expected)


def _evicted(app: str, raw: list[str], why: str) -> Evicted:
    function, call, invocation, instance = raw
    return Evicted(app, function, call, invocation, instance.partition(" ")[2], why)
