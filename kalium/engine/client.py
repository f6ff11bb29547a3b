"""A client of the OpenFaaS REST API for the command line: one connection a call, every wait with a deadline."""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kalium.engine.backend import REASON_ANNOTATION
from kalium.errors import EXIT_NO, EXIT_USAGE, KaliumError

CALL_SECONDS_MAX = 150.0  # longer than the gateway's own deadlines together
POLL_SECONDS = 0.1
EXCERPT_CHARACTERS = 500


@dataclass(frozen=True)
class Answer:
    """An answer, read to its end."""

    status: int
    body: bytes

    def excerpt(self) -> str:
        """Status and text, on one line."""
        text = " ".join(self.body.decode("utf-8", "replace").split())
        return f"{self.status} {text[:EXCERPT_CHARACTERS]}".strip()


class Client:
    """The gateway at `url`. `password` is asked for when a call needs it: invocations do not."""

    def __init__(self, url: str, user: str, password: Callable[[], str]) -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port:
            raise KaliumError(
                "function.gateway", f"cannot use the gateway {url!r}", "it is no http:// URL", "write it as http://127.0.0.1:31112", EXIT_USAGE
            )
        self.url = url.rstrip("/")
        self._host, self._port, self._prefix = parts.hostname, port, parts.path.rstrip("/")
        self._user, self._password = user, password

    def call(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request, whatever the answer. Raises KaliumError function.gateway when there is none."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CALL_SECONDS_MAX)
        try:
            connection.request(method, self._prefix + path, body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise KaliumError(
                "function.gateway",
                f"cannot ask the gateway {self.url}",
                f"{type(error).__name__}: {error}",
                "is it running? its log is /var/log/kalium/engine.log; another one is named with --gateway",
            ) from error
        finally:
            connection.close()

    def administer(self, attempted: str, method: str, path: str, body: Any = None, accept: tuple[int, ...] = (200, 201, 202)) -> Answer:
        """A call of /system/. Raises KaliumError function.refused for an answer that is not accepted."""
        token = base64.b64encode(f"{self._user}:{self._password()}".encode()).decode("ascii")
        data = None if body is None else json.dumps(body).encode("utf-8")
        answer = self.call(method, path, data, {"Authorization": f"Basic {token}", "Content-Type": "application/json"})
        if answer.status == 401:
            raise KaliumError("function.password", f"cannot {attempted}", "the gateway does not take the password", "see --user and --password-file")
        if answer.status not in accept:
            raise KaliumError("function.refused", f"cannot {attempted}", f"the gateway answered {answer.excerpt()}", "correct what it names", EXIT_NO)
        return answer

    def list(self) -> list[dict[str, Any]]:
        """Status of every function."""
        listed: list[dict[str, Any]] = json.loads(self.administer("list functions", "GET", "/system/functions").body)
        return listed

    def describe(self, name: str) -> dict[str, Any]:
        """Status of one function. Raises KaliumError, also when it is not deployed."""
        answer = self.administer(f"describe {name}", "GET", f"/system/function/{urllib.parse.quote(name, safe='')}?usage=1")
        described: dict[str, Any] = json.loads(answer.body)
        return described

    def deploy(self, body: Mapping[str, Any]) -> bool:
        """Update a function, or create it when it is not there. Returns whether it was there."""
        attempted = f"deploy {body['service']}"
        answer = self.administer(attempted, "PUT", "/system/functions", body, accept=(200, 201, 202, 404))
        if answer.status == 404:
            self.administer(attempted, "POST", "/system/functions", body)
        return answer.status != 404

    def wait_ready(self, name: str, seconds_max: float) -> None:
        """Return when an instance of what was deployed last answers. Raises KaliumError when one failed, or at the deadline."""
        deadline = time.monotonic() + seconds_max
        while True:
            status = self.describe(name)
            if status.get("availableReplicas"):
                return
            reason = (status.get("annotations") or {}).get(REASON_ANNOTATION)
            if reason or time.monotonic() > deadline:
                found = reason or f"no instance was ready after {seconds_max:.0f} s"
                raise KaliumError(
                    "function.not_ready",
                    f"cannot start {name}",
                    found,
                    f"see /var/log/kalium/engine.log; `kalium function describe {name}` shows whether a later try worked",
                    EXIT_NO,
                )
            time.sleep(POLL_SECONDS)

    def remove(self, name: str) -> None:
        """Remove a function and all its instances."""
        self.administer(f"remove {name}", "DELETE", "/system/functions", {"functionName": name})

    def invoke(self, name: str, path: str, method: str, data: bytes, headers: Mapping[str, str]) -> Answer:
        """Invoke a function; any status is an answer."""
        return self.call(method, f"/function/{urllib.parse.quote(name, safe='')}{path}", data, headers)
