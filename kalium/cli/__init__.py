"""The command `kalium <noun> <verb>`: argument parsing, files and streams; the work is in the packages beside this one.

One module a noun. Each has `register(subparsers)`, which adds the noun's parser and, below it, one parser a verb with
`set_defaults(run=function)`; a noun without a verb is wrong usage, so its own `add_subparsers` says `required=True`.
`function(arguments)` does the work and returns the exit code, or None for "done"; it raises KaliumError for what a person
has to act on. `main` imports only the module of the noun that was asked for.
"""
