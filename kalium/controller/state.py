"""What the controller knows and decides: agents, instances, policies, calls, invocations, tokens.

Pure: no socket, no clock, no randomness of its own; time comes in as `now_ns` of one monotonic clock, ids and tokens come
from `mint`. A step costs the same at the end of a long call as at its beginning, and every table has a bound (`limits`).

An app cursor belongs to (app, call, invocation). A denial moves nothing. What an instance says counts only on the connection
of the agent that has registered it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from kalium.controller.deadlines import Deadlines
from kalium.controller.limits import LIMITS, Limits
from kalium.errors import EXIT_NO, KaliumError
from kalium.policy.automaton import CompiledPolicy, States
from kalium.policy.message import Reason
from kalium.protocol.frames import Answer, InstanceEnd, InstanceInvoke, InstanceStart, Register, StatusReport

NS_PER_MS = 1_000_000
AgentKey = Hashable  # names a live connection; the shell chooses it
Remembered = TypeVar("Remembered")


@dataclass(frozen=True)
class Evicted:
    """An invocation that nobody ended. `why` is "timeout", "agent_gone" or "unregistered"."""

    app: str
    function: str
    call: str
    invocation: str
    instance: str
    why: str


@dataclass(frozen=True)
class Published:
    """The newest policy of an app, and the signed bytes that agents get."""

    policy: CompiledPolicy
    envelope: bytes


class _Version:
    """One version of an app's policy, for as long as somebody needs it."""

    __slots__ = ("envelope", "is_dropped", "policy")

    def __init__(self, policy: CompiledPolicy, envelope: bytes) -> None:
        self.policy = policy
        self.envelope = envelope
        self.is_dropped = False


class _Call:
    """One request's way through an app, under the version that it began with."""

    __slots__ = ("app", "id", "invocations", "tokens", "version")

    def __init__(self, app: str, call_id: str, version: _Version) -> None:
        self.app = app
        self.id = call_id
        self.version = version
        self.invocations: dict[str, _Invocation] = {}
        self.tokens = 0  # pending ones


class _Invocation:
    """One execution of a function inside a call, and where it stands in the app CFG."""

    __slots__ = ("call", "function", "id", "instance", "states", "steps")

    def __init__(self, call: _Call, invocation_id: str, instance: _Instance, states: States) -> None:
        self.call = call
        self.id = invocation_id
        self.function = instance.function
        self.instance = instance
        self.states = states
        self.steps: dict[str, tuple[str, Answer]] | None = None  # step -> (callee, answer); most invocations never ask


class _Token:
    """The right to start `callee` once, within a call."""

    __slots__ = ("call", "callee", "caller", "text")

    def __init__(self, text: str, call: _Call, callee: str, caller: str) -> None:
        self.text = text
        self.call = call
        self.callee = callee
        self.caller = caller


class _Instance:
    """A sandbox that an agent vouches for."""

    __slots__ = ("agent", "app", "function", "id", "invocations", "node", "starts")

    def __init__(self, agent: _Agent, said: Register) -> None:
        self.id = said.instance
        self.app = said.app
        self.function = said.function
        self.node = agent.name
        self.agent: _Agent | None = agent  # None while its agent is away
        self.invocations: dict[_Invocation, None] = {}
        self.starts: dict[str, tuple[tuple[str, int], Answer]] = {}  # step -> ((token, version), answer)


class _Agent:
    """A live connection. `name` is who it is: the certificate's subject and the node."""

    __slots__ = ("instances", "key", "name")

    def __init__(self, key: AgentKey, name: tuple[str, str]) -> None:
        self.key = key
        self.name = name
        self.instances: dict[str, _Instance] = {}


def _denied(reason: Reason, detail: str, expected: list[str] | None = None) -> Answer:
    return Answer(False, reason.value, expected=tuple(expected or ()), detail=detail)


def _full(what: str, bound: int) -> Answer:
    return _denied(Reason.CONTROLLER_UNAVAILABLE, f"the bound of {bound} {what} is reached")


_UNREGISTERED = _denied(Reason.UNREGISTERED, "the instance is not registered on this connection")
_UNKNOWN_CALL = _denied(Reason.UNKNOWN_CALL, "no such invocation of this instance is live")
_NO_TOKEN = _denied(Reason.BAD_TOKEN, "the token is not pending for this function")
_STEP_REUSED = _denied(Reason.MALFORMED, "the step id has been used for another question")


class State:
    """The controller's tables. Not shared between threads."""

    def __init__(self, *, mint: Callable[[], str], limits: Limits = LIMITS) -> None:
        """`mint` gives 32 fresh hexadecimal digits, 128 random bits, at each call."""
        self._mint = mint
        self._limits = limits
        self._agents: dict[AgentKey, _Agent] = {}
        self._agent_by_name: dict[tuple[str, str], _Agent] = {}
        self._instances: dict[str, _Instance] = {}
        self._versions: dict[str, dict[int, _Version]] = {}  # app -> version -> policy; the last one is the newest
        self._calls: dict[tuple[str, str], _Call] = {}
        self._tokens: dict[str, _Token] = {}
        self._invocations = 0
        self._token_deadlines: Deadlines[_Token] = Deadlines(limits.token_ms * NS_PER_MS)
        self._gone_deadlines: Deadlines[_Instance] = Deadlines(limits.agent_gone_ms * NS_PER_MS)
        self._drain_deadlines: Deadlines[tuple[str, int]] = Deadlines(limits.drain_ms * NS_PER_MS)
        # One queue for each lifetime, which is a function's invocation timeout and the grace. Policies have few of them.
        self._invocation_deadlines: dict[int, Deadlines[_Invocation]] = {}

    # Policies

    def install(self, policy: CompiledPolicy, envelope: bytes, *, now_ns: int) -> bool:
        """Make `policy` the newest of its app, and start to drain the one before it. False: it is the newest already.

        Raises:
            KaliumError: policy.version, the version does not grow. The newest one stays.
        """
        held = self._versions.setdefault(policy.app, {})
        newest = self._newest(policy.app)
        if newest is not None:
            if policy.version == newest.policy.version and envelope == newest.envelope:
                return False
            if policy.version <= newest.policy.version:
                raise KaliumError(
                    "policy.version", f"cannot take version {policy.version} of {policy.app}",
                    f"version {newest.policy.version} is in force, and versions only grow",
                    "sign the policy under a higher version; to go back, sign the old text under a new one", EXIT_NO,
                )  # fmt: skip
            self._drain_deadlines.add((policy.app, newest.policy.version), now_ns=now_ns)
        held[policy.version] = _Version(policy, envelope)
        while len(held) > self._limits.versions_per_app:
            self._drop_version(policy.app, next(iter(held)))
        return True

    def newest(self) -> dict[str, Published]:
        """The policy in force of each app, by name."""
        return {app: Published(version.policy, version.envelope) for app in self._versions if (version := self._newest(app)) is not None}

    def _newest(self, app: str) -> _Version | None:
        held = self._versions.get(app)
        return held[next(reversed(held))] if held else None

    def _held(self, app: str, version: int, now_ns: int) -> _Version | None:
        """The version, if it is the newest or its drain is not over."""
        held = self._versions.get(app)
        found = held.get(version) if held else None
        if found is None or self._drain_deadlines.is_due((app, version), now_ns=now_ns):
            return None
        return found

    def _drop_version(self, app: str, version: int) -> None:
        self._drain_deadlines.discard((app, version))
        self._versions[app].pop(version).is_dropped = True  # its calls find out at their next step

    # Agents and instances

    def agent_hello(self, key: AgentKey, *, subject: str, node: str, now_ns: int) -> AgentKey | None:
        """Take a new connection of the agent that is `subject` by its certificate and `node` by its own word.

        Returns the connection that this one replaces, which the caller closes: an agent that comes back is often back before
        its old connection is known to be dead. Raises OverflowError at the bound of agents.
        """
        name = (subject, node)
        replaced = self._agent_by_name.get(name)
        if replaced is not None:
            self.agent_gone(replaced.key, now_ns=now_ns)
        elif len(self._agents) >= self._limits.agents:
            raise OverflowError(f"{self._limits.agents} agents are connected")
        self._agents[key] = self._agent_by_name[name] = _Agent(key, name)
        return replaced.key if replaced is not None else None

    def agent_gone(self, key: AgentKey, *, now_ns: int) -> None:
        """The connection is over. Its instances wait for their agent to register them again, and are evicted after a bound."""
        agent = self._agents.pop(key, None)
        if agent is None:
            return  # it never said hello, or was replaced
        del self._agent_by_name[agent.name]
        for instance in agent.instances.values():
            instance.agent = None
            self._gone_deadlines.add(instance, now_ns=now_ns)

    def register(self, key: AgentKey, said: Register) -> Answer:
        """Let `said.instance` speak on this connection. Registering again what is registered here changes nothing."""
        agent = self._agents[key]
        instance = self._instances.get(said.instance)
        fault = self._fault_of(said, instance, agent)
        if fault is not None:
            return fault
        if instance is None or instance.agent is not agent:
            if len(agent.instances) >= self._limits.instances_per_agent:
                return _full("instances of one agent", self._limits.instances_per_agent)
            if instance is None:
                instance = self._instances[said.instance] = _Instance(agent, said)
            instance.agent = agent
            self._gone_deadlines.discard(instance)
            agent.instances[instance.id] = instance
        return Answer(True, Reason.ALLOWED.value)

    def _fault_of(self, said: Register, instance: _Instance | None, agent: _Agent) -> Answer | None:
        """Why `said` may not be registered, where `instance` is what has its id already."""
        newest = self._newest(said.app)
        if newest is None:
            return _denied(Reason.UNKNOWN_FUNCTION, f"no policy of app {said.app} is loaded")
        if said.function not in newest.policy.functions:
            return _denied(Reason.UNKNOWN_FUNCTION, f"version {newest.policy.version} of {said.app} has no function {said.function}")
        if not said.instance:
            return _denied(Reason.MALFORMED, "an instance without an id")
        if instance is not None and (instance.node, instance.app, instance.function) != (agent.name, said.app, said.function):
            return _denied(Reason.UNREGISTERED, "the instance is registered as another function or on another node")
        return None

    def unregister(self, key: AgentKey, instance_id: str) -> list[Evicted]:
        """The instance is gone; what it was doing ends. Nothing happens for an instance of another connection."""
        instance = self._instances.get(instance_id)
        if instance is None or instance.agent is None or instance.agent.key != key:
            return []
        return list(self._remove_instance(instance, "unregistered"))

    def _remove_instance(self, instance: _Instance, why: str) -> Iterator[Evicted]:
        if instance.agent is not None:
            del instance.agent.instances[instance.id]
        self._gone_deadlines.discard(instance)
        del self._instances[instance.id]
        for invocation in list(instance.invocations):
            yield self._evict(invocation, why)

    def _speaking(self, key: AgentKey, said: InstanceStart | InstanceInvoke | InstanceEnd) -> _Instance | None:
        """The instance that `said` is about, if this connection may speak for it and names its registration."""
        instance = self._instances.get(said.instance)
        if instance is None or instance.agent is None or instance.agent.key != key:
            return None
        return instance if (instance.app, instance.function) == (said.app, said.function) else None

    # Steps

    def start(self, key: AgentKey, said: InstanceStart, *, now_ns: int) -> Answer:
        """May an invocation of the instance's function begin? Granted: it lives, and a token that was used is gone."""
        instance = self._speaking(key, said)
        if instance is None:
            return _UNREGISTERED
        question = (said.token, said.version)
        remembered = instance.starts.get(said.step)
        if remembered is not None:
            return remembered[1] if remembered[0] == question else _STEP_REUSED
        if len(instance.invocations) >= self._limits.invocations_per_instance:
            return _full("live invocations of one instance", self._limits.invocations_per_instance)
        answer = self._start_in_call(instance, said, now_ns) if said.token else self._start_call(instance, said, now_ns)
        if answer.reason != Reason.CONTROLLER_UNAVAILABLE.value:  # a full table is no decision: asked again it may have room
            _remember(instance.starts, said.step, (question, answer), self._limits.starts_per_instance)
        return answer

    def _start_call(self, instance: _Instance, said: InstanceStart, now_ns: int) -> Answer:
        version = self._held(said.app, said.version, now_ns)
        if version is None:
            return self._mismatch(said.app, said.version)
        if said.function not in version.policy.functions:
            return _denied(Reason.UNKNOWN_FUNCTION, f"version {said.version} of {said.app} has no function {said.function}")
        if said.function not in version.policy.entries:
            return _denied(Reason.NOT_AN_ENTRY, f"{said.function} starts only with the token of a granted invoke")
        if len(self._calls) >= self._limits.calls:
            return _full("live calls", self._limits.calls)
        call = _Call(said.app, self._mint(), version)
        assert (call.app, call.id) not in self._calls, "mint has repeated itself"
        self._calls[call.app, call.id] = call
        return self._begin(call, instance, now_ns)

    def _start_in_call(self, instance: _Instance, said: InstanceStart, now_ns: int) -> Answer:
        token = self._tokens.get(said.token)
        if token is None or token.callee != said.function or token.call.app != said.app or self._token_deadlines.is_due(token, now_ns=now_ns):
            return _NO_TOKEN
        if token.call.version.is_dropped or self._held(said.app, said.version, now_ns) is None:
            return self._mismatch(said.app, said.version)
        if len(token.call.invocations) >= self._limits.invocations_per_call:
            return _full("invocations of one call", self._limits.invocations_per_call)
        answer = self._begin(token.call, instance, now_ns)
        self._remove_token(token)
        return answer

    def _begin(self, call: _Call, instance: _Instance, now_ns: int) -> Answer:
        """Add an invocation of the instance's function to the call."""
        policy = call.version.policy
        invocation = _Invocation(call, self._mint(), instance, policy.start(instance.function))
        assert invocation.id not in call.invocations, "mint has repeated itself"
        call.invocations[invocation.id] = invocation
        instance.invocations[invocation] = None
        self._invocations += 1
        self._deadlines_of(invocation).add(invocation, now_ns=now_ns)
        return Answer(True, Reason.ALLOWED.value, call.id, invocation.id)

    def invoke(self, key: AgentKey, said: InstanceInvoke, *, now_ns: int) -> Answer:
        """May this invocation call `callee` now? Granted: its cursor has moved, and the answer holds the callee's token."""
        invocation = self._live_invocation(key, said)
        if isinstance(invocation, Answer):
            return invocation
        if self._deadlines_of(invocation).is_due(invocation, now_ns=now_ns):
            return _UNKNOWN_CALL
        remembered = invocation.steps.get(said.step) if invocation.steps is not None else None
        if remembered is not None:
            return remembered[1] if remembered[0] == said.callee else _STEP_REUSED
        call = invocation.call
        if call.version.is_dropped or self._held(said.app, said.version, now_ns) is None:
            return self._mismatch(said.app, said.version)
        if call.tokens >= self._limits.tokens_per_call:
            return _full("pending tokens of one call", self._limits.tokens_per_call)
        states = call.version.policy.step(invocation.function, invocation.states, said.callee)
        if states:
            invocation.states = states
            answer = Answer(True, Reason.ALLOWED.value, call.id, invocation.id, self._new_token(call, said.callee, invocation.id, now_ns))
        else:
            expected = call.version.policy.expected(invocation.function, invocation.states)
            answer = _denied(Reason.EDGE_NOT_ALLOWED, f"{invocation.function} may not invoke {said.callee} now", expected)
        if invocation.steps is None:
            invocation.steps = {}
        _remember(invocation.steps, said.step, (said.callee, answer), self._limits.steps_per_invocation)
        return answer

    def end(self, key: AgentKey, said: InstanceEnd) -> bool:
        """The invocation is over. False: this instance has no such invocation."""
        invocation = self._live_invocation(key, said)
        if isinstance(invocation, Answer):
            return False
        self._remove_invocation(invocation)
        return True

    def _live_invocation(self, key: AgentKey, said: InstanceInvoke | InstanceEnd) -> _Invocation | Answer:
        """The invocation that `said` is about, or why there is none for who says it."""
        instance = self._speaking(key, said)
        if instance is None:
            return _UNREGISTERED
        call = self._calls.get((said.app, said.call))
        invocation = call.invocations.get(said.invocation) if call is not None else None
        if invocation is None or invocation.instance is not instance:
            return _UNKNOWN_CALL
        return invocation

    def _mismatch(self, app: str, version: int) -> Answer:
        newest = self._newest(app)
        in_force = f"version {newest.policy.version} is in force" if newest is not None else "no version is loaded"
        return _denied(Reason.POLICY_MISMATCH, f"version {version} of {app} is not held any more or not yet; {in_force}")

    # Removing

    def expire(self, *, now_ns: int, evictions_max: int = 1000) -> list[Evicted]:
        """Remove what is over, at most about `evictions_max` of each kind, so that one call stays short; see `has_due`.

        Nothing waits for this to be denied: a step looks at the deadlines itself.
        """
        evicted: list[Evicted] = []
        while (version := self._drain_deadlines.next_due(now_ns=now_ns)) is not None:
            self._drop_version(*version)
        for _ in range(evictions_max):
            if (token := self._token_deadlines.next_due(now_ns=now_ns)) is None:
                break
            self._remove_token(token)
        while len(evicted) < evictions_max and (instance := self._gone_deadlines.next_due(now_ns=now_ns)) is not None:
            evicted += self._remove_instance(instance, "agent_gone")
        for lifetime_ms, deadlines in list(self._invocation_deadlines.items()):
            while len(evicted) < evictions_max and (invocation := deadlines.next_due(now_ns=now_ns)) is not None:
                evicted.append(self._evict(invocation, "timeout"))
            if not deadlines:
                del self._invocation_deadlines[lifetime_ms]
        return evicted

    def has_due(self, *, now_ns: int) -> bool:
        """Whether `expire` has left something over."""
        queues: list[Deadlines[Any]] = [self._token_deadlines, self._gone_deadlines, self._drain_deadlines, *self._invocation_deadlines.values()]
        return any(queue.next_due(now_ns=now_ns) is not None for queue in queues)

    def status(self) -> StatusReport:
        """Counts, and the version in force of each app."""
        policies = {app: published.policy.version for app, published in self.newest().items()}
        return StatusReport(policies, len(self._agents), len(self._calls), self._invocations)

    def _deadlines_of(self, invocation: _Invocation) -> Deadlines[_Invocation]:
        timeout_ms = invocation.call.version.policy.functions[invocation.function].invocation_timeout_ms
        deadlines = self._invocation_deadlines.get(timeout_ms)
        if deadlines is None:
            deadlines = self._invocation_deadlines[timeout_ms] = Deadlines((timeout_ms + self._limits.invocation_grace_ms) * NS_PER_MS)
        return deadlines

    def _evict(self, invocation: _Invocation, why: str) -> Evicted:
        self._remove_invocation(invocation)
        return Evicted(invocation.call.app, invocation.function, invocation.call.id, invocation.id, invocation.instance.id, why)

    def _remove_invocation(self, invocation: _Invocation) -> None:
        del invocation.call.invocations[invocation.id]
        del invocation.instance.invocations[invocation]
        self._invocations -= 1
        self._deadlines_of(invocation).discard(invocation)
        self._end_if_idle(invocation.call)

    def _new_token(self, call: _Call, callee: str, caller: str, now_ns: int) -> str:
        token = _Token(self._mint(), call, callee, caller)
        assert token.text not in self._tokens, "mint has repeated itself"
        self._tokens[token.text] = token
        self._token_deadlines.add(token, now_ns=now_ns)
        call.tokens += 1
        return token.text

    def _remove_token(self, token: _Token) -> None:
        del self._tokens[token.text]
        self._token_deadlines.discard(token)
        token.call.tokens -= 1
        self._end_if_idle(token.call)

    def _end_if_idle(self, call: _Call) -> None:
        """A call ends when nothing of it lives and nothing of it may still begin."""
        if not call.invocations and not call.tokens:
            del self._calls[call.app, call.id]


def _remember(memory: dict[str, Remembered], step: str, answer: Remembered, steps_max: int) -> None:
    """Keep the answer of a step, and forget the oldest one at the bound: a guard repeats only its latest question."""
    memory[step] = answer
    if len(memory) > steps_max:
        del memory[next(iter(memory))]
