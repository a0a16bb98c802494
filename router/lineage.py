"""Blocks in any order, put into the order in which they follow one another."""

from collections.abc import Mapping, Sequence

__all__ = ["runs_of"]


def runs_of(
    keys: Sequence[int], parents: Mapping[int, int | None]
) -> tuple[list[tuple[list[int], int | None]], list[int]]:
    """Joins blocks to runs.

    Args:
        keys: in any order.
        parents: of each key the one before it, None for the first of a sequence.

    Returns:
        (keys, parent) of each run, a run's parent always in an earlier run or no key of `keys`; and the keys that `parents`
        does not know.
    """
    members = dict.fromkeys(keys)
    followers: dict[int | None, list[int]] = {}
    loose = []
    starts: list[tuple[int, int | None]] = []
    for key in members:
        if key not in parents:
            loose.append(key)
            continue
        parent = parents[key]
        if parent is None or parent not in members or parent not in parents:
            starts.append((key, parent))
        else:
            followers.setdefault(parent, []).append(key)
    runs = []
    starts.reverse()
    while starts:
        key, parent = starts.pop()
        run = [key]
        while behind := followers.pop(run[-1], None):
            starts += [(other, run[-1]) for other in behind[1:]]
            run.append(behind[0])
        runs.append((run, parent))
    return runs, loose
