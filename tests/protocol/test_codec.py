"""Streams in pieces, and bytes that nobody should send: whatever goes in, a frame or ProtocolError comes out."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]  # no package of stubs exists for it
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalium.policy.message import Reason
from kalium.protocol import codec, limits
from kalium.protocol.codec import FrameReader, ProtocolError, decode, encode
from kalium.protocol.frames import (
    COLUMNS,
    EVENT_VERDICT,
    FAIL_MODES,
    OUTCOMES,
    SHAPES,
    SPAN_ABSENT,
    WITHOUT_ID,
    Answer,
    Frame,
    FrameType,
    InstanceEnd,
    InstanceFinish,
    InstanceInvoke,
    InstanceStart,
    Kind,
    Lease,
    Names,
    Policy,
    Status,
    StatusReport,
    Unregister,
    VerdictRecord,
    kinds_of,
)

# Every length of UTF-8 and the ends of ASCII. Not every character: building that strategy takes seconds on a busy machine.
TEXTS = st.text("\x00\x7faZ~é世🔒", max_size=limits.TEXT_BYTES_MAX // 4)
INTS = st.integers(limits.INT_MIN, limits.INT_MAX)
LISTS = st.lists(TEXTS, max_size=5).map(tuple)
VALUES: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.TEXT: TEXTS,
    Kind.STEP: st.text("0123456789abcdef", min_size=limits.STEP_HEX, max_size=limits.STEP_HEX),
    Kind.OUTCOME: st.sampled_from(sorted(OUTCOMES)),
    Kind.FAIL_MODE: st.sampled_from(sorted(FAIL_MODES)),
    Kind.REASON: st.sampled_from([reason.value for reason in Reason]),
    Kind.EVENT: st.just(EVENT_VERDICT),
    Kind.BOOL: st.booleans(),
    Kind.INT: INTS,
    Kind.BIN: st.binary(max_size=300),
    Kind.TEXTS: LISTS,
    Kind.INTS: st.lists(INTS, max_size=5).map(tuple),
    Kind.SPANS: st.lists(st.integers(SPAN_ABSENT, limits.INT_MAX), max_size=5).map(tuple),
    Kind.NAMES: st.dictionaries(TEXTS, LISTS, max_size=5),
    Kind.POLICIES: st.dictionaries(TEXTS, st.binary(max_size=50), max_size=5),
    Kind.VERSIONS: st.dictionaries(TEXTS, INTS, max_size=5),
}


def as_a_table(value: Any) -> Any:
    """`value` with the columns of its table cut to one length."""
    columns = {name: getattr(value, name) for name in COLUMNS[type(value)]}
    shortest = min(map(len, columns.values()))
    return dataclasses.replace(value, **{name: each[:shortest] for name, each in columns.items()})


def shape(cls: type[Any]) -> st.SearchStrategy[Any]:
    built = st.builds(cls, **{name: VALUES[kind] for name, kind in kinds_of(cls).items()})
    return built.map(as_a_table) if cls in COLUMNS else built


VALUES[Kind.RECORD] = shape(VerdictRecord)
VALUES[Kind.REPORT] = shape(StatusReport)


@st.composite
def frames_with_ids(draw: st.DrawFn) -> tuple[int, Frame]:
    """Any frame that may be said, with an id that it may have."""
    frame_type = draw(st.sampled_from(FrameType))
    frame = draw(shape(draw(st.sampled_from(SHAPES[frame_type]))))
    if getattr(frame, "instance", "there") == "" and hasattr(frame, "function"):
        change = msgspec.structs.replace if isinstance(frame, msgspec.Struct) else dataclasses.replace
        frame = change(frame, instance="c")  # an origin may not be empty
    return 0 if frame_type in WITHOUT_ID else draw(st.integers(1, limits.ID_MAX)), frame


def read(data: bytes, cuts: list[int]) -> tuple[list[tuple[int, Frame]], str]:
    """What a reader makes of `data` cut at `cuts`: the frames, and the code of the refusal or ""."""
    reader = FrameReader()
    frames = []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    try:
        for begin, end in itertools.pairwise(edges):
            reader.feed(data[begin:end])
            while (frame := reader.next_frame()) is not None:
                frames.append(frame)
        reader.end()
    except ProtocolError as refusal:
        return frames, refusal.code
    return frames, ""


@given(st.lists(frames_with_ids(), max_size=4), st.lists(st.integers(0, 10_000), max_size=8))
def test_frames_come_out_as_they_went_in_whatever_the_split(said: list[tuple[int, Frame]], cuts: list[int]) -> None:
    stream = b"".join(encode(*each) for each in said)

    assert read(stream, cuts) == (said, "")


def test_a_stream_may_arrive_byte_by_byte() -> None:
    said: list[tuple[int, Frame]] = [(1, Status()), (0, Lease(1)), (2, Answer(False, "bad_token"))]
    stream = b"".join(encode(*each) for each in said)

    assert read(stream, list(range(len(stream)))) == (said, "")


@given(st.binary(max_size=200))
def test_no_bytes_make_a_reader_raise_anything_else(data: bytes) -> None:
    read(data, [])


@given(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 21, 22, 23, 24, 25]), st.binary(max_size=300))
def test_no_payload_makes_a_reader_raise_anything_else(frame_type: int, payload: bytes) -> None:
    """Behind a good prefix the bytes reach msgpack."""
    frame_id = 0 if frame_type in WITHOUT_ID else 1
    read(b"KL\x01" + bytes([frame_type]) + frame_id.to_bytes(4, "big") + len(payload).to_bytes(4, "big") + payload, [])


@given(frames_with_ids(), st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_gives_another_frame_or_a_refusal_and_never_the_same(said: tuple[int, Frame], at: int, change: int) -> None:
    """One spelling a frame: bytes that differ cannot mean the same."""
    data = bytearray(encode(*said))
    data[at % len(data)] ^= change

    frames, refusal = read(bytes(data), [])

    assert refusal or frames != [said]


@given(frames_with_ids(), st.integers(0, 10_000))
def test_a_frame_cut_short_is_waited_for_and_its_end_is_a_refusal(said: tuple[int, Frame], at: int) -> None:
    data = encode(*said)

    frames, refusal = read(data[: 1 + at % (len(data) - 1)], [])

    assert (frames, refusal) == ([], "truncated")


@given(frames_with_ids(), st.integers(0, 10_000), st.binary(min_size=1, max_size=20))
def test_junk_in_the_middle_makes_a_reader_raise_nothing_else(said: tuple[int, Frame], at: int, junk: bytes) -> None:
    data = encode(*said)

    read(data[: at % len(data)] + junk, [])


# The short way against the long one

SHORT = [InstanceStart, InstanceInvoke, InstanceEnd, InstanceFinish, Answer]


@st.composite
def hot_frames(draw: st.DrawFn) -> tuple[int, Frame]:
    """A frame that has a short way, with texts as they are in life and as they are not."""
    cls: type[Any] = draw(st.sampled_from(SHORT))
    texts = st.sampled_from(["", "shop", "f" * 32, "é" * 40, "x" * 200, "世"]) | TEXTS
    values = {name: texts if kind is Kind.TEXT else VALUES[kind] for name, kind in kinds_of(cls).items()}
    frame = draw(st.builds(cls, **values))
    if getattr(frame, "instance", "there") == "":
        frame = msgspec.structs.replace(frame, instance="c")
    return 0 if cls is InstanceEnd else draw(st.integers(1, limits.ID_MAX)), frame


def by_the_long_way(data: bytes) -> tuple[list[tuple[int, Frame]], str]:
    """What a reader without short ways makes of a stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_SHORT_WAYS", {})
        return read(data, [])


@given(hot_frames(), st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 255)), max_size=3))
def test_the_short_way_is_the_long_way_for_frames_and_for_what_becomes_of_them(said: tuple[int, Frame], changes: list[tuple[int, int]]) -> None:
    """Whole frames, and frames of which some bytes were changed: the same frames and the same refusal."""
    data = bytearray(encode(*said))
    for at, change in changes:
        data[at % len(data)] ^= change

    assert read(bytes(data), []) == by_the_long_way(bytes(data))


def packed_with(document: dict[str, Any], value: Any, *names: str) -> bytes:
    """`document` with `value` in the fields `names`, of which it may lack some."""
    packed: bytes = msgpack.packb({name: value if name in names else each for name, each in document.items()})
    return packed


Spelling = Callable[[dict[str, Any]], bytes]
OTHER_SPELLINGS: list[Spelling] = [
    lambda document: msgpack.packb(dict(reversed(document.items()))),
    lambda document: msgpack.packb({**document, "zz": 1}),
    lambda document: msgpack.packb(dict(list(document.items())[1:])),
    lambda document: msgpack.packb(document) + b"\xc0",
    lambda document: b"\xde\x00" + bytes([len(document)]) + msgpack.packb(document)[1:],
    lambda document: msgpack.packb({name: value.encode() if isinstance(value, str) else value for name, value in document.items()}),
    lambda document: msgpack.packb({name: float(value) if type(value) is int else value for name, value in document.items()}),
    lambda document: msgpack.packb({name: int(value) if isinstance(value, bool) else value for name, value in document.items()}),
    lambda document: msgpack.packb({name: 2**63 if type(value) is int else value for name, value in document.items()}),
    lambda document: msgpack.packb({name: None if value == "" else value for name, value in document.items()}),
    lambda document: packed_with(document, "0" * 15 + "A", "step"),
    lambda document: packed_with(document, "x" * 513, "label", "call", "detail"),
    lambda document: packed_with(document, "é" * 257, "label", "call", "detail"),
    lambda document: packed_with(document, "because", "reason", "outcome"),
    lambda document: packed_with(document, "", "instance", "app", "function"),
    lambda document: msgpack.packb(list(document.values())),
    lambda document: msgpack.packb(document).replace(b"\x01", b"\xcc\x01"),
    lambda document: msgpack.packb(document).replace(b"\xa7allowed", b"\xd9\x07allowed").replace(b"\xa3app", b"\xd9\x03app"),
    lambda document: msgpack.packb(document).replace(b"\xa3app", b"\xa3app\xa1x\xa3app"),
    lambda document: msgpack.packb(document).replace(b"shop", b"\xed\xa0\x80x"),
]


@pytest.mark.parametrize("spelling", OTHER_SPELLINGS, ids=range(len(OTHER_SPELLINGS)))
@pytest.mark.parametrize("cls", SHORT)
@pytest.mark.parametrize("frame_id", [0, 1])
def test_another_spelling_is_refused_by_the_short_way_as_by_the_long_one(
    cls: type[Any], spelling: Callable[[dict[str, Any]], bytes], frame_id: int
) -> None:
    plain: dict[Kind, Any] = {Kind.TEXT: "shop", Kind.STEP: "0" * 16, Kind.OUTCOME: "closed", Kind.REASON: "allowed", Kind.TEXTS: ["x"], Kind.INT: 1}
    document = {name: plain.get(kind, False) for name, kind in kinds_of(cls).items()}
    frame_type = next(each for each, shapes in SHAPES.items() if cls in shapes)

    for payload in (msgpack.packb(document), spelling(document)):
        data = b"KL\x01" + bytes([frame_type]) + frame_id.to_bytes(4, "big") + len(payload).to_bytes(4, "big") + payload
        assert read(data, []) == by_the_long_way(data)


@given(st.sampled_from([3, 4, 5, 6, 12]), st.integers(0, 2), st.binary(max_size=400))
def test_the_short_way_is_the_long_way_for_any_bytes(frame_type: int, frame_id: int, payload: bytes) -> None:
    data = b"KL\x01" + bytes([frame_type]) + frame_id.to_bytes(4, "big") + len(payload).to_bytes(4, "big") + payload

    assert read(data, []) == by_the_long_way(data)


def test_a_short_frame_behind_a_long_one_in_pieces_is_read() -> None:
    """The buffer of what comes in pieces is another than that of what comes whole."""
    short: list[tuple[int, Frame]] = [(7, Answer(True, "allowed")), (8, Answer(False, "bad_token"))]
    said: list[tuple[int, Frame]] = [*short, (0, Policy("a", b"x" * 20_000)), *short]
    stream = b"".join(encode(*each) for each in said)

    for cut in (200, 6_000, 15_000, len(stream) - 20, len(stream) - 1):
        assert read(stream, [1, cut]) == read(stream, [cut]) == (said, "")


def test_a_wrong_first_byte_is_refused_without_waiting_for_more() -> None:
    """A browser that strays onto the port is told so by its first byte, not after a timeout."""
    reader = FrameReader()
    reader.feed(b"G")

    with pytest.raises(ProtocolError, match="bad_magic"):
        reader.next_frame()


def test_an_announced_payload_beyond_the_bound_is_refused_before_a_byte_of_it() -> None:
    reader = FrameReader()
    reader.feed(b"KL\x01\x09\x00\x00\x00\x00\x00\x10\x00\x01")

    with pytest.raises(ProtocolError, match="oversize"):
        reader.next_frame()


def test_the_largest_payload_is_read_and_one_byte_more_is_not_written() -> None:
    around = len(encode(0, Policy("a", b"x" * 70_000))) - 70_000 - limits.PREFIX_BYTES
    largest = Policy("a", b"x" * (limits.FRAME_BYTES_MAX - around))

    assert decode(encode(0, largest)) == (0, largest)
    with pytest.raises(ProtocolError, match="oversize"):
        encode(0, Policy("a", largest.policy + b"x"))


def test_a_refused_stream_stays_refused() -> None:
    """Nothing behind a broken frame has a meaning: the reader does not look for the next one."""
    reader = FrameReader()
    reader.feed(b"KM")
    with pytest.raises(ProtocolError) as first:
        reader.next_frame()

    reader.feed(encode(0, Lease(1)))

    with pytest.raises(ProtocolError) as second:
        reader.next_frame()
    assert second.value is first.value
    with pytest.raises(ProtocolError):
        reader.end()


@pytest.mark.parametrize(
    ("frame_id", "frame", "code"),
    [
        (1, Lease(1), "bad_id"),
        (0, Status(), "bad_id"),
        (2**32, Status(), "bad_id"),
        (0, Lease("1"), "wrong_type"),  # type: ignore[arg-type]
        (0, Lease(2**63), "out_of_range"),
        (0, Unregister("x" * 513), "out_of_range"),
        (0, Unregister("\ud800"), "wrong_type"),
        (1, Answer(False, "because"), "out_of_range"),
        (1, Answer(False, "bad_token", detail="x" * 513), "out_of_range"),
        (1, Answer(False, ""), "out_of_range"),
        (1, InstanceStart("xyz", "", "", 1, "c", "a", "f"), "out_of_range"),
        (1, InstanceStart("0" * 16, "", "", 1, "", "", ""), "out_of_range"),
        (0, Names({"a": ["x"] * (limits.ITEMS_MAX + 1)}), "out_of_range"),
        (0, Names({str(number): [] for number in range(limits.ITEMS_MAX + 1)}), "out_of_range"),
        (0, Names({"a": "10.0.0.1"}), "wrong_type"),
    ],
)
def test_our_own_mistake_is_found_before_it_is_sent(frame_id: int, frame: Frame, code: str) -> None:
    with pytest.raises(ProtocolError) as refusal:
        encode(frame_id, frame)

    assert refusal.value.code == code
