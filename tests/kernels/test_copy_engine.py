"""Pieces reach their places byte for byte, in as few calls as the driver allows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.copy_engine import MAX_BATCH, copy_pieces, copy_runs
from dynamo.kernels.driver import CudaError, Memory
from dynamo.kernels.fake_driver import FakeDriver
from dynamo.kernels.layouts import from_paged
from dynamo.kernels.pieces import Pieces
from dynamo.kernels.runs import find_runs


def buffers(driver: FakeDriver, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pinned memory, and as much GPU memory."""
    host = driver.pinned_buffer_new(num_bytes)
    host.copy_(torch.randint(0, 256, (num_bytes,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8))
    return host, driver.device_buffer_new(num_bytes, 0)


def expect_copied(driver: FakeDriver, src_at: list[int], dst_at: list[int], sizes: list[int]) -> None:
    """Copies within 64 KiB buffers and compares with the plain loop; sizes fit, destinations do not overlap."""
    host, gpu = buffers(driver, 1 << 16)
    expected = gpu.clone()
    for src, dst, size in zip(src_at, dst_at, sizes, strict=True):
        expected[dst : dst + size] = host[src : src + size]
    pieces = Pieces.of(host.data_ptr() + np.array(src_at), gpu.data_ptr() + np.array(dst_at), sizes)
    copy_pieces(pieces, driver, driver.stream_new(0))
    driver.run_all()
    assert torch.equal(gpu, expected)


@st.composite
def scattered(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Runs of pieces that step evenly or not, contiguous or not, on either side."""
    src_at: list[int] = []
    dst_at: list[int] = []
    sizes: list[int] = []
    dst = 0
    for _ in range(draw(st.integers(0, 5))):
        size, rows = draw(st.integers(1, 40)), draw(st.integers(1, 12))
        src, src_gap, dst_gap = draw(st.integers(0, 9000)), draw(st.integers(0, 9)), draw(st.sampled_from([0, 0, 5]))
        for _ in range(rows):
            src_at.append(src)
            dst_at.append(dst)
            sizes.append(size)
            src += size + src_gap
            dst += size + dst_gap
        dst += draw(st.sampled_from([0, 3]))
    return src_at, dst_at, sizes


@given(scattered(), st.sampled_from([12060, 12080, 13000]), st.integers(0, 1000))
@settings(deadline=None, max_examples=150)
def test_pieces_arrive_whether_batched_pitched_or_single(
    pieces: tuple[list[int], list[int], list[int]], version: int, seed: int
) -> None:
    expect_copied(FakeDriver(deferred=True, seed=seed, version=version), *pieces)


def test_contiguous_pieces_are_one_copy() -> None:
    driver = FakeDriver()
    expect_copied(driver, [100, 164, 300], [0, 64, 500], [64, 64, 64])
    (call,) = [call for call in driver.calls if call[0] == "memcpy_batch_async"]
    assert isinstance(call[3], np.ndarray)
    assert call[3].tolist() == [128, 64]


def test_long_lists_are_cut_into_batches_that_drivers_survive() -> None:
    driver = FakeDriver(max_batch=MAX_BATCH)
    order = np.random.default_rng(0).permutation(10_000)
    expect_copied(driver, (order * 4).tolist(), (np.arange(10_000) * 6).tolist(), [3] * 10_000)
    lengths = [call[1].size for call in driver.calls if call[0] == "memcpy_batch_async"]  # type: ignore[attr-defined]
    assert max(lengths) <= MAX_BATCH
    assert sum(lengths) == 10_000


def test_long_even_stretches_are_one_pitched_copy_beside_the_batch() -> None:
    driver = FakeDriver()
    rows = np.arange(300)
    src_at = [*(rows * 50).tolist(), 40_000, 41_000]
    dst_at = [*(rows * 70).tolist(), 50_000, 49_000]
    expect_copied(driver, src_at, dst_at, [20] * 302)
    assert driver.count("memcpy_2d_async") == 1
    assert [call[1].size for call in driver.calls if call[0] == "memcpy_batch_async"] == [2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("src_step", [-64, 0, 30])
def test_stretches_that_no_pitch_describes_are_not_pitched(src_step: int) -> None:
    driver = FakeDriver()
    rows = np.arange(300)
    expect_copied(driver, (32_000 + rows * src_step).tolist(), (rows * 64).tolist(), [40] * 300)
    assert driver.count("memcpy_2d_async") == 0


def test_without_batches_stretches_are_pitched_and_the_rest_copied_singly() -> None:
    driver = FakeDriver(version=12040)
    expect_copied(driver, [0, 50, 100, 900, 7000], [0, 30, 60, 500, 400], [20, 20, 20, 9, 8])
    assert (driver.count("memcpy_2d_async"), driver.count("memcpy_async")) == (1, 2)


def test_a_driver_that_says_not_supported_is_asked_once() -> None:
    driver = FakeDriver(failures={"memcpy_batch_async": 801})
    order = np.random.default_rng(0).permutation(9_000)
    expect_copied(driver, (order * 5).tolist(), (np.arange(9_000) * 7).tolist(), [3] * 9_000)
    assert driver.count("memcpy_batch_async") == 1
    assert driver.count("memcpy_async") + driver.count("memcpy_2d_async") > 8_000


def test_other_errors_are_raised() -> None:
    driver = FakeDriver(failures={"memcpy_batch_async": 700})
    with pytest.raises(CudaError, match="memcpy_batch_async failed with CUDA error 700") as raised:
        expect_copied(driver, [0, 100], [0, 200], [10, 10])
    assert (raised.value.code, raised.value.call, raised.value.is_unsupported) == (700, "memcpy_batch_async", False)


def test_copies_do_not_cross_from_one_registration_into_the_next() -> None:
    driver = FakeDriver()
    host, gpu = torch.arange(4096).to(torch.uint8), driver.device_buffer_new(8192, 0)
    for start in (0, 1024, 2048):
        driver.host_register(host.data_ptr() + start, 1024)
    assert (driver.registration_borders() - host.data_ptr()).tolist() == [1024, 2048]
    pieces = Pieces.of(host.data_ptr() + np.array([100, 3000 - 512]), gpu.data_ptr() + np.array([0, 4000]), [2500, 99])
    copy_pieces(pieces, driver, driver.stream_new(0))
    (call,) = [call for call in driver.calls if call[0] == "memcpy_batch_async"]
    assert sorted(call[3].tolist()) == [99, 552, 924, 1024]  # type: ignore[attr-defined]
    assert torch.equal(gpu[:2500], host[100:2600])
    driver.host_unregister(host.data_ptr() + 1024)
    assert driver.registration_borders().size == 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((2, 4), dtype=np.int64), r"C-contiguous int64 \[3, n\]"),
        (np.ones((3, 4), dtype=np.int32), "got int32"),
        (np.ones((3, 8), dtype=np.int64)[:, ::2], "C-contiguous"),
        (np.array([[1], [1], [0]]), "piece 0 has 0 bytes"),
        (np.array([[1, 5], [1, -9], [8, 8]]), "address -9 is negative"),
    ],
)
def test_malformed_tables_never_reach_the_driver(table: np.ndarray, message: str) -> None:  # type: ignore[type-arg]
    driver = FakeDriver()
    with pytest.raises(KernelArgumentError, match=message):
        copy_pieces(Pieces(table), driver, driver.stream_new(0))
    assert driver.calls == []


@pytest.mark.parametrize("stream", [0, 1])
def test_the_legacy_default_stream_is_refused(stream: int) -> None:
    driver = FakeDriver()
    with pytest.raises(KernelArgumentError, match="refuse the legacy default stream"):
        copy_pieces(Pieces.of([1], [2], [3]), driver, stream)
    assert driver.calls == []


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(KernelArgumentError, match="equally long"):
        Pieces.of([1, 2], [2], [3])


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), max_size=12), st.sets(st.integers(1, 400), max_size=6)
)
@settings(deadline=None, max_examples=100)
def test_splitting_keeps_every_byte_and_respects_the_borders(
    gaps_and_sizes: list[tuple[int, int]], border_set: set[int]
) -> None:
    src_at, at = [], 0
    for gap, size in gaps_and_sizes:
        src_at.append(at + gap)
        at += gap + size
    sizes = [size for _, size in gaps_and_sizes]
    pieces = Pieces.of(src_at, [1000 + 2 * start for start in src_at], sizes)
    borders = np.array(sorted(border_set), dtype=np.int64)
    split = pieces.split_at(borders, "src")

    def moved(pieces: Pieces) -> list[tuple[int, int]]:
        rows = pieces.table.T.tolist()
        return [(src + i, dst + i) for src, dst, size in rows for i in range(size)]

    assert moved(split) == moved(pieces)
    assert not any(src < border < src + size for src, _, size in split.table.T.tolist() for border in border_set)
    assert moved(split.merged()) == moved(pieces)


def adjacent_layers(driver: FakeDriver, memory: Memory, num_blocks: int) -> list[torch.Tensor]:
    """Two layers [num_blocks, 64] in allocations of their own, the second right behind the first."""
    both = np.full(2 * num_blocks * 64, 7, dtype=np.uint8)
    halves = [torch.from_numpy(half).view(num_blocks, 64) for half in np.split(both, 2)]
    for half in halves:
        driver.mark(half, memory)
    assert halves[0].data_ptr() + halves[0].nbytes == halves[1].data_ptr()
    return halves


@pytest.mark.parametrize("version", [12060, 13000])
@pytest.mark.parametrize("step", [1, 2])
def test_no_copy_reaches_from_one_allocation_into_the_next(version: int, step: int) -> None:
    driver = FakeDriver(version=version)
    host, gpu = (adjacent_layers(driver, kind, 800) for kind in (Memory.PINNED, Memory.DEVICE))
    for layer in host:
        layer.copy_(torch.randint(0, 256, layer.shape, dtype=torch.uint8))
    chosen = np.arange(0, 800, step)  # one run of each layer, or pieces that step evenly through both
    copy_runs(find_runs(from_paged(host, "BD"), chosen, from_paged(gpu, "BD"), chosen), driver, driver.stream_new(0))
    for ours, theirs in zip(gpu, host, strict=True):
        assert torch.equal(ours[::step], theirs[::step])
        assert step == 1 or (ours[1::step] == 7).all()


def test_the_stand_in_refuses_a_pitched_copy_across_two_allocations() -> None:
    driver = FakeDriver()
    host, gpu = (adjacent_layers(driver, kind, 4)[0].data_ptr() for kind in (Memory.PINNED, Memory.DEVICE))
    driver.memcpy_2d_async(gpu, 64, host, 64, 32, 4, driver.stream_new(0))
    with pytest.raises(CudaError, match="not within one known buffer"):
        driver.memcpy_2d_async(gpu, 64, host, 64, 32, 5, driver.stream_new(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("num_pieces", "size"), [(1, 7), (5000, 512), (65536, 1000), (300, 64 << 10)])
def test_real_copy_engines_move_scattered_pieces_both_ways(num_pieces: int, size: int) -> None:
    from dynamo.kernels.cuda_runtime import cuda_driver

    driver = cuda_driver()
    host = driver.pinned_buffer_new(num_pieces * size)
    host.copy_(torch.randint(0, 256, host.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2)))
    gpu, back = driver.device_buffer_new(num_pieces * size, 0), driver.pinned_buffer_new(num_pieces * size)
    order = np.random.default_rng(3).permutation(num_pieces).astype(np.int64) * size
    in_order = np.arange(num_pieces, dtype=np.int64) * size
    stream = torch.cuda.Stream()
    sizes = np.full(num_pieces, size)
    there = Pieces.of(host.data_ptr() + in_order, gpu.data_ptr() + order, sizes)
    copy_pieces(there, driver, stream.cuda_stream, stable_source=True)
    copy_pieces(Pieces.of(gpu.data_ptr() + order, back.data_ptr() + in_order, sizes), driver, stream.cuda_stream)
    stream.synchronize()
    assert torch.equal(back, host)
    assert torch.equal(gpu.cpu().view(num_pieces, size)[torch.from_numpy(order // size)], host.view(num_pieces, size))
