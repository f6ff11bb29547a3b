"""What a policy's text may be, and how its faults are told: file, line, next step."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalium.errors import KaliumError
from kalium.policy import source
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.compile import compile_policy, read
from kalium.policy.limits import SOURCE_BYTES_MAX, SOURCE_DEPTH_MAX, SOURCE_NODES_MAX
from kalium.policy.source import SourceRefused

GOOD = """\
schema: kalium/v1
app: shop
version: 1
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
  api: {host: api.example, port: 80, protocol: http}
  images: {host: images.example, port: 443, protocol: https}
  database: {host: database, port: 3306, protocol: mysql, schema: shop}
entries: [buy]
functions:
  buy:
    messages:
      - {mysql: select, read: [carts]}
      - {https: GET, peer: images, path: /a.jpg}
      - {invoke: pay}
  pay: {messages: []}
"""
STEP_LINE = 14  # of the mysql message, which the cases below replace


def refusal(text: str) -> KaliumError:
    """The error of compiling `text`."""
    with pytest.raises(KaliumError) as caught:
        compile_policy(text.encode("utf-8"), "shop.yml")
    return caught.value


def with_pay(setting: str) -> str:
    """The policy with something more said of the function pay, on line 17."""
    return GOOD.replace("pay: {messages: []}", f"pay: {{messages: [], {setting}}}")


def with_step(step: str) -> str:
    return GOOD.replace("{mysql: select, read: [carts]}", step)


def test_the_good_policy_compiles() -> None:
    assert compile_policy(GOOD.encode(), "shop.yml").startswith(b'{"app":"shop"')


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("", 1, "an empty file"),
        ("# only a comment\n", 1, "an empty file"),
        ("a: 1\na: 2\n", 2, 'key "a" appears twice, first on line 1'),
        ("a: &x 1\n", 1, "an anchor or alias"),
        ("a: [1]\nb: *x\n", 2, "an anchor or alias"),
        ("a: !!str 1\n", 1, "a tag"),
        ("!x {a: 1}\n", 1, "a tag"),
        ("a: 1\n\tb: 2\n", 2, "a tab"),
        ("a: 1 # fine\tcomment\n", 1, "a tab"),
        ("%YAML 1.1\n---\na: 1\n", 1, "a YAML directive"),
        ("a: 1\n---\nb: 2\n", 2, "a second document"),
        ("? [a]\n: 1\n", 1, "a key that is not a plain text"),
        ("? {a: 1}\n: 1\n", 1, "a key that is not a plain text"),
        ("a: [1\nb: 2\n", 2, "not YAML"),
        ("a: 'x\n  y\n", 3, "not YAML"),
        ('a: "x\\ny"\n', 1, "other than printable ASCII"),
        ('"a\\n": 1\n', 1, "other than printable ASCII"),
        ("a: gr\u00fcn\n", 1, "other than printable ASCII"),
        ("a: 1\nb: x\u2028y\n", 2, "end of a line"),
        ("\ufeffa: 1\n", 1, "end of a line"),
        ("a: 1\rb: 2\n", 1, "end of a line"),
        ("a: 1\nb: \x00\n", 0, "not YAML"),
    ],
)
def test_yaml_that_a_reviewer_could_misread_is_refused_with_its_line(text: str, line: int, found: str) -> None:
    with pytest.raises(SourceRefused) as caught:
        source.read(text.encode("utf-8"))

    assert (caught.value.finding.line, found in caught.value.finding.found) == (line, True), caught.value.finding


def test_bytes_that_are_not_utf8_are_refused_with_their_line() -> None:
    with pytest.raises(SourceRefused) as caught:
        source.read(b"a: 1\nb: \xff\n")

    assert (caught.value.finding.line, caught.value.finding.found) == (2, "byte 0xff is not UTF-8")


@pytest.mark.parametrize(
    "data",
    [
        b"#" * (SOURCE_BYTES_MAX + 1),
        b"[" * (SOURCE_DEPTH_MAX + 1),
        b"a: " + b"[" * 100_000,
        b"[" + b"1," * (SOURCE_NODES_MAX + 1) + b"1]",
    ],
    ids=["bytes", "depth", "bombed depth", "values"],
)
def test_a_text_beyond_a_bound_is_refused(data: bytes) -> None:
    with pytest.raises(SourceRefused) as caught:
        source.read(data)

    assert caught.value.finding.code == "policy.too_large"


def test_values_are_read_as_they_are_written() -> None:
    """No word of YAML 1.1 turns into something else: off stays a text, and so do dates, fractions and octal numbers."""
    text = "[off, yes, 1.5, 010, 0x10, 1_000, 2020-01-01, '7', 7, -3, 0, true, null, ~, 99999999999999999999]"

    assert source.read(text.encode()).document == [
        "off", "yes", "1.5", "010", "0x10", "1_000", "2020-01-01", "7", 7, -3, 0, True, None, None, "99999999999999999999",
    ]  # fmt: skip


def test_every_value_knows_its_line() -> None:
    """A value of a mapping stands where its key does, an item of a list where it begins."""
    text = source.read(b"a:\n  - b: 1\n    c:\n      d\n  - [1,\n     2]\n")

    assert [text.line(path) for path in (("a",), ("a", 0), ("a", 0, "c"), ("a", 1), ("a", 1, 1), ("a", 9), ("x",))] == [1, 2, 3, 5, 6, 1, 1]


@pytest.mark.parametrize(
    ("text", "code", "line", "found", "next_step"),
    [
        (with_step("{mysql: select, raed: [carts]}"), "policy.unknown_key", STEP_LINE, 'unknown key "raed"', 'write "read"'),
        (with_step("{htps: GET, peer: images}"), "policy.unknown_key", STEP_LINE, 'unknown key "htps"', 'write "https"'),
        (with_step("{mysql: select, invoke: pay}"), "policy.step", STEP_LINE, "mysql and invoke at once", "list item of each"),
        (with_step("{}"), "policy.step", STEP_LINE, "is empty", "delete it"),
        (with_step("show-tables"), "policy.value", STEP_LINE, 'is "show-tables", not a mapping of keys', "write a mapping of keys"),
        (with_step("{mysql: drop}"), "policy.value", STEP_LINE, 'is "drop", not one of show-tables', "use one of"),
        (with_step("{mysql: select, read: carts}"), "policy.value", STEP_LINE, 'is "carts", not a list', "write a list"),
        (with_step("{mysql: select, read: ['a b']}"), "policy.value", STEP_LINE, 'is "a b"', "a table"),
        (with_step("{mysql: select, read: [a, a]}"), "policy.value", STEP_LINE, "has non-unique elements", "tables"),
        (with_step("{http: GET, peer: api}"), "policy.missing_key", STEP_LINE, 'no key "path"', "begins with a slash"),
        (with_step("{http: get, peer: api, path: /}"), "policy.value", STEP_LINE, 'is "get"', "capital letters"),
        (with_step("{http: TRACE, peer: api, path: /}"), "policy.value", STEP_LINE, 'is "TRACE"', "cannot be judged"),
        (with_step("{http: GET, peer: api, path: '/a?b=c'}"), "policy.value", STEP_LINE, 'is "/a?b=c"', "no query"),
        (with_step("{http: GET, peer: api, path: /a/../b}"), "policy.path", STEP_LINE, 'segment ".."', "as it goes over the wire"),
        (with_step("{http: GET, peer: api, path: '/a{b}'}"), "policy.path", STEP_LINE, 'segment "a{b}"', "as it goes over the wire"),
        (with_step("{repeat: {invoke: pay}}"), "policy.missing_key", STEP_LINE, 'no key "at_most"', "rounds that may be"),
        (with_step("{repeat: {invoke: pay}, at_most: 0}"), "policy.value", STEP_LINE, "is 0, not from 1 to 256", "rounds that may be"),
        (with_step("{repeat: {invoke: pay}, at_most: 1, at_least: 2}"), "policy.value", STEP_LINE, "at_least 2 is more than at_most 1", "exchange"),
        (with_step("{parallel: [{invoke: pay}]}"), "policy.value", STEP_LINE, "parallel", "interleaving"),
        (with_step("{choice: []}"), "policy.value", STEP_LINE, "choice", "one of them"),
        (with_step("{optional: []}"), "policy.value", STEP_LINE, "optional", "one after the other"),
        (with_step("{invoke: ship}"), "policy.unknown_function", STEP_LINE, "ship is not a function", "add ship under functions"),
        (with_step("{http: GET, peer: apo, path: /}"), "policy.unknown_peer", STEP_LINE, "peer apo is not listed", 'write "api"'),
        (with_step("{http: GET, peer: images, path: /}"), "policy.wrong_peer", STEP_LINE, "peer images is not one with protocol http", "api"),
        (with_step("{http: GET, peer: gateway, path: /}"), "policy.wrong_peer", STEP_LINE, "without a role", "api"),
        (with_step("{invoke: pay, peer: api}"), "policy.wrong_peer", STEP_LINE, "not a gateway", "gateway"),
        (with_step("{mysql: select, write: [carts]}"), "policy.statement", STEP_LINE, "select writes carts; it writes none", "no statement matches"),
        (with_step("{mysql: insert}"), "policy.statement", STEP_LINE, "insert writes no table; it writes exactly one", "write"),
        (with_step("{mysql: insert, write: [a, b]}"), "policy.statement", STEP_LINE, "exactly one", "write"),
        (with_step("{mysql: delete, read: [a]}"), "policy.statement", STEP_LINE, "at least one", "write"),
        (with_step("{mysql: show-tables, read: [a]}"), "policy.statement", STEP_LINE, "it reads none", "delete `read`"),
        (with_step("{mysql: select, read: [shop.carts]}"), "policy.statement", STEP_LINE, "names the peer's own schema", 'write "carts"'),
        (with_step("{transaction: {mysql: commit}}"), "policy.transaction", STEP_LINE, "commit inside a transaction", "by itself"),
        (with_step("{transaction: {transaction: {mysql: select}}}"), "policy.transaction", STEP_LINE, "inside a transaction", "end the outer"),
        (GOOD.replace("schema: kalium/v1", "schema: kalium/v2"), "policy.value", 1, 'is "kalium/v2", not one of kalium/v1', "kalium/v1"),
        (GOOD.replace("app: shop", "app: 7"), "policy.value", 2, "is 7, not a text", "write a text"),
        (GOOD.replace("app: shop", "app: Shop"), "policy.value", 2, 'is "Shop"', "lower-case"),
        (GOOD.replace("version: 1", "version: 0"), "policy.value", 3, "is 0", "only grows"),
        (GOOD.replace("version: 1", "version: 1.5"), "policy.value", 3, 'is "1.5", not a whole number', "write a whole number"),
        (GOOD.replace("version: 1", "version: true"), "policy.value", 3, "is true, not a whole number", "write a whole number"),
        (GOOD.replace("mode: enforce", "mode: no"), "policy.value", 4, 'is "no", not one of off, learn, audit, enforce', "use one of"),
        (GOOD.replace("mode: enforce\n", ""), "policy.missing_key", 1, 'the policy has no key "mode"', "enforce refuses"),
        (GOOD.replace("entries: [buy]", "entries: [sell]"), "policy.unknown_function", 10, "sell is not a function", "add sell"),
        (GOOD.replace("entries: [buy]", "entries: [buy, buy]"), "policy.value", 10, "non-unique", "a client"),
        (GOOD.replace("entries: [buy]\n", "entries: [buy]\nflow: {}\n"), "policy.unknown_key", 11, 'unknown key "flow"', "delete the key"),
        (GOOD.replace("host: api.example", "host: Api.example"), "policy.value", 7, "peers.api.host", "lower case"),
        (GOOD.replace("port: 80,", "port: 65536,"), "policy.value", 7, "not from 1 to 65535", "port"),
        (GOOD.replace("protocol: http}", "protocol: redis}"), "policy.value", 7, "not one of http, https, mysql, smtp", "use one of"),
        (GOOD.replace("protocol: http, role", "protocol: https, role"), "policy.peer", 6, "gateway gateway has protocol https", "protocol: http"),
        (GOOD.replace(", schema: shop", ""), "policy.peer", 9, "has no schema", "add `schema:`"),
        (GOOD.replace("protocol: https}", "protocol: https, schema: a}"), "policy.peer", 8, "https peer images has a schema", "delete it"),
        (GOOD.replace("images.example, port: 443", "api.example, port: 80"), "policy.peer", 8, "same host and port as api", "keep one"),
        (GOOD.replace("  pay:", "  Pay:"), "policy.value", 17, 'a key of functions is "Pay"', "lower-case"),
        (GOOD.replace("  pay: {messages: []}", "  pay: {}"), "policy.missing_key", 17, 'functions.pay has no key "messages"', "in this order"),
        (GOOD.replace("  pay: {messages: []}", "  pay: {messages: [], max_body: -1}"), "policy.value", 17, "max_body is -1", "bytes of the body"),
        (with_step("{http: GET, peer: api, path: '/a;b'}"), "policy.value", STEP_LINE, 'is "/a;b"', "a segment is literal"),
        (with_step("{http: GET, peer: api, path: /, retries: 4}"), "policy.value", STEP_LINE, "is 4, not from 0 to 3", "no byte of an answer"),
        (with_step("{http: POST, peer: api, path: /, upgrade: websocket}"), "policy.request", STEP_LINE, "an upgrade by POST", "write GET"),
        (with_step("{http: GET, peer: api, path: /, upgrade: h2c}"), "policy.value", STEP_LINE, 'is "h2c", not one of websocket', "websocket"),
        (with_step("{https: GET, peer: images, path: /, grpc: true}"), "policy.request", STEP_LINE, "a gRPC call by GET", "write POST"),
        (with_step("{https: GET, peer: images, path: /, grpc: true, upgrade: websocket}"), "policy.request", STEP_LINE, "by gRPC", "write GET"),
        (with_step("{https: POST, peer: images, path: /, grpc: 1}"), "policy.value", STEP_LINE, "is 1, not true or false", "a gRPC call"),
        (with_step("{http: POST, peer: api, path: /, grpc: true}"), "policy.unknown_key", STEP_LINE, 'unknown key "grpc"', "delete the key"),
        (with_step("{smtp: mail}"), "policy.unknown_peer", STEP_LINE, "no peer is one with protocol smtp", "add it"),
        (with_step("{smtp: mail, peer: api}"), "policy.wrong_peer", STEP_LINE, "peer api is not one with protocol smtp", "correct it"),
        (with_step("{smtp: send}"), "policy.value", STEP_LINE, 'is "send", not one of mail', "mail"),
        (with_step("{smtp: mail, from: A@Example.org}"), "policy.value", STEP_LINE, 'is "A@Example.org"', "the domain in lower case"),
        (with_step("{smtp: mail, to: [a]}"), "policy.value", STEP_LINE, 'is "a"', "a mail address"),
        (with_pay("tail: [{invoke: buy}]"), "policy.invoke", 17, "buy is invoked after the answer", "move it to messages"),
        (with_pay("startup: [{choice: [{invoke: buy}, {invoke: pay}]}]"), "policy.invoke", 17, "buy is invoked before the first request", "messages"),
        (with_pay("tail: []"), "policy.value", 17, "tail", "one after the other"),
        (with_pay("tail_ms: 5"), "policy.tail", 17, "tail_ms without a tail", "add `tail:`"),
        (with_pay("quiet_ms: 30000"), "policy.value", 17, "quiet_ms 30000 is not less than retire_ms 30000", "raise retire_ms"),
        (with_pay("retire_ms: 200"), "policy.value", 17, "quiet_ms 200 is not less than retire_ms 200", "raise retire_ms"),
        (with_pay("reuse: never, max_inflight: 2"), "policy.value", 17, "one invocation an instance", "delete max_inflight"),
        (with_pay("max_inflight: 17"), "policy.value", 17, "is 17, not from 1 to 16", "invocations at a time"),
        (with_pay("tls: trust"), "policy.value", 17, 'is "trust", not one of open, terminate', "use one of"),
        (with_pay("mode: enforced"), "policy.value", 17, 'is "enforced"', 'write "enforce"'),
        ("- a\n", "policy.value", 1, "the policy is a list, not a mapping", "mapping"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_line_and_the_next_step(text: str, code: str, line: int, found: str, next_step: str) -> None:
    error = refusal(text)

    assert (error.code, error.exit_code) == (code, 1)
    assert error.attempted == "cannot compile shop.yml"
    assert error.found.startswith(f"line {line}: "), error.found
    assert found in error.found, error.found
    assert next_step in error.next_step, error.next_step


@pytest.mark.parametrize(
    ("body", "tail", "is_refused"),
    [
        ("{mysql: select, read: [carts]}", "{mysql: select, read: [carts]}", True),
        ("{mysql: select, read: [carts]}", "{mysql: select, read: [items]}", False),
        ("{repeat: {optional: {mysql: show-tables}}, at_most: 2}", "{choice: [{mysql: show-tables}, {mysql: begin}]}", True),
        ("{transaction: {mysql: insert, write: [a]}}", "{transaction: {mysql: insert, write: [b]}}", True),
        ("{http: GET, peer: api, path: '/a/{b}'}", "{http: GET, peer: api, path: /a/c}", True),
        ("{http: GET, peer: api, path: /a/c}", "{http: GET, peer: api, path: '/{b}/c', query: [d]}", True),
        ("{http: GET, peer: api, path: '/a/{b}'}", "{http: GET, peer: api, path: '/{c}/d'}", True),
        ("{http: GET, peer: api, path: '/a/{b}'}", "{http: GET, peer: api, path: /a/}", False),
        ("{http: GET, peer: api, path: '/a/{b}'}", "{http: GET, peer: api, path: '/{c}'}", False),
        ("{http: GET, peer: api, path: /a}", "{http: PUT, peer: api, path: /a}", False),
        ("{http: GET, peer: api, path: /a}", "{http: GET, peer: api, path: /a, upgrade: websocket}", False),
        ("{https: POST, peer: images, path: /a}", "{https: POST, peer: images, path: /a, grpc: true}", False),
        ("{smtp: mail}", "{smtp: mail, from: a@b, to: [c@d]}", True),
        ("{smtp: mail, from: a@b}", "{smtp: mail, to: [c@d]}", True),
        ("{smtp: mail, to: [a@b, c@d]}", "{smtp: mail, to: [c@d, e@f]}", True),
        ("{smtp: mail, to: [a@b]}", "{smtp: mail, to: [c@d]}", False),
        ("{smtp: mail, from: a@b}", "{smtp: mail, from: c@d}", False),
        ("{invoke: pay}", "{smtp: mail}", False),
    ],
)
def test_body_and_tail_have_no_message_in_common(body: str, tail: str, is_refused: bool) -> None:
    """A message that could be either would let the tail begin again, or the body go on, behind the answer."""
    mail = "  mail: {host: mail, port: 25, protocol: smtp}\nentries:"
    text = with_step(body).replace("entries:", mail).replace("  pay: {messages: []}\n", f"    tail: [{tail}]\n  pay: {{messages: []}}\n")

    if is_refused:
        error = refusal(text)
        assert (error.code, error.found.startswith("line 18: ")) == ("policy.tail", True), error
        assert "line 15 has it before the answer" in error.found
    else:
        compile_policy(text.encode(), "shop.yml")


def test_the_error_has_the_two_lines_of_every_error() -> None:
    error = refusal(with_step("{mysql: select, raed: [carts]}"))

    assert error.for_humans() == (
        'error[policy.unknown_key]: cannot compile shop.yml: line 14: unknown key "raed" in functions.buy.messages[0]\n'
        'next: write "read" or delete the key'
    )


def test_several_faults_are_all_found_and_the_first_is_told() -> None:
    text = with_step("{mysql: insert}").replace("entries: [buy]", "entries: [bye]")

    _, findings = read(text.encode())

    assert [finding.line for finding in findings] == [10, STEP_LINE]
    assert refusal(text).next_step.endswith("; `kalium policy lint shop.yml` shows all 2 errors")


def test_a_missing_peer_is_chosen_only_when_there_is_one() -> None:
    second = "  archive: {host: archive, port: 3306, protocol: mysql, schema: old}\nentries"
    gateway = "  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}\n"

    several, none = refusal(GOOD.replace("entries", second)), refusal(GOOD.replace(gateway, ""))

    assert "2 peers are one with protocol mysql: database, archive" in several.found
    assert "no peer is a gateway" in none.found


@given(st.binary(max_size=200))
def test_any_bytes_either_read_or_are_refused(data: bytes) -> None:
    """Fuzz target: one exception may come out."""
    with contextlib.suppress(SourceRefused):
        source.read(data)


@given(st.data())
def test_any_damage_to_a_policy_compiles_or_is_told(data: st.DataObject) -> None:
    """Fuzz target: characters of a good policy are replaced, doubled and cut; one exception may come out."""
    text = GOOD
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 8))
        text = text[:at] + data.draw(st.text(alphabet="ab1[]{},:-#&*! \n'\"\\|>%?.", max_size=4)) + text[at + length :]

    with contextlib.suppress(KaliumError):
        CompiledPolicy.parse(compile_policy(text.encode("utf-8"), "shop.yml"))
