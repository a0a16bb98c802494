"""How far each worker reaches along a sequence, run by run: exact whatever holes there are."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence

from dynamo.router.boundaries import FIRST_BLOCKS, STEP_BLOCKS
from dynamo.router.chain import PrefixChain
from dynamo.router.runs import Run

__all__ = ["Levels", "prefixes", "slots_in", "walk"]

Levels = tuple[int, int, int, int]
"""For each tier, the workers (bit `1 << slot`) that hold a block there or in a faster one."""


def prefixes(chain: PrefixChain, runs: Mapping[int, Run], holders: int) -> list[tuple[int, int]]:
    """(depth, holders that have all blocks before `depth` and not the one there), depth ascending, 1 or more.

    Args:
        holders: bits of those that matter.
    """
    num_blocks = chain.num_blocks
    keys = chain.hashed(FIRST_BLOCKS)
    found: list[tuple[int, int]] = []
    alive, at = holders, 0
    while at < num_blocks:
        if at >= len(keys):
            chain.hashed(at + STEP_BLOCKS)
        run = runs.get(keys[at])
        mask = run.mask & alive if run is not None else 0
        if mask != alive:
            if at:
                found.append((at, alive & ~mask))
            alive = mask
        if run is None or not alive:
            return found
        end = at + len(run.keys)
        if end <= len(keys) and keys[end - 1] == run.keys[-1]:
            at = end  # as a rule; see `_end`
        else:
            at = _end(chain, keys, at, run)
    found.append((num_blocks, alive))
    return found


def walk(
    chain: PrefixChain, runs: Mapping[int, Run], levels: Callable[[int], Levels], expected: Sequence[tuple[int, int]]
) -> dict[int, tuple[int, ...]]:
    """slot → leading blocks in each tier or a faster one; workers without the first block are absent.

    Args:
        levels: what a mask means.
        expected: (depth, workers of whom just `depth` leading blocks are predicted), as `boundaries` gives them.
    """
    keys = chain.hashed(FIRST_BLOCKS)
    ends = dict(expected)
    predicted = sum(ends.values())  # no worker is in two of them
    first = runs.get(keys[0])
    alive = list(_present(levels(first.mask if first is not None else 0), predicted))
    rows: dict[int, tuple[int, ...]] = dict.fromkeys(slots_in(alive[-1]), (0, 0, 0, 0))
    at = 0
    while at < chain.num_blocks and alive[-1]:
        next_end = min(ends, default=chain.num_blocks)
        if not alive[-1] & ~predicted:
            at = next_end  # nobody drops out before, whoever holds what
        else:
            if at >= len(keys):
                chain.hashed(at + STEP_BLOCKS)
            run = runs.get(keys[at])
            _drop(alive, _present(levels(run.mask if run is not None else 0), predicted), at, rows)
            at = min(next_end, at + 1 if run is None else _end(chain, keys, at, run))
        predicted &= ~ends.pop(at, 0)
    _drop(alive, (0, 0, 0, 0), chain.num_blocks, rows)
    return rows


def slots_in(workers: int) -> Iterator[int]:
    """Positions of the bits that are set, lowest first."""
    while workers:
        low = workers & -workers
        yield low.bit_length() - 1
        workers ^= low


def _end(chain: PrefixChain, keys: Sequence[int], at: int, run: Run) -> int:
    """Up to where the sequence, which is in a run at `at`, stays in it.

    A key commits to all blocks before it, so that two of the same run are as far apart in the sequence as in the run, with
    the same blocks between them.
    """
    run_keys = run.keys
    start = 0 if run_keys[0] == keys[at] else run_keys.index(keys[at])
    end = min(at + len(run_keys) - start, chain.num_blocks)
    while True:
        seen = min(end, len(keys))
        if keys[seen - 1] != run_keys[start + seen - 1 - at]:
            shift = start - at
            return bisect_left(range(seen), True, at + 1, seen, key=lambda i: keys[i] != run_keys[i + shift])
        if seen == end:
            return end
        at, start = seen - 1, start + seen - 1 - at
        chain.hashed(seen + STEP_BLOCKS)


def _present(levels: Levels, predicted: int) -> Levels:
    device, host, disk, remote = levels
    return device | predicted, host | predicted, disk | predicted, remote | predicted


def _drop(alive: list[int], present: Levels, position: int, rows: dict[int, tuple[int, ...]]) -> None:
    """Notes where those end that are alive and not present."""
    if alive[0] == alive[-1] and present[0] == present[-1]:  # each tier's are among the next one's: all are the same
        ended = alive[0] & ~present[0]
        if ended:
            alive[:] = [alive[0] & present[0]] * len(alive)
            rows.update(dict.fromkeys(slots_in(ended), (position,) * len(alive)))
        return
    for tier, workers in enumerate(present):
        ended = alive[tier] & ~workers
        if ended:
            alive[tier] &= workers
            for slot in slots_in(ended):
                row = rows[slot]
                rows[slot] = (*row[:tier], position, *row[tier + 1 :])
