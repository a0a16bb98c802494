"""Views of the layouts that engines and stores use. Nothing is copied; a view holds the tensors it describes.

Axes of a tensor are named by letters, outermost first:

    B block   L layer   P plane (K, V)   T token   H head   G head group   D bytes of one row (innermost, contiguous)

| layout | `from_paged(…)` |
| --- | --- |
| NHD, one tensor per layer, outer-first (FlashAttention) | `from_paged([kv0, kv1, …], "PBTHD")` |
| NHD, one tensor per layer, block-first (FlashInfer) | `from_paged([kv0, kv1, …], "BPTHD")` |
| HND, block-first | `from_paged([kv0, kv1, …], "BPHTD")` |
| K and V in tensors of their own | `from_paged([(k0, v0), (k1, v1), …], "BTHD")` |
| K and V interleaved per token, per head | `"BTPHD"`, `"BTHPD"` |
| all layers in one tensor, layer outermost or inside the block | `"LPBTHD"`, `"BLPTHD"` |
| MLA latents, one row per token | `"BTD"` |
| the stored layout | `"BGLPTHD"` |
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.view import View

__all__ = ["flashinfer", "from_paged", "from_tokens", "mla", "stored", "vllm"]

Paged = Tensor | Sequence[Tensor] | Sequence[tuple[Tensor, Tensor]]

_LETTERS = frozenset("BLPTHGD")


def from_paged(tensors: Paged, axes: str) -> View:
    """View of tensors whose axes are named by `axes`. Strides are the tensors' own, so permuted tensors are fine.

    Args:
        tensors: one tensor; one per layer; or one (K, V) pair per layer. Any dtype; alike in shape, strides and dtype.
        axes: a letter per dimension, as in this module's table. Axes left out have length 1. Layers of several tensors
            with an axis L follow each other, as do planes.

    Raises:
        KernelArgumentError: letters and dimensions do not fit, the tensors differ, or rows are not contiguous.

    >>> import torch
    >>> layers = [torch.zeros(2, 8, 16, 4, 64, dtype=torch.float16) for _ in range(3)]
    >>> view = from_paged(layers, "PBTHD")
    >>> view.base.shape, view.num_blocks, view.num_tokens, view.num_heads, view.row_bytes
    ((3, 2), 8, 16, 4, 128)
    >>> from_paged([kv.transpose(2, 3) for kv in layers], "PBHTD").token_stride == view.token_stride
    True
    """
    grid = _as_grid(tensors)
    first = grid[0][0]
    _check_axes(first, axes)
    for tensor in (t for planes in grid for t in planes):
        if (tensor.shape, tensor.stride(), tensor.dtype) != (first.shape, first.stride(), first.dtype):
            raise KernelArgumentError(
                f"tensors of one view must be alike, got {tuple(first.shape)} {first.stride()} {first.dtype} and "
                f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"
            )
    item = first.element_size()
    count = dict.fromkeys(_LETTERS, 1) | dict(zip(axes, first.shape, strict=True))
    stride = dict.fromkeys(_LETTERS, 0)
    stride |= {letter: step * item for letter, step in zip(axes, first.stride(), strict=True)}
    steps = {letter: np.arange(count[letter], dtype=np.int64) * stride[letter] for letter in "BGLP"}
    # [group, tensors along layers, L, tensors along planes, P] → [group × layer, plane]
    starts = np.array([[t.data_ptr() for t in planes] for planes in grid], dtype=np.int64)[None, :, None, :, None]
    ends = np.array([[_storage_range(t) for t in planes] for planes in grid], dtype=np.int64)[None, :, None, :, None, :]
    bases = starts + steps["G"][:, None, None, None, None] + steps["L"][:, None, None] + steps["P"]
    num_planes = len(grid[0]) * count["P"]
    return View(
        tensors=tuple(t for planes in grid for t in planes),
        base=bases.reshape(-1, num_planes),
        block_offsets=steps["B"],
        token_stride=stride["T"],
        head_stride=stride["H"],
        row_bytes=count["D"] * item,
        num_tokens=count["T"],
        num_heads=count["H"],
        limits=np.broadcast_to(ends, (*bases.shape, 2)).reshape(-1, num_planes, 2),
        head_groups=count["G"],
    )


def vllm(kv_caches: Sequence[Tensor]) -> View:
    """View of vLLM's `kv_caches`, one tensor per layer, told apart by shape.

    Args:
        kv_caches: [2, num_blocks, block_size, num_kv_heads, head_size] or [num_blocks, 2, block_size, num_kv_heads,
            head_size]; [num_blocks, num_kv_heads, block_size, 2 * head_size] (K beside V, since 0.30 or so); MLA
            [num_blocks, block_size, head_size]. HND is a permuted stride there, and is followed.

    Raises:
        KernelArgumentError: none of these shapes, or one that could be two of them.

    >>> import torch
    >>> view = vllm([torch.zeros(8, 4, 16, 2 * 64, dtype=torch.bfloat16) for _ in range(2)])
    >>> view.num_planes, view.num_heads, view.row_bytes, view.token_stride
    (2, 4, 128, 256)
    """
    if not kv_caches:
        raise KernelArgumentError("vllm() needs one tensor per layer, got none")
    shape = tuple(kv_caches[0].shape)
    if len(shape) == 3:
        return from_paged(kv_caches, "BTD")
    if len(shape) == 4 and shape[3] % 2 == 0:
        return from_paged([kv.view(*shape[:3], 2, -1) for kv in kv_caches], "BHTPD")
    if len(shape) == 5 and (shape[0] == 2) != (shape[1] == 2):
        return from_paged(kv_caches, "PBTHD" if shape[0] == 2 else "BPTHD")
    raise KernelArgumentError(f"shape {shape} is not, or not certainly, one of vLLM's; name its axes with from_paged()")


def flashinfer(kv_caches: Paged, order: str = "NHD") -> View:
    """View of FlashInfer's paged KV caches, per layer a tensor or a (K, V) pair.

    Args:
        kv_caches: per layer [max_num_pages, 2, page_size, num_kv_heads, head_dim], or a pair of the same without the 2;
            with "HND" heads come before the page's tokens.
        order: "NHD" or "HND", FlashInfer's `kv_layout`.

    Raises:
        KernelArgumentError: an unknown order, or tensors of other shapes.

    >>> import torch
    >>> pages = [torch.zeros(8, 2, 4, 16, 64, dtype=torch.bfloat16) for _ in range(2)]
    >>> flashinfer(pages, "HND").num_heads
    4
    """
    if order not in ("NHD", "HND"):
        raise KernelArgumentError(f'order is {order!r}, FlashInfer knows "NHD" and "HND"')
    inner = "THD" if order == "NHD" else "HTD"
    return from_paged(kv_caches, ("B" if _as_grid(kv_caches)[0][0].dim() == 4 else "BP") + inner)


def mla(latents: Tensor | Sequence[Tensor]) -> View:
    """View of MLA latents: per layer [num_blocks, block_size, latent] or [num_blocks, block_size, 1, latent]; one plane.

    >>> import torch
    >>> mla([torch.zeros(8, 64, 576, dtype=torch.bfloat16) for _ in range(2)]).run_bytes == 64 * 576 * 2
    True
    """
    return from_paged(latents, "BTD" if _as_grid(latents)[0][0].dim() == 3 else "BTHD")


def from_tokens(pools: Paged, num_tokens: int) -> View:
    """View of pools indexed by token, such as SGLang's, as blocks of `num_tokens` consecutive slots.

    Args:
        pools: per layer a (K, V) pair [num_slots, num_heads, head_dim], or a latent pool [num_slots, 1, latent].
        num_tokens: slots of a block; divides num_slots.

    Raises:
        KernelArgumentError: other shapes, or num_slots is not a multiple.

    >>> import torch
    >>> k, v = torch.zeros(2, 128, 4, 64, dtype=torch.bfloat16)
    >>> from_tokens([(k, v)], 16).num_blocks
    8
    """
    grid = _as_grid(pools)
    if len(grid[0]) > 2:
        raise KernelArgumentError(
            f"a layer has {len(grid[0])} pools; one of K and one of V, or one of latents, are meant"
        )
    num_slots = grid[0][0].shape[0]
    if num_tokens < 1 or num_slots % num_tokens:
        raise KernelArgumentError(f"{num_slots} slots are not whole blocks of {num_tokens} tokens")
    paged = [tuple(t.view(-1, num_tokens, *t.shape[1:]) for t in planes) for planes in grid]
    return from_paged([(p[0], p[1]) for p in paged] if len(grid[0]) == 2 else [p[0] for p in paged], "BTHD")


def stored(
    slots: Tensor,
    *,
    num_layers: int,
    num_planes: int = 2,
    num_tokens: int,
    num_heads: int,
    row_bytes: int,
    head_groups: int = 1,
) -> View:
    """View of stored blocks, each one contiguous run [head_group, layer, plane, token, head_in_group, row] in a slot.

    Args:
        slots: uint8 [num_slots, slot_bytes]; a slot may be larger than its block. `torch.from_numpy(rows)` for an arena.
        num_layers: layers of the block.
        num_planes: 2 for K and V, 1 for MLA latents.
        num_tokens: tokens of the block.
        num_heads: all heads of the block; `head_groups` divides them.
        row_bytes: bytes of one token and head.
        head_groups: the most tensor-parallel ranks that can read contiguous parts.

    Raises:
        KernelArgumentError: wrong dtype or shape, or the block does not fit into a slot.

    >>> import torch
    >>> slots = torch.zeros(4, 4096, dtype=torch.uint8)
    >>> view = stored(slots, num_layers=2, num_tokens=4, num_heads=4, row_bytes=32, head_groups=2)
    >>> view.block_bytes, view.head_groups, view.slice_heads(2, 4).run_bytes
    (2048, 2, 256)
    """
    if slots.element_size() != 1 or slots.dim() != 2 or (slots.shape[1] > 1 and slots.stride(1) != 1):
        raise KernelArgumentError(
            f"slots must be bytes [num_slots, slot_bytes], got {slots.dtype} {tuple(slots.shape)}"
        )
    if head_groups < 1 or num_heads % head_groups:
        raise KernelArgumentError(f"{num_heads} heads do not divide into {head_groups} groups")
    shape = (head_groups, num_layers, num_planes, num_tokens, num_heads // head_groups, row_bytes)
    block_bytes = int(np.prod(shape))
    if min(shape) < 1 or block_bytes > slots.shape[1]:
        raise KernelArgumentError(
            f"a block {shape} of {block_bytes} bytes does not fit slots of {slots.shape[1]} bytes"
        )
    return from_paged(slots[:, :block_bytes].view(-1, *shape), "BGLPTHD")


def _as_grid(tensors: Paged) -> list[list[Tensor]]:
    """[layer][plane]."""
    if isinstance(tensors, Tensor):
        return [[tensors]]
    grid = [[entry] if isinstance(entry, Tensor) else list(entry) for entry in tensors]
    if not grid or len({len(planes) for planes in grid}) != 1 or not grid[0]:
        raise KernelArgumentError("a view needs at least one layer, and the same planes in every layer")
    return grid


def _check_axes(tensor: Tensor, axes: str) -> None:
    if len(set(axes)) != len(axes) or not set(axes) <= _LETTERS or "B" not in axes or not axes.endswith("D"):
        raise KernelArgumentError(
            f"axes {axes!r} must name B once and end in D, with letters of BLPTHGD at most once each"
        )
    if len(axes) != tensor.dim():
        raise KernelArgumentError(
            f"axes {axes!r} name {len(axes)} dimensions, the tensor has shape {tuple(tensor.shape)}"
        )
    if 0 in (length for letter, length in zip(axes, tensor.shape, strict=True) if letter != "B"):
        raise KernelArgumentError(f"only the number of blocks may be 0, the tensor has shape {tuple(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelArgumentError(f"rows must be contiguous, the last dimension has stride {tensor.stride(-1)}")
    for letter, length, step in zip(axes, tensor.shape, tensor.stride(), strict=True):
        if length > 1 and step == 0:
            raise KernelArgumentError(f"axis {letter} repeats the same memory {length} times (stride 0)")


def _storage_range(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
