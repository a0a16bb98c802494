"""Quantisation on the CPU: a few tiles at a time pass through small buffers that stay in the L2 cache.

Every pass is one numpy or torch call that runs at cache speed; torch's are kept below the size at which it would start
its own threads, which do badly on a busy machine. The rounding is the kernels': see `dynamo.kernels.quantize_kernel`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamo.kernels.quantized_layout import LARGEST, QuantizedLayout

__all__ = ["QuantizeWork"]

SERIAL_ELEMENTS = 1 << 15
"""Torch runs an elementwise operation of this many elements on the calling thread."""

CHUNK_ELEMENTS = 1 << 17
"""Handled per call: about 1 MiB with their fp32 copy and the codes, where the cost of a call and of the L2 cache balance."""

SMALLEST_SCALE = np.float32(2.0**-126)
LARGEST_AMAX = np.float32((2**24 - 2) * 2.0**104)
"""The fp32 before the last: the largest whose scale, rounded up, times the largest code is still finite."""

FP8_NAN = 0x7F
FP8_BITS = np.int32(-0x80000000 + 0x07F00000)  # sign, four exponent and three mantissa bits, where fp32 has them
FP8_BIAS = np.float32(2.0**120)  # what e4m3 is too small by when read as fp32: 2 ** (127 - 7)

Floats = npt.NDArray[np.float32]
Tile = npt.NDArray[Any]


class QuantizeWork:
    """Buffers for a few tiles [tokens, heads, dim], and the passes over them. One thread at a time.

    Attributes:
        num_tiles: the most that one call takes.
        word: unsigned integers as wide as the elements; tiles of rows are given as these.
    """

    def __init__(self, layout: QuantizedLayout, num_tokens: int, num_heads: int) -> None:
        self.word: np.dtype[Any] = np.dtype(f"u{layout.elements.itemsize}")
        signed = torch.int32 if self.word.itemsize == 4 else torch.int16
        tile = num_tokens * num_heads * layout.head_dim
        self.num_tiles = max(1, CHUNK_ELEMENTS // tile)
        self._tiles_per_call = max(1, SERIAL_ELEMENTS // tile)
        self._dtype, self._elements = layout.dtype, layout.elements
        self._tokens_per_call = max(1, SERIAL_ELEMENTS // (num_heads * layout.head_dim))
        self._half = layout.head_dim // 2
        shape = (self.num_tiles, num_tokens, num_heads, layout.head_dim)
        self._rows = torch.empty(shape, dtype=layout.elements)
        self._words: Tile = self._rows.view(signed).numpy().view(self.word)
        self._magnitudes: Tile = np.empty(shape, dtype=self.word)
        self._x = torch.empty(shape, dtype=torch.float32)
        self._codes = torch.empty(shape, dtype=torch.int8)
        self._infinity = int(torch.tensor(float("inf"), dtype=layout.elements).view(signed))

    def quantize(self, rows: Sequence[Tile], codes: Sequence[Tile], scales: Sequence[Tile]) -> None:
        """Tiles of rows to tiles of codes, uint8 [tokens, heads, bytes], and of scales, fp32 [1, heads, 1]."""
        for i, tile in enumerate(rows):
            self._words[i] = tile
        found, is_finite = self._find_scales(len(rows))
        inverse = torch.from_numpy(np.float32(1.0) / found)
        for part in self._parts(len(rows)):
            torch.mul(self._x[part].copy_(self._rows[part]), inverse[part[0]], out=self._x[part])
        encoded = self._encode(len(rows), is_finite)
        for i, (code, scale) in enumerate(zip(codes, scales, strict=True)):
            code[...] = encoded[i]
            scale[...] = found[i]

    def restore(self, rows: Sequence[Tile], codes: Sequence[Tile], scales: Sequence[Tile]) -> None:
        """The mirror of `quantize`: writes the tiles of rows."""
        self._decode(codes)
        factors = torch.from_numpy(np.stack(scales))
        for part in self._parts(len(rows)):
            self._rows[part].copy_(torch.mul(self._x[part], factors[part[0]], out=self._x[part]))
        for i, row in enumerate(rows):
            row[...] = self._words[i]

    def _parts(self, num_tiles: int) -> Iterator[tuple[slice, slice]]:
        """Tiles and tokens small enough for torch to stay on this thread."""
        num_tokens = self._x.shape[1]
        for first in range(0, num_tiles, self._tiles_per_call):
            tiles = slice(first, min(first + self._tiles_per_call, num_tiles))
            for start in range(0, num_tokens, self._tokens_per_call):
                yield tiles, slice(start, start + self._tokens_per_call)

    def _find_scales(self, n: int) -> tuple[Floats, bool]:
        """Scales [n, 1, heads, 1], and whether all elements are finite."""
        magnitudes = self._magnitudes[:n]
        np.bitwise_and(self._words[:n], self.word.type((1 << (8 * self.word.itemsize - 1)) - 1), out=magnitudes)
        largest = magnitudes.max(axis=1).max(axis=2)
        is_finite = bool((largest < self._infinity).all())
        if not is_finite:
            np.copyto(magnitudes, 0, where=magnitudes >= self._infinity)
            largest = magnitudes.max(axis=1).max(axis=2)
        signed = largest.view(f"i{self.word.itemsize}")
        amax = torch.from_numpy(signed).view(self._elements).float().numpy()
        amax = np.minimum(amax, LARGEST_AMAX)
        scale = np.maximum(amax / np.float32(LARGEST[self._dtype]), SMALLEST_SCALE)
        return scale[:, None, :, None], is_finite

    def _encode(self, n: int, is_finite: bool) -> Tile:
        x, codes = self._x[:n].numpy(), self._codes[:n]
        encoded: Tile = codes.numpy().view(np.uint8)
        limit = np.float32(LARGEST[self._dtype])
        if not is_finite:
            np.clip(x, -limit, limit, out=x)
        if self._dtype == "fp8_e4m3":
            self._convert(self._x, self._codes.view(torch.float8_e4m3fn), n)
            if not is_finite:
                np.copyto(encoded, FP8_NAN, where=np.isnan(x))
            return encoded
        if not is_finite:
            np.copyto(x, 0.0, where=np.isnan(x))
        np.rint(x, out=x)
        self._convert(self._x, self._codes, n)
        if self._dtype == "int8":
            return encoded
        np.add(encoded, 8, out=encoded)
        low, high = encoded[..., : self._half], encoded[..., self._half :]
        np.left_shift(high, 4, out=high)
        np.bitwise_or(low, high, out=low)
        return low

    def _decode(self, codes: Sequence[Tile]) -> None:
        """Fills the floats with what the codes stand for, unscaled."""
        n = len(codes)
        signed: Tile = self._codes[:n].numpy()
        unsigned = signed.view(np.uint8)
        if self._dtype == "int4":
            low, high = unsigned[..., : self._half], unsigned[..., self._half :]
            for i, code in enumerate(codes):
                np.bitwise_and(code, 0xF, out=low[i])
                np.right_shift(code, 4, out=high[i])
            np.subtract(signed, 8, out=signed)
        else:
            for i, code in enumerate(codes):
                unsigned[i] = code
        if self._dtype != "fp8_e4m3":
            self._convert(self._codes, self._x, n)
            return
        self._convert(self._codes, self._x.view(torch.int32), n)
        x = self._x[:n].numpy()
        bits = x.view(np.int32)
        np.left_shift(bits, 20, out=bits)
        np.bitwise_and(bits, FP8_BITS, out=bits)
        np.multiply(x, FP8_BIAS, out=x)
        np.bitwise_and(unsigned, FP8_NAN, out=unsigned)
        if unsigned.max() == FP8_NAN:
            np.copyto(x, np.nan, where=unsigned == FP8_NAN)

    def _convert(self, src: Tensor, dst: Tensor, num_tiles: int) -> None:
        for part in self._parts(num_tiles):
            dst[part].copy_(src[part])
