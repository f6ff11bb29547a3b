"""The controller's numbers: what is counted under which name and label, and who may ask."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from kalium.controller import metrics, monitor
from kalium.controller.config import Listen
from kalium.controller.counts import QUESTIONS, Counts
from kalium.controller.metrics import Exporter
from kalium.controller.monitor import Monitor
from kalium.errors import KaliumError
from kalium.policy.message import Reason
from kalium.protocol.frames import StatusReport
from kalium.protocol.session import CloseReason

REPORT = StatusReport(
    {"shop": 7}, agents=2, calls=3, invocations=4, controller="c1", controllers=("c1", "c2"), store="redis", started_ms=1500,
    node=("n1", "n2", "n2", "n2"), app=("shop", "shop", "shop", "evil\n"), function=("buy", "buy", "gone", "f"),
    asked=("enforce", "enforce", "", ""), mode=("enforce", "audit", "none", "made up"), version=(7, 7, 6, 1), count=(2, 1, 3, 5),
)  # fmt: skip


def samples(counts: Counts, report: StatusReport = REPORT) -> dict[tuple[str, ...], float]:
    """Every sample of a scrape: (name, label values in the order of label names) -> value."""
    text = (
        Exporter(
            counts,
            status=lambda: report,
            not_after=lambda: 1234.0,
            faults=lambda: {"store": "it is away", "audit": ""},
            audit_entries=lambda: 12,
            waiting=lambda: 5,
        )
        .text()
        .decode()
    )
    return {
        (sample.name.removeprefix(metrics.PREFIX), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_step_is_counted_by_question_and_reason() -> None:
    counts = Counts()
    counts.steps["invoke"]["allowed"] += 2
    counts.steps["start"]["bad_token"] += 1
    counts.steps["start"]["controller_unavailable"] += 1
    counts.steps["finish"]["controller_unavailable"] += 1

    found = samples(counts)

    assert (found["steps_total", "invoke", "allowed"], found["steps_total", "start", "bad_token"], found["steps_total", "start", "allowed"]) == (
        2,
        1,
        0,
    )


def test_every_reason_has_a_series_from_the_start_on() -> None:
    """A counter that begins with 1 would hide its first event from rate()."""
    found = samples(Counts())

    assert {key[1:] for key in found if key[0] == "steps_total"} == {
        (question, reason) for question in QUESTIONS for reason in [*(each.value for each in Reason), "other"]
    }


def test_a_label_that_is_not_in_its_set_is_other() -> None:
    counts = Counts()
    counts.steps["start"]["made up"] += 3
    log = counts.logging(lambda event, **fields: None)
    log("connection_refused", reason="tls")
    log("connection_refused", reason="from the moon")
    log("connection_refused", reason="duplicate_agent")

    found = samples(counts)

    assert (found["steps_total", "start", "other"], found["connections_refused_total", "tls"], found["connections_refused_total", "other"]) == (
        3,
        1,
        1,
    )
    assert found["connections_refused_total", "duplicate_agent"] == 1
    assert not any("made up" in key or "from the moon" in key for key in found)


@pytest.mark.parametrize(("event", "labels"), [("connection_refused", metrics.REFUSALS), ("invocation_evicted", metrics.EVICTIONS)])
def test_every_reason_that_the_controller_logs_has_a_label_of_its_own(event: str, labels: tuple[str, ...]) -> None:
    """A new one that nobody adds here would be counted as OTHER, and no alert could name it."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(metrics.__file__).parent.glob("*.py")))

    if event == "connection_refused":
        said = set(re.findall(rf'"{event}",\s*reason="(\w+)"', text)) | {
            CloseReason[name].value for name in re.findall(rf'"{event}",\s*reason=CloseReason\.(\w+)', text)
        }
    else:
        said = set(re.findall(r'_forget\(\w+, "(\w+)"', text)) | set(re.findall(r'_evict\(\w+, "(\w+)"', text))
    assert said <= set(labels)
    assert len(said) > 1


def test_what_an_agent_makes_up_is_no_label() -> None:
    """Apps and functions are those of loaded policies: an agent could report a name a second."""
    found = {key[1:]: value for key, value in samples(Counts()).items() if key[0] == "instances"}

    # The order of the labels' names: app, asked, function, mode.
    assert found == {
        ("shop", "enforce", "buy", "enforce"): 2,
        ("shop", "enforce", "buy", "audit"): 1,
        ("other", "other", "other", "none"): 8,
    }


def test_a_line_of_the_log_and_its_counter_are_one() -> None:
    counts, lines = Counts(), []
    log = counts.logging(lambda event, **fields: lines.append((event, fields)))

    log("invocation_evicted", reason="timeout", app="shop")
    log("connection_closed", reason="shutdown")
    log("policy_refused", reason="policy.version")
    log("listening", address="x")
    log("audit_failed", file="x")

    assert (counts.evicted["timeout"], counts.closed["shutdown"], counts.policies_refused, counts.audit_failures) == (1, 1, 1, 1)
    assert [event for event, _ in lines] == ["invocation_evicted", "connection_closed", "policy_refused", "listening", "audit_failed"]
    assert lines[0][1] == {"reason": "timeout", "app": "shop"}


def test_a_batch_falls_into_the_bucket_whose_bound_it_does_not_exceed() -> None:
    counts = Counts()
    for ns in (10_000, 10_001, 2_000_000_000):
        counts.batch(ns)

    found = samples(counts)

    assert [found["batch_seconds_bucket", bound] for bound in ("1e-05", "2.5e-05", "1.0", "+Inf")] == [1, 2, 2, 3]
    assert found["batch_seconds_count",] == 3
    assert found["batch_seconds_sum",] == pytest.approx(2.000020001)


def test_what_is_there_now_comes_from_the_status() -> None:
    found = samples(Counts())

    assert {name: found[name,] for name in ("agents", "calls", "invocations", "controllers", "start_time_seconds")} == {
        "agents": 2, "calls": 3, "invocations": 4, "controllers": 2, "start_time_seconds": 1.5,
    }  # fmt: skip
    assert (found["fault", "store"], found["fault", "audit"], found["audit_entries_total",]) == (1, 0, 12)
    assert (found["policy_version", "shop"], found["certificate_not_after_seconds",]) == (7, 1234)


# The listener

Ask = Callable[[bytes], Coroutine[Any, Any, bytes]]


def listening(faults: dict[str, str], work: Callable[[Ask, Monitor], Awaitable[None]], text: Callable[[], bytes] = lambda: b"m 1\n") -> None:
    """Run `work` against a listener on a port that the system chose."""

    async def run() -> None:
        watched = Monitor(text, lambda: faults)
        address = await watched.start(Listen("127.0.0.1", 0))
        host, _, port = address.rpartition(":")

        async def ask(request: bytes) -> bytes:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            try:
                return await asyncio.wait_for(reader.read(), 20)
            except ConnectionError:
                return b""
            finally:
                writer.close()

        try:
            await work(ask, watched)
        finally:
            watched.close()

    asyncio.run(run())


async def until(claim: Callable[[], bool]) -> None:
    for _ in range(2000):
        if claim():
            return
        await asyncio.sleep(0.01)
    pytest.fail("waited 20 s in vain")


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_metrics_are_served_as_prometheus_wants_them() -> None:
    async def work(ask: Ask, _: Monitor) -> None:
        head, body = (await ask(get("/metrics?x=1"))).split(b"\r\n\r\n", 1)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert CONTENT_TYPE_LATEST.encode() in head and b"Content-Length: 4" in head
        assert body == b"m 1\n"

    listening({}, work)


def test_a_flood_of_scrapes_makes_the_text_once() -> None:
    made: Iterator[int] = iter(range(100))

    async def work(ask: Ask, watched: Monitor) -> None:
        watched._clock = lambda: 0.0
        assert [(await ask(get("/metrics"))).rpartition(b"\n")[2] for _ in range(5)] == [b"0"] * 5
        watched._clock = lambda: monitor.CACHE_S
        assert (await ask(get("/metrics"))).endswith(b"\n1")

    listening({}, work, lambda: b"%d" % next(made))


def test_readiness_names_the_check_that_fails() -> None:
    wrong = {"policies": "", "store": "no answer from redis"}

    async def work(ask: Ask, _: Monitor) -> None:
        head, body = (await ask(get("/readyz"))).split(b"\r\n\r\n", 1)
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body) == {"ready": False, "checks": {"policies": "ok", "store": "no answer from redis"}}
        assert (await ask(get("/healthz"))).startswith(b"HTTP/1.1 200 ")  # it lives all the same
        wrong["store"] = ""
        assert (await ask(get("/readyz"))).startswith(b"HTTP/1.1 200 ")

    listening(wrong, work)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/metrics", "POST"), b"405"), (get("/"), b"404"), (b"GET /metrics\r\n\r\n", b"400"), (b"\x16\x03\x01\r\n\r\n", b"400"),
        (get("/" + "a" * monitor.HEAD_BYTES_MAX), b"431"), (get("/metrics", "HEAD"), b"200"),
    ],
)  # fmt: skip
def test_odd_requests_get_their_status(request_: bytes, status: bytes) -> None:
    async def work(ask: Ask, _: Monitor) -> None:
        answer = await ask(request_)
        assert answer.split(b" ")[1] == status
        assert not request_.startswith(b"HEAD") or answer.endswith(b"\r\n\r\n")
        assert (await ask(get("/healthz"))).endswith(b"ok\n")

    listening({}, work)


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects and says nothing holds one place, and never the loop."""
    monkeypatch.setattr(monitor, "DEADLINE_S", 60.0)  # none of them ends before all are there

    async def work(ask: Ask, watched: Monitor) -> None:
        silent = [asyncio.create_task(ask(b"GET /hea")) for _ in range(monitor.CONNECTIONS_MAX)]
        await until(lambda: watched._open == monitor.CONNECTIONS_MAX)
        assert await ask(get("/healthz")) == b""
        for one in silent:
            one.cancel()
        await until(lambda: not watched._open)
        assert (await ask(get("/healthz"))).endswith(b"ok\n")

    listening({}, work)


def test_a_connection_that_says_nothing_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "DEADLINE_S", 0.1)

    async def work(ask: Ask, watched: Monitor) -> None:
        assert await ask(b"GET /hea") == b""
        await until(lambda: not watched._open)

    listening({}, work)


def test_an_address_that_is_taken_is_an_error_for_people() -> None:
    async def work(_: Ask, watched: Monitor) -> None:
        assert watched._server is not None
        with pytest.raises(KaliumError, match="cannot listen on"):
            await Monitor(lambda: b"", dict).start(Listen("127.0.0.1", watched._server.sockets[0].getsockname()[1]))

    listening({}, work)
