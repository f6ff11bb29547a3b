"""The gateway keeps to OpenFaaS's REST API: what faas-cli was recorded to send, and every error path by a client of this file.

The site's gateway, stock gVisor and what runs it, podman or a cluster, are real. The function is a program of this file, built by the product.
What a back-end does differently is in backend.py, and nowhere but there.
"""

import base64
import http.client
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .backend import Backend, Image, reached
from .conftest import READY_S_MAX, ROOT, until

RECORDED = Path(__file__).parent / "data" / "faas-cli-calls.jsonl"
IMAGE, ABSENT = "localhost/echo:1", "localhost/nosuch:1"  # as the recording names them
NAMESPACE = "openfaas-fn"
GUARDED = "product-photos-4-success"  # a function of the app hello-retail

# A line of the recording that is not about the contract.
NOT_REPLAYED = {
    # Sent by hand while the recorder's own back-end was broken; the same request is in the recording again, with 202.
    ("POST", "/system/functions", 400, "localhost/echo:1"),
}

ECHO = """
import os
from collections import deque

SECRETS = "/var/openfaas/secrets"
callbacks = deque(maxlen=100)

def handle(event):
    if event.path == "/die":
        os._exit(3)
    if event.path == "/print":
        print(event.body, flush=True)
    if event.path == "/callbacks":
        return list(callbacks)
    names = os.listdir(SECRETS) if os.path.isdir(SECRETS) else []
    seen = {"method": event.method, "path": event.path, "query": event.query, "body": event.body,
            "fields": [(name.lower(), value) for name, value in event.headers.items()], "environment": dict(os.environ),
            "secrets": {name: open(SECRETS + "/" + name).read() for name in names if not name.startswith(".")}}
    if "X-Function-Name" in event.headers:
        callbacks.append(seen)
    return seen
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

    @contextmanager
    def following(self, service: str) -> Iterator[http.client.HTTPResponse]:
        """A function's log as it grows, once its head is there."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=READY_S_MAX)
        try:
            connection.request("GET", f"/system/logs?name={service}&follow=true", headers={"Authorization": basic(self.login)})
            yield connection.getresponse()
        finally:
            connection.close()

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


@pytest.fixture(scope="module")
def backend(site: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with reached(site, tmp_path_factory.mktemp("gateway")) as found:
        yield found


@pytest.fixture(scope="module")
def api(backend: Backend) -> OpenFaaS:
    return OpenFaaS(backend.admin, backend.user, backend.password)


@pytest.fixture(scope="module", autouse=True)
def _image(site: dict[str, Any], backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """localhost/echo:1 while these tests run."""
    image = Image(ECHO, Path(site["images_file"]).parent, tmp_path_factory.mktemp("echo"))
    with backend.having(image, IMAGE):
        yield


@contextmanager
def a_name(api: OpenFaaS) -> Iterator[str]:
    """A function's name that nobody has; what is deployed under it is removed afterwards."""
    chosen = f"contract-{secrets.token_hex(3)}"
    try:
        yield chosen
    finally:
        assert api.remove(chosen).status in (202, 404)


@pytest.fixture
def name(api: OpenFaaS) -> Iterator[str]:
    with a_name(api) as chosen:
        yield chosen


@pytest.fixture
def echo(api: OpenFaaS, name: str) -> str:
    """The name of a function that is ready."""
    assert api.deploy(name, envVars={"FN_A": "1"}).status == 202
    api.wait_ready(name)
    return name


@pytest.fixture
def other(api: OpenFaaS) -> Iterator[str]:
    """The name of a second one."""
    with a_name(api) as chosen:
        assert api.deploy(chosen).status == 202
        api.wait_ready(chosen)
        yield chosen


# What faas-cli sends


def recorded() -> list[dict[str, Any]]:
    """The calls that are replayed, in their order."""
    calls = [call for line in RECORDED.read_text(encoding="utf-8").splitlines() if "m" in (call := json.loads(line))]
    assert len(calls) >= 30, "the recording is whole"

    def is_replayed(call: dict[str, Any]) -> bool:
        image = json.loads(call["body"])["image"] if '"image"' in call["body"] else ""
        return (call["m"], call["p"], call["s"], image) not in NOT_REPLAYED

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


def test_a_function_is_deployed_updated_described_listed_and_removed(api: OpenFaaS, name: str, backend: Backend) -> None:
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
    if "usage" in used or backend.always_measures:
        assert used["usage"]["totalMemoryBytes"] > 1 << 20

    assert api.remove(name).status == 202
    until(lambda: api.system("GET", f"function/{name}").status == 404, "its end")
    assert api.remove(name).status == 404
    assert name not in [function["name"] for function in api.system("GET", "functions").json()]


def test_a_removed_function_leaves_nothing_behind(api: OpenFaaS, echo: str, backend: Backend) -> None:
    left = backend.traces_of(echo)
    assert len(left()) == 3, "a container, its namespace and its interface; or a pod, its Deployment and its Service"

    assert api.remove(echo).status == 202

    assert api.system("GET", f"function/{echo}").status == 404
    until(lambda: not left(), "its end", backend.removal_s_max)


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


def test_a_call_has_an_id_and_a_start(api: OpenFaaS, echo: str, backend: Backend) -> None:
    before = time.time_ns()
    minted = api.send("POST", f"/function/{echo}")
    given = api.send("POST", f"/function/{echo}", fields={"X-Call-Id": "mine", "X-Kalium-Token": "ab" * 16, "Connection": "X-Hop", "X-Hop": "1"})

    seen = dict(minted.json()["fields"])
    assert seen["x-call-id"] == minted.fields["x-call-id"]
    assert seen["x-start-time"] == minted.fields["x-start-time"]
    assert before - backend.clock_ns_max <= int(seen["x-start-time"]) <= time.time_ns() + backend.clock_ns_max
    assert (seen["x-forwarded-host"], seen["x-forwarded-for"]) == (f"{api.host}:{api.port}", backend.client_address)
    seen = dict(given.json()["fields"])
    assert (seen["x-call-id"], seen["x-kalium-token"], "x-hop" in seen) == ("mine", "ab" * 16, False)
    assert "x-call-id" not in given.fields


def test_functions_reach_functions_and_no_administration(api: OpenFaaS, echo: str, backend: Backend) -> None:
    inside = OpenFaaS(backend.data, backend.user, backend.password)

    assert inside.send("POST", f"/function/{echo}").status == 200
    assert inside.send("GET", "/healthz").status == 200
    assert inside.system("GET", "functions").status == 404
    assert inside.deploy("x").status == 404


# Asynchronous calls


def test_an_asynchronous_call_is_accepted_and_its_result_is_posted_to_its_callback(api: OpenFaaS, echo: str, other: str) -> None:
    token = "ab" * 16
    accepted = api.send(
        "POST",
        f"/async-function/{echo}.{NAMESPACE}/a?b=c",
        b'"later"',
        {"X-Callback-Url": f"http://gateway:8080/function/{other}", "X-Kalium-Token": token},
    )
    assert (accepted.status, accepted.body) == (202, b"")

    (told,) = until(lambda: api.send("POST", f"/function/{other}/callbacks").json(), "the callback")

    fields = dict(told["fields"])
    assert (told["method"], told["path"], told["query"]) == ("POST", "/", {})
    assert (
        fields.items()
        >= {
            "content-type": "application/json",
            "x-call-id": accepted.fields["x-call-id"],
            "x-function-name": echo,
            "x-function-status": "200",
        }.items()
    )
    assert 0 < float(fields["x-duration-seconds"]) < READY_S_MAX
    assert not {"x-kalium-token", "server", "date"} & fields.keys(), "nothing else of the caller's or of the answer"
    made = told["body"]
    assert (made["method"], made["path"], made["query"], made["body"]) == ("POST", "/a", {"b": ["c"]}, "later")
    assert dict(made["fields"]).items() >= {"x-call-id": accepted.fields["x-call-id"], "x-kalium-token": token}.items()
    assert "x-callback-url" not in dict(made["fields"])
    starts = [int(value) for name, value in made["fields"] if name == "x-start-time"]
    assert len(starts) == 2 and int(accepted.fields["x-start-time"]) == starts[0] < starts[1]


def test_a_callback_is_told_of_a_failure_as_a_client_is(api: OpenFaaS, echo: str, other: str) -> None:
    callback = {"X-Callback-Url": f"http://gateway:8080/function/{other}", "X-Call-Id": "mine"}
    accepted = api.send("POST", f"/async-function/{echo}/die", fields=callback)
    assert (accepted.status, accepted.fields["x-call-id"]) == (202, "mine")

    (told,) = until(lambda: api.send("POST", f"/function/{other}/callbacks").json(), "the callback")

    fields = dict(told["fields"])
    assert fields.items() >= {"x-call-id": "mine", "x-function-name": echo, "x-function-status": "502"}.items()
    assert f"{echo} did not answer" in told["body"]


@pytest.mark.parametrize(
    ("spelling", "told"),
    [
        ("http://gateway:8080/function/no-such-function", "there is no function no-such-function to call back"),
        ("http://gateway:8080/function/{other}/path", "has one spelling"),
        ("http://gateway:8080/function/{other}.openfaas-fn", "has one spelling"),
        ("http://gateway:8080/async-function/{other}", "has one spelling"),
        ("http://gateway/function/{other}", "has one spelling"),
        ("{data}/function/{other}", "has one spelling"),
        ("https://attacker.example/function/{other}", "has one spelling"),
        ("", "has one spelling"),
    ],
)
def test_a_callback_to_anything_else_is_400(api: OpenFaaS, echo: str, backend: Backend, spelling: str, told: str) -> None:
    callback = {"X-Callback-Url": spelling.format(other=echo, data=backend.data)}

    reply = api.send("POST", f"/async-function/{echo}", fields=callback)

    assert (reply.status, told in reply.body.decode()) == (400, True), reply


def test_a_callback_to_a_function_of_another_app_is_400(api: OpenFaaS, echo: str) -> None:
    labels, annotations = {"kalium.io/runtime": "kalium"}, {"kalium.io/app": "hello-retail"}
    assert api.deploy(GUARDED, labels=labels, annotations=annotations).status == 202
    try:
        reply = api.send("POST", f"/async-function/{echo}", fields={"X-Callback-Url": f"http://gateway:8080/function/{GUARDED}"})
    finally:
        assert api.remove(GUARDED).status == 202

    assert (reply.status, reply.body.decode()) == (400, f"{GUARDED} is of another app than what it would be called back for")


def test_a_callback_of_a_call_that_is_not_asynchronous_is_400(api: OpenFaaS, echo: str, other: str) -> None:
    reply = api.send("POST", f"/function/{echo}", fields={"X-Callback-Url": f"http://gateway:8080/function/{other}"})

    assert (reply.status, api.send("POST", f"/function/{other}/callbacks").json()) == (400, [])


# Logs


def test_a_followed_log_has_lines_that_are_written_after_the_request(api: OpenFaaS, echo: str) -> None:
    with api.following(echo) as answer:
        assert (answer.status, answer.getheader("Transfer-Encoding")) == (200, "chunked")
        text = secrets.token_hex(8)
        assert api.send("POST", f"/function/{echo}/print", text.encode()).status == 200

        line = next(line for line in map(json.loads, answer) if line["text"] == text)

    assert (line["name"], line["namespace"], line.keys()) == (echo, NAMESPACE, {"name", "namespace", "instance", "timestamp", "text"})
    assert line["instance"] and line["timestamp"]


def test_a_followed_log_goes_on_with_instances_that_come_later(api: OpenFaaS, echo: str) -> None:
    with api.following(echo) as answer:
        assert api.send("POST", f"/function/{echo}/print", b"first").status == 200
        first = next(line for line in map(json.loads, answer) if line["text"] == "first")
        assert api.send("POST", f"/function/{echo}/die").status == 502
        until(lambda: api.send("POST", f"/function/{echo}/print", b"second").status == 200, "its successor")

        second = next(line for line in map(json.loads, answer) if line["text"] == "second")

    assert first["instance"] != second["instance"]


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
        ({"service": "contract", "image": IMAGE, "labels": {"kalium.io/runtime": "runc"}}, "there are only kalium, stock"),
        ({"service": "contract", "image": IMAGE, "annotations": {"kalium.io/app": "hello-retail"}}, "the runtime stock has no guard"),
        ({"service": "contract", "image": IMAGE, "labels": {"kalium.io/runtime": "kalium"}}, "annotation kalium.io/app is not given"),
        ({"service": "contract", "image": IMAGE, "secrets": ["no-such-secret"]}, "there is no secret no-such-secret"),
        ({"service": "contract", "image": IMAGE, "namespace": "other"}, "there is no namespace 'other'"),
    ],
)
def test_what_cannot_be_deployed_is_400_with_the_reason(api: OpenFaaS, backend: Backend, body: Any, told: str) -> None:
    reply = api.system("POST", "functions", body)

    assert (reply.status, told in reply.body.decode()) == (400, True), reply
    assert_nothing_is_left_of("contract", api, backend)


def test_an_image_that_is_nowhere_is_400_with_the_reason(api: OpenFaaS, backend: Backend) -> None:
    reply = api.deploy("contract", ABSENT)

    assert (reply.status, backend.refusal_of_image(ABSENT) in reply.body.decode()) == (400, True), reply
    assert_nothing_is_left_of("contract", api, backend)


@pytest.mark.parametrize(("app", "code"), [("no-such-app", "unknown_app"), ("hello-retail", "unknown_function")])
def test_what_the_agent_refuses_never_gets_ready_and_says_so(api: OpenFaaS, backend: Backend, app: str, code: str) -> None:
    labels, annotations = {"kalium.io/runtime": "kalium"}, {"kalium.io/app": app}

    reply = api.deploy("contract", labels=labels, annotations=annotations)

    if backend.asks_agent_first:
        assert (reply.status, f"the agent refuses contract of app {app}: {code}" in reply.body.decode()) == (400, True), reply
    else:
        try:
            assert reply.status == 202, reply
            reason = until(lambda: api.describe("contract")["annotations"].get("kalium.io/reason"), "the reason")
            assert ("FailedCreatePodSandBox" in reason, api.describe("contract")["availableReplicas"]) == (True, 0), reason
        finally:
            assert api.remove("contract").status == 202
    assert_nothing_is_left_of("contract", api, backend)


def assert_nothing_is_left_of(function: str, api: OpenFaaS, backend: Backend) -> None:
    assert api.system("GET", f"function/{function}").status == 404
    left = backend.traces_of(function)
    until(lambda: not left(), f"the end of {function}", backend.removal_s_max)


def test_what_is_not_there_is_404(api: OpenFaaS) -> None:
    assert api.send("POST", "/function/no-such-function").status == 404
    assert api.send("POST", f"/function/no-such-function.{NAMESPACE}").status == 404
    assert api.system("GET", "function/no-such-function").status == 404
    assert api.remove("no-such-function").status == 404
    assert api.system("POST", "scale-function/no-such-function", {"serviceName": "no-such-function", "replicas": 1}).status == 404
    assert api.system("GET", "nothing").status == 404


def test_the_command_line_speaks_the_same_api(api: OpenFaaS, name: str, backend: Backend, tmp_path: Path) -> None:
    """`kalium function` deploys a stack file, waits, lists, invokes and removes; its exit code is the answer."""
    stack = tmp_path / "stack.yml"
    stack.write_text(f"version: 1.0\nfunctions:\n  {name}:\n    image: {IMAGE}\n    environment: {{FN_A: 1}}\n", encoding="utf-8")
    options = ["--gateway", backend.admin]
    administrator = [*options, "--password-file", str(backend.password_file)]

    def kalium(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kalium.cli.main", "function", *words]
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
