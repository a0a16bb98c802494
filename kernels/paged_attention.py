"""Attention over a paged cache for serving: decode, chunked prefill, and the write of new keys and values.

Caches are NHD views [num_blocks, block_size, num_kv_heads, head_dim] with any stride but the last, so a layer of a pool
whose blocks hold all layers works as it is. Query heads may outnumber key heads (grouped queries), keys and values may
differ in head_dim, and values may be a prefix of the keys' latent (multi-head latent attention): then a key tile is read
once and used twice. On CUDA these are Triton kernels, everywhere else the reference in torch.

Nothing here allocates, synchronises, or looks at an environment variable. Block tables and lengths stay on the device;
what the host cannot check, the kernels do: a block number outside the cache, or a context longer than its table, reads
nothing and gives NaN.
"""

import math

import torch
from torch import Tensor

from dynamo.kernels import paged_reference
from dynamo.kernels.checks import KernelArgumentError

__all__ = ["choose_num_splits", "decode_workspace_elements", "paged_decode", "paged_prefill", "paged_write"]

MAX_SPLITS = 64
"""Bounds what the combining kernel holds in registers."""

MIN_SPLIT_KEYS = 256
"""A split shorter than this costs more in combining than it gains in parallelism."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    out: Tensor,
    window: int | None = None,
    workspace: Tensor | None = None,
    num_splits: int = 1,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence over the sequence's cached tokens.

    Sums are kept in float32. A sequence of length 0 (padding of a captured batch) reads nothing and gives zeros.

    Args:
        q: float32, float16 or bfloat16 [num_seqs, num_q_heads, k_dim]; the query of the last token of each sequence.
        k_cache: [num_blocks, block_size, num_kv_heads, k_dim] of q's dtype or float8_e4m3fn; any strides, the last 1.
        v_cache: [num_blocks, block_size, num_kv_heads, v_dim], like k_cache; may be a prefix of it (`k_cache[..., :v_dim]`).
        block_tables: int32 or int64 [num_seqs, max_blocks]; entries past a sequence's length or before its window are never
            followed.
        context_lens: int32 or int64 [num_seqs], tokens in the cache, the query's own included.
        scale: factor of the scores before the softmax.
        out: [num_seqs, num_q_heads, v_dim] of q's dtype, written.
        window: a query sees this many tokens up to and including its own; None: all.
        workspace: float32, contiguous, at least `decode_workspace_elements(...)`; needed when num_splits > 1.
        num_splits: pieces a context is cut into, attended in parallel and combined; see `choose_num_splits`.
        k_scale: float32 [1] or [num_kv_heads], what stored float8 keys are multiplied by; None: 1.
        v_scale: the same for values.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: shapes, dtypes, strides or devices do not fit. On the CPU also a block number out of range.

    >>> import torch
    >>> k_cache, v_cache = torch.randn(2, 8, 16, 2, 64)             # 8 blocks of 16 tokens, 2 key heads
    >>> block_tables = torch.tensor([[5, 0], [3, 7]])
    >>> context_lens = torch.tensor([20, 3], dtype=torch.int32)
    >>> q = torch.randn(2, 8, 64)                                   # 2 sequences, 8 query heads
    >>> out = paged_decode(q, k_cache, v_cache, block_tables, context_lens, scale=64**-0.5, out=torch.empty_like(q))
    >>> keys, values = k_cache[3, :3, 0], v_cache[3, :3, 0]         # the second sequence, the first key head
    >>> expected = (q[1, :4] @ keys.T * 64**-0.5).softmax(-1) @ values
    >>> torch.allclose(out[1, :4], expected, atol=1e-5)
    True
    """
    _check_caches(q, k_cache, v_cache, k_scale, v_scale)
    _check_sequences(q, block_tables, context_lens, scale, window)
    _check_out(q, v_cache, out)
    if context_lens.shape[0] != q.shape[0]:
        raise KernelArgumentError(
            f"q has {q.shape[0]} queries for {context_lens.shape[0]} sequences; decode takes one each"
        )
    needed = decode_workspace_elements(q.shape[0], q.shape[1], v_cache.shape[3], num_splits)
    if needed and (workspace is None or workspace.dtype != torch.float32 or not workspace.is_contiguous()):
        raise KernelArgumentError(f"num_splits={num_splits} needs a contiguous float32 workspace of {needed} elements")
    if workspace is not None and (workspace.numel() < needed or workspace.device != q.device):
        raise KernelArgumentError(
            f"workspace has {workspace.numel()} elements on {workspace.device}; {needed} are needed on {q.device}"
        )
    if q.shape[0] == 0:
        return out
    if q.device.type == "cuda":
        from dynamo.kernels import paged_attention_kernel

        with torch.cuda.device(q.device):
            paged_attention_kernel.launch_decode(
                q,
                k_cache,
                v_cache,
                block_tables,
                context_lens,
                scale,
                window,
                out,
                workspace,
                num_splits,
                k_scale,
                v_scale,
            )
        return out
    query_starts = torch.arange(q.shape[0] + 1)
    return paged_reference.attend(
        q, k_cache, v_cache, block_tables, context_lens, query_starts, scale, window, out, k_scale, v_scale
    )


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    *,
    max_query_len: int,
    scale: float,
    out: Tensor,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of chunks of queries over cached tokens, the chunk's own included.

    Sequence i has queries [query_starts[i], query_starts[i + 1]) of `q`, at positions [context_lens[i] - how many,
    context_lens[i]) of the sequence; a query sees the tokens up to its own position. Arguments not named here are those of
    `paged_decode`.

    Args:
        q: [num_tokens, num_q_heads, k_dim], the chunks one after the other.
        query_starts: int32 or int64 [num_seqs + 1], rising, from 0 to num_tokens.
        max_query_len: at least the longest chunk; known on the host, so that the launch needs no synchronisation.
        out: [num_tokens, num_q_heads, v_dim] of q's dtype, written.

    Returns:
        `out`.

    Raises:
        KernelArgumentError: shapes, dtypes, strides or devices do not fit. On the CPU also a block number out of range,
            and query_starts that do not rise from 0 to num_tokens in steps of up to max_query_len.

    >>> import torch
    >>> k_cache, v_cache = torch.randn(2, 4, 16, 1, 64)
    >>> block_tables = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    >>> context_lens = torch.tensor([5, 20])                        # 5 new tokens; 2 new ones after 18
    >>> query_starts = torch.tensor([0, 5, 7])
    >>> q = torch.randn(7, 4, 64)
    >>> out = paged_prefill(q, k_cache, v_cache, block_tables, context_lens, query_starts, max_query_len=5,
    ...                     scale=64**-0.5, out=torch.empty_like(q))
    >>> torch.allclose(out[0], v_cache[2, 0].expand(4, 64))         # the first token sees only itself
    True
    """
    _check_caches(q, k_cache, v_cache, k_scale, v_scale)
    _check_sequences(q, block_tables, context_lens, scale, window)
    _check_out(q, v_cache, out)
    _check_index(query_starts, "query_starts", (context_lens.shape[0] + 1,), q.device)
    if max_query_len < 1:
        raise KernelArgumentError(f"max_query_len must be at least 1, not {max_query_len}")
    if q.shape[0] == 0:
        return out
    if q.device.type == "cuda":
        from dynamo.kernels import paged_prefill_kernel

        with torch.cuda.device(q.device):
            paged_prefill_kernel.launch_prefill(
                q, k_cache, v_cache, block_tables, context_lens, query_starts, max_query_len, scale, window, out,
                k_scale, v_scale,
            )  # fmt: skip
        return out
    _check_chunks(query_starts, q.shape[0], max_query_len)
    return paged_reference.attend(
        q, k_cache, v_cache, block_tables, context_lens, query_starts, scale, window, out, k_scale, v_scale
    )


def paged_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_blocks: Tensor, slot_offsets: Tensor
) -> None:
    """Stores new keys and values in their slots of the cache.

    Args:
        k: [num_tokens, num_kv_heads, k_dim] of k_cache's dtype, last stride 1.
        v: [num_tokens, num_kv_heads, v_dim], likewise.
        k_cache: [num_blocks, block_size, num_kv_heads, k_dim], written.
        v_cache: [num_blocks, block_size, num_kv_heads, v_dim], written.
        slot_blocks: int32 or int64 [num_tokens], the block of each token; a token whose block is not in
            [0, num_blocks) is not stored (padding of a captured batch has -1). Slots must be distinct.
        slot_offsets: the same, the token's place in its block; a token whose place is not in [0, block_size) is not stored.

    Raises:
        KernelArgumentError: shapes, dtypes, strides or devices do not fit; nothing was written.

    >>> import torch
    >>> k_cache, v_cache = torch.zeros(2, 4, 16, 1, 8)
    >>> k, v = torch.ones(2, 3, 1, 8)
    >>> paged_write(k, v, k_cache, v_cache, torch.tensor([2, 2, -1]), torch.tensor([14, 15, 0]))
    >>> k_cache[2, 14:].sum().item(), k_cache.sum().item()
    (16.0, 16.0)
    """
    num_tokens = k.shape[0] if k.ndim else 0
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if cache.ndim != 4 or tuple(new.shape) != (num_tokens, *cache.shape[2:]) or new.dtype != cache.dtype:
            raise KernelArgumentError(
                f"{name} is {_describe(new)} and {name}_cache {_describe(cache)}; they must agree in dtype, heads and "
                "head_dim, over [num_tokens] and [num_blocks, block_size]"
            )
        if new.stride(2) != 1 or cache.stride(3) != 1 or _repeats(cache):
            raise KernelArgumentError(
                f"the last stride of {name} and {name}_cache must be 1, and no other of the cache 0"
            )
        if cache.device != k.device or new.device != k.device:
            raise KernelArgumentError(f"{name} and {name}_cache must be on {k.device}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise KernelArgumentError(
            f"k_cache {_describe(k_cache)} and v_cache {_describe(v_cache)} differ in blocks or heads"
        )
    _check_index(slot_blocks, "slot_blocks", (num_tokens,), k.device)
    _check_index(slot_offsets, "slot_offsets", (num_tokens,), k.device)
    if num_tokens == 0:
        return
    if k.device.type == "cuda":
        from dynamo.kernels import paged_write_kernel

        with torch.cuda.device(k.device):
            paged_write_kernel.launch_write(k, v, k_cache, v_cache, slot_blocks, slot_offsets)
        return
    paged_reference.write(k, v, k_cache, v_cache, slot_blocks, slot_offsets)


def decode_workspace_elements(num_seqs: int, num_q_heads: int, v_dim: int, num_splits: int) -> int:
    """Float32 elements that `paged_decode` needs: an output and its weight per sequence, head and split; 0 for one split.

    Raises:
        KernelArgumentError: num_splits is not in [1, MAX_SPLITS].

    >>> decode_workspace_elements(num_seqs=4, num_q_heads=32, v_dim=128, num_splits=8)
    132096
    """
    if not 1 <= num_splits <= MAX_SPLITS:
        raise KernelArgumentError(f"num_splits is {num_splits}, outside [1, {MAX_SPLITS}]")
    return num_seqs * num_q_heads * num_splits * (v_dim + 1) if num_splits > 1 else 0


def choose_num_splits(num_seqs: int, num_kv_heads: int, max_context_len: int, *, num_processors: int) -> int:
    """Splits that keep every processor at work twice over, but no shorter than MIN_SPLIT_KEYS at full length.

    It depends on no actual length: a captured batch keeps it, and splits that find nothing to do end at once.

    Args:
        max_context_len: the longest context there can be.
        num_processors: streaming multiprocessors of the device.

    >>> choose_num_splits(1, 8, 131072, num_processors=132)
    33
    >>> choose_num_splits(64, 8, 131072, num_processors=132)
    1
    """
    wanted = 2 * num_processors // max(1, num_seqs * num_kv_heads)
    return max(1, min(wanted, max_context_len // MIN_SPLIT_KEYS, MAX_SPLITS))


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    if q.ndim != 3 or q.dtype not in _FLOATS or q.stride(2) != 1:
        raise KernelArgumentError(
            f"q must be a float [n, num_q_heads, k_dim] tensor of last stride 1, got {_describe(q)}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.ndim != 4 or cache.stride(3) != 1 or cache.device != q.device:
            raise KernelArgumentError(
                f"{name} must be [num_blocks, block_size, num_kv_heads, head_dim] of last stride 1 on {q.device}, got "
                f"{_describe(cache)} on {cache.device}"
            )
        if cache.dtype not in (q.dtype, torch.float8_e4m3fn) or cache.dtype != k_cache.dtype:
            raise KernelArgumentError(f"{name} is {cache.dtype}; caches must both be {q.dtype} as q, or float8_e4m3fn")
    if k_cache.shape[:3] != v_cache.shape[:3] or q.shape[2] != k_cache.shape[3] or 0 in k_cache.shape:
        raise KernelArgumentError(
            f"q {_describe(q)}, k_cache {_describe(k_cache)}, v_cache {_describe(v_cache)} do not fit"
        )
    num_kv_heads = k_cache.shape[2]
    if q.shape[1] == 0 or q.shape[1] % num_kv_heads:
        raise KernelArgumentError(f"{q.shape[1]} query heads cannot share {num_kv_heads} key heads evenly")
    for name, factors in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factors is None:
            continue
        if k_cache.dtype != torch.float8_e4m3fn:
            raise KernelArgumentError(f"{name} is for float8_e4m3fn caches; these are {k_cache.dtype}")
        if factors.dtype != torch.float32 or factors.shape not in ((1,), (num_kv_heads,)) or factors.device != q.device:
            raise KernelArgumentError(
                f"{name} must be float32 [1] or [{num_kv_heads}] on {q.device}, got {_describe(factors)}"
            )


def _check_sequences(q: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float, window: int | None) -> None:
    num_seqs = context_lens.shape[0] if context_lens.ndim == 1 else -1
    _check_index(context_lens, "context_lens", (num_seqs,), q.device)
    _check_index(block_tables, "block_tables", (num_seqs, block_tables.shape[-1]), q.device)
    if not 0 < scale < math.inf:
        raise KernelArgumentError(f"scale must be positive and finite, not {scale}")
    if window is not None and window < 1:
        raise KernelArgumentError(f"window must be at least 1 token, not {window}; None means no window")


def _check_chunks(query_starts: Tensor, num_tokens: int, max_query_len: int) -> None:
    """What takes the values of `query_starts`, so on the CPU only."""
    lengths = query_starts.diff()
    if int(query_starts[0]) != 0 or (lengths < 0).any() or int(query_starts[-1]) != num_tokens:
        raise KernelArgumentError(f"query_starts must rise from 0 to {num_tokens}, got {query_starts.tolist()}")
    if (lengths > max_query_len).any():
        raise KernelArgumentError(f"a chunk has {int(lengths.max())} queries, max_query_len is {max_query_len}")


def _check_index(index: Tensor, name: str, shape: tuple[int, ...], device: torch.device) -> None:
    """Index tensors are int32 or int64, of the shape, on the device, and dense in their last dimension."""
    is_dense = index.ndim == len(shape) and (index.shape[-1] <= 1 or index.stride(-1) == 1)
    if (
        index.dtype not in (torch.int32, torch.int64)
        or tuple(index.shape) != shape
        or not is_dense
        or index.device != device
    ):
        raise KernelArgumentError(
            f"{name} must be int32 or int64 {list(shape)} on {device}, dense in its last dimension, got {_describe(index)} "
            f"on {index.device}"
        )


def _check_out(q: Tensor, v_cache: Tensor, out: Tensor) -> None:
    if tuple(out.shape) != (*q.shape[:2], v_cache.shape[3]) or out.dtype != q.dtype or out.device != q.device:
        raise KernelArgumentError(
            f"out must be {q.dtype} {[*q.shape[:2], v_cache.shape[3]]} on {q.device}, got {_describe(out)} on {out.device}"
        )
    if out.stride(2) != 1 or _repeats(out):
        raise KernelArgumentError(f"the last stride of out must be 1 and no other 0, got {list(out.stride())}")


def _repeats(tensor: Tensor) -> bool:
    """Whether some of its elements are the same memory, as in expanded tensors."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
