"""The pods of a node, as the API server lists and watches them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes_asyncio import client, config
from kubernetes_asyncio.config import ConfigException

from kalium.engine.deadline import within
from kalium.registrar.admission import Place
from kalium.registrar.limits import DETAIL_CHARACTERS_MAX, LIST_SECONDS_MAX, PAGE_PODS, PAGES_MAX, WATCH_SECONDS, WATCH_SILENCE_SECONDS_MAX

HTTP_OK = 200
HTTP_GONE = 410


class VersionGone(Exception):
    """The API server no longer knows what was changed since that version: list again."""


class ApiUnavailable(Exception):
    """The API server does not answer, or not as one does; later it may."""


@dataclass(frozen=True)
class Change:
    """One event of a watch. `pod` is None for a bookmark, which moves `version` alone."""

    version: str
    pod: Mapping[str, Any] | None
    is_deleted: bool


class Pods:
    """Lists and watches. Every method raises ApiUnavailable, and VersionGone where it says so."""

    def __init__(self, api: client.CoreV1Api, place: Place) -> None:
        self._api = api
        self._place = place

    async def list(self) -> tuple[list[Mapping[str, Any]], str]:
        """All pods of the node, and the version since which to watch. Raises VersionGone when they change faster than pages come."""
        pods: list[Mapping[str, Any]] = []
        page: dict[str, Any] = {}
        for _ in range(PAGES_MAX):
            with _as_unavailable():
                document = await within(LIST_SECONDS_MAX, self._page(page))
            found, metadata = document.get("items"), document.get("metadata")
            if not isinstance(found, list) or not isinstance(metadata, dict) or not isinstance(metadata.get("resourceVersion"), str):
                raise ApiUnavailable("its list of pods has no items or no version")
            pods += [pod for pod in found if isinstance(pod, dict)]
            if not metadata.get("continue"):
                return pods, metadata["resourceVersion"]
            page = {"_continue": metadata["continue"]}
        raise ApiUnavailable(f"its list of pods has more than {PAGES_MAX} pages")

    async def _page(self, page: Mapping[str, Any]) -> dict[str, Any]:
        async with await self._get(limit=PAGE_PODS, **page) as response:
            document = json.loads(await response.read())
        if not isinstance(document, dict):
            raise ApiUnavailable("its list of pods is no object")
        return document

    async def watch(self, version: str) -> AsyncIterator[Change]:
        """What changes after `version`, until the API server ends the watch after a minute. Raises VersionGone."""
        with _as_unavailable():
            answer = await within(
                LIST_SECONDS_MAX, self._get(watch=True, resource_version=version, allow_watch_bookmarks=True, timeout_seconds=WATCH_SECONDS)
            )
        async with answer as response:
            while True:
                with _as_unavailable():
                    line = await within(WATCH_SILENCE_SECONDS_MAX, response.content.readline())
                    if not line:
                        return
                    event = json.loads(line)
                yield _change(event)

    async def _get(self, **options: Any) -> aiohttp.ClientResponse:
        response: Any = await self._api.list_namespaced_pod(
            self._place.namespace, field_selector=f"spec.nodeName={self._place.node}", _preload_content=False,
            _request_timeout=aiohttp.ClientTimeout(total=None, connect=LIST_SECONDS_MAX), **options,
        )  # fmt: skip
        assert isinstance(response, aiohttp.ClientResponse)
        if response.status == HTTP_OK:
            return response
        text = (await response.read()).decode("utf-8", "replace")[:DETAIL_CHARACTERS_MAX]
        response.close()
        if response.status == HTTP_GONE:
            raise VersionGone(text)
        raise ApiUnavailable(f"it answers {response.status}: {text}")


def _change(event: Any) -> Change:
    """An event of a watch, checked. Raises VersionGone and ApiUnavailable."""
    kind, pod = (event.get("type"), event.get("object")) if isinstance(event, dict) else (None, None)
    if kind == "ERROR":
        code = pod.get("code") if isinstance(pod, dict) else None
        if code == HTTP_GONE:
            raise VersionGone(json.dumps(pod)[:DETAIL_CHARACTERS_MAX])
        raise ApiUnavailable(f"its watch ends with {json.dumps(pod)[:DETAIL_CHARACTERS_MAX]}")
    metadata = pod.get("metadata") if isinstance(pod, dict) else None
    version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
    if kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK") or not isinstance(version, str):
        raise ApiUnavailable(f"its watch says {json.dumps(event)[:DETAIL_CHARACTERS_MAX]}")
    return Change(version, None if kind == "BOOKMARK" else pod, is_deleted=kind == "DELETED")


@contextmanager
def _as_unavailable() -> Iterator[None]:
    """Everything that goes wrong on the way to an API server is one error; what it says itself passes."""
    try:
        yield
    except asyncio.TimeoutError as error:
        raise ApiUnavailable("it does not answer in time") from error
    except (OSError, aiohttp.ClientError, ValueError) as error:
        raise ApiUnavailable(str(error)[:DETAIL_CHARACTERS_MAX] or type(error).__name__) from error


@asynccontextmanager
async def connect(kubeconfig: Path, place: Place) -> AsyncIterator[Pods]:
    """A client with the certificates that `kubeconfig` names now: they may have been renewed. Raises ApiUnavailable."""
    configuration = client.Configuration()
    try:
        await config.load_kube_config(str(kubeconfig), client_configuration=configuration, persist_config=False)
        api = client.ApiClient(configuration=configuration)
    except (OSError, ValueError, ConfigException) as error:
        raise ApiUnavailable(f"{kubeconfig}: {error}"[:DETAIL_CHARACTERS_MAX]) from error
    async with api:
        yield Pods(client.CoreV1Api(api), place)
