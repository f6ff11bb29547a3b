"""Writes policies/*.json beside this file: what every executor of compiled policies has to accept, to judge and to refuse.

    python tests/vectors/generate_policies.py

Verdicts come from the Python executor, so unit tests hold it against a matcher of another kind; refused documents each break
one rule of an accepted one. tests/vectors/README.md describes the files.
"""

from __future__ import annotations

import base64
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402  # the path has to be set first

from kalium.errors import KaliumError  # noqa: E402
from kalium.policy import envelope  # noqa: E402
from kalium.policy.automaton import CompiledPolicy, FunctionAutomaton, LabelKey, MessageAutomaton  # noqa: E402
from kalium.policy.compile import compile_policy  # noqa: E402
from kalium.policy.envelope import canonical  # noqa: E402
from kalium.policy.limits import COMPILED_BYTES_MAX, LABELS_MAX  # noqa: E402
from kalium.policy.message import Kind, Message  # noqa: E402

EXPANDED_DEPTH = 4  # the file, its runs, a run, its steps
FOLDER = Path(__file__).with_name("policies")

HEAD = """\
schema: kalium/v1
app: vectors
version: 3
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
  api: {host: api.example, port: 80, protocol: http}
  images: {host: images.example, port: 4443, protocol: https}
  database: {host: database, port: 3306, protocol: mysql, schema: shop}
  archive: {host: archive, port: 3307, protocol: mysql, schema: old}
  mail: {host: mail.example, port: 25, protocol: smtp}
entries: [f]
functions:
  g: {messages: []}
  h: {messages: []}
  f:
    messages:
"""


def invoke(callee: str, peer: str = "gateway", *, callback: str = "", asynchronous: bool = False) -> Message:
    """An invocation of `callee`; one with a callback is asynchronous."""
    return Message(Kind.INVOKE, peer, callee=callee, asynchronous=asynchronous or bool(callback), callback=callback)


def answered(callee: str) -> Message:
    """A mark inside a run: the oldest granted invocation of `callee` that is joined has been answered."""
    return Message(Kind.OTHER, "answered", callee=callee)


def sql(verb: str, read: Sequence[str] = (), write: Sequence[str] = (), peer: str = "database") -> Message:
    """A statement."""
    return Message(Kind.MYSQL, peer, verb=verb, read=tuple(read), write=tuple(write))


def http(method: str, path: str, query: Sequence[str] = (), *, peer: str = "api", kind: Kind = Kind.HTTP, **further: Any) -> Message:
    """A request."""
    return Message(kind, peer, method, path, tuple(query), **further)


def mail(sender: str, *to: str, peer: str = "mail") -> Message:
    """A mail."""
    return Message(Kind.SMTP, peer, sender=sender, to=to)


TABLES, A, B, C = sql("show-tables"), sql("select", ["a"]), sql("select", ["b"]), sql("select", ["c"])
UNKNOWN = Message(Kind.OTHER, "api")

# Marks inside a run: from here on the answer is given, and this is no invocation but what comes before the first request.
ANSWER, STARTUP = Message(Kind.OTHER, "the answer"), Message(Kind.OTHER, "the startup")

# Name, what it shows, the steps of function f, and runs: the messages of one invocation each, allowed and denied ones.
CASES: Sequence[tuple[str, str, str, Sequence[Sequence[Message]]]] = (
    (
        "order",
        "out_of_order is what stands elsewhere in the policy, not_in_policy what stands nowhere; a denial leaves the cursor",
        """\
      - {mysql: select, read: [a], peer: database}
      - {mysql: select, read: [b], peer: database}
      - {mysql: insert, write: [a], read: [b], peer: database}
""",
        [
            [B, C, A, A, B, sql("insert", ["b"], ["a"]), A],
            [sql("select", ["a"], peer="archive"), sql("select", ["a", "b"]), sql("select"), sql("insert", [], ["a"]), sql("replace", ["b"], ["a"])],
            [UNKNOWN, Message(Kind.OTHER), http("GET", "/"), invoke("g")],
        ],
    ),
    (
        "parallel",
        "branches interleave in any way, and what follows waits for all of them",
        """\
      - parallel:
          - [{mysql: select, read: [a], peer: database}, {mysql: select, read: [b], peer: database}]
          - {invoke: g}
          - optional: {invoke: h}
      - {mysql: select, read: [c], peer: database}
""",
        [
            [A, invoke("g"), B, C],
            [invoke("h"), invoke("h"), A, B, C, invoke("g"), C, C],
            [invoke("g"), B, A, invoke("h"), B, C, invoke("h")],
        ],
    ),
    (
        "repeat",
        "a bounded repeat allows its bound and no more, and at least its lower bound",
        """\
      - repeat:
          - {mysql: select, read: [a], peer: database}
          - optional: {mysql: select, read: [b], peer: database}
        at_least: 1
        at_most: 3
      - {invoke: g}
""",
        [
            [invoke("g"), A, invoke("g")],
            [A, B, A, B, A, B, A, B, invoke("g"), invoke("g")],
            [A, A, A, A, B, B, invoke("g")],
        ],
    ),
    (
        "many_states",
        "a cursor of more states than one machine word holds",
        """\
      - repeat: {choice: [{invoke: g}, {invoke: h}]}
        at_most: 70
      - {mysql: select, read: [a], peer: database}
""",
        [[invoke("g"), invoke("h")] * 34 + [A, invoke("g")], [invoke("g")] * 72 + [A]],
    ),
    (
        "ambiguous",
        "the same message on several lines: all branches stay open until one is excluded; line is the first that matched",
        """\
      - choice:
          - - {invoke: g}
            - {mysql: select, read: [a], peer: database}
          - - {invoke: g}
            - {mysql: select, read: [b], peer: database}
          - - optional: {invoke: g}
            - {mysql: select, read: [c], peer: database}
""",
        [[invoke("g"), B, A], [invoke("g"), C], [C, invoke("g")], [invoke("g"), invoke("g"), A, C], [A, invoke("h")]],
    ),
    (
        "requests",
        "methods, path templates, query keys; a path with an escape matches no placeholder",
        """\
      - repeat:
          choice:
            - {http: GET, peer: api, path: "/items/{item}/parts", query: [page, size]}
            - {http: POST, peer: api, path: /items/}
            - {http: GET, peer: api, path: /}
        at_most: 40
""",
        [
            [
                http("GET", "/items/7/parts"),
                http("GET", "/items/7/parts", ["size"]),
                http("GET", "/items/7/parts", ["size", "page"]),
                http("GET", "/items/7/parts", ["page", "token"]),
                http("GET", "/items//parts"),
                http("GET", "/items/../parts"),
                http("GET", "/items/./parts"),
                http("GET", "/items/a%2fb/parts"),
                http("GET", "/items/7/parts/"),
                http("GET", "/items/7/8/parts"),
                http("POST", "/items/"),
                http("POST", "/items"),
                http("post", "/items/"),
                http("POST", "/items/", ["page"]),
                http("GET", "/"),
                http("GET", ""),
                http("GET", "//"),
                http("GET", "/", peer="images"),
                http("GET", "/", kind=Kind.HTTPS),
            ]
        ],
    ),
    (
        "retries",
        "the verdict carries the retries of the line: by default one for GET, HEAD, PUT and DELETE",
        """\
      - {http: GET, peer: api, path: /}
      - {http: POST, peer: api, path: /}
      - {http: POST, peer: api, path: /again, retries: 3}
      - {https: DELETE, peer: images, path: /, retries: 0}
      - {https: PUT, peer: images, path: /}
""",
        [
            [
                http("GET", "/"),
                http("GET", "/"),
                http("POST", "/"),
                http("POST", "/again"),
                http("DELETE", "/", peer="images", kind=Kind.HTTPS),
                http("PUT", "/", peer="images", kind=Kind.HTTPS),
            ]
        ],
    ),
    (
        "upgrades",
        "an upgrade to websocket and a gRPC call are other messages than the plain request, both ways",
        """\
      - {http: GET, peer: api, path: /live, upgrade: websocket}
      - {http: GET, peer: api, path: /live}
      - {https: POST, peer: images, path: /shop.Cart/Add, grpc: true}
      - {https: POST, peer: images, path: /shop.Cart/Add, grpc: false}
""",
        [
            [
                http("GET", "/live"),
                http("GET", "/live", upgrade=True),
                http("GET", "/live", upgrade=True),
                http("GET", "/live"),
                http("POST", "/shop.Cart/Add", peer="images", kind=Kind.HTTPS),
                http("POST", "/shop.Cart/Add", peer="images", kind=Kind.HTTPS, upgrade=True),
                http("POST", "/shop.Cart/Add", peer="images", kind=Kind.HTTPS, grpc=True),
                http("POST", "/shop.Cart/Add", peer="images", kind=Kind.HTTPS),
            ]
        ],
    ),
    (
        "mails",
        "without from and to a line stands for any mail; to is the set that the recipients are taken from",
        """\
      - {smtp: mail, from: shop@shop.example, to: [anna@example.org, bert@example.org]}
      - {smtp: mail, to: [anna@example.org]}
      - {smtp: mail, from: shop@shop.example}
      - {smtp: mail}
""",
        [
            [
                mail("shop@shop.example", "anna@example.org", "carl@example.org"),
                mail("shop@shop.example", "bert@example.org", "anna@example.org"),
                mail("", "bert@example.org"),
                mail("", "anna@example.org"),
                mail("Shop@shop.example", "carl@example.org"),
                mail("shop@shop.example"),
                mail("", "carl@example.org", peer="api"),
                mail("", "carl@example.org"),
                mail("eve@example.org", "carl@example.org"),
            ]
        ],
    ),
    (
        "gateways",
        "the same function through another gateway is another message",
        "      - {invoke: g, peer: gateway}\n      - {invoke: g, peer: backstage}\n",
        [[invoke("g", "backstage"), invoke("g"), invoke("g"), invoke("g", "backstage")]],
    ),
    (
        "asynchronous",
        "through the queue, and with a callback, an invocation is another message than the plain one, all ways; retries are no part of it",
        """\
      - {invoke: g, async: true, callback: h, retries: 2}
      - {invoke: g, async: true}
      - {invoke: g, async: false, retries: 1}
""",
        [
            [
                invoke("g"),
                invoke("g", asynchronous=True),
                invoke("g", callback="g"),
                invoke("h", callback="h"),
                invoke("g", callback="h"),
                invoke("g", callback="h"),
                invoke("g"),
                invoke("g", asynchronous=True),
                invoke("g", asynchronous=True),
                invoke("g"),
            ],
        ],
    ),
    (
        "joins",
        "what follows a join waits until all that was granted of it is answered; messages of the function itself do not wait",
        """\
      - parallel: [{invoke: g}, {invoke: g}, {optional: {invoke: h, async: true}}]
        join: answered
      - {mysql: select, read: [a], peer: database}
      - {invoke: g}
      - {invoke: h, join: answered}
      - {invoke: g}
""",
        [
            [invoke("g"), invoke("g"), A, invoke("g"), answered("g"), invoke("g"), answered("g"), invoke("g"), invoke("h"), invoke("g")],
            [invoke("g"), invoke("h", asynchronous=True), answered("h"), answered("g"), A, invoke("g"), A, answered("g"), invoke("g")],
            [
                invoke("g"),
                invoke("h", asynchronous=True),
                invoke("g"),
                A,
                answered("g"),
                answered("g"),
                invoke("g"),
                answered("h"),
                invoke("g"),
                invoke("g"),
                invoke("h"),
                invoke("g"),
                answered("h"),
                invoke("g"),
                invoke("h"),
            ],
            [invoke("h"), invoke("h", asynchronous=True), invoke("h", asynchronous=True), answered("h"), invoke("g", asynchronous=True)],
        ],
    ),
    (
        "joins_in_rounds",
        "a join in a repeat is one group: each round waits for all before it",
        """\
      - repeat:
          parallel: [{optional: {invoke: g}}, {invoke: h}]
          join: answered
        at_most: 3
      - {invoke: f}
""",
        [
            [invoke("h"), invoke("g"), invoke("h"), answered("g"), invoke("h"), answered("h"), invoke("h"), invoke("f"), answered("h"), invoke("f")],
            [invoke("f"), invoke("f"), invoke("g")],
            [
                invoke("h"),
                answered("h"),
                invoke("h"),
                invoke("g"),
                answered("g"),
                answered("h"),
                invoke("g"),
                invoke("f"),
                invoke("h"),
                answered("h"),
                invoke("f"),
                invoke("h"),
                answered("g"),
                invoke("h"),
                invoke("f"),
            ],
        ],
    ),
    (
        "joins_inside",
        "an invocation belongs to the innermost join around it; the outer one waits for it as its branch does",
        """\
      - parallel:
          - - {invoke: g, join: answered}
            - {invoke: h}
          - {invoke: f}
        join: answered
      - {invoke: g}
""",
        [
            [invoke("g"), invoke("h"), invoke("f"), answered("g"), invoke("h"), answered("f"), invoke("g"), answered("h"), invoke("g"), invoke("g")],
            [invoke("f"), answered("f"), invoke("g"), invoke("g"), answered("g"), invoke("g"), invoke("h"), answered("h"), invoke("h"), invoke("g")],
        ],
    ),
    (
        "tail",
        "the tail may begin as soon as the messages may end; after the answer nothing but the tail is left",
        """\
      - {mysql: select, read: [a], peer: database}
      - optional: {invoke: g}
    tail:
      - {smtp: mail, from: shop@shop.example}
      - {mysql: insert, write: [b], peer: database}
""",
        [
            [A, invoke("g"), ANSWER, mail("shop@shop.example", "a@example.org"), sql("insert", (), ["b"]), mail("shop@shop.example")],
            [A, ANSWER, invoke("g"), sql("insert", (), ["b"]), A, mail("eve@example.org"), mail("shop@shop.example")],
            [ANSWER, mail("shop@shop.example"), A],
            [mail("shop@shop.example"), A, mail("shop@shop.example"), invoke("g"), ANSWER, sql("insert", (), ["b"])],
        ],
    ),
    (
        "startup",
        "what is sent before the first request has its own order, and no part in an invocation's",
        """\
      - {mysql: select, read: [a], peer: database}
    startup:
      - {mysql: show-tables, peer: database}
      - repeat: {http: GET, peer: api, path: "/settings/{name}"}
        at_most: 2
""",
        [
            [STARTUP, A, http("GET", "/settings/a"), TABLES, http("GET", "/settings/a"), http("GET", "/settings/b"), http("GET", "/settings/c")],
            [TABLES, A, A],
        ],
    ),
    (
        "settings",
        "each function has its mode and what the guard does around its invocations",
        """\
      - {https: GET, peer: images, path: /}
    mode: audit
    tls: terminate
    quiet_ms: 100
    retire_ms: 1000
    max_inflight: 4
  k: {messages: [], mode: off, reuse: never, max_body: 0, invocation_timeout_ms: 1}
""",
        [[http("GET", "/", peer="images", kind=Kind.HTTPS), http("GET", "/", peer="images", kind=Kind.HTTPS)]],
    ),
    (
        "transaction",
        "begin, the statements, commit, on the peer that is named",
        """\
      - transaction:
          - {mysql: delete, write: [a], peer: archive}
          - optional: {mysql: insert, write: [a], peer: archive}
        peer: archive
""",
        [
            [sql("delete", (), ["a"], "archive"), sql("begin"), sql("begin", peer="archive"), sql("commit", peer="archive")],
            [
                sql("begin", peer="archive"),
                sql("delete", (), ["a"], "archive"),
                sql("begin", peer="archive"),
                sql("insert", (), ["a"], "archive"),
                sql("rollback", peer="archive"),
                sql("commit", peer="archive"),
                sql("commit", peer="archive"),
            ],
        ],
    ),
    (
        "expected_is_bounded",
        "of twenty messages that are possible, sixteen are listed",
        "      - choice:\n" + "".join(f"          - {{mysql: select, read: [t{number}], peer: database}}\n" for number in range(20)),
        [[A, sql("select", ["t19"])]],
    ),
)


def code_of(read: Callable[..., object], *arguments: object) -> str:
    """The code of the error that `read` raises; "" when it accepts."""
    try:
        read(*arguments)
    except KaliumError as error:
        return error.code
    return ""


def message_fields(message: Message) -> dict[str, Any]:
    """The message as the vectors write it: lists for tuples, empty fields left out."""
    names = {"sender": "from"}
    fields = {names.get(name, name): list(value) if isinstance(value, tuple) else value for name, value in vars(message).items() if value}
    return fields | {"kind": message.kind.value}


def judged(function: FunctionAutomaton, messages: Sequence[Message]) -> dict[str, Any]:
    """One invocation, or one startup: each message with its verdict."""
    is_startup, is_answered = messages[:1] == [STARTUP], False
    automaton: MessageAutomaton | None = function.startup if is_startup else function
    assert automaton is not None
    states, steps = automaton.start, []
    for message in messages[is_startup:]:
        if message is ANSWER:
            is_answered = True
        if message in (ANSWER, answered(message.callee)):
            continue
        verdict, states = automaton.step_tail(states, message) if is_answered else automaton.step(states, message)
        steps.append(
            {
                "message": message_fields(message),
                "text": message.text(),
                **({"tail": True} if is_answered else {}),
                "allowed": verdict.allowed,
                "reason": verdict.reason.value,
                "line": verdict.line,
                "states": list(verdict.states),
                "expected": list(verdict.expected),
                "retries": verdict.retries,
            }
        )
    begin = {"startup": True} if is_startup else {}
    return {"function": function.name, **begin, "steps": steps, "may_end": automaton.accepts(states)}


def invoked(policy: CompiledPolicy, function: str, messages: Sequence[Message]) -> dict[str, Any]:
    """The same for the app CFG: each invocation with what the controller answers, while the joins in `open` wait for answers."""
    graph = policy.app_cfg[function]
    states, steps = policy.start(function), []
    waited: list[tuple[str, int]] = []  # granted and not answered: the callee and its group
    for message in messages:
        if message == answered(message.callee):
            waited.remove(next(edge for edge in waited if edge[0] == message.callee))
        if message.kind is not Kind.INVOKE:
            continue
        key = LabelKey(message.callee, message.asynchronous, message.callback)
        groups = sorted({group for _, group in waited})
        after, label = policy.step(function, states, key, groups)
        expected = policy.expected(function, states, groups)
        states = after or states
        steps.append({**key._asdict(), "open": groups, "allowed": label >= 0, "label": label, "states": sorted(states), "expected": expected})
        if label >= 0 and graph.labels[label].join:
            waited.append((message.callee, graph.labels[label].join))
    return {"function": function, "steps": steps}


def accepted(name: str, what: str, source: str, runs: Sequence[tuple[str, Sequence[Message]]]) -> dict[str, Any]:
    """One vector: a policy and what it makes of messages."""
    compiled = compile_policy(source.encode("ascii"), name)
    policy = CompiledPolicy.parse(compiled)
    return {
        "name": name,
        "what": what,
        "source": source,
        "compiled": compiled.decode("ascii"),
        "runs": [judged(policy.functions[function], messages) for function, messages in runs],
        "app_runs": [invoked(policy, function, messages) for function, messages in runs],
    }


def hello_retail() -> dict[str, Any]:
    """The benchmark's policy under an honest and a hostile invocation of each interesting function."""
    image = http("GET", "/image.jpg", peer="images", kind=Kind.HTTPS)
    delete, insert = sql("delete", (), ["storedPhotosTable"]), sql("insert", (), ["storedPhotosTable"])
    read = sql("select", ["photoAssignmentTable"])
    receive, master = "product-photos-3-receive", "product-photos-master"
    steps = [invoke(receive), invoke("product-photos-4-success"), invoke("product-photos-6-report")]
    runs: list[tuple[str, Sequence[Message]]] = [
        (receive, [image, TABLES, read, TABLES, sql("begin"), delete, insert, sql("commit"), sql("begin"), insert]),
        (receive, [TABLES, image, image, read, sql("begin"), TABLES, insert, sql("begin"), sql("commit"), delete]),
        (master, steps + steps),
        (master, [steps[2], steps[0], steps[2], steps[1], steps[1], steps[2]]),
    ]
    source = (ROOT / "policies" / "hello-retail.yml").read_text(encoding="ascii")
    return accepted("hello_retail", "policies/hello-retail.yml", source, runs)


def good() -> Iterator[dict[str, Any]]:
    """All vectors of policies that are accepted."""
    yield hello_retail()
    for name, what, steps, runs in CASES:
        another = "  backstage: {host: backstage, port: 8080, protocol: http, role: gateway}\n"
        head = HEAD.replace("entries:", f"{another}entries:") if name == "gateways" else HEAD
        yield accepted(name, what, head + steps, [("f", messages) for messages in runs])
    yield from (at_random(seed) for seed in range(4))


# Lines of the policies of `random`, each with a message that it stands for and one that it nearly stands for.
LINES: Sequence[tuple[str, Message, Message]] = (
    ("{invoke: g}", invoke("g"), invoke("g", "backstage")),
    ("{mysql: select, read: [a], peer: database}", A, sql("select", ["a", "b"])),
    ("{mysql: insert, write: [a], read: [b], peer: database}", sql("insert", ["b"], ["a"]), sql("insert", ["b"], ["a"], "archive")),
    ('{http: GET, peer: api, path: "/{x}/y"}', http("GET", "/1/y"), http("GET", "/../y")),
    ("{http: POST, peer: api, path: /, query: [k], retries: 2}", http("POST", "/", ["k"]), http("POST", "/", ["k", "l"])),
    ("{http: GET, peer: api, path: /ws, upgrade: websocket}", http("GET", "/ws", upgrade=True), http("GET", "/ws")),
    (
        "{https: POST, peer: images, path: /, grpc: true}",
        http("POST", "/", peer="images", kind=Kind.HTTPS, grpc=True),
        http("POST", "/", peer="images", kind=Kind.HTTPS),
    ),
    ("{smtp: mail, from: a@b}", mail("a@b", "c@d"), mail("c@d", "a@b")),
    ("{smtp: mail, to: [a@b, c@d]}", mail("", "c@d", "a@b"), mail("", "c@d", "e@f")),
)


def at_random(seed: int) -> dict[str, Any]:
    """A policy of random constructs, and random messages under it: what nobody has thought of."""
    dice = random.Random(seed)  # noqa: S311

    def step(lines: Sequence[str], depth: int) -> str:
        kind = dice.choice(("line", "line", "sequence", "choice", "parallel", "optional", "repeat")) if depth else "line"
        if kind == "line":
            return dice.choice(lines)
        if kind in ("optional", "repeat"):
            bounds = f", at_least: {dice.randrange(2)}, at_most: {dice.randrange(1, 4)}" if kind == "repeat" else ""
            return f"{{{kind}: {step(lines, depth - 1)}{bounds}}}"
        return f"{{{kind}: [{', '.join(step(lines, depth - 1) for _ in range(dice.randrange(2, 4)))}]}}"

    lines = [line for line, _, _ in LINES]
    dice.shuffle(lines)
    tail, body = [line for line in lines[:3] if "invoke" not in line and "smtp" not in line] or [LINES[1][0]], lines[3:]
    body = [line for line in body if line not in tail]
    startup = [line for line in lines if "invoke" not in line]
    steps = [
        *(f"      - {step(body, 3)}" for _ in range(3)),
        "    tail:",
        *(f"      - {step(tail, 2)}" for _ in range(2)),
        "    startup:",
        *(f"      - {step(startup, 2)}" for _ in range(2)),
    ]
    source = HEAD + "\n".join(steps) + "\n"
    function = CompiledPolicy.parse(compile_policy(source.encode("ascii"), "random")).functions["f"]
    runs = [("f", _walked(function, dice, is_startup=number % 4 == 0)) for number in range(8)]
    return accepted(f"random_{seed}", "random constructs and random messages", source, runs)


def _walked(function: FunctionAutomaton, dice: random.Random, *, is_startup: bool) -> list[Message]:
    """Random messages, every other one among those that are allowed where it comes; the answer may be given in between."""
    messages = [message for _, *pair in LINES for message in pair]
    automaton: MessageAutomaton | None = function.startup if is_startup else function
    assert automaton is not None
    judge, states = automaton.step, automaton.start
    run = [STARTUP] * is_startup
    for _ in range(24):
        if automaton.accepts(states) and not is_startup and ANSWER not in run and dice.randrange(3) == 0:
            judge = automaton.step_tail
            run.append(ANSWER)
        allowed = [message for message in messages if judge(states, message)[0].allowed]
        run.append(dice.choice(allowed if allowed and dice.randrange(2) else messages))
        _, states = judge(states, run[-1])
    return run


BASE = """\
schema: kalium/v1
app: base
version: 3
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
  api: {host: api.example, port: 80, protocol: http}
  database: {host: database, port: 3306, protocol: mysql, schema: shop}
  mail: {host: mail, port: 25, protocol: smtp}
entries: [f]
functions:
  f:
    messages:
      - {http: GET, peer: api, path: "/items/{item}", query: [page, size]}
      - {mysql: select, read: [a, b]}
      - {invoke: g}
      - {smtp: mail, from: f@api.example, to: [a@api.example, b@api.example]}
    tail:
      - {http: POST, peer: api, path: /last}
    startup:
      - {http: GET, peer: api, path: /first}
  g: {messages: []}
"""

Change = Callable[[Any], Any]


def put(path: str, value: Any) -> Change:
    """Set what stands at `path` (keys and positions with slashes between them)."""

    def change(document: Any) -> None:
        *outer, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for part in outer:
            document = document[part]
        document[last] = value

    return change


def drop(path: str) -> Change:
    """Delete what stands at `path`."""

    def change(document: Any) -> None:
        *outer, last = path.split("/")
        for part in outer:
            document = document[int(part) if part.isdigit() else part]
        del document[last]

    return change


F = "functions/f"
S0, S1, S2, S3, S4 = (f"{F}/symbols/{number}" for number in range(5))
L0 = "app_cfg/f/labels/0"
STARTUP_S0 = f"{F}/startup/symbols/0"

# Each breaks one rule of the document that BASE compiles to.
BROKEN: Sequence[tuple[str, Change]] = (
    ("another_format", put("format", "kalium-compiled/v2")),
    ("no_app", drop("app")),
    ("unknown_field", put("comment", "x")),
    ("another_case", lambda document: document.update(App=document.pop("app"))),
    ("app_is_no_name", put("app", "a b")),
    ("app_is_empty", put("app", "")),
    ("app_is_a_number", put("app", 7)),
    ("version_zero", put("version", 0)),
    ("version_too_high", put("version", 1 << 31)),
    ("version_is_true", put("version", True)),
    ("version_is_a_fraction", put("version", 3.5)),
    ("version_is_a_text", put("version", "3")),
    ("mode_unknown", put("mode", "watch")),
    ("mode_missing", drop("mode")),
    ("source_sha256_too_long", put("source_sha256", "0" * 65)),
    ("app_edge_unknown", put("on_unavailable/app_edge", "audit")),
    ("app_edge_is_a_number", put("on_unavailable/app_edge", 0)),
    ("deadline_zero", put("on_unavailable/deadline_ms", 0)),
    ("deadline_too_long", put("on_unavailable/deadline_ms", 60_001)),
    ("peers_is_a_list", put("peers", [])),
    ("peer_without_host", drop("peers/api/host")),
    ("peer_host_in_capitals", put("peers/api/host", "Api.example")),
    ("peer_host_with_a_final_dot", put("peers/api/host", "api.example.")),
    ("peer_port_zero", put("peers/api/port", 0)),
    ("peer_port_too_high", put("peers/api/port", 65_536)),
    ("peer_protocol_redis", put("peers/api/protocol", "redis")),
    ("peer_role_admin", put("peers/api/role", "admin")),
    ("gateway_that_speaks_https", put("peers/gateway/protocol", "https")),
    ("mysql_without_schema", drop("peers/database/schema")),
    ("schema_of_an_http_peer", put("peers/api/schema", "shop")),
    ("entry_that_is_no_function", put("entries", ["x"])),
    ("entry_twice", put("entries", ["f", "f"])),
    ("states_zero", put(f"{F}/states", 0)),
    ("states_too_many", put(f"{F}/states", 4097)),
    ("states_100000", put(f"{F}/states", 100_000)),
    ("app_cfg_of_100000_states", put("app_cfg/f/states", 100_000)),
    ("start_empty", put(f"{F}/start", [])),
    ("start_beyond_the_states", put(f"{F}/start", [6])),
    ("start_not_rising", put(f"{F}/start", [1, 0])),
    ("start_twice", put(f"{F}/start", [0, 0])),
    ("accept_negative", put(f"{F}/accept", [-1])),
    ("max_body_negative", put(f"{F}/max_body", -1)),
    ("max_body_too_large", put(f"{F}/max_body", (1 << 30) + 1)),
    ("timeout_zero", put(f"{F}/invocation_timeout_ms", 0)),
    ("timeout_too_long", put(f"{F}/invocation_timeout_ms", 3_600_001)),
    ("function_with_an_unknown_field", put(f"{F}/tail", [])),
    ("function_mode_unknown", put(f"{F}/mode", "watch")),
    ("function_mode_missing", drop(f"{F}/mode")),
    ("tls_unknown", put(f"{F}/tls", "trust")),
    ("tail_ms_zero", put(f"{F}/tail_ms", 0)),
    ("quiet_ms_too_long", put(f"{F}/quiet_ms", 3_600_001)),
    ("retire_ms_missing", drop(f"{F}/retire_ms")),
    ("max_inflight_zero", put(f"{F}/max_inflight", 0)),
    ("max_inflight_17", put(f"{F}/max_inflight", 17)),
    ("reuse_is_true", put(f"{F}/reuse", True)),
    ("reuse_unknown", put(f"{F}/reuse", "once")),
    ("startup_is_null", put(f"{F}/startup", None)),
    ("startup_without_edges", drop(f"{F}/startup/edges")),
    ("startup_with_a_mode", put(f"{F}/startup/mode", "audit")),
    ("startup_start_empty", put(f"{F}/startup/start", [])),
    ("startup_of_a_tail", put(f"{STARTUP_S0}/tail", True)),
    ("startup_that_invokes", lambda document: document["functions"]["f"]["startup"].update(symbols=[document["functions"]["f"]["symbols"][2]])),
    ("tail_that_invokes", put(f"{S2}/tail", True)),
    ("tail_is_a_number", put(f"{S4}/tail", 1)),
    ("tail_missing", drop(f"{S1}/tail")),
    ("edge_of_two", put(f"{F}/edges/0", [0, 0])),
    ("edge_from_nowhere", put(f"{F}/edges/4", [6, 0, 1])),
    ("edge_to_nowhere", put(f"{F}/edges/0", [0, 0, 6])),
    ("edge_of_no_symbol", put(f"{F}/edges/0", [0, 5, 1])),
    ("edges_not_rising", put(f"{F}/edges", [[1, 1, 2], [0, 0, 1]])),
    ("edge_twice", put(f"{F}/edges", [[0, 0, 1], [0, 0, 1]])),
    ("kind_redis", put(f"{S0}/kind", "redis")),
    ("kind_other", put(f"{S0}/kind", "other")),
    ("symbol_without_line", drop(f"{S0}/line")),
    ("symbol_with_a_field_of_another_kind", put(f"{S2}/verb", "select")),
    ("symbol_line_negative", put(f"{S0}/line", -1)),
    ("symbol_text_empty", put(f"{S0}/text", "")),
    ("symbol_text_not_printable", put(f"{S0}/text", "a\u001bb")),
    ("symbol_text_not_ascii", put(f"{S0}/text", "a\u00e9b")),
    ("symbol_text_too_long", put(f"{S0}/text", "x" * 301)),
    ("symbol_peer_not_listed", put(f"{S0}/peer", "images")),
    ("http_to_a_mysql_peer", put(f"{S0}/peer", "database")),
    ("http_to_the_gateway", put(f"{S0}/peer", "gateway")),
    ("https_to_an_http_peer", put(f"{S0}/kind", "https")),
    ("mysql_to_an_http_peer", put(f"{S1}/peer", "api")),
    ("invoke_by_an_http_peer", put(f"{S2}/peer", "api")),
    ("method_in_small_letters", put(f"{S0}/method", "get")),
    ("method_empty", put(f"{S0}/method", "")),
    ("path_empty", put(f"{S0}/path", "")),
    ("path_without_slash", put(f"{S0}/path", "items")),
    ("path_with_a_gap", put(f"{S0}/path", "/a//b")),
    ("path_with_a_dot_segment", put(f"{S0}/path", "/a/../b")),
    ("path_with_an_escape", put(f"{S0}/path", "/a%20b")),
    ("path_with_a_query", put(f"{S0}/path", "/a?b")),
    ("path_with_a_space", put(f"{S0}/path", "/a b")),
    ("path_with_half_a_placeholder", put(f"{S0}/path", "/a{item}")),
    ("path_with_an_empty_placeholder", put(f"{S0}/path", "/{}")),
    ("path_with_nested_braces", put(f"{S0}/path", "/{{a}}")),
    ("path_with_a_parameter", put(f"{S0}/path", "/a;b")),
    ("path_with_a_bar", put(f"{S0}/path", "/a|b")),
    ("retries_4", put(f"{S0}/retries", 4)),
    ("retries_negative", put(f"{S0}/retries", -1)),
    ("retries_of_a_statement", put(f"{S1}/retries", 1)),
    ("upgrade_is_a_text", put(f"{S0}/upgrade", "websocket")),
    ("upgrade_by_post", put(f"{S4}/upgrade", True)),
    ("grpc_in_clear", put(f"{S4}/grpc", True)),
    ("async_is_a_text", put(f"{S2}/asynchronous", "true")),
    ("invocation_without_a_callback_field", drop(f"{S2}/callback")),
    ("callback_is_null", put(f"{S2}/callback", None)),
    ("callback_of_a_plain_invocation", put(f"{S2}/callback", "g")),
    ("callback_is_no_name", lambda document: document["functions"]["f"]["symbols"][2].update(asynchronous=True, callback="a b")),
    ("callback_is_no_function", lambda document: document["functions"]["f"]["symbols"][2].update(asynchronous=True, callback="x")),
    ("callee_is_no_function", put(f"{S2}/callee", "x")),
    ("invocation_retries_4", put(f"{S2}/retries", 4)),
    ("smtp_to_an_http_peer", put(f"{S3}/peer", "api")),
    ("http_to_an_smtp_peer", put(f"{S0}/peer", "mail")),
    ("from_is_null", put(f"{S3}/from", None)),
    ("from_without_a_domain", put(f"{S3}/from", "f@")),
    ("from_in_brackets", put(f"{S3}/from", "<f@api.example>")),
    ("from_with_a_domain_in_capitals", put(f"{S3}/from", "f@Api.example")),
    ("to_not_sorted", put(f"{S3}/to", ["b@api.example", "a@api.example"])),
    ("to_of_two_ats", put(f"{S3}/to", ["a@b@api.example"])),
    ("to_of_a_list_in_a_text", put(f"{S3}/to", ["a@api.example,b@api.example"])),
    ("path_of_65_segments", put(f"{S0}/path", "/a" * 65)),
    ("query_not_sorted", put(f"{S0}/query", ["size", "page"])),
    ("query_twice", put(f"{S0}/query", ["page", "page"])),
    ("verb_truncate", put(f"{S1}/verb", "truncate")),
    ("tables_not_sorted", put(f"{S1}/read", ["b", "a"])),
    ("tables_65", put(f"{S1}/read", [f"t{number:02}" for number in range(65)])),
    ("app_cfg_of_one_function_missing", drop("app_cfg/g")),
    ("app_cfg_of_another_function", lambda document: document["app_cfg"].update(x=document["app_cfg"].pop("g"))),
    ("app_cfg_to_no_function", put(f"{L0}/callee", "x")),
    ("app_cfg_to_no_state", put("app_cfg/f/edges/0", [0, 0, 9])),
    ("app_cfg_by_the_callee", put("app_cfg/f/edges/0", [0, "g", 1])),
    ("app_cfg_of_no_label", put("app_cfg/f/edges/0", [0, 1, 1])),
    ("app_cfg_edges_not_rising", put("app_cfg/f/edges", [[1, 0, 1], [0, 0, 1]])),
    ("app_cfg_edge_twice", put("app_cfg/f/edges", [[0, 0, 1], [0, 0, 1]])),
    ("app_cfg_without_labels", drop("app_cfg/f/labels")),
    ("label_is_a_name", put(L0, "g")),
    ("label_twice", lambda document: document["app_cfg"]["f"]["labels"].append(document["app_cfg"]["f"]["labels"][0])),
    ("label_with_an_unknown_field", put(f"{L0}/peer", "gateway")),
    ("label_without_join", drop(f"{L0}/join")),
    ("label_with_a_callback_to_no_function", lambda document: document["app_cfg"]["f"]["labels"][0].update(asynchronous=True, callback="x")),
    ("label_with_a_callback_that_is_waited_for", put(f"{L0}/callback", "g")),
    ("label_retries_4", put(f"{L0}/retries", 4)),
    ("label_join_negative", put(f"{L0}/join", -1)),
    ("label_join_too_high", put(f"{L0}/join", LABELS_MAX + 1)),
    ("label_and_barrier", put(f"{L0}/barrier", 1)),
    ("barrier_zero", put(L0, {"barrier": 0})),
    ("barrier_too_high", put(L0, {"barrier": LABELS_MAX + 1})),
    ("labels_too_many", put("app_cfg/f/labels", [{"barrier": number} for number in range(1, LABELS_MAX + 2)])),
    ("app_cfg_with_an_unknown_field", put("app_cfg/f/accept", [0])),
    ("nested_too_deep", put("app", [[[[[[[[[[[[[]]]]]]]]]]]]])),
)  # fmt: skip


def refused() -> Iterator[dict[str, str]]:
    """Documents that every reader refuses, as text."""
    base = compile_policy(BASE.encode("ascii"), "base")
    texts = {
        "empty": "",
        "not_json": "{",
        "a_list": "[]",
        "bytes_behind": base.decode() + "{}",
        "a_field_twice": base.decode().replace('"mode":"enforce"', '"mode":"enforce","mode":"enforce"'),
        "a_function_twice": base.decode().replace('"functions":{', '"functions":{"g":{},', 1),
        "version_with_an_exponent": base.decode().replace('"version":3', '"version":3e0'),
        "version_with_a_fraction_of_zero": base.decode().replace('"version":3', '"version":3.0'),
        "version_with_a_leading_zero": base.decode().replace('"version":3', '"version":03'),
        "version_of_40_digits": base.decode().replace('"version":3', f'"version":{"3" * 40}'),
        "not_a_number": base.decode().replace('"version":3', '"version":NaN'),
        "a_comma_too_many": base.decode().replace('"entries":["f"]', '"entries":["f",]'),
        "single_quotes": base.decode().replace('"', "'"),
        "too_long": base.decode() + " " * (COMPILED_BYTES_MAX - len(base) + 1),
    }
    for name, change in BROKEN:
        document = json.loads(base)
        change(document)
        texts[name] = canonical(document).decode("ascii")
    for name, text in texts.items():
        assert text != base.decode(), name
        if name == "too_long":  # 700 KiB of spaces say nothing in a file
            yield {"name": name, "compiled": base.decode(), "pad_to_bytes": str(COMPILED_BYTES_MAX + 1), "code": "policy.malformed"}
        else:
            yield {"name": name, "compiled": text, "code": "policy.malformed"}
        assert code_of(CompiledPolicy.parse, text.encode("utf-8")) == "policy.malformed", name


def envelopes() -> dict[str, Any]:
    """Envelopes that hold and that do not, under one public key. The private keys exist for these vectors alone."""
    key, stranger = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32), Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
    public = key.public_key()
    compiled = compile_policy(BASE.encode("ascii"), "base")
    whole = envelope.sign(compiled, key)

    def changed(**fields: Any) -> bytes:
        return canonical(json.loads(whole) | fields)

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode("ascii")

    other = compiled.replace(b'"mode":"enforce"', b'"mode":"audit"')
    malformed = compiled.replace(b'"version":3', b'"version":0')
    plain_signature = text(key.sign(compiled))
    broken = [
        ("another_policy_inside", changed(policy=text(other)), "policy.signature"),
        ("signature_without_the_format", changed(signature=plain_signature), "policy.signature"),
        ("signature_cut", changed(signature=text(b"\x00" * 63)), "policy.signature"),
        ("signature_empty", changed(signature=""), "policy.signature"),
        ("signature_of_zeros", changed(signature=text(b"\x00" * 64)), "policy.signature"),
        ("signed_by_a_stranger", envelope.sign(compiled, stranger), "policy.signature"),
        (
            "a_stranger_under_our_key_id",
            canonical(json.loads(envelope.sign(compiled, stranger)) | {"key_id": envelope.key_id(public)}),
            "policy.signature",
        ),
        ("key_id_in_capitals", changed(key_id=envelope.key_id(public).upper() + "x"), "policy.signature"),
        ("signature_damaged", whole.replace(b'"signature":"', b'"signature":"AAAA', 1), "policy.signature"),
        ("signature_not_base64", changed(signature="*"), "policy.malformed"),
        ("signature_with_bits_behind_it", changed(signature=text(b"\x00" * 64)[:-3] + "B=="), "policy.malformed"),
        ("another_format", changed(format="kalium-signed/v2"), "policy.malformed"),
        ("unknown_field", changed(comment="x"), "policy.malformed"),
        ("no_signature", canonical({name: value for name, value in json.loads(whole).items() if name != "signature"}), "policy.malformed"),
        ("truncated", whole[:-100], "policy.malformed"),
        ("signed_and_truncated", _signed_unchecked(compiled[:-100], key), "policy.malformed"),
        ("signed_and_of_100000_states", _signed_unchecked(compiled.replace(b'"states":6', b'"states":100000'), key), "policy.malformed"),
        ("not_an_envelope", compiled, "policy.malformed"),
        ("empty", b"", "policy.malformed"),
        ("signed_and_malformed", _signed_unchecked(malformed, key), "policy.malformed"),
    ]
    for name, data, code in broken:
        assert code_of(envelope.verify, data, public) == code, name
    spaced = json.dumps(json.loads(whole), indent=1).encode("ascii") + b"\n"
    return {
        "public_key": text(public.public_bytes_raw()),
        "key_id": envelope.key_id(public),
        "good": [
            {"name": name, "envelope": data.decode("ascii"), "app": "base", "version": envelope.verify(data, public).version}
            for name, data in (("whole", whole), ("with_spaces", spaced))
        ],
        "refused": [{"name": name, "envelope": data.decode("ascii"), "code": code} for name, data, code in broken],
    }


def _signed_unchecked(compiled: bytes, key: Ed25519PrivateKey) -> bytes:
    """An envelope that `envelope.sign` refuses to make."""
    signature = key.sign(f"{envelope.SIGNED_FORMAT}\n".encode("ascii") + compiled)
    parts = {"policy": base64.b64encode(compiled).decode("ascii"), "signature": base64.b64encode(signature).decode("ascii")}
    return canonical({"format": envelope.SIGNED_FORMAT, "key_id": envelope.key_id(key.public_key()), **parts})


def rendered() -> dict[str, str]:
    """The text of every file by its name."""
    files: dict[str, Any] = {f"{vector['name']}.json": vector for vector in good()}
    files |= {"refused.json": list(refused()), "envelopes.json": envelopes()}
    return {name: f"{spelled(content)}\n" for name, content in files.items()}


def spelled(value: Any, depth: int = 0) -> str:
    """JSON with one judged message, one document a line, so that a change of one is a change of one line."""
    if depth == EXPANDED_DEPTH or not value or not isinstance(value, (dict, list)) or (depth == 1 and "code" in value):
        return json.dumps(value)
    inner, end = " " * (depth + 1), " " * depth
    if isinstance(value, dict):
        fields = (f"{inner}{json.dumps(name)}: {spelled(part, depth + 1)}" for name, part in value.items())
        return "{\n" + ",\n".join(fields) + f"\n{end}}}"
    return "[\n" + ",\n".join(f"{inner}{spelled(part, depth + 1)}" for part in value) + f"\n{end}]"


def write() -> None:
    """Write all files and remove those that no vector has any more."""
    files = rendered()
    FOLDER.mkdir(exist_ok=True)
    for stale in {path.name for path in FOLDER.glob("*.json")} - files.keys():
        (FOLDER / stale).unlink()
    for name, text in files.items():
        (FOLDER / name).write_text(text, encoding="ascii")


if __name__ == "__main__":
    write()
