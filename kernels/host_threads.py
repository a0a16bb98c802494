"""Threads that help a caller to copy host memory: one core alone does not fill the memory bus.

Bytes moved: none here; the callers' numpy calls move them, and release the GIL while they do. A copy is a number of items
that may be copied in any order. The caller and up to three helpers take parts of it until none is left, large parts first
and small ones last, so that a helper whose core becomes busy with something else takes fewer and is not waited for long. Where
no core is idle when a copy begins, the caller copies alone: a helper that is put aside in the middle of a part holds up the
whole copy.
Guided self-scheduling is Polychronopoulos' and Kuck's (https://doi.org/10.1109/TC.1987.5009495).
"""

import os
import queue
import threading
from collections.abc import Callable

__all__ = ["HostThreads", "copy_in_parts", "num_threads_for"]

CopyPart = Callable[[int, int], None]
"""Copies the items in [start, stop). Called from several threads at a time, for disjoint ranges."""

MIN_SHARED_BYTES = 4 << 20  # half a millisecond: waking a helper takes a tenth of it
MIN_PART_BYTES = 1 << 20
MAX_LANES = 4  # the caller and its helpers; two or three cores fill the bus of most machines


class HostThreads:
    """Helpers that wait for copies. Owns its daemon threads, which start with the first large copy and then stay.

    Any number of threads may copy at a time: a helper goes to one copy after the other, and a caller never waits for a
    helper to come, only for parts that helpers are copying already. After a fork the child starts its own.

    >>> copied = []
    >>> HostThreads(num_helpers=1).copy(8, 1 << 20, lambda start, stop: copied.extend(range(start, stop)))
    >>> sorted(copied)
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(self, num_helpers: int, has_idle_core: Callable[[], bool] | None = None) -> None:
        """Starts nothing yet.

        Args:
            num_helpers: threads beside the caller, 0 or more.
            has_idle_core: asked at each large copy whether helpers should come; None: they always do.
        """
        self._num_helpers = num_helpers
        self._has_idle_core = has_idle_core
        self._begin_anew()
        os.register_at_fork(after_in_child=self._begin_anew)

    @property
    def num_lanes(self) -> int:
        """Threads that copy together: the caller and the helpers."""
        return 1 + self._num_helpers

    def copy(self, num_items: int, item_bytes: int, copy_part: CopyPart) -> None:
        """Has all items copied, by the calling thread alone or with helpers. Blocks until done.

        Args:
            num_items: at least 0.
            item_bytes: of one item on average; decides how many make a part, and whether helpers are worth it.
            copy_part: what copies; must release the GIL most of the time, and allocate little.

        Raises:
            BaseException: the first that `copy_part` raised, on whichever thread; no part is being copied any more.
        """
        if self._num_helpers == 0 or num_items < 2 or num_items * item_bytes < MIN_SHARED_BYTES:
            if num_items:
                copy_part(0, num_items)
            return
        if self._has_idle_core is not None and not self._has_idle_core():
            copy_part(0, num_items)
            return
        job = _Job(num_items, max(1, MIN_PART_BYTES // max(1, item_bytes)), 2 * self.num_lanes, copy_part)
        try:
            self._call_helpers(job)
            job.lead()
        finally:
            job.finish()

    def _call_helpers(self, job: "_Job") -> None:
        with self._lock:
            try:
                while self._num_started < self._num_helpers:
                    number = self._num_started
                    threading.Thread(target=_serve, args=(self._jobs,), name=f"kv-copy-{number}", daemon=True).start()
                    self._num_started += 1
            except RuntimeError:  # no thread can be had, as while the interpreter ends: those there are will do
                pass
            for _ in range(self._num_started):
                self._jobs.put(job)

    def _begin_anew(self) -> None:
        """Forgets the helpers, which a forked child does not have, and their locks, which nobody there would release."""
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._num_started = 0


class _Job:
    """Items of one copy that are left, and how many helpers are at work on others."""

    def __init__(self, num_items: int, min_part: int, divisor: int, copy_part: CopyPart) -> None:
        self._num_items, self._min_part, self._divisor = num_items, min_part, divisor
        self._copy_part: CopyPart | None = copy_part
        self._next = 0
        self._num_helping = 0
        self._error: BaseException | None = None
        self._state = threading.Condition(threading.Lock())

    def lead(self) -> None:
        """The caller's share: part after part until none is left."""
        while True:
            with self._state:
                part = self._take()
            if part is None:
                return
            part[0](*part[1:])

    def help(self) -> None:
        """A helper's share. Errors are kept for `finish`."""
        while True:
            with self._state:
                part = self._take()
                if part is None:
                    return
                self._num_helping += 1
            error: BaseException | None = None
            try:
                part[0](*part[1:])
            except BaseException as raised:  # noqa: BLE001 - the caller's to handle, whose thread this is not
                error = raised
            with self._state:
                self._num_helping -= 1
                if error is not None:
                    self._next, self._error = self._num_items, self._error or error
                if self._num_helping == 0:
                    self._state.notify_all()

    def finish(self) -> None:
        """Takes what is left off the list, waits until no helper copies any more, and raises what one of them raised.

        Has no deadline and holds an interrupt back: a helper inside of a part is writing the caller's memory, which must
        not be given back before. A part is one call's worth of copying; it ends whatever else happens.
        """
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                with self._state:
                    self._next, self._copy_part = self._num_items, None
                    self._state.wait_for(lambda: self._num_helping == 0)
                break
            except KeyboardInterrupt as pressed:
                interrupt = pressed
        error = interrupt or self._error
        if error is not None:
            raise error

    def _take(self) -> tuple[CopyPart, int, int] | None:
        """The next part, or None; the caller holds the lock."""
        left = self._num_items - self._next
        if self._copy_part is None or left == 0:
            return None
        start, self._next = self._next, self._next + min(left, max(self._min_part, left // self._divisor))
        return self._copy_part, start, self._next


def _serve(jobs: "queue.SimpleQueue[_Job]") -> None:
    """What a helper does for as long as the process lives."""
    while True:
        jobs.get().help()


def _has_idle_core() -> bool:
    """Whether fewer threads run on this machine, this one among them, than it has cores. True where that is not told."""
    try:
        with open("/proc/loadavg", "rb", buffering=0) as file:
            num_running = int(file.read(64).split()[3].partition(b"/")[0])
    except (OSError, IndexError, ValueError):
        return True
    return num_running < (os.cpu_count() or 1)


_THREADS = HostThreads(min(len(os.sched_getaffinity(0)), MAX_LANES) - 1, _has_idle_core)
# The one piece of state that a module of this package holds: `copy_rows` and `copy_blocks` are functions, to be called from
# any thread without setting anything up, and threads that each caller brought along would fight for the same cores.


def copy_in_parts(num_items: int, item_bytes: int, copy_part: CopyPart) -> None:
    """`HostThreads.copy` with the process's own helpers: three at most, one less than the cores this process may use.

    >>> import numpy as np
    >>> src, dst = np.ones(8 << 20, dtype=np.uint8), np.zeros(8 << 20, dtype=np.uint8)
    >>> copy_in_parts(dst.size, 1, lambda start, stop: np.copyto(dst[start:stop], src[start:stop]))
    >>> bool(dst.all())
    True
    """
    _THREADS.copy(num_items, item_bytes, copy_part)


def num_threads_for(num_bytes: int) -> int:
    """Threads, the caller among them, that `copy_in_parts` has at most for so many bytes.

    >>> num_threads_for(4096)
    1
    """
    return _THREADS.num_lanes if num_bytes >= MIN_SHARED_BYTES else 1
