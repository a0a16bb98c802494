"""Gathered attention over cached blocks, on every device."""

import pytest
import torch

from dynamo.serve.engine.attention import plan_attention
from dynamo.serve.engine.batch import ForwardBatch, SequenceSlice

BLOCK_SIZE, HEADS, KV_HEADS, DIM = 16, 4, 2, 64
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_one_step_see_their_own_past(device: str, dtype: torch.dtype) -> None:
    """Contexts whose masks begin at odd places of the one mask that all chunks share."""
    torch.manual_seed(0)
    contexts, num_queries = [64, 61, 35], 8
    keys, values = torch.randn(2, 12, BLOCK_SIZE, KV_HEADS, DIM).to(dtype)
    q = torch.randn(len(contexts) * num_queries, HEADS, DIM).to(dtype)
    tables = torch.randperm(12).split(4)
    slices = tuple(
        SequenceSlice(i * num_queries, num_queries, context, table.to(device))
        for i, (context, table) in enumerate(zip(contexts, tables, strict=True))
    )
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    batch = ForwardBatch(
        token_ids=nothing,
        positions=nothing,
        slot_blocks=nothing,
        slot_offsets=nothing,
        sequences=slices,
        logit_rows=nothing,
    )
    k_cache, v_cache = keys.to(device), values.to(device)
    found = plan_attention(batch, k_cache).attend(q.to(device), nothing, nothing, k_cache, v_cache).cpu().float()
    for i, (context, table) in enumerate(zip(contexts, tables, strict=True)):
        k, v = (cache[table].flatten(0, 1)[:context].double().repeat_interleave(2, 1) for cache in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[i * num_queries : (i + 1) * num_queries].double(), k) * DIM**-0.5
        scores = scores.masked_fill(torch.ones_like(scores).tril(context - num_queries) == 0, -torch.inf)
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1).float()
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(
            found[i * num_queries : (i + 1) * num_queries], expected, atol=tolerance, rtol=tolerance
        )
