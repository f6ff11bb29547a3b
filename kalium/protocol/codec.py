"""The bytes of a frame: a prefix of 12 bytes and one canonical msgpack map.

Canonical means that a frame has exactly one spelling: keys rise, numbers and lengths take the shortest form, nothing is
said twice. What arrives is unpacked and packed again, and anything that comes out differently is refused; so two readers
cannot understand the same bytes differently. Only ProtocolError comes out of the decoding half, whatever goes in.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgpack  # type: ignore[import-untyped]  # no package of stubs exists for it

from kalium.protocol.frames import OUTCOMES, SHAPES, WITHOUT_ID, Frame, FrameType, Kind, kinds_of
from kalium.protocol.limits import (
    APPS_MAX,
    CONTAINER_ELEMENTS_MAX,
    DEPTH_MAX,
    FRAME_BYTES_MAX,
    HOSTS_MAX,
    ID_MAX,
    INT_MAX,
    INT_MIN,
    LIST_MAX,
    PREFIX_BYTES,
    PROTOCOL,
    RECORD_TEXT_BYTES_MAX,
    STEP_HEX,
    TEXT_BYTES_MAX,
)

MAGIC = b"KL"
_PREFIX = struct.Struct(">2sBBII")
assert _PREFIX.size == PREFIX_BYTES

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
    "too_deep",
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
        ProtocolError: a value is not what its field may hold. That is a mistake of ours, and found before it is sent.
    """
    shape = type(frame)
    frame_type, kinds = _SHAPE_OF_CLASS[shape]
    if not _is_id_of(frame_type, frame_id):
        raise ProtocolError("bad_id", f"{frame_type.name} with id {frame_id}")
    document: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = getattr(frame, name)
        if isinstance(value, Mapping):
            value = _sorted(value)
        _CHECKS[kind](name, value)
        document[name] = value
    payload: bytes = msgpack.packb(document)
    if len(payload) > FRAME_BYTES_MAX:
        raise ProtocolError("oversize", f"{frame_type.name} of {len(payload)} bytes, at most {FRAME_BYTES_MAX}")
    return _PREFIX.pack(MAGIC, PROTOCOL, frame_type, frame_id, len(payload)) + payload


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
        self._buffer = bytearray()
        self._taken = 0  # bytes of the buffer that are handed out already
        self._error: ProtocolError | None = None

    @property
    def buffered(self) -> int:
        """Bytes that belong to frames not handed out yet."""
        return len(self._buffer) - self._taken

    def feed(self, data: bytes) -> None:
        """Take bytes in. Afterwards call `next_frame` until it returns None, or the buffer grows by what it holds."""
        if self._taken:
            del self._buffer[: self._taken]
            self._taken = 0
        self._buffer += data

    def next_frame(self) -> tuple[int, Frame] | None:
        """The next whole frame with its id; None when more bytes are needed.

        Raises:
            ProtocolError: the next frame breaks a rule.
        """
        if self._error is not None:
            raise self._error
        try:
            return self._next_frame()
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
        if self.buffered < PREFIX_BYTES:
            _check_partial_prefix(bytes(self._buffer[self._taken :]))
            return None
        magic, version, type_number, frame_id, length = _PREFIX.unpack_from(self._buffer, self._taken)
        if magic != MAGIC or version != PROTOCOL or type_number not in _TYPES:
            _check_partial_prefix(bytes(self._buffer[self._taken : self._taken + PREFIX_BYTES]))
        if length > FRAME_BYTES_MAX:
            raise ProtocolError("oversize", f"a payload of {length} bytes is announced, at most {FRAME_BYTES_MAX}")
        frame_type = _TYPES[type_number]
        if not _is_id_of(frame_type, frame_id):
            raise ProtocolError("bad_id", f"{frame_type.name} with id {frame_id}")
        if self.buffered < PREFIX_BYTES + length:
            return None
        begin = self._taken + PREFIX_BYTES
        self._taken = begin + length
        return frame_id, _decode_payload(frame_type, bytes(self._buffer[begin : self._taken]))


def _check_partial_prefix(prefix: bytes) -> None:
    """Raise ProtocolError when the bytes of a prefix that are here, up to all of them, cannot begin a frame."""
    if not MAGIC.startswith(prefix[:2]):
        raise ProtocolError("bad_magic", "the stream does not continue with a frame")
    if len(prefix) > 2 and prefix[2] != PROTOCOL:
        raise ProtocolError("bad_version", f"version {prefix[2]}, this is {PROTOCOL}")
    if len(prefix) > 3 and prefix[3] not in _TYPES:
        raise ProtocolError("unknown_type", f"type {prefix[3]}")


def _is_id_of(frame_type: FrameType, frame_id: int) -> bool:
    return frame_id == 0 if frame_type in WITHOUT_ID else 0 < frame_id <= ID_MAX


def _decode_payload(frame_type: FrameType, payload: bytes) -> Frame:
    try:
        document = msgpack.unpackb(payload, use_list=False, max_array_len=CONTAINER_ELEMENTS_MAX, max_map_len=CONTAINER_ELEMENTS_MAX)
    except ValueError as error:  # the root of all that msgpack raises for bad bytes
        raise ProtocolError("malformed", f"{frame_type.name}: {error}") from error
    if type(document) is not dict:
        raise ProtocolError("wrong_type", f"{frame_type.name}: the payload is no map")
    shape, kinds = _shape_for(frame_type, document)
    for name, kind in kinds.items():
        _CHECKS[kind](name, document[name])
    if msgpack.packb(document) != payload:
        raise ProtocolError("not_canonical", f"{frame_type.name}: a number, a length or a key is not in its one spelling")
    frame: Frame = shape(**document)
    return frame


def _shape_for(frame_type: FrameType, document: dict[str, Any]) -> tuple[Callable[..., Frame], dict[str, Kind]]:
    """The shape of `frame_type` that has just the fields of `document`, in this order."""
    shape = _SHAPE_OF_NAMES[frame_type].get(tuple(document))
    if shape is not None:
        return shape
    names = set(document)
    shapes = _SHAPE_OF_NAMES[frame_type]
    if any(names == set(each) for each in shapes):
        raise ProtocolError("not_canonical", f"{frame_type.name}: the fields are not in the order of their names")
    if not any(names <= set(each) for each in shapes):
        raise ProtocolError("unknown_field", f"{frame_type.name} has a field that is not its own")
    raise ProtocolError("missing_field", f"{frame_type.name} lacks a field")


def _sorted(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with the keys of every map in it rising. Keys that are no texts keep their place and fail their check."""
    keys = sorted(value) if all(type(key) is str for key in value) else list(value)
    return {key: _sorted(value[key]) if isinstance(value[key], Mapping) else value[key] for key in keys}


def _wrong_type(name: str) -> ProtocolError:
    return ProtocolError("wrong_type", f"field {name}")


def _out_of_range(name: str) -> ProtocolError:
    return ProtocolError("out_of_range", f"field {name}")


def _check_text(name: str, value: Any, bytes_max: int = TEXT_BYTES_MAX) -> None:
    if type(value) is not str:
        raise _wrong_type(name)
    if len(value) > bytes_max or not value.isascii():
        _check_long_text(name, value, bytes_max)


def _check_long_text(name: str, value: str, bytes_max: int) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:  # a lone surrogate, which only our own side can hold
        raise _wrong_type(name) from error
    if size > bytes_max:
        raise _out_of_range(name)


_STEP = re.compile(f"[0-9a-f]{{{STEP_HEX}}}")


def _check_step(name: str, value: Any) -> None:
    if type(value) is not str:
        raise _wrong_type(name)
    if _STEP.fullmatch(value) is None:
        raise _out_of_range(name)


def _check_outcome(name: str, value: Any) -> None:
    if type(value) is not str:
        raise _wrong_type(name)
    if value not in OUTCOMES:
        raise _out_of_range(name)


def _check_bool(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise _wrong_type(name)


def _check_int(name: str, value: Any) -> None:
    if type(value) is not int:
        raise _wrong_type(name)
    if not 0 <= value <= INT_MAX:
        raise _out_of_range(name)


def _check_bin(name: str, value: Any) -> None:
    if type(value) is not bytes:
        raise _wrong_type(name)


def _check_texts(name: str, value: Any) -> None:
    if type(value) is not tuple and type(value) is not list:
        raise _wrong_type(name)
    if len(value) > LIST_MAX:
        raise _out_of_range(name)
    for each in value:
        _check_text(name, each)


def _check_keys(name: str, value: Any, elements_max: int) -> None:
    """A map whose keys are texts and rise. Equal ones cannot be seen here: packing again finds them."""
    if type(value) is not dict:
        raise _wrong_type(name)
    if len(value) > elements_max:
        raise _out_of_range(name)
    last = ""
    for key in value:
        _check_text(name, key)
        if key < last:
            raise ProtocolError("not_canonical", f"field {name}: the keys of a map do not rise")
        last = key


def _check_names(name: str, value: Any) -> None:
    _check_keys(name, value, HOSTS_MAX)
    for addresses in value.values():
        _check_texts(name, addresses)


def _check_policies(name: str, value: Any) -> None:
    _check_keys(name, value, APPS_MAX)
    for policy in value.values():
        _check_bin(name, policy)


def _check_free(name: str, value: Any) -> None:
    if type(value) is not dict:
        raise _wrong_type(name)
    _check_anything(name, value, 2)  # the payload's own map is at depth 1


def _check_anything(name: str, value: Any, depth: int) -> None:
    """Any value of the wire's types; recursion ends at DEPTH_MAX."""
    kind = type(value)
    if kind is str:
        _check_text(name, value, RECORD_TEXT_BYTES_MAX)
    elif kind is int:
        if not INT_MIN <= value <= INT_MAX:
            raise _out_of_range(name)
    elif kind is dict or kind is tuple or kind is list:
        if depth > DEPTH_MAX:
            raise ProtocolError("too_deep", f"field {name}: nested deeper than {DEPTH_MAX}")
        if len(value) > CONTAINER_ELEMENTS_MAX:
            raise _out_of_range(name)
        if kind is dict:
            _check_keys(name, value, CONTAINER_ELEMENTS_MAX)
        for each in value.values() if kind is dict else value:
            _check_anything(name, each, depth + 1)
    elif kind is not bool and kind is not bytes and value is not None:
        raise _wrong_type(name)


_CHECKS: Mapping[Kind, Callable[[str, Any], None]] = {
    Kind.TEXT: _check_text,
    Kind.STEP: _check_step,
    Kind.OUTCOME: _check_outcome,
    Kind.BOOL: _check_bool,
    Kind.INT: _check_int,
    Kind.BIN: _check_bin,
    Kind.TEXTS: _check_texts,
    Kind.NAMES: _check_names,
    Kind.POLICIES: _check_policies,
    Kind.FREE: _check_free,
}
_TYPES = {int(frame_type): frame_type for frame_type in FrameType}
_SHAPE_OF_CLASS: Mapping[type[Frame], tuple[FrameType, dict[str, Kind]]] = {
    shape: (frame_type, kinds_of(shape)) for frame_type, shapes in SHAPES.items() for shape in shapes
}
_SHAPE_OF_NAMES: Mapping[FrameType, Mapping[tuple[str, ...], tuple[Callable[..., Frame], dict[str, Kind]]]] = {
    frame_type: {tuple(kinds_of(shape)): (shape, kinds_of(shape)) for shape in shapes} for frame_type, shapes in SHAPES.items()
}
