"""A tiered, content-addressed KV cache for language models: a device pool over a block store of host memory and disk.

    KVCache ──► BlockPool (device slots)          Sequence: a token sequence's blocks, pinned while it is open
       │
       └──► BlockStore ──► BlockPool + tier (host), BlockPool + tier (disk), offload and load threads

`hashing` and `events` load no torch, so that a router can use them; the names below are therefore imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "dynamo.kvcache":
    raise ImportError(f"this package is dynamo.kvcache, imported as {__name__!r}; run python with -P or from elsewhere")

if TYPE_CHECKING:
    from dynamo.kvcache.cache import KVCache
    from dynamo.kvcache.errors import KVCacheError, OutOfBlocksError
    from dynamo.kvcache.leases import Lease
    from dynamo.kvcache.sequence import Sequence
    from dynamo.kvcache.spec import KVSpec
    from dynamo.kvcache.stats import CacheStats
    from dynamo.kvcache.status import Residency

__all__ = ["CacheStats", "KVCache", "KVCacheError", "KVSpec", "Lease", "OutOfBlocksError", "Residency", "Sequence"]

_HOMES = {
    "CacheStats": "stats",
    "KVCache": "cache",
    "KVCacheError": "errors",
    "KVSpec": "spec",
    "Lease": "leases",
    "OutOfBlocksError": "errors",
    "Residency": "status",
    "Sequence": "sequence",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
