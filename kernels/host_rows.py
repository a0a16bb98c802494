"""Rows of a copy plan moved by number: memory seen as one long array of void scalars, and numpy told which go where.

Bytes moved: every byte of the plan is read once and written once, and 8 to 16 bytes of row numbers are written and read
for each row, in slices that stay small beside the payload. The idea of void scalars as rows is measured in `copy`.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from dynamo.kernels.copy import copy_row_numbers
from dynamo.kernels.copy_plan import CopyPlan
from dynamo.kernels.host_memory import array_at
from dynamo.kernels.host_threads import copy_in_parts

__all__ = ["Side", "copy_by_number", "dense_runs", "gather_or_scatter", "is_on_grid", "voids_at"]

Int64s = npt.NDArray[np.int64]
Voids = npt.NDArray[np.void]
Side = Literal["src", "dst"]

ROWS_AT_A_TIME = 1 << 16
CALL_BYTES = 4 << 20
"""Moved by one call at most: enough to hide what it costs, and little where numpy keeps the GIL, as it does from "src"."""


def voids_at(address: int, shape: tuple[int, ...], strides: tuple[int, ...], row_bytes: int) -> Voids:
    """Rows of memory as an array of void scalars. The caller answers for address and extent.

    >>> import numpy as np
    >>> numbers = np.arange(6, dtype=np.int64)
    >>> voids_at(numbers.ctypes.data, (3,), (16,), 8).view(np.int64).tolist()
    [0, 2, 4]
    """
    return array_at(address, f"V{row_bytes}", shape, strides)


def is_on_grid(plan: CopyPlan) -> bool:
    """Whether, on each side, all rows below one base lie at multiples of the row's size from each other.

    >>> import numpy as np
    >>> zero = np.zeros(1, dtype=np.int64)
    >>> [is_on_grid(CopyPlan(zero, zero, np.array([0, step]), np.array([0, 64]), (), 32)) for step in (96, 100)]
    [True, False]
    """
    strides = [stride for axis in plan.axes for stride in (axis.src_stride, axis.dst_stride)]
    if any(stride % plan.row_bytes for stride in strides):
        return False
    tables = (plan.src_offsets, plan.dst_offsets)
    return not any(((table - table[0]) % plan.row_bytes).any() for table in tables)


def dense_runs(plan: CopyPlan, side: Side) -> int | None:
    """How many contiguous runs one side's rows below one base make, in address order; None where a pair has gaps.

    >>> import numpy as np
    >>> zero = np.zeros(1, dtype=np.int64)
    >>> dense_runs(CopyPlan(zero, zero, np.array([96, 0, 32]), np.array([0, 64, 128]), (), 32), "src")
    2
    """
    pair_bytes = plan.row_bytes
    for axis in reversed(plan.ordered_by(side).axes):
        if (axis.src_stride if side == "src" else axis.dst_stride) != pair_bytes:
            return None
        pair_bytes *= axis.count
    offsets = plan.src_offsets if side == "src" else plan.dst_offsets
    return int(np.count_nonzero(np.diff(np.sort(offsets)) != pair_bytes)) + 1


def gather_or_scatter(plan: CopyPlan, side: Side) -> None:
    """Moves rows in the address order of the side on which they are dense: np.take into "dst", with the helpers of
    `host_threads`; assignment from "src", alone.

    >>> import numpy as np
    >>> src, dst = np.arange(4), np.zeros(4, dtype=np.int64)
    >>> bases = (np.array([array.ctypes.data]) for array in (src, dst))
    >>> gather_or_scatter(CopyPlan(*bases, np.array([24, 0]), np.array([0, 8]), (), 8), "dst")
    >>> dst.tolist()
    [3, 0, 0, 0]
    """
    plan = plan.ordered_by(side)
    near, far = (plan.src_offsets, plan.dst_offsets) if side == "src" else (plan.dst_offsets, plan.src_offsets)
    if (near[1:] < near[:-1]).any():
        order = np.argsort(near, kind="stable")
        near, far = near[order], far[order]
    near_bases, far_bases = (plan.src_bases, plan.dst_bases) if side == "src" else (plan.dst_bases, plan.src_bases)
    rows, row_bytes = plan.rows_per_pair, plan.row_bytes
    breaks = np.flatnonzero(np.diff(near) != rows * row_bytes) + 1
    pairs_at_a_time = max(1, min(ROWS_AT_A_TIME, CALL_BYTES // row_bytes) // rows)
    slices = np.union1d(np.append(breaks, near.size), np.arange(0, near.size, pairs_at_a_time)).tolist()
    # Made once for all calls: made in each, as little as they are, they took 3 to 6 % of the time with 256 B rows.
    near_numbers, near_memory = _numbered(near_bases, near, np.arange(rows, dtype=np.int64), row_bytes)
    far_inner = _inner(plan, "dst" if side == "src" else "src")
    far_numbers, far_memory = _numbered(far_bases, far, far_inner, row_bytes)
    num_slices = len(slices) - 1

    def move(first: int, last: int) -> None:
        for index in range(first, last):
            base, at = divmod(index, num_slices)
            start, stop = slices[at], slices[at + 1]
            numbers = (far_numbers[start:stop, None] + far_inner).reshape(-1)
            place = int(near_numbers[start])
            near_rows = near_memory[base][place : place + numbers.size]
            if side == "dst":
                far_memory[base].take(numbers, out=near_rows, mode="clip")
            else:
                far_memory[base][numbers] = near_rows

    num_calls = plan.num_bases * num_slices
    if side == "dst":
        copy_in_parts(num_calls, plan.num_bytes // num_calls, move)
    else:
        move(0, num_calls)


def copy_by_number(plan: CopyPlan) -> None:
    """Moves the rows of a plan without axes, all bases that share a grid in one call, `copy_row_numbers` choosing the order.

    >>> import numpy as np
    >>> src, dst = np.arange(4), np.zeros(4, dtype=np.int64)
    >>> bases = (np.array([array.ctypes.data]) for array in (src, dst))
    >>> copy_by_number(CopyPlan(*bases, np.array([24, 0]), np.array([0, 16]), (), 8))
    >>> dst.tolist()
    [3, 0, 0, 0]
    """
    row_bytes = plan.row_bytes
    residues = np.stack((plan.src_bases % row_bytes, plan.dst_bases % row_bytes))
    for residue in np.unique(residues, axis=1).T:
        chosen = (residues == residue[:, None]).all(axis=0)
        src_rows, src_numbers = _rows_of(plan.src_bases[chosen], plan.src_offsets, row_bytes)
        dst_rows, dst_numbers = _rows_of(plan.dst_bases[chosen], plan.dst_offsets, row_bytes)
        copy_row_numbers(src_rows, src_numbers, dst_rows, dst_numbers)


def _rows_of(bases: Int64s, offsets: Int64s, row_bytes: int) -> tuple[Voids, Int64s]:
    """All memory from the first to the last row as rows, and the number of each row of the plan, in address order
    where that is cheap. Rows in between that belong to nobody are never touched."""
    first = int(bases.min() + offsets.min())
    num_rows = (int(bases.max() + offsets.max()) - first) // row_bytes + 1
    numbers = (((bases - first)[:, None] + offsets) // row_bytes).reshape(-1)
    return voids_at(first, (num_rows,), (row_bytes,), row_bytes), numbers


def _numbered(bases: Int64s, offsets: Int64s, inner: Int64s, row_bytes: int) -> tuple[Int64s, list[Voids]]:
    """One side below each base as rows from its lowest offset on, and the number of each pair's first row in them."""
    low = int(offsets.min())
    numbers = (offsets - low) // row_bytes
    shape = (int(numbers.max()) + int(inner.max()) + 1,)
    return numbers, [voids_at(base + low, shape, (row_bytes,), row_bytes) for base in bases.tolist()]


def _inner(plan: CopyPlan, side: Side) -> Int64s:
    """Row numbers below one base and pair, the axes in the plan's order."""
    numbers = np.zeros(1, dtype=np.int64)
    for axis in plan.axes:
        stride = axis.src_stride if side == "src" else axis.dst_stride
        steps = np.arange(axis.count, dtype=np.int64) * (stride // plan.row_bytes)
        numbers = (numbers[:, None] + steps).reshape(-1)
    return numbers
