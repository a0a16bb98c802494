"""Runs the parts of transfers on its own threads, a few parts of each transfer at a time.

A transfer is many independent parts (runs of blocks). Each transfer has at most `PARTS_AT_ONCE` of its parts running or
queued, and queues the next one behind the parts of all other transfers: a short transfer never waits for the whole of a
long one.
"""

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dynamo.tiers.tier import Outcomes, SlotIds

__all__ = ["PARTS_AT_ONCE", "Mover", "Part", "Transfer"]

logger = logging.getLogger(__name__)

PARTS_AT_ONCE = 2  # one part reads while the other copies

Part = Callable[[], None]
"""Moves some of a transfer's blocks and gives back the pins it holds, in every case."""


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
        self._closed = False
        self._expired = False
        self._ended = threading.Event()
        self._callbacks: list[Callable[[], None]] = []

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
            return True

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
        self._ended.wait(self.remaining_s if timeout_s is None else min(timeout_s, self.remaining_s))
        self.expire()
        return self.num_blocks if self._arrived.all() else int(np.argmin(self._arrived))

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once, on some thread, when the transfer ends; at once if it has."""
        with self._lock:
            if not self._closed:
                self._callbacks.append(callback)
                return
        callback()

    def _end(self, *, expired: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._expired = expired
            callbacks, self._callbacks = self._callbacks, []
        self._ended.set()
        for callback in callbacks:
            callback()


class Mover:
    """Owns the threads that run transfers' parts, and one that ends transfers whose deadline has passed."""

    def __init__(self, num_threads: int) -> None:
        self._changed = threading.Condition()  # guards all below
        self._parts: deque[tuple[_Work, Part]] = deque()
        self._deadlines: list[tuple[float, int, Transfer]] = []  # a heap; the number keeps equal deadlines apart
        self._num_submitted = 0
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._run_parts, name=f"kv-load-{i}", daemon=True) for i in range(num_threads)
        ]
        self._threads.append(threading.Thread(target=self._watch_deadlines, name="kv-load-deadlines", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(self, transfer: Transfer, parts: list[Part]) -> None:
        """Runs all parts, in order of their start, and then finishes the transfer. A part runs even if the transfer has
        expired, since it owns pins that it must give back."""
        if not parts:
            transfer.finish()
            return
        work = _Work(transfer, deque(parts), len(parts))
        with self._changed:
            for _ in range(min(PARTS_AT_ONCE, len(parts))):
                self._parts.append((work, work.waiting.popleft()))
            self._num_submitted += 1
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

    def _run_parts(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._parts or self._is_closing)
                if not self._parts:
                    return
                work, part = self._parts.popleft()
            try:
                part()
            except Exception:  # root of a task: the part's blocks count as not arrived
                logger.exception("a part of a KV transfer failed; its blocks are computed again")
            with self._changed:
                work.num_remaining -= 1
                is_last = work.num_remaining == 0
                if work.waiting:
                    self._parts.append((work, work.waiting.popleft()))
                    self._changed.notify()
            if is_last:
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
                _, _, transfer = heapq.heappop(self._deadlines)
            transfer.expire()


@dataclass(slots=True)
class _Work:
    """A transfer's parts that are not queued yet, and how many have not ended."""

    transfer: Transfer
    waiting: deque[Part]
    num_remaining: int
