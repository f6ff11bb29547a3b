"""A cluster for the gateway that is none: an API server on loopback with its objects in dictionaries, the few controllers that matter here, and
pods that all answer requests on addresses of their own. What a kubelet says of a pod is a function that a test replaces."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from engine_world import PORT, FakeAgent, FakeWatch, Machine, World, http_answer, until

from kalium.engine.config import Config, KubernetesConfig, Listener, RuntimeClass
from kalium.engine.kubernetes.backend import KubernetesBackend
from kalium.engine.server import Engine

Object = dict[str, Any]
PODS_MAX = 24
PATH = re.compile(r"/(?:api/v1|apis/apps/v1)/namespaces/openfaas-fn/(deployments|services|secrets|pods|events)(?:/([^/]+))?(/log)?")
METRICS = "/apis/metrics.k8s.io/v1beta1/namespaces/openfaas-fn/pods"
OURS = {"kalium.io/engine": "gateway"}


def condition(kind: str, is_true: bool, message: str = "") -> Object:
    return {"type": kind, "status": "True" if is_true else "False", "message": message}


def running(*, is_ready: bool = True) -> Object:
    """The status of a pod whose container runs, but for its address."""
    return {"phase": "Running", "conditions": [condition("Ready", is_ready)], "containerStatuses": [{"state": {"running": {}}, "restartCount": 0}]}


def waiting(reason: str, message: str = "") -> Object:
    """The status of a pod whose container does not run yet."""
    container = {"state": {"waiting": {"reason": reason, **({"message": message} if message else {})}}}
    return {"phase": "Pending", "conditions": [condition("Ready", False)], "containerStatuses": [container]}


def ended(code: int) -> Object:
    """The status of a pod whose process has ended."""
    container = {"state": {"terminated": {"exitCode": code, "reason": "Error"}}}
    return {"phase": "Running", "conditions": [condition("Ready", False)], "containerStatuses": [container]}


def status_of(code: int, reason: str, message: str) -> web.Response:
    """An answer that is a Status."""
    return web.json_response({"kind": "Status", "metadata": {}, "code": code, "reason": reason, "message": message}, status=code)


async def hello(pod: str, head: str, body: str) -> bytes:
    """What a pod answers by itself: its name."""
    return http_answer(200, pod.encode())


@dataclass
class Cluster:
    """The fake. What a test may set is first; `asked` has every request as "METHOD path", `bodies` what they had."""

    kubelet: Callable[[Object], Object] = lambda pod: running()  # the status of a new pod
    admission: Callable[[Object], str] = lambda template: ""  # why no pod of it may be made
    intercept: Callable[[web.BaseRequest], web.StreamResponse | None] = lambda request: None  # an answer in place of the server's
    delay: Callable[[web.BaseRequest], Awaitable[None]] | None = None
    answering: Callable[[str, str, str], Awaitable[bytes]] = hello
    health: Callable[[str], int] = lambda pod: 200
    token: str = "first"
    is_away: bool = False
    lets_go: bool = True  # pods that are deleted go at once
    is_quiet: bool = False  # who watches does not hear yet; a watch from before that will
    has_controllers: bool = True  # who make and delete pods, and write the status of Deployments
    printed: str = "2026-01-01T00:00:00Z something was printed\n"
    metrics: Any = None

    asked: list[str] = field(default_factory=list)
    bodies: list[tuple[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # the names of the pods that were asked, but for their health
    objects: dict[str, dict[str, Object]] = field(
        default_factory=lambda: {kind: {} for kind in ("deployments", "services", "secrets", "pods", "events")}
    )
    version: int = 100
    forgotten: int = 0  # watches from before this version are told 410
    made: int = 0
    history: list[tuple[int, str, Object]] = field(default_factory=list)
    watches: list[tuple[str, asyncio.Queue[Object | bytes | None]]] = field(default_factory=list)
    connections: set[asyncio.Transport] = field(default_factory=set)

    # What a test looks at and does

    def pods(self, name: str = "echo") -> list[Object]:
        return [pod for pod in self.objects["pods"].values() if pod["metadata"]["labels"]["faas_function"] == name]

    def pod(self, name: str = "echo") -> str:
        """The name of the only pod of a function."""
        (found,) = self.pods(name)
        return str(found["metadata"]["name"])

    def count(self, asked: str) -> int:
        return sum(asked in line for line in self.asked)

    def put(self, kind: str, found: Object) -> Object:
        """Make an object, or have it as it is now; whoever watches hears of it."""
        self.version += 1
        metadata = found["metadata"]
        metadata.setdefault("uid", f"uid-{self.version}")
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        metadata["resourceVersion"] = str(self.version)
        is_new = metadata["name"] not in self.objects[kind]
        self.objects[kind][metadata["name"]] = found
        self._happened(kind, "ADDED" if is_new else "MODIFIED", found)
        return found

    def drop(self, kind: str, name: str, *, silently: bool = False) -> None:
        """An object is gone."""
        found = self.objects[kind].pop(name)
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        if not silently:
            self._happened(kind, "DELETED", found)
        self.reconcile()

    def say(self, name: str, status: Object) -> None:
        """The kubelet says something of a pod."""
        pod = self.objects["pods"][name]
        pod["status"] = {**status, "podIP": pod["status"]["podIP"]}
        self.put("pods", pod)
        self.reconcile()

    def warn(self, pod: str, reason: str, message: str) -> None:
        """There is an event about a pod."""
        about = {"kind": "Pod", "name": pod, "uid": self.objects["pods"][pod]["metadata"]["uid"]}
        self.put("events", {"metadata": {"name": f"{pod}.{reason}"}, "reason": reason, "message": message, "involvedObject": about})

    def delete_pod(self, name: str) -> None:
        """A pod is told to end."""
        self.objects["pods"][name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        self.put("pods", self.objects["pods"][name])
        if self.lets_go:
            asyncio.get_running_loop().call_soon(self._let_go, name)

    def _let_go(self, name: str) -> None:
        if name in self.objects["pods"]:
            self.drop("pods", name)

    def shout(self, what: Object | bytes | None) -> None:
        """To everybody who watches; None ends the watches."""
        for _, watch in self.watches:
            watch.put_nowait(what)

    def go_away(self) -> None:
        """The API server breaks every connection, those that are there and those to come."""
        self.is_away = True
        for transport in self.connections:
            transport.abort()

    # Controllers

    def reconcile(self) -> None:
        """Make pods for Deployments, and delete those that nobody wants any more."""
        if not self.has_controllers:
            return
        for deployment in list(self.objects["deployments"].values()):
            self._roll_out(deployment)
        owners = {deployment["metadata"]["uid"] for deployment in self.objects["deployments"].values()}
        for pod in list(self.objects["pods"].values()):
            if pod["owner"] not in owners and "deletionTimestamp" not in pod["metadata"]:
                self.delete_pod(pod["metadata"]["name"])

    def _roll_out(self, deployment: Object) -> None:
        template, uid, replicas = deployment["spec"]["template"], deployment["metadata"]["uid"], deployment["spec"]["replicas"]
        alive = [pod for pod in self.objects["pods"].values() if pod["owner"] == uid and "deletionTimestamp" not in pod["metadata"]]
        revision = template["metadata"]["labels"]["kalium.io/revision"]
        current = [pod for pod in alive if pod["metadata"]["labels"]["kalium.io/revision"] == revision]
        refusal = self.admission(template) if len(current) < replicas else ""
        conditions = [condition("ReplicaFailure", True, refusal)] if refusal else []
        if deployment.setdefault("status", {}).setdefault("conditions", []) != conditions:
            deployment["status"]["conditions"] = conditions
            self.put("deployments", deployment)
        for pod in current[replicas:]:
            self.delete_pod(pod["metadata"]["name"])
        for _ in range(0 if refusal else replicas - len(current)):
            self._make_pod(template, deployment)
        ready = [pod for pod in current if condition("Ready", True) in pod["status"].get("conditions", ())]
        for pod in alive if len(ready) >= replicas else ():
            if pod not in current:
                self.delete_pod(pod["metadata"]["name"])

    def _make_pod(self, template: Object, deployment: Object) -> None:
        self.made += 1
        assert self.made <= PODS_MAX, "the gateway has pods made and deleted without an end"
        metadata = {**copy.deepcopy(template["metadata"]), "name": f"{deployment['metadata']['name']}-{self.made}"}
        pod = {"metadata": metadata, "spec": {**template["spec"], "nodeName": "node1"}, "owner": deployment["metadata"]["uid"]}
        pod["status"] = {**self.kubelet(pod), "podIP": f"127.67.0.{self.made}"}
        self.put("pods", pod)
        asyncio.get_running_loop().call_soon(self.reconcile)

    def _happened(self, kind: str, event: str, found: Object) -> None:
        said = {"type": event, "object": copy.deepcopy(found)}
        self.history.append((self.version, kind, said))
        for watched, watch in self.watches:
            if watched == kind and _is_selected(found, kind) and not self.is_quiet:
                watch.put_nowait(said)

    # The API

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        self.connections.add(request.transport)
        body = json.loads(await request.read() or b"null")
        if self.is_away:
            request.transport.abort()
            return web.Response()
        line = f"{request.method} {request.path}"
        self.asked.append(line + ("?watch" if "watch" in request.query else ""))
        self.bodies.append((line, body))
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return status_of(401, "Unauthorized", "Unauthorized")
        if self.delay is not None:
            await self.delay(request)
        return self.intercept(request) or await self._answer(request, body)

    async def _answer(self, request: web.BaseRequest, body: Any) -> web.StreamResponse:
        if request.path == METRICS and self.metrics is not None:
            return web.json_response(self.metrics)
        match = PATH.fullmatch(request.path)
        if match is None:
            return status_of(404, "NotFound", "the server could not find the requested resource")
        kind, name, is_log = match.groups()
        if is_log:
            return web.Response(text=self.printed)
        if name is None and request.method == "GET":
            return await (self._watch(request, kind) if "watch" in request.query else self._list(kind))
        answered: web.StreamResponse = getattr(self, f"_{request.method.lower()}")(kind, name, body)
        if request.method != "GET":
            self.reconcile()
        return answered

    async def _list(self, kind: str) -> web.Response:
        found = [item for item in self.objects[kind].values() if _is_selected(item, kind)]
        return web.json_response({"kind": "List", "metadata": {"resourceVersion": str(self.version)}, "items": found})

    async def _watch(self, request: web.BaseRequest, kind: str) -> web.StreamResponse:
        begin = int(request.query["resourceVersion"])
        if begin < self.forgotten:
            return status_of(410, "Expired", "too old resource version")
        response = web.StreamResponse()
        await response.prepare(request)
        watch: asyncio.Queue[Object | bytes | None] = asyncio.Queue()
        for version, past, said in self.history:
            if version > begin and past == kind and _is_selected(said["object"], kind):
                watch.put_nowait(said)
        self.watches.append((kind, watch))
        try:
            while (event := await watch.get()) is not None:
                await response.write(event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n")
        except ConnectionError:
            pass  # the gateway has gone
        finally:
            self.watches.remove((kind, watch))
        return response

    def _get(self, kind: str, name: str, _body: Any) -> web.Response:
        found = self.objects[kind].get(name)
        return web.json_response(found) if found else status_of(404, "NotFound", f"{kind} {name!r} not found")

    def _post(self, kind: str, _name: None, body: Object) -> web.Response:
        if body["metadata"]["name"] in self.objects[kind]:
            return status_of(409, "AlreadyExists", f"{kind} {body['metadata']['name']!r} already exists")
        return web.json_response(self.put(kind, body), status=201)

    def _put(self, kind: str, name: str, body: Object) -> web.Response:
        found = self.objects[kind].get(name)
        if found is None or body["metadata"].get("uid") not in (None, found["metadata"]["uid"]):
            return status_of(404 if found is None else 409, "Conflict", f"{kind} {name!r}: there is another, or none")
        # As the real one: what is in `status` is not changed by whoever writes the rest, and is in the answer as it was.
        kept = {key: found["metadata"][key] for key in ("uid", "creationTimestamp")}
        return web.json_response(self.put(kind, {**body, "metadata": {**body["metadata"], **kept}, "status": found.get("status", {})}))

    def _patch(self, kind: str, name: str, body: Object) -> web.Response:
        found = self.objects[kind].get(name)
        if found is None or body["metadata"].get("uid") not in (None, found["metadata"]["uid"]):
            return status_of(404 if found is None else 409, "Conflict", f"{kind} {name!r}: there is another, or none")
        return web.json_response(
            self.put(kind, {key: {**found[key], **body.get(key, {})} if isinstance(found[key], dict) else found[key] for key in found})
        )

    def _delete(self, kind: str, name: str, body: Object) -> web.Response:
        found = self.objects[kind].get(name)
        if found is None or ((body or {}).get("preconditions") or {}).get("uid") not in (None, found["metadata"]["uid"]):
            return status_of(404 if found is None else 409, "Conflict", f"{kind} {name!r}: there is another, or none")
        if kind == "pods":
            self.delete_pod(name)
        else:
            self.drop(kind, name)
        return web.json_response({"kind": "Status", "metadata": {}, "status": "Success"})

    # Pods

    async def serve_pod(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request to the address of a pod."""
        address = writer.get_extra_info("sockname")[0]
        name = next((pod["metadata"]["name"] for pod in self.objects["pods"].values() if pod["status"]["podIP"] == address), "")
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"(?i)^content-length: (\d+)", head, re.MULTILINE)
            body = (await reader.readexactly(int(length[1]))).decode("latin-1") if length else ""
            if head.startswith("GET /_/health "):
                writer.write(http_answer(self.health(name), b""))
            elif name:
                self.requests.append(name)
                writer.write(await self.answering(name, head, body))
            await writer.drain()
        writer.close()


def _is_selected(found: Object, kind: str) -> bool:
    """By the label of the gateway. Events have none, and are selected otherwise."""
    return kind == "events" or (found["metadata"].get("labels") or {}).get("kalium.io/engine") == "gateway"


def cluster_config(folder: Path, **changes: Any) -> Config:
    """A configuration of a gateway on a cluster. Nothing of it is there yet."""
    cluster = KubernetesConfig(
        kubeconfig=folder / "gateway.conf",
        runtimes={"stock": RuntimeClass("gvisor", guarded=False), "kalium": RuntimeClass("kalium-class", guarded=True)},
        node_selector={},
    )
    return Config(
        admin=Listener("127.0.0.1", 0),
        data=Listener("127.0.0.1", 0),
        user="admin",
        password_file=folder / "password",
        hosts={"gateway": "127.66.0.1", "database": "127.66.0.1"},
        backend=replace(cluster, **changes),
        state_dir=folder / "state",
        function_port=PORT,
        health_path="/_/health",
        log=None,
    )


def write_kubeconfig(path: Path, url: str, token: str) -> None:
    """As whoever renews it does: another file in its place."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": token}}],
    }
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document), encoding="utf-8")
    new.replace(path)


@dataclass
class ClusterWorld(World):
    """A running gateway on a cluster. The machine, the agent and the watch of a World are there, and idle."""

    cluster: Cluster
    url: str  # of the API server

    @property
    def on(self) -> KubernetesBackend:
        assert isinstance(self.engine.backend, KubernetesBackend)
        return self.engine.backend

    async def reason(self, name: str = "echo") -> str:
        return str((await self.describe(name))["annotations"].get("kalium.io/reason", ""))


@asynccontextmanager
async def api_server(cluster: Cluster) -> AsyncIterator[str]:
    """The API server and the pods of `cluster`, while the block lasts; gives its URL."""
    runner = web.ServerRunner(web.Server(cluster.answer, access_log=None), shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    pods = await asyncio.start_server(cluster.serve_pod, [f"127.67.0.{number}" for number in range(1, PODS_MAX + 1)], PORT)
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        cluster.shout(None)
        pods.close()
        await runner.cleanup()


@asynccontextmanager
async def gateway(folder: Path, cluster: Cluster, url: str, **changes: Any) -> AsyncIterator[ClusterWorld]:
    """A gateway that serves while the block lasts. At its end nothing of it runs, and the cluster has what it had."""
    made, log = cluster_config(folder, **changes), list[dict[str, Any]]()
    made.password_file.write_text("right\n", encoding="utf-8")
    write_kubeconfig(folder / "gateway.conf", url, cluster.token)
    engine = Engine(made, lambda event, **fields: log.append({"event": event, **fields}))
    serving = asyncio.ensure_future(engine.serve())
    try:
        await until(lambda: serving.done() or any(line["event"] == "listening" for line in log), "the gateway to listen")
        if serving.done():
            await serving
        async with aiohttp.ClientSession() as session:
            yield ClusterWorld(Machine(), FakeAgent(folder / "idle.sock"), FakeWatch(), engine, made, session, log, cluster, url)
    finally:
        engine.stop()
        (failed,) = await asyncio.gather(serving, return_exceptions=True)
        if failed is not None:
            raise failed  # a mistake of the gateway's comes before what a story thought of it
    assert isinstance(engine.backend, KubernetesBackend)
    assert not engine.backend._tasks, "nothing of it runs any more"


@asynccontextmanager
async def cluster_world(folder: Path, cluster: Cluster | None = None, **changes: Any) -> AsyncIterator[ClusterWorld]:
    """A cluster and a gateway on it."""
    cluster = cluster or Cluster()
    async with api_server(cluster) as url, gateway(folder, cluster, url, **changes) as site:
        yield site
