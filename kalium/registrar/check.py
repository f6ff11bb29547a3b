"""Asking a running registrar how it is."""

from __future__ import annotations

import json
import socket
from typing import Any

from kalium.errors import EXIT_NO, KaliumError
from kalium.registrar.config import Config
from kalium.registrar.limits import STATUS_BYTES_MAX, STATUS_SECONDS_MAX

NEXT = "see why in /var/log/kalium/registrar.log"


def ask(config: Config) -> dict[str, Any]:
    """What the registrar says. Raises KaliumError with exit code 3 when none answers."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(STATUS_SECONDS_MAX)
            connection.connect(str(config.status))
            with connection.makefile("rb") as answer:
                status: Any = json.loads(answer.readline(STATUS_BYTES_MAX))
    except (OSError, ValueError) as error:
        raise KaliumError(
            "registrar.unreachable", f"cannot ask the registrar at {config.status}", str(error) or type(error).__name__, "start it, and ask as root"
        ) from error
    if not isinstance(status, dict):
        raise KaliumError("registrar.unreachable", f"cannot ask the registrar at {config.status}", "its answer is no object", NEXT)
    return status


def require_ready(status: dict[str, Any]) -> None:
    """Raises KaliumError with exit code 1 unless pods that are admitted now will be registered."""
    for part, what in (
        ("following", "it does not hear of pods: the API server does not answer it"),
        ("agent", "the node's agent does not answer it"),
    ):
        if status.get(part) is not True:
            raise KaliumError(f"registrar.no_{part}", "cannot call the registrar well", what, NEXT, EXIT_NO)
