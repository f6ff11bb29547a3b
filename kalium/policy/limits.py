"""Bounds of policies. Those of the compiled form are the Go executor's (runtime/internal/policy/parse.go); a test compares them."""

from __future__ import annotations

# The compiled form: they keep the cost of a step and the size of a verdict small, whatever a policy says.
COMPILED_BYTES_MAX = 700 * 1024  # in base64 inside a frame of 1 MiB
ENVELOPE_BYTES_MAX = 1 << 20
SYMBOLS_MAX = 1024
LABELS_MAX = 2048  # of an app CFG
STATES_MAX = 4096
EDGES_MAX = 65536
FUNCTIONS_MAX = 512
PEERS_MAX = 256
LIST_MAX = 64  # tables of a statement, query keys, segments of a path, recipients
NAME_BYTES_MAX = 255
DEADLINE_MS_MAX = 60_000
TIMEOUT_MS_MAX = 3_600_000
BODY_BYTES_MAX = 1 << 30
RETRIES_MAX = 3
INFLIGHT_MAX = 16
DEPTH_MAX = 12
MESSAGE_TEXT_MAX = 300
EXPECTED_MAX = 16
VERSION_MAX = (1 << 31) - 1

# The source: YAML that a person wrote and can review.
SOURCE_BYTES_MAX = 256 * 1024
SOURCE_DEPTH_MAX = 24
SOURCE_NODES_MAX = 50_000
REPEAT_MAX = 256  # a bounded repeat is unrolled

# What a function gets when its policy does not say otherwise; lint reports a raised max_body, max_inflight or retries.
DEADLINE_MS_DEFAULT = 250
MAX_BODY_DEFAULT = 1 << 20
INVOCATION_TIMEOUT_MS_DEFAULT = 60_000
TAIL_MS_DEFAULT = 10_000
QUIET_MS_DEFAULT = 200
RETIRE_MS_DEFAULT = 30_000
INFLIGHT_DEFAULT = 1
RETRIES_DEFAULT = {"GET": 1, "HEAD": 1, "PUT": 1, "DELETE": 1}  # by method: what may be sent twice; others 0

assert COMPILED_BYTES_MAX * 4 // 3 + 1024 <= ENVELOPE_BYTES_MAX  # any compiled policy fits an envelope
assert LABELS_MAX >= 2 * SYMBOLS_MAX  # each line may invoke under a label of its own, with a barrier behind it
assert MAX_BODY_DEFAULT <= BODY_BYTES_MAX
assert max(INVOCATION_TIMEOUT_MS_DEFAULT, TAIL_MS_DEFAULT, RETIRE_MS_DEFAULT) <= TIMEOUT_MS_MAX
assert QUIET_MS_DEFAULT < RETIRE_MS_DEFAULT  # silence has to be possible before the instance is given up
assert DEADLINE_MS_DEFAULT <= DEADLINE_MS_MAX
