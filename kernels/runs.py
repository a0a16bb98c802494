"""Turns a copy between two views into as few plain copies as its bytes allow.

A copy that runs in both views without a gap becomes one piece: NHD to NHD one per plane and block, a stored block one
altogether, consecutive stored blocks one for all of them. What is left is written down in the order of one side's
addresses, usually the host's, so that the bus sees ascending, long runs. Everything is vectorised; the only work in
proportion to the number of pieces is writing them down.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import SlotIds, check_ids
from dynamo.kernels.copy_plan import CopyPlan, plan_copy
from dynamo.kernels.pairing import match_views
from dynamo.kernels.pieces import Pieces
from dynamo.kernels.view import View

__all__ = ["Runs", "ascending_pairs", "find_runs", "in_host_order", "runs_of"]

Int64s = npt.NDArray[np.int64]

NOBODY = np.iinfo(np.int64).min  # no number of a block
FEW_INNER = 16  # below this many inner offsets, one strided pass per offset beats numpy's broadcasting


class Offsets(NamedTuple):
    """What every piece takes one of, in bytes relative to the other axes; int64 [n] for each side."""

    src: Int64s
    dst: Int64s

    def spacing(self, side: int) -> float:
        """Mean distance of neighbours on one side, 0 for a single offset."""
        offsets = self[side]
        return 0.0 if offsets.size < 2 else float(offsets.max() - offsets.min()) / (offsets.size - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Copies before they are written down: each piece takes one offset of every axis; their sums are its addresses.

    Attributes:
        axes: from the widest to the narrowest step of the side that gives the order.
        block_axis: which of `axes` the blocks are; its entries differ in size where consecutive blocks were joined.
        block_sizes: int64, bytes of a piece of each entry of the block axis.
        storages: int64, ascending, where each storage of either side begins.
    """

    axes: tuple[Offsets, ...]
    block_axis: int
    block_sizes: Int64s
    storages: Int64s

    @property
    def num_pieces(self) -> int:
        """Pieces that `expand` writes."""
        return math.prod(axis.src.size for axis in self.axes)

    @property
    def num_bytes(self) -> int:
        """Bytes moved."""
        return int(self.block_sizes.sum()) * self._pieces_per_entry

    def sizes(self) -> dict[int, int]:
        """Histogram: piece size in bytes to the number of such pieces, ascending."""
        if self.block_sizes.size and self.block_sizes.strides == (0,):  # one number for all
            return {int(self.block_sizes[0]): self.num_pieces}
        sizes, counts = np.unique(self.block_sizes, return_counts=True)
        return dict(zip(sizes.tolist(), (counts * self._pieces_per_entry).tolist(), strict=True))

    def expand(self) -> Pieces:
        """Writes the pieces down."""
        table = np.empty((3, self.num_pieces), dtype=np.int64)
        if table.size == 0:
            return Pieces(table, self.storages)
        shape = [axis.src.size for axis in self.axes]
        lifted = self.block_sizes.reshape([-1 if i == self.block_axis else 1 for i in range(len(shape))])
        table[2].reshape(shape)[...] = lifted
        for side in (0, 1):
            _outer_sum([axis[side] for axis in self.axes], table[side])
        return Pieces(table, self.storages)

    def parts(self, num_pieces: int) -> Iterator[Pieces]:
        """The pieces in lists of at most so many. Lone blocks are written down list by list, in memory that stays small:
        fresh large arrays cost more in page faults than the work."""
        if self.num_pieces > self.axes[self.block_axis].src.size:
            pieces = self.expand()
            for start in range(0, pieces.num_pieces, num_pieces):
                yield pieces.part(slice(start, start + num_pieces))
            return
        blocks, others = self.axes[self.block_axis], [a for i, a in enumerate(self.axes) if i != self.block_axis]
        shifts = [sum(int(axis[side][0]) for axis in others) for side in (0, 1)]
        for start in range(0, self.num_pieces, num_pieces):
            part = slice(start, start + num_pieces)
            table = np.empty((3, blocks.src[part].size), dtype=np.int64)
            for side, shift in enumerate(shifts):
                np.add(blocks[side][part], shift, out=table[side])
            table[2] = self.block_sizes[part]
            yield Pieces(table, self.storages)

    @property
    def _pieces_per_entry(self) -> int:
        return math.prod(axis.src.size for i, axis in enumerate(self.axes) if i != self.block_axis)


def find_runs(
    src: View,
    src_ids: SlotIds,
    dst: View,
    dst_ids: SlotIds,
    *,
    order_by: str = "dst",
) -> Runs:
    """The plain copies that `copy_blocks` with the same arguments would make, contiguous ones joined.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged, stored
    >>> paged = from_paged(torch.zeros(2, 8, 16, 4, 32), "PBTHD")  # one layer: K and V, block, token, head, dim
    >>> slots = torch.zeros(8, 16384, dtype=torch.uint8)
    >>> slots = stored(slots, num_layers=1, num_tokens=16, num_heads=4, row_bytes=128)
    >>> runs = find_runs(paged, np.array([5, 1, 2]), slots, np.array([4, 0, 1]))
    >>> runs.sizes(), runs.num_bytes
    ({8192: 6}, 49152)
    >>> np.diff(runs.expand().dst).tolist()  # ascending, as the destination lies in memory
    [8192, 8192, 8192, 40960, 8192]

    Args:
        src: view read.
        src_ids: int64 [n], blocks of `src`; may repeat.
        dst: view written.
        dst_ids: int64 [m], distinct blocks of `dst`, together as many tokens as those of `src`.
        order_by: "src" or "dst", the side whose ascending addresses order the pieces; give the host side.

    Raises:
        KernelArgumentError: shapes or ids do not fit.
    """
    return runs_of(plan_copy(*in_host_order(src, src_ids, dst, dst_ids, order_by)), order_by=order_by)


def in_host_order(
    src: View, src_ids: SlotIds, dst: View, dst_ids: SlotIds, order_by: str
) -> tuple[View, SlotIds, View, SlotIds]:
    """The same copy, block by block of one size, in the order of the ids of one side, "src" or "dst".

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> paged = from_paged(torch.zeros(2, 8, 16, 4, 32), "PBTHD")
    >>> _, src_ids, _, dst_ids = in_host_order(paged, np.array([5, 1, 2]), paged, np.array([4, 0, 6]), "dst")
    >>> src_ids.tolist(), dst_ids.tolist()
    ([1, 5, 2], [0, 4, 6])

    Raises:
        KernelArgumentError: blocks of different sizes do not pair up, or an id of that side is out of range.
    """
    if src.num_tokens != dst.num_tokens:
        src, src_ids, dst, dst_ids = match_views(src, src_ids, dst, dst_ids)
    host, host_ids = (src, src_ids) if order_by == "src" else (dst, dst_ids)
    check_ids(host_ids, f"{order_by}_ids", host.num_blocks)
    are_arrays = isinstance(src_ids, np.ndarray) and isinstance(dst_ids, np.ndarray)  # else `plan_copy` says so
    if are_arrays and src_ids.shape == dst_ids.shape and src_ids.dtype == dst_ids.dtype:
        src_ids, dst_ids = ascending_pairs(src_ids, dst_ids, order_by, host.num_blocks)
    return src, src_ids, dst, dst_ids


def runs_of(copy: CopyPlan, *, order_by: str) -> Runs:
    """What `find_runs` finds in a copy that is planned already, its pairs of blocks in the order they have.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.copy_plan import plan_copy
    >>> from dynamo.kernels.layouts import from_paged
    >>> paged = from_paged(torch.zeros(2, 8, 16, 4, 32), "PBTHD")
    >>> runs_of(plan_copy(paged, np.array([0, 1, 5]), paged, np.array([2, 3, 7])), order_by="dst").sizes()
    {8192: 2, 16384: 2}
    """
    side = 0 if order_by == "src" else 1
    blocks, sizes = _join_blocks(copy.src_offsets, copy.dst_offsets, copy.row_bytes)
    axes = [*copy.axes]
    if sizes.size == 1:  # one run of blocks may continue an axis that could not continue a block
        run_bytes = int(sizes[0])
        while joined := next((a for a in axes if a.src_stride == a.dst_stride == run_bytes), None):
            run_bytes *= joined.count
            axes.remove(joined)
        sizes = np.array([run_bytes], dtype=np.int64)
    steps = [np.arange(axis.count, dtype=np.int64) for axis in axes]
    even = [Offsets(step * axis.src_stride, step * axis.dst_stride) for step, axis in zip(steps, axes, strict=True)]
    bases = _ascending(Offsets(copy.src_bases, copy.dst_bases), side)
    ordered = sorted([bases, blocks, *even], key=lambda axis: -axis.spacing(side))
    return Runs(tuple(ordered), next(i for i, axis in enumerate(ordered) if axis is blocks), sizes, copy.storages)


def ascending_pairs(src_ids: SlotIds, dst_ids: SlotIds, order_by: str, num_ids: int) -> tuple[SlotIds, SlotIds]:
    """Both lists in the ascending order of one; themselves where they already are.

    Writing each number's partner where the number belongs beats comparing by ten times for long lists of distinct numbers,
    which is what a transfer has.

    >>> import numpy as np
    >>> [side.tolist() for side in ascending_pairs(np.array([7, 8, 9]), np.array([4, 0, 2]), "dst", 5)]
    [[8, 9, 7], [0, 2, 4]]

    Args:
        src_ids: int64 [n].
        dst_ids: int64 [n].
        order_by: "src" or "dst", the list that gives the order; its numbers lie in [0, num_ids).
        num_ids: exclusive upper bound of that list.
    """
    ids, others = (src_ids, dst_ids) if order_by == "src" else (dst_ids, src_ids)
    if (ids[1:] >= ids[:-1]).all():
        return src_ids, dst_ids
    if num_ids <= 16 * ids.size:
        partners = np.full(num_ids, NOBODY, dtype=np.int64)
        partners[ids] = others
        is_named = partners != NOBODY
        if np.count_nonzero(is_named) == ids.size:
            ordered = np.flatnonzero(is_named)
            others = partners if num_ids == ids.size else partners[ordered]
            return (ordered, others) if order_by == "src" else (others, ordered)
    order = np.argsort(ids, kind="stable")
    return src_ids[order], dst_ids[order]


def _join_blocks(src: Int64s, dst: Int64s, run_bytes: int) -> tuple[Offsets, Int64s]:
    """The offsets of blocks with consecutive ones joined, and the bytes of a piece of each."""
    if src.size == 0:
        return Offsets(src, dst), src
    steps = src[1:] - src[:-1]
    breaks = steps != run_bytes
    np.subtract(dst[1:], dst[:-1], out=steps)
    breaks |= steps != run_bytes
    if breaks.all():
        return Offsets(src, dst), np.broadcast_to(np.int64(run_bytes), src.size)
    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.flatnonzero(breaks) + 1))
    return Offsets(src[starts], dst[starts]), np.diff(starts, append=src.size) * run_bytes


def _ascending(axis: Offsets, side: int) -> Offsets:
    if (axis[side][1:] >= axis[side][:-1]).all():
        return axis
    order = np.argsort(axis[side], kind="stable")
    return Offsets(axis.src[order], axis.dst[order])


def _outer_sum(offsets: list[Int64s], out: Int64s) -> None:
    """Writes the sum of every combination of offsets, the last list running fastest, as two balanced halves."""
    outer, inner = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    while offsets and inner.size * offsets[-1].size <= max(FEW_INNER, math.isqrt(out.size)):
        inner = np.add.outer(offsets.pop(), inner).reshape(-1)
    if len(offsets) == 1 and inner.size == 1:
        np.add(offsets[0], inner, out=out)
        return
    if inner.size == 1 and offsets:
        inner = offsets.pop() + inner
    for column in offsets:
        outer = np.add.outer(outer, column).reshape(-1)
    target = out.reshape(outer.size, inner.size)
    if inner.size < FEW_INNER < outer.size:
        for i, offset in enumerate(inner.tolist()):
            np.add(outer, offset, out=target[:, i])
    else:
        np.add(outer[:, None], inner, out=target)
