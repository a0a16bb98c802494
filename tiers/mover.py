"""Runs the parts of transfers on its own threads, a few parts of each transfer at a time.

A transfer is many independent parts (runs of blocks). Each transfer has at most `PARTS_AT_ONCE` parts of a lane running or
queued, and queues the next one behind the parts of all other transfers: a short transfer never waits for the whole of a
long one.
"""

import heapq
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynamo.tiers.tier import Outcomes, SlotIds

__all__ = ["PARTS_AT_ONCE", "Mover", "Part", "Transfer"]

logger = logging.getLogger(__name__)

PARTS_AT_ONCE = 2  # one part reads while the other copies

Part = Callable[[], None]
"""Moves some of a transfer's blocks."""


class Transfer:
    """Blocks on their way into slots that somebody waits for: per-block outcome, deadline, and a safe end.

    After `expire`, no part can write to the destination any more, so the owner may reuse the slots although I/O that
    was already submitted is still under way towards staging memory. Thread-safe.
    """

    def __init__(self, num_blocks: int, timeout_s: float) -> None:
        self.num_blocks = num_blocks
        self.deadline = time.monotonic() + timeout_s
        self._lock = threading.Lock()
        self._arrived: Outcomes = np.zeros(num_blocks, dtype=np.bool_)
        self._num_leading = 0
        self._closed = False
        self._expired = False
        self._ended = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._progress_callback: Callable[[int], None] | None = None

    @property
    def is_ended(self) -> bool:
        """True once all parts ran, or the transfer expired."""
        return self._ended.is_set()

    @property
    def is_due(self) -> bool:
        """True once `wait` would return at once: the transfer has ended, or its deadline has passed."""
        return self._ended.is_set() or time.monotonic() >= self.deadline

    @property
    def is_expired(self) -> bool:
        """True if the transfer was ended before all its parts had run."""
        return self._expired

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, not below 0."""
        return max(0.0, self.deadline - time.monotonic())

    def deliver(self, positions: SlotIds, write: Callable[[], Outcomes]) -> bool:
        """Runs `write`, the last hop of the blocks at `positions`, unless the transfer has ended. Returns whether it ran."""
        with self._lock:
            if self._closed:
                return False
            self._arrived[positions] = write()
            before, self._num_leading = self._num_leading, self._count_leading()
            now, callback = self._num_leading, self._progress_callback
        if callback is not None and now > before:
            callback(now)
        return True

    def extend(self, deadline: float) -> None:
        """Moves the deadline to a later moment of `time.monotonic()`; an earlier one changes nothing."""
        with self._lock:
            self.deadline = max(self.deadline, deadline)

    def on_progress(self, callback: Callable[[int], None]) -> None:
        """Calls `callback(num_leading_arrived)`, on some thread, when that number has grown; at once if it is above 0.

        Calls of several threads may overtake one another. There is one such callback.
        """
        with self._lock:
            self._progress_callback = callback
            now = self._num_leading
        if now:
            callback(now)

    def finish(self) -> None:
        """Says that no part is left. Called by the mover."""
        self._end(expired=False)

    def expire(self) -> None:
        """Ends the transfer now: what has not arrived never will. Waits for a last hop that is under way."""
        self._end(expired=True)

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for the end, at most until the deadline or for `timeout_s`, and then expires the transfer.

        Returns:
            How many blocks arrived, counted from the first one to the first that did not.
        """
        give_up_at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while (left_s := min(self.deadline, give_up_at) - time.monotonic()) > 0:  # the deadline may move while waiting
            if self._ended.wait(left_s):
                break
        self.expire()
        return self._num_leading

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once, on some thread, when the transfer ends; at once if it has."""
        with self._lock:
            if not self._closed:
                self._callbacks.append(callback)
                return
        callback()

    def _count_leading(self) -> int:
        rest = self._arrived[self._num_leading :]
        return self.num_blocks if rest.all() else self._num_leading + int(np.argmin(rest))

    def _end(self, *, expired: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._expired = expired
            callbacks, self._callbacks = self._callbacks, []
        self._ended.set()
        for callback in callbacks:
            try:
                callback()
            except Exception:
                logger.exception("a listener to the end of a KV transfer failed")


class Mover:
    """Owns the threads that run transfers' parts, and one that ends transfers whose deadline has passed.

    Parts belong to lanes, such as "host" and "disk", with threads of their own: a disk that hangs holds up no load that
    needs host memory only.
    """

    def __init__(self, num_threads: Mapping[str, int]) -> None:
        """Starts `num_threads[lane]` threads for each lane."""
        self._changed = threading.Condition()  # guards all below
        self._lanes: dict[str, deque[_Queued]] = {lane: deque() for lane in num_threads}
        self._deadlines: list[tuple[float, int, Transfer]] = []  # a heap; the number keeps equal deadlines apart
        self._num_submitted = 0
        self._num_unfinished = 0
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._run_parts, args=(queued,), name=f"kv-load-{lane}-{i}", daemon=True)
            for lane, queued in self._lanes.items()
            for i in range(num_threads[lane])
        ]
        self._threads.append(threading.Thread(target=self._watch_deadlines, name="kv-load-deadlines", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def num_unfinished(self) -> int:
        """Transfers with parts queued or running, expired ones included."""
        return self._num_unfinished

    def submit(self, transfer: Transfer, parts: Mapping[str, Sequence[Part]], on_done: Callable[[], None]) -> None:
        """Runs all parts, those of a lane in order of their start, then `on_done`, and then finishes the transfer.

        Parts run, and `on_done` waits for them, even if the transfer expires meanwhile: `on_done` gives back what they use.
        """
        num_parts = sum(map(len, parts.values()))
        if num_parts == 0:
            on_done()
            transfer.finish()
            return
        work = _Work(transfer, {lane: deque(lane_parts) for lane, lane_parts in parts.items()}, num_parts, on_done)
        with self._changed:
            for lane, waiting in work.waiting.items():
                for _ in range(min(PARTS_AT_ONCE, len(waiting))):
                    self._lanes[lane].append(_Queued(work, lane, waiting.popleft()))
            self._num_submitted += 1
            self._num_unfinished += 1
            heapq.heappush(self._deadlines, (transfer.deadline, self._num_submitted, transfer))
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Waits for all parts, also queued ones, for at most `timeout_s`. A thread that hangs in a read is left behind."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            logger.error(
                "loads of KV blocks still run %g s after they were told to end; going on without them", timeout_s
            )

    def _run_parts(self, lane: "deque[_Queued]") -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: lane or self._is_closing)
                if not lane:
                    return
                queued = lane.popleft()
            try:
                queued.part()
            except Exception:  # root of a task: the part's blocks count as not arrived
                logger.exception("a part of a KV transfer failed; its blocks are computed again")
            work = queued.work
            with self._changed:
                work.num_remaining -= 1
                is_last = work.num_remaining == 0
                if waiting := work.waiting[queued.lane]:
                    lane.append(_Queued(work, queued.lane, waiting.popleft()))
                    self._changed.notify_all()
            if is_last:
                work.on_done()
                with self._changed:
                    self._num_unfinished -= 1
                work.transfer.finish()

    def _watch_deadlines(self) -> None:
        while True:
            with self._changed:
                if self._is_closing:
                    return
                next_s = self._deadlines[0][0] - time.monotonic() if self._deadlines else None
                if next_s is None or next_s > 0:
                    self._changed.wait(next_s)
                    continue
                _, number, transfer = heapq.heappop(self._deadlines)
                if not transfer.is_due:  # it was extended
                    heapq.heappush(self._deadlines, (transfer.deadline, number, transfer))
                    continue
            transfer.expire()


@dataclass(slots=True)
class _Work:
    """A transfer's parts that are not queued yet, by lane, and how many have not ended."""

    transfer: Transfer
    waiting: dict[str, deque[Part]]
    num_remaining: int
    on_done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Queued:
    work: _Work
    lane: str
    part: Part
