"""Kernel benchmark, the host's part: planning and submitting many pieces, with a driver that only takes notes."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from dynamo.kernels.calibration import Route
from dynamo.kernels.copy_blocks import kernel_launch
from dynamo.kernels.copy_plan import plan_copy
from dynamo.kernels.fake_driver import FakeDriver
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.plan import plan, run
from dynamo.kernels.staged import Staging
from dynamo.kernels.view import View
from dynamo.perf.harness import median, percentile, quiet_collector
from dynamo.perf.kernels_layouts import Ids, shuffled
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.report import Result

__all__ = ["planning"]

_LAYERS, _TOKENS, _ROW_BYTES = 32, 16, 64
_BLOCKS = (16, 128, 1024)  # of 64 pieces each: 1,024 to 65,536
_SINGLE_BLOCKS = 65_536  # of one piece each
_STAGING_BYTES = 128 << 20
_RUNS = 40
_SETTLING_BYTES = 24 << 20
"""The C library gives freed memory back, and pays for it anew in page faults, until a program has once freed something large,
as every server has by the time it copies. Without, plans of 65,536 single blocks take a millisecond more."""

Sides = tuple[View, Ids, View, Ids]
Actions = Mapping[str, Callable[[], object]]


def planning(workload: Workload) -> Findings:
    """Onboarding shuffled blocks: of 32 layers into a pool with a tensor per layer, and of one piece each.

    What the staged route is given differs in its blocks on the host side: they are a piece of its DMA each.
    """
    driver = FakeDriver(copies=False)
    np.empty(_SETTLING_BYTES, dtype=np.uint8)  # freed at once
    with quiet_collector():
        for num_blocks in _BLOCKS:
            sides = _layered(driver, num_blocks)
            yield from _measure(driver, f"{num_blocks * _LAYERS * 2:,} pieces", _actions(driver, sides))
        singles = _singles(driver)
        yield from _measure(driver, f"{_SINGLE_BLOCKS:,} single blocks", _actions(driver, singles))
    yield (
        "planning: processor time of the calling thread, with a driver that copies nothing; the copy engine is given every "
        "piece, a kernel two tables, staged copies every run of the host side. The process has freed 24 MiB before, so that "
        "malloc keeps what is freed"
    )


def _layered(driver: FakeDriver, num_blocks: int) -> Sides:
    """Consecutive slots of all layers, and a pool with a tensor per layer: a piece for each layer's K and V."""
    num_bytes = num_blocks * _LAYERS * 2 * _TOKENS * _ROW_BYTES
    gpu, host = driver.device_buffer_new(num_bytes, 0), driver.pinned_buffer_new(num_bytes)
    layers = list(gpu.view(_LAYERS, 2, num_blocks, _TOKENS, 1, _ROW_BYTES))
    pool = from_paged(layers, "PBTHD")
    slots = stored(host.view(num_blocks, -1), num_layers=_LAYERS, num_tokens=_TOKENS, num_heads=1, row_bytes=_ROW_BYTES)
    return slots, np.arange(num_blocks, dtype=np.int64), pool, shuffled(num_blocks)


def _singles(driver: FakeDriver) -> Sides:
    """Slots and blocks of one piece, shuffled on both sides so that none follows another."""
    num_bytes = _SINGLE_BLOCKS * _TOKENS * _ROW_BYTES
    gpu, host = driver.device_buffer_new(num_bytes, 0), driver.pinned_buffer_new(num_bytes)
    views = [from_paged(memory.view(_SINGLE_BLOCKS, _TOKENS, _ROW_BYTES), "BTD") for memory in (host, gpu)]
    order = shuffled(_SINGLE_BLOCKS)
    return views[0], order, views[1], np.roll(order, 1)


def _actions(driver: FakeDriver, sides: Sides) -> Actions:
    stream, staging = driver.stream_new(0), Staging(driver, num_bytes=_STAGING_BYTES)
    by_engine = partial(plan, *sides, driver=driver, route=Route.COPY_ENGINE, stable_source=True)
    staged = partial(plan, *sides, driver=driver, route=Route.STAGED, staging=staging)
    ready = by_engine()
    return {
        "copy engine, plan": by_engine,
        "copy engine, submit": lambda: run(ready, stream),
        "copy engine, plan and submit": lambda: run(by_engine(), stream),
        "staged, plan and submit": lambda: run(staged(), stream),
        "kernel, plan": lambda: kernel_launch(plan_copy(*sides), "src"),
    }


def _measure(driver: FakeDriver, case: str, actions: Actions) -> Findings:
    for subject, action in actions.items():
        times = []
        for _ in range(_RUNS):
            started = time.thread_time_ns()
            action()
            times.append((time.thread_time_ns() - started) / 1e6)
            driver.calls.clear()
        for metric, value in (("median", median(times)), ("90 %", percentile(times, 90))):
            yield Result(
                case=f"onboard {case}",
                subject=f"dynamo-kv {subject}",
                metric=metric,
                value=value,
                unit="ms",
                samples=_RUNS,
            )
