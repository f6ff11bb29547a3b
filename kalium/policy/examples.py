"""A policy's own examples: what it has to allow and to deny, written as verdict logs write messages.

They are to a policy what tests are to a program: `kalium policy test` plays them through the executor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema

from kalium.policy import schema, source
from kalium.policy.automaton import CompiledPolicy, MessageAutomaton, Protocol
from kalium.policy.message import Kind, Message, Reason
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
                    "during": {"enum": ["startup"], "description": "what comes before the first request, in the place of an invocation"},
                    "allowed": _TEXTS,
                    "tail": _TEXTS | {"description": "what is allowed after those and the answer; the denied ones then come after it, too"},
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
    """The message that Message.text writes as `text`.

    Raises NotAMessage; texts of mysql and invoke name no peer, so they need a policy with one that fits.
    """
    kind, *words = text.split(" ")
    if kind == "invoke" and words:
        gateway = _only(text, [name for name, peer in policy.peers.items() if peer.gateway])
        callback = words[-1] if words[2:3] == ["callback"] else ""
        message = Message(Kind.INVOKE, gateway, callee=words[0], asynchronous="async" in words[1:2], callback=callback)
    elif kind in ("http", "https") and len(words) >= 3:
        method, peer, target, *marks = words
        path, _, query = target.partition("?")
        message = Message(
            Kind(kind), peer, method, path, tuple(query.split("&")) if query else (), upgrade="websocket" in marks, grpc="grpc" in marks
        )
    elif kind == "mysql" and words:
        verb, *lists = words
        peer = _only(text, [name for name, peer in policy.peers.items() if peer.protocol is Protocol.MYSQL])
        tables = _named(lists)
        message = Message(Kind.MYSQL, peer, verb=verb, read=tables.get("read", ()), write=tables.get("write", ()))
    elif kind == "smtp" and len(words) >= 2:
        envelope = _named(words[2:])
        message = Message(Kind.SMTP, words[1], sender=",".join(envelope.get("from", ())), to=envelope.get("to", ()))
    else:
        raise NotAMessage(text)
    if message.text() != text:
        raise NotAMessage(text)
    return message


def _named(words: list[str]) -> dict[str, tuple[str, ...]]:
    """Lists behind their names: read a,b write c."""
    return {name: tuple(listed.split(",")) for name, listed in zip(words[::2], words[1::2], strict=False)}


def _only(text: str, peers: list[str]) -> str:
    if len(peers) != 1:
        raise NotAMessage(text)
    return peers[0]


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
    automaton: MessageAutomaton | None = function.startup if "during" in example else function
    if automaton is None:
        yield _failed(text, (*path, "during"), f"{function.name} has no startup")
        return
    states = automaton.start
    for kind in ("allowed", "tail", "denied"):
        step = automaton.step_tail if kind != "allowed" and "tail" in example else automaton.step
        for index, line in enumerate(example.get(kind, ())):
            here: Path = (*path, kind, index)
            try:
                verdict, after = step(states, message_of(line, policy))
            except NotAMessage:
                yield _failed(text, here, f'"{line}" is not a message as logs write it')
                return
            if verdict.allowed != (kind != "denied"):
                expected = f"; expected here: {', '.join(verdict.expected) or 'nothing'}" if kind != "denied" else ""
                yield _failed(text, here, f'"{example["name"]}": {line} is {verdict.reason.value}{expected}')
                return
            if kind == "denied" and verdict.reason.value != example.get("reason", verdict.reason.value):
                yield _failed(text, here, f'"{example["name"]}": {line} is {verdict.reason.value}, not {example["reason"]}')
            states = after
    if "may_end" in example and automaton.accepts(states) != example["may_end"]:
        yield _failed(text, (*path, "may_end"), f'"{example["name"]}": the invocation may {"not " if example["may_end"] else ""}end there')
