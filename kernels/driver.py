"""The few CUDA runtime calls that moving bytes needs, as a protocol.

`cuda_runtime.cuda_driver()` gives the real one, `fake_driver.FakeDriver` one for machines without a GPU. Addresses, streams
and events are plain integers. No call here waits for the GPU, except where it says so. Every failed call raises CudaError.
"""

import time
from collections.abc import Callable
from enum import IntEnum, StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "LEGACY_STREAMS",
    "AccessOrder",
    "CudaDriver",
    "CudaError",
    "Memory",
    "wait_for_event",
]

Int64s = npt.NDArray[np.int64]

LEGACY_STREAMS = (0, 1)
"""Handles of the legacy default stream, which batched copies refuse and which serialises with every blocking stream."""

UNSUPPORTED = {36, 500, 801}  # call requires newer driver, symbol not found, not supported


class CudaError(RuntimeError):
    """A CUDA call failed. Copies submitted before it may still be under way; the caller's memory must outlive them.

    `code` is the cudaError_t, `call` the name of the function, `is_unsupported` whether another way should be taken.
    """

    def __init__(self, code: int, call: str, detail: str = "") -> None:
        super().__init__(f"{call} failed with CUDA error {code}{': ' if detail else ''}{detail}")
        self.code = code
        self.call = call
        self.is_unsupported = code in UNSUPPORTED


class Memory(StrEnum):
    """What an address points to."""

    DEVICE = "device"
    PINNED = "pinned"
    PAGEABLE = "pageable"


class AccessOrder(IntEnum):
    """When a batched copy may read its source (cudaMemcpySrcAccessOrder)."""

    STREAM = 1  # in stream order: always right
    ANY = 3  # before earlier work of the stream is done: right only where nothing queued still writes the source


class CudaDriver(Protocol):
    """Calls on one process's CUDA context. Implementations are thread-safe; streams and events are integer handles."""

    @property
    def runtime_version(self) -> int:
        """CUDA runtime, such as 13000."""

    @property
    def driver_version(self) -> int:
        """Newest CUDA version that the installed driver supports."""

    def device_name(self, device: int) -> str:
        """Name of a GPU."""

    def memcpy_async(self, dst: int, src: int, num_bytes: int, stream: int) -> None:
        """Queues one copy."""

    def memcpy_2d_async(
        self, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, height: int, stream: int
    ) -> None:
        """Queues `height` copies of `width` bytes, each a pitch (at least the width) after the one before."""

    def memcpy_batch_async(self, dst: Int64s, src: Int64s, sizes: Int64s, order: AccessOrder, stream: int) -> None:
        """Queues copies that may run in any order among themselves. Arrays are read during the call only."""

    def launch(self, call: Callable[[], None], stream: int, device: int) -> None:
        """Calls `call`, which launches kernels on torch's current stream, with `stream` as that stream."""

    def memory_of(self, address: int, num_bytes: int = 1) -> Memory:
        """What all of [address, address + num_bytes) is made of; pageable where a part of it is found to be."""

    def host_device_pointer(self, address: int) -> int:
        """The GPU's address of registered host memory; differs from the host's on some systems."""

    def host_register(self, address: int, num_bytes: int) -> None:
        """Pins host memory, portable and mapped. Pages must exist until `host_unregister`."""

    def host_unregister(self, address: int) -> None:
        """Unpins what `host_register` pinned."""

    def registration_borders(self) -> Int64s:
        """Addresses where one range that this driver pinned ends and another begins; no DMA may cross one. Ascending."""

    def stream_new(self, device: int) -> int:
        """A non-blocking stream."""

    def stream_destroy(self, stream: int) -> None:
        """Gives a stream back; its queued work still runs."""

    def stream_wait(self, stream: int, event: int) -> None:
        """Work queued later on `stream` starts after what the event's last recording marks."""

    def event_new(self, device: int) -> int:
        """An event without timing; done until it is recorded."""

    def event_record(self, event: int, stream: int) -> None:
        """The event is done when all work queued so far on `stream` is."""

    def event_is_done(self, event: int) -> bool:
        """Whether the work before the event's last recording is done. Never waits."""

    def event_destroy(self, event: int) -> None:
        """Gives an event back; waits that were queued on it hold."""

    def device_buffer_new(self, num_bytes: int, device: int) -> torch.Tensor:
        """GPU memory, uint8 [num_bytes], 256-byte aligned."""

    def pinned_buffer_new(self, num_bytes: int) -> torch.Tensor:
        """Registered, page-aligned host memory, uint8 [num_bytes], unpinned when its last user is gone."""


def wait_for_event(driver: CudaDriver, event: int, timeout_s: float) -> bool:
    """Waits on the host until `event` is done or `timeout_s` seconds have passed; returns whether it is done.

    >>> from dynamo.kernels.driver import wait_for_event
    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> driver = FakeDriver()
    >>> stream, event = driver.stream_new(0), driver.event_new(0)
    >>> driver.event_record(event, stream)
    >>> wait_for_event(driver, event, timeout_s=1.0)
    True
    """
    deadline = time.monotonic() + timeout_s
    pause_s = 20e-6
    while not driver.event_is_done(event):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1e-3)
    return True
