"""What a client sends beside bodies is bounded, in size and in time."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo.serve.http_server import serving

CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


async def count(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of headers and the length of the body."""
    num_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        num_bytes += len(message["body"])
        more = message["more_body"]
    answer = b"%d %d" % (len(scope["headers"]), num_bytes)
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@asynccontextmanager
async def connection(app: Any = count) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with serving(app, listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            try:
                yield reader, writer
            finally:
                writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
    return int(head.split()[1]), await reader.readexactly(length)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\nx-long: ", b"a" * 10_000),
        (b"GET / HTTP/1.1\r\nhost: x\r\n", b"x-many: a\r\n" * 1000),
        (CHUNKED + b"2\r\n{}\r\n0\r\nx-long: ", b"a" * 10_000),
        (CHUNKED + b"2\r\n{}\r\n0\r\n", b"x-many: a\r\n" * 1000),
        (CHUNKED + b"2;", b"a" * 10_000),
    ],
    ids=["a long header", "many headers", "a long trailer", "many trailers", "a long chunk extension"],
)
def test_headers_without_end_are_refused(run: Any, start: bytes, piece: bytes) -> None:
    async def work() -> None:
        async with connection() as (reader, writer):
            writer.write(start)
            for _ in range(30):
                writer.write(piece)
                await writer.drain()
            status, body = await answer(reader)
            assert (status, b"headers are longer than 65536 bytes" in body) == (431, True)
            assert await reader.read() == b""

    run(work())


@pytest.mark.parametrize(
    "head",
    [
        b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n" % (b"a" * 70_000),
        b"GET / HTTP/1.1\r\nhost: x\r\nx-long: %s\r\n\r\n" % (b"a" * 70_000),
        b"GET / HTTP/1.1\r\nhost: x\r\n%s\r\n" % (b"x-many: a\r\n" * 7000),
        CHUNKED + b"2\r\n{}\r\n0\r\n%s\r\n" % (b"x-many: a\r\n" * 7000),
    ],
    ids=["a long path", "a long header", "many headers", "many trailers"],
)
def test_a_long_head_is_refused_even_if_all_of_it_is_there_at_once(run: Any, head: bytes) -> None:
    async def work() -> None:
        async with connection() as (reader, writer):
            writer.write(head)  # uvloop reads up to 256 KB at a time
            status, body = await answer(reader)
            assert (status, b"headers are longer than 65536 bytes" in body) == (431, True)
            assert await reader.read() == b""

    run(work())


def test_what_has_an_end_is_taken_whatever_pieces_it_comes_in(run: Any) -> None:
    many = b"".join(b"x-%d: a\r\n" % number for number in range(2000))

    async def work() -> None:
        async with connection() as (reader, writer):
            for _ in range(3):
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n" + many + b"\r\n")
                assert await answer(reader) == (200, b"2001 0")
            writer.write(CHUNKED + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
            assert await answer(reader) == (200, b"2 100000")
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n" + bytes(3_000_000))
            assert await answer(reader) == (200, b"2 3000000")
            for byte in b"GET / HTTP/1.1\r\nhost: x\r\n\r\n":
                writer.write(bytes([byte]))
                await writer.drain()
            assert await answer(reader) == (200, b"1 0")

    run(work())


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET /", b"GET / HTTP/1.1\r\nx-"])
def test_a_head_that_does_not_come_ends_the_connection(run: Any, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr("dynamo.serve.http_protocol._HEAD_TIMEOUT_S", 0.2)

    async def work() -> None:
        async with connection() as (reader, writer):
            writer.write(start)
            if b"\r\n\r\n" in start:
                assert await answer(reader) == (200, b"1 0")
            assert await reader.read() == b""

    run(work())


def test_an_answer_is_not_cut_off_because_the_next_head_does_not_come(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.serve.http_protocol._HEAD_TIMEOUT_S", 0.1)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
        await asyncio.sleep(0.35)
        await send({"type": "http.response.body", "body": b"answer"})

    async def work() -> None:
        async with connection(slow) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET /")
            assert await answer(reader) == (200, b"answer")
            assert await reader.read() == b""

    run(work())


def test_a_client_that_takes_long_for_a_large_answer_gets_all_of_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo.serve.http_protocol._UNREAD_TIMEOUT_S", 0.3)
    large = 60_000_000  # many times what the kernel takes for a client that does not read

    async def once(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % large)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(large)})

    async def work() -> None:
        async with connection(once) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(10):
                await asyncio.sleep(0.1)
                await reader.readexactly(large // 10)

    run(work())


def test_a_client_that_reads_nothing_counts_as_gone_and_a_slow_one_does_not(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.serve.http_protocol._UNREAD_TIMEOUT_S", 0.3)
    gone = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        leaving = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not leaving.done():
            await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
            await asyncio.sleep(0)
        gone.set()

    async def work() -> None:
        async with connection(endless) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            for _ in range(6):
                await asyncio.sleep(0.1)
                await reader.readexactly(4_000_000)
            assert not gone.is_set()
            await gone.wait()

    run(work())
