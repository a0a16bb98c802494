"""Paged decode attention in Triton: one query per sequence, contexts split over programs and combined.

Bytes moved: every key and value of the contexts once, plus num_splits partial outputs in float32 written and read back.
    Query heads that share a key head lie in one program, so a key is read once for all of them (up to BLOCK_M; more
    programs read it again through L2). A value that is a prefix of the key (multi-head latent attention) is not read.
Grid: (row tiles x num_splits, num_kv_heads, num_seqs), then (num_seqs, num_q_heads, v tiles) to combine.

    rows      the query heads of one key head, padded to BLOCK_M
    keys      tiles of BLOCK_N tokens, from whichever blocks the table names; loads are pipelined over the table
    k_dim     K_MAIN, the largest power of two in it, and K_REST for what is left: 80, 96 and 576 waste no lanes

Online softmax over paged keys is PagedAttention's (https://arxiv.org/abs/2309.06180) and FlashAttention-2's
(https://arxiv.org/abs/2307.08691); splitting the context is Flash-Decoding's
(https://pytorch.org/blog/flash-decoding/); packing the heads of a group into the rows of a matrix product is FlashInfer's
(https://arxiv.org/abs/2501.01005).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamo.kernels.paged_keys_kernel import attend_keys, fresh_state, load_queries, scaled_for

__all__ = [
    "COMBINE_DIM",
    "LOG2_E",
    "SPLITS_PADS",
    "Tile",
    "as_loaded",
    "combine_kernel",
    "decode_kernel",
    "decode_tile",
    "fp8_mode",
    "head_constants",
    "is_prefix",
    "launch_decode",
    "scale_stride",
]

LOG2_E = math.log2(math.e)
COMBINE_DIM = 128
"""Value elements that one program combines."""

SPLITS_PADS = (8, 64)
"""Few, so that a new number of splits is not another compilation; the last is the most there can be."""


@triton.jit(do_not_specialize=["num_splits"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    weight_ptr,
    table_ptr,
    length_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_seq_stride,
    q_head_stride,
    k_block_stride,
    k_token_stride,
    k_head_stride,
    v_block_stride,
    v_token_stride,
    v_head_stride,
    out_seq_stride,
    out_head_stride,
    table_stride,
    k_scale_stride,
    v_scale_stride,
    max_blocks,
    num_blocks,
    score_scale,
    num_splits,
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
    """One split of one sequence's context for BLOCK_M query heads of one key head; without partial_ptr the only one."""
    split = tl.program_id(0) % num_splits
    kv_head = tl.program_id(1).to(tl.int64)
    seq = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) // num_splits * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = row < GROUP
    head = kv_head * GROUP + row
    context_len = tl.load(length_ptr + seq).to(tl.int32)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(context_len - WINDOW, 0)
    first_tile = first_key // BLOCK_N
    num_tiles = tl.cdiv(context_len, BLOCK_N) - first_tile
    split_tiles = tl.cdiv(num_tiles, num_splits)
    first = (first_tile + split * split_tiles) * BLOCK_N
    last = tl.minimum(first + split_tiles * BLOCK_N, context_len)
    score_scale = scaled_for(kv_head, score_scale, k_scale_ptr, k_scale_stride)
    q_main, q_rest = load_queries(q_ptr + seq * q_seq_stride, head * q_head_stride, row_valid, K_DIM, K_MAIN, K_REST)
    acc, row_sum, row_max = fresh_state(BLOCK_M, V_PAD)
    positions = tl.zeros([BLOCK_M], tl.int32) + context_len - 1
    acc, row_sum, row_max = attend_keys(
        acc, row_sum, row_max, q_main, q_rest, positions, k_ptr + kv_head * k_head_stride,
        v_ptr + kv_head * v_head_stride, table_ptr + seq * table_stride, first, last, first_key, context_len,
        max_blocks, num_blocks, k_block_stride, k_token_stride, v_block_stride, v_token_stride, score_scale,
        BLOCK_SIZE, WINDOW, True, K_DIM, K_MAIN, K_REST, V_DIM, V_PAD, VALUE_IS_KEY, FP8, BLOCK_N, NUM_STAGES,
    )  # fmt: skip
    result = scaled_for(kv_head, acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None], v_scale_ptr, v_scale_stride)
    dims = tl.arange(0, V_PAD)
    valid = row_valid[:, None] & (dims < V_DIM)[None, :]
    if partial_ptr is None:
        places = seq * out_seq_stride + head * out_head_stride
        tl.store(out_ptr + places[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=valid)
    else:
        slot = (seq * tl.num_programs(1) * GROUP + head) * num_splits + split
        if first < last:  # otherwise the weight below keeps the partial output from being read
            tl.store(partial_ptr + slot[:, None] * V_DIM + dims[None, :], result, mask=valid)
        weight = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)))
        tl.store(weight_ptr + slot, weight, mask=row_valid)


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    partial_ptr,
    weight_ptr,
    out_ptr,
    out_seq_stride,
    out_head_stride,
    num_splits,
    V_DIM: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums the splits of one sequence and query head, each by its share of the softmax's denominator."""
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    splits = tl.arange(0, SPLITS_PAD)
    slots = (seq * tl.num_programs(1) + head) * num_splits + splits
    weights = tl.load(weight_ptr + slots, mask=splits < num_splits, other=float("-inf"))
    top = tl.max(weights, 0)
    shares = tl.exp2(weights - tl.where(top == float("-inf"), 0.0, top))
    used = (weights != float("-inf"))[:, None] & (dims < V_DIM)[None, :]
    partial = tl.load(partial_ptr + slots[:, None] * V_DIM + dims[None, :], mask=used, other=0.0)
    total = tl.sum(shares, 0)
    result = tl.sum(partial * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    place = out_ptr + seq * out_seq_stride + head * out_head_stride
    tl.store(place + dims, result.to(out_ptr.dtype.element_ty), mask=dims < V_DIM)


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape of a program's work and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def launch_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
    workspace: Tensor | None,
    num_splits: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Launches decode on the current stream. The arguments are those of `paged_decode`, already checked."""
    num_seqs, num_q_heads, k_dim = q.shape
    num_kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    group = num_q_heads // num_kv_heads
    tile = decode_tile(k_cache.dtype, k_dim)
    partial = weights = None
    if num_splits > 1 and workspace is not None:
        num_partial = num_seqs * num_q_heads * num_splits * v_dim
        partial, weights = workspace[:num_partial], workspace[num_partial:]
    decode_kernel[(-(-group // tile.block_m) * num_splits, num_kv_heads, num_seqs)](
        q, as_loaded(k_cache), as_loaded(v_cache), out, partial, weights, block_tables, context_lens, k_scale, v_scale,
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:2], block_tables.stride(0),
        scale_stride(k_scale), scale_stride(v_scale), block_tables.shape[1], k_cache.shape[0], scale * LOG2_E,
        num_splits,
        GROUP=group,
        BLOCK_SIZE=k_cache.shape[1],
        WINDOW=window or 0,
        **head_constants(k_dim, v_dim, is_prefix=is_prefix(k_cache, v_cache)),
        FP8=fp8_mode(k_cache),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )  # fmt: skip
    if partial is not None:
        block_d = min(COMBINE_DIM, triton.next_power_of_2(v_dim))
        combine_kernel[(num_seqs, num_q_heads, -(-v_dim // block_d))](
            partial, weights, out, *out.stride()[:2], num_splits,
            V_DIM=v_dim,
            SPLITS_PAD=next(pad for pad in SPLITS_PADS if pad >= num_splits),
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip


def decode_tile(cache_dtype: torch.dtype, k_dim: int) -> Tile:
    """Tiles of up to 16 KiB of keys, two of them and their values on the way: with two programs, 128 KiB a processor.

    The table is one load before the keys, and the pipeline's stages are shared out between the two.
    """
    if cache_dtype == torch.float32:  # products without tensor cores hold their operands in registers
        return Tile(16, 16, 4, 5 if k_dim <= 128 else 2)
    return Tile(16, 64, 4, 5) if k_dim <= 128 else Tile(16, 32, 8, 5)


def head_constants(k_dim: int, v_dim: int, *, is_prefix: bool) -> dict[str, int | bool]:
    """The constants that describe the head dimensions.

    Args:
        is_prefix: whether the values are the first elements of the keys, in the same place.
    """
    k_main = max(16, triton.next_power_of_2(k_dim + 1) // 2)
    k_rest = k_dim - k_main
    return {
        "K_DIM": k_dim,
        "K_MAIN": k_main,
        "K_REST": max(16, triton.next_power_of_2(k_rest)) if k_rest > 0 else 0,
        "V_DIM": v_dim,
        "V_PAD": max(16, triton.next_power_of_2(v_dim)),
        "VALUE_IS_KEY": is_prefix and v_dim == k_main,
    }


def is_prefix(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether values lie where keys begin."""
    return k_cache.data_ptr() == v_cache.data_ptr() and k_cache.stride() == v_cache.stride()


def fp8_mode(cache: Tensor) -> int:
    """How float8 is widened on the cache's device: see `_widen`."""
    if cache.dtype != torch.float8_e4m3fn:
        return 0
    native = cache.device.type == "cuda" and torch.cuda.get_device_capability(cache.device) >= (8, 9)
    return 1 if native else 2


def as_loaded(cache: Tensor) -> Tensor:
    """Float8 is loaded as bytes."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def scale_stride(factors: Tensor | None) -> int:
    """0 repeats a per-tensor scale for every head."""
    return 0 if factors is None or factors.numel() == 1 else factors.stride(0)
