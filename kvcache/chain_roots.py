"""Where the key chains of a cache's prompts start, computed once for each salt and LoRA adapter."""

import threading
from collections import OrderedDict

from dynamo.kvcache.hashing import ChainRoot, chain_root

__all__ = ["ChainRoots"]

_MAX_ROOTS = 1024


class ChainRoots:
    """The roots that were used last. Thread-safe.

    Args:
        fingerprint: of the model and its layout.
        block_size: tokens of a block.
    """

    def __init__(self, fingerprint: bytes, block_size: int) -> None:
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._lock = threading.Lock()
        self._roots: OrderedDict[tuple[str, str], ChainRoot] = OrderedDict()

    def get(self, salt: str, lora: str) -> ChainRoot:
        """The root of prompts of that salt and adapter."""
        with self._lock:
            root = self._roots.get((salt, lora))
            if root is None:
                root = chain_root(self._fingerprint, self._block_size, salt=salt, lora=lora)
                self._roots[salt, lora] = root
                if len(self._roots) > _MAX_ROOTS:
                    self._roots.popitem(last=False)
            else:
                self._roots.move_to_end((salt, lora))
            return root
