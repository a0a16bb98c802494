"""Vectored reads and writes of slots in one file, spread over a thread pool.

Slots that follow one another in the file become one `preadv` or `pwritev` even when their rows lie scattered in memory.
Faults of the file are outcomes per slot, never exceptions.
"""

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

import numpy as np

from dynamo.kernels.checks import KernelArgumentError, Rows, SlotIds
from dynamo.tiers.layout import SLOT_ALIGNMENT_BYTES
from dynamo.tiers.tier import Outcomes

__all__ = ["BlockFile", "FileIO", "IOResult"]

logger = logging.getLogger(__name__)

_MAX_CALL_BYTES = 2 << 20  # larger calls gain nothing and leave other threads idle
_MIN_CALL_BYTES = 256 << 10  # smaller ones are not worth splitting
_MAX_IOVECS = 1024  # IOV_MAX of Linux
_MAX_IDLE_CALLS = 8  # calls in a row that end inside the page they began with
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class IOResult:
    """What became of one call.

    Attributes:
        outcomes: bool [n], in the order of the slots asked for.
        faults: failed slots by kind: "truncated" (the file ends before the slot does), "disk_full", "io_error"; and
            "direct_refused" once when O_DIRECT stopped working and the file went on buffered.
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
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        if self.is_direct:
            flags |= os.O_DIRECT
        self.fd = os.open(path, flags, 0o600)
        self._lock = Lock()

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


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive slots, done in one call: positions [start, stop) of the batch's sorted slots."""

    start: int
    stop: int


class _Batch:
    """One read or write: its pieces, and what has become of them. Pieces touch disjoint positions of `outcomes`."""

    def __init__(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds, writes: bool) -> None:
        self.file = file
        self.order = np.argsort(slots, kind="stable")
        self.slots = slots[self.order]
        self.row_ids: list[int] = row_ids[self.order].tolist()
        self.slot_bytes = rows.shape[1]
        self.memory = rows.reshape(-1).data
        self.writes = writes
        self.call: Callable[[int, list[memoryview], int], int] = os.pwritev if writes else os.preadv
        self.outcomes = np.zeros(slots.size, dtype=np.bool_)  # in sorted order
        self.faults: Counter[str] = Counter()
        self.lock = Lock()
        self.pieces: deque[_Piece] = deque()
        self.num_unfinished = 0
        self.done = Event()

    def split(self, num_threads: int) -> None:
        """Cuts the slots into pieces that keep every thread busy."""
        target_bytes = self.slots.size * self.slot_bytes // num_threads
        target_bytes = max(_MIN_CALL_BYTES, min(_MAX_CALL_BYTES, target_bytes))
        step = max(1, min(_MAX_IOVECS, target_bytes // self.slot_bytes))
        breaks = (np.flatnonzero(np.diff(self.slots) != 1) + 1).tolist()
        for start, stop in zip([0, *breaks], [*breaks, self.slots.size], strict=True):
            self.pieces.extend(_Piece(at, min(at + step, stop)) for at in range(start, stop, step))
        self.num_unfinished = len(self.pieces)

    def run(self, piece: _Piece) -> None:
        """Moves one piece and records its outcome."""
        try:
            good, fault = self._transfer(piece)
            self.outcomes[piece.start : piece.start + good] = True
            failed_at = piece.start + good
            if fault == "io_error" and piece.stop - piece.start > 1:
                for at in range(failed_at, piece.stop):  # one bad sector must not take its neighbours along
                    good, fault = self._transfer(_Piece(at, at + 1))
                    self.outcomes[at] = good == 1
                    self._count(fault, 1 - good)
            else:
                self._count(fault, piece.stop - failed_at)
        finally:
            with self.lock:
                self.num_unfinished -= 1
                if self.num_unfinished == 0:
                    self.done.set()

    def result(self) -> IOResult:
        """Outcomes in the caller's order; call when `done` is set."""
        outcomes = np.empty_like(self.outcomes)
        outcomes[self.order] = self.outcomes
        return IOResult(outcomes, dict(self.faults))

    def _count(self, fault: str | None, blocks: int) -> None:
        if fault is not None and blocks > 0:
            with self.lock:
                self.faults[fault] += blocks

    def _transfer(self, piece: _Piece) -> tuple[int, str | None]:
        """Reads or writes one piece.

        Returns:
            (slots moved whole, what stopped the rest or None).
        """
        start_offset = int(self.slots[piece.start]) * self.slot_bytes
        total_bytes = (piece.stop - piece.start) * self.slot_bytes
        done_bytes = num_idle_calls = 0
        while done_bytes < total_bytes:
            was_direct = self.file.is_direct
            try:
                count = self.call(self.file.fd, self._iovecs(piece, done_bytes), start_offset + done_bytes)
            except OSError as error:
                if error.errno == errno.EINVAL and was_direct:
                    self._fall_back()
                    continue
                return done_bytes // self.slot_bytes, "disk_full" if error.errno in _FULL else "io_error"
            # What is short goes on from a page that O_DIRECT accepts, so a call may gain nothing; some do so for ever.
            gained_bytes = count - count % SLOT_ALIGNMENT_BYTES
            done_bytes += gained_bytes
            num_idle_calls = 0 if gained_bytes else num_idle_calls + 1
            if count == 0 or (not self.writes and gained_bytes < count) or num_idle_calls == _MAX_IDLE_CALLS:
                return done_bytes // self.slot_bytes, "disk_full" if self.writes else "truncated"
        return piece.stop - piece.start, None

    def _fall_back(self) -> None:
        """After EINVAL on a direct call: the file is buffered from now on, whoever of the callers was first."""
        if self.file.use_buffered():
            self._count("direct_refused", 1)

    def _iovecs(self, piece: _Piece, done_bytes: int) -> list[memoryview]:
        """Memory of a piece from `done_bytes` on; rows that follow one another in memory are one vector."""
        width = self.slot_bytes
        rows = self.row_ids[piece.start + done_bytes // width : piece.stop]
        vectors = []
        begin = rows[0] * width + done_bytes % width
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

    A caller works on its own batch too: a single piece needs no hand-over, and a batch ends even after `close`.
    """

    def __init__(self, num_threads: int) -> None:
        """Starts `num_threads` - at least 1 - daemon threads."""
        self.num_threads = max(1, num_threads)
        self._batches: deque[_Batch] = deque()
        self._wake = Condition()
        self._closed = False
        self._threads = [Thread(target=self._work, name=f"kv-disk-{i}", daemon=True) for i in range(self.num_threads)]
        for thread in self._threads:
            thread.start()

    def read(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> IOResult:
        """Reads `slots` of the file into rows; slot i lies at `i * row_bytes`. Blocks until the kernel is done with `rows`.

        There is no deadline: memory that a stuck disk may still write to cannot be given back to anybody.

        Args:
            file: where the slots lie; must stay open.
            slots: int64 [n], distinct, not negative.
            rows: uint8 [num_rows, row_bytes], C-contiguous and page-aligned, row_bytes a multiple of 4096; checked ids.
            row_ids: int64 [n].

        Raises:
            KernelArgumentError: the rows are not aligned.
        """
        return self._run(_Batch(file, slots, rows, row_ids, writes=False), rows)

    def write(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> IOResult:
        """Writes rows to `slots` of the file; as `read`. Not durable: nothing is synced."""
        return self._run(_Batch(file, slots, rows, row_ids, writes=True), rows)

    def close(self) -> None:
        """Ends the threads after the pieces they are working on; callers finish their own batches. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _run(self, batch: _Batch, rows: Rows) -> IOResult:
        if batch.slots.size == 0:
            return batch.result()
        if rows.ctypes.data % mmap.PAGESIZE or rows.shape[1] % SLOT_ALIGNMENT_BYTES:
            raise KernelArgumentError(
                f"rows must start at a page and be a multiple of {SLOT_ALIGNMENT_BYTES} bytes wide for O_DIRECT, "
                f"got address {rows.ctypes.data:#x} and {rows.shape[1]} bytes; use HostTier.rows"
            )
        batch.split(self.num_threads)
        if len(batch.pieces) > 1:
            with self._wake:
                self._batches.append(batch)
                self._wake.notify(len(batch.pieces) - 1)
        while True:
            try:
                piece = batch.pieces.popleft()
            except IndexError:
                break
            batch.run(piece)
        batch.done.wait()
        return batch.result()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._batches and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                batch = self._batches.popleft()
                try:
                    piece = batch.pieces.popleft()
                except IndexError:
                    continue
                if batch.pieces:
                    self._batches.append(batch)
            batch.run(piece)
            del batch  # an idle thread must not keep the rows' memory


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
        if error.errno in _FULL:
            return True  # nothing can be proven on a full disk; a later EINVAL still falls back
        logger.info("%s does not support O_DIRECT (%s): the disk tier goes through the page cache", folder, error)
        return False
    finally:
        os.close(fd)
        view.release()
        page.close()
        with contextlib.suppress(OSError):
            probe.unlink()
