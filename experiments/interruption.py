"""A run that cannot go on: why, told in one paragraph, and whether it may be resumed.

A wrong answer refuses a run, unless the host that should have given it is gone: then the run was interrupted, and the block in
which it happened is measured again as a whole. Which of the two it was is not guessed: the site is asked.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments import health
from experiments.errors import ExperimentError, RunRefused
from experiments.paths import RunPaths, utc_now
from experiments.progress import Progress
from experiments.site import Site

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What a lost node or a full disk looks like from outside; every other refusal says something of the product.
MAY_BE_THE_SITE = ("e1.wrong_answer", "e1.unjudged", "cluster.runtime")


def explained(error: BaseException, site: Site) -> BaseException:
    """`error`, or what stands behind it: the host that is gone, the disk that is full, the pod that does not start."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return ExperimentError("results.full", f"write {error.filename or 'the run'}", error.strerror or str(error), "make room on this machine")
    if not isinstance(error, ExperimentError) or (isinstance(error, RunRefused) and error.code not in MAY_BE_THE_SITE):
        return error
    found = health.findings(site)
    if not found:
        return error
    return ExperimentError("site.unwell", error.attempted, f"{health.told(found)} ({error.found})", found[0].next_step)


@contextlib.contextmanager
def told(run: RunPaths, record: Mapping[str, Any], state: Progress | None, site: Site, *, leave: Callable[[], None]) -> Iterator[None]:
    """What measures a run stands in this `with`. When it fails, run.json says why, and `leave` removes what was deployed as far as possible.

    With `state` the run can be resumed, unless it was refused. Nothing that goes wrong on the way hides the first error.
    """
    try:
        yield
    except BaseException as error:
        reason = _kept(explained(error, site), run, record, state, leave)
        if reason is error:
            raise
        raise reason from error


@contextlib.contextmanager
def explaining(site: Site) -> Iterator[None]:
    """What asks a site, without a run, stands in this `with`: its errors name what is behind them."""
    try:
        yield
    except ExperimentError as error:
        reason = explained(error, site)
        if reason is error:
            raise
        raise reason from error


def _kept(reason: BaseException, run: RunPaths, record: Mapping[str, Any], state: Progress | None, leave: Callable[[], None]) -> BaseException:
    refused = isinstance(reason, RunRefused) or not isinstance(reason, ExperimentError | KeyboardInterrupt)
    if state is not None and refused:
        state.end(run)
    with contextlib.suppress(OSError):  # on a full disk run.json stays as it was when the run began
        run.write_record({**record, "end": utc_now(), "error": str(reason) or type(reason).__name__})
    with contextlib.suppress(ExperimentError):  # a gateway that is gone cannot be asked; whoever goes on removes it then
        leave()
    if state is None or refused:
        print(f"the run stays incomplete in {run.folder}", flush=True)
        return reason
    again = f"`fab run-{run.experiment} --resume {run.stamp}` goes on with block {state.blocks + 1}"
    print(f"the run is interrupted in {run.folder}: {again}", flush=True)
    if isinstance(reason, ExperimentError):
        return ExperimentError(reason.code, reason.attempted, reason.found, f"{reason.next_step}; then {again}", exit_code=reason.exit_code)
    return reason
