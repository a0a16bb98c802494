"""Gives the host and disk tiers another size while they are in use."""

import time
from threading import Lock

from dynamo.kvcache.config import format_size
from dynamo.kvcache.errors import CacheConfigError, CacheMemoryError
from dynamo.kvcache.shelf import Shelf
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.host import HostTier
from dynamo.tiers.memory import available_memory_bytes

__all__ = ["TierResizer", "check_index_fits"]

_INDEX_BYTES = 377  # of memory for a block on disk, all books together; `perf index` measures it


class TierResizer:
    """Resizes one tier at a time. Thread-safe; owns neither books nor tiers.

    Room is made in the books first and only then taken from the tier, the other way round where a tier grows.
    """

    def __init__(self, shelf: Shelf, host: HostTier, disk: DiskTier | None) -> None:
        self._shelf = shelf
        self._host = host
        self._storages: dict[str, HostTier | DiskTier | None] = {"host": host, "disk": disk}
        self._slot_bytes = host.layout.slot_bytes
        self._resizing = Lock()

    def resize(self, tier: str, num_bytes: int, timeout_s: float) -> int:
        """Gives "host" or "disk" another size; what has no room is evicted.

        Returns:
            The tier's number of slots from now on.

        Raises:
            CacheConfigError: there is no such tier, or the size holds no block, or none in each directory.
            CacheMemoryError: the index of so large a disk tier does not fit into memory.
            TimeoutError: slots beyond are still in use after `timeout_s`. They are given to nobody any more, and their
                memory or disk space is given back with the next call. Or another resize still waits for such slots.
            dynamo.tiers.errors.TierError: the tier cannot have that size.
        """
        storage, pool = self._storages[tier], self._shelf.pool(tier)
        if storage is None or not pool.num_slots:
            raise CacheConfigError(f"the cache has no {tier} tier to resize")
        num_slots = num_bytes // self._slot_bytes
        self._check_size(tier, storage, num_slots, num_bytes)
        deadline = time.monotonic() + timeout_s
        if not self._resizing.acquire(timeout=timeout_s):
            raise TimeoutError("another resize still waits for blocks in use")
        try:
            if tier == "disk":
                check_index_fits(num_slots - storage.num_slots)
            if num_slots > storage.num_slots:
                storage.resize(num_slots)
            if not self._shelf.resize(tier, num_slots, max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"{pool.num_leaving} blocks of the {tier} tier are in use beyond its new size")
            if num_slots < storage.num_slots:
                storage.resize(num_slots)
        finally:
            self._resizing.release()
        return num_slots

    def _check_size(self, tier: str, storage: HostTier | DiskTier, num_slots: int, num_bytes: int) -> None:
        """Refuses what the tier would refuse, before anything is evicted for it."""
        num_folders = len(storage.folders) if isinstance(storage, DiskTier) else 1
        if num_slots < num_folders:
            where = f" in each of its {num_folders} directories" if num_folders > 1 else ""
            raise CacheConfigError(
                f"a {tier} tier of {format_size(num_bytes)} is less than one block of {format_size(self._slot_bytes)}"
                f"{where}; give more"
            )
        if tier == "host" and num_slots > self._host.max_slots:
            raise CacheConfigError(
                f"the host tier can have up to {format_size(self._host.max_slots * self._slot_bytes)}, not "
                f"{format_size(num_bytes)}; start with a larger maximum (host_max, --host-cache-max) to go beyond"
            )


def check_index_fits(num_blocks: int) -> None:
    """Refuses more blocks on disk than memory can keep books of, which would otherwise fail when the tier has filled up.

    Raises:
        CacheMemoryError: they need more memory than there is.
    """
    needed_bytes, available_bytes = num_blocks * _INDEX_BYTES, available_memory_bytes()
    if available_bytes is not None and needed_bytes > available_bytes:
        raise CacheMemoryError(
            f"the index of {num_blocks:,} blocks on disk takes {format_size(needed_bytes)} of memory when they are all there, "
            f"and {format_size(available_bytes)} are available; make the disk tier smaller, or its blocks larger",
            tier="disk",
            needed_bytes=needed_bytes,
            available_bytes=available_bytes,
        )
