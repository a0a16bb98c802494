"""Numpy windows on the host memory that views describe, for kernels that compute on the CPU.

A window is an array over one row of `base` and one plane: [slots, tokens, heads, words]. It copies nothing; blocks are found
in it by number, so that a loop over blocks does no address arithmetic in Python.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import SlotIds
from dynamo.kernels.host_memory import array_at
from dynamo.kernels.view import View

__all__ = ["HostWindow"]


class HostWindow:
    """Tiles of one row of `base` and one plane of a view on the CPU, as words of `dtype`. The view must outlive it.

    Tiles may be unaligned for their dtype; numpy then handles them, slowly.
    """

    def __init__(self, view: View, row: int, plane: int, dtype: npt.DTypeLike, *, writable: bool = False) -> None:
        words = np.dtype(dtype)
        self._low, self._step, count = _grid(view.block_offsets)
        self._words: npt.NDArray[Any] = array_at(
            int(view.base[row, plane]) + self._low,
            words,
            (count, view.num_tokens, view.num_heads, view.row_bytes // words.itemsize),
            (self._step, view.token_stride, view.head_stride, words.itemsize),
            read_only=not writable,
        )
        self._offsets = view.block_offsets

    def tiles(self, ids: SlotIds) -> list[npt.NDArray[Any]]:
        """The tile [tokens, heads, words] of each block. Ids are trusted: check them first."""
        return [self._words[slot] for slot in ((self._offsets[ids] - self._low) // self._step).tolist()]


def _grid(offsets: npt.NDArray[np.int64]) -> tuple[int, int, int]:
    """Lowest offset, step and number of steps of a grid on which all offsets lie."""
    if offsets.size == 0:
        return 0, 1, 0
    low = int(offsets.min())
    step = math.gcd(*map(int, (np.unique(np.diff(np.unique(offsets)))))) if offsets.size > 1 else 0
    if step == 0:
        return low, 1, 1
    return low, step, (int(offsets.max()) - low) // step + 1
