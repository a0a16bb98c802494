"""Copies rows between host arrays at memmove speed without allocating row-sized memory.

Bytes moved: `len(ids) * row_bytes` read and as many written. Rows are handled as numpy void scalars, so that one numpy call
moves a whole list of rows. The pairs of ids may be taken in any order; the one with the longest runs is used:

    one slice copy   per run in which both sides step by one together, in the order given (`host_runs`)
    np.take          per run of destination rows, pairs sorted by destination (mode="clip": no bounce buffer); in pieces of
                     32 KiB where rows are wider: three points more of memmove's speed with 64 KiB, eight with 2 MiB
    fancy assignment per run of source rows, pairs sorted by source: only for scattered short runs, as it keeps the GIL

Large copies of the first two kinds are shared with the helpers of `host_threads`.
"""

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import Rows, SlotIds, check_distinct, check_ids, check_rows
from dynamo.kernels.host_runs import LONG_BYTES, move_run
from dynamo.kernels.host_threads import copy_in_parts

__all__ = ["copy_row_numbers", "copy_rows", "shared_runs"]

Voids = npt.NDArray[np.void]

RUN_BYTES = 64 << 10  # shorter runs cost more in calls, and in taking the GIL again after each, than in bytes
GIL_BYTES = 1 << 20  # moved before other threads get a turn, where the GIL is kept: a tenth of a millisecond
TAKEN_BYTES = 32 << 10  # the widest piece that np.take is given; memmove is fastest up to here
MIN_TAKEN_BYTES = 8 << 10  # rows without pieces as wide stay whole
CUT_BYTES = 8 << 20  # in smaller copies, which the caches hold, whole rows are as fast, and cutting takes 4 µs
SPAN_PER_ID = 8  # 16,384 distinct ids are sorted in 1 ms, and by marking their places in 0.05, or 0.5 in so wide a span


def shared_runs(src_ids: SlotIds, dst_ids: SlotIds) -> SlotIds:
    """Borders of the runs in which both id lists step by one together.

    Args:
        src_ids: int64 [n].
        dst_ids: int64 [n].

    Returns:
        int64 [num_runs + 1], first 0 and last n: run i is the pairs [borders[i], borders[i + 1]). `[0]` when n is 0.

    >>> import numpy as np
    >>> shared_runs(np.array([4, 5, 6, 0]), np.array([0, 1, 2, 3])).tolist()
    [0, 3, 4]
    """
    return _borders((np.diff(src_ids) != 1) | (np.diff(dst_ids) != 1), src_ids.size)


def copy_rows(src: Rows, src_ids: SlotIds, dst: Rows, dst_ids: SlotIds) -> None:
    """Copies `src[src_ids[i]]` to `dst[dst_ids[i]]` for every i. Blocks until done; callable from any thread.

    Several copies may run at a time. When `src` and `dst` share memory, no row may be both read and written.

    Args:
        src: uint8 [num_src_rows, row_bytes], C-contiguous.
        src_ids: int64 [n].
        dst: uint8 [num_dst_rows, row_bytes], C-contiguous, writable.
        dst_ids: int64 [n], distinct.

    Raises:
        KernelArgumentError: shapes, dtypes or ids do not fit; nothing was copied.

    >>> import numpy as np
    >>> src = np.arange(8, dtype=np.uint8).reshape(4, 2)
    >>> dst = np.zeros((3, 2), dtype=np.uint8)
    >>> copy_rows(src, np.array([3, 1]), dst, np.array([0, 2]))
    >>> dst.tolist()
    [[6, 7], [0, 0], [2, 3]]
    """
    check_rows(src, "src")
    check_rows(dst, "dst", src.shape[1], writable=True)
    check_ids(src_ids, "src_ids", src.shape[0])
    check_ids(dst_ids, "dst_ids", dst.shape[0], src_ids.size)
    check_distinct(dst_ids, "dst_ids", dst.shape[0])
    if src_ids.size and src.shape[1]:
        copy_row_numbers(_as_void(src), src_ids, _as_void(dst), dst_ids)


def copy_row_numbers(src: Voids, src_ids: SlotIds, dst: Voids, dst_ids: SlotIds) -> None:
    """Copies rows as `copy_rows` does, between arrays of void scalars, and trusts ids and shapes.

    Args:
        src: void [num_src_rows], contiguous.
        src_ids: int64 [n].
        dst: void [num_dst_rows], contiguous, rows as wide as those of `src`.
        dst_ids: int64 [n], distinct.

    >>> import numpy as np
    >>> src, dst = np.arange(4).view("V8"), np.zeros(3, dtype=np.int64)
    >>> copy_row_numbers(src, np.array([3, 1]), dst.view("V8"), np.array([0, 2]))
    >>> dst.tolist()
    [3, 0, 1]
    """
    borders = shared_runs(src_ids, dst_ids)
    if borders.size > 2:
        by_dst = _ascending(dst_ids, distinct=True)
        dst_borders = _runs(dst_ids[by_dst])
        fewest = min(dst_borders.size, borders.size)
        if dst_borders.size > 2 and src_ids.size * src.itemsize < (fewest - 1) * RUN_BYTES:
            by_src = _ascending(src_ids)
            src_borders = _runs(src_ids[by_src])
            if src_borders.size < fewest:
                _scatter_runs(src, src_ids[by_src], dst, dst_ids[by_src], src_borders)
                return
        if dst_borders.size < borders.size:
            _take_runs(src, src_ids[by_dst], dst, dst_ids[by_dst], dst_borders)
            return
    _copy_runs(src, src_ids, dst, dst_ids, borders)


def _copy_runs(src: Voids, src_ids: SlotIds, dst: Voids, dst_ids: SlotIds, borders: SlotIds) -> None:
    width = src.itemsize
    long = -(-LONG_BYTES // width)
    src_bytes, dst_bytes = src.view(np.uint8), dst.view(np.uint8)  # as bytes, since numpy keeps the GIL for few items

    def copy_part(first: int, last: int) -> None:
        cuts = _within(borders, first, last)
        starts, lengths = cuts[:-1], np.diff(cuts).tolist()
        for s, d, length in zip(src_ids[starts].tolist(), dst_ids[starts].tolist(), lengths, strict=True):
            if length < long:
                dst_bytes[d * width : (d + length) * width] = src_bytes[s * width : (s + length) * width]
            else:
                move_run(src_bytes[s * width : (s + length) * width], dst_bytes[d * width : (d + length) * width])

    copy_in_parts(src_ids.size, src.itemsize, copy_part)


def _take_runs(src: Voids, src_ids: SlotIds, dst: Voids, dst_ids: SlotIds, dst_borders: SlotIds) -> None:
    per_row = _pieces_per_row(src.itemsize) if src_ids.size * src.itemsize >= CUT_BYTES else 1
    src_pieces, dst_pieces = src, dst
    if per_row > 1:
        src_pieces, dst_pieces = (rows.view(f"V{rows.itemsize // per_row}") for rows in (src, dst))

    def copy_part(first: int, last: int) -> None:
        cuts = _within(dst_borders, first, last)
        for (start, stop), d in zip(pairwise(cuts.tolist()), dst_ids[cuts[:-1]].tolist(), strict=True):
            ids = src_ids[start:stop]
            if per_row > 1:
                ids = (ids[:, None] * per_row + np.arange(per_row)).reshape(-1)
            src_pieces.take(ids, out=dst_pieces[d * per_row : (d + stop - start) * per_row], mode="clip")

    copy_in_parts(src_ids.size, src.itemsize, copy_part)


def _scatter_runs(src: Voids, src_ids: SlotIds, dst: Voids, dst_ids: SlotIds, src_borders: SlotIds) -> None:
    """On the calling thread: numpy keeps the GIL during fancy assignment, so that helpers would only wait."""
    at_once = max(1, GIL_BYTES // src.itemsize)
    for start, stop in pairwise(src_borders.tolist()):
        first = int(src_ids[start])
        for low in range(start, stop, at_once):
            high = min(low + at_once, stop)
            dst[dst_ids[low:high]] = src[first + low - start : first + high - start]


def _within(borders: SlotIds, first: int, last: int) -> SlotIds:
    """The borders between `first` and `last`, and these two: the runs of [first, last)."""
    low, high = np.searchsorted(borders, first, side="right"), np.searchsorted(borders, last, side="left")
    return np.concatenate(([first], borders[low:high], [last]))


def _pieces_per_row(row_bytes: int) -> int:
    """Into how many pieces a row is cut for np.take: of 32 KiB, or of 16 or 8 where it has no such."""
    width = math.gcd(row_bytes, TAKEN_BYTES)
    return row_bytes // width if row_bytes > TAKEN_BYTES and width >= MIN_TAKEN_BYTES else 1


def _ascending(ids: SlotIds, *, distinct: bool = False) -> "SlotIds | slice":
    """An index that sorts `ids`; the whole slice where they are sorted. That they are distinct saves the sorting."""
    if (ids[1:] >= ids[:-1]).all():
        return slice(None)
    if not distinct:
        return np.argsort(ids)
    low = int(ids.min())
    span = int(ids.max()) - low + 1
    if span > SPAN_PER_ID * ids.size:
        return np.argsort(ids)
    places = np.full(span, -1, dtype=np.int64)
    places[ids - low] = np.arange(ids.size)
    return places[places >= 0]


def _as_void(rows: Rows) -> Voids:
    """Rows as scalars, so that one numpy call moves many of them."""
    return rows.view(f"V{rows.shape[1]}")[:, 0]


def _runs(ids: SlotIds) -> SlotIds:
    return _borders(np.diff(ids) != 1, ids.size)


def _borders(is_break: npt.NDArray[np.bool_], n: int) -> SlotIds:
    """0, the positions after each break, and n."""
    if n == 0:
        return np.zeros(1, dtype=np.int64)
    breaks = np.flatnonzero(is_break)
    borders = np.empty(breaks.size + 2, dtype=np.int64)
    borders[0], borders[-1] = 0, n
    borders[1:-1] = breaks + 1
    return borders
