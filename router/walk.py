"""How far each worker reaches along a sequence, block by block: exact whatever holes there are."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from dynamo.router.chain import PrefixChain

__all__ = ["Levels", "slots_in", "walk"]

Levels = tuple[int, int, int, int]
"""For each tier, the workers (bit `1 << slot`) that hold a block there or in a faster one."""

_STEP_BLOCKS = 64


def walk(
    chain: PrefixChain,
    masks: Mapping[int, int],
    levels: Callable[[int], Levels],
    expected: Sequence[tuple[int, int]],
) -> dict[int, list[int]]:
    """slot → leading blocks in each tier or a faster one; workers without the first block are absent.

    Args:
        masks: holders of a key.
        levels: what a mask means.
        expected: (depth, workers of whom just `depth` leading blocks are predicted), as `boundaries` gives them.
    """
    ends = dict(expected)
    predicted = sum(ends.values())  # no worker is in two of them
    present = _present(levels(masks.get(chain.hashed(1)[0], 0)), predicted)
    alive = list(present)
    rows = {slot: [0, 0, 0, 0] for slot in slots_in(alive[-1])}
    previous: int | None = None
    start = 0
    while start < chain.num_blocks and alive[-1]:
        end = min(start + _STEP_BLOCKS, chain.num_blocks)
        stretch = list(map(masks.get, chain.hashed(end)[start:end]))
        if stretch[0] == previous and not ends and stretch.count(previous) == len(stretch):
            start = end
            continue
        for position, mask in enumerate(stretch, start):
            if position in ends:
                predicted &= ~ends.pop(position)
            elif mask is previous:
                continue
            previous = mask
            present = _present(levels(mask or 0), predicted)
            _drop(alive, present, position, rows)
        start = end
    _drop(alive, (0, 0, 0, 0), chain.num_blocks, rows)
    return rows


def slots_in(workers: int) -> Iterator[int]:
    """Positions of the bits that are set, lowest first."""
    while workers:
        low = workers & -workers
        yield low.bit_length() - 1
        workers ^= low


def _present(levels: Levels, predicted: int) -> Levels:
    device, host, disk, remote = levels
    return device | predicted, host | predicted, disk | predicted, remote | predicted


def _drop(alive: list[int], present: Levels, position: int, rows: dict[int, list[int]]) -> None:
    """Notes where those end that are alive and not present."""
    for tier, workers in enumerate(present):
        ended = alive[tier] & ~workers
        if ended:
            alive[tier] &= workers
            for slot in slots_in(ended):
                rows[slot][tier] = position
