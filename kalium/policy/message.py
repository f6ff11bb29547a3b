"""Messages as the guard's parsers normalise them, the reasons of verdicts, and how both are written in logs.

The same as runtime/internal/policy/message.go; tests/vectors/policies hold the two together.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kalium.policy.limits import MESSAGE_TEXT_MAX


class Reason(str, enum.Enum):
    """Why a verdict came out as it did. The set is closed: it is a metric label and a log field."""

    ALLOWED = "allowed"
    OUT_OF_ORDER = "out_of_order"
    UNKNOWN_PEER = "unknown_peer"
    NOT_IN_POLICY = "not_in_policy"
    NO_INVOCATION = "no_invocation"
    UNKNOWN_PROTOCOL = "unknown_protocol"
    MALFORMED = "malformed"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too_large"
    HELD_TOO_LONG = "held_too_long"
    CONNECTION_DEAD = "connection_dead"
    NO_GUARD = "no_guard"
    LEASE_EXPIRED = "lease_expired"
    CONTROLLER_UNAVAILABLE = "controller_unavailable"
    NOT_AN_ENTRY = "not_an_entry"
    BAD_TOKEN = "bad_token"
    UNKNOWN_CALL = "unknown_call"
    EDGE_NOT_ALLOWED = "edge_not_allowed"
    UNKNOWN_FUNCTION = "unknown_function"
    NAME_NOT_LISTED = "name_not_listed"
    SNI_MISMATCH = "sni_mismatch"
    GATEWAY_RULE = "gateway_rule"
    INCOMING_NOT_DECLARED = "incoming_not_declared"
    REENTRANT = "reentrant"
    UNREGISTERED = "unregistered"
    POLICY_MISMATCH = "policy_mismatch"
    NO_KEY = "no_key"
    RETIRED = "retired"
    RATE_BOUND = "rate_bound"
    UNKNOWN_STATE = "unknown_state"
    OVERLOADED = "overloaded"


class Kind(str, enum.Enum):
    """The protocol family of a message. OTHER matches no symbol of any policy."""

    OTHER = "other"
    HTTP = "http"
    HTTPS = "https"
    INVOKE = "invoke"
    MYSQL = "mysql"
    SMTP = "smtp"


@dataclass(frozen=True)
class Message:
    """An outgoing unit that the function CFG orders. Never payload: no header values, no bodies, no literals.

    `method`, `path` (without query), `query` (the keys), `upgrade` (to websocket) and `grpc` belong to http and https, `callee`,
    `asynchronous` (through the gateway's queue) and `callback` (the function that its result goes to, "" for none) to invoke,
    `verb`, `read` and `write` (tables, sorted, unqualified in the peer's schema) to mysql, `sender` ("" is the null
    reverse-path) and `to` to smtp.
    """

    kind: Kind
    peer: str = ""
    method: str = ""
    path: str = ""
    query: tuple[str, ...] = ()
    callee: str = ""
    verb: str = ""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    upgrade: bool = False
    grpc: bool = False
    sender: str = ""
    to: tuple[str, ...] = ()
    asynchronous: bool = False
    callback: str = ""

    def text(self) -> str:
        """The message as a symbol of a policy is written, so that a log line can be compared with the policy by eye."""
        if self.kind in (Kind.HTTP, Kind.HTTPS):
            target = self.path + ("?" + "&".join(self.query) if self.query else "")
            parts = [self.kind.value, self.method, self.peer, target]
            parts += [word for word, holds in (("websocket", self.upgrade), ("grpc", self.grpc)) if holds]
        elif self.kind is Kind.INVOKE:
            parts = ["invoke", self.callee]
            parts += ["async"] if self.asynchronous else []
            parts += ["callback", self.callback] if self.callback else []
        elif self.kind is Kind.MYSQL:
            parts = ["mysql", self.verb]
            parts += ["read", ",".join(self.read)] if self.read else []
            parts += ["write", ",".join(self.write)] if self.write else []
        elif self.kind is Kind.SMTP:
            parts = ["smtp", "mail", self.peer]
            parts += ["from", self.sender] if self.sender else []
            parts += ["to", ",".join(self.to)] if self.to else []
        else:
            parts = ["other", self.peer]
        return printable(" ".join(parts), MESSAGE_TEXT_MAX)


def printable(text: str, bytes_max: int) -> str:
    """`text` with everything but printable ASCII as '?', cut to `bytes_max` and then ending in "..."."""
    cut = text[:bytes_max]
    clean = "".join(character if " " <= character <= "~" else "?" for character in cut)
    return clean[:-3] + "..." if len(text) > bytes_max >= 3 else clean
