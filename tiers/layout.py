"""The stored form of a block: one contiguous run `[head_group, layer, 2, token, head_in_group, dim]`.

There is one head group today, so layer i's K starts at `2 * i * plane_bytes` and its V one plane later.
"""

from dataclasses import dataclass

from dynamo.tiers.errors import TierConfigError

__all__ = ["SLOT_ALIGNMENT_BYTES", "BlockLayout"]

SLOT_ALIGNMENT_BYTES = 4096
"""Slots are whole pages, so that O_DIRECT can read and write any of them."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Sizes of one block, the same in every tier.

    Attributes:
        num_layers: layers whose K and V a block holds.
        block_size: tokens per block.
        num_kv_heads: KV heads of this tensor-parallel rank.
        head_dim: elements per head.
        itemsize: bytes per element.

    Raises:
        TierConfigError: a size is not a positive integer.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    itemsize: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "block_size", "num_kv_heads", "head_dim", "itemsize"):
            value = getattr(self, name)
            if value < 1:
                raise TierConfigError(f"{name} is {value}; it must be at least 1")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K (or V) in one layer."""
        return self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def plane_bytes(self) -> int:
        """Bytes of one layer's K (or V) of a block."""
        return self.block_size * self.token_bytes

    @property
    def block_bytes(self) -> int:
        """Payload of one block: K and V of all layers."""
        return 2 * self.num_layers * self.plane_bytes

    @property
    def slot_bytes(self) -> int:
        """Place one block takes in every tier: `block_bytes` rounded up to whole pages."""
        return -(-self.block_bytes // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES
