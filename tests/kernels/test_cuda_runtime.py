"""The real driver hands its arguments to CUDA as CUDA declares them: proven on a stand-in for the runtime library."""

import ctypes
import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dynamo.kernels.cuda_runtime import CudaRuntime, cuda_driver
from dynamo.kernels.driver import AccessOrder, CudaError, Memory, wait_for_event
from dynamo.kernels.fake_driver import FakeDriver
from dynamo.kernels.registrations import has_gap

P, S, N, U = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint


class StandInLibrary:
    """A libcudart of some version, made of C callbacks: arguments pass through the C calling convention."""

    def __init__(self, version: int, driver_version: int | None = None) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.codes: dict[str, int] = {}
        self.last_error = 0
        self._message = ctypes.create_string_buffer(b"something went wrong")
        self._keep: list[object] = []
        self._versions = {
            "cudaRuntimeGetVersion": version,
            "cudaDriverGetVersion": version if driver_version is None else driver_version,
        }
        fail_index = (P,) if version < 13000 else ()
        self._signatures = {
            "cudaMemcpyAsync": (P, P, S, N, P),
            "cudaMemcpy2DAsync": (P, S, P, S, S, S, N, P),
            "cudaMemcpyBatchAsync": (P, P, P, S, P, P, S, *fail_index, P),
            "cudaStreamWaitEvent": (P, P, U),
            "cudaStreamCreateWithFlags": (P, U),
            "cudaStreamDestroy": (P,),
            "cudaEventCreateWithFlags": (P, U),
            "cudaEventRecord": (P, P),
            "cudaEventQuery": (P,),
            "cudaEventDestroy": (P,),
            "cudaHostRegister": (P, S, U),
            "cudaHostUnregister": (P,),
            "cudaPointerGetAttributes": (P, P),
            "cudaGetLastError": (),
            "cudaGetErrorString": (N,),
            "cudaRuntimeGetVersion": (P,),
            "cudaDriverGetVersion": (P,),
        }
        if version < 12080:
            del self._signatures["cudaMemcpyBatchAsync"]

    def __getitem__(self, name: str) -> object:
        if name not in self._signatures:
            raise AttributeError(name)
        result = P if name == "cudaGetErrorString" else N
        function = ctypes.CFUNCTYPE(result, *self._signatures[name])(self._answer(name))
        self._keep.append(function)
        return function

    def _answer(self, name: str) -> Callable[..., object]:
        def answer(*arguments: int) -> object:
            if name in self._versions:
                ctypes.c_int.from_address(arguments[0]).value = self._versions[name]
                return 0
            if name == "cudaGetErrorString":
                return ctypes.addressof(self._message)
            if name == "cudaMemcpyBatchAsync":
                dst, src, sizes, count, attributes, first, num_attributes = arguments[:7]
                lists = [(ctypes.c_int64 * count).from_address(a)[:] for a in (dst, src, sizes)]
                words = (ctypes.c_int * 6).from_address(attributes)[:]
                self.calls.append((name, *lists, words, ctypes.c_size_t.from_address(first).value, num_attributes))
                self.calls.append((len(arguments), arguments[-1]))
                return self._code(name)
            self.calls.append((name, *arguments))
            if name == "cudaGetLastError":
                code, self.last_error = self.last_error, 0
                return code
            if name == "cudaPointerGetAttributes":
                kind = ctypes.c_int.from_address(arguments[0]).value = (arguments[1] or 0) % 4
                seen = (arguments[1] or 0) + 0x1000 if kind else None
                ctypes.c_void_p.from_address(arguments[0] + 8).value = seen
            return self._code(name)

        return answer

    def _code(self, name: str) -> int:
        self.last_error = self.codes.get(name, 0)
        return self.last_error


def runtime(version: int, driver_version: int | None = None) -> tuple[CudaRuntime, StandInLibrary]:
    library = StandInLibrary(version, driver_version)
    return CudaRuntime(library), library  # type: ignore[arg-type]


@pytest.mark.parametrize(("version", "num_arguments"), [(12080, 9), (12090, 9), (13000, 8), (13020, 8)])
@pytest.mark.parametrize("order", list(AccessOrder))
def test_a_batch_is_passed_as_its_version_declares_it(version: int, num_arguments: int, order: AccessOrder) -> None:
    driver, library = runtime(version)
    high = (1 << 47) + 12345
    driver.memcpy_batch_async(np.array([high, 2, 3]), np.array([4, 5, high]), np.array([7, 8, 1 << 33]), order, 0x77)
    assert library.calls == [
        ("cudaMemcpyBatchAsync", [high, 2, 3], [4, 5, high], [7, 8, 1 << 33], [int(order), 0, 0, 0, 0, 0], 0, 1),
        (num_arguments, 0x77),
    ]


@pytest.mark.parametrize(("version", "driver_version"), [(12060, 13000), (13000, 12040)])
def test_where_runtime_or_driver_lack_batches_the_call_says_not_supported(version: int, driver_version: int) -> None:
    driver, library = runtime(version, driver_version)
    assert (driver.runtime_version, driver.driver_version) == (version, driver_version)
    one = np.array([1])
    with pytest.raises(CudaError, match=r"needs CUDA 12\.8") as raised:
        driver.memcpy_batch_async(one, one, one, AccessOrder.STREAM, 7)
    assert raised.value.is_unsupported
    assert library.calls == []


def test_plain_calls_pass_their_arguments_in_order() -> None:
    driver, library = runtime(13000)
    driver.memcpy_async(1 << 40, 1 << 41, 1 << 34, 5)
    driver.memcpy_2d_async(11, 12, 13, 14, 15, 16, 17)
    driver.stream_wait(21, 22)
    driver.event_record(31, 32)
    assert driver.event_is_done(41)
    assert driver.host_device_pointer(0x5001) == 0x6001
    driver.stream_destroy(51)
    driver.event_destroy(61)
    assert [call for call in library.calls if call[0] != "cudaPointerGetAttributes"] == [
        ("cudaMemcpyAsync", 1 << 40, 1 << 41, 1 << 34, 4, 5),
        ("cudaMemcpy2DAsync", 11, 12, 13, 14, 15, 16, 4, 17),
        ("cudaStreamWaitEvent", 21, 22, 0),
        ("cudaEventRecord", 31, 32),
        ("cudaEventQuery", 41),
        ("cudaStreamDestroy", 51),
        ("cudaEventDestroy", 61),
    ]


def test_addresses_are_told_apart() -> None:
    driver, _ = runtime(13000)
    kinds = [driver.memory_of(address) for address in (4, 5, 6, 7)]
    assert kinds == [Memory.PAGEABLE, Memory.PINNED, Memory.DEVICE, Memory.DEVICE]
    with pytest.raises(CudaError, match="no GPU reaches the host memory at 0x4; register it"):
        driver.host_device_pointer(4)


def test_a_failed_pin_leaves_no_error_behind_for_the_next_launch() -> None:
    driver, library = runtime(13000)
    library.codes["cudaHostRegister"] = 2
    with pytest.raises(CudaError, match="cudaHostRegister failed with CUDA error 2: something went wrong") as raised:
        driver.host_register(0x10000, 4096)
    assert (raised.value.code, raised.value.is_unsupported) == (2, False)
    assert library.last_error == 0
    assert driver.registration_borders().size == 0


def test_an_event_that_is_not_ready_is_no_error_and_leaves_none() -> None:
    driver, library = runtime(13000)
    library.codes["cudaEventQuery"] = 600
    assert not driver.event_is_done(1)
    assert library.last_error == 0
    assert not wait_for_event(driver, 1, timeout_s=0.01)
    library.codes["cudaEventQuery"] = 700
    with pytest.raises(CudaError, match="cudaEventQuery"):
        driver.event_is_done(1)


def test_pinned_buffers_are_registered_portable_and_mapped_and_given_back() -> None:
    driver, library = runtime(13000)
    buffer = driver.pinned_buffer_new(8192)
    assert buffer.data_ptr() % 4096 == 0
    assert ("cudaHostRegister", buffer.data_ptr(), 8192, 3) in library.calls
    address, part = buffer.data_ptr(), buffer[100:200]
    del buffer
    gc.collect()
    assert ("cudaHostUnregister", address) not in library.calls
    del part
    gc.collect()
    assert ("cudaHostUnregister", address) in library.calls


def test_neighbouring_registrations_have_a_border() -> None:
    driver, _ = runtime(13000)
    for address in (0x30000, 0x10000, 0x20000, 0x80000):
        driver.host_register(address, 0x10000)
    assert driver.registration_borders().tolist() == [0x20000, 0x30000]
    driver.host_unregister(0x20000)
    assert driver.registration_borders().tolist() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_the_driver_says_what_to_do() -> None:
    with pytest.raises(CudaError, match="torch sees no CUDA device; keep both views on the CPU"):
        cuda_driver()


def test_the_fake_notices_a_missing_event() -> None:
    """Without ordering, some seed of the deferred driver lets the copy overtake the work it should wait for."""
    outcomes = set()
    for seed in range(20):
        driver = FakeDriver(deferred=True, seed=seed)
        gpu, host = driver.device_buffer_new(8, 0), driver.pinned_buffer_new(8)
        first, second = driver.stream_new(0), driver.stream_new(0)
        driver.launch(lambda gpu=gpu: gpu.zero_(), first, 0)  # type: ignore[misc]
        driver.memcpy_async(host.data_ptr(), gpu.data_ptr(), 8, second)
        driver.run_all()
        outcomes.add(int(host[0]))
    assert outcomes == {0, 255}


def test_the_fake_refuses_what_cuda_refuses() -> None:
    driver = FakeDriver(max_batch=2)
    gpu, host = driver.device_buffer_new(64, 0), driver.pinned_buffer_new(64)
    stream, start = driver.stream_new(0), host.data_ptr() + np.arange(3) * 8
    to = gpu.data_ptr() + np.arange(3) * 8
    sizes = np.full(3, 8)
    with pytest.raises(CudaError, match="3 copies"):
        driver.memcpy_batch_async(to, start, sizes, AccessOrder.STREAM, stream)
    with pytest.raises(CudaError, match="stream 0"):
        driver.memcpy_batch_async(to[:1], start[:1], sizes[:1], AccessOrder.STREAM, 0)
    with pytest.raises(CudaError, match="width 9"):
        driver.memcpy_2d_async(gpu.data_ptr(), 8, host.data_ptr(), 16, 9, 2, stream)
    with pytest.raises(CudaError, match="not within one known buffer"):
        driver.memcpy_async(gpu.data_ptr(), host.data_ptr() + 60, 8, stream)
    driver.stream_wait(stream, event := driver.event_new(0))
    assert driver.event_is_done(event)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_driver_answers_on_a_gpu() -> None:
    driver = cuda_driver()
    assert driver.runtime_version >= 12000
    pinned, gpu = driver.pinned_buffer_new(1 << 20), driver.device_buffer_new(1 << 20, 0)
    pageable = torch.zeros(64, dtype=torch.uint8)
    kinds = [driver.memory_of(tensor.data_ptr()) for tensor in (pinned, gpu, pageable)]
    assert kinds == [Memory.PINNED, Memory.DEVICE, Memory.PAGEABLE]
    assert pinned.is_pinned()
    first = pinned.data_ptr()
    assert driver.host_device_pointer(first + 12_345) - driver.host_device_pointer(first) == 12_345
    with pytest.raises(CudaError, match="cudaHostRegister"):
        driver.host_register(8, 4096)
    assert int(torch.ones(4, device="cuda").sum()) == 4  # the failed pin did not poison the next launch
    stream, event = driver.stream_new(0), driver.event_new(0)
    driver.memcpy_async(gpu.data_ptr(), pinned.data_ptr(), 1 << 20, stream)
    driver.event_record(event, stream)
    assert wait_for_event(driver, event, timeout_s=10)
    driver.event_destroy(event)
    driver.stream_destroy(stream)


@pytest.mark.parametrize(
    ("registered", "expected"),
    [
        ({}, False),
        ({1000: 100}, False),
        ({900: 200, 1100: 50}, False),
        ({900: 150}, True),
        ({1000: 40, 1050: 50}, True),
        ({1050: 50}, True),
        ({0: 1000, 1100: 5}, False),
    ],
)
def test_gaps_between_registrations_are_found(registered: dict[int, int], expected: bool) -> None:
    assert has_gap(registered, 1000, 100) == expected
