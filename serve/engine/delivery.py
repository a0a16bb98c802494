"""How deltas get from the engine's thread to the consumers on their event loop."""

import asyncio
import threading

from dynamo.serve.engine.request import DeltaSink, OutputDelta
from dynamo.serve.errors import ServeError

__all__ = ["MAX_QUEUED_DELTAS", "MAX_STEPS_AHEAD", "Outbox", "OutputStream"]

# The engine's thread waits once the event loop has not looked at this many steps. A slow consumer never holds it up, as
# deltas queue in its stream; this bounds how far the thread runs ahead of the loop itself, and gives the loop its turn
# of the interpreter lock when steps take no time at all.
MAX_STEPS_AHEAD = 4
_LOOP_STALL_S = 1.0
MAX_QUEUED_DELTAS = 256  # bounds the memory that a client which does not read can take


class OutputStream:
    """Deltas of one request until the consumer takes them. Used on the event loop.

    Args:
        hold_s: see `GenerationRequest`.
        sink: see `DeltaSink`. Waking the consumer's task costs several times as much as calling it.
    """

    __slots__ = ("_deltas", "_error", "_hold_s", "_holding", "_is_over", "_loop", "_sink", "_taken_at_s", "_waiter")

    def __init__(self, hold_s: float = 0.0, sink: DeltaSink | None = None) -> None:
        self._deltas: list[OutputDelta] = []
        self._error: ServeError | None = None
        self._hold_s = hold_s
        self._holding: asyncio.TimerHandle | None = None
        self._is_over = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sink = sink
        self._taken_at_s: float | None = None
        self._waiter: asyncio.Future[None] | None = None

    def feed(self, delta: OutputDelta) -> None:
        """Queues a delta; merges it into the last one where `MAX_QUEUED_DELTAS` are queued already."""
        deltas = self._deltas
        if delta.finish_reason is not None:
            self._is_over = True
        if len(deltas) < MAX_QUEUED_DELTAS:
            deltas.append(delta)
        else:
            last = deltas[-1]
            last.text += delta.text
            last.token_ids += delta.token_ids
            if delta.logprobs is not None:
                last.logprobs = (last.logprobs or []) + delta.logprobs
            last.finish_reason = delta.finish_reason
            last.stop_reason = delta.stop_reason
        if self._waiter is None:
            return
        if self._is_over:
            self._wake()
        elif self._holding is None:
            is_first = self._taken_at_s is None
            if not self._must_hold():
                self._hand_over(is_first)

    def fail(self, error: ServeError) -> None:
        """Makes `next` raise `error` once all deltas are taken."""
        self._error = error
        self._is_over = True
        self._wake()

    async def next(self) -> list[OutputDelta]:
        """Waits for deltas, as long as the engine lives: it ends every stream it has, also when it dies.

        Raises:
            ServeError: the request failed.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        if not self._deltas or self._must_hold():
            if self._deltas or self._error is None:
                await self._wait(self._loop)
            if not self._deltas and self._error is not None:
                raise self._error
        deltas, self._deltas = self._deltas, []
        return deltas

    def _must_hold(self) -> bool:
        """Whether too little time has passed since deltas were taken last; then a timer hands them over."""
        if self._is_over:
            return False
        assert self._loop is not None, "only a consumer in `next` is handed anything"
        now_s, taken_at_s = self._loop.time(), self._taken_at_s
        if taken_at_s is None or now_s - taken_at_s >= self._hold_s:
            self._taken_at_s = now_s
            return False
        self._taken_at_s = taken_at_s + self._hold_s
        self._holding = self._loop.call_at(self._taken_at_s, self._release)
        return True

    def _release(self) -> None:
        self._holding = None
        self._hand_over(is_first=False)

    def _hand_over(self, is_first: bool) -> None:
        waiter, sink = self._waiter, self._sink
        # A waiter that is done belongs to a consumer that was cancelled.
        if not is_first and sink is not None and waiter is not None and not waiter.done() and sink(self._deltas):
            self._deltas = []
        else:
            self._wake()

    async def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._holding is not None:
                self._holding.cancel()
                self._holding = None

    def _wake(self) -> None:
        # From here on it is the consumer's turn, until it waits again.
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Outbox:
    """What the engine's thread has for the streams of the event loop: one hand-over per step.

    `put` and `flush` belong to the engine's thread, and come after `attach`.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._items: list[tuple[OutputStream, OutputDelta | ServeError]] = []
        self._num_sent = 0  # written by the engine's thread
        self._num_seen = 0  # written by the loop
        self._caught_up = threading.Event()
        self._caught_up.set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Where the streams are used; None before `attach`."""
        return self._loop

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Says which event loop that is. Before the engine's thread starts."""
        self._loop = loop

    def put(self, stream: OutputStream, item: OutputDelta | ServeError) -> None:
        self._items.append((stream, item))

    def flush(self) -> bool:
        """Hands everything over, waiting while the loop is too far behind. False if the loop is closed."""
        if not self._items:
            return True
        assert self._loop is not None, "nothing can be handed over before attach()"
        items, self._items = self._items, []
        try:
            self._loop.call_soon_threadsafe(self._deliver, items)
        except RuntimeError:  # the loop is closed, and with it everybody who could listen
            return False
        self._num_sent += 1
        if self._num_sent - self._num_seen >= MAX_STEPS_AHEAD:
            self._caught_up.clear()
            # The loop may have caught up between the comparison and the clear; then nobody would set the event.
            if self._num_sent - self._num_seen >= MAX_STEPS_AHEAD:
                self._caught_up.wait(_LOOP_STALL_S)
        return True

    def _deliver(self, items: list[tuple[OutputStream, OutputDelta | ServeError]]) -> None:
        self._num_seen += 1
        if not self._caught_up.is_set():
            self._caught_up.set()
        for stream, item in items:
            if isinstance(item, OutputDelta):
                stream.feed(item)
            else:
                stream.fail(item)
