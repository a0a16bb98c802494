"""Kernel benchmark, kernels that change or inspect blocks while they copy them, and whether GPU and CPU agree on the bits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamo.kernels.compact import compact, plan_compaction
from dynamo.kernels.cuda_runtime import cuda_driver
from dynamo.kernels.digest_blocks import copy_blocks_digest, digest_blocks
from dynamo.kernels.layouts import from_paged
from dynamo.kernels.quantize import QuantizedLayout, dequantize_blocks, quantize_blocks
from dynamo.kernels.rope_shift import Rope, rope_shift
from dynamo.perf.kernels_layouts import shuffled
from dynamo.perf.kernels_measure import Timer, choose_timer, paired, speed_results
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.report import Result

__all__ = ["Pool", "device_transforms", "exactness", "transforms"]

_LAYERS, _TOKENS, _HEADS, _DIM = 4, 16, 8, 128
_THETA, _SHIFT = 500_000.0, 48
_SMALL_MIB = 256
_FORMATS = ("fp8_e4m3", "int8")

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pool:
    """A paged bfloat16 pool whose blocks hold all layers, a place for copies of it, and which blocks are worked on."""

    blocks: Tensor
    copies: Tensor
    ids: Ids
    consecutive: Ids

    @classmethod
    def make(cls, num_bytes: int, device: torch.device) -> "Pool":
        count = max(8, num_bytes // (_LAYERS * 2 * _TOKENS * _HEADS * _DIM * 2))
        generator = torch.Generator().manual_seed(3)
        few = torch.randn(8, _LAYERS, 2, _TOKENS, _HEADS, _DIM, generator=generator).bfloat16()
        blocks = few.repeat(-(-count // 8), 1, 1, 1, 1, 1)[:count].to(device)
        return cls(blocks, torch.zeros_like(blocks), shuffled(count), np.arange(count, dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        return self.blocks.numel() * 2

    def layout(self, dtype: str) -> QuantizedLayout:
        return QuantizedLayout(
            num_layers=_LAYERS,
            num_tokens=_TOKENS,
            num_heads=_HEADS,
            head_dim=_DIM,
            elements=torch.bfloat16,
            dtype=dtype,
        )


@dataclass(frozen=True, slots=True)
class _Way:
    """One measured action."""

    case: str
    subject: str
    num_bytes: int
    run: Callable[[], object]


def transforms(workload: Workload) -> Findings:
    """Within the GPU, and quantised straight into pinned host memory and back."""
    device = torch.device(workload.device)
    timer = choose_timer(device)
    yield from device_transforms(workload, timer)
    yield from _over_the_bus(Pool.make(min(workload.mib, _SMALL_MIB) << 20, device), timer, workload.repeats)
    yield (
        "transforms: payload counts the unquantised bytes; the ceiling copies as many bytes, so that quantising may exceed "
        "100 %"
    )


def device_transforms(workload: Workload, timer: Timer) -> Findings:
    """Every transform with both sides on one device."""
    pool = Pool.make(workload.num_bytes, torch.device(workload.device))
    plain = torch.ones(2, pool.num_bytes, dtype=torch.uint8, device=pool.blocks.device)
    for way in (*_quantising(pool), *_others(pool)):
        source, target = plain[:, : way.num_bytes]
        speed = paired(timer, way.run, partial(target.copy_, source), way.num_bytes, workload.repeats)
        yield from speed_results(way.case, way.subject, speed, workload.repeats)


def _quantising(pool: Pool) -> Iterator[_Way]:
    rows, restored = from_paged(pool.blocks, "BLPTHD"), from_paged(pool.copies, "BLPTHD")
    ids, consecutive, size = pool.ids, pool.consecutive, pool.num_bytes
    for dtype in _FORMATS:
        layout = pool.layout(dtype)
        slots = layout.view(torch.zeros(ids.size, layout.block_bytes, dtype=torch.uint8, device=pool.blocks.device))
        out = partial(quantize_blocks, rows, ids, slots, consecutive)
        back = partial(dequantize_blocks, slots, consecutive, restored, ids)
        yield _Way(f"quantise to {dtype}", "dynamo-kv quantize_blocks", size, out)
        yield _Way(f"restore from {dtype}", "dynamo-kv dequantize_blocks", size, back)

    def eager() -> Tensor:
        scale = pool.blocks.abs().amax(dim=(3, 5), keepdim=True).float() / 448
        return (pool.blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    yield _Way("quantise to fp8_e4m3", "torch, eager, blocks in order", size, eager)


def _others(pool: Pool) -> Iterator[_Way]:
    view, target = from_paged(pool.blocks, "BLPTHD"), from_paged(pool.copies, "BLPTHD")
    device, ids, size = pool.blocks.device, pool.ids, pool.num_bytes
    digests = torch.zeros(ids.size, dtype=torch.int64, device=device)
    yield _Way("digest", "dynamo-kv digest_blocks (reads only)", size, partial(digest_blocks, view, ids, digests))
    both = partial(copy_blocks_digest, view, ids, target, pool.consecutive, digests)
    yield _Way("copy and digest", "dynamo-kv copy_blocks_digest", size, both)
    yield _Way("RoPE shift of K, V copied", "dynamo-kv rope_shift", size, partial(_shift, pool))
    # Every second block is used: as many move as lie behind the middle, a quarter of the pool.
    moves = plan_compaction(np.arange(ids.size) % 2 == 0)
    moved = moves.shape[0] * (size // ids.size)
    yield _Way("compact a half-full pool, moved bytes", "dynamo-kv compact", moved, partial(compact, view, moves))


def _over_the_bus(pool: Pool, timer: Timer, repeats: int) -> Findings:
    """Offload and onboard in one kernel each, quantised, against one large copy of the unquantised bytes."""
    host = cuda_driver().pinned_buffer_new(pool.num_bytes).fill_(0)
    rows, ids, consecutive = from_paged(pool.blocks, "BLPTHD"), pool.ids, pool.consecutive
    plain, count = pool.copies.view(torch.uint8).view(-1), pool.ids.size
    for dtype in _FORMATS:
        layout = pool.layout(dtype)
        slots = layout.view(host[: count * layout.block_bytes].view(count, layout.block_bytes))
        out = partial(quantize_blocks, rows, ids, slots, consecutive)
        back = partial(dequantize_blocks, slots, consecutive, rows, ids)
        for case, action, source, target in (("offload", out, plain, host), ("onboard", back, host, plain)):
            ceiling = partial(target.copy_, source, non_blocking=True)
            speed = paired(timer, action, ceiling, pool.num_bytes, repeats)
            yield from speed_results(f"{case} as {dtype}", "dynamo-kv zero-copy", speed, repeats)


def exactness(workload: Workload) -> Findings:
    """The same blocks through the same functions on both devices: bytes that differ."""
    device = torch.device(workload.device)
    pools = [Pool.make(8 << 20, where) for where in (torch.device("cpu"), device)]
    for dtype in _FORMATS:
        codes, restored = zip(*(_there_and_back(pool, dtype) for pool in pools), strict=True)
        for case, (ours, theirs) in ((f"{dtype} codes and scales", codes), (f"{dtype} restored", restored)):
            yield _differences(case, ours, theirs)
    digests = [_digests(pool) for pool in pools]
    yield _differences("digests", *digests)
    shifted = [_shifted(pool) for pool in pools]
    yield _differences("RoPE-shifted K", *shifted)
    if device.type == "cuda":
        plain = pools[0].blocks.float().clamp(-448, 448)
        on_gpu = plain.to(device).to(torch.float8_e4m3fn).view(torch.uint8).cpu()
        yield _differences(
            "torch's own bfloat16 to float8_e4m3fn", plain.to(torch.float8_e4m3fn).view(torch.uint8), on_gpu
        )
    yield "exactness: bytes that differ between the CPU's and the GPU's result; 0 is what our kernels promise"


def _there_and_back(pool: Pool, dtype: str) -> tuple[Tensor, Tensor]:
    layout = pool.layout(dtype)
    memory = torch.zeros(pool.ids.size, layout.block_bytes, dtype=torch.uint8, device=pool.blocks.device)
    slots, restored = layout.view(memory), torch.zeros_like(pool.blocks)
    quantize_blocks(from_paged(pool.blocks, "BLPTHD"), pool.ids, slots, pool.consecutive)
    dequantize_blocks(slots, pool.consecutive, from_paged(restored, "BLPTHD"), pool.ids)
    return memory.cpu(), restored.view(torch.uint8).cpu()


def _digests(pool: Pool) -> Tensor:
    digests = torch.zeros(pool.ids.size, dtype=torch.int64, device=pool.blocks.device)
    digest_blocks(from_paged(pool.blocks, "BLPTHD"), pool.ids, digests)
    return digests.view(torch.uint8).cpu()


def _shifted(pool: Pool) -> Tensor:
    _shift(pool)
    return pool.copies.view(torch.uint8).cpu()


def _shift(pool: Pool) -> None:
    rope_shift(
        from_paged(pool.blocks, "BLPTHD"),
        pool.ids,
        from_paged(pool.copies, "BLPTHD"),
        pool.consecutive,
        deltas=np.full(pool.ids.size, _SHIFT, dtype=np.int64),
        rope=Rope.of_theta(_DIM, _THETA),
        elements=torch.bfloat16,
    )


def _differences(case: str, ours: Tensor, theirs: Tensor) -> Result:
    different = int((ours != theirs).sum())
    return Result(
        case=f"CPU and GPU, {case}",
        subject=f"{ours.numel():,} bytes",
        metric="different",
        value=float(different),
        unit="bytes",
    )
