"""The audit log: what was denied, refused or changed, in a chain of signed lines that nobody can edit unseen.

`chain` makes the lines, `journal` brings them to the disk, `writer` does so on a thread, `verify` checks them. The Go twin of
the first three is runtime/internal/audit; docs/reference/audit.md is the specification.
"""
