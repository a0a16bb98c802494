"""A launch of a Triton kernel over address tables, as data: built and checked on the host, then launched on a GPU.

Kernels that take views read addresses from one int64 table. A call holds that table, the integers and constants of the
kernel, and how many items of work there are; the grid is the number of items, or the caller's budget of multiprocessors.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.cuda_runtime import cuda_driver
from dynamo.kernels.pinned import seen_from_device
from dynamo.kernels.view import View

__all__ = ["KernelCall", "Occupancy", "Target", "addresses_on"]

Int64s = npt.NDArray[np.int64]

MAX_ITEMS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Programs of a kernel that are useful at a time.

    Attributes:
        per_sm: when all views are on the GPU.
        over_bus: in all, when one side is host memory: enough bytes in flight for the round trip over PCIe Gen5.
    """

    per_sm: int
    over_bus: int


SMALL_TILES = Occupancy(per_sm=4, over_bus=8)
"""For kernels whose tiles have 16 KiB."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class KernelCall:
    """One launch, yet to be made.

    Attributes:
        kernel: a `@triton.jit` function whose first argument is the table, and which strides over items by its grid.
        table: int64 [n], what `table_ptr` points to.
        arguments: the other run-time arguments, in order.
        constexprs: constant arguments by name.
        num_items: pieces of work; more programs than these are never started.

    Raises:
        KernelArgumentError: more items than the kernels count.
    """

    kernel: Any
    table: Int64s
    arguments: tuple[Any, ...]
    constexprs: Mapping[str, Any]
    num_items: int
    num_warps: int

    def __post_init__(self) -> None:
        if self.num_items > MAX_ITEMS:
            raise KernelArgumentError(
                f"{self.num_items} tiles are more than one launch takes; give fewer blocks at a time"
            )

    def launch(self, target: "Target") -> None:
        """Queues the kernel. Does not wait, except for room in the queue."""
        if self.num_items == 0:
            return
        grid = (min(self.num_items, target.max_programs),)
        with target.active():
            # Both buffers come from torch's caching allocators, which keep them until the stream has passed.
            table = torch.from_numpy(self.table).pin_memory().to(target.device, non_blocking=True)
            # A fused multiply-add would differ from the CPU's result in the last bit.
            self.kernel[grid](
                table, *self.arguments, **self.constexprs, num_warps=self.num_warps, enable_fp_fusion=False
            )


@dataclass(frozen=True, slots=True)
class Target:
    """Where launches go, and how many programs each may have.

    Attributes:
        device: a CUDA device, or the CPU, where nothing is launched.
        stream: None for the device's current one.
    """

    device: torch.device
    max_programs: int
    stream: torch.cuda.Stream | None

    @classmethod
    def of(
        cls,
        *views: View,
        sm_budget: int | None,
        stream: torch.cuda.Stream | None,
        occupancy: Occupancy = SMALL_TILES,
    ) -> "Target":
        """For a kernel over these views: on the GPU that one of them is on, else on the CPU.

        Args:
            views: what is read and written.
            sm_budget: most programs to run at a time; None for as many as are useful.
            stream: stream to submit to.
            occupancy: of the kernel.

        Raises:
            KernelArgumentError: views on two GPUs, a budget below 1, or a stream of another GPU.
        """
        if sm_budget is not None and sm_budget < 1:
            raise KernelArgumentError(f"sm_budget is {sm_budget}, at least 1 is needed")
        devices = {view.device for view in views if view.device.type != "cpu"}
        if any(device.type != "cuda" for device in devices) or len(devices) > 1:
            places = ", ".join(str(view.device) for view in views)
            raise KernelArgumentError(f"the views are on {places}: one CUDA device, the CPU, or both")
        if not devices:
            return cls(torch.device("cpu"), 1, None)
        device = devices.pop()
        if stream is not None and stream.device != device:
            raise KernelArgumentError(f"the stream is on {stream.device}, the views on {device}; give one of that GPU")
        if sm_budget is None:
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
            is_local = all(view.device == device for view in views)
            sm_budget = occupancy.per_sm * num_sms if is_local else occupancy.over_bus
        return cls(device, sm_budget, stream)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes device and stream torch's current ones."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield


def addresses_on(view: View, device: torch.device) -> Int64s:
    """`view.base` as `device` sees it: mapped, where the view is host memory and the device a GPU.

    Raises:
        KernelArgumentError: the host memory is not pinned throughout.

    >>> from dynamo.kernels.layouts import from_paged
    >>> view = from_paged(torch.zeros(4, 16, 8), "BTD")
    >>> addresses_on(view, torch.device("cpu")) is view.base
    True
    """
    if device.type == "cpu" or view.device.type != "cpu":
        return view.base
    return seen_from_device(view, cuda_driver()).base
