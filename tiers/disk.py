"""G3: slots in one preallocated file, found again after a restart through the journal beside it."""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Condition, Lock

import numpy as np

from dynamo.kernels.checks import Rows, SlotIds, check_ids, check_rows
from dynamo.tiers.errors import (
    JournalFormatError,
    TierBusyError,
    TierClosedError,
    TierConfigError,
    TierUnavailableError,
)
from dynamo.tiers.file_io import BlockFile, FileIO, IOResult
from dynamo.tiers.journal import Journal, RecoveredBlocks
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.namespace import Namespace
from dynamo.tiers.stats import TierRecorder, TierStats
from dynamo.tiers.tier import Outcomes

__all__ = ["DiskTier"]

logger = logging.getLogger(__name__)

_MAX_EXTENT_BYTES = 64 << 20
_MIN_EXTENTS = 16  # a small capacity is taken in smaller steps, so that other models do not make way for nothing
_CLOSE_TIMEOUT_S = 30.0

_FAULT_MESSAGES = {
    "truncated": "the file is shorter than its blocks; those lost are computed again",
    "missing": "the index is there but the blocks are gone; starting empty",
    "deleted": "the file was deleted; its blocks are lost and a new file is started",
    "disk_full": "the disk is full; blocks are not kept until there is space",
    "over_capacity": "other models in use fill the directory's capacity; blocks are not kept",
    "io_error": "the disk reports I/O errors; blocks affected are computed again",
    "direct_refused": "O_DIRECT stopped working; going on through the page cache",
    "index_format": "the index cannot be used; starting empty",
    "index_damaged": "the index has damaged records; the blocks they named are forgotten",
    "unavailable": "the file cannot be made again; nothing is kept on disk",
}


class DiskTier:
    """Slots in `blocks.dat` with a `Journal` beside it, in a folder locked against other processes.

    Owns the folder, file, index and I/O threads. Knows nothing of names: whoever writes a block calls `journal.put` when
    `write` has succeeded, `journal.drop` before a slot goes to another block, and checks digests of what `read` gives.

    The file grows in extents as higher slots are first used, so use low slots first. Faults are counted by kind in
    `stats().faults` and logged at the first of each kind.
    """

    name = "disk"

    def __init__(
        self,
        namespace: Namespace,
        file: BlockFile,
        journal: Journal,
        io: FileIO,
        layout: BlockLayout,
        num_slots: int,
        capacity_bytes: int,
    ) -> None:
        """Takes over what it is given; use `open`."""
        self.layout = layout
        self.num_slots = num_slots
        self.folder = namespace.folder
        self._namespace = namespace
        self._journal = journal
        self._recovered = journal.recovered
        self._io = io
        self._capacity_bytes = capacity_bytes
        extent_slots = min(_MAX_EXTENT_BYTES // layout.slot_bytes, num_slots // _MIN_EXTENTS)
        self._extent_bytes = max(1, extent_slots) * layout.slot_bytes
        self._recorder = TierRecorder(layout.block_bytes)
        self._growing = Lock()  # taken before _state
        self._state = Condition()  # guards all below
        self._closed = False
        self._file: BlockFile | None = file
        self._users: dict[BlockFile, int] = {}
        self._allocated_bytes = 0
        self._is_present = np.zeros(num_slots, dtype=np.bool_)
        self._generation = 0

    @classmethod
    def open(
        cls, directory: Path, layout: BlockLayout, capacity_bytes: int, fingerprint: bytes, io_threads: int = 8
    ) -> "DiskTier":
        """Opens, or creates, the folder of one model inside `directory`.

        Args:
            directory: may be shared with other models' tiers; created where needed.
            layout: sizes of a block.
            capacity_bytes: what all models in `directory` may take together. Folders of models not in use, the least
                recently used first, make way when this one grows.
            fingerprint: names model, dtype and layout; blocks of another fingerprint are never seen.
            io_threads: calls in flight at the disk. More help only when small slots lie far from one another.

        Raises:
            TierConfigError: the capacity does not hold one block.
            TierBusyError: another process uses this folder.
            TierUnavailableError: the folder cannot be created, read or written; go on without a disk tier.
        """
        num_slots = capacity_bytes // layout.slot_bytes
        if num_slots < 1:
            raise TierConfigError(
                f"a disk capacity of {capacity_bytes} bytes holds no block of {layout.slot_bytes} bytes; give it more"
            )
        with contextlib.ExitStack() as undo:
            try:
                namespace = Namespace(directory, fingerprint)
                undo.callback(namespace.close)
                existed = namespace.blocks_path.exists()
                file = BlockFile(namespace.blocks_path)
                undo.callback(file.close)
                journal, refusal = _open_journal(namespace.journal_path, num_slots, layout, fingerprint)
                undo.callback(journal.close)
                io = FileIO(io_threads)
                undo.callback(io.close)
                tier = cls(namespace, file, journal, io, layout, num_slots, capacity_bytes)
                tier._recover(file, existed, refusal)
            except OSError as error:
                raise TierUnavailableError(
                    f"the disk tier's folder {directory} cannot be used: {error}; check that this user may write there",
                    path=directory,
                ) from error
            undo.pop_all()
        return tier

    @property
    def journal(self) -> Journal:
        """The index."""
        return self._journal

    @property
    def recovered(self) -> RecoveredBlocks:
        """Blocks of an earlier run that lie within the file, least recently put first. Their bytes are not checked yet."""
        return self._recovered

    @property
    def generation(self) -> int:
        """Goes up when everything stored was lost (the file was deleted): forget the index of this tier then."""
        return self._generation

    @property
    def num_allocated_slots(self) -> int:
        """Slots for which the file has room already; the others may be refused when the disk is full."""
        return self._allocated_bytes // self.layout.slot_bytes

    def read(self, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> Outcomes:
        """Reads slots into rows; see `Tier.read`. Also False for slots not written since the file was made."""
        check_rows(rows, "rows", self.layout.slot_bytes, writable=True)
        check_ids(slots, "slots", self.num_slots)
        check_ids(row_ids, "row_ids", rows.shape[0], slots.size)
        started = time.perf_counter()
        with self._using_file() as file:
            outcomes = self._is_present[slots]
            if file is None:
                outcomes[:] = False
                self._fault("unavailable", slots.size)
            elif outcomes.any():
                result = self._io.read(file, slots[outcomes], rows, row_ids[outcomes])
                self._count_faults(result)
                outcomes[outcomes] = result.outcomes
        num_good = int(np.count_nonzero(outcomes))
        self._recorder.add_read(num_good, slots.size - num_good, time.perf_counter() - started)
        return outcomes

    def write(self, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> Outcomes:
        """Writes rows to slots; see `Tier.write`. Not synced: after a power cut digests tell what is good."""
        check_rows(rows, "rows", self.layout.slot_bytes)
        check_ids(slots, "slots", self.num_slots)
        check_ids(row_ids, "row_ids", rows.shape[0], slots.size)
        started = time.perf_counter()
        outcomes = np.zeros(slots.size, dtype=np.bool_)
        with self._using_file() as file:
            if file is None:
                self._fault("unavailable", slots.size)
            elif slots.size:
                outcomes = self._write(file, slots, rows, row_ids)
        num_good = int(np.count_nonzero(outcomes))
        self._recorder.add_write(num_good, slots.size - num_good, time.perf_counter() - started)
        return outcomes

    def stats(self) -> TierStats:
        """Counters; `path` is "O_DIRECT", "buffered" or "unavailable"."""
        file = self._file
        path = "unavailable" if file is None else "O_DIRECT" if file.is_direct else "buffered"
        return self._recorder.snapshot(self.name, self.num_slots, path)

    def close(self) -> None:
        """Waits up to 30 s for calls in progress, closes the index and gives the lock back. Idempotent."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            if not self._state.wait_for(lambda: not self._users, _CLOSE_TIMEOUT_S):
                logger.warning("%s: calls still running after %g s; closing anyway", self.folder, _CLOSE_TIMEOUT_S)
            file, self._file = self._file, None
            if file is not None and file not in self._users:
                file.close()  # otherwise its last user closes it
        self._io.close()
        self._journal.close()
        self._namespace.close()

    def _recover(self, file: BlockFile, existed: bool, refusal: str | None) -> None:
        """Compares what the index says with how long the file is."""
        if refusal is not None:
            self._fault("index_format", detail=refusal)
        self._fault("index_damaged", self._journal.num_damaged)
        found = self._journal.recovered
        size_bytes = os.fstat(file.fd).st_size
        is_whole = (found.slots + 1) * self.layout.slot_bytes <= size_bytes
        if found.names and not existed:
            self._fault("missing")
            self._journal.clear()
        elif not is_whole.all():
            lost = _selected(found, ~is_whole)
            self._fault("truncated", len(lost.names))
            self._journal.drop(lost.names, lost.slots)
        self._recovered = _selected(found, is_whole)
        self._is_present[self._recovered.slots] = True
        limit_bytes = self.num_slots * self.layout.slot_bytes
        if size_bytes > limit_bytes:  # the capacity is smaller than last time
            os.ftruncate(file.fd, limit_bytes)
        self._allocated_bytes = min(size_bytes, limit_bytes)
        self._namespace.make_room(self._allocated_bytes, self._capacity_bytes)

    @contextlib.contextmanager
    def _using_file(self) -> Iterator[BlockFile | None]:
        """The file, kept open during the call; None when it is gone and cannot be made again."""
        with self._state:
            if self._closed:
                raise TierClosedError(f"the disk tier in {self.folder} is closed")
            file = self._checked_file()
            if file is None:
                users = 0
            else:
                users = self._users.get(file, 0)
                self._users[file] = users + 1
        try:
            yield file
        finally:
            if file is not None:
                with self._state:
                    self._users[file] -= 1
                    if self._users[file] == 0:
                        del self._users[file]
                        if file is not self._file:
                            file.close()
                        self._state.notify_all()

    def _checked_file(self) -> BlockFile | None:
        """The current file after a look at whether it still exists under its name; holds `_state`."""
        file = self._file
        if file is not None:
            status = os.fstat(file.fd)
            if status.st_nlink:
                if status.st_size < self._allocated_bytes:
                    self._forget_beyond(status.st_size)
                return file
            self._fault("deleted")
            self._is_present[:] = False
            self._generation += 1
            self._file = None
            if file not in self._users:
                file.close()
        try:
            self._namespace.restore()
            self._file = BlockFile(self._namespace.blocks_path)
        except (OSError, TierBusyError):
            return None
        self._allocated_bytes = 0
        self._journal.clear()
        return self._file

    def _forget_beyond(self, size_bytes: int) -> None:
        """Takes note that somebody cut the file; holds `_state`."""
        cut = self._is_present[size_bytes // self.layout.slot_bytes :]
        self._fault("truncated", int(np.count_nonzero(cut)))
        cut[:] = False
        self._allocated_bytes = size_bytes

    def _write(self, file: BlockFile, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> Outcomes:
        ends = (slots + 1) * self.layout.slot_bytes
        if int(ends.max()) > self._allocated_bytes:
            self._grow(file, int(ends.max()))
        outcomes = ends <= self._allocated_bytes
        if not outcomes.any():
            return outcomes
        written_slots = slots[outcomes]
        with self._state:
            self._is_present[written_slots] = False
        result = self._io.write(file, written_slots, rows, row_ids[outcomes])
        self._count_faults(result)
        outcomes[outcomes] = result.outcomes
        with self._state:
            if file is not self._file:  # deleted meanwhile: the bytes went with it
                outcomes[:] = False
            self._is_present[slots[outcomes]] = True
        return outcomes

    def _grow(self, file: BlockFile, end: int) -> None:
        """Preallocates at least up to byte `end`; where that fails, `_allocated_bytes` stays as it is."""
        limit_bytes = self.num_slots * self.layout.slot_bytes
        with self._growing:
            start = self._allocated_bytes
            if end <= start or file is not self._file:
                return
            target = min(-(-end // self._extent_bytes) * self._extent_bytes, limit_bytes)
            if not self._namespace.make_room(target, self._capacity_bytes):
                target = end
                if not self._namespace.make_room(target, self._capacity_bytes):
                    self._fault("over_capacity")
                    return
            try:
                try:
                    _allocate(file.fd, start, target)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or target == end:
                        raise
                    target = end  # not a whole extent left: take what this call needs
                    _allocate(file.fd, start, target)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                self._fault("disk_full" if full else "io_error", detail=str(error))
                return
            with self._state:
                if file is self._file:
                    self._allocated_bytes = max(self._allocated_bytes, target)

    def _count_faults(self, result: IOResult) -> None:
        for kind, count in result.faults.items():
            self._fault(kind, count)

    def _fault(self, kind: str, count: int = 1, detail: str = "") -> None:
        if self._recorder.add_fault(kind, count):
            suffix = f" ({detail})" if detail else ""
            logger.warning("disk tier %s: %s%s", self.folder, _FAULT_MESSAGES[kind], suffix)


def _open_journal(path: Path, num_slots: int, layout: BlockLayout, fingerprint: bytes) -> tuple[Journal, str | None]:
    """The index, and why what was there before could not be used, if so: then it starts empty."""
    fingerprint += layout.slot_bytes.to_bytes(8, "little")
    try:
        return Journal.open(path, num_slots, fingerprint), None
    except JournalFormatError as error:
        return Journal.create(path, num_slots, fingerprint), str(error)


def _allocate(fd: int, start: int, end: int) -> None:
    """Reserves [start, end) of a file, or only extends it where the file system cannot reserve."""
    try:
        os.posix_fallocate(fd, start, end - start)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(fd, end)


def _selected(blocks: RecoveredBlocks, chosen: Outcomes) -> RecoveredBlocks:
    if chosen.all():
        return blocks
    picks = np.flatnonzero(chosen).tolist()
    return RecoveredBlocks(
        [blocks.names[i] for i in picks],
        [blocks.parents[i] for i in picks],
        blocks.slots[chosen],
        blocks.digests[chosen],
    )
