"""Policies: the YAML that people write, the automaton that guards and controllers execute, and the operator's signature.

Pure: no socket, no file, no clock, no randomness; the same source gives the same bytes. `source` reads YAML with line
numbers, `schema` holds its shape, `compile` makes the compiled form, `automaton` reads and executes that form exactly as
runtime/internal/policy does in Go, `envelope` signs and verifies, `lint` looks for what is allowed and should not be, and
`render` shows a policy to people. docs/reference/policy.md is the manual.
"""
