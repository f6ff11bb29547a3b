"""A function that does what its input says, and applications made of it: each test writes the policy that it is about.

What a test has such a function do is what an attacker could have it do: nothing in it stands between its input and the guard.
"""

import json
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .conftest import ROOT, Gateway, Reply, until

ACTOR = '''\
import http.client
import json


def post(name, body=None, *, headers={}, path="/function/", seconds=20):
    """Invoke a function: its status and answer, or the name of the error."""
    connection = http.client.HTTPConnection("gateway", 8080, timeout=seconds)
    try:
        connection.request("POST", path + name, json.dumps(body), {"Content-Type": "application/json", **headers})
        reply = connection.getresponse()
        return [reply.status, reply.read().decode()]
    except (OSError, http.client.HTTPException) as error:
        return [type(error).__name__, ""]
    finally:
        connection.close()


def image():
    """Fetch the image: the status, or the name of the error."""
    import urllib.request, ssl
    try:
        with urllib.request.urlopen("https://images.kalium.test:4443/image.jpg", timeout=40, context=ssl._create_unverified_context()) as reply:
            return reply.status
    except OSError as error:
        return type(getattr(error, "reason", error)).__name__


def handle(event):
    body = event.body
    if not (isinstance(body, dict) and "do" in body):
        print(json.dumps(body), flush=True)
        return "idle"
    names = {"event": event, "post": post, "image": image, "answer": None}
    exec(body["do"], names)
    return names["answer"]
'''
IMAGE = "localhost/kalium-test/actor:1"
KALIUM = Path("/opt/kalium/venv/bin/kalium")
POLICIES = Path("/etc/kalium/policies")
OPERATOR_KEY = Path("/etc/kalium/operator/operator.key")
HEAD = """\
schema: kalium/v1
app: {app}
version: {version}
mode: enforce
on_unavailable: {{app_edge: {app_edge}, deadline_ms: {deadline_ms}}}
peers:
  gateway: {{host: gateway, port: 8080, protocol: http, role: gateway}}
  images: {{host: images.kalium.test, port: 4443, protocol: https}}
"""


def kalium(*words: str | Path, status: int = 0) -> str:
    """What the installed command prints; it has to end with `status`."""
    done = subprocess.run([KALIUM, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, f"kalium {' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


class Apps:
    """Applications of this run. `apply` puts a policy in force; `remove` takes all of them out of the controller's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._version = 0
        self._apps: set[str] = set()

    def next_version(self) -> int:
        """Higher than whatever a node has seen of an app, also in an earlier run."""
        self._version = max(self._version + 1, int(time.time()))
        return self._version

    def apply(self, app: str, functions: str, *, app_edge: str = "deny", deadline_ms: int = 20_000) -> int:
        """Sign and apply: `functions` is the policy from `entries` on. The version that is in force then.

        Only what a controller does not answer takes until the deadline, which a busy machine must not miss where there is one.
        """
        version = self.next_version()
        self._apps.add(app)
        source, signed = (self._folder / f"{app}-{version}.{kind}" for kind in ("yml", "signed.json"))
        source.write_text(
            HEAD.format(app=app, version=version, app_edge=app_edge, deadline_ms=deadline_ms) + textwrap.dedent(functions), encoding="ascii"
        )
        kalium("policy", "sign", source, "--key", OPERATOR_KEY, "--out", signed)
        kalium("policy", "apply", signed)
        return version

    def remove(self) -> None:
        for app in self._apps:
            (POLICIES / f"{app}.signed.json").unlink(missing_ok=True)
            subprocess.run(["rm", "-rf", POLICIES / "history" / app], check=True)


@contextmanager
def built(archive: Path, gateway: Gateway) -> Iterator[str]:
    """The image of an archive, by its name in podman and, for `Gateway.deploy`, as `actor`."""
    pulled = subprocess.run(["podman", "pull", "--quiet", f"oci-archive:{archive}"], capture_output=True, text=True, timeout=120, check=True)
    identity = pulled.stdout.split()[-1]
    try:
        subprocess.run(["podman", "tag", identity, IMAGE], check=True, timeout=60)
        gateway.images["actor"] = {"image": IMAGE}
        yield IMAGE
    finally:
        subprocess.run(["podman", "image", "rm", "--force", identity], capture_output=True, check=True, timeout=60)


@contextmanager
def deployed_all(gateway: Gateway, functions: Mapping[str, str]) -> Iterator[None]:
    """Each of these functions is an actor of its app while the `with` lasts."""
    with ThreadPoolExecutor(4) as pool:
        try:
            list(pool.map(lambda name: gateway.deploy(name, runtime="kalium", app=functions[name], image="actor"), functions))
            yield
        finally:
            list(pool.map(gateway.remove, functions))


def act(gateway: Gateway, function: str, code: str, headers: dict[str, str] | None = None, **more: Any) -> Reply:
    """Have an entry run `code`; what it leaves in `answer` is the answer."""
    return gateway.request("POST", f"/function/{function}", {"do": textwrap.dedent(code), **more}, headers)


def answered(gateway: Gateway, function: str, code: str, **more: Any) -> Any:
    """The answer to `act`, which has to be 200."""
    reply = act(gateway, function, code, **more)
    assert reply.status == 200, reply
    return json.loads(reply.body)


def invocations(gateway: Gateway, function: str) -> int:
    """How often the gateway has passed a request on to a function since it was deployed."""
    count: int = json.loads(gateway.system("GET", f"function/{function}").body)["invocationCount"]
    return count


def printed(gateway: Gateway, function: str, what: str) -> bool:
    """Whether a function has printed `what`."""
    return what.encode() in gateway.system("GET", f"logs?name={function}").body


def status_of(app: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`kalium status` of the site: all of it, and the rows of one app. It fails exactly when a row is not in force."""
    done = subprocess.run([KALIUM, "status", "--output", "json"], capture_output=True, text=True, timeout=60, check=False)
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1), done
    return document, [row for row in document["instances"] if row["app"] == app]


def in_force(app: str, version: int, functions: int) -> None:
    """Wait until the sandboxes of all functions say themselves that they enforce this version."""
    until(
        lambda: [(row["mode"], row["version"], row["count"]) for row in status_of(app)[1]] == [("enforce", version, 1)] * functions,
        f"version {version} of {app} in force",
    )
