"""The cache: a device pool over a block store."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, Self

import torch

from dynamo.kvcache.config import DiskPlace, format_size, parse_disk_place, parse_size
from dynamo.kvcache.errors import CacheClosedError, CacheConfigError, CacheMemoryError, OutOfBlocksError
from dynamo.kvcache.events import Event, EventLog
from dynamo.kvcache.hashing import BlockKey, ChainRoot, Tokens, block_keys, chain_root
from dynamo.kvcache.offload import SaveRequest
from dynamo.kvcache.onboard import LoadRequest
from dynamo.kvcache.pool import BlockPool, SlotIds
from dynamo.kvcache.sequence import Sequence
from dynamo.kvcache.spec import KVSpec
from dynamo.kvcache.stats import CacheStats, TierUsage
from dynamo.kvcache.store import PART_BYTES, BlockStore
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierBusyError, TierConfigError, TierMemoryError, TierUnavailableError
from dynamo.tiers.host import HostTier
from dynamo.tiers.stats import MovedBlocks, TierStats

__all__ = ["KVCache", "Residency", "TierName"]

logger = logging.getLogger(__name__)

TierName = Literal["device", "host", "disk"]

_PIN_WAIT_S = 0.05  # how long an allocation waits for blocks that are only held by their own offload
_OFFER_WAIT_S = 1.0  # how long a commit waits for a full offload queue before its blocks are not offered
_CLOSE_TIMEOUT_S = 30.0
_MAX_ROOTS = 1024
_NOTHING_MOVED = MovedBlocks()


@dataclass(frozen=True, slots=True)
class Residency:
    """How many leading tokens lie in each tier, and in all of them together. Whole blocks only."""

    device_tokens: int
    host_tokens: int
    disk_tokens: int
    cached_tokens: int


class KVCache:
    """KV blocks of one model in device memory, host memory and on disk. Thread-safe; use `with`, or `close` it.

    Sequences reserve slots in the device pool and share blocks by content. Committed blocks are copied to the host tier
    and from there to disk in the background; `open` brings them back. Whatever goes wrong below the device makes a block
    uncached, never wrong.
    """

    def __init__(
        self,
        spec: KVSpec,
        *,
        device: str | torch.device,
        device_blocks: int,
        host: str | int | None = None,
        disk: str | DiskPlace | None = None,
        load_timeout_s: float = 30.0,
        io_threads: int = 8,
    ) -> None:
        """Allocates all tiers. A disk folder that cannot be used is logged and counted, and the cache goes on without it.

        Args:
            device: "cpu", "cuda" or "cuda:N".
            device_blocks: slots of the device pool.
            host: size of the host tier, such as "8GiB"; None or 0: no host tier.
            disk: "PATH:SIZE" of the disk tier; None: no disk tier. The folder holds one sub-folder for each spec.
            load_timeout_s: a block that takes longer to load is computed instead.
            io_threads: threads that read and write the disk file.

        Raises:
            CacheConfigError: a size or path is wrong.
            CacheMemoryError: device or host memory does not suffice.
        """
        if device_blocks < 1:
            raise CacheConfigError(f"device_blocks must be at least 1, not {device_blocks}")
        self.spec = spec
        self.block_size = spec.block_size
        self.num_device_blocks = device_blocks
        self.load_timeout_s = load_timeout_s
        self._changed = threading.Condition()  # guards the pool, the sequences' tables and the counts below
        self._pool = BlockPool(device_blocks)
        self._events = EventLog()
        self._roots: OrderedDict[tuple[str, str], ChainRoot] = OrderedDict()
        self._num_open = 0
        self._num_offload_pins = 0
        self._hit_blocks = 0
        self._requested_blocks = 0
        self._missed_blocks = 0
        self._late_blocks = 0
        self._is_closed = False
        self._disk_fault: str | None = None
        self._arena: HostTier | None = None
        self._disk: DiskTier | None = None
        self._store: BlockStore | None = None
        with _translated_errors(), ExitStack() as undo:
            self._device = DeviceTier(spec.layout, spec.dtype, device_blocks, device)
            undo.callback(self._device.close)
            self._open_store(host, disk, io_threads, undo)
            undo.pop_all()

    def _open_store(
        self, host: str | int | None, disk: str | DiskPlace | None, io_threads: int, undo: ExitStack
    ) -> None:
        slot_bytes = self.spec.layout.slot_bytes
        host_bytes = parse_size(host) if host is not None else 0
        if 0 < host_bytes < slot_bytes:
            raise CacheConfigError(
                f"host={host!r} is less than one block of {format_size(slot_bytes)}; give more, or 0 for none"
            )
        place = parse_disk_place(disk) if isinstance(disk, str) else disk
        if place is not None:
            if place.capacity_bytes < slot_bytes:
                raise CacheConfigError(f"disk={disk!r} is less than one block of {format_size(slot_bytes)}; give more")
            self._disk = self._open_disk(place, io_threads)
            if self._disk is not None:
                undo.callback(self._disk.close)
        if not host_bytes and self._disk is None:
            return
        num_host_slots = host_bytes // slot_bytes
        part_blocks = max(1, PART_BYTES // slot_bytes)
        self._arena = HostTier(self.spec.layout, num_host_slots + part_blocks * (1 if num_host_slots else 4))
        self._store = BlockStore(
            self._device,
            self._arena,
            num_host_slots,
            self._disk,
            self._events,
            max_pending_blocks=max(1, self.num_device_blocks // 4),
        )

    def _open_disk(self, place: DiskPlace, io_threads: int) -> DiskTier | None:
        try:
            return DiskTier.open(
                place.directory, self.spec.layout, place.capacity_bytes, self.spec.fingerprint, io_threads=io_threads
            )
        except TierBusyError as error:
            self._disk_fault = "busy"
            logger.warning("going on without a disk tier: %s", error)
        except TierUnavailableError as error:
            self._disk_fault = "unavailable"
            logger.warning("going on without a disk tier: %s", error)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def device(self) -> torch.device:
        """Where `layer` tensors lie."""
        return self._device.device

    @property
    def num_available_blocks(self) -> int:
        """Device blocks that are free or hold only cached content that nobody uses."""
        return self._pool.num_available

    def open(self, tokens: Tokens, *, salt: str = "", lora: str = "") -> Sequence:
        """Reserves blocks for all of `tokens`, shares the longest cached prefix and starts loading what lies below.

        At most `len(tokens) - 1` tokens, in whole blocks, count as cached: one is always left to compute logits from.

        Args:
            tokens: at least one token id.
            salt: blocks are shared only between sequences of equal salt; one for each tenant keeps tenants apart.
            lora: name of the adapter that the KV is computed with.

        Raises:
            OutOfBlocksError: the device pool cannot hold the sequence now; nothing was reserved.
            ValueError: no tokens, or one not in [0, 2**32).
        """
        self._check_open()
        sequence = Sequence(self, self._root(salt, lora), tokens)
        if not sequence.num_tokens:
            raise ValueError("a sequence needs at least one token")
        num_blocks = -(-sequence.num_tokens // self.block_size)
        keys = sequence._chain.keys[: (sequence.num_tokens - 1) // self.block_size]
        with self._changed:
            matched = self._pool.find_prefix(keys)
            self._pool.acquire(matched)
            try:
                reserved = self._allocate(num_blocks - len(matched))
            except OutOfBlocksError:
                self._pool.release(matched)
                raise
            sequence._add_slots(matched)
            sequence._add_slots(reserved)
            sequence._num_shared_blocks = len(matched)
            self._num_open += 1
            self._hit_blocks += len(matched)
            self._requested_blocks += len(keys)
        num_loading = self._start_loading(sequence, keys, len(matched), reserved)
        self._missed_blocks += len(keys) - len(matched) - num_loading
        return sequence

    def _start_loading(self, sequence: Sequence, keys: list[BlockKey], matched: int, reserved: SlotIds) -> int:
        """Starts the loads of what follows the `matched` blocks; returns how many blocks."""
        num_loading = 0
        if self._store and keys:
            if num_loading := self._store.count_loadable(keys[matched:]):
                request = LoadRequest(keys, matched, reserved[:num_loading], self._device.fence())
                sequence._transfer = self._store.load(request, self.load_timeout_s)
            self._store.touch(keys)
        if not num_loading:
            sequence._num_cached_tokens = matched * self.block_size
        return num_loading

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [num_device_blocks, block_size, num_kv_heads, head_dim] (NHD), of the spec's dtype.

        Views of the device pool. The stride between blocks is larger than a block, so index them by block and offset.
        """
        return self._device.layer(index)

    def lookup(self, tokens: Tokens, *, salt: str = "", lora: str = "") -> Residency:
        """How many leading tokens each tier holds; changes nothing, not even the order of eviction."""
        self._check_open()
        keys = block_keys(tokens, self.block_size, self._root(salt, lora))
        with self._changed:
            num_device = len(self._pool.find_prefix(keys))
        num_host, num_disk, num_cached = 0, 0, num_device
        if self._store:
            num_host, num_disk = self._store.count_prefix(keys)
            num_cached += self._store.count_loadable(keys[num_device:])
        return Residency(*(count * self.block_size for count in (num_device, num_host, num_disk, num_cached)))

    def prefetch(self, tokens: Tokens, *, salt: str = "", lora: str = "") -> Future[int]:
        """Starts bringing the cached prefix of `tokens` into device memory, where it stays until evicted.

        Returns:
            A future of the number of leading tokens that are in device memory when the loads have ended.

        Raises:
            OutOfBlocksError: the device pool cannot hold the prefix now.
        """
        done: Future[int] = Future()
        held = self.lookup(tokens, salt=salt, lora=lora).cached_tokens
        if not held:
            done.set_result(0)
            return done
        # `open` always leaves a token to compute: one more than the prefix makes all of the prefix cacheable.
        prefix = [*tokens[:held], 0]
        sequence = self.open(prefix, salt=salt, lora=lora)

        def finish() -> None:
            sequence.wait(0.0)
            num_tokens = sequence.num_cached_tokens
            sequence.close()
            done.set_result(num_tokens)

        if sequence._transfer is None:
            finish()
        else:
            sequence._transfer.when_ended(finish)
        return done

    def clear(self, tier: TierName | None = None) -> None:
        """Drops every block of one tier, or of all, that is not in use at this moment."""
        self._check_open()
        if tier in (None, "device"):
            with self._changed:
                removed, _ = self._pool.evict_idle()
                if len(self._pool):
                    self._events.removed("device", removed)
                else:
                    self._events.cleared("device")
        for name in ("host", "disk"):
            if tier in (None, name) and self._store:
                self._store.clear(name)

    def events(self, after: int = -1) -> list[Event]:
        """Events numbered above `after`, oldest first; see `EventLog` for how a reader notices that it missed some."""
        return self._events.read(after)

    def flush(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> bool:
        """Waits until all committed blocks have reached the lower tiers or were dropped; False if that took too long."""
        return self._store.flush(timeout_s) if self._store else True

    def stats(self) -> CacheStats:
        """Occupancy and counters of every tier. May be called after `close`."""
        with self._changed:
            tiers = [_usage(self._device.stats(), self._pool, self.spec.layout.slot_bytes, self._hit_blocks)]
        tiers += self._lower_tiers()
        store = self._store
        faults = store.counters.faults if store else {}
        if self._late_blocks:
            faults["late"] = self._late_blocks
        return CacheStats(
            tiers=tuple(tiers),
            num_open_sequences=self._num_open,
            requested_blocks=self._requested_blocks,
            missed_blocks=self._missed_blocks,
            load_faults=faults,
            dropped_blocks=store.counters.dropped if store else {},
            num_pending_offload_blocks=store.num_pending_blocks if store else 0,
            num_pending_disk_blocks=store.num_writing_blocks if store else 0,
        )

    def _lower_tiers(self) -> Iterator[TierUsage]:
        slot_bytes = self.spec.layout.slot_bytes
        if self._store and self._arena and self._store.host.num_slots:
            yield _usage(self._arena.stats(), self._store.host, slot_bytes, self._store.counters.loaded("host"))
        if self._store and self._disk:
            yield _usage(self._disk.stats(), self._store.disk, slot_bytes, self._store.counters.loaded("disk"))
        if self._disk_fault:
            stats = TierStats("disk", 0, "none", _NOTHING_MOVED, _NOTHING_MOVED, {self._disk_fault: 1})
            yield _usage(stats, BlockPool(0), slot_bytes, 0)

    def check_invariants(self) -> None:
        """Raises AssertionError if any pool's books do not balance. For tests; cost grows with the number of slots."""
        with self._changed:
            self._pool.check_invariants()
            if not self._num_open and not self._num_offload_pins:
                assert self._pool.num_pinned == 0, f"{self._pool.num_pinned} device blocks are held by nobody"
        if self._store:
            self._store.check_invariants()

    def close(self) -> None:
        """Writes what is pending, ends all threads and frees all tiers. Sequences must no longer be used. Idempotent."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
        if self._store:
            self._store.close(_CLOSE_TIMEOUT_S)
        self._device.close()

    # What sequences ask for.

    def _grow(self, sequence: Sequence, num_blocks: int) -> None:
        with self._changed:
            sequence._add_slots(self._allocate(num_blocks - sequence._num_blocks))

    def _adopt_loaded(self, sequence: Sequence, timeout_s: float | None) -> None:
        """Ends a sequence's transfer and shares the blocks that arrived."""
        transfer = sequence._transfer
        assert transfer is not None, "only a sequence with a transfer waits"
        arrived = transfer.wait(timeout_s)
        with self._changed:
            if transfer.is_expired:
                self._late_blocks += transfer.num_blocks - arrived
            self._register(sequence, sequence._num_shared_blocks + arrived)
            sequence._transfer = None
            sequence._num_cached_tokens = sequence._num_shared_blocks * self.block_size

    def _share(self, sequence: Sequence, num_blocks: int) -> None:
        """Shares a sequence's first `num_blocks` blocks and offers the new ones to the lower tiers."""
        first = sequence._num_shared_blocks
        with self._changed:
            slots = self._register(sequence, num_blocks)
            if not self._store:
                return
            self._pool.acquire(slots)
            self._num_offload_pins += len(slots)
        request = SaveRequest(
            chain=sequence._chain.keys[:num_blocks],
            first=first,
            device_slots=slots,
            fence=self._device.fence(),
            release=lambda: self._unpin(slots),
        )
        self._store.save(request, _OFFER_WAIT_S)

    def _release(self, sequence: Sequence) -> None:
        if sequence._transfer is not None:
            sequence._transfer.expire()
        with self._changed:
            self._pool.release(sequence.block_table.astype("int64"))
            self._num_open -= 1
            self._changed.notify_all()

    def _register(self, sequence: Sequence, num_blocks: int) -> SlotIds:
        """Makes the sequence's blocks up to `num_blocks` findable; returns the slots of those that were not before."""
        first = sequence._num_shared_blocks
        keys = sequence._chain.keys[first:num_blocks]
        own = sequence.block_table[first:num_blocks].astype("int64")
        slots = self._pool.register(keys, own)
        sequence.block_table[first:num_blocks] = slots
        sequence._num_shared_blocks = num_blocks
        self._events.stored("device", keys, sequence._chain.keys[first - 1] if first else None)
        return slots

    def _unpin(self, slots: SlotIds) -> None:
        with self._changed:
            self._pool.release(slots)
            self._num_offload_pins -= len(slots)
            self._changed.notify_all()

    def _allocate(self, count: int) -> SlotIds:
        """Slots for `count` blocks; the caller holds the lock, which is let go while offloads finish."""
        if count > self._pool.num_available and self._num_offload_pins:
            self._changed.wait_for(
                lambda: count <= self._pool.num_available or not self._num_offload_pins, timeout=_PIN_WAIT_S
            )
        room = self._pool.allocate(count)
        if room is None:
            raise OutOfBlocksError(count, self._pool.num_available)
        self._events.removed("device", room.evicted_keys)
        return room.slots

    def _root(self, salt: str, lora: str) -> ChainRoot:
        with self._changed:
            root = self._roots.get((salt, lora))
            if root is None:
                root = chain_root(self.spec.fingerprint, self.block_size, salt=salt, lora=lora)
                self._roots[salt, lora] = root
                if len(self._roots) > _MAX_ROOTS:
                    self._roots.popitem(last=False)
            return root

    def _check_open(self) -> None:
        if self._is_closed:
            raise CacheClosedError("the cache is closed")


@contextmanager
def _translated_errors() -> Iterator[None]:
    """What tiers raise while they are made, in the words of this package."""
    try:
        yield
    except TierMemoryError as error:
        raise CacheMemoryError(str(error)) from error
    except TierConfigError as error:
        raise CacheConfigError(str(error)) from error


def _usage(stats: TierStats, pool: BlockPool, slot_bytes: int, hit_blocks: int) -> TierUsage:
    return TierUsage(
        tier=stats.name,
        path=stats.path,
        num_slots=pool.num_slots,
        slot_bytes=slot_bytes,
        num_cached_blocks=len(pool),
        num_pinned_blocks=pool.num_pinned,
        hit_blocks=hit_blocks,
        evicted_blocks=pool.num_evicted,
        read=stats.read,
        write=stats.write,
        faults=stats.faults,
    )
