"""The back-end of a cluster: what the gateway asks of a back-end, as requests to the API server and out of what its watches tell."""

from __future__ import annotations

import asyncio
import copy
import re
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from typing import Any

from kalium.engine.backend import Backend, BackendFailed, Function, LogLineOf, LogQuery, Observe, Turns
from kalium.engine.config import Config, KubernetesConfig
from kalium.engine.deadline import within
from kalium.engine.deployment import NAMESPACE, Deployment, Refused
from kalium.engine.follow import Source, lines_of
from kalium.engine.instance import Health
from kalium.engine.kubernetes.api import ApiServer, Object, Rejected, Unavailable
from kalium.engine.kubernetes.functions import ClusterFunction, Hands, PodInstance
from kalium.engine.kubernetes.objects import (
    FUNCTION_LABEL,
    KEEPS,
    SELECTOR,
    Found,
    Pod,
    deployment_object,
    first_revision,
    is_ours,
    next_revision,
    read_deployment,
    read_pod,
    secret_object,
    service_object,
)
from kalium.engine.kubernetes.watch import Change, Watcher, uid_of
from kalium.engine.limits import (
    ADMIT_SECONDS_MAX,
    BEGIN_SECONDS_MAX,
    ERROR_CHARACTERS_MAX,
    FUNCTIONS_MAX,
    LOG_LINES_TOLD,
    REPLICAS_MAX,
    SECRETS_MAX,
    STOP_SECONDS,
    WARNINGS_MAX,
    WATCH_PAUSE_SECONDS,
)
from kalium.engine.log import LogLine

CORE, APPS = f"/api/v1/namespaces/{NAMESPACE}", f"/apis/apps/v1/namespaces/{NAMESPACE}"
METRICS = f"/apis/metrics.k8s.io/v1beta1/namespaces/{NAMESPACE}/pods"
MERGE = "application/merge-patch+json"
# Secrets without what is in them.
NAMES_ONLY = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"
# Warnings that say why a pod does not start, where its status does not: of images and containers that tells more, a moment later. Others (a
# probe that fails while a program begins) come to pass by themselves.
WARNINGS = frozenset({"FailedCreatePodSandBox", "FailedAttachVolume", "FailedMount"})
CPU: dict[str, float] = {"n": 1e-6, "u": 1e-3, "m": 1.0, "": 1e3}  # to thousandths of a processor
BYTES: dict[str, float] = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


@contextmanager
def _answered(attempted: str) -> Iterator[None]:
    """What the API server says to a call, as what the client is told."""
    try:
        yield
    except Unavailable as error:
        raise Refused(503, f"cannot {attempted}: the API server of Kubernetes cannot be asked: {error}") from error
    except Rejected as error:
        # What the client wrote, or a policy of the cluster against it. The gateway's own lack of rights is neither.
        is_ours_to_mend = error.status == 403 and " cannot " in str(error)
        if error.status in (400, 403, 422) and not is_ours_to_mend:
            raise Refused(400, f"Kubernetes refuses to {attempted}: {error}") from error
        raise BackendFailed(f"cannot {attempted}: the API server answered {error.status}: {error}") from error


class KubernetesBackend(Backend):
    """Functions of Kubernetes."""

    orchestration = "kubernetes"
    keeps = KEEPS

    def __init__(self, config: Config, cluster: KubernetesConfig, log: LogLine, observe: Observe) -> None:
        self.port = config.function_port
        self.runtimes = cluster.runtimes
        self._config = config
        self._cluster = cluster
        self._log = log
        self._observe = observe
        self._api = ApiServer(cluster.kubeconfig)
        self._table: dict[str, ClusterFunction] = {}
        self._leaving: dict[str, PodInstance] = {}  # pods of what was removed, by uid
        self._warnings: dict[str, str] = {}  # by the uid of what they are about, oldest first
        self._turns = Turns()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        ours = {"labelSelector": SELECTOR}
        self._deployments = Watcher(self._api, f"{APPS}/deployments", ours, self._take_deployments, self._tell)
        self._pods = Watcher(self._api, f"{CORE}/pods", ours, self._take_pods, self._tell)
        self._events = Watcher(self._api, f"{CORE}/events", {"fieldSelector": "type=Warning"}, self._take_events)
        self._hands = Hands(
            health=Health(config.function_port, config.health_path),
            log=log,
            spawn=self._spawn,
            delete_pod=self._delete_pod,
            last_words=self._last_words,
            warning_of=lambda uid: self._warnings.get(uid, ""),
        )

    async def prepare(self) -> None:
        """Read the kubeconfig. Raises KaliumError."""
        await self._api.open()

    async def begin(self) -> None:
        """Read what there is. An API server that does not answer is not waited for: what is asked meanwhile is told so."""
        for watcher in (self._deployments, self._pods, self._events):
            self._spawn(watcher.run())
        waiting = [asyncio.ensure_future(watcher.synced.wait()) for watcher in (self._deployments, self._pods)]
        await asyncio.wait(waiting, timeout=BEGIN_SECONDS_MAX)
        for task in waiting:
            task.cancel()

    async def stop(self) -> None:
        """Return when no change is under way and nothing runs here. Deployments and pods stay as they are."""
        self._is_stopping = True
        await self._turns.all_over()
        for task in list(self._tasks):
            task.cancel()
        for function in self._table.values():
            function.close()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        await self._api.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._observe)
        return task

    # What the watches tell

    @property
    def _lost(self) -> str:
        return self._deployments.lost or self._pods.lost

    def _tell(self, lost: str) -> None:
        if lost:
            self._log("cluster_lost", detail=lost[:ERROR_CHARACTERS_MAX])
        elif not self._lost:
            self._log("cluster_back", functions=len(self._table))

    def _take_deployments(self, changes: Iterable[Change]) -> None:
        for change in changes:
            name, uid = str(change.object["metadata"]["name"]), uid_of(change.object)
            known = self._table.get(name)
            if change.is_gone:
                if known is not None and known.found.uid == uid:
                    self._close(name)
                continue
            try:
                found = read_deployment(change.object, self.runtimes, self._cluster.node_selector)
            except (Refused, KeyError, TypeError, ValueError, IndexError) as error:
                self._log("function_unreadable", path=f"deployments/{name}", detail=f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS_MAX])
                continue
            if known is not None and known.found.uid == uid:
                known.update(found)
                continue
            if known is not None:
                self._close(name)
            self._open(found)

    def _open(self, found: Found) -> None:
        deployment = found.deployment
        function = ClusterFunction(found, self._hands, self._cluster.runtimes)
        self._table[deployment.name] = function
        for pod in map(read_pod, self._pods.reflection.objects.values()):
            if pod.function == deployment.name:
                function.see(pod)

    def _close(self, name: str) -> None:
        for instance in self._table.pop(name).close():
            self._leaving[instance.id] = instance

    def _take_pods(self, changes: Iterable[Change]) -> None:
        for change in changes:
            uid = uid_of(change.object)
            if change.is_gone:
                self._warnings.pop(uid, None)
                leaving = self._leaving.pop(uid, None)
                if leaving is not None:
                    leaving.end("its pod was deleted")
            pod = read_pod(change.object)
            function = self._table.get(pod.function)
            if function is None:
                continue
            if change.is_gone:
                function.lose(uid)
            else:
                function.see(pod)

    def _take_events(self, changes: Iterable[Change]) -> None:
        for change in changes:
            event = change.object
            about = event.get("involvedObject") or {}
            if not change.is_gone and event.get("reason") in WARNINGS:
                self._warnings.pop(about.get("uid", ""), None)
                self._warnings[about.get("uid", "")] = f"{event['reason']}: {event.get('message') or ''}"[:ERROR_CHARACTERS_MAX]
                function = self._table.get(next((f.deployment.name for f in self._table.values() if about.get("uid") in f.pods), ""))
                if function is not None:
                    function.changed.set()
        while len(self._warnings) > WARNINGS_MAX:
            del self._warnings[next(iter(self._warnings))]

    # Functions

    def find(self, name: str) -> ClusterFunction | None:
        """The function of that name. Raises Refused while nobody has said yet which there are."""
        function = self._table.get(name)
        if function is None and not self._deployments.reflection.is_synced:
            raise Refused(503, f"the API server of Kubernetes cannot be asked: {self._lost}")
        return function

    def _deployed(self, name: str) -> ClusterFunction:
        self.get(name)
        return self._table[name]

    def all(self) -> list[Function]:
        """Every function, by name."""
        return [self._table[name] for name in sorted(self._table)]

    def check(self) -> None:
        """Raise Refused while the API server is away."""
        if self._lost:
            raise Refused(503, f"the API server of Kubernetes cannot be asked: {self._lost}")
        if self._is_stopping:
            raise Refused(503, "the gateway is stopping")

    async def deploy(self, deployment: Deployment, *, must_exist: bool) -> None:
        """Deploy or update. Returns when a pod of it has begun, or nothing was heard of one for ADMIT_SECONDS_MAX.

        Raises Refused, with everything as it was before: also when its image cannot be had or a policy of the cluster refuses its pods.
        """
        name = deployment.name
        async with self._turns.of(name):
            self.check()
            if must_exist:
                self.get(name)
            function = self.find(name)
            if function is None and len(self._table) >= FUNCTIONS_MAX:
                raise Refused(400, f"there are {FUNCTIONS_MAX} functions already")
            await self._check_secrets(deployment)
            before = None if function is None else copy.deepcopy(self._deployments.reflection.objects[function.found.uid])
            if function is None:
                revision, known = first_revision(secrets.token_hex(4)), ""
            else:
                # Pods of a deployment that was undone may still be there, with a revision after the last.
                pods = [instance.pod.revision for instance in function.pods.values()]
                revision, known = next_revision(function.found.revision, *pods), function.found.refusal
            wanted = deployment_object(deployment, revision, self._config, self._cluster)
            with _answered(f"deploy {name}"):
                uid = await self._create(wanted) if function is None else await self._replace(wanted, function.found.uid)
                try:
                    await self._ensure_service(deployment, uid)
                except (Unavailable, Rejected, Refused):
                    with suppress(Refused, BackendFailed):  # what went wrong first is what is told
                        await self._undo(name, before)
                    raise
            reason = await self._why_not_begun(name, known)
            if reason:
                await self._undo(name, before)
                raise Refused(400, f"cannot deploy {name}: {reason}")
            event = "function_updated" if before else "function_deployed"
            self._log(event, function=name, image=deployment.image, runtime=deployment.runtime, app=deployment.app, replicas=deployment.replicas)

    async def _create(self, wanted: Object) -> str:
        try:
            made = await self._api.ask("POST", f"{APPS}/deployments", body=wanted)
        except Rejected as error:
            if error.status != 409:
                raise
            raise Refused(400, f"there is a Deployment {wanted['metadata']['name']} that this gateway did not make: {error}") from error
        self._deployments.apply(made)
        return uid_of(made)

    async def _replace(self, wanted: Object, uid: str) -> str:
        """Make a Deployment what is wanted, whatever it is now, but not another of its name."""
        name = wanted["metadata"]["name"]
        known = self._deployments.reflection.objects[uid]["metadata"].get("annotations") or {}
        kept = {key: value for key, value in known.items() if key.startswith("deployment.kubernetes.io/")}
        annotations = {**wanted["metadata"]["annotations"], **kept}
        wanted = {**wanted, "metadata": {**wanted["metadata"], "uid": uid, "annotations": annotations}}
        self._deployments.apply(await self._api.ask("PUT", f"{APPS}/deployments/{name}", body=wanted))
        return uid

    async def _ensure_service(self, deployment: Deployment, owner: str) -> None:
        name = deployment.name
        wanted = service_object(deployment, owner, self.port)
        try:
            await self._api.ask("POST", f"{CORE}/services", body=wanted)
        except Rejected as error:
            if error.status != 409:
                raise
            found = await self._api.ask("GET", f"{CORE}/services/{name}")
            if not is_ours(found):
                raise Refused(400, f"there is a Service {name} that this gateway did not make") from error
            owned = {"metadata": {"ownerReferences": wanted["metadata"]["ownerReferences"]}}
            await self._api.ask("PATCH", f"{CORE}/services/{name}", body=owned, kind=MERGE)

    async def _why_not_begun(self, name: str, known: str) -> str:
        """Wait until a pod of the last revision has begun. Why none can, when that is said; "" in doubt.

        `known` is why the revision before was refused: until controllers have seen the last, the Deployment's status is about that one. One that
        stays to the end is of the last.
        """
        deadline = time.monotonic() + ADMIT_SECONDS_MAX
        while (left := deadline - time.monotonic()) > 0:
            function = self._table.get(name)
            if function is None or function.has_started():
                return ""
            if function.found.refusal != known:
                known = ""
            if reason := function.image_trouble(known=known):
                return reason
            if function.trouble(known=known):  # it may pass; until then it is the function's kalium.io/reason
                return ""
            function.changed.clear()
            with suppress(asyncio.TimeoutError):
                await within(left, function.changed.wait())
        return "" if name not in self._table else self._table[name].found.refusal

    async def _undo(self, name: str, before: Object | None) -> None:
        """Have things as they were before a deployment that cannot begin."""
        with _answered(f"undo the deployment of {name}"):
            if before is None:
                await self._remove(name)
            else:
                metadata = {key: before["metadata"].get(key) or {} for key in ("labels", "annotations")}
                wanted = {
                    "apiVersion": "apps/v1",
                    "kind": "Deployment",
                    "metadata": {"name": name, "namespace": NAMESPACE, **metadata},
                    "spec": before["spec"],
                }
                await self._replace(wanted, uid_of(before))

    async def scale(self, name: str, replicas: int) -> None:
        """Have so many replicas of a function. Raises Refused."""
        if not 0 <= replicas <= REPLICAS_MAX:
            raise Refused(400, f"replicas is {replicas}: this gateway has 0 to {REPLICAS_MAX}")
        async with self._turns.of(name):
            self.check()
            wanted = {"metadata": {"uid": self._deployed(name).found.uid}, "spec": {"replicas": replicas}}
            with _answered(f"scale {name}"):
                self._deployments.apply(await self._api.ask("PATCH", f"{APPS}/deployments/{name}", body=wanted, kind=MERGE))
            self._log("function_scaled", function=name, replicas=replicas)

    async def remove(self, name: str) -> None:
        """Remove a function. It is gone from here at once, and its pods end after that. Raises Refused."""
        async with self._turns.of(name):
            self.check()
            self.get(name)
            with _answered(f"remove {name}"):
                await self._remove(name)
            self._log("function_removed", function=name)

    async def _remove(self, name: str) -> None:
        function = self._deployed(name)
        options = _delete_options(function.found.uid, propagationPolicy="Background")
        with _already_gone():
            await self._api.ask("DELETE", f"{APPS}/deployments/{name}", body=options)
        pods = [instance.pod for instance in function.pods.values()]
        self._deployments.forget(function.found.uid)
        for pod in pods:
            self._spawn(self._delete_pod(pod))
        with _already_gone():
            service = await self._api.ask("GET", f"{CORE}/services/{name}")
            if is_ours(service):
                await self._api.ask("DELETE", f"{CORE}/services/{name}", body=_delete_options(uid_of(service)))

    async def _delete_pod(self, pod: Pod) -> None:
        """Delete a pod, and not another of its name; try for as long as the API server is away."""
        pause, pause_max = WATCH_PAUSE_SECONDS
        options = _delete_options(pod.uid, gracePeriodSeconds=STOP_SECONDS)
        while True:
            try:
                with _already_gone():
                    await self._api.ask("DELETE", f"{CORE}/pods/{pod.name}", body=options)
                return
            except Rejected as error:
                self._log("instance_left", function=pod.function, instance=pod.name, detail=str(error))
                return
            except Unavailable:
                await asyncio.sleep(pause)
                pause = min(pause * 2, pause_max)

    async def usage(self, function: Function) -> dict[str, float] | None:
        """What the metrics API of the cluster says, where it has one."""
        query = {"labelSelector": f"{SELECTOR},{FUNCTION_LABEL}={function.deployment.name}"}
        ready = {instance.name for instance in function.ready()}
        try:
            listed = await self._api.ask("GET", METRICS, query=query)
            containers = [container for pod in listed["items"] if pod["metadata"]["name"] in ready for container in pod["containers"]]
            cpu = sum(_quantity(container["usage"]["cpu"], CPU) for container in containers)
            memory = sum(_quantity(container["usage"]["memory"], BYTES) for container in containers)
        except (Unavailable, Rejected, KeyError, TypeError, ValueError):
            return None
        return {"cpu": round(cpu, 3), "totalMemoryBytes": memory} if containers else None

    # Logs

    def logs(self, function: Function, query: LogQuery) -> AsyncGenerator[LogLineOf | None, None]:
        """What its pods printed, also those that are not ready; with `follow` also those that come."""
        name = function.deployment.name

        def sources() -> dict[str, Source]:
            pods = [instance.pod for instance in self._table[name].pods.values()] if name in self._table else []
            wanted = [pod for pod in sorted(pods, key=lambda pod: pod.name) if query.instance in ("", pod.name)]
            return {pod.uid: partial(self._lines, pod, query) for pod in wanted if pod.is_running or pod.ended}

        return lines_of(sources, follow=query.follow)

    async def _lines(self, pod: Pod, query: LogQuery) -> AsyncGenerator[LogLineOf, None]:
        options = {"container": pod.function, "timestamps": "true", "tailLines": str(query.tail), "follow": "true" if query.follow else "false"}
        if query.since:
            moment = datetime.fromisoformat(query.since).astimezone(timezone.utc)
            options["sinceTime"] = moment.isoformat(timespec="seconds").replace("+00:00", "Z")
        try:
            path = f"{CORE}/pods/{pod.name}/log"
            async with aclosing(self._api.lines(path, options, silence_seconds_max=None if query.follow else 30.0)) as lines:
                async for line in lines:
                    timestamp, _, text = line.decode("utf-8", "replace").partition(" ")
                    if timestamp:
                        yield LogLineOf(pod.name, timestamp, text)
        except Rejected as error:
            if error.status not in (400, 404):  # it has gone, or has printed nothing yet
                raise BackendFailed(f"cannot read the log of {pod.name}: {error}") from error
        except Unavailable as error:
            raise BackendFailed(f"cannot read the log of {pod.name}: {error}") from error

    async def _last_words(self, pod: Pod) -> str:
        query = LogQuery(tail=LOG_LINES_TOLD, since="", instance="", follow=False)
        try:
            return " | ".join([line.text async for line in self._lines(pod, query)])
        except BackendFailed:
            return ""

    # Secrets

    async def secrets(self) -> list[str]:
        """The names of all secrets of ours; nothing of what is in them is asked for."""
        with _answered("list secrets"):
            listed = await self._api.ask("GET", f"{CORE}/secrets", query={"labelSelector": SELECTOR}, accept=NAMES_ONLY.format("List"))
        return sorted(str(item["metadata"]["name"]) for item in listed.get("items") or ())

    async def _secret(self, name: str) -> Object | None:
        """The metadata of a secret of ours; None when there is none, or one that is not ours."""
        try:
            found = await self._api.ask("GET", f"{CORE}/secrets/{name}", accept=NAMES_ONLY.format(""))
        except Rejected as error:
            if error.status != 404:
                raise
            return None
        return found if is_ours(found) else None

    async def _check_secrets(self, deployment: Deployment) -> None:
        with _answered(f"look for the secrets of {deployment.name}"):
            for name in deployment.secrets:
                if await self._secret(name) is None:
                    raise Refused(400, f"there is no secret {name}: create it first")

    async def put_secret(self, name: str, value: bytes, *, is_new: bool) -> None:
        """Keep a secret."""
        wanted = secret_object(name, value)
        with _answered(f"keep the secret {name}"):
            if not is_new:
                known = await self._secret(name)
                if known is None:
                    raise Refused(404, f"there is no secret {name}")
                wanted["metadata"]["uid"] = uid_of(known)
                await self._api.ask("PUT", f"{CORE}/secrets/{name}", body=wanted)
                return
            if len(await self.secrets()) >= SECRETS_MAX:
                raise Refused(400, f"there are {SECRETS_MAX} secrets already")
            try:
                await self._api.ask("POST", f"{CORE}/secrets", body=wanted)
            except Rejected as error:
                if error.status != 409:
                    raise
                raise Refused(409, f"secret {name} is there already: use PUT to change it") from error

    async def forget_secret(self, name: str) -> None:
        """Remove a secret."""
        with _answered(f"remove the secret {name}"):
            known = await self._secret(name)
            if known is None:
                raise Refused(404, f"there is no secret {name}")
            with _already_gone():
                await self._api.ask("DELETE", f"{CORE}/secrets/{name}", body=_delete_options(uid_of(known)))


def _delete_options(uid: str, **more: Any) -> Object:
    """To delete an object, and not another of its name."""
    return {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}, **more}


@contextmanager
def _already_gone() -> Iterator[None]:
    """What is to be deleted may be gone, or another has its name."""
    try:
        yield
    except Rejected as error:
        if error.status not in (404, 409):
            raise


def _quantity(text: str, units: dict[str, float]) -> float:
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    if match is None:
        raise ValueError(text)
    return float(match[1]) * units[match[2]]
