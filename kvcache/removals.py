"""A short memory of blocks that a tier gave up or refused, to explain why one is not there."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo.kvcache.hashing import BlockKey

__all__ = ["MAX_REMOVALS", "Removal", "RemovalLog"]

MAX_REMOVALS = 4096


@dataclass(frozen=True, slots=True)
class Removal:
    """Why a block is not there: "evicted", "cleared", "lost", "resized" or "not_admitted", and since when.

    Attributes:
        time_s: on the monotonic clock.
    """

    reason: str
    time_s: float


class RemovalLog:
    """The last few thousand removals of one pool. Not thread-safe: belongs to a pool. Adding a batch is a list copy."""

    def __init__(self) -> None:
        self._keys: deque[BlockKey] = deque(maxlen=MAX_REMOVALS)
        self._batches: deque[tuple[int, Removal]] = deque(
            maxlen=MAX_REMOVALS
        )  # number of keys added with it and before
        self._num_added = 0

    def add(self, keys: Sequence[BlockKey], reason: str) -> None:
        """Notes that `keys` are not there any more."""
        if keys:
            self._keys.extend(keys)
            self._num_added += len(keys)
            self._batches.append((self._num_added, Removal(reason, time.monotonic())))

    def find(self, key: BlockKey) -> Removal | None:
        """The last removal of `key`, as far back as the memory reaches."""
        for back, removed in enumerate(reversed(self._keys)):
            if removed == key:
                number = self._num_added - back
                return next(removal for end, removal in self._batches if end >= number)
        return None
