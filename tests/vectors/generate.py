"""Writes frames.json beside this file: frames that every reader has to understand, and streams that it has to refuse.

    python tests/vectors/generate.py

Good frames come from the codec, so a test holds a few of them against bytes written out by hand. Refused streams are put
together here from raw msgpack, because the codec cannot be made to write them; each breaks one rule.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgpack  # type: ignore[import-untyped]  # noqa: E402
import msgspec  # noqa: E402

from kalium.protocol import frames  # noqa: E402  # the path has to be set first
from kalium.protocol.codec import ERROR_CODES, encode  # noqa: E402
from kalium.protocol.frames import SHAPES, WITHOUT_ID, FrameType, kinds_of  # noqa: E402
from kalium.protocol.limits import FRAME_BYTES_MAX, INT_MAX, INT_MIN, ITEMS_MAX, TEXT_BYTES_MAX  # noqa: E402

FRAMES_JSON = Path(__file__).with_name("frames.json")

STEP = "00f1e2d3c4b5a697"
CALL = "0123456789abcdef0123456789abcdef"
INVOCATION = "fedcba9876543210fedcba9876543210"
TOKEN = "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf"
CONTAINER = "5d1f" * 16
ROOTS = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
ENVELOPE = b'{"format":"kalium-signed/v1"}'
ORIGIN: dict[str, Any] = {"instance": CONTAINER, "app": "hello-retail", "function": "product-photos-master"}
RECORD = frames.VerdictRecord(
    mode="enforce",
    policy_version=7,
    call=CALL,
    invocation=INVOCATION,
    kind="mysql",
    message="mysql select read photoAssignmentTable",
    peer="database",
    allowed=False,
    would_deny=False,
    reason="out_of_order",
    expected=["https GET images /image.jpg @line 14"],
    line=16,
    states=[0, 2],
    judging="",
    latency_us=12,
)


TIMES = frames.Times(
    dropped=0,
    invocation=[INVOCATION, ""],
    kind=["https", "off"],
    bytes=[1024, 517],
    record=[210, -1],
    open=[1_480, -1],
    event=[2_600, -1],
    local=[390, -1],
    controller=[-1, -1],
    total=[9_700, 0],
    reseal=[1_350, -1],
)


REPORT = frames.Report(
    audit_seq=12,
    audit_hash="7d" * 32,
    app=["hello-retail", "hello-retail"],
    function=["product-photos-master", "product-photos-3-receive"],
    mode=["enforce", "none"],
    version=[7, 0],
    count=[2, 1],
    denied={"hello-retail out_of_order": 3},
    fail_modes={"hello-retail allow": 1},
)
REPORT_OF_A_CONTROLLER = frames.StatusReport(
    {"hello-retail-strict": 1, "hello-retail": 7},
    1,
    2,
    3,
    controller="controller-0",
    controllers=["controller-0", "controller-1"],
    store="redis",
    started_ms=1_793_000_000_000,
    node=["node0"],
    app=["hello-retail"],
    function=["product-photos-master"],
    asked=["enforce"],
    mode=["enforce"],
    version=[7],
    count=[2],
    denied={"hello-retail out_of_order": 3},
    evicted={"timeout": 1},
)


def good() -> Iterator[tuple[str, int, frames.Frame]]:
    """Name, id and frame of everything that has to be understood."""
    yield "hello", 1, frames.Hello(CONTAINER, "hello-retail", "product-photos-3-receive")
    yield (
        "welcome",
        1,
        frames.Welcome(
            ok=True,
            policy=ENVELOPE,
            lease_ms=60_000,
            names={"gateway": ["10.137.0.1"], "images.kalium.test": ["10.137.0.1", "10.137.0.2"]},
            port=8080,
            sources=["10.137.0.1/32"],
            health_path="/_/health",
        ),
    )
    yield "welcome_with_roots", 1, frames.Welcome(ok=True, policy=ENVELOPE, lease_ms=1, port=8080, health_path="/", roots=ROOTS)
    yield "welcome_refused", 4_294_967_295, frames.Welcome(ok=False, reason="unregistered")
    yield "start_of_the_guard", 2, frames.Start(STEP, "", "benchmark-17", 7)
    yield "start_with_a_token", 3, frames.Start(STEP, TOKEN, "", 7)
    yield "start_of_the_agent", 2, frames.InstanceStart(STEP, TOKEN, "benchmark-17", 7, **ORIGIN)
    yield "invoke_of_the_guard", 4, frames.Invoke(STEP, CALL, INVOCATION, "product-photos-4-success", 7)
    yield "invoke_of_the_agent", 4, frames.InstanceInvoke(STEP, CALL, INVOCATION, "product-photos-4-success", 7, **ORIGIN)
    yield "answer_that_grants_a_start", 2, frames.Answer(True, "allowed", CALL, INVOCATION)
    yield "answer_that_grants_an_invoke", 4, frames.Answer(True, "allowed", CALL, INVOCATION, TOKEN)
    denial = frames.Answer(False, "edge_not_allowed", expected=("invoke product-photos-4-success @line 30",), detail="not the next one")
    yield "answer_that_denies", 4, denial
    yield "answer_that_grants_a_callback", 4, frames.Answer(True, "allowed", CALL, INVOCATION, TOKEN, callback=TOKEN[::-1])
    yield "answer_that_holds", 2, frames.Answer(True, "allowed", CALL, INVOCATION, hold=True)
    yield "invoke_by_the_queue", 4, frames.Invoke(STEP, CALL, INVOCATION, "resize", 7, asynchronous=True, callback="collect")
    yield "invoke_once_more", 4, frames.InstanceInvoke(STEP, CALL, INVOCATION, "resize", 7, **ORIGIN, retry=True)
    yield "end_of_the_guard", 0, frames.End(CALL, INVOCATION, "answered")
    yield "end_by_close", 0, frames.End(CALL, INVOCATION, "closed")
    yield "end_of_the_agent", 0, frames.InstanceEnd(CALL, INVOCATION, "timeout", **ORIGIN)
    yield "finish_of_the_guard", 8, frames.Finish(CALL, INVOCATION, "answered")
    yield "finish_of_the_agent", 8, frames.InstanceFinish(CALL, INVOCATION, "answered", **ORIGIN)
    yield "mode", 0, frames.Mode("enforce", 7)
    yield "verdict", 0, frames.Verdict(RECORD)
    yield "verdict_under_a_fail_mode", 0, frames.Verdict(replace(RECORD, allowed=True, reason="allowed", fail_mode="last_known"))
    yield "verdict_of_many_states", 0, frames.Verdict(replace(RECORD, states=list(range(300)), expected=[]))
    yield "policy", 0, frames.Policy("hello-retail", ENVELOPE)
    yield "lease", 0, frames.Lease(60_000)
    yield "names", 0, frames.Names({"database": ["10.137.0.1"], "gateway": []})
    yield "names_of_nobody", 0, frames.Names({})
    yield "times", 0, TIMES
    yield "times_of_nothing_but_losses", 0, frames.Times(dropped=3)
    yield "agent_hello", 1, frames.AgentHello("node0", STEP)
    yield "controller_welcome", 1, frames.ControllerWelcome(True, lease_ms=60_000, policies={"b": ENVELOPE, "a": ENVELOPE})
    yield "controller_welcome_refused", 1, frames.ControllerWelcome(False, "unsupported_protocol")
    yield "register", 5, frames.Register(CONTAINER, "hello-retail", "product-photos-master", "localhost/kalium/master:1")
    yield "unregister", 0, frames.Unregister(CONTAINER)
    yield "status", 6, frames.Status()
    yield "status_answer", 6, frames.StatusAnswer(REPORT_OF_A_CONTROLLER)
    yield "status_answer_of_nothing", 6, frames.StatusAnswer(frames.StatusReport({}, 0, 0, 0))
    yield "ping", 7, frames.Ping()
    yield "pong", 7, frames.Pong()
    yield "report", 0, REPORT
    yield "report_of_nothing", 0, frames.Report(0, "")
    yield "agent_hello_of_many_versions", 1, frames.AgentHello("node0", STEP, protos=list(range(300)))
    for number in (0, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, INT_MAX):
        yield f"int_{number}", 0, frames.Lease(number)
    for number in (-1, -32, -33, -128, -129, -32_768, -32_769, -(2**31), -(2**31) - 1, INT_MIN):
        yield f"int_minus_{-number}", 0, frames.Lease(number)
    for size in (31, 32, 255, 256, TEXT_BYTES_MAX):
        yield f"text_of_{size}_bytes", 0, frames.Unregister("x" * size)
    for size in (0, 255, 256, 65_536):
        yield f"bin_of_{size}_bytes", 0, frames.Policy("a", b"\x5a" * size)
    for size in (15, 16, ITEMS_MAX):
        yield f"list_of_{size}", 9, frames.Answer(False, "edge_not_allowed", expected=("x",) * size)
    yield "text_beyond_ascii", 0, frames.Unregister("Grüße, 世界 🔒")
    yield "text_of_512_bytes_beyond_ascii", 0, frames.Unregister("é" * (TEXT_BYTES_MAX // 2))
    yield "keys_rise_by_their_bytes", 0, frames.Names({"a": [], "Z": [], "é": [], "aa": [], "": []})


def text(value: str) -> bytes:
    """A str of at most 31 bytes in its shortest form."""
    data = value.encode()
    assert len(data) <= 31
    return bytes([0xA0 | len(data)]) + data


def raw_map(*pairs: tuple[bytes, bytes]) -> bytes:
    """A map of at most 15 pairs, packed as they stand."""
    assert len(pairs) <= 15
    return bytes([0x80 | len(pairs)]) + b"".join(key + value for key, value in pairs)


def framed(frame_type: int, frame_id: int, payload: bytes, *, magic: bytes = b"KL", version: int = 1, length: int | None = None) -> bytes:
    """Any payload behind any prefix."""
    return struct.pack(">2sBBII", magic, version, frame_type, frame_id, len(payload) if length is None else length) + payload


def lease(value: bytes, key: bytes = b"\xa8lease_ms") -> bytes:
    """A LEASE whose number is packed as it stands."""
    return framed(FrameType.LEASE, 0, raw_map((key, value)))


def names(value: bytes) -> bytes:
    """A NAMES whose map is packed as it stands."""
    return framed(FrameType.NAMES, 0, raw_map((text("names"), value)))


def status_answer(**changed: bytes) -> bytes:
    """A STATUS_ANSWER whose report has the fields `changed` or added."""
    return framed(FrameType.STATUS_ANSWER, 6, b"\x81" + text("status") + changed_map(frames.StatusAnswer(REPORT_OF_A_CONTROLLER), "status", changed))


def verdict(**changed: bytes) -> bytes:
    """A VERDICT whose record has the fields `changed` or added."""
    return framed(FrameType.VERDICT, 0, b"\x81" + text("record") + changed_map(frames.Verdict(RECORD), "record", changed))


def changed_map(frame: frames.Frame, name: str, changed: Mapping[str, bytes]) -> bytes:
    """The map of 16 fields or more that is the only field of `frame`, with raw values in the place of some or added to it."""
    frame_id = 0 if type_of(frame) in WITHOUT_ID else 1
    inner = {**msgpack.unpackb(encode(frame_id, frame)[12:])[name], **changed}
    packed = b"".join(msgpack.packb(key) + (value if key in changed else msgpack.packb(value)) for key, value in sorted(inner.items()))
    return b"\xde" + struct.pack(">H", len(inner)) + packed


def times(**changed: bytes) -> bytes:
    """A TIMES of one message that has the lists `changed`."""
    one = dict.fromkeys(("bytes", "controller", "event", "local", "open", "record", "reseal", "total"), b"\x91\x01")
    lists = {**one, "invocation": b"\x91\xa0", "kind": b"\x91" + text("http"), "dropped": b"\x00", **changed}
    return framed(FrameType.TIMES, 0, raw_map(*((text(name), value) for name, value in sorted(lists.items()))))


def refused() -> Iterator[tuple[str, str, bytes]]:
    """Name, error code and bytes of everything that has to be refused. The bytes are the whole stream: no more follows."""
    good_lease = encode(0, frames.Lease(60_000))
    app, policy = (text("app"), text("a")), (text("policy"), b"\xc4\x01x")
    bare_start = {"label": text(""), "step": text(STEP), "token": text(""), "version": b"\x07"}

    def start(frame_id: int = 2, **changed: bytes) -> bytes:
        return framed(FrameType.START, frame_id, raw_map(*((text(name), value) for name, value in sorted({**bare_start, **changed}.items()))))

    yield "nothing_but_a_byte", "truncated", b"K"
    yield "prefix_of_11_bytes", "truncated", good_lease[:11]
    yield "prefix_without_payload", "truncated", good_lease[:12]
    yield "payload_without_its_last_byte", "truncated", good_lease[:-1]
    yield "second_frame_cut_short", "truncated", good_lease + good_lease[:5]
    yield "wrong_magic", "bad_magic", framed(FrameType.LEASE, 0, good_lease[12:], magic=b"KM")
    yield "wrong_magic_in_the_first_byte", "bad_magic", b"GET / HTTP/1.1\r\n\r\n"
    yield "version_0", "bad_version", framed(FrameType.LEASE, 0, good_lease[12:], version=0)
    yield "version_2", "bad_version", framed(FrameType.LEASE, 0, good_lease[12:], version=2)
    yield "type_0", "unknown_type", framed(0, 0, b"\x80")
    yield "type_14", "unknown_type", framed(14, 0, b"\x80")
    yield "type_255", "unknown_type", framed(255, 0, b"\x80")
    yield "one_byte_too_large", "oversize", framed(FrameType.LEASE, 0, b"", length=FRAME_BYTES_MAX + 1)
    yield "as_large_as_the_field", "oversize", framed(FrameType.LEASE, 0, b"", length=2**32 - 1)
    yield "question_with_id_0", "bad_id", start(frame_id=0)
    yield "answer_with_id_0", "bad_id", framed(FrameType.STATUS_ANSWER, 0, raw_map((text("status"), b"\x80")))
    yield "lease_with_an_id", "bad_id", framed(FrameType.LEASE, 1, good_lease[12:])
    yield "empty_payload", "malformed", framed(FrameType.LEASE, 0, b"")
    yield "byte_that_msgpack_never_uses", "malformed", lease(b"\xc1")
    yield "map_that_announces_more", "malformed", framed(FrameType.LEASE, 0, b"\x82\xa8lease_ms\x01")
    yield "text_that_announces_more", "malformed", framed(FrameType.UNREGISTER, 0, b"\x81\xa8instance\xa5abc")
    yield "text_that_is_not_utf_8", "malformed", framed(FrameType.UNREGISTER, 0, b"\x81\xa8instance\xa2\xc3\x28")
    yield "text_with_a_surrogate", "malformed", framed(FrameType.UNREGISTER, 0, b"\x81\xa8instance\xa3\xed\xa0\x80")
    yield "key_that_is_a_number", "malformed", lease(b"\x01", key=b"\x01")
    yield "trailing_byte", "malformed", framed(FrameType.LEASE, 0, good_lease[12:] + b"\x00")
    yield "second_map_in_one_payload", "malformed", framed(FrameType.STATUS, 1, b"\x80\x80")
    yield "payload_that_is_a_list", "wrong_type", framed(FrameType.STATUS, 1, b"\x90")
    yield "payload_that_is_nil", "wrong_type", framed(FrameType.STATUS, 1, b"\xc0")
    yield "keys_that_fall", "not_canonical", framed(FrameType.POLICY, 0, raw_map(policy, app))
    yield "keys_that_fall_in_an_inner_map", "not_canonical", names(raw_map((text("b"), b"\x90"), (text("a"), b"\x90")))
    yield "key_twice", "not_canonical", framed(FrameType.POLICY, 0, raw_map(app, app, policy))
    yield "key_twice_in_an_inner_map", "not_canonical", names(raw_map((text("a"), b"\x90"), (text("a"), b"\x90")))
    yield "int_as_uint8_that_is_a_fixint", "not_canonical", lease(b"\xcc\x7f")
    yield "int_as_uint16_that_is_a_uint8", "not_canonical", lease(b"\xcd\x00\xff")
    yield "int_as_uint32_that_is_a_uint16", "not_canonical", lease(b"\xce\x00\x00\xff\xff")
    yield "int_as_uint64_that_is_a_uint32", "not_canonical", lease(b"\xcf\x00\x00\x00\x00\xff\xff\xff\xff")
    yield "int_as_int16_that_is_positive", "not_canonical", lease(b"\xd1\x01\x00")
    yield "int_as_int8_that_is_a_negative_fixint", "not_canonical", lease(b"\xd0\xff")
    yield "text_as_str8_that_is_a_fixstr", "not_canonical", framed(FrameType.UNREGISTER, 0, b"\x81\xa8instance\xd9\x01x")
    yield "key_as_str8_that_is_a_fixstr", "not_canonical", lease(b"\x01", key=b"\xd9\x08lease_ms")
    yield "bin_as_bin16_that_is_a_bin8", "not_canonical", framed(FrameType.POLICY, 0, raw_map(app, (text("policy"), b"\xc5\x00\x01x")))
    yield "map_as_map16_that_is_a_fixmap", "not_canonical", framed(FrameType.LEASE, 0, b"\xde\x00\x01\xa8lease_ms\x01")
    yield "list_as_array16_that_is_a_fixarray", "not_canonical", names(raw_map((text("a"), b"\xdc\x00\x00")))
    yield "nested_deeper_than_4", "wrong_type", names(raw_map((text("a"), b"\x91\x91\x91\xa0")))
    yield "nested_in_a_record", "wrong_type", verdict(states=b"\x91\x91\x01")
    yield "nested_deeper_than_any_stack", "malformed", names(b"\x91" * 5_000 + b"\xc0")
    yield "unknown_field", "unknown_field", framed(FrameType.LEASE, 0, raw_map((b"\xa8lease_ms", b"\x01"), (text("more"), b"\x01")))
    yield "unknown_field_alone", "unknown_field", framed(FrameType.STATUS, 1, raw_map((text("all"), b"\xc3")))
    yield "field_in_another_case", "unknown_field", lease(b"\x01", key=b"\xa8Lease_ms")
    yield "missing_field", "missing_field", framed(FrameType.POLICY, 0, raw_map(app))
    yield "no_field_at_all", "missing_field", framed(FrameType.LEASE, 0, b"\x80")
    yield "start_with_half_an_origin", "missing_field", start(app=text("a"), function=text("f"))
    yield "text_that_is_a_bin", "wrong_type", framed(FrameType.UNREGISTER, 0, b"\x81\xa8instance\xc4\x01x")
    yield "text_that_is_nil", "wrong_type", start(token=b"\xc0")
    yield "int_that_is_a_bool", "wrong_type", lease(b"\xc3")
    yield "int_that_is_a_float", "wrong_type", lease(b"\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00")
    yield "int_that_is_a_short_float", "wrong_type", lease(b"\xca\x3f\x80\x00\x00")
    yield "int_that_is_an_extension", "wrong_type", lease(b"\xd4\x01\x00")
    yield "int_that_is_a_timestamp", "wrong_type", lease(b"\xd6\xff\x00\x00\x00\x00")
    yield "record_that_is_a_list", "wrong_type", framed(FrameType.VERDICT, 0, raw_map((text("record"), b"\x90")))
    yield "names_to_a_text", "wrong_type", names(raw_map((text("a"), text("10.0.0.1"))))
    yield "unknown_field_in_a_record", "unknown_field", verdict(sql=text("SELECT 1"))
    yield "unknown_field_in_a_report", "unknown_field", status_answer(tokens=b"\x01")
    yield "reason_of_its_own", "out_of_range", verdict(reason=text("because"))
    yield "event_of_its_own", "out_of_range", verdict(event=text("answer"))
    yield (
        "no_reason",
        "out_of_range",
        framed(FrameType.ANSWER, 2, encode(2, frames.Answer(True, "allowed"))[12:].replace(b"\xa7allowed\xa5", b"\xa0\xa5")),
    )
    yield "start_with_an_empty_origin", "out_of_range", start(app=text(""), function=text(""), instance=text(""))
    yield "int_beyond_63_bits", "out_of_range", lease(b"\xcf\x80\x00\x00\x00\x00\x00\x00\x00")
    yield "int_beyond_63_bits_in_a_report", "out_of_range", status_answer(calls=b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff")
    yield "text_of_513_bytes", "out_of_range", framed(FrameType.UNREGISTER, 0, b"\x81\xa8instance\xda\x02\x01" + b"x" * 513)
    yield (
        "text_of_257_characters_in_514_bytes",
        "out_of_range",
        framed(FrameType.UNREGISTER, 0, b"\x81\xa8instance\xda\x02\x02" + "é".encode() * 257),
    )
    yield "list_of_4097", "malformed", names(raw_map((text("a"), b"\xdc\x10\x01" + b"\xa0" * (ITEMS_MAX + 1))))
    yield "span_below_minus_1", "out_of_range", times(open=b"\x91\xfe")
    yield "times_of_two_lengths", "out_of_range", times(total=b"\x90")
    yield "times_of_two_kinds", "out_of_range", times(kind=b"\x92" + text("a") + text("b"))
    yield "times_with_an_id", "bad_id", framed(FrameType.TIMES, 1, times()[12:])
    yield "span_that_is_a_text", "wrong_type", times(local=b"\x91" + text("1"))
    yield "fail_mode_of_its_own", "out_of_range", verdict(fail_mode=text("maybe"))
    yield "report_with_columns_of_two_lengths", "out_of_range", status_answer(count=b"\x90")
    yield "run_of_15_digits", "out_of_range", framed(FrameType.AGENT_HELLO, 1, encode(1, frames.AgentHello("n", STEP))[12:-17] + text(STEP[:15]))
    yield "ping_with_a_field", "unknown_field", framed(FrameType.PING, 1, raw_map((text("now"), b"\x01")))
    yield "finish_without_an_id", "bad_id", framed(FrameType.FINISH, 0, encode(1, frames.Finish("c", "i", "closed"))[12:])
    yield "step_in_upper_case", "out_of_range", start(step=text(STEP.upper()))
    yield "step_of_15_digits", "out_of_range", start(step=text(STEP[:15]))
    yield "outcome_of_its_own", "out_of_range", framed(
        FrameType.END, 0, raw_map((text("call"), text("c")), (text("invocation"), text("i")), (text("outcome"), text("failed")))
    )  # fmt: skip


def as_json(value: Any) -> Any:
    """JSON for a value of the wire; bytes, which JSON lacks, are {"$bin": base64}."""
    if isinstance(value, bytes):
        return {"$bin": base64.b64encode(value).decode()}
    if is_dataclass(value) or isinstance(value, msgspec.Struct):
        return {name: as_json(getattr(value, name)) for name in kinds_of(cast(Any, type(value)))}
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    return value


def type_of(frame: frames.Frame) -> FrameType:
    """The type whose shape `frame` is."""
    return next(frame_type for frame_type, shapes in SHAPES.items() if type(frame) in shapes)


def vectors() -> list[dict[str, Any]]:
    """The contents of frames.json."""
    understood: list[dict[str, Any]] = [
        {
            "name": name,
            "hex": encode(frame_id, frame).hex(),
            "type": int(type_of(frame)),
            "id": frame_id,
            "fields": as_json(frame),
        }
        for name, frame_id, frame in good()
    ]
    broken: list[dict[str, Any]] = [{"name": name, "hex": data.hex(), "error": error} for name, error, data in refused()]
    names = [vector["name"] for vector in understood + broken]
    assert len(set(names)) == len(names)
    assert {vector["error"] for vector in broken} == set(ERROR_CODES)
    return understood + broken


def rendered() -> str:
    """The text of frames.json: one vector a line, so that a change of one is a change of one line."""
    lines = ",\n".join(json.dumps(vector, ensure_ascii=True) for vector in vectors())
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    import generate_policies

    FRAMES_JSON.write_text(rendered(), encoding="utf-8")
    generate_policies.write()
