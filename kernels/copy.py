"""Copies rows between host arrays at memmove speed without allocating row-sized memory.

Bytes moved: `len(ids) * row_bytes` read and as many written. Rows are handled as numpy void scalars, so one numpy call
moves a whole list of rows and releases the GIL while it does.

The pairs of ids may be taken in any order, so the order with the fewest runs is used:

    one slice copy   per run in which both sides step by one together, in the order given
    np.take          per run of destination rows, pairs sorted by destination (mode="clip": no bounce buffer)
    fancy assignment per run of source rows, pairs sorted by source
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import KernelArgumentError, Rows, SlotIds, check_ids, check_rows

__all__ = ["copy_row_numbers", "copy_rows", "shared_runs"]

Voids = npt.NDArray[np.void]


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


def copy_rows(src: Rows, src_ids: SlotIds, dst: Rows, dst_ids: SlotIds, num_bytes: int | None = None) -> None:
    """Copies `src[src_ids[i]]` to `dst[dst_ids[i]]` for every i. Blocks until done; callable from any thread.

    Destination ids must be distinct, and when `src` and `dst` share memory no row may be both read and written.
    Bytes past `num_bytes` in a destination row are undefined afterwards: they are copied where that is faster.

    Args:
        src: uint8 [num_src_rows, row_bytes], C-contiguous.
        src_ids: int64 [n].
        dst: uint8 [num_dst_rows, row_bytes], C-contiguous, writable.
        dst_ids: int64 [n].
        num_bytes: payload at the start of every row; None means the whole row.

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
    row_bytes = src.shape[1]
    if num_bytes is not None and not 0 <= num_bytes <= row_bytes:
        raise KernelArgumentError(f"num_bytes is {num_bytes}, outside [0, {row_bytes}]")
    if src_ids.size == 0 or row_bytes == 0 or num_bytes == 0:
        return
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
        by_dst = _ascending(dst_ids)
        dst_borders = _runs(dst_ids[by_dst])
        if dst_borders.size == 2:
            _take_runs(src, src_ids[by_dst], dst, dst_ids[by_dst], dst_borders)
            return
        by_src = _ascending(src_ids)
        src_borders = _runs(src_ids[by_src])
        if dst_borders.size < borders.size and dst_borders.size <= src_borders.size:
            _take_runs(src, src_ids[by_dst], dst, dst_ids[by_dst], dst_borders)
            return
        if src_borders.size < borders.size:
            _scatter_runs(src, src_ids[by_src], dst, dst_ids[by_src], src_borders)
            return
    starts = borders[:-1]
    lengths = np.diff(borders).tolist()
    for s, d, length in zip(src_ids[starts].tolist(), dst_ids[starts].tolist(), lengths, strict=True):
        dst[d : d + length] = src[s : s + length]


def _take_runs(src: Voids, src_ids: SlotIds, dst: Voids, dst_ids: SlotIds, dst_borders: SlotIds) -> None:
    for start, stop in pairwise(dst_borders.tolist()):
        first = int(dst_ids[start])
        np.take(src, src_ids[start:stop], out=dst[first : first + stop - start], mode="clip")


def _scatter_runs(src: Voids, src_ids: SlotIds, dst: Voids, dst_ids: SlotIds, src_borders: SlotIds) -> None:
    for start, stop in pairwise(src_borders.tolist()):
        first = int(src_ids[start])
        dst[dst_ids[start:stop]] = src[first : first + stop - start]


def _ascending(ids: SlotIds) -> "SlotIds | slice":
    """An index that sorts `ids`; the whole slice where they are sorted."""
    return slice(None) if (ids[1:] >= ids[:-1]).all() else np.argsort(ids)


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
