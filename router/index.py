"""Who holds how much of a prompt: all workers' blocks in one table, and every worker's reach in one look-up.

Each tier of each worker is a *lane*, and holds the blocks of a `RunTable` under a bit of its own. A look-up goes along the
prompt, from run to run, and reads one mask for each: as many steps as the prompt has holders with different parts of it. That
a worker left, was cleared or is replaced means that a few bits count no longer: constant time, whatever it held. `sweep`
forgets the blocks later, a slice at a time, and only then are its bits and its slot given to others.

Look-ups are exact, whatever holes there are.

Everything is synchronous and belongs to one thread.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from dynamo.router.boundaries import boundaries
from dynamo.router.chain import PrefixChain
from dynamo.router.index_stats import IndexStats
from dynamo.router.predictions import Predictions
from dynamo.router.reach import TIERS, Reach
from dynamo.router.runs import MAX_RUN_BLOCKS, RunTable
from dynamo.router.walk import Levels, prefixes, slots_in, walk

__all__ = ["TIERS", "IndexStats", "PrefixIndex", "Reach"]

_MAX_REMEMBERED = 4096  # meanings of masks, and reaches


@dataclass(frozen=True, slots=True)
class _Lane:
    """A tier of a worker: its bit in the table."""

    bit: int
    slot: int
    tier: int


@dataclass(slots=True)
class _Slot:
    """One worker.

    Attributes:
        lanes: by tier; None before the first block.
        num_unswept: its ended lanes of which the table still has traces.
    """

    is_member: bool = True
    lanes: list[_Lane | None] = field(default_factory=lambda: [None] * len(TIERS))
    num_unswept: int = 0


class PrefixIndex:
    """Which worker holds which blocks in which tier, by what the workers say, and what is predicted of them.

    A worker is a slot, from `join` until `leave`; an event for a slot that is none is the caller's mistake (ValueError).
    """

    def __init__(
        self,
        *,
        max_blocks: int = 1 << 24,
        max_predicted_blocks: int = 1 << 20,
        max_run_blocks: int = MAX_RUN_BLOCKS,
    ) -> None:
        """An index without workers.

        Args:
            max_blocks: (worker, tier, block) entries, of which each costs up to 120 bytes; what is stored beyond that is
                refused and counted.
            max_predicted_blocks: (worker, block) pairs that are predicted at a time.
            max_run_blocks: of what is kept as one run; see `RunTable`.
        """
        self._table = RunTable(max_run_blocks)
        self._predictions = Predictions(max_predicted_blocks)
        self._max_blocks = max_blocks
        self._slots: list[_Slot] = []
        self._free_slots: list[int] = []  # heap
        self._lanes: dict[int, _Lane] = {}  # those that count, by bit
        self._ended: list[_Lane] = []
        self._num_bits = 0
        self._free_bits: list[int] = []  # heap; low bits first, which keeps masks short
        self._live = 0  # bits of all lanes that count
        self._num_lower = 0  # lanes of other tiers than the first
        self._num_refused = 0
        self._levels: dict[int, Levels] = {}  # meanings of masks
        self._reaches: dict[tuple[int, ...], Reach] = {}

    def join(self) -> int:
        """A slot for a worker that holds nothing yet."""
        if self._free_slots:
            slot = heapq.heappop(self._free_slots)
            self._slots[slot] = _Slot()
        else:
            slot = len(self._slots)
            self._slots.append(_Slot())
        return slot

    def leave(self, slot: int) -> None:
        """The worker is gone, with all it held and all that was predicted of it. Constant time."""
        worker = self._member(slot)
        for tier in range(len(TIERS)):
            self._end_lane(worker, tier)
        worker.is_member = False
        self._predictions.void(slot)
        self._free_if_swept(slot)

    def stored(self, slot: int, tier: str, keys: Sequence[int], parent: int | None) -> None:
        """Blocks can be had from a tier of the worker. What is known already stays as it is.

        Args:
            keys: blocks that follow one another.
            parent: the block before the first; None only where the first block starts its sequence. A parent that the worker
                is not known to hold makes a hole, and no error.
        """
        lane = self._lane(slot, tier)
        keys = self._admitted(keys)
        if keys:
            self._table.add(lane.bit, keys, parent)

    def removed(self, slot: int, tier: str, keys: Sequence[int]) -> int:
        """Blocks can no longer be had from a tier of the worker.

        Returns:
            how many of them it was not known to hold.
        """
        lane = self._member(slot).lanes[_tier_number(tier)]
        if lane is None or not keys:
            return len(set(keys))
        removed = self._table.discard(lane.bit, keys)
        return len(keys) - removed if len(keys) == removed else len(set(keys)) - removed

    def cleared(self, slot: int, tier: str | None = None) -> None:
        """A tier of the worker, or all of them, was emptied. Constant time.

        With the device tier goes what was predicted of the worker.
        """
        worker = self._member(slot)
        numbers = range(len(TIERS)) if tier is None else (_tier_number(tier),)
        for number in numbers:
            self._end_lane(worker, number)
        if 0 in numbers:
            self._predictions.void(slot)

    def replace(self, slot: int, held: Mapping[str, Sequence[int]]) -> None:
        """What the worker holds now, whatever was known of it; predictions of it stay.

        Each block that nobody else has costs up to 300 bytes, since nothing is known of what follows what. Where that is
        known, replace with nothing and store run by run.

        Args:
            held: by tier, in any order; a tier that is absent is empty.
        """
        worker = self._member(slot)
        for tier in held:
            _tier_number(tier)  # refuses before anything is changed
        for number in range(len(TIERS)):
            self._end_lane(worker, number)
        for tier, keys in held.items():
            admitted = self._admitted(keys)
            if admitted:
                self._table.add(self._lane(slot, tier).bit, admitted, None, in_order=False)

    def predict(self, slot: int, keys: Sequence[int], expires_s: float) -> None:
        """Counts blocks as the worker's, in its device tier, until a time.

        Args:
            keys: leading blocks of a sequence, from its first.
            expires_s: on the clock of `match` and `sweep`; from then on they no longer count.
        """
        self._member(slot)
        self._predictions.add(slot, keys, expires_s)

    def match(self, chain: PrefixChain, now_s: float = 0.0) -> dict[int, Reach]:
        """slot → how much of the sequence the worker holds. Workers without its first block are absent."""
        if not chain.num_blocks:
            return {}
        runs = self._table.runs
        expected: list[tuple[int, int]] = []
        if len(self._predictions):
            workers = self._predictions.workers
            expected = boundaries(chain, lambda key: workers(key, now_s))
        if self._num_lower or expected:
            return {slot: self._reach(row) for slot, row in walk(chain, runs, self._meaning, expected).items()}
        found: dict[int, Reach] = {}
        for depth, mask in prefixes(chain, runs, self._live):
            reach = self._reach((depth,) * len(TIERS))
            lane = self._lanes.get(mask)
            if lane is not None:
                found[lane.slot] = reach
            else:
                found.update(dict.fromkeys(slots_in(self._meaning(mask)[0]), reach))
        return found

    def sweep(self, now_s: float, max_steps: int) -> int:
        """Forgets what nobody holds any more: expired predictions, and blocks of workers that left or were cleared.

        Returns:
            how many steps that took, `max_steps` at most; less than that when nothing is left to do. A step is a prediction
            or block that is forgotten, or a run of blocks that is looked at: less than a microsecond.
        """
        steps = self._predictions.forget(now_s, max_steps)
        if self._ended:
            steps += self._table.sweep(max_steps - steps)
            ended, self._ended = self._ended, []
            for lane in ended:
                if self._table.forgotten(lane.bit):
                    heapq.heappush(self._free_bits, lane.bit)
                    self._slots[lane.slot].num_unswept -= 1
                    self._free_if_swept(lane.slot)
                else:
                    self._ended.append(lane)
        return steps

    def stats(self) -> IndexStats:
        """Counts and memory, in time proportional to the number of lanes."""
        counts = self._table.counts
        by_slot = {
            number: {TIERS[lane.tier]: counts[lane.bit] for lane in slot.lanes if lane is not None}
            for number, slot in enumerate(self._slots)
            if slot.is_member
        }
        table_bytes = self._table.num_bytes()
        per_entry = table_bytes / max(1, self._table.num_entries)
        return IndexStats(
            num_workers=len(by_slot),
            num_blocks=len(self._table.runs),
            num_runs=self._table.num_runs,
            num_entries=self._table.num_entries - self._table.num_unswept,
            num_unswept=self._table.num_unswept,
            num_predicted=self._predictions.num_blocks,
            num_predictions_evicted=self._predictions.num_evicted,
            num_refused=self._num_refused,
            entries=by_slot,
            slot_bytes={number: round(per_entry * sum(tiers.values())) for number, tiers in by_slot.items()},
            num_bytes=table_bytes + self._predictions.num_bytes(),
        )

    def _member(self, slot: int) -> _Slot:
        if not 0 <= slot < len(self._slots) or not self._slots[slot].is_member:
            raise ValueError(f"slot {slot} is no worker's: it was never given out, or the worker has left")
        return self._slots[slot]

    def _lane(self, slot: int, tier: str) -> _Lane:
        """The worker's lane of a tier, made if there is none."""
        worker = self._member(slot)
        number = _tier_number(tier)
        lane = worker.lanes[number]
        if lane is None:
            if self._free_bits:
                bit = heapq.heappop(self._free_bits)
            else:
                bit = 1 << self._num_bits
                self._num_bits += 1
            lane = self._lanes[bit] = worker.lanes[number] = _Lane(bit, slot, number)
            self._table.begin(bit)
            self._live |= bit
            self._num_lower += number > 0
            self._levels.clear()
        return lane

    def _end_lane(self, worker: _Slot, tier: int) -> None:
        lane = worker.lanes[tier]
        if lane is None:
            return
        worker.lanes[tier] = None
        worker.num_unswept += 1
        del self._lanes[lane.bit]
        self._ended.append(lane)
        self._table.end(lane.bit)
        self._live &= ~lane.bit
        self._num_lower -= tier > 0
        self._levels.clear()

    def _free_if_swept(self, slot: int) -> None:
        worker = self._slots[slot]
        if not worker.is_member and not worker.num_unswept:
            heapq.heappush(self._free_slots, slot)

    def _admitted(self, keys: Sequence[int]) -> Sequence[int]:
        """As many of `keys` as there is room for."""
        room = self._max_blocks - self._table.num_entries
        if len(keys) <= room:
            return keys
        self._num_refused += len(keys) - room
        return keys[:room]

    def _meaning(self, mask: int) -> Levels:
        """Workers that a holders' mask stands for, by tier or faster ones; ended lanes' bits mean nothing."""
        levels = self._levels.get(mask)
        if levels is None:
            tiers = [0] * len(TIERS)
            for number in slots_in(mask & self._live):
                lane = self._lanes[1 << number]
                tiers[lane.tier] |= 1 << lane.slot
            device, host, disk, remote = accumulate(tiers, int.__or__)
            if len(self._levels) >= _MAX_REMEMBERED:
                self._levels.clear()
            levels = self._levels[mask] = (device, host, disk, remote)
        return levels

    def _reach(self, row: tuple[int, ...]) -> Reach:
        """Remembered, since many workers reach equally far."""
        reach = self._reaches.get(row)
        if reach is None:
            if len(self._reaches) >= _MAX_REMEMBERED:
                self._reaches.clear()
            reach = self._reaches[row] = Reach(*row)
        return reach

    def check_invariants(self) -> None:
        """Raises AssertionError if the parts contradict each other. Goes through everything."""
        self._table.check_invariants()
        known = {**self._lanes, **{lane.bit: lane for lane in self._ended}}
        assert len(known) == len(self._lanes) + len(self._ended), "two lanes share a bit"
        assert not known.keys() & set(self._free_bits), "a lane's bit is free"
        assert len(known) + len(self._free_bits) == self._num_bits, "a bit is lost"
        assert self._table.counts.keys() == known.keys(), "the table has other holders"
        assert self._live == sum(self._lanes), "the mask of lanes that count is wrong"
        assert self._num_lower == sum(lane.tier > 0 for lane in self._lanes.values()), "lower lanes are miscounted"
        for number, slot in enumerate(self._slots):
            lanes = [lane for lane in slot.lanes if lane is not None]
            assert all(self._lanes[lane.bit] is lane and lane.slot == number for lane in lanes), f"slot {number}"
            assert slot.num_unswept == sum(lane.slot == number for lane in self._ended), f"slot {number} is miscounted"
            assert (number in self._free_slots) == (not slot.is_member and not slot.num_unswept), (
                f"slot {number} is lost"
            )
        self._predictions.check_invariants()


def _tier_number(tier: str) -> int:
    try:
        return TIERS.index(tier)
    except ValueError:
        raise ValueError(f"there is no tier {tier!r}; the tiers are {', '.join(TIERS)}") from None
