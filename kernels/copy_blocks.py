"""Copies blocks between any two layouts: gather, scatter and conversion, on the GPU, over pinned host memory, or on the CPU.

On CUDA one Triton kernel does all of it (`copy_blocks_kernel`); a side in pinned host memory is read or written in place,
over the bus, by few programs with much in flight. On the CPU numpy moves rows (`host_blocks`). The layouts decide nothing
but numbers: `copy_plan` reduces them to tables, axes and rows, and here those become a grid and compile-time constants.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.checks import KernelArgumentError, SlotIds
from dynamo.kernels.copy_plan import Axis, CopyPlan, plan_copy
from dynamo.kernels.cuda_runtime import cuda_driver
from dynamo.kernels.host_blocks import copy_on_host
from dynamo.kernels.kernel_call import Occupancy, Target
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.pairing import Range
from dynamo.kernels.pinned import seen_from_device
from dynamo.kernels.view import View

if TYPE_CHECKING:
    from dynamo.kernels.aot import Specialization

__all__ = ["KernelLaunch", "copy_blocks", "kernel_launch", "specializations"]

MAX_WARPS = 8
WARP_THREADS = 32
ACCESSES_PER_THREAD = 8  # of 16 bytes: a tile of 32 KiB and 64 registers; twice as many spill once pipelined
IN_FLIGHT_BYTES = 64 << 10  # per program; two of them cover the round trip over PCIe Gen5
MAX_STAGES = 8
OCCUPANCY = Occupancy(per_sm=2, over_bus=4)  # over the bus 256 KiB in flight
MAX_TILES = MAX_PIECE_BYTES = 2**31 - 1
MAX_REGISTERS = 112


@dataclass(frozen=True, slots=True, eq=False)
class KernelLaunch:
    """One launch of `copy_blocks_kernel`.

    Attributes:
        tables: int64, the addresses of both sides; one after the other in one buffer that the GPU can read.
        arguments: run-time integers by name.
        constants: constexpr arguments by name; `WORD` is left out and follows from `ALIGNMENT`.
    """

    tables: tuple[npt.NDArray[np.int64], ...]
    arguments: Mapping[str, int]
    constants: Mapping[str, int | bool]
    num_warps: int

    @property
    def num_tiles(self) -> int:
        return self.arguments["num_tiles"]


def copy_blocks(
    src: View,
    src_ids: SlotIds,
    dst: View,
    dst_ids: SlotIds,
    *,
    layers: Range | None = None,
    heads: Range | None = None,
    sm_budget: int | None = None,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Copies blocks `src_ids` of one view to blocks `dst_ids` of another, whatever the layouts.

    Both views hold as many planes and rows as wide. Blocks may differ in tokens: the two lists then name the same tokens
    in the same order, so n blocks of 32 tokens pair up with 2 n blocks of 16. Sources may repeat.

    On the CPU this blocks until done, on the calling thread and, when large, with the helpers of `host_threads`. With a
    CUDA side it only submits: views and their memory must stay until the stream has passed this copy, and nothing waits for
    the GPU. A CPU side must then be pinned or registered.

    Args:
        src: view read.
        src_ids: int64 [n], blocks of `src`.
        dst: view written; shares no memory with what is read.
        dst_ids: int64 [m], distinct blocks of `dst`.
        layers: half-open range of layers to copy, on the sides that have more layers than that; None for all.
        heads: half-open range of heads to copy, on the sides that have more heads than that; None for all. Both ways of
            tensor-parallel re-sharding: a rank's heads out of wider blocks, and into them.
        sm_budget: most programs to run at a time, each on an SM of its own; None for as many as are useful.
        stream: stream to submit to; None for the current one.

    Raises:
        KernelArgumentError: layouts, ids, memory or devices do not fit; nothing was copied.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged, stored
    >>> paged = [torch.randn(2, 8, 16, 4, 64) for _ in range(3)]  # per layer: K and V, block, token, head, dim
    >>> slots = torch.zeros(5, 3 * 2 * 16 * 4 * 64 * 4, dtype=torch.uint8)
    >>> pool = from_paged(paged, "PBTHD")
    >>> store = stored(slots, num_layers=3, num_tokens=16, num_heads=4, row_bytes=256, head_groups=2)
    >>> copy_blocks(pool, np.array([6, 1]), store, np.array([0, 3]))
    >>> block = slots[3].view(torch.float32).view(2, 3, 2, 16, 2, 64)  # head group, layer, K and V, token, head, dim
    >>> bool((block[1, 2, 0] == paged[2][0, 1, :, 2:]).all())
    True
    """
    target = Target.of(src, dst, sm_budget=sm_budget, stream=stream, occupancy=OCCUPANCY)
    if not target.is_gpu:
        copy_on_host(plan_copy(src, src_ids, dst, dst_ids, layers=layers, heads=heads))
        return
    host_side = "src" if src.device.type == "cpu" else "dst"
    src, dst = (view if view.device == target.device else seen_from_device(view, cuda_driver()) for view in (src, dst))
    plan = plan_copy(src, src_ids, dst, dst_ids, layers=layers, heads=heads)
    if plan.num_bytes == 0:
        return
    launch = kernel_launch(plan, host_side)
    with target.active():
        _submit(launch, target.device, target.max_programs)


def kernel_launch(plan: CopyPlan, ordered_by: str) -> KernelLaunch:
    """Tables and constants for a plan that moves at least one byte.

    Args:
        plan: what to copy.
        ordered_by: "src" or "dst", whose memory order the tiles follow; the host's, whose bus rewards long runs.

    Raises:
        KernelArgumentError: more than 2^31 - 1 tiles, or contiguous runs as long.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.copy_plan import plan_copy
    >>> from dynamo.kernels.layouts import from_paged
    >>> nhd = from_paged(torch.zeros(4, 2, 16, 8, 128, dtype=torch.bfloat16), "BPTHD")
    >>> hnd = from_paged(torch.zeros(4, 2, 8, 16, 128, dtype=torch.bfloat16), "BPHTD")
    >>> launch = kernel_launch(plan_copy(nhd, np.array([0, 2]), hnd, np.array([1, 3])), "dst")
    >>> launch.num_tiles, launch.constants["ALIGNMENT"], launch.constants["STAGES"]
    (4, 16, 3)
    """
    plan = plan.ordered_by(ordered_by)
    bases = plan.dst_bases if ordered_by == "dst" else plan.src_bases
    offsets = plan.dst_offsets if ordered_by == "dst" else plan.src_offsets
    plan = _within_reach(plan)
    alignment = plan.alignment
    word_bytes = 4 if alignment == 16 else alignment
    piece_words = plan.row_bytes * plan.rows_per_pair // word_bytes
    tile_words = _tile_words(piece_words, alignment, word_bytes)
    num_tiles = plan.num_pairs * plan.num_bases * -(-piece_words // tile_words)
    if num_tiles > MAX_TILES:
        raise KernelArgumentError(f"{num_tiles} tiles are more than one launch takes; copy fewer blocks at a time")
    outer, inner = (*(Axis(1, 0, 0),) * (2 - len(plan.axes)), *plan.axes)
    accesses = tile_words * word_bytes // alignment
    return KernelLaunch(
        tables=(plan.src_offsets, plan.dst_offsets, plan.src_bases, plan.dst_bases),
        arguments={"num_pairs": plan.num_pairs, "num_bases": plan.num_bases, "num_tiles": num_tiles},
        constants={
            "NUM_INNER": inner.count,
            "ROW_WORDS": plan.row_bytes // word_bytes,
            "PIECE_WORDS": piece_words,
            "SRC_OUTER_STRIDE": outer.src_stride // word_bytes,
            "SRC_INNER_STRIDE": inner.src_stride // word_bytes,
            "DST_OUTER_STRIDE": outer.dst_stride // word_bytes,
            "DST_INNER_STRIDE": inner.dst_stride // word_bytes,
            "ALIGNMENT": alignment,
            "TILE_WORDS": tile_words,
            "BASES_OUTERMOST": bases.size > 1 and offsets.size > 1 and _spacing(bases) > _spacing(offsets),
            "STAGES": min(MAX_STAGES, max(2, 1 + IN_FLIGHT_BYTES // (tile_words * word_bytes))),
        },
        num_warps=max(1, min(MAX_WARPS, accesses // WARP_THREADS)),
    )


def specializations() -> "Iterator[Specialization]":
    """What `copy_blocks` compiles for the layouts that engines use, for the ahead-of-time check.

    >>> import importlib.util
    >>> names = [s.name for s in specializations()] if importlib.util.find_spec("triton") else ["copy_blocks"]
    >>> all(name.startswith("copy_blocks") for name in names)
    True
    """
    from dynamo.kernels.aot import Specialization
    from dynamo.kernels.copy_blocks_kernel import copy_blocks_kernel

    ids = np.array([0, 2], dtype=np.int64)
    for name, src, dst in _listed_conversions():
        launch = kernel_launch(plan_copy(src, ids, dst, ids), "dst")
        stages = int(launch.constants["STAGES"])
        # Past a piece's end the compiler drops accesses altogether.
        tile_bytes = min(_word_bytes(launch) * int(launch.constants[n]) for n in ("TILE_WORDS", "PIECE_WORDS"))
        yield Specialization(
            name=f"copy_blocks {name}",
            kernel=copy_blocks_kernel,
            signature={"table_ptr": "*i64"} | dict.fromkeys(launch.arguments, "i32"),
            constexprs=_kernel_constants(launch),
            divisible_by_16=("table_ptr",),
            num_warps=launch.num_warps,
            num_stages=stages,
            max_registers=MAX_REGISTERS,
            loaded_bytes=tile_bytes,
            stored_bytes=tile_bytes,
            narrow_loads=8 * stages,  # four table entries, prefetched for every stage of tiles and once ahead of them
        )


def _submit(launch: KernelLaunch, device: torch.device, max_programs: int) -> None:
    from dynamo.kernels.copy_blocks_kernel import copy_blocks_kernel

    # Both buffers come from torch's caching allocators, which keep them until the stream has passed.
    pinned = torch.empty(sum(table.size for table in launch.tables), dtype=torch.int64, pin_memory=True)
    np.concatenate(launch.tables, out=pinned.numpy())
    table = pinned.to(device, non_blocking=True)
    grid = (min(launch.num_tiles, max_programs),)
    # Triton warns unless told about fusion, of which a copy has none.
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    copy_blocks_kernel[grid](table, **launch.arguments, **_kernel_constants(launch), **options)


def _kernel_constants(launch: KernelLaunch) -> dict[str, Any]:
    from dynamo.kernels.copy_blocks_kernel import WORD_TYPES

    return {**launch.constants, "WORD": WORD_TYPES[launch.constants["ALIGNMENT"]]}


def _within_reach(plan: CopyPlan) -> CopyPlan:
    """The plan with as many axes, two at most, as keep positions within a piece below 2^31 bytes."""
    for num_axes in (2, 1, 0):
        tiled = plan.with_axes(num_axes)
        for strides in ([axis.src_stride for axis in tiled.axes], [axis.dst_stride for axis in tiled.axes]):
            spans = ((axis.count - 1) * stride for axis, stride in zip(tiled.axes, strides, strict=True))
            if sum(spans) + tiled.row_bytes > MAX_PIECE_BYTES:
                break
        else:
            return tiled
    raise KernelArgumentError(
        f"contiguous runs of {plan.row_bytes} bytes are more than the {MAX_PIECE_BYTES} supported"
    )


def _tile_words(piece_words: int, alignment: int, word_bytes: int) -> int:
    """Power of two: the largest tile, unless the piece is smaller or most of its last tile would be empty."""
    vector = alignment // word_bytes
    largest, smallest = ACCESSES_PER_THREAD * MAX_WARPS * WARP_THREADS * vector, WARP_THREADS * vector
    if piece_words <= largest:
        return max(smallest, 1 << (piece_words - 1).bit_length())
    sizes = (largest, largest // 2, largest // 4)
    return next((size for size in sizes if -piece_words % size <= piece_words // 8), sizes[-1])


def _word_bytes(launch: KernelLaunch) -> int:
    alignment = int(launch.constants["ALIGNMENT"])
    return 4 if alignment == 16 else alignment


def _spacing(numbers: npt.NDArray[np.int64]) -> float:
    return float(np.ptp(numbers)) / (numbers.size - 1)


def _listed_conversions() -> Iterator[tuple[str, View, View]]:
    """(name, source, destination) of every conversion whose machine code is checked."""

    def paged(axes: str, *shape: int) -> View:
        return from_paged(torch.empty(shape, dtype=torch.uint8), axes)

    def slots(num_heads: int, row_bytes: int, num_planes: int = 2, head_groups: int = 1) -> View:
        block_bytes = 2 * num_planes * 16 * num_heads * row_bytes
        buffer = torch.empty(3, block_bytes, dtype=torch.uint8)
        return stored(
            buffer,
            num_layers=2,
            num_planes=num_planes,
            num_tokens=16,
            num_heads=num_heads,
            row_bytes=row_bytes,
            head_groups=head_groups,
        )

    for row in (64, 128, 160, 256):
        yield f"NHD to HND, {row} B rows", paged("LPBTHD", 2, 2, 3, 16, 8, row), paged("LPBHTD", 2, 2, 3, 8, 16, row)
    yield "HND to NHD, 256 B rows", paged("LPBHTD", 2, 2, 3, 8, 16, 256), paged("LPBTHD", 2, 2, 3, 16, 8, 256)
    yield "split to fused, contiguous", paged("LPBTHD", 2, 2, 3, 16, 8, 256), slots(8, 256)
    yield "fused to split, contiguous", slots(8, 256), paged("LPBTHD", 2, 2, 3, 16, 8, 256)
    yield "interleaved K and V to stored", paged("LBTHPD", 2, 3, 16, 8, 2, 256), slots(8, 256)
    for row in (656, 1152):
        padded = from_paged(torch.empty(2, 3, 16, row + 48, dtype=torch.uint8)[..., :row], "LBTD")
        yield f"MLA, {row} B rows, padded to packed", padded, slots(1, row, 1)
    yield "TP 1 head of 8", paged("LPBTHD", 2, 2, 3, 16, 8, 256).slice_heads(3, 4), slots(1, 256)
    yield "TP 1 head of 8 into wider blocks", slots(1, 256), paged("LPBTHD", 2, 2, 3, 16, 8, 256).slice_heads(3, 4)
    yield "NHD to 8 head groups", paged("LPBTHD", 2, 2, 3, 16, 8, 256), slots(8, 256, head_groups=8)
