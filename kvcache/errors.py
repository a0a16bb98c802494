"""Errors of the cache.

KVCacheError
├── CacheConfigError    a size, path or spec given to the constructor is wrong (also a ValueError)
├── CacheMemoryError    device or host memory does not suffice for the sizes asked for (also a MemoryError)
├── OutOfBlocksError    the device pool cannot give the blocks asked for; nothing was reserved
├── PinLimitError       a pin would hold more of a tier than pins may; nothing was pinned
├── UnsupportedError    the cache, as it was made, cannot do what was asked
├── CacheClosedError    the cache or sequence was used after close()
├── LayerLoadError      the device failed to take blocks that a sequence counts on already
└── SequenceStateError  a sequence's methods were called in an order that has no meaning

A missing, damaged or late block is none of these: it is computed again, and counted in `KVCache.stats()`. Tokens that are
no token ids raise a plain ValueError.
"""

__all__ = [
    "CacheClosedError",
    "CacheConfigError",
    "CacheMemoryError",
    "KVCacheError",
    "LayerLoadError",
    "OutOfBlocksError",
    "PinLimitError",
    "SequenceStateError",
    "UnsupportedError",
]


class KVCacheError(Exception):
    """Root of all errors raised by `dynamo.kvcache`."""


class CacheConfigError(KVCacheError, ValueError):
    """A constructor argument is wrong. The message names it, its value and what would be accepted."""


class CacheMemoryError(KVCacheError, MemoryError):
    """Device or host memory does not suffice; ask for less.

    Attributes:
        tier: which does not fit: "device"; "host", which without a host tier is the buffer for transfers; or "disk" for
            the memory that its index takes.
        needed_bytes: what the tier needs.
        available_bytes: what the machine can still give; None where unknown.
    """

    def __init__(self, message: str, *, tier: str, needed_bytes: int, available_bytes: int | None) -> None:
        super().__init__(message)
        self.tier = tier
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class OutOfBlocksError(KVCacheError):
    """The device pool cannot give the blocks asked for; nothing was reserved. Close a sequence and try again.

    Attributes:
        needed_blocks: blocks that had to be reserved.
        available_blocks: free and evictable blocks at that moment.
    """

    def __init__(self, needed_blocks: int, available_blocks: int) -> None:
        super().__init__(
            f"{needed_blocks} device blocks are needed and {available_blocks} are free or evictable; "
            "close other sequences, or give the cache more device blocks"
        )
        self.needed_blocks = needed_blocks
        self.available_blocks = available_blocks


class PinLimitError(KVCacheError):
    """A pin would hold more of a tier, or be one more, than pins may. Nothing was pinned; end other pins first.

    Attributes:
        tier: the tier that is short; None when there are too many pins.
        needed_blocks: what all pins would hold of it together, this one included.
        allowed_blocks: what they may hold.
    """

    def __init__(self, message: str, *, tier: str | None, needed_blocks: int, allowed_blocks: int) -> None:
        super().__init__(message)
        self.tier = tier
        self.needed_blocks = needed_blocks
        self.allowed_blocks = allowed_blocks


class UnsupportedError(KVCacheError):
    """What was asked cannot be done with a cache made as this one was. The message says what can."""


class CacheClosedError(KVCacheError):
    """The cache or the sequence is closed."""


class LayerLoadError(KVCacheError):
    """Blocks that are loaded by layers did not reach device memory. Close the sequence; its KV is not complete.

    Attributes:
        layer: the layer waited for.
        num_blocks: blocks that were promised.
    """

    def __init__(self, layer: int, num_blocks: int) -> None:
        super().__init__(
            f"layer {layer} of {num_blocks} KV blocks did not reach device memory; "
            "close the sequence and open it again, or check the device"
        )
        self.layer = layer
        self.num_blocks = num_blocks


class SequenceStateError(KVCacheError):
    """A method was called too early, or with a position the sequence does not have."""
