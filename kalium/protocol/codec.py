"""The bytes of a frame: a prefix of 12 bytes and one canonical msgpack map.

Canonical means that a frame has exactly one spelling: keys rise, numbers and lengths take the shortest form, nothing is
said twice. What arrives is unpacked and packed again, and anything that comes out differently is refused; so two readers
cannot understand the same bytes differently. Only ProtocolError comes out of the decoding half, whatever goes in.

`_Shape` is the rule. The frames of app edges are most of what is said, and have a short way besides: msgspec reads them into their
classes and packs them again, and whatever is not plainly right goes the long way, which says what is wrong.
tests/protocol/test_codec.py holds the two against each other.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import msgpack  # type: ignore[import-untyped]  # no package of stubs exists for it
import msgspec

from kalium.policy.message import Reason
from kalium.protocol.frames import (
    COLUMNS,
    EVENT_VERDICT,
    FAIL_MODES,
    ORIGIN,
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
    StatusReport,
    VerdictRecord,
    kinds_of,
)
from kalium.protocol.limits import (
    FORM,
    FRAME_BYTES_MAX,
    ID_MAX,
    INT_MAX,
    INT_MIN,
    ITEMS_MAX,
    PREFIX_BYTES,
    STEP_HEX,
    TEXT_BYTES_MAX,
)

MAGIC = b"KL"
_PREFIX = struct.Struct(">2sBBII")
_HEADS = struct.Struct(">III")  # the same, with what comes before the id as one number
assert _PREFIX.size == _HEADS.size == PREFIX_BYTES
_PACKER = msgpack.Packer()  # one for all: making one costs as much as packing a frame. It keeps nothing between calls

# The closed set of what a peer can do wrong with bytes; sessions add what it can do wrong with their order.
ERROR_CODES = (
    "bad_magic",
    "bad_version",
    "unknown_type",
    "oversize",
    "bad_id",
    "truncated",
    "malformed",
    "not_canonical",
    "unknown_field",
    "missing_field",
    "wrong_type",
    "out_of_range",
)


class ProtocolError(Exception):
    """The peer broke a rule of the wire. `code` is one of ERROR_CODES; the text is for the log and holds no value of a field."""

    def __init__(self, code: str, text: str) -> None:
        assert code in ERROR_CODES, code
        super().__init__(f"{code}: {text}")
        self.code = code


def encode(frame_id: int, frame: Frame) -> bytes:
    """The bytes of one frame.

    Raises:
        ProtocolError: a value is not what its field may hold. That is a mistake of ours, found before it is sent.
    """
    if type(frame) is Answer and 0 < frame_id <= ID_MAX and frame.reason in _REASONS:
        payload = _PACK(frame)
        if len(payload) <= TEXT_BYTES_MAX:  # so no text of it is longer
            return _HEADS.pack(_ANSWER_HEAD, frame_id, len(payload)) + payload
    shape = _SHAPE_OF_CLASS[type(frame)]
    if not _is_id_of(shape.frame_type, frame_id):
        raise ProtocolError("bad_id", f"{shape.frame_type.name} with id {frame_id}")
    document = shape.document(frame)
    shape.check(document)
    payload = cast(bytes, _PACKER.pack(document))
    if len(payload) > FRAME_BYTES_MAX:
        raise ProtocolError("oversize", f"{shape.frame_type.name} of {len(payload)} bytes, at most {FRAME_BYTES_MAX}")
    return _PREFIX.pack(MAGIC, FORM, shape.frame_type, frame_id, len(payload)) + payload


def decode(data: bytes) -> tuple[int, Frame]:
    """The id and the frame in `data`, which is one whole frame and nothing more.

    Raises:
        ProtocolError: it is not.
    """
    reader = FrameReader()
    reader.feed(data)
    frame = reader.next_frame()
    if frame is None:
        raise ProtocolError("truncated", f"{len(data)} bytes are no whole frame")
    if reader.buffered:
        raise ProtocolError("malformed", f"{reader.buffered} bytes follow the frame")
    return frame


class FrameReader:
    """Cuts a stream of bytes, arriving in any split, into frames.

    A broken prefix is refused as soon as the byte that breaks it is there: no payload is waited for that will not be read.
    After a refusal the stream has no meaning left, and every further call raises the same again.
    """

    def __init__(self) -> None:
        self._buffer: bytes | bytearray = b""
        self._taken = 0  # bytes of the buffer that are handed out already
        self._error: ProtocolError | None = None

    @property
    def buffered(self) -> int:
        """Bytes that belong to frames not handed out yet."""
        return len(self._buffer) - self._taken

    def feed(self, data: bytes) -> None:
        """Take bytes in. Afterwards read `frames` to the end, or the buffer grows by what it holds."""
        left = self.buffered
        if not left:
            self._buffer = data
        elif left <= _LEFT_BYTES_MAX:
            self._buffer = bytes(self._buffer[self._taken :]) + data
        else:
            # A long frame that comes in small pieces must not be copied at each of them.
            if type(self._buffer) is not bytearray:
                self._buffer = bytearray(self._buffer)
            del self._buffer[: self._taken]
            self._buffer += data
        self._taken = 0

    def next_frame(self) -> tuple[int, Frame] | None:
        """The next whole frame with its id; None when more bytes are needed.

        Raises:
            ProtocolError: the next frame breaks a rule.
        """
        return next(self.frames(), None)

    def frames(self) -> Iterator[tuple[int, Frame]]:
        """The whole frames with their ids, in order, each once. Nothing is fed while somebody iterates.

        Raises:
            ProtocolError: the next frame breaks a rule.
        """
        if self._error is not None:
            raise self._error
        buffer, size, taken, ways = self._buffer, len(self._buffer), self._taken, _SHORT_WAYS
        try:
            while size - taken >= PREFIX_BYTES:
                head, frame_id, length = _HEADS.unpack_from(buffer, taken)
                end = taken + PREFIX_BYTES + length
                # What comes in small pieces goes the long way: its buffer is another.
                short_way = ways.get(head)
                if short_way is not None and end <= size and length <= TEXT_BYTES_MAX and type(buffer) is bytes:
                    frame = short_way(frame_id, buffer[taken + PREFIX_BYTES : end])
                    if frame is not None:
                        self._taken = taken = end
                        yield frame_id, frame
                        continue
                found = self._next_frame()
                if found is None:
                    return
                taken = self._taken
                yield found
            if size > taken:
                _check_prefix(bytes(buffer[taken:]))
        except ProtocolError as error:
            self._error = error
            raise

    def end(self) -> None:
        """The peer has said its last byte.

        Raises:
            ProtocolError: it stopped inside a frame, or had broken a rule before.
        """
        if self._error is None and self.buffered:
            self._error = ProtocolError("truncated", f"the stream ended {self.buffered} bytes into a frame")
        if self._error is not None:
            raise self._error

    def _next_frame(self) -> tuple[int, Frame] | None:
        """The frame whose prefix is there, by the long way; None when more bytes are needed."""
        magic, version, type_number, frame_id, length = _PREFIX.unpack_from(self._buffer, self._taken)
        frame_type = _TYPES.get(type_number)
        if magic != MAGIC or version != FORM or frame_type is None:
            _check_prefix(bytes(self._buffer[self._taken : self._taken + PREFIX_BYTES]))
            raise AssertionError("unreachable: the check above refuses this prefix")
        if length > FRAME_BYTES_MAX:
            raise ProtocolError("oversize", f"a payload of {length} bytes is announced, at most {FRAME_BYTES_MAX}")
        if not _is_id_of(frame_type, frame_id):
            raise ProtocolError("bad_id", f"{frame_type.name} with id {frame_id}")
        if self.buffered < PREFIX_BYTES + length:
            return None
        begin = self._taken + PREFIX_BYTES
        self._taken = begin + length
        return frame_id, _decode_payload(frame_type, bytes(self._buffer[begin : self._taken]))


def _check_prefix(prefix: bytes) -> None:
    """Raise ProtocolError when the bytes of a prefix that are here, up to all of them, cannot begin a frame."""
    if not MAGIC.startswith(prefix[:2]):
        raise ProtocolError("bad_magic", "the stream does not continue with a frame")
    if len(prefix) > 2 and prefix[2] != FORM:
        raise ProtocolError("bad_version", f"version {prefix[2]}, this is {FORM}")
    if len(prefix) > 3 and prefix[3] not in _TYPES:
        raise ProtocolError("unknown_type", f"type {prefix[3]}")


def _is_id_of(frame_type: FrameType, frame_id: int) -> bool:
    return frame_id == 0 if frame_type in WITHOUT_ID else 0 < frame_id <= ID_MAX


def _decode_payload(frame_type: FrameType, payload: bytes) -> Frame:
    try:
        document = msgpack.unpackb(payload, use_list=False, max_array_len=ITEMS_MAX, max_map_len=ITEMS_MAX)
    except ValueError as error:  # the root of all that msgpack raises for bad bytes
        raise ProtocolError("malformed", f"{frame_type.name}: {error}") from error
    if type(document) is not dict:
        raise ProtocolError("wrong_type", f"{frame_type.name}: the payload is no map")
    shapes = _SHAPES_BY_NAMES[frame_type]
    shape = shapes.get(tuple(document))
    if shape is None:
        raise _wrong_names(frame_type.name, document, list(shapes))
    shape.check(document)
    if _PACKER.pack(document) != payload:
        raise ProtocolError("not_canonical", f"{frame_type.name}: a number, a length or a key is not in its one spelling")
    return cast(Frame, shape.build(document))


def _wrong_names(where: str, document: Mapping[str, Any], allowed: list[tuple[str, ...]]) -> ProtocolError:
    """Why `document` has none of the `allowed` sequences of names."""
    names = set(document)
    if any(names == set(each) for each in allowed):
        return ProtocolError("not_canonical", f"{where}: the fields are not in the order of their names")
    if any(names < set(each) for each in allowed):
        return ProtocolError("missing_field", f"{where} lacks a field")
    return ProtocolError("unknown_field", f"{where} has a field that is not its own")


def _wrong_type(name: str) -> ProtocolError:
    return ProtocolError("wrong_type", f"field {name}")


def _out_of_range(name: str) -> ProtocolError:
    return ProtocolError("out_of_range", f"field {name}")


def _check_text(name: str, value: Any) -> None:
    if type(value) is not str:
        raise _wrong_type(name)
    if len(value) > TEXT_BYTES_MAX or not value.isascii():
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:  # a lone surrogate, which only our own side can hold
            raise _wrong_type(name) from error
        if size > TEXT_BYTES_MAX:
            raise _out_of_range(name)


_STEP = re.compile(f"[0-9a-f]{{{STEP_HEX}}}")


def _check_step(name: str, value: Any) -> None:
    if type(value) is not str:
        raise _wrong_type(name)
    if _STEP.fullmatch(value) is None:
        raise _out_of_range(name)


def _check_one_of(allowed: frozenset[str]) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if type(value) is not str:
            raise _wrong_type(name)
        if value not in allowed:
            raise _out_of_range(name)

    return check


def _check_bool(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise _wrong_type(name)


def _check_int(name: str, value: Any) -> None:
    if type(value) is not int:
        raise _wrong_type(name)
    if not INT_MIN <= value <= INT_MAX:
        raise _out_of_range(name)


def _check_span(name: str, value: Any) -> None:
    _check_int(name, value)
    if value < SPAN_ABSENT:
        raise _out_of_range(name)


def _check_bin(name: str, value: Any) -> None:
    if type(value) is not bytes:
        raise _wrong_type(name)


def _check_list_of(check_each: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if type(value) is not tuple and type(value) is not list:
            raise _wrong_type(name)
        if len(value) > ITEMS_MAX:
            raise _out_of_range(name)
        for each in value:
            check_each(name, each)

    return check


def _check_map_of(check_each: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """A map whose keys are texts and rise. A key that is there twice cannot be seen here: packing again finds it."""

    def check(name: str, value: Any) -> None:
        if type(value) is not dict:
            raise _wrong_type(name)
        if len(value) > ITEMS_MAX:
            raise _out_of_range(name)
        last = ""
        for key, each in value.items():
            _check_text(name, key)
            if key < last:
                raise ProtocolError("not_canonical", f"field {name}: the keys of a map do not rise")
            last = key
            check_each(name, each)

    return check


class _Shape:
    """One class of `frames` as the wire has it: names in order, and what each value may be."""

    def __init__(self, cls: type[Any], frame_type: FrameType | None = None) -> None:
        kinds = kinds_of(cls)
        self.cls = cls
        self.frame_type = cast(FrameType, frame_type)  # None for a map inside a frame, where nobody asks
        self.names = tuple(kinds)
        # Texts, numbers and booleans are most of what is said: they are looked at in place, and by a call only when unusual.
        self._texts = tuple(name for name, kind in kinds.items() if kind is Kind.TEXT)
        self._ints = tuple(name for name, kind in kinds.items() if kind is Kind.INT)
        self._checks = tuple((name, _CHECKS[kind]) for name, kind in kinds.items() if kind not in (Kind.TEXT, Kind.INT, *_INNER))
        self._maps = frozenset(name for name, kind in kinds.items() if kind in (Kind.NAMES, Kind.POLICIES, Kind.VERSIONS))
        self._inner = tuple((name, _INNER[kind]) for name, kind in kinds.items() if kind in _INNER)
        self._columns = COLUMNS.get(cls, ())
        self._has_origin = set(ORIGIN) < set(self.names) and frame_type in (FrameType.START, FrameType.INVOKE, FrameType.END, FrameType.FINISH)

    def document(self, value: Any) -> dict[str, Any]:
        """The fields of `value` in the order of the wire, the keys of maps too."""
        document = {name: getattr(value, name) for name in self.names}
        for name in self._maps:
            document[name] = dict(sorted(document[name].items()))
        for name, shape in self._inner:
            document[name] = shape.document(document[name])
        return document

    def check(self, document: dict[str, Any]) -> None:
        """Raise ProtocolError unless every value of `document`, which has this shape's names, may be in its field."""
        for name in self._texts:
            value = document[name]
            if type(value) is not str or len(value) > TEXT_BYTES_MAX or not value.isascii():
                _check_text(name, value)
        for name in self._ints:
            value = document[name]
            if type(value) is not int or not INT_MIN <= value <= INT_MAX:
                _check_int(name, value)
        for name, check in self._checks:
            check(name, document[name])
        for name, shape in self._inner:
            inner = document[name]
            if type(inner) is not dict:
                raise _wrong_type(name)
            if tuple(inner) != shape.names:
                raise _wrong_names(f"field {name}", inner, [shape.names])
            shape.check(inner)
        if len({len(document[name]) for name in self._columns}) > 1:
            raise _out_of_range(self._columns[0])
        if self._has_origin and not any(document[name] for name in ORIGIN):
            raise _out_of_range("instance")

    def build(self, document: dict[str, Any]) -> object:
        """The value that a checked document says."""
        if self._inner:
            document = {**document, **{name: shape.build(document[name]) for name, shape in self._inner}}
        return self.cls(**document)


_CHECKS: Mapping[Kind, Callable[[str, Any], None]] = {
    Kind.TEXT: _check_text,
    Kind.STEP: _check_step,
    Kind.OUTCOME: _check_one_of(OUTCOMES),
    Kind.FAIL_MODE: _check_one_of(FAIL_MODES),
    Kind.REASON: _check_one_of(frozenset(reason.value for reason in Reason)),
    Kind.EVENT: _check_one_of(frozenset({EVENT_VERDICT})),
    Kind.BOOL: _check_bool,
    Kind.INT: _check_int,
    Kind.BIN: _check_bin,
    Kind.TEXTS: _check_list_of(_check_text),
    Kind.INTS: _check_list_of(_check_int),
    Kind.SPANS: _check_list_of(_check_span),
    Kind.NAMES: _check_map_of(_check_list_of(_check_text)),
    Kind.POLICIES: _check_map_of(_check_bin),
    Kind.VERSIONS: _check_map_of(_check_int),
}
_INNER: dict[Kind, _Shape] = {}  # filled right below, because these maps are shapes themselves and have no inner ones
_INNER.update({Kind.RECORD: _Shape(VerdictRecord), Kind.REPORT: _Shape(StatusReport)})
assert set(_CHECKS) | set(_INNER) == set(Kind)  # a kind without a check would let anything in

_TYPES = {int(frame_type): frame_type for frame_type in FrameType}
_SHAPE_OF_CLASS: Mapping[type[Frame], _Shape] = {cls: _Shape(cls, frame_type) for frame_type, classes in SHAPES.items() for cls in classes}
_SHAPES_BY_NAMES: Mapping[FrameType, Mapping[tuple[str, ...], _Shape]] = {
    frame_type: {_SHAPE_OF_CLASS[cls].names: _SHAPE_OF_CLASS[cls] for cls in classes} for frame_type, classes in SHAPES.items()
}

# The short way

_LEFT_BYTES_MAX = 4096
_REASONS = frozenset(reason.value for reason in Reason)
_PACK = msgspec.msgpack.Encoder(order="sorted").encode
_STEP_DIGITS = "0123456789abcdef"


def _head(frame_type: FrameType) -> int:
    """What comes before the id in the prefix of a frame, as one number."""
    return int.from_bytes(MAGIC + bytes([FORM, frame_type]), "big")


_ANSWER_HEAD = _head(FrameType.ANSWER)


def _short_step(cls: type[InstanceStart | InstanceInvoke]) -> Callable[[int, bytes], Frame | None]:
    unpack = msgspec.msgpack.Decoder(cls).decode

    def read(frame_id: int, payload: bytes) -> Frame | None:
        """The frame in a payload of TEXT_BYTES_MAX at most, so that no text of it is longer; None: go the long way."""
        try:
            frame = unpack(payload)
        except (msgspec.MsgspecError, ValueError):
            return None
        step = frame.step
        if (
            frame_id
            and _PACK(frame) == payload
            and len(step) == STEP_HEX
            and not step.strip(_STEP_DIGITS)
            and frame.version <= INT_MAX
            and (frame.instance or frame.app or frame.function)
        ):
            return frame
        return None

    return read


def _short_end(cls: type[InstanceEnd | InstanceFinish]) -> Callable[[int, bytes], Frame | None]:
    unpack, has_id = msgspec.msgpack.Decoder(cls).decode, cls is InstanceFinish

    def read(frame_id: int, payload: bytes) -> Frame | None:
        """As that of a step."""
        try:
            frame = unpack(payload)
        except (msgspec.MsgspecError, ValueError):
            return None
        if _PACK(frame) == payload and frame.outcome in OUTCOMES and (frame_id > 0) is has_id and (frame.instance or frame.app or frame.function):
            return frame
        return None

    return read


def _short_answer(frame_id: int, payload: bytes) -> Frame | None:
    """As that of a step."""
    try:
        frame = _UNPACK_ANSWER(payload)
    except (msgspec.MsgspecError, ValueError):
        return None
    return frame if frame_id and frame.reason in _REASONS and _PACK(frame) == payload else None


_UNPACK_ANSWER = msgspec.msgpack.Decoder(Answer).decode
_SHORT_WAYS: Mapping[int, Callable[[int, bytes], Frame | None]] = {
    _head(FrameType.START): _short_step(InstanceStart),
    _head(FrameType.INVOKE): _short_step(InstanceInvoke),
    _head(FrameType.END): _short_end(InstanceEnd),
    _head(FrameType.FINISH): _short_end(InstanceFinish),
    _ANSWER_HEAD: _short_answer,
}
