"""The shape of a policy as JSON Schema (2020-12), and its violations in words and lines.

`SCHEMA` is published beside this file as kalium-v1.schema.json for editors; a test holds the two together. What depends on other
parts of a policy (is the peer listed, may a SELECT write) is judged by the compiler.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jsonschema

from kalium.policy.automaton import VERBS, FailMode, Mode, Protocol, Reuse, Tls
from kalium.policy.limits import (
    BODY_BYTES_MAX,
    DEADLINE_MS_DEFAULT,
    DEADLINE_MS_MAX,
    FUNCTIONS_MAX,
    INFLIGHT_DEFAULT,
    INFLIGHT_MAX,
    INVOCATION_TIMEOUT_MS_DEFAULT,
    LIST_MAX,
    MAX_BODY_DEFAULT,
    MESSAGE_TEXT_MAX,
    PEERS_MAX,
    QUIET_MS_DEFAULT,
    REPEAT_MAX,
    RETIRE_MS_DEFAULT,
    RETRIES_MAX,
    TAIL_MS_DEFAULT,
    TIMEOUT_MS_MAX,
    VERSION_MAX,
)
from kalium.policy.source import Finding, Path, Source, did_you_mean, error_at

SCHEMA_NAME = "kalium/v1"

_NAME = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # a DNS label: OpenFaaS names functions so
_MESSAGES = ("http", "https", "invoke", "mysql", "smtp")
_CONSTRUCTS = ("sequence", "parallel", "choice", "optional", "repeat", "transaction")


def _text(pattern: str, description: str, length_max: int = 255) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^{pattern}$", "maxLength": length_max, "description": description}


def _whole(low: int, high: int, description: str, default: int | None = None) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high, "description": description} | ({} if default is None else {"default": default})


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _mapping(required: str, properties: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "additionalProperties": False, "properties": properties, "description": description}


def _named(pattern_of: str, value: str, count_max: int, count_min: int, description: str) -> dict[str, Any]:
    return {
        "type": "object", "propertyNames": _ref(pattern_of), "additionalProperties": _ref(value), "minProperties": count_min,
        "maxProperties": count_max, "description": description,
    }  # fmt: skip


def _set(value: str, description: str) -> dict[str, Any]:
    return {"type": "array", "items": _ref(value), "maxItems": LIST_MAX, "uniqueItems": True, "description": description}


def _branches(description: str) -> dict[str, Any]:
    return {"type": "array", "items": _ref("branch"), "minItems": 2, "maxItems": LIST_MAX, "description": description}


def _one_of(values: Iterable[Any], description: str, default: str = "") -> dict[str, Any]:
    return {"enum": [getattr(value, "value", value) for value in values], "description": description} | ({"default": default} if default else {})


def _join(whom: str) -> dict[str, Any]:
    return _one_of(["answered"], f"no invocation behind it before {whom} has been answered")


def _request(kind: str, description: str, **further: Any) -> dict[str, Any]:
    fields = {
        kind: _ref("method"),
        "peer": _ref("name"),
        "path": _ref("path"),
        "query": _set("query_key", "the keys that the request's query may carry, any subset of them; without this key: no query"),
        "retries": _whole(0, RETRIES_MAX, "how often the request may be sent again when no byte of an answer came"),
        "upgrade": _one_of(["websocket"], "the request asks to speak websocket afterwards; only with GET"),
        **further,
    }
    return _mapping(f"{kind} peer path", fields, description)


SCHEMA: Mapping[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "urn:kalium:policy:v1",
    "title": "Kalium policy",
    **_mapping(
        "schema app version mode peers entries functions",
        {
            "schema": {"const": SCHEMA_NAME, "description": "the version of this format"},
            "app": _ref("name"),
            "version": _whole(1, VERSION_MAX, "only grows: a guard that has seen a version takes no lower one"),
            "mode": _one_of(Mode, "what becomes of a denial: enforce refuses, audit logs, learn records; off looks at nothing"),
            "on_unavailable": _mapping(
                "",
                {
                    "app_edge": _one_of(
                        FailMode,
                        "starts and invocations while no controller answers: deny refuses them, last_known allows those that the policy has at "
                        "some place, allow all",
                        FailMode.DENY.value,
                    ),
                    "deadline_ms": _whole(1, DEADLINE_MS_MAX, "how long the controller may take to answer", DEADLINE_MS_DEFAULT),
                },
                "what the guard does when the controller does not answer in time",
            ),
            "peers": _named("name", "peer", PEERS_MAX, 0, "every name that a function may reach, and how it is read"),
            "entries": {
                "type": "array", "items": _ref("name"), "maxItems": FUNCTIONS_MAX, "uniqueItems": True,
                "description": "the functions that a client may invoke; all others need a token of the controller",
            },
            "functions": _named("name", "function", FUNCTIONS_MAX, 1, "each function's CFG"),
        },
        "what the functions of one application may send, in which order",
    ),
    "$defs": {
        "name": _text(_NAME, "lower-case letters, digits and inner hyphens, at most 63", 63),
        "host": _text(rf"{_NAME}(\.{_NAME})*", "a host name in lower case without a final dot"),
        "table": _text(r"[A-Za-z0-9_$-]{1,64}(\.[A-Za-z0-9_$-]{1,64})?", "a table, or schema.table outside the peer's schema", 129),
        "schema_name": _text(r"[A-Za-z0-9_$-]{1,64}", "a schema's name", 64),
        "method": _text(r"(?!CONNECT$|TRACE$)[A-Z]{1,16}", "a method in capital letters; CONNECT and TRACE cannot be judged", 16),
        "path": _text(
            r"/([A-Za-z0-9/._~!$&'()*+,=:@-]|\{[A-Za-z0-9_-]+\})*",
            "begins with a slash; a segment is literal or {name}, which stands for any one segment; no query, no escapes",
            MESSAGE_TEXT_MAX,
        ),
        "address": _text(
            rf"[A-Za-z0-9.!#$%&*+/=?^_`{{|}}~-]{{1,64}}@{_NAME}(\.{_NAME})*", "a mail address, local@domain, the domain in lower case", 254
        ),
        "query_key": _text(r"[A-Za-z0-9/._~!$()*,:@-]+", "a key of a query, without escapes", 64),
        "peer": _mapping(
            "host port protocol",
            {
                "host": _ref("host"),
                "port": _whole(1, 65535, "the port that functions connect to"),
                "protocol": _one_of(Protocol, "how the peer is spoken to"),
                "role": _one_of(["gateway"], "reached by invocations only"),
                "schema": _ref("schema_name"),
            },
            "a name that functions may reach",
        ),
        "function": _mapping(
            "messages",
            {
                "messages": {"type": "array", "items": _ref("step"), "description": "in this order; [] for a function that sends nothing"},
                "max_body": _whole(0, BODY_BYTES_MAX, "bytes of the body of one message", MAX_BODY_DEFAULT),
                "invocation_timeout_ms": _whole(1, TIMEOUT_MS_MAX, "when an unfinished invocation ends", INVOCATION_TIMEOUT_MS_DEFAULT),
                "mode": _one_of(Mode, "the mode of this function, by default that of the policy"),
                "tls": _one_of(Tls, "open: with the keys that the program logs; terminate: TLS ends in the guard, under its own CA", Tls.OPEN.value),
                "startup": _ref("steps"),
                "tail": _ref("steps"),
                "tail_ms": _whole(1, TIMEOUT_MS_MAX, "how long after the answer the tail may be sent", TAIL_MS_DEFAULT),
                "quiet_ms": _whole(1, TIMEOUT_MS_MAX, "after an invocation without an answer: silence before the next request", QUIET_MS_DEFAULT),
                "retire_ms": _whole(1, TIMEOUT_MS_MAX, "how long that silence is waited for before the instance is replaced", RETIRE_MS_DEFAULT),
                "max_inflight": _whole(1, INFLIGHT_MAX, "invocations at a time in one instance", INFLIGHT_DEFAULT),
                "reuse": _one_of(Reuse, "never: an instance serves one invocation and is replaced", Reuse.ALWAYS.value),
            },
            "the messages of one invocation",
        ),
        "step": {
            "type": "object",
            "oneOf": [{"type": "object", "required": [key]} for key in (*_MESSAGES, *_CONSTRUCTS)],
            "allOf": [
                {"if": {"type": "object", "required": [key]}, "then": _ref(f"step_{key}")} for key in (*_MESSAGES, *_CONSTRUCTS)
            ],
            "description": "a message or a construct over messages",
        },
        "steps": {"type": "array", "items": _ref("step"), "minItems": 1, "description": "one after the other"},
        "branch": {"if": {"type": "array"}, "then": _ref("steps"), "else": _ref("step")},
        "step_http": _request("http", "one request to a peer with protocol http"),
        "step_https": _request(
            "https", "one request to a peer with protocol https", grpc={"type": "boolean", "description": "a gRPC call; only with POST"}
        ),
        "step_invoke": _mapping(
            "invoke",
            {
                "invoke": _ref("name"),
                "peer": _ref("name"),
                "async": {"type": "boolean", "description": "through the gateway's queue, which answers at once", "default": False},
                "callback": _ref("name"),
                "retries": _whole(0, RETRIES_MAX, "how often it may be made again when no byte of an answer came", 0),
                "join": _join("the invocation"),
            },
            "one invocation, through the only gateway peer by default",
        ),
        "step_mysql": _mapping(
            "mysql",
            {
                "mysql": {"enum": list(VERBS), "description": "the statement's verb"},
                "read": _set("table", "exactly the tables that the statement reads"),
                "write": _set("table", "exactly the tables that the statement writes"),
                "peer": _ref("name"),
            },
            "one statement, to the only mysql peer by default",
        ),
        "step_smtp": _mapping(
            "smtp",
            {
                "smtp": _one_of(["mail"], "one mail"),
                "peer": _ref("name"),
                "from": _ref("address"),
                "to": _set("address", "whom the mail may go to, any subset of them; without this key: anybody"),
            },
            "one mail, to the only smtp peer by default",
        ),
        "step_sequence": _mapping("sequence", {"sequence": _ref("steps")}, "one after the other"),
        "step_parallel": _mapping(
            "parallel", {"parallel": _branches("in any interleaving"), "join": _join("all in the branches")}, "all branches, interleaved in any way"
        ),
        "step_choice": _mapping("choice", {"choice": _branches("one of them")}, "exactly one of the branches"),
        "step_optional": _mapping("optional", {"optional": _ref("branch")}, "once or not at all"),
        "step_repeat": _mapping(
            "repeat at_most",
            {
                "repeat": _ref("branch"),
                "at_least": _whole(0, REPEAT_MAX, "rounds that have to be", 0),
                "at_most": _whole(1, REPEAT_MAX, "rounds that may be"),
            },
            "several rounds",
        ),
        "step_transaction": _mapping(
            "transaction", {"transaction": _ref("branch"), "peer": _ref("name")}, "START TRANSACTION, the statements, COMMIT, on one mysql peer"
        ),
    },
}  # fmt: skip

_VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def published() -> str:
    """The text of kalium-v1.schema.json."""
    return json.dumps(SCHEMA, indent=2) + "\n"


def findings(source: Source, validator: jsonschema.Draft202012Validator = _VALIDATOR) -> list[Finding]:
    """What violates the schema of policies, or another one that is written with the same keywords, in the order of lines."""
    # A step that is no mapping violates its type; that it is no known kind of mapping says nothing more.
    errors = [error for error in validator.iter_errors(source.document) if error.validator != "oneOf" or isinstance(error.instance, dict)]
    # A step of no known kind, or of two, says so once; what its parts violate beside that would only confuse.
    unknown = [_path(error) for error in errors if error.validator == "oneOf"]
    kept = [error for error in errors if error.validator == "oneOf" or not any(_path(error)[: len(path)] == path for path in unknown)]
    found = [finding for error in kept for finding in _Violation(error, source).findings()]
    return sorted(dict.fromkeys(found), key=lambda finding: (finding.line, finding.code, finding.found))


def _path(error: jsonschema.ValidationError) -> Path:
    return tuple(error.absolute_path)


def spelled(path: Path) -> str:
    """A path as a person writes it: functions.f.messages[0]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the policy"


_HINT = "`kalium policy schema` prints the whole shape"
_KINDS = {"object": "a mapping of keys", "array": "a list", "string": "a text", "integer": "a whole number", "boolean": "true or false"}


class _Violation:
    """One of the validator's errors, with what its sentence needs; one method a keyword of the schema."""

    def __init__(self, error: jsonschema.ValidationError, source: Source) -> None:
        self.path = _path(error)
        self.source = source
        self.line = source.line(self.path)
        self.where = spelled(self.path)
        self.instance: Any = error.instance
        self.schema: Mapping[str, Any] = error.schema if isinstance(error.schema, Mapping) else {}
        self.description = self.schema.get("description", _HINT)
        self.keyword = str(error.validator)
        self.message = error.message
        if "propertyNames" in error.absolute_schema_path:  # the validator stands at the mapping and judges its key
            self.line = source.line((*self.path, str(self.instance)))
            self.where = f"a key of {self.where}"

    def findings(self) -> Iterable[Finding]:
        say = {
            "additionalProperties": self.unknown_keys, "required": self.missing_keys, "oneOf": self.unclear_step, "enum": self.not_one_of,
            "const": self.not_one_of, "minimum": self.out_of_range, "maximum": self.out_of_range, "type": self.of_another_type,
            "pattern": self.badly_spelled, "maxLength": self.badly_spelled,
        }.get(self.keyword)  # fmt: skip
        if say is not None:
            return say()
        # Counts, repetitions and names of keys: the validator's own words are good.
        return [error_at("policy.value", self.line, f"{self.where}: {self.message}", self.description)]

    def unknown_keys(self) -> Iterator[Finding]:
        known = list(self.schema["properties"])
        for key in self.instance:
            if key not in known:
                step = f"{did_you_mean(key, [name for name in known if name not in self.instance])} or delete the key"
                yield error_at("policy.unknown_key", self.source.line((*self.path, key)), f'unknown key "{key}" in {self.where}', step)

    def missing_keys(self) -> Iterator[Finding]:
        for key in self.schema["required"]:
            if key not in self.instance:
                yield error_at("policy.missing_key", self.line, f'{self.where} has no key "{key}"', f"add it: {_described(key, self.schema)}")

    def unclear_step(self) -> Iterator[Finding]:
        known = (*_MESSAGES, *_CONSTRUCTS)
        kinds = [key for key in self.instance if key in known]
        if kinds:
            yield error_at("policy.step", self.line, f"{self.where} is {' and '.join(kinds)} at once", "make a list item of each")
        elif self.instance:
            first = next(iter(self.instance))
            found = f'unknown key "{first}": {self.where} is no message and no construct'
            yield error_at("policy.unknown_key", self.line, found, did_you_mean(first, known))
        else:
            yield error_at("policy.step", self.line, f"{self.where} is empty", "delete it or name a message")

    def not_one_of(self) -> Iterator[Finding]:
        allowed = [str(value) for value in self.schema.get("enum", [self.schema.get("const")])]
        found = f"{self.where} is {_quoted(self.instance)}, not one of {', '.join(allowed)}"
        yield error_at("policy.value", self.line, found, did_you_mean(str(self.instance), allowed))

    def out_of_range(self) -> Iterator[Finding]:
        found = f"{self.where} is {self.instance}, not from {self.schema['minimum']} to {self.schema['maximum']}"
        yield error_at("policy.value", self.line, found, f"choose a value between the two: {self.description}")

    def of_another_type(self) -> Iterator[Finding]:
        expected = _KINDS[self.schema["type"]]
        found = f"{self.where} is {_quoted(self.instance)}, not {expected}"
        yield error_at("policy.value", self.line, found, f"write {expected}: {self.description}")

    def badly_spelled(self) -> Iterator[Finding]:
        yield error_at("policy.value", self.line, f"{self.where} is {_quoted(self.instance)}", f"write it as {self.description}")


def _described(key: str, schema: Mapping[str, Any]) -> str:
    entry = schema["properties"][key]
    if "$ref" in entry:
        entry = SCHEMA["$defs"][entry["$ref"].rsplit("/", 1)[1]]
    return str(entry.get("description", _HINT))


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else json.dumps(value)
