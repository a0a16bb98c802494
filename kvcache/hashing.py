"""Block keys: 16 bytes that name a full block *and its whole prefix*, the same in every process.

Two independent chains of seeded XXH3-64 run over the little-endian u32 tokens of each block:

    lo[i] = xxh3_64(tokens[i], seed=lo[i-1])        hi[i] = xxh3_64(tokens[i], seed=hi[i-1])

and `key[i] = lo[i] || hi[i]`, both little-endian. The root seeds are digests of everything two caches must agree on before
they may share a block. The store compares all 128 bits; a router needs and keeps only `lo`. This module loads no torch.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NewType, cast

import numpy as np
import numpy.typing as npt
import xxhash

__all__ = ["HASH_VERSION", "BlockKey", "ChainRoot", "KeyChain", "Tokens", "block_keys", "chain_root", "pack_tokens"]

HASH_VERSION = 1

BlockKey = NewType("BlockKey", bytes)
"""16 bytes. A NewType, so that no other bytes are taken for one."""

Tokens = Sequence[int] | npt.NDArray[np.uint32]
"""Token ids, each in [0, 2**32). A contiguous uint32 array is read without a copy."""

_PIECES = 64
_HI_ROOT_SEED = 0x9E3779B97F4A7C15  # any constant other than the lo chain's 0: the two roots must differ


@dataclass(frozen=True, slots=True)
class ChainRoot:
    """Seeds of a chain's first block."""

    lo: int
    hi: int


def chain_root(fingerprint: bytes, block_size: int, *, salt: str = "", lora: str = "") -> ChainRoot:
    """Seeds for blocks of one model, block size, tenant salt and LoRA adapter.

    Every part is length-prefixed, so that no two different combinations give the same material.
    """
    parts = (fingerprint, struct.pack("<I", block_size), salt.encode(), lora.encode(), struct.pack("<I", HASH_VERSION))
    material = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return ChainRoot(xxhash.xxh3_64_intdigest(material, 0), xxhash.xxh3_64_intdigest(material, _HI_ROOT_SEED))


def pack_tokens(tokens: Tokens) -> memoryview:
    """Tokens as a byte view of little-endian u32.

    Raises:
        ValueError: a token is negative, 2**32 or more, or no integer.
    """
    if isinstance(tokens, np.ndarray):
        if tokens.dtype != np.uint32 or tokens.ndim != 1:
            raise ValueError(f"token arrays must be one-dimensional uint32, not {tokens.dtype} of shape {tokens.shape}")
        return np.ascontiguousarray(tokens).data.cast("B")
    if isinstance(tokens, array) and tokens.typecode == "I":
        return memoryview(tokens).cast("B")
    try:
        return memoryview(array("I", tokens)).cast("B")
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers from 0 to 4294967295: {error}") from None


class KeyChain:
    """Block keys of one growing token sequence. Not thread-safe: it belongs to its sequence."""

    __slots__ = ("_block_bytes", "_hi", "_lo", "keys")

    def __init__(self, root: ChainRoot, block_size: int) -> None:
        self._block_bytes = 4 * block_size
        self._lo = root.lo
        self._hi = root.hi
        self.keys: list[BlockKey] = []

    def extend(self, packed: memoryview) -> None:
        """Appends the keys of the full blocks in `packed`, which starts at the first token not yet hashed."""
        size = self._block_bytes
        lo, hi = self._lo, self._hi
        digest = xxhash.xxh3_64_intdigest
        words: list[int] = []
        append = words.append
        for block in _pieces(packed[: len(packed) // size * size], size):
            lo = digest(block, lo)
            hi = digest(block, hi)
            append(lo)
            append(hi)
        self._lo, self._hi = lo, hi
        joined = struct.pack(f"<{len(words)}Q", *words)
        self.keys.extend(cast("list[BlockKey]", _pieces(joined, 16)))


def _pieces(data: bytes | memoryview, size: int) -> list[bytes]:
    """Cuts bytes, many pieces in one call: one by one would take as long as half a digest of each."""
    whole = len(data) - len(data) % (_PIECES * size)
    many = chain.from_iterable(struct.iter_unpack(f"{size}s" * _PIECES, data[:whole]))
    return [*many, *(piece for (piece,) in struct.iter_unpack(f"{size}s", data[whole:]))]


def block_keys(tokens: Tokens, block_size: int, root: ChainRoot) -> list[BlockKey]:
    """Keys of all full blocks of `tokens`, first to last; a partial last block has none."""
    chain = KeyChain(root, block_size)
    chain.extend(pack_tokens(tokens))
    return chain.keys
