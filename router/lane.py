"""What one worker holds in one tier, in the order in which the blocks follow one another."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from sys import getsizeof

from dynamo.router.holders import HolderTable

__all__ = ["Lane", "Run"]

_RUN_BYTES = 250  # Run, its array's header, and its entry in `tips`
_DETACH_PASSES = 4  # over one batch, which may name a run first to last, or before the runs behind it


@dataclass(slots=True, eq=False)
class Run:
    """Blocks that follow one another.

    Attributes:
        keys: u64, first to last; 8 bytes each where a list of ints would take 56.
        parent: key of the block before the first, None where the first block starts a sequence.
    """

    keys: "array[int]"
    parent: int | None


class Lane:
    """One tier of one worker: a bit of the holder table, and records of which keys carry it. Not thread-safe.

    The records answer two questions that the table cannot. Which keys carry this bit, so that a lane that ended can be swept
    without a pass over all others' blocks. And whether it is *closed*: whether it holds, with each block, the block before
    it. On any sequence a closed lane holds a prefix, so that its length can be found by bisection; of an open one every block
    must be looked at.

    Being closed is proven, not assumed: a stored run must start a sequence or follow a block that is held, and a removed
    block must be the last of its run with no other run behind it, which is the order of every cache that evicts the tail
    first. What does not fit opens the lane. While it is closed, its runs are exactly what it holds; while it is open, they
    are a superset, and are gone through after as many changes as they are long, which forgets what is no longer held and
    finds out whether the hole has closed.

    Attributes:
        bit: its bit in the table.
        slot: the worker.
        tier: position in TIERS.
        count: keys that carry the bit.
        recorded: keys in the records.
        is_closed: each held block's predecessor is held as well.
    """

    __slots__ = (
        "_changes",
        "_forks",
        "_loose",
        "_proof_interval",
        "_spare",
        "_table",
        "_tips",
        "bit",
        "count",
        "is_closed",
        "recorded",
        "slot",
        "tier",
    )

    def __init__(self, table: HolderTable, bit: int, slot: int, tier: int, proof_interval: int) -> None:
        """A lane that holds nothing, and is closed.

        Args:
            proof_interval: changes of an open lane, besides half as many as it has records, between two looks.
        """
        self._table = table
        self.bit = bit
        self.slot = slot
        self.tier = tier
        self.count = 0
        self.recorded = 0
        self.is_closed = True
        self._tips: dict[int, Run] = {}  # by last key
        self._forks: dict[int, int] = {}  # key → runs whose parent it is; kept while closed
        self._spare: list[Run] = []  # runs with a last key that another run ends with too; while open only
        self._loose: array[int] = array("Q")  # keys whose predecessors are unknown; while open only
        self._proof_interval = proof_interval
        self._changes = 0

    def stored(self, keys: Sequence[int], parent: int | None) -> int:
        """Adds a run; what is held already stays. Returns how many are new."""
        added, first = self._table.add(self.bit, keys)
        if not added:
            return 0
        self.count += added
        if first + added != len(keys):
            self._open()  # a key twice, or a held block behind one that is not: no run of a closed lane
        if first:
            keys, parent = keys[first:], keys[first - 1]
        self._record(keys, parent)
        self._count_changes(len(keys))
        return added

    def stored_loose(self, keys: Sequence[int]) -> int:
        """Adds blocks of unknown order. Returns how many are new."""
        added, first = self._table.add(self.bit, keys)
        if added:
            self.count += added
            self._open()
            self._loose.extend(keys[first:])
            self.recorded += len(keys) - first
            self._count_changes(len(keys))
        return added

    def removed(self, keys: Sequence[int]) -> int:
        """Takes blocks away. Returns how many were held."""
        gone = self._table.discard(self.bit, keys)
        self.count -= len(gone)
        if self.is_closed:
            self._detach(gone)
        else:
            self._count_changes(len(gone))
        return len(gone)

    def drain(self, max_keys: int) -> int:
        """Forgets up to `max_keys` records and what they stand for in the table. For a lane that has ended.

        Returns:
            how many records were gone through; 0 when there are no more.
        """
        self._open()  # what is left of the records is a superset from here on
        while not self._loose:
            if self._spare:
                self._loose = self._spare.pop().keys
            elif self._tips:
                self._loose = self._tips.popitem()[1].keys
            else:
                return 0
        keys = self._loose[-max_keys:].tolist()
        del self._loose[-max_keys:]
        self.recorded -= len(keys)
        self.count -= len(self._table.discard(self.bit, keys))
        return len(keys)

    def num_bytes(self) -> int:
        """Memory of the records."""
        runs = len(self._tips) + len(self._spare)
        return 8 * self.recorded + _RUN_BYTES * runs + getsizeof(self._tips) + getsizeof(self._forks)

    def _record(self, keys: Sequence[int], parent: int | None) -> None:
        """Appends to the run that ends with `parent`, or starts one."""
        run = self._tips.pop(parent, None) if parent is not None else None
        if run is None:
            if parent is not None and self.is_closed:
                if self._holds(parent):
                    self._forks[parent] = self._forks.get(parent, 0) + 1
                else:
                    self._open()
            run = Run(array("Q", keys), parent)
        else:
            run.keys.extend(keys)
        self.recorded += len(keys)
        self._file(run)

    def _file(self, run: Run) -> None:
        """Puts a run where its last key says. Two that end alike exist only while the lane is open."""
        if self._tips.setdefault(run.keys[-1], run) is not run:
            self._open()
            self._spare.append(run)

    def _detach(self, keys: list[int]) -> None:
        """Takes removed keys off the ends of runs; opens the lane if one of them was no end."""
        if len(keys) > 1 and self._detach_run(keys):
            return
        rest = keys
        for _ in range(_DETACH_PASSES):
            rest = [key for key in rest if not self._pop_tip(key)]
            if not rest:
                return
            rest.reverse()
        self._open()

    def _detach_run(self, keys: list[int]) -> bool:
        """True if the keys were the end of one run, last to first, with none behind them; they are off it now."""
        run = self._tips.get(keys[0])
        if run is None or not self._forks.keys().isdisjoint(keys):
            return False
        ascending = array("Q", keys)
        ascending.reverse()
        if run.keys[-len(keys) :] != ascending:
            return False
        del self._tips[keys[0]], run.keys[-len(keys) :]
        self.recorded -= len(keys)
        self._file_rest(run)
        return True

    def _pop_tip(self, key: int) -> bool:
        """Takes `key` off the run that it ends. False if it ends none, or other runs follow it."""
        if key in self._forks:
            return False
        run = self._tips.pop(key, None)
        if run is None:
            return False
        run.keys.pop()
        self.recorded -= 1
        self._file_rest(run)
        return True

    def _file_rest(self, run: Run) -> None:
        """Puts a run that became shorter where its last key says; one that is empty no longer follows its parent."""
        if run.keys:
            self._tips[run.keys[-1]] = run
        elif run.parent is not None:
            self._forks[run.parent] -= 1
            if not self._forks[run.parent]:
                del self._forks[run.parent]

    def _open(self) -> None:
        if self.is_closed:
            self.is_closed = False
            self._forks.clear()
            self._changes = 0

    def _count_changes(self, number: int) -> None:
        if not self.is_closed:
            self._changes += number
            if self._changes > self._proof_interval + self.recorded // 2:
                self._go_through()

    def _go_through(self) -> None:
        """Makes the records anew from what is still held, each key once, and closes the lane if nothing is missing."""
        runs = [*self._tips.values(), *self._spare]
        loose = self._loose.tolist()
        self._tips, self._spare, self._loose = {}, [], array("Q")
        self.recorded = self._changes = 0
        seen: set[int] = set()
        parents: list[int] = []
        for run in runs:
            self._keep_held(run, seen, parents)
        self._loose.extend(key for key in dict.fromkeys(loose) if key not in seen and self._holds(key))
        self.recorded += len(self._loose)
        if not self._loose and all(map(self._holds, parents)):
            self.is_closed = True
            for parent in parents:
                self._forks[parent] = self._forks.get(parent, 0) + 1

    def _keep_held(self, run: Run, seen: set[int], parents: list[int]) -> None:
        """Files those stretches of a run that are held and in no other run; notes their parents."""
        keys = run.keys.tolist()
        get, bit = self._table.masks.get, self.bit
        held = [get(key, 0) & bit for key in keys]
        if all(held) and seen.isdisjoint(keys) and len(before := set(keys)) == len(keys):
            seen |= before
            self._keep(run, parents)
            return
        previous, stretch = run.parent, None
        for key, is_held in zip(keys, held, strict=True):
            if is_held and key not in seen:
                seen.add(key)
                if stretch is None:
                    stretch = Run(array("Q"), previous)
                stretch.keys.append(key)
            elif stretch is not None:
                self._keep(stretch, parents)
                stretch = None
            previous = key
        if stretch is not None:
            self._keep(stretch, parents)

    def _keep(self, run: Run, parents: list[int]) -> None:
        self.recorded += len(run.keys)
        self._tips[run.keys[-1]] = run
        if run.parent is not None:
            parents.append(run.parent)

    def _holds(self, key: int) -> bool:
        return bool(self._table.masks.get(key, 0) & self.bit)

    def check_invariants(self, held: Mapping[int, object]) -> None:
        """Raises AssertionError if the records and `held`, the keys that carry the bit, do not fit together."""
        runs = [*self._tips.values(), *self._spare]
        recorded = [*self._loose.tolist(), *(key for run in runs for key in run.keys)]
        assert len(recorded) == self.recorded, f"{len(recorded)} records are counted as {self.recorded}"
        assert len(held) == self.count, f"{len(held)} held keys are counted as {self.count}"
        assert set(recorded) >= set(held), "a held key is in no record, so that a sweep would leave it"
        assert all(run.keys and tip == run.keys[-1] for tip, run in self._tips.items()), (
            "a run is filed under another key"
        )
        if self.is_closed:
            assert len(recorded) == self.count, "a closed lane has records of what it does not hold"
            assert not self._spare and not self._loose, "a closed lane has runs that end alike, or loose keys"
            forks: dict[int, int] = {}
            for run in runs:
                if run.parent is not None:
                    assert run.parent in held, f"a run follows {run.parent:#x}, which a closed lane does not hold"
                    forks[run.parent] = forks.get(run.parent, 0) + 1
            assert forks == self._forks, "the runs behind each key are miscounted"
