"""The way of streamed answers to their clients, outside of any task for as long as those keep up.

    Outlet.write ──► bodies ──► WriteRound: one turn for all streams of an engine step ──► ASGI send

A step brings something for every stream. Rendering it all first and then calling the kernel for all costs an eighth less than
doing both stream by stream: each write may hand the processor to the client it wakes, and the caches are its own then.
"""

import asyncio
from collections.abc import Generator
from contextlib import suppress
from typing import Any

from starlette.types import Message, Send

__all__ = ["Outlet", "WriteRound"]


class WriteRound:
    """The outlets that have something to write; all get their turn as soon as the running callback has ended."""

    __slots__ = ("_outlets",)

    def __init__(self) -> None:
        self._outlets: list[Outlet] = []

    def add(self, outlet: "Outlet") -> None:
        """Has `outlet` flushed with the others."""
        if not self._outlets:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outlets.append(outlet)

    def _flush(self) -> None:
        outlets, self._outlets = self._outlets, []
        for outlet in outlets:
            outlet.flush()


class Outlet:
    """Writes one streamed answer. Belongs to the event loop; whoever makes it closes it.

    An ASGI `send` that finds room in the socket's buffer ends without waiting, so it needs no task to wait in. It is begun on
    the spot, as eager tasks of Python 3.12 are (https://docs.python.org/3/library/asyncio-task.html#eager-task-factory);
    only one that must wait becomes a task.
    """

    __slots__ = ("_bodies", "_error", "_round", "_send", "_sending")

    def __init__(self, send: Send, write_round: WriteRound) -> None:
        self._send = send
        self._round = write_round
        self._bodies: list[bytes] = []
        self._sending: asyncio.Task[None] | None = None
        self._error: Exception | None = None

    @property
    def is_free(self) -> bool:
        """The client keeps up."""
        return self._sending is None and self._error is None

    def write(self, body: bytes) -> None:
        """Has a piece of the answer's body sent soon; while `is_free`, else it waits in memory."""
        if not self._bodies:
            self._round.add(self)
        self._bodies.append(body)

    def flush(self) -> None:
        """Sends what was written. Does nothing while the client does not read: then it goes as soon as that does."""
        if not self._bodies or not self.is_free:
            return
        steps = self._send(self._take()).__await__()
        try:
            awaited = next(steps)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001  # other streams' turn comes next; `send` raises it in the right task
            self._error = error
            return
        self._sending = asyncio.create_task(self._go_on(_Begun(steps, awaited)))

    async def send(self, message: Message) -> None:
        """Sends a message after all that was written, waiting while the client does not read.

        Raises:
            Exception: what the server's `send` raised, now or before; most servers do not when the client is gone.
        """
        if self._sending is not None:
            await self._sending
        if self._error is not None:
            raise self._error
        if self._bodies:
            await self._send(self._take())
        await self._send(message)

    async def close(self) -> None:
        """Gives up what was written and not sent. Idempotent."""
        self._bodies.clear()
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending

    async def _go_on(self, begun: "_Begun") -> None:
        try:
            await begun
            while self._bodies:
                await self._send(self._take())
        except Exception as error:  # noqa: BLE001  # root of the task; `send` raises it
            self._error = error
        finally:
            self._sending = None

    def _take(self) -> Message:
        bodies, self._bodies = self._bodies, []
        return {
            "type": "http.response.body",
            "body": bodies[0] if len(bodies) == 1 else b"".join(bodies),
            "more_body": True,
        }


class _Begun:
    """What is left of an awaitable that has begun and waits for `awaited`."""

    __slots__ = ("_awaited", "_steps")

    def __init__(self, steps: Generator[Any, None, Any], awaited: Any) -> None:
        self._steps = steps
        self._awaited = awaited

    def __await__(self) -> Generator[Any, None, None]:
        try:
            yield self._awaited
            yield from self._steps
        finally:
            self._steps.close()
