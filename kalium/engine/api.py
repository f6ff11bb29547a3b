"""The OpenFaaS REST API: which path and method does what, who may, and how refusals are answered."""

from __future__ import annotations

import base64
import hmac
import json
import platform
import urllib.parse
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any

from aiohttp import web

from kalium import __version__
from kalium.engine.command import CommandFailed
from kalium.engine.config import Runtime
from kalium.engine.deployment import NAMESPACE, Refused, check_namespace, function_name, object_of, parse
from kalium.engine.functions import Functions
from kalium.engine.limits import ADMIN_BYTES_MAX, LOG_LINES_MAX
from kalium.engine.log import LogLine
from kalium.engine.podman import Podman
from kalium.engine.proxy import PREFIX, Proxy, read_body
from kalium.engine.store import Store

ASYNC_PREFIX = "/async-function/"
LOG_LINES_DEFAULT = 100

Call = Callable[[web.BaseRequest, str], Awaitable[web.Response]]  # the second argument is what follows the route's path


class Data:
    """The listener of the functions: invocations and nothing else."""

    def __init__(self, proxy: Proxy, log: LogLine) -> None:
        self._proxy = proxy
        self._log = log

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        """Answer one request, whatever happens."""
        try:
            return await self._answer(request)
        except Refused as error:
            return web.Response(status=error.status, text=error.text)
        except (OSError, CommandFailed) as error:
            self._log("request_failed", path=request.path[:200], detail=f"{type(error).__name__}: {error}")
            return web.Response(status=500, text=f"the gateway failed: {error}")

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        target = request.raw_path
        if target.startswith(PREFIX):
            return await self._proxy.invoke(request)
        if target.startswith(ASYNC_PREFIX):
            raise Refused(501, "this gateway has no asynchronous invocations: use /function/NAME")
        if target.partition("?")[0] == "/healthz":
            return web.Response(text="OK")
        return await self._administer(request)

    async def _administer(self, request: web.BaseRequest) -> web.Response:
        raise Refused(404, f"there is no {request.path[:200]} here")


class Admin(Data):
    """The administrator's listener: the whole API. Everything under /system/ needs basic authentication."""

    def __init__(
        self,
        *,
        proxy: Proxy,
        functions: Functions,
        store: Store,
        podman: Podman,
        runtimes: dict[str, Runtime],
        user: str,
        password: str,
        log: LogLine,
    ) -> None:
        super().__init__(proxy, log)
        self._functions = functions
        self._store = store
        self._podman = podman
        self._runtimes = runtimes
        self._expected = f"{user}:{password}".encode()
        # Path, or the beginning of one that ends with the name of something -> method -> call.
        self._routes: dict[str, dict[str, Call]] = {
            "/system/functions": {"GET": self._list, "POST": self._deploy, "PUT": self._deploy, "DELETE": self._remove},
            "/system/function/": {"GET": self._describe},
            "/system/scale-function/": {"POST": self._scale},
            "/system/info": {"GET": self._info},
            "/system/namespaces": {"GET": self._namespaces},
            "/system/secrets": {"GET": self._list_secrets, "POST": self._put_secret, "PUT": self._put_secret, "DELETE": self._remove_secret},
            "/system/logs": {"GET": self._logs},
        }

    async def _administer(self, request: web.BaseRequest) -> web.Response:
        path = request.raw_path.partition("?")[0]
        if not path.startswith("/system/"):
            raise Refused(404, f"there is no {path[:200]} here")
        if not self._is_authorized(request.headers.get("Authorization", "")):
            return web.Response(status=401, text="invalid credentials", headers={"WWW-Authenticate": 'Basic realm="Restricted"'})
        for route, calls in self._routes.items():
            rest = path[len(route) :] if route.endswith("/") and path.startswith(route) else ""
            if path == route or rest:
                if request.method not in calls:
                    return web.Response(status=405, text=f"{request.method} is not for {path[:200]}", headers={"Allow": ", ".join(calls)})
                check_namespace(request.query.get("namespace"))
                return await calls[request.method](request, urllib.parse.unquote(rest))
        if path.startswith("/system/namespace/"):
            raise Refused(501, f"this gateway has the namespace {NAMESPACE} alone")
        raise Refused(404, f"there is no {path[:200]} here")

    def _is_authorized(self, header: str) -> bool:
        scheme, _, credentials = header.partition(" ")
        try:
            given = base64.b64decode(credentials.strip(), validate=True)
        except ValueError:
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(given, self._expected)

    async def _document(self, request: web.BaseRequest) -> dict[str, Any]:
        return object_of(await read_body(request, ADMIN_BYTES_MAX))

    # Functions

    async def _list(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        return web.json_response([function.status() for function in self._functions.all()])

    async def _describe(self, request: web.BaseRequest, rest: str) -> web.Response:
        function = self._functions.get(rest.removesuffix("." + NAMESPACE))
        return web.json_response(function.status(with_usage=request.query.get("usage") in ("1", "true")))

    async def _deploy(self, request: web.BaseRequest, _rest: str) -> web.Response:
        document = await self._document(request)
        if request.method == "PUT":
            self._functions.get(function_name(document.get("service")))  # absent comes before whatever else may be wrong
        await self._functions.deploy(parse(document, self._runtimes), must_exist=request.method == "PUT")
        return web.Response(status=202)

    async def _remove(self, request: web.BaseRequest, _rest: str) -> web.Response:
        document = await self._document(request)
        await self._functions.remove(function_name(document.get("functionName"), "functionName"))
        return web.Response(status=202)

    async def _scale(self, request: web.BaseRequest, rest: str) -> web.Response:
        document = await self._document(request)
        name, replicas = function_name(rest), document.get("replicas")
        if document.get("serviceName") not in (None, "", name, rest):
            raise Refused(400, f"serviceName is {str(document['serviceName'])[:200]!r}, but the path says {name}")
        if type(replicas) is not int:
            raise Refused(400, "replicas is not a number")
        await self._functions.scale(name, replicas)
        return web.Response(status=202)

    # The gateway

    async def _info(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        version = {"release": __version__, "sha": "", "commit_message": ""}
        provider = {"provider": "kalium-engine", "orchestration": "podman", "version": version}
        return web.json_response({"provider": provider, "version": version, "arch": platform.machine()})

    async def _namespaces(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        return web.json_response([NAMESPACE])

    # Secrets

    async def _list_secrets(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        return web.json_response([{"name": name, "namespace": NAMESPACE} for name in self._store.secrets()])

    async def _put_secret(self, request: web.BaseRequest, _rest: str) -> web.Response:
        self._store.put_secret(await self._document(request), is_new=request.method == "POST")
        return web.Response(status=202)

    async def _remove_secret(self, request: web.BaseRequest, _rest: str) -> web.Response:
        self._store.forget_secret(await self._document(request))
        return web.Response(status=202)

    # Logs

    async def _logs(self, request: web.BaseRequest, _rest: str) -> web.Response:
        query = request.query
        name = function_name(query.get("name"), "name")
        function = self._functions.get(name)
        if query.get("follow", "") in ("1", "true"):
            raise Refused(501, "this gateway follows no logs: ask with follow=false")
        tail, since = _tail(query.get("tail", "")), _since(query.get("since", ""))
        lines = []
        for instance in function.ready():
            if query.get("instance") in (None, "", instance.name):
                for line in await self._podman.logs(instance.container, tail=tail, since=since):
                    timestamp, _, text = line.partition(" ")
                    lines.append({"name": name, "namespace": NAMESPACE, "instance": instance.name, "timestamp": timestamp, "text": text})
        body = "".join(json.dumps(line) + "\n" for line in lines)
        return web.Response(text=body, content_type="application/x-ndjson")


def _tail(text: str) -> int:
    if not text:
        return LOG_LINES_DEFAULT
    if not text.lstrip("-").isdigit() or len(text) > 9:
        raise Refused(400, f"tail is {text[:200]!r}, and not a number")
    tail = int(text)
    return LOG_LINES_MAX if tail < 0 else min(tail, LOG_LINES_MAX)


def _since(text: str) -> str:
    """An RFC 3339 time as podman takes it; "" when there is none."""
    if not text:
        return ""
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise Refused(400, f"since is {text[:200]!r}, and not a time of RFC 3339") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).isoformat()
