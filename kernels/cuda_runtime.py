"""The CUDA runtime library through ctypes: the `CudaDriver` of a process that has a GPU.

It is the library that torch has already loaded, so that streams, events and pointers are torch's own. The array arguments of
the batched copy are handed over as numpy memory: turning 65,536 Python integers into a C array would cost 50 ms. Every failed
call clears the runtime's last error, which would otherwise surface in the next, innocent kernel launch.

Batched copies: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html (cudaMemcpyBatchAsync takes a
`failIdx` pointer before the stream in CUDA 12.8 and 12.9, and no longer does in CUDA 13).
"""

import contextlib
import ctypes
import functools
import mmap
import threading
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.driver import AccessOrder, CudaError, Memory
from dynamo.kernels.registrations import has_gap, touching

__all__ = ["CudaRuntime", "cuda_driver"]

Int64s = npt.NDArray[np.int64]

NOT_READY = 600
FIRST_BATCH_VERSION, EIGHT_ARGUMENTS_VERSION = 12080, 13000
ANY_DIRECTION = 4  # cudaMemcpyDefault: from the pointers
PORTABLE_AND_MAPPED = 3
EVENT_WITHOUT_TIMING = 2
NON_BLOCKING = 1
PROBES = 8
ATTRIBUTE_BYTES = 128  # larger than any version of the structs written to or read from it
DEVICE_POINTER_OFFSET = 8  # in cudaPointerAttributes, behind the type and the device


@functools.cache
def cuda_driver() -> "CudaRuntime":
    """The real driver of this process.

    >>> import torch
    >>> from dynamo.kernels.driver import Memory
    >>> if torch.cuda.is_available():
    ...     kind = cuda_driver().memory_of(torch.ones(64, device="cuda").data_ptr())
    ... else:
    ...     kind = Memory.DEVICE
    >>> kind.value
    'device'

    Raises:
        CudaError: torch has no CUDA device, or its CUDA runtime library cannot be found.
    """
    if not torch.cuda.is_available():
        raise CudaError(100, "cuda_driver", "torch sees no CUDA device; keep both views on the CPU")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return CudaRuntime(_load_runtime())


def _load_runtime() -> ctypes.CDLL:
    """The CUDA runtime library that is mapped into this process, since a second one would not share torch's state."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = sorted({line.split(maxsplit=5)[5].strip() for line in maps if "libcudart.so" in line})
    names = [*paths, f"libcudart.so.{(torch.version.cuda or '13').split('.')[0]}"]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(500, "cuda_driver", f"found no CUDA runtime library; tried {', '.join(names)}")


class CudaRuntime:
    """The CUDA runtime library through ctypes. Implements CudaDriver."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Resolves the functions that `library`, a libcudart, has."""
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._library = library
        self._lock = threading.Lock()
        self._registered: dict[int, int] = {}  # address → bytes
        self._borders = touching({})
        self._memcpy = self._resolve("cudaMemcpyAsync", pointer, pointer, size, integer, pointer)
        self._memcpy_2d = self._resolve("cudaMemcpy2DAsync", pointer, size, pointer, size, size, size, integer, pointer)
        self._stream_wait = self._resolve("cudaStreamWaitEvent", pointer, pointer, ctypes.c_uint)
        self._stream_new = self._resolve("cudaStreamCreateWithFlags", pointer, ctypes.c_uint)
        self._stream_destroy = self._resolve("cudaStreamDestroy", pointer)
        self._event_new = self._resolve("cudaEventCreateWithFlags", pointer, ctypes.c_uint)
        self._event_record = self._resolve("cudaEventRecord", pointer, pointer)
        self._event_query = self._resolve("cudaEventQuery", pointer)
        self._event_destroy = self._resolve("cudaEventDestroy", pointer)
        self._register = self._resolve("cudaHostRegister", pointer, size, ctypes.c_uint)
        self._unregister = self._resolve("cudaHostUnregister", pointer)
        self._attributes = self._resolve("cudaPointerGetAttributes", pointer, pointer)
        self._last_error = self._resolve("cudaGetLastError")
        self._error_string = self._resolve("cudaGetErrorString", integer, result=ctypes.c_char_p)
        self._runtime_version = self._version("cudaRuntimeGetVersion")
        self._driver_version = self._version("cudaDriverGetVersion")
        self._batch = self._resolve_batch()

    @property
    def runtime_version(self) -> int:
        """See CudaDriver."""
        return self._runtime_version

    @property
    def driver_version(self) -> int:
        """See CudaDriver."""
        return self._driver_version

    def device_name(self, device: int) -> str:
        """See CudaDriver."""
        return str(torch.cuda.get_device_name(device))

    def memcpy_async(self, dst: int, src: int, num_bytes: int, stream: int) -> None:
        """See CudaDriver."""
        self._check(self._memcpy(dst, src, num_bytes, ANY_DIRECTION, stream), "cudaMemcpyAsync")

    def memcpy_2d_async(
        self, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, height: int, stream: int
    ) -> None:
        """See CudaDriver."""
        code = self._memcpy_2d(dst, dst_pitch, src, src_pitch, width, height, ANY_DIRECTION, stream)
        self._check(code, "cudaMemcpy2DAsync")

    def memcpy_batch_async(self, dst: Int64s, src: Int64s, sizes: Int64s, order: AccessOrder, stream: int) -> None:
        """See CudaDriver. Locations are not hinted and no flag is set: overlapping with compute slows GPU-to-GPU copies."""
        if self._batch is None:
            raise CudaError(801, "cudaMemcpyBatchAsync", "needs CUDA 12.8, in the runtime and in the driver")
        attributes = (ctypes.c_int * (ATTRIBUTE_BYTES // 4))(int(order))  # access order, two empty hints, no flags
        first_copy, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        arguments = [dst.ctypes.data, src.ctypes.data, sizes.ctypes.data, dst.size]
        arguments += [ctypes.addressof(attributes), ctypes.addressof(first_copy), 1]
        if self._runtime_version < EIGHT_ARGUMENTS_VERSION:
            arguments.append(ctypes.addressof(failed))
        self._check(self._batch(*arguments, stream), "cudaMemcpyBatchAsync")

    def launch(self, call: Callable[[], None], stream: int, device: int) -> None:
        """See CudaDriver."""
        external = torch.cuda.ExternalStream(stream, device=device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(external):
            call()

    def memory_of(self, address: int, num_bytes: int = 1) -> Memory:
        """See CudaDriver. Of memory that others pinned, both ends and a few places in between are asked for."""
        kinds = {self._memory_at(address), self._memory_at(address + num_bytes - 1)}
        if kinds != {Memory.PINNED}:
            return kinds.pop() if len(kinds) == 1 else Memory.PAGEABLE
        with self._lock:
            ours = dict(self._registered)
        if has_gap(ours, address, num_bytes):
            return Memory.PAGEABLE
        between = [address + num_bytes * i // PROBES for i in range(1, PROBES)] if num_bytes > mmap.PAGESIZE else []
        return Memory.PINNED if all(self._memory_at(a) is Memory.PINNED for a in between) else Memory.PAGEABLE

    def _memory_at(self, address: int) -> Memory:
        kind = self._attributes_at(address)[0]
        return {1: Memory.PINNED, 2: Memory.DEVICE, 3: Memory.DEVICE}.get(kind, Memory.PAGEABLE)

    def host_device_pointer(self, address: int) -> int:
        """See CudaDriver. Not cudaHostGetDevicePointer, which promises an answer only for where an allocation begins."""
        found = ctypes.c_void_p.from_buffer(self._attributes_at(address), DEVICE_POINTER_OFFSET).value
        if not found:
            raise CudaError(
                1, "cudaPointerGetAttributes", f"no GPU reaches the host memory at {address:#x}; register it"
            )
        return found

    def _attributes_at(self, address: int) -> "ctypes.Array[ctypes.c_int]":
        found = (ctypes.c_int * (ATTRIBUTE_BYTES // 4))()
        self._check(self._attributes(ctypes.addressof(found), address), "cudaPointerGetAttributes")
        return found

    def host_register(self, address: int, num_bytes: int) -> None:
        """See CudaDriver."""
        self._check(self._register(address, num_bytes, PORTABLE_AND_MAPPED), "cudaHostRegister")
        with self._lock:
            self._registered[address] = num_bytes
            self._borders = touching(self._registered)

    def host_unregister(self, address: int) -> None:
        """See CudaDriver."""
        with self._lock:
            self._registered.pop(address, None)
            self._borders = touching(self._registered)
        self._check(self._unregister(address), "cudaHostUnregister")

    def registration_borders(self) -> Int64s:
        """See CudaDriver."""
        return self._borders

    def stream_new(self, device: int) -> int:
        """See CudaDriver."""
        return self._handle(self._stream_new, NON_BLOCKING, device, "cudaStreamCreateWithFlags")

    def stream_destroy(self, stream: int) -> None:
        """See CudaDriver."""
        self._check(self._stream_destroy(stream), "cudaStreamDestroy")

    def stream_wait(self, stream: int, event: int) -> None:
        """See CudaDriver."""
        self._check(self._stream_wait(stream, event, 0), "cudaStreamWaitEvent")

    def event_new(self, device: int) -> int:
        """See CudaDriver."""
        return self._handle(self._event_new, EVENT_WITHOUT_TIMING, device, "cudaEventCreateWithFlags")

    def event_record(self, event: int, stream: int) -> None:
        """See CudaDriver."""
        self._check(self._event_record(event, stream), "cudaEventRecord")

    def event_is_done(self, event: int) -> bool:
        """See CudaDriver."""
        code = self._event_query(event)
        if code == NOT_READY:
            self._last_error()
            return False
        self._check(code, "cudaEventQuery")
        return True

    def event_destroy(self, event: int) -> None:
        """See CudaDriver."""
        self._check(self._event_destroy(event), "cudaEventDestroy")

    def device_buffer_new(self, num_bytes: int, device: int) -> torch.Tensor:
        """See CudaDriver. Waits for the current stream, where freed memory that torch hands out may still be in use."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=torch.device("cuda", device))
        torch.cuda.current_stream(device).synchronize()
        return buffer

    def pinned_buffer_new(self, num_bytes: int) -> torch.Tensor:
        """See CudaDriver. Not torch's pinned allocator, which rounds large buffers up to a power of two."""
        rows = np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)
        address = rows.ctypes.data
        self.host_register(address, num_bytes)
        weakref.finalize(rows, self._forget, address)
        return torch.from_numpy(rows)

    def _forget(self, address: int) -> None:
        """Unpins memory whose last user is gone; there is nobody left to tell of a failure."""
        with contextlib.suppress(CudaError):
            self.host_unregister(address)

    def _resolve(self, name: str, *arguments: type, result: type = ctypes.c_int) -> "ctypes._NamedFuncPointer":
        function = self._library[name]
        function.argtypes, function.restype = arguments, result
        return function

    def _resolve_batch(self) -> "ctypes._NamedFuncPointer | None":
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        failed_index = (pointer,) if self._runtime_version < EIGHT_ARGUMENTS_VERSION else ()
        if min(self._runtime_version, self._driver_version) < FIRST_BATCH_VERSION:
            return None
        try:
            return self._resolve(
                "cudaMemcpyBatchAsync", pointer, pointer, pointer, size, pointer, pointer, size, *failed_index, pointer
            )
        except AttributeError:
            return None

    def _version(self, name: str) -> int:
        found = ctypes.c_int()
        self._check(self._resolve(name, ctypes.c_void_p)(ctypes.addressof(found)), name)
        return found.value

    def _handle(self, create: "ctypes._NamedFuncPointer", flags: int, device: int, name: str) -> int:
        found = ctypes.c_void_p()
        with torch.cuda.device(device):
            self._check(create(ctypes.addressof(found), flags), name)
        return found.value or 0

    def _check(self, code: int, name: str) -> None:
        if code:
            self._last_error()
            raise CudaError(code, name, self._error_string(code).decode())
