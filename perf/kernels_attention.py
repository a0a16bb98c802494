"""Kernel benchmark, attention over paged KV: bytes of KV read per second, beside gathering and torch's SDPA."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamo.kernels.paged_attention import (
    choose_num_splits,
    decode_workspace_elements,
    paged_decode,
    paged_prefill,
)
from dynamo.perf.kernels_measure import choose_timer, paired, speed_results
from dynamo.perf.kernels_workload import Findings, Workload

__all__ = ["attention"]

_Q_HEADS, _KV_HEADS, _DIM, _BLOCK = 32, 8, 128, 16
_DECODES = ((1, 2048), (1, 32768), (16, 4096), (64, 2048))
_PREFILLS = ((2048, 2048), (512, 8192))


@dataclass(frozen=True, slots=True)
class _Paged:
    """Sequences of equal length over a shuffled pool."""

    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    context_len: int
    num_bytes: int

    @classmethod
    def make(cls, num_seqs: int, context_len: int, device: torch.device) -> "_Paged":
        per_seq = -(-context_len // _BLOCK)
        count = num_seqs * per_seq
        # Keys and values of all blocks in one pool, as the cache lays them out: strided views.
        pool = torch.randn(count, 2, _BLOCK, _KV_HEADS, _DIM, device=device, dtype=torch.bfloat16)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).to(device)
        return cls(
            k_cache=pool[:, 0],
            v_cache=pool[:, 1],
            block_tables=order.view(num_seqs, per_seq).to(torch.int32),
            context_lens=torch.full((num_seqs,), context_len, dtype=torch.int32, device=device),
            context_len=context_len,
            num_bytes=2 * num_seqs * context_len * _KV_HEADS * _DIM * 2,
        )

    def gathered(self) -> tuple[Tensor, Tensor]:
        """[num_seqs, heads, tokens, dim] copies, as engines without a paged kernel make them."""
        num_seqs = self.block_tables.shape[0]
        k, v = (
            cache[self.block_tables.flatten()]
            .view(num_seqs, -1, _KV_HEADS, _DIM)[:, : self.context_len]
            .transpose(1, 2)
            for cache in (self.k_cache, self.v_cache)
        )
        return k, v


def attention(workload: Workload) -> Findings:
    """Decode and chunked prefill in the shape of Llama 3 8B: 32 query heads, 8 key heads, head_dim 128, bfloat16."""
    device = torch.device(workload.device)
    for num_seqs, context_len in _DECODES:
        yield from _decode(num_seqs, context_len, device, workload.repeats)
    for query_len, context_len in _PREFILLS:
        yield from _prefill(query_len, context_len, device, workload.repeats)
    yield "attention: payload is the KV of the contexts; the ceiling moves as many bytes, half of them reads, by a device copy"


def _decode(num_seqs: int, context_len: int, device: torch.device, repeats: int) -> Findings:
    paged = _Paged.make(num_seqs, context_len, device)
    q = torch.randn(num_seqs, _Q_HEADS, _DIM, device=device, dtype=torch.bfloat16)
    out, scale = torch.empty_like(q), _DIM**-0.5
    splits = choose_num_splits(num_seqs, _KV_HEADS, context_len, num_processors=_processors(device))
    elements = decode_workspace_elements(num_seqs, _Q_HEADS, _DIM, splits)
    workspace = torch.empty(max(1, elements), device=device)

    def ours() -> None:
        paged_decode(
            q, paged.k_cache, paged.v_cache, paged.block_tables, paged.context_lens,
            scale=scale, out=out, workspace=workspace, num_splits=splits,
        )  # fmt: skip

    def gather_and_sdpa() -> None:
        k, v = paged.gathered()
        F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    case = f"decode, {num_seqs} x {context_len:,} tokens"
    yield from _both(case, paged, (("dynamo-kv paged_decode", ours), ("torch gather + SDPA", gather_and_sdpa)), repeats)


def _prefill(query_len: int, context_len: int, device: torch.device, repeats: int) -> Findings:
    paged = _Paged.make(1, context_len, device)
    q = torch.randn(query_len, _Q_HEADS, _DIM, device=device, dtype=torch.bfloat16)
    out, scale = torch.empty_like(q), _DIM**-0.5
    starts = torch.tensor([0, query_len], dtype=torch.int32, device=device)
    mask = torch.ones(query_len, context_len, dtype=torch.bool, device=device).tril(context_len - query_len)

    def ours() -> None:
        paged_prefill(
            q, paged.k_cache, paged.v_cache, paged.block_tables, paged.context_lens, starts,
            max_query_len=query_len, scale=scale, out=out,
        )  # fmt: skip

    def gather_and_sdpa() -> None:
        k, v = paged.gathered()
        queries = q.transpose(0, 1)[None]
        if query_len == context_len:
            F.scaled_dot_product_attention(queries, k, v, is_causal=True, enable_gqa=True)
        else:
            F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=True)

    case = f"prefill, {query_len:,} of {context_len:,} tokens"
    yield from _both(
        case, paged, (("dynamo-kv paged_prefill", ours), ("torch gather + SDPA", gather_and_sdpa)), repeats
    )


def _both(case: str, paged: _Paged, ways: Sequence[tuple[str, Callable[[], object]]], repeats: int) -> Findings:
    device = paged.k_cache.device
    timer = choose_timer(device)
    source, target = (torch.ones(paged.num_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
    for name, action in ways:
        speed = paired(timer, action, lambda: target.copy_(source), paged.num_bytes, repeats)
        yield from speed_results(case, name, speed, repeats)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
