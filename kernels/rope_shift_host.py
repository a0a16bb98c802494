"""Rotations on the CPU, and the cosines and sines that all devices share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamo.kernels.checks import KernelArgumentError, SlotIds

__all__ = ["Rope", "RopeWork", "Trig", "rotations"]

SERIAL_ELEMENTS = 1 << 15
"""Torch runs an elementwise operation of this many elements on the calling thread."""

CHUNK_ELEMENTS = 1 << 17

Trig = npt.NDArray[np.float32]
"""Cosines and sines, fp32 [rotations, 2, rotary_dim / 2]."""


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """The rotary embedding of a model: what a step of one position does to a row.

    Attributes:
        inv_freq: radians per position, [rotary_dim / 2], on the host; any scaling that does not depend on the length of the
            sequence (linear, Llama 3, YaRN; not dynamic NTK) is in here.
        interleaved: pairs are (2i, 2i + 1), as in GPT-J and DeepSeek; else (i, i + rotary_dim / 2), as in Llama and NeoX.
        offset: first rotated element of a row; 512 for DeepSeek's latents, else 0.

    Raises:
        KernelArgumentError: inv_freq is not a non-empty 1-D list of finite numbers, or the offset is negative.

    >>> Rope.of_theta(128, 500000.0).inv_freq.shape
    (64,)
    """

    inv_freq: npt.NDArray[np.float64]
    interleaved: bool = False
    offset: int = 0

    def __post_init__(self) -> None:
        values = np.asarray(self.inv_freq, dtype=np.float64)
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all() or self.offset < 0:
            raise KernelArgumentError(
                f"inv_freq must be finite numbers [rotary_dim / 2] and offset at least 0, got shape {values.shape}, "
                f"offset {self.offset}"
            )
        object.__setattr__(self, "inv_freq", values)

    @classmethod
    def of_theta(cls, rotary_dim: int, theta: float = 10000.0, *, interleaved: bool = False, offset: int = 0) -> "Rope":
        """Unscaled frequencies theta ** (-2i / rotary_dim).

        Raises:
            KernelArgumentError: rotary_dim is odd or not positive, or theta is not positive.
        """
        if rotary_dim < 2 or rotary_dim % 2 or theta <= 0:
            raise KernelArgumentError(
                f"rotary_dim must be even and positive, theta positive; got {rotary_dim}, {theta}"
            )
        exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
        return cls(theta**-exponents, interleaved, offset)


def rotations(rope: Rope, deltas: npt.NDArray[np.int64]) -> tuple[Trig, SlotIds]:
    """Cosines and sines of every distinct difference of positions, and which of them each block takes.

    >>> trig, rotation_ids = rotations(Rope.of_theta(64), np.array([5, -3, 5]))
    >>> trig.shape, rotation_ids.tolist()
    ((2, 2, 32), [1, 0, 1])
    """
    distinct, rotation_ids = np.unique(deltas, return_inverse=True)
    angles = distinct[:, None].astype(np.float64) * rope.inv_freq
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32), rotation_ids.astype(np.int64)


class RopeWork:
    """Buffers for a few tiles [tokens, heads, dim], small enough to stay in the L2 cache. One thread at a time.

    Attributes:
        num_tiles: the most that one call takes.
        word: unsigned integers as wide as the elements; tiles are given as these.
    """

    def __init__(self, rope: Rope, elements: torch.dtype, num_tokens: int, num_heads: int, head_dim: int) -> None:
        self.word: np.dtype[Any] = np.dtype(f"u{elements.itemsize}")
        tile = num_tokens * num_heads * head_dim
        self.num_tiles = max(1, CHUNK_ELEMENTS // tile)
        self._tiles_per_call = max(1, SERIAL_ELEMENTS // tile)
        self._tokens_per_call = max(1, SERIAL_ELEMENTS // (num_heads * head_dim))
        shape = (self.num_tiles, num_tokens, num_heads)
        self._rows = torch.empty((*shape, head_dim), dtype=elements)
        signed = torch.int32 if self.word.itemsize == 4 else torch.int16
        self._words: npt.NDArray[Any] = self._rows.view(signed).numpy().view(self.word)
        half = rope.inv_freq.size
        part = self._rows[..., rope.offset : rope.offset + 2 * half]
        self._x: Tensor = part[..., 0::2] if rope.interleaved else part[..., :half]
        self._y: Tensor = part[..., 1::2] if rope.interleaved else part[..., half:]
        calls = (min(self._tiles_per_call, self.num_tiles), min(self._tokens_per_call, num_tokens), num_heads, half)
        self._wide_x, self._wide_y, self._turned, self._product = (torch.empty(calls) for _ in range(4))
        # Cosines and sines repeated for every row, so that no pass has an inner loop as short as a row.
        self._cosine, self._sine = torch.empty((2, 1, *calls[1:]))
        self._rotation = -1

    def turn(
        self, rows: Sequence[npt.NDArray[Any]], out: Sequence[npt.NDArray[Any]], trig: Trig, rotation_ids: SlotIds
    ) -> None:
        """Writes each tile of `rows` to `out`, rotated by its cosines and sines, `trig[rotation_ids[i]]`."""
        for i, tile in enumerate(rows):
            self._words[i] = tile
        borders = [0, *(np.flatnonzero(np.diff(rotation_ids)) + 1).tolist(), len(rows)]
        for start, stop in pairwise(borders):
            if int(rotation_ids[start]) != self._rotation:
                self._rotation = int(rotation_ids[start])
                self._cosine[:], self._sine[:] = torch.from_numpy(trig[self._rotation])
            for tiles, tokens in self._parts(start, stop):
                self._turn_part(self._x[tiles, tokens], self._y[tiles, tokens])
        for i, tile in enumerate(out):
            tile[...] = self._words[i]

    def _turn_part(self, x: Tensor, y: Tensor) -> None:
        n, tokens = x.shape[:2]
        cosine, sine = self._cosine[:, :tokens], self._sine[:, :tokens]
        wide_x, wide_y = self._wide_x[:n, :tokens].copy_(x), self._wide_y[:n, :tokens].copy_(y)
        turned, product = self._turned[:n, :tokens], self._product[:n, :tokens]
        torch.mul(wide_x, cosine, out=turned)
        x.copy_(turned.sub_(torch.mul(wide_y, sine, out=product)))
        torch.mul(wide_y, cosine, out=turned)
        y.copy_(turned.add_(torch.mul(wide_x, sine, out=product)))

    def _parts(self, start_tile: int, stop_tile: int) -> Iterator[tuple[slice, slice]]:
        """Tiles and tokens small enough for torch to stay on this thread."""
        for first in range(start_tile, stop_tile, self._tiles_per_call):
            tiles = slice(first, min(first + self._tiles_per_call, stop_tile))
            for start in range(0, self._rows.shape[1], self._tokens_per_call):
                yield tiles, slice(start, start + self._tokens_per_call)
