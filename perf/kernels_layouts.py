"""The layout changes the kernel benchmark measures: pools of tensors, views of them, and how torch users do the same."""

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.view import View
from dynamo.perf.kernels_peers import UniversalPack

__all__ = ["Ids", "LayoutCase", "Peer", "conversions", "host_bytes_new", "rows", "shuffled", "universal_pack"]

_LAYERS, _TOKENS, _HEADS = 4, 16, 8
_SEED = 7

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Peer:
    """The same bytes moved by somebody else's way."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class LayoutCase:
    """A copy between two views, and its peers.

    Attributes:
        num_bytes: payload.
        others: what torch and numpy users write for it; they may write more than the views' bytes, never less.
    """

    name: str
    src: View
    src_ids: Ids
    dst: View
    dst_ids: Ids
    num_bytes: int
    others: tuple[Peer, ...]


def rows(row_bytes: int, num_bytes: int, device: torch.device) -> Iterator[LayoutCase]:
    """Whole rows of one pool gathered into consecutive rows of another, and scattered back."""
    count = max(2, num_bytes // row_bytes)
    pool, packed = _bytes(count, row_bytes, device=device), _bytes(count, row_bytes, device=device)
    order = shuffled(count)
    pool_ids = torch.from_numpy(order).to(device)
    views = from_paged(pool, "BD"), from_paged(packed, "BD")
    consecutive = np.arange(count, dtype=np.int64)
    size = _size(row_bytes)
    gathers = [Peer("torch index_select(out=)", lambda: torch.index_select(pool, 0, pool_ids, out=packed))]
    scatters = [Peer("torch index_copy_", lambda: pool.index_copy_(0, pool_ids, packed))]
    if device.type == "cpu":
        source, target = (tensor.numpy().view(f"V{row_bytes}")[:, 0] for tensor in (pool, packed))
        gathers.append(Peer("numpy take", lambda: np.take(source, order, out=target, mode="clip")))
    yield LayoutCase(f"gather {size} rows", views[0], order, views[1], consecutive, count * row_bytes, tuple(gathers))
    yield LayoutCase(f"scatter {size} rows", views[1], consecutive, views[0], order, count * row_bytes, tuple(scatters))


def conversions(row_bytes: int, num_bytes: int, device: torch.device) -> Iterator[LayoutCase]:
    """Paged blocks of 4 layers, 16 tokens and 8 heads between NHD, HND and the stored order.

    Engine pools are one bfloat16 tensor per layer [2, num_blocks, ...] read or written at shuffled blocks; the stored
    side is consecutive.
    """
    block_bytes = _LAYERS * 2 * _TOKENS * _HEADS * row_bytes
    count = max(4, num_bytes // block_bytes // 4 * 4)
    nhd = _layers(count, (_TOKENS, _HEADS), row_bytes, device)
    hnd = _layers(count, (_HEADS, _TOKENS), row_bytes, device)
    nhd_view, hnd_view = from_paged(nhd, "PBTHD"), from_paged(hnd, "PBHTD")
    slots = _bytes(count, block_bytes, device=device)
    stored_view = stored(slots, num_layers=_LAYERS, num_tokens=_TOKENS, num_heads=_HEADS, row_bytes=row_bytes)
    packed = slots.view(torch.bfloat16).view(count, _LAYERS, 2, _TOKENS, _HEADS, row_bytes // 2)
    order, consecutive = shuffled(count), np.arange(count, dtype=np.int64)
    ids = torch.from_numpy(order).to(device)
    total, suffix = count * block_bytes, f", {row_bytes} B rows"

    def pack() -> None:
        for layer, kv in enumerate(nhd):
            packed[:, layer].copy_(kv.index_select(1, ids).transpose(0, 1))

    def unpack() -> None:
        for layer, kv in enumerate(nhd):
            kv.index_copy_(1, ids, packed[:, layer].transpose(0, 1))

    def transpose_with(copy: Callable[[Tensor, Tensor], object], src: list[Tensor], dst: list[Tensor]) -> None:
        for kv, out in zip(src, dst, strict=True):
            copy(out, kv.transpose(2, 3))

    def contiguous(out: Tensor, turned: Tensor) -> object:
        return turned.contiguous()

    def turning(src: list[Tensor], dst: list[Tensor]) -> tuple[Peer, ...]:
        return (
            Peer("torch copy_(permute), blocks in order", lambda: transpose_with(Tensor.copy_, src, dst)),
            Peer("torch permute().contiguous(), in order", lambda: transpose_with(contiguous, src, dst)),
        )

    yield LayoutCase(
        f"NHD to stored{suffix}", nhd_view, order, stored_view, consecutive, total,
        (Peer("torch index_select + copy_", pack),),
    )  # fmt: skip
    yield LayoutCase(
        f"stored to NHD{suffix}", stored_view, consecutive, nhd_view, order, total,
        (Peer("torch index_copy_", unpack),),
    )  # fmt: skip
    yield LayoutCase(f"NHD to HND{suffix}", nhd_view, order, hnd_view, consecutive, total, turning(nhd, hnd))
    yield LayoutCase(f"HND to NHD{suffix}", hnd_view, consecutive, nhd_view, order, total, turning(hnd, nhd))
    half = _HEADS // 2
    yield LayoutCase(
        f"stored to NHD, half the heads{suffix}",
        stored_view.slice_heads(half, _HEADS), consecutive, nhd_view.slice_heads(0, half), order, total // 2, (),
    )  # fmt: skip


def universal_pack(row_bytes: int, num_bytes: int, device: torch.device) -> LayoutCase:
    """Paged NHD layers to Dynamo's universal blocks [head, layer, plane, token, dim], beside its way of doing so."""
    block_bytes = _LAYERS * 2 * _TOKENS * _HEADS * row_bytes
    count = max(4, num_bytes // block_bytes)
    layers, slots = _layers(count, (_TOKENS, _HEADS), row_bytes, device), _bytes(count, block_bytes, device=device)
    order = shuffled(count)
    universal = stored(
        slots, num_layers=_LAYERS, num_tokens=_TOKENS, num_heads=_HEADS, row_bytes=row_bytes, head_groups=_HEADS
    )
    theirs = UniversalPack(layers, order, slots)
    return LayoutCase(
        f"NHD to universal, {row_bytes} B rows", from_paged(layers, "PBTHD"), order, universal,
        np.arange(count, dtype=np.int64), count * block_bytes,
        (Peer("Dynamo's way: element by element", theirs.run),),
    )  # fmt: skip


def host_bytes_new(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Host memory of ones as the tiers map it: its own mapping, with huge pages where the system has them."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    ones = np.frombuffer(memory, dtype=np.uint8)
    ones[:] = 1
    return ones


def _bytes(*shape: int, device: torch.device) -> Tensor:
    """Memory of ones: written, so that it is really there."""
    if device.type == "cpu":
        return torch.from_numpy(host_bytes_new(math.prod(shape))).view(shape)
    return torch.ones(shape, dtype=torch.uint8, device=device)


def _layers(count: int, inner: tuple[int, int], row_bytes: int, device: torch.device) -> list[Tensor]:
    return [_bytes(2, count, *inner, row_bytes, device=device).view(torch.bfloat16) for _ in range(_LAYERS)]


def shuffled(count: int) -> Ids:
    """All numbers below `count`, int64, in an order that is the same every time."""
    return np.random.default_rng(_SEED).permutation(count).astype(np.int64)


def _size(num_bytes: int) -> str:
    if num_bytes >= 1 << 20:
        return f"{num_bytes / (1 << 20):g} MiB"
    return f"{num_bytes / 1024:g} KiB" if num_bytes >= 1024 else f"{num_bytes} B"
