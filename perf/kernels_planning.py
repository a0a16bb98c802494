"""Kernel benchmark, the host's part: planning and submitting many pieces, with a driver that only takes notes."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from dynamo.kernels.calibration import Route
from dynamo.kernels.copy_blocks import kernel_launch
from dynamo.kernels.copy_plan import plan_copy
from dynamo.kernels.fake_driver import FakeDriver
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.plan import plan, run
from dynamo.perf.harness import median, percentile, quiet_collector
from dynamo.perf.kernels_layouts import shuffled
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.report import Result

__all__ = ["planning"]

_LAYERS, _TOKENS, _ROW_BYTES = 32, 16, 64
_BLOCKS = (16, 128, 1024)  # of 64 pieces each: 1,024 to 65,536
_RUNS = 40


def planning(workload: Workload) -> Findings:
    """Onboarding shuffled blocks of 32 layers into a pool with a tensor per layer: pieces of one layer's K or V."""
    with quiet_collector():
        for num_blocks in _BLOCKS:
            yield from _onboard(num_blocks)
    yield (
        "planning: elapsed time of the calling thread, with a driver that copies nothing; the copy engine is given every "
        "piece, a kernel two tables"
    )


def _onboard(num_blocks: int) -> Findings:
    driver = FakeDriver(copies=False)
    piece = _TOKENS * _ROW_BYTES
    gpu = driver.device_buffer_new(num_blocks * _LAYERS * 2 * piece, 0)
    host = driver.pinned_buffer_new(num_blocks * _LAYERS * 2 * piece)
    layers = list(gpu.view(_LAYERS, 2, num_blocks, _TOKENS, 1, _ROW_BYTES))
    pool = from_paged(layers, "PBTHD")
    slots = stored(host.view(num_blocks, -1), num_layers=_LAYERS, num_tokens=_TOKENS, num_heads=1, row_bytes=_ROW_BYTES)
    sides = slots, np.arange(num_blocks, dtype=np.int64), pool, shuffled(num_blocks)
    stream = driver.stream_new(0)
    by_engine = partial(plan, *sides, driver=driver, route=Route.COPY_ENGINE, stable_source=True)
    ready = by_engine()
    actions: dict[str, Callable[[], object]] = {
        "copy engine, plan": by_engine,
        "copy engine, submit": lambda: run(ready, stream),
        "copy engine, plan and submit": lambda: run(by_engine(), stream),
        "kernel, plan": lambda: kernel_launch(plan_copy(*sides), "src"),
    }
    for subject, action in actions.items():
        times = []
        for _ in range(_RUNS):
            started = time.perf_counter_ns()
            action()
            times.append((time.perf_counter_ns() - started) / 1e6)
            driver.calls.clear()
        case = f"onboard {num_blocks * _LAYERS * 2:,} pieces"
        for metric, value in (("median", median(times)), ("90 %", percentile(times, 90))):
            yield Result(
                case=case, subject=f"dynamo-kv {subject}", metric=metric, value=value, unit="ms", samples=_RUNS
            )
