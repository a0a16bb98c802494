"""Block digests on the CPU, and the numbers that all devices share: keys of words, positions of rows, starts of blocks.

Work goes through two buffers of CHUNK_BYTES that stay in the L2 cache; see `dynamo.kernels.digest_blocks_kernel` for the
formula.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import SlotIds
from dynamo.kernels.host_tiles import HostWindow
from dynamo.kernels.view import View

__all__ = ["GOLDEN", "Digests", "add_row_sums", "block_starts", "mix", "row_keys", "row_positions"]

GOLDEN = 0x9E3779B97F4A7C15
FIRST_FACTOR, SECOND_FACTOR = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
WORD_BYTES = 8
CHUNK_BYTES = 1 << 18

Digests = npt.NDArray[np.uint64]


def mix(x: Digests, scratch: Digests | None = None) -> Digests:
    """The finaliser of SplitMix64, in place; a bijection of 64-bit words. Returns x.

    >>> [hex(word) for word in mix(np.array([0, 1], dtype=np.uint64))]
    ['0x0', '0x5692161d100b05e5']
    """
    spare = np.empty_like(x) if scratch is None else scratch
    for shift, factor in ((30, FIRST_FACTOR), (27, SECOND_FACTOR)):
        np.right_shift(x, shift, out=spare)
        np.bitwise_xor(x, spare, out=x)
        np.multiply(x, factor, out=x)
    np.right_shift(x, 31, out=spare)
    return np.bitwise_xor(x, spare, out=x)


def row_keys(row_bytes: int) -> Digests:
    """Odd keys of the words of a row, [ceil(row_bytes / 8)].

    >>> row_keys(20).size, bool((row_keys(20) % np.uint64(2) == 1).all())
    (3, True)
    """
    words = np.arange(1, -(-row_bytes // WORD_BYTES) + 1, dtype=np.uint64)
    return mix(words * np.uint64(GOLDEN)) | np.uint64(1)


def row_positions(view: View) -> SlotIds:
    """Position of the first token's first head below each base, int64 [rows of base, num_planes].

    Rows are counted in the order layer, plane, token, head, whatever their order in memory and however the view is folded.

    >>> import torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> view = from_paged(torch.zeros(8, 3, 2, 16, 4, 64), "BLPTHD")
    >>> row_positions(view).tolist(), row_positions(view.fold_heads(2))[3:].tolist()
    ([[0, 64], [128, 192], [256, 320]], [[2, 66], [130, 194], [258, 322]])
    """
    groups = np.arange(view.head_groups, dtype=np.int64)[:, None, None] * view.num_heads
    layers = np.arange(view.layers_per_group, dtype=np.int64)[None, :, None] * view.num_planes
    planes = layers + np.arange(view.num_planes, dtype=np.int64)
    return (planes * view.num_tokens * view.total_heads + groups).reshape(view.base.shape)


def block_starts(view: View, seeds: Digests | None, num_blocks: int) -> Digests:
    """What each digest starts from: the seed and the shape of the block, [num_blocks].

    >>> import torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> view = from_paged(torch.zeros(8, 16, 4, 64), "BTHD")
    >>> bool((block_starts(view, None, 2) == block_starts(view.fold_heads(2), np.zeros(2, np.uint64), 2)).all())
    True
    """
    shape = np.zeros(1, dtype=np.uint64)
    for size in (view.layers_per_group, view.num_planes, view.num_tokens, view.total_heads, view.row_bytes):
        shape = mix(shape + np.uint64(size))
    if seeds is None:
        seeds = np.zeros(num_blocks, dtype=np.uint64)
    return mix(seeds ^ shape)


def add_row_sums(src: View, src_ids: SlotIds, dst: View | None, dst_ids: SlotIds, totals: Digests) -> None:
    """Adds the mixed rows of each block to `totals` [n], copying the rows to `dst` on the way if there is one.

    Sums of parts add up to the sum of the whole, in any order.

    >>> import torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> view, ids = from_paged(torch.randn(2, 16, 4, 64), "BTHD"), np.array([1])
    >>> once, twice = np.zeros((2, 1), dtype=np.uint64)
    >>> for totals in (once, twice, twice):
    ...     add_row_sums(view, ids, None, ids, totals)
    >>> bool((twice == once + once).all())
    True
    """
    work = _Work(src, totals)
    both = (src,) if dst is None else (src, dst)
    is_aligned = min(view.alignment for view in both) >= WORD_BYTES and src.row_bytes % WORD_BYTES == 0
    word = np.dtype(np.uint64 if is_aligned else np.uint8)
    positions = row_positions(src)
    for row in range(src.num_layers):
        for plane in range(src.num_planes):
            tiles = HostWindow(src, row, plane, word).tiles(src_ids)
            copies = [] if dst is None else HostWindow(dst, row, plane, word, writable=True).tiles(dst_ids)
            work.add(tiles, copies, int(positions[row, plane]))


class _Work:
    """Buffers for a few tiles of the same view. One thread at a time."""

    def __init__(self, view: View, totals: Digests) -> None:
        self._totals = totals
        self._keys = row_keys(view.row_bytes)
        words = self._keys.size
        tile_bytes = view.num_tokens * view.num_heads * words * WORD_BYTES
        self._num_tiles = max(1, CHUNK_BYTES // tile_bytes)
        self._num_tokens = min(view.num_tokens, max(1, CHUNK_BYTES // (view.num_heads * words * WORD_BYTES)))
        shape = (self._num_tiles, self._num_tokens, view.num_heads, words)
        self._words: Digests = np.zeros(shape, dtype=np.uint64)  # zeros stay behind rows that end within a word
        self._folded: Digests = np.empty(shape, dtype=np.uint64)
        self._sums: Digests = np.empty(shape[:3], dtype=np.uint64)
        self._spare: Digests = np.empty(shape[:3], dtype=np.uint64)
        tokens = np.arange(view.num_tokens, dtype=np.uint64)[:, None] * np.uint64(view.total_heads)
        heads = np.arange(1, view.num_heads + 1, dtype=np.uint64)
        self._steps: Digests = (tokens + heads) * np.uint64(GOLDEN)

    def add(self, tiles: Sequence[npt.NDArray[Any]], copies: Sequence[npt.NDArray[Any]], position: int) -> None:
        """Adds tiles [tokens, heads, words or bytes] of all blocks, whose first row has `position`."""
        start = np.uint64(position * GOLDEN & 0xFFFFFFFFFFFFFFFF)
        for first in range(0, len(tiles), self._num_tiles):
            part = slice(first, min(first + self._num_tiles, len(tiles)))
            for token in range(0, self._steps.shape[0], self._num_tokens):
                tokens = slice(token, token + self._num_tokens)
                steps = self._steps[tokens] + start
                self._totals[part] += self._sum_part(tiles[part], copies[part], tokens, steps)

    def _sum_part(
        self, tiles: Sequence[npt.NDArray[Any]], copies: Sequence[npt.NDArray[Any]], tokens: slice, steps: Digests
    ) -> Digests:
        n, num_tokens = len(tiles), steps.shape[0]
        words, folded = self._words[:n, :num_tokens], self._folded[:n, :num_tokens]
        sums, spare = self._sums[:n, :num_tokens], self._spare[:n, :num_tokens]
        for i, tile in enumerate(tiles):
            words[i].view(tile.dtype)[..., : tile.shape[2]] = tile[tokens]
        np.right_shift(words, 32, out=folded)
        np.bitwise_xor(folded, words, out=folded)
        np.einsum("nthw,w->nth", folded, self._keys, out=sums)
        for i, copy in enumerate(copies):
            copy[tokens] = words[i].view(copy.dtype)[..., : copy.shape[2]]
        np.add(sums, steps, out=sums)
        total: Digests = mix(sums, spare).sum(axis=(1, 2), dtype=np.uint64)
        return total
