"""Errors that tell a person what to do next, and the one place where they are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_NO = 1  # the task ran and its answer is no: a run refused, an attack missed
EXIT_USAGE = 2  # a parameter that cannot be
EXIT_ENVIRONMENT = 3  # the site, a service or a file is not as it has to be


class ExperimentError(Exception):
    """What was attempted on what, what was found, and the next step; `exit_code` is one of the EXIT constants."""

    def __init__(self, code: str, attempted: str, found: str, next_step: str, *, exit_code: int = EXIT_ENVIRONMENT) -> None:
        super().__init__(f"{attempted}: {found}")
        self.code = code
        self.attempted = attempted
        self.found = found
        self.next_step = next_step
        self.exit_code = exit_code

    def for_humans(self) -> str:
        """The two lines that the project prints for any error a person has to act on."""
        return f"error[{self.code}]: {self.attempted}: {self.found}\nnext: {self.next_step}"


class RunRefused(ExperimentError):
    """A run that measured, and whose samples must not be used: it stays on disk, marked incomplete."""

    def __init__(self, code: str, attempted: str, found: str, next_step: str) -> None:
        super().__init__(code, attempted, found, next_step, exit_code=EXIT_NO)


@contextmanager
def errors_for_humans() -> Iterator[None]:
    """Print an ExperimentError as its two lines and leave with its exit code; our own mistakes keep their traceback."""
    try:
        yield
    except ExperimentError as error:
        print(error.for_humans(), file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt as error:
        print("error[task.interrupted]: run the task: interrupted\nnext: `fab clean` removes what it left behind", file=sys.stderr)
        raise SystemExit(130) from error
