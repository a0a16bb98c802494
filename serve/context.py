"""One HTTP request's life in the engine: its sequences run side by side, and end together when anything goes wrong."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive

from dynamo.serve.engine.request import Engine, GenerationRequest, OutputDelta
from dynamo.serve.errors import RequestFailedError

__all__ = ["Batch", "ClientDisconnectedError", "Interruption", "generate_all", "run_interruptible"]

T = TypeVar("T")
Batch = list[tuple[int, OutputDelta]]
"""What some of a request's choices gained, in the order in which they gained it; the int is the choice's index."""


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


async def run_interruptible(work: Coroutine[Any, Any, T], receive: Receive, interruption: Interruption) -> T:
    """Runs `work` to its end, unless the client leaves or the interruption triggers: then `work` is cancelled at once.

    `receive` must have delivered the whole body before.

    Raises:
        ClientDisconnectedError: the client left.
        Exception: what `work` raised, or what the interruption was triggered with.
    """
    worker = asyncio.create_task(work)
    watchers = (asyncio.create_task(_disconnect(receive)), asyncio.create_task(interruption.wait()))
    try:
        await asyncio.wait((worker, *watchers), return_when=asyncio.FIRST_COMPLETED)
        for task in (worker, *watchers):
            if task.done():
                # Finished work wins over a client that left in the same moment.
                return task.result()  # type: ignore[return-value]  # watchers never return
        raise AssertionError("asyncio.wait returned although nothing was done")
    finally:
        tasks = (worker, *watchers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnectedError("the client closed the connection")


async def generate_all(
    engine: Engine, requests: Sequence[GenerationRequest], on_batch: Callable[[Batch], Awaitable[None]]
) -> None:
    """Runs all `requests` and hands over what they gain, until each has its finish reason.

    While `on_batch` waits for a slow client, nothing more is taken from the engine.
    On any error, and when cancelled, all of them are aborted before this returns.

    Raises:
        EngineOverloadedError, EngineDeadError, RequestFailedError: the first error of any of them.
    """
    if len(requests) == 1:
        await _run_one(engine, requests[0], lambda deltas: on_batch([(0, delta) for delta in deltas]))
        return
    merger = _Merger()
    try:
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                group.create_task(_run_one(engine, request, merger.sink(index)))
            finished = 0
            while finished < len(requests):
                batch, release = await merger.next_batch()
                finished += sum(delta.finish_reason is not None for _, delta in batch)
                await on_batch(batch)
                release.set()
    except BaseExceptionGroup as group_error:
        raise _first(group_error) from None


async def _run_one(
    engine: Engine, request: GenerationRequest, sink: Callable[[list[OutputDelta]], Awaitable[None]]
) -> None:
    async with aclosing(engine.generate(request)) as gains:
        async for deltas in gains:
            await sink(deltas)
            if deltas[-1].finish_reason is not None:
                return
    raise RequestFailedError("the engine ended the sequence without saying why")


class _Merger:
    """Collects the deltas of several sequences, so that those of one engine step leave in one write."""

    def __init__(self) -> None:
        self._batch: Batch = []
        self._arrived = asyncio.Event()
        self._release = asyncio.Event()

    def sink(self, index: int) -> Callable[[list[OutputDelta]], Awaitable[None]]:
        async def put(deltas: list[OutputDelta]) -> None:
            self._batch += [(index, delta) for delta in deltas]
            self._arrived.set()
            if deltas[-1].finish_reason is None:
                await self._release.wait()

        return put

    async def next_batch(self) -> tuple[Batch, asyncio.Event]:
        """What has arrived, and the event to set once it is written: until then its sequences hold still."""
        await self._arrived.wait()
        self._arrived.clear()
        taken = self._batch, self._release
        self._batch, self._release = [], asyncio.Event()
        return taken


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
