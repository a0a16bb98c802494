"""The cache: a device pool over a block store."""

import math
import threading
from array import array
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Literal, Self, get_args

import torch

from dynamo.kvcache.chain_roots import ChainRoots
from dynamo.kvcache.config import DiskPlace, parse_disk_place, parse_host_sizes, parse_size
from dynamo.kvcache.device_pool import DevicePool
from dynamo.kvcache.errors import CacheClosedError, CacheConfigError, UnsupportedError
from dynamo.kvcache.events import Event, EventLog, Snapshot
from dynamo.kvcache.hashing import BlockKey, KeyChain, Tokens, block_keys, pack_tokens
from dynamo.kvcache.leases import HeldSlots, Lease, LeaseBook, PinInfo
from dynamo.kvcache.planner import LoadPlanner
from dynamo.kvcache.policies import AdmissionName, BeginUse, EvictionName, Policies
from dynamo.kvcache.pool import BlockPlace
from dynamo.kvcache.prefetch import close_when_loaded
from dynamo.kvcache.prefix_load import PrefixLoader
from dynamo.kvcache.removals import Removal
from dynamo.kvcache.sequence import Sequence
from dynamo.kvcache.spec import KVSpec
from dynamo.kvcache.stats import CacheCounters, CacheStats
from dynamo.kvcache.status import CacheStatus, Residency, Verification, cache_status
from dynamo.kvcache.store import BlockStore
from dynamo.kvcache.tier_errors import translated_errors
from dynamo.kvcache.window import RequestWindow
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.mover import Priority
from dynamo.tiers.stats import TierStats

__all__ = ["KVCache", "TierName"]

TierName = Literal["device", "host", "disk"]

_CLOSE_TIMEOUT_S = 30.0
_SCRUB_RATE = "8MiB"  # 200 GiB in seven hours, with 0.3 % of what an NVMe disk gives; a shared network disk gives 10 %
_MAX_TTL_S = 30 * 86400.0


class KVCache:
    """KV blocks of one model in device memory, host memory and on disk. Thread-safe; use `with`, or `close` it.

    Sequences reserve slots in the device pool and share blocks by content. Committed blocks are copied to the host tier
    and from there to disk in the background; `open` brings them back. Whatever goes wrong below the device makes a
    block uncached, never wrong.
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
        load_patience: float | None = 0.03,
        io_threads: int = 8,
        eviction: EvictionName = "hit_density",
        admission: AdmissionName = "always",
        disk_write_budget: str | int | None = None,
        host_max: str | int | None = None,
        scrub_bytes_per_s: str | int = _SCRUB_RATE,
    ) -> None:
        """Allocates all tiers. A disk folder that cannot be used is logged and counted; the cache goes on without it.

        Args:
            device: "cpu", "cuda" or "cuda:N".
            device_blocks: slots of the device pool.
            host: size of the host tier, such as "8GiB"; None or 0: no host tier.
            disk: "PATH:SIZE" of the disk tier, or "PATH,PATH:SIZE" for several devices, always in the same order; None: no
                disk tier. The folder holds one sub-folder for each spec.
            load_timeout_s: a block that takes longer to load is computed instead; see also `observe_compute`.
            load_patience: share of the time to compute a prompt that waiting for its loads may cost beyond what they save. For
                short prompts up to 2 ms, where their tiers' last loads came in time, and a fifth at most of what loading saves.
                None: all that is cached is loaded and waited for, as it is before `observe_compute` has told that time; with
                `overlap`, then, for 25 ms at most and while it comes fast, and not from a disk that was slow at the start.
            io_threads: threads that read and write the disk file.
            eviction: which blocks of a full tier go first.
            admission: which blocks the host and disk tiers take.
            disk_write_budget: what may be written to the disk tier in a day, such as "500GB", a 24th of it at once; None: no
                limit. Adaptive admission spends it on the blocks that promise most.
            host_max: to what `resize` may make the host tier; None: not beyond `host`. Costs addresses, not memory.
            scrub_bytes_per_s: how fast the disk tier is checked for bad blocks while nobody else uses it; 0: not at all.

        Raises:
            CacheConfigError: a size or path is wrong.
            CacheMemoryError: device or host memory does not suffice.
        """
        if device_blocks < 1:
            raise CacheConfigError(f"device_blocks must be at least 1, not {device_blocks}")
        if io_threads < 1:
            raise CacheConfigError(f"io_threads must be at least 1, not {io_threads}")
        if load_patience is not None and not load_patience >= 0:
            raise CacheConfigError(f"load_patience must be a share from 0 on, or None, not {load_patience}")
        if not 0 <= load_timeout_s < math.inf:
            raise CacheConfigError(f"load_timeout_s must be seconds from 0 on, not {load_timeout_s}")
        host_bytes, max_host_bytes = parse_host_sizes(host, host_max)
        place = parse_disk_place(disk) if isinstance(disk, str) else disk
        self.spec = spec
        self.block_size = spec.block_size
        self.num_device_blocks = device_blocks
        self.load_timeout_s = load_timeout_s
        self._events = EventLog()
        self._counters = CacheCounters()
        self._planner = LoadPlanner(
            block_size=spec.block_size, block_bytes=spec.layout.block_bytes, patience=load_patience
        )
        self._roots = ChainRoots(spec.fingerprint, spec.block_size)
        self._closing = threading.Lock()
        self._is_closed = False
        self._store: BlockStore | None = None
        self._policies = Policies(eviction, admission, write_budget=self._write_tightness)
        with ExitStack() as undo:
            with translated_errors("device"):
                self._device = DeviceTier(spec.layout, spec.dtype, device_blocks, device)
            undo.callback(self._device.close)
            if host_bytes or place is not None:
                with translated_errors("host"):
                    self._store = BlockStore.open(
                        spec,
                        self._device,
                        self._events,
                        self._counters,
                        self._planner,
                        host_bytes=host_bytes,
                        disk=place,
                        io_threads=io_threads,
                        max_host_bytes=max_host_bytes,
                        policies=self._policies,
                        disk_write_budget=None if disk_write_budget is None else parse_size(disk_write_budget),
                        scrub_bytes_per_s=parse_size(scrub_bytes_per_s),
                    )
            undo.pop_all()
        self._pool = DevicePool(self._device, self._events, self._counters, self._policies.new_order("device"))
        self._leases = LeaseBook()
        self._window = RequestWindow(self._tier_stats)

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

    def open(
        self,
        tokens: Tokens,
        *,
        salt: str = "",
        lora: str = "",
        spare_blocks: int = 0,
        priority: int = 0,
        ttl_s: float | None = None,
        overlap: bool = False,
    ) -> Sequence:
        """Reserves blocks for all of `tokens`, shares the longest cached prefix and starts loading what lies below.

        At most `len(tokens) - 1` tokens, in whole blocks, count as cached: one is always left to compute logits from.
        Where device blocks are held only by their own offload, waits up to 50 ms for them.

        Args:
            tokens: at least one token id.
            salt: blocks are shared only between sequences of equal salt; one for each tenant keeps tenants apart.
            lora: name of the adapter that the KV is computed with.
            spare_blocks: device blocks that must stay available for the sequences that are open already.
            priority: what the sequence was the last to use outlives what sequences of a lower priority used.
            ttl_s: after so many seconds what the sequence was the last to use is the first to go; None: never.
            overlap: the caller computes from the start while the rest is loaded from the end, and asks `Sequence.next_span`
                before each piece.

        Raises:
            OutOfBlocksError: the device pool cannot hold the sequence now; nothing was reserved.
            ValueError: no tokens, or one not in [0, 2**32).
        """
        packed = array("I")
        packed.frombytes(pack_tokens(tokens))
        if not packed:
            raise ValueError("a sequence needs at least one token")
        num_cacheable_blocks = (len(packed) - 1) // self.block_size
        begin_use = self._policies.begin_use(len(packed), priority, ttl_s)
        sequence = self._open(
            packed,
            salt,
            lora,
            num_cacheable_blocks,
            spare_blocks,
            self._planner,
            begin_use,
            window=self._window,
            overlap=overlap,
        )
        self._counters.count_request(num_cacheable_blocks, sequence.num_missed_blocks)
        return sequence

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [num_device_blocks, block_size, num_kv_heads, head_dim] (NHD), of the spec's dtype.

        Views of the device pool. The stride between blocks is larger than a block, so index them by block and offset.

        Raises:
            CacheConfigError: there is no such layer.
        """
        self._check_open()
        with translated_errors("device"):
            return self._device.layer(index)

    def observe_compute(self, num_tokens: int, context_tokens: float, seconds: float) -> None:
        """Tells the cache how long it took to compute tokens of prompts, so that it knows when loading is worth it.

        Call it after each step of prefill, with what the device really took. After a few steps `open` loads only what
        comes sooner than it could be computed, and a load that is too slow is given up before it costs more than a few
        percent of computing the whole prompt. Without it, all that is cached is loaded, for up to `load_timeout_s`.

        Args:
            num_tokens: tokens that the step computed; of several prompts, all of them. Decoding does not count.
            context_tokens: tokens before them in their prompt; of several prompts, the mean over tokens.
            seconds: how long it took.
        """
        self._planner.observe_compute(num_tokens, context_tokens, seconds)

    def lookup(self, tokens: Tokens, *, salt: str = "", lora: str = "") -> Residency:
        """How many leading tokens each tier holds; changes nothing, not even the order of eviction."""
        self._check_open()
        keys = self.block_keys(tokens, salt=salt, lora=lora)
        num_device = self._pool.count_prefix(keys)
        num_host, num_disk, num_cached = 0, 0, num_device
        if self._store:
            num_host, num_disk = self._store.count_prefix(keys)
            num_cached = self._store.count_loadable(keys, max(num_device, num_host, num_disk))
        return Residency(*(count * self.block_size for count in (num_device, num_host, num_disk, num_cached)))

    def block_keys(self, tokens: Tokens, *, salt: str = "", lora: str = "") -> list[BlockKey]:
        """Keys of the full blocks of `tokens`: what `explain` takes, and what events and other caches name them by."""
        return block_keys(tokens, self.block_size, self._roots.get(salt, lora))

    def prefetch(self, tokens: Tokens, *, salt: str = "", lora: str = "") -> Future[int]:
        """Starts bringing the cached prefix of `tokens` into device memory, where it stays until evicted.

        Returns:
            A future of the number of leading tokens that are in device memory when the loads have ended, which is at the
            latest after `load_timeout_s`. Closing the cache makes it CacheClosedError, a fault of the device that fault.

        Raises:
            OutOfBlocksError: the device pool cannot hold the prefix now, or would have no block left for each sequence.
        """
        held = self.lookup(tokens, salt=salt, lora=lora).cached_tokens
        if not held:
            nothing: Future[int] = Future()
            nothing.set_result(0)
            return nothing
        packed = array("I")
        packed.frombytes(pack_tokens(tokens)[: 4 * held])
        # Each open sequence will want a block before long.
        spare_blocks = self._pool.num_sequences
        num_blocks = held // self.block_size
        sequence = self._open(packed, salt, lora, num_blocks, spare_blocks, None, priority=Priority.PREFETCH)
        return close_when_loaded(sequence)

    def pin(
        self,
        tokens: Tokens,
        *,
        salt: str = "",
        lora: str = "",
        tiers: Collection[TierName] = ("host", "disk"),
        ttl_s: float | None = None,
        name: str = "",
    ) -> Lease:
        """Keeps what `tiers` have of the blocks of `tokens` from being evicted until the lease ends.

        Nothing is moved: what is not cached now is not pinned. All pins together may hold half of a tier.

        Args:
            tiers: where to pin; absent tiers are passed over. In device memory, sequences have so much less room then.
            ttl_s: seconds after which the pin ends by itself; None: with the lease, at the latest when that is garbage.
            name: what `status` calls the pin.

        Raises:
            PinLimitError: pins would hold too much; nothing was pinned.
            CacheConfigError: `tiers` names what is no tier.
            ValueError: `ttl_s` is not above 0 and at most 30 days.
        """
        self._check_open()
        if ttl_s is not None:
            _check_ttl(ttl_s)
        for tier in tiers:
            _check_tier(tier)
        keys = self.block_keys(tokens, salt=salt, lora=lora)
        held = [self._store.pin(keys, tier) for tier in ("host", "disk") if self._store and tier in tiers]
        if "device" in tiers:
            slots = self._pool.hold(keys)
            held.append(HeldSlots("device", slots, self.num_device_blocks, lambda: self._pool.let_go(slots)))
        return self._leases.pin(held, num_tokens=len(keys) * self.block_size, name=name, ttl_s=ttl_s)

    def unpin(self, pin_id: str) -> bool:
        """Ends the pin of that id; False if there is none, or no longer."""
        return self._leases.end(pin_id)

    def extend_pin(self, pin_id: str, ttl_s: float) -> bool:
        """Lets the pin of that id live for `ttl_s` from now on; False if there is none, or no longer.

        Raises:
            ValueError: `ttl_s` is not above 0 and at most 30 days.
        """
        _check_ttl(ttl_s)
        return self._leases.extend(pin_id, ttl_s)

    def pins(self) -> tuple[PinInfo, ...]:
        """All active pins, oldest first."""
        return self._leases.pins()

    def resize(self, tier: TierName, size: str | int) -> int:
        """Gives the host or disk tier another size, such as "8GiB", while the cache goes on; evicts what has no room.

        Returns:
            The tier's number of slots from now on.

        Raises:
            CacheConfigError: the size is wrong, or the host tier would be larger than `host_max`.
            CacheMemoryError: the host has not that much memory.
            TimeoutError: blocks beyond the new size stay in use. They are given to nobody any more, and the next call gives
                their memory or disk space back.
            UnsupportedError: the cache has no such tier, or the tier's size is fixed.
        """
        self._check_open()
        num_bytes = parse_size(size)
        if tier == "device":
            raise UnsupportedError("the device tier cannot be resized: the tensors that `layer` gives are views of it")
        _check_tier(tier)
        if self._store is None or all(stats.name != tier for stats in self._store.tier_stats()):
            raise UnsupportedError(f"the cache was made without a {tier} tier, so there is none to resize")
        with translated_errors(tier):
            return self._store.resize(tier, num_bytes)

    def describe_shortage(self) -> str | None:
        """Where a disk is too small for the disk tier's size, and the way out; None if none is. Blocks are dropped there then.

        Space may be freed later, so a size beyond it is no error: ask after `resize`. The log has the same.
        """
        self._check_open()
        return self._store.describe_shortage() if self._store else None

    def verify(self, timeout_s: float = 60.0) -> Verification:
        """Reads what lies on disk and compares it with its digests; forgets and counts the blocks that are not right.

        Takes as long as reading the tier does, up to `timeout_s`; the cache goes on meanwhile. May be called from any
        thread. A second check waits for the first.

        Raises:
            UnsupportedError: there is no disk tier.
            CacheClosedError: the cache was closed meanwhile.
            ValueError: `timeout_s` is negative or infinite.
        """
        self._check_open()
        if not 0 <= timeout_s < math.inf:
            raise ValueError(f"timeout_s must be seconds from 0 on, not {timeout_s}")
        if self._store is None:
            raise UnsupportedError("there is no disk tier to verify; give the cache one")
        with translated_errors("disk"):
            return self._store.verify(timeout_s)

    def clear(self, tier: TierName | None = None) -> None:
        """Drops every block of one tier, or of all, that is not in use at this moment. Does nothing for an absent tier.

        Raises:
            CacheConfigError: `tier` names no tier.
        """
        self._check_open()
        if tier is not None:
            _check_tier(tier)
        if tier in (None, "device"):
            self._pool.clear()
        for name in ("host", "disk"):
            if tier in (None, name) and self._store:
                self._store.clear(name)

    def events(self, after: int = -1) -> list[Event]:
        """Events numbered above `after`, oldest first; see `EventLog` for how a reader notices that it missed some."""
        return self._events.read(after)

    @property
    def event_log(self) -> EventLog:
        """Where the events come from, for an `EventPublisher` to follow."""
        return self._events

    def snapshot(self) -> Snapshot:
        """What each tier holds now: where a reader of `events` starts."""
        number = self._events.last_number  # first, so that no later event is missed
        held = {"device": self._pool.runs(), **(self._store.runs() if self._store else {})}
        return Snapshot(
            number,
            {tier: keys for tier, (keys, _) in held.items()},
            {tier: starts for tier, (_, starts) in held.items()},
        )

    def explain(self, key: BlockKey) -> dict[str, BlockPlace | Removal | None]:
        """By tier: where the block of that key lies and why it is kept, or why it is not there.

        None for a block that a tier never had, as far back as it remembers: the last few thousand removals.
        """
        return {"device": self._pool.explain(key), **(self._store.explain(key) if self._store else {})}

    def flush(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> bool:
        """Waits until all committed blocks have reached the lower tiers or were dropped; False if that took too long."""
        return self._store.flush(timeout_s) if self._store else True

    def status(self) -> CacheStatus:
        """What lies where now, who holds it, and what is on its way. May be called after `close`."""
        return cache_status(self.stats(), self.pins())

    def stats(self) -> CacheStats:
        """Occupancy and counters of every tier. May be called after `close`."""
        store = self._store
        counted = self._counters.snapshot()
        return CacheStats(
            tiers=(self._pool.usage(), *(store.usage() if store else ())),
            num_open_sequences=self._pool.num_sequences,
            requested_blocks=counted.requested_blocks,
            missed_blocks=counted.missed_blocks,
            load_faults=counted.load_faults,
            dropped_blocks=counted.dropped_blocks,
            num_pending_offload_blocks=store.num_pending_blocks if store else 0,
            num_pending_disk_blocks=store.num_writing_blocks if store else 0,
            planner=self._planner.stats(),
            num_loads=store.num_loads if store else 0,
            num_pins=len(self._leases),
            verify_faults=counted.verify_faults,
            load_latency=counted.load_latency,
            window=self._window.snapshot(),
            scrub=store.scrub_stats if store else None,
            write_budget=store.write_budget_stats if store else None,
        )

    def check_invariants(self) -> None:
        """Raises AssertionError if any tier's books do not balance. For tests; cost grows with the number of slots."""
        self._pool.check_invariants()
        if self._store:
            self._store.check_invariants()

    def close(self) -> None:
        """Writes what is pending, ends all threads and frees all tiers. Idempotent.

        Pins end. Of sequences that are still open, nothing but their `close` is of use: what else is asked of them raises
        CacheClosedError, also of a thread that waits for their loads meanwhile.
        """
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        self._pool.close()
        self._leases.close(_CLOSE_TIMEOUT_S)
        if self._store:
            self._store.close(_CLOSE_TIMEOUT_S)
        self._device.close()

    def _open(
        self,
        packed: "array[int]",
        salt: str,
        lora: str,
        num_cacheable_blocks: int,
        spare_blocks: int,
        planner: LoadPlanner | None,
        begin_use: BeginUse | None = None,
        priority: Priority = Priority.LOAD,
        window: RequestWindow | None = None,
        overlap: bool = False,
    ) -> Sequence:
        self._check_open()
        chain = KeyChain(self._roots.get(salt, lora), self.block_size)
        chain.extend(memoryview(packed).cast("B"))
        loader = None
        if self._store:
            loader = PrefixLoader(
                self._store,
                planner,
                self._counters,
                block_size=self.block_size,
                overlap=overlap,
                timeout_s=self.load_timeout_s,
            )
        return Sequence(
            self._pool,
            self._store,
            self._counters,
            loader,
            packed,
            chain,
            block_size=self.block_size,
            num_cacheable_blocks=num_cacheable_blocks,
            spare_blocks=spare_blocks,
            begin_use=begin_use,
            priority=priority,
            window=window,
            overlap=overlap,
        )

    def _write_tightness(self) -> float:
        return self._store.write_tightness if self._store else 0.0

    def _tier_stats(self) -> Iterator[TierStats]:
        yield self._device.stats()
        if self._store:
            yield from self._store.tier_stats()

    def _check_open(self) -> None:
        if self._is_closed:
            raise CacheClosedError("the cache is closed")


def _check_tier(name: str) -> None:
    names = get_args(TierName)
    if name not in names:
        raise CacheConfigError(f"{name!r} is no tier; there are {', '.join(names)}")


def _check_ttl(ttl_s: float) -> None:
    if not 0 < ttl_s <= _MAX_TTL_S:
        raise ValueError(f"ttl_s must be above 0 and at most {_MAX_TTL_S:g} seconds, not {ttl_s}")
