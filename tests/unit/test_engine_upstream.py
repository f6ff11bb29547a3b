"""Answers of functions, read strictly: what two readers could read differently is no answer, and hostile bytes are an error."""

import asyncio
import contextlib
import itertools

import pytest
from engine_world import play
from hypothesis import given
from hypothesis import strategies as st

from kalium.engine.limits import BODY_BYTES_MAX, HEAD_BYTES_MAX
from kalium.engine.upstream import Answer, Breaker, Parser, Request, UpstreamError, UpstreamTimeout, exchange

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi": (200, b"hi"),
    b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n": (200, b""),
    b"HTTP/1.0 500 Internal Server Error\r\n\r\nuntil the end": (500, b"until the end"),
    b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n": (204, b""),
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi": (200, b"hi"),
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi": (200, b"hi"),
    CHUNKED + b"2\r\nhi\r\n0\r\n\r\n": (200, b"hi"),
    CHUNKED + b"1;a=b\r\nh\r\n00a\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n": (200, b"h0123456789"),
    CHUNKED + b"0\r\n\r\n": (200, b""),
}


def parse(data: bytes, method: str = "POST", *, cuts: tuple[int, ...] = ()) -> Answer:
    """The answer in `data`, fed in pieces, and then the end of the connection."""
    parser = Parser(method)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        parser.feed(data[start:end])
    parser.end()
    assert parser.answer is not None
    return parser.answer


@pytest.mark.parametrize("data", ANSWERS)
def test_an_answer_is_read_whole(data: bytes) -> None:
    answer = parse(data)

    assert (answer.status, answer.body) == ANSWERS[data]


@given(st.sampled_from(list(ANSWERS)), st.lists(st.integers(0, 200), max_size=20))
def test_where_the_network_cuts_does_not_matter(data: bytes, cuts: list[int]) -> None:
    answer = parse(data, cuts=tuple(cuts))

    assert (answer.status, answer.body) == ANSWERS[data]


@pytest.mark.parametrize("data", [data for data in ANSWERS if data.startswith(b"HTTP/1.1")])
def test_an_answer_that_is_cut_short_is_none(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(UpstreamError, match="closed the connection"):
            parse(data[:length])


def test_a_head_has_a_length_and_no_body() -> None:
    assert parse(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", "HEAD").body == b""


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: x\ny: z\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: x\0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi!",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1),
        b"HTTP/1.1 200 OK\r\n" + b"A: x\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * HEAD_BYTES_MAX,
        CHUNKED + b"-1\r\n",
        CHUNKED + b"0x2\r\nhi\r\n",
        CHUNKED + b"2\r\nhi!\r\n0\r\n\r\n",
        CHUNKED + b"%x\r\n" % (BODY_BYTES_MAX + 1),
        CHUNKED + b"1" * 10_000,
    ],
)
def test_what_is_not_clearly_an_answer_is_refused(data: bytes) -> None:
    with pytest.raises(UpstreamError):
        Parser("POST").feed(data)


def test_a_body_without_a_length_has_a_bound() -> None:
    parser = Parser("GET")
    parser.feed(b"HTTP/1.1 200 OK\r\n\r\n")
    parser.feed(b" " * BODY_BYTES_MAX)
    with pytest.raises(UpstreamError, match="more than"):
        parser.feed(b" ")


@given(st.lists(st.binary(max_size=40) | st.sampled_from([*ANSWERS, b"\r\n", b"HTTP/1.1 200 OK\r\n", CHUNKED]), max_size=8))
def test_hostile_bytes_are_an_error_and_nothing_else(pieces: list[bytes]) -> None:
    parser = Parser("GET")
    with contextlib.suppress(UpstreamError):
        for piece in pieces:
            parser.feed(piece)
        parser.end()


def test_a_request_says_how_long_it_is() -> None:
    get = Request("GET", "/_/health", (), b"").encode("10.0.0.1:8080")
    post = Request("POST", "/", (("A", "b"),), b"").encode("h")

    assert get == b"GET /_/health HTTP/1.1\r\nHost: 10.0.0.1:8080\r\nConnection: close\r\n\r\n"
    assert post == b"POST / HTTP/1.1\r\nHost: h\r\nA: b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def ask(seconds_max: float, *, answer: bytes | None, trip: bool = False) -> Answer:
    """Exchange with a server that sends `answer` and closes; with None it only listens."""

    async def story() -> Answer:
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            if trip:
                breaker.trip("it is gone")
            if answer is None:
                await ended.wait()
            else:
                writer.write(answer)
            writer.close()

        breaker = Breaker()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        try:
            return await exchange(host, port, Request("GET", "/", (), b""), breaker, seconds_max=seconds_max)
        finally:
            ended.set()
            server.close()
            assert not breaker._exchanges

    return play(story())


def test_an_exchange_is_one_request_and_its_answer() -> None:
    assert ask(5, answer=b"HTTP/1.1 200 OK\r\n\r\nhi").body == b"hi"


def test_an_exchange_has_a_deadline() -> None:
    with pytest.raises(UpstreamTimeout):
        ask(0.02, answer=None)


def test_an_exchange_ends_with_its_peer() -> None:
    with pytest.raises(UpstreamError, match="it is gone"):
        ask(5, answer=None, trip=True)


def test_nobody_listens() -> None:
    async def story() -> None:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        server.close()
        await exchange(host, port, Request("GET", "/", (), b""), Breaker(), seconds_max=5)

    with pytest.raises(UpstreamError, match="no connection"):
        play(story())
