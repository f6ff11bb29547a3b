"""Every bound of the wire, in bytes, counts or milliseconds, and how they hold together."""

from __future__ import annotations

FORM = 1  # of frames, in the prefix of each: how bytes are cut
PROTOCOLS = (2,)  # of the messages: what this side speaks, in HELLO and AGENT_HELLO. The highest that both speak is taken

PREFIX_BYTES = 12
FRAME_BYTES_MAX = 1024 * 1024  # of a payload: a signed policy fits, and one peer cannot ask for more memory than this
TEXT_BYTES_MAX = 512  # of any text, in UTF-8: they are names, ids and sentences
ITEMS_MAX = 4096  # elements of any list or map: a function has at most so many states

ENVELOPE_BYTES_MAX = FRAME_BYTES_MAX - 4096  # a signed policy; the room left is for the other fields of its frame
APPS_BYTES_MAX = FRAME_BYTES_MAX - 4096  # of all policies in one CONTROLLER_WELCOME; the others follow as POLICY

ID_MAX = 2**32 - 1
INT_MIN = -(2**63)
INT_MAX = 2**63 - 1

STEP_HEX = 16
TOKEN_HEX = 32
CALL_HEX = 32

QUESTIONS_MAX = 4096  # open ones of one connection; beyond it the connection is closed, it does not queue
PROTOCOLS_MAX = 16  # versions that a hello may list
HELLO_TIMEOUT_MS = 10_000  # a connection that has not said who it is by then is closed
LEASE_MS = 60_000  # what one LEASE is worth
LEASE_EVERY_MS = 20_000
WRITE_BUFFER_BYTES_MAX = 4 * FRAME_BYTES_MAX  # what may wait for a peer that does not read; beyond it the peer is dropped

assert ENVELOPE_BYTES_MAX + PREFIX_BYTES + TEXT_BYTES_MAX < FRAME_BYTES_MAX  # any policy fits one frame, so no reassembly
assert 3 * LEASE_EVERY_MS <= LEASE_MS  # two lost renewals in a row are survived
assert WRITE_BUFFER_BYTES_MAX >= 2 * (FRAME_BYTES_MAX + PREFIX_BYTES)  # the largest frame may follow another
