"""A policy's own examples: what it has to allow and to deny, written as verdict logs write messages.

They are to a policy what tests are to a program: `kalium policy test` plays them through the executor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema

from kalium.policy import schema, source
from kalium.policy.automaton import CompiledPolicy, Protocol
from kalium.policy.message import JUDGING_CONNECTION, Kind, Message, Reason
from kalium.policy.source import Finding, Path, Source, SourceRefused, error_at

SCHEMA_NAME = "kalium/examples-v1"

_TEXT = {"type": "string", "description": "a message as a verdict log writes it: mysql select read photos"}
_TEXTS = {"type": "array", "items": _TEXT, "description": "messages, each as a verdict log writes it"}
_NAMES = {"type": "array", "items": {"type": "string", "description": "a function's name"}, "description": "names of functions"}
SCHEMA: Mapping[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["schema", "examples"],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": SCHEMA_NAME, "description": "the version of this format"},
        "starts": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"allowed": _NAMES, "denied": _NAMES},
            "description": "what a client may start, and may not",
        },
        "examples": {
            "type": "array",
            "minItems": 1,
            "description": "one invocation each",
            "items": {
                "type": "object",
                "required": ["name", "function"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "description": "the sentence that the example proves"},
                    "function": {"type": "string", "description": "whose invocation it is"},
                    "allowed": _TEXTS,
                    "denied": _TEXTS,
                    "reason": {"enum": [Reason.OUT_OF_ORDER.value, Reason.NOT_IN_POLICY.value], "description": "why the denied ones are"},
                    "may_end": {"type": "boolean", "description": "whether the invocation may end after the allowed ones"},
                },
                "description": "messages that are allowed in this order, then messages each of which is denied there",
            },
        },
    },
}
_VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


class NotAMessage(ValueError):
    """A text that no verdict log writes."""


def message_of(text: str, policy: CompiledPolicy) -> Message:
    """The message that Message.text writes as `text`. Raises NotAMessage; mysql texts need a policy with one mysql peer."""
    words = text.split(" ")
    kind = words[0]
    if kind == "invoke" and len(words) == 2:
        return Message(Kind.INVOKE, callee=words[1])
    if kind == "https" and words[1:2] == ["connection"] and len(words) == 3:
        return Message(Kind.HTTPS, words[2], judging=JUDGING_CONNECTION)
    if kind in ("http", "https") and len(words) == 4:
        path, _, query = words[3].partition("?")
        return Message(Kind(kind), words[2], words[1], path, tuple(query.split("&")) if query else ())
    if kind == "mysql" and len(words) in (2, 4, 6):
        peers = [name for name, peer in policy.peers.items() if peer.protocol is Protocol.MYSQL]
        tables = dict(zip(words[2::2], (tuple(part.split(",")) for part in words[3::2]), strict=True))
        if len(peers) == 1 and list(tables) == [way for way in ("read", "write") if way in tables]:
            return Message(Kind.MYSQL, peers[0], verb=words[1], read=tables.get("read", ()), write=tables.get("write", ()))
    raise NotAMessage(text)


def run(data: bytes, policy: CompiledPolicy) -> tuple[int, list[Finding]]:
    """Play the examples in `data`: how many there are, and what is wrong with them or with the policy, in the order of lines."""
    try:
        text = source.read(data)
    except SourceRefused as refused:
        return 0, [refused.finding]
    findings = schema.findings(text, _VALIDATOR)
    if findings:
        return 0, findings
    found = [*_starts(text, policy)]
    for index, example in enumerate(text.document["examples"]):
        found += _play(text, ("examples", index), example, policy)
    return len(text.document["examples"]), sorted(found, key=lambda finding: finding.line)


def _failed(text: Source, path: Path, found: str) -> Finding:
    return error_at("policy.example", text.line(path), found, "correct the example or the policy; `kalium policy show` draws what the policy allows")


def _starts(text: Source, policy: CompiledPolicy) -> Iterator[Finding]:
    for expected, names in text.document.get("starts", {}).items():
        for index, name in enumerate(names):
            got = "allowed" if name in policy.entries else "denied"
            if got != expected or name not in policy.functions:
                what = f"a client's start of {name} is {got}" if name in policy.functions else f"{name} is not a function of the policy"
                yield _failed(text, ("starts", expected, index), f"{what}; the example says {expected}")


def _play(text: Source, path: Path, example: Mapping[str, Any], policy: CompiledPolicy) -> Iterator[Finding]:
    function = policy.functions.get(example["function"])
    if function is None:
        yield _failed(text, (*path, "function"), f"{example['function']} is not a function of the policy")
        return
    states = function.start
    for kind in ("allowed", "denied"):
        for index, line in enumerate(example.get(kind, ())):
            here: Path = (*path, kind, index)
            try:
                verdict, after = function.step(states, message_of(line, policy))
            except NotAMessage:
                yield _failed(text, here, f'"{line}" is not a message as logs write it')
                return
            if verdict.allowed != (kind == "allowed"):
                expected = f"; expected here: {', '.join(verdict.expected) or 'nothing'}" if kind == "allowed" else ""
                yield _failed(text, here, f'"{example["name"]}": {line} is {verdict.reason.value}{expected}')
                return
            if kind == "denied" and verdict.reason.value != example.get("reason", verdict.reason.value):
                yield _failed(text, here, f'"{example["name"]}": {line} is {verdict.reason.value}, not {example["reason"]}')
            states = after
        if kind == "allowed" and "may_end" in example and function.accepts(states) != example["may_end"]:
            yield _failed(text, (*path, "may_end"), f'"{example["name"]}": the invocation may {"not " if example["may_end"] else ""}end there')
