"""A packet capture on the host's side of the sandboxes' interfaces, and the search for markers in what it holds.

tcpdump writes it; reading is done here, because a marker may be cut by a segment boundary: payloads are put back in
order for each direction of each TCP connection before they are searched.
"""

from __future__ import annotations

import contextlib
import re
import select
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from experiments.errors import ExperimentError, RunRefused
from experiments.hostfiles import as_root

TCPDUMP = ("tcpdump", "-n", "-s", "0", "-U", "--immediate-mode", "-B", "65536", "-w", "-")
START_SECONDS_MAX = 15.0
STOP_SECONDS_MAX = 15.0
FLUSH_SECONDS = 0.5  # what the kernel still holds when the last request has ended
PCAP_MAGIC = {b"\xd4\xc3\xb2\xa1": "<", b"\xa1\xb2\xc3\xd4": ">", b"\x4d\x3c\xb2\xa1": "<", b"\xa1\xb2\x3c\x4d": ">"}
LINK_ETHERNET = 1
ETHERTYPE_IPV4 = 0x0800
PROTOCOL_TCP = 6
PROTOCOL_UDP = 17
VXLAN_PORTS = (8472, 4789)  # of Linux, which flannel takes, and of the standard
VXLAN_BYTES = 16  # of the UDP and VXLAN headers
SEQUENCE_MODULUS = 1 << 32


class Capture:
    """tcpdump on `interface` while the `with` lasts. Raises RunRefused at its end when packets were lost.

    `within` is a command that runs another in the network namespace of the interface.
    """

    def __init__(self, interface: str, file: Path, *, within: tuple[str, ...] = ()) -> None:
        self.interface = interface
        self.within = within
        self.file = file
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""

    def __enter__(self) -> Capture:
        # To standard output: whatever user or profile tcpdump is confined to, the file is ours.
        command = as_root([*self.within, *TCPDUMP, "-i", self.interface])
        try:
            with self.file.open("xb") as output:
                self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            raise self._failed(str(error)) from error
        deadline = time.monotonic() + START_SECONDS_MAX
        while b"listening on" not in self._said:
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._said.decode("utf-8", "replace").strip()
                self._stop()
                raise self._failed(said or "it did not start to listen")
            self._read_said(0.2)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        time.sleep(FLUSH_SECONDS)
        self._stop()
        if error is None:
            require_nothing_dropped(self._said, self.interface)

    def _failed(self, found: str) -> ExperimentError:
        return ExperimentError(
            "capture.failed",
            f"capture on {self.interface} with tcpdump",
            found,
            "install tcpdump with `make site`; run `sudo -v` first, or the task as root",
        )

    def _read_said(self, seconds_max: float) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        ready, _, _ = select.select([self._process.stderr], [], [], seconds_max)
        if ready:
            self._said += self._process.stderr.read1(65536)  # type: ignore[attr-defined]

    def _stop(self) -> None:
        assert self._process is not None, "it was started"
        process = self._process
        if process.poll() is None:
            # With sudo in between the process is root's: only root may end it. The shell's own `kill`: a small host has no program of that name.
            subprocess.run(as_root(["sh", "-c", f"kill -INT {process.pid}"]), check=False, timeout=STOP_SECONDS_MAX)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, rest = process.communicate(timeout=STOP_SECONDS_MAX)
            self._said += rest
            return
        raise self._failed(f"tcpdump (process {process.pid}) did not end when asked to")


def require_nothing_dropped(said: bytes, where: str) -> None:
    """Refuse a capture whose tcpdump, by its last words, lost packets, or said no such words: it may have ended before the run did."""
    counts = re.findall(rb"(\d+) packets? dropped by kernel", said)
    dropped = sum(map(int, counts))
    if dropped or not counts:
        raise RunRefused(
            "capture.dropped",
            f"capture on {where}",
            f"{dropped} packets were lost, so absence proves nothing" if counts else f"tcpdump did not say how it ended: {said[-200:]!r}",
            "run it on an idle machine",
        )


@dataclass(frozen=True)
class Flow:
    """One direction of a TCP connection."""

    source: str
    source_port: int
    target: str
    target_port: int

    def __str__(self) -> str:
        return f"{self.source}:{self.source_port} > {self.target}:{self.target_port}"


@dataclass
class _Stream:
    first: int  # sequence number of the first payload byte
    chunks: list[tuple[int, bytes]] = field(default_factory=list)


def frames(data: bytes) -> Iterator[bytes]:
    """The captured frames, in order; a record cut at the end of the file ends the iteration."""
    order = PCAP_MAGIC.get(data[:4])
    if order is None or len(data) < 24:
        raise RunRefused("capture.format", "read the packet capture", "it is not a pcap file", "see tcpdump's message above, then run it again")
    (link,) = struct.unpack_from(f"{order}I", data, 20)
    if link & 0x0FFFFFFF != LINK_ETHERNET:
        raise RunRefused("capture.link", "read the packet capture", f"link type {link} is not Ethernet", "capture on the bridge of the site")
    offset = 24
    while offset + 16 <= len(data):
        (length,) = struct.unpack_from(f"{order}I", data, offset + 8)
        if offset + 16 + length > len(data):
            return
        yield data[offset + 16 : offset + 16 + length]
        offset += 16 + length


def tcp_payload(frame: bytes) -> tuple[Flow, int, bool, bytes] | None:
    """Flow, sequence number, SYN and payload of an IPv4 TCP frame, also of one that VXLAN carries to another node; None for any other frame."""
    if len(frame) < 34 or int.from_bytes(frame[12:14], "big") != ETHERTYPE_IPV4:
        return None
    packet = frame[14:]
    header, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
    if packet[0] >> 4 == 4 and packet[9] == PROTOCOL_UDP and int.from_bytes(packet[header + 2 : header + 4], "big") in VXLAN_PORTS:
        inner = packet[header + VXLAN_BYTES :]
        # A frame inside the frame inside would be somebody's trick: it is searched as it is.
        return None if inner[23:24] == bytes([PROTOCOL_UDP]) else tcp_payload(inner)
    if packet[0] >> 4 != 4 or packet[9] != PROTOCOL_TCP or len(packet) < header + 20:
        return None
    # A segment that the kernel has not cut yet may announce length 0: then it is all that was captured.
    packet = packet[: total or len(packet)]
    segment = packet[header:]
    source, target = (".".join(str(octet) for octet in packet[at : at + 4]) for at in (12, 16))
    source_port, target_port, sequence = struct.unpack_from("!HHI", segment)
    flow = Flow(source, source_port, target, target_port)
    return flow, sequence, bool(segment[13] & 2), segment[(segment[12] >> 4) * 4 :]


def streams(data: bytes) -> list[tuple[Flow, list[tuple[int, bytes]]]]:
    """Payload chunks of each direction of each connection as (stream offset, bytes), in order of arrival.

    A SYN begins a new stream on ports that were used before. Retransmissions are kept: they were on the wire too.
    """
    found: list[tuple[Flow, _Stream]] = []
    current: dict[Flow, _Stream] = {}
    for frame in frames(data):
        parsed = tcp_payload(frame)
        if parsed is None:
            continue
        flow, sequence, is_syn, payload = parsed
        if is_syn or flow not in current:
            current[flow] = _Stream((sequence + is_syn) % SEQUENCE_MODULUS)
            found.append((flow, current[flow]))
        if payload:
            current[flow].chunks.append(((sequence + is_syn - current[flow].first) % SEQUENCE_MODULUS, payload))
    return [(flow, stream.chunks) for flow, stream in found]


def marked_bytes(chunks: list[tuple[int, bytes]], marker: bytes) -> int:
    """Payload bytes of the segments that hold `marker` or a part of it, where segment boundaries cut it.

    Whole markers are looked for in each segment as it was sent, cut ones in the payloads put in order, so that neither a
    retransmission nor an overlap hides one.
    """
    marked = {index for index, (_, payload) in enumerate(chunks) if marker in payload}
    text = bytearray()
    spans: list[tuple[int, int, int]] = []  # start and end in `text`, index in `chunks`
    expected: int | None = None
    for index in sorted(range(len(chunks)), key=lambda index: chunks[index][0]):
        offset, payload = chunks[index]
        if expected is not None and offset > expected:
            text += b"\0" * len(marker)  # a hole: what stands before and after it is not adjacent
        overlap = max(0, (offset if expected is None else expected) - offset)
        if overlap >= len(payload):
            continue  # nothing that was not there before
        spans.append((len(text), len(text) + len(payload) - overlap, index))
        text += payload[overlap:]
        expected = offset + len(payload)
    at = text.find(marker)
    while at >= 0:
        marked |= {index for start, end, index in spans if start < at + len(marker) and end > at}
        at = text.find(marker, at + 1)
    return sum(len(chunks[index][1]) for index in marked)


def search(data: bytes, marker: str) -> list[tuple[Flow, int]]:
    """Marked payload bytes of each TCP stream that has some."""
    needle = marker.encode("ascii")
    found = [(flow, marked_bytes(chunks, needle)) for flow, chunks in streams(data)]
    return [(flow, count) for flow, count in found if count]


def search_other(data: bytes, marker: str) -> int:
    """Bytes of frames that are not IPv4 TCP and hold the marker: UDP, other protocols, other families."""
    needle = marker.encode("ascii")
    return sum(len(frame) for frame in frames(data) if tcp_payload(frame) is None and needle in frame)
