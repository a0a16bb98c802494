"""Kernel benchmark, over the bus: zero-copy kernels, copy engine and staging between pinned host memory and a GPU."""

import dataclasses
import mmap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamo.kernels.calibrate import calibrate
from dynamo.kernels.calibration import Calibration, Direction, Route
from dynamo.kernels.copy_blocks import copy_blocks, kernel_launch
from dynamo.kernels.copy_engine import copy_pieces
from dynamo.kernels.copy_plan import plan_copy
from dynamo.kernels.cuda_runtime import cuda_driver
from dynamo.kernels.driver import AccessOrder, CudaDriver
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.pieces import Pieces
from dynamo.kernels.plan import Submission, plan, run
from dynamo.kernels.runs import find_runs
from dynamo.kernels.staged import Staging
from dynamo.kernels.view import View
from dynamo.perf.harness import median
from dynamo.perf.kernels_layouts import shuffled
from dynamo.perf.kernels_measure import choose_timer, new_stream, paired, speed_results
from dynamo.perf.kernels_peers import PointerList, copy_one_by_one
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.report import Result

__all__ = [
    "Crossing",
    "batch_cap",
    "batched_copies",
    "crossings",
    "page_sizes",
    "pinned_copies",
    "pipeline_depths",
    "ways",
    "zero_copy",
]

_ROW_BYTES, _TOKENS, _LAYERS = 256, 16, 4
_HEADS = (1, 4, 8, 16, 64)  # pieces of 4, 16, 32, 64 and 256 KiB: one layer's K or V of a block
_COUNTS = (16, 128)  # blocks: 256 and 2,048 tokens of a prompt
_PROGRAMS = (1, 2, 4, 8, 16)
_SMALL_MIB = 256  # of host memory; pinning more takes seconds
_STAGING_BYTES = 64 << 20
_MOST_SINGLE_CALLS = 20_000  # at some µs each, more says nothing new

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Crossing:
    """Blocks between a paged pool on the GPU and consecutive slots in pinned host memory.

    Attributes:
        large: one plain copy of the same bytes in the same direction, on torch's current stream.
    """

    name: str
    to_host: bool
    src: View
    src_ids: Ids
    dst: View
    dst_ids: Ids
    num_bytes: int
    large: Callable[[], object]

    @property
    def host_side(self) -> str:
        return "dst" if self.to_host else "src"

    def pieces(self) -> Pieces:
        """The copy as a list, in the host's order."""
        return find_runs(self.src, self.src_ids, self.dst, self.dst_ids, order_by=self.host_side).expand()


def crossings(num_heads: int, num_bytes: int, device: torch.device, driver: CudaDriver) -> Iterator[Crossing]:
    """Both directions of an NHD pool of `num_heads` heads of 256 B, block size 16, one tensor per layer."""
    block_bytes = _block_bytes(num_heads)
    count = max(2, num_bytes // block_bytes)
    layer_shape = (2, count, _TOKENS, num_heads, _ROW_BYTES)
    index = _index(device)
    buffers = [driver.device_buffer_new(count * block_bytes // _LAYERS, index).fill_(1) for _ in range(_LAYERS)]
    layers = [buffer.view(layer_shape) for buffer in buffers]
    host = driver.pinned_buffer_new(count * block_bytes).fill_(1)
    plain = driver.device_buffer_new(count * block_bytes, index).fill_(1)
    pool = from_paged(layers, "PBTHD")
    slots = stored(
        host.view(count, block_bytes), num_layers=_LAYERS, num_tokens=_TOKENS, num_heads=num_heads, row_bytes=_ROW_BYTES
    )
    order, consecutive = shuffled(count), np.arange(count, dtype=np.int64)
    name = f"{count:,} blocks in pieces of {_TOKENS * num_heads * _ROW_BYTES // 1024} KiB"
    yield Crossing(
        f"GPU to host, {name}", True, pool, order, slots, consecutive, host.numel(),
        _large(driver, plain, host),
    )  # fmt: skip
    yield Crossing(
        f"host to GPU, {name}", False, slots, consecutive, pool, order, host.numel(),
        _large(driver, host, plain),
    )  # fmt: skip


def pinned_copies(workload: Workload) -> Findings:
    """Every path and the peers, by size of the pieces; first what calibration finds, since plans follow it."""
    driver, device = cuda_driver(), torch.device(workload.device)
    calibration = calibrate(driver, refresh=True)
    yield from _calibrated(calibration)
    num_bytes = min(workload.mib, _SMALL_MIB) << 20
    with torch.cuda.stream(new_stream(device)), Staging(driver, num_bytes=_STAGING_BYTES) as staging:
        timer = choose_timer(device)
        sizes = [(num_heads, num_bytes) for num_heads in _HEADS]
        sizes += [(8, count * _block_bytes(8)) for count in _COUNTS]
        for num_heads, size in sizes:
            for crossing in crossings(num_heads, min(size, num_bytes), device, driver):
                for name, action in (
                    *ways(crossing, driver, staging, device),
                    _planned(crossing, driver, staging, calibration, device),
                ):
                    speed = paired(timer, action, crossing.large, crossing.num_bytes, workload.repeats)
                    yield from speed_results(crossing.name, name, speed, workload.repeats)
    yield "over the bus: the ceiling is one large cudaMemcpyAsync of as many bytes in the same direction"


def pipeline_depths(workload: Workload) -> Findings:
    """Zero-copy by tile, stages and programs: how many bytes in flight the bus wants."""
    from triton.errors import TritonError

    driver, device = cuda_driver(), torch.device(workload.device)
    num_bytes = min(workload.mib, _SMALL_MIB) << 20
    with torch.cuda.stream(new_stream(device)):
        timer = choose_timer(device)
        for crossing in crossings(8, num_bytes, device, driver):
            for tile_kib, stages, programs in product((16, 32), (2, 3, 5), (1, 2, 4, 8)):
                name = f"{tile_kib} KiB tile, {stages} stages, {programs} programs"
                try:
                    action = zero_copy(crossing, device, tile_kib << 10, stages, programs)
                    speed = paired(timer, action, crossing.large, crossing.num_bytes, workload.repeats)
                except (RuntimeError, TritonError) as error:  # such as for more shared memory than there is
                    yield f"{crossing.name}, {name}: {str(error).splitlines()[0]}"
                    continue
                yield from speed_results(crossing.name, name, speed, workload.repeats)


def batched_copies(workload: Workload) -> Findings:
    """cudaMemcpyBatchAsync over size and number of pieces: speed, and what submitting costs the host."""
    driver, device = cuda_driver(), torch.device(workload.device)
    num_bytes = min(workload.mib, _SMALL_MIB) << 20
    host = driver.pinned_buffer_new(num_bytes).fill_(1)
    gpu = driver.device_buffer_new(host.numel(), _index(device)).fill_(1)
    with torch.cuda.stream(new_stream(device)):
        timer = choose_timer(device)
        for to_host, size_kib, count in product((True, False), (4, 16, 32, 64, 256), (16, 256, 4096, 16384)):
            size = size_kib << 10
            if 2 * size * count > num_bytes:
                continue
            pieces = _apart(gpu, host, size, count) if to_host else _apart(host, gpu, size, count)
            source, target = (gpu, host) if to_host else (host, gpu)
            large = _large(driver, source[: size * count], target[: size * count])
            submit_us: list[float] = []

            def action(pieces: Pieces = pieces, submit_us: list[float] = submit_us) -> None:
                started = time.perf_counter_ns()
                copy_pieces(pieces, driver, torch.cuda.current_stream(device).cuda_stream)
                submit_us.append((time.perf_counter_ns() - started) / 1000)

            case = f"{'GPU to host' if to_host else 'host to GPU'}, {size_kib} KiB pieces"
            subject = f"copy engine, {count:,} pieces"
            speed = paired(timer, action, large, size * count, workload.repeats)
            yield from speed_results(case, subject, speed, workload.repeats)
            yield _plain(case, subject, "submit", median(submit_us[-workload.repeats :]), "µs", workload.repeats)


def page_sizes(workload: Workload) -> Findings:
    """Pinned memory backed by 4 KiB and by 2 MiB pages: one large copy and zero-copy, both ways."""
    driver, device = cuda_driver(), torch.device(workload.device)
    num_bytes = min(workload.mib, _SMALL_MIB) << 20
    advice = {
        "4 KiB pages": getattr(mmap, "MADV_NOHUGEPAGE", None),
        "2 MiB pages": getattr(mmap, "MADV_HUGEPAGE", None),
    }
    gpu = driver.device_buffer_new(num_bytes, _index(device)).fill_(1)
    count = num_bytes >> 16
    order, consecutive = shuffled(count), np.arange(count, dtype=np.int64)
    with torch.cuda.stream(new_stream(device)):
        timer = choose_timer(device)
        for name, hint in advice.items():
            if hint is None:
                yield f"{name}: this Python cannot ask for them"
                continue
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(hint)
            host = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8)).fill_(1)
            driver.host_register(host.data_ptr(), num_bytes)
            views = from_paged(host.view(count, -1), "BD"), from_paged(gpu.view(count, -1), "BD")
            for to_host in (True, False):
                ends = (gpu, host) if to_host else (host, gpu)
                src, dst = (views[1], views[0]) if to_host else views
                ways: dict[str, Callable[[], object]] = {
                    "one large copy": _large(driver, *ends),
                    "zero-copy, 64 KiB pieces": partial(copy_blocks, src, order, dst, consecutive),
                }
                for way, action in ways.items():
                    timer.prepare(action)
                    seconds = median([timer.seconds(action) for _ in range(workload.repeats)])
                    case = f"{way}, {'GPU to host' if to_host else 'host to GPU'}"
                    yield _plain(case, name, "payload", num_bytes / seconds / 1e9, "GB/s", workload.repeats)
            torch.cuda.synchronize(device)
            driver.host_unregister(host.data_ptr())


def batch_cap(workload: Workload) -> Findings:
    """Lists longer than our cap in one call, which some drivers hang on; each length is reported before the next is tried."""
    driver, device = cuda_driver(), torch.device(workload.device)
    size, most = 4096, 65_536
    host = driver.pinned_buffer_new(2 * size * most).fill_(1)
    gpu = driver.device_buffer_new(host.numel(), _index(device)).fill_(1)
    with torch.cuda.stream(new_stream(device)):
        timer = choose_timer(device)
        handle = torch.cuda.current_stream(device).cuda_stream
        for count in (4096, 16_384, 32_768, 49_152, most):
            pieces = _apart(host, gpu, size, count)

            def action(pieces: Pieces = pieces) -> None:
                driver.memcpy_batch_async(pieces.dst, pieces.src, pieces.sizes, AccessOrder.STREAM, handle)

            seconds = timer.seconds(action)
            subject = f"one call of {count:,} pieces"
            yield _plain("host to GPU, 4 KiB pieces", subject, "payload", size * count / seconds / 1e9, "GB/s", 1)


def ways(
    crossing: Crossing, driver: CudaDriver, staging: Staging, device: torch.device
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every way of making a crossing, by name, but for the planned one; queued on torch's current stream."""
    stream = torch.cuda.current_stream(device).cuda_stream
    sides = crossing.src, crossing.src_ids, crossing.dst, crossing.dst_ids
    for programs in _PROGRAMS:
        yield f"dynamo-kv zero-copy, {programs} SMs", partial(copy_blocks, *sides, sm_budget=programs)
    yield "dynamo-kv copy engine", lambda: copy_pieces(crossing.pieces(), driver, stream)
    stage = staging.offload if crossing.to_host else staging.onboard
    yield "dynamo-kv staged", lambda: stage(*sides, stream)
    pieces = crossing.pieces()
    listed = PointerList(pieces.src, pieces.dst, pieces.sizes, device)
    yield "vLLM's way: pointer list, 8 B accesses, 12 SMs", listed.run
    if pieces.num_pieces <= _MOST_SINGLE_CALLS:
        columns = pieces.src, pieces.dst, pieces.sizes
        yield "one cudaMemcpyAsync per piece", lambda: copy_one_by_one(driver, *columns, stream)


def _planned(
    crossing: Crossing, driver: CudaDriver, staging: Staging, calibration: Calibration, device: torch.device
) -> tuple[str, Callable[[], object]]:
    """What users call, planning included; how long that takes the host is a section of its own."""
    stream = torch.cuda.current_stream(device).cuda_stream
    sides = crossing.src, crossing.src_ids, crossing.dst, crossing.dst_ids
    planned = partial(plan, *sides, calibration=calibration, staging=staging, driver=driver)
    kept: list[Submission] = []  # until the timer has waited for the stream

    def action() -> None:
        kept[:] = [run(planned(), stream)]

    return f"dynamo-kv plan and run ({planned().route})", action


def _calibrated(calibration: Calibration) -> Findings:
    """Where the copy engine begins to win, which is what plans turn on."""
    counts = sorted({measurement.count for measurement in calibration.measurements})
    for direction, route in product((Direction.ONBOARD, Direction.OFFLOAD), (Route.KERNEL, Route.STAGED)):
        for count in counts:
            border = calibration.crossover(Route.COPY_ENGINE, route, direction, count)
            if border is not None:
                case, subject = f"calibration, {direction}", f"copy engine beats {route}, {count:,} pieces"
                yield _plain(case, subject, "from", border / 1024, "KiB", 3)
    yield f"calibration: {calibration.table()}"


def zero_copy(
    crossing: Crossing, device: torch.device, tile_bytes: int, stages: int, programs: int
) -> Callable[[], object]:
    """`copy_blocks`' kernel with constants of our choosing. Registered memory has the same address on both sides here."""
    from dynamo.kernels.copy_blocks_kernel import WORD_TYPES, copy_blocks_kernel

    plan = plan_copy(crossing.src, crossing.src_ids, crossing.dst, crossing.dst_ids)
    launch = kernel_launch(plan, crossing.host_side)
    alignment = int(launch.constants["ALIGNMENT"])
    words = tile_bytes // (4 if alignment == 16 else alignment)
    pieces = launch.num_tiles // -(-int(launch.constants["PIECE_WORDS"]) // int(launch.constants["TILE_WORDS"]))
    num_tiles = pieces * -(-int(launch.constants["PIECE_WORDS"]) // words)
    launch = dataclasses.replace(
        launch,
        arguments={**launch.arguments, "num_tiles": num_tiles},
        constants={**launch.constants, "TILE_WORDS": words, "STAGES": stages},
    )
    table = torch.from_numpy(np.concatenate(launch.tables)).to(device)
    constants = {**launch.constants, "WORD": WORD_TYPES[alignment]}

    def action() -> None:
        copy_blocks_kernel[(min(programs, num_tiles),)](
            table, **launch.arguments, **constants, num_warps=8, enable_fp_fusion=False
        )

    return action


def _block_bytes(num_heads: int) -> int:
    return _LAYERS * 2 * _TOKENS * num_heads * _ROW_BYTES


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device == torch.device("cuda") else device.index or 0


def _large(driver: CudaDriver, src: Tensor, dst: Tensor) -> Callable[[], None]:
    def copy() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        driver.memcpy_async(dst.data_ptr(), src.data_ptr(), src.numel(), stream)

    return copy


def _apart(src: Tensor, dst: Tensor, size: int, count: int) -> Pieces:
    """Pieces that cannot be merged: every other one of the source, in a shuffled order, to every other of the target."""
    sources, targets = shuffled(count) * (2 * size), np.arange(count, dtype=np.int64) * (2 * size)
    return Pieces.of(src.data_ptr() + sources, dst.data_ptr() + targets, np.full(count, size, dtype=np.int64))


def _plain(case: str, subject: str, metric: str, value: float, unit: str, repeats: int) -> Result:
    return Result(case=case, subject=subject, metric=metric, value=value, unit=unit, samples=repeats)
