"""What one controller knows about its site: versions of policies, connected agents, their instances and their reports.

Pure, as all of the core: no socket and no clock; time comes in as `now_ns` of one monotonic clock. Every table has a bound
(`limits`). What an instance says counts only on the connection of the agent that has registered it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

from kalium.controller.deadlines import Deadlines
from kalium.controller.limits import LIMITS, Limits
from kalium.errors import EXIT_NO, KaliumError
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.message import Reason
from kalium.protocol.frames import Answer, InstanceEnd, InstanceFinish, InstanceInvoke, InstanceStart, Register, Report

NS_PER_MS = 1_000_000
AgentKey = Hashable  # names a live connection; the shell chooses it


class Published:
    """A version of an app's policy, and the signed bytes that agents get. It is drained at `drained_ns`, 0 while it is the newest."""

    __slots__ = ("drained_ns", "envelope", "policy")

    def __init__(self, policy: CompiledPolicy, envelope: bytes) -> None:
        self.policy = policy
        self.envelope = envelope
        self.drained_ns = 0


class DuplicateAgent(Exception):
    """Another run of the agent is connected and alive."""


class Instance:
    """A sandbox that an agent vouches for. `agent` is None while it is away; `calls` is the store's own place, None until used."""

    __slots__ = ("agent", "app", "calls", "function", "id", "node")

    def __init__(self, instance_id: str, app: str, function: str, node: str) -> None:
        self.id = instance_id
        self.app = app
        self.function = function
        self.node = node
        self.agent: Agent | None = None
        self.calls: Any = None


class Agent:
    """A live connection of the agent of `node`. `run` tells two programs of one name apart."""

    __slots__ = ("heard_ns", "instances", "key", "node", "report", "run")

    def __init__(self, key: AgentKey, node: str, run: str, now_ns: int) -> None:
        self.key = key
        self.node = node
        self.run = run
        self.heard_ns = now_ns
        self.instances: dict[str, Instance] = {}
        self.report: Report | None = None


def denied(reason: Reason, detail: str, expected: tuple[str, ...] = ()) -> Answer:
    """An answer that says no."""
    return Answer(False, reason.value, expected=expected, detail=detail)


def full(what: str, bound: int) -> Answer:
    """The answer of a table that has no room. It decides nothing: asked again there may be room."""
    return denied(Reason.OVERLOADED, f"the bound of {bound} {what} is reached")


REGISTERED = Answer(True, Reason.ALLOWED.value)
UNREGISTERED = denied(Reason.UNREGISTERED, "the instance is not registered on this connection")


class Registry:
    """The tables of one controller. Not shared between threads."""

    def __init__(self, *, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._agents: dict[AgentKey, Agent] = {}
        self._agent_of: dict[str, Agent] = {}  # by node
        self._instances: dict[str, Instance] = {}
        self._of_node: Counter[str] = Counter()  # instances, those whose agent is away included: who reconnects gets no room by that
        self._versions: dict[str, dict[int, Published]] = {}  # app -> version -> policy; the last one is the newest
        self._gone: Deadlines[Instance] = Deadlines(limits.agent_gone_ms * NS_PER_MS)
        self._draining: Deadlines[tuple[str, int]] = Deadlines(limits.drain_ms * NS_PER_MS)

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
            self._draining.add((policy.app, newest.policy.version), now_ns=now_ns)
            newest.drained_ns = now_ns + self._limits.drain_ms * NS_PER_MS
        held[policy.version] = Published(policy, envelope)
        while len(held) > self._limits.versions_per_app:
            self._drop_version(policy.app, next(iter(held)))
        return True

    def newest(self) -> dict[str, Published]:
        """The policy in force of each app, by name."""
        return {app: published for app in self._versions if (published := self._newest(app)) is not None}

    def held(self, app: str, version: int, now_ns: int) -> CompiledPolicy | None:
        """The policy, if it is the newest or its drain is not over."""
        versions = self._versions.get(app)
        found = versions.get(version) if versions else None
        if found is None or 0 < found.drained_ns <= now_ns:
            return None
        return found.policy

    def versions(self, app: str, now_ns: int) -> Iterator[CompiledPolicy]:
        """Each policy that `held` gives for `app`."""
        for version in self._versions.get(app, ()):
            found = self.held(app, version, now_ns)
            if found is not None:
                yield found

    def _newest(self, app: str) -> Published | None:
        held = self._versions.get(app)
        return held[next(reversed(held))] if held else None

    def _drop_version(self, app: str, version: int) -> None:
        self._draining.discard((app, version))
        del self._versions[app][version]  # its calls find out at their next step

    # Agents

    @property
    def agents(self) -> dict[AgentKey, Agent]:
        """The agents that are connected; not to be changed."""
        return self._agents

    def agent_hello(self, key: AgentKey, *, node: str, run: str, now_ns: int) -> AgentKey | None:
        """Take a new connection of the agent of `node`, which has proven that it is.

        Returns the connection that this one replaces, which the caller closes: an agent that comes back is often back before
        its old connection is known to be dead.

        Raises:
            DuplicateAgent: another run of it is connected, and was heard within `duplicate_heard_ms`.
            OverflowError: at the bound of agents.
        """
        replaced = self._agent_of.get(node)
        if replaced is not None:
            if replaced.run != run and now_ns - replaced.heard_ns < self._limits.duplicate_heard_ms * NS_PER_MS:
                raise DuplicateAgent(f"run {replaced.run} of {node} is connected and alive")
            self.agent_gone(replaced.key, now_ns=now_ns)
        elif len(self._agents) >= self._limits.agents:
            raise OverflowError(f"{self._limits.agents} agents are connected")
        self._agents[key] = self._agent_of[node] = Agent(key, node, run, now_ns)
        return replaced.key if replaced is not None else None

    def heard(self, key: AgentKey, *, now_ns: int) -> None:
        """Something came from this connection."""
        agent = self._agents.get(key)
        if agent is not None:
            agent.heard_ns = now_ns

    def agent_gone(self, key: AgentKey, *, now_ns: int) -> None:
        """The connection is over. Its instances wait for their agent to register them again, and are given up after a bound."""
        agent = self._agents.pop(key, None)
        if agent is None:
            return  # it never said hello, or was replaced
        del self._agent_of[agent.node]
        for instance in agent.instances.values():
            instance.agent = None
            self._gone.add(instance, now_ns=now_ns)

    def heard_since(self, since_ns: int) -> list[str]:
        """The nodes whose agents were heard then or later."""
        return [agent.node for agent in self._agents.values() if agent.heard_ns >= since_ns]

    def connection_of(self, node: str) -> AgentKey | None:
        """The connection of the agent of `node`."""
        agent = self._agent_of.get(node)
        return None if agent is None else agent.key

    def report(self, key: AgentKey, said: Report) -> None:
        """Keep what the agent says; its last report is what counts."""
        self._agents[key].report = said

    # Instances

    def register(self, key: AgentKey, said: Register) -> Answer | Instance:
        """The instance, which may speak on this connection from now on; or why it may not. Saying it again changes nothing."""
        agent = self._agents[key]
        instance = self._instances.get(said.instance)
        fault = self._fault_of(said, instance, agent)
        if fault is not None:
            return fault
        if instance is None or instance.agent is not agent:
            if instance is None:
                if self._of_node[agent.node] >= self._limits.instances_per_agent:
                    return full("instances of one agent", self._limits.instances_per_agent)
                instance = self._instances[said.instance] = Instance(said.instance, said.app, said.function, agent.node)
                self._of_node[agent.node] += 1
            instance.agent = agent
            self._gone.discard(instance)
            agent.instances[instance.id] = instance
        return instance

    def _fault_of(self, said: Register, instance: Instance | None, agent: Agent) -> Answer | None:
        """Why `said` may not be registered, where `instance` is what has its id already."""
        newest = self._newest(said.app)
        if newest is None:
            return denied(Reason.UNKNOWN_FUNCTION, f"no policy of app {said.app} is loaded")
        if said.function not in newest.policy.functions:
            return denied(Reason.UNKNOWN_FUNCTION, f"version {newest.policy.version} of {said.app} has no function {said.function}")
        if not said.instance:
            return denied(Reason.MALFORMED, "an instance without an id")
        if instance is not None and (instance.node, instance.app, instance.function) != (agent.node, said.app, said.function):
            return denied(Reason.UNREGISTERED, "the instance is registered as another function or on another node")
        return None

    def unregister(self, key: AgentKey, instance_id: str) -> Instance | None:
        """Forget the instance and return it. Nothing happens for an instance of another connection."""
        instance = self._instances.get(instance_id)
        if instance is None or instance.agent is None or instance.agent.key != key:
            return None
        self._remove(instance)
        return instance

    def refuse(self, instance: Instance) -> None:
        """Forget an instance whose id turned out to be another node's."""
        if self._instances.get(instance.id) is instance:
            self._remove(instance)

    def _remove(self, instance: Instance) -> None:
        if instance.agent is not None:
            del instance.agent.instances[instance.id]
            instance.agent = None
        self._gone.discard(instance)
        del self._instances[instance.id]
        self._of_node[instance.node] -= 1
        if not self._of_node[instance.node]:
            del self._of_node[instance.node]

    def speaking(self, key: AgentKey, said: InstanceStart | InstanceInvoke | InstanceEnd | InstanceFinish) -> Instance | None:
        """The instance that `said` is about, if this connection may speak for it and names its registration."""
        instance = self._instances.get(said.instance)
        if instance is None or instance.agent is None or instance.agent.key != key:
            return None
        return instance if instance.app == said.app and instance.function == said.function else None

    # Time

    def expire(self, *, now_ns: int) -> Iterator[Instance]:
        """Drop versions whose drain is over, and yield the instances whose agent stayed away, forgetting each as it is taken."""
        while (version := self._draining.next_due(now_ns=now_ns)) is not None:
            self._drop_version(*version)
        while (instance := self._gone.next_due(now_ns=now_ns)) is not None:
            self._remove(instance)
            yield instance

    def has_due(self, *, now_ns: int) -> bool:
        """Whether `expire` has left something over."""
        return self._gone.next_due(now_ns=now_ns) is not None or self._draining.next_due(now_ns=now_ns) is not None
