"""What a copy between two views comes to: few address tables, few strided axes, and rows as wide as both sides allow.

    source      = src_bases[q] + src_offsets[i] + Σ axes[a].src_stride * index[a] + byte
    destination = dst_bases[q] + dst_offsets[i] + Σ axes[a].dst_stride * index[a] + byte

over all q, i, indices and bytes of a row. Planning is vectorised over the ids: it costs the same for any layout, and no
array holds more than one number per id or per base.

    widen   an axis whose stride is the row's size on both sides becomes part of the row
    join    two axes that form one longer axis on both sides become one
    keep    layers and planes in regular steps are an axis; in irregular steps, or in several storages, they stay a table
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import KernelArgumentError, SlotIds, check_distinct, check_ids
from dynamo.kernels.pairing import Range, check_alike, check_tokens, cut_views
from dynamo.kernels.view import View, common_alignment

__all__ = ["Axis", "CopyPlan", "check_apart", "plan_copy", "storage_starts"]

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Axis:
    """`count` steps of so many bytes on each side."""

    count: int
    src_stride: int
    dst_stride: int


@dataclass(frozen=True, slots=True, eq=False)
class CopyPlan:
    """A validated copy. Keeps no storage alive: the views do.

    Attributes:
        src_bases: int64 [num_bases], absolute addresses.
        dst_bases: int64 [num_bases].
        src_offsets: int64 [num_pairs], one per pair of blocks.
        dst_offsets: int64 [num_pairs].
        axes: outermost first, none of length 1, at most five.
        row_bytes: contiguous on both sides.
        storages: int64, ascending, where each storage of either side begins: copies of one must not reach into the next.
    """

    src_bases: Int64s
    dst_bases: Int64s
    src_offsets: Int64s
    dst_offsets: Int64s
    axes: tuple[Axis, ...]
    row_bytes: int
    storages: Int64s = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def num_pairs(self) -> int:
        return int(self.src_offsets.size)

    @property
    def num_bases(self) -> int:
        return int(self.src_bases.size)

    @property
    def rows_per_pair(self) -> int:
        """Rows of one pair of blocks below one base."""
        return math.prod(axis.count for axis in self.axes)

    @property
    def num_rows(self) -> int:
        return self.num_pairs * self.num_bases * self.rows_per_pair

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    @property
    def alignment(self) -> int:
        """Largest power of two up to 16 that divides every address and the row size."""
        strides = [stride for axis in self.axes for stride in (axis.src_stride, axis.dst_stride)]
        tables = (self.src_bases, self.dst_bases, self.src_offsets, self.dst_offsets)
        return common_alignment(*tables, *strides, self.row_bytes)

    def ordered_by(self, side: str) -> "CopyPlan":
        """The same copy with the axes in the memory order of one side, "src" or "dst"."""
        axes = sorted(self.axes, key=lambda axis: axis.src_stride if side == "src" else axis.dst_stride, reverse=True)
        return replace(self, axes=tuple(axes))

    def with_axes(self, num_axes: int) -> "CopyPlan":
        """The same copy with only the innermost `num_axes` axes; the outer ones become entries of the base tables."""
        outer, inner = self.axes[: max(0, len(self.axes) - num_axes)], self.axes[max(0, len(self.axes) - num_axes) :]
        src, dst = self.src_bases, self.dst_bases
        for axis in outer:
            src, dst = _expand(src, axis.count, axis.src_stride), _expand(dst, axis.count, axis.dst_stride)
        return replace(self, src_bases=src, dst_bases=dst, axes=inner)


def plan_copy(
    src: View, src_ids: SlotIds, dst: View, dst_ids: SlotIds, *, layers: Range | None = None, heads: Range | None = None
) -> CopyPlan:
    """Validates a copy as described at `dynamo.kernels.copy_blocks.copy_blocks` and reduces it to tables and axes.

    Raises:
        KernelArgumentError: the views do not hold the same rows, an id is out of range or repeated among the
            destinations, two destinations lie at the same place, or bytes would be both read and written. Destinations
            that overlap in part are not looked for: no layout of `dynamo.kernels.layouts` has them.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> nhd = from_paged(torch.zeros(4, 2, 16, 8, 128, dtype=torch.bfloat16), "BPTHD")
    >>> hnd = from_paged(torch.zeros(4, 2, 8, 16, 128, dtype=torch.bfloat16), "BPHTD")
    >>> ids = np.array([0, 1, 3])
    >>> plan_copy(nhd, ids, hnd, ids).row_bytes  # heads and tokens change places: one row each
    256
    >>> plan = plan_copy(nhd, ids, from_paged(torch.zeros(4, 2, 16, 8, 128, dtype=torch.bfloat16), "BPTHD"), ids)
    >>> plan.row_bytes, plan.axes  # nothing changes places: a block is one row
    (65536, ())
    """
    src, dst = cut_views(src, dst, layers, heads)
    check_alike(src, dst)
    head_groups = math.lcm(src.head_groups, dst.head_groups)
    src, dst = src.fold_heads(head_groups), dst.fold_heads(head_groups)
    check_ids(src_ids, "src_ids", src.num_blocks)
    check_ids(dst_ids, "dst_ids", dst.num_blocks)
    check_distinct(dst_ids, "dst_ids", dst.num_blocks)
    _check_places_distinct(dst)
    check_tokens(src, src_ids, dst, dst_ids)
    src_offsets, dst_offsets = src.block_offsets[src_ids], dst.block_offsets[dst_ids]
    _check_blocks_apart(src, src_ids, src_offsets, dst, dst_ids, dst_offsets)
    num_tokens = math.gcd(src.num_tokens, dst.num_tokens)
    src_offsets = _expand(src_offsets, src.num_tokens // num_tokens, num_tokens * src.token_stride)
    dst_offsets = _expand(dst_offsets, dst.num_tokens // num_tokens, num_tokens * dst.token_stride)
    src_bases, dst_bases, axes = _regular_bases(src, dst)
    axes += [
        Axis(num_tokens, src.token_stride, dst.token_stride),
        Axis(src.num_heads, src.head_stride, dst.head_stride),
    ]
    axes, row_bytes = _widen([axis for axis in axes if axis.count > 1], src.row_bytes)
    return CopyPlan(
        src_bases, dst_bases, src_offsets, dst_offsets, tuple(_join(axes)), row_bytes, storage_starts(src, dst)
    )


def storage_starts(src: View, dst: View) -> Int64s:
    """Where the storages of both views begin, int64, ascending.

    >>> import torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> layers = [torch.zeros(4, 16, 8) for _ in range(3)]
    >>> storage_starts(from_paged(layers, "BTD"), from_paged(torch.zeros(4, 16, 8), "BTD")).size
    4
    """
    return np.unique(np.concatenate([view.limits[..., 0].reshape(-1) for view in (src, dst)]))


def check_apart(read: View, written: View) -> None:
    """Checks that two views of different shape do not reach into each other.

    Raises:
        KernelArgumentError: their storages meet, and the ranges that they span overlap.

    >>> import torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> memory = torch.zeros(8, 16, 8)
    >>> check_apart(from_paged(memory[:4], "BTD"), from_paged(memory[4:], "BTD"))
    """
    if _spans_meet(read, read.block_offsets, written, written.block_offsets):
        raise KernelArgumentError("what is read and what is written lie in the same memory and overlap")


def _expand(table: Int64s, count: int, stride: int) -> Int64s:
    """Every entry of `table` plus 0, 1, … count - 1 strides; entries outermost."""
    if count == 1:
        return table
    expanded = np.empty((table.size, count), dtype=np.int64)
    if count < table.size:  # numpy is slow where the inner loop is short
        for i in range(count):
            np.add(table, i * stride, out=expanded[:, i])
    else:
        np.add(table[:, None], np.arange(count, dtype=np.int64) * stride, out=expanded)
    return expanded.reshape(-1)


def _check_places_distinct(dst: View) -> None:
    """No two blocks, layers or planes of a view that is written may lie at the same place. Callers can make such views."""
    if not dst.num_blocks:  # torch gives every tensor without elements the address 0
        return
    offsets = dst.block_offsets
    if not (offsets[1:] > offsets[:-1]).all() and np.unique(offsets).size != offsets.size:
        raise KernelArgumentError("blocks of the destination lie at the same place; give each an offset of its own")
    if dst.base.size > 1 and np.unique(dst.base).size != dst.base.size:
        raise KernelArgumentError("layers or planes of the destination lie at the same place; give each its own memory")


def _check_blocks_apart(
    src: View, src_ids: SlotIds, src_offsets: Int64s, dst: View, dst_ids: SlotIds, dst_offsets: Int64s
) -> None:
    """No byte may be both read and written: which of the two came first would be left to chance."""
    if not _spans_meet(src, src_offsets, dst, dst_offsets):
        return
    same_geometry = src.token_stride == dst.token_stride and src.head_stride == dst.head_stride
    if same_geometry and np.array_equal(src.base, dst.base) and np.array_equal(src.block_offsets, dst.block_offsets):
        is_read = np.zeros(src.num_blocks, dtype=np.bool_)
        is_read[src_ids] = True
        shared = dst_ids[is_read[dst_ids]]
        if shared.size:
            raise KernelArgumentError(f"block {shared[0]} is both read and written")
        return
    starts = np.sort((src.base.reshape(-1, 1) + src_offsets).reshape(-1))
    written = np.sort((dst.base.reshape(-1, 1) + dst_offsets).reshape(-1))
    # The last source that starts before the destination's end must have ended before its start.
    position = np.searchsorted(starts, written + dst.span_bytes) - 1
    meets = (position >= 0) & (starts[position] + src.span_bytes > written)
    if meets.any():
        raise KernelArgumentError("source and destination share memory and blocks of one lie among those of the other")


def _spans_meet(src: View, src_offsets: Int64s, dst: View, dst_offsets: Int64s) -> bool:
    """Whether the ranges that the blocks at these offsets span overlap, in storages that do."""
    if not src_offsets.size or not dst_offsets.size or src.device != dst.device or not _storages_meet(src, dst):
        return False
    lows = [int(v.base.min() + o.min()) for v, o in ((src, src_offsets), (dst, dst_offsets))]
    highs = [int(v.base.max() + o.max()) + v.span_bytes for v, o in ((src, src_offsets), (dst, dst_offsets))]
    return lows[0] < highs[1] and lows[1] < highs[0]


def _storages_meet(src: View, dst: View) -> bool:
    """Whether any storage of one side overlaps one of the other. Storages of one side may overlap among themselves."""
    src_ranges, dst_ranges = (set(map(tuple, view.limits.reshape(-1, 2).tolist())) for view in (src, dst))
    if not src_ranges.isdisjoint(dst_ranges):
        return True
    (src_starts, src_ends), (dst_starts, dst_ends) = (np.array(list(ranges)).T for ranges in (src_ranges, dst_ranges))
    return bool(((src_starts[:, None] < dst_ends) & (dst_starts < src_ends[:, None])).any())


def _regular_bases(src: View, dst: View) -> tuple[Int64s, Int64s, list[Axis]]:
    """Base tables with head groups, layers and planes turned into axes where their steps are regular on both sides."""
    shape = (src.head_groups, src.layers_per_group, src.num_planes)
    tables, axes = [src.base.reshape(shape), dst.base.reshape(shape)], []
    limits = [view.limits.reshape(*shape, 2) for view in (src, dst)]
    for dimension, count in enumerate(shape):
        if count == 1:
            continue
        steps = [np.diff(table, axis=dimension).reshape(-1) for table in tables]
        one_storage = all((np.ptp(limit, axis=dimension) == 0).all() for limit in limits)
        if one_storage and all(s[0] > 0 and (s == s[0]).all() for s in steps):
            axes.append(Axis(count, int(steps[0][0]), int(steps[1][0])))
            tables = [np.take(table, [0], axis=dimension) for table in tables]
    return tables[0].reshape(-1), tables[1].reshape(-1), axes


def _widen(axes: list[Axis], row_bytes: int) -> tuple[list[Axis], int]:
    while True:
        inner = next((axis for axis in axes if axis.src_stride == axis.dst_stride == row_bytes), None)
        if inner is None:
            return axes, row_bytes
        axes = [axis for axis in axes if axis is not inner]
        row_bytes *= inner.count


def _join(axes: list[Axis]) -> list[Axis]:
    for outer in axes:
        for inner in axes:
            continues_src = outer.src_stride == inner.count * inner.src_stride
            if outer is not inner and continues_src and outer.dst_stride == inner.count * inner.dst_stride:
                joined = Axis(outer.count * inner.count, inner.src_stride, inner.dst_stride)
                return _join([joined if axis is inner else axis for axis in axes if axis is not outer])
    return axes
