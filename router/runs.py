"""Who holds which blocks: one dict from router key to a run of blocks that follow one another and have the same holders."""

from collections import deque
from collections.abc import Sequence
from itertools import repeat
from sys import getsizeof

import msgspec

__all__ = ["MAX_RUN_BLOCKS", "Run", "RunTable"]

MAX_RUN_BLOCKS = 512
"""Bounds what it costs to split a run, or to find a block in the middle of it."""

_KEY_BYTES = (
    48 + 8
)  # an int of 61 to 64 bits: 36 bytes, which the allocator rounds up to its 16-byte steps; and its place
_RUN_BYTES = 200  # Run, its tuple's header, its mask, and its place in the list


class Run(msgspec.Struct, gc=False, eq=False):
    """Blocks that follow one another and are held by the same.

    Invisible to the garbage collector, and so is a dict of millions of keys whose values are runs: they refer to ints alone.

    Attributes:
        keys: first to last; the very objects that are the dict's keys.
        mask: a bit for each holder.
        parent: key of the block before the first, None where that is unknown or where the first starts a sequence.
        follower: a hint: once a run that began with this key followed.
        place: in the table's list of runs.
    """

    keys: tuple[int, ...]
    mask: int
    parent: int | None
    follower: int | None = None
    place: int = -1


class RunTable:
    """Key → run of which the block is a part; each block that anybody holds is in one run. Not thread-safe.

    Most of what workers say is about whole runs. To store one that others have costs a comparison of its keys and one
    changed mask, to store a new one a pass over the dict: a dict of this size costs a cache miss for each key that is
    touched, which is more than all else together. A run is split where its holders begin to differ, and short ones are
    joined where they no longer do. That edges of a tree carry many blocks is the idea of radix trees, as in Dynamo's indexer
    (https://github.com/ai-dynamo/dynamo); that all blocks are found in one dict lets events name any of them.

    Holders end at once (`end`), and their bits stay in masks until `sweep` has gone through all runs.

    Attributes:
        runs: the dict itself, for look-ups. Only this class changes it.
        counts: by bit of each holder, blocks that carry it.
        num_entries: sum of `counts`.
        num_unswept: of these, entries of holders that ended.
    """

    __slots__ = ("_all", "_cursor", "_ended", "_max_run", "_short_run", "counts", "num_entries", "num_unswept", "runs")

    def __init__(self, max_run_blocks: int = MAX_RUN_BLOCKS) -> None:
        self._max_run = max_run_blocks
        self._short_run = max_run_blocks // 8  # one that is no longer grows, and is joined with neighbours
        self.runs: dict[int, Run] = {}
        self.counts: dict[int, int] = {}
        self.num_entries = 0
        self.num_unswept = 0
        self._all: list[Run] = []
        self._ended = 0
        self._cursor = 0

    @property
    def num_runs(self) -> int:
        """Runs that the blocks are in."""
        return len(self._all)

    def begin(self, bit: int) -> None:
        """A holder that has nothing yet. No run may carry its bit."""
        self.counts[bit] = 0

    def end(self, bit: int) -> None:
        """The holder is gone. Constant time; its bit is not to be used again before `forgotten`."""
        self._ended |= bit
        self.num_unswept += self.counts[bit]

    def forgotten(self, bit: int) -> bool:
        """Whether nothing is left of a holder that ended; if so, its bit may begin anew."""
        if self.counts[bit]:
            return False
        del self.counts[bit]
        self._ended &= ~bit
        return True

    def add(self, bit: int, keys: Sequence[int], parent: int | None, *, in_order: bool = True) -> int:
        """Gives a holder blocks.

        Args:
            keys: blocks that follow one another; in any order if not `in_order`.
            parent: the block before the first of them, if there is one and it is known.

        Returns:
            how many it did not have.
        """
        added = at = 0
        limit = self._max_run if in_order else 1
        is_mixed = False  # some are known, or there twice: then one looks before
        while at < len(keys):
            run = self.runs.get(keys[at])
            if run is None:
                end = self._end_of_new(keys, at) if is_mixed else min(at + limit, len(keys))
                if not self._insert(bit, keys if end - at == len(keys) else keys[at:end], parent):
                    is_mixed = True
                    continue
                added += end - at
            else:
                start = _position(run.keys, keys[at])
                count = _common(run.keys, start, keys, at)
                end = at + count
                if not run.mask & bit:
                    added += count
                    self._count(bit, count)
                    self._set_mask(run, start, start + count, run.mask | bit)
            at = end
            parent = keys[at - 1] if in_order else None
        return added

    def discard(self, bit: int, keys: Sequence[int]) -> int:
        """Takes blocks from a holder, in any order. Returns how many it had."""
        gone = at = 0
        while at < len(keys):
            run = self.runs.get(keys[at])
            if run is None or not run.mask & bit:
                at += 1
                continue
            start, count = _stretch(run.keys, keys, at)
            self._count(bit, -count)
            mask = run.mask & ~bit
            if mask:
                self._set_mask(run, start, start + count, mask)
            else:
                self._forget(run, start, start + count)
            gone += count
            at += count
        return gone

    def sweep(self, max_steps: int) -> int:
        """Forgets holders that ended. Returns the steps that it took: runs looked at, and blocks forgotten.

        Fewer than `max_steps` when nothing is left to forget.
        """
        steps = 0
        while self.num_unswept and steps < max_steps:
            if not 0 < self._cursor <= len(self._all):
                self._cursor = len(self._all)
            run = self._all[self._cursor - 1]
            count = len(run.keys)
            ended = run.mask & self._ended
            steps += 1
            if ended == run.mask:
                count = min(count, max_steps - steps + 1)
                steps += count - 1
            self._cursor -= count == len(run.keys)
            while ended:
                bit = ended & -ended
                ended ^= bit
                self._count(bit, -count)
                self.num_unswept -= count
            if run.mask & ~self._ended:
                run.mask &= ~self._ended
            else:
                self._forget(run, len(run.keys) - count, len(run.keys))
        return steps

    def num_bytes(self) -> int:
        """Memory of dict, keys and runs."""
        return getsizeof(self.runs) + _KEY_BYTES * len(self.runs) + _RUN_BYTES * len(self._all)

    def _count(self, bit: int, change: int) -> None:
        self.counts[bit] += change
        self.num_entries += change

    def _insert(self, bit: int, keys: Sequence[int], parent: int | None) -> bool:
        """Adds keys that nobody holds, all different, as one run. False if they are not: then nothing was done.

        One pass, in which the interpreter takes no step, and which touches the dict once for each key.
        """
        runs = self.runs
        before = runs.get(parent) if parent is not None and len(keys) <= self._short_run else None
        if before and before.mask == bit and before.keys[-1] == parent and len(before.keys) <= self._short_run:
            run = before
        else:
            run = Run((), bit, parent)
        num_known = len(runs)
        found = list(map(runs.setdefault, keys, repeat(run)))
        if len(runs) - num_known != len(keys):
            new = {key for key, one in zip(keys, found, strict=True) if one is run}.difference(run.keys)
            deque(map(runs.__delitem__, new), maxlen=0)
            return False
        run.keys += tuple(keys)
        if run is not before:
            run.place = len(self._all)
            self._all.append(run)
        self._count(bit, len(keys))
        return True

    def _end_of_new(self, keys: Sequence[int], at: int) -> int:
        """Up to where keys are unknown and all different, which the one at `at` is."""
        seen: set[int] = set()
        for end in range(at, min(at + self._max_run, len(keys))):
            if keys[end] in self.runs or keys[end] in seen:
                return end
            seen.add(keys[end])
        return at + len(seen)

    def _set_mask(self, run: Run, start: int, end: int, mask: int) -> None:
        """Gives part of a run other holders."""
        if end < len(run.keys):
            run, _ = self._split(run, end)
        if start:
            _, run = self._split(run, start)
        run.mask = mask
        if len(run.keys) <= self._short_run:
            self._join_neighbours(run)

    def _forget(self, run: Run, start: int, end: int) -> None:
        """Forgets part of a run."""
        if start > 0 and end < len(run.keys):
            run, _ = self._split(run, end)
        keys = run.keys[start:end]
        if len(keys) == len(run.keys):
            self._unlist(run)
        elif start:
            run.keys = run.keys[:start]
        else:
            run.keys, run.parent = run.keys[end:], keys[-1]
        deque(map(self.runs.__delitem__, keys), maxlen=0)

    def _split(self, run: Run, at: int) -> tuple[Run, Run]:
        """Makes two of a run; the longer part stays the same object, so that fewer keys change theirs."""
        before, after = run.keys[:at], run.keys[at:]
        if len(before) < len(after):
            left, right = Run(before, run.mask, run.parent, after[0], len(self._all)), run
            right.keys, right.parent = after, before[-1]
            new = left
        else:
            left, right = run, Run(after, run.mask, before[-1], run.follower, len(self._all))
            left.keys, left.follower = before, after[0]
            new = right
        self._all.append(new)
        self.runs.update(dict.fromkeys(new.keys, new))
        return left, right

    def _join_neighbours(self, run: Run) -> None:
        left = self.runs.get(run.parent) if run.parent is not None else None
        if left is not None and left.keys[-1] == run.parent:
            run = self._join(left, run)
        right = self.runs.get(run.follower) if run.follower is not None else None
        if right is not None and right.keys[0] == run.follower and right.parent == run.keys[-1]:
            self._join(run, right)

    def _join(self, left: Run, right: Run) -> Run:
        """Makes one of two runs that follow one another, if they have the same holders. Returns where `right` is now."""
        if left is right or left.mask != right.mask or len(left.keys) + len(right.keys) > self._max_run:
            return right
        kept, gone = (left, right) if len(left.keys) >= len(right.keys) else (right, left)
        self.runs.update(dict.fromkeys(gone.keys, kept))
        kept.keys, kept.parent, kept.follower = left.keys + right.keys, left.parent, right.follower
        self._unlist(gone)
        return kept

    def _unlist(self, run: Run) -> None:
        last = self._all.pop()
        if last is not run:
            last.place = run.place
            self._all[run.place] = last

    def check_invariants(self) -> None:
        """Raises AssertionError if the parts contradict each other. Goes through everything."""
        assert all(run.place == place for place, run in enumerate(self._all)), "a run is not where it says"
        counts = dict.fromkeys(self.counts, 0)
        for run in self._all:
            assert 0 < len(run.keys) <= self._max_run, f"a run has {len(run.keys)} blocks"
            assert run.mask, f"nobody holds {run.keys[0]:#x}, which is kept"
            assert all(self.runs.get(key) is run for key in run.keys), "a block is filed under another run"
            mask = run.mask
            while mask:
                bit = mask & -mask
                mask ^= bit
                assert bit in counts, f"{run.keys[0]:#x} carries a bit that is nobody's"
                counts[bit] += len(run.keys)
        assert sum(len(run.keys) for run in self._all) == len(self.runs), "a block is in two runs, or in none"
        assert counts == self.counts, "entries are miscounted"
        assert self.num_entries == sum(counts.values()), "all entries are miscounted"
        unswept = sum(count for bit, count in counts.items() if bit & self._ended)
        assert self.num_unswept == unswept, "entries of holders that ended are miscounted"


def _position(run_keys: tuple[int, ...], key: int) -> int:
    if run_keys[0] == key:
        return 0
    return len(run_keys) - 1 if run_keys[-1] == key else run_keys.index(key)


def _stretch(run_keys: tuple[int, ...], keys: Sequence[int], at: int) -> tuple[int, int]:
    """(start, length) of the part of a run that `keys` name from `at` on, first to last or last to first."""
    start = _position(run_keys, keys[at])
    if start and at + 1 < len(keys) and run_keys[start - 1] == keys[at + 1]:
        count = _common(run_keys[start::-1], 0, keys, at)
        return start + 1 - count, count
    return start, _common(run_keys, start, keys, at)


def _common(run_keys: tuple[int, ...], start: int, keys: Sequence[int], at: int) -> int:
    """How many keys are the same in both, from `start` and from `at` on. The first one is known to be."""
    count = min(len(run_keys) - start, len(keys) - at)
    if count == 1:
        return 1
    ours = run_keys[start : start + count]
    theirs = tuple(keys if count == len(keys) else keys[at : at + count])
    if ours == theirs:
        return count
    same, other = 1, count  # they differ from somewhere between these on
    while other - same > 1:
        middle = (same + other) // 2
        if ours[same:middle] == theirs[same:middle]:
            same = middle
        else:
            other = middle
    return same
