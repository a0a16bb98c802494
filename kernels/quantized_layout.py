"""How quantised blocks lie in a slot: codes first, scales behind them, one such pair per group of heads.

    slot = head_groups × [ layer, plane, token, head_in_group, row ] codes, or elements in a plane that is copied as it is
                         [ layer, plane, head_in_group ]            fp32 scales, of quantised planes only
                         padding to 16 bytes

A tensor-parallel rank that holds whole groups reads its codes and scales as one contiguous run.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.view import View

__all__ = ["FORMATS", "LARGEST", "SCALE_BYTES", "QuantizedLayout", "QuantizedView"]

FORMATS = {"fp8_e4m3": 8, "int8": 8, "int4": 4}
"""Bits of one code."""

LARGEST = {"fp8_e4m3": 448, "int8": 127, "int4": 7}
"""What the largest magnitude of a block and head is mapped to."""

ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)
SCALE_BYTES = 4
SLOT_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayout:
    """Shape of a block, what its elements are, and which planes are quantised to what.

    Attributes:
        elements: dtype of the unquantised side: fp32, fp16 or bf16.
        dtype: "fp8_e4m3", "int8" or "int4".
        keys: quantise plane 0 (K, or the latents of MLA); else it is copied as it is.
        values: quantise plane 1; else it is copied as it is.
        head_groups: divides the heads; what one tensor-parallel rank reads is whole groups.
        allow_int4: int4 is off by 15 % of a Gaussian row's norm; without this flag it is refused.

    Raises:
        KernelArgumentError: unknown formats, or numbers that do not fit together.

    >>> import torch
    >>> layout = QuantizedLayout(num_layers=32, num_tokens=16, num_heads=8, head_dim=128, elements=torch.bfloat16)
    >>> layout.block_bytes, 32 * 2 * 16 * 8 * 128  # scales add 0.2 %
    (1050624, 1048576)
    >>> layout.view(torch.zeros(4, layout.block_bytes, dtype=torch.uint8)).num_blocks
    4
    """

    num_layers: int
    num_planes: int = 2
    num_tokens: int
    num_heads: int
    head_dim: int
    elements: torch.dtype
    dtype: str = "fp8_e4m3"
    keys: bool = True
    values: bool = True
    head_groups: int = 1
    allow_int4: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in FORMATS:
            raise KernelArgumentError(f"dtype is {self.dtype!r}, not one of {sorted(FORMATS)}")
        if self.elements not in ELEMENTS:
            raise KernelArgumentError(f"elements are {self.elements}; only fp32, fp16 and bf16 can be quantised")
        if self.dtype == "int4" and not self.allow_int4:
            raise KernelArgumentError("int4 is off by about 15 % of a row's norm; pass allow_int4=True to accept that")
        sizes = (self.num_layers, self.num_tokens, self.num_heads, self.head_dim, self.head_groups)
        if min(sizes) < 1 or self.num_planes not in (1, 2) or self.num_heads % self.head_groups:
            raise KernelArgumentError(
                f"layers, tokens, heads, head_dim and head_groups must be positive, got {sizes}; planes 1 or 2, got "
                f"{self.num_planes}; groups divide heads"
            )
        if self.dtype == "int4" and self.head_dim % 2:
            raise KernelArgumentError(f"int4 packs pairs of elements; head_dim {self.head_dim} is odd")
        if not any(self.is_quantized(plane) for plane in range(self.num_planes)):
            raise KernelArgumentError("neither keys nor values are to be quantised; use copy_blocks")

    def is_quantized(self, plane: int) -> bool:
        return self.keys if plane == 0 else self.values

    def row_bytes(self, plane: int) -> int:
        """Bytes of one token and head of `plane`."""
        bits = FORMATS[self.dtype] if self.is_quantized(plane) else 8 * self.elements.itemsize
        return self.head_dim * bits // 8

    @property
    def group_bytes(self) -> int:
        """Codes, scales and padding of one group of heads."""
        size = self._scales_offset + self.num_layers * self._num_quantized * self._group_heads * SCALE_BYTES
        return -(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    @property
    def block_bytes(self) -> int:
        """What a slot must hold at least."""
        return self.head_groups * self.group_bytes

    def view(self, slots: Tensor) -> "QuantizedView":
        """Slots as quantised blocks.

        Args:
            slots: uint8 [num_slots, slot_bytes]; a slot may be larger than its block. The scales of quantised planes are
                reached by 4-byte accesses, so the first byte and the distance of slots must be multiples of 4.

        Raises:
            KernelArgumentError: wrong dtype or shape, misaligned, or a block does not fit into a slot.
        """
        if slots.dtype != torch.uint8 or slots.dim() != 2 or (slots.shape[1] > 1 and slots.stride(1) != 1):
            raise KernelArgumentError(f"slots must be uint8 [num_slots, slot_bytes], got {slots.dtype} {slots.shape}")
        if slots.shape[1] < self.block_bytes:
            raise KernelArgumentError(f"blocks of {self.block_bytes} bytes do not fit slots of {slots.shape[1]} bytes")
        if slots.data_ptr() % SCALE_BYTES or slots.stride(0) % SCALE_BYTES:
            raise KernelArgumentError(
                f"slots start at {slots.data_ptr():#x} in steps of {slots.stride(0)}, not of 4 bytes"
            )
        planes = tuple(self._plane(slots, plane) for plane in range(self.num_planes))
        scales = tuple(self._scales(slots, p) if self.is_quantized(p) else None for p in range(self.num_planes))
        return QuantizedView(layout=self, planes=planes, scales=scales)

    @property
    def _group_heads(self) -> int:
        return self.num_heads // self.head_groups

    @property
    def _num_quantized(self) -> int:
        return sum(self.is_quantized(plane) for plane in range(self.num_planes))

    @property
    def _layer_bytes(self) -> int:
        return sum(self._plane_bytes(plane) for plane in range(self.num_planes))

    @property
    def _scales_offset(self) -> int:
        return -(-self.num_layers * self._layer_bytes // SCALE_BYTES) * SCALE_BYTES

    def _plane_bytes(self, plane: int) -> int:
        return self.num_tokens * self._group_heads * self.row_bytes(plane)

    def _plane(self, slots: Tensor, plane: int) -> View:
        first = sum(self._plane_bytes(p) for p in range(plane))
        row = self.row_bytes(plane)
        return self._window(slots, first, self._layer_bytes, row * self._group_heads, row, self.num_tokens)

    def _scales(self, slots: Tensor, plane: int) -> View:
        step = self._group_heads * SCALE_BYTES
        first = self._scales_offset + step * sum(self.is_quantized(p) for p in range(plane))
        return self._window(slots, first, step * self._num_quantized, step, SCALE_BYTES, 1)

    def _window(
        self, slots: Tensor, first: int, layer_step: int, token_stride: int, row_bytes: int, num_tokens: int
    ) -> View:
        groups = np.arange(self.head_groups, dtype=np.int64)[:, None] * self.group_bytes
        layers = np.arange(self.num_layers, dtype=np.int64) * layer_step
        base = (slots.data_ptr() + first + groups + layers).reshape(-1, 1)
        storage = slots.untyped_storage()
        limits = np.array([storage.data_ptr(), storage.data_ptr() + storage.nbytes()], dtype=np.int64)
        return View(
            tensors=(slots,),
            base=base,
            block_offsets=np.arange(slots.shape[0], dtype=np.int64) * slots.stride(0),
            token_stride=token_stride,
            head_stride=row_bytes,
            row_bytes=row_bytes,
            num_tokens=num_tokens,
            num_heads=self._group_heads,
            limits=np.broadcast_to(limits, (*base.shape, 2)),
            head_groups=self.head_groups,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedView:
    """Quantised blocks in slots: one view per plane, and one of scales per quantised plane. Owns no memory.

    Attributes:
        planes: K and V, or one for latents; each a view of one plane.
        scales: fp32, one token per block and rows of 4 bytes; None for a plane that is copied as it is.
    """

    layout: QuantizedLayout
    planes: tuple[View, ...]
    scales: tuple[View | None, ...]

    @property
    def device(self) -> torch.device:
        return self.planes[0].device

    @property
    def num_blocks(self) -> int:
        return self.planes[0].num_blocks

    def fold_with(self, other: View) -> tuple["QuantizedView", View]:
        """Itself and `other` with their heads in the same, fewest groups."""
        groups = math.lcm(self.planes[0].head_groups, other.head_groups)
        planes = tuple(plane.fold_heads(groups) for plane in self.planes)
        scales = tuple(None if scale is None else scale.fold_heads(groups) for scale in self.scales)
        return QuantizedView(layout=self.layout, planes=planes, scales=scales), other.fold_heads(groups)
