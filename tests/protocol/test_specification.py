"""docs/reference/protocol.md says what the code does: its tables are compared with the code's, row by row."""

import re
from pathlib import Path

import pytest

from kalium.controller.limits import LIMITS, STARTS_PER_INFLIGHT
from kalium.controller.server import CONNECTIONS_OF_AGENT_MAX, CONNECTIONS_OF_OTHERS_MAX, HANDSHAKES_MAX, KEPT_BYTES_MAX, TURN_BYTES
from kalium.policy.message import Reason
from kalium.protocol import limits
from kalium.protocol.codec import ERROR_CODES
from kalium.protocol.frames import OUTCOMES, SHAPES, WITHOUT_ID, FrameType, StatusReport, VerdictRecord, kinds_of
from kalium.protocol.session import AGENT_TRANSITIONS, CONTROLLER_TRANSITIONS, CloseReason, SessionState

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "protocol.md").read_text(encoding="utf-8")
WORDS = re.sub(r"\s+", " ", TEXT)


def table(first_header: str, second_header: str) -> list[list[str]]:
    """The cells of the table whose header begins with these two, without the header."""
    lines = TEXT.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_header} | {second_header} |"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_frame_is_listed_with_its_number_and_its_id() -> None:
    said = {int(number): (name, frame_id) for number, name, _, frame_id, _ in table("#", "Frame")}

    assert {number: name for number, (name, _) in said.items()} == {int(each): each.name for each in FrameType}
    assert {FrameType(number) for number, (_, frame_id) in said.items() if frame_id == "0"} == WITHOUT_ID


def test_every_shape_is_listed_with_its_fields_and_their_kinds() -> None:
    said = dict(table("Frame", "Fields"))

    expected = {}
    for frame_type, shapes in SHAPES.items():
        for shape, name in zip(shapes, (frame_type.name, f"{frame_type.name} of an agent"), strict=False):
            expected[name] = ", ".join(f"`{field}` {kind.value}" for field, kind in kinds_of(shape).items()) or "none"
    for name, inner in (("*record*", VerdictRecord), ("*report*", StatusReport)):
        expected[name] = ", ".join(f"`{field}` {kind.value}" for field, kind in kinds_of(inner).items())
    assert said == expected


def test_every_kind_and_outcome_is_explained() -> None:
    kinds = {kind for row in table("Kind", "Value") for kind in row[0].replace("…}", "[str]}").split(", ")}

    said = " ".join(kinds)
    used = {kind.value for shapes in SHAPES.values() for shape in shapes for kind in kinds_of(shape).values()}
    assert {kind for kind in used if kind.strip("[]") not in said and not kind.startswith("{")} == set()
    assert next(row[1] for row in table("Kind", "Value") if row[0] == "outcome") == "`answered`, `closed` or `timeout`"
    assert sorted(OUTCOMES) == ["answered", "closed", "timeout"]


@pytest.mark.parametrize(
    ("first_column", "transitions"), [("AGENT_HELLO", CONTROLLER_TRANSITIONS), ("CONTROLLER_WELCOME", AGENT_TRANSITIONS)], ids=["controller", "agent"]
)
def test_the_tables_of_states_are_those_of_the_sessions(first_column: str, transitions: object) -> None:
    header = next(line for line in TEXT.splitlines() if line.startswith(f"| State | {first_column} |"))
    columns = [cell.strip() for cell in header.strip("|").split("|")][1:]
    said = {(row[0], column, cell) for row in table("State", first_column) for column, cell in zip(columns, row[1:], strict=True) if cell}

    names = {shape: frame_type.name for frame_type, shapes in SHAPES.items() for shape in shapes}
    assert isinstance(transitions, dict)
    assert said == {(state.name, names[frame], after.name) for state, taken in transitions.items() for frame, after in taken.items()}
    assert [row[0] for row in table("State", first_column)] == [state.name for state in SessionState]


def test_every_reason_for_an_end_is_explained() -> None:
    assert [row[0] for row in table("Code", "What the peer did")] == [*ERROR_CODES, *(reason.value for reason in CloseReason)]


def test_the_limits_are_those_of_the_code() -> None:
    said = {name: re.sub(r" (bytes.*|ms)$|;.*$", "", value).removesuffix(" bytes") for name, value in table("Limit", "Value")}

    assert said == {
        "payload of a frame": f"{limits.FRAME_BYTES_MAX:,}",
        "any text": f"{limits.TEXT_BYTES_MAX:,}",
        "elements of any list or map": f"{limits.ITEMS_MAX:,}",
        "a signed policy": f"{limits.ENVELOPE_BYTES_MAX:,}",
        "all policies in one CONTROLLER_WELCOME": f"{limits.APPS_BYTES_MAX:,}",
        "versions that a hello lists": f"{limits.PROTOCOLS_MAX}",
        "open questions of one connection": f"{limits.QUESTIONS_MAX:,}",
        "wait for the AGENT_HELLO": f"{limits.HELLO_TIMEOUT_MS:,}",
        "what one LEASE is worth": f"{limits.LEASE_MS:,}",
        "a LEASE comes every": f"{limits.LEASE_EVERY_MS:,}",
        "bytes that wait for a peer that does not read": f"{limits.WRITE_BUFFER_BYTES_MAX:,}",
    }


def test_the_bounds_of_the_controller_are_those_of_the_code() -> None:
    said = {name: int(re.split("[;]|, those", value)[0].replace(",", "")) for name, value in table("Table", "Bound")}

    assert said == {
        "live calls": LIMITS.calls,
        "live invocations": LIMITS.invocations,
        "pending tokens": LIMITS.tokens,
        "invocations of a call": LIMITS.invocations_per_call,
        "pending tokens of a call": LIMITS.tokens_per_call,
        "pending tokens that an instance was granted": LIMITS.tokens_per_instance,
        "live invocations of an instance": LIMITS.invocations_per_instance,
        "agents": LIMITS.agents,
        "connections of an agent": CONNECTIONS_OF_AGENT_MAX,
        "connections of all who are no agents": CONNECTIONS_OF_OTHERS_MAX,
        "open handshakes": HANDSHAKES_MAX,
        "bytes of a connection that are worked on at a time": TURN_BYTES,
        "bytes of a connection that wait for their turns": KEPT_BYTES_MAX,
        "instances of an agent": LIMITS.instances_per_agent,
        "versions of an app": LIMITS.versions_per_app,
    }


def test_the_times_in_the_text_are_those_of_the_code() -> None:
    assert f"expires {LIMITS.token_ms // 1000} s after its grant" in WORDS
    assert f"| a token | {LIMITS.token_ms // 1000} s |" in TEXT
    assert f"`invocation_timeout_ms` and {LIMITS.invocation_grace_ms // 1000} s" in TEXT
    assert f"| an instance whose agent is away | {LIMITS.agent_gone_ms // 1000} s |" in TEXT
    assert f"heard there within the last {LIMITS.duplicate_heard_ms // 1000} s" in WORDS
    assert f"drains for {LIMITS.drain_ms // 1000} s" in WORDS
    assert f"of an asynchronous edge or a callback {LIMITS.token_late_ms // 1000} s after it" in WORDS
    assert f"| a token of an asynchronous edge or a callback | {LIMITS.token_late_ms // 1000} s |" in TEXT
    assert f"the last step of an invocation and to the last {LIMITS.starts_per_instance} starts" in WORDS
    assert f"`max_inflight` ({STARTS_PER_INFLIGHT} for each)" in WORDS


def test_the_reasons_in_the_text_exist() -> None:
    decisions = TEXT.split("## Decisions of the controller")[1].split("## Errors")[0]
    words = set(re.findall(r"`([a-z_]+)`", decisions)) - {
        "call",
        "invocation",
        "token",
        "hold",
        "retry",
        "retries",
        "callback",
        "answered",
        "closed",
        "timeout",
        "callee",
        "expected",
        "invocation_timeout_ms",
        "max_inflight",
    }

    assert words <= {reason.value for reason in Reason}
    assert words >= {"unregistered", "policy_mismatch", "not_an_entry", "bad_token", "unknown_call", "edge_not_allowed", "unknown_function"}
