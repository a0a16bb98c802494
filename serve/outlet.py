"""An ASGI `send` that is called where the data arrives, outside of any task, for as long as the client keeps up."""

import asyncio
from collections.abc import Generator
from contextlib import suppress
from typing import Any

from starlette.types import Message, Send

__all__ = ["Outlet"]


class Outlet:
    """Sends one answer's messages in order. Belongs to the event loop it is made on; whoever makes it closes it.

    A `send` that finds room in the socket's buffer ends without waiting for anything, so it needs no task to wait in: it is
    begun on the spot, as eager tasks of Python 3.12 are (https://docs.python.org/3/library/asyncio-task.html#eager-task-factory).
    Only one that must wait becomes a task.
    """

    __slots__ = ("_send", "_sending")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._sending: asyncio.Task[None] | None = None

    @property
    def is_free(self) -> bool:
        """Nothing waits for the client to read."""
        return self._sending is None or (self._sending.done() and not self._sending.cancelled() and self._sent())

    def begin(self, message: Message) -> None:
        """Sends a message while `is_free`; what cannot go at once goes as soon as the client reads.

        Raises:
            OSError: the client is gone, if the server tells.
        """
        steps = self._send(message).__await__()
        try:
            awaited = next(steps)
        except StopIteration:
            return
        self._sending = asyncio.create_task(_finish(steps, awaited))

    async def send(self, message: Message) -> None:
        """Sends a message after all that were begun, waiting while the client does not read.

        Raises:
            OSError: the client is gone, if the server tells.
        """
        if self._sending is not None:
            await self._sending
            self._sending = None
        await self._send(message)

    async def close(self) -> None:
        """Gives up what waits for the client to read. Idempotent."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await sending

    def _sent(self) -> bool:
        assert self._sending is not None
        if self._sending.exception() is not None:
            return False  # `send` raises it
        self._sending = None
        return True


class _Begun:
    """What is left of an awaitable that has begun and waits for `awaited`."""

    def __init__(self, steps: Generator[Any, None, Any], awaited: Any) -> None:
        self._steps = steps
        self._awaited = awaited

    def __await__(self) -> Generator[Any, None, None]:
        try:
            yield self._awaited
            yield from self._steps
        finally:
            self._steps.close()


async def _finish(steps: Generator[Any, None, Any], awaited: Any) -> None:
    await _Begun(steps, awaited)
