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

# Asynchronous calls.
CALLS_MAX = 1000  # accepted and not over; the next is refused
CALLS_BYTES_MAX = 256 << 20  # of their bodies
TOKEN_BYTES_MAX = 512  # of a callback's token, which is a text of the guards' protocol
CALLS_AT_ONCE = 32
CALLS_AT_ONCE_OF_FUNCTION = 16
CALL_WAIT_SECONDS_MAX = 60.0  # for a function that has no instance with room, beside the time in its queue
CALL_WAIT_PAUSE_SECONDS = 0.25
CALLS_DRAIN_SECONDS_MAX = 30.0  # those that were begun, when the gateway is told to stop

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

# The API server of Kubernetes.
API_SECONDS_MAX = 15.0  # one request and its answer
API_CONNECT_SECONDS_MAX = 5.0
API_ANSWER_BYTES_MAX = 64 << 20  # a list of every pod
BEGIN_SECONDS_MAX = 10.0  # until the first list; then the gateway serves what it knows
ADMIT_SECONDS_MAX = 15.0  # until a pod of a deployment has begun; then it is accepted in doubt
PATIENCE_SECONDS = 5.0  # for a node to take a pod, before that is a reason
WATCH_SECONDS = 290  # a watch ends by itself
WATCH_SILENCE_SECONDS_MAX = 90.0  # the server sends a bookmark every minute
WATCH_PAUSE_SECONDS = (0.2, 10.0)  # doubled from one failure to the next
TOMBSTONES_MAX = 1000
WARNINGS_MAX = 1000

# What is told of failures.
ERROR_CHARACTERS_MAX = 600  # of a program's own words
LOG_LINES_TOLD = 10
CONTAINER_LOG_BYTES_MAX = 10 << 20
LOG_LINES_MAX = 10_000  # of one answer of /system/logs that follows nothing
STREAMED_LINE_BYTES_MAX = 1 << 20
FOLLOWERS_MAX = 16
FOLLOW_SECONDS_MAX = 3600.0
FOLLOW_TICK_SECONDS = 1.0  # until it is seen that the reader has gone, or that there is another instance
FOLLOWED_LINES_MAX = 1000  # that wait for a slow reader

assert PROBE_PAUSE_SECONDS[1] + PROBE_SECONDS_MAX < READY_SECONDS_MAX  # an instance is asked more than once
assert DRAIN_SECONDS_MAX >= INVOCATION_SECONDS_MAX  # an update interrupts no request
assert CALLS_AT_ONCE_OF_FUNCTION < CALLS_AT_ONCE  # no function has all workers
assert BODY_BYTES_MAX <= CALLS_BYTES_MAX
