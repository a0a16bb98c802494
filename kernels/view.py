"""The one description of KV bytes that every kernel reads: any paged layout as a few numbers.

    address(layer, plane, block, token, head, byte) =
        base[layer, plane] + block_offsets[block] + token * token_stride + head * head_stride + byte

NHD, HND, layers separate or fused, K and V split, stacked or interleaved, tensor-parallel slices and other block sizes
differ in these numbers only. `dynamo.kernels.layouts` builds views of the shapes that engines use. A View cannot be made
unless all its addresses lie inside the storages it names, so ids in range are all that a copy has left to check.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamo.kernels.checks import KernelArgumentError

__all__ = ["WIDEST_ACCESS_BYTES", "View", "common_alignment"]

WIDEST_ACCESS_BYTES = 16
"""One thread moves at most this much at a time."""

Int64s = npt.NDArray[np.int64]


def common_alignment(*numbers: int | Int64s) -> int:
    """Largest power of two up to 16 that divides all numbers.

    >>> import numpy as np
    >>> common_alignment(48, np.array([64, 24]))
    8
    """
    bits = WIDEST_ACCESS_BYTES
    for number in numbers:
        bits |= int(np.bitwise_or.reduce(number, axis=None)) if isinstance(number, np.ndarray) else number
    return bits & -bits


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """KV bytes of a pool of blocks: rows of `row_bytes`, one per layer, plane, block, token and head. Owns no memory.

    A view may be folded: its heads are divided into `head_groups` of `num_heads` consecutive heads each, and the rows of
    `base` are then [head_group, layer] flattened. The stored layout with groups is such a view. Code that walks all rows
    of `base` and all heads of each reaches every byte, folded or not.

    Attributes:
        tensors: the storages, kept alive; all on one device.
        base: int64 [num_layers, num_planes], absolute byte addresses. Planes are K and V, or one for MLA latents.
        block_offsets: int64 [num_blocks], bytes relative to every base.
        token_stride: bytes from a token to the next within a block.
        head_stride: bytes from a head to the next within a token.
        row_bytes: contiguous bytes of one token and head.
        num_tokens: tokens of a block.
        num_heads: heads below one row of `base`.
        limits: int64 [num_layers, num_planes, 2], first and one-past-last address of the storage each base points into;
            each that of one of `tensors`. Arrays are kept read-only, copied where the caller could still write them.
        head_groups: how many groups of heads the rows of `base` are divided into.

    Raises:
        KernelArgumentError: the numbers do not fit together, rows overlap, or an address lies outside its storage.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> pool = torch.zeros(8, 4, 2, 16, 2, 64, dtype=torch.bfloat16)  # blocks, layers, K and V, tokens, heads, dim
    >>> view = from_paged(pool, "BLPTHD")
    >>> view.num_layers, view.num_planes, view.num_blocks, view.num_tokens, view.num_heads, view.row_bytes
    (4, 2, 8, 16, 2, 128)
    >>> view.slice_heads(1, 2).slice_layers(0, 2).block_bytes == 2 * 2 * 16 * 128
    True
    >>> view.regroup(8).num_blocks
    16
    """

    tensors: tuple[Tensor, ...]
    base: Int64s
    block_offsets: Int64s
    token_stride: int
    head_stride: int
    row_bytes: int
    num_tokens: int
    num_heads: int
    limits: Int64s
    head_groups: int = 1

    def __post_init__(self) -> None:
        self._check_shapes()
        for name in ("base", "block_offsets", "limits"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        self._check_rows_apart()
        self._check_storages()
        self._check_range()

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def num_layers(self) -> int:
        """Rows of `base`: layers, times head groups in a folded view."""
        return int(self.base.shape[0])

    @property
    def layers_per_group(self) -> int:
        return self.num_layers // self.head_groups

    @property
    def total_heads(self) -> int:
        return self.num_heads * self.head_groups

    @property
    def num_planes(self) -> int:
        return int(self.base.shape[1])

    @property
    def num_blocks(self) -> int:
        return int(self.block_offsets.size)

    @property
    def block_bytes(self) -> int:
        """Payload of one block over all layers, planes, tokens and heads."""
        return self.num_layers * self.num_planes * self.num_tokens * self.num_heads * self.row_bytes

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Layers, planes, tokens, heads and row bytes of a block: what two views must share to hold the same rows."""
        return self.layers_per_group, self.num_planes, self.num_tokens, self.total_heads, self.row_bytes

    @property
    def span_bytes(self) -> int:
        """From the first to one past the last byte below one base and block."""
        tail = (self.num_tokens - 1) * self.token_stride + (self.num_heads - 1) * self.head_stride
        return tail + self.row_bytes

    @property
    def run_bytes(self) -> int:
        """Longest contiguous piece below one base and block."""
        axes = [(self.num_tokens, self.token_stride), (self.num_heads, self.head_stride)]
        run = self.row_bytes
        for count, stride in sorted(axes, key=lambda axis: axis[1]):
            if stride == run:
                run *= count
        return run

    @property
    def alignment(self) -> int:
        """Largest power of two up to 16 that divides every address and the row size."""
        strides = (
            self.token_stride if self.num_tokens > 1 else 0,
            self.head_stride if self.num_heads > 1 else 0,
        )
        return common_alignment(self.base, self.block_offsets, *strides, self.row_bytes)

    def slice_layers(self, start: int, stop: int) -> "View":
        """The layers in [start, stop).

        Raises:
            KernelArgumentError: the range is empty or reaches past the layers.
        """
        _check_slice(start, stop, self.layers_per_group, "layers")

        def cut(table: Int64s) -> Int64s:
            grouped = table.reshape(self.head_groups, self.layers_per_group, *table.shape[1:])
            return grouped[:, start:stop].reshape(-1, *table.shape[1:])

        return replace(self, base=cut(self.base), limits=cut(self.limits))

    def slice_heads(self, start: int, stop: int) -> "View":
        """The heads in [start, stop), counted over all groups: one tensor-parallel rank's part of wider blocks.

        Raises:
            KernelArgumentError: the range is empty or reaches past the heads.
        """
        _check_slice(start, stop, self.total_heads, "heads")
        first_group, skipped = divmod(start, self.num_heads)
        if (stop - 1) // self.num_heads == first_group:
            rows = slice(first_group * self.layers_per_group, (first_group + 1) * self.layers_per_group)
            base = self.base[rows] + skipped * self.head_stride
            return replace(self, base=base, limits=self.limits[rows], num_heads=stop - start, head_groups=1)
        group_heads = math.gcd(start, stop, self.num_heads)
        folded = self.fold_heads(self.total_heads // group_heads)
        low, high = start // group_heads, stop // group_heads
        rows = slice(low * self.layers_per_group, high * self.layers_per_group)
        return replace(folded, base=folded.base[rows], limits=folded.limits[rows], head_groups=high - low)

    def fold_heads(self, head_groups: int) -> "View":
        """The same bytes with the heads in `head_groups` groups, a multiple of the present number.

        Raises:
            KernelArgumentError: the heads do not divide into that many groups.
        """
        if head_groups == self.head_groups:
            return self
        parts, rest = divmod(head_groups, self.head_groups)
        if rest or parts == 0 or self.num_heads % parts:
            raise KernelArgumentError(
                f"{self.total_heads} heads in {self.head_groups} groups do not fold into {head_groups} groups"
            )
        heads = self.num_heads // parts
        shape = (self.head_groups, 1, self.layers_per_group, self.num_planes)
        shifts = (np.arange(parts, dtype=np.int64) * heads * self.head_stride).reshape(1, parts, 1, 1)
        base = (self.base.reshape(shape) + shifts).reshape(-1, self.num_planes)
        limits = np.repeat(self.limits.reshape(*shape, 2), parts, axis=1).reshape(*base.shape, 2)
        return replace(self, base=base, limits=limits, num_heads=heads, head_groups=head_groups)

    def regroup(self, num_tokens: int) -> "View":
        """The same bytes in blocks of `num_tokens`: block b becomes blocks b * k … b * k + k - 1, or k blocks become one.

        Raises:
            KernelArgumentError: neither size divides the other, or blocks to be joined do not follow each other.
        """
        if num_tokens == self.num_tokens:
            return self
        if num_tokens > 0 and self.num_tokens % num_tokens == 0:
            offsets = np.empty((self.num_blocks, self.num_tokens // num_tokens), dtype=np.int64)
            for part in range(offsets.shape[1]):  # by columns: numpy is slow where the inner loop is short
                np.add(self.block_offsets, part * num_tokens * self.token_stride, out=offsets[:, part])
            return replace(self, block_offsets=offsets.reshape(-1), num_tokens=num_tokens)
        joined, rest = divmod(num_tokens, self.num_tokens)
        if num_tokens <= 0 or rest or self.num_blocks % joined:
            raise KernelArgumentError(
                f"{self.num_blocks} blocks of {self.num_tokens} tokens do not make whole blocks of {num_tokens} tokens"
            )
        offsets = self.block_offsets.reshape(-1, joined)
        # A block of one token has no stride of its own to keep.
        stride = self.token_stride
        if self.num_tokens == 1 and offsets.size:
            stride = int(offsets[0, 1] - offsets[0, 0])
        if (np.diff(offsets, axis=1) != self.num_tokens * stride).any():
            raise KernelArgumentError(
                f"blocks of {self.num_tokens} tokens do not follow each other in steps of {self.num_tokens * stride} bytes"
            )
        return replace(self, block_offsets=offsets[:, 0].copy(), num_tokens=num_tokens, token_stride=stride)

    def _check_shapes(self) -> None:
        if not self.tensors or any(t.device != self.device for t in self.tensors):
            raise KernelArgumentError("a view needs at least one tensor, and all of them on one device")
        arrays: list[tuple[Int64s, str, int]] = [(self.base, "base", 2), (self.block_offsets, "block_offsets", 1)]
        for array, name, ndim in arrays:
            if array.dtype != np.int64 or array.ndim != ndim:
                raise KernelArgumentError(
                    f"{name} must be int64 with {ndim} dimensions, got {array.dtype} {array.shape}"
                )
        if self.limits.dtype != np.int64 or self.limits.shape != (*self.base.shape, 2):
            raise KernelArgumentError(f"limits must be int64 {(*self.base.shape, 2)}, got {self.limits.shape}")
        counts = (self.row_bytes, self.num_tokens, self.num_heads, self.num_layers, self.num_planes, self.head_groups)
        if min(counts) < 1 or self.num_layers % self.head_groups:
            raise KernelArgumentError(
                f"row_bytes, num_tokens, num_heads, layers, planes and head_groups must be positive, got {counts}; "
                "head groups must divide the rows of base"
            )

    def _check_rows_apart(self) -> None:
        """Rows of one block must not overlap: the wider stride clears all that lies below the narrower one."""
        axes = [(self.token_stride, self.num_tokens), (self.head_stride, self.num_heads)]
        end = self.row_bytes
        for stride, count in sorted(axis for axis in axes if axis[1] > 1):
            if stride < end:
                raise KernelArgumentError(
                    f"rows of {self.row_bytes} bytes overlap: token stride {self.token_stride} for {self.num_tokens} "
                    f"tokens, head stride {self.head_stride} for {self.num_heads} heads"
                )
            end += (count - 1) * stride

    def _check_storages(self) -> None:
        storages = (tensor.untyped_storage() for tensor in self.tensors)
        known = {(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages}
        for first, end in set(map(tuple, self.limits.reshape(-1, 2).tolist())) - known:
            raise KernelArgumentError(f"limits [{first:#x}, {end:#x}) are not those of a storage of the view's tensors")

    def _check_range(self) -> None:
        if not self.num_blocks:
            return
        first, last = int(self.block_offsets.min()), int(self.block_offsets.max()) + self.span_bytes
        # Sums of Python integers, which do not wrap: past this, no sum of the arrays does either.
        if int(self.base.min()) + first < 0 or last + max(0, int(self.base.max())) >= 2**63:
            raise KernelArgumentError(f"offsets [{first}, {last}) reach past the addresses there are")
        low, high = self.base + first, self.base + last
        outside = (low < self.limits[..., 0]) | (high > self.limits[..., 1])
        if outside.any():
            layer, plane = np.argwhere(outside)[0].tolist()
            first, end = self.limits[layer, plane].tolist()
            raise KernelArgumentError(
                f"layer {layer}, plane {plane} reaches bytes [{low[layer, plane] - first}, {high[layer, plane] - first}) "
                f"of a storage of {end - first} bytes"
            )


def _frozen(array: Int64s) -> Int64s:
    """The array if it is read-only, else a copy that is."""
    if not array.flags.writeable:
        return array
    copied = array.copy()
    copied.flags.writeable = False
    return copied


def _check_slice(start: int, stop: int, num: int, name: str) -> None:
    if not 0 <= start < stop <= num:
        raise KernelArgumentError(f"{name} [{start}, {stop}) is not a range within the {num} {name} there are")
