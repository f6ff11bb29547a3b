"""Pods as the API server gives them, an agent behind a real socket and an API server over real TLS, all of them scripted."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from aiohttp import web

from kalium.pki.authority import Role, issue, new_ca
from kalium.registrar.admission import Place
from kalium.registrar.config import Config

PLACE = Place(node="node1", namespace="openfaas-fn", runtime_class="kalium")
UID = "3f0c1d52-8b1e-4a2f-9d5e-{:012x}"


def pod(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A pod of function `pay` that may be registered; `changes` go into its `metadata`, `spec` or `status`, by the key they belong to."""
    document: dict[str, Any] = {
        "metadata": {
            "uid": UID.format(number),
            "name": f"pay-{number}",
            "namespace": "openfaas-fn",
            "resourceVersion": str(100 + number),
            "annotations": {"kalium.io/app": "shop", "kalium.io/function": "pay"},
        },
        "spec": {
            "nodeName": "node1",
            "runtimeClassName": "kalium",
            "containers": [{"name": "pay", "image": "docker.io/library/pay:1"}],
            "volumes": [{"name": "secret", "secret": {}}],
        },
        "status": {"phase": "Pending"},
    }
    for name, value in changes.items():
        part = next((part for part in ("metadata", "status") if name in document[part]), "spec")
        document[part][name] = value
    return document


def uids(*numbers: int) -> set[str]:
    """The UIDs of these pods."""
    return {UID.format(number) for number in numbers}


class FakeAgent:
    """An agent: what it has registered, in memory, and how it refuses."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.instances: dict[str, tuple[str, str, str]] = {}
        self.refuse: dict[str, str] = {}  # container -> code
        self.requests: list[dict[str, str]] = []
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.socket))

    async def stop(self) -> None:
        """As when it is killed: what it knew is gone."""
        assert self._server is not None
        self._server.close()
        self.socket.unlink()
        self.instances.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads(await reader.readline())
        self.requests.append(request)
        writer.write(json.dumps(self._answer(request)).encode() + b"\n")
        await writer.drain()
        writer.close()

    def _answer(self, request: Mapping[str, str]) -> dict[str, Any]:
        if request["op"] == "list":
            return {"ok": True, "containers": sorted(self.instances)}
        container = request["container"]
        if request["op"] == "unregister":
            self.instances.pop(container, None)
        elif code := self.refuse.get(container):
            return {"ok": False, "error": code}
        else:
            self.instances[container] = (request["app"], request["function"], request["image"])
        return {"ok": True}

    def count(self, op: str) -> int:
        return sum(request["op"] == op for request in self.requests)


class FakeApi:
    """An API server with one namespace of pods. `say` ends up in every open watch; `faults` answer the next requests instead."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.version = 1000
        self.queries: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.faults: list[Callable[[web.Request], web.StreamResponse]] = []
        self._past: list[tuple[int, dict[str, Any]]] = []
        self._watches: list[asyncio.Queue[dict[str, Any] | bytes | None]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.queries.append(query)
        self.paths.append(request.path)
        if self.faults:
            return self.faults.pop(0)(request)
        if "watch" not in query:
            return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": list(self.pods.values())})
        response = web.StreamResponse()
        await response.prepare(request)
        watch: asyncio.Queue[dict[str, Any] | bytes | None] = asyncio.Queue()
        for version, past in self._past:
            if version > int(query["resourceVersion"]):
                watch.put_nowait(past)
        self._watches.append(watch)
        try:
            while (event := await watch.get()) is not None:
                await response.write(event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n")
        finally:
            self._watches.remove(watch)
        return response

    @property
    def watches(self) -> int:
        return len(self._watches)

    def say(self, event: dict[str, Any] | bytes | None) -> None:
        """To every watch; None ends them."""
        for watch in self._watches:
            watch.put_nowait(event)

    def put(self, document: dict[str, Any], kind: str = "ADDED") -> None:
        """A pod is made or changed, and those who watch hear of it."""
        self.version += 1
        document["metadata"]["resourceVersion"] = str(self.version)
        self.pods[document["metadata"]["uid"]] = document
        self._happened({"type": kind, "object": document})

    def remove(self, uid: str, *, silently: bool = False) -> None:
        self.version += 1
        document = self.pods.pop(uid)
        document["metadata"]["resourceVersion"] = str(self.version)
        if not silently:
            self._happened({"type": "DELETED", "object": document})

    def _happened(self, event: dict[str, Any]) -> None:
        self._past.append((self.version, event))
        self.say(event)


@asynccontextmanager
async def serving(api: FakeApi, folder: Path) -> AsyncIterator[Path]:
    """Serve `api` over TLS with client certificates; gives the kubeconfig of one that it knows."""
    authority = new_ca(now=datetime.now(timezone.utc))
    files = {}
    for role in (Role.SERVER, Role.CLIENT):
        name = role.value
        identity = issue(authority, name, ("IP:127.0.0.1",), role=role, days=1, now=datetime.now(timezone.utc))
        files[name] = (folder / f"{name}.crt", folder / f"{name}.key")
        files[name][0].write_bytes(identity.certificate_pem())
        files[name][1].write_bytes(identity.key_pem())
    (folder / "ca.crt").write_bytes(authority.certificate_pem())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.crt"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(*map(str, files["server"]))
    application = web.Application()
    application.router.add_get("/{path:.*}", api.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        port = runner.addresses[0][1]
        kubeconfig = folder / "registrar.conf"
        kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
                    "clusters": [{"name": "k", "cluster": {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(folder / "ca.crt")}}],
                    "users": [{"name": "u", "user": {"client-certificate": str(files["client"][0]), "client-key": str(files["client"][1])}}],
                }
            )
        )
        yield kubeconfig
    finally:
        api.say(None)
        await runner.cleanup()


def config_in(folder: Path, kubeconfig: Path | None = None) -> Config:
    return Config(PLACE, kubeconfig or folder / "registrar.conf", folder / "register.sock", folder / "status.sock")
