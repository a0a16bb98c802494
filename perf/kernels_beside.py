"""Kernel benchmark, interference: what a copy costs a matmul that runs beside it, and the copy gets meanwhile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.copy_engine import copy_pieces
from dynamo.kernels.cuda_runtime import cuda_driver
from dynamo.kernels.driver import CudaDriver
from dynamo.kernels.staged import Staging
from dynamo.kernels.view import View
from dynamo.perf.harness import median
from dynamo.perf.kernels_layouts import LayoutCase, conversions
from dynamo.perf.kernels_measure import new_event, new_stream
from dynamo.perf.kernels_peers import PointerList
from dynamo.perf.kernels_pinned import Crossing, crossings
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.report import Result

__all__ = ["beside_matmul"]

_SIDE = 8192  # of the square matrices: fills every SM
_MATMULS = 40
_MARGIN = 1.3  # copies are queued for so much longer than the matmuls take
_HEADS = (1, 8)  # pieces of 4 and 32 KiB
_SMALL_MIB = 128

Way = tuple[str, Callable[[torch.cuda.Stream], object]]
Sides = tuple[View, npt.NDArray[np.int64], View, npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class _Beside:
    """Times of one concurrent run, in seconds."""

    matmuls: float
    copies: float


class _Matmuls:
    """A queue of bfloat16 matmuls on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._a, self._b, self._out = (torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16) for _ in range(3))

    def run(self) -> None:
        for _ in range(_MATMULS):
            torch.mm(self._a, self._b, out=self._out)


def beside_matmul(workload: Workload) -> Findings:
    """Every way of copying, over the bus and within the GPU, on a stream beside the matmul's."""
    driver, device = cuda_driver(), torch.device(workload.device)
    num_bytes = min(workload.mib, _SMALL_MIB) << 20
    matmuls = _Matmuls(device)
    with Staging(driver, num_bytes=64 << 20) as staging:
        cases: list[tuple[str, int, list[Way]]] = []
        for num_heads in _HEADS:
            for crossing in crossings(num_heads, num_bytes, device, driver):
                ways = list(_crossing_ways(crossing, driver, staging, device))
                cases.append((crossing.name, crossing.num_bytes, ways))
        inside = next(iter(conversions(256, num_bytes, device)))
        cases.append((f"within the GPU, {inside.name}", inside.num_bytes, list(_inside_ways(inside))))
        for name, size, ways in cases:
            for subject, copy in ways:
                yield from _measure(f"{name}, beside a matmul", subject, copy, size, matmuls, workload.repeats)
    yield f"beside a matmul: bfloat16, {_SIDE} cubed; copies run for the whole of it; payload is what they get meanwhile"


def _crossing_ways(crossing: Crossing, driver: CudaDriver, staging: Staging, device: torch.device) -> Iterator[Way]:
    sides = crossing.src, crossing.src_ids, crossing.dst, crossing.dst_ids
    for programs in (1, 2, 4, 8, 16):
        yield f"dynamo-kv zero-copy, {programs} SMs", partial(_copy, sides, programs)
    pieces = crossing.pieces()
    yield "dynamo-kv copy engine", lambda s: copy_pieces(pieces, driver, s.cuda_stream)
    stage = staging.offload if crossing.to_host else staging.onboard
    for budget in (4, 16):
        yield f"dynamo-kv staged, {budget} SMs", partial(_stage, stage, sides, budget)
    listed = PointerList(pieces.src, pieces.dst, pieces.sizes, device)
    yield "vLLM's way: pointer list, 8 B accesses, 12 SMs", partial(_on, listed.run)


def _inside_ways(case: LayoutCase) -> Iterator[Way]:
    sides = case.src, case.src_ids, case.dst, case.dst_ids
    for budget in (2, 8, 32):
        yield f"dynamo-kv copy_blocks, {budget} SMs", partial(_copy, sides, budget)
    yield "dynamo-kv copy_blocks, all SMs", partial(_copy, sides, None)
    for other in case.others:
        yield other.name, partial(_on, other.run)


def _copy(sides: Sides, sm_budget: int | None, stream: torch.cuda.Stream) -> None:
    copy_blocks(*sides, sm_budget=sm_budget, stream=stream)


def _stage(stage: Callable[..., None], sides: Sides, sm_budget: int, stream: torch.cuda.Stream) -> None:
    stage(*sides, stream.cuda_stream, sm_budget=sm_budget)


def _on(action: Callable[[], object], stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        action()


def _measure(
    case: str,
    subject: str,
    copy: Callable[[torch.cuda.Stream], object],
    num_bytes: int,
    matmuls: _Matmuls,
    repeats: int,
) -> Findings:
    side = new_stream(torch.device("cuda", torch.cuda.current_device()))
    copy(side)
    matmuls.run()
    torch.cuda.synchronize()
    alone = _alone(matmuls)
    once = _seconds(side, lambda: [copy(side) for _ in range(4)]) / 4
    count = max(2, int(_MARGIN * alone / once) + 1)
    runs = [_together(matmuls, side, lambda: [copy(side) for _ in range(count)]) for _ in range(repeats)]
    slower = 100 * (median([run.matmuls for run in runs]) / alone - 1)
    # The last copies may run after the matmuls have ended and are then faster; the margin keeps that share small.
    payload = count * num_bytes / median([run.copies for run in runs]) / 1e9
    for metric, value, unit in (("payload", payload, "GB/s"), ("matmul slower by", slower, "%")):
        yield Result(case=case, subject=subject, metric=metric, value=value, unit=unit, samples=repeats)


def _alone(matmuls: _Matmuls) -> float:
    return median([_seconds(torch.cuda.current_stream(), matmuls.run) for _ in range(5)])


def _seconds(stream: torch.cuda.Stream, action: Callable[[], object]) -> float:
    start, end = new_event(), new_event()
    start.record(stream)
    action()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _together(matmuls: _Matmuls, side: torch.cuda.Stream, copies: Callable[[], object]) -> _Beside:
    """Queues matmuls on the current stream and then, which takes the host longer, copies on `side`."""
    main = torch.cuda.current_stream()
    events = [new_event() for _ in range(4)]
    torch.cuda.synchronize()
    events[2].record(main)
    matmuls.run()
    events[3].record(main)
    events[0].record(side)
    copies()
    events[1].record(side)
    torch.cuda.synchronize()
    return _Beside(
        matmuls=float(events[2].elapsed_time(events[3])) / 1000, copies=float(events[0].elapsed_time(events[1])) / 1000
    )
