"""Priority and time to live for orders that know neither."""

from collections.abc import Callable, Iterator
from heapq import heappop, heappush

from dynamo.kvcache.eviction import EvictionOrder, Use

__all__ = ["Retention"]


class Retention:
    """Expired entries first, then those of the lowest priority, and within one priority the order that is wrapped.

    Implements EvictionOrder. An entry costs one dictionary place, and one in a heap if it expires.
    """

    def __init__(self, make_order: Callable[[], EvictionOrder]) -> None:
        """
        Args:
            make_order: called once for each priority that is used.
        """
        self._make_order = make_order
        self._orders: dict[int, EvictionOrder] = {}  # by priority, lowest first
        self._priority: dict[int, int] = {}
        self._expiring: list[tuple[float, int]] = []  # heap; places of removed entries are dropped when they come up
        self._expired: dict[int, None] = {}

    def add(self, entry: int, use: Use, num_blocks: int) -> None:
        """Files an entry under its priority."""
        order = self._orders.get(use.priority)
        if order is None:
            order = self._make_order()
            self._orders = dict(sorted({**self._orders, use.priority: order}.items()))
        order.add(entry, use, num_blocks)
        self._priority[entry] = use.priority
        if use.expires_s is not None:
            heappush(self._expiring, (use.expires_s, entry))

    def remove(self, entry: int) -> None:
        """Forgets an entry."""
        priority = self._priority.pop(entry, None)
        if priority is not None:
            self._expired.pop(entry, None)
            self._orders[priority].remove(entry)
            if len(self._expiring) > 2 * len(self._priority) + 64:
                self._expiring = sorted(place for place in self._expiring if place[1] in self._priority)

    def candidates(self, now_s: float) -> Iterator[int]:
        """Expired entries, then the others."""
        while self._expiring and self._expiring[0][0] <= now_s:
            entry = heappop(self._expiring)[1]
            if entry in self._priority:
                self._expired[entry] = None
        yield from self._expired
        for order in self._orders.values():
            for entry in order.candidates(now_s):
                if entry not in self._expired:
                    yield entry
