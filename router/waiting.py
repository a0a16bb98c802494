"""Where requests wait while all workers are busy."""

import asyncio
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dynamo.router.booking import Booking
from dynamo.router.decision import Decision, RouteQuery
from dynamo.router.errors import AllBusyError, RouteError, WaitedTooLongError, WaitingRoomFullError
from dynamo.router.router import Router

__all__ = ["WaitingRoom", "WaitingStats"]

_TICK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingStats:
    """Counts since the start, and who waits now.

    Attributes:
        outcomes: requests by what became of them: "at-once" (did not wait), "waited" (and got a worker), "full" (refused at the
            door), "displaced" (by one of a higher priority), "too-long", "cancelled", "no-worker" (those that could have taken
            it left).
        waited_s: of all that entered and are gone, together.
        num_waiting: by priority.
    """

    outcomes: Mapping[str, int]
    waited_s: float
    num_waiting: Mapping[int, int]


class _Waiter:
    __slots__ = ("entered_s", "future", "has_wishes", "priority", "query", "rank")

    def __init__(
        self,
        query: RouteQuery,
        priority: int,
        serial: int,
        entered_s: float,
        future: asyncio.Future[tuple[Decision, Booking]],
    ) -> None:
        self.query = query
        self.priority = priority
        self.rank = (-priority, serial)
        self.entered_s = entered_s
        self.future = future
        self.has_wishes = query.pin is not None or query.allowed is not None or bool(query.exclude)


class WaitingRoom:
    """A bounded queue before a Router. Belongs to one event loop.

    Higher priorities go first, and within one priority those who came first. A request that only some workers may take does
    not hold up those behind it. Woken by the router when something may have changed, and twice a second while somebody waits.
    """

    def __init__(self, router: Router, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._router = router
        self._clock = clock
        self._max_waiting = router.config.max_waiting
        self._timeout_s = router.config.waiting_timeout_s
        self._waiters: list[_Waiter] = []  # by rank
        self._num_entered = 0
        self._outcomes: Counter[str] = Counter()
        self._waited_s = 0.0
        self._serving: asyncio.Handle | None = None
        self._ticking: asyncio.TimerHandle | None = None
        router.when_room(self._wake)

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiters)

    async def route(
        self, query: RouteQuery, *, priority: int = 0, timeout_s: float | None = None
    ) -> tuple[Decision, Booking]:
        """As `Router.route`, but waits while all workers that may take the request are busy.

        Cancelling it leaves nothing booked.

        Args:
            priority: higher goes first.
            timeout_s: longest wait; the config's where there is none.

        Raises:
            WaitingRoomFullError: as many wait as may; at once, or while waiting if a more important request came.
            WaitedTooLongError: the time is up.
            RouteError: no worker may take the request, busy or not.
        """
        if not self._waiters:
            try:
                routed = self._router.route(query)
            except AllBusyError:
                pass
            else:
                self._outcomes["at-once"] += 1
                return routed
        waiter = self._enter(query, priority)
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(self._timeout_s if timeout_s is None else timeout_s, self._expire, waiter)
        try:
            self._serve()
            return await waiter.future
        except asyncio.CancelledError:
            self._give_back(waiter)
            raise
        finally:
            expiry.cancel()
            self._remove(waiter)

    def stats(self) -> WaitingStats:
        """Counts since the start, and who waits now."""
        return WaitingStats(
            outcomes=dict(self._outcomes),
            waited_s=self._waited_s,
            num_waiting=dict(Counter(waiter.priority for waiter in self._waiters)),
        )

    def _enter(self, query: RouteQuery, priority: int) -> _Waiter:
        if len(self._waiters) >= self._max_waiting:
            last = self._waiters[-1] if self._waiters else None
            if last is None or last.priority >= priority:
                self._outcomes["full"] += 1
                raise WaitingRoomFullError(
                    f"all workers are busy and {len(self._waiters)} requests wait, as many as may: try again later"
                )
            self._refuse(
                last,
                "displaced",
                WaitingRoomFullError("the request gave its place in the waiting room to a more important one"),
            )
        self._num_entered += 1
        future: asyncio.Future[tuple[Decision, Booking]] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(query, priority, self._num_entered, self._clock(), future)
        insort(self._waiters, waiter, key=_rank)
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        return waiter

    def _remove(self, waiter: _Waiter) -> None:
        """Takes a waiter out if it still is in; the last one switches off the light."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            self._waited_s += self._clock() - waiter.entered_s
        if not self._waiters:
            if self._ticking is not None:
                self._ticking.cancel()
                self._ticking = None
            if self._serving is not None:
                self._serving.cancel()
                self._serving = None

    def _refuse(self, waiter: _Waiter, outcome: str, error: Exception) -> None:
        self._outcomes[outcome] += 1
        waiter.future.set_exception(error)
        self._remove(waiter)

    def _expire(self, waiter: _Waiter) -> None:
        if not waiter.future.done():
            waited_s = self._clock() - waiter.entered_s
            self._refuse(
                waiter,
                "too-long",
                WaitedTooLongError(f"all workers were busy for {waited_s:.1f} s: try again later", waited_s),
            )

    def _give_back(self, waiter: _Waiter) -> None:
        """The waiter was cancelled: at the same moment it may have got what it waited for, or been refused."""
        future = waiter.future
        if future.cancelled() or not future.done():
            self._outcomes["cancelled"] += 1
        elif future.exception() is None:
            self._outcomes["waited"] -= 1
            self._outcomes["cancelled"] += 1
            future.result()[1].free()

    def _wake(self) -> None:
        if self._waiters and self._serving is None:
            self._serving = asyncio.get_running_loop().call_soon(self._serve)

    def _tick(self) -> None:
        self._ticking = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        self._router.tick()

    def _serve(self) -> None:
        """Gives workers to those that wait, in order, as far as there is room."""
        if self._serving is not None:
            self._serving.cancel()
            self._serving = None
        is_full = False  # for requests without wishes: if one finds no room, none does
        for waiter in list(self._waiters):
            if waiter.future.done() or (is_full and not waiter.has_wishes):
                continue
            try:
                routed = self._router.route(waiter.query) if self._router.has_room(waiter.query) else None
            except AllBusyError:
                routed = None
            except RouteError as error:
                self._refuse(waiter, "no-worker", error)
                continue
            if routed is None:
                is_full = is_full or not waiter.has_wishes
                continue
            self._outcomes["waited"] += 1
            waiter.future.set_result(routed)
            self._remove(waiter)


def _rank(waiter: _Waiter) -> tuple[int, int]:
    return waiter.rank
