"""The part of a disk tier that lies in one directory: a file of slots, its I/O threads, and what goes wrong with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Lock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import Rows, SlotIds
from dynamo.tiers.block_file import BlockFile, fault_kind
from dynamo.tiers.errors import TierBusyError, TierClosedError
from dynamo.tiers.identity import StripeIdentity, write_identity
from dynamo.tiers.namespace import Namespace
from dynamo.tiers.outage import Outage
from dynamo.tiers.slot_io import IOResult, PendingIO, SlotIO
from dynamo.tiers.tier import Outcomes

if TYPE_CHECKING:
    import torch

__all__ = ["ABSENT", "FaultReport", "Generations", "IOTarget", "Stripe"]

_MAX_EXTENT_BYTES = 64 << 20
_MIN_EXTENTS = 16  # a small capacity is taken in smaller steps, so that other models do not make way for nothing
_DISK_FAULTS = frozenset({"io_error", "read_only", "no_permission"})  # which a disk has as a whole, and may get over

ABSENT = np.uint64(0)
"""Generation of a slot that holds nothing, or is being written."""

FaultReport = Callable[[str, int, str], None]
"""Takes a fault's kind, how many blocks it hit and a detail for the log."""

Generations = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class IOTarget:
    """Memory that slots are moved from or to, and the back-end for that kind of memory: None for the stripe's own."""

    rows: Rows | torch.Tensor
    io: SlotIO | None = None


class Stripe:
    """Slots in `blocks.dat` of one folder. Thread-safe; owns the file and the I/O threads.

    Slots are numbered within the stripe here. Every slot has a generation: a number that no other content of that slot had
    before, and `ABSENT` from before its bytes begin to change until they are all there. A read takes the generations before
    it starts and compares them when it is done. A write that was under way at the start shows as `ABSENT`, one that began
    later as another number, so what passes was not touched in between; this is a seqlock's argument, per slot.
    """

    def __init__(
        self,
        namespace: Namespace,
        identity: StripeIdentity,
        io: SlotIO,
        num_slots: int,
        capacity_bytes: int,
        report: FaultReport,
        on_emptied: Callable[[], None],
    ) -> None:
        """Opens the file; takes over `io` when it returns.

        Args:
            namespace: the locked folder; must stay so until `close`.
            identity: what the folder is part of, written anew should the folder be deleted.
            io: how bytes move.
            num_slots: slots of this stripe.
            capacity_bytes: what all namespaces in the directory may take together.
            report: told of every fault.
            on_emptied: called when a deleted file was made anew, before anything is written to it; must not call back.

        Raises:
            OSError: the file cannot be opened.
        """
        self.namespace = namespace
        self.is_new = not namespace.blocks_path.exists()
        self._identity = identity
        self._slot_bytes = identity.slot_bytes
        self._io = io
        self._report = report
        self._on_emptied = on_emptied
        self._read_outage, self._write_outage = Outage(), Outage()
        self._growing = Lock()  # taken before _state
        self._state = Condition()  # guards all below
        self._closed = False
        self._num_slots = num_slots
        self._capacity_bytes = capacity_bytes
        self._users: dict[BlockFile, int] = {}
        self._generations: Generations = np.zeros(num_slots, dtype=np.uint64)
        self._last_generation = 1
        self._num_losses = 0
        self._file: BlockFile | None = BlockFile(namespace.blocks_path)
        self._allocated_bytes = os.fstat(self._file.fd).st_size

    @property
    def num_whole_slots(self) -> int:
        """Slots that lie within the file."""
        return self._allocated_bytes // self._slot_bytes

    @property
    def num_losses(self) -> int:
        """How often the file was deleted and everything in it lost."""
        return self._num_losses

    @property
    def path(self) -> str:
        """ "O_DIRECT", "buffered" or "unavailable"."""
        file = self._file
        return "unavailable" if file is None else "O_DIRECT" if file.is_direct else "buffered"

    def recover(self, slots: SlotIds) -> None:
        """Declares what the index says to be there; slots beyond the file's end must not be among them. Call once, first.

        Raises:
            OSError: a file longer than the stripe cannot be cut.
        """
        self._generations[slots] = 1
        file, limit_bytes = self._file, self._num_slots * self._slot_bytes
        if file is not None and self._allocated_bytes > limit_bytes:  # the capacity is smaller than last time
            os.ftruncate(file.fd, limit_bytes)
            self._allocated_bytes = limit_bytes
        self.namespace.make_room(self._allocated_bytes, self._capacity_bytes)

    def generations(self, slots: SlotIds) -> Generations:
        """Of each slot, uint64 [n]; `ABSENT` where nothing is."""
        with self._state:
            return self._generations[slots]

    def resize(self, num_slots: int) -> None:
        """Changes the number of slots, and the capacity with it; a shorter file gives its space back.

        Nobody may use the slots beyond any more.
        """
        with self._growing, self._state:
            if num_slots > self._generations.size:
                grown = np.zeros(num_slots, dtype=np.uint64)
                grown[: self._generations.size] = self._generations
                self._generations = grown
            self._generations[num_slots:] = ABSENT  # not cut: a late reader must find its numbers outdated, not missing
            limit_bytes = num_slots * self._slot_bytes
            self._num_slots, self._capacity_bytes = num_slots, limit_bytes
            if self._file is not None and self._allocated_bytes > limit_bytes:
                try:
                    os.ftruncate(self._file.fd, limit_bytes)
                except OSError as error:  # the file keeps its length, and the slots beyond are gone all the same
                    self._report(fault_kind(error), 1, str(error))
                else:
                    self._allocated_bytes = limit_bytes

    def close(self, timeout_s: float) -> None:
        """Waits up to `timeout_s` for calls in progress, then gives file and threads back, not the lock. Idempotent."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            if not self._state.wait_for(lambda: not self._users, timeout_s):
                self._report("still_used", 1, "")
            file, self._file = self._file, None
            if file is not None and file not in self._users:
                file.close()  # otherwise its last user closes it
        self._io.close()

    def acquire_file(self) -> BlockFile | None:
        """The file, kept open until `release_file`; None when it is gone and cannot be made again.

        Raises:
            TierClosedError: the stripe is closed.
        """
        with self._state:
            if self._closed:
                raise TierClosedError(f"the disk tier in {self.namespace.folder} is closed")
            file = self._checked_file()
            if file is not None:
                self._users[file] = self._users.get(file, 0) + 1
            return file

    def release_file(self, file: BlockFile) -> None:
        """Ends one use of a file; the last one of a file that was given up closes it."""
        with self._state:
            self._users[file] -= 1
            if self._users[file] == 0:
                del self._users[file]
                if file is not self._file:
                    file.close()
                self._state.notify_all()

    def begin(
        self, file: BlockFile, slots: SlotIds, target: IOTarget, row_ids: SlotIds, *, writes: bool
    ) -> PendingIO | None:
        """Starts I/O on an acquired file; None, and counted, while the disk is left alone."""
        outage = self._write_outage if writes else self._read_outage
        if outage.is_resting:
            self._report("resting", slots.size, "")
            return None
        io = self._io if target.io is None else target.io
        return io.start(file, slots, target.rows, row_ids, writes=writes)

    def finish(self, pending: PendingIO, *, writes: bool) -> Outcomes:
        """Outcomes of what `begin` started; faults are counted, and remembered for the next pause."""
        result = pending.result()
        self._count_faults(result)
        failed = bool(_DISK_FAULTS & result.faults.keys()) and not result.outcomes.any()
        (self._write_outage if writes else self._read_outage).note(not failed)
        return result.outcomes

    def mark_absent(self, slots: SlotIds) -> None:
        """Before slots are overwritten: whoever reads them now must not believe what it gets."""
        with self._state:
            self._generations[slots] = ABSENT

    def mark_present(self, file: BlockFile, slots: SlotIds) -> bool:
        """After slots were written to `file`. False when that file is gone meanwhile, and the bytes with it."""
        with self._state:
            if file is not self._file:
                return False
            self._last_generation += 1
            self._generations[slots] = self._last_generation
            return True

    def report(self, kind: str, count: int, detail: str = "") -> None:
        """Counts a fault."""
        self._report(kind, count, detail)

    def make_room(self, file: BlockFile, slots: SlotIds) -> Outcomes:
        """Preallocates for slots where needed; which of them lie within the file then, bool [n]."""
        ends = (slots + 1) * self._slot_bytes
        last_end = int(ends.max())
        if last_end > self._allocated_bytes and not self._write_outage.is_resting:
            self._grow(file, last_end)
        return ends <= self._allocated_bytes

    def _checked_file(self) -> BlockFile | None:
        """The current file after a look at whether it still exists under its name; holds `_state`."""
        file = self._file
        if file is not None:
            status = os.fstat(file.fd)
            if status.st_nlink:
                if status.st_size < self._allocated_bytes:
                    self._forget_beyond(status.st_size)
                return file
            self._report("deleted", 1, "")
            self._generations[:] = ABSENT
            self._num_losses += 1
            self._file = None
            if file not in self._users:
                file.close()
        if self._write_outage.is_resting:
            return None
        try:
            self.namespace.restore()
            write_identity(self.namespace.identity_path, self._identity)
            self._file = BlockFile(self.namespace.blocks_path)
        except (OSError, TierBusyError):
            self._write_outage.note(False)
            return None
        self._write_outage.note(True)
        self._allocated_bytes = 0
        self._on_emptied()
        return self._file

    def _forget_beyond(self, size_bytes: int) -> None:
        """Takes note that somebody cut the file; holds `_state`."""
        cut = self._generations[size_bytes // self._slot_bytes :]
        self._report("truncated", int(np.count_nonzero(cut)), "")
        cut[:] = ABSENT
        self._allocated_bytes = size_bytes

    def _grow(self, file: BlockFile, end: int) -> None:
        """Preallocates at least up to byte `end`; where that fails, `_allocated_bytes` stays as it is."""
        with self._growing:
            start = self._allocated_bytes
            if end <= start or file is not self._file:
                return
            target = self._extent_end(end)
            if not self.namespace.make_room(target, self._capacity_bytes):
                target = end
                if not self.namespace.make_room(target, self._capacity_bytes):
                    self._report("over_capacity", 1, "")
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
                kind = fault_kind(error)
                self._report(kind, 1, str(error))
                if kind in _DISK_FAULTS:
                    self._write_outage.note(False)
                return
            with self._state:
                if file is self._file:
                    self._allocated_bytes = max(self._allocated_bytes, target)

    def _extent_end(self, end: int) -> int:
        slots = min(_MAX_EXTENT_BYTES // self._slot_bytes, self._num_slots // _MIN_EXTENTS)
        extent_bytes = max(1, slots) * self._slot_bytes
        return min(-(-end // extent_bytes) * extent_bytes, self._num_slots * self._slot_bytes)

    def _count_faults(self, result: IOResult) -> None:
        for kind, count in result.faults.items():
            self._report(kind, count, "")


def _allocate(fd: int, start: int, end: int) -> None:
    """Reserves [start, end) of a file, or only extends it where the file system cannot reserve."""
    try:
        os.posix_fallocate(fd, start, end - start)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(fd, end)
