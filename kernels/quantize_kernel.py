"""Quantises and restores the rows of blocks while copying them, with one scale per block, layer, plane and head.

One program takes one block, one layer and plane, and HEADS heads of it: a tile [tokens, HEADS, dim]. Bytes moved per
element: quantise 2 (or 4 from fp32) read and 1 (fp8, int8) or ½ (int4) written; blocks of more than TILE_TOKENS tokens are
read twice, the second time mostly from L2. Restoring moves the same the other way. Scales add 4 bytes per tokens × dim.

Grid: min(sm_budget, items), grid-stride over items = blocks × layers·planes × groups of HEADS heads, heads fastest.
Address tables, one int64 tensor: for each layer and plane the base of rows, of codes and of scales; then for each block the
three offsets. Everything is aligned to ALIGN_BYTES on the source and CODE_ALIGN_BYTES on the quantised side.

Arithmetic, the same on the CPU, in the interpreter and on GPUs (no step that a compiler may fuse into another):

    amax   largest finite |x|, found on the bits of fp32 as integers; the last fp32 counts as the one before, since its
           scale may be rounded up and code * scale would be infinite
    scale  max(amax / LARGEST, 2**-126), divided as IEEE demands
    y      x * (1 / scale)
    code   y to nearest, ties to even: fp8 e4m3 saturating; int8 and int4 symmetric, int4 as two nibbles of code + 8

`casts_kernel` says how HARDWARE_CAST rounds. int4 packs element i with element i + dim / 2, so that both halves of a row
stay contiguous. One symmetric scale per head and block is the plainest of the schemes that KVQuant compares
(https://arxiv.org/abs/2401.18079); that keys of 4 bits need a scale per channel, as KIVI found
(https://arxiv.org/abs/2402.02750), is why int4 has to be asked for.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from dynamo.kernels.aot import Specialization
from dynamo.kernels.casts_kernel import fp8_code, fp8_value, int_code, narrow, widen
from dynamo.kernels.checks import KernelArgumentError, SlotIds
from dynamo.kernels.kernel_call import KernelCall, addresses_on
from dynamo.kernels.quantized_layout import FORMATS, SCALE_BYTES, QuantizedView
from dynamo.kernels.view import View

__all__ = ["ELEMENTS", "build_call", "constants", "dequantize_kernel", "quantize_kernel", "specializations"]

TILE_ELEMENTS = 8192
NUM_WARPS = 8
ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.uint16}
FP8_INSTRUCTIONS_SINCE = (8, 9)
MAX_REGISTERS = 128  # two programs of eight warps per multiprocessor
TABLE_LOADS = 6

SMALLEST_SCALE = tl.constexpr(2.0**-126)
LARGEST_AMAX_BITS = tl.constexpr(0x7F7FFFFE)


@triton.jit
def _finite_amax_bits(x):
    """Bits of the largest finite |x| per head of a tile [tokens, heads, dim]; ordered like the numbers themselves."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(bits < 0x7F800000, bits, 0)
    return tl.max(tl.max(bits, axis=2), axis=0)


@triton.jit
def _codes(low, high, inverse, FORMAT: tl.constexpr, LARGEST: tl.constexpr, HARDWARE_CAST: tl.constexpr):
    """uint8 codes of one tile; of two tiles, half rows, for int4."""
    if FORMAT == "fp8_e4m3":
        return fp8_code(low * inverse, HARDWARE_CAST)
    code = int_code(low * inverse, LARGEST, HARDWARE_CAST)
    if FORMAT == "int4":
        code = (code + 8) | ((int_code(high * inverse, LARGEST, HARDWARE_CAST) + 8) << 4)
    return code.to(tl.uint8)


@triton.jit
def _row_offsets(tokens, heads, token_stride, head_stride):
    """[tokens, heads, 1] offsets in the units of the strides."""
    return tokens[:, None, None].to(tl.int64) * token_stride + heads[None, :, None].to(tl.int64) * head_stride


@triton.jit
def _mask(tokens, heads, columns, NUM_TOKENS: tl.constexpr, NUM_HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    inside = (tokens < NUM_TOKENS)[:, None, None] & (heads < NUM_HEADS)[None, :, None]
    return inside & (columns < COLUMNS)[None, None, :]


@triton.jit
def _load_rows(row_ptr, mask, COLUMNS: tl.constexpr, IS_BF16: tl.constexpr, FORMAT: tl.constexpr):
    """fp32 of the rows, as their two halves for int4; otherwise twice the same."""
    low = widen(tl.load(row_ptr, mask=mask, other=0), IS_BF16)
    high = low
    if FORMAT == "int4":
        high = widen(tl.load(row_ptr + COLUMNS, mask=mask, other=0), IS_BF16)
    return low, high


@triton.jit
def _scales(amax_bits, LARGEST: tl.constexpr):
    """Scale and its inverse per head."""
    amax = tl.minimum(amax_bits, LARGEST_AMAX_BITS).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32)), SMALLEST_SCALE)
    return scale, tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)


@triton.jit
def quantize_kernel(
    table_ptr,
    num_planes,
    num_blocks,
    token_stride,
    head_stride,
    code_token_stride,
    code_head_stride,
    scale_head_stride,
    NUM_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ELEMENT: tl.constexpr,
    ELEMENT_BYTES: tl.constexpr,
    IS_BF16: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    CODE_ALIGN_BYTES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
):
    """Rows of ELEMENTs to codes and scales. FORMAT: "fp8_e4m3", "int8" or "int4".

    Args:
        table_ptr: int64, [3, num_planes] bases of rows, codes, scales; then [3, num_blocks] their offsets.
        num_planes: layers × planes listed.
        num_blocks: blocks listed.
        token_stride: in units of ALIGN_BYTES, as is head_stride.
        code_token_stride: in units of CODE_ALIGN_BYTES, as is code_head_stride.
        scale_head_stride: in units of 4 bytes.
    """
    LARGEST: tl.constexpr = 448 if FORMAT == "fp8_e4m3" else (127 if FORMAT == "int8" else 7)
    COLUMNS: tl.constexpr = DIM // 2 if FORMAT == "int4" else DIM
    HEAD_GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    UNIT: tl.constexpr = ALIGN_BYTES // ELEMENT_BYTES
    columns = tl.arange(0, PADDED_COLUMNS)
    tokens = tl.arange(0, TILE_TOKENS)
    for item in range(tl.program_id(0), num_blocks * num_planes * HEAD_GROUPS, tl.num_programs(0)):
        heads = (item % HEAD_GROUPS) * HEADS + tl.arange(0, HEADS)
        plane = (item // HEAD_GROUPS) % num_planes
        block = item // HEAD_GROUPS // num_planes
        offsets_ptr = table_ptr + 3 * num_planes + block
        src = tl.load(table_ptr + plane) + tl.load(offsets_ptr)
        codes = tl.load(table_ptr + num_planes + plane) + tl.load(offsets_ptr + num_blocks)
        scales = tl.load(table_ptr + 2 * num_planes + plane) + tl.load(offsets_ptr + 2 * num_blocks)
        src_ptr = tl.multiple_of(src.to(tl.pointer_type(ELEMENT)), ALIGN_BYTES)
        code_ptr = tl.multiple_of(codes.to(tl.pointer_type(tl.uint8)), CODE_ALIGN_BYTES)
        scale_ptr = scales.to(tl.pointer_type(tl.float32)) + heads.to(tl.int64) * scale_head_stride
        row_ptr = src_ptr + _row_offsets(tokens, heads, token_stride, head_stride) * UNIT + columns
        out_ptr = (
            code_ptr + _row_offsets(tokens, heads, code_token_stride, code_head_stride) * CODE_ALIGN_BYTES + columns
        )
        if NUM_TOKENS <= TILE_TOKENS:
            mask = _mask(tokens, heads, columns, NUM_TOKENS, NUM_HEADS, COLUMNS)
            low, high = _load_rows(row_ptr, mask, COLUMNS, IS_BF16, FORMAT)
            scale, inverse = _scales(tl.maximum(_finite_amax_bits(low), _finite_amax_bits(high)), LARGEST)
            tl.store(scale_ptr, scale, mask=heads < NUM_HEADS)
            tl.store(out_ptr, _codes(low, high, inverse[None, :, None], FORMAT, LARGEST, HARDWARE_CAST), mask=mask)
        else:
            amax_bits = tl.zeros((HEADS,), dtype=tl.int32)
            for first in range(0, NUM_TOKENS, TILE_TOKENS):
                mask = _mask(first + tokens, heads, columns, NUM_TOKENS, NUM_HEADS, COLUMNS)
                step = tl.cast(first, tl.int64) * token_stride * UNIT
                low, high = _load_rows(row_ptr + step, mask, COLUMNS, IS_BF16, FORMAT)
                amax_bits = tl.maximum(amax_bits, tl.maximum(_finite_amax_bits(low), _finite_amax_bits(high)))
            scale, inverse = _scales(amax_bits, LARGEST)
            tl.store(scale_ptr, scale, mask=heads < NUM_HEADS)
            for first in range(0, NUM_TOKENS, TILE_TOKENS):
                mask = _mask(first + tokens, heads, columns, NUM_TOKENS, NUM_HEADS, COLUMNS)
                step = tl.cast(first, tl.int64) * token_stride * UNIT
                low, high = _load_rows(row_ptr + step, mask, COLUMNS, IS_BF16, FORMAT)
                code = _codes(low, high, inverse[None, :, None], FORMAT, LARGEST, HARDWARE_CAST)
                tl.store(out_ptr + tl.cast(first, tl.int64) * code_token_stride * CODE_ALIGN_BYTES, code, mask=mask)


@triton.jit
def dequantize_kernel(
    table_ptr,
    num_planes,
    num_blocks,
    token_stride,
    head_stride,
    code_token_stride,
    code_head_stride,
    scale_head_stride,
    NUM_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ELEMENT: tl.constexpr,
    ELEMENT_BYTES: tl.constexpr,
    IS_BF16: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    CODE_ALIGN_BYTES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
):
    """Codes and scales to rows of ELEMENTs. Arguments as of `quantize_kernel`; the rows are written."""
    COLUMNS: tl.constexpr = DIM // 2 if FORMAT == "int4" else DIM
    HEAD_GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    TOKEN_GROUPS: tl.constexpr = (NUM_TOKENS + TILE_TOKENS - 1) // TILE_TOKENS
    UNIT: tl.constexpr = ALIGN_BYTES // ELEMENT_BYTES
    columns = tl.arange(0, PADDED_COLUMNS)
    for item in range(tl.program_id(0), num_blocks * num_planes * HEAD_GROUPS * TOKEN_GROUPS, tl.num_programs(0)):
        heads = (item % HEAD_GROUPS) * HEADS + tl.arange(0, HEADS)
        tokens = (item // HEAD_GROUPS % TOKEN_GROUPS) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
        plane = item // (HEAD_GROUPS * TOKEN_GROUPS) % num_planes
        block = item // (HEAD_GROUPS * TOKEN_GROUPS) // num_planes
        offsets_ptr = table_ptr + 3 * num_planes + block
        dst = tl.load(table_ptr + plane) + tl.load(offsets_ptr)
        codes = tl.load(table_ptr + num_planes + plane) + tl.load(offsets_ptr + num_blocks)
        scales = tl.load(table_ptr + 2 * num_planes + plane) + tl.load(offsets_ptr + 2 * num_blocks)
        dst_ptr = tl.multiple_of(dst.to(tl.pointer_type(ELEMENT)), ALIGN_BYTES)
        code_ptr = tl.multiple_of(codes.to(tl.pointer_type(tl.uint8)), CODE_ALIGN_BYTES)
        scale_ptr = scales.to(tl.pointer_type(tl.float32))

        mask = _mask(tokens, heads, columns, NUM_TOKENS, NUM_HEADS, COLUMNS)
        scale = tl.load(scale_ptr + heads.to(tl.int64) * scale_head_stride, mask=heads < NUM_HEADS, other=0.0)
        scale = scale[None, :, None]
        offsets = _row_offsets(tokens, heads, code_token_stride, code_head_stride) * CODE_ALIGN_BYTES
        code = tl.load(code_ptr + offsets + columns, mask=mask, other=0)
        row_ptr = dst_ptr + _row_offsets(tokens, heads, token_stride, head_stride) * UNIT + columns
        if FORMAT == "fp8_e4m3":
            low = fp8_value(code, HARDWARE_CAST)
        elif FORMAT == "int8":
            low = code.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            low = ((code & 0xF).to(tl.int32) - 8).to(tl.float32)
            high = ((code >> 4).to(tl.int32) - 8).to(tl.float32)
            tl.store(row_ptr + COLUMNS, narrow(high * scale, ELEMENT, IS_BF16, HARDWARE_CAST), mask=mask)
        tl.store(row_ptr, narrow(low * scale, ELEMENT, IS_BF16, HARDWARE_CAST), mask=mask)


def build_call(
    rows: View, row_ids: SlotIds, pool: QuantizedView, pool_ids: SlotIds, device: torch.device, *, to_codes: bool
) -> KernelCall:
    """The launch that quantises (`to_codes`) or restores; both sides folded alike, everything checked before."""
    layout = pool.layout
    planes = [p for p, scales in enumerate(pool.scales) if scales is not None]
    codes = [pool.planes[p] for p in planes]
    scales = [view for view in pool.scales if view is not None]
    bases = [addresses_on(rows, device)[:, planes]]
    bases += [np.concatenate([addresses_on(view, device) for view in side], axis=1) for side in (codes, scales)]
    offsets = [rows.block_offsets[row_ids], codes[0].block_offsets[pool_ids], scales[0].block_offsets[pool_ids]]
    align, code_align = rows.alignment, min(view.alignment for view in codes)
    is_gpu = device.type == "cuda"
    constexprs = constants(
        num_tokens=rows.num_tokens,
        num_heads=rows.num_heads,
        head_dim=layout.head_dim,
        elements=layout.elements,
        dtype=layout.dtype,
        align_bytes=align,
        code_align_bytes=code_align,
        hardware_cast=is_gpu
        and (layout.dtype != "fp8_e4m3" or torch.cuda.get_device_capability(device) >= FP8_INSTRUCTIONS_SINCE),
    )
    head_groups = -(-rows.num_heads // constexprs["HEADS"])
    token_groups = 1 if to_codes else -(-rows.num_tokens // constexprs["TILE_TOKENS"])
    strides = [rows.token_stride // align, rows.head_stride // align]
    strides += [codes[0].token_stride // code_align, codes[0].head_stride // code_align]
    return KernelCall(
        kernel=quantize_kernel if to_codes else dequantize_kernel,
        table=np.concatenate([array.reshape(-1) for array in (*bases, *offsets)]),
        arguments=(bases[0].size, row_ids.size, *strides, scales[0].head_stride // SCALE_BYTES),
        constexprs=constexprs,
        num_items=bases[0].size * row_ids.size * head_groups * token_groups,
        num_warps=NUM_WARPS,
    )


def constants(
    *,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    elements: torch.dtype,
    dtype: str,
    align_bytes: int,
    code_align_bytes: int,
    hardware_cast: bool,
) -> dict[str, Any]:
    """Constant arguments of both kernels; a tile holds about TILE_ELEMENTS, whole tokens first, then heads.

    Raises:
        KernelArgumentError: not even one row fits a tile.
    """
    if head_dim > TILE_ELEMENTS:
        raise KernelArgumentError(
            f"rows of {head_dim} elements are wider than the {TILE_ELEMENTS} that a GPU quantises at a time"
        )
    padded = triton.next_power_of_2(head_dim // 2 if dtype == "int4" else head_dim)
    budget = TILE_ELEMENTS // triton.next_power_of_2(head_dim)
    tokens = min(triton.next_power_of_2(num_tokens), budget)
    return {
        "NUM_TOKENS": num_tokens,
        "NUM_HEADS": num_heads,
        "DIM": head_dim,
        "ELEMENT": ELEMENTS[elements],
        "ELEMENT_BYTES": elements.itemsize,
        "IS_BF16": elements is torch.bfloat16,
        "FORMAT": dtype,
        "ALIGN_BYTES": align_bytes,
        "CODE_ALIGN_BYTES": code_align_bytes,
        "TILE_TOKENS": tokens,
        "HEADS": min(triton.next_power_of_2(num_heads), budget // tokens),
        "PADDED_COLUMNS": padded,
        "HARDWARE_CAST": hardware_cast,
    }


def specializations() -> list[Specialization]:
    """What is checked ahead of time: both ways, blocks of 16 tokens and 8 heads of 128, and MLA latents of 64 tokens."""
    bf16, fp32 = torch.bfloat16, torch.float32
    chosen = [(bf16, "fp8_e4m3", True), (bf16, "fp8_e4m3", False), (fp32, "fp8_e4m3", True), (bf16, "int8", True)]
    chosen += [(bf16, "int4", True), (fp32, "int4", True)]
    found = [
        specialization
        for elements, dtype, instructions in chosen
        for specialization in _specialize(16, 8, 128, elements, dtype, hardware_cast=instructions)
    ]
    return found + _specialize(64, 1, 576, bf16, "fp8_e4m3", hardware_cast=True)


def _specialize(
    num_tokens: int, num_heads: int, head_dim: int, elements: torch.dtype, dtype: str, *, hardware_cast: bool
) -> list[Specialization]:
    chosen = constants(
        num_tokens=num_tokens,
        num_heads=num_heads,
        head_dim=head_dim,
        elements=elements,
        dtype=dtype,
        align_bytes=16,
        code_align_bytes=16,
        hardware_cast=hardware_cast,
    )
    tile = chosen["TILE_TOKENS"] * chosen["HEADS"] * head_dim
    row_bytes, code_bytes = tile * elements.itemsize, tile * FORMATS[dtype] // 8
    needs_instructions = hardware_cast and dtype == "fp8_e4m3"
    name = f"{dtype} of {str(elements).removeprefix('torch.')}, rows of {head_dim}"
    name += ", integer rounding" if dtype == "fp8_e4m3" and not hardware_cast else ""
    strides = ("token_stride", "head_stride", "code_token_stride", "code_head_stride", "scale_head_stride")
    signature = {"table_ptr": "*i64", "num_planes": "i32", "num_blocks": "i32"} | dict.fromkeys(strides, "i64")
    return [
        Specialization(
            name=f"{verb} {name}",
            kernel=kernel,
            signature=signature,
            constexprs=chosen,
            num_warps=NUM_WARPS,
            max_registers=MAX_REGISTERS,
            loaded_bytes=loaded,
            stored_bytes=stored,
            narrow_loads=TABLE_LOADS + (not is_quantizing),
            narrow_stores=int(is_quantizing),  # the scales
            architectures=(90, 100) if needs_instructions else (80, 90, 100),
        )
        for verb, kernel, loaded, stored, is_quantizing in (
            ("quantise", quantize_kernel, row_bytes, code_bytes, True),
            ("restore", dequantize_kernel, code_bytes, row_bytes, False),
        )
    ]
