"""A Redis that wants to know who comes: a user of its ACL, a password from a file, TLS with certificates on both sides."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from controller_samples import policy

from control.redis_server import RedisServer
from control.store import WAIT_S
from kalium.controller.calls import Deferred
from kalium.controller.config import Store, TlsFiles
from kalium.controller.redis_calls import RedisCalls
from kalium.controller.redis_link import Link
from kalium.controller.registry import Instance
from kalium.pki import files
from kalium.pki.authority import Role
from kalium.protocol.frames import Answer

# What docs/topics/stores.md tells to allow.
DOCUMENTED = (Path(__file__).resolve().parents[2] / "docs" / "topics" / "stores.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    now = datetime.now(timezone.utc)
    files.init(folder, now=now)
    files.issue(folder, "controller", ("IP:127.0.0.1",), role=Role.CONTROLLER, days=7, now=now)
    files.issue(folder, "store", ("IP:127.0.0.1",), role=Role.SERVER, days=7, now=now)
    return folder


@pytest.fixture
def guarded(tmp_path: Path, pki: Path) -> Iterator[tuple[RedisServer, int]]:
    """A Redis with TLS on a port, and the user that the page describes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    options = (
        "--tls-port", str(port), "--tls-cert-file", str(pki / "store.crt"), "--tls-key-file", str(pki / "store.key"),
        "--tls-ca-cert-file", str(pki / "ca.crt"), "--tls-auth-clients", "yes", "--appendonly", "yes", "--appendfsync", "always",
    )  # fmt: skip
    with RedisServer(tmp_path / "redis", *options) as server:
        line = next(line for line in DOCUMENTED.splitlines() if line.startswith("user kalium "))
        server.ask("ACL", "SETUSER", *line.replace("PASSWORD", "secret").split()[1:])
        yield server, port


def first_step(store: Store, tls: TlsFiles) -> tuple[Answer | None, list[dict[str, Any]]]:
    """What an entry's start is answered over a link to `store`, None when it does not come up; and what the log says."""
    lines: list[dict[str, Any]] = []

    async def run() -> Answer | None:
        is_said = asyncio.Event()

        def log(event: str, **fields: Any) -> None:
            lines.append({"event": event, **fields})
            is_said.set()

        link = Link(store, tls, log=log)
        calls = RedisCalls(link, name="controller", versions=lambda _app, _now: [policy()], mint=lambda: secrets.token_hex(16))
        running = asyncio.ensure_future(link.run())
        await asyncio.wait_for(is_said.wait(), WAIT_S)
        answer = None
        await asyncio.sleep(0)  # behind the line comes the connection
        if link.is_up:
            front = Instance("front-1", "shop", "front", "node0")
            for asked in (calls.adopt(front, now_ns=0), calls.begin(front, 1, "a" * 16, now_ns=0)):
                assert isinstance(asked, Deferred)
                waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
                asked.then(waiting.set_result)
                answer = await asyncio.wait_for(waiting, WAIT_S)
            calls.beat([])
            calls.offer_policy(policy(), b"{}")
            calls.expire(now_ns=0)
            deadline = time.monotonic() + WAIT_S
            while calls.counts() != (1, 1):  # the last that was asked, so all is answered then
                assert time.monotonic() < deadline, calls.counts()
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return answer

    return asyncio.run(run()), lines


def password(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "password"
    path.write_text(text + "\n")
    return path


def test_the_documented_user_over_tls_is_all_that_a_controller_needs(guarded: tuple[RedisServer, int], pki: Path, tmp_path: Path) -> None:
    _, port = guarded
    store = Store("redis", f"rediss://kalium@127.0.0.1:{port}/0", "kalium:", pki / "ca.crt", password(tmp_path, "secret"))

    answer, lines = first_step(store, TlsFiles(pki / "ca.crt", pki / "controller.crt", pki / "controller.key"))

    assert answer is not None and answer.allowed
    assert [(line["event"], line["detail"]) for line in lines] == [("store_connected", "new")]


@pytest.mark.parametrize("case", ["password", "user", "prefix", "ca", "plain"])
def test_whoever_is_not_let_in_is_told_why_in_the_log(guarded: tuple[RedisServer, int], pki: Path, tmp_path: Path, case: str) -> None:
    _, port = guarded
    tls = TlsFiles(pki / "ca.crt", pki / "controller.crt", pki / "controller.key")
    user = "stranger" if case == "user" else "kalium"
    ca = None if case == "ca" else pki / "ca.crt"
    scheme = "redis" if case == "plain" else "rediss"
    prefix = "others:" if case == "prefix" else "kalium:"
    file = password(tmp_path, "wrong" if case == "password" else "secret")
    store = Store("redis", f"{scheme}://{user}@127.0.0.1:{port}", prefix, None if case == "plain" else ca, file)

    answer, lines = first_step(store, tls)

    assert answer is None
    assert lines[0]["event"] == "store_lost"
    found = {"password": "WRONGPASS", "user": "WRONGPASS", "prefix": "NOPERM", "ca": "certificate verify failed", "plain": ""}[case]
    assert found in lines[0]["detail"]
    assert "secret" not in str(lines)
