"""Stores new keys and values in their slots of a paged cache, in Triton.

Bytes moved: the new keys and values, read once and written once.
Grid: (num_tokens, head tiles); a program stores up to TILE_ELEMENTS of a token's keys and as many values. A token whose
block is outside the cache is skipped, which is what the padding of a captured batch needs.

One launch for both planes follows the reshape-and-cache step of PagedAttention (https://arxiv.org/abs/2309.06180).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_write", "write_kernel", "write_tile"]

TILE_ELEMENTS = 2048


@triton.jit
def write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_ptr,
    offset_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    k_cache_block_stride,
    k_cache_token_stride,
    k_cache_head_stride,
    v_cache_block_stride,
    v_cache_token_stride,
    v_cache_head_stride,
    num_blocks,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_H heads of one token, keys and values."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ptr + token).to(tl.int64)
    offset = tl.load(offset_ptr + token).to(tl.int64)
    if (block >= 0) & (block < num_blocks) & (offset >= 0) & (offset < BLOCK_SIZE):
        head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
        dims = tl.arange(0, BLOCK_D)
        k_valid = (head < NUM_HEADS)[:, None] & (dims < K_DIM)[None, :]
        v_valid = (head < NUM_HEADS)[:, None] & (dims < V_DIM)[None, :]
        k_from = token * k_token_stride + head * k_head_stride
        v_from = token * v_token_stride + head * v_head_stride
        k_to = block * k_cache_block_stride + offset * k_cache_token_stride + head * k_cache_head_stride
        v_to = block * v_cache_block_stride + offset * v_cache_token_stride + head * v_cache_head_stride
        keys = tl.load(k_ptr + k_from[:, None] + dims[None, :], mask=k_valid)
        values = tl.load(v_ptr + v_from[:, None] + dims[None, :], mask=v_valid)
        tl.store(k_cache_ptr + k_to[:, None] + dims[None, :], keys, mask=k_valid)
        tl.store(v_cache_ptr + v_to[:, None] + dims[None, :], values, mask=v_valid)


def launch_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_blocks: Tensor, slot_offsets: Tensor
) -> None:
    """Launches the write on the current stream. The arguments are those of `paged_write`, already checked."""
    num_tokens, num_heads, k_dim = k.shape
    v_dim = v.shape[2]
    block_h, block_d, num_warps = write_tile(num_heads, max(k_dim, v_dim), k.itemsize)
    write_kernel[(num_tokens, -(-num_heads // block_h))](
        k, v, k_cache, v_cache, slot_blocks, slot_offsets,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], k_cache.shape[0],
        NUM_HEADS=num_heads,
        BLOCK_SIZE=k_cache.shape[1],
        K_DIM=k_dim,
        V_DIM=v_dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip


def write_tile(num_heads: int, head_dim: int, itemsize: int) -> tuple[int, int, int]:
    """BLOCK_H, BLOCK_D, and warps, few enough that each thread has 16 bytes to move."""
    block_d = triton.next_power_of_2(head_dim)
    block_h = min(triton.next_power_of_2(num_heads), max(1, TILE_ELEMENTS // block_d))
    return block_h, block_d, max(1, min(4, block_h * block_d * itemsize // 512))
