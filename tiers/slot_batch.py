"""One read or write of slots, cut into vectored system calls.

Slots that follow one another in the file become one `preadv` or `pwritev` even when their rows lie scattered in memory.
Faults of the file are outcomes per slot, never exceptions.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import Counter, deque
from collections.abc import Callable
from threading import Event, Lock
from typing import TYPE_CHECKING, Self

import numpy as np

from dynamo.kernels.checks import KernelArgumentError, Rows, SlotIds
from dynamo.tiers.block_file import BlockFile, fault_kind
from dynamo.tiers.layout import SLOT_ALIGNMENT_BYTES
from dynamo.tiers.slot_io import IOResult

if TYPE_CHECKING:
    import torch

__all__ = ["PendingBatch", "SlotBatch", "check_aligned"]

_MAX_CALL_BYTES = 2 << 20  # larger calls gain nothing and leave other threads idle
_MIN_CALL_BYTES = 256 << 10  # smaller ones are not worth splitting
_MAX_IOVECS = 1024  # IOV_MAX of Linux
_MAX_IDLE_CALLS = 8  # calls in a row that end inside the page they began with
_MAX_SHARE_CALLS = 8  # a thread takes up to so many calls at once ...
_SHARES_PER_THREAD = 2  # ... but leaves enough that all threads end at about the same time


class SlotBatch:
    """One read or write: its calls, and what has become of them. Calls touch disjoint positions of `outcomes`.

    Attributes:
        slots: int64 [n], ascending; `row_ids` and `outcomes` are in the same order.
        cuts: `cuts[i]:cuts[i + 1]` are the positions of call i: consecutive slots.
        address: of the first row.
        shares: what threads take at a time: the first of several calls, so that small slots do not cost a lock each.
    """

    def __init__(
        self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds, num_threads: int, writes: bool
    ) -> None:
        self.file = file
        self.order = None if (slots[1:] > slots[:-1]).all() else np.argsort(slots, kind="stable")
        if self.order is not None:
            slots, row_ids = slots[self.order], row_ids[self.order]
        self.slots = slots
        self.row_ids: list[int] = row_ids.tolist()
        self.slot_bytes = rows.shape[1]
        self.address = rows.ctypes.data
        self.memory = rows.reshape(-1).data
        self.writes = writes
        self.call: Callable[[int, list[memoryview], int], int] = os.pwritev if writes else os.preadv
        self.outcomes = np.zeros(slots.size, dtype=np.bool_)  # in sorted order
        self.faults: Counter[str] = Counter()
        self.lock = Lock()
        self.cuts = _cuts(slots, self.slot_bytes, num_threads)
        self.num_calls = len(self.cuts) - 1
        share_calls = max(1, min(_MAX_SHARE_CALLS, -(-self.num_calls // (_SHARES_PER_THREAD * num_threads))))
        self.shares = deque(range(0, self.num_calls, share_calls))
        self.num_shares = self.num_unfinished = len(self.shares)
        self.share_calls = share_calls
        self.done = Event()

    @classmethod
    def of(
        cls,
        file: BlockFile,
        slots: SlotIds,
        rows: Rows | torch.Tensor,
        row_ids: SlotIds,
        num_threads: int,
        writes: bool,
    ) -> Self:
        """A batch of rows that are checked.

        Raises:
            KernelArgumentError: the rows are not in host memory, or not aligned.
        """
        if not isinstance(rows, np.ndarray):
            raise KernelArgumentError("rows in GPU memory cannot be read and written by system calls; use host rows")
        check_aligned(rows)
        return cls(file, slots, rows, row_ids, num_threads, writes)

    def run(self, first: int) -> None:
        """Makes the calls of one share, and records their outcomes."""
        try:
            for call in range(first, min(first + self.share_calls, self.num_calls)):
                self.run_call(call)
        finally:
            with self.lock:
                self.num_unfinished -= 1
                if self.num_unfinished == 0:
                    self.done.set()

    def result(self) -> IOResult:
        """Outcomes in the caller's order; call when `done` is set."""
        if self.order is None:
            return IOResult(self.outcomes, dict(self.faults))
        outcomes = np.empty_like(self.outcomes)
        outcomes[self.order] = self.outcomes
        return IOResult(outcomes, dict(self.faults))

    def run_call(self, call: int) -> None:
        """Makes one call, again and in parts where that helps, and records its outcomes."""
        start, stop = self.cuts[call], self.cuts[call + 1]
        self._record(start, stop, *self._transfer(start, stop))

    def settle(self, call: int, result: int) -> None:
        """Records what became of a call that somebody else made and that gave not all bytes, but fewer or -errno."""
        start, stop = self.cuts[call], self.cuts[call + 1]
        self.outcomes[start:stop] = False
        if result < 0 and result != -errno.EINVAL:
            self._record(start, stop, 0, fault_kind(OSError(-result, os.strerror(-result))))
        else:
            self.run_call(call)

    def _record(self, start: int, stop: int, good: int, fault: str | None) -> None:
        self.outcomes[start : start + good] = True
        if fault is None:
            return
        failed_at = start + good
        if fault == "io_error" and stop - start > 1:
            for at in range(failed_at, stop):  # one bad sector must not take its neighbours along
                good, fault = self._transfer(at, at + 1)
                self.outcomes[at] = good == 1
                self._count(fault, 1 - good)
        else:
            self._count(fault, stop - failed_at)

    def _count(self, fault: str | None, blocks: int) -> None:
        if fault is not None and blocks > 0:
            with self.lock:
                self.faults[fault] += blocks

    def _transfer(self, start: int, stop: int) -> tuple[int, str | None]:
        """Reads or writes consecutive slots.

        Returns:
            (slots moved whole, what stopped the rest or None).
        """
        start_offset = int(self.slots[start]) * self.slot_bytes
        total_bytes = (stop - start) * self.slot_bytes
        done_bytes = num_idle_calls = 0
        while done_bytes < total_bytes:
            was_direct = self.file.is_direct
            try:
                count = self.call(self.file.fd, self._iovecs(start, stop, done_bytes), start_offset + done_bytes)
            except OSError as error:
                if error.errno == errno.EINVAL and was_direct:
                    self._fall_back()
                    continue
                return done_bytes // self.slot_bytes, fault_kind(error)
            if count == total_bytes:
                break
            # What is short goes on from a page that O_DIRECT accepts, so a call may gain nothing; some do so for ever.
            gained_bytes = count - count % SLOT_ALIGNMENT_BYTES
            done_bytes += gained_bytes
            num_idle_calls = 0 if gained_bytes else num_idle_calls + 1
            if count == 0 or (not self.writes and gained_bytes < count) or num_idle_calls == _MAX_IDLE_CALLS:
                return done_bytes // self.slot_bytes, "disk_full" if self.writes else "truncated"
        return stop - start, None

    def _fall_back(self) -> None:
        """After EINVAL on a direct call: the file is buffered from now on, whoever of the callers was first."""
        if self.file.use_buffered():
            self._count("direct_refused", 1)

    def _iovecs(self, start: int, stop: int, done_bytes: int) -> list[memoryview]:
        """Memory of some slots from `done_bytes` on; rows that follow one another in memory are one vector."""
        width = self.slot_bytes
        rows = self.row_ids[start + done_bytes // width : stop]
        begin = rows[0] * width + done_bytes % width
        if rows[-1] - rows[0] == len(rows) - 1 and all(map(int.__lt__, rows, rows[1:])):
            return [self.memory[begin : (rows[-1] + 1) * width]]
        vectors = []
        end = (rows[0] + 1) * width
        for row in rows[1:]:
            if row * width != end:
                vectors.append(self.memory[begin:end])
                begin = row * width
            end = (row + 1) * width
        vectors.append(self.memory[begin:end])
        return vectors


class PendingBatch:
    """A batch that its caller works on too, alone where nobody else has it."""

    def __init__(self, batch: SlotBatch) -> None:
        self._batch = batch

    def result(self) -> IOResult:
        """See `PendingIO.result`."""
        batch = self._batch
        if not batch.num_shares:
            return batch.result()
        while True:
            try:
                first = batch.shares.popleft()
            except IndexError:
                break
            batch.run(first)
        batch.done.wait()
        return batch.result()


def check_aligned(rows: Rows) -> None:
    """Checks that rows can be read and written with O_DIRECT.

    Raises:
        KernelArgumentError: they cannot.
    """
    if rows.ctypes.data % mmap.PAGESIZE or rows.shape[1] % SLOT_ALIGNMENT_BYTES:
        raise KernelArgumentError(
            f"rows must start at a page and be a multiple of {SLOT_ALIGNMENT_BYTES} bytes wide for O_DIRECT, "
            f"got address {rows.ctypes.data:#x} and {rows.shape[1]} bytes; use HostTier.rows"
        )


def _cuts(slots: SlotIds, slot_bytes: int, num_threads: int) -> list[int]:
    """Where to cut ascending `slots` into calls that keep every thread busy: the first position of each, and the end."""
    if not slots.size:
        return [0]
    target_bytes = slots.size * slot_bytes // num_threads
    target_bytes = max(_MIN_CALL_BYTES, min(_MAX_CALL_BYTES, target_bytes))
    step = max(1, min(_MAX_IOVECS, target_bytes // slot_bytes))
    position = np.arange(slots.size)
    run_start = position.copy()
    run_start[1:][slots[1:] - slots[:-1] == 1] = 0
    run_start = np.maximum.accumulate(run_start)
    return [*np.flatnonzero((position - run_start) % step == 0).tolist(), slots.size]
