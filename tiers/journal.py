"""Index of the disk tier: which block lies in which slot, kept in an append-only file that survives `kill -9`.

Appends are single writes without fsync. After a power cut the file may lack its last records or hold records whose
blocks never reached the disk; the digest in each record shows the latter when the block is read.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import SlotIds, check_ids
from dynamo.tiers.errors import JournalFormatError, TierClosedError
from dynamo.tiers.name_table import Names
from dynamo.tiers.plain_file import open_plain
from dynamo.tiers.records import (
    DROP,
    HEADER_BYTES,
    NAME_BYTES,
    PUT,
    RECORD,
    RECORD_BYTES,
    ROOT_NAME,
    Header,
    Records,
    chosen,
    make_records,
    names_of,
    record_checks,
    replay,
    surviving_puts,
)
from dynamo.tiers.recovered import RecoveredBlocks, read_records
from dynamo.tiers.slot_digests import DigestKind

__all__ = ["NAME_BYTES", "ROOT_NAME", "Journal"]

logger = logging.getLogger(__name__)

_COMPACT_ABOVE_LIVE = 2  # a log is rewritten when it is this many times longer than what is true ...
_MAX_SLOTS = 1 << 26  # what a header may claim: 64 million blocks
_COMPACT_ABOVE_RECORDS = 16384  # ... and by this much (1 MiB)


class Journal:
    """Append-only index of which block lies in which slot; thread-safe.

    Owns the file at its path and `path.tmp`. One process at a time (the disk tier's lock sees to that). Keeps the last
    record of every slot in memory, 64 bytes each, so that a log grown long can be rewritten.
    """

    def __init__(self, path: Path, num_slots: int, fingerprint: bytes) -> None:
        """Use `open` or `create`."""
        self.path = path
        self.num_slots = num_slots
        self._max_slots = num_slots  # it ever had
        self._fingerprint = fingerprint
        self._lock = Lock()
        self._live = np.zeros(num_slots, dtype=RECORD)
        self._num_records = 0
        self._next_sequence = 1
        self._compact_at = 0
        self._failed_once = False
        self._fd: int | None = None
        self._seed = np.uint64(0)
        self._num_damaged = 0
        self._recovered = RecoveredBlocks.empty()

    @classmethod
    def open(cls, path: Path, num_slots: int, fingerprint: bytes) -> "Journal":
        """Opens the index at `path` and reads what it holds, or creates an empty one where there is none.

        Args:
            path: the file; its folder exists.
            num_slots: slots of the tier; records of slots beyond are forgotten.
            fingerprint: names the model and layout the blocks belong to.

        Raises:
            JournalFormatError: the file is foreign, another version's or another fingerprint's. It is left as it is.
            OSError: the file cannot be read or created.
        """
        journal = cls(path, num_slots, fingerprint)
        _temporary(path).unlink(missing_ok=True)
        if path.exists():
            journal._load()
        else:
            journal._rewrite(np.zeros(0, dtype=RECORD))
        return journal

    @classmethod
    def create(cls, path: Path, num_slots: int, fingerprint: bytes) -> "Journal":
        """Starts an empty index at `path`, replacing whatever file is there.

        Raises:
            OSError: the file cannot be written.
        """
        journal = cls(path, num_slots, fingerprint)
        journal._rewrite(np.zeros(0, dtype=RECORD))
        return journal

    @property
    def recovered(self) -> RecoveredBlocks:
        """What the file held when it was opened. `DiskTier.recovered` leaves out what lies beyond the data file."""
        return self._recovered

    def release_recovered(self) -> None:
        """Frees the memory of `recovered`, which is empty from now on."""
        self._recovered = RecoveredBlocks.empty()

    @property
    def num_damaged(self) -> int:
        """Records that were skipped at open because their check failed."""
        return self._num_damaged

    def put(
        self,
        names: Sequence[bytes] | Names,
        parents: Sequence[bytes] | Names,
        slots: SlotIds,
        digests: npt.NDArray[np.uint64],
        digest_kind: DigestKind = DigestKind.XXH3,
    ) -> bool:
        """Records that blocks lie in slots; call it when their bytes are there. One write for the whole list.

        A later put wins over an earlier one of the same name or slot.

        Args:
            names: 16 bytes each, [n]; a list, or an array uint8 [n, 16].
            parents: 16 bytes each, ROOT_NAME for none, likewise.
            slots: int64 [n].
            digests: uint64 [n], given back at recovery.
            digest_kind: of what kind they all are; given back as well.

        Returns:
            False when nothing could be recorded (full disk, I/O error; logged once): treat the blocks as not stored.

        Raises:
            KernelArgumentError: lists of different length, wrong names or slots.
            TierClosedError: the journal is closed.
        """
        return self._append(PUT, names, parents, slots, digests, digest_kind)

    def drop(self, names: Sequence[bytes] | Names, slots: SlotIds) -> bool:
        """Records that blocks no longer lie in their slots. A name that is not in its slot is ignored.

        So is a slot that `resize` has taken away, with what lay there.

        Returns:
            False when it could not be recorded: the blocks may come back after a restart, and their digest then tells
            whether they are still good.

        Raises:
            KernelArgumentError: lists of different length, wrong names or slots.
            TierClosedError: the journal is closed.
        """
        return self._append(DROP, names, [ROOT_NAME] * len(names), slots, np.zeros(len(names), dtype=np.uint64))

    def forget(self, slots: SlotIds) -> bool:
        """Drops whatever blocks lie in `slots`, one write for all; as `drop`."""
        live = self.records_in(slots)
        return self.drop(names_of(live, "name"), live["slot"].astype(np.int64))

    def records_in(self, slots: SlotIds) -> Records:
        """The records of those of `slots` that hold a block, as they are now; RECORD [m], in the order of `slots`."""
        check_ids(slots, "slots", self._max_slots)
        with self._lock:
            slots = slots[slots < self.num_slots]
            return chosen(chosen(self._live, slots), self._live["kind"][slots] == PUT)

    def resize(self, num_slots: int) -> None:
        """Changes the number of slots; blocks in slots beyond are dropped.

        Raises:
            TierClosedError: the journal is closed.
        """
        if num_slots < self.num_slots:
            self.forget(np.arange(num_slots, self.num_slots))
        with self._lock:
            self._open_fd()
            live = np.zeros(num_slots, dtype=RECORD)
            num_kept = min(num_slots, self.num_slots)
            live.view(f"V{RECORD_BYTES}")[:num_kept] = self._live.view(f"V{RECORD_BYTES}")[:num_kept]
            self._live = live
            self.num_slots = num_slots
            self._max_slots = max(self._max_slots, num_slots)

    def clear(self) -> bool:
        """Forgets everything, on disk too before it returns.

        Returns:
            False when the file could not be emptied (logged once); the blocks may come back after a restart.

        Raises:
            TierClosedError: the journal is closed.
        """
        with self._lock:
            fd = self._open_fd()
            try:
                if os.fstat(fd).st_nlink:
                    os.ftruncate(fd, HEADER_BYTES)  # needs no space, unlike a new file
                    self._num_records = 0
                    self._live[:] = 0
                    os.fsync(fd)
                else:
                    self._rewrite(np.zeros(0, dtype=RECORD))
            except OSError as error:
                self._live[:] = 0
                self._log_failure(error)
                return False
            return True

    def close(self) -> None:
        """Makes what was recorded durable and closes the file. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, None
            if fd is not None:
                with contextlib.suppress(OSError):  # a full or failing disk: a shorter index, never a wrong one
                    os.fsync(fd)
                os.close(fd)

    def check_invariants(self) -> None:
        """Raises AssertionError when the records in memory or the file's length are wrong; for tests."""
        with self._lock:
            live = np.flatnonzero(self._live["kind"])
            assert (self._live["slot"][live] == live).all(), "a record in memory stands at another slot"
            assert (record_checks(self._live[live], self._seed) == self._live["check"][live]).all(), "a check is wrong"
            if self._fd is not None:
                length = os.fstat(self._fd).st_size
                expected = HEADER_BYTES + self._num_records * RECORD_BYTES
                assert length == expected, f"{self.path} has {length} bytes, {expected} were written"

    def _open_fd(self) -> int:
        if self._fd is None:
            raise TierClosedError(f"the index {self.path} is closed")
        return self._fd

    def _append(
        self,
        kind: int,
        names: Sequence[bytes] | Names,
        parents: Sequence[bytes] | Names,
        slots: SlotIds,
        digests: npt.NDArray[np.uint64],
        digest_kind: DigestKind = DigestKind.XXH3,
    ) -> bool:
        with self._lock:
            fd = self._open_fd()
            check_ids(slots, "slots", self.num_slots if kind == PUT else self._max_slots, len(names))
            records = make_records(kind, names, parents, slots, digests, self._next_sequence, self._seed, digest_kind)
            self._next_sequence += records.size
            records = chosen(records, records["slot"] < self.num_slots)
            if records.size == 0:
                return True
            try:
                if os.fstat(fd).st_nlink == 0:  # deleted under us: start a new file with what is still true
                    self._rewrite(self._live_records())
                    fd = self._open_fd()
                    records["check"] = record_checks(records, self._seed)
                self._write_at_end(fd, records)
            except OSError as error:
                self._log_failure(error)
                return False
            self._num_records += records.size
            self._remember(kind, records)
            if self._num_records > self._compact_at:
                self._compact()
            return True

    def _write_at_end(self, fd: int, records: Records) -> None:
        """Appends all or nothing: after a failure the file ends where it ended before."""
        end = HEADER_BYTES + self._num_records * RECORD_BYTES
        try:
            _write_all(fd, records.tobytes(), end)
        except OSError:
            with contextlib.suppress(OSError):  # the next append overwrites the rest, and a reader skips it
                os.ftruncate(fd, end)
            raise

    def _remember(self, kind: int, records: Records) -> None:
        slots = records["slot"].astype(np.int64)
        if kind == PUT:
            self._live[slots] = records  # of equal slots in one call the last wins, as in a replay
            return
        same = (self._live["name"][slots] == records["name"]).all(axis=1)
        self._live[slots[same]] = 0

    def _live_records(self) -> Records:
        return surviving_puts(chosen(self._live, self._live["kind"] == PUT))

    def _compact(self) -> None:
        """Rewrites the log when it is much longer than what is true. A failure is logged and tried again later."""
        num_live = int(np.count_nonzero(self._live["kind"]))
        self._compact_at = max(_COMPACT_ABOVE_LIVE * num_live + _COMPACT_ABOVE_RECORDS, self._num_records)
        if self._num_records <= _COMPACT_ABOVE_LIVE * num_live + _COMPACT_ABOVE_RECORDS:
            return
        try:
            self._rewrite(self._live_records())
        except OSError as error:
            self._compact_at = 2 * self._num_records
            self._log_failure(error)

    def _rewrite(self, records: Records) -> None:
        """Replaces the file by one holding exactly `records`; on OSError the old file goes on as it was."""
        header = Header.new(self._fingerprint, self.num_slots)
        records = records.copy()
        records["check"] = record_checks(records, header.seed)
        temporary = _temporary(self.path)
        temporary.unlink(missing_ok=True)  # left by a crash
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, header.to_bytes() + records.tobytes(), 0)
            os.fsync(fd)
            temporary.rename(self.path)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        old_fd, self._fd = self._fd, fd
        if old_fd is not None:
            os.close(old_fd)
        self._adopt(header, records, records.size)
        with contextlib.suppress(OSError):  # after a power cut the old file may be there again; it is as true as it was
            _sync_directory(self.path.parent)

    def _load(self) -> None:
        fd = open_plain(self.path, os.O_RDWR)
        try:
            header = Header.from_bytes(os.pread(fd, HEADER_BYTES, 0), self._fingerprint, self.path)
            self._check_length(fd, header)
            records = read_records(fd)
            os.ftruncate(fd, HEADER_BYTES + records.size * RECORD_BYTES)  # a record torn by a crash
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        good = chosen(records, record_checks(records, header.seed) == records["check"])
        self._num_damaged = records.size - good.size
        log = replay(good)
        live = log.records
        is_here = live["slot"] < self.num_slots
        self._recovered = RecoveredBlocks.from_log(log).selected(is_here)
        live = chosen(live, is_here)
        if good.size:
            self._next_sequence = int(good["sequence"].max()) + 1
        self._adopt(header, live, records.size)
        if not is_here.all():  # or they would be missed, or read as damaged, when the tier is made larger again
            try:
                self._rewrite(live)
            except OSError as error:
                self._log_failure(error)
        self._compact()

    def _check_length(self, fd: int, header: Header) -> None:
        """A log is compacted before it is much longer than its slots need; a far longer one is none of ours."""
        num_slots = min(max(self.num_slots, header.num_slots), _MAX_SLOTS)
        limit_bytes = HEADER_BYTES + RECORD_BYTES * 4 * (_COMPACT_ABOVE_LIVE * num_slots + _COMPACT_ABOVE_RECORDS)
        size_bytes = os.fstat(fd).st_size
        if size_bytes > limit_bytes:
            raise JournalFormatError(
                f"{self.path} has {size_bytes} bytes, an index of {num_slots} slots at most {limit_bytes}",
                path=self.path,
            )

    def _adopt(self, header: Header, live: Records, num_records: int) -> None:
        self._seed = header.seed
        self._live = np.zeros(self.num_slots, dtype=RECORD)  # fresh pages, faster than clearing the old ones
        self._live.view(f"V{RECORD_BYTES}")[live["slot"].astype(np.int64)] = live.view(f"V{RECORD_BYTES}")
        self._num_records = num_records
        self._compact_at = _COMPACT_ABOVE_LIVE * live.size + _COMPACT_ABOVE_RECORDS

    def _log_failure(self, error: OSError) -> None:
        if not self._failed_once:
            self._failed_once = True
            logger.warning("the disk tier's index %s cannot be written (%s): new blocks are not kept", self.path, error)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        view, offset = view[count:], offset + count


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
