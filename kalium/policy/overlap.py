"""Whether two lines of a policy have a message in common."""

from __future__ import annotations

from kalium.policy.automaton import Symbol, is_placeholder, path_matches
from kalium.policy.message import Kind


def overlap(one: Symbol, other: Symbol) -> bool:
    """Whether some message matches both lines, wherever they stand."""
    if (one.kind, one.peer) != (other.kind, other.peer):
        return False
    if one.kind is Kind.INVOKE:
        return one.key() == other.key()
    if one.kind is Kind.MYSQL:
        return (one.verb, one.read, one.write) == (other.verb, other.read, other.write)
    if one.kind is Kind.SMTP:
        return (not one.sender or not other.sender or one.sender == other.sender) and (not one.to or not other.to or bool({*one.to} & {*other.to}))
    # Any query of one may be empty, so the keys keep no two lines apart.
    same = (one.method, one.upgrade, one.grpc) == (other.method, other.upgrade, other.grpc)
    return same and _paths_overlap(one.path, other.path)


def _paths_overlap(one: str, other: str) -> bool:
    segments, parts = one[1:].split("/"), other[1:].split("/")
    return len(segments) == len(parts) and all(
        (is_placeholder(segment) and is_placeholder(part)) or path_matches(f"/{segment}", f"/{part}") or path_matches(f"/{part}", f"/{segment}")
        for segment, part in zip(segments, parts, strict=True)
    )
