"""Which blocks a tier takes in. A write costs time, bandwidth and, on flash, wear; most blocks are never read again."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Protocol

from dynamo.kvcache.eviction import Part, Use
from dynamo.kvcache.hazards import ReuseTables, group_of
from dynamo.kvcache.reuse import ReuseTracker, parts

__all__ = ["Adaptive", "AdmissionPolicy", "AdmitAlways", "SecondSighting"]

_STEP = 1.125


class AdmissionPolicy(Protocol):
    """Says how much of a chain a tier may write. Not thread-safe: whoever owns the tier's pools holds a lock."""

    def admit(self, tier: str, keys: Sequence[Hashable], use: Use, num_lacking: int) -> int:
        """How many blocks may be written.

        Args:
            tier: name of the tier.
            keys: the chain as far as it is computed, from its first block on.
            use: the use it belongs to.
            num_lacking: the tier lacks that many of the last blocks of `keys`.

        Returns:
            From 0 to `num_lacking`: the leading ones of those blocks, so that no block is written without its prefix.
        """


class AdmitAlways:
    """Every block. Implements AdmissionPolicy."""

    def admit(self, tier: str, keys: Sequence[Hashable], use: Use, num_lacking: int) -> int:
        """All of them."""
        return num_lacking


class _Ghosts:
    """Keys that were refused, the last `limit` of them, at about 100 bytes each."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._offered_by: dict[int, int] = {}  # hash of a key -> number of the use that offered it first; oldest first

    def __len__(self) -> int:
        return len(self._offered_by)

    def count_leading(self, keys: Sequence[Hashable], use: Use) -> int:
        """How many of `keys`, from the first on, an earlier use offered."""
        seen = (self._offered_by.get(hash(key), use.number) != use.number for key in keys)
        return sum(1 for _ in takewhile(bool, seen))

    def settle(self, keys: Sequence[Hashable], use: Use, num_admitted: int) -> None:
        """Forgets the admitted ones: should the tier lose them, their next sighting is a first one. Remembers the others."""
        ghosts = self._offered_by
        for key in keys[:num_admitted]:
            ghosts.pop(hash(key), None)
        for key in keys[num_admitted:]:
            ghosts.setdefault(hash(key), use.number)
        for _ in range(len(ghosts) - self._limit):
            del ghosts[next(iter(ghosts))]


class SecondSighting:
    """Blocks that an earlier use offered already. Implements AdmissionPolicy. Memory is bounded by `max_ghosts` per tier."""

    def __init__(self, *, max_ghosts: int = 1 << 20) -> None:
        self._ghosts = defaultdict[str, _Ghosts](lambda: _Ghosts(max_ghosts))  # by tier

    @property
    def num_ghosts(self) -> int:
        """Keys remembered, of all tiers."""
        return sum(map(len, self._ghosts.values()))

    def admit(self, tier: str, keys: Sequence[Hashable], use: Use, num_lacking: int) -> int:
        """Those seen before, from the first lacking block on."""
        lacking = keys[len(keys) - num_lacking :]
        admitted = self._ghosts[tier].count_leading(lacking, use)
        self._ghosts[tier].settle(lacking, use, admitted)
        return admitted


class Adaptive:
    """Blocks whose expected hits are worth more than their write and their place. Implements AdmissionPolicy.

    What eviction knows decides here too. A block that is admitted stays until its index falls below the price of the tier's
    slots (`HitDensity.price`); until then it brings hits, less what the slot would bring otherwise. A block that is refused
    may be written when its chain comes back, if it does, and has lost one hit. A block is admitted if the first is worth more
    than the second by the cost of a write, in hits:

        write_cost = seconds of disk bandwidth for a block / seconds saved by a hit

    which for a prefill of 50 ms a block and writes beside other work is about 0.02. A block that an earlier use offered has
    proven itself; the others, most of all writes, may be charged more to spare flash. With `unproven_cost` large this is
    second sighting among what is worth its place; the lower it is, the more is bet on what the tracker foresees. A write
    budget raises both costs as it gets tight.
    """

    def __init__(
        self,
        tracker: ReuseTracker,
        price: Callable[[str, float], float],
        *,
        write_cost: float = 0.02,
        unproven_cost: float = 0.02,
        budget: Callable[[], float] | None = None,
        max_ghosts: int = 1 << 20,
    ) -> None:
        """
        Args:
            price: of a tier at a time in seconds, hits per second and slot.
            write_cost: of a block that an earlier use offered, in hits.
            unproven_cost: of any other block, in hits.
            budget: how tight the write budget is: 0 for not at all, 1 when nothing may be written.
            max_ghosts: refused keys remembered per tier, at about 100 bytes each.
        """
        self._tracker = tracker
        self._price = price
        self._costs = (write_cost, unproven_cost)
        self._budget = budget
        self._ghosts = defaultdict[str, _Ghosts](lambda: _Ghosts(max_ghosts))  # by tier
        self._tables: ReuseTables | None = None  # those that the gains were computed with
        self._gains: dict[tuple[float, float], Sequence[float]] = {}  # by group, for a price and a cost

    @property
    def num_ghosts(self) -> int:
        """Keys remembered, of all tiers."""
        return sum(map(len, self._ghosts.values()))

    def admit(self, tier: str, keys: Sequence[Hashable], use: Use, num_lacking: int) -> int:
        """Up to the end of that part up to which the chain gains most: a part may be written for the sake of the next."""
        first = len(keys) - num_lacking
        lacking = keys[first:]
        ghosts = self._ghosts[tier]
        proven_end = max(use.num_known_blocks, first + ghosts.count_leading(lacking, use))
        prompt_end = max(len(keys) if use.num_prompt_blocks is None else use.num_prompt_blocks, proven_end)
        use_now = replace(use, num_known_blocks=proven_end, num_prompt_blocks=prompt_end)
        price = _nearest_step(self._price(tier, use.time_s))
        room = 1.0 if self._budget is None else 1.0 - self._budget()
        gain, best_gain, admitted = 0.0, 0.0, 0
        for start, end, part in reversed(list(parts(use_now, len(keys)))):
            if end > first and room > 0:
                is_proven = part.part in (Part.KNOWN, Part.SHARED)
                gain += (end - max(start, first)) * self._gain_of(price, is_proven, room)[group_of(part)]
                if gain > best_gain:
                    best_gain, admitted = gain, end - first
        ghosts.settle(lacking, use, admitted)
        return admitted

    def _gain_of(self, price: float, is_proven: bool, room: float) -> Sequence[float]:
        """By group; computed once for what the tracker has learned and each step of price and cost."""
        if self._tables is not self._tracker.tables:
            self._tables = self._tracker.tables
            self._gains.clear()
        cost = _nearest_step(self._costs[0 if is_proven else 1] / room)
        gains = self._gains.get((price, cost))
        if gains is None:
            gains = self._gains[price, cost] = self._tables.write_gain(price, cost).tolist()
        return gains


def _nearest_step(value: float) -> float:
    """A power of 1.125 beside `value`, which is not negative: prices waver with every eviction."""
    return _STEP ** round(math.log(value, _STEP)) if value > 0 else 0.0
