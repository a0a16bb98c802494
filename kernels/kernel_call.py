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
from dynamo.kernels.view import View

__all__ = ["KernelCall", "Submission", "addresses_on"]

Int64s = npt.NDArray[np.int64]

MAX_ITEMS = 2**31 - 1
PROGRAMS_PER_SM = 4
HOST_PROGRAMS = 8  # when one side is host memory: enough tiles of 16 KiB in flight for the round trip over PCIe Gen5


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class KernelCall:
    """One launch, yet to be made.

    Attributes:
        kernel: a `@triton.jit` function whose first argument is the table, and which strides over items by its grid.
        table: int64 [n], what `table_ptr` points to.
        arguments: the other run-time arguments, in order.
        constexprs: constant arguments by name.
        num_items: pieces of work; more programs than these are never started.
    """

    kernel: Any
    table: Int64s
    arguments: tuple[Any, ...]
    constexprs: Mapping[str, Any]
    num_items: int
    num_warps: int

    def launch(self, submission: "Submission") -> None:
        """Queues the kernel. Does not wait, except for room in the queue.

        Raises:
            KernelArgumentError: more items than the kernels count.
        """
        if self.num_items == 0:
            return
        if self.num_items > MAX_ITEMS:
            raise KernelArgumentError(
                f"{self.num_items} tiles are more than one launch takes; give fewer blocks at a time"
            )
        grid = (min(self.num_items, submission.max_programs),)
        with submission.active():
            # Both buffers come from torch's caching allocators, which keep them until the stream has passed.
            table = torch.from_numpy(self.table).pin_memory().to(submission.device, non_blocking=True)
            # A fused multiply-add would differ from the CPU's result in the last bit.
            self.kernel[grid](
                table, *self.arguments, **self.constexprs, num_warps=self.num_warps, enable_fp_fusion=False
            )


@dataclass(frozen=True, slots=True)
class Submission:
    """Where launches go, and how many programs each may have.

    Attributes:
        device: a CUDA device, or the CPU, where nothing is launched.
        stream: None for the device's current one.
    """

    device: torch.device
    max_programs: int
    stream: torch.cuda.Stream | None

    @classmethod
    def of(cls, *views: View, sm_budget: int | None, stream: torch.cuda.Stream | None) -> "Submission":
        """For a kernel over these views: on the GPU that one of them is on, else on the CPU.

        Args:
            views: what is read and written.
            sm_budget: most programs to run at a time; None for as many as are useful.
            stream: stream to submit to.

        Raises:
            KernelArgumentError: views on two GPUs, or a budget below 1.
        """
        if sm_budget is not None and sm_budget < 1:
            raise KernelArgumentError(f"sm_budget is {sm_budget}, at least 1 is needed")
        devices = {view.device for view in views if view.device.type != "cpu"}
        if any(device.type != "cuda" for device in devices) or len(devices) > 1:
            raise KernelArgumentError(f"views on {[str(v.device) for v in views]}: one CUDA device, the CPU, or both")
        if not devices:
            return cls(torch.device("cpu"), 1, None)
        device = devices.pop()
        if sm_budget is None:
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
            is_local = all(view.device == device for view in views)
            sm_budget = PROGRAMS_PER_SM * num_sms if is_local else HOST_PROGRAMS
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
    from dynamo.kernels.driver import Memory, cuda_driver

    driver = cuda_driver()
    base = view.base.copy()
    for first, end in np.unique(view.limits.reshape(-1, 2), axis=0).tolist():
        if driver.memory_of(first) is not Memory.PINNED or driver.memory_of(end - 1) is not Memory.PINNED:
            raise KernelArgumentError(f"{end - first} bytes of host memory at {first:#x} are not pinned; register them")
        shift = driver.host_device_pointer(first) - first
        if driver.host_device_pointer(end - 1) - (end - 1) != shift:
            raise KernelArgumentError(f"the host memory at {first:#x} is registered in parts that lie apart on the GPU")
        base[view.limits[..., 0] == first] += shift
    return base
