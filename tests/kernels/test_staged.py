"""Staging keeps its two buffers apart under any order of streams, and asks the host side for one DMA per run."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.driver import CudaError
from dynamo.kernels.fake_driver import FakeDriver
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.runs import find_runs
from dynamo.kernels.staged import Staging, packed_like
from dynamo.kernels.view import View

NUM_BLOCKS, BLOCK_BYTES = 24, 2 * 2 * 4 * 2 * 32


def sides(driver: FakeDriver) -> tuple[View, View, torch.Tensor, torch.Tensor]:
    """A paged pool on the GPU, stored blocks on the host, and both as [block, layer, plane, token, head, byte]."""
    gpu, host = driver.device_buffer_new(NUM_BLOCKS * BLOCK_BYTES, 0), driver.pinned_buffer_new(NUM_BLOCKS * 2048)
    generator = torch.Generator().manual_seed(0)
    for memory in (gpu, host):
        memory.copy_(torch.randint(0, 256, memory.shape, generator=generator, dtype=torch.uint8))
    paged = gpu.view(2, 2, NUM_BLOCKS, 4, 2, 32)
    slots = host.view(NUM_BLOCKS, 2048)
    blocks = slots[:, :BLOCK_BYTES].view(NUM_BLOCKS, 2, 2, 4, 2, 32)
    pool = from_paged(paged, "LPBTHD")
    return (
        pool,
        stored(slots, num_layers=2, num_tokens=4, num_heads=2, row_bytes=32),
        paged.permute(2, 0, 1, 3, 4, 5),
        blocks,
    )


def fill(view: View, value: int) -> None:
    for tensor in view.tensors:
        tensor.fill_(value)


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([BLOCK_BYTES, 2 * BLOCK_BYTES, 7 * BLOCK_BYTES]))
@settings(deadline=None, max_examples=60)
def test_transfers_that_share_a_staging_do_not_disturb_each_other(seed: int, to_host: bool, num_bytes: int) -> None:
    rng = np.random.default_rng(seed)
    driver = FakeDriver(deferred=True, seed=seed)
    pool, slots, paged, blocks = sides(driver)
    src, dst = (paged, blocks) if to_host else (blocks, paged)
    expected = dst.clone()
    src_ids = rng.permutation(NUM_BLOCKS).reshape(3, 8)
    dst_ids = rng.permutation(NUM_BLOCKS).reshape(3, 8)
    for part in range(3):
        expected[dst_ids[part]] = src[src_ids[part]].clone()
    streams = [driver.stream_new(0), driver.stream_new(0)]
    with Staging(driver, num_bytes=num_bytes) as staging:  # from half a block to three and a half per buffer
        for part in range(3):
            move = staging.offload if to_host else staging.onboard
            views = (
                (pool, src_ids[part], slots, dst_ids[part]) if to_host else (slots, src_ids[part], pool, dst_ids[part])
            )
            move(*views, streams[part % 2])
            driver.run_some(int(rng.integers(0, 40)))
        driver.run_all()
    assert torch.equal(dst, expected)


def test_offload_and_onboard_are_mirrors() -> None:
    driver = FakeDriver(deferred=True, seed=3)
    pool, slots, paged, _ = sides(driver)
    before = paged.clone()
    stream = driver.stream_new(0)
    ids = np.random.default_rng(0).permutation(NUM_BLOCKS)
    with Staging(driver, num_bytes=6 * BLOCK_BYTES) as staging:
        staging.offload(pool, ids, slots, np.arange(NUM_BLOCKS), stream)
        driver.launch(partial(fill, pool, 0), stream, 0)
        staging.onboard(slots, np.arange(NUM_BLOCKS), pool, ids, stream)
        driver.run_all()
    assert torch.equal(paged, before)


def test_onboarding_waits_for_work_that_still_writes_the_host_side() -> None:
    for seed in range(20):
        driver = FakeDriver(deferred=True, seed=seed)
        pool, slots, paged, _ = sides(driver)
        stream = driver.stream_new(0)
        with Staging(driver, num_bytes=4 * BLOCK_BYTES) as staging:
            driver.launch(partial(fill, slots, 9), stream, 0)
            staging.onboard(slots, np.array([3]), pool, np.array([5]), stream)
            driver.run_all()
        assert (paged[5] == 9).all()


def test_what_is_contiguous_on_the_host_is_one_dma_per_buffer() -> None:
    driver = FakeDriver()
    gpu, host = (
        driver.device_buffer_new(NUM_BLOCKS * BLOCK_BYTES, 0),
        driver.pinned_buffer_new(NUM_BLOCKS * BLOCK_BYTES),
    )
    pool = from_paged(gpu.view(2, 2, NUM_BLOCKS, 4, 2, 32), "LPBTHD")
    slots = stored(host.view(NUM_BLOCKS, -1), num_layers=2, num_tokens=4, num_heads=2, row_bytes=32)
    with Staging(driver, num_bytes=2 * 6 * BLOCK_BYTES) as staging:
        order = np.random.default_rng(0).permutation(NUM_BLOCKS)
        staging.offload(pool, order, slots, np.arange(NUM_BLOCKS)[::-1].copy(), driver.stream_new(0))
    copies = [call[3].tolist() for call in driver.calls if call[0] == "memcpy_batch_async"]  # type: ignore[attr-defined]
    assert copies == [[6 * BLOCK_BYTES]] * 4


@pytest.mark.parametrize("axes", ["BLPTHD", "LPBTHD", "LBPHTD", "PLTBHD", "HBLPTD"])
def test_packed_blocks_keep_the_order_and_the_runs_of_the_view_they_mimic(axes: str) -> None:
    shape = {"B": 6, "L": 3, "P": 2, "T": 4, "H": 2, "D": 32}
    view = from_paged(torch.zeros([shape[letter] for letter in axes], dtype=torch.uint8), axes)
    packed = packed_like(view, torch.zeros(5 * view.block_bytes + 40, dtype=torch.uint8), 5)
    runs = find_runs(packed, np.arange(5), view, np.arange(1, 6))
    itself = from_paged(torch.zeros([shape[letter] for letter in axes], dtype=torch.uint8), axes)
    assert runs.num_pieces <= find_runs(itself, np.arange(5), view, np.arange(1, 6)).num_pieces
    assert packed.block_bytes == view.block_bytes
    starts = runs.expand().src
    assert starts.min() == packed.tensors[0].data_ptr()


def test_buffers_that_are_too_small_are_refused() -> None:
    driver = FakeDriver()
    pool, slots, *_ = sides(driver)
    one, stream = np.array([1]), driver.stream_new(0)
    with Staging(driver, num_bytes=BLOCK_BYTES - 2) as staging:
        assert not staging.can_hold(slots)
        with pytest.raises(KernelArgumentError, match="512 bytes of a block's layer must fit one buffer of 511"):
            staging.offload(pool, one, slots, one, stream)
    with pytest.raises(KernelArgumentError, match="staging of 1 bytes holds nothing"):
        Staging(driver, num_bytes=1)
    with pytest.raises(KernelArgumentError, match="2 packed blocks need 2048 contiguous bytes"):
        packed_like(slots, torch.zeros(2047, dtype=torch.uint8), 2)


def test_wrong_streams_ids_and_a_closed_staging_are_refused_before_anything_is_queued() -> None:
    driver = FakeDriver()
    pool, slots, *_ = sides(driver)
    staging = Staging(driver, num_bytes=4 * BLOCK_BYTES)
    stream, one, two = driver.stream_new(0), np.array([1]), np.array([2, 2])
    with pytest.raises(KernelArgumentError, match="legacy default stream"):
        staging.offload(pool, one, slots, one, 0)
    with pytest.raises(KernelArgumentError, match="dst_ids holds 2 more than once"):
        staging.onboard(slots, np.array([0, 1]), pool, two, stream)
    with pytest.raises(KernelArgumentError, match=r"dst_ids holds 99, outside \[0, 24\)"):
        staging.onboard(slots, one, pool, np.array([99]), stream)
    assert not {"launch", "memcpy_batch_async"} & {call[0] for call in driver.calls}
    staging.close()
    staging.close()
    with pytest.raises(KernelArgumentError, match="closed"):
        staging.offload(pool, one, slots, one, stream)
    assert driver.count("event_destroy") == 5


def test_a_failed_dma_is_raised_and_the_staging_stays_usable() -> None:
    driver = FakeDriver(failures={"memcpy_batch_async": 700})
    pool, slots, paged, blocks = sides(driver)
    stream = driver.stream_new(0)
    with Staging(driver, num_bytes=4 * BLOCK_BYTES) as staging:
        with pytest.raises(CudaError, match="CUDA error 700"):
            staging.offload(pool, np.array([1, 2]), slots, np.array([0, 5]), stream)
        driver.failures.clear()
        staging.offload(pool, np.array([1, 2]), slots, np.array([0, 5]), stream)
    assert torch.equal(blocks[[0, 5]], paged[[1, 2]])


def test_closing_gives_up_after_the_deadline_and_keeps_the_buffers() -> None:
    driver = FakeDriver(deferred=True)
    pool, slots, *_ = sides(driver)
    never = driver.event_new(0)
    other = driver.stream_new(0)
    blocked = driver.stream_new(0)
    staging = Staging(driver, num_bytes=4 * BLOCK_BYTES, close_timeout_s=0.0)
    driver.event_record(never, other)
    driver.stream_wait(blocked, never)
    staging.offload(pool, np.array([1]), slots, np.array([0]), blocked)
    with pytest.raises(TimeoutError, match=r"did not finish within 0\.0 s"):
        staging.close()
    driver.run_all()
    staging.close()


@pytest.mark.parametrize("to_host", [True, False])
def test_a_buffer_whose_kernel_could_not_be_queued_is_not_reused_before_its_copies_end(to_host: bool) -> None:
    class Refusing(FakeDriver):
        is_refusing = False

        def launch(self, call: Callable[[], None], stream: int, device: int) -> None:
            if self.is_refusing:
                raise KernelArgumentError("no such kernel")
            super().launch(call, stream, device)

    driver = Refusing(deferred=True)
    pool, slots, paged, blocks = sides(driver)
    src, dst = (paged, blocks) if to_host else (blocks, paged)
    stream, order = driver.stream_new(0), np.array([3, 5])
    with Staging(driver, num_bytes=4 * BLOCK_BYTES) as staging:
        move = partial(staging.offload, pool) if to_host else partial(staging.onboard, slots)
        there = slots if to_host else pool
        driver.is_refusing = True
        with pytest.raises(KernelArgumentError, match="no such kernel"):
            move(order, there, order, stream)
        marks = [call for call in driver.calls if call[0] in ("event_record", "stream_wait")][-3:]
        assert [call[0] for call in marks] == ["event_record", "stream_wait", "event_record"]
        assert marks[0][2] == stream  # what is queued there, and on the staging's own stream, is waited for
        driver.is_refusing = False
        expected = dst.clone()
        expected[[8, 9]] = src[order].clone()
        if not to_host:
            driver.run_all()
        move(order, there, np.array([8, 9]), stream)
    driver.run_all()
    assert torch.equal(dst[[8, 9]], expected[[8, 9]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_reuses_buffers_only_when_they_are_free() -> None:
    from dynamo.kernels.cuda_runtime import cuda_driver

    driver = cuda_driver()
    count = 2000
    gpu = torch.randint(0, 256, (2, 2, count, 16, 4, 128), dtype=torch.uint8).cuda()
    host = driver.pinned_buffer_new(count * 4 * 16 * 512).view(count, -1)
    slots = stored(host, num_layers=2, num_tokens=16, num_heads=4, row_bytes=128)
    pool = from_paged(gpu, "LPBTHD")
    before, order = gpu.clone(), np.random.default_rng(0).permutation(count)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with Staging(driver, num_bytes=8 << 20) as staging:
        for _ in range(5):
            staging.offload(pool, order, slots, np.arange(count), stream.cuda_stream)
            with torch.cuda.stream(stream):
                gpu.zero_()
            staging.onboard(slots, np.arange(count), pool, order, stream.cuda_stream)
        stream.synchronize()
    assert torch.equal(gpu, before)
