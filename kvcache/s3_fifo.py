"""S3-FIFO: new chains pass through a small queue first, so that those used once never displace those used often."""

from collections import deque
from collections.abc import Iterator

from dynamo.kvcache.eviction import Use

__all__ = ["S3Fifo"]

_SMALL_SHARE = 0.1
_MAX_LAPS = 3


class S3Fifo:
    """Two queues of entries. Implements EvictionOrder; wrap it in Retention for priorities and time to live.

    Adapted from Yang and others, "FIFO queues are all you need for cache eviction", SOSP 2023
    (https://dl.acm.org/doi/10.1145/3600006.3613147). An object there is an entry here. An entry is never used again: a later
    use of its chain takes its blocks to an entry of its own. So what the paper learns from an object's hits and from its
    ghosts, the use brings along: a first turn enters the small queue, a later one the main queue with as many laps to its
    credit as it has turns, at most three. Blocks leave the small queue while it holds more than a tenth of all.
    """

    def __init__(self) -> None:
        self._small: dict[int, int] = {}  # entry -> blocks when it was filed
        self._main: deque[int] = deque()  # removed entries are dropped when they come up
        self._laps: dict[int, int] = {}  # of the entries in the main queue
        self._blocks: dict[int, int] = {}
        self._small_blocks = 0
        self._main_blocks = 0

    def __len__(self) -> int:
        """Entries known."""
        return len(self._small) + len(self._laps)

    def add(self, entry: int, use: Use, num_blocks: int) -> None:
        """Files a first turn in the small queue, and what has been used before in the main queue."""
        if use.turn == 0 and use.num_sharers == 0:
            self._small[entry] = num_blocks
            self._small_blocks += num_blocks
        else:
            self._main.append(entry)
            self._laps[entry] = min(max(use.turn, use.num_sharers), _MAX_LAPS)
            self._blocks[entry] = num_blocks
            self._main_blocks += num_blocks

    def remove(self, entry: int) -> None:
        """Forgets an entry."""
        if entry in self._small:
            self._small_blocks -= self._small.pop(entry)
        elif entry in self._laps:
            del self._laps[entry]
            self._main_blocks -= self._blocks.pop(entry)
            if len(self._main) > 2 * len(self._laps) + 64:
                self._main = deque(known for known in self._main if known in self._laps)

    def candidates(self, now_s: float) -> Iterator[int]:
        """The small queue's oldest while that is too long, else the main queue's oldest without laps to its credit."""
        small_first = self._small_blocks > _SMALL_SHARE * (self._small_blocks + self._main_blocks)
        if small_first:
            yield from self._small
        yield from self._turn_main()
        if not small_first:
            yield from self._small

    def _turn_main(self) -> Iterator[int]:
        """Turns the main queue until each entry has used up its laps, then gives each once."""
        main, laps = self._main, self._laps
        given: set[int] = set()
        for _ in range((_MAX_LAPS + 1) * len(main)):
            if not main:
                return
            entry = main[0]
            credit = laps.get(entry)
            if credit is None:
                main.popleft()
            elif credit:
                laps[entry] = credit - 1
                main.rotate(-1)
            else:
                if entry not in given:
                    given.add(entry)
                    yield entry
                main.rotate(-1)
