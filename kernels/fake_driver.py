"""A CUDA driver for machines without a GPU: CPU memory plays the GPU's, and streams are real queues.

It performs every copy byte for byte, refuses what CUDA refuses, such as copies across two allocations, and records every
call. With `deferred=True` nothing runs until somebody waits, and then the heads of the streams run in a random order that
only events constrain: a missing event shows as wrong bytes. Copies of one batch run in random order as well, and a batch
with AccessOrder.ANY reads its sources at once, as early as a GPU may.
"""

import ctypes
import random
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.driver import LEGACY_STREAMS, AccessOrder, CudaError, Memory
from dynamo.kernels.registrations import touching

__all__ = ["FakeDriver"]

Int64s = npt.NDArray[np.int64]
Work = Callable[[], bool]
"""Does its part and returns True, or returns False when an event it waits for is not done."""

INVALID_VALUE, NOT_SUPPORTED = 1, 801


class FakeDriver:
    """Implements CudaDriver on CPU memory, for one thread at a time.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.fake_driver import FakeDriver
    >>> driver = FakeDriver()
    >>> gpu, host = driver.device_buffer_new(256, 0), driver.pinned_buffer_new(256)
    >>> _ = host.copy_(torch.arange(256))
    >>> driver.memcpy_async(gpu.data_ptr(), host.data_ptr(), 256, driver.stream_new(0))
    >>> bool((gpu == host).all()), driver.memory_of(gpu.data_ptr()).value, driver.calls[-1][0]
    (True, 'device', 'memcpy_async')
    """

    def __init__(
        self,
        *,
        copies: bool = True,
        deferred: bool = False,
        seed: int = 0,
        version: int = 13000,
        max_batch: int = 4096,
        failures: dict[str, int] | None = None,
    ) -> None:
        """A driver with no memory yet.

        Args:
            copies: whether to move bytes; without, calls are recorded only, which costs next to nothing, and of batches only
                the lengths.
            deferred: whether work waits in its stream until an event is asked for, or `run_all`.
            seed: of the order in which streams take turns.
            version: CUDA runtime and driver; batched copies exist from 12080.
            max_batch: a longer batch is an error, as some drivers hang on it.
            failures: CUDA error code for each call that is to fail.
        """
        self.calls: list[tuple[object, ...]] = []
        self.runtime_version = self.driver_version = version
        self.failures = dict(failures or {})
        self._copies, self._deferred, self._max_batch = copies, deferred, max_batch
        self._random = random.Random(seed)
        self._streams: dict[int, deque[Work]] = {}
        self._recorded: dict[int, int] = {}  # event → its last ticket
        self._done: set[int] = set()  # tickets
        self._handles = 1000
        self._registered: dict[int, int] = {}
        self._ranges: list[tuple[int, int, Memory, torch.Tensor | None]] = []

    def device_name(self, device: int) -> str:
        """See CudaDriver."""
        return f"Fake GPU {device}"

    def mark(self, tensor: torch.Tensor, memory: Memory) -> None:
        """Declares the whole storage of a CPU tensor to be of this kind, and keeps it alive."""
        storage = tensor.untyped_storage()
        self._ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), memory, tensor))

    def memcpy_async(self, dst: int, src: int, num_bytes: int, stream: int) -> None:
        """See CudaDriver."""
        self._note("memcpy_async", dst, src, num_bytes, stream)
        self._queue_copy(stream, dst, src, num_bytes)

    def memcpy_2d_async(
        self, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, height: int, stream: int
    ) -> None:
        """See CudaDriver."""
        self._note("memcpy_2d_async", dst, dst_pitch, src, src_pitch, width, height, stream)
        if not 0 < width <= min(dst_pitch, src_pitch) or max(dst_pitch, src_pitch) >= 1 << 31:
            raise CudaError(INVALID_VALUE, "cudaMemcpy2DAsync", f"pitches {dst_pitch}, {src_pitch}, width {width}")
        if self._copies:
            for start, pitch in ((dst, dst_pitch), (src, src_pitch)):
                self._checked(start, (height - 1) * pitch + width)
        for row in range(height) if self._copies else ():
            self._queue_copy(stream, dst + row * dst_pitch, src + row * src_pitch, width)

    def memcpy_batch_async(self, dst: Int64s, src: Int64s, sizes: Int64s, order: AccessOrder, stream: int) -> None:
        """See CudaDriver."""
        if self._copies:
            self._note("memcpy_batch_async", dst, src, sizes, order, stream)
        else:  # keeping memory that a real driver reads during the call only would be paid for in page faults
            self._note("memcpy_batch_async", dst.size, src.size, sizes.size, order, stream)
        if self.runtime_version < 12080:
            raise CudaError(NOT_SUPPORTED, "cudaMemcpyBatchAsync")
        if stream in LEGACY_STREAMS or not 0 < dst.size <= self._max_batch or not dst.size == src.size == sizes.size:
            raise CudaError(INVALID_VALUE, "cudaMemcpyBatchAsync", f"stream {stream}, {dst.size} copies")
        if not self._copies:
            return
        rows = list(zip(dst.tolist(), src.tolist(), sizes.tolist(), strict=True))
        self._random.shuffle(rows)
        for to, start, size in rows:
            if order == AccessOrder.ANY:
                early = ctypes.string_at(self._checked(start, size), size)
                self._queue(stream, partial(ctypes.memmove, self._checked(to, size), early, size))
            else:
                self._queue_copy(stream, to, start, size)

    def launch(self, call: Callable[[], None], stream: int, device: int) -> None:
        """See CudaDriver. `call` works on CPU tensors here."""
        self._note("launch", stream, device)
        self._queue(stream, call)

    def memory_of(self, address: int, num_bytes: int = 1) -> Memory:
        """See CudaDriver. Ranges that were registered or marked one behind the other count as one."""
        kinds, end = set(), address + num_bytes
        while address < end:
            found = next((r for r in self._ranges if r[0] <= address < r[1]), None)
            kinds.add(Memory.PAGEABLE if found is None else found[2])
            if found is None or len(kinds) > 1:
                return Memory.PAGEABLE
            address = found[1]
        return kinds.pop()

    def host_device_pointer(self, address: int) -> int:
        """See CudaDriver."""
        self._note("host_device_pointer", address)
        return address

    def host_register(self, address: int, num_bytes: int) -> None:
        """See CudaDriver."""
        self._note("host_register", address, num_bytes)
        self._ranges.append((address, address + num_bytes, Memory.PINNED, None))
        self._registered[address] = num_bytes

    def host_unregister(self, address: int) -> None:
        """See CudaDriver."""
        self._note("host_unregister", address)
        del self._registered[address]
        self._ranges = [entry for entry in self._ranges if entry[0] != address or entry[2] != Memory.PINNED]

    def registration_borders(self) -> Int64s:
        """See CudaDriver."""
        return touching(self._registered)

    def stream_new(self, device: int) -> int:
        """See CudaDriver."""
        return self._new_handle()

    def stream_destroy(self, stream: int) -> None:
        """See CudaDriver."""
        self._note("stream_destroy", stream)

    def stream_wait(self, stream: int, event: int) -> None:
        """See CudaDriver."""
        self._note("stream_wait", stream, event)
        ticket = self._recorded[event]
        if self._copies:
            self._streams.setdefault(stream, deque()).append(lambda: ticket in self._done)
            self._run_unless_deferred()

    def event_new(self, device: int) -> int:
        """See CudaDriver."""
        event = self._new_handle()
        self._recorded[event] = 0
        self._done.add(0)
        return event

    def event_record(self, event: int, stream: int) -> None:
        """See CudaDriver."""
        self._note("event_record", event, stream)
        if self._copies:
            ticket = self._recorded[event] = self._new_handle()
            self._queue(stream, partial(self._done.add, ticket))

    def event_is_done(self, event: int) -> bool:
        """See CudaDriver. Asking lets one step of some stream run, as time would."""
        if self._recorded[event] not in self._done:
            self._step()
        return self._recorded[event] in self._done

    def event_destroy(self, event: int) -> None:
        """See CudaDriver."""
        self._note("event_destroy", event)

    def device_buffer_new(self, num_bytes: int, device: int) -> torch.Tensor:
        """See CudaDriver."""
        return self._buffer(num_bytes, Memory.DEVICE)

    def pinned_buffer_new(self, num_bytes: int) -> torch.Tensor:
        """See CudaDriver."""
        return self._buffer(num_bytes, Memory.PINNED)

    def run_all(self) -> None:
        """Runs all queued work, streams taking turns at random."""
        while self._step():
            pass

    def run_some(self, num_steps: int) -> None:
        """Runs that many steps of queued work, fewer if there are fewer that can run."""
        for _ in range(num_steps):
            if not self._step():
                return

    def count(self, name: str) -> int:
        """How often the call `name` was made."""
        return sum(call[0] == name for call in self.calls)

    def _buffer(self, num_bytes: int, memory: Memory) -> torch.Tensor:
        buffer = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        self.mark(buffer, memory)
        return buffer

    def _new_handle(self) -> int:
        self._handles += 1
        return self._handles

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        code = self.failures.get(str(call[0]))
        if code is not None:
            raise CudaError(code, str(call[0]))

    def _queue(self, stream: int, call: Callable[[], object]) -> None:
        if not self._copies:
            return

        def work() -> bool:
            call()
            return True

        self._streams.setdefault(stream, deque()).append(work)
        self._run_unless_deferred()

    def _queue_copy(self, stream: int, dst: int, src: int, num_bytes: int) -> None:
        if self._copies:
            pair = self._checked(dst, num_bytes), self._checked(src, num_bytes)
            self._queue(stream, partial(ctypes.memmove, *pair, num_bytes))

    def _run_unless_deferred(self) -> None:
        if not self._deferred:
            self.run_all()

    def _step(self) -> bool:
        streams = [stream for stream, queue in self._streams.items() if queue]
        for stream in self._random.sample(streams, len(streams)):
            work = self._streams[stream].popleft()
            if work():
                return True
            self._streams[stream].appendleft(work)
        return False

    def _checked(self, address: int, num_bytes: int) -> int:
        for start, stop, memory, _ in self._ranges:
            if start <= address and address + num_bytes <= stop and memory != Memory.PAGEABLE:
                return address
        raise CudaError(700, "copy", f"[{address}, {address + num_bytes}) is not within one known buffer")
