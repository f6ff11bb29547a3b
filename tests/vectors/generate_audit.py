"""Writes audit/ beside this file: what both writers of audit logs make of the same entries, and what is found at a start.

    python tests/vectors/generate_audit.py

The lines come from kalium/audit; a test holds one of them against hashes and a signature that are computed there by hand.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402

from kalium.audit.chain import Chain, Place, Writer  # noqa: E402  # the path has to be set first

FOLDER = Path(__file__).with_name("audit")
SEED = bytes(range(32))
KEY = Ed25519PrivateKey.from_private_bytes(SEED)
WHO = Writer("agent", "node0", "00f1e2d3c4b5a697", "fedcba9876543210")
T = 1_790_000_000_000
VERDICT = {
    "id": "00f1e2d300000001", "node": "node0", "instance": "5d1f" * 16, "app": "hello-retail", "function": "product-photos-master",
    "mode": "enforce", "message": "https GET images /<a>&\"\\", "allowed": False, "reason": "out_of_order", "states": [0, 2], "expected": [],
}  # fmt: skip
POLICY = {"what": "loaded", "app": "hello-retail", "version": 7, "sha256": "ab" * 32, "detail": ""}


def opened(at: int, torn: bytes = b"") -> dict[str, Any]:
    return {"do": "open", "now_ms": T + at, "torn": base64.b64encode(torn).decode()}


def entry(at: int, event: str = "verdict", fields: Any = None) -> dict[str, Any]:
    return {"do": "append", "now_ms": T + at, "event": event, "fields": VERDICT if fields is None else fields}


def seal(at: int) -> dict[str, Any]:
    return {"do": "seal", "now_ms": T + at}


def start_file(at: int) -> dict[str, Any]:
    return {"do": "start_file", "now_ms": T + at}


# What is in the files when the writer starts: number and hash of the last line, and of the current file its first number and size.
NEW = {"seq": 0, "hash": "0" * 64, "file_seq": 0, "file_bytes": 0}
OLD = {"seq": 41, "hash": "c" * 64, "file_seq": 17, "file_bytes": 5000}

WRITTEN: list[tuple[str, dict[str, Any], int, list[dict[str, Any]]]] = [
    ("a log begins", NEW, 1 << 20, [opened(0), entry(1), entry(2, "policy", POLICY), seal(3)]),
    ("an entry without fields", NEW, 1 << 20, [opened(0), entry(1, "outage", {})]),
    ("nothing to sign is not signed", NEW, 1 << 20, [seal(0), opened(1), seal(2), seal(3)]),
    ("a head comes before an entry a second later", NEW, 1 << 20, [opened(0), entry(999), entry(1000), entry(1001)]),
    ("a clock that goes back makes a head due", NEW, 1 << 20, [opened(0), entry(-1), entry(0)]),
    ("a restart with a torn line", OLD, 1 << 20, [opened(0, b'{"prev":"cc'), entry(1), seal(2)]),
    ("a restart behind a rotated file", {**OLD, "file_seq": 0, "file_bytes": 0}, 1 << 20, [opened(0), entry(1), seal(2)]),
    ("a full file is followed by the next", NEW, 4000, [opened(0), *(entry(at) for at in range(1, 9)), seal(9)]),
    ("a restart in a full file", OLD, 4000, [opened(0), entry(1), entry(2)]),
    ("a file that was moved away", NEW, 1 << 20, [opened(0), entry(1), start_file(2), entry(3), seal(4)]),
    ("two rotations in one batch", NEW, 1 << 20, [opened(0), start_file(1), start_file(2)]),
]


def chain_for(found: dict[str, Any], bytes_max: int) -> Chain:
    return Chain(WHO, KEY.sign, bytes_max, Place(found["seq"], found["hash"]), found["file_seq"], found["file_bytes"])


def play(chain: Chain, steps: list[dict[str, Any]]) -> None:
    """Do what the steps of a script say."""
    for step in steps:
        now_ms = step["now_ms"]
        if step["do"] == "open":
            chain.open(now_ms=now_ms, torn=base64.b64decode(step["torn"]))
        elif step["do"] == "append":
            chain.append(step["event"], step["fields"], now_ms=now_ms)
        elif step["do"] == "seal":
            chain.seal(now_ms=now_ms)
        else:
            chain.start_file(now_ms=now_ms)


def written() -> Iterator[dict[str, Any]]:
    for name, found, bytes_max, steps in WRITTEN:
        chain = chain_for(found, bytes_max)
        play(chain, steps)
        parts = [{"rotated": part.rotated, "data": part.data.decode()} for part in chain.take()]
        yield {"name": name, "found": found, "bytes_max": bytes_max, "steps": steps, "parts": parts}


def a_log(entries: int) -> bytes:
    chain = chain_for(NEW, 1 << 20)
    play(chain, [opened(0), *(entry(at) for at in range(1, entries + 1)), seal(entries + 1)])
    return b"".join(part.data for part in chain.take())


def found_at_a_start() -> Iterator[dict[str, Any]]:
    """Files, and the chain that is continued behind them; with `error`, the start is refused."""
    whole = a_log(2)
    lines = whole.splitlines(keepends=True)
    last = json.loads(lines[-1])
    fields = {"seq": 4, "hash": last["hash"], "first_seq": 1, "log": WHO.log, "whole_bytes": len(whole), "torn_bytes": 0}

    def good(name: str, data: bytes, **changed: Any) -> dict[str, Any]:
        return {"name": name, "data": data.decode("latin-1"), **fields, **changed}

    def bad(name: str, data: bytes) -> dict[str, Any]:
        return {"name": name, "data": data.decode("latin-1"), "error": True}

    nothing = {"seq": 0, "hash": "", "first_seq": 0, "log": "", "whole_bytes": 0}
    yield good("a whole log", whole)
    yield good("a torn line", whole + lines[1][:100], torn_bytes=100)
    yield good("a torn line of one byte", whole + b"{", torn_bytes=1)
    yield good("a page that was never written", whole + b"\0" * 4096, torn_bytes=4096)
    yield good("an empty file", b"", **nothing)
    yield good("a torn line alone", lines[0][:-1], **nothing, torn_bytes=len(lines[0]) - 1)
    yield good("one line", lines[0], seq=1, hash=json.loads(lines[0])["hash"], whole_bytes=len(lines[0]))
    yield bad("another byte in the last entry", whole.replace(b'"signature":"', b'"signaturE":"'))
    yield bad("another hash in the last line", whole[:-100].rpartition(b"\n")[0] + b"\n" + lines[-1].replace(b'"hash":"', b'"hash":"0', 1))
    yield bad("an empty last line", whole + b"\n")
    yield bad("something else", b"Nov 30 12:00:00 node0 kernel: hello\n")
    yield bad("a first line that was edited", whole.replace(b'"name":"node0"', b'"name":"node1"', 1))
    yield bad("a first line that is no open", b"".join(lines[1:]))
    other = Chain(replace(WHO, log="not-hexadecimal!"), KEY.sign, 1 << 20)
    other.open(now_ms=T)
    yield bad("a log without a name", other.take()[0].data)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, document in (
        ("written.json", {"seed": SEED.hex(), "who": vars(WHO), "runs": list(written())}),
        ("found.json", list(found_at_a_start())),
    ):
        (FOLDER / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
