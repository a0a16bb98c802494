"""A load of streaming chat completions: raw asyncio protocols, since a comfortable client would cost more than the server.

Each stream is one kept-alive connection that sends its requests one after the other.
"""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from dynamo.perf.harness import BenchmarkError

__all__ = ["Load", "StreamRecord", "run_load"]

_TEXT = re.compile(rb'"content":"(?!")')  # an event with text; the one that only gives the role has none
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send.

    Attributes:
        url: of the server, without path.
        num_streams: requests in flight at any time.
        num_requests: of each stream.
        num_tokens: asked of each request; `ignore_eos` makes it exact.
        timeout_s: for the whole load.
    """

    url: str
    model: str
    num_streams: int
    num_requests: int
    num_tokens: int
    api_key: str | None
    timeout_s: float


@dataclass(slots=True)
class StreamRecord:
    """What one request's stream brought.

    Attributes:
        ttft_s: from sending the request to its first text.
        gaps_s: between successive arrivals of text. Events that arrive together are one arrival.
        num_events: events with text.
        num_tokens: completion tokens by the server's own usage.
    """

    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_events: int = 0
    num_tokens: int = 0


class _Connection(asyncio.Protocol):
    """One kept-alive connection. `parser` calls the `on_` methods below."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[StreamRecord] | None = None
        self._record = StreamRecord()
        self._rest = b""
        self._sent = 0.0
        self._last_arrival: float | None = None

    def request(self, head_and_body: bytes) -> "asyncio.Future[StreamRecord]":
        """Sends one request; the future ends with its record once the response is complete."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._record = StreamRecord()
        self._rest = b""
        self._last_arrival = None
        self._sent = time.perf_counter()
        self._transport.write(head_and_body)
        return self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's inherits from none of asyncio's classes

    def data_received(self, data: bytes) -> None:
        before = self._record.num_events
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the server's response is no HTTP: {error}")
        else:
            if self._record.num_events > before:
                self._note_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the server closed the connection during a response ({exc})")

    def on_message_begin(self) -> None:
        # A kept-alive connection needs a fresh parser only after an error, and errors end the load.
        self._rest = b""

    def on_body(self, body: bytes) -> None:
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if _TEXT.search(event):
                self._record.num_events += 1
            elif usage := _USAGE.search(event):
                self._record.num_tokens = int(usage[1])
            elif b'"error"' in event:
                self._fail(f"the stream ended with an error: {event.decode(errors='replace')[:300]}")

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._fail(f"the server answered {status}: {self._rest.decode(errors='replace')[:300]}")
        elif self._answer is not None and not self._answer.done():
            if self._record.num_events and self._last_arrival is None:
                self._note_arrival()  # text and end came in one piece
            self._answer.set_result(self._record)

    def close(self) -> None:
        self._answer = None
        if self._transport is not None:
            self._transport.close()

    def _note_arrival(self) -> None:
        now = time.perf_counter()
        if self._last_arrival is None:
            self._record.ttft_s = now - self._sent
        elif self._answer is not None and not self._answer.done():
            self._record.gaps_s.append(now - self._last_arrival)
        self._last_arrival = now

    def _fail(self, message: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BenchmarkError(message))


async def run_load(load: Load) -> list[StreamRecord]:
    """Opens all connections, then runs all streams at once.

    Raises:
        BenchmarkError: the server refuses, breaks off or takes longer than `timeout_s`.
    """
    address = urlsplit(load.url)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_report_unless_interrupted)
    connections: list[_Connection] = []
    try:
        async with asyncio.timeout(load.timeout_s):
            for _ in range(load.num_streams):
                _, connection = await loop.create_connection(_Connection, address.hostname or "", address.port or 80)
                connections.append(connection)
            streams = (_run_stream(connection, index, load) for index, connection in enumerate(connections))
            records: Sequence[list[StreamRecord]] = await asyncio.gather(*streams)
    except TimeoutError:
        raise BenchmarkError(f"the load did not end in {load.timeout_s:.0f} s") from None
    except OSError as error:
        raise BenchmarkError(f"no connection to {load.url}: {error}") from error
    finally:
        for connection in connections:
            connection.close()
    return [record for stream in records for record in stream]


def _report_unless_interrupted(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # An interrupt ends the run, and is no fault of the transport.
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


async def _run_stream(connection: _Connection, index: int, load: Load) -> list[StreamRecord]:
    records = []
    for number in range(load.num_requests):
        # Every prompt differs in its first token, so that none profits from another's cached prefix.
        body = {
            "model": load.model,
            "messages": [{"role": "user", "content": f"{index}.{number}: say something about key-value caches"}],
            "max_tokens": load.num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        records.append(await connection.request(_render(load, json.dumps(body).encode())))
    return records


def _render(load: Load, body: bytes) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"host: {urlsplit(load.url).netloc}",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    if load.api_key is not None:
        lines.append(f"authorization: Bearer {load.api_key}")
    return "\r\n".join((*lines, "", "")).encode() + body
