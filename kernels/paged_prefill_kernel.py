"""Paged prefill attention in Triton: chunks of queries, causal, over everything cached before and in them.

Bytes moved: per tile of rows, the keys and values it may see; the tiles of a chunk find each other's in L2.
Grid: (row tiles of the longest chunk, num_kv_heads, num_seqs); programs past their chunk end at once.

    rows      queries x the query heads of one key head, a query's heads next to each other; BLOCK_M of them
    keys      [0, full) are seen by every row and need no mask, [full, last) cross the diagonal
              (with a window all are masked, and none before the first row's window is read)

Chunked prefill over block tables and packed heads follow PagedAttention (https://arxiv.org/abs/2309.06180) and FlashInfer
(https://arxiv.org/abs/2501.01005); the online softmax is FlashAttention-2's (https://arxiv.org/abs/2307.08691).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamo.kernels.paged_attention_kernel import (
    LOG2_E,
    Tile,
    as_loaded,
    fp8_mode,
    head_constants,
    is_prefix,
    scale_stride,
)
from dynamo.kernels.paged_keys_kernel import attend_keys, fresh_state, load_queries, scaled_for

__all__ = ["launch_prefill", "prefill_kernel", "prefill_tile"]


@triton.jit(do_not_specialize=["num_tokens"])
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    length_ptr,
    start_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_token_stride,
    q_head_stride,
    k_block_stride,
    k_token_stride,
    k_head_stride,
    v_block_stride,
    v_token_stride,
    v_head_stride,
    out_token_stride,
    out_head_stride,
    table_stride,
    k_scale_stride,
    v_scale_stride,
    max_blocks,
    num_blocks,
    num_tokens,
    score_scale,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    VALUE_IS_KEY: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """BLOCK_M rows of one sequence's chunk for one key head."""
    kv_head = tl.program_id(1).to(tl.int64)
    seq = tl.program_id(2).to(tl.int64)
    query_start = tl.load(start_ptr + seq).to(tl.int64)
    query_len = tl.load(start_ptr + seq + 1).to(tl.int32) - query_start.to(tl.int32)
    # The last tiles of a chunk have the most keys: started first, they do not end last.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first_row < query_len * GROUP:
        context_len = tl.load(length_ptr + seq).to(tl.int32)
        row = first_row + tl.arange(0, BLOCK_M)
        past_len = context_len - query_len
        positions = past_len + row // GROUP
        token = query_start + row // GROUP
        row_valid = (row < query_len * GROUP) & (token >= 0) & (token < num_tokens)
        head = kv_head * GROUP + row % GROUP
        first_position = past_len + first_row // GROUP
        last_row = tl.minimum(first_row + BLOCK_M, query_len * GROUP) - 1
        last = past_len + last_row // GROUP + 1
        lowest = 0
        full = tl.maximum(first_position + 1, 0) // BLOCK_N * BLOCK_N
        if WINDOW > 0:
            lowest = tl.maximum(first_position - WINDOW + 1, 0)
            full = lowest // BLOCK_N * BLOCK_N
        score_scale = scaled_for(kv_head, score_scale, k_scale_ptr, k_scale_stride)
        q_main, q_rest = load_queries(
            q_ptr, token * q_token_stride + head * q_head_stride, row_valid, K_DIM, K_MAIN, K_REST
        )
        acc, row_sum, row_max = fresh_state(BLOCK_M, V_PAD)
        k_ptr += kv_head * k_head_stride
        v_ptr += kv_head * v_head_stride
        table_ptr += seq * table_stride
        if WINDOW == 0:
            acc, row_sum, row_max = attend_keys(
                acc, row_sum, row_max, q_main, q_rest, positions, k_ptr, v_ptr, table_ptr, 0, full, 0, context_len,
                max_blocks, num_blocks, k_block_stride, k_token_stride, v_block_stride, v_token_stride, score_scale,
                BLOCK_SIZE, WINDOW, False, K_DIM, K_MAIN, K_REST, V_DIM, V_PAD, VALUE_IS_KEY, FP8, BLOCK_N, NUM_STAGES,
            )  # fmt: skip
        acc, row_sum, row_max = attend_keys(
            acc, row_sum, row_max, q_main, q_rest, positions, k_ptr, v_ptr, table_ptr, full, last, lowest, context_len,
            max_blocks, num_blocks, k_block_stride, k_token_stride, v_block_stride, v_token_stride, score_scale,
            BLOCK_SIZE, WINDOW, True, K_DIM, K_MAIN, K_REST, V_DIM, V_PAD, VALUE_IS_KEY, FP8, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
        result = scaled_for(kv_head, acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None], v_scale_ptr, v_scale_stride)
        dims = tl.arange(0, V_PAD)
        places = token * out_token_stride + head * out_head_stride
        valid = row_valid[:, None] & (dims < V_DIM)[None, :]
        tl.store(out_ptr + places[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=valid)


def launch_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    max_query_len: int,
    scale: float,
    window: int | None,
    out: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Launches prefill on the current stream. The arguments are those of `paged_prefill`, already checked."""
    num_kv_heads, num_seqs = k_cache.shape[2], context_lens.shape[0]
    group = q.shape[1] // num_kv_heads
    tile = prefill_tile(q.dtype, q.shape[2])
    prefill_kernel[(-(-max_query_len * group // tile.block_m), num_kv_heads, num_seqs)](
        q, as_loaded(k_cache), as_loaded(v_cache), out, block_tables, context_lens, query_starts, k_scale, v_scale,
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:2], block_tables.stride(0),
        scale_stride(k_scale), scale_stride(v_scale), block_tables.shape[1], k_cache.shape[0], q.shape[0], scale * LOG2_E,
        GROUP=group,
        BLOCK_SIZE=k_cache.shape[1],
        WINDOW=window or 0,
        **head_constants(q.shape[2], v_cache.shape[3], is_prefix=is_prefix(k_cache, v_cache)),
        FP8=fp8_mode(k_cache),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )  # fmt: skip


def prefill_tile(dtype: torch.dtype, k_dim: int) -> Tile:
    """As many rows as the registers hold queries and outputs for, on every architecture."""
    if dtype == torch.float32:  # products without tensor cores hold their operands in registers
        return Tile(16, 16, 4, 2)
    if k_dim > 128:
        return Tile(64 if k_dim <= 256 else 32, 32, 8, 2)
    if k_dim > 96:
        return Tile(64, 64, 8, 3)
    return Tile(64, 32, 8 if k_dim > 64 else 4, 3)
