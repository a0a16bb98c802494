"""What became reusable in which tier, and what ceased to be. This module loads no torch."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

from dynamo.kvcache.hashing import BlockKey

__all__ = ["Cleared", "Event", "EventLog", "Removed", "RunStarts", "Snapshot", "Stored"]


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks can be had from `tier`. `keys` follow one another in a chain whose block before the first is `parent`."""

    sequence_number: int
    tier: str
    keys: tuple[BlockKey, ...]
    parent: BlockKey | None


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks can no longer be had from `tier`."""

    sequence_number: int
    tier: str
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    """`tier` was emptied; blocks in use at that moment are stored anew when they are committed again."""

    sequence_number: int
    tier: str


Event = Stored | Removed | Cleared


RunStarts = Sequence[tuple[int, BlockKey | None]]
"""(position, parent): the keys from that position up to the next one follow one another, the first of them after `parent`."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What each tier holds, for a reader of events to start from.

    Attributes:
        sequence_number: of the last event that is in it for certain, -1 for none. Later ones may be in it, or not yet; to
            apply them, in order, to this state does no harm.
        keys: by tier. Each tier's blocks in runs, a run's parent, if that tier has it, always in an earlier run.
        starts: by tier, where the runs begin. A tier that is missing here has its keys in no order.
    """

    sequence_number: int
    keys: Mapping[str, Sequence[BlockKey]]
    starts: Mapping[str, RunStarts] = field(default_factory=dict)


class EventLog:
    """Ring of the last events, numbered from 0 without gaps. Thread-safe.

    A reader starts with a `Snapshot`, since there may be blocks of before the first event, as on a disk found warm, and goes
    on from its number. It keeps the last number it saw. If the first event it is given next is not the one after that
    number, it read too slowly and starts anew.
    """

    def __init__(self, capacity: int = 16384) -> None:
        self._lock = threading.Lock()
        self._grown = threading.Condition(self._lock)
        self._num_waiting = 0  # an engine's thread tells of blocks: with nobody to wake it must not pay for a Condition
        self._ring: deque[Event] = deque(maxlen=capacity)
        self._next = 0

    def stored(self, tier: str, keys: list[BlockKey], parent: BlockKey | None) -> None:
        if keys:
            with self._lock:
                self._append(Stored(self._next, tier, tuple(keys), parent))

    def stored_runs(self, tier: str, keys: list[BlockKey], parents: list[BlockKey | None]) -> None:
        """One `Stored` for each run of `keys` in which every block's parent is the block before it."""
        if keys and parents[1:] == keys[:-1]:
            self.stored(tier, keys, parents[0])
            return
        starts = [i for i in range(len(keys)) if i == 0 or parents[i] != keys[i - 1]]
        for start, end in pairwise([*starts, len(keys)]):
            self.stored(tier, keys[start:end], parents[start])

    def removed(self, tier: str, keys: list[BlockKey]) -> None:
        if keys:
            with self._lock:
                self._append(Removed(self._next, tier, tuple(keys)))

    def cleared(self, tier: str) -> None:
        with self._lock:
            self._append(Cleared(self._next, tier))

    @property
    def last_number(self) -> int:
        """Number of the latest event, -1 before the first."""
        return self._next - 1

    def read(self, after: int) -> list[Event]:
        """Events numbered above `after`, oldest first, as far back as the ring reaches."""
        with self._lock:
            num_new = self._next - 1 - after
            if num_new <= 0:
                return []
            newest = list(islice(reversed(self._ring), num_new))  # from the end: a reader is rarely far behind
        newest.reverse()
        return newest

    def wait(self, after: int, timeout_s: float) -> bool:
        """Blocks until there is an event numbered above `after`. False if `timeout_s` passed first, or `wake` was called."""
        with self._lock:
            if self._next - 1 <= after:
                self._num_waiting += 1
                try:
                    self._grown.wait(timeout_s)
                finally:
                    self._num_waiting -= 1
            return self._next - 1 > after

    def wake(self) -> None:
        """Lets every `wait` return now, so that who waits can look around and end."""
        with self._lock:
            self._grown.notify_all()

    def _append(self, event: Event) -> None:
        self._ring.append(event)
        self._next += 1
        if self._num_waiting:
            self._grown.notify_all()
