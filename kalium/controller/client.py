"""Asks a controller for its status over mTLS, as `kalium controller status` and readiness checks do. Blocking, with a deadline."""

from __future__ import annotations

import socket
import ssl
import time

from kalium.controller import tls
from kalium.controller.config import Config
from kalium.controller.identity import Role
from kalium.errors import KaliumError
from kalium.protocol.frames import Status, StatusAnswer, StatusReport
from kalium.protocol.session import ControllerSession

TIMEOUT_S = 5.0
RECEIVE_BYTES = 65536
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # what a client means by the address of a listener on all of them


def status(config: Config, *, timeout_s: float = TIMEOUT_S) -> StatusReport:
    """The status of the controller that `config` starts. Raises KaliumError controller.away when it does not answer in time."""
    context = tls.client_context(config.tls)
    host = ANY.get(config.host, config.host)
    deadline = time.monotonic() + timeout_s
    try:
        with (
            socket.create_connection((host, config.port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            peer = tls.peer_of(connection.getpeercert()).identity
            if peer.role is not Role.CONTROLLER:
                raise _away(config, f"its certificate has the role {peer.role.value or 'none'}", "see which program has the port")
            if peer.name != config.name:  # on another host's address another one answers, and this one would be called ready
                raise _away(config, f"it is the controller {peer.name}, not {config.name}", "correct `listen`: each has an address of its own")
            return _ask(connection, deadline)
    except ssl.SSLCertVerificationError as error:
        raise _away(
            config, f"its certificate does not hold: {error.verify_message}", "compare `tls.ca` with the CA of the running controller"
        ) from error
    except ssl.SSLError as error:
        raise _away(config, f"no TLS: {error.reason or error}", "its log says whom it refused and why") from error
    except OSError as error:
        raise _away(config, error.strerror or str(error) or "no answer in time", "start it, and read its log") from error


def _ask(connection: ssl.SSLSocket, deadline: float) -> StatusReport:
    session = ControllerSession()
    question = session.ask(Status())
    connection.sendall(session.data_to_send())
    while session.close_reason is None:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        data = connection.recv(RECEIVE_BYTES)
        if data:
            session.receive_data(data, now_ns=time.monotonic_ns())
        else:
            session.receive_end()
        for event in session.events():
            if event.id == question and isinstance(event.frame, StatusAnswer):
                return event.frame.status
    raise ConnectionError(f"it closed the connection: {session.close_reason}")


def _away(config: Config, found: str, next_step: str) -> KaliumError:
    return KaliumError("controller.away", f"cannot ask the controller at {config.host}:{config.port}", found, next_step)
