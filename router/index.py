"""Who holds how much of a prompt: all workers' blocks in one table, and every worker's reach in one look-up.

Each tier of each worker is a *lane* with a bit of its own in one dict from router key to bit mask (`HolderTable`), and a
look-up reads a few masks along the prompt's keys. That a worker left, was cleared or is replaced means that a few bits count no
longer: constant time, whatever it held. `sweep` forgets the blocks later, a slice at a time, and only then are its bits and
its slot given to others.

Look-ups are exact. Where all lanes that matter are *closed* (see `Lane`), each holds a prefix of the prompt, whose end is
found by bisection; else the prompt is gone through block by block, so that holes are seen. To jump along the prompt instead of
walking is the idea of Dynamo's positional indexer (https://github.com/ai-dynamo/dynamo), which scans back where a worker drops
out; here it is known beforehand whether one may jump.

Everything is synchronous and belongs to one thread.
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from dynamo.router.boundaries import FIRST_BLOCKS, boundaries
from dynamo.router.chain import PrefixChain
from dynamo.router.holders import HolderTable
from dynamo.router.index_stats import IndexStats
from dynamo.router.lane import Lane
from dynamo.router.predictions import Predictions
from dynamo.router.reach import TIERS, Reach
from dynamo.router.walk import Levels, slots_in, walk

__all__ = ["TIERS", "IndexStats", "PrefixIndex", "Reach"]

_MAX_REMEMBERED = 4096  # meanings of masks, and reaches


@dataclass(slots=True)
class _Slot:
    """One worker.

    Attributes:
        lanes: by tier; None before the first block.
        num_unswept: its ended lanes of which the table still has traces.
    """

    is_member: bool = True
    lanes: list[Lane | None] = field(default_factory=lambda: [None] * len(TIERS))
    num_unswept: int = 0


class PrefixIndex:
    """Which worker holds which blocks in which tier, by what the workers say, and what is predicted of them.

    A worker is a slot, from `join` until `leave`; an event for a slot that is none is the caller's mistake (ValueError).
    """

    def __init__(
        self, *, max_blocks: int = 1 << 24, max_predicted_blocks: int = 1 << 20, proof_interval: int = 4096
    ) -> None:
        """An index without workers.

        Args:
            max_blocks: (worker, tier, block) entries, of which each costs up to 120 bytes; what is stored beyond that is
                refused and counted.
            max_predicted_blocks: (worker, block) pairs that are predicted at a time.
            proof_interval: how much must change at least before a lane that has a hole is looked at again; see `Lane`.
        """
        self._table = HolderTable()
        self._predictions = Predictions(max_predicted_blocks)
        self._max_blocks = max_blocks
        self._proof_interval = proof_interval
        self._slots: list[_Slot] = []
        self._free_slots: list[int] = []  # heap
        self._lanes: dict[int, Lane] = {}  # those that count, by bit
        self._ended: deque[Lane] = deque()
        self._num_bits = 0
        self._free_bits: list[int] = []  # heap; low bits first, which keeps masks short
        self._closed = 0  # bits of closed lanes
        self._live = 0  # bits of all lanes that count
        self._open_slots = 0  # bit `1 << slot` of workers with a lane that is not closed
        self._num_lower = 0  # lanes of other tiers than the first
        self._num_entries = 0
        self._num_refused = 0
        self._levels: dict[int, Levels] = {}  # meanings of masks
        self._reaches: dict[int, Reach] = {}  # of workers that have a device tier only, by depth

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
            self._num_entries += lane.stored(keys, parent)
            self._note_proof(lane)

    def removed(self, slot: int, tier: str, keys: Sequence[int]) -> int:
        """Blocks can no longer be had from a tier of the worker.

        Returns:
            how many of them it was not known to hold.
        """
        lane = self._member(slot).lanes[_tier_number(tier)]
        if lane is None or not keys:
            return len(set(keys))
        removed = lane.removed(keys)
        self._num_entries -= removed
        self._note_proof(lane)
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

        Look-ups of prompts that such a worker shares go block by block until it is cleared or has let go of all this, since
        nothing is known of what follows what. Where that is known, replace with nothing and store run by run.

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
                lane = self._lane(slot, tier)
                self._num_entries += lane.stored_loose(admitted)
                self._note_proof(lane)

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
        masks = self._table.masks
        first = masks.get(chain.hashed(FIRST_BLOCKS)[0], 0) & self._live
        expected: list[tuple[int, int]] = []
        if len(self._predictions):
            workers = self._predictions.workers
            expected = boundaries(chain, lambda key: workers(key, now_s))
        if not first and not expected:
            return {}
        if self._open_slots and self._open_slots & (self._meaning(first)[-1] | sum(mask for _, mask in expected)):
            rows = walk(chain, masks, self._meaning, expected)
            return {slot: Reach(*row) for slot, row in rows.items()}
        if self._ended or self._closed != self._live:
            closed = self._closed
            ends = boundaries(chain, lambda key: masks.get(key, 0) & closed)
        else:
            ends = boundaries(chain, masks.__getitem__, masks.__contains__)
        if self._num_lower or expected:
            return self._over_tiers(ends, expected)
        found: dict[int, Reach] = {}
        for depth, mask in ends:
            reach = self._uniform(depth)
            lane = self._lanes.get(mask)
            if lane is not None:
                found[lane.slot] = reach
            else:
                found.update(dict.fromkeys(slots_in(self._meaning(mask)[0]), reach))
        return found

    def sweep(self, now_s: float, max_entries: int) -> int:
        """Forgets what nobody holds any more: expired predictions, and blocks of workers that left or were cleared.

        Returns:
            how many entries were gone through, `max_entries` at most; less than that when nothing is left to do.
        """
        left = max_entries - self._predictions.forget(now_s, max_entries)
        while left > 0 and self._ended:
            lane = self._ended[0]
            count = lane.count
            gone_through = lane.drain(left)
            self._num_entries -= count - lane.count
            left -= gone_through
            if not lane.recorded:
                self._ended.popleft()
                heapq.heappush(self._free_bits, lane.bit)
                self._slots[lane.slot].num_unswept -= 1
                self._free_if_swept(lane.slot)
        return max_entries - left

    def stats(self) -> IndexStats:
        """Counts and memory, in time proportional to the number of lanes."""
        lanes = list(self._lanes.values())
        by_slot = {
            number: {TIERS[lane.tier]: lane.count for lane in slot.lanes if lane is not None}
            for number, slot in enumerate(self._slots)
            if slot.is_member
        }
        table_bytes = self._table.num_bytes()
        per_entry = table_bytes / max(1, self._num_entries)
        record_bytes = {
            number: sum(lane.num_bytes() for lane in slot.lanes if lane is not None)
            for number, slot in enumerate(self._slots)
            if slot.is_member
        }
        return IndexStats(
            num_workers=len(by_slot),
            num_blocks=len(self._table.masks),
            num_entries=sum(lane.count for lane in lanes),
            num_unswept=self._num_entries - sum(lane.count for lane in lanes),
            num_open_lanes=sum(not lane.is_closed for lane in lanes),
            num_predicted=self._predictions.num_blocks,
            num_predictions_evicted=self._predictions.num_evicted,
            num_refused=self._num_refused,
            entries=by_slot,
            slot_bytes={
                number: round(record_bytes[number] + per_entry * sum(counts.values()))
                for number, counts in by_slot.items()
            },
            num_bytes=table_bytes
            + sum(record_bytes.values())
            + sum(lane.num_bytes() for lane in self._ended)
            + self._predictions.num_bytes(),
        )

    def _member(self, slot: int) -> _Slot:
        if not 0 <= slot < len(self._slots) or not self._slots[slot].is_member:
            raise ValueError(f"slot {slot} is no worker's: it was never given out, or the worker has left")
        return self._slots[slot]

    def _lane(self, slot: int, tier: str) -> Lane:
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
            lane = worker.lanes[number] = Lane(self._table, bit, slot, number, self._proof_interval)
            self._lanes[bit] = lane
            self._live |= bit
            self._closed |= bit
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
        self._live &= ~lane.bit
        self._closed &= ~lane.bit
        self._num_lower -= tier > 0
        self._levels.clear()
        self._note_open_slot(lane.slot)

    def _free_if_swept(self, slot: int) -> None:
        worker = self._slots[slot]
        if not worker.is_member and not worker.num_unswept:
            heapq.heappush(self._free_slots, slot)

    def _note_proof(self, lane: Lane) -> None:
        """Takes note of a lane that was opened or closed by an event."""
        if lane.is_closed != bool(self._closed & lane.bit):
            self._closed ^= lane.bit
            self._note_open_slot(lane.slot)

    def _note_open_slot(self, slot: int) -> None:
        self._open_slots &= ~(1 << slot)
        if any(lane is not None and not lane.is_closed for lane in self._slots[slot].lanes):
            self._open_slots |= 1 << slot

    def _admitted(self, keys: Sequence[int]) -> Sequence[int]:
        """As many of `keys` as there is room for."""
        room = self._max_blocks - self._num_entries
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

    def _over_tiers(self, ends: Sequence[tuple[int, int]], expected: Sequence[tuple[int, int]]) -> dict[int, Reach]:
        """Reaches of workers whose lanes and predictions are all prefixes: their union ends where the longest does."""
        rows: dict[int, list[int]] = {}
        for depth, mask in ends:
            for number in slots_in(mask):
                lane = self._lanes[1 << number]
                rows.setdefault(lane.slot, [0] * len(TIERS))[lane.tier] = depth
        for depth, workers in expected:
            for slot in slots_in(workers):
                row = rows.setdefault(slot, [0] * len(TIERS))
                row[0] = max(row[0], depth)
        return {slot: Reach(*accumulate(row, max)) for slot, row in rows.items()}

    def _uniform(self, depth: int) -> Reach:
        reach = self._reaches.get(depth)
        if reach is None:
            if len(self._reaches) >= _MAX_REMEMBERED:
                self._reaches.clear()
            reach = self._reaches[depth] = Reach(depth, depth, depth, depth)
        return reach

    def check_invariants(self) -> None:
        """Raises AssertionError if the parts contradict each other. Goes through everything."""
        held: dict[int, dict[int, None]] = {}
        for key, mask in self._table.masks.items():
            assert mask, f"nobody holds {key:#x}, which is kept"
            for number in slots_in(mask):
                held.setdefault(1 << number, {})[key] = None
        known = {**self._lanes, **{lane.bit: lane for lane in self._ended}}
        assert len(known) == len(self._lanes) + len(self._ended), "two lanes share a bit"
        assert not known.keys() & set(self._free_bits), "a lane's bit is free"
        assert len(known) + len(self._free_bits) == self._num_bits, "a bit is lost"
        assert held.keys() <= known.keys(), "blocks carry a bit that is no lane's"
        for bit, lane in known.items():
            lane.check_invariants(held.get(bit, {}))
        assert self._num_entries == sum(map(len, held.values())), "entries are miscounted"
        assert self._live == sum(self._lanes), "the mask of lanes that count is wrong"
        assert self._closed == sum(bit for bit, lane in self._lanes.items() if lane.is_closed), "closed lanes are wrong"
        assert self._num_lower == sum(lane.tier > 0 for lane in self._lanes.values()), "lower lanes are miscounted"
        for number, slot in enumerate(self._slots):
            lanes = [lane for lane in slot.lanes if lane is not None]
            assert all(self._lanes[lane.bit] is lane and lane.slot == number for lane in lanes), f"slot {number}"
            assert slot.num_unswept == sum(lane.slot == number for lane in self._ended), f"slot {number} is miscounted"
            is_open = any(not lane.is_closed for lane in lanes)
            assert bool(self._open_slots >> number & 1) is is_open, f"slot {number}: whether a lane is open is wrong"
            assert (number in self._free_slots) == (not slot.is_member and not slot.num_unswept), (
                f"slot {number} is lost"
            )
        self._predictions.check_invariants()


def _tier_number(tier: str) -> int:
    try:
        return TIERS.index(tier)
    except ValueError:
        raise ValueError(f"there is no tier {tier!r}; the tiers are {', '.join(TIERS)}") from None
