"""Quantises blocks while copying them, and restores them while copying back.

Bytes moved: the rows once on the unquantised side; one byte (fp8, int8) or half a byte (int4) per element and four bytes
per head and block on the other. See `dynamo.kernels.quantized_layout` for what lies where, `quantize_kernel` for the
arithmetic. CPU, interpreter and GPU give the same bits, NaN payloads aside.

Largest error of a restored element x, in the block, layer, plane and head whose largest finite magnitude is amax, before
it is rounded to its dtype (at most half an ulp more: 2**-8 |x| for bf16, 2**-11 |x| for fp16):

    | dtype    | bound                        | relative RMS error of Gaussian rows, 16 tokens of 128 |
    | fp8_e4m3 | max(|x| / 16, amax / 458752) | 2.6 % |
    | int8     | amax / 254                   | 0.9 % |
    | int4     | amax / 14                    | 15 %  |

each times 1 + 2**-20 for the fp32 arithmetic. Infinities saturate at amax; NaN stays NaN in fp8 and becomes 0 in integers;
where amax is below LARGEST × 2**-126 the bound is that of amax = LARGEST × 2**-126.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from dynamo.kernels.checks import KernelArgumentError, SlotIds, check_distinct, check_ids
from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.copy_plan import check_apart
from dynamo.kernels.host_tiles import HostWindow
from dynamo.kernels.kernel_call import Target
from dynamo.kernels.quantize_host import QuantizeWork
from dynamo.kernels.quantized_layout import QuantizedLayout, QuantizedView
from dynamo.kernels.view import View

__all__ = ["QuantizedLayout", "QuantizedView", "dequantize_blocks", "quantize_blocks"]


def quantize_blocks(
    src: View,
    src_ids: SlotIds,
    dst: QuantizedView,
    dst_ids: SlotIds,
    *,
    sm_budget: int | None = None,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Quantises `src[src_ids[i]]` into `dst[dst_ids[i]]` for every i.

    With a GPU on one side it only submits, and host memory on the other must be pinned; on the CPU it blocks until done.

    Args:
        src: rows of `dst.layout.elements`, in any layout.
        src_ids: int64 [n].
        dst: slots, on the same device or pinned; its layout says which planes are quantised, and to what.
        dst_ids: int64 [n], distinct.
        sm_budget: most programs to run at a time; None for as many as are useful.
        stream: stream to submit to; None for the current one.

    Raises:
        KernelArgumentError: shapes, ids or devices do not fit; nothing was moved.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> pool = torch.randn(4, 2, 2, 16, 8, 128).bfloat16()  # blocks, layers, K and V, tokens, heads, dim
    >>> view = from_paged(pool, "BLPTHD")
    >>> layout = QuantizedLayout(num_layers=2, num_tokens=16, num_heads=8, head_dim=128, elements=torch.bfloat16)
    >>> slots = torch.zeros(3, layout.block_bytes, dtype=torch.uint8)
    >>> quantize_blocks(view, np.array([3, 0]), layout.view(slots), np.array([0, 2]))
    >>> restored = torch.zeros_like(pool)
    >>> dequantize_blocks(layout.view(slots), np.array([0, 2]), from_paged(restored, "BLPTHD"), np.array([3, 0]))
    >>> bool((restored[3] - pool[3]).float().norm() < 0.03 * pool[3].float().norm())
    True
    """
    target = Target.of(src, *dst.planes, sm_budget=sm_budget, stream=stream)
    _check(src, src_ids, dst, dst_ids, dst_ids)
    work = _prepare(src, src_ids, dst, dst_ids, target, to_codes=True)
    for plain, plane in _plain_planes(src, dst):
        copy_blocks(plain, src_ids, plane, dst_ids, sm_budget=sm_budget, stream=stream)
    work()


def dequantize_blocks(
    src: QuantizedView,
    src_ids: SlotIds,
    dst: View,
    dst_ids: SlotIds,
    *,
    sm_budget: int | None = None,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Restores `src[src_ids[i]]` into `dst[dst_ids[i]]` for every i; the mirror of `quantize_blocks`.

    Args:
        src: slots written by `quantize_blocks` with the same layout.
        src_ids: int64 [n].
        dst: rows of `src.layout.elements`, in any layout, on the same device or pinned.
        dst_ids: int64 [n], distinct.
        sm_budget: most programs to run at a time; None for as many as are useful.
        stream: stream to submit to; None for the current one.

    Raises:
        KernelArgumentError: shapes, ids or devices do not fit; nothing was moved.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> keys, values = torch.randn(2, 4, 16, 2, 64)  # blocks, tokens, heads, dim
    >>> layout = QuantizedLayout(
    ...     num_layers=1, num_tokens=16, num_heads=2, head_dim=64, elements=torch.float32, dtype="int8", values=False
    ... )
    >>> slots = layout.view(torch.zeros(4, layout.block_bytes, dtype=torch.uint8))
    >>> quantize_blocks(from_paged([(keys, values)], "BTHD"), np.arange(4), slots, np.arange(4))
    >>> k, v = torch.zeros(2, 4, 16, 2, 64)
    >>> dequantize_blocks(slots, np.arange(4), from_paged([(k, v)], "BTHD"), np.arange(4))
    >>> bool(torch.equal(v, values)), bool((k - keys).abs().max() <= keys.abs().max() / 253)
    (True, True)
    """
    target = Target.of(dst, *src.planes, sm_budget=sm_budget, stream=stream)
    _check(dst, dst_ids, src, src_ids, dst_ids)
    work = _prepare(dst, dst_ids, src, src_ids, target, to_codes=False)
    for plain, plane in _plain_planes(dst, src):
        copy_blocks(plane, src_ids, plain, dst_ids, sm_budget=sm_budget, stream=stream)
    work()


def _prepare(
    rows: View, row_ids: SlotIds, pool: QuantizedView, pool_ids: SlotIds, target: Target, *, to_codes: bool
) -> Callable[[], None]:
    """What quantises or restores the quantised planes. A launch is built, and refused, before any plane is copied."""
    pool, rows = pool.fold_with(rows)
    if target.is_gpu:
        from dynamo.kernels import quantize_kernel

        call = quantize_kernel.build_call(rows, row_ids, pool, pool_ids, target.device, to_codes=to_codes)
        return partial(call.launch, target)
    return partial(_run_on_host, rows, row_ids, pool, pool_ids, to_codes)


def _run_on_host(rows: View, row_ids: SlotIds, pool: QuantizedView, pool_ids: SlotIds, to_codes: bool) -> None:
    work = QuantizeWork(pool.layout, rows.num_tokens, rows.num_heads)
    for plane, scales in enumerate(pool.scales):
        if scales is None:
            continue
        for row in range(rows.num_layers):
            tiles = HostWindow(rows, row, plane, work.word, writable=not to_codes).tiles(row_ids)
            codes = HostWindow(pool.planes[plane], row, 0, np.uint8, writable=to_codes).tiles(pool_ids)
            factors = HostWindow(scales, row, 0, np.float32, writable=to_codes).tiles(pool_ids)
            for start in range(0, len(tiles), work.num_tiles):
                part = slice(start, start + work.num_tiles)
                (work.quantize if to_codes else work.restore)(tiles[part], codes[part], factors[part])


def _plain_planes(rows: View, pool: QuantizedView) -> Iterator[tuple[View, View]]:
    """Both sides of the planes that are copied as they are."""
    for plane, scales in enumerate(pool.scales):
        if scales is None:
            column = slice(plane, plane + 1)
            yield replace(rows, base=rows.base[:, column], limits=rows.limits[:, column]), pool.planes[plane]


def _check(rows: View, row_ids: SlotIds, pool: QuantizedView, pool_ids: SlotIds, written: SlotIds) -> None:
    layout = pool.layout
    row_bytes = layout.head_dim * layout.elements.itemsize
    wanted = (layout.num_layers, layout.num_planes, layout.num_tokens, layout.num_heads, row_bytes)
    if rows.block_shape != wanted:
        raise KernelArgumentError(
            f"(layers, planes, tokens, heads, row bytes) are {rows.block_shape} in the view and {wanted} in the slots"
        )
    check_ids(row_ids, "ids of the view", rows.num_blocks)
    check_ids(pool_ids, "ids of the quantised view", pool.num_blocks, row_ids.size)
    check_distinct(written, "dst_ids", max(rows.num_blocks, pool.num_blocks))
    if rows.alignment < layout.elements.itemsize:
        raise KernelArgumentError(f"rows are aligned to {rows.alignment} bytes, {layout.elements} needs more")
    for view in (*pool.planes, *pool.scales):
        if view is not None:
            check_apart(rows, view)
