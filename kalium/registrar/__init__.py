"""The registrar of a cluster's node: tells its agent which admitted pods are which functions. `ledger` and `admission` decide and
do no I/O; `pods` watches the API server, `server` ties both to the agent's socket."""
