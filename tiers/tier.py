"""The seam between the cache and a medium: slots that are read into, and written from, rows of host memory."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import Rows, SlotIds
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.stats import TierStats

__all__ = ["Outcomes", "Rows", "SlotIds", "Tier"]

Outcomes = npt.NDArray[np.bool_]
"""bool [n]: which of n blocks were moved. A False block's destination bytes are undefined."""


class Tier(Protocol):
    """A medium with `num_slots` slots of `layout.slot_bytes`.

    Every method may be called from any thread. Calls on disjoint slots and rows may run at the same time; who may touch
    which slot when is decided above. `rows` are uint8 [num_rows, slot_bytes], C-contiguous, page-aligned host memory,
    usually `HostTier.rows`. Slots of one call must be distinct.
    """

    @property
    def name(self) -> str:
        """ "device", "host" or "disk"."""

    @property
    def layout(self) -> BlockLayout:
        """Sizes of the blocks held."""

    @property
    def num_slots(self) -> int:
        """Slots are numbered [0, num_slots)."""

    def read(self, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> Outcomes:
        """Copies slot `slots[i]` to `rows[row_ids[i]]`, payload at least. Blocks until done.

        Returns:
            bool [n]; False where the medium failed. Failures of the medium never raise.

        Raises:
            KernelArgumentError: ids or rows do not fit; nothing was moved.
            TierClosedError: the tier is closed.
        """

    def write(self, slots: SlotIds, rows: Rows, row_ids: SlotIds) -> Outcomes:
        """Copies `rows[row_ids[i]]` to slot `slots[i]`, payload at least. Blocks until done.

        Returns:
            bool [n]; False where the medium failed and the slot's content is undefined. Never raises for that.

        Raises:
            KernelArgumentError: ids or rows do not fit; nothing was moved.
            TierClosedError: the tier is closed.
        """

    def stats(self) -> TierStats:
        """Counters since the tier was opened; also after close."""

    def close(self) -> None:
        """Ends the tier; calls in progress finish first. Idempotent."""
