"""Host-side validation shared by the row kernels: every id and shape is checked before a byte moves."""

import numpy as np
import numpy.typing as npt

__all__ = [
    "KernelArgumentError",
    "Rows",
    "SlotIds",
    "check_array",
    "check_distinct",
    "check_ids",
    "check_rows",
    "describe",
]

SlotIds = npt.NDArray[np.int64]
"""1-D array of row or slot numbers; the numbers need not be consecutive."""

Rows = npt.NDArray[np.uint8]
"""Host memory [num_rows, row_bytes], uint8, C-contiguous."""


MARK_BYTES_PER_ID = 64  # what sorting an id takes, marking so many rows takes too


class KernelArgumentError(ValueError):
    """Rows or ids handed to a kernel or a tier do not fit together. Nothing was moved; fix the caller."""


def check_rows(rows: Rows, name: str, row_bytes: int | None = None, *, writable: bool = False) -> None:
    """Checks that `rows` is a uint8 C-contiguous [num_rows, row_bytes] array.

    Args:
        rows: the array to check.
        name: what messages call it.
        row_bytes: required width in bytes, or None for any.
        writable: whether the rows are going to be written.

    Raises:
        KernelArgumentError: dtype, number of dimensions, contiguity or width is wrong, or the rows are read-only.
    """
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8:
        found = rows.dtype if isinstance(rows, np.ndarray) else type(rows).__name__
        raise KernelArgumentError(f"{name} must be a numpy uint8 array [num_rows, row_bytes], got {found}")
    if rows.ndim != 2 or not rows.flags.c_contiguous:
        raise KernelArgumentError(
            f"{name} must be C-contiguous [num_rows, row_bytes], got shape {rows.shape} with strides {rows.strides}"
        )
    if row_bytes is not None and rows.shape[1] != row_bytes:
        raise KernelArgumentError(f"{name} has rows of {rows.shape[1]} bytes, {row_bytes} are needed")
    if writable and not rows.flags.writeable:
        raise KernelArgumentError(f"{name} is read-only; it is to be written")


def check_ids(ids: SlotIds, name: str, num_rows: int, length: int | None = None) -> None:
    """Checks that `ids` is a 1-D int64 array of numbers in [0, num_rows).

    Args:
        ids: the array to check; may be empty.
        name: what messages call it.
        num_rows: exclusive upper bound of the numbers.
        length: required number of ids, or None for any.

    Raises:
        KernelArgumentError: dtype, shape, length or a number is wrong.
    """
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.ndim != 1:
        raise KernelArgumentError(f"{name} must be a 1-D numpy int64 array, got {describe(ids)}")
    if length is not None and ids.size != length:
        raise KernelArgumentError(f"{name} has {ids.size} ids, {length} are needed: the two sides must pair up")
    if ids.size:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= num_rows:
            raise KernelArgumentError(f"{name} holds {low if low < 0 else high}, outside [0, {num_rows})")


def check_array(array: object, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """Checks that `array` is a numpy array of this type and shape.

    Raises:
        KernelArgumentError: it is not.
    """
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        raise KernelArgumentError(f"{name} must be {np.dtype(dtype)} {shape}, got {describe(array)}")


def describe(found: object) -> str:
    """What was given where an array was to be, for messages."""
    return f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__


def check_distinct(ids: SlotIds, name: str, num_rows: int) -> None:
    """Checks that no number occurs twice in `ids`, whose numbers lie in [0, num_rows).

    Raises:
        KernelArgumentError: a number is repeated.
    """
    if (ids[1:] > ids[:-1]).all():
        return
    if ids.size * MARK_BYTES_PER_ID < num_rows:
        ordered = np.sort(ids)
        repeated = ordered[1:] == ordered[:-1]
        if repeated.any():
            raise KernelArgumentError(f"{name} holds {ordered[1:][repeated][0]} more than once")
        return
    is_named = np.zeros(num_rows, dtype=np.bool_)
    is_named[ids] = True
    if int(np.count_nonzero(is_named)) != ids.size:
        numbers, counts = np.unique(ids, return_counts=True)
        raise KernelArgumentError(f"{name} holds {numbers[counts > 1][0]} more than once")
