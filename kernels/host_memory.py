"""Host memory at an address as numpy arrays. Whoever asks answers for address and extent, and keeps the memory alive."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["array_at"]


class _Memory:
    """Bytes at an address as numpy's array interface."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def array_at(
    address: int,
    dtype: npt.DTypeLike,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    read_only: bool = False,
) -> npt.NDArray[Any]:
    """An array over memory, which it neither owns nor checks.

    >>> import numpy as np
    >>> numbers = np.arange(6, dtype=np.int64)
    >>> array_at(numbers.ctypes.data, np.int64, (3,), (16,)).tolist()
    [0, 2, 4]

    Args:
        address: of the first element.
        dtype: of the elements; they may be unaligned for it, which is slow.
        shape: of the array.
        strides: bytes from one element to the next along each axis.
        read_only: whether writing is refused.
    """
    words = np.dtype(dtype)
    interface = {"version": 3, "data": (address, read_only), "typestr": words.str, "shape": shape, "strides": strides}
    return np.asarray(_Memory(interface))
