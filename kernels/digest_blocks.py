"""One 64-bit digest per block: the same on the CPU and on GPUs, and in every layout, since rows count in logical order.

Bytes moved: each block once; `copy_blocks_digest` copies it in the same pass. What it finds, in a block of the shape and
seed the digest was made for:

    - every change within one word of 8 bytes, so every single flipped bit: certainly (odd keys and bijections)
    - every two flipped bits in one row of up to 2 KiB: certainly (the keys were checked for it)
    - swapped rows, swapped or shifted layers, tokens and heads: unless two sums of mixed 64-bit words happen to agree, one
      in 2**64
    - any other change within a row: unless its sums of products happen to agree, one in 2**(64 - t) where the halves of
      its words, 32 bits each, change from bit t upwards only; so one in 2**33 if nothing but the halves' top bits flip
    - a block that is another block: by the seed, such as the low half of its key

It finds accidents; it is no signature against somebody who chooses the bytes. The disk index keeps such digests over restarts:
the formula cannot change without a new kind of digest there.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dynamo.kernels.checks import KernelArgumentError, SlotIds, check_array, check_ids
from dynamo.kernels.copy_plan import plan_copy
from dynamo.kernels.digest_host import Digests, add_row_sums, block_starts, mix
from dynamo.kernels.kernel_call import Target
from dynamo.kernels.view import View

__all__ = ["copy_blocks_digest", "digest_blocks", "digest_blocks_new"]


def digest_blocks(
    view: View,
    ids: SlotIds,
    out: Tensor,
    *,
    seeds: Digests | None = None,
    sm_budget: int | None = None,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Writes the digest of block `ids[i]` to `out[i]` for every i.

    On a GPU it only submits; on the CPU it blocks until done.

    Args:
        view: the blocks. Views of the same bytes in other layouts give the same digests; a slice is a block of its own.
        ids: int64 [n].
        out: uint64 or int64 [n], contiguous, on the view's device.
        seeds: uint64 [n], one per block; None: 0.
        sm_budget: most programs to run at a time; None for as many as are useful.
        stream: stream to submit to; None for the current one.

    Raises:
        KernelArgumentError: shapes, ids or devices do not fit; nothing was written.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> pool = torch.randn(4, 2, 2, 16, 8, 64).half()  # blocks, layers, K and V, tokens, heads, dim
    >>> nhd, hnd = torch.zeros(2, 3, dtype=torch.uint64)
    >>> digest_blocks(from_paged(pool, "BLPTHD"), np.array([3, 0, 1]), nhd)
    >>> digest_blocks(from_paged(pool.transpose(3, 4).contiguous(), "BLPHTD"), np.array([3, 0, 1]), hnd)
    >>> torch.equal(nhd, hnd)
    True
    """
    check_ids(ids, "ids", view.num_blocks)
    _run(view, ids, None, ids, out, seeds, Target.of(view, sm_budget=sm_budget, stream=stream))


def digest_blocks_new(view: View, ids: SlotIds, seeds: Digests | None = None) -> Tensor:
    """Digests of the blocks as a new uint64 tensor [n] on the view's device; else as `digest_blocks`.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> latents = torch.zeros(2, 64, 576, dtype=torch.bfloat16)
    >>> view = from_paged(latents, "BTD")
    >>> before = digest_blocks_new(view, np.array([0, 1]))
    >>> latents[1, 63, 575] = -0.0  # one bit
    >>> (digest_blocks_new(view, np.array([0, 1])) == before).tolist()
    [True, False]
    """
    check_ids(ids, "ids", view.num_blocks)
    out = torch.empty(ids.size, dtype=torch.uint64, device=view.device)
    digest_blocks(view, ids, out, seeds=seeds)
    return out


def copy_blocks_digest(
    src: View,
    src_ids: SlotIds,
    dst: View,
    dst_ids: SlotIds,
    out: Tensor,
    *,
    seeds: Digests | None = None,
    sm_budget: int | None = None,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Copies `src[src_ids[i]]` to `dst[dst_ids[i]]` and writes the digest of what was read to `out[i]`, in one pass.

    Args:
        src: blocks of any layout.
        src_ids: int64 [n].
        dst: blocks of the same shape, in any layout, on the same device or in pinned memory.
        dst_ids: int64 [n], distinct, and apart from what is read.
        out: uint64 or int64 [n], contiguous, on the GPU if one side is, else on the CPU.
        seeds: uint64 [n], one per block; None: 0.
        sm_budget: most programs to run at a time; None for as many as are useful.
        stream: stream to submit to; None for the current one.

    Raises:
        KernelArgumentError: shapes, ids or devices do not fit; nothing was copied.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged, stored
    >>> pool = torch.randn(4, 2, 2, 16, 8, 64).half()
    >>> slots = torch.zeros(2, 2 * 2 * 16 * 8 * 128, dtype=torch.uint8)
    >>> view = stored(slots, num_layers=2, num_tokens=16, num_heads=8, row_bytes=128, head_groups=4)
    >>> digests, keys = torch.zeros(2, dtype=torch.uint64), np.array([7, 9], dtype=np.uint64)
    >>> copy_blocks_digest(from_paged(pool, "BLPTHD"), np.array([3, 1]), view, np.arange(2), digests, seeds=keys)
    >>> torch.equal(digest_blocks_new(view, np.arange(2), keys), digests)
    True
    """
    found, wanted = dst.block_shape, src.block_shape
    if found != wanted:
        raise KernelArgumentError(f"(layers, planes, tokens, heads, row bytes) are {wanted} in src and {found} in dst")
    plan_copy(src, src_ids, dst, dst_ids)  # for its checks: ids, and that nothing is both read and written
    groups = math.lcm(src.head_groups, dst.head_groups)
    target = Target.of(src, dst, sm_budget=sm_budget, stream=stream)
    _run(src.fold_heads(groups), src_ids, dst.fold_heads(groups), dst_ids, out, seeds, target)


def _run(
    src: View,
    src_ids: SlotIds,
    dst: View | None,
    dst_ids: SlotIds,
    out: Tensor,
    seeds: Digests | None,
    target: Target,
) -> None:
    _check_numbers(out, seeds, src_ids, target.device)
    starts = block_starts(src, seeds, src_ids.size)
    if target.is_gpu:
        from dynamo.kernels.digest_blocks_kernel import build_calls

        add, finish = build_calls(src, src_ids, dst, dst_ids, starts, out)
        with target.active():
            out.view(torch.int64).zero_()
        add.launch(target)
        finish.launch(target)
        return
    add_row_sums(src, src_ids, dst, dst_ids, starts)
    out.view(torch.int64).numpy()[:] = mix(starts).view(np.int64)


def _check_numbers(out: Tensor, seeds: Digests | None, ids: SlotIds, device: torch.device) -> None:
    if out.dtype not in (torch.uint64, torch.int64) or out.shape != ids.shape or not out.is_contiguous():
        raise KernelArgumentError(f"out must be contiguous uint64 {list(ids.shape)}, got {out.dtype} {list(out.shape)}")
    if out.device != device:
        raise KernelArgumentError(f"out is on {out.device}, the digests are made on {device}")
    if seeds is not None:
        check_array(seeds, "seeds", np.uint64, ids.shape)
