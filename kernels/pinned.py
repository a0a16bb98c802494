"""Host memory as a GPU sees it: whether it is pinned throughout, and at which addresses."""

from dataclasses import replace

import numpy as np

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.driver import CudaDriver, Memory
from dynamo.kernels.view import View

__all__ = ["memory_of_view", "seen_from_device"]


def memory_of_view(view: View, driver: CudaDriver) -> Memory:
    """What a view's storages are made of.

    Raises:
        KernelArgumentError: they are not alike.

    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> from dynamo.kernels.layouts import from_paged
    >>> driver = FakeDriver()
    >>> memory_of_view(from_paged(driver.pinned_buffer_new(4096).view(4, 16, 64), "BTD"), driver).value
    'pinned'
    """
    kinds = {driver.memory_of(first, end - first) for first, end in _storages(view)}
    if len(kinds) > 1:
        raise KernelArgumentError(f"a view's tensors must be alike, got {', '.join(sorted(kinds))} memory")
    return kinds.pop()


def seen_from_device(view: View, driver: CudaDriver) -> View:
    """A view of host memory with the addresses under which the GPU reaches it.

    Raises:
        KernelArgumentError: a part of the memory is not pinned, or parts of it lie apart on the GPU.

    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> from dynamo.kernels.layouts import from_paged
    >>> driver = FakeDriver()  # whose GPU sees host memory where the host does
    >>> view = from_paged(driver.pinned_buffer_new(4096).view(4, 16, 64), "BTD")
    >>> bool((seen_from_device(view, driver).base == view.base).all())
    True
    """
    shift = np.zeros_like(view.base)
    for first, end in _storages(view):
        if driver.memory_of(first, end - first) is not Memory.PINNED:
            raise KernelArgumentError(
                f"not all of the {end - first} bytes of host memory at {first:#x} are pinned; register them"
            )
        moved = driver.host_device_pointer(first) - first
        if driver.host_device_pointer(end - 1) - (end - 1) != moved:
            raise KernelArgumentError(f"the host memory at {first:#x} is registered in parts that lie apart on the GPU")
        shift[view.limits[..., 0] == first] = moved
    return replace(view, base=view.base + shift, limits=view.limits + shift[..., None])


def _storages(view: View) -> list[tuple[int, int]]:
    """First and one-past-last address of each storage of a view."""
    return sorted({(first, end) for first, end in view.limits.reshape(-1, 2).tolist()})
