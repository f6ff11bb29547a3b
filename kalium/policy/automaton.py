"""Reads compiled policies and executes them: the Python twin of runtime/internal/policy in Go.

Both refuse the same documents and give the same verdicts; tests/vectors/policies is what they are compared by. A policy is
never changed after `parse`, so it may be shared. States travel as frozensets: immutable, hashable, one an invocation.
"""

from __future__ import annotations

import enum
import itertools
import json
import string
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from kalium.errors import EXIT_NO, KaliumError
from kalium.policy.limits import (
    BODY_BYTES_MAX,
    COMPILED_BYTES_MAX,
    DEADLINE_MS_MAX,
    DEPTH_MAX,
    EDGES_MAX,
    EXPECTED_MAX,
    FUNCTIONS_MAX,
    INFLIGHT_MAX,
    LABELS_MAX,
    LIST_MAX,
    MESSAGE_TEXT_MAX,
    NAME_BYTES_MAX,
    PEERS_MAX,
    RETRIES_MAX,
    STATES_MAX,
    SYMBOLS_MAX,
    TIMEOUT_MS_MAX,
    VERSION_MAX,
)
from kalium.policy.message import Kind, Message, Reason, printable

FORMAT = "kalium-compiled/v3"
VERBS = ("show-tables", "select", "insert", "update", "delete", "replace", "begin", "commit", "rollback", "create-table")

States = frozenset[int]
NOWHERE: States = frozenset()


class Mode(str, enum.Enum):
    """What becomes of a denial; off: nothing is looked at."""

    OFF = "off"
    LEARN = "learn"
    AUDIT = "audit"
    ENFORCE = "enforce"


class FailMode(str, enum.Enum):
    """How the guard decides an app edge that no controller decides: not, by whether the policy has the edge at all, or always for it."""

    DENY = "deny"
    LAST_KNOWN = "last_known"
    ALLOW = "allow"


class Protocol(str, enum.Enum):
    """How a peer is spoken to."""

    HTTP = "http"
    HTTPS = "https"
    MYSQL = "mysql"
    SMTP = "smtp"


class Tls(str, enum.Enum):
    """How a function's TLS is read: opened with the keys that the program logs, or ended in the guard under its own CA."""

    OPEN = "open"
    TERMINATE = "terminate"


class Reuse(str, enum.Enum):
    """Whether an instance serves another invocation after its first."""

    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True)
class Peer:
    """A name that functions may reach; `gateway` ones by invocations only. `schema` is what unqualified tables belong to."""

    name: str
    host: str
    port: int
    protocol: Protocol
    gateway: bool = False
    schema: str = ""


@dataclass(frozen=True)
class Symbol:
    """One line of the policy: the set of messages that may be sent where its edges are. Fields as in Message.

    An empty `sender` stands for any, an empty `to` for anybody. `retries` is how often a message without an answer may be
    sent again, `tail` whether it may be sent after the answer.
    """

    kind: Kind
    peer: str
    method: str = ""
    path: str = ""
    query: tuple[str, ...] = ()
    callee: str = ""
    verb: str = ""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    upgrade: bool = False
    grpc: bool = False
    sender: str = ""
    to: tuple[str, ...] = ()
    asynchronous: bool = False
    callback: str = ""
    retries: int = 0
    tail: bool = False
    line: int = 0
    text: str = ""

    def key(self) -> LabelKey:
        """What the controller is told of an invocation."""
        return LabelKey(self.callee, self.asynchronous, self.callback)

    def expected(self) -> str:
        """The symbol as verdicts list it."""
        return f"{self.text} @line {self.line}"

    def matches(self, message: Message) -> bool:
        """Whether `message` is one of the symbol's messages."""
        if message.kind is Kind.OTHER or (self.kind, self.peer) != (message.kind, message.peer):
            return False
        if self.kind is Kind.INVOKE:
            same = (self.asynchronous, self.callback) == (message.asynchronous, message.callback)
            return same and self.callee == message.callee != ""
        if self.kind is Kind.MYSQL:
            return (self.verb, self.read, self.write) == (message.verb, message.read, message.write)
        if self.kind is Kind.SMTP:
            return self.sender in ("", message.sender) and (not self.to or set(message.to) <= set(self.to))
        same = (self.method, self.upgrade, self.grpc) == (message.method, message.upgrade, message.grpc)
        return same and path_matches(self.path, message.path) and set(message.query) <= set(self.query)


def is_placeholder(segment: str) -> bool:
    """Whether `segment` of a path template is {name}: any one non-empty segment without an escape."""
    return len(segment) > 2 and segment[0] == "{" and segment[-1] == "}" and not set(segment[1:-1]) & set("{}")


def path_matches(template: str, path: str) -> bool:
    """Whether `path`, as it went over the wire, is one of the template's.

    A path with an escape never matches a placeholder: what the server decodes out of it is unknown here.
    """
    if not path.startswith("/"):
        return False
    segments, parts = template[1:].split("/"), path[1:].split("/")
    return len(segments) == len(parts) and all(
        (part not in ("", ".", "..") and "%" not in part) if is_placeholder(segment) else part == segment
        for segment, part in zip(segments, parts, strict=True)
    )


@dataclass(frozen=True)
class Verdict:
    """What the send path consults. The default denies, so a forgotten argument fails closed.

    `expected` is what the policy would have accepted here, at most EXPECTED_MAX; `line` that of the symbol which matched, at
    whatever place, 0 when none does; `states` the states after the step, which after a denial are those that denied;
    `retries` those of the symbol that matched, 0 after a denial.
    """

    allowed: bool = False
    reason: Reason = Reason.NOT_IN_POLICY
    expected: tuple[str, ...] = ()
    line: int = 0
    states: tuple[int, ...] = ()
    retries: int = 0


@dataclass(frozen=True)
class MessageAutomaton:
    """The automaton of a CFG: nondeterministic, without empty transitions."""

    symbols: tuple[Symbol, ...]
    states: int
    start: States
    accept: States
    edges: tuple[tuple[int, int, int], ...]  # (from, symbol, to), rising
    _leaving: Mapping[int, Sequence[tuple[int, int]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        leaving: dict[int, list[tuple[int, int]]] = {}
        for source, symbol, target in self.edges:
            leaving.setdefault(source, []).append((symbol, target))
        object.__setattr__(self, "_leaving", leaving)

    def leaving(self, state: int) -> Sequence[tuple[int, int]]:
        """(symbol, to) of the edges that leave `state`, rising."""
        return self._leaving.get(state, ())

    def accepts(self, states: States) -> bool:
        """Whether an invocation may end at `states`."""
        return bool(states & self.accept)

    def knows(self, message: Message) -> bool:
        """Whether any symbol matches `message`, at whatever place."""
        return any(symbol.matches(message) for symbol in self.symbols)

    def step(self, states: States, message: Message) -> tuple[Verdict, States]:
        """Judge `message` at `states`. Denied: the same states come back, so audit stands where enforce stands."""
        return self._step(states, message, tail=False)

    def step_tail(self, states: States, message: Message) -> tuple[Verdict, States]:
        """Judge a message that is sent after the answer: as step, over the symbols of the tail alone."""
        return self._step(states, message, tail=True)

    def _step(self, states: States, message: Message, *, tail: bool) -> tuple[Verdict, States]:
        matched: dict[int, bool] = {}
        reached: set[int] = set()
        first: Symbol | None = None
        for state in sorted(states):
            for number, target in self.leaving(state):
                symbol = self.symbols[number]
                if number not in matched:
                    matched[number] = (symbol.tail or not tail) and symbol.matches(message)
                if matched[number]:
                    first = first or symbol
                    reached.add(target)
        if first:
            return Verdict(True, Reason.ALLOWED, (), first.line, tuple(sorted(reached)), first.retries), frozenset(reached)
        elsewhere = next((symbol for symbol in self.symbols if symbol.matches(message)), None)
        reason = Reason.NOT_IN_POLICY if elsewhere is None else Reason.OUT_OF_ORDER
        line = elsewhere.line if elsewhere else 0
        return Verdict(False, reason, self.expected(states, tail=tail), line, tuple(sorted(states))), states

    def expected(self, states: States, *, tail: bool = False) -> tuple[str, ...]:
        """The symbols that leave `states`, in the order of the policy's text, at most EXPECTED_MAX; `tail`: those of the tail alone."""
        leaving = sorted({symbol for state in states for symbol, _ in self.leaving(state) if self.symbols[symbol].tail or not tail})
        return tuple(self.symbols[symbol].expected() for symbol in leaving[:EXPECTED_MAX])


@dataclass(frozen=True)
class FunctionAutomaton(MessageAutomaton):
    """One function: the automaton of its messages and then its tail, and what the guard does around an invocation."""

    name: str = field(kw_only=True)
    max_body: int = field(kw_only=True)  # bytes of a message's body
    invocation_timeout_ms: int = field(kw_only=True)
    mode: Mode = field(kw_only=True)  # its own, or else the policy's
    tls: Tls = field(kw_only=True)
    startup: MessageAutomaton | None = field(kw_only=True)  # of what is sent before the first request; None when nothing may be
    tail_ms: int = field(kw_only=True)  # how long after the answer the symbols of the tail may be sent
    quiet_ms: int = field(kw_only=True)  # after an invocation without an answer: silence before the next request
    retire_ms: int = field(kw_only=True)  # and how long that silence is waited for before the instance is replaced
    max_inflight: int = field(kw_only=True)  # invocations at a time
    reuse: Reuse = field(kw_only=True)


class LabelKey(NamedTuple):
    """What an INVOKE says of its invocation, and by which the controller finds the label."""

    callee: str
    asynchronous: bool = False
    callback: str = ""

    def text(self) -> str:
        """The invocation as verdicts write it."""
        return Message(Kind.INVOKE, callee=self.callee, asynchronous=self.asynchronous, callback=self.callback).text()


_NO_KEY = LabelKey("")


@dataclass(frozen=True)
class Label:
    """What an edge of an app CFG carries: an invocation, or the barrier behind a group of them.

    `retries` is how often the invocation may be made again when it remained without an answer, `join` the group that it
    belongs to, 0 for none. `barrier` is not 0 for a barrier: an edge that is taken without a question when every invocation
    of that group which was granted has been answered. A group's number is one of its function's policy, from 1 on.
    """

    key: LabelKey = _NO_KEY
    retries: int = 0
    join: int = 0
    barrier: int = 0


@dataclass(frozen=True)
class AppGraph:
    """Which functions a function may invoke, in which order: the projection of its CFG on invocations, with its joins.

    A cursor is a set of states, as it was after the last grant: barriers are passed when the next step asks, by what has been
    answered until then. A label is handed out as its position in `labels`.
    """

    states: int
    start: States
    labels: tuple[Label, ...]
    edges: tuple[tuple[int, int, int], ...]  # (from, label, to), rising
    _next: Mapping[int, Mapping[LabelKey, tuple[int, States]]] = field(init=False, repr=False, compare=False)
    _barriers: Mapping[int, Sequence[tuple[int, int]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        leaving: dict[int, dict[LabelKey, dict[int, set[int]]]] = {}
        barriers: dict[int, list[tuple[int, int]]] = {}
        for source, number, target in self.edges:
            label = self.labels[number]
            if label.barrier:
                barriers.setdefault(source, []).append((label.barrier, target))
            else:
                leaving.setdefault(source, {}).setdefault(label.key, {}).setdefault(number, set()).add(target)
        object.__setattr__(self, "_barriers", barriers)
        first = {source: {key: (min(targets), frozenset(targets[min(targets)])) for key, targets in keys.items()} for source, keys in leaving.items()}
        object.__setattr__(self, "_next", first)

    def step(self, states: States, key: LabelKey, open_groups: Collection[int] = ()) -> tuple[States, int]:
        """The states after the invocation `key`, and its label; (NOWHERE, -1): not allowed here.

        `open_groups` are the groups of which this invocation has granted edges that are not answered yet. The cost depends on
        the edges of `states`, never on the length of the path. Labels that differ in retries or join could both be meant where
        no compiler of ours made the policy: then the first is, with the edges that carry it and no other.
        """
        if len(states) == 1:
            (state,) = states
            if state not in self._barriers:
                label, targets = self._next.get(state, _NO_EDGES).get(key, _NO_EDGE)
                return targets, label
        best, reached = -1, NOWHERE
        for state in self.passed(states, open_groups):
            label, targets = self._next.get(state, _NO_EDGES).get(key, _NO_EDGE)
            if label == best:
                reached |= targets
            elif label >= 0 and (best < 0 or label < best):
                best, reached = label, targets
        return reached, best

    def passed(self, states: States, open_groups: Collection[int] = ()) -> States:
        """`states` and those behind the barriers that are passed, as no group of theirs is open."""
        if not self._barriers:
            return states
        found, waiting = set(states), list(states)
        while waiting:
            for group, target in self._barriers.get(waiting.pop(), ()):
                if group not in open_groups and target not in found:
                    found.add(target)
                    waiting.append(target)
        return frozenset(found)

    def expected(self, states: States, open_groups: Collection[int] = ()) -> list[LabelKey]:
        """The invocations that are allowed at `states`, sorted."""
        return sorted({key for state in self.passed(states, open_groups) for key in self._next.get(state, {})})

    def awaited(self, states: States, open_groups: Collection[int]) -> list[LabelKey]:
        """The invocations whose answers are waited for by the barriers at `states`, sorted."""
        groups = {group for state in self.passed(states, open_groups) for group, _ in self._barriers.get(state, ()) if group in open_groups}
        return sorted({label.key for label in self.labels if label.join in groups})

    def plain(self) -> dict[str, Any]:
        """All of it in lists and texts, for a store that steps by itself: what `step` does, done by a script.

        `labels` are as in the compiled form. `edges` and `barriers` have an element for each state: the list of its (label,
        target), and of its (group, target), both rising. A step first adds to the states those behind barriers whose group is
        not open, until nothing is added; then takes the lowest label that has the key, and all targets of that label.
        """
        edges: list[list[list[int]]] = [[] for _ in range(self.states)]
        barriers: list[list[list[int]]] = [[] for _ in range(self.states)]
        for source, number, target in self.edges:
            label = self.labels[number]
            (barriers if label.barrier else edges)[source].append([label.barrier or number, target])
        return {"start": sorted(self.start), "labels": [label_fields(label) for label in self.labels], "edges": edges, "barriers": barriers}


_NO_EDGE: tuple[int, States] = (-1, NOWHERE)
_NO_EDGES: Mapping[LabelKey, tuple[int, States]] = {}


def label_fields(label: Label) -> dict[str, Any]:
    """The label as the compiled form has it."""
    if label.barrier:
        return {"barrier": label.barrier}
    return {**label.key._asdict(), "retries": label.retries, "join": label.join}


@dataclass(frozen=True)
class CompiledPolicy:
    """One version of an app's policy, parsed and checked."""

    app: str
    version: int
    mode: Mode
    app_edge: FailMode  # what becomes of an app edge that no controller decides
    deadline_ms: int  # after so long without an answer, no controller has decided it
    source_sha256: str
    peers: Mapping[str, Peer]
    entries: frozenset[str]
    functions: Mapping[str, FunctionAutomaton]
    app_cfg: Mapping[str, AppGraph]

    @classmethod
    def parse(cls, compiled: bytes) -> CompiledPolicy:
        """Read a compiled policy. Raises KaliumError policy.malformed for anything but a whole and valid one."""
        if len(compiled) > COMPILED_BYTES_MAX:
            raise malformed(f"{len(compiled)} bytes, at most {COMPILED_BYTES_MAX}")
        return _policy(decode(compiled))

    def start(self, function: str) -> States:
        """Where the app CFG of an invocation of `function` begins. KeyError: no such function."""
        return self.app_cfg[function].start

    def step(self, function: str, states: States, key: LabelKey, open_groups: Collection[int] = ()) -> tuple[States, int]:
        """Where an invocation of `function` stands after it invokes `key` at `states`, and the edge's label: AppGraph.step."""
        return self.app_cfg[function].step(states, key, open_groups)

    def expected(self, function: str, states: States, open_groups: Collection[int] = ()) -> list[str]:
        """What `function` may invoke at `states`, and what it has to wait for before more, as verdicts list it; at most EXPECTED_MAX.

        The line is given where it is certain: the app CFG does not say from which of several lines an edge comes.
        """
        graph, texts = self.app_cfg[function], []
        for key in graph.expected(states, open_groups)[:EXPECTED_MAX]:
            symbols = [symbol for symbol in self.functions[function].symbols if symbol.kind is Kind.INVOKE and symbol.key() == key]
            texts.append(symbols[0].expected() if len(symbols) == 1 else key.text())
        return [*texts, *(f"answer of {key.text()}" for key in graph.awaited(states, open_groups))][:EXPECTED_MAX]


def malformed(found: str) -> KaliumError:
    """The error of a compiled policy or envelope that is refused whole."""
    return KaliumError(
        "policy.malformed", "cannot load a policy", printable(found, MESSAGE_TEXT_MAX), "compile it again with `kalium policy compile`", EXIT_NO
    )


def decode(data: bytes) -> Any:
    """One JSON value without what json.loads forgives: repeated names, NaN, other encodings, deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise malformed(f'field "{twice}" appears twice')
        return names

    def refuse(constant: str) -> Any:
        raise malformed(f"not JSON: {constant}")

    def whole(digits: str) -> int | float:
        # Python refuses to convert thousands of digits; as a float the number is refused by whoever wants a whole one.
        return int(digits) if len(digits) <= 20 else float(digits)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_int=whole)
    except (ValueError, RecursionError) as error:
        raise malformed(f"not JSON: {error}") from error
    level = [value]
    for _ in range(DEPTH_MAX + 1):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise malformed(f"nested deeper than {DEPTH_MAX}")
    return value


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def object_of(value: Any, path: str, required: str, optional: str = "") -> dict[str, Any]:
    """`value` as an object that has all required fields, and beyond them only optional ones (names, space-separated)."""
    if not isinstance(value, dict):
        raise malformed(f"{path} is not an object")
    for name in required.split():
        if name not in value:
            raise malformed(f'{path} has no field "{name}"')
    for name in value:
        if name not in f"{required} {optional}".split():
            raise malformed(f'{path} has an unknown field "{name}"')
    return value


def text_of(value: Any, path: str, bytes_max: int) -> str:
    """`value` as a text of at most `bytes_max` bytes of UTF-8."""
    if not isinstance(value, str) or len(value.encode("utf-8", "replace")) > bytes_max:
        raise malformed(f"{path} is not a text of at most {bytes_max} bytes")
    return value


def is_name(text: str) -> bool:
    """Whether `text` can be a name in a compiled policy: printable ASCII without spaces, quotes and backslashes."""
    return 0 < len(text) <= NAME_BYTES_MAX and all("!" <= character <= "~" and character not in "\"'\\" for character in text)


def _name(value: Any, path: str) -> str:
    text = text_of(value, path, NAME_BYTES_MAX)
    if not is_name(text):
        raise malformed(f'{path}: "{text}" is no name')
    return text


def _boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise malformed(f"{path} is neither true nor false")
    return value


def _names(value: Any, path: str, count_max: int) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > count_max:
        raise malformed(f"{path} is not an object of at most {count_max} names")
    for name in value:
        _name(name, path)
    return value


def _integer(value: Any, path: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # bool is an int to isinstance
        raise malformed(f"{path} is not a whole number from {low} to {high}")
    return value


def _list(value: Any, path: str, count_max: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > count_max:
        raise malformed(f"{path} is not a list of at most {count_max}")
    return value


def _sorted_names(value: Any, path: str) -> tuple[str, ...]:
    names = tuple(_name(element, path) for element in _list(value, path, LIST_MAX))
    if any(second <= first for first, second in itertools.pairwise(names)):
        raise malformed(f"{path} is not sorted")
    return names


def one_of(value: Any, path: str, allowed: Collection[str]) -> str:
    """`value` as one of the texts `allowed`."""
    text = text_of(value, path, NAME_BYTES_MAX)
    if text not in allowed:
        raise malformed(f'{path} is "{text}", not one of {", ".join(allowed)}')
    return text


def _states(value: Any, path: str, states: int) -> States:
    last = -1
    for element in _list(value, path, states):
        last = _integer(element, path, last + 1, states - 1)
    return frozenset(value)


def _edges(value: Any, path: str, states: int, labels: int) -> Iterator[tuple[int, int, int]]:
    """The list in strictly rising order, so that it has one spelling and no duplicates."""
    last = (-1, -1, -1)
    for index, element in enumerate(_list(value, path, EDGES_MAX)):
        triple = _list(element, path, 3)
        if len(triple) != 3:
            raise malformed(f"{path}[{index}] does not have three parts")
        edge = (
            _integer(triple[0], path, 0, states - 1),
            _integer(triple[1], path, 0, labels - 1),
            _integer(triple[2], path, 0, states - 1),
        )
        if edge <= last:
            raise malformed(f"{path}[{index}] is not after the one before it")
        last = edge
        yield edge


def _policy(document: Any) -> CompiledPolicy:
    top = object_of(document, "the policy", "format app version mode source_sha256 on_unavailable peers entries functions app_cfg")
    one_of(top["format"], "format", [FORMAT])
    app = _name(top["app"], "app")
    version = _integer(top["version"], "version", 1, VERSION_MAX)
    source_sha256 = text_of(top["source_sha256"], "source_sha256", 64)
    mode = Mode(one_of(top["mode"], "mode", [mode.value for mode in Mode]))
    on_unavailable = object_of(top["on_unavailable"], "on_unavailable", "app_edge deadline_ms")
    app_edge = FailMode(one_of(on_unavailable["app_edge"], "on_unavailable.app_edge", [mode.value for mode in FailMode]))
    deadline_ms = _integer(on_unavailable["deadline_ms"], "on_unavailable.deadline_ms", 1, DEADLINE_MS_MAX)
    peers = {name: _peer(name, value) for name, value in _names(top["peers"], "peers", PEERS_MAX).items()}
    functions = {name: _function(peers, name, value) for name, value in _names(top["functions"], "functions", FUNCTIONS_MAX).items()}
    entries = [_name(element, "entries") for element in _list(top["entries"], "entries", FUNCTIONS_MAX)]
    for index, name in enumerate(entries):
        if name in entries[:index] or name not in functions:
            raise malformed(f'entries: "{name}" appears twice or is not a function of the policy')
    for name, function in functions.items():
        for symbol in function.symbols:
            _known(functions, f"functions.{name}.symbols", symbol.callee, symbol.callback)
    app_cfg = _app_cfg(functions, top["app_cfg"])
    return CompiledPolicy(app, version, mode, app_edge, deadline_ms, source_sha256, peers, frozenset(entries), functions, app_cfg)


def _peer(name: str, value: Any) -> Peer:
    path = f"peers.{name}"
    fields = object_of(value, path, "host port protocol", "role schema")
    host = _name(fields["host"], f"{path}.host")
    port = _integer(fields["port"], f"{path}.port", 1, 65535)
    protocol = Protocol(one_of(fields["protocol"], f"{path}.protocol", [protocol.value for protocol in Protocol]))
    if host != host.lower() or host.endswith("."):
        raise malformed(f"{path}.host is not in lower case without a final dot")
    if "role" in fields:
        one_of(fields["role"], f"{path}.role", ["gateway"])
        if protocol is not Protocol.HTTP:
            raise malformed(f"{path}: a gateway is spoken to in http")
    if ("schema" in fields) != (protocol is Protocol.MYSQL):
        raise malformed(f"{path}: a schema belongs to every mysql peer and to no other")
    schema = _name(fields["schema"], f"{path}.schema") if "schema" in fields else ""
    return Peer(name, host, port, protocol, "role" in fields, schema)


_AUTOMATON_FIELDS = "symbols states start accept edges"


def _function(peers: Mapping[str, Peer], name: str, value: Any) -> FunctionAutomaton:
    path = f"functions.{name}"
    settings = "max_body invocation_timeout_ms mode tls tail_ms quiet_ms retire_ms max_inflight reuse"
    fields = object_of(value, path, f"{_AUTOMATON_FIELDS} {settings}", "startup")

    def milliseconds(field: str) -> int:
        return _integer(fields[field], f"{path}.{field}", 1, TIMEOUT_MS_MAX)

    symbols, states, start, accept, edges = _automaton(peers, fields, path)
    for index, symbol in enumerate(symbols):
        if symbol.tail and symbol.kind is Kind.INVOKE:
            raise malformed(f"{path}.symbols[{index}] is an invocation after the answer")
    return FunctionAutomaton(
        symbols, states, start, accept, edges, name=name,
        max_body=_integer(fields["max_body"], f"{path}.max_body", 0, BODY_BYTES_MAX),
        invocation_timeout_ms=milliseconds("invocation_timeout_ms"),
        mode=Mode(one_of(fields["mode"], f"{path}.mode", [mode.value for mode in Mode])),
        tls=Tls(one_of(fields["tls"], f"{path}.tls", [tls.value for tls in Tls])),
        startup=_startup(peers, fields["startup"], f"{path}.startup") if "startup" in fields else None,
        tail_ms=milliseconds("tail_ms"), quiet_ms=milliseconds("quiet_ms"), retire_ms=milliseconds("retire_ms"),
        max_inflight=_integer(fields["max_inflight"], f"{path}.max_inflight", 1, INFLIGHT_MAX),
        reuse=Reuse(one_of(fields["reuse"], f"{path}.reuse", [reuse.value for reuse in Reuse])),
    )  # fmt: skip


def _startup(peers: Mapping[str, Peer], value: Any, path: str) -> MessageAutomaton:
    """The automaton of what is sent before the first request. No call is there yet that an invocation could belong to."""
    parts = _automaton(peers, object_of(value, path, _AUTOMATON_FIELDS), path)
    for index, symbol in enumerate(parts[0]):
        if symbol.tail or symbol.kind is Kind.INVOKE:
            raise malformed(f"{path}.symbols[{index}] is an invocation or of the tail")
    return MessageAutomaton(*parts)


_Parts = tuple[tuple[Symbol, ...], int, States, States, tuple[tuple[int, int, int], ...]]


def _automaton(peers: Mapping[str, Peer], fields: Mapping[str, Any], path: str) -> _Parts:
    """What a MessageAutomaton consists of, in its order."""
    states = _integer(fields["states"], f"{path}.states", 1, STATES_MAX)
    listed = _list(fields["symbols"], f"{path}.symbols", SYMBOLS_MAX)
    symbols = tuple(_symbol(peers, f"{path}.symbols[{index}]", element) for index, element in enumerate(listed))
    start = _states(fields["start"], f"{path}.start", states)
    accept = _states(fields["accept"], f"{path}.accept", states)
    if not start:
        raise malformed(f"{path}.start is empty")
    edges = tuple(_edges(fields["edges"], f"{path}.edges", states, len(symbols)))
    return symbols, states, start, accept, edges


_SYMBOL_FIELDS = {  # beside those that every symbol has
    Kind.HTTP: "method path query retries upgrade grpc",
    Kind.HTTPS: "method path query retries upgrade grpc",
    Kind.INVOKE: "callee asynchronous callback retries",
    Kind.MYSQL: "verb read write",
    Kind.SMTP: "from to",
}


def _symbol(peers: Mapping[str, Peer], path: str, value: Any) -> Symbol:
    name = value.get("kind") if isinstance(value, dict) else None
    kind = next((kind for kind in _SYMBOL_FIELDS if kind.value == name), None)
    if kind is None:
        raise malformed(f"{path} has no known kind")
    fields = object_of(value, path, f"kind peer line text tail {_SYMBOL_FIELDS[kind]}")
    text = text_of(fields["text"], f"{path}.text", MESSAGE_TEXT_MAX)
    if not text or printable(text, MESSAGE_TEXT_MAX) != text:
        raise malformed(f"{path}.text is not a printable text")
    peer_name = _name(fields["peer"], f"{path}.peer")
    peer = peers.get(peer_name)
    if peer is None:
        raise malformed(f'{path}.peer "{peer_name}" is not listed')
    if not _speaks(peer, kind):
        raise malformed(f'{path}: peer "{peer_name}" is not one that is reached by {kind.value} messages')
    line = _integer(fields["line"], f"{path}.line", 0, VERSION_MAX)
    common = Symbol(kind, peer_name, line=line, text=text, tail=_boolean(fields["tail"], f"{path}.tail"))
    if kind is Kind.INVOKE:
        asynchronous, callback = _result(fields, path)
        retries = _integer(fields["retries"], f"{path}.retries", 0, RETRIES_MAX)
        return replace(common, callee=_name(fields["callee"], f"{path}.callee"), asynchronous=asynchronous, callback=callback, retries=retries)
    if kind is Kind.MYSQL:
        verb = _name(fields["verb"], f"{path}.verb")
        if verb not in VERBS:
            raise malformed(f'{path}.verb "{verb}" is unknown')
        return replace(common, verb=verb, read=_sorted_names(fields["read"], f"{path}.read"), write=_sorted_names(fields["write"], f"{path}.write"))
    if kind is Kind.SMTP:
        return _mail(common, fields, path)
    return _request(common, fields, path)


def _result(fields: Mapping[str, Any], path: str) -> tuple[bool, str]:
    """How an invocation's result comes: `asynchronous`, and `callback`, which only an asynchronous one has."""
    asynchronous = _boolean(fields["asynchronous"], f"{path}.asynchronous")
    callback = _name(fields["callback"], f"{path}.callback") if fields["callback"] != "" else ""
    if callback and not asynchronous:
        raise malformed(f"{path}: a callback of an invocation that is waited for")
    return asynchronous, callback


def _speaks(peer: Peer, kind: Kind) -> bool:
    return peer.gateway if kind is Kind.INVOKE else peer.protocol.value == kind.value and not peer.gateway


def _request(symbol: Symbol, fields: Mapping[str, Any], path: str) -> Symbol:
    method = _name(fields["method"], f"{path}.method")
    if method != method.upper():
        raise malformed(f"{path}.method is not in upper case")
    template = text_of(fields["path"], f"{path}.path", MESSAGE_TEXT_MAX)
    if fault := fault_of_template(template):
        raise malformed(f"{path}.path: {fault}")
    request = replace(
        symbol, method=method, path=template, query=_sorted_names(fields["query"], f"{path}.query"),
        retries=_integer(fields["retries"], f"{path}.retries", 0, RETRIES_MAX),
        upgrade=_boolean(fields["upgrade"], f"{path}.upgrade"), grpc=_boolean(fields["grpc"], f"{path}.grpc"),
    )  # fmt: skip
    if (request.upgrade and (request.grpc or method != "GET")) or (request.grpc and (symbol.kind, method) != (Kind.HTTPS, "POST")):
        raise malformed(f"{path}: an upgrade is a GET, and gRPC is POST over https")
    return request


def _mail(symbol: Symbol, fields: Mapping[str, Any], path: str) -> Symbol:
    mail = replace(symbol, sender=text_of(fields["from"], f"{path}.from", NAME_BYTES_MAX), to=_sorted_names(fields["to"], f"{path}.to"))
    for address in (*mail.to, *([mail.sender] if mail.sender else [])):
        local, _, domain = address.partition("@")
        if not (is_name(address) and local and domain) or domain != domain.lower() or set(address) & set("<>,") or "@" in domain:
            raise malformed(f'{path}: "{address}" is no address in the spelling local@domain')
    return mail


# The characters of a path of an accepted request, without the slash: those that runtime/internal/wire/http1 takes.
PATH_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-._~!$&'()*+,=:@")


def fault_of_template(template: str) -> str:
    """Why `template` can be the path of no accepted request; "" when it can, so that no line is silently dead."""
    if not template.startswith("/"):
        return "it does not begin with a slash"
    segments = template[1:].split("/")
    if len(segments) > LIST_MAX:
        return f"it has more than {LIST_MAX} segments"
    for index, segment in enumerate(segments):
        if is_placeholder(segment):
            continue
        is_inner_gap = segment == "" and index < len(segments) - 1
        if is_inner_gap or segment in (".", "..") or not set(segment) <= PATH_CHARACTERS:
            return f'segment "{segment}" cannot be in a request\'s path'
    return ""


def _app_cfg(functions: Mapping[str, FunctionAutomaton], value: Any) -> dict[str, AppGraph]:
    graphs = _names(value, "app_cfg", FUNCTIONS_MAX)
    if len(graphs) != len(functions):
        raise malformed(f"app_cfg has {len(graphs)} functions, functions has {len(functions)}")
    found = {}
    for name, graph in graphs.items():
        path = f"app_cfg.{name}"
        if name not in functions:
            raise malformed(f"{path} is not a function of the policy")
        fields = object_of(graph, path, "states start labels edges")
        states = _integer(fields["states"], f"{path}.states", 1, STATES_MAX)
        start = _states(fields["start"], f"{path}.start", states)
        listed = _list(fields["labels"], f"{path}.labels", LABELS_MAX)
        labels = tuple(_label(functions, f"{path}.labels[{index}]", element) for index, element in enumerate(listed))
        if len(set(labels)) != len(labels):
            raise malformed(f"{path}.labels has one twice")
        found[name] = AppGraph(states, start, labels, tuple(_edges(fields["edges"], f"{path}.edges", states, len(labels))))
    return found


def _known(functions: Collection[str], path: str, *names: str) -> None:
    """Refuse names that are neither empty nor functions of the policy."""
    for name in names:
        if name and name not in functions:
            raise malformed(f'{path}: "{name}" is not a function of the policy')


def _label(functions: Mapping[str, FunctionAutomaton], path: str, value: Any) -> Label:
    if isinstance(value, dict) and "barrier" in value:
        object_of(value, path, "barrier")
        return Label(barrier=_integer(value["barrier"], f"{path}.barrier", 1, LABELS_MAX))
    fields = object_of(value, path, "callee asynchronous callback retries join")
    callee = _name(fields["callee"], f"{path}.callee")
    asynchronous, callback = _result(fields, path)
    _known(functions, path, callee, callback)
    retries = _integer(fields["retries"], f"{path}.retries", 0, RETRIES_MAX)
    return Label(LabelKey(callee, asynchronous, callback), retries, _integer(fields["join"], f"{path}.join", 0, LABELS_MAX))
