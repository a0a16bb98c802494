"""The keys of one prompt, made only as far as somebody asks."""

import struct
import time
from collections.abc import Callable
from functools import lru_cache

import xxhash

__all__ = ["PrefixChain"]

_CHUNK_BLOCKS = 256  # cut out of the buffer by one call; more would not be faster


class PrefixChain:
    """Router keys (`lo` of each block key) of one token sequence. Not thread-safe: it belongs to its request.

    Only full blocks have keys. A key costs one XXH3 over its block, seeded with the key before it, and is made once; the
    other half of a block key is never made here, since a router that mistakes one block for another only chooses less well.

    Attributes:
        num_blocks: full blocks of the sequence.
        hash_s: elapsed time that making keys took so far.
    """

    __slots__ = ("_block_bytes", "_keys", "_packed", "_root", "_seeds", "hash_s", "num_blocks")

    def __init__(self, root_lo: int, tokens: memoryview | bytes, block_size: int) -> None:
        """Hashes nothing yet.

        Args:
            root_lo: `ChainRoot.lo` of model, block size, salt and adapter.
            tokens: little-endian u32 token ids, as `pack_tokens` makes them. Not copied, and not to be changed while the
                chain is in use.
            block_size: tokens of a block.

        Raises:
            ValueError: the block size is none.
        """
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        packed = memoryview(tokens)
        self._packed = packed if packed.format == "B" and packed.ndim == 1 else packed.cast("B")
        self._block_bytes = 4 * block_size
        self.num_blocks = len(self._packed) // self._block_bytes
        self._root = root_lo
        self._keys: list[int] = []
        self._seeds = iter(self._keys)
        self.hash_s = 0.0

    @property
    def num_hashed(self) -> int:
        """Keys that were made so far."""
        return len(self._keys)

    def keys(self, num_blocks: int) -> list[int]:
        """Keys of the first `num_blocks` blocks, or of all where there are fewer. The list is the caller's."""
        return self.hashed(num_blocks)[:num_blocks]

    def hashed(self, num_blocks: int) -> list[int]:
        """The chain's own list of keys, which has at least as many as `keys` would give. Read it only."""
        keys = self._keys
        end = min(num_blocks, self.num_blocks)
        if len(keys) >= end:
            return keys
        begun_s = time.perf_counter()
        if not keys:
            keys.append(xxhash.xxh3_64_intdigest(self._packed[: self._block_bytes], self._root))
        while len(keys) < end:
            count = min(_CHUNK_BLOCKS, end - len(keys))
            blocks = _splitter(self._block_bytes, count)(self._packed, len(keys) * self._block_bytes)
            # The iterator of seeds runs one behind the end of the list it reads, which `extend` lengthens key by key: the
            # whole chain without a step of the interpreter.
            keys.extend(map(xxhash.xxh3_64_intdigest, blocks, self._seeds))
        self.hash_s += time.perf_counter() - begun_s
        return keys


@lru_cache(maxsize=512)
def _splitter(block_bytes: int, count: int) -> Callable[[memoryview, int], tuple[bytes, ...]]:
    """Cuts `count` blocks out of a buffer, from an offset, in one call."""
    return struct.Struct(f"{block_bytes}s" * count).unpack_from
