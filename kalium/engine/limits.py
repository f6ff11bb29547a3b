"""Every bound of the gateway, in bytes, counts or seconds, and how they hold together."""

from __future__ import annotations

# What one request may be.
BODY_BYTES_MAX = 16 << 20  # of an invocation and of its answer; both are held whole
ADMIN_BYTES_MAX = 1 << 20  # of a call of the REST API
HEAD_BYTES_MAX = 64 << 10  # of an answer's status line and header fields
HEAD_FIELDS_MAX = 256

# How long it may take.
QUEUE_SECONDS_MAX = 60.0  # a request waits for a free instance
INVOCATION_SECONDS_MAX = 60.0  # then for its answer
CONNECT_SECONDS_MAX = 5.0
RETRY_AFTER_SECONDS = 1
RETIRED_BYTES_MAX = 4096  # of the body by which a guard says that its instance takes no more requests

# What is deployed.
QUEUE_REQUESTS_MAX = 100  # waiting requests of one function; the next is refused
REPLICAS_MAX = 16
INFLIGHT_MAX = 16  # requests at a time in one instance, as a policy bounds its max_inflight
FUNCTIONS_MAX = 100
NAME_CHARACTERS_MAX = 63  # a DNS label, as on a cluster
IMAGE_CHARACTERS_MAX = 512
VALUES_MAX = 256  # entries of each of envVars, labels, annotations, secrets
SECRETS_MAX = 256
SECRET_BYTES_MAX = 512 << 10

# How an instance is made and kept.
PODMAN_AT_ONCE = 4  # podman commands; more only wait for its locks
PODMAN_SECONDS_MAX = 60.0
IP_SECONDS_MAX = 10.0
AGENT_SECONDS_MAX = 10.0
AGENT_LINE_BYTES_MAX = 64 << 10
READY_SECONDS_MAX = 60.0  # from the start of an instance to its first 200, and for one that has to show that it still works
PROBE_SECONDS_MAX = 1.0
PROBE_PAUSE_SECONDS = (0.02, 0.25)  # the first pause and the longest; a sandbox is up after some 300 ms
RESTART_PAUSE_SECONDS = (0.5, 30.0)  # doubled from one failure to the next
STEADY_SECONDS = 60.0  # an instance that was ready for so long begins with the short pause again
DRAIN_SECONDS_MAX = 60.0  # a replaced instance finishes its request
REMOVE_ATTEMPTS_MAX = 3
REMOVE_PAUSE_SECONDS = 0.5
STOP_SECONDS = 1  # between SIGTERM and SIGKILL of a function

# What is told of failures.
ERROR_CHARACTERS_MAX = 600  # of a program's own words
LOG_LINES_TOLD = 10
CONTAINER_LOG_BYTES_MAX = 10 << 20
LOG_LINES_MAX = 10_000  # of one answer of /system/logs

assert PROBE_PAUSE_SECONDS[1] + PROBE_SECONDS_MAX < READY_SECONDS_MAX  # an instance is asked more than once
assert DRAIN_SECONDS_MAX >= INVOCATION_SECONDS_MAX  # an update interrupts no request
