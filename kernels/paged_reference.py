"""Paged attention in plain torch: what the kernels are compared with, and what runs where there is no CUDA.

One gather and one `scaled_dot_product_attention` per sequence, in float32 whatever the inputs are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamo.kernels.checks import KernelArgumentError

__all__ = ["attend", "write"]


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """`paged_prefill` in torch; decode is the case of one query per sequence. Returns `out`.

    Raises:
        KernelArgumentError: a table names a block outside the cache, or is shorter than its context, or a chunk is longer
            than its context.
    """
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    starts, lengths = query_starts.tolist(), context_lens.tolist()
    for i, (start, stop, context_len) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        if start == stop:
            continue
        if context_len == 0:
            out[start:stop] = 0
            continue
        lowest = 0 if window is None else max(0, context_len - (stop - start) - window + 1)
        first_block = lowest // block_size
        table = block_tables[i, first_block : -(-context_len // block_size)].long()
        places = (lowest - first_block * block_size, context_len - first_block * block_size)
        _check_sequence(i, stop - start, context_len, table, num_blocks, places[1] - table.numel() * block_size)
        keys = _gather(k_cache, table, places, k_scale)
        values = _gather(v_cache, table, places, v_scale)
        queries = q[start:stop].float().reshape(stop - start, num_kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)
        shape = (*queries.shape[:2], -1, -1)
        attended = F.scaled_dot_product_attention(
            queries,
            keys.unsqueeze(1).expand(shape),
            values.unsqueeze(1).expand(shape),
            attn_mask=_mask(stop - start, lowest, context_len, window, q.device),
            scale=scale,
        )
        out[start:stop] = attended.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
    return out


def write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_blocks: Tensor, slot_offsets: Tensor) -> None:
    """`paged_write` in torch."""
    stored = (slot_blocks >= 0) & (slot_blocks < k_cache.shape[0])
    stored &= (slot_offsets >= 0) & (slot_offsets < k_cache.shape[1])
    blocks, offsets = slot_blocks[stored].long(), slot_offsets[stored].long()
    k_cache[blocks, offsets] = k[stored]
    v_cache[blocks, offsets] = v[stored]


def _check_sequence(
    i: int, query_len: int, context_len: int, table: Tensor, num_blocks: int, num_missing_tokens: int
) -> None:
    if query_len > context_len:
        raise KernelArgumentError(f"sequence {i} has {query_len} queries but a context of {context_len} tokens")
    if num_missing_tokens > 0:
        raise KernelArgumentError(f"the table of sequence {i} has too few blocks for {context_len} tokens")
    low, high = int(table.min()), int(table.max())
    if low < 0 or high >= num_blocks:
        raise KernelArgumentError(
            f"the table of sequence {i} names block {low if low < 0 else high}, outside [0, {num_blocks})"
        )


def _gather(cache: Tensor, table: Tensor, places: tuple[int, int], factors: Tensor | None) -> Tensor:
    """float32 [num_kv_heads, num_tokens, head_dim] of the tokens [places) of the table's blocks."""
    rows = cache[table].flatten(0, 1)[slice(*places)].float()
    if factors is not None:
        rows = rows * factors[:, None]
    return rows.transpose(0, 1)


def _mask(query_len: int, lowest: int, context_len: int, window: int | None, device: torch.device) -> Tensor:
    """True where the query may look, bool [query_len, context_len - lowest]."""
    positions = torch.arange(context_len - query_len, context_len, device=device)[:, None]
    keys = torch.arange(lowest, context_len, device=device)
    visible = keys <= positions
    return visible if window is None else visible & (keys > positions - window)
