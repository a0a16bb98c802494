"""The load generator, against a server that sends exactly what a test says."""

import asyncio
import json
from collections.abc import Callable, Sequence

import pytest

from dynamo.perf.harness import BenchmarkError
from dynamo.perf.sse_client import Load, StreamRecord, run_load

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"

Script = Callable[[int], Sequence[bytes]]
"""Pieces to send for the n-th request of a server; the connection stays open unless the last piece is empty."""


def chunked(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


def load(port: int, num_streams: int = 1, num_requests: int = 1, api_key: str | None = None) -> Load:
    return Load(
        url=f"http://127.0.0.1:{port}",
        model="m",
        num_streams=num_streams,
        num_requests=num_requests,
        num_tokens=3,
        api_key=api_key,
        timeout_s=20.0,
    )


def run(script: Script, num_streams: int = 1, num_requests: int = 1) -> tuple[list[StreamRecord], list[bytes]]:
    """Runs a load against `script`; returns the records and the requests' heads and bodies as the server saw them."""
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                seen.append(head + await reader.readexactly(length))
                for piece in script(len(seen) - 1):
                    if not piece:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has all it wanted
        finally:
            writer.close()

    async def both() -> list[StreamRecord]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            return await run_load(load(server.sockets[0].getsockname()[1], num_streams, num_requests))

    return asyncio.run(both()), seen


def test_a_stream_is_counted_by_its_events_and_the_servers_usage() -> None:
    (record,), _ = run(lambda _: [HEAD, chunked(ROLE, TEXT, TEXT, USAGE, DONE)])
    assert record.num_events == 2
    assert record.num_tokens == 3
    assert record.ttft_s > 0


def test_events_that_arrive_together_are_one_arrival() -> None:
    (record,), _ = run(lambda _: [HEAD + chunked(ROLE, TEXT, TEXT, TEXT, USAGE, DONE)])
    assert record.num_events == 3
    assert record.gaps_s == []


def test_events_may_be_cut_anywhere() -> None:
    response = HEAD + chunked(ROLE + TEXT[:20], TEXT[20:] + TEXT, USAGE, DONE)
    (record,), _ = run(lambda _: [response[i : i + 7] for i in range(0, len(response), 7)])
    assert record.num_events == 2
    assert record.num_tokens == 3


def test_streams_send_their_requests_one_after_the_other_on_one_connection() -> None:
    records, seen = run(lambda _: [HEAD, chunked(TEXT, USAGE, DONE)], num_streams=3, num_requests=4)
    assert len(records) == len(seen) == 12
    assert {record.num_events for record in records} == {1}
    prompts = {json.loads(request.partition(b"\r\n\r\n")[2])["messages"][0]["content"] for request in seen}
    assert len(prompts) == 12, "no prompt may profit from another's cached prefix"


def test_requests_ask_for_exactly_the_tokens_wanted_and_for_usage() -> None:
    _, (request,) = run(lambda _: [HEAD, chunked(TEXT, USAGE, DONE)])
    body = json.loads(request.partition(b"\r\n\r\n")[2])
    assert body["max_tokens"] == 3
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b'HTTP/1.1 429 Busy\r\ncontent-length: 13\r\n\r\n{"error":"no"}'[:-1]], "answered 429"),
        ([HEAD, chunked(TEXT, b'data: {"error":{"message":"engine died"}}\n\n')], "engine died"),
        ([HEAD, b"5\r\nhello\r\n", b""], "closed the connection during a response"),
        ([b"SSH-2.0-hello\r\n\r\n"], "no HTTP"),
    ],
    ids=["refused", "error event", "broken off", "not HTTP"],
)
def test_what_goes_wrong_ends_the_load(pieces: list[bytes], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        run(lambda _: pieces)


def test_a_server_that_is_not_there_is_named() -> None:
    async def closed_port() -> int:
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
            return int(server.sockets[0].getsockname()[1])

    port = asyncio.run(closed_port())
    with pytest.raises(BenchmarkError, match=f"no connection to http://127.0.0.1:{port}"):
        asyncio.run(run_load(load(port)))
