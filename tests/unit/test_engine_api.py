"""The REST API of OpenFaaS as a client meets it, each error path included. The engine is whole; only the machine is not one."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
from engine_world import APP, GUARDED, PORT, Machine, World, play, until, world

from kalium.engine.limits import ADMIN_BYTES_MAX, REPLICAS_MAX, SECRET_BYTES_MAX

LOGIN = {"Authorization": "Basic " + base64.b64encode(b"admin:right").decode()}


def test_a_function_is_deployed_listed_described_invoked_and_removed(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            assert await site.deploy(envVars={"A": "1"}, labels={"tier": "t1"}, annotations={"note": "n"}) == (202, "")
            described = await site.ready()
            status, listed, _ = await site.call("GET", "/system/functions")
            assert (status, json.loads(listed)) == (200, [described])
            assert (await site.invoke())[0] == 200
            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202
            assert site.machine.is_clean(), "an answered removal is done"
            assert (await site.call("GET", "/system/function/echo"))[0] == 404
            assert (await site.call("GET", "/system/functions"))[1] == "[]"

            assert described == {
                "name": "echo",
                "namespace": "openfaas-fn",
                "image": "shop/echo:1",
                "envVars": {"A": "1"},
                "labels": {"tier": "t1"},
                "annotations": {"note": "n", "kalium.io/address": f"127.66.0.10:{PORT}"},
                "replicas": 1,
                "availableReplicas": 1,
                "invocationCount": 0,
                "createdAt": described["createdAt"],
            }

    play(story())


def test_a_put_of_an_absent_function_is_not_found_whatever_else_is_wrong(tmp_path: Path) -> None:
    """faas-cli sends PUT first, and POST only after a 404."""

    async def story() -> None:
        async with world(tmp_path) as site:
            assert (await site.deploy(method="PUT"))[0] == 404
            assert (await site.deploy(method="PUT", image="shop/absent:1"))[0] == 404
            assert (await site.deploy())[0] == 202
            assert (await site.deploy(method="PUT"))[0] == 202
            assert (await site.deploy())[0] == 202, "POST of one that is there replaces it, as faas-cli --update=false expects"

    play(story())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ({}, "service is not given"),
        ({"service": "echo"}, "image is 'None'"),
        ({"service": "Echo", "image": "shop/echo:1"}, "'Echo' is no name"),
        ({"service": "a.b", "image": "shop/echo:1"}, "'a.b' is no name"),
        ({"service": "x" * 64, "image": "shop/echo:1"}, "is no name"),
        ({"service": "echo", "image": "--privileged"}, "no name of an image"),
        ({"service": "echo", "image": "shop/absent:1"}, "image shop/absent:1 is not on this machine"),
        ({"service": "echo", "image": "shop/echo:1", "namespace": "other"}, "there is no namespace 'other'"),
        ({"service": "echo", "image": "shop/echo:1", "labels": {"kalium.io/runtime": "runc"}}, "only kalium, stock"),
        ({"service": "echo", "image": "shop/echo:1", "labels": {"kalium.io/runtim": "kalium"}}, "label kalium.io/runtim is not known"),
        ({"service": "echo", "image": "shop/echo:1", "annotations": APP}, "the runtime stock has no guard"),
        ({"service": "echo", "image": "shop/echo:1", "labels": GUARDED}, "annotation kalium.io/app is not given"),
        ({"service": "echo", "image": "shop/echo:1", "labels": GUARDED, "annotations": {"kalium.io/app": ""}}, "annotation kalium.io/app is ''"),
        ({"service": "echo", "image": "shop/echo:1", "annotations": {"kalium.io/function": "other"}}, "this gateway's own"),
        ({"service": "echo", "image": "shop/echo:1", "annotations": {"kalium.io/timers": "off"}}, "only `on` has a meaning"),
        ({"service": "echo", "image": "shop/echo:1", "annotations": {"kalium.io/tls": "open"}}, "only `terminate` has a meaning"),
        ({"service": "echo", "image": "shop/echo:1", "envVars": {"A": 1}}, "envVars holds 'A'"),
        ({"service": "echo", "image": "shop/echo:1", "envVars": {"A=B": "1"}}, "envVars holds 'A=B'"),
        ({"service": "echo", "image": "shop/echo:1", "envVars": ["A"]}, "envVars is not an object"),
        ({"service": "echo", "image": "shop/echo:1", "limits": {"memory": "1Gi"}}, "cannot keep `limits`"),
        ({"service": "echo", "image": "shop/echo:1", "constraints": ["a=b"]}, "cannot keep `constraints`"),
        ({"service": "echo", "image": "shop/echo:1", "secrets": ["absent"]}, "there is no secret absent"),
        ({"service": "echo", "image": "shop/echo:1", "secrets": ["../lock"]}, "'../lock' is no name of a secret"),
        ({"service": "echo", "image": "shop/echo:1", "readOnlyRootFilesystem": "yes"}, "neither true nor false"),
        ({"service": "echo", "image": "shop/echo:1", "envProcess": 1}, "envProcess is not a text"),
        ({"service": "echo", "image": "shop/echo:1", "labels": {"com.openfaas.scale.min": "0"}}, "not a number from 1"),
        ({"service": "echo", "image": "shop/echo:1", "annotations": {"kalium.io/max-inflight": "0"}}, "not a number from 1 to 16"),
        ({"service": "echo", "image": "shop/echo:1", "annotations": {"kalium.io/max-inflight": "17"}}, "not a number from 1 to 16"),
        ({"service": "echo", "image": "shop/echo:1", "annotations": {"kalium.io/max-inflight": "\u0662"}}, "not a number from 1 to 16"),
    ],
)
def test_what_cannot_be_deployed_is_refused_with_the_reason(tmp_path: Path, body: Any, told: str) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            status, text, _ = await site.call("POST", "/system/functions", body)

            assert (status, told in text) == (400, True), text
            assert (await site.call("GET", "/system/functions"))[1] == "[]"
            assert site.machine.is_clean()

    play(story())


@pytest.mark.parametrize(
    ("refusal", "status", "told"),
    [("unknown_function", 400, "unknown_function: as the test says"), ("controller_unavailable", 503, "controller_unavailable")],
)
def test_a_refused_registration_is_told_and_leaves_nothing(tmp_path: Path, refusal: str, status: int, told: str) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            site.agent.refusal = refusal

            answered, text = await site.deploy(labels=GUARDED, annotations=APP)

            assert (answered, told in text) == (status, True), text
            assert site.machine.is_clean()

    play(story())


def test_without_an_agent_guarded_functions_are_refused_and_others_are_not(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            site.agent_socket.unlink()

            assert (await site.deploy(labels=GUARDED, annotations=APP))[0] == 503
            assert (await site.deploy())[0] == 202

    play(story())


def test_a_guarded_function_is_registered_before_it_runs_and_told_apart_by_annotations(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            seen = []
            site.machine.fails = lambda command: seen.append(dict(site.agent.registered)) if " start " in command else None
            assert (
                await site.deploy(
                    labels=GUARDED, annotations={**APP, "dev.gvisor.flag.network": "host", "kalium.io/timers": "on", "kalium.io/tls": "terminate"}
                )
            )[0] == 202
            await site.ready()

            (container,) = site.machine.containers.values()
            assert seen == [{container.id: ("shop", "echo", "sha256:" + "5" * 64)}]
            assert container.values("--annotation") == [
                "kalium.io/function=echo",
                "kalium.io/app=shop",
                "kalium.io/timers=on",
                "kalium.io/tls=terminate",
            ], "runsc reads flags out of others"

    play(story())


@pytest.mark.parametrize("auth", ["", "admin:wrong", "root:right", "admin:"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/system/functions"), ("POST", "/system/functions"), ("GET", "/system/nothing")])
def test_everything_under_system_needs_the_password(tmp_path: Path, auth: str, method: str, path: str) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            status, text, headers = await site.call(method, path, auth=auth)

            assert (status, text, headers["www-authenticate"]) == (401, "invalid credentials", 'Basic realm="Restricted"')

    play(story())


def test_a_bearer_token_is_no_password(tmp_path: Path) -> None:
    """faas-cli without a login sends an empty one."""

    async def story() -> None:
        async with world(tmp_path) as site:
            for given in ("Bearer ", "Basic", "Basic !!!", "Basic YWRtaW46cmlnaHQ"):  # the last without its padding
                assert (await site.call("GET", "/system/functions", auth="", headers={"Authorization": given}))[0] == 401

    play(story())


def test_health_information_and_namespaces(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            assert (await site.call("GET", "/healthz", auth=""))[:2] == (200, "OK")
            info = json.loads((await site.call("GET", "/system/info"))[1])
            assert info["provider"]["orchestration"] == "podman"
            assert info["provider"]["version"].keys() == info["version"].keys() == {"release", "sha", "commit_message"}
            assert (await site.call("GET", "/system/namespaces"))[1] == '["openfaas-fn"]'
            assert (await site.call("POST", "/system/namespace/other"))[0] == 501

    play(story())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/system/", 404),
        ("GET", "/system/functions/x", 404),
        ("GET", "/system/function/", 404),
        ("PATCH", "/system/functions", 405),
        ("POST", "/system/function/echo", 405),
        ("GET", "/system/scale-function/echo", 405),
        ("GET", "/system/functions?namespace=other", 400),
        ("GET", "/system/function/absent", 404),
        ("GET", "/system/function/absent.openfaas-fn?usage=1", 404),
        ("GET", "/system/logs?name=absent", 404),
        ("GET", "/system/logs", 400),
    ],
)
def test_what_is_not_there_is_not_there(tmp_path: Path, method: str, path: str, status: int) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            assert (await site.call(method, path))[0] == status

    play(story())


def test_a_body_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            assert (await site.call("POST", "/system/functions", b" " * (ADMIN_BYTES_MAX + 1)))[0] == 413

    play(story())


def test_the_side_of_the_functions_invokes_and_administers_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()

            assert (await site.invoke(side="data_address"))[0] == 200
            assert (await site.call("GET", "/healthz", side="data_address"))[0] == 200
            for path in ("/system/functions", "/system/info", "/function", "//system/functions"):
                assert (await site.call("GET", path, side="data_address"))[0] == 404, path
            assert (await site.call("GET", "/function/../system/functions", side="data_address"))[0] == 400

    play(story())


@pytest.mark.parametrize(
    "target",
    [
        "/function/%65cho", "/function/echo%2F", "/function/echo/../echo", "/function/echo/.", "/function/echo//a", "/function//echo",
        "/function/echo/", "/function/echo.openfaas-fn", "/function/Echo", "/function/echo;a", "/function/echo/a%20b", "/function/echo\\a",
        "/function/-echo", "/async-function/echo.openfaas-fn", "/async-function/%65cho", "/async-function/echo/../mine",
    ],
)  # fmt: skip
def test_functions_invoke_each_other_in_one_spelling(tmp_path: Path, target: str) -> None:
    """A client's path is its own affair; what comes from a function's side is held to what guards let out."""

    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()
            reader, writer = await asyncio.open_connection(*site.listening["data_address"].split(":"))
            writer.write(f"POST {target} HTTP/1.1\r\nHost: gateway:8080\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

            assert (await reader.readline()).split()[1] in (b"400", b"404")
            writer.close()
            assert site.machine.requests == []

    play(story())


def test_a_function_of_an_app_is_invoked_at_its_name_and_by_post_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.deploy("mine", labels=GUARDED, annotations=APP)
            for name in ("echo", "mine"):
                await site.ready(name)

            async def status(method: str, target: str, side: str = "data_address") -> int:
                return (await site.call(method, target, b"" if method == "GET" else b"x", side=side))[0]

            assert await status("POST", "/function/mine") == 200
            assert await status("POST", "/async-function/mine") == 202
            for method, target in (
                ("POST", "/function/mine/a"),
                ("POST", "/function/mine?a=b"),
                ("PUT", "/function/mine"),
                ("POST", "/async-function/mine/a"),
            ):
                assert await status(method, target) == 400, (method, target)
            assert await status("POST", "/function/echo/a?b=c") == 200, "a function without an app is nobody's to guard"
            assert await status("POST", "/function/mine/a?b=c", side="address") == 200, "a client"

    play(story())


def test_scaling_makes_and_removes_instances(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()

            async def scale(replicas: Any) -> int:
                return (await site.call("POST", "/system/scale-function/echo", {"serviceName": "echo", "replicas": replicas}))[0]

            assert await scale(3) == 202
            described = await site.ready(replicas=3)
            assert len(described["annotations"]["kalium.io/address"].split(",")) == 3
            assert await scale(0) == 202
            assert site.machine.is_clean()
            described = await site.describe()
            assert (described["replicas"], described["annotations"]["kalium.io/reason"]) == (0, "it is scaled to 0 replicas")
            assert (await site.invoke())[0] == 503
            assert await scale(1) == 202
            await site.ready()
            assert [await scale(wrong) for wrong in (REPLICAS_MAX + 1, -1, "2", True, None)] == [400] * 5
            assert (await site.call("POST", "/system/scale-function/echo", {"serviceName": "other", "replicas": 1}))[0] == 400
            assert (await site.call("POST", "/system/scale-function/absent", {"replicas": 1}))[0] == 404

    play(story())


def test_a_deployment_may_begin_with_several_replicas(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy(labels={"com.openfaas.scale.min": "3"})

            await site.ready(replicas=3)

    play(story())


def test_secrets_are_kept_changed_removed_and_never_shown(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:

            async def secret(method: str, **body: str) -> int:
                return (await site.call(method, "/system/secrets", body))[0]

            assert await secret("PUT", name="key", value="v") == 404
            assert await secret("POST", name="key", value="first") == 202
            assert await secret("POST", name="key", value="again") == 409
            assert await secret("PUT", name="key", rawValue="c2Vjb25k") == 202
            assert (await site.call("GET", "/system/secrets"))[1] == '[{"name": "key", "namespace": "openfaas-fn"}]'
            assert await secret("POST", name="Key", value="v") == 400
            assert await secret("POST", name="raw", rawValue="*") == 400
            assert await secret("POST", name="long", value="v" * (SECRET_BYTES_MAX + 1)) == 400

            assert (await site.deploy(secrets=["key"]))[0] == 202
            await site.ready()
            (container,) = site.machine.containers.values()
            assert b"var/openfaas/secrets/key" in container.files
            assert b"second" in container.files
            assert not any("second" in word for word in container.words)

            assert await secret("DELETE", name="key") == 202
            assert await secret("DELETE", name="key") == 404

    play(story())


def test_logs_are_told_line_by_line(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()

            status, text, headers = await site.call("GET", "/system/logs?name=echo&tail=3&follow=false&since=2026-11-22T01%3A54%3A12Z")

            (container,) = site.machine.containers.values()
            assert (status, headers["content-type"]) == (200, "application/x-ndjson; charset=utf-8")
            assert json.loads(text) == {
                "name": "echo",
                "namespace": "openfaas-fn",
                "instance": container.name,
                "timestamp": "2026-01-01T00:00:00Z",
                "text": "hello from the function",
            }
            assert " --tail 3 --since 2026-11-22T01:54:12+00:00 " in site.machine.commands[-1]
            assert (await site.call("GET", "/system/logs?name=echo&tail=x"))[0] == 400
            assert (await site.call("GET", "/system/logs?name=echo&since=yesterday"))[0] == 400

    play(story())


def test_logs_are_followed_for_as_long_as_somebody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of an instance that comes meanwhile; a reader that has gone is noticed though nothing is printed."""
    monkeypatch.setattr("kalium.engine.follow.FOLLOW_TICK_SECONDS", 0.01)

    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()
            url = f"http://{site.listening['address']}/system/logs?name=echo&follow=1&tail=3"
            async with site.session.get(url, headers=LOGIN) as answer:
                assert answer.headers["Transfer-Encoding"] == "chunked"
                assert json.loads(await answer.content.readline())["text"] == "hello from the function"
                await site.machine.printed.put(b"2026-01-01T00:00:01Z and more")
                assert json.loads(await answer.content.readline())["text"] == "and more"
                await site.call("POST", "/system/scale-function/echo", {"replicas": 2})
                await site.ready(replicas=2)
                second = json.loads(await answer.content.readline())
                assert (second["text"], second["instance"]) == ("hello from the function", list(site.machine.containers.values())[1].name)
                answer.close()
            await until(lambda: site.machine.following == 0, "that the reader is missed")
            followed = [command for command in site.machine.commands if " logs --follow " in command]
            assert len(followed) == 2
            assert " --timestamps --tail 3 " in followed[0]

    play(story())


def test_followers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.api.FOLLOWERS_MAX", 1)

    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()
            url = f"http://{site.listening['address']}/system/logs?name=echo&follow=true"
            async with site.session.get(url, headers=LOGIN) as answer:
                await answer.content.readline()
                assert (await site.call("GET", "/system/logs?name=echo&follow=true"))[0] == 503
                assert (await site.call("GET", "/system/logs?name=echo&follow=false"))[0] == 200

    play(story())


def test_a_failing_podman_is_an_error_of_the_gateway_and_logged(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()
            site.machine.fails = lambda command: "it is out of order" if " logs " in command or " image " in command else None

            assert (await site.call("GET", "/system/logs?name=echo"))[0] == 500
            assert (await site.deploy())[0] == 500
            assert "out of order" in site.events("request_failed")[0]["detail"]
            site.machine.fails = lambda command: None

    play(story())


def test_several_functions_are_made_at_the_same_time_and_not_too_many(tmp_path: Path) -> None:
    async def story() -> int:
        machine = Machine()
        async with world(tmp_path, machine) as site:
            await asyncio.gather(*(site.deploy(f"f{number}") for number in range(8)))
            for number in range(8):
                await site.ready(f"f{number}")
            await asyncio.gather(*(site.call("DELETE", "/system/functions", {"functionName": f"f{number}"}) for number in range(8)))
        return machine.most

    assert play(story()) == 4


def test_changes_of_one_function_come_one_after_the_other(tmp_path: Path) -> None:
    """faas-cli --replace sends DELETE and POST without looking."""

    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()

            answers = await asyncio.gather(
                site.call("DELETE", "/system/functions", {"functionName": "echo"}), site.deploy(image="shop/echo:2"), site.deploy(method="PUT")
            )

            assert [answer[0] for answer in answers] == [202, 202, 202]
            assert (await site.ready())["image"] == "shop/echo:1"
            await until(lambda: len(site.machine.containers) == 1, "one instance of the last")

    play(story())


def test_addresses_end_before_anything_else_does(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            for number in range(10):
                assert (await site.deploy(f"f{number}"))[0] == 202

            status, text = await site.deploy("one-more")

            assert (status, "all 10 addresses" in text) == (503, True), text

    play(story())


def described_reason(described: dict[str, Any]) -> str:
    return str(described["annotations"].get("kalium.io/reason"))


def test_an_instance_that_never_gets_ready_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.instance.READY_SECONDS_MAX", 0.05)

    async def story() -> None:
        async with world(tmp_path) as site:
            site.machine.is_healthy = False
            assert (await site.deploy())[0] == 202
            await until(lambda: site.events("instance_failed"), "the first failure")

            described = await site.describe()

            assert described["availableReplicas"] == 0
            assert "/_/health answered 500" in described_reason(described)
            assert "hello from the function" in described_reason(described)
            assert (await site.invoke())[1] == "No endpoints available for: echo."

    play(story())


async def usage_of(site: World) -> dict[str, Any]:
    return json.loads((await site.call("GET", "/system/function/echo?usage=1"))[1])["usage"]  # type: ignore[no-any-return]


def test_usage_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()

            assert "usage" not in await site.ready()
            assert (await usage_of(site)).keys() == {"cpu", "totalMemoryBytes"}

    play(story())
