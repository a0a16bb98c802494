"""The CPU side of `copy_blocks`: a plan carried out by numpy, on the calling thread, with no memory the size of the payload.

Bytes moved: every byte of the plan is read once and written once. The way is chosen by how much one call can move:

    strided assignment   evenly spaced blocks, or one block, in one call; where the axes change places over more than the
                         L2 cache holds, in parts: from 256 KiB per call
    gather or scatter    rows by number, where they are dense on one side (`host_rows`): from 256 KiB per run, and ahead of
                         strided assignment for rows of 0.5 to 4 KiB, which are then cut narrower
    memmove              contiguous pieces, neighbours joined: from 128 KiB per piece
    rows by number       all other contiguous pieces on a common grid
    one by one           the rest

Numpy and memmove release the GIL. Threads of its own would gain nothing: one core saturates the memory bus.
"""

import ctypes
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dynamo.kernels.copy_plan import Axis, CopyPlan
from dynamo.kernels.host_rows import Side, copy_by_number, dense_runs, gather_or_scatter, is_on_grid, voids_at

__all__ = ["copy_on_host"]

Int64s = npt.NDArray[np.int64]

CALL_BYTES = 256 << 10
MEMMOVE_BYTES = 128 << 10
NARROW_BYTES, WIDE_BYTES = 512, 4096  # in between, memmove of one row runs at half speed (glibc 2.36, AVX-512)


def copy_on_host(plan: CopyPlan) -> None:
    """Carries out a plan between two views in host memory. Blocks until done; callable from any thread.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.copy_plan import plan_copy
    >>> from dynamo.kernels.layouts import from_paged
    >>> src, dst = torch.arange(24).view(6, 2, 2, 1), torch.zeros(6, 2, 2, 1, dtype=torch.int64)
    >>> ids = np.array([5, 0])
    >>> copy_on_host(plan_copy(from_paged(src, "BTHD"), ids, from_paged(dst, "BHTD"), ids))
    >>> bool((dst[5] == src[5].transpose(0, 1)).all()), int(dst[1:5].sum())
    (True, 0)
    """
    if plan.num_bytes == 0:
        return
    if not plan.axes:
        if plan.num_bases * _joined_borders(plan).size * MEMMOVE_BYTES <= plan.num_bytes or not is_on_grid(plan):
            _move_pieces(plan)
        else:
            copy_by_number(plan)
        return
    borders = _even_runs(plan.src_offsets, plan.dst_offsets)
    narrow = _with_narrow_rows(plan)
    if narrow is not plan or plan.num_bytes < plan.num_bases * (borders.size - 1) * CALL_BYTES:
        side = _dense_side(narrow)
        if side is not None:
            gather_or_scatter(narrow, side)
            return
    _assign_runs(plan, borders)


def _with_narrow_rows(plan: CopyPlan) -> CopyPlan:
    """The plan with rows of 128 to 512 bytes where they are of a size that glibc's memmove takes twice as long for."""
    if not NARROW_BYTES < plan.row_bytes < WIDE_BYTES:
        return plan
    parts = next((n for n in range(2, 33) if plan.row_bytes % n == 0 and plan.row_bytes // n <= NARROW_BYTES), None)
    if parts is None or plan.row_bytes // parts < NARROW_BYTES // 4:
        return plan
    row_bytes = plan.row_bytes // parts
    return replace(plan, axes=(*plan.axes, Axis(parts, row_bytes, row_bytes)), row_bytes=row_bytes)


def _dense_side(plan: CopyPlan) -> Side | None:
    """The side to go along when rows are moved by number, if there is one; scattering is the faster of the two."""
    bytes_per_base = plan.num_bytes // plan.num_bases
    sides: tuple[Side, Side] = ("src", "dst")
    if is_on_grid(plan):
        for side in sides:
            runs = dense_runs(plan, side)
            if runs is not None and bytes_per_base >= runs * CALL_BYTES:
                return side
    return None


def _even_runs(src_offsets: Int64s, dst_offsets: Int64s) -> Int64s:
    """Borders of the runs of pairs in which each side steps evenly; every pair is in one run."""
    num_pairs = src_offsets.size
    src_steps, dst_steps = np.diff(src_offsets), np.diff(dst_offsets)
    is_border = np.zeros(num_pairs + 1, dtype=np.bool_)
    is_border[2:num_pairs] = (np.diff(src_steps) != 0) | (np.diff(dst_steps) != 0)
    # A pair between two borders whose successor steps on evenly opens that run instead of standing alone.
    is_border[1:-1] &= ~(is_border[:-2] & ~is_border[2:])
    is_border[[0, -1]] = True
    return np.flatnonzero(is_border)


def _assign_runs(plan: CopyPlan, borders: Int64s) -> None:
    """One strided assignment, or one per part, for each base and run."""
    src_offsets, dst_offsets = plan.src_offsets.tolist(), plan.dst_offsets.tolist()
    bases = list(zip(plan.src_bases.tolist(), plan.dst_bases.tolist(), strict=True))
    for start, stop in pairwise(borders.tolist()):
        second = min(start + 1, stop - 1)
        src_step = src_offsets[second] - src_offsets[start]
        dst_step = dst_offsets[second] - dst_offsets[start]
        parts = _parts((Axis(stop - start, src_step, dst_step), *plan.axes), plan.row_bytes)
        for src_base, dst_base in bases:
            src_start, dst_start = src_base + src_offsets[start], dst_base + dst_offsets[start]
            for src_shift, dst_shift, axes in parts:
                shape = tuple(axis.count for axis in axes)
                src_strides = tuple(axis.src_stride for axis in axes)
                dst_strides = tuple(axis.dst_stride for axis in axes)
                src = voids_at(src_start + src_shift, shape, src_strides, plan.row_bytes)
                dst = voids_at(dst_start + dst_shift, shape, dst_strides, plan.row_bytes)
                dst[...] = src


def _parts(axes: tuple[Axis, ...], row_bytes: int) -> list[tuple[int, int, tuple[Axis, ...]]]:
    """Cuts a nest so that what one call reads stays in the L2 cache although numpy goes through it in the order of writing.

    Returns:
        Shifts of source and destination, and the axes, of each part.
    """
    order = sorted((axis for axis in axes if axis.count > 1), key=lambda axis: -abs(axis.src_stride))
    written = sorted(order, key=lambda axis: -abs(axis.dst_stride))
    inner_bytes = row_bytes * math.prod(axis.count for axis in order[1:])
    if not order or order[0] is written[0]:
        return [(0, 0, axes)]
    cut, size = order[0], max(1, CALL_BYTES // inner_bytes)
    return [
        (
            first * cut.src_stride,
            first * cut.dst_stride,
            tuple(
                Axis(min(size, cut.count - first), axis.src_stride, axis.dst_stride) if axis is cut else axis
                for axis in axes
            ),
        )
        for first in range(0, cut.count, size)
    ]


def _joined_borders(plan: CopyPlan) -> Int64s:
    """Borders of the runs of pairs whose rows follow each other on both sides."""
    row_bytes = plan.row_bytes
    is_break = (np.diff(plan.src_offsets) != row_bytes) | (np.diff(plan.dst_offsets) != row_bytes)
    return np.concatenate(([0], np.flatnonzero(is_break) + 1, [plan.num_pairs])).astype(np.int64)


def _move_pieces(plan: CopyPlan) -> None:
    """One memmove per base and run of joined rows."""
    borders = _joined_borders(plan)
    starts = borders[:-1]
    sizes = (np.diff(borders) * plan.row_bytes).tolist()
    src_offsets, dst_offsets = plan.src_offsets[starts], plan.dst_offsets[starts]
    memmove = ctypes.memmove
    for src_base, dst_base in zip(plan.src_bases.tolist(), plan.dst_bases.tolist(), strict=True):
        addresses = zip((dst_offsets + dst_base).tolist(), (src_offsets + src_base).tolist(), sizes, strict=True)
        for dst, src, size in addresses:
            memmove(dst, src, size)
