"""Moves keys to other positions while copying them, so that a cached passage can be reused wherever it stands.

A rotary embedding rotates pairs of a key by position × frequency; a key cached at position p is moved to p + delta by
rotating it by delta × frequency. Bytes moved: keys once each way; values once each way where they are copied.

A shifted key differs from the unrounded key at its new position, relative to the length of the rotated pair, by at most

    fp32: 2**-21        fp16: 2**-10        bf16: 2**-7

which is two roundings to the dtype, one in the cache and one here; a key computed anew has one of them. A model that
computes angles in fp32 is itself further away than that in fp32, by position × 2**-24 radians. CPU, interpreter and GPU
give the same bits.
"""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.checks import KernelArgumentError, SlotIds, check_array, check_distinct, check_ids
from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.copy_plan import plan_copy
from dynamo.kernels.host_tiles import HostWindow
from dynamo.kernels.kernel_call import Target
from dynamo.kernels.rope_shift_host import Rope, RopeWork, rotations
from dynamo.kernels.view import View

__all__ = ["Rope", "rope_shift"]

ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)
MAX_DELTA = 1 << 31
"""Positions; so far an angle in fp64 is right to 2**-22 radians."""


def rope_shift(
    src: View,
    src_ids: SlotIds,
    dst: View,
    dst_ids: SlotIds,
    *,
    deltas: npt.NDArray[np.int64],
    rope: Rope,
    elements: torch.dtype,
    values: bool = True,
    sm_budget: int | None = None,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Copies `src[src_ids[i]]` to `dst[dst_ids[i]]`, with plane 0 rotated by `deltas[i]` positions.

    Blocks may be shifted in place (the same view and ids on both sides). With a GPU on one side it only submits, and host
    memory on the other must be pinned; on the CPU it blocks until done.

    Args:
        src: blocks of any layout; plane 0 holds keys, or latents whose rotated part `rope.offset` finds.
        src_ids: int64 [n].
        dst: blocks of the same shape, in any layout.
        dst_ids: int64 [n], distinct.
        deltas: int64 [n], new position minus old, of either sign, up to 2**31: angles are made in fp64.
        rope: the model's rotary embedding.
        elements: dtype of the rows: fp32, fp16 or bf16.
        values: copy plane 1 as it is; False leaves it alone.
        sm_budget: most programs to run at a time; None for as many as are useful.
        stream: stream to submit to; None for the current one.

    Raises:
        KernelArgumentError: shapes, ids, dtypes or devices do not fit; nothing was moved.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> pool = torch.randn(4, 2, 2, 16, 8, 64)  # blocks, layers, K and V, tokens, heads, dim
    >>> view, rope = from_paged(pool, "BLPTHD"), Rope.of_theta(64, 500000.0)
    >>> moved = torch.zeros_like(pool)
    >>> there, back = np.array([100, -7]), np.array([-100, 7])
    >>> kwargs = {"rope": rope, "elements": torch.float32}
    >>> rope_shift(view, np.array([3, 1]), from_paged(moved, "BLPTHD"), np.array([0, 2]), deltas=there, **kwargs)
    >>> rope_shift(from_paged(moved, "BLPTHD"), np.array([0, 2]), view, np.array([0, 2]), deltas=back, **kwargs)
    >>> torch.allclose(pool[0], pool[3], atol=1e-5), torch.equal(pool[2, :, 1], pool[1, :, 1])
    (True, True)
    """
    _check(src, src_ids, dst, dst_ids, deltas, rope, elements)
    target = Target.of(src, dst, sm_budget=sm_budget, stream=stream)
    if _is_same(src, src_ids, dst, dst_ids):
        values = False
    else:
        plan_copy(src, src_ids, dst, dst_ids)  # for its check that nothing is both read and written
    groups = math.lcm(src.head_groups, dst.head_groups)
    keys, turned = _plane(src, 0).fold_heads(groups), _plane(dst, 0).fold_heads(groups)
    trig, rotation_ids = rotations(rope, deltas)
    call = None
    if target.is_gpu:  # built, and refused, before any value is copied
        from dynamo.kernels.rope_shift_kernel import build_call

        call = build_call(keys, src_ids, turned, dst_ids, rope, trig, rotation_ids, elements, target.device)
    if values and src.num_planes == 2:
        copy_blocks(_plane(src, 1), src_ids, _plane(dst, 1), dst_ids, sm_budget=sm_budget, stream=stream)
    if call is not None:
        call.launch(target)
        return
    work = RopeWork(rope, elements, keys.num_tokens, keys.num_heads, keys.row_bytes // elements.itemsize)
    for row in range(keys.num_layers):
        tiles = HostWindow(keys, row, 0, work.word).tiles(src_ids)
        out = HostWindow(turned, row, 0, work.word, writable=True).tiles(dst_ids)
        for start in range(0, len(tiles), work.num_tiles):
            part = slice(start, start + work.num_tiles)
            work.turn(tiles[part], out[part], trig, rotation_ids[part])


def _plane(view: View, plane: int) -> View:
    column = slice(plane, plane + 1)
    return replace(view, base=view.base[:, column], limits=view.limits[:, column])


def _is_same(src: View, src_ids: SlotIds, dst: View, dst_ids: SlotIds) -> bool:
    """Whether every row is its own destination; the shapes are known to agree."""
    if src.device != dst.device or src.head_groups != dst.head_groups or not np.array_equal(src.base, dst.base):
        return False
    steps = ((src.num_tokens, src.token_stride, dst.token_stride), (src.num_heads, src.head_stride, dst.head_stride))
    if any(count > 1 and ours != theirs for count, ours, theirs in steps):
        return False
    return np.array_equal(src.block_offsets[src_ids], dst.block_offsets[dst_ids])


def _check(
    src: View,
    src_ids: SlotIds,
    dst: View,
    dst_ids: SlotIds,
    deltas: npt.NDArray[np.int64],
    rope: Rope,
    elements: torch.dtype,
) -> None:
    found, wanted = dst.block_shape, src.block_shape
    if found != wanted:
        raise KernelArgumentError(f"(layers, planes, tokens, heads, row bytes) are {wanted} in src and {found} in dst")
    check_ids(src_ids, "src_ids", src.num_blocks)
    check_ids(dst_ids, "dst_ids", dst.num_blocks, src_ids.size)
    check_distinct(dst_ids, "dst_ids", dst.num_blocks)
    check_array(deltas, "deltas", np.int64, src_ids.shape)
    if deltas.size and not -MAX_DELTA <= deltas.min() <= deltas.max() <= MAX_DELTA:
        raise KernelArgumentError(f"deltas reach from {deltas.min()} to {deltas.max()}, past {MAX_DELTA} positions")
    if elements not in ELEMENTS:
        raise KernelArgumentError(f"elements are {elements}; only fp32, fp16 and bf16 can be rotated")
    head_dim, rest = divmod(src.row_bytes, elements.itemsize)
    if rest or rope.offset + 2 * rope.inv_freq.size > head_dim:
        raise KernelArgumentError(
            f"rows of {src.row_bytes} bytes hold no {elements} elements [{rope.offset}, {rope.offset + 2 * rope.inv_freq.size})"
        )
    if min(src.alignment, dst.alignment) < elements.itemsize:
        raise KernelArgumentError(
            f"rows are aligned to {min(src.alignment, dst.alignment)} bytes, {elements} needs more"
        )
