"""The bypass suite: every way out, in every protocol, under stock gVisor, audit and enforcement; what counts is what arrived.

Each case has a marker of its own. The evidence is outside of the sandbox: the bytes that servers received (after TLS, where there is
some), MariaDB's general log, files of the host, and a capture of the bridge. Stock is the control: it says whether the way delivers at all.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.attacks.capture import frames, streams, tcp_payload
from experiments.paths import RunPaths

from .interpreters import GATING, pythons, with_clients
from .lab import INSIDE, Lab, Sandbox
from .servers import MYSQL_PORT, PROGRAMS, MariaDB
from .world import OK, Receiver

sys.path.append(str(PROGRAMS))  # as inside of the sandbox
ways, odd_ways = importlib.import_module("ways"), importlib.import_module("odd_ways")

SYSTEMS = ("stock", "audit", "enforce")
NAMES = {
    "web.test": "10.199.0.2",
    "tls.test": "10.199.0.3",
    "database.test": "10.199.0.4",
    "mail.test": "10.199.0.5",
    "gateway.test": "10.199.0.6",
}
# How a call says that a kind of socket or an option does not exist here. It ends before there is a message to judge.
ABSENT = frozenset({"EPROTONOSUPPORT", "ENOPROTOOPT", "EAFNOSUPPORT", "ENOSYS"})
STARTS_MAX = 5
STRANGER = ("10.199.0.9", 9000)
TARGETS = {
    "http": (NAMES["web.test"], 80),
    "mapped": (NAMES["web.test"], 80),
    "https": (NAMES["tls.test"], 4443),
    "tls": (NAMES["tls.test"], 4443),
    "mysql": (NAMES["database.test"], MYSQL_PORT),
    "smtp": (NAMES["mail.test"], 2525),
    "gateway": (NAMES["gateway.test"], 8080),
    "stranger": STRANGER,
    "sockets": STRANGER,
}
POLICY = """\
schema: kalium/v1
app: {mode}
version: 1
mode: {mode}
on_unavailable: {{app_edge: deny, deadline_ms: 60000}}
peers:
  web: {{host: web.test, port: 80, protocol: http}}
  tls: {{host: tls.test, port: 4443, protocol: https}}
  database: {{host: database.test, port: 3306, protocol: mysql, schema: helloRetail}}
  mail: {{host: mail.test, port: 2525, protocol: smtp}}
  gateway: {{host: gateway.test, port: 8080, protocol: http, role: gateway}}
entries: [victim]
functions:
  victim:
    messages:
      - repeat:
          choice:
            - {{http: GET, peer: web, path: /allowed}}
            - {{http: POST, peer: web, path: /allowed}}
            - {{https: GET, peer: tls, path: /allowed}}
            - {{mysql: select, peer: database, read: [photos]}}
            - {{smtp: mail, peer: mail, from: function@shop.test, to: [allowed@shop.test]}}
        at_most: 8
"""


@dataclass(frozen=True)
class Case:
    """One attempt: `way` of sending something in `protocol`, or the attempt `way` of a group of odd ones."""

    protocol: str
    way: str
    is_odd: bool

    @property
    def name(self) -> str:
        return f"{self.protocol}: {self.way}"

    def code(self, marker: str, host_files: tuple[str, str, str]) -> str:
        """What runs inside."""
        to = TARGETS[self.protocol]
        # Backwards: the capture sees the request that brings the code, too.
        spelled = f"{marker[::-1]!r}[::-1]"
        call = f"odd_ways.run({self.protocol!r}, {self.way!r}, {to!r}, {spelled}, {host_files!r})"
        if not self.is_odd:
            call = f"ways.run({self.way!r}, {self.protocol!r}, {to!r}, {spelled})"
        return f"import sys\nsys.path[:1] = [{str(PROGRAMS)!r}]\nimport odd_ways, ways\nresult = {call}\n"


def cases() -> Iterator[Case]:
    """All of them, in a fixed order."""
    for protocol in ("http", "stranger", "gateway", "https", "mysql", "smtp"):
        for way in ways.WAYS:
            if way == "io_uring" and protocol != "http":
                continue  # it ends before it knows a socket
            if way == "swapped buffer" and protocol != "http":
                continue  # its harmless half is HTTP
            yield Case(protocol, way, is_odd=False)
    yield Case("mapped", "write", is_odd=False)
    for group, attempts in odd_ways.ATTEMPTS.items():
        for way in attempts:
            yield Case(group, way, is_odd=True)


class HostFiles:
    """A Unix socket, a FIFO and a file of the host, which a sandbox sees as files, and what came out of them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.paths = (str(folder / "socket"), str(folder / "fifo"), str(folder / "file"))
        self._received = bytearray()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.paths[0])
        self._listener.listen()
        os.mkfifo(self.paths[1])
        self._fifo = os.open(self.paths[1], os.O_RDONLY | os.O_NONBLOCK)
        Path(self.paths[2]).touch()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(65536):
                    self._received += data

    def received(self) -> bytes:
        with suppress(BlockingIOError):
            self._received += os.read(self._fifo, 65536)
        return bytes(self._received) + Path(self.paths[2]).read_bytes()

    def close(self) -> None:
        self._listener.close()
        os.close(self._fifo)


def any_answer(kept: bytes) -> bytes:
    """An answer to whatever came, so that the program knows at once that it has arrived."""
    return OK if kept else b""


def smtp_answer(kept: bytes) -> bytes:
    """A mail server that takes everything, so that nothing but the guard refuses; DATA it refuses to who says EHLO refuse."""
    if kept.rstrip(b"\r\n").rsplit(b"\r\n", 1)[-1] == b"DATA":
        return b"554 no\r\n" if b"EHLO refuse\r\n" in kept else b"354 go on\r\n"
    return b"250 ok\r\n" if kept.endswith(b"\n") else b""


class Suite:
    """The lab's servers, and the cases under one system after the other."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab = lab
        for address in (*NAMES.values(), STRANGER[0]):
            lab.world.address(int(address.rsplit(".", 1)[1]))
        pki = lab.folder / "pki"
        lab.kalium("pki", "issue", "--dir", str(pki), "--role", "server", "--name", "tls.test")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki / "tls.test.crt", pki / "tls.test.key")
        self.database = stack.enter_context(MariaDB(lab, NAMES["database.test"], "database.test"))
        self.receivers = {
            "http": Receiver(lab.world, *TARGETS["http"], answer=any_answer),
            "https": Receiver(lab.world, *TARGETS["https"], answer=any_answer, context=context),
            "smtp": Receiver(lab.world, *TARGETS["smtp"], answer=smtp_answer, greeting=b"220 mail.test\r\n"),
            "gateway": Receiver(lab.world, *TARGETS["gateway"], answer=any_answer),
            "stranger": Receiver(lab.world, *STRANGER, answer=any_answer),
        }
        for receiver in self.receivers.values():
            stack.callback(receiver.close)
        self.files = HostFiles(lab.folder / "host")
        stack.callback(self.files.close)
        self.ca = str(pki / "ca.crt")
        self.python = str(with_clients(next(version for version in (*GATING, *pythons()) if version in pythons())))

    def sandbox(self, stack: ExitStack, system: str) -> Sandbox:
        runtime = "runsc-stock" if system == "stock" else "runsc-kalium"
        return stack.enter_context(
            self.lab.sandbox(system, "victim", runtime=runtime, env={"SSL_CERT_FILE": self.ca}, argv=(self.python, str(INSIDE)))
        )

    def kept(self) -> bytes:
        """Everything that any server or file of the host holds."""
        return b"\n".join([*(receiver.received for receiver in self.receivers.values()), self.database.queries().encode(), self.files.received()])

    def run(self, case: Case, sandbox: Sandbox, system: str) -> dict[str, Any]:
        marker = "M" + secrets.token_hex(8).upper()
        for _ in range(STARTS_MAX):
            answer = sandbox.request({"python": case.code(marker, self.files.paths)})
            if answer.status != 503:  # on a busy machine a start may miss the policy's deadline; then nothing ran
                break
        job = answer.job if answer.status == 200 else {"result": f"answer {answer.status}"}
        outcome = job.get("result") or f"{job['error']}: {job['text']}"
        return {"case": case.name, "protocol": case.protocol, "way": case.way, "mode": system, "marker": marker, "outcome": outcome}


def by_request(verdicts: list[dict[str, Any]]) -> list[list[str]]:
    """`kind reason` of what denies, or would, for each request: its verdicts are those from its start to the next one's."""
    requests: list[list[str]] = []
    for record in verdicts:
        if record["kind"] == "start":
            if record["allowed"]:
                requests.append([])
        elif not record["allowed"] or record["would_deny"]:
            requests[-1].append(f"{record['kind']} {record['reason']}")
    return requests


def observe(lab: Lab, chosen: list[Case], *, report: Callable[[str], None] = lambda _line: None) -> list[dict[str, Any]]:
    """Run the cases under each system; what servers, files and the wire show is added to each row at the end."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        suite = Suite(lab, stack)
        capture = lab.folder / "capture.pcap"
        with lab.world.capture(capture):
            for system in SYSTEMS:
                with ExitStack() as inner:
                    sandbox = suite.sandbox(inner, system)
                    mine = []
                    for number, case in enumerate(chosen, 1):
                        mine.append(suite.run(case, sandbox, system))
                        if number % 50 == 0 or number == len(chosen):
                            report(f"{system}: {number} of {len(chosen)}")
                    denials = by_request(sandbox.verdicts()) if system != "stock" else [[] for _ in chosen]
                    assert len(denials) == len(chosen), f"{len(denials)} starts were logged for {len(chosen)} requests"
                    rows += [{**row, "denials": reasons} for row, reasons in zip(mine, denials, strict=True)]
        kept, wire = suite.kept(), streams_of(capture.read_bytes())
    for row in rows:
        # A name travels in lower case.
        texts = {row["marker"].encode(), row["marker"].lower().encode()}
        row["server_bytes"] = sum(kept.count(text) * len(text) for text in texts)
        row["wire_bytes"] = sum(wire.count(text) * len(text) for text in texts)
    return rows


def streams_of(capture: bytes) -> bytes:
    """What was on the bridge: each TCP stream's payload put in order, every segment as it was, and every other frame."""
    parts = []
    for _, chunks in streams(capture):
        ordered = sorted(chunks, key=lambda chunk: chunk[0])
        parts += [b"".join(payload for _, payload in ordered), *(payload for _, payload in chunks)]
    return b"\0".join([*parts, *(frame for frame in frames(capture) if tcp_payload(frame) is None)])


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: one row a case and mode with what is wrong with it, "" when nothing is."""
    stock = {row["case"]: row for row in rows if row["mode"] == "stock"}
    table = []
    for row in rows:
        bytes_out = row["server_bytes"] + row["wire_bytes"]
        control = stock[row["case"]]
        delivered = bool(control["server_bytes"] + control["wire_bytes"])
        wrong = ""
        if row["mode"] == "enforce":
            if bytes_out:
                wrong = "leaked"
            elif delivered and not row["denials"] and row["outcome"] not in ABSENT:
                wrong = "refused without a verdict"
        elif row["mode"] == "audit" and bytes_out and not row["denials"]:
            wrong = "passed without a would-deny"
        table.append(
            {
                "case": row["case"],
                "protocol": row["protocol"],
                "way": row["way"],
                "mode": row["mode"],
                "stock_delivered": str(delivered).lower(),
                "errno": row["outcome"],
                "received_bytes": row["server_bytes"],
                "wire_bytes": row["wire_bytes"],
                "verdicts": "; ".join(dict.fromkeys(row["denials"])),
                "wrong": wrong,
            }
        )
    return table


def figures(table: list[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """What summary.csv holds."""
    enforced = [row for row in table if row["mode"] == "enforce"]
    return {
        "cases": (len(enforced), "cases"),
        "leaked_bytes": (sum(row["received_bytes"] + row["wire_bytes"] for row in enforced), "bytes"),
        "unexpected": (sum(bool(row["wrong"]) for row in table), "cases"),
    }


def store(run: RunPaths, rows: list[dict[str, Any]]) -> None:
    """The raw observations, which the seal covers."""
    run.observations.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
