"""G2: one arena of host memory, pinned when CUDA is there. Its rows are where all tiers meet."""

import dataclasses
import logging
import time
from collections.abc import Callable
from threading import Lock

import numpy as np

from dynamo.kernels.checks import Rows, SlotIds, check_ids
from dynamo.kernels.copy import copy_rows
from dynamo.tiers.arena import Arena, ResidentPages, prefault, resident_pages
from dynamo.tiers.errors import TierClosedError, TierConfigError, TierMemoryError
from dynamo.tiers.host_budget import HostBudget, Reservation
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.memory import check_available
from dynamo.tiers.numa import MemoryNode, choose_node, prefer_node
from dynamo.tiers.pinning import PinnedRows
from dynamo.tiers.stats import TierRecorder, TierStats
from dynamo.tiers.tier import Outcomes

__all__ = ["HostTier", "Progress"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes ready, bytes in total) while memory is being touched."""


class HostTier:
    """Slots in one mmap arena, resident from the start, registered with CUDA where CUDA is available.

    Owns the arena and its part of the machine's budget for KV caches. Other tiers copy straight into and out of `rows`:

    | rows                                | what                                                  | resident |
    | ----------------------------------- | ----------------------------------------------------- | -------- |
    | [0, num_slots)                      | slots; slot i is row i                                | yes      |
    | [num_slots, max_slots)              | address space that `resize` may make slots of         | no       |
    | [max_slots, max_slots + num_staging)| staging rows, for bytes on their way through the host | yes      |

    Attributes:
        max_slots: the most that `resize` can give; less than was asked for where the address space cannot be had.
        num_staging: staging rows.
        node: the memory node that the arena prefers, and why.
    """

    name = "host"

    def __init__(
        self,
        layout: BlockLayout,
        num_slots: int,
        *,
        num_staging: int = 0,
        max_slots: int | None = None,
        budget: HostBudget | None = None,
        progress: Progress | None = None,
        gpu: str | None = None,
    ) -> None:
        """Reserves from the budget, then maps and touches slots and staging rows; takes about a second per few GiB.

        Args:
            layout: sizes of a block.
            num_slots: blocks; with the staging rows at least 1.
            num_staging: rows behind the slots.
            max_slots: the most that `resize` may ask for; None for no more than now, and if pinned, no less either.
            budget: what all processes share; None for the machine's default one.
            progress: told while memory is being touched.
            gpu: PCI address such as "0000:17:00.0" of the GPU whose memory node is nearest.

        Raises:
            TierConfigError: there is no row at all, or a count does not fit the others.
            TierMemoryError: the budget, the machine or this process's cgroup has less memory left than is needed.
        """
        if num_slots < 0 or num_staging < 0 or num_slots + num_staging < 1:
            raise TierConfigError(
                f"the host tier needs at least 1 block of {layout.slot_bytes} bytes, got {num_slots} "
                f"and {num_staging} staging rows; give it more"
            )
        if max_slots is not None and max_slots < num_slots:
            raise TierConfigError(
                f"max_slots is {max_slots}, less than the {num_slots} blocks of now; give at least that"
            )
        self.layout = layout
        self.num_staging = num_staging
        self.node: MemoryNode = choose_node(gpu)
        self._is_resizable = max_slots is not None
        self._num_slots = 0
        self._num_resident = 0  # slots that memory is there for: more than num_slots where CUDA holds on to them
        self._recorder = TierRecorder(layout.block_bytes)
        self._lock = Lock()  # of `resize` and `close`
        self._pages: ResidentPages | None = None
        num_bytes = (num_slots + num_staging) * layout.slot_bytes
        purpose = "the host tier" if num_slots else "the buffer for transfers"  # nobody asked for a host tier
        check_available(num_bytes, purpose)
        self._reservation: Reservation = (budget or HostBudget()).reserve(num_bytes, purpose)
        try:
            self._arena, self.max_slots = _map(layout, num_slots, max_slots, num_staging)
            self._rows: Rows | None = self._arena.rows
            self._prefer_node()
            self._pinned = PinnedRows(self._arena.rows)
            self._make_resident(num_slots, progress)
        except BaseException:
            self._reservation.close()
            raise

    @property
    def num_slots(self) -> int:
        """Slots are numbered [0, num_slots)."""
        return self._num_slots

    @property
    def rows(self) -> Rows:
        """The arena, uint8 [max_slots + num_staging, slot_bytes], page-aligned.

        Whoever was given a slot or a staging row may write it; rows of neither kind must not be touched.

        Raises:
            TierClosedError: the tier is closed.
        """
        rows = self._rows
        if rows is None:
            raise TierClosedError("the host tier is closed")
        return rows

    @property
    def resident_bytes(self) -> int:
        """Memory that slots and staging rows take; after a pinned tier was made smaller, up to 1 GiB more than they need."""
        return (self._num_resident + self.num_staging) * self.layout.slot_bytes

    def resize(self, num_slots: int, progress: Progress | None = None) -> None:
        """Makes more slots resident, or gives the memory of the last ones back.

        To make the tier smaller, first see to it that nobody uses slots from `num_slots` on, or ever asks for them.

        Args:
            num_slots: from 1 on (0 with staging rows) up to `max_slots`.
            progress: told while memory is being touched.

        Raises:
            TierConfigError: the count is out of range.
            TierMemoryError: there is not so much memory, or CUDA refuses to pin it; the tier stays as it is.
            TierClosedError: the tier is closed.
        """
        if not (0 if self.num_staging else 1) <= num_slots <= self.max_slots:
            raise TierConfigError(
                f"the host tier can have up to {self.max_slots} blocks, got {num_slots}; "
                "start it with a larger maximum to go beyond that"
            )
        with self._lock:
            rows = self.rows
            needed_bytes = (num_slots + self.num_staging) * self.layout.slot_bytes
            if num_slots >= self._num_slots:
                check_available(max(0, num_slots - self._num_resident) * self.layout.slot_bytes, "the host tier")
                self._reservation.resize(max(needed_bytes, self.resident_bytes))
                try:
                    self._make_resident(num_slots, progress)
                except BaseException:
                    self._arena.give_back(self._num_resident, self.max_slots)
                    self._reservation.resize(self.resident_bytes)
                    raise
            else:
                self._num_slots = num_slots
                self._num_resident = self._pinned.release(num_slots, self._num_resident)
                self._arena.give_back(self._num_resident, self.max_slots)
                self._reservation.resize(self.resident_bytes)
                self._pages = resident_pages(rows)

    def read(self, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> Outcomes:
        """Copies slots to other rows; see `Tier.read`."""
        own_rows = self.rows
        check_ids(slots, "slots", self.num_slots)
        started = time.perf_counter()
        copy_rows(own_rows, slots, rows, row_ids)
        self._recorder.add_read(slots.size, 0, time.perf_counter() - started)
        return np.ones(slots.size, dtype=np.bool_)

    def write(self, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> Outcomes:
        """Copies other rows to slots; see `Tier.write`."""
        own_rows = self.rows
        check_ids(slots, "slots", self.num_slots)
        started = time.perf_counter()
        copy_rows(rows, row_ids, own_rows, slots)
        self._recorder.add_write(slots.size, 0, time.perf_counter() - started)
        return np.ones(slots.size, dtype=np.bool_)

    def count_read(self, num_blocks: int, seconds: float) -> None:
        """Counts blocks that another tier took straight out of `rows`."""
        self._recorder.add_read(num_blocks, 0, seconds)

    def count_write(self, num_blocks: int, seconds: float) -> None:
        """Counts blocks that another tier put straight into `rows`."""
        self._recorder.add_write(num_blocks, 0, seconds)

    def stats(self) -> TierStats:
        """Counters; `path` is "pinned" or "pageable", `page_bytes` the size of the pages really in use."""
        snapshot = self._recorder.snapshot(
            self.name, self.num_slots, "pinned" if self._pinned.is_pinned else "pageable"
        )
        return dataclasses.replace(snapshot, page_bytes=self._pages.page_bytes if self._pages else None)

    def close(self) -> None:
        """Unregisters the arena from CUDA, lets go of it and gives its budget back. Idempotent.

        The memory itself is unmapped when the last view of `rows` is gone, so views that are still held stay valid (but
        pageable); nothing on a GPU may be copying from or to them.
        """
        with self._lock:
            rows, self._rows = self._rows, None
            if rows is not None:
                self._pinned.close()
                self._reservation.close()
                del self._arena

    def _make_resident(self, num_slots: int, progress: Progress | None) -> None:
        """Touches and pins what is needed beyond what is there; holds `_lock`, or nobody else knows the tier yet."""
        rows = self._arena.rows
        fresh = [(self._num_resident, max(num_slots, self._num_resident))]
        if not self._pages:
            fresh.append((self.max_slots, self.max_slots + self.num_staging))
        total_bytes = sum(stop - start for start, stop in fresh) * self.layout.slot_bytes
        done_bytes = 0

        def advance(part_bytes: int, _: int) -> None:
            if progress is not None:
                progress(done_bytes + part_bytes, total_bytes)

        for start, stop in fresh:
            if stop > start:
                prefault(rows[start:stop], advance)
                done_bytes += (stop - start) * self.layout.slot_bytes
        if not self._pinned.add(fresh, can_shrink=self._is_resizable):
            raise TierMemoryError(
                f"CUDA does not pin {total_bytes} bytes more of host memory; the host tier stays at {self._num_slots} "
                "blocks; check `ulimit -l` and free memory",
                needed_bytes=total_bytes,
                available_bytes=None,
            )
        self._num_resident = max(num_slots, self._num_resident)
        self._num_slots = num_slots
        self._pages = resident_pages(rows)

    def _prefer_node(self) -> None:
        node = self.node.node
        if node is None:
            logger.debug("the host tier lies on any memory node: %s", self.node.reason)
        elif (refusal := prefer_node(self._arena.rows, node)) is None:
            logger.info("the host tier lies on memory node %d: %s", node, self.node.reason)
        else:
            logger.warning("the host tier cannot be put on memory node %d (%s): %s", node, self.node.reason, refusal)


def _map(layout: BlockLayout, num_slots: int, max_slots: int | None, num_staging: int) -> tuple[Arena, int]:
    """Address space for the most slots, or where that cannot be had for those of now; and how many slots that is."""
    if max_slots is not None and max_slots > num_slots:
        try:
            return Arena(layout, max_slots + num_staging, is_sparse=True), max_slots
        except TierMemoryError as error:
            logger.warning("the host tier cannot grow beyond its %d blocks: %s", num_slots, error)
    return Arena(layout, num_slots + num_staging), num_slots
