"""Measures every route in every direction over piece size and number of pieces, once per GPU and driver.

Each point is the best of a few runs, after one that is not counted, from the call that plans to the completion on the GPU:
a route that is slow to submit is slow. Pieces are scattered on the GPU and follow each other on the host, as blocks do.
Takes some seconds the first time, most of them for compiling kernels, and uses about 250 MiB of GPU and 64 MiB of pinned
host memory meanwhile.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dynamo.kernels.calibration import (
    Calibration,
    Direction,
    Measurement,
    Route,
    load_calibration,
    save_calibration,
)
from dynamo.kernels.checks import SlotIds
from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.copy_engine import copy_runs
from dynamo.kernels.driver import CudaDriver
from dynamo.kernels.layouts import from_paged
from dynamo.kernels.runs import find_runs
from dynamo.kernels.staged import Staging
from dynamo.kernels.view import View

__all__ = ["calibrate", "measure"]

logger = logging.getLogger(__name__)

RUN_BYTES = (512, 4 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 2 << 20)
COUNTS = (1, 64, 1024, 16384)
MAX_BYTES = 64 << 20
REPEATS = 3
TIMEOUT_S = 20.0

Submit = Callable[[int], None]
"""Queues one copy on a stream."""


def calibrate(driver: CudaDriver, *, device: int = 0, folder: Path | None = None, refresh: bool = False) -> Calibration:
    """The calibration of a GPU: from the cache where it is known, else measured and cached.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from dynamo.kernels.calibrate import calibrate
    >>> from dynamo.kernels.calibration import Calibration, save_calibration
    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> driver = FakeDriver()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_calibration(Calibration("Fake GPU 0", driver.driver_version, ()), Path(folder))
    ...     calibrate(driver, folder=Path(folder)).device  # found there, so nothing is measured
    'Fake GPU 0'

    Args:
        driver: the CUDA driver.
        device: index of the GPU.
        folder: of the cache; by default `dynamo-kv` below the user's cache folder. One that cannot be written is logged.
        refresh: measure although there is a cached calibration.

    Raises:
        CudaError: the GPU refuses a call.
        TimeoutError: a copy did not finish within 20 s.
    """
    name, version = driver.device_name(device), driver.driver_version
    found = None if refresh else load_calibration(name, version, folder)
    if found is not None:
        return found
    calibration = Calibration(name, version, tuple(measure(driver, device=device)))
    try:
        save_calibration(calibration, folder)
    except OSError as error:
        logger.warning("could not keep the calibration of %s, it is measured again next time: %s", name, error)
    return calibration


def measure(
    driver: CudaDriver,
    *,
    device: int = 0,
    run_bytes: Sequence[int] = RUN_BYTES,
    counts: Sequence[int] = COUNTS,
    max_bytes: int = MAX_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Measurement]:
    """Times every route in every direction, one point at a time.

    >>> from dynamo.kernels.calibrate import measure
    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> points = list(measure(FakeDriver(), run_bytes=[512, 4096], counts=[1, 8], max_bytes=32768))
    >>> len(points), {(p.run_bytes, p.count) for p in points} == {(512, 1), (512, 8), (4096, 1), (4096, 8)}
    (32, True)

    Args:
        driver: the CUDA driver.
        device: index of the GPU.
        run_bytes: bytes of a piece.
        counts: numbers of pieces.
        max_bytes: larger products of the two are left out.
        clock: seconds.

    Raises:
        CudaError: the GPU refuses a call.
        TimeoutError: a copy did not finish within 20 s.
    """
    host = driver.pinned_buffer_new(max_bytes)
    pools = driver.device_buffer_new(max_bytes, device), driver.device_buffer_new(max_bytes, device)
    stream, event = driver.stream_new(device), driver.event_new(device)
    try:
        with Staging(driver, device=device, num_bytes=max(2 * max(run_bytes), max_bytes // 2)) as staging:
            for size in run_bytes:
                for count in counts:
                    if size * count > max_bytes:
                        continue
                    for (route, direction), submit in _submits(driver, staging, host, pools, size, count):
                        seconds = _best(driver, submit, stream, event, clock)
                        yield Measurement(route, direction, size, count, seconds)
    finally:
        driver.event_destroy(event)
        driver.stream_destroy(stream)


def _submits(
    driver: CudaDriver,
    staging: Staging,
    host: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    size: int,
    count: int,
) -> Iterator[tuple[tuple[Route, Direction], Submit]]:
    on_host, gpu, other = (from_paged(memory[: size * count].view(count, size), "BD") for memory in (host, *pools))
    in_order = np.arange(count, dtype=np.int64)
    scattered = np.random.default_rng(0).permutation(count).astype(np.int64)
    copies = {
        Direction.ONBOARD: (on_host, in_order, gpu, scattered),
        Direction.OFFLOAD: (gpu, scattered, on_host, in_order),
        Direction.ON_DEVICE: (gpu, scattered, other, in_order),
    }
    for direction, copy in copies.items():
        yield (Route.COPY_ENGINE, direction), partial(_by_engine, driver, *copy, direction == Direction.ONBOARD)
        yield (Route.KERNEL, direction), partial(_by_kernel, driver, staging.device, *copy)
    yield (Route.STAGED, Direction.ONBOARD), partial(staging.onboard, *copies[Direction.ONBOARD])
    yield (Route.STAGED, Direction.OFFLOAD), partial(staging.offload, *copies[Direction.OFFLOAD])


def _by_engine(
    driver: CudaDriver, src: View, src_ids: SlotIds, dst: View, dst_ids: SlotIds, from_host: bool, stream: int
) -> None:
    runs = find_runs(src, src_ids, dst, dst_ids, order_by="src" if from_host else "dst")
    copy_runs(runs, driver, stream, stable_source=from_host)


def _by_kernel(
    driver: CudaDriver, device: int, src: View, src_ids: SlotIds, dst: View, dst_ids: SlotIds, stream: int
) -> None:
    driver.launch(partial(copy_blocks, src, src_ids, dst, dst_ids), stream, device)


def _best(driver: CudaDriver, submit: Submit, stream: int, event: int, clock: Callable[[], float]) -> float:
    best = float("inf")
    for repeat in range(REPEATS + 1):
        deadline = time.monotonic() + TIMEOUT_S
        started = clock()
        submit(stream)
        driver.event_record(event, stream)
        while not driver.event_is_done(event):  # sleeping would be longer than what is measured
            if time.monotonic() >= deadline:
                raise TimeoutError(f"a copy did not finish within {TIMEOUT_S} s while calibrating; the GPU hangs?")
        if repeat:
            best = min(best, clock() - started)
    return max(best, 1e-9)
