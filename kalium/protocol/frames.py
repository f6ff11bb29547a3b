"""Everything that can be said on the wire: one frozen class a shape, whose fields carry the kind of their value.

Those of app edges and their answers are most of what is said, so they are msgspec.Struct, which is read and made in a fraction of
the time; the others are dataclasses.

Numbers, names and meanings are those of docs/reference/protocol.md. START, INVOKE, END and FINISH have two shapes each: as the guard
sends them, and with what the agent knows about the instance added. A frame's class is compared by identity, never by
`isinstance`, because the second shape inherits from the first only to list the fields once. Lists that arrive are tuples.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

import msgspec

from kalium.protocol.limits import PROTOCOLS


class FrameType(enum.IntEnum):
    """The byte behind the version in the prefix."""

    HELLO = 1
    WELCOME = 2
    START = 3
    INVOKE = 4
    ANSWER = 5
    END = 6
    VERDICT = 7
    POLICY = 8
    LEASE = 9
    NAMES = 10
    TIMES = 11
    FINISH = 12
    MODE = 13
    AGENT_HELLO = 20
    CONTROLLER_WELCOME = 21
    REGISTER = 22
    UNREGISTER = 23
    STATUS = 24
    STATUS_ANSWER = 25
    PING = 26
    PONG = 27
    REPORT = 28


# Neither asks nor answers, so their id is 0; every other frame belongs to a question and its id is not.
WITHOUT_ID = frozenset(
    {
        FrameType.END, FrameType.VERDICT, FrameType.POLICY, FrameType.LEASE, FrameType.NAMES, FrameType.TIMES, FrameType.MODE,
        FrameType.UNREGISTER, FrameType.REPORT,
    }
)  # fmt: skip


class Kind(enum.Enum):
    """What a field's value may be; the bounds are in `limits`."""

    TEXT = "str"  # at most TEXT_BYTES_MAX bytes of UTF-8
    STEP = "step"  # a text of STEP_HEX lower-case hexadecimal digits
    OUTCOME = "outcome"  # a text out of OUTCOMES
    FAIL_MODE = "fail mode"  # a text out of FAIL_MODES
    REASON = "reason"  # a text out of kalium.policy.message.Reason
    EVENT = "event"  # the text EVENT_VERDICT
    BOOL = "bool"
    INT = "int"  # of 64 bits with a sign
    BIN = "bin"
    TEXTS = "[str]"
    INTS = "[int]"
    SPANS = "[span]"  # nanoseconds, and SPAN_ABSENT where there is nothing to measure
    NAMES = "{str: [str]}"
    POLICIES = "{str: bin}"
    VERSIONS = "{str: int}"
    RECORD = "record"  # a map with the fields of VerdictRecord
    REPORT = "report"  # a map with the fields of StatusReport


OUTCOMES = frozenset({"answered", "closed", "timeout"})
FAIL_MODES = frozenset({"", "deny", "allow", "last_known"})  # "" when the controller decided, or did not have to
EVENT_VERDICT = "verdict"
SPAN_ABSENT = -1

TEXT = {"kind": Kind.TEXT}
STEP = {"kind": Kind.STEP}
FAIL_MODE = {"kind": Kind.FAIL_MODE}
REASON = {"kind": Kind.REASON}
EVENT = {"kind": Kind.EVENT}
BOOL = {"kind": Kind.BOOL}
INT = {"kind": Kind.INT}
BIN = {"kind": Kind.BIN}
TEXTS = {"kind": Kind.TEXTS}
INTS = {"kind": Kind.INTS}
SPANS = {"kind": Kind.SPANS}
NAMES = {"kind": Kind.NAMES}
POLICIES = {"kind": Kind.POLICIES}
VERSIONS = {"kind": Kind.VERSIONS}
RECORD = {"kind": Kind.RECORD}
REPORT = {"kind": Kind.REPORT}


@dataclass(frozen=True, slots=True)
class Hello:
    """Guard -> agent: which container this is, and what its bundle says that it runs."""

    container: str = field(metadata=TEXT)
    app: str = field(metadata=TEXT)
    function: str = field(metadata=TEXT)
    protos: Sequence[int] = field(default=PROTOCOLS, metadata=INTS)


@dataclass(frozen=True, slots=True)
class Welcome:
    """Agent -> guard, with the id of its HELLO. When `ok` is false, `reason` says why and the rest is empty."""

    ok: bool = field(metadata=BOOL)
    reason: str = field(default="", metadata=TEXT)
    proto: int = field(default=0, metadata=INT)  # the version that both speak
    policy: bytes = field(default=b"", metadata=BIN)
    lease_ms: int = field(default=0, metadata=INT)
    names: Mapping[str, Sequence[str]] = field(default_factory=dict, metadata=NAMES)
    port: int = field(default=0, metadata=INT)
    sources: Sequence[str] = field(default=(), metadata=TEXTS)
    health_path: str = field(default="", metadata=TEXT)
    roots: bytes = field(default=b"", metadata=BIN)  # PEM; empty unless the policy ends the function's TLS in the guard


class Start(msgspec.Struct, frozen=True, gc=False):
    """Guard -> agent: may this invocation begin? `token` is "" when the request carried none; `label` is for logs only."""

    step: Annotated[str, Kind.STEP]
    token: Annotated[str, Kind.TEXT]
    label: Annotated[str, Kind.TEXT]
    version: Annotated[int, Kind.INT]


class InstanceStart(Start, frozen=True, gc=False):
    """Agent -> controller: a START with the identity that the agent holds for the guard's connection."""

    instance: Annotated[str, Kind.TEXT]
    app: Annotated[str, Kind.TEXT]
    function: Annotated[str, Kind.TEXT]


class _Manner(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """How an invocation is made."""

    asynchronous: Annotated[bool, Kind.BOOL] = False
    callback: Annotated[str, Kind.TEXT] = ""
    retry: Annotated[bool, Kind.BOOL] = False


class Invoke(_Manner, frozen=True, gc=False):
    """Guard -> agent: may this invocation call `callee` now?

    `asynchronous`: by the gateway's queue; `callback` is the function that its result goes to, "" for none. `retry`: the same
    edge once more, because the connection of the last one ended without a byte of an answer.
    """

    step: Annotated[str, Kind.STEP]
    call: Annotated[str, Kind.TEXT]
    invocation: Annotated[str, Kind.TEXT]
    callee: Annotated[str, Kind.TEXT]
    version: Annotated[int, Kind.INT]


class InstanceInvoke(Invoke, frozen=True, gc=False):
    """Agent -> controller: an INVOKE with the identity that the agent holds for the guard's connection."""

    instance: Annotated[str, Kind.TEXT]
    app: Annotated[str, Kind.TEXT]
    function: Annotated[str, Kind.TEXT]


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The answer to START, INVOKE, FINISH and REGISTER. `detail` is for people.

    `callback` is the token of the callback that an INVOKE asked for. `hold`, in the grant of a START: the last byte of the
    invocation's answer waits until its FINISH is answered, because a join of its caller needs it.
    """

    allowed: Annotated[bool, Kind.BOOL]
    reason: Annotated[str, Kind.REASON]
    call: Annotated[str, Kind.TEXT] = ""
    invocation: Annotated[str, Kind.TEXT] = ""
    token: Annotated[str, Kind.TEXT] = ""
    expected: Annotated[tuple[str, ...], Kind.TEXTS] = ()
    detail: Annotated[str, Kind.TEXT] = ""
    callback: Annotated[str, Kind.TEXT] = ""
    hold: Annotated[bool, Kind.BOOL] = False


class End(msgspec.Struct, frozen=True, gc=False):
    """Guard -> agent: an invocation is over. Nobody waits for it."""

    call: Annotated[str, Kind.TEXT]
    invocation: Annotated[str, Kind.TEXT]
    outcome: Annotated[str, Kind.OUTCOME]


class InstanceEnd(End, frozen=True, gc=False):
    """Agent -> controller: an END with the identity that the agent holds for the guard's connection."""

    instance: Annotated[str, Kind.TEXT]
    app: Annotated[str, Kind.TEXT]
    function: Annotated[str, Kind.TEXT]


class Finish(msgspec.Struct, frozen=True, gc=False):
    """Guard -> agent: an END that is answered; what a START with `hold` ends by."""

    call: Annotated[str, Kind.TEXT]
    invocation: Annotated[str, Kind.TEXT]
    outcome: Annotated[str, Kind.OUTCOME]


class InstanceFinish(Finish, frozen=True, gc=False):
    """Agent -> controller: a FINISH with the identity that the agent holds for the guard's connection."""

    instance: Annotated[str, Kind.TEXT]
    app: Annotated[str, Kind.TEXT]
    function: Annotated[str, Kind.TEXT]


@dataclass(frozen=True, slots=True)
class Mode:
    """Guard -> agent: the mode that is in force in the sandbox, and by which version; told whenever either changes."""

    mode: str = field(metadata=TEXT)
    version: int = field(metadata=INT)


@dataclass(frozen=True, slots=True)
class VerdictRecord:
    """The guard's part of a line of the verdict log; the agent adds time_ms, seq, node, instance, app and function."""

    mode: str = field(metadata=TEXT)
    policy_version: int = field(metadata=INT)
    call: str = field(metadata=TEXT)
    invocation: str = field(metadata=TEXT)
    kind: str = field(metadata=TEXT)
    message: str = field(metadata=TEXT)
    peer: str = field(metadata=TEXT)
    allowed: bool = field(metadata=BOOL)
    would_deny: bool = field(metadata=BOOL)
    reason: str = field(metadata=REASON)
    expected: Sequence[str] = field(metadata=TEXTS)
    line: int = field(metadata=INT)
    states: Sequence[int] = field(metadata=INTS)
    judging: str = field(metadata=TEXT)
    latency_us: int = field(metadata=INT)
    event: str = field(default=EVENT_VERDICT, metadata=EVENT)
    fail_mode: str = field(default="", metadata=FAIL_MODE)  # by which an app edge was decided without the controller


@dataclass(frozen=True, slots=True)
class Verdict:
    """Guard -> agent: one line for the verdict log."""

    record: VerdictRecord = field(metadata=RECORD)


@dataclass(frozen=True, slots=True)
class Policy:
    """Agent -> guard and controller -> agent: a newer signed policy of `app`."""

    app: str = field(metadata=TEXT)
    policy: bytes = field(metadata=BIN)


@dataclass(frozen=True, slots=True)
class Lease:
    """Agent -> guard and controller -> agent: decisions may be made for this long from now on."""

    lease_ms: int = field(metadata=INT)


@dataclass(frozen=True, slots=True)
class Names:
    """Agent -> guard: the addresses of every listed host, whole and not as a difference."""

    names: Mapping[str, Sequence[str]] = field(metadata=NAMES)


@dataclass(frozen=True, slots=True)
class Times:
    """Guard -> agent: measurements of judged messages. A message has its place in each list; the lists are equally long."""

    dropped: int = field(metadata=INT)
    invocation: Sequence[str] = field(default=(), metadata=TEXTS)
    kind: Sequence[str] = field(default=(), metadata=TEXTS)
    bytes: Sequence[int] = field(default=(), metadata=INTS)
    record: Sequence[int] = field(default=(), metadata=SPANS)
    open: Sequence[int] = field(default=(), metadata=SPANS)
    event: Sequence[int] = field(default=(), metadata=SPANS)
    local: Sequence[int] = field(default=(), metadata=SPANS)
    controller: Sequence[int] = field(default=(), metadata=SPANS)
    total: Sequence[int] = field(default=(), metadata=SPANS)
    reseal: Sequence[int] = field(default=(), metadata=SPANS)


@dataclass(frozen=True, slots=True)
class AgentHello:
    """Agent -> controller: the first frame of an agent's connection.

    `run` is drawn anew at each start of the agent, and `connection` counts its connections since then, to whichever controllers:
    a question that arrives late over an older one is no question any more.
    """

    node: str = field(metadata=TEXT)
    run: str = field(metadata=STEP)
    connection: int = field(default=0, metadata=INT)
    protos: Sequence[int] = field(default=PROTOCOLS, metadata=INTS)


@dataclass(frozen=True, slots=True)
class ControllerWelcome:
    """Controller -> agent, with the id of its AGENT_HELLO. Policies that do not fit follow as POLICY frames."""

    ok: bool = field(metadata=BOOL)
    reason: str = field(default="", metadata=TEXT)
    proto: int = field(default=0, metadata=INT)  # the version that both speak
    controller: str = field(default="", metadata=TEXT)  # the name of who answers
    lease_ms: int = field(default=0, metadata=INT)
    policies: Mapping[str, bytes] = field(default_factory=dict, metadata=POLICIES)


@dataclass(frozen=True, slots=True)
class Register:
    """Agent -> controller: an instance of this connection's node; answered before it may start."""

    instance: str = field(metadata=TEXT)
    app: str = field(metadata=TEXT)
    function: str = field(metadata=TEXT)
    image: str = field(metadata=TEXT)


@dataclass(frozen=True, slots=True)
class Unregister:
    """Agent -> controller: the instance is gone, and with it what it was doing."""

    instance: str = field(metadata=TEXT)


@dataclass(frozen=True, slots=True)
class Ping:
    """Agent -> controller: are you there? Told when nothing else was heard for a while."""


@dataclass(frozen=True, slots=True)
class Pong:
    """Controller -> agent, with the id of its PING."""


@dataclass(frozen=True, slots=True)
class Report:
    """Agent -> controller: what its node runs, and what it has counted since its start.

    The lists are equally long: `count` instances of `function` whose guards say that `mode` is in force by `version`; the mode of
    an instance without a guard is "none". Keys of the maps are an app and a reason or fail mode, with a space between.
    `audit_seq` and `audit_hash` are those of the last line of the agent's audit log.
    """

    audit_seq: int = field(metadata=INT)
    audit_hash: str = field(metadata=TEXT)
    app: Sequence[str] = field(default=(), metadata=TEXTS)
    function: Sequence[str] = field(default=(), metadata=TEXTS)
    mode: Sequence[str] = field(default=(), metadata=TEXTS)
    version: Sequence[int] = field(default=(), metadata=INTS)
    count: Sequence[int] = field(default=(), metadata=INTS)
    denied: Mapping[str, int] = field(default_factory=dict, metadata=VERSIONS)
    would_deny: Mapping[str, int] = field(default_factory=dict, metadata=VERSIONS)
    fail_modes: Mapping[str, int] = field(default_factory=dict, metadata=VERSIONS)


@dataclass(frozen=True, slots=True)
class Status:
    """Any client with a certificate of the site -> controller: what do you hold?"""


@dataclass(frozen=True, slots=True)
class StatusReport:
    """What a controller holds: the version of each app's newest policy, and how many agents, calls and invocations.

    `controllers` are the names of all that share its store. The lists from `node` to `count` are equally long, one row for each
    node, function, mode and version: what the agents reported last; `asked` is the mode that the newest policy wants, "" when it
    has no such function. `denied`, `would_deny` and `fail_modes` are sums of the agents' reports; `evicted` counts by reason.
    """

    policies: Mapping[str, int] = field(metadata=VERSIONS)
    agents: int = field(metadata=INT)
    calls: int = field(metadata=INT)
    invocations: int = field(metadata=INT)
    controller: str = field(default="", metadata=TEXT)
    controllers: Sequence[str] = field(default=(), metadata=TEXTS)
    store: str = field(default="", metadata=TEXT)  # memory or redis
    started_ms: int = field(default=0, metadata=INT)  # since 1970
    node: Sequence[str] = field(default=(), metadata=TEXTS)
    app: Sequence[str] = field(default=(), metadata=TEXTS)
    function: Sequence[str] = field(default=(), metadata=TEXTS)
    asked: Sequence[str] = field(default=(), metadata=TEXTS)
    mode: Sequence[str] = field(default=(), metadata=TEXTS)
    version: Sequence[int] = field(default=(), metadata=INTS)
    count: Sequence[int] = field(default=(), metadata=INTS)
    denied: Mapping[str, int] = field(default_factory=dict, metadata=VERSIONS)
    would_deny: Mapping[str, int] = field(default_factory=dict, metadata=VERSIONS)
    fail_modes: Mapping[str, int] = field(default_factory=dict, metadata=VERSIONS)
    evicted: Mapping[str, int] = field(default_factory=dict, metadata=VERSIONS)


@dataclass(frozen=True, slots=True)
class StatusAnswer:
    """Controller -> client, with the id of its STATUS."""

    status: StatusReport = field(metadata=REPORT)


Frame = (
    Hello | Welcome | Start | Invoke | Answer | End | Verdict | Policy | Lease | Names | Times
    | Finish | Mode | AgentHello | ControllerWelcome | Register | Unregister | Status | StatusAnswer | Ping | Pong | Report
)  # fmt: skip

# Lists of one shape that are equally long: a table, column by column.
COLUMNS: Mapping[type, tuple[str, ...]] = {
    Times: ("bytes", "controller", "event", "invocation", "kind", "local", "open", "record", "reseal", "total"),
    Report: ("app", "count", "function", "mode", "version"),
    StatusReport: ("app", "asked", "count", "function", "mode", "node", "version"),
}

# A shape with these fields is refused when all of them are empty: it would be a second spelling of the first shape.
ORIGIN = ("instance", "app", "function")

# Every shape that a type may have on the wire. No two shapes of one type have the same field names, so the names choose.
SHAPES: Mapping[FrameType, tuple[type[Frame], ...]] = {
    FrameType.HELLO: (Hello,),
    FrameType.WELCOME: (Welcome,),
    FrameType.START: (Start, InstanceStart),
    FrameType.INVOKE: (Invoke, InstanceInvoke),
    FrameType.ANSWER: (Answer,),
    FrameType.END: (End, InstanceEnd),
    FrameType.VERDICT: (Verdict,),
    FrameType.POLICY: (Policy,),
    FrameType.LEASE: (Lease,),
    FrameType.NAMES: (Names,),
    FrameType.TIMES: (Times,),
    FrameType.FINISH: (Finish, InstanceFinish),
    FrameType.MODE: (Mode,),
    FrameType.AGENT_HELLO: (AgentHello,),
    FrameType.CONTROLLER_WELCOME: (ControllerWelcome,),
    FrameType.REGISTER: (Register,),
    FrameType.UNREGISTER: (Unregister,),
    FrameType.STATUS: (Status,),
    FrameType.STATUS_ANSWER: (StatusAnswer,),
    FrameType.PING: (Ping,),
    FrameType.PONG: (Pong,),
    FrameType.REPORT: (Report,),
}


def kinds_of(shape: type[Frame | VerdictRecord | StatusReport]) -> dict[str, Kind]:
    """The fields of a shape in the order of the wire, which is that of their names."""
    kinds: dict[str, Kind] = {}
    if issubclass(shape, msgspec.Struct):
        hints: dict[str, Any] = get_type_hints(shape, include_extras=True)
        kinds = {name: hints[name].__metadata__[0] for name in shape.__struct_fields__}
    else:
        kinds = {each.name: each.metadata["kind"] for each in fields(shape)}
    return dict(sorted(kinds.items()))


assert set(SHAPES) == set(FrameType)  # a type without a shape could be announced and never said
assert all(len({tuple(kinds_of(shape)) for shape in shapes}) == len(shapes) for shapes in SHAPES.values())
