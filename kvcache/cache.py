"""The cache: a device pool over a block store."""

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch

from dynamo.kvcache.config import DiskPlace, parse_disk_place, parse_size
from dynamo.kvcache.device_pool import DevicePool
from dynamo.kvcache.errors import CacheClosedError, CacheConfigError, CacheMemoryError
from dynamo.kvcache.events import Event, EventLog
from dynamo.kvcache.hashing import ChainRoot, KeyChain, Tokens, block_keys, chain_root, pack_tokens
from dynamo.kvcache.planner import LoadPlanner
from dynamo.kvcache.sequence import Sequence
from dynamo.kvcache.spec import KVSpec
from dynamo.kvcache.stats import CacheCounters, CacheStats
from dynamo.kvcache.store import BlockStore
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.errors import TierClosedError, TierConfigError, TierMemoryError

__all__ = ["KVCache", "Residency", "TierName"]

TierName = Literal["device", "host", "disk"]

_CLOSE_TIMEOUT_S = 30.0
_MAX_ROOTS = 1024


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
        load_patience: float | None = 0.02,
        io_threads: int = 8,
    ) -> None:
        """Allocates all tiers. A disk folder that cannot be used is logged and counted; the cache goes on without it.

        Args:
            device: "cpu", "cuda" or "cuda:N".
            device_blocks: slots of the device pool.
            host: size of the host tier, such as "8GiB"; None or 0: no host tier.
            disk: "PATH:SIZE" of the disk tier; None: no disk tier. The folder holds one sub-folder for each spec.
            load_timeout_s: a block that takes longer to load is computed instead; see also `observe_compute`.
            load_patience: share of the time to compute a prompt that its loads may cost beyond what they save, where
                `observe_compute` has told that time; None: all that is cached is loaded and waited for.
            io_threads: threads that read and write the disk file.

        Raises:
            CacheConfigError: a size or path is wrong.
            CacheMemoryError: device or host memory does not suffice.
        """
        if device_blocks < 1:
            raise CacheConfigError(f"device_blocks must be at least 1, not {device_blocks}")
        host_bytes = parse_size(host) if host is not None else 0
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
        self._roots: OrderedDict[tuple[str, str], ChainRoot] = OrderedDict()
        self._roots_lock = threading.Lock()
        self._is_closed = False
        self._store: BlockStore | None = None
        with _translated_errors(), ExitStack() as undo:
            self._device = DeviceTier(spec.layout, spec.dtype, device_blocks, device)
            undo.callback(self._device.close)
            if host_bytes or place is not None:
                self._store = BlockStore.open(
                    spec,
                    self._device,
                    self._events,
                    self._counters,
                    self._planner,
                    host_bytes=host_bytes,
                    disk=place,
                    io_threads=io_threads,
                )
            undo.pop_all()
        self._pool = DevicePool(self._device, self._events, self._counters)

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

    def open(self, tokens: Tokens, *, salt: str = "", lora: str = "", spare_blocks: int = 0) -> Sequence:
        """Reserves blocks for all of `tokens`, shares the longest cached prefix and starts loading what lies below.

        At most `len(tokens) - 1` tokens, in whole blocks, count as cached: one is always left to compute logits from.
        Where device blocks are held only by their own offload, waits up to 50 ms for them.

        Args:
            tokens: at least one token id.
            salt: blocks are shared only between sequences of equal salt; one for each tenant keeps tenants apart.
            lora: name of the adapter that the KV is computed with.
            spare_blocks: device blocks that must stay available for the sequences that are open already.

        Raises:
            OutOfBlocksError: the device pool cannot hold the sequence now; nothing was reserved.
            ValueError: no tokens, or one not in [0, 2**32).
        """
        packed = array("I")
        packed.frombytes(pack_tokens(tokens))
        if not packed:
            raise ValueError("a sequence needs at least one token")
        num_cacheable_blocks = (len(packed) - 1) // self.block_size
        sequence = self._open(packed, salt, lora, num_cacheable_blocks, spare_blocks, self._planner)
        self._counters.count_request(num_cacheable_blocks, sequence.num_missed_blocks)
        return sequence

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [num_device_blocks, block_size, num_kv_heads, head_dim] (NHD), of the spec's dtype.

        Views of the device pool. The stride between blocks is larger than a block, so index them by block and offset.

        Raises:
            CacheConfigError: there is no such layer.
        """
        self._check_open()
        with _translated_errors():
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
        keys = block_keys(tokens, self.block_size, self._root(salt, lora))
        num_device = self._pool.count_prefix(keys)
        num_host, num_disk, num_cached = 0, 0, num_device
        if self._store:
            num_host, num_disk = self._store.count_prefix(keys)
            num_cached += self._store.count_loadable(keys[num_device:])
        return Residency(*(count * self.block_size for count in (num_device, num_host, num_disk, num_cached)))

    def prefetch(self, tokens: Tokens, *, salt: str = "", lora: str = "") -> Future[int]:
        """Starts bringing the cached prefix of `tokens` into device memory, where it stays until evicted.

        Returns:
            A future of the number of leading tokens that are in device memory when the loads have ended, which is at the
            latest after `load_timeout_s`.

        Raises:
            OutOfBlocksError: the device pool cannot hold the prefix now.
        """
        done: Future[int] = Future()
        held = self.lookup(tokens, salt=salt, lora=lora).cached_tokens
        if not held:
            done.set_result(0)
            return done
        packed = array("I")
        packed.frombytes(pack_tokens(tokens)[: 4 * held])
        sequence = self._open(packed, salt, lora, held // self.block_size, 0, None)

        def finish() -> None:
            with sequence:
                sequence.wait(0.0)
                num_tokens = sequence.num_cached_tokens
            if done.set_running_or_notify_cancel():
                done.set_result(num_tokens)

        sequence.when_ready(finish)
        return done

    def clear(self, tier: TierName | None = None) -> None:
        """Drops every block of one tier, or of all, that is not in use at this moment. Does nothing for an absent tier.

        Raises:
            CacheConfigError: `tier` names no tier.
        """
        self._check_open()
        names = get_args(TierName)
        if tier is not None and tier not in names:
            raise CacheConfigError(f"{tier!r} is no tier; there are {', '.join(names)}")
        if tier in (None, "device"):
            self._pool.clear()
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
        )

    def check_invariants(self) -> None:
        """Raises AssertionError if any tier's books do not balance. For tests; cost grows with the number of slots."""
        self._pool.check_invariants()
        if self._store:
            self._store.check_invariants()

    def close(self) -> None:
        """Writes what is pending, ends all threads and frees all tiers. Sequences must no longer be used. Idempotent."""
        with self._roots_lock:
            if self._is_closed:
                return
            self._is_closed = True
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
    ) -> Sequence:
        self._check_open()
        chain = KeyChain(self._root(salt, lora), self.block_size)
        chain.extend(memoryview(packed).cast("B"))
        return Sequence(
            self._pool,
            self._store,
            self._counters,
            planner,
            packed,
            chain,
            block_size=self.block_size,
            num_cacheable_blocks=num_cacheable_blocks,
            spare_blocks=spare_blocks,
            load_timeout_s=self.load_timeout_s,
        )

    def _root(self, salt: str, lora: str) -> ChainRoot:
        with self._roots_lock:
            root = self._roots.get((salt, lora))
            if root is None:
                root = chain_root(self.spec.fingerprint, self.block_size, salt=salt, lora=lora)
                self._roots[salt, lora] = root
                if len(self._roots) > _MAX_ROOTS:
                    self._roots.popitem(last=False)
            else:
                self._roots.move_to_end((salt, lora))
            return root

    def _check_open(self) -> None:
        if self._is_closed:
            raise CacheClosedError("the cache is closed")


@contextmanager
def _translated_errors() -> Iterator[None]:
    """What tiers raise, in the words of this package."""
    try:
        yield
    except TierMemoryError as error:
        raise CacheMemoryError(
            str(error), needed_bytes=error.needed_bytes, available_bytes=error.available_bytes
        ) from error
    except TierConfigError as error:
        raise CacheConfigError(str(error)) from error
    except TierClosedError as error:
        raise CacheClosedError(str(error)) from error
