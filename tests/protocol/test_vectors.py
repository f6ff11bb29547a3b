"""tests/vectors/frames.json is what both languages read: here it is held against the codec, and a little by hand."""

import base64
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kalium.protocol.codec import FrameReader, ProtocolError, decode, encode
from kalium.protocol.frames import SHAPES, Frame, FrameType, Lease, Register, StatusReport, VerdictRecord, kinds_of

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
FRAMES: list[dict[str, Any]] = json.loads((VECTORS / "frames.json").read_text(encoding="utf-8"))
GOOD = [vector for vector in FRAMES if "error" not in vector]
REFUSED = [vector for vector in FRAMES if "error" in vector]


def from_json(value: Any) -> Any:
    """The wire's value of a vector's JSON, lists as the codec hands them out."""
    if isinstance(value, dict):
        return base64.b64decode(value["$bin"]) if set(value) == {"$bin"} else {key: from_json(each) for key, each in value.items()}
    return tuple(from_json(each) for each in value) if isinstance(value, list) else value


def frame_of(vector: dict[str, Any]) -> Frame:
    """The frame that a vector describes by its fields."""
    values = from_json(vector["fields"])
    if isinstance(values.get("record"), dict):
        values["record"] = VerdictRecord(**values["record"])
    if "status" in values:
        values["status"] = StatusReport(**values["status"])
    shapes = SHAPES[FrameType(vector["type"])]
    cls: Callable[..., Frame] = next(shape for shape in shapes if set(kinds_of(shape)) == set(values))
    return cls(**values)


def read_whole(data: bytes) -> None:
    """Read `data` as a stream that ends behind it."""
    reader = FrameReader()
    reader.feed(data)
    while reader.next_frame() is not None:
        pass
    reader.end()


@pytest.mark.parametrize("vector", GOOD, ids=lambda vector: vector["name"])
def test_a_good_frame_is_read_and_written_as_the_vector_says(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])

    frame_id, frame = decode(data)

    assert (frame_id, frame) == (vector["id"], frame_of(vector))
    assert encode(frame_id, frame) == data


@pytest.mark.parametrize("vector", REFUSED, ids=lambda vector: vector["name"])
def test_a_broken_stream_is_refused_for_the_rule_that_it_breaks(vector: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as refusal:
        read_whole(bytes.fromhex(vector["hex"]))

    assert refusal.value.code == vector["error"]


def test_the_file_is_what_its_generator_writes() -> None:
    """A change of the codec shows up here as a change of the file, which Go reads too."""
    spec = importlib.util.spec_from_file_location("generate", VECTORS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)

    assert generate.rendered() == (VECTORS / "frames.json").read_text(encoding="utf-8")


def test_every_shape_has_a_vector() -> None:
    """A frame that no vector shows could be understood differently by the two languages."""
    shown = {type(frame_of(vector)) for vector in GOOD}

    assert shown == {shape for shapes in SHAPES.values() for shape in shapes}


def test_a_lease_is_these_bytes() -> None:
    """Written out by hand from the specification, because the vectors come from the codec itself."""
    assert encode(0, Lease(60_000)).hex(" ") == "4b 4c 01 09 00 00 00 00 00 00 00 0d 81 a8 6c 65 61 73 65 5f 6d 73 cd ea 60"


def test_the_fields_of_a_register_stand_in_the_order_of_their_names() -> None:
    payload = b"\x84" + b"\xa3app\xa1a" + b"\xa8function\xa1f" + b"\xa5image\xa1i" + b"\xa8instance\xa1c"

    assert encode(7, Register("c", "a", "f", "i")) == b"KL\x01\x16\x00\x00\x00\x07\x00\x00\x00\x25" + payload
