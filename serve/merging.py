"""The sequences of one HTTP request: they run side by side, are written together, and end together when one fails."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from dynamo.serve.engine.request import Engine, GenerationRequest, OutputDelta
from dynamo.serve.errors import RequestFailedError

__all__ = ["Batch", "generate_all"]

Batch = list[tuple[int, OutputDelta]]
"""What some of a request's choices gained, in the order in which they gained it; the int is the choice's index."""


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
