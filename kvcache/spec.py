"""What the KV of one model looks like."""

from dataclasses import dataclass

import torch
import xxhash

from dynamo.kvcache.errors import CacheConfigError
from dynamo.tiers.layout import BlockLayout

__all__ = ["KVSpec"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """Shape, dtype and identity of a model's KV blocks.

    Attributes:
        model: names the weights. Two caches share blocks only if it is equal, so put a digest of the weights into it
            where a name alone may come to mean other weights.
        num_layers: attention layers.
        num_kv_heads: K/V heads of one tensor-parallel rank.
        head_dim: elements of one head's K or V.
        dtype: float32, bfloat16 or float16.
        block_size: tokens of a block, a power of two.

    Raises:
        CacheConfigError: a value is out of range.
    """

    model: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int = 16

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            value = getattr(self, name)
            if value < 1:
                raise CacheConfigError(f"{name} must be at least 1, not {value}")
        if self.block_size & (self.block_size - 1) or self.block_size > 1024:
            raise CacheConfigError(f"block_size must be a power of two up to 1024, not {self.block_size}")
        if self.dtype not in _DTYPES:
            names = ", ".join(str(dtype) for dtype in _DTYPES)
            raise CacheConfigError(f"dtype must be one of {names}, not {self.dtype}")

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that differ whenever any attribute does. Part of every block key and of the disk tier's folder name."""
        fields = (self.model, self.num_layers, self.num_kv_heads, self.head_dim, str(self.dtype), self.block_size)
        return xxhash.xxh3_128_digest("\x00".join(str(field) for field in fields).encode())

    @property
    def layout(self) -> BlockLayout:
        """How a block lies in a slot."""
        return BlockLayout(
            num_layers=self.num_layers,
            block_size=self.block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            itemsize=self.dtype.itemsize,
        )
