"""HTTP/1.1 as uvicorn speaks it, with limits where it has none: on what comes beside bodies, and on waiting for a client.

A body is handed on piece by piece, and read no faster than it is taken. All else that a client sends, such as headers,
trailers and what may stand beside a chunk's size, is kept in memory until it is complete.
"""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dynamo.serve.envelope import envelope
from dynamo.serve.errors import RequestError

__all__ = ["BoundedProtocol"]

_MAX_HEAD_BYTES: Final = 64 << 10
_HEAD_TIMEOUT_S: Final = 60.0
_UNREAD_TIMEOUT_S: Final = 300.0  # people stop clients in debuggers
_LINGER_S: Final = 1.0
_BYTES_BESIDE_HEADER: Final = 4  # a colon, a space, and the line's end
_SPARE_PER_BODY_BYTE: Final = 16  # a chunk of one byte comes with five others
_REFUSAL_BODY: Final = envelope(
    RequestError(f"the request's headers are longer than {_MAX_HEAD_BYTES} bytes", code="headers_too_large")
)
_REFUSAL: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_REFUSAL_BODY), _REFUSAL_BODY)
)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A head of more than 64 KiB is answered with 431, one that takes a minute not at all.

    A client that reads nothing for five minutes, while much is there for it, counts as gone: what its requests hold is needed.

    What has come is counted twice: bytes as they are read, since the parser keeps what has no end, and names and values as it
    hands them on, since a whole head may come in one read.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._num_spare = _MAX_HEAD_BYTES  # bytes that may still come beside bodies
        self._num_parsed = 0  # bytes of this head, or these trailers
        self._num_unread = 0  # bytes that waited for the client at the last look
        self._head_due: asyncio.TimerHandle | None = None
        self._read_due: asyncio.TimerHandle | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._read_due is not None:
            self._read_due.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        if self._read_due is not None:
            self._read_due.cancel()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._num_spare -= len(data)
        super().data_received(data)
        if self._num_spare < 0 and not self.transport.is_closing():
            self._refuse()

    def send_400_response(self, msg: str) -> None:
        """Answers what the parser has given up, be it no HTTP or a head that is too long."""
        if self._num_parsed > _MAX_HEAD_BYTES:
            self._refuse()
        else:
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_spare = _MAX_HEAD_BYTES
        self._num_parsed = 0
        self._await_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + _BYTES_BESIDE_HEADER)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_spare = _MAX_HEAD_BYTES
        self._num_parsed = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_spare = min(_MAX_HEAD_BYTES, self._num_spare + _SPARE_PER_BODY_BYTE * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_spare = _MAX_HEAD_BYTES
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Says nothing: the request is answered as HTTP, and there is no library to install that would change it."""

    def _count(self, num_bytes: int) -> None:
        """Raises an error, for the parser to end with, when the head is too long."""
        self._num_parsed += num_bytes
        if self._num_parsed > _MAX_HEAD_BYTES:
            raise ValueError(f"a head of more than {_MAX_HEAD_BYTES} bytes")

    def _await_reader(self) -> None:
        self._num_unread = self.transport.get_write_buffer_size()
        self._read_due = self.loop.call_later(_UNREAD_TIMEOUT_S, self._look_at_reader)

    def _look_at_reader(self) -> None:
        if self.transport.get_write_buffer_size() < self._num_unread:  # slow, but it reads
            self._await_reader()
        else:
            self.transport.abort()

    def _await_head(self) -> None:
        if self._head_due is None:
            self._head_due = self.loop.call_later(_HEAD_TIMEOUT_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _give_up(self) -> None:
        self._head_due = None
        if self._is_answering():  # the client has sent the beginning of its next request ahead
            self._await_head()
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self) -> None:
        """Answers, unless an answer is under way, and closes once the client has had time to read it."""
        self._stop_waiting()
        self._is_refused = True
        is_unanswered = True
        if self._is_answering():
            is_unanswered = not (self.cycle.response_started or self.pipeline)
            self.cycle.disconnected = True  # the application is to say nothing more
            self.cycle.message_event.set()
        if is_unanswered:
            self.transport.write(_REFUSAL)
        self.loop.call_later(_LINGER_S, self.transport.close)
