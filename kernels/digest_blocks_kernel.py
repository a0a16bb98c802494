"""The device side of `digest_blocks`: one 64-bit digest per block, alone or while the block is copied.

Bytes moved: every byte read once, and written once when copying; 8 bytes of table per program and entry, 8 bytes of digest
per block. Grid: min(sm_budget, items), grid-stride over items = blocks × layers·planes × tiles of ROWS rows. An item adds
its sum to its block's digest by one atomic; additions modulo 2**64 commute, so the result does not depend on the order. A
second, tiny kernel finishes the digests.

A row is read as little-endian words of 8 bytes, zero-padded, and a word costs one exclusive or and one 64-bit product:

    row    = Σ_j (w_j ^ (w_j >> 32)) · key_j            mod 2**64, keys odd
    digest = mix(start + Σ_rows mix(row + (position + 1) · GOLDEN))

with `mix` the finaliser of SplitMix64 (https://prng.di.unimi.it/splitmix64.c), a bijection, and the position that of the
row in logical order. A sum of products with odd keys is the multilinear hash of https://arxiv.org/abs/1202.4961; folding
the upper half down keeps changes of top bits from cancelling.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from dynamo.kernels.aot import Specialization
from dynamo.kernels.checks import KernelArgumentError, SlotIds
from dynamo.kernels.digest_host import GOLDEN, Digests, row_keys, row_positions
from dynamo.kernels.kernel_call import KernelCall, addresses_on
from dynamo.kernels.view import View, common_alignment

__all__ = ["build_calls", "digest_blocks_kernel", "finish_kernel", "specializations", "tile_rows"]

NUM_WARPS = 8
TILE_BYTES = 16384
FINISH_TILE = 256
MAX_REGISTERS = 64
TABLE_LOADS = 6
PIECES = {8: tl.uint64, 4: tl.uint32, 2: tl.uint16, 1: tl.uint8}
STEP = tl.constexpr(GOLDEN)
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * FIRST_FACTOR
    x = (x ^ (x >> 27)) * SECOND_FACTOR
    return x ^ (x >> 31)


@triton.jit
def digest_blocks_kernel(
    table_ptr,
    out_ptr,
    num_planes,
    num_blocks,
    token_stride,
    head_stride,
    dst_token_stride,
    dst_head_stride,
    total_heads,
    NUM_ROWS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ROW_PIECES: tl.constexpr,
    PADDED_WORDS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECE_BYTES: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COPY: tl.constexpr,
):
    """Adds the sum over the rows of each block to `out_ptr[block]`, and copies the rows if COPY.

    Args:
        table_ptr: int64, [3, num_planes] source bases, destination bases, row positions; [2, num_blocks] source and
            destination offsets; [PADDED_WORDS] keys.
        out_ptr: int64 [num_blocks], zero at first.
        token_stride: in units of ALIGN_BYTES, as are all strides.
        total_heads: positions from a token to the next.
    """
    WORD_PIECES: tl.constexpr = 8 // PIECE_BYTES
    UNIT: tl.constexpr = ALIGN_BYTES // PIECE_BYTES
    TILES: tl.constexpr = (NUM_ROWS + ROWS - 1) // ROWS
    columns = tl.arange(0, PADDED_WORDS * WORD_PIECES)
    keys_ptr = table_ptr + 3 * num_planes + 2 * num_blocks
    keys = tl.load(keys_ptr + tl.arange(0, PADDED_WORDS)).to(tl.uint64, bitcast=True)
    for item in range(tl.program_id(0), num_blocks * num_planes * TILES, tl.num_programs(0)):
        plane = (item // TILES) % num_planes
        block = item // TILES // num_planes
        rows = (item % TILES) * ROWS + tl.arange(0, ROWS)
        tokens = (rows // NUM_HEADS).to(tl.int64)
        heads = (rows % NUM_HEADS).to(tl.int64)
        offsets_ptr = table_ptr + 3 * num_planes + block
        src = tl.load(table_ptr + plane) + tl.load(offsets_ptr)
        src_ptr = tl.multiple_of(src.to(tl.pointer_type(PIECE)), ALIGN_BYTES)
        mask = (rows < NUM_ROWS)[:, None] & (columns < ROW_PIECES)[None, :]
        row_offsets = ((tokens * token_stride + heads * head_stride) * UNIT)[:, None]
        pieces = tl.load(src_ptr + row_offsets + columns[None, :], mask=mask, other=0)
        if COPY:
            dst = tl.load(table_ptr + num_planes + plane) + tl.load(offsets_ptr + num_blocks)
            dst_ptr = tl.multiple_of(dst.to(tl.pointer_type(PIECE)), ALIGN_BYTES)
            dst_offsets = ((tokens * dst_token_stride + heads * dst_head_stride) * UNIT)[:, None]
            tl.store(dst_ptr + dst_offsets + columns[None, :], pieces, mask=mask)
        words = pieces.to(tl.uint64)
        if WORD_PIECES > 1:
            shifts = (tl.arange(0, WORD_PIECES) * (8 * PIECE_BYTES)).to(tl.uint64)
            words = tl.sum(tl.reshape(words, (ROWS, PADDED_WORDS, WORD_PIECES)) << shifts[None, None, :], axis=2)
        sums = tl.sum((words ^ (words >> 32)) * keys[None, :], axis=1)
        positions = tl.load(table_ptr + 2 * num_planes + plane) + tokens * total_heads + heads + 1
        terms = tl.where(rows < NUM_ROWS, _mix(sums + positions.to(tl.uint64) * STEP), 0)
        tl.atomic_add(out_ptr + block, tl.sum(terms, axis=0).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def finish_kernel(table_ptr, out_ptr, num_blocks, TILE: tl.constexpr):
    """Turns sums into digests: out = mix(out + start), the starts in `table_ptr` [num_blocks]."""
    for first in range(tl.program_id(0) * TILE, num_blocks, tl.num_programs(0) * TILE):
        block = first + tl.arange(0, TILE)
        mask = block < num_blocks
        total = tl.load(out_ptr + block, mask=mask, other=0) + tl.load(table_ptr + block, mask=mask, other=0)
        tl.store(out_ptr + block, _mix(total.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True), mask=mask)


def build_calls(
    src: View, src_ids: SlotIds, dst: View | None, dst_ids: SlotIds, starts: Digests, out: torch.Tensor
) -> tuple[KernelCall, KernelCall]:
    """The launch that sums and the one that finishes; views folded alike, everything checked. `out` is zeroed between."""
    to = src if dst is None else dst
    align = min(src.alignment, to.alignment)
    piece_bytes = min(8, common_alignment(align, src.row_bytes))
    words = triton.next_power_of_2(-(-src.row_bytes // 8))
    num_rows = src.num_tokens * src.num_heads
    rows = tile_rows(num_rows, src.row_bytes)
    keys = np.zeros(words, dtype=np.uint64)
    keys[: -(-src.row_bytes // 8)] = row_keys(src.row_bytes)
    bases = [addresses_on(src, out.device), addresses_on(to, out.device), row_positions(src)]
    offsets = [src.block_offsets[src_ids], to.block_offsets[dst_ids]]
    strides = (src.token_stride, src.head_stride, to.token_stride, to.head_stride)
    constexprs = constants(num_rows, src.num_heads, src.row_bytes, piece_bytes, align, rows, copy=dst is not None)
    out = out.view(torch.int64)
    add = KernelCall(
        kernel=digest_blocks_kernel,
        table=np.concatenate([array.reshape(-1).view(np.int64) for array in (*bases, *offsets, keys)]),
        arguments=(out, bases[0].size, src_ids.size, *(stride // align for stride in strides), src.total_heads),
        constexprs=constexprs,
        num_items=bases[0].size * src_ids.size * -(-num_rows // rows),
        num_warps=NUM_WARPS,
    )
    finish = KernelCall(
        kernel=finish_kernel,
        table=starts.view(np.int64),
        arguments=(out, src_ids.size),
        constexprs={"TILE": FINISH_TILE},
        num_items=-(-src_ids.size // FINISH_TILE),
        num_warps=NUM_WARPS,
    )
    return add, finish


def constants(
    num_rows: int, num_heads: int, row_bytes: int, piece_bytes: int, align_bytes: int, rows: int, *, copy: bool
) -> dict[str, Any]:
    """Constant arguments of `digest_blocks_kernel`."""
    return {
        "NUM_ROWS": num_rows,
        "NUM_HEADS": num_heads,
        "ROW_PIECES": row_bytes // piece_bytes,
        "PADDED_WORDS": triton.next_power_of_2(-(-row_bytes // 8)),
        "PIECE": PIECES[piece_bytes],
        "PIECE_BYTES": piece_bytes,
        "ALIGN_BYTES": align_bytes,
        "ROWS": rows,
        "COPY": copy,
    }


def specializations() -> list[Specialization]:
    """What is checked ahead of time: digests alone and while copying, rows from 64 to 1152 bytes."""
    strides = ("token_stride", "head_stride", "dst_token_stride", "dst_head_stride", "total_heads")
    signature = {"table_ptr": "*i64", "out_ptr": "*i64", "num_planes": "i32", "num_blocks": "i32"}
    found = []
    for num_rows, num_heads, row_bytes in ((128, 8, 256), (128, 8, 64), (128, 8, 160), (64, 1, 1152)):
        rows = tile_rows(num_rows, row_bytes)
        tile = rows * row_bytes
        found += [
            Specialization(
                name=f"{'copy and digest' if copy else 'digest'} rows of {row_bytes} bytes",
                kernel=digest_blocks_kernel,
                signature=signature | dict.fromkeys(strides, "i64"),
                constexprs=constants(num_rows, num_heads, row_bytes, 8, 16, rows, copy=copy),
                num_warps=NUM_WARPS,
                max_registers=MAX_REGISTERS,
                loaded_bytes=tile,
                stored_bytes=tile if copy else 0,
                narrow_loads=TABLE_LOADS + 2 * copy,
            )
            for copy in (False, True)
        ]
    return found


def tile_rows(num_rows: int, row_bytes: int) -> int:
    """Rows of a tile: about TILE_BYTES, a power of two.

    Raises:
        KernelArgumentError: not even one row fits.
    """
    padded = 8 * triton.next_power_of_2(-(-row_bytes // 8))
    if padded > TILE_BYTES:
        raise KernelArgumentError(f"rows of {row_bytes} bytes are wider than the {TILE_BYTES} of a GPU's tile")
    return int(min(triton.next_power_of_2(num_rows), TILE_BYTES // padded))
