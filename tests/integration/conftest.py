"""Fixtures of the end-to-end tests: the site that `site.yml` set up, asked only through what a user has.

Nothing here skips: without a site the tests fail and say how to make one.
"""

import base64
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .actors import Apps

ROOT = Path(__file__).resolve().parents[2]
SUPERVISORCTL = ("/opt/kalium/venv/bin/supervisorctl", "-c", "/etc/kalium/supervisord.conf")
READY_S_MAX = 60.0


@dataclass(frozen=True)
class Reply:
    """One HTTP answer, whatever its status."""

    status: int
    body: bytes


def until(claim: Callable[[], Any], what: str, seconds: float = READY_S_MAX) -> Any:
    """Poll `claim` until it is true and return its value; fail with `what` at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = claim()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.05)


class Gateway:
    """The OpenFaaS API of the site, by plain HTTP: deliberately not the client that the experiments use."""

    def __init__(self, site: dict[str, Any]) -> None:
        self.url = site["gateway"]
        password = Path(site["basic_auth_password_file"]).read_text(encoding="utf-8").strip()
        token = base64.b64encode(f"{site['basic_auth_user']}:{password}".encode()).decode()
        self._auth = {"Authorization": f"Basic {token}"}
        self.images = json.loads(Path(site["images_file"]).read_text(encoding="utf-8"))

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers or {})
        if data is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=READY_S_MAX) as answer:
                return Reply(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.read())

    def system(self, method: str, path: str, body: Any = None) -> Reply:
        return self.request(method, "/system/" + path, body, dict(self._auth))

    def deploy(self, function: str, *, runtime: str, app: str = "", image: str = "", env: dict[str, str] | None = None) -> None:
        """Deploy and wait until a replica is available."""
        body = {
            "service": function,
            "image": self.images[image or function]["image"],
            "envVars": {
                "DB_HOST": "database",
                "DB_PORT": "3306",
                "DB_USER": "abc",
                "DB_PASSWORD": "xyz",
                "DB_NAME": "helloRetail",
                **(env or {}),
            },
            "labels": {"kalium.io/runtime": runtime},
            "annotations": {"kalium.io/app": app} if app else {},
        }
        reply = self.system("PUT", "functions", body)
        if reply.status == 404:
            reply = self.system("POST", "functions", body)
        assert reply.status in (200, 202), reply

        def available() -> bool:
            answer = self.system("GET", f"function/{function}")
            return answer.status == 200 and json.loads(answer.body).get("availableReplicas", 0) >= 1

        until(available, f"a replica of {function}")

    def remove(self, function: str) -> None:
        assert self.system("DELETE", "functions", {"functionName": function}).status in (200, 202)

    def invoke(self, function: str, body: Any, path: str = "") -> Reply:
        return self.request("POST", f"/function/{function}{path}", body)


@pytest.fixture(scope="session")
def site() -> dict[str, Any]:
    """What `site.yml` wrote at its end."""
    path = ROOT / ".kalium" / "site.json"
    assert path.exists(), "there is no site: run `ansible-playbook site.yml -i inventory/local` first"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="session")
def gateway(site: dict[str, Any]) -> Gateway:
    return Gateway(site)


@pytest.fixture
def deployed(gateway: Gateway) -> Iterator[Callable[..., None]]:
    """`deployed(function, runtime=..., app=...)` deploys for one test; everything is removed after it."""
    names: list[str] = []

    def deploy(function: str, **options: Any) -> None:
        names.append(function)
        gateway.deploy(function, **options)

    yield deploy
    for name in dict.fromkeys(names):
        gateway.remove(name)


class Lines:
    """The JSON lines that a file gains after this object was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, _, _ = file.read().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]

    def until(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first new line that `wanted` accepts."""
        found: dict[str, Any] = until(lambda: next((line for line in self.read() if wanted(line)), None), what)
        return found


@pytest.fixture
def verdicts(site: dict[str, Any]) -> Lines:
    return Lines(Path(site["verdicts"]))


@pytest.fixture
def image_requests(site: dict[str, Any]) -> Lines:
    """The image server's own log, written after its own decryption."""
    return Lines(Path(site["imageserver_log"]))


def supervisorctl(*words: str) -> str:
    """Ask the site's supervisor; its exit status is not a verdict, its text is."""
    return subprocess.run([*SUPERVISORCTL, *words], capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.fixture(scope="session")
def actor(site: dict[str, Any], gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of the image of tests/integration/actors.py, for `deployed` too."""
    from .actors import ACTOR, built  # noqa: PLC0415  both modules need what stands above
    from .backend import Image  # noqa: PLC0415

    archive = Image(ACTOR, Path(site["images_file"]).parent, tmp_path_factory.mktemp("actor")).archive
    with built(archive, gateway) as name:
        yield name


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Apps"]:
    """Policies of a module's own; none of them is left."""
    from .actors import Apps  # noqa: PLC0415  it needs what stands above

    made = Apps(tmp_path_factory.mktemp("policies"))
    yield made
    made.remove()


@pytest.fixture
def sample(site: dict[str, Any]) -> Callable[[str], Any]:
    """A benchmark function's sample input, with this site's image URL."""

    def load(function: str) -> Any:
        body = json.loads((ROOT / "functions" / function / "sample.json").read_text(encoding="utf-8"))
        if isinstance(body, dict) and "MediaUrl0" in body:
            body["MediaUrl0"] = site["images_url"]
        return body

    return load


@pytest.fixture(scope="session", autouse=True)
def _as_root() -> None:
    assert os.geteuid() == 0, "end-to-end tests read root's sockets and logs: run them by `make test`"
