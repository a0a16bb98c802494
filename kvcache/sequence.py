"""One token sequence and the blocks it holds."""

import asyncio
from array import array
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.errors import CacheClosedError, SequenceStateError
from dynamo.kvcache.hashing import ChainRoot, KeyChain, Tokens, pack_tokens
from dynamo.kvcache.pool import SlotIds
from dynamo.tiers.mover import Transfer

if TYPE_CHECKING:
    from dynamo.kvcache.cache import KVCache

__all__ = ["Sequence"]


class Sequence:
    """A sequence's tokens, its block table, and what of it is cached. Made by `KVCache.open`; close it, or use `with`.

    Its blocks, by position:

        [0, matched)            found in device memory, shared and never written again
        [matched, loaded)       on their way from a lower tier until `wait`; shared after it
        [.., committed)         computed and committed by this sequence, shared
        [committed, num_blocks) reserved; the caller writes them

    A sequence belongs to one thread at a time; different sequences may be used from different threads.
    """

    def __init__(self, cache: "KVCache", root: ChainRoot, tokens: Tokens) -> None:
        self._cache = cache
        self._tokens = array("I")
        self._tokens.frombytes(pack_tokens(tokens))
        self._chain = KeyChain(root, cache.block_size)
        self._chain.extend(memoryview(self._tokens).cast("B"))
        self._table = np.empty(0, dtype=np.int32)
        self._num_blocks = 0
        self._num_shared_blocks = 0  # leading blocks that are registered in the device pool
        self._transfer: Transfer | None = None
        self._num_cached_tokens: int | None = None
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_tokens(self) -> int:
        """Tokens given to `open` and `append`."""
        return len(self._tokens)

    @property
    def is_ready(self) -> bool:
        """True once `wait` would return at once."""
        return self._transfer is None or self._transfer.is_due

    @property
    def num_cached_tokens(self) -> int:
        """Leading tokens whose KV need not be computed; whole blocks, and fewer than `num_tokens` at the time of `open`.

        Raises:
            SequenceStateError: before `wait` or `ready`, since a load may still fail.
        """
        if self._num_cached_tokens is None:
            raise SequenceStateError("num_cached_tokens is known only after wait() or ready()")
        return self._num_cached_tokens

    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """int32 [num_blocks]: device slots of the sequence's blocks. `wait` and `commit` may exchange equal blocks in it."""
        return self._table[: self._num_blocks]

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until the loads that `open` started have ended; what failed, or is late, is not cached.

        Args:
            timeout_s: what has not arrived by then is computed instead; at most, and by default, the cache's
                `load_timeout_s` since `open`.
        """
        if self._transfer is not None:
            self._check_open()
            self._cache._adopt_loaded(self, timeout_s)

    async def ready(self) -> None:
        """`wait` without blocking the event loop."""
        transfer = self._transfer
        if transfer is not None and not transfer.is_ended:
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()

            def tell_loop() -> None:
                loop.call_soon_threadsafe(ended.set)

            transfer.when_ended(tell_loop)
            try:
                await asyncio.wait_for(ended.wait(), transfer.remaining_s)
            except TimeoutError:
                transfer.expire()
        self.wait(0.0)

    def append(self, tokens: Tokens) -> None:
        """Adds tokens and reserves slots for their KV: for all of them or, with an error, none.

        Raises:
            OutOfBlocksError: the device pool is full of blocks in use; nothing was changed.
            ValueError: a token is not in [0, 2**32).
        """
        self._check_open()
        added = pack_tokens(tokens)
        num_blocks = -(-(len(self._tokens) + len(added) // 4) // self._cache.block_size)
        if num_blocks > self._num_blocks:
            self._cache._grow(self, num_blocks)
        self._tokens.frombytes(added)

    def commit(self, num_tokens: int | None = None) -> None:
        """Says that the KV of the first `num_tokens` tokens (default: all) is written and will not change.

        Their full blocks become reusable by other sequences and are offered to the lower tiers. On CUDA, kernels that
        write them must have been submitted to the current stream.

        Raises:
            SequenceStateError: before `wait`, or beyond the sequence's tokens.
        """
        self._check_open()
        count = len(self._tokens) if num_tokens is None else num_tokens
        if self._num_cached_tokens is None:
            raise SequenceStateError("commit() before wait(): blocks that are still being loaded cannot be committed")
        if not 0 <= count <= len(self._tokens):
            raise SequenceStateError(f"cannot commit {count} tokens of a sequence of {len(self._tokens)}")
        num_full = count // self._cache.block_size
        if num_full > self._num_shared_blocks:
            self._extend_chain(num_full)
            self._cache._share(self, num_full)

    def close(self) -> None:
        """Gives all blocks back: committed ones stay cached until evicted, the others are free. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._cache._release(self)

    def _extend_chain(self, num_blocks: int) -> None:
        num_hashed = len(self._chain.keys)
        if num_blocks > num_hashed:
            size = self._cache.block_size
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
