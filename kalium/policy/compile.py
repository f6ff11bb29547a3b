"""Compiles a policy's source to the form that guards and controllers execute: same source, same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kalium.errors import KaliumError
from kalium.policy import schema, source
from kalium.policy.automaton import (
    FORMAT,
    CompiledPolicy,
    FailMode,
    Label,
    Mode,
    Peer,
    Protocol,
    Reuse,
    Symbol,
    Tls,
    fault_of_template,
    label_fields,
)
from kalium.policy.cfg import WORK_MAX, Automaton, Barrier, Behaviours, Cfg, Choice, Parallel, Repeat, Send, Steps, TooManyStates, leaves_of
from kalium.policy.envelope import canonical
from kalium.policy.limits import (
    COMPILED_BYTES_MAX,
    DEADLINE_MS_DEFAULT,
    EDGES_MAX,
    INFLIGHT_DEFAULT,
    INVOCATION_TIMEOUT_MS_DEFAULT,
    MAX_BODY_DEFAULT,
    QUIET_MS_DEFAULT,
    RETIRE_MS_DEFAULT,
    RETRIES_DEFAULT,
    STATES_MAX,
    SYMBOLS_MAX,
    TAIL_MS_DEFAULT,
)
from kalium.policy.message import Kind, Message
from kalium.policy.overlap import overlap
from kalium.policy.source import Finding, Path, Source, SourceRefused, did_you_mean, error_at

# What a verb's statements read and write, as the guard's classifier reports them (runtime/internal/wire/sql): the number of
# tables written, and whether any may be read.
_WRITES_NONE, _WRITES_ONE, _WRITES_SOME = "none", "exactly one", "at least one"
TABLES_OF_VERB = {
    "show-tables": (_WRITES_NONE, False),
    "select": (_WRITES_NONE, True),
    "insert": (_WRITES_ONE, True),
    "replace": (_WRITES_ONE, True),
    "update": (_WRITES_SOME, True),
    "delete": (_WRITES_SOME, True),
    "create-table": (_WRITES_ONE, False),
    "begin": (_WRITES_NONE, False),
    "commit": (_WRITES_NONE, False),
    "rollback": (_WRITES_NONE, False),
}
_TRANSACTION_VERBS = ("begin", "commit", "rollback")


@dataclass(frozen=True)
class DraftCfg:
    """A CFG as it was read, and the messages that it is over."""

    cfg: Cfg
    symbols: tuple[Symbol, ...]


@dataclass(frozen=True)
class DraftFunction:
    """A function as it was read: `during` an invocation its messages and then, maybe, its tail; and what it sends at `startup`."""

    name: str
    line: int
    during: DraftCfg
    startup: DraftCfg | None
    mode: Mode
    max_body: int
    max_inflight: int
    settings: Mapping[str, Any]  # the other fields of the compiled form

    def cfgs(self) -> tuple[DraftCfg, ...]:
        """All that is there of it."""
        return (self.during, self.startup) if self.startup else (self.during,)

    def symbols(self) -> Iterator[Symbol]:
        """The messages that it may send at some time."""
        return itertools.chain.from_iterable(cfg.symbols for cfg in self.cfgs())


@dataclass(frozen=True)
class Draft:
    """A policy as it was read: every name resolved, nothing compiled."""

    source: Source
    app: str
    version: int
    mode: Mode
    app_edge: FailMode
    deadline_ms: int
    peers: Mapping[str, Peer]
    entries: tuple[str, ...]
    functions: Mapping[str, DraftFunction]


def compile_policy(data: bytes, where: str) -> bytes:
    """The compiled form of the YAML `data`; `where` names it in errors. Raises KaliumError for the first thing that is wrong."""
    draft, findings = read(data)
    compiled = b""
    if draft is not None and not findings:
        compiled, findings = assemble(draft)
    if findings:
        raise first_error(findings, where)
    return compiled


def first_error(findings: list[Finding], where: str) -> KaliumError:
    """The first of `findings` as the error of compiling `where`; it says how many follow."""
    first = findings[0]
    if len(findings) > 1:
        more = f"; `kalium policy lint {where}` shows all {len(findings)} errors"
        first = replace(first, next_step=first.next_step + more)
    return first.error(f"cannot compile {where}")


def read(data: bytes) -> tuple[Draft | None, list[Finding]]:
    """The policy in `data`, or None and the errors, in the order of lines."""
    try:
        text = source.read(data)
    except SourceRefused as refused:
        return None, [refused.finding]
    findings = schema.findings(text)
    if findings:
        return None, findings  # of another shape, nothing in it can be relied on
    reader = _PolicyReader(text)
    draft = reader.draft()
    if reader.findings:
        return None, sorted(reader.findings, key=lambda finding: finding.line)
    return draft, []


class _PolicyReader:
    """Resolves the names of a policy that has the right shape. Errors gather in `findings`; reading goes on after each."""

    def __init__(self, text: Source) -> None:
        self.source = text
        self.document: Mapping[str, Any] = text.document
        self.findings: list[Finding] = []
        self.peers: dict[str, Peer] = {}

    def refuse(self, code: str, path: Path, found: str, next_step: str) -> None:
        self.findings.append(error_at(code, self.source.line(path), found, next_step))

    def draft(self) -> Draft:
        document = self.document
        self.read_peers()
        functions = {name: self.function(name, description) for name, description in document["functions"].items()}
        for index, name in enumerate(document["entries"]):
            self.check_function(name, ("entries", index))
        on_unavailable = document.get("on_unavailable", {})
        return Draft(
            self.source, document["app"], document["version"], Mode(document["mode"]),
            FailMode(on_unavailable.get("app_edge", FailMode.DENY)), on_unavailable.get("deadline_ms", DEADLINE_MS_DEFAULT),
            self.peers, tuple(sorted(document["entries"])), functions,
        )  # fmt: skip

    def function(self, name: str, description: Mapping[str, Any]) -> DraftFunction:
        """Everything that is said of one function."""
        path: Path = ("functions", name)
        reader = _FunctionReader(self)
        body = reader.steps(description["messages"], (*path, "messages"))
        sent = tuple(reader.symbols)
        if "tail" in description:
            # The invocation may end with its answer, whether or not the tail is sent.
            reader.part = "tail"
            body = Steps((body, Repeat(reader.steps(description["tail"], (*path, "tail")), 0, 1)))
            self.check_tail(sent, tuple(reader.symbols)[len(sent) :])
        startup = None
        if "startup" in description:
            beginning = _FunctionReader(self, "startup")
            startup = DraftCfg(beginning.steps(description["startup"], (*path, "startup")), tuple(beginning.symbols))
        self.check_settings(path, description)
        function = DraftFunction(
            name, self.source.line(path), DraftCfg(body, tuple(reader.symbols)), startup, self.mode_of(name),
            description.get("max_body", MAX_BODY_DEFAULT), description.get("max_inflight", INFLIGHT_DEFAULT),
            {
                "invocation_timeout_ms": description.get("invocation_timeout_ms", INVOCATION_TIMEOUT_MS_DEFAULT),
                "tls": description.get("tls", Tls.OPEN.value),
                "tail_ms": description.get("tail_ms", TAIL_MS_DEFAULT),
                "quiet_ms": description.get("quiet_ms", QUIET_MS_DEFAULT),
                "retire_ms": description.get("retire_ms", RETIRE_MS_DEFAULT),
                "reuse": description.get("reuse", Reuse.ALWAYS.value),
            },
        )  # fmt: skip
        for cfg in function.cfgs():
            if len(cfg.symbols) > SYMBOLS_MAX:
                found = f"function {name} has {len(cfg.symbols)} messages, at most {SYMBOLS_MAX}"
                self.refuse("policy.too_large", path, found, "split the function")
        return function

    def check_tail(self, body: tuple[Symbol, ...], tail: tuple[Symbol, ...]) -> None:
        """A message that body and tail have in common could be counted as either, so an answer would not end the body."""
        for symbol in tail:
            twin = next((other for other in body if overlap(symbol, other)), None)
            if twin is not None:
                found = f"{symbol.text} is in the tail, and line {twin.line} has it before the answer"
                self.findings.append(error_at("policy.tail", symbol.line, found, "keep it in one of the two"))

    def check_settings(self, path: Path, description: Mapping[str, Any]) -> None:
        """Settings that contradict each other."""
        if "tail_ms" in description and "tail" not in description:
            self.refuse("policy.tail", (*path, "tail_ms"), "tail_ms without a tail", "add `tail:`, or delete it")
        quiet_ms, retire_ms = description.get("quiet_ms", QUIET_MS_DEFAULT), description.get("retire_ms", RETIRE_MS_DEFAULT)
        if quiet_ms >= retire_ms:
            found = f"quiet_ms {quiet_ms} is not less than retire_ms {retire_ms}, so no instance could become quiet in time"
            self.refuse("policy.value", (*path, "quiet_ms" if "quiet_ms" in description else "retire_ms"), found, "raise retire_ms")
        if description.get("reuse") == Reuse.NEVER.value and description.get("max_inflight", INFLIGHT_DEFAULT) > 1:
            self.refuse("policy.value", (*path, "max_inflight"), "reuse: never is one invocation an instance", "delete max_inflight")

    def read_peers(self) -> None:
        addresses: dict[tuple[str, int], str] = {}
        for name, description in self.document["peers"].items():
            path: Path = ("peers", name)
            protocol = Protocol(description["protocol"])
            is_gateway = "role" in description
            if is_gateway and protocol is not Protocol.HTTP:
                self.refuse("policy.peer", (*path, "role"), f"gateway {name} has protocol {protocol.value}", "write `protocol: http`")
            if protocol is Protocol.MYSQL and "schema" not in description:
                self.refuse("policy.peer", path, f"mysql peer {name} has no schema", "add `schema:`, the database that functions connect to")
            if protocol is not Protocol.MYSQL and "schema" in description:
                self.refuse("policy.peer", (*path, "schema"), f"{protocol.value} peer {name} has a schema", "delete it: only mysql peers have one")
            address = description["host"], description["port"]
            if address in addresses:
                other = addresses[address]
                self.refuse("policy.peer", path, f"peer {name} is at the same host and port as {other}", "keep one: a connection belongs to one peer")
            addresses[address] = name
            self.peers[name] = Peer(name, description["host"], description["port"], protocol, is_gateway, description.get("schema", ""))

    def mode_of(self, function: str) -> Mode:
        """The mode of a function, wherever it stands in the text; that of the policy for one that is not there."""
        return Mode(self.document["functions"].get(function, {}).get("mode", self.document["mode"]))

    def check_function(self, name: str, path: Path) -> None:
        known = self.document["functions"]
        if name not in known:
            step = f"{did_you_mean(name, list(known))}, or add {name} under functions"
            self.refuse("policy.unknown_function", path, f"{name} is not a function of this policy", step)


class _FunctionReader:
    """Reads one function's steps; each message on a line of its own becomes a symbol, in the order of the text.

    `part` is what is being read: messages, tail or startup. Each `join` of the text is a group, also where it is repeated.
    """

    def __init__(self, policy: _PolicyReader, part: str = "messages") -> None:
        self._policy = policy
        self._in_transaction = False
        self._groups = 0
        self._group = 0  # that of the construct which is being read, 0 outside of all
        self._has_joined = False
        self.part = part
        self.symbols: dict[Symbol, int] = {}

    def steps(self, items: list[Any], path: Path) -> Cfg:
        return Steps(tuple(self._step(item, (*path, index)) for index, item in enumerate(items)))

    def _branch(self, value: Any, path: Path) -> Cfg:
        return self.steps(value, path) if isinstance(value, list) else self._step(value, path)

    def _branches(self, values: list[Any], path: Path) -> tuple[Cfg, ...]:
        return tuple(self._branch(value, (*path, index)) for index, value in enumerate(values))

    def _step(self, step: Mapping[str, Any], path: Path) -> Cfg:
        readers: Mapping[str, Callable[[Mapping[str, Any], Path], Cfg]] = {
            "http": self._request,
            "https": self._request,
            "invoke": self._invoke,
            "mysql": self._mysql,
            "smtp": self._smtp,
            "sequence": lambda step, path: self.steps(step["sequence"], (*path, "sequence")),
            "parallel": self._parallel,
            "choice": lambda step, path: Choice(self._branches(step["choice"], (*path, "choice"))),
            "optional": lambda step, path: Repeat(self._branch(step["optional"], (*path, "optional")), 0, 1),
            "repeat": self._repeat,
            "transaction": self._transaction,
        }
        (kind,) = readers.keys() & step.keys()
        return readers[kind](step, path)

    def _line(self, path: Path, kind: str) -> int:
        """The line of the key that says what the step is; in a branch of its own that is not the branch's line."""
        return self._policy.source.line((*path, kind))

    def _send(self, path: Path, kind: str, message: Message, retries: int = 0) -> Cfg:
        symbol = Symbol(
            message.kind, message.peer, message.method, message.path, message.query, message.callee, message.verb, message.read, message.write,
            message.upgrade, message.grpc, message.sender, message.to, message.asynchronous, message.callback, retries, self.part == "tail",
            self._line(path, kind), message.text(),
        )  # fmt: skip
        return Send(self.symbols.setdefault(symbol, len(self.symbols)), self._group if symbol.kind is Kind.INVOKE else 0)

    def _peer(self, step: Mapping[str, Any], path: Path, wanted: str, fits: Callable[[Peer], bool]) -> str:
        """The peer that the step names, or the only one that fits. `wanted` describes those that do."""
        peers = self._policy.peers
        fitting = [name for name, peer in peers.items() if fits(peer)]
        name: str | None = step.get("peer")
        if name is None:
            if len(fitting) == 1:
                return fitting[0]
            found = f"{len(fitting)} peers are {wanted}: {', '.join(fitting)}" if fitting else f"no peer is {wanted}"
            self._policy.refuse("policy.unknown_peer", path, found, "say which with `peer:`" if fitting else "add it under peers")
        elif name not in peers:
            step_next = f"{did_you_mean(name, list(peers))}, or add {name} under peers"
            self._policy.refuse("policy.unknown_peer", (*path, "peer"), f"peer {name} is not listed", step_next)
        elif name not in fitting:
            self._policy.refuse("policy.wrong_peer", (*path, "peer"), f"peer {name} is not {wanted}", did_you_mean(name, fitting))
        return name or ""

    def _request(self, step: Mapping[str, Any], path: Path) -> Cfg:
        kind = Kind.HTTP if "http" in step else Kind.HTTPS
        wanted = f"one with protocol {kind.value}" + (" and without a role" if kind is Kind.HTTP else "")
        peer = self._peer(step, path, wanted, lambda peer: peer.protocol.value == kind.value and not peer.gateway)
        if fault := fault_of_template(step["path"]):
            self._policy.refuse("policy.path", (*path, "path"), f'path "{step["path"]}": {fault}', "write the path as it goes over the wire")
        method, upgrade, grpc = step[kind.value], "upgrade" in step, step.get("grpc", False)
        if upgrade and (grpc or method != "GET"):
            self._policy.refuse("policy.request", (*path, "upgrade"), f"an upgrade by {'gRPC' if grpc else method}", "write GET: no other asks")
        elif grpc and method != "POST":
            self._policy.refuse("policy.request", (*path, "grpc"), f"a gRPC call by {method}", "write POST: no other is one")
        message = Message(kind, peer, method, step["path"], tuple(sorted(step.get("query", ()))), upgrade=upgrade, grpc=grpc)
        return self._send(path, kind.value, message, step.get("retries", RETRIES_DEFAULT.get(method, 0)))

    def _invoke(self, step: Mapping[str, Any], path: Path) -> Cfg:
        if self.part != "messages":
            when = "after the answer" if self.part == "tail" else "before the first request"
            found = f"{step['invoke']} is invoked {when}, when no call is there to belong to"
            self._policy.refuse("policy.invoke", (*path, "invoke"), found, "move it to messages")
        callee, callback, is_asynchronous = step["invoke"], step.get("callback", ""), step.get("async", False)
        self._policy.check_function(callee, (*path, "invoke"))
        if callback:
            self._policy.check_function(callback, (*path, "callback"))
            if not is_asynchronous:
                found = f"the answer of {callee} comes on the connection, so there is no result that {callback} could be called with"
                self._policy.refuse("policy.callback", (*path, "callback"), found, "add `async: true`, or delete it")
        peer = self._peer(step, path, "a gateway", lambda peer: peer.gateway)
        message = Message(Kind.INVOKE, peer, callee=callee, asynchronous=is_asynchronous, callback=callback)
        if "join" in step:
            return self._joined(lambda: self._invocation(step, path, message))
        return self._invocation(step, path, message)

    def _invocation(self, step: Mapping[str, Any], path: Path, message: Message) -> Cfg:
        if self._group:
            self._has_joined = True
            if self._policy.mode_of(message.callee) is Mode.OFF:
                found = f"{message.callee} is joined, and in mode off nothing says that it has answered"
                self._policy.refuse("policy.join", (*path, "invoke"), found, f"switch {message.callee} on, or delete the join")
        return self._send(path, "invoke", message, step.get("retries", 0))

    def _parallel(self, step: Mapping[str, Any], path: Path) -> Cfg:
        def branches() -> Cfg:
            return Parallel(self._branches(step["parallel"], (*path, "parallel")), self._line(path, "parallel"))

        if "join" not in step:
            return branches()
        outside, self._has_joined = self._has_joined, False
        joined = self._joined(branches)
        if not self._has_joined:
            self._policy.refuse("policy.join", (*path, "join"), "no branch of it invokes a function", "delete it: only invocations are joined")
        self._has_joined |= outside
        return joined

    def _joined(self, read: Callable[[], Cfg]) -> Cfg:
        """What `read` reads as a group of its own with the barrier behind it. Invocations of a join inside belong to that one alone:

        what follows the inner barrier, and so the outer one, has waited for them.
        """
        self._groups += 1
        outside, self._group = self._group, self._groups
        part, barrier = read(), Barrier(self._group)
        self._group = outside
        return Steps((part, barrier))

    def _mysql_peer(self, step: Mapping[str, Any], path: Path) -> str:
        return self._peer(step, path, "one with protocol mysql", lambda peer: peer.protocol is Protocol.MYSQL)

    def _mysql(self, step: Mapping[str, Any], path: Path) -> Cfg:
        verb, read, write = step["mysql"], tuple(sorted(step.get("read", ()))), tuple(sorted(step.get("write", ())))
        peer = self._mysql_peer(step, path)
        written, may_read = TABLES_OF_VERB[verb]
        counts = {_WRITES_NONE: len(write) == 0, _WRITES_ONE: len(write) == 1, _WRITES_SOME: len(write) > 0}
        if not counts[written]:
            found = f"{verb} writes {', '.join(write) or 'no table'}; it writes {written}"
            self._policy.refuse("policy.statement", path, found, "list under `write` what the statement changes: no statement matches this line")
        if read and not may_read:
            self._policy.refuse(
                "policy.statement", path, f"{verb} reads {', '.join(read)}; it reads none", "delete `read`: no statement matches this line"
            )
        own_schema = f"{self._policy.peers[peer].schema}." if peer in self._policy.peers else None
        for table in (*read, *write):
            if own_schema and table.startswith(own_schema):
                step_next = f'write "{table.removeprefix(own_schema)}": the guard reports it without its schema'
                self._policy.refuse("policy.statement", path, f"table {table} names the peer's own schema", step_next)
        if self._in_transaction and verb in _TRANSACTION_VERBS:
            self._policy.refuse("policy.transaction", path, f"{verb} inside a transaction", "delete it: the transaction begins and commits by itself")
        return self._send(path, "mysql", Message(Kind.MYSQL, peer, verb=verb, read=read, write=write))

    def _smtp(self, step: Mapping[str, Any], path: Path) -> Cfg:
        peer = self._peer(step, path, "one with protocol smtp", lambda peer: peer.protocol is Protocol.SMTP)
        return self._send(path, "smtp", Message(Kind.SMTP, peer, sender=step.get("from", ""), to=tuple(sorted(step.get("to", ())))))

    def _repeat(self, step: Mapping[str, Any], path: Path) -> Cfg:
        low, high = step.get("at_least", 0), step["at_most"]
        if low > high:
            self._policy.refuse("policy.value", (*path, "at_least"), f"at_least {low} is more than at_most {high}", "exchange them")
        return Repeat(self._branch(step["repeat"], (*path, "repeat")), low, high, self._line(path, "repeat"))

    def _transaction(self, step: Mapping[str, Any], path: Path) -> Cfg:
        if self._in_transaction:
            self._policy.refuse("policy.transaction", path, "a transaction inside a transaction", "end the outer one before it: MySQL does the same")
        peer = self._mysql_peer(step, path)
        begin = self._send(path, "transaction", Message(Kind.MYSQL, peer, verb="begin"))
        self._in_transaction, outside = True, self._in_transaction
        body = self._branch(step["transaction"], (*path, "transaction"))
        self._in_transaction = outside
        return Steps((begin, body, self._send(path, "transaction", Message(Kind.MYSQL, peer, verb="commit"))))


def assemble(draft: Draft) -> tuple[bytes, list[Finding]]:
    """The compiled form of `draft`, or the errors of functions that are too large for an executor or ambiguous for the controller."""
    findings: list[Finding] = []
    functions: dict[str, Any] = {}
    app_cfg: dict[str, Any] = {}
    for name, function in draft.functions.items():
        try:
            automaton = message_automaton(function.during)
            invocations, labels = app_automaton(function.during)
            startup = {"startup": _automaton(function.startup, message_automaton(function.startup))} if function.startup else {}
            twins = ambiguous(invocations, labels)
            callbacks = ambiguous_callbacks(automaton, function.during.symbols)
        except TooManyStates as error:
            findings.append(_too_large(error.line or function.line, f"function {name} has {error}"))
            continue
        functions[name] = {
            **_automaton(function.during, automaton),
            **startup,
            "mode": function.mode.value,
            "max_body": function.max_body,
            "max_inflight": function.max_inflight,
            **function.settings,
        }
        most = max(len(invocations.edges), *(len(part["edges"]) for part in (functions[name], *startup.values())))
        if most > EDGES_MAX:
            findings.append(_too_large(function.line, f"function {name} has {most} transitions, at most {EDGES_MAX}"))
        if twins is not None:
            findings.append(_ambiguous(function, twins))
        elif callbacks is not None:
            findings.append(_ambiguous_callback(function, callbacks))
        app_cfg[name] = {
            "states": invocations.states,
            "start": [0],
            "labels": [label_fields(label) for label in labels],
            "edges": [list(edge) for edge in invocations.edges],
        }
    if findings:
        return b"", sorted(findings, key=lambda finding: finding.line)
    compiled = canonical(
        {
            "format": FORMAT,
            "app": draft.app,
            "version": draft.version,
            "mode": draft.mode.value,
            "source_sha256": draft.source.sha256,
            "on_unavailable": {"app_edge": draft.app_edge.value, "deadline_ms": draft.deadline_ms},
            "peers": {name: _peer(peer) for name, peer in draft.peers.items()},
            "entries": list(draft.entries),
            "functions": functions,
            "app_cfg": app_cfg,
        }
    )
    if len(compiled) > COMPILED_BYTES_MAX:
        return b"", [_too_large(0, f"the compiled policy has {len(compiled)} bytes, at most {COMPILED_BYTES_MAX}")]
    CompiledPolicy.parse(compiled)  # what an executor would refuse is our mistake, and must not be written
    return compiled, []


def message_automaton(draft: DraftCfg) -> Automaton:
    """The automaton that guards execute: messages, without joins."""
    behaviours = Behaviours()
    return behaviours.numbered(behaviours.build(draft.cfg, Behaviours.END))


def app_automaton(draft: DraftCfg) -> tuple[Automaton, list[Label]]:
    """The automaton that the controller executes, of invocations and barriers, and what its edges' numbers stand for."""
    found = {label for part in leaves_of(draft.cfg) if (label := _label(part, draft.symbols)) is not None}
    labels = sorted(found, key=lambda label: (label.barrier, label.key, label.retries, label.join))
    numbers = {label: number for number, label in enumerate(labels)}

    def number_of(part: Send | Barrier) -> int | None:
        label = _label(part, draft.symbols)
        return None if label is None else numbers[label]

    behaviours, prefixes = Behaviours(), Behaviours()
    start = behaviours.build(draft.cfg, Behaviours.END, number_of)
    return prefixes.numbered(behaviours.prefixes(start, prefixes)), labels


def _label(part: Send | Barrier, symbols: Sequence[Symbol]) -> Label | None:
    """What the controller sees of a leaf: nothing of a message that is no invocation."""
    if isinstance(part, Barrier):
        return Label(barrier=part.join)
    symbol = symbols[part.symbol]
    return Label(symbol.key(), symbol.retries, part.join) if symbol.kind is Kind.INVOKE else None


def ambiguous(automaton: Automaton, labels: Sequence[Label]) -> tuple[Label, Label] | None:
    """Two labels that the same invocation could mean at the same point, and that differ in retries or join; None: there are none."""
    invoking = [number for number, label in enumerate(labels) if not label.barrier]
    like = {number: [twin for twin in invoking if labels[twin].key == labels[number].key] for number in invoking}
    twins = _twins(automaton, like, lambda one, other: one != other)
    return (labels[twins[0]], labels[twins[1]]) if twins else None


def ambiguous_callbacks(automaton: Automaton, symbols: Sequence[Symbol]) -> tuple[Symbol, Symbol] | None:
    """Two lines between which only the callback decides, and that are possible at the same point; None: there are none.

    The guard writes the callback, so it has to know which: what the program sends does not tell them apart.
    """
    way = [(symbol.peer, symbol.callee, symbol.asynchronous) if symbol.asynchronous else None for symbol in symbols]
    if len({(way[number], symbol.callback) for number, symbol in enumerate(symbols)}) == len(set(way)):
        return None
    like = {
        number: [twin for twin, other in enumerate(symbols) if (way[number] and way[number] == way[twin]) or overlap(symbol, other)]
        for number, symbol in enumerate(symbols)
    }
    twins = _twins(automaton, like, lambda one, other: symbols[one].callback != symbols[other].callback)
    return (symbols[twins[0]], symbols[twins[1]]) if twins else None


def _twins(automaton: Automaton, like: Mapping[int, Sequence[int]], differ: Callable[[int, int], bool]) -> tuple[int, int] | None:
    """Two edges' numbers that differ, that are `like` each other, and that leave the same point. Numbers without any like are barriers.

    Looked for in pairs of states that the same messages lead to, barriers passed or not. Raises TooManyStates beyond WORK_MAX.
    """
    if not any(differ(one, other) for one, others in like.items() for other in others):
        return None
    leaving: dict[int, dict[int, list[int]]] = {}
    for state, number, target in automaton.edges:
        leaving.setdefault(state, {}).setdefault(number, []).append(target)
    seen, waiting, work = {(0, 0)}, [(0, 0)], 0
    while waiting:
        pair = waiting.pop()
        one, other = (leaving.get(state, {}) for state in pair)
        reached = [(target, pair[1]) for number, targets in one.items() if number not in like for target in targets]
        reached += [(pair[0], target) for number, targets in other.items() if number not in like for target in targets]
        for number, targets in one.items():
            for twin in like.get(number, ()):
                if twin in other:
                    if differ(number, twin):
                        return min(number, twin), max(number, twin)
                    reached += itertools.product(targets, other[twin])
        work += 1 + len(reached)
        if work > WORK_MAX:
            raise TooManyStates(0, "too many points at which lines have to be told apart")
        fresh = {(min(pair), max(pair)) for pair in reached} - seen
        seen |= fresh
        waiting.extend(fresh)
    return None


def _ambiguous(function: DraftFunction, twins: tuple[Label, Label]) -> Finding:
    leaves = [part for part in leaves_of(function.during.cfg) if isinstance(part, Send)]
    symbols = function.during.symbols
    one, other = (min(symbols[part.symbol].line for part in leaves if _label(part, symbols) == label) for label in twins)
    what = "retries" if twins[0].retries != twins[1].retries else "join"
    found = f"{twins[0].key.text()} at one point of {function.name} can be that of line {min(one, other)} too, which has another {what}"
    return error_at("policy.ambiguous", max(one, other), found, f"give both the same {what}, or let other invocations come between them")


def _ambiguous_callback(function: DraftFunction, twins: tuple[Symbol, Symbol]) -> Finding:
    first, second = sorted(twins, key=lambda symbol: symbol.line)
    found = f"{second.text} at one point of {function.name} can be {first.text} of line {first.line} too, and the program does not say which"
    return error_at("policy.ambiguous", second.line, found, "let other messages come before one of them, or give both one callback")


def _too_large(line: int, found: str) -> Finding:
    step = f"lower a bound, or let fewer parts run in parallel: an executor holds {STATES_MAX} states and {EDGES_MAX} transitions a function"
    return error_at("policy.too_large", line, found, step)


def _peer(peer: Peer) -> dict[str, Any]:
    role = {"role": "gateway"} if peer.gateway else {}
    tables = {"schema": peer.schema} if peer.protocol is Protocol.MYSQL else {}
    return {"host": peer.host, "port": peer.port, "protocol": peer.protocol.value, **role, **tables}


def _automaton(draft: DraftCfg, automaton: Automaton) -> dict[str, Any]:
    return {
        "symbols": [_symbol(symbol) for symbol in draft.symbols],
        "states": automaton.states,
        "start": [0],
        "accept": list(automaton.accept),
        "edges": [list(edge) for edge in automaton.edges],
    }


def _symbol(symbol: Symbol) -> dict[str, Any]:
    common = {"kind": symbol.kind.value, "peer": symbol.peer, "line": symbol.line, "text": symbol.text, "tail": symbol.tail}
    if symbol.kind is Kind.INVOKE:
        return common | {**symbol.key()._asdict(), "retries": symbol.retries}
    if symbol.kind is Kind.MYSQL:
        return common | {"verb": symbol.verb, "read": list(symbol.read), "write": list(symbol.write)}
    if symbol.kind is Kind.SMTP:
        return common | {"from": symbol.sender, "to": list(symbol.to)}
    request = {"method": symbol.method, "path": symbol.path, "query": list(symbol.query), "retries": symbol.retries}
    return common | request | {"upgrade": symbol.upgrade, "grpc": symbol.grpc}
