"""What a worker's events and snapshots do to its slot of the index."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, cast

from dynamo.kvcache.event_wire import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    SnapshotMessage,
    WireEvent,
    tier_of,
)
from dynamo.router.foreign import ForeignKeys

__all__ = ["BlockIndex", "SlotWriter"]


class BlockIndex(Protocol):
    """What is written to; see `router.index.PrefixIndex`."""

    def stored(self, slot: int, tier: str, keys: Sequence[int], parent: int | None) -> object: ...
    def removed(self, slot: int, tier: str, keys: Sequence[int]) -> int: ...
    def cleared(self, slot: int, tier: str | None = None) -> None: ...
    def replace(self, slot: int, held: Mapping[str, Sequence[int]]) -> None: ...


class SlotWriter:
    """Writes to one slot, through the translation of the engine's hashes where it has its own. Not thread-safe.

    Attributes:
        unknown_removals: blocks removed that the index did not have.
        unknown_events: of a kind, or for a tier, unknown here.
    """

    def __init__(self, index: BlockIndex, slot: int, tiers: Sequence[str], foreign: ForeignKeys | None) -> None:
        self._index = index
        self._slot = slot
        self._tiers = frozenset(tiers)
        self._foreign = foreign
        self._rest: Iterator[tuple[str, Sequence[int], int | None]] = iter(())
        self.unknown_removals = 0
        self.unknown_events = 0

    def apply(self, event: WireEvent) -> bool:
        """False if the event's kind or tier is unknown here, so that nothing was done."""
        match event:
            case BlockStored() if (tier := tier_of(event)) in self._tiers:
                if self._foreign is None:
                    keys = cast("Sequence[int]", event.block_hashes)
                    self._index.stored(self._slot, tier, keys, cast("int | None", event.parent_block_hash))
                    return True
                for run in self._foreign.stored(event):
                    self._index.stored(self._slot, tier, run.keys, run.parent)
            case BlockRemoved() if (tier := tier_of(event)) in self._tiers:
                if self._foreign is None:
                    keys = cast("Sequence[int]", event.block_hashes)
                else:
                    keys = self._foreign.removed(event)
                self.unknown_removals += self._index.removed(self._slot, tier, keys)
            case AllBlocksCleared() if event.tier is None or event.tier in self._tiers:
                self._index.cleared(self._slot, event.tier)
                if self._foreign is not None:
                    self._foreign.cleared(event.tier)
            case _:
                self.unknown_events += 1
                return False
        return True

    def clear(self) -> None:
        """The worker may hold nothing any more."""
        self._index.cleared(self._slot)
        if self._foreign is not None:
            self._foreign.cleared()

    def forget(self) -> None:
        """The worker is another one, whose hashes may mean something else."""
        self._index.cleared(self._slot)
        if self._foreign is not None:
            self._foreign.forget()

    def replace(self, message: SnapshotMessage) -> None:
        """Begins to put a snapshot in the place of all that was there. `load` goes on.

        Blocks of unknown order go in at once. Until all are in, less is claimed than is true.
        """
        held = {tier: keys for tier, keys in message.held.items() if tier in self._tiers}
        self._index.replace(self._slot, {tier: keys for tier, keys in held.items() if tier not in message.starts})
        self._rest = _runs(held, message.starts)

    def load(self, max_blocks: int) -> bool:
        """Puts in about `max_blocks` of the snapshot. False when all are in."""
        for tier, keys, parent in self._rest:
            self._index.stored(self._slot, tier, keys, parent)
            max_blocks -= len(keys)
            if max_blocks <= 0:
                return True
        return False


def _runs(
    held: Mapping[str, Sequence[int]], starts: Mapping[str, Sequence[tuple[int, int | None]]]
) -> Iterator[tuple[str, Sequence[int], int | None]]:
    """(tier, keys, parent) of a snapshot's runs."""
    for tier, keys in held.items():
        ends = [position for position, _ in starts.get(tier, ())][1:]
        for (start, parent), end in zip(starts.get(tier, ()), [*ends, len(keys)], strict=False):
            yield tier, keys[start:end], parent
