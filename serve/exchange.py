"""One HTTP request and its answer: identity, body, status. Raw ASGI, so that a streamed chunk passes no wrapper."""

import asyncio
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from dynamo.serve.errors import RequestError
from dynamo.serve.interruption import ClientDisconnectedError

__all__ = ["Exchange", "read_json_body", "send_body"]

_CLIENT_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_BODY_TIMEOUT_S = 60.0
_LINGER_BYTES = 64 << 20
_LINGER_S = 4.0  # less than a server that stops leaves its connections
_LINGER_QUIET_S = 1.0

RawHeaders = Iterable[tuple[bytes, bytes]]


class Exchange:
    """One request from its arrival to the end of its answer.

    Attributes:
        request_id: the client's own x-request-id where it is a sane one, else ours; every answer carries it.
        started_s: `time.perf_counter()` at arrival.
        endpoint: the route's path, for metrics; "other" until a route is found.
        status: what was answered; None before.
        stream_error: code of an error told inside a stream whose status was 200.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._is_body_over = False
        self.headers = Headers(scope=scope)
        wanted = self.headers.get("x-request-id", "")
        self.request_id = wanted if _CLIENT_REQUEST_ID.fullmatch(wanted) else f"req_{uuid.uuid4().hex}"
        self.started_s = time.perf_counter()
        self.endpoint = "other"
        self.status: int | None = None
        self.stream_error: str | None = None

    @property
    def response_started(self) -> bool:
        return self.status is not None

    async def start(self, send: Send, status: int, headers: RawHeaders) -> None:
        """Sends status and headers."""
        self.status = status
        all_headers = [*headers, (b"x-request-id", self.request_id.encode())]
        await send({"type": "http.response.start", "status": status, "headers": all_headers})

    async def receive(self) -> Message:
        """What the server hands over next of the request, in place of its own `receive`."""
        message = await self._receive()
        self._is_body_over = not message.get("more_body", False)
        return message

    async def hang_up(self, send: Send) -> None:
        """Ends an answer after which the connection closes, once the client has had time to read it.

        Many clients read nothing before they have sent all of their body. Closing while that is on its way resets the
        connection, and the client may find nothing but that; so a part of it is received and dropped, for a short time, as
        nginx does (https://nginx.org/en/docs/http/ngx_http_core_module.html#lingering_close).
        """
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not self._is_body_over and num_bytes < _LINGER_BYTES:
                    async with asyncio.timeout(_LINGER_QUIET_S):
                        num_bytes += len((await self.receive()).get("body", b""))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_body(
    send: Send,
    exchange: Exchange,
    status: int,
    body: bytes,
    headers: RawHeaders = (),
    content_type: bytes = b"application/json",
    *,
    hangs_up: bool = False,
) -> None:
    """Sends a whole answer.

    Args:
        hangs_up: the connection closes after it; the caller ends it with `Exchange.hang_up`.
    """
    fixed = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    if hangs_up:
        fixed.append((b"connection", b"close"))
    await exchange.start(send, status, (*fixed, *headers))
    await send({"type": "http.response.body", "body": body, "more_body": hangs_up})


async def read_json_body(exchange: Exchange, receive: Receive, max_bytes: int) -> bytes:
    """The request's body, not yet parsed.

    Raises:
        RequestError: 415 not JSON; 413 longer than `max_bytes`; 408 it does not arrive within a minute.
        ClientDisconnectedError: the client left in the middle.
    """
    _check_content_type(exchange.headers)
    announced = exchange.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    more = True
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnectedError("the client left before its body was complete")
                parts.append(message.get("body", b""))
                num_bytes += len(parts[-1])
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                more = message.get("more_body", False)
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive within {_BODY_TIMEOUT_S:g} s", status=408, code="request_timeout"
        ) from None
    return b"".join(parts)


def _check_content_type(headers: Headers) -> None:
    content_type = headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            f"content-type {content_type!r} is not accepted; send application/json",
            status=415,
            code="unsupported_media_type",
        )
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise RequestError(
            f"content-encoding {encoding!r} is not accepted; send the body uncompressed",
            status=415,
            code="unsupported_media_type",
        )


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the body is larger than the {max_bytes} bytes accepted", status=413, code="request_too_large")
