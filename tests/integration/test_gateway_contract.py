"""The gateway keeps to OpenFaaS's REST API: what faas-cli was recorded to send, and every error path by a client of this file.

The site's gateway, podman and stock gVisor are real. The function is a program of this file in a benchmark function's image.
"""

import base64
import http.client
import json
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import ROOT, until

RECORDED = Path(__file__).parent / "data" / "faas-cli-calls.jsonl"
BASE = "product-photos-4-success"  # whose image the echo is made of
IMAGE, ABSENT = "localhost/echo:1", "localhost/nosuch:1"  # as the recording names them
NAMESPACE = "openfaas-fn"

# Two lines of the recording are not about the contract.
NOT_REPLAYED = {
    # This gateway has no asynchronous invocations: it answers 501 with a text, and so nobody waits for a callback.
    ("POST", "/async-function/echo.openfaas-fn", 202),
    # Sent by hand while the recorder's own back-end was broken; the same request is in the recording again, with 202.
    ("POST", "/system/functions", 400, "localhost/echo:1"),
}

ECHO = """
import os
import sys

sys.path.append("/function")  # the benchmark's images have their server there
import watchdog

def handle(event):
    if event.path == "/die":
        os._exit(3)
    return {"method": event.method, "path": event.path, "query": event.query, "body": event.body, "headers": dict(event.headers.items()),
            "environment": dict(os.environ), "secrets": {name: open("/var/openfaas/secrets/" + name).read() for name in
            (os.listdir("/var/openfaas/secrets") if os.path.isdir("/var/openfaas/secrets") else [])}}

sys.exit(watchdog.run(handle))
"""


@dataclass(frozen=True)
class Reply:
    """One answer: status, fields by lower-case name, body."""

    status: int
    fields: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class OpenFaaS:
    """A client of the API's published shapes, apart from the experiments' and the command line's."""

    def __init__(self, url: str, user: str, password: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        self.host, self.port = parts.hostname, parts.port or 80
        self.login = f"{user}:{password}"

    def send(self, method: str, path: str, body: bytes | None = None, fields: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=90)
        try:
            connection.request(method, path, body, fields or {})
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def system(self, method: str, path: str, body: Any = None, login: str = "") -> Reply:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return self.send(method, f"/system/{path}", data, {"Authorization": basic(login or self.login), "Content-Type": "application/json"})

    def deploy(self, service: str, image: str = IMAGE, *, method: str = "POST", **more: Any) -> Reply:
        return self.system(method, "functions", {"service": service, "image": image, **more})

    def remove(self, service: str) -> Reply:
        return self.system("DELETE", "functions", {"functionName": service})

    def describe(self, service: str) -> dict[str, Any]:
        reply = self.system("GET", f"function/{service}")
        assert reply.status == 200, reply
        described: dict[str, Any] = reply.json()
        return described

    def wait_ready(self, service: str, replicas: int = 1) -> dict[str, Any]:
        until(lambda: self.describe(service)["availableReplicas"] == replicas, f"{replicas} instances of {service}")
        return self.describe(service)


def basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()


def podman(*words: str) -> str:
    return subprocess.run(["podman", *words], capture_output=True, text=True, timeout=120, check=True).stdout.strip()


@pytest.fixture(scope="module")
def api(site: dict[str, Any]) -> OpenFaaS:
    return OpenFaaS(site["gateway"], site["basic_auth_user"], Path(site["basic_auth_password_file"]).read_text(encoding="utf-8").strip())


@pytest.fixture(scope="module", autouse=True)
def _image(site: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """localhost/echo:1 while these tests run."""
    base = json.loads(Path(site["images_file"]).read_text(encoding="utf-8"))[BASE]["image"]
    program = tmp_path_factory.mktemp("echo")
    (program / "__main__.py").write_text(ECHO, encoding="utf-8")
    container = podman("create", "--pull", "never", base)
    try:
        podman("cp", str(program), f"{container}:/echo")
        podman("commit", "--quiet", "--change", 'ENTRYPOINT ["python3", "/echo"]', container, IMAGE)
    finally:
        podman("rm", "--force", container)
    yield
    podman("image", "rm", "--force", IMAGE)


@pytest.fixture
def name(api: OpenFaaS) -> Iterator[str]:
    """A function's name that nobody has; what is deployed under it is removed afterwards."""
    chosen = f"contract-{secrets.token_hex(3)}"
    yield chosen
    assert api.remove(chosen).status in (200, 202, 404)


@pytest.fixture
def echo(api: OpenFaaS, name: str) -> str:
    """The name of a function that is ready."""
    assert api.deploy(name, envVars={"FN_A": "1"}).status == 202
    api.wait_ready(name)
    return name


# What faas-cli sends


def recorded() -> list[dict[str, Any]]:
    """The calls that are replayed, in their order."""
    calls = [call for line in RECORDED.read_text(encoding="utf-8").splitlines() if "m" in (call := json.loads(line))]
    assert len(calls) >= 30, "the recording is whole"

    def is_replayed(call: dict[str, Any]) -> bool:
        image = json.loads(call["body"])["image"] if '"image"' in call["body"] else ""
        return not {(call["m"], call["p"], call["s"]), (call["m"], call["p"], call["s"], image)} & NOT_REPLAYED

    replayed = [call for call in calls if is_replayed(call)]
    assert len(calls) - len(replayed) == len(NOT_REPLAYED), "each exception is there once"
    return replayed


def test_every_recorded_call_of_faas_cli_gets_its_recorded_status(api: OpenFaaS) -> None:
    """The recording begins with `echo` deployed and without the secret."""
    assert api.deploy("echo").status == 202
    try:
        answered = []
        for call in recorded():
            login = api.login if call["s"] != 401 else "admin:wrong"
            authorization = {"Basic": basic(login), "Bearer": "Bearer ", "": ""}[call["auth"]]
            fields = {"User-Agent": call["ua"], "Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
            reply = api.send(call["m"], call["p"], call["body"].encode() or None, fields)
            answered.append((call["m"], call["p"], call["body"], reply.status))

        assert answered == [(call["m"], call["p"], call["body"], call["s"]) for call in recorded()]
    finally:
        api.remove("echo")
        api.system("DELETE", "secrets", {"name": "mysec"})


# A function's life


def test_a_function_is_deployed_updated_described_listed_and_removed(api: OpenFaaS, name: str) -> None:
    assert api.deploy(name, method="PUT").status == 404, "an update needs something to update"
    assert api.deploy(name, envVars={"FN_A": "1"}, labels={"tier": "t1"}, annotations={"note": "n"}).status == 202
    described = api.wait_ready(name)
    assert {key: described[key] for key in ("name", "image", "namespace", "replicas", "availableReplicas")} == {
        "name": name,
        "image": IMAGE,
        "namespace": NAMESPACE,
        "replicas": 1,
        "availableReplicas": 1,
    }
    assert described["labels"] == {"tier": "t1"}
    assert described["annotations"].items() >= {"note": "n"}.items()
    assert time.strptime(described["createdAt"], "%Y-%m-%dT%H:%M:%SZ")
    assert api.send("POST", f"/function/{name}").json()["environment"]["FN_A"] == "1"

    assert api.deploy(name, method="PUT", envVars={"FN_A": "2"}).status == 202
    api.wait_ready(name)
    assert api.send("POST", f"/function/{name}").json()["environment"]["FN_A"] == "2", "what is available is what was asked for last"
    assert name in [function["name"] for function in api.system("GET", "functions").json()]
    used = api.system("GET", f"function/{name}?usage=1").json()
    assert used["invocationCount"] == 2
    assert used["usage"]["totalMemoryBytes"] > 1 << 20

    assert api.remove(name).status == 202
    until(lambda: api.system("GET", f"function/{name}").status == 404, "its end")
    assert api.remove(name).status == 404
    assert name not in [function["name"] for function in api.system("GET", "functions").json()]


def test_a_removed_function_leaves_nothing_on_the_machine(api: OpenFaaS, echo: str) -> None:
    (container,) = podman("ps", "--filter", f"name=^kal-{echo}-", "--format", "{{.Names}}").split()
    instance = container.rpartition("-")[2]
    assert Path(f"/run/netns/kal-{instance}").exists()
    assert Path(f"/sys/class/net/kv{instance}").exists()

    api.remove(echo)

    until(lambda: api.system("GET", f"function/{echo}").status == 404, "its end")
    assert not podman("ps", "--all", "--quiet", "--filter", f"name=^kal-{echo}-")
    assert not Path(f"/run/netns/kal-{instance}").exists()
    assert not Path(f"/sys/class/net/kv{instance}").exists()


def test_replicas_come_and_go(api: OpenFaaS, echo: str) -> None:
    assert api.system("POST", f"scale-function/{echo}", {"serviceName": echo, "replicas": 2}).status == 202
    addresses = api.wait_ready(echo, replicas=2)["annotations"]["kalium.io/address"].split(",")
    assert len(set(addresses)) == 2
    assert api.system("POST", f"scale-function/{echo}", {"serviceName": echo, "replicas": 0}).status == 202
    api.wait_ready(echo, replicas=0)

    reply = api.send("POST", f"/function/{echo}")

    assert (reply.status, reply.body.decode()) == (503, f"No endpoints available for: {echo}.")


def test_an_instance_that_dies_is_replaced(api: OpenFaaS, echo: str) -> None:
    first = api.describe(echo)["annotations"]["kalium.io/address"]

    assert api.send("POST", f"/function/{echo}/die").status == 502

    until(lambda: api.send("POST", f"/function/{echo}").status == 200, "its successor")
    assert api.describe(echo)["annotations"]["kalium.io/address"] != first


def test_a_secret_is_a_file_that_the_function_reads(api: OpenFaaS, name: str) -> None:
    secret = name.replace("contract", "secret")
    assert api.system("POST", "secrets", {"name": secret, "value": "s3cr3t"}).status == 202
    try:
        assert api.deploy(name, secrets=[secret]).status == 202
        api.wait_ready(name)

        assert api.send("POST", f"/function/{name}").json()["secrets"] == {secret: "s3cr3t"}
        assert secret in [entry["name"] for entry in api.system("GET", "secrets").json()]
        assert b"s3cr3t" not in api.system("GET", "secrets").body + api.system("GET", f"function/{name}").body
    finally:
        assert api.system("DELETE", "secrets", {"name": secret}).status == 202


# Invocations


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_any_method_and_path_is_passed_on(api: OpenFaaS, echo: str, method: str) -> None:
    body = b'"body"' if method in ("POST", "PUT", "PATCH") else None

    reply = api.send(method, f"/function/{echo}.{NAMESPACE}/a/b?c=d", body)

    said = reply.json()
    assert (reply.status, said["method"], said["path"], said["query"], said["body"]) == (200, method, "/a/b", {"c": ["d"]}, "body" if body else None)


def test_a_call_has_an_id_and_a_start(api: OpenFaaS, echo: str) -> None:
    before = time.time_ns()
    minted = api.send("POST", f"/function/{echo}")
    given = api.send("POST", f"/function/{echo}", fields={"X-Call-Id": "mine", "X-Kalium-Token": "ab" * 16, "Connection": "X-Hop", "X-Hop": "1"})

    seen = {name.lower(): value for name, value in minted.json()["headers"].items()}
    assert seen["x-call-id"] == minted.fields["x-call-id"]
    assert before <= int(seen["x-start-time"]) == int(minted.fields["x-start-time"]) <= time.time_ns()
    assert (seen["x-forwarded-host"], seen["x-forwarded-for"]) == (f"{api.host}:{api.port}", "127.0.0.1")
    seen = {name.lower(): value for name, value in given.json()["headers"].items()}
    assert (seen["x-call-id"], seen["x-kalium-token"], "x-hop" in seen) == ("mine", "ab" * 16, False)
    assert "x-call-id" not in given.fields


def test_functions_reach_functions_and_no_administration(api: OpenFaaS, echo: str, site: dict[str, Any]) -> None:
    inside = OpenFaaS(f"http://{site['bridge_address']}:8080", *api.login.split(":"))

    assert inside.send("POST", f"/function/{echo}").status == 200
    assert inside.send("GET", "/healthz").status == 200
    assert inside.system("GET", "functions").status == 404
    assert inside.deploy("x").status == 404


# Refusals


@pytest.mark.parametrize("login", ["admin:wrong", "nobody:", "admin:"])
def test_a_wrong_password_is_401(api: OpenFaaS, login: str) -> None:
    reply = api.system("GET", "functions", login=login)

    assert (reply.status, reply.body, reply.fields["www-authenticate"]) == (401, b"invalid credentials", 'Basic realm="Restricted"')


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "not JSON"),
        ({}, "service is not given"),
        ({"service": "No Name", "image": IMAGE}, "is no name of a function"),
        ({"service": "contract", "image": ABSENT}, f"image {ABSENT} is not on this machine"),
        ({"service": "contract", "image": IMAGE, "labels": {"kalium.io/runtime": "runc"}}, "there are only kalium, stock"),
        ({"service": "contract", "image": IMAGE, "annotations": {"kalium.io/app": "hello-retail"}}, "the runtime stock has no guard"),
        ({"service": "contract", "image": IMAGE, "labels": {"kalium.io/runtime": "kalium"}}, "annotation kalium.io/app is not given"),
        (
            {"service": "contract", "image": IMAGE, "labels": {"kalium.io/runtime": "kalium"}, "annotations": {"kalium.io/app": "no-such-app"}},
            "the agent refuses contract of app no-such-app: unknown_app",
        ),
        (
            {"service": "contract", "image": IMAGE, "labels": {"kalium.io/runtime": "kalium"}, "annotations": {"kalium.io/app": "hello-retail"}},
            "the agent refuses contract of app hello-retail: unknown_function",
        ),
        ({"service": "contract", "image": IMAGE, "secrets": ["no-such-secret"]}, "there is no secret no-such-secret"),
        ({"service": "contract", "image": IMAGE, "namespace": "other"}, "there is no namespace 'other'"),
    ],
)
def test_what_cannot_be_deployed_is_400_with_the_reason(api: OpenFaaS, body: Any, told: str) -> None:
    reply = api.system("POST", "functions", body)

    assert (reply.status, told in reply.body.decode()) == (400, True), reply
    assert api.system("GET", "function/contract").status == 404
    assert not podman("ps", "--all", "--quiet", "--filter", "name=^kal-contract-[0-9a-f]{8}$")


def test_what_is_not_there_is_404(api: OpenFaaS) -> None:
    assert api.send("POST", "/function/no-such-function").status == 404
    assert api.send("POST", f"/function/no-such-function.{NAMESPACE}").status == 404
    assert api.system("GET", "function/no-such-function").status == 404
    assert api.remove("no-such-function").status == 404
    assert api.system("POST", "scale-function/no-such-function", {"serviceName": "no-such-function", "replicas": 1}).status == 404
    assert api.system("GET", "nothing").status == 404


def test_the_command_line_speaks_the_same_api(api: OpenFaaS, name: str, site: dict[str, Any], tmp_path: Path) -> None:
    """`kalium function` deploys a stack file, waits, lists, invokes and removes; its exit code is the answer."""
    stack = tmp_path / "stack.yml"
    stack.write_text(f"version: 1.0\nfunctions:\n  {name}:\n    image: {IMAGE}\n    environment: {{FN_A: 1}}\n", encoding="utf-8")
    options = ["--gateway", site["gateway"]]
    administrator = [*options, "--password-file", site["basic_auth_password_file"]]

    def kalium(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / ".venv/bin/python"), "-m", "kalium.cli.main", "function", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    deployed = kalium("deploy", "-f", str(stack), *administrator)
    assert (deployed.returncode, deployed.stdout.splitlines()[-1]) == (0, f"ready {name}"), deployed
    assert f"{name} " in kalium("list", *administrator).stdout
    invoked = kalium("invoke", name, "--data", '{"a": 1}', "--path", "/x", *options)
    assert (invoked.returncode, json.loads(invoked.stdout)["body"]) == (0, {"a": 1})
    died = kalium("invoke", name, "--path", "/die", *options)
    assert (died.returncode, len(died.stderr.splitlines())) == (1, 2), died
    assert kalium("remove", name, *administrator).returncode == 0
    assert kalium("describe", name, *administrator).returncode == 1
