"""Requests to the API server: JSON in and out, each with a deadline, and streams with a bound on their silence."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp

from kalium.engine.limits import API_ANSWER_BYTES_MAX, API_CONNECT_SECONDS_MAX, API_SECONDS_MAX, ERROR_CHARACTERS_MAX
from kalium.errors import KaliumError

CONNECTIONS_MAX = 64  # watches and followed logs among them
RETRIED = frozenset({429, 500, 502, 503, 504})  # the server's trouble, and not what was asked

Object = dict[str, Any]


class Unavailable(Exception):
    """The API server cannot be asked now; later it may."""


class Rejected(Exception):
    """The API server's answer is no: `status` is that of HTTP, `reason` and the text are its own."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class _Client:
    """What was made of one reading of the kubeconfig, and how many requests use it."""

    def __init__(self, rest: Any, host: str, fields: dict[str, str]) -> None:
        self.rest = rest
        self.host = host
        self.fields = fields
        self.uses = 0


class ApiServer:
    """The API server that a kubeconfig names. A kubeconfig that changes is read anew with the next request; those under way end as they began."""

    def __init__(self, kubeconfig: Path) -> None:
        self._path = kubeconfig
        self._read: tuple[int, int] | None = None  # time and inode of the file that the client was made of
        self._client: _Client | None = None
        self._turn = asyncio.Lock()

    async def open(self) -> None:
        """Read the kubeconfig. Raises KaliumError engine.kubeconfig."""
        async with self._turn:
            try:
                status = self._path.stat()
                if self._read != (status.st_mtime_ns, status.st_ino):
                    await self._make_client()
                    self._read = status.st_mtime_ns, status.st_ino
            except Exception as error:
                if self._client is None:
                    raise KaliumError(
                        "engine.kubeconfig",
                        f"cannot use the kubeconfig {self._path}",
                        f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS_MAX],
                        "`playbooks/engine.yml` brings it, or correct kubernetes.kubeconfig in the configuration",
                    ) from error

    async def _make_client(self) -> None:
        # Loaded here and by name: it takes 40 MB, which a gateway on podman has no use for.
        configuration = importlib.import_module("kubernetes_asyncio.client.configuration").Configuration()
        await importlib.import_module("kubernetes_asyncio.config.kube_config").load_kube_config(
            config_file=str(self._path), client_configuration=configuration, persist_config=False
        )
        configuration.connection_pool_maxsize = CONNECTIONS_MAX
        rest = importlib.import_module("kubernetes_asyncio.client.rest").RESTClientObject(configuration)
        token = configuration.api_key.get("BearerToken")
        before, self._client = self._client, _Client(rest, configuration.host.rstrip("/"), {"Authorization": token} if token else {})
        if before is not None:
            await self._close_unused(before)

    async def _close_unused(self, client: _Client) -> None:
        """Close a client that is not the last one, once nothing uses it: a watch may go on for some minutes, a followed log for an hour."""
        if client is not self._client and not client.uses:
            await client.rest.close()

    async def close(self) -> None:
        """End every connection. Nothing is asked any more."""
        if self._client is not None:
            await self._client.rest.close()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        kind: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        """One request and its answer, an object. Raises Unavailable or Rejected."""
        timeout = aiohttp.ClientTimeout(total=API_SECONDS_MAX, sock_connect=API_CONNECT_SECONDS_MAX)
        async with self._send(method, path, query, body, {"Content-Type": kind, "Accept": accept}, timeout) as response:
            text = await response.content.read(API_ANSWER_BYTES_MAX + 1) if response.content_length != 0 else b""
            while not response.content.at_eof() and len(text) <= API_ANSWER_BYTES_MAX:
                text += await response.content.read(API_ANSWER_BYTES_MAX)
            if response.content.at_eof():
                response.release()
        if len(text) > API_ANSWER_BYTES_MAX:
            raise Unavailable(f"its answer to {method} {path} has more than {API_ANSWER_BYTES_MAX} bytes")
        document = _object(text)
        _check(response.status, document, text)
        return document

    async def lines(self, path: str, query: Mapping[str, str], *, silence_seconds_max: float | None) -> AsyncGenerator[bytes, None]:
        """The lines of an answer that goes on; an empty one first, when it has begun. Raises Unavailable or Rejected."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=API_CONNECT_SECONDS_MAX, sock_read=silence_seconds_max)
        async with self._send("GET", path, query, None, {"Accept": "application/json, */*"}, timeout) as response:
            if response.status != 200:
                text = await response.content.read(ERROR_CHARACTERS_MAX * 8)
                _check(response.status, _object(text), text)
            yield b""
            try:
                while line := await response.content.readline():
                    yield line.rstrip(b"\n")
            except ValueError as error:
                raise Unavailable(f"a line of its answer to {path} is too long: {error}") from error

    @asynccontextmanager
    async def _send(
        self, method: str, path: str, query: Mapping[str, str] | None, body: Object | None, fields: dict[str, str], timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a request, for as long as the block reads it. Raises Unavailable, also for what fails in there."""
        await self.open()
        client = self._client
        assert client is not None
        client.uses += 1
        try:
            url = client.host + path + (f"?{urlencode(query)}" if query else "")
            response: aiohttp.ClientResponse = await client.rest.request(
                method, url, headers={**client.fields, **fields}, body=body, _preload_content=False, _request_timeout=timeout
            )
            try:
                yield response
            finally:
                response.close()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise Unavailable(_told(error)) from error
        finally:
            client.uses -= 1
            await self._close_unused(client)


def _told(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "it did not answer in time"
    return (str(error) or type(error).__name__)[:ERROR_CHARACTERS_MAX]


def _object(text: bytes) -> Object:
    try:
        document = json.loads(text)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _check(status: int, document: Object, text: bytes) -> None:
    """Raise for an answer that is no success, or that is no object: everything that the server tells has metadata."""
    if 200 <= status < 300 and isinstance(document.get("metadata"), dict):
        return
    message = str(document.get("message") or text.decode("utf-8", "replace").strip() or "it answered no object")[:ERROR_CHARACTERS_MAX]
    if 200 <= status < 300 or status in RETRIED:
        raise Unavailable(f"it answered {status}: {message}")
    raise Rejected(status, str(document.get("reason") or ""), message)
