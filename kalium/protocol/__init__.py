"""The wire between guard, agent and controller: frames, their codec, and the sessions as cores that do no I/O.

`limits` has every bound, `frames` what can be said, `codec` the bytes of it, `session` the controller's and the agent's side
of one connection. Nothing here opens a socket, reads a clock or draws a random number. The specification is
docs/reference/protocol.md, and tests/vectors/frames.json its executable half, which the Go side reads too.
"""
