"""Batches that wait behind a gap."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dynamo.kvcache.event_wire import WireEvent

__all__ = ["PendingBatches", "PositionedBatch"]


class PositionedBatch(NamedTuple):
    """A batch and the span of positions that it covers; see `dynamo.router.feed`.

    Attributes:
        first: position of its first event; last + 1 if it has none.
        digest: of its bytes; 0 where nobody needs it.
        num_hashes: what it costs to keep, about.
    """

    seq: int
    first: int
    last: int
    events: Sequence[WireEvent]
    ts: float
    digest: int
    num_hashes: int


class PendingBatches:
    """Batches by number, as many as memory allows. Not thread-safe."""

    def __init__(self, max_batches: int, max_hashes: int) -> None:
        self._max_batches = max_batches
        self._max_hashes = max_hashes
        self._num_hashes = 0
        self._by_seq: dict[int, PositionedBatch] = {}

    def __len__(self) -> int:
        return len(self._by_seq)

    def __contains__(self, seq: object) -> bool:
        return seq in self._by_seq

    def add(self, batch: PositionedBatch) -> int:
        """Keeps one more. Returns how many of the oldest had no room any more."""
        self._by_seq[batch.seq] = batch
        self._num_hashes += batch.num_hashes
        dropped = 0
        while len(self._by_seq) > self._max_batches or self._num_hashes > self._max_hashes:
            self.take(min(self._by_seq))
            dropped += 1
        return dropped

    @property
    def first(self) -> PositionedBatch:
        """The oldest. There must be one."""
        return self._by_seq[min(self._by_seq)]

    def take(self, seq: int) -> PositionedBatch:
        """Gives one out, which is not kept any more."""
        batch = self._by_seq.pop(seq)
        self._num_hashes -= batch.num_hashes
        return batch

    def in_order(self) -> Iterator[PositionedBatch]:
        """All that are kept now, oldest first; those seen may be taken meanwhile."""
        return map(self._by_seq.__getitem__, sorted(self._by_seq))

    def clear(self) -> None:
        """Keeps none."""
        self._by_seq.clear()
        self._num_hashes = 0
