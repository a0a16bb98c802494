"""Who holds a block: one dict from router key to a bit for each holder."""

from collections import deque
from collections.abc import Sequence
from itertools import compress, repeat
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
        masks: the dict itself, for look-ups. Only this class changes it. A plain dict of ints, which the garbage collector
            does not go through, however large it is.
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
        if keys[0] not in masks:
            return self._add_new(bit, keys), 0
        old = list(map(masks.get, keys))
        changed = {mask: self._intern((mask or 0) | bit) for mask in set(old) if mask is None or not mask & bit}
        if not changed:
            return 0, len(keys)
        first = min(map(old.index, changed))
        if old.count(old[0]) == len(old):
            fresh = dict.fromkeys(keys, changed[old[0]])
        else:
            fresh = {key: changed[mask] for key, mask in zip(keys, old, strict=True) if mask in changed}
        masks.update(fresh)
        return len(fresh), first

    def _add_new(self, bit: int, keys: Sequence[int]) -> int:
        """`add` where the first key is new, and then as a rule all are: one pass, which gives new keys their mask."""
        masks = self.masks
        before = len(masks)
        old = list(map(masks.setdefault, keys, repeat(self._intern(bit))))
        added = len(masks) - before
        if added == len(keys):
            return added
        fresh = {key: self._intern(mask | bit) for key, mask in zip(keys, old, strict=True) if not mask & bit}
        masks.update(fresh)
        return added + len(fresh)

    def discard(self, bit: int, keys: Sequence[int]) -> list[int]:
        """Clears `bit` for all keys, and forgets the keys that nobody holds any more.

        Returns:
            those that had it, in the order given; one that comes twice is there once.
        """
        masks = self.masks
        old = list(map(masks.get, keys))
        kept: dict[int | None, int]
        kept = {mask: self._intern(mask & ~bit) for mask in set(old) if mask is not None and mask & bit}
        if kept and old.count(old[0]) == len(old):
            return self._set_all(keys, kept[old[0]])
        fresh = {key: kept[mask] for key, mask in zip(keys, old, strict=True) if mask in kept}
        masks.update(fresh)
        if not all(kept.values()):
            deque(map(masks.pop, compress(fresh, map(not_, fresh.values()))), maxlen=0)
        return list(fresh)

    def _set_all(self, keys: Sequence[int], mask: int) -> list[int]:
        """Gives keys that are all known the same mask, or forgets them if it is 0. Returns them, each once."""
        if mask:
            fresh = dict.fromkeys(keys, mask)
            self.masks.update(fresh)
            return list(fresh)
        before = len(self.masks)
        deque(map(self.masks.pop, keys, repeat(0)), maxlen=0)
        return list(keys) if before - len(self.masks) == len(keys) else list(dict.fromkeys(keys))

    def num_bytes(self) -> int:
        """Memory of dict, keys and masks."""
        masks = sum(map(getsizeof, self._interned)) + getsizeof(self._interned)
        return getsizeof(self.masks) + _KEY_BYTES * len(self.masks) + masks

    def _intern(self, mask: int) -> int:
        if len(self._interned) >= _MAX_INTERNED:
            self._interned.clear()  # masks in use live on in the table; only new ones no longer share their objects
        return self._interned.setdefault(mask, mask)
