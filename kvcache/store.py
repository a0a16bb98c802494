"""Content-addressed blocks of the tiers below the device. This is the seam the device pool looks through.

The host arena is where all paths meet. Without a host tier it has staging rows only; with one, staging rows serve loads
when every host slot is pinned. Whatever fails makes a block uncached, never wrong.
"""

from collections.abc import Sequence

from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.offload import Offloader, SaveRequest
from dynamo.kvcache.onboard import LoadRequest, Onboarder
from dynamo.kvcache.pool import BlockPool
from dynamo.kvcache.shelf import Shelf
from dynamo.kvcache.stats import StoreCounters
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.host import HostTier
from dynamo.tiers.mover import Transfer

__all__ = ["PART_BYTES", "BlockStore"]

PART_BYTES = 8 << 20
"""One part of a transfer: large enough for the disk's full speed, small enough for two hops to overlap."""


class BlockStore:
    """Host and disk tiers behind one index: `count_loadable`, `load(keys → slots)`, `save(slots → keys)`. Thread-safe.

    Owns the arena, the disk tier and all threads; `close` ends them. Not the device tier.
    """

    def __init__(
        self,
        device: DeviceTier,
        arena: HostTier,
        num_host_slots: int,
        disk: DiskTier | None,
        events: EventLog,
        *,
        max_pending_blocks: int,
    ) -> None:
        """Starts the threads.

        Args:
            arena: rows `[0, num_host_slots)` are the host tier; the others, at least one, are staging rows.
            max_pending_blocks: offered blocks, and so device pins, that may wait for the offload thread.
        """
        part_blocks = max(1, PART_BYTES // device.layout.slot_bytes)
        self._arena = arena
        self._disk = disk
        self._shelf = Shelf(arena, num_host_slots, disk, events)
        self._offloader = Offloader(self._shelf, device, part_blocks=part_blocks, max_pending_blocks=max_pending_blocks)
        self._onboarder = Onboarder(self._shelf, device, part_blocks=part_blocks)
        self._is_closed = False

    @property
    def host(self) -> BlockPool:
        """The host tier's books, for statistics."""
        return self._shelf.host

    @property
    def disk(self) -> BlockPool:
        """The disk tier's books, for statistics."""
        return self._shelf.disk

    @property
    def counters(self) -> StoreCounters:
        """Faults, drops and loads since the store was made."""
        return self._shelf.counters

    @property
    def num_pending_blocks(self) -> int:
        """Offered blocks that lie in device memory only."""
        return self._offloader.num_pending_blocks

    @property
    def num_writing_blocks(self) -> int:
        """Blocks on their way from host memory to disk."""
        return self._offloader.num_writing_blocks

    def count_loadable(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first on, lie in host or disk."""
        return self._shelf.count_loadable(keys)

    def count_prefix(self, keys: Sequence[BlockKey]) -> tuple[int, int]:
        """How many of `keys`, from the first on, lie in host and in disk."""
        return self._shelf.count_prefix(keys)

    def load(self, request: LoadRequest, timeout_s: float) -> Transfer:
        """Starts loading blocks into device slots that the caller holds until the transfer has ended."""
        return self._onboarder.load(request, timeout_s)

    def save(self, request: SaveRequest, timeout_s: float) -> bool:
        """Offers blocks; waits while too many are pending, at most `timeout_s`. Returns whether the offer was taken."""
        return self._offloader.save(request, timeout_s)

    def touch(self, chain: list[BlockKey]) -> None:
        """Says that a sequence uses these blocks. Takes effect a little later."""
        self._offloader.touch(chain)

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything offered so far is in its tiers or dropped; False if that took longer than `timeout_s`."""
        return self._offloader.flush(timeout_s)

    def clear(self, tier: str) -> None:
        """Drops every block of "host" or "disk" that is not in use at this moment."""
        self._shelf.clear(tier)

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not balance."""
        self._shelf.check_invariants()

    def close(self, timeout_s: float) -> None:
        """Writes what is pending, for at most `timeout_s`, then ends threads and tiers. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._offloader.close(timeout_s)
        self._onboarder.close()
        if self._disk:
            self._disk.close()
        self._arena.close()
