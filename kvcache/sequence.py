"""One token sequence and the blocks it holds."""

import asyncio
import contextlib
from array import array
from collections.abc import Callable
from typing import Self

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.device_pool import DevicePool
from dynamo.kvcache.errors import CacheClosedError, SequenceStateError
from dynamo.kvcache.eviction import OpenUse
from dynamo.kvcache.hashing import BlockKey, KeyChain, Tokens, pack_tokens
from dynamo.kvcache.layerwise import LayerLoad
from dynamo.kvcache.load_decision import LoadQuestion
from dynamo.kvcache.onboard import SOURCES, LoadRequest
from dynamo.kvcache.overlap import OverlappedLoad
from dynamo.kvcache.prefix_load import PrefixLoader, WaitedLoad
from dynamo.kvcache.prefix_save import PrefixSaver
from dynamo.kvcache.stats import CacheCounters
from dynamo.kvcache.store import BlockStore
from dynamo.kvcache.tier_errors import translated_errors
from dynamo.kvcache.window import RequestHits, RequestWindow
from dynamo.tiers.mover import Priority
from dynamo.tiers.tier import SlotIds

__all__ = ["Sequence"]


class Sequence:
    """A sequence's tokens, its block table, and what of it is cached. Made by `KVCache.open`; close it, or use `with`.

    Its blocks, by position:

        [0, matched)            found in device memory, shared and never written again
        [matched, loaded)       on their way from a lower tier until `wait`, or `next_span`; shared after it
        [.., committed)         computed and committed by this sequence, shared
        [committed, num_blocks) reserved; the caller writes them

    A sequence belongs to one thread at a time; different sequences may be used from different threads.
    """

    def __init__(
        self,
        pool: DevicePool,
        store: BlockStore | None,
        counters: CacheCounters,
        loader: PrefixLoader | None,
        tokens: "array[int]",
        chain: KeyChain,
        *,
        block_size: int,
        num_cacheable_blocks: int,
        spare_blocks: int,
        begin_use: Callable[[list[BlockKey]], OpenUse] | None = None,
        priority: Priority = Priority.LOAD,
        window: RequestWindow | None = None,
        overlap: bool = False,
    ) -> None:
        """Reserves blocks for all `tokens`, of which the first `num_cacheable_blocks` may come from the cache.

        Args:
            loader: brings up what lies in the store; None where there is no store.
            chain: keys of all full blocks of `tokens`.
            begin_use: called with the chain's keys once the blocks are reserved; None: nobody's use.
            priority: who waits for the loads.
            window: is told, at `close`, what the sequence got from which tier; None: the sequence is no request.
            overlap: see `KVCache.open`.

        Raises:
            OutOfBlocksError: see `DevicePool.reserve`.
        """
        self._pool = pool
        self._store = store
        self._counters = counters
        self._tokens = tokens
        self._chain = chain
        self._block_size = block_size
        self._table = np.empty(0, dtype=np.int32)
        self._num_blocks = 0
        self._load: WaitedLoad | OverlappedLoad | None = None
        self._layers: LayerLoad | None = None
        self._num_cached_tokens: int | None = None
        self._is_closed = False
        self._use: OpenUse | None = None
        self._saver: PrefixSaver | None = None
        self._window = window
        self._num_prompt_tokens = len(tokens)
        self._num_cacheable_blocks = num_cacheable_blocks
        self._hit_blocks = [0] * len(SOURCES)
        self._sources = np.empty(0, dtype=np.uint8)
        keys = chain.keys[:num_cacheable_blocks]
        reservation = pool.reserve(keys, -(-len(tokens) // block_size), spare_blocks)
        self._add_slots(reservation.matched)
        self._add_slots(reservation.fresh)
        self._num_shared_blocks = len(reservation.matched)  # leading blocks that are registered in the pool
        try:
            if begin_use is not None:
                self._use = begin_use(chain.keys)
            if store is not None:
                self._saver = PrefixSaver(store, pool, self._use)
            self._num_matched_blocks = self._num_shared_blocks
            # Tokens that may be committed; None: all. Those from there on may still be written by a load.
            self._num_handed_tokens = self._num_matched_blocks * block_size if overlap else None
            num_loadable = self._start_loading(loader, keys, reservation.fresh, priority) if loader is not None else 0
            if self._load is None:
                self._num_cached_tokens = self._num_matched_blocks * block_size
        except BaseException:
            pool.release(self.block_table.astype(np.int64))
            raise
        self._num_missed_blocks = len(keys) - self._num_shared_blocks - num_loadable

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_tokens(self) -> int:
        """Tokens given to `open` and `append`."""
        return len(self._tokens)

    @property
    def num_missed_blocks(self) -> int:
        """Of the full blocks that could have come from the cache, those that no tier held at the time of `open`."""
        return self._num_missed_blocks

    @property
    def block_keys(self) -> list[BlockKey]:
        """Keys of the sequence's full blocks, as far as it has hashed them: those of `open`, and of what was committed.

        The sequence's own list, which grows until it is closed; not to be changed.
        """
        return self._chain.keys

    @property
    def is_ready(self) -> bool:
        """True once `wait` would return at once."""
        return self._load is None or self._load.is_ready

    @property
    def patience_left_s(self) -> float:
        """Seconds until `is_ready` at the latest, as things stand: what arrives meanwhile may make it more or less."""
        return 0.0 if self._load is None else self._load.patience_left_s

    @property
    def num_cached_tokens(self) -> int:
        """Leading tokens whose KV need not be computed; whole blocks, and fewer than `num_tokens` at the time of `open`.

        With `overlap`: tokens that `next_span` has passed over until now, wherever they lie.

        Raises:
            SequenceStateError: before `wait` or `ready`, since a load may still fail; with `overlap`, before `next_span`.
        """
        if self._num_cached_tokens is None:
            raise SequenceStateError("num_cached_tokens is known only after wait() or ready(), or next_span()")
        return self._num_cached_tokens

    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """int32 [num_blocks]: device slots of the sequence's blocks. `wait` and `commit` may exchange equal blocks in it."""
        return self._table[: self._num_blocks]

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until the loads that `open` started have ended; what failed, or is late, is not cached.

        With `overlap`, blocks for as long as loading is much faster than computing, and ends nothing.

        Args:
            timeout_s: what has not arrived by then is computed instead; at most, and by default, the cache's
                `load_timeout_s` since `open`, or until waiting on would cost more than computing.
        """
        self._check_open()
        load = self._load
        if load is None:
            return
        if isinstance(load, OverlappedLoad):
            load.wait(timeout_s)
            return
        arrived = load.wait(timeout_s)
        self._counters.count_fault("late", load.num_late)
        self._hit_blocks = np.bincount(self._sources[:arrived], minlength=len(SOURCES)).tolist()
        self._share(self._num_shared_blocks + arrived)
        self._load = None
        self._num_cached_tokens = self._num_shared_blocks * self._block_size

    async def ready(self) -> None:
        """`wait` without blocking the event loop."""
        if not self.is_ready:
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()

            def tell_loop() -> None:
                with contextlib.suppress(RuntimeError):  # the loop was closed, and with it whoever waited
                    loop.call_soon_threadsafe(ended.set)

            self.when_ready(tell_loop)
            while not self.is_ready:  # the deadline may move while waiting
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.patience_left_s):
                        await ended.wait()
        self.wait(0.0)

    def next_span(self, num_computed: int, max_tokens: int) -> tuple[int, int]:
        """Which tokens to compute next, where the caller computes in pieces: with `overlap`, while the others are loaded.

        To be called before each piece, when those before it are committed. The caller writes the KV of the tokens it is
        given, and only those:

            end = 0
            while end < seq.num_tokens:
                start, end = seq.next_span(end, 512)
                ...  # compute tokens [start, end), and write their KV
                seq.commit(end)

        Args:
            num_computed: tokens from the start on whose KV is written and committed, or came from the cache.
            max_tokens: of the piece, at least 1.

        Returns:
            First token and end of the piece. What lies between `num_computed` and it came from the cache. Both are
            `num_tokens` when nothing is left.

        Raises:
            SequenceStateError: loads that somebody has to `wait` for are under way, or what was computed is not committed.
            ValueError: `num_computed` is beyond the sequence, or no token is asked for.
        """
        self._check_open()
        size, load, first = self._block_size, self._load, self._num_matched_blocks
        if not 0 <= num_computed <= self.num_tokens:
            raise ValueError(
                f"num_computed must be from 0 to the sequence's {self.num_tokens} tokens, not {num_computed}"
            )
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        if num_computed // size > self._num_shared_blocks:
            raise SequenceStateError(
                f"next_span() after {num_computed} tokens of which {self._num_shared_blocks * size} are committed; write the "
                "others and commit them first"
            )
        if isinstance(load, WaitedLoad):
            raise SequenceStateError("next_span() before wait(): blocks are still being loaded")
        start = max(num_computed, self._num_shared_blocks * size)
        end = min(self.num_tokens, start + max_tokens)
        while load is not None:
            if start % size == 0 and (count := load.pass_over(start // size - first)):
                self._share(start // size + count)
                start += count * size
            end = min(self.num_tokens, start + max_tokens)
            end = min(end, (first + load.claim(-(-start // size) - first, -(-end // size) - first)) * size)
            self._hit_blocks = np.bincount(self._sources[load.used], minlength=len(SOURCES)).tolist()
            self._num_cached_tokens = (first + sum(self._hit_blocks)) * size
            if end > start or start == self.num_tokens:  # else more has come in between
                break
        self._num_handed_tokens = end if end < self.num_tokens else None
        return start, end

    def begin_layerwise(self) -> int:
        """Instead of `wait`: settles at once which blocks are cached, and loads them layer by layer.

        Cached are the leading blocks that have arrived, or lie in host memory where their bytes were checked; the others
        are computed. Before each layer reads them, call `wait_layer`; nothing but a failing device can keep them from
        coming. `num_cached_tokens` is known now.

        Returns:
            Leading blocks of the sequence whose KV need not be computed, those found in device memory included.

        Raises:
            SequenceStateError: the sequence was opened with `overlap`.
        """
        self._check_open()
        load = self._load
        if isinstance(load, OverlappedLoad):
            raise SequenceStateError("begin_layerwise() of a sequence that was opened with overlap; open it without")
        if load is not None and self._store is not None:
            with translated_errors("device"):  # the cache may just be being closed
                self._layers = self._store.begin_layerwise(load.load)
            self._load = None
            num_promised = self._layers.num_blocks
            self._counters.count_fault("late", load.load.num_blocks - num_promised)
            self._hit_blocks = np.bincount(self._sources[:num_promised], minlength=len(SOURCES)).tolist()
            num_blocks = self._num_shared_blocks + num_promised
            self._num_cached_tokens = num_blocks * self._block_size
        return self.num_cached_tokens // self._block_size

    def wait_layer(self, layer: int, timeout_s: float | None = None) -> None:
        """Blocks until layer `layer` of all cached blocks is in device memory; after the last one they are shared.

        Args:
            timeout_s: at most so long; None: as long as the device may take.

        Raises:
            SequenceStateError: before `begin_layerwise` or `wait`.
            LayerLoadError: the device failed. The sequence is of no use any more; close it.
            TimeoutError: it took longer than `timeout_s`.
        """
        self._check_open()
        if self._num_cached_tokens is None:
            raise SequenceStateError("wait_layer() before begin_layerwise() or wait(): nothing is promised yet")
        if self._layers is not None:
            self._layers.wait(layer, timeout_s)
            if layer == self._pool.tier.layout.num_layers - 1:
                self._share(self._num_shared_blocks + self._layers.num_blocks)
                self._layers = None

    def append(self, tokens: Tokens) -> None:
        """Adds tokens and reserves slots for their KV: for all of them or, with an error, none.

        Raises:
            OutOfBlocksError: the device pool is full of blocks in use; nothing was changed. Where some are held only by
                their own offload, waits up to 50 ms for them first.
            ValueError: a token is not in [0, 2**32).
        """
        self._check_open()
        added = pack_tokens(tokens)
        num_blocks = -(-(len(self._tokens) + len(added) // 4) // self._block_size)
        if num_blocks > self._num_blocks:
            self._add_slots(self._pool.grow(num_blocks - self._num_blocks))
        self._tokens.frombytes(added)

    def commit_layer(self, layer: int, num_tokens: int | None = None) -> None:
        """Says that layer `layer` of the first `num_tokens` tokens (default: as for `commit`) is written and will not change.

        To be called for layer 0, then 1, and so on, before `commit` for the same tokens: each layer is then copied to the
        host tier while the next ones are computed, as far as there is room. Blocks become visible only with `commit`. Does
        not wait. On CUDA, as for `commit`.

        Raises:
            SequenceStateError: before `wait`, `begin_layerwise` or `next_span`, or beyond what may be committed.
        """
        self._check_open()
        first, end = self._num_cached_blocks("commit_layer"), self._num_full_blocks(num_tokens)
        saver = self._saver
        if saver is None:
            return
        if layer == 0:
            saver.abandon()
            if end > first:
                self._extend_chain(end)
                saver.begin_layers(self._chain.keys[:end], first, self.block_table[:end])
        saver.save_layer(layer)

    def commit(self, num_tokens: int | None = None) -> None:
        """Says that the KV of the first `num_tokens` tokens is written and will not change.

        Default are all tokens or, while `next_span` has more to hand out, all that it has handed out.

        Their full blocks become reusable by other sequences and are offered to the lower tiers. When those cannot keep
        up, waits for them for up to a second, once for as long as they are behind. On CUDA, kernels that write the blocks
        must have been submitted to the current stream.

        Raises:
            SequenceStateError: before `wait` or `next_span`, beyond the sequence's tokens, or beyond what `next_span` has
                handed out.
        """
        self._check_open()
        self._num_cached_blocks("commit")
        end = self._num_full_blocks(num_tokens)
        if self._layers is not None:
            self.wait_layer(self._pool.tier.layout.num_layers - 1)
        first = self._num_shared_blocks
        if end <= first:
            return
        self._extend_chain(end)
        fences = self._pool.tier.fences()
        self._share(end)
        if self._saver is not None:
            self._saver.save(self._chain.keys[:end], first, self.block_table[:end], fences)

    def close(self) -> None:
        """Gives all blocks back: committed ones stay cached until evicted, the others are free. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self._load is not None:
                self._load.finish()
                self._counters.count_fault("late", self._load.num_late)
            if self._layers is not None:
                self._layers.cancel()
            if self._saver is not None:
                self._saver.abandon()
            if self._use is not None:
                self._use.finish(self._chain.keys, len(self._tokens) - self._num_prompt_tokens)
                if self._store is not None and self._num_shared_blocks:
                    self._store.touch(self._chain.keys[: self._num_shared_blocks], self._use)
        finally:
            self._pool.release(self.block_table.astype(np.int64), self._use.latest if self._use else None)
        if self._window is not None:
            size = self._block_size
            host, disk = self._hit_blocks
            asked = self._num_cacheable_blocks * size
            self._window.add(
                RequestHits(self._num_prompt_tokens, asked, self._num_matched_blocks * size, host * size, disk * size)
            )

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once, on some thread, when the loads have ended; at once if there are none.

        Not when patience ends: `patience_left_s` tells when that is.
        """
        if self._load is None:
            callback()
        else:
            self._load.when_ended(callback)

    def _start_loading(
        self,
        loader: PrefixLoader,
        keys: list[BlockKey],
        fresh: SlotIds,
        priority: Priority,
    ) -> int:
        """Starts to load what follows the matched blocks, as far as that is worth it; returns how many could be loaded."""
        first = self._num_matched_blocks
        question = LoadQuestion(tuple(loader.store.find_runs(keys[first:])), first, len(self._tokens))
        num_loading, decision = loader.decide(question)
        if num_loading:
            self._sources = np.zeros(num_loading, dtype=np.uint8)
            slots, fences = fresh[:num_loading], self._pool.tier.fences()
            request = LoadRequest(keys, first, slots, fences, self._sources, self._use, priority, loader.overlap)
            self._load = loader.start(request, decision)
        if keys:
            loader.store.touch(keys, self._use)
        return question.num_blocks

    def _num_cached_blocks(self, method: str) -> int:
        """Leading blocks that need not be computed, or are committed."""
        if self._num_cached_tokens is None:
            before = "next_span" if isinstance(self._load, OverlappedLoad) else "wait"
            raise SequenceStateError(
                f"{method}() before {before}(): blocks that are still being loaded cannot be committed"
            )
        return max(self._num_shared_blocks, self._num_cached_tokens // self._block_size)

    def _num_full_blocks(self, num_tokens: int | None) -> int:
        handed = self._num_handed_tokens
        most = len(self._tokens) if handed is None else handed
        count = most if num_tokens is None else num_tokens
        if most < count <= len(self._tokens):
            raise SequenceStateError(
                f"cannot commit {count} tokens, of which next_span() has handed out {most} until now"
            )
        if not 0 <= count <= len(self._tokens):
            raise SequenceStateError(f"cannot commit {count} tokens of a sequence of {len(self._tokens)}")
        return count // self._block_size

    def _share(self, end: int) -> None:
        """Shares the blocks from the last shared one up to `end`."""
        first = self._num_shared_blocks
        parent = self._chain.keys[first - 1] if first else None
        own = self.block_table[first:end].astype(np.int64)
        self.block_table[first:end] = self._pool.share(self._chain.keys[first:end], own, parent)
        self._num_shared_blocks = end

    def _extend_chain(self, num_blocks: int) -> None:
        num_hashed, size = len(self._chain.keys), self._block_size
        if num_blocks > num_hashed:
            self._chain.extend(memoryview(self._tokens[num_hashed * size : num_blocks * size]).cast("B"))

    def _add_slots(self, slots: SlotIds) -> None:
        needed = self._num_blocks + len(slots)
        if needed > len(self._table):
            table = np.empty(max(needed, 2 * len(self._table)), dtype=np.int32)
            table[: self._num_blocks] = self.block_table
            self._table = table
        self._table[self._num_blocks : needed] = slots
        self._num_blocks = needed

    def _check_open(self) -> None:
        if self._is_closed:
            raise CacheClosedError("the sequence is closed; open it again with its tokens")
        self._pool.check_open()
