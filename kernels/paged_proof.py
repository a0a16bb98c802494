"""Proves the paged attention kernels on the device at hand, against plain torch, before anybody relies on them."""

import torch
from torch import Tensor

from dynamo.kernels import paged_reference
from dynamo.kernels.paged_attention import (
    decode_workspace_elements,
    paged_decode,
    paged_prefill,
    paged_write,
)

__all__ = ["find_paged_fault"]

_NUM_SPLITS = 4
_TOLERANCE = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # tensor cores round float32 to 10 bits


def find_paged_fault(
    device: torch.device, dtype: torch.dtype, *, num_q_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> str | None:
    """Writes a few sequences into a small cache, attends to them, and compares with plain torch on the CPU.

    Synchronises with the device; takes as long as compiling the kernels does.

    Returns:
        What is wrong, as a sentence, or None.

    Example:
        >>> import torch
        >>> from dynamo.kernels.paged_proof import find_paged_fault
        >>> cpu = torch.device("cpu")
        >>> fault = find_paged_fault(
        ...     cpu, torch.float32, num_q_heads=4, num_kv_heads=2, head_dim=16, block_size=8
        ... )
        >>> fault is None
        True
    """
    lengths = [3 * block_size - 1, 1, 2 * block_size]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tables = torch.tensor([[7, 1, 4], [2, 0, 0], [6, 3, 0]], dtype=torch.int32)
    context_lens = torch.tensor(lengths)
    places = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.repeat_interleave(torch.arange(3), context_lens)
    blocks, offsets = tables[rows, places // block_size].long(), places % block_size
    k, v = random(len(places), num_kv_heads, head_dim), random(len(places), num_kv_heads, head_dim)
    # Block strides like those of the cache: K and V of a block side by side.
    pool = torch.full((9, 2, block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    ours, theirs = pool.clone().to(device), pool
    paged_write(k.to(device), v.to(device), ours[:, 0], ours[:, 1], blocks.to(device), offsets.to(device))
    paged_reference.write(k, v, theirs[:, 0], theirs[:, 1], blocks, offsets)
    if not torch.equal(ours.cpu().nan_to_num(), theirs.nan_to_num()):
        return "paged_write stored other keys and values than it was given"
    scale = head_dim**-0.5
    tolerance = _TOLERANCE[dtype]
    on_device = (tables.to(device), context_lens.to(device))
    q = random(3, num_q_heads, head_dim)
    wanted = _attend(q, theirs, tables, context_lens, torch.arange(4), scale)
    for num_splits in (1, _NUM_SPLITS):
        size = decode_workspace_elements(3, num_q_heads, head_dim, num_splits)
        workspace = torch.empty(size, dtype=torch.float32, device=device)
        out = torch.full_like(q, float("nan")).to(device)
        paged_decode(
            q.to(device),
            ours[:, 0],
            ours[:, 1],
            *on_device,
            scale=scale,
            out=out,
            workspace=workspace,
            num_splits=num_splits,
        )
        if not _is_close(out, wanted, tolerance):
            return f"paged_decode with {num_splits} splits differs from plain torch by more than {tolerance}"
    starts = torch.tensor([0, block_size + 1, block_size + 2, 2 * block_size + 2])
    q = random(int(starts[-1]), num_q_heads, head_dim)
    wanted = _attend(q, theirs, tables, context_lens, starts, scale)
    out = torch.full_like(q, float("nan")).to(device)
    paged_prefill(
        q.to(device),
        ours[:, 0],
        ours[:, 1],
        *on_device,
        starts.to(device),
        max_query_len=block_size + 1,
        scale=scale,
        out=out,
    )
    if not _is_close(out, wanted, tolerance):
        return f"paged_prefill differs from plain torch by more than {tolerance}"
    return None


def _attend(q: Tensor, pool: Tensor, tables: Tensor, context_lens: Tensor, starts: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(q)
    return paged_reference.attend(q, pool[:, 0], pool[:, 1], tables, context_lens, starts, scale, None, out, None, None)


def _is_close(out: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return torch.allclose(out.cpu().float(), wanted.float(), rtol=tolerance, atol=tolerance)
