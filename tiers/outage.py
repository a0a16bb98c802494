"""Leaves a failing disk alone for a while, and tries again: each wait on a dead disk may cost half a minute."""

import time
from collections.abc import Callable
from threading import Lock

__all__ = ["Outage"]

_MAX_PAUSE_S = 60.0


class Outage:
    """Counts calls in a row that achieved nothing; from the third on, the disk rests. Thread-safe.

    The first pause lasts `pause_s`, each further one twice as long up to a minute; when one is over, calls are let through,
    and the first of them decides.
    """

    def __init__(
        self, *, num_failures: int = 3, pause_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds and never goes backwards."""
        self._num_failures = num_failures
        self._first_pause_s = pause_s
        self._clock = clock
        self._lock = Lock()
        self._failures = 0
        self._pause_s = pause_s
        self._resting_until = 0.0

    @property
    def is_resting(self) -> bool:
        """Whether the disk is to be left alone now."""
        return self._failures >= self._num_failures and self._clock() < self._resting_until

    def note(self, is_good: bool) -> None:
        """Takes note of a call: whether it moved any block, or failed for a reason other than the disk itself."""
        if is_good and not self._failures:
            return
        with self._lock:
            if is_good:
                self._failures = 0
                self._pause_s = self._first_pause_s
                return
            self._failures += 1
            now_s = self._clock()
            if self._failures >= self._num_failures and now_s >= self._resting_until:
                self._resting_until = now_s + self._pause_s
                self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
