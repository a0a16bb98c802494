"""Looks for blocks that went bad on disk before somebody needs them: slowly, and only when nobody else uses the disk."""

import logging
import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dynamo.kernels.checks import KernelArgumentError, Rows, SlotIds
from dynamo.kernels.digest import digest_rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierClosedError, TierConfigError
from dynamo.tiers.name_table import Names
from dynamo.tiers.records import names_of
from dynamo.tiers.stripe import ABSENT

__all__ = ["BadBlocks", "ScrubStats", "Scrubber"]

logger = logging.getLogger(__name__)

_BATCH_BYTES = 4 << 20
_QUIET_S = 0.25  # the disk counts as idle when nobody has used it for so long
_NO_BLOCKS_S = 1.0  # pause after a look at the last slots that found nothing to read
_WINDOW_SLOTS = 1 << 16


@dataclass(frozen=True, slots=True)
class BadBlocks:
    """Blocks that are not what was written, or cannot be read.

    Attributes:
        names: uint8 [n, 16].
        slots: where they lie, int64 [n].
    """

    names: Names
    slots: SlotIds


@dataclass(frozen=True, slots=True)
class ScrubStats:
    """What a scrubber has done.

    Attributes:
        num_passes: how often it came to the end of the tier.
        num_checked: blocks read and digested.
        num_corrupt: blocks that did not match their digest.
        num_unreadable: blocks that could not be read while others near them could.
        checked_bytes: bytes read.
    """

    num_passes: int = 0
    num_checked: int = 0
    num_corrupt: int = 0
    num_unreadable: int = 0
    checked_bytes: int = 0


class Scrubber:
    """Walks over the slots of a disk tier, on a thread of its own, round after round.

    A slot that is written to meanwhile is passed over: the read then fails, since its generation has changed. A disk that can
    read nothing at all is not believed to have lost everything; only when some blocks of a batch are readable are the others
    reported.
    """

    def __init__(
        self,
        disk: DiskTier,
        on_bad: Callable[[BadBlocks], None],
        *,
        bytes_per_s: float,
        quiet_s: float = _QUIET_S,
    ) -> None:
        """Starts the thread.

        Args:
            disk: the tier; stays open until `close`.
            on_bad: told of bad blocks, on the scrubber's thread. A name may have left its slot since.
            bytes_per_s: how fast to read at most, on average.
            quiet_s: how long nobody must have used the disk before a batch is read.

        Raises:
            TierConfigError: `bytes_per_s` is not positive.
        """
        if not bytes_per_s > 0:
            raise TierConfigError(f"a scrubber of {bytes_per_s} bytes a second checks nothing; give more, or have none")
        self._disk = disk
        self._on_bad = on_bad
        self._bytes_per_s = bytes_per_s
        self._quiet_s = quiet_s
        slot_bytes = disk.layout.slot_bytes
        num_rows = max(1, _BATCH_BYTES // slot_bytes)
        self._rows: Rows = np.frombuffer(mmap.mmap(-1, num_rows * slot_bytes), dtype=np.uint8).reshape(-1, slot_bytes)
        self._changed = threading.Condition()  # guards all below
        self._is_closed = False
        self._is_paused = False
        self._stats = ScrubStats()
        self._thread = threading.Thread(target=self._run, name="kv-scrub", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> ScrubStats:
        """Counters until now."""
        return self._stats

    def pause(self) -> None:
        """Stops before the next batch until `resume`."""
        with self._changed:
            self._is_paused = True

    def resume(self) -> None:
        """Goes on after `pause`."""
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Ends the thread after its batch, within `timeout_s`; one that hangs is left behind. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("the scrubber is still reading after %g s; going on without it", timeout_s)

    def _run(self) -> None:
        position = 0
        try:
            while self._wait_for_turn():
                started_s = time.monotonic()
                try:
                    num_bytes, position = self._check_from(position)
                except KernelArgumentError:  # the tier was made smaller meanwhile
                    num_bytes = position = 0
                pause_s = num_bytes / self._bytes_per_s
                self._sleep(started_s + (pause_s if num_bytes or position else _NO_BLOCKS_S))
        except TierClosedError:
            logger.debug("the disk tier was closed before its scrubber")
        except Exception:
            logger.exception(
                "checking the blocks on disk failed and is given up; they are still checked when they are read"
            )

    def _check_from(self, position: int) -> tuple[int, int]:
        """Checks the next batch of slots from `position` on; (bytes to account for, where to go on, 0 after the last)."""
        disk = self._disk
        window = np.arange(position, min(position + _WINDOW_SLOTS, disk.num_slots))
        held = window[disk.generations(window) != ABSENT]
        slots = held[: len(self._rows)]
        if slots.size:
            self._check(slots)
        position = int(slots[-1]) + 1 if slots.size < held.size else position + window.size
        if position >= disk.num_slots:
            position = 0
            self._count(num_passes=1)
        return slots.size * disk.layout.slot_bytes, position

    def _check(self, slots: SlotIds) -> None:
        disk, rows = self._disk, self._rows
        generations = disk.generations(slots)  # before the names: a name that is newer than its bytes fails the read
        records = disk.journal.records_in(slots)
        named = records["slot"].astype(np.int64)
        generations = generations[np.searchsorted(slots, named)]
        row_ids = np.arange(named.size)
        readable = disk.inspect(named, rows, row_ids, generations)
        digests = digest_rows(rows, row_ids, np.ascontiguousarray(records["name"][:, 0]), disk.layout.block_bytes)
        is_same = disk.generations(named) == generations
        is_same &= disk.journal.generations(named) == records["sequence"]
        is_corrupt = is_same & readable & (digests != records["digest"])
        is_unreadable = is_same & ~readable & readable.any()
        is_bad = is_corrupt | is_unreadable
        self._count(
            num_checked=int(np.count_nonzero(readable)),
            num_corrupt=int(np.count_nonzero(is_corrupt)),
            num_unreadable=int(np.count_nonzero(is_unreadable)),
        )
        if is_bad.any():
            self._on_bad(BadBlocks(names_of(records, "name")[is_bad], named[is_bad]))

    def _count(
        self, *, num_passes: int = 0, num_checked: int = 0, num_corrupt: int = 0, num_unreadable: int = 0
    ) -> None:
        stats = self._stats
        self._stats = ScrubStats(
            stats.num_passes + num_passes,
            stats.num_checked + num_checked,
            stats.num_corrupt + num_corrupt,
            stats.num_unreadable + num_unreadable,
            stats.checked_bytes + num_checked * self._disk.layout.slot_bytes,
        )

    def _wait_for_turn(self) -> bool:
        """Waits until the disk is idle and nobody has paused us; False when closed."""
        with self._changed:
            while not self._is_closed:
                busy_s = self._quiet_s - self._disk.idle_s
                if self._is_paused:
                    self._changed.wait()
                elif busy_s > 0:
                    self._changed.wait(busy_s)
                else:
                    return True
            return False

    def _sleep(self, until_s: float) -> None:
        """Keeps to the byte rate."""
        with self._changed:
            while not self._is_closed and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
