"""The site's own audit logs, after whatever the tests before this one have done to the site: restarts, kills, denials."""

import json
from pathlib import Path
from typing import Any

import pytest

from .actors import kalium


def log_of(config: str) -> tuple[list[Path], Path]:
    """All files of a program's audit log, and the public key that its heads are signed with."""
    said: dict[str, str] = json.loads(Path(config).read_text(encoding="utf-8"))["audit"]
    log = Path(said["log"])
    files = [path for path in log.parent.glob(f"{log.name}*") if path == log or path.suffix[1:].isdigit()]
    assert log in files
    return files, Path(said["key"]).with_suffix(".pub")


AGENT, CONTROLLER = "/etc/kalium/agent.json", "/etc/kalium/controller.json"


def entries(files: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line)["entry"] for path in files for line in path.read_bytes().splitlines() if line.endswith(b"}}")]


@pytest.fixture(scope="module", params=[AGENT, CONTROLLER], ids=["agent", "controller"])
def log(request: pytest.FixtureRequest) -> tuple[list[Path], Path]:
    return log_of(request.param)


def test_the_logs_of_the_site_verify(log: tuple[list[Path], Path]) -> None:
    """As they are while their writers run: what has no head yet is at most a second old and is no finding."""
    files, key = log

    said = kalium("audit", "verify", *files, "--key", key)

    assert entries(files)[0]["event"] == "open", said


def test_one_changed_byte_is_found(log: tuple[list[Path], Path], tmp_path: Path) -> None:
    """In a copy, in the middle of it: a digit of a time."""
    files, key = log
    copy = tmp_path / "audit.jsonl"
    data = bytearray(max(files, key=lambda path: path.stat().st_size).read_bytes())
    at = data.index(b'"time_ms":', len(data) // 2) + len('"time_ms":')
    data[at + 3] ^= 1
    copy.write_bytes(data)

    assert "edited" in kalium("audit", "verify", copy, "--key", key, status=1)


def test_the_controller_has_the_agents_log_on_record() -> None:
    """So the agent's log cannot be cut off behind what its REPORT has said, whoever has its key."""
    files, key = log_of(AGENT)
    anchors, anchors_key = log_of(CONTROLLER)

    assert any(entry["event"] == "anchor" for entry in entries(anchors))
    kalium("audit", "verify", *files, "--key", key, *(word for path in anchors for word in ("--anchors", path)), "--anchors-key", anchors_key)


def test_what_the_tests_have_done_is_on_record() -> None:
    """Denials with the ids by which they are explained, verdicts without a controller, policies that came, modes that the sandboxes report."""
    files, _ = log_of(AGENT)
    held = entries(files)

    denied = [entry for entry in held if entry["event"] == "verdict" and not entry["allowed"]]
    assert denied and all(len(entry["id"]) == 16 for entry in denied)
    assert {"deny", "allow", "last_known"} <= {entry.get("fail_mode") for entry in held if entry["event"] == "verdict"}
    assert {"open", "policy", "mode", "head"} <= {entry["event"] for entry in held}
    kalium("explain", denied[-1]["id"], "--log", files[0])
