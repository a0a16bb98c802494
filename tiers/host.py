"""G2: one arena of host memory, pinned when CUDA is there. Its rows are where all tiers meet."""

import contextlib
import logging
import time
from collections.abc import Callable
from threading import Lock

import numpy as np
import torch

from dynamo.kernels.checks import Rows, SlotIds, check_ids
from dynamo.kernels.copy import copy_rows
from dynamo.tiers.arena import available_memory_bytes, map_rows, prefault
from dynamo.tiers.errors import TierClosedError, TierConfigError, TierMemoryError
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.stats import TierRecorder, TierStats
from dynamo.tiers.tier import Outcomes

__all__ = ["HostTier"]

logger = logging.getLogger(__name__)

_REGISTER_PORTABLE_MAPPED = 0x1 | 0x2  # cudaHostRegisterPortable | cudaHostRegisterMapped


class HostTier:
    """Slots in one mmap arena, resident from the start, registered with CUDA where CUDA is available.

    Owns the arena. Other tiers copy straight into and out of `rows`; slot i is row i.
    """

    name = "host"

    def __init__(self, layout: BlockLayout, num_slots: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Maps and touches the whole arena; takes about a second per few GiB.

        Args:
            layout: sizes of a block.
            num_slots: blocks, at least 1.
            progress: called with (bytes ready, bytes in total) while memory is being touched.

        Raises:
            TierConfigError: num_slots is not positive.
            TierMemoryError: the machine or this process's cgroup has less memory available than the arena needs.
        """
        if num_slots < 1:
            raise TierConfigError(
                f"the host tier needs at least 1 block of {layout.slot_bytes} bytes, got {num_slots}; give it more"
            )
        needed_bytes = num_slots * layout.slot_bytes
        available_bytes = available_memory_bytes()
        if available_bytes is not None and needed_bytes > available_bytes:
            raise TierMemoryError(
                f"the host tier needs {needed_bytes / 2**30:.2f} GiB, {available_bytes / 2**30:.2f} GiB are available; "
                "make it smaller or free memory",
                needed_bytes=needed_bytes,
                available_bytes=available_bytes,
            )
        self.layout = layout
        self.num_slots = num_slots
        self._recorder = TierRecorder(layout.block_bytes)
        self._lock = Lock()
        self._rows: Rows | None = map_rows(layout, num_slots)
        prefault(self._rows, progress)
        self._pinned = _register(self._rows)

    @property
    def rows(self) -> Rows:
        """The arena, uint8 [num_slots, slot_bytes], page-aligned. Whoever was given a slot may write its row.

        Raises:
            TierClosedError: the tier is closed.
        """
        rows = self._rows
        if rows is None:
            raise TierClosedError("the host tier is closed")
        return rows

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
        """Counters; `path` is "pinned" or "pageable"."""
        return self._recorder.snapshot(self.name, self.num_slots, "pinned" if self._pinned else "pageable")

    def close(self) -> None:
        """Unregisters the arena from CUDA and lets go of it. Idempotent.

        The memory itself is unmapped when the last view of `rows` is gone, so views that are still held stay valid (but
        pageable); nothing on a GPU may be copying from or to them.
        """
        with self._lock:
            rows, self._rows = self._rows, None
            if rows is not None and self._pinned:
                _unregister(rows)


def _register(rows: Rows) -> bool:
    """Pins the arena for CUDA. False, logged, when it cannot be: copies then go through pageable memory."""
    if not torch.cuda.is_available():
        return False
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(rows.ctypes.data, rows.nbytes, _REGISTER_PORTABLE_MAPPED))
    if code == 0:
        return True
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # the failed registration fails the next kernel launch: let it be this one
    logger.warning(
        "the host tier's %d bytes could not be pinned (CUDA error %d): copies to the GPU are slower; "
        "check `ulimit -l` and free memory",
        rows.nbytes,
        code,
    )
    return False


def _unregister(rows: Rows) -> None:
    torch.cuda.synchronize()
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostUnregister(rows.ctypes.data))
    if code != 0:
        logger.warning("the host tier's memory could not be unpinned (CUDA error %d)", code)
