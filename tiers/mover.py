"""Runs the parts of transfers on its own threads, a few parts of each transfer at a time.

A transfer is many independent parts (runs of blocks). Each transfer has at most `PARTS_AT_ONCE` of its parts running or
queued, and queues the next one behind the parts of all other transfers: a short transfer never waits for the whole of a
long one.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

__all__ = ["PARTS_AT_ONCE", "Mover", "Transfer"]

logger = logging.getLogger(__name__)

PARTS_AT_ONCE = 2  # one part reads while the other copies


class Transfer:
    """Blocks on their way into slots that somebody waits for: per-block outcome, deadline, and a safe end.

    After `expire`, no part can write to the destination any more, so the owner may reuse the slots although I/O that
    was already submitted is still under way towards staging memory. Thread-safe.
    """

    def __init__(self, num_blocks: int, timeout_s: float) -> None:
        self.num_blocks = num_blocks
        self.deadline = time.monotonic() + timeout_s
        self._lock = threading.Lock()
        self._arrived = np.zeros(num_blocks, dtype=np.bool_)
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

    def deliver(self, positions: npt.NDArray[np.int64], write: Callable[[], npt.NDArray[np.bool_]]) -> bool:
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
    """Owns the threads that run transfers' parts."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-load")

    def submit(self, transfer: Transfer, parts: list[Callable[[], None]]) -> None:
        """Runs all parts, in order of their start, and then finishes the transfer. A part runs even if the transfer has
        expired, since it owns pins that it must give back."""
        waiting = deque(parts)
        remaining = len(parts)
        lock = threading.Lock()

        def run(part: Callable[[], None] | None) -> None:
            nonlocal remaining
            while part is not None:
                try:
                    part()
                except Exception:
                    logger.exception("a part of a KV transfer failed; its blocks are computed again")
                with lock:
                    remaining -= 1
                    last = remaining == 0
                    part = waiting.popleft() if waiting else None
                if last:
                    transfer.finish()
                if part is not None and self._queue(run, part):
                    return

        if not parts:
            transfer.finish()
        for _ in range(min(PARTS_AT_ONCE, len(parts))):
            with lock:
                part = waiting.popleft() if waiting else None
            if part is not None and not self._queue(run, part):
                run(part)

    def _queue(self, run: Callable[[Callable[[], None]], None], part: Callable[[], None]) -> bool:
        """Queues a part behind those of all transfers; False once the mover is closing."""
        try:
            self._threads.submit(run, part)
        except RuntimeError:  # the executor takes nothing more after shutdown()
            return False
        return True

    def close(self) -> None:
        """Waits for the parts that are running; those still queued run too, since they own pins."""
        self._threads.shutdown(wait=True)
