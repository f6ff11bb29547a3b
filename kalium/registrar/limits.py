"""Bounds of the registrar. Seconds unless the name says otherwise."""

from __future__ import annotations

PODS_MAX = 1024  # of the node, in the ledger; as many instances as an agent takes
PAGE_PODS = 500
PAGES_MAX = 16
IMAGE_CHARACTERS_MAX = 512
DETAIL_CHARACTERS_MAX = 300

LIST_SECONDS_MAX = 30.0
WATCH_SECONDS = 60  # after which the API server ends a watch, so that a dead link is noticed
WATCH_SILENCE_SECONDS_MAX = WATCH_SECONDS + 15.0
WATCH_SECONDS_LEAST = 1.0  # one that ends sooner is taken for a fault, and not begun again at once

AGENT_POLL_SECONDS = 2.0  # until an agent that was restarted is noticed
REFUSED_RETRY_SECONDS = 5.0  # a policy may have come meanwhile
BACKOFF_SECONDS_LEAST = 0.1
API_BACKOFF_SECONDS_MAX = 10.0
AGENT_BACKOFF_SECONDS_MAX = 2.0

STATUS_SECONDS_MAX = 5.0
STATUS_BYTES_MAX = 4096

assert WATCH_SILENCE_SECONDS_MAX > WATCH_SECONDS
assert PAGE_PODS * PAGES_MAX >= PODS_MAX
