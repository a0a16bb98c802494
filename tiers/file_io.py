"""Vectored reads and writes of slots in one file, spread over a thread pool.

Slots that follow one another in the file become one `preadv` or `pwritev` even when their rows lie scattered in memory.
Faults of the file are outcomes per slot, never exceptions.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event, Lock, Thread
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from dynamo.kernels.checks import KernelArgumentError, Rows, SlotIds
from dynamo.tiers.layout import SLOT_ALIGNMENT_BYTES
from dynamo.tiers.plain_file import open_plain
from dynamo.tiers.tier import Outcomes

if TYPE_CHECKING:
    import torch

__all__ = [
    "BlockFile",
    "FileIO",
    "IOResult",
    "PendingBatch",
    "PendingIO",
    "SlotBatch",
    "SlotIO",
    "check_aligned",
    "fault_kind",
]

logger = logging.getLogger(__name__)

_MAX_CALL_BYTES = 2 << 20  # larger calls gain nothing and leave other threads idle
_MIN_CALL_BYTES = 256 << 10  # smaller ones are not worth splitting
_MAX_IOVECS = 1024  # IOV_MAX of Linux
_MAX_IDLE_CALLS = 8  # calls in a row that end inside the page they began with
_MAX_SHARE_CALLS = 8  # a thread takes up to so many calls at once ...
_SHARES_PER_THREAD = 2  # ... but leaves enough that all threads end at about the same time
_FAULT_KINDS = {
    errno.ENOSPC: "disk_full",
    errno.EFBIG: "disk_full",
    errno.EDQUOT: "quota_exceeded",
    errno.EROFS: "read_only",
    errno.EACCES: "no_permission",
    errno.EPERM: "no_permission",
}


@dataclass(frozen=True, slots=True)
class IOResult:
    """What became of one call.

    Attributes:
        outcomes: bool [n], in the order of the slots asked for.
        faults: failed slots by kind: "truncated" (the file ends before the slot does), "disk_full", "quota_exceeded",
            "read_only", "no_permission", "io_error"; and "direct_refused" once when O_DIRECT stopped working and the file
            went on buffered.
    """

    outcomes: Outcomes
    faults: Mapping[str, int]


class BlockFile:
    """An open file of slots. Owns its descriptor; the opener closes it when no call uses it any more."""

    def __init__(self, path: Path) -> None:
        """Opens or creates `path`, with O_DIRECT where writing and reading back a page that way proves to work.

        Raises:
            OSError: the file cannot be opened for reading and writing.
        """
        self.path = path
        self.is_direct = _can_use_direct(path.parent)
        self.fd = open_plain(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if self.is_direct else 0))
        self._lock = Lock()

    @classmethod
    def open_to_read(cls, path: Path) -> Self:
        """Opens an existing file for reading only and creates nothing beside it; with O_DIRECT where that opens.

        Raises:
            OSError: the file cannot be opened.
        """
        file = cls.__new__(cls)
        file.path = path
        try:
            file.fd = open_plain(path, os.O_RDONLY | os.O_DIRECT)
            file.is_direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file.fd = open_plain(path, os.O_RDONLY)
            file.is_direct = False
        file._lock = Lock()
        return file

    def use_buffered(self) -> bool:
        """Gives up O_DIRECT for this file. True for the one caller that changed it."""
        with self._lock:
            if not self.is_direct:
                return False
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            self.is_direct = False
            return True

    def close(self) -> None:
        """Closes the descriptor; call once."""
        os.close(self.fd)


class SlotIO(Protocol):
    """A way to move slots between one file and rows of memory. Calls may come from any thread."""

    def start(
        self, file: BlockFile, slots: SlotIds, rows: Rows | torch.Tensor, row_ids: SlotIds, *, writes: bool
    ) -> PendingIO:
        """Begins to move `slots` of the file into rows, or rows to slots; slot i lies at `i * row_bytes`.

        Args:
            file: where the slots lie; stays open until `PendingIO.result`.
            slots: int64 [n], distinct, not negative.
            rows: uint8 [num_rows, row_bytes], C-contiguous and page-aligned, row_bytes a multiple of 4096; in the memory
                that this back-end is for.
            row_ids: int64 [n], within the rows.
            writes: whether rows go to the file. Not durable: nothing is synced.

        Raises:
            KernelArgumentError: the rows are not aligned, or not in the right memory.
        """

    def close(self) -> None:
        """Ends the threads after what they are at. Idempotent."""


class PendingIO(Protocol):
    """A read or write under way."""

    def result(self) -> IOResult:
        """Helps, then blocks until the kernel is done with the rows; call once.

        There is no deadline: memory that a stuck disk may still write to cannot be given back to anybody.
        """


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


class FileIO:
    """Threads that read and write slots. Batches of different callers take turns, so none waits for another's end.

    A caller works on its own batch too: a single call needs no hand-over, and a batch ends even after `close`.
    """

    def __init__(self, num_threads: int) -> None:
        """Starts `num_threads` - at least 1 - daemon threads."""
        self.num_threads = max(1, num_threads)
        self._batches: deque[SlotBatch] = deque()
        self._wake = Condition()
        self._closed = False
        self._threads = [Thread(target=self._work, name=f"kv-disk-{i}", daemon=True) for i in range(self.num_threads)]
        for thread in self._threads:
            thread.start()

    def start(
        self, file: BlockFile, slots: SlotIds, rows: Rows | torch.Tensor, row_ids: SlotIds, *, writes: bool
    ) -> PendingIO:
        """Begins a read or write; see `SlotIO.start`."""
        return self.start_batch(SlotBatch.of(file, slots, rows, row_ids, self.num_threads, writes))

    def start_batch(self, batch: SlotBatch) -> PendingBatch:
        """Shares a batch out among the threads."""
        if batch.num_shares > 1:
            with self._wake:
                self._batches.append(batch)
                self._wake.notify(batch.num_shares - 1)
        return PendingBatch(batch)

    def read(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> IOResult:
        """Reads `slots` of the file into rows and waits for them; as `start`."""
        return self.start(file, slots, rows, row_ids, writes=False).result()

    def write(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> IOResult:
        """Writes rows to `slots` of the file and waits for them; as `start`."""
        return self.start(file, slots, rows, row_ids, writes=True).result()

    def close(self) -> None:
        """Ends the threads after the calls they are working on; callers finish their own batches. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._batches and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                batch = self._batches.popleft()
                try:
                    first = batch.shares.popleft()
                except IndexError:
                    continue
                if batch.shares:
                    self._batches.append(batch)
            batch.run(first)
            del batch  # an idle thread must not keep the rows' memory


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


def fault_kind(error: OSError) -> str:
    """What the counters call a failed system call."""
    return _FAULT_KINDS.get(error.errno or 0, "io_error")


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


def _can_use_direct(folder: Path) -> bool:
    """Proves O_DIRECT in `folder` by writing a page and reading it back."""
    probe = folder / "direct.probe"
    page = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    view = memoryview(page)
    try:
        probe.unlink(missing_ok=True)  # left by a crash
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, 0o600)
    except OSError as error:
        logger.info("%s does not support O_DIRECT (%s): the disk tier goes through the page cache", folder, error)
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        return False
    try:
        view[: mmap.PAGESIZE] = os.urandom(mmap.PAGESIZE)
        written = os.pwritev(fd, [view[: mmap.PAGESIZE]], 0)
        read = os.preadv(fd, [view[mmap.PAGESIZE :]], 0)
        return written == read == mmap.PAGESIZE and view[: mmap.PAGESIZE] == view[mmap.PAGESIZE :]
    except OSError as error:
        if fault_kind(error) in ("disk_full", "quota_exceeded"):
            return True  # nothing can be proven on a full disk; a later EINVAL still falls back
        logger.info("%s does not support O_DIRECT (%s): the disk tier goes through the page cache", folder, error)
        return False
    finally:
        os.close(fd)
        view.release()
        page.close()
        with contextlib.suppress(OSError):
            probe.unlink()
