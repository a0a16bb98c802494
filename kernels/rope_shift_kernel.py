"""Rotates the keys of blocks to other positions while copying them.

Bytes moved: every byte of the key rows read and written once; 8 bytes of table per program and entry, and the cosines and
sines of one difference of positions, 4 bytes per rotated element. Grid: min(sm_budget, items), grid-stride over items =
blocks × layers × tiles of ROWS rows. Cosines and sines are made on the host in fp64 and rounded to fp32 once, since fp32
angles are off by 0.06 radians at a million positions; the products are fp32, in an order and without a fusion that would
make the result differ from the CPU's.

The idea of moving cached keys by a rotation is that of EPIC (https://arxiv.org/abs/2410.15332).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from dynamo.kernels.aot import Specialization
from dynamo.kernels.casts_kernel import narrow, widen
from dynamo.kernels.checks import SlotIds
from dynamo.kernels.kernel_call import KernelCall, addresses_on
from dynamo.kernels.quantize_kernel import ELEMENTS
from dynamo.kernels.rope_shift_host import Rope, Trig
from dynamo.kernels.view import View

__all__ = ["build_call", "rope_shift_kernel", "specializations"]

ROTATED_ELEMENTS = 8192
PLAIN_ELEMENTS = 16384
NUM_WARPS = 8
MAX_REGISTERS = 128  # two programs of eight warps per multiprocessor
TABLE_LOADS = 5


@triton.jit
def _copy_columns(src_ptr, dst_ptr, mask, FIRST: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """Copies COUNT elements from FIRST on of rows given as pointers [rows, 1]."""
    columns = tl.arange(0, PADDED)[None, :]
    inside = mask & (columns < COUNT)
    tl.store(dst_ptr + FIRST + columns, tl.load(src_ptr + FIRST + columns, mask=inside, other=0), mask=inside)


@triton.jit
def rope_shift_kernel(
    table_ptr,
    num_rotations,
    num_planes,
    num_blocks,
    token_stride,
    head_stride,
    dst_token_stride,
    dst_head_stride,
    NUM_ROWS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    OFFSET: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PADDED_OFFSET: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ELEMENT: tl.constexpr,
    ELEMENT_BYTES: tl.constexpr,
    IS_BF16: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
):
    """Rows of OFFSET elements that stay, 2 × HALF that are rotated, and REST that stay.

    Args:
        table_ptr: fp32 [num_rotations, 2, HALF] cosines and sines; then int64 [2, num_planes] source and destination
            bases; [3, num_blocks] source and destination offsets and number of the rotation.
        num_planes: key planes, one per layer.
        token_stride: in units of ALIGN_BYTES, as are all strides.
    """
    UNIT: tl.constexpr = ALIGN_BYTES // ELEMENT_BYTES
    TILES: tl.constexpr = (NUM_ROWS + ROWS - 1) // ROWS
    trig_ptr = table_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    bases_ptr = table_ptr + num_rotations * HALF
    half = tl.arange(0, PADDED_HALF)
    for item in range(tl.program_id(0), num_blocks * num_planes * TILES, tl.num_programs(0)):
        plane = (item // TILES) % num_planes
        block = item // TILES // num_planes
        rows = (item % TILES) * ROWS + tl.arange(0, ROWS)
        tokens = (rows // NUM_HEADS).to(tl.int64)
        heads = (rows % NUM_HEADS).to(tl.int64)
        offsets_ptr = bases_ptr + 2 * num_planes + block
        src = tl.load(bases_ptr + plane) + tl.load(offsets_ptr)
        dst = tl.load(bases_ptr + num_planes + plane) + tl.load(offsets_ptr + num_blocks)
        src_ptr = tl.multiple_of(src.to(tl.pointer_type(ELEMENT)), ALIGN_BYTES)
        dst_ptr = tl.multiple_of(dst.to(tl.pointer_type(ELEMENT)), ALIGN_BYTES)
        src_row = src_ptr + ((tokens * token_stride + heads * head_stride) * UNIT)[:, None]
        dst_row = dst_ptr + ((tokens * dst_token_stride + heads * dst_head_stride) * UNIT)[:, None]
        row_mask = (rows < NUM_ROWS)[:, None]

        angle_ptr = trig_ptr + tl.load(offsets_ptr + 2 * num_blocks) * (2 * HALF) + half
        cosine = tl.load(angle_ptr, mask=half < HALF, other=0.0)[None, :]
        sine = tl.load(angle_ptr + HALF, mask=half < HALF, other=0.0)[None, :]
        if INTERLEAVED:
            columns = tl.arange(0, 2 * PADDED_HALF)[None, :]
            mask = row_mask & (columns < 2 * HALF)
            both = tl.load(src_row + OFFSET + columns, mask=mask, other=0)
            even, odd = tl.split(tl.reshape(both, (ROWS, PADDED_HALF, 2)))
            x = widen(even, IS_BF16)
            y = widen(odd, IS_BF16)
            turned_x = narrow(x * cosine - y * sine, ELEMENT, IS_BF16, HARDWARE_CAST)
            turned_y = narrow(y * cosine + x * sine, ELEMENT, IS_BF16, HARDWARE_CAST)
            turned = tl.reshape(tl.join(turned_x, turned_y), (ROWS, 2 * PADDED_HALF))
            tl.store(dst_row + OFFSET + columns, turned, mask=mask)
        else:
            mask = row_mask & (half < HALF)[None, :]
            x = widen(tl.load(src_row + OFFSET + half[None, :], mask=mask, other=0), IS_BF16)
            y = widen(tl.load(src_row + OFFSET + HALF + half[None, :], mask=mask, other=0), IS_BF16)
            turned_x = narrow(x * cosine - y * sine, ELEMENT, IS_BF16, HARDWARE_CAST)
            turned_y = narrow(y * cosine + x * sine, ELEMENT, IS_BF16, HARDWARE_CAST)
            tl.store(dst_row + OFFSET + half[None, :], turned_x, mask=mask)
            tl.store(dst_row + OFFSET + HALF + half[None, :], turned_y, mask=mask)
        if OFFSET:
            _copy_columns(src_row, dst_row, row_mask, 0, OFFSET, PADDED_OFFSET)
        if REST:
            _copy_columns(src_row, dst_row, row_mask, OFFSET + 2 * HALF, REST, PADDED_REST)


def build_call(
    src: View,
    src_ids: SlotIds,
    dst: View,
    dst_ids: SlotIds,
    rope: Rope,
    trig: Trig,
    rotation_ids: SlotIds,
    elements: torch.dtype,
    device: torch.device,
) -> KernelCall:
    """The launch over views of key planes only, folded alike, everything checked before."""
    align = min(src.alignment, dst.alignment)
    head_dim = src.row_bytes // elements.itemsize
    is_gpu = device.type == "cuda"
    constexprs = constants(src.num_tokens, src.num_heads, head_dim, rope, elements, align, is_gpu=is_gpu)
    bases = (addresses_on(src, device), addresses_on(dst, device))
    offsets = (src.block_offsets[src_ids], dst.block_offsets[dst_ids], rotation_ids)
    strides = (src.token_stride, src.head_stride, dst.token_stride, dst.head_stride)
    tiles = -(-src.num_tokens * src.num_heads // constexprs["ROWS"])
    return KernelCall(
        kernel=rope_shift_kernel,
        table=np.concatenate([array.reshape(-1).view(np.int64) for array in (trig, *bases, *offsets)]),
        arguments=(trig.shape[0], bases[0].size, src_ids.size, *(stride // align for stride in strides)),
        constexprs=constexprs,
        num_items=bases[0].size * src_ids.size * tiles,
        num_warps=NUM_WARPS,
    )


def constants(
    num_tokens: int, num_heads: int, head_dim: int, rope: Rope, elements: torch.dtype, align_bytes: int, *, is_gpu: bool
) -> dict[str, Any]:
    """Constant arguments of `rope_shift_kernel`; a tile is whole rows, up to ROTATED_ELEMENTS and PLAIN_ELEMENTS of them."""
    half, rest = rope.inv_freq.size, head_dim - rope.offset - 2 * rope.inv_freq.size
    plain = triton.next_power_of_2(max(1, rope.offset, rest))
    rows = max(1, min(ROTATED_ELEMENTS // (2 * triton.next_power_of_2(half)), PLAIN_ELEMENTS // plain))
    return {
        "NUM_ROWS": num_tokens * num_heads,
        "NUM_HEADS": num_heads,
        "OFFSET": rope.offset,
        "HALF": half,
        "REST": rest,
        "PADDED_OFFSET": triton.next_power_of_2(max(1, rope.offset)),
        "PADDED_HALF": triton.next_power_of_2(half),
        "PADDED_REST": triton.next_power_of_2(max(1, rest)),
        "INTERLEAVED": rope.interleaved,
        "ELEMENT": ELEMENTS[elements],
        "ELEMENT_BYTES": elements.itemsize,
        "IS_BF16": elements is torch.bfloat16,
        "ALIGN_BYTES": align_bytes,
        "ROWS": min(triton.next_power_of_2(num_tokens * num_heads), rows),
        "HARDWARE_CAST": is_gpu,
    }


def specializations() -> list[Specialization]:
    """What is checked ahead of time: both styles of pairs, partial rotation, and DeepSeek's latents."""
    strides = ("token_stride", "head_stride", "dst_token_stride", "dst_head_stride")
    counts = ("num_rotations", "num_planes", "num_blocks")
    signature = {"table_ptr": "*i64"} | dict.fromkeys(counts, "i32") | dict.fromkeys(strides, "i64")
    shapes = (
        ("halves of 128", 16, 8, 128, Rope.of_theta(128)),
        ("pairs of 128", 16, 8, 128, Rope.of_theta(128, interleaved=True)),
        ("halves, 32 of 80", 16, 8, 80, Rope.of_theta(32)),
        ("pairs, last 64 of 576", 64, 1, 576, Rope.of_theta(64, interleaved=True, offset=512)),
    )
    found = []
    for name, num_tokens, num_heads, head_dim, rope in shapes:
        for elements in (torch.bfloat16, torch.float32):
            chosen = constants(num_tokens, num_heads, head_dim, rope, elements, 16, is_gpu=True)
            tile = chosen["ROWS"] * head_dim * elements.itemsize
            found.append(
                Specialization(
                    name=f"rotate {name}, {str(elements).removeprefix('torch.')}",
                    kernel=rope_shift_kernel,
                    signature=signature,
                    constexprs=chosen,
                    divisible_by_16=("table_ptr",),
                    num_warps=NUM_WARPS,
                    max_registers=MAX_REGISTERS,
                    loaded_bytes=tile,
                    stored_bytes=tile,
                    # A thread that holds two pairs of fp32 reads two cosines and two sines.
                    narrow_loads=TABLE_LOADS + 2 * (rope.interleaved and elements is torch.float32),
                )
            )
    return found
