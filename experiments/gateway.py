"""A small client of the OpenFaaS REST API: deploy, wait until ready, describe, invoke, remove. Every wait has a deadline."""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from experiments import machine
from experiments.errors import ExperimentError
from experiments.site import Site

CALL_SECONDS_MAX = 60.0
READY_SECONDS_MAX = 120.0
GONE_SECONDS_MAX = 60.0
POLL_SECONDS = 0.1
DEPLOYMENTS_AT_ONCE = 4
ADDRESS_ANNOTATION = "kalium.io/address"  # ip:port of each ready instance, comma-separated; our engine's, not OpenFaaS'


@dataclass(frozen=True)
class Function:
    """A function to deploy, in the API's terms."""

    name: str
    image: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    constraints: Sequence[str] = ()  # where it may run, as `kubernetes.io/hostname=NAME`

    def body(self) -> dict[str, Any]:
        """The deployment request."""
        return {
            "service": self.name,
            "image": self.image,
            "labels": dict(self.labels),
            "annotations": dict(self.annotations),
            "envVars": dict(self.environment),
        } | ({"constraints": list(self.constraints)} if self.constraints else {})


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def excerpt(self) -> str:
        """Status and the start of the body, for an error message."""
        return f"{self.status} {self.body[:300].decode('utf-8', 'replace').strip()!r}"


class Gateway:
    """The gateway at `url`; administrative calls authenticate, invocations do not. `dial` makes a connection in another way than from here."""

    def __init__(self, url: str, user: str, password: str, *, dial: Callable[[str, int, float], Any] | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None, f"a gateway URL has a host: {url}"
        self.url = url
        self._host, self._port = parts.hostname, parts.port or 80
        self._dial = dial
        self._authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")

    @classmethod
    def of(cls, site: Site) -> Gateway:
        """The site's gateway, with its password read now.

        On a remote host it is asked through that host's SSH connection: its password crosses no network in clear, and no port but
        SSH's has to be open for the operator.
        """
        there = machine.of(site.control)
        password = there.read_bytes(site.basic_auth_password_file).decode("utf-8").strip()
        dial = None if site.control.is_local else lambda host, port, seconds: there.tunnel(host, port, seconds_max=seconds)
        return cls(site.gateway, site.basic_auth_user, password, dial=dial)

    def _call(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *, seconds_max: float) -> Answer:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=seconds_max)
        if self._dial is not None:
            connection.sock = self._dial(self._host, self._port, seconds_max)
        try:
            connection.request(method, path, body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise ExperimentError(
                "gateway.unreachable", f"{method} {self.url}{path}", f"{type(error).__name__}: {error}",
                "see gateway's log in /var/log/kalium, or set the site up again with `make site`",
            ) from error  # fmt: skip
        finally:
            connection.close()

    def _administer(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        headers = {"Authorization": self._authorization, "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode("utf-8")
        return self._call(method, path, data, headers, seconds_max=CALL_SECONDS_MAX)

    def _refuse(self, attempted: str, answer: Answer) -> ExperimentError:
        hint = "the password file of the site does not match the gateway: run `make site`" if answer.status == 401 else "see the gateway's log"
        return ExperimentError("gateway.refused", f"{attempted} at {self.url}", answer.excerpt(), hint)

    def functions(self) -> list[str]:
        """Names of all deployed functions, sorted."""
        answer = self._administer("GET", "/system/functions")
        if answer.status != 200:
            raise self._refuse("list functions", answer)
        return sorted(str(entry["name"]) for entry in json.loads(answer.body))

    def information(self) -> dict[str, Any]:
        """The gateway's account of itself."""
        answer = self._administer("GET", "/system/info")
        if answer.status != 200:
            raise self._refuse("ask for /system/info", answer)
        info: dict[str, Any] = json.loads(answer.body)
        return info

    def describe(self, name: str) -> dict[str, Any] | None:
        """The function's status, or None when it is not deployed."""
        answer = self._administer("GET", f"/system/function/{name}?usage=1")
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise self._refuse(f"describe {name}", answer)
        status: dict[str, Any] = json.loads(answer.body)
        return status

    def deploy(self, function: Function) -> None:
        """Ask for `function`; it must not be deployed yet. It is not ready when this returns."""
        answer = self._administer("POST", "/system/functions", function.body())
        if answer.status not in (200, 201, 202):
            raise self._refuse(f"deploy {function.name} ({function.image})", answer)

    def wait_ready(self, name: str, *, seconds_max: float = READY_SECONDS_MAX) -> None:
        """Return when at least one instance of `name` is available."""
        deadline = time.monotonic() + seconds_max
        while time.monotonic() < deadline:
            status = self.describe(name)
            if status is not None and int(status.get("availableReplicas") or 0) >= 1:
                return
            time.sleep(POLL_SECONDS)
        raise ExperimentError(
            "gateway.not_ready", f"wait for an instance of {name}", f"none was available after {seconds_max:.0f} s",
            f"its log (`podman logs`, `kubectl logs`) tells whether it started; the agent's log tells whether {name} got its policy",
        )  # fmt: skip

    def remove(self, name: str) -> None:
        """Remove `name` and wait until it is gone; a function that is not deployed is no error."""
        answer = self._administer("DELETE", "/system/functions", {"functionName": name})
        if answer.status not in (200, 202, 404):
            raise self._refuse(f"remove {name}", answer)
        deadline = time.monotonic() + GONE_SECONDS_MAX
        while self.describe(name) is not None:
            if time.monotonic() > deadline:
                raise ExperimentError(
                    "gateway.not_gone", f"remove {name}", f"it is still there after {GONE_SECONDS_MAX:.0f} s", "see the gateway's log"
                )
            time.sleep(POLL_SECONDS)

    def deploy_all(self, functions: Sequence[Function]) -> float:
        """Deploy `functions` together and return when each has an instance; the result is the seconds this took."""
        begin = time.monotonic()
        with ThreadPoolExecutor(DEPLOYMENTS_AT_ONCE) as pool:
            list(pool.map(self.deploy, functions))
            list(pool.map(lambda function: self.wait_ready(function.name), functions))
        return time.monotonic() - begin

    def remove_all(self, names: Sequence[str]) -> None:
        """Remove the named functions together and return when none is left."""
        with ThreadPoolExecutor(DEPLOYMENTS_AT_ONCE) as pool:
            list(pool.map(self.remove, names))

    def instance_address(self, name: str) -> str | None:
        """`ip:port` of one ready instance of `name`, or None on an engine that does not tell."""
        annotations = (self.describe(name) or {}).get("annotations") or {}
        addresses = str(annotations.get(ADDRESS_ANNOTATION) or "")
        return addresses.split(",", maxsplit=1)[0] or None

    def invoke(self, name: str, body: Mapping[str, Any], *, path: str = "", call_id: str = "", seconds_max: float = CALL_SECONDS_MAX) -> Answer:
        """`POST /function/NAME[path]` with `body` as JSON; any status is an answer."""
        headers = {"Content-Type": "application/json"} | ({"X-Call-Id": call_id} if call_id else {})
        return self._call("POST", f"/function/{name}{path}", json.dumps(body).encode("utf-8"), headers, seconds_max=seconds_max)
