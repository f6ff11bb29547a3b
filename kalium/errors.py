"""The one shape of every error that a person has to act on, and the exit codes that programs read."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_NO = 1  # the command ran and its answer is no: a policy with errors, a signature that does not hold
EXIT_USAGE = 2  # the command line cannot be what was meant
EXIT_ENVIRONMENT = 3  # a file, a service or the machine is not as it has to be
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT

EXIT_CODES = frozenset({EXIT_DONE, EXIT_NO, EXIT_USAGE, EXIT_ENVIRONMENT, EXIT_INTERRUPTED})


class KaliumError(Exception):
    """What was attempted on what, what was found, and the next step.

    `code` is `area.what` and stable, for programs. `attempted` begins with "cannot". `exit_code` is one of the EXIT
    constants. Our own mistakes are assertions and never this.
    """

    def __init__(self, code: str, attempted: str, found: str, next_step: str, exit_code: int = EXIT_ENVIRONMENT) -> None:
        assert exit_code in EXIT_CODES, exit_code
        super().__init__(f"{attempted}: {found}")
        self.code = code
        self.attempted = attempted
        self.found = found
        self.next_step = next_step
        self.exit_code = exit_code

    def for_humans(self) -> str:
        """The two lines that every program of ours prints on standard error."""
        return f"error[{self.code}]: {self.attempted}: {self.found}\nnext: {self.next_step}"
