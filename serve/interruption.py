"""Work for a client that may leave, on a server that may stop: either ends it at once."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

__all__ = ["ClientDisconnectedError", "Interruption", "run_interruptible"]

T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """The client closed the connection before its answer was complete; nobody is left to be told."""


class Interruption:
    """A switch that ends running requests from outside, such as when the server has no more time for them."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()
        self._error: Exception | None = None

    def trigger(self, error: Exception) -> None:
        """Makes every `run_interruptible` under this switch, now and later, raise `error`."""
        self._error = error
        for future in self._waiting:
            if not future.done():
                future.set_exception(error)

    async def wait(self) -> None:
        """Waits until triggered, and raises what was given."""
        if self._error is not None:
            raise self._error
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` to its end, unless this triggers before: then `work` is cancelled at once."""
        return await _first(work, self.wait())


async def run_interruptible(work: Coroutine[Any, Any, T], receive: Receive, interruption: Interruption) -> T:
    """Runs `work` to its end, unless the client leaves or the interruption triggers: then `work` is cancelled at once.

    `receive` must have delivered the whole body before.

    Raises:
        ClientDisconnectedError: the client left.
        Exception: what `work` raised, or what the interruption was triggered with.
    """
    return await _first(work, _disconnect(receive), interruption.wait())


async def _first(work: Coroutine[Any, Any, T], *watching: Coroutine[Any, Any, None]) -> T:
    """The result of `work`, unless one of the watchers, which never return, raises before."""
    tasks = (asyncio.create_task(work), *map(asyncio.create_task, watching))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                # Finished work wins over a client that left in the same moment.
                return task.result()  # type: ignore[return-value]  # watchers never return
        raise AssertionError("asyncio.wait returned although nothing was done")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnectedError("the client closed the connection")
