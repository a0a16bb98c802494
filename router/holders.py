"""Who holds a block: one dict from router key to a bit for each holder."""

from collections import deque
from collections.abc import Sequence
from itertools import compress
from operator import not_
from sys import getsizeof

__all__ = ["HolderTable"]

_MAX_INTERNED = 1 << 16
_KEY_BYTES = 48  # an int of 61 to 64 bits: 36 bytes, which the allocator rounds up to its 16-byte steps


class HolderTable:
    """Key → bit mask of its holders, never 0. Not thread-safe.

    Every event is applied by a handful of calls that loop in C, since the blocks of one event have few different masks: the
    new mask is made once for each of them. Equal masks are one object, so that a mask costs a block nothing.

    Attributes:
        masks: the dict itself, for look-ups. Only this class changes it.
    """

    __slots__ = ("_interned", "masks")

    def __init__(self) -> None:
        self.masks: dict[int, int] = {}
        self._interned: dict[int, int] = {}

    def add(self, bit: int, keys: Sequence[int]) -> tuple[int, int]:
        """Sets `bit` for all keys.

        Returns:
            how many did not have it, counting a key that comes twice once, and the position of the first of them
            (len(keys) where there is none).
        """
        masks = self.masks
        old = list(map(masks.get, keys))
        distinct = set(old)
        if len(distinct) == 1:
            (mask,) = distinct
            if mask is not None and mask & bit:
                return 0, len(keys)
            fresh = dict.fromkeys(keys, self._intern(bit if mask is None else mask | bit))
            masks.update(fresh)
            return len(fresh), 0
        changed = {mask: self._intern(bit if mask is None else mask | bit) for mask in distinct}
        fresh = dict(zip(keys, map(changed.__getitem__, old), strict=True))
        masks.update(fresh)
        lacking = {mask for mask in distinct if mask is None or not mask & bit}
        if not lacking:
            return 0, len(keys)
        first = min(map(old.index, lacking))
        if len(fresh) == len(keys):
            return sum(map(old.count, lacking)), first
        return len({key for key, mask in zip(keys, old, strict=True) if mask in lacking}), first

    def discard(self, bit: int, keys: Sequence[int]) -> list[int]:
        """Clears `bit` for all keys, and forgets the keys that nobody holds any more.

        Returns:
            those that had it, in the order given; one that comes twice is there once.
        """
        masks = self.masks
        old = list(map(masks.get, keys))
        distinct = set(old)
        held = {mask for mask in distinct if mask is not None and mask & bit}
        if not held:
            return []
        if len(held) < len(distinct):
            chosen = [mask in held for mask in old]
            keys = list(compress(keys, chosen))
            old = list(compress(old, chosen))
        kept = {mask: self._intern(mask & ~bit) for mask in held}
        fresh = dict(zip(keys, map(kept.__getitem__, old), strict=True))  # type: ignore[arg-type]  # no None is left
        if all(kept.values()):
            masks.update(fresh)
        else:
            masks.update(fresh)
            deque(map(masks.pop, compress(fresh, map(not_, fresh.values()))), maxlen=0)
        return list(fresh)

    def num_bytes(self) -> int:
        """Memory of dict, keys and masks."""
        masks = sum(map(getsizeof, self._interned)) + getsizeof(self._interned)
        return getsizeof(self.masks) + _KEY_BYTES * len(self.masks) + masks

    def _intern(self, mask: int) -> int:
        if len(self._interned) >= _MAX_INTERNED:
            self._interned.clear()  # masks in use live on in the table; only new ones no longer share their objects
        return self._interned.setdefault(mask, mask)
