"""Plans choose sensibly, refuse what does not fit, and keep the order of streams."""

import gc
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynamo.kernels.calibration import Calibration, Direction, Measurement, Route
from dynamo.kernels.checks import KernelArgumentError, SlotIds
from dynamo.kernels.driver import CudaError, Memory
from dynamo.kernels.fake_driver import FakeDriver
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.pinned import seen_from_device
from dynamo.kernels.plan import plan, run
from dynamo.kernels.staged import Staging
from dynamo.kernels.view import View


def ids(*numbers: int) -> SlotIds:
    return np.array(numbers, dtype=np.int64)


def pools(driver: FakeDriver, row_bytes: int = 64) -> tuple[View, View]:
    """Eight blocks on the GPU, K and V apart, and eight stored ones in pinned memory."""
    gpu, host = driver.device_buffer_new(8 * 16 * 4 * 2 * row_bytes, 0), driver.pinned_buffer_new(8 * 128 * row_bytes)
    slots = stored(host.view(8, -1), num_layers=1, num_tokens=16, num_heads=4, row_bytes=row_bytes)
    return from_paged(gpu.view(2, 8, 16, 4, row_bytes), "PBTHD"), slots


@pytest.mark.parametrize(
    ("to_host", "row_bytes", "with_staging", "expected"),
    [
        pytest.param(True, 1024, True, Route.COPY_ENGINE, id="offload-64KiB-runs"),
        pytest.param(True, 64, True, Route.STAGED, id="offload-small-runs"),
        pytest.param(True, 64, False, Route.KERNEL, id="offload-small-runs-unstaged"),
        pytest.param(False, 1024, True, Route.COPY_ENGINE, id="onboard-64KiB-runs"),
        pytest.param(False, 64, True, Route.KERNEL, id="onboard-small-runs"),
    ],
)
def test_without_a_calibration_large_runs_go_by_engine_small_ones_as_the_direction_asks(
    to_host: bool, row_bytes: int, with_staging: bool, expected: Route
) -> None:
    driver = FakeDriver(copies=False)
    count = 4096
    pool_memory = torch.empty(2 * count * 64 * row_bytes, dtype=torch.uint8)  # never touched, so never mapped
    slot_memory = torch.empty(count * 128 * row_bytes, dtype=torch.uint8)
    driver.mark(pool_memory, Memory.DEVICE)
    driver.mark(slot_memory, Memory.PINNED)
    pool = from_paged(pool_memory.view(2, count, 16, 4, row_bytes), "PBTHD")
    slots = stored(slot_memory.view(count, -1), num_layers=1, num_tokens=16, num_heads=4, row_bytes=row_bytes)
    scattered, order = np.random.default_rng(0).permutation(count), np.arange(count)
    sides = (pool, scattered, slots, order) if to_host else (slots, order, pool, scattered)
    with Staging(driver) as staging:
        copy = plan(*sides, driver=driver, staging=staging if with_staging else None)
    assert copy.route == expected
    assert set(copy.histogram) == {64 * row_bytes}


def test_within_a_gpu_a_kernel_copies_and_on_the_host_numpy() -> None:
    driver = FakeDriver()
    gpu, _ = pools(driver)
    other, host = pools(driver)
    assert plan(gpu, ids(0, 2), other, ids(4, 5), driver=driver).route == Route.KERNEL
    on_host = plan(host, ids(0, 2), pools(driver)[1], ids(4, 5), driver=driver)
    assert (on_host.route, on_host.direction, on_host.device) == (Route.HOST, Direction.ON_HOST, None)
    assert run(on_host).wait(timeout_s=0)


def test_the_calibration_decides() -> None:
    driver = FakeDriver()
    gpu, host = pools(driver)
    sides = host, ids(0, 1, 2), gpu, ids(1, 5, 3)

    def seconds(route: Route, run_bytes: int, value: float) -> Measurement:
        return Measurement(route, Direction.ONBOARD, run_bytes, 6, value)

    slow_engine, slow_kernel = seconds(Route.COPY_ENGINE, 4096, 1.0), seconds(Route.KERNEL, 4096, 0.5)
    staged, quick_engine = seconds(Route.STAGED, 4096, 1e-3), seconds(Route.COPY_ENGINE, 8192, 1e-3)
    with Staging(driver) as staging:
        for points, expected in (
            ((slow_engine, slow_kernel), Route.KERNEL),
            ((slow_engine, slow_kernel, staged), Route.KERNEL),  # staging is no faster than the DMA that it contains
            ((slow_engine, quick_engine, slow_kernel, staged), Route.STAGED),
            ((quick_engine,), Route.COPY_ENGINE),
        ):
            calibration = Calibration("Fake GPU 0", 13000, points)
            copy = plan(*sides, driver=driver, staging=staging, calibration=calibration)
            assert copy.route == expected
            assert copy.expected_s == min(copy.considered.values())
            assert copy.considered.keys() == {point.route for point in points}


def test_a_plan_can_be_run_again_and_prints_what_it_does() -> None:
    driver = FakeDriver()
    gpu, host = pools(driver, row_bytes=1024)
    copy = plan(host, ids(0, 1, 5), gpu, ids(2, 3, 7), driver=driver, route=Route.COPY_ENGINE)
    assert str(copy).splitlines()[:2] == [
        "host to device: 393216 B by copy engine",
        "  runs      6 of 65536 B",
    ]
    stream = driver.stream_new(0)
    for value in (1, 2):
        host.tensors[0].fill_(value)
        assert run(copy, stream).is_done
        assert (gpu.tensors[0][:, 7] == value).all()


def test_later_work_of_the_stream_and_of_waiting_streams_sees_the_bytes() -> None:
    for seed in range(20):
        driver = FakeDriver(deferred=True, seed=seed)
        gpu, host = pools(driver)
        other = driver.pinned_buffer_new(512)
        stream, third = driver.stream_new(0), driver.stream_new(0)
        gpu_bytes, host_bytes = (view.tensors[0].view(-1) for view in (gpu, host))
        with Staging(driver) as staging:
            gpu_bytes.fill_(7)
            copy = plan(gpu, ids(4), host, ids(0), driver=driver, staging=staging, route=Route.STAGED)
            done = run(copy, stream)
            driver.memcpy_async(int(gpu.base[0, 0]) + 4 * 4096, other.data_ptr(), 512, stream)  # overwrites the source
            done.before(third)
            back = driver.device_buffer_new(512, 0)
            driver.memcpy_async(back.data_ptr(), host_bytes.data_ptr(), 512, third)
            driver.run_all()
        assert (host_bytes[:8192] == 7).all()
        assert (back == 7).all()


def test_host_memory_is_read_early_only_where_it_is_said_to_be_stable() -> None:
    driver = FakeDriver(deferred=True)
    gpu, host = pools(driver)
    orders = []
    for stable in (False, True):
        copy = plan(host, ids(0, 3), gpu, ids(5, 1), driver=driver, route=Route.COPY_ENGINE, stable_source=stable)
        run(copy, driver.stream_new(0))
        orders.append(next(call[4] for call in reversed(driver.calls) if call[0] == "memcpy_batch_async"))
    back = plan(gpu, ids(0, 3), host, ids(5, 1), driver=driver, route=Route.COPY_ENGINE, stable_source=True)
    run(back, driver.stream_new(0))
    orders.append(next(call[4] for call in reversed(driver.calls) if call[0] == "memcpy_batch_async"))
    assert [order.name for order in orders] == ["STREAM", "ANY", "STREAM"]  # type: ignore[attr-defined]


def test_staging_and_streams_of_another_gpu_are_refused() -> None:
    driver = FakeDriver()
    gpu, host = pools(driver)
    with (
        Staging(driver, device=1, num_bytes=1 << 20) as staging,
        pytest.raises(KernelArgumentError, match="the staging is on GPU 1, the copy on GPU 0"),
    ):
        plan(gpu, ids(0), host, ids(1), driver=driver, staging=staging)
    copy = plan(gpu, ids(0), host, ids(1), driver=driver)
    elsewhere = SimpleNamespace(device=torch.device("cuda", 1), cuda_stream=driver.stream_new(1))
    before = len(driver.calls)
    with pytest.raises(KernelArgumentError, match="the stream is on cuda:1, the copy on GPU 0"):
        run(copy, elsewhere)  # type: ignore[arg-type]
    assert len(driver.calls) == before


def test_host_memory_that_is_pinned_at_its_ends_only_is_refused() -> None:
    driver = FakeDriver()
    gpu, _ = pools(driver)
    memory = torch.zeros(8, 8192, dtype=torch.uint8)
    slots = stored(memory, num_layers=1, num_tokens=16, num_heads=4, row_bytes=64)
    for first in (0, 6):
        driver.host_register(memory[first].data_ptr(), 2 * 8192)
    with pytest.raises(KernelArgumentError, match="dst is pageable host memory"):
        plan(gpu, ids(0), slots, ids(1), driver=driver)
    with pytest.raises(KernelArgumentError, match=r"not all of the 65536 bytes of host memory at .* are pinned"):
        seen_from_device(slots, driver)
    driver.host_register(memory[2].data_ptr(), 4 * 8192)
    assert plan(gpu, ids(0), slots, ids(1), driver=driver).direction == Direction.OFFLOAD
    assert np.array_equal(seen_from_device(slots, driver).base, slots.base)


def test_destinations_that_are_one_place_are_refused() -> None:
    src, other = (from_paged(torch.zeros(4, 16, 2, 8), "BTHD") for _ in range(2))
    aliased = replace(other, block_offsets=other.block_offsets[[0, 1, 2, 1]])
    with pytest.raises(KernelArgumentError, match="blocks of the destination lie at the same place"):
        plan(src, ids(0, 1), aliased, ids(2, 3))
    run(plan(aliased, ids(1, 3), src, ids(0, 1)))
    layer = torch.zeros(4, 16, 2, 8)
    layers, same = from_paged([torch.zeros(4, 16, 2, 8) for _ in range(2)], "BTHD"), from_paged([layer, layer], "BTHD")
    with pytest.raises(KernelArgumentError, match="layers or planes of the destination lie at the same place"):
        plan(layers, ids(0, 1), same, ids(2, 3))
    run(plan(same, ids(2, 3), layers, ids(0, 1)))


def test_what_does_not_fit_is_refused_before_anything_is_submitted() -> None:
    driver = FakeDriver()
    gpu, host = pools(driver)
    pageable = stored(torch.zeros(8, 8192, dtype=torch.uint8), num_layers=1, num_tokens=16, num_heads=4, row_bytes=64)
    mixed = [driver.device_buffer_new(8 * 8192, 0), driver.pinned_buffer_new(8 * 8192)]
    before = len(driver.calls)
    for match, call in {
        "src is pageable host memory; pin it": lambda: plan(pageable, ids(0), gpu, ids(0), driver=driver),
        "dst is pageable host memory": lambda: plan(gpu, ids(0), pageable, ids(0), driver=driver),
        r"src_ids holds 8, outside \[0, 8\)": lambda: plan(host, ids(8), gpu, ids(0), driver=driver),
        "src_ids must be a 1-D numpy int64 array, got list": lambda: plan(
            host,
            [0],  # type: ignore[arg-type]
            gpu,
            ids(0),
            driver=driver,
        ),
        "dst_ids holds -1": lambda: plan(host, ids(0), gpu, ids(-1), driver=driver),
        "dst_ids holds 3 more than once": lambda: plan(host, ids(0, 1), gpu, ids(3, 3), driver=driver),
        "2 blocks of 16 tokens and 1 blocks of 16 tokens": lambda: plan(host, ids(0, 1), gpu, ids(3), driver=driver),
        "sm_budget is 0": lambda: plan(host, ids(0), gpu, ids(3), driver=driver, sm_budget=0),
        "staged is not possible here": lambda: plan(host, ids(0), gpu, ids(3), driver=driver, route=Route.STAGED),
        "tensors must be alike, got device, pinned": lambda: plan(
            from_paged([m.view(2, 8, 16, 4, 64) for m in mixed], "PBTHD").slice_layers(0, 2),
            ids(0),
            from_paged([m.view(2, 8, 16, 4, 64) for m in mixed], "PBTHD"),
            ids(1),
            driver=driver,
        ),
    }.items():
        with pytest.raises(KernelArgumentError, match=match):
            call()
    copy = plan(host, ids(0), gpu, ids(3), driver=driver, route=Route.COPY_ENGINE)
    with pytest.raises(KernelArgumentError, match="a copy host to device needs a stream"):
        run(copy)
    with pytest.raises(KernelArgumentError, match="legacy default stream"):
        run(copy, 0)
    assert {call[0] for call in driver.calls[before:]} <= {"event_destroy"}


def test_a_failing_call_is_raised_and_its_event_given_back() -> None:
    driver = FakeDriver(failures={"memcpy_batch_async": 700})
    gpu, host = pools(driver)
    copy = plan(host, ids(0, 2), gpu, ids(3, 1), driver=driver, route=Route.COPY_ENGINE)
    with pytest.raises(CudaError, match="memcpy_batch_async failed with CUDA error 700") as raised:
        run(copy, driver.stream_new(0))
    assert not raised.value.is_unsupported
    del raised
    gc.collect()
    assert driver.count("event_destroy") == 1


def test_nothing_to_copy_is_done_at_once() -> None:
    driver = FakeDriver()
    gpu, host = pools(driver)
    none = np.zeros(0, dtype=np.int64)
    copy = plan(host, none, gpu, none, driver=driver)
    assert (copy.num_bytes, copy.considered, dict(copy.histogram)) == (0, {}, {})
    assert run(copy, driver.stream_new(0)).is_done
    assert not {"memcpy_batch_async", "memcpy_async"} & {call[0] for call in driver.calls}


@pytest.mark.parametrize(
    ("axes", "num_blocks", "rows"),
    [("LPBTHD", 1024, (32, 2)), ("BD", 65536, ())],
    ids=["1024-blocks-of-64-pieces", "65536-blocks"],
)
def test_65536_pieces_cost_little_to_plan_and_submit(axes: str, num_blocks: int, rows: tuple[int, ...]) -> None:
    """The budget is 2 ms; CPU time of the best of some runs is compared with twice that, for slower machines."""
    driver = FakeDriver(copies=False)
    shape = [*rows, num_blocks, 16, 1, 64] if rows else [num_blocks, 512]
    size = int(np.prod(shape))
    gpu, host = (torch.empty(size, dtype=torch.uint8) for _ in range(2))  # never touched
    driver.mark(gpu, Memory.DEVICE)
    driver.mark(host, Memory.PINNED)
    pool = from_paged(gpu.view(shape), axes)
    if rows:
        slots = stored(host.view(num_blocks, -1), num_layers=32, num_tokens=16, num_heads=1, row_bytes=64)
    else:
        slots = from_paged(host.view(shape), axes)
    rng, stream, best = np.random.default_rng(0), driver.stream_new(0), float("inf")
    src_ids, dst_ids = rng.permutation(num_blocks), rng.permutation(num_blocks)
    for _ in range(15):
        driver.calls.clear()
        started = time.thread_time()
        copy = plan(pool, src_ids, slots, dst_ids, driver=driver, route=Route.COPY_ENGINE)
        run(copy, stream)
        best = min(best, time.thread_time() - started)
    assert copy.runs.num_pieces > 65000
    assert driver.count("memcpy_batch_async") == 16
    assert best < 4e-3
