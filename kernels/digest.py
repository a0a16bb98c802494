"""Digests of block bytes: XXH3-64, seeded per block.

The seed ties the bytes to the block's name, so right-looking bytes of another block are found out as well.
"""

import numpy as np
import numpy.typing as npt
import xxhash

from dynamo.kernels.checks import KernelArgumentError, Rows, SlotIds, check_array, check_ids, check_rows

__all__ = ["digest_rows"]


def digest_rows(rows: Rows, row_ids: SlotIds, seeds: npt.NDArray[np.uint64], num_bytes: int) -> npt.NDArray[np.uint64]:
    """XXH3-64 of the first `num_bytes` of each row. Blocks until done; callable from any thread.

    Args:
        rows: uint8 [num_rows, row_bytes], C-contiguous.
        row_ids: int64 [n].
        seeds: uint64 [n], one per row, such as the low half of the block's key.
        num_bytes: payload at the start of every row.

    Returns:
        uint64 [n].

    Raises:
        KernelArgumentError: shapes, dtypes or ids do not fit.

    >>> import numpy as np
    >>> rows = np.zeros((3, 4096), dtype=np.uint8)
    >>> digests = digest_rows(rows, np.array([0, 2]), np.array([7, 7], dtype=np.uint64), num_bytes=4000)
    >>> bool(digests[0] == digests[1])  # same bytes under the same seed
    True
    """
    check_rows(rows, "rows")
    check_ids(row_ids, "row_ids", rows.shape[0])
    check_array(seeds, "seeds", np.uint64, row_ids.shape)
    if not 0 <= num_bytes <= rows.shape[1]:
        raise KernelArgumentError(f"num_bytes is {num_bytes}, outside [0, {rows.shape[1]}]")
    digests = np.empty(row_ids.size, dtype=np.uint64)
    if row_ids.size == 0:
        return digests
    payload = rows.reshape(-1).data
    starts = (row_ids * rows.shape[1]).tolist()
    for i, (start, seed) in enumerate(zip(starts, seeds.tolist(), strict=True)):
        digests[i] = xxhash.xxh3_64_intdigest(payload[start : start + num_bytes], seed)
    return digests
