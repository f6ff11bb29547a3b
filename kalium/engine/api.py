"""The OpenFaaS REST API: which path and method does what, who may, and how refusals are answered."""

from __future__ import annotations

import base64
import hmac
import json
import platform
import re
import urllib.parse
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from datetime import datetime, timezone
from typing import Any

from aiohttp import web

from kalium import __version__
from kalium.engine.backend import Backend, BackendFailed, LogLineOf, LogQuery
from kalium.engine.calls import ASYNC_PREFIX, Calls
from kalium.engine.deployment import NAMESPACE, Refused, check_namespace, function_name, object_of, parse, secret_name, secret_value
from kalium.engine.limits import ADMIN_BYTES_MAX, FOLLOWERS_MAX, LOG_LINES_MAX
from kalium.engine.log import LogLine
from kalium.engine.proxy import PREFIX, Proxy, read_body

LOG_LINES_DEFAULT = 100
LOG_CONTENT = "application/x-ndjson"
WITHOUT_BACKEND = frozenset({"/system/info", "/system/namespaces"})  # answered whatever the back-end's state is

Call = Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]  # the second argument is what follows the route's path


# How a function writes whom it invokes. Guards let nothing else out; whoever comes around one is held to the same here, so that no
# two readers of a path, with escapes or dot segments in it, could find two functions in it.
SPELLING = re.compile(r"/(?:async-)?function/([a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?)((?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*)(\?[!-~]*)?")


class Data:
    """The listener of the functions: invocations and nothing else."""

    def __init__(self, proxy: Proxy, calls: Calls, backend: Backend, log: LogLine) -> None:
        self._backend = backend
        self._proxy = proxy
        self._calls = calls
        self._log = log

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, whatever happens."""
        try:
            return await self._answer(request)
        except Refused as error:
            return web.Response(status=error.status, text=error.text)
        except (OSError, BackendFailed) as error:
            self._log("request_failed", path=request.path[:200], detail=f"{type(error).__name__}: {error}")
            return web.Response(status=500, text=f"the gateway failed: {error}")

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request.raw_path
        if target.startswith((PREFIX, ASYNC_PREFIX)):
            self._check_spelling(request.method, target)
        if target.startswith(PREFIX):
            return await self._proxy.invoke(request)
        if target.startswith(ASYNC_PREFIX):
            return await self._calls.accept(request)
        if target.partition("?")[0] == "/healthz":
            return web.Response(text="OK")
        return await self._administer(request)

    def _check_spelling(self, method: str, target: str) -> None:
        """Raises Refused for what no guard lets a function write. A function of an app is invoked by POST, at its name and nothing behind it."""
        match = SPELLING.fullmatch(target)
        if match is None:
            raise Refused(400, "functions invoke each other by /function/NAME or /async-function/NAME, without escapes and dot segments")
        function = self._backend.find(match[1])
        if function is not None and function.deployment.app and (method != "POST" or match[2] or match[3]):
            raise Refused(400, f"{match[1]} belongs to an app: functions invoke it by POST, without a path or query behind its name")

    async def _administer(self, request: web.BaseRequest) -> web.StreamResponse:
        raise Refused(404, f"there is no {request.path[:200]} here")


class Admin(Data):
    """The administrator's listener: the whole API. Everything under /system/ needs basic authentication."""

    def __init__(self, *, proxy: Proxy, calls: Calls, backend: Backend, user: str, password: str, log: LogLine) -> None:
        super().__init__(proxy, calls, backend, log)
        self._followers = 0
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

    def _check_spelling(self, method: str, target: str) -> None:
        """Clients are not held to it: OpenFaaS passes paths and queries on."""

    async def _administer(self, request: web.BaseRequest) -> web.StreamResponse:
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
                if route not in WITHOUT_BACKEND:
                    self._backend.check()
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
        return web.json_response([function.status() for function in self._backend.all()])

    async def _describe(self, request: web.BaseRequest, rest: str) -> web.Response:
        function = self._backend.get(rest.removesuffix("." + NAMESPACE))
        status = function.status()
        if request.query.get("usage") in ("1", "true") and (usage := await self._backend.usage(function)) is not None:
            status["usage"] = usage
        return web.json_response(status)

    async def _deploy(self, request: web.BaseRequest, _rest: str) -> web.Response:
        document = await self._document(request)
        if request.method == "PUT":
            self._backend.get(function_name(document.get("service")))  # absent comes before whatever else may be wrong
        await self._backend.deploy(parse(document, self._backend.runtimes, self._backend.keeps), must_exist=request.method == "PUT")
        return web.Response(status=202)

    async def _remove(self, request: web.BaseRequest, _rest: str) -> web.Response:
        document = await self._document(request)
        await self._backend.remove(function_name(document.get("functionName"), "functionName"))
        return web.Response(status=202)

    async def _scale(self, request: web.BaseRequest, rest: str) -> web.Response:
        document = await self._document(request)
        name, replicas = function_name(rest), document.get("replicas")
        if document.get("serviceName") not in (None, "", name, rest):
            raise Refused(400, f"serviceName is {str(document['serviceName'])[:200]!r}, but the path says {name}")
        if type(replicas) is not int:
            raise Refused(400, "replicas is not a number")
        await self._backend.scale(name, replicas)
        return web.Response(status=202)

    # The gateway

    async def _info(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        version = {"release": __version__, "sha": "", "commit_message": ""}
        provider = {"provider": "kalium-engine", "orchestration": self._backend.orchestration, "version": version}
        return web.json_response({"provider": provider, "version": version, "arch": platform.machine()})

    async def _namespaces(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        return web.json_response([NAMESPACE])

    # Secrets

    async def _list_secrets(self, _request: web.BaseRequest, _rest: str) -> web.Response:
        return web.json_response([{"name": name, "namespace": NAMESPACE} for name in await self._backend.secrets()])

    async def _put_secret(self, request: web.BaseRequest, _rest: str) -> web.Response:
        document = await self._document(request)
        await self._backend.put_secret(secret_name(document.get("name")), secret_value(document), is_new=request.method == "POST")
        return web.Response(status=202)

    async def _remove_secret(self, request: web.BaseRequest, _rest: str) -> web.Response:
        await self._backend.forget_secret(secret_name((await self._document(request)).get("name")))
        return web.Response(status=202)

    # Logs

    async def _logs(self, request: web.BaseRequest, _rest: str) -> web.StreamResponse:
        text = request.query
        name = function_name(text.get("name"), "name")
        function = self._backend.get(name)
        query = LogQuery(
            tail=_tail(text.get("tail", "")),
            since=_since(text.get("since", "")),
            instance=text.get("instance", ""),
            follow=text.get("follow", "") in ("1", "true"),
        )
        async with aclosing(self._backend.logs(function, query)) as lines:
            if query.follow:
                return await self._follow(request, name, lines)
            body = "".join([_log_line(name, line) async for line in lines if line is not None])
        return web.Response(text=body, content_type=LOG_CONTENT)

    async def _follow(self, request: web.BaseRequest, name: str, lines: AsyncGenerator[LogLineOf | None, None]) -> web.StreamResponse:
        """Write lines as they come, until the client has gone."""
        if self._followers >= FOLLOWERS_MAX:
            raise Refused(503, f"{FOLLOWERS_MAX} clients follow logs already")
        self._followers += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": LOG_CONTENT})
            response.enable_chunked_encoding()
            await response.prepare(request)
            with suppress(ConnectionError, BackendFailed):  # the client has gone, or there is nothing more to read
                async for line in lines:
                    if line is not None:
                        await response.write(_log_line(name, line).encode("utf-8"))
                    elif request.transport is None or request.transport.is_closing():
                        break
                await response.write_eof()
            return response
        finally:
            self._followers -= 1


def _log_line(name: str, line: LogLineOf) -> str:
    record = {"name": name, "namespace": NAMESPACE, "instance": line.instance, "timestamp": line.timestamp, "text": line.text}
    return json.dumps(record) + "\n"


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
