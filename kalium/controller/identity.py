"""Who a peer is by its certificate."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(str, enum.Enum):
    """What the site's CA has issued a certificate for. NONE registers nothing and may ask for the status, as every role may."""

    AGENT = "agent"
    CONTROLLER = "controller"
    CLIENT = "client"
    NONE = ""


@dataclass(frozen=True)
class PeerIdentity:
    """A role, and the name that the certificate gives its holder in it: of an agent, its node."""

    role: Role
    name: str

    @classmethod
    def parse(cls, uri: str) -> PeerIdentity:
        """What a certificate's URI kalium://ROLE/NAME says; NOBODY for any other."""
        scheme, _, rest = uri.partition("://")
        role, _, name = rest.partition("/")
        if scheme != "kalium" or role not in ("agent", "controller", "client") or not name or "/" in name:
            return NOBODY
        return cls(Role(role), name)

    def is_agent_of(self, node: str) -> bool:
        """Whether this peer may speak for `node`."""
        return self.role is Role.AGENT and self.name == node != ""


NOBODY = PeerIdentity(Role.NONE, "")
