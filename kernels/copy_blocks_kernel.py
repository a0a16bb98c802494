"""The device side of `copy_blocks`: gather, scatter and layout conversion in one kernel.

Bytes moved: every byte of the plan is read once and written once; besides them 8 bytes per table entry and program.
Grid: one program per tile, or as many programs as the caller's budget of SMs allows, each striding over the tiles.
A tile is a run of words of one piece, and a piece is NUM_OUTER x NUM_INNER rows below one base and one pair of blocks.
Rows stay contiguous on both sides, so no transposition through shared memory is needed: a warp covers whole sectors from
rows of 32 bytes on. The loop over tiles is pipelined: STAGES - 1 tiles and their table entries are in flight per program,
by cp.async through shared memory, which is what a long round trip over PCIe needs.

The idea of one (source, destination) table and a persistent grid on few SMs is that of vLLM's `swap_blocks_triton`
(https://github.com/vllm-project/vllm/pull/42212); bytes in flight as the quantity to budget, SGLang's HiCache
(https://github.com/sgl-project/sglang/pull/40278).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from typing import Any

import triton
import triton.language as tl

__all__ = ["WORD_TYPES", "copy_blocks_kernel"]

WORD_TYPES: dict[int, Any] = {16: tl.int32, 8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
"""Element moved for each alignment in bytes. Sixteen bytes are four elements, which the compiler joins into one access."""


@triton.jit(do_not_specialize=["num_pairs", "num_bases", "num_tiles"])
def copy_blocks_kernel(
    table_ptr,  # int64: num_pairs source offsets, as many destination offsets, num_bases source bases, destination bases
    num_pairs,
    num_bases,
    num_tiles,
    NUM_INNER: tl.constexpr,  # rows of the inner axis
    ROW_WORDS: tl.constexpr,
    PIECE_WORDS: tl.constexpr,
    SRC_OUTER_STRIDE: tl.constexpr,  # strides in words
    SRC_INNER_STRIDE: tl.constexpr,
    DST_OUTER_STRIDE: tl.constexpr,
    DST_INNER_STRIDE: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes
    TILE_WORDS: tl.constexpr,
    BASES_OUTERMOST: tl.constexpr,  # whether the host side sees longer runs going through the pairs of one base first
    STAGES: tl.constexpr,
):
    CHUNKS: tl.constexpr = (PIECE_WORDS + TILE_WORDS - 1) // TILE_WORDS
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        piece = tile // CHUNKS
        if BASES_OUTERMOST:
            base = piece // num_pairs
            pair = piece % num_pairs
        else:
            pair = piece // num_bases
            base = piece % num_bases
        base_ptr = table_ptr + 2 * num_pairs + base
        src_address = tl.load(base_ptr) + tl.load(table_ptr + pair)
        dst_address = tl.load(base_ptr + num_bases) + tl.load(table_ptr + num_pairs + pair)
        # The hint must sit on the pointer: the cast from an integer drops it silently.
        src_ptr = tl.multiple_of(src_address.to(tl.pointer_type(WORD)), ALIGNMENT)
        dst_ptr = tl.multiple_of(dst_address.to(tl.pointer_type(WORD)), ALIGNMENT)
        # Positions within a piece stay below 2^31 bytes, which the launcher sees to; addresses have 64 bits.
        word = (tile % CHUNKS) * TILE_WORDS + tl.arange(0, TILE_WORDS)
        row = word // ROW_WORDS
        column = word % ROW_WORDS
        outer = row // NUM_INNER
        inner = row % NUM_INNER
        src_word = outer * SRC_OUTER_STRIDE + inner * SRC_INNER_STRIDE + column
        dst_word = outer * DST_OUTER_STRIDE + inner * DST_INNER_STRIDE + column
        if PIECE_WORDS % TILE_WORDS == 0:
            tl.store(dst_ptr + dst_word, tl.load(src_ptr + src_word))
        else:
            is_inside = word < PIECE_WORDS
            tl.store(dst_ptr + dst_word, tl.load(src_ptr + src_word, mask=is_inside), mask=is_inside)
