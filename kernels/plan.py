"""Chooses how a copy between two views is made, and runs it.

| direction | routes, the fastest by the calibration wins |
| --- | --- |
| host to device | copy engine, zero-copy kernel, staged |
| device to host | copy engine, zero-copy kernel, staged |
| within a GPU | kernel, copy engine |
| between GPUs | copy engine |
| host to host | numpy on the calling thread and its helpers |

A plan is data: it can be printed, kept, and run again while its views are valid. Planning and running only submit; nothing
waits for the GPU.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch

from dynamo.kernels.calibration import Calibration, Direction, Route, default_calibration
from dynamo.kernels.checks import KernelArgumentError, SlotIds
from dynamo.kernels.copy_blocks import copy_blocks
from dynamo.kernels.copy_engine import copy_runs
from dynamo.kernels.copy_plan import plan_copy
from dynamo.kernels.cuda_runtime import cuda_driver
from dynamo.kernels.driver import CudaDriver, Memory, wait_for_event
from dynamo.kernels.pairing import Range, cut_views
from dynamo.kernels.pinned import memory_of_view
from dynamo.kernels.runs import Runs, in_host_order, runs_of
from dynamo.kernels.staged import Staging
from dynamo.kernels.view import View

__all__ = ["Plan", "Submission", "plan", "run"]

ROUTES: Mapping[Direction, tuple[Route, ...]] = {
    Direction.ONBOARD: (Route.COPY_ENGINE, Route.KERNEL, Route.STAGED),
    Direction.OFFLOAD: (Route.COPY_ENGINE, Route.STAGED, Route.KERNEL),
    Direction.ON_DEVICE: (Route.KERNEL, Route.COPY_ENGINE),
    Direction.ON_HOST: (Route.HOST,),
}
"""In the order that decides between equals."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One copy and how it is to be made. Keeps the views' memory alive.

    Attributes:
        route: the way of copying.
        direction: where the bytes go.
        src, src_ids, dst, dst_ids: what is copied, in the order of the host side's blocks; the views are cut to the layers
            and heads that were asked for, and to blocks of one size.
        runs: contiguous runs common to both sides.
        sm_budget: SMs that a kernel may use at a time, or None for as many as are useful.
        stable_source: nothing queued still writes the source.
        device: index of the GPU, or None when none takes part.
        expected_s: seconds by the calibration, or None where it says nothing.
        considered: expected seconds of every route that could have been taken.
    """

    route: Route
    direction: Direction
    src: View
    src_ids: SlotIds
    dst: View
    dst_ids: SlotIds
    runs: Runs
    sm_budget: int | None
    stable_source: bool
    device: int | None
    expected_s: float | None
    considered: Mapping[Route, float]
    driver: CudaDriver | None = field(repr=False, default=None)
    staging: Staging | None = field(repr=False, default=None)

    @property
    def num_bytes(self) -> int:
        """Bytes written."""
        return self.runs.num_bytes

    @property
    def histogram(self) -> Mapping[int, int]:
        """Bytes of a run that is contiguous on both sides, to the number of such runs."""
        return self.runs.sizes()

    def __str__(self) -> str:
        sizes = ", ".join(f"{count} of {size} B" for size, count in self.histogram.items()) or "none"
        lines = [f"{self.direction}: {self.num_bytes} B by {self.route}", f"  runs      {sizes}"]
        if self.expected_s is not None and self.expected_s > 0:
            rate = self.num_bytes / self.expected_s / 1e9
            lines.append(f"  expected  {self.expected_s * 1e3:.3g} ms, {rate:.3g} GB/s")
        others = ", ".join(f"{r} {s * 1e3:.3g} ms" for r, s in self.considered.items() if r != self.route)
        return "\n".join(lines + [f"  instead   {others}"] * bool(others))


class Submission:
    """A copy that was submitted. Keep it until it is done: it keeps the memory of the copy alive.

    The copy runs whether or not anybody asks; what is queued later on the same stream comes after it.
    """

    def __init__(self, plan: Plan, driver: CudaDriver | None, event: int | None) -> None:
        """Made by `run`."""
        self.plan = plan
        self.event = event
        """Handle of the CUDA event that marks the end; None when the copy was done before `run` returned."""
        self._driver = driver
        if driver is not None and event is not None:
            weakref.finalize(self, driver.event_destroy, event).atexit = False  # the process takes its events with it

    @property
    def is_done(self) -> bool:
        """Whether the bytes have arrived. Never waits."""
        return self._driver is None or self.event is None or self._driver.event_is_done(self.event)

    def wait(self, timeout_s: float) -> bool:
        """Waits on the host until the bytes have arrived, `timeout_s` seconds at most; returns whether they have."""
        if self._driver is None or self.event is None:
            return True
        return wait_for_event(self._driver, self.event, timeout_s)

    def before(self, stream: "int | torch.cuda.Stream") -> None:
        """Work queued later on `stream` starts after the bytes have arrived. Never waits."""
        if self._driver is not None and self.event is not None:
            self._driver.stream_wait(_handle(stream), self.event)


def plan(
    src: View,
    src_ids: SlotIds,
    dst: View,
    dst_ids: SlotIds,
    *,
    layers: Range | None = None,
    heads: Range | None = None,
    sm_budget: int | None = None,
    calibration: Calibration | None = None,
    staging: Staging | None = None,
    driver: CudaDriver | None = None,
    route: Route | None = None,
    stable_source: bool = False,
) -> Plan:
    """Decides how to copy blocks `src_ids` of `src` to blocks `dst_ids` of `dst`, and prepares it. Moves nothing.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> from dynamo.kernels.layouts import from_paged, stored
    >>> driver = FakeDriver()
    >>> gpu, host = driver.device_buffer_new(1 << 20, 0), driver.pinned_buffer_new(1 << 20)
    >>> pool = from_paged(gpu.view(8, 2, 16, 8, 512), "BPTHD")
    >>> slots = stored(host.view(8, 1 << 17), num_layers=1, num_tokens=16, num_heads=8, row_bytes=512)
    >>> copy = plan(slots, np.array([0, 1, 5]), pool, np.array([2, 3, 7]), driver=driver)
    >>> print(copy)
    host to device: 393216 B by copy engine
      runs      1 of 131072 B, 1 of 262144 B
      expected  0.0133 ms, 29.6 GB/s
      instead   kernel 0.0137 ms

    Args:
        src: view read.
        src_ids: int64 [n]; may repeat.
        dst: view written; shares no memory with what is read.
        dst_ids: int64 [m], distinct, together as many tokens as those of `src`.
        layers: half-open range of layers, as for `copy_blocks`.
        heads: half-open range of heads, as for `copy_blocks`.
        sm_budget: SMs that a kernel may use at a time, at least 1.
        calibration: of this GPU; by default constants that hold for a GPU on PCIe Gen5.
        staging: makes the staged route possible.
        driver: of CUDA; by default the real one where a view is on a GPU.
        route: takes this one, without asking the calibration.
        stable_source: nothing queued or running still writes the source; lets host memory be read ahead of the stream.

    Raises:
        KernelArgumentError: views, ids, memory or routes do not fit; the message says which.
        CudaError: a view is on a GPU, and CUDA cannot be used.
    """
    if sm_budget is not None and sm_budget < 1:
        raise KernelArgumentError(f"sm_budget is {sm_budget}, at least 1 is needed")
    src, dst = cut_views(src, dst, layers, heads)
    if driver is None and "cuda" in (src.device.type, dst.device.type):
        driver = cuda_driver()
    direction, device = _place(src, dst, driver)
    if staging is not None and device is not None and staging.device != device:
        raise KernelArgumentError(
            f"the staging is on GPU {staging.device}, the copy on GPU {device}; use that GPU's own"
        )
    order_by = "src" if direction == Direction.ONBOARD else "dst"
    src, src_ids, dst, dst_ids = in_host_order(src, src_ids, dst, dst_ids, order_by)
    runs = runs_of(plan_copy(src, src_ids, dst, dst_ids), order_by=order_by)
    possible = _possible(src, dst, direction, staging)
    if route is not None and route not in possible:
        raise KernelArgumentError(f"{route} is not possible here; possible: {', '.join(possible)}")
    considered = _expect(possible, direction, runs, (src, src_ids), (dst, dst_ids), calibration or _defaults())
    chosen = route or min(possible, key=lambda r: considered.get(r, float("inf")))
    return Plan(
        route=chosen,
        direction=direction,
        src=src,
        src_ids=src_ids,
        dst=dst,
        dst_ids=dst_ids,
        runs=runs,
        sm_budget=sm_budget,
        stable_source=stable_source and direction == Direction.ONBOARD,
        device=device,
        expected_s=considered.get(chosen),
        considered=considered,
        driver=driver,
        staging=staging,
    )


def run(plan: Plan, stream: "int | torch.cuda.Stream | None" = None) -> Submission:
    """Submits a plan as one step of `stream`. On the CPU, copies before it returns.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> from dynamo.kernels.plan import plan, run
    >>> nhd, hnd = torch.randn(6, 2, 16, 4, 64), torch.zeros(6, 2, 4, 16, 64)
    >>> src, dst = from_paged(nhd, "BPTHD"), from_paged(hnd, "BPHTD")
    >>> copy = plan(src, np.array([4, 0]), dst, np.array([1, 2]))
    >>> run(copy).is_done, copy.route.value
    (True, 'host')
    >>> bool((hnd[1] == nhd[4].transpose(1, 2)).all())
    True

    Args:
        plan: from `plan`; may be run again.
        stream: of the plan's GPU, a torch stream, or a handle, which is trusted; only the kernel route takes the legacy
            default stream. None only for plans without a GPU.

    Returns:
        What becomes done when the bytes have arrived. Keep it, or the views' memory, until then.

    Raises:
        KernelArgumentError: no stream, one of another GPU, or the legacy default stream on another route; nothing was queued.
        CudaError: a call failed; parts before it are queued.
    """
    sides = plan.src, plan.src_ids, plan.dst, plan.dst_ids
    copy = partial(copy_blocks, *sides, sm_budget=plan.sm_budget)
    driver, device = plan.driver, plan.device
    if plan.route == Route.HOST or driver is None or device is None:
        copy()
        return Submission(plan, None, None)
    if stream is None:
        raise KernelArgumentError(f"a copy {plan.direction} needs a stream")
    if not isinstance(stream, int) and (stream.device.index or 0) != device:
        raise KernelArgumentError(f"the stream is on {stream.device}, the copy on GPU {device}; give one of that GPU")
    handle = _handle(stream)
    submission = Submission(plan, driver, driver.event_new(device))
    if plan.route == Route.COPY_ENGINE:
        copy_runs(plan.runs, driver, handle, stable_source=plan.stable_source)
    elif plan.route == Route.STAGED and plan.staging is not None:
        carry = plan.staging.offload
        if plan.direction == Direction.ONBOARD:
            carry = partial(plan.staging.onboard, stable_source=plan.stable_source)
        carry(*sides, handle, sm_budget=plan.sm_budget)
    else:
        driver.launch(copy, handle, device)
    driver.event_record(submission.event or 0, handle)
    return submission


def _handle(stream: "int | torch.cuda.Stream") -> int:
    return stream if isinstance(stream, int) else int(stream.cuda_stream)


@lru_cache(maxsize=1)
def _defaults() -> Calibration:
    return default_calibration()


def _place(src: View, dst: View, driver: CudaDriver | None) -> tuple[Direction, int | None]:
    """Where the bytes go, and the GPU whose stream carries them: the one that is not host memory, or the source's."""
    on_gpu = [_memory(view, driver) for view in (src, dst)]
    if Memory.DEVICE not in on_gpu:
        return Direction.ON_HOST, None
    if Memory.PAGEABLE in on_gpu:
        name = "src" if on_gpu[0] == Memory.PAGEABLE else "dst"
        raise KernelArgumentError(f"{name} is pageable host memory; pin it with CudaDriver.host_register")
    view = src if on_gpu[0] == Memory.DEVICE else dst
    device = view.device.index or 0
    if on_gpu[0] == on_gpu[1]:
        return Direction.ON_DEVICE, device
    return (Direction.ONBOARD if on_gpu[1] == Memory.DEVICE else Direction.OFFLOAD), device


def _memory(view: View, driver: CudaDriver | None) -> Memory:
    if view.device.type == "cuda":
        return Memory.DEVICE
    if driver is None:
        return Memory.PAGEABLE
    return memory_of_view(view, driver)


def _possible(src: View, dst: View, direction: Direction, staging: Staging | None) -> tuple[Route, ...]:
    host = src if direction == Direction.ONBOARD else dst
    routes = list(ROUTES[direction])
    if staging is None or not staging.can_hold(host):
        routes = [route for route in routes if route != Route.STAGED]
    if direction == Direction.ON_DEVICE and src.device != dst.device:
        routes = [route for route in routes if route == Route.COPY_ENGINE]
    return tuple(routes)


def _expect(
    possible: Sequence[Route],
    direction: Direction,
    runs: Runs,
    src: tuple[View, SlotIds],
    dst: tuple[View, SlotIds],
    calibration: Calibration,
) -> dict[Route, float]:
    """Expected seconds of each route that the calibration knows."""
    num_bytes, num_runs = runs.num_bytes, runs.num_pieces
    expected: dict[Route, float] = {}
    if num_bytes == 0:
        return expected
    for route in possible:
        seconds = calibration.seconds(route, direction, max(1, num_bytes // num_runs), num_runs)
        if seconds is not None and route == Route.STAGED:  # its DMA has the runs of the host side
            host_runs = _host_runs(*(src if direction == Direction.ONBOARD else dst))
            by_engine = calibration.seconds(Route.COPY_ENGINE, direction, max(1, num_bytes // host_runs), host_runs)
            seconds = max(seconds, by_engine or 0.0)
        if seconds is not None:
            expected[route] = seconds
    return expected


def _host_runs(view: View, ids: SlotIds) -> int:
    """Runs in which blocks lie in host memory, as the DMA of a staged copy sees them."""
    starts = np.sort(view.base.reshape(-1))
    runs_per_block = view.block_bytes // view.run_bytes
    if runs_per_block > starts.size or (np.diff(starts) != view.run_bytes).any():
        return runs_per_block * ids.size
    is_taken = np.zeros(view.num_blocks + 1, dtype=np.bool_)
    is_taken[ids] = True
    follows = np.diff(view.block_offsets) == view.block_bytes  # [i]: block i + 1 lies right behind block i
    return int(np.count_nonzero(is_taken)) - int(np.count_nonzero(is_taken[:-2] & is_taken[1:-1] & follows))
