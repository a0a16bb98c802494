"""Which blocks a tier takes in. A write costs time, bandwidth and, on flash, wear; most blocks are never read again."""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from dynamo.kvcache.eviction import Use
from dynamo.kvcache.hazards import ReuseTables, group_of
from dynamo.kvcache.reuse import ReuseTracker, parts

__all__ = ["Adaptive", "AdmissionPolicy", "AdmitAlways", "SecondSighting"]


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


class SecondSighting:
    """Blocks that an earlier use offered already. Implements AdmissionPolicy.

    It remembers the last `max_ghosts` keys that were refused, per tier, at about 100 bytes each.
    """

    def __init__(self, *, max_ghosts: int = 1 << 20) -> None:
        self._max_ghosts = max_ghosts
        self._ghosts: dict[str, dict[int, int]] = {}  # tier -> hash of a key -> number of the use that offered it

    @property
    def num_ghosts(self) -> int:
        """Keys remembered, of all tiers."""
        return sum(map(len, self._ghosts.values()))

    def admit(self, tier: str, keys: Sequence[Hashable], use: Use, num_lacking: int) -> int:
        """Those seen before, from the first lacking block on."""
        ghosts = self._ghosts.setdefault(tier, {})
        lacking = [hash(key) for key in keys[len(keys) - num_lacking :]]
        admitted = 0
        for name in lacking:
            seen = ghosts.get(name)
            if seen is None or seen == use.number:
                break
            del ghosts[name]  # it is written now; should the tier lose it, the next sighting is a first one
            admitted += 1
        for name in lacking[admitted:]:
            ghosts.setdefault(name, use.number)
        for _ in range(len(ghosts) - self._max_ghosts):
            del ghosts[next(iter(ghosts))]
        return admitted


class Adaptive:
    """Blocks whose expected hits are worth more than their write and their place. Implements AdmissionPolicy.

    What eviction knows decides here too. A block that is admitted stays until its index falls below the price of the tier's
    slots (`HitDensity.price`); until then it brings hits, less what the slot would bring otherwise. A block that is refused
    may be written when its chain comes back, if it does, and has lost one hit. A block is admitted if the first is worth more
    than the second by the cost of a write, in hits:

        write_cost = seconds to write a block / seconds saved by a hit

    which for a prefill of 50 ms a block and a disk of 2 GB/s is 0.02. A higher cost spares flash: writes fall much faster
    than hits. A write budget raises the cost as it gets tight.
    """

    def __init__(
        self,
        tracker: ReuseTracker,
        price: Callable[[str], float],
        *,
        write_cost: float = 0.02,
        budget: Callable[[], float] | None = None,
    ) -> None:
        """
        Args:
            price: of a tier, hits per second and slot.
            write_cost: of one block, in hits.
            budget: how tight the write budget is: 0 for not at all, 1 when nothing may be written.
        """
        self._tracker = tracker
        self._price = price
        self._write_cost = write_cost
        self._budget = budget
        self._known: dict[str, tuple[ReuseTables, float, float, Sequence[float]]] = {}  # by tier, for what it was

    def admit(self, tier: str, keys: Sequence[Hashable], use: Use, num_lacking: int) -> int:
        """Up to the end of that part up to which the chain gains most: a part may be written for the sake of the next."""
        room = 1.0 if self._budget is None else 1.0 - self._budget()
        if room <= 0:
            return 0
        cost = self._write_cost / room
        gains = self._gains(tier, cost)
        first = len(keys) - num_lacking
        gain, best_gain, admitted = 0.0, 0.0, 0
        for start, end, part in reversed(list(parts(use, len(keys)))):
            if end > first:
                gain += (end - max(start, first)) * gains[group_of(part)]
                if gain > best_gain:
                    best_gain, admitted = gain, end - first
        return admitted

    def _gains(self, tier: str, cost: float) -> Sequence[float]:
        """By group; computed anew when the tracker has learned, or price or cost have moved by an eighth."""
        tables, price = self._tracker.tables, self._price(tier)
        known = self._known.get(tier)
        if known is not None and known[0] is tables and _is_near(price, known[1]) and _is_near(cost, known[2]):
            return known[3]
        gains: list[float] = tables.write_gain(price, cost).tolist()
        self._known[tier] = (tables, price, cost, gains)
        return gains


def _is_near(value: float, other: float) -> bool:
    return abs(value - other) <= other / 8
