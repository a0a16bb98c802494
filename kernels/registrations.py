"""Arithmetic on ranges of pinned host memory, each known by its address and size."""

import numpy as np
import numpy.typing as npt

__all__ = ["has_gap", "touching"]


def touching(registered: dict[int, int]) -> npt.NDArray[np.int64]:
    """Addresses where one registered range (address → bytes) ends and another begins, int64, ascending.

    >>> touching({0: 100, 100: 50, 200: 10}).tolist()
    [100]
    """
    stops = {address + num_bytes for address, num_bytes in registered.items()}
    return np.array(sorted(stops & registered.keys()), dtype=np.int64)


def has_gap(registered: dict[int, int], address: int, num_bytes: int) -> bool:
    """Whether registered ranges (address → bytes) reach into [address, address + num_bytes), and leave a part of it out.

    >>> has_gap({0: 100, 200: 100}, 50, 200), has_gap({0: 100, 100: 100}, 50, 150)
    (True, False)
    """
    stop = address + num_bytes
    inside = sorted(
        (start, start + size) for start, size in registered.items() if start < stop and address < start + size
    )
    for start, end in inside:
        if start > address:
            return True
        address = max(address, end)
    return bool(inside) and address < stop
