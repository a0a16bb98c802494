"""The CPU side of `copy_blocks`: a plan carried out by numpy, with no memory the size of the payload.

Bytes moved: every byte of the plan is read once and written once. The way is chosen by how much one call can move:

    strided assignment   evenly spaced blocks in one call, others one by one out of the same two arrays; where the axes change
                         places over more than the L2 cache holds, in parts
    gather or scatter    rows by number, where they are dense on one side (`host_rows`), if need be only below one layer or
                         plane: from 256 KiB per run, unless strided assignment has 256 KiB per call and rows that are not of
                         0.5 to 4 KiB, which are then cut narrower
    run by run           contiguous pieces, neighbours joined: from 128 KiB per piece (`host_runs`)
    rows by number       all other contiguous pieces on a common grid
    one by one           the rest

All but assignment by number releases the GIL; large copies of these ways are shared with the helpers of `host_threads`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dynamo.kernels.copy_plan import Axis, CopyPlan
from dynamo.kernels.host_memory import array_at
from dynamo.kernels.host_rows import Side, copy_by_number, dense_runs, gather_or_scatter, is_on_grid, voids_at
from dynamo.kernels.host_runs import move_run
from dynamo.kernels.host_threads import copy_in_parts, num_threads_for

__all__ = ["copy_on_host"]

Int64s = npt.NDArray[np.int64]
Voids = npt.NDArray[np.void]

CALL_BYTES = 256 << 10
KEEPS_GIL_ROWS = 500  # numpy assigns so few items without releasing the GIL: helpers would only wait
SHARE_BYTES = 4 << 20  # of one call, so that threads can share what is larger
PASS_BYTES = 4096  # of one pair
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
        for part in _passes(narrow):
            side = _dense_side(part)
            if side is not None:
                gather_or_scatter(part, side)
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


def _passes(plan: CopyPlan) -> Iterator[CopyPlan]:
    """The plan, and as several passes over the blocks, one for each step of its outer axes: a block of K and one of V may
    each lie dense where both together do not. Passes of less than a page per block would share cache lines."""
    for num_axes in range(len(plan.axes), -1, -1):
        part = plan.with_axes(num_axes)
        if num_axes == len(plan.axes) or part.rows_per_pair * part.row_bytes >= PASS_BYTES:
            yield part


def _dense_side(plan: CopyPlan) -> Side | None:
    """The side to go along when rows are moved by number, if there is one.

    Of two, that of the destination where helpers come, who can take but not assign by number; else that from which fewer
    streams run through the other's blocks: with 8 heads and 16 tokens, the one with the heads innermost.
    """
    if not is_on_grid(plan):
        return None
    bytes_per_base = plan.num_bytes // plan.num_bases
    sides: tuple[Side, Side] = ("src", "dst")
    runs = {side: dense_runs(plan, side) for side in sides}
    dense = [side for side, n in runs.items() if n is not None and bytes_per_base >= n * CALL_BYTES]
    if "dst" in dense and num_threads_for(plan.num_bytes) > 1:
        return "dst"
    return min(dense, key=lambda side: _streams(plan, side), default=None)


def _streams(plan: CopyPlan, side: Side) -> int:
    """How many places of the other side's block are visited in turn."""
    return next((a.count for a in reversed(plan.ordered_by(side).axes) if a.src_stride != a.dst_stride), 1)


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
    starts, lengths = borders[:-1], np.diff(borders)
    single = starts[lengths == 1]
    _assign_pairs(plan, plan.src_offsets[single], plan.dst_offsets[single])
    bases = list(zip(plan.src_bases.tolist(), plan.dst_bases.tolist(), strict=True))
    for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        (src_start, src_next), (dst_start, dst_next) = (
            table[start : start + 2].tolist() for table in (plan.src_offsets, plan.dst_offsets)
        )
        run = Axis(length, src_next - src_start, dst_next - dst_start)
        parts = _parts((run, *plan.axes), plan.row_bytes)
        calls = [
            (src_base + src_start + src_shift, dst_base + dst_start + dst_shift, axes)
            for src_shift, dst_shift, axes in parts
            for src_base, dst_base in bases
        ]

        def assign(first: int, last: int, calls: Sequence[tuple[int, int, tuple[Axis, ...]]] = calls) -> None:
            for src_address, dst_address, axes in calls[first:last]:
                src = _nest(src_address, axes, "src", plan.row_bytes)
                _nest(dst_address, axes, "dst", plan.row_bytes)[...] = src

        copy_in_parts(len(calls), length * plan.rows_per_pair * plan.row_bytes // len(parts), assign)


def _assign_pairs(plan: CopyPlan, src_offsets: Int64s, dst_offsets: Int64s) -> None:
    """One strided assignment, or one per part, for each base and pair. Building arrays costs as much as moving 45 KiB, so
    that two of them hold all blocks below a base: as steps of the offsets' common divisor, most of which are no block."""
    if src_offsets.size == 0:
        return
    src_low, dst_low = int(src_offsets.min()), int(dst_offsets.min())
    src_step, src_numbers = _numbered(src_offsets - src_low)
    dst_step, dst_numbers = _numbered(dst_offsets - dst_low)
    src_count, dst_count = max(src_numbers) + 1, max(dst_numbers) + 1
    pair_bytes = plan.rows_per_pair * plan.row_bytes
    parts = _parts(plan.axes, plan.row_bytes)
    for src_base, dst_base in zip(plan.src_bases.tolist(), plan.dst_bases.tolist(), strict=True):
        for src_shift, dst_shift, axes in parts:
            src_axes, dst_axes = (Axis(src_count, src_step, 0), *axes), (Axis(dst_count, 0, dst_step), *axes)
            src = _nest(src_base + src_low + src_shift, src_axes, "src", plan.row_bytes)
            dst = _nest(dst_base + dst_low + dst_shift, dst_axes, "dst", plan.row_bytes)

            def assign(first: int, last: int, src: Voids = src, dst: Voids = dst) -> None:
                for i, j in zip(src_numbers[first:last], dst_numbers[first:last], strict=True):
                    dst[j] = src[i]

            num_pairs = len(src_numbers)
            if plan.rows_per_pair > KEEPS_GIL_ROWS * len(parts):
                copy_in_parts(num_pairs, pair_bytes // len(parts), assign)
            else:
                assign(0, num_pairs)


def _numbered(offsets: Int64s) -> tuple[int, list[int]]:
    """Offsets from the lowest as multiples of the largest step that allows it."""
    step = int(np.gcd.reduce(offsets)) or 1
    return step, (offsets // step).tolist()


def _nest(address: int, axes: tuple[Axis, ...], side: Side, row_bytes: int) -> npt.NDArray[np.void]:
    """One side's rows from `address` on, a dimension per axis."""
    strides = tuple(axis.src_stride if side == "src" else axis.dst_stride for axis in axes)
    return voids_at(address, tuple(axis.count for axis in axes), strides, row_bytes)


def _parts(axes: tuple[Axis, ...], row_bytes: int) -> list[tuple[int, int, tuple[Axis, ...]]]:
    """Cuts a nest so that threads can share it, and so that what one call reads stays in the L2 cache where numpy, which goes
    through it in the order of writing, jumps back and forth in what is read.

    Returns:
        Shifts of source and destination, and the axes, of each part.
    """
    order = sorted((axis for axis in axes if axis.count > 1), key=lambda axis: -abs(axis.src_stride))
    written = sorted(order, key=lambda axis: -abs(axis.dst_stride))
    inner_bytes = row_bytes * math.prod(axis.count for axis in order[1:])
    if not order:
        return [(0, 0, axes)]
    limit = SHARE_BYTES if order[0] is written[0] else CALL_BYTES
    cut, size = order[0], max(1, limit // inner_bytes)
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
    """One call per base and run of joined rows, or part of one: what threads share are the bytes, not the pieces."""
    borders = _joined_borders(plan)
    starts = borders[:-1]
    sizes = np.tile(np.diff(borders) * plan.row_bytes, plan.num_bases)
    src, src_memory = _pieces(np.add.outer(plan.src_bases, plan.src_offsets[starts]).reshape(-1), sizes)
    dst, dst_memory = _pieces(np.add.outer(plan.dst_bases, plan.dst_offsets[starts]).reshape(-1), sizes)
    ends = np.cumsum(sizes)

    def move(first: int, last: int) -> None:
        pieces = slice(np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="left") + 1)
        begins = ends[pieces] - sizes[pieces]
        skipped = np.maximum(first - begins, 0)
        wanted = np.minimum(ends[pieces], last) - begins - skipped
        places = (src[pieces] + skipped).tolist(), (dst[pieces] + skipped).tolist(), wanted.tolist()
        for start, to, size in zip(*places, strict=True):
            move_run(src_memory[start : start + size], dst_memory[to : to + size])

    copy_in_parts(plan.num_bytes, 1, move)


def _pieces(addresses: Int64s, sizes: Int64s) -> tuple[Int64s, npt.NDArray[np.uint8]]:
    """One side's pieces as places in one array from the first to the last, since an array for each would cost more than
    slices do. What lies between pieces is never touched."""
    low = int(addresses.min())
    return addresses - low, array_at(low, np.uint8, (int((addresses + sizes).max()) - low,), (1,))
