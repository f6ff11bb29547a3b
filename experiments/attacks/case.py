"""What a case of the attack suite is made of."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from experiments.entries import MASTER, RECEIVE, SUCCESS
from experiments.site import Site
from experiments.verdicts import Verdict

MARKER_BYTES = 16
# The field of an input that each function's vulnerable variant runs.
HOLES = {RECEIVE: "exploit", MASTER: "exploit_master", SUCCESS: "exploit_success"}


@dataclass(frozen=True)
class Received:
    """What one receiver saw of a marker: bytes of the messages that carry it (0: none), and where it was seen."""

    bytes: int
    where: str


@dataclass(frozen=True)
class Match:
    """Verdicts of one of `kinds` whose message or peer contains `fragment`."""

    kinds: tuple[str, ...]
    fragment: str = ""

    def holds(self, verdict: Verdict) -> bool:
        """Whether `verdict` is one of them."""
        return verdict.kind in self.kinds and (self.fragment in verdict.message or self.fragment in verdict.peer)


class Evidence(Protocol):
    """Ways to ask receivers, given to each case; see runner.py for the real ones."""

    def receiver(self, marker: str) -> Received:
        """The attacker's server, by its own log."""

    def imageserver(self, marker: str) -> Received:
        """The image server, by its own access log after its decryption."""

    def database(self, marker: str) -> Received:
        """The database, by what it stored."""


@dataclass(frozen=True)
class Case:
    """One attack.

    `exploits` run inside the vulnerable variants of functions and derive the marker from `@REVERSED@`: the request that carries
    the exploit would otherwise carry the marker through every capture by itself. `attacker` is the function whose guard has to
    deny the hostile message; `allowed_first` and `denied` say which of its verdicts show that this was stopped, and not the
    exploit's own preparations. `at_receiver` asks the receiver's own log before the next case; it is None where only the
    capture on the wire can tell.
    """

    name: str
    category: str
    claim: str
    exploits: Mapping[str, str]
    denied: Match
    at_receiver: Callable[[Evidence, str], Received] | None
    allowed_first: Match | None = None
    attacker: str = RECEIVE

    def fields(self, marker: str, site: Site) -> dict[str, str]:
        """What the input has besides: the exploits for this run, with marker and addresses filled in."""
        assert len(marker) == 2 * MARKER_BYTES, "a marker is 16 random bytes in hex"
        return {HOLES[function]: _filled_in(text, marker, site) for function, text in self.exploits.items()}

    def denial(self, verdicts: Sequence[Verdict]) -> Verdict | None:
        """The denial of the hostile message among the function's verdicts, oldest first; None when there is none."""
        prepared = self.allowed_first is None
        for verdict in verdicts:
            if verdict.denied and prepared and self.denied.holds(verdict):
                return verdict
            if not verdict.denied and self.allowed_first is not None and self.allowed_first.holds(verdict):
                prepared = True
        return None


def _filled_in(exploit: str, marker: str, site: Site) -> str:
    text = textwrap.dedent(exploit)
    for name, value in {
        "@REVERSED@": marker[::-1],
        "@RECEIVER@": site.attacker_address,
        "@RECEIVER_PORT@": str(RECEIVER_PORT),
        "@IMAGES@": site.images_url.rsplit("/", 1)[0],
        "@IMAGE@": site.images_url,
    }.items():
        text = text.replace(name, value)
    assert marker not in text, "the request that carries the exploit does not carry the marker"
    return text


RECEIVER_PORT = 9999  # not in any policy; the receiver listens there while the suite runs
