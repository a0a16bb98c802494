"""Every route moves exactly the right bytes, whatever the layouts and whichever stream runs first."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynamo.kernels.calibration import Direction, Route
from dynamo.kernels.checks import SlotIds
from dynamo.kernels.fake_driver import FakeDriver
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.plan import plan, run
from dynamo.kernels.staged import Staging
from dynamo.kernels.view import View

SIZES = {"L": 3, "P": 2, "T": 4, "H": 4, "D": 24}


def ids(*numbers: int) -> SlotIds:
    return np.array(numbers, dtype=np.int64)


@dataclass
class Pool:
    """Blocks in some layout, in memory of which padding is a part."""

    memory: list[Tensor]
    view: View
    blocks: Callable[[list[Tensor]], Tensor]
    """The blocks in given memory as [B, L, P, T, H, D], a copy."""
    store: Callable[[list[Tensor], SlotIds, Tensor], None]
    """Reference: writes whole blocks into given memory."""


@dataclass(frozen=True)
class Layout:
    """Order of the axes, bytes of padding behind each row, and whether each layer has a buffer of its own."""

    axes: str
    padding: int
    splits_layers: bool

    def build(self, new: Callable[[int], Tensor], sizes: dict[str, int], seed: int) -> Pool:
        axes = self.axes.replace("L", "") if self.splits_layers else self.axes
        shape = [sizes[letter] for letter in axes] + [sizes["D"] + self.padding]
        memory = [new(int(np.prod(shape))) for _ in range(sizes["L"] if self.splits_layers else 1)]
        generator = torch.Generator().manual_seed(seed)
        for buffer in memory:
            buffer.copy_(torch.randint(0, 256, buffer.shape, generator=generator, dtype=torch.uint8))
        letters = axes + "D"
        canonical = [letters.index(letter) for letter in "BLPTHD" if letter in letters]

        def rows(buffers: list[Tensor]) -> list[Tensor]:
            return [b.view(shape)[..., : sizes["D"]].permute(canonical) for b in buffers]

        def blocks(buffers: list[Tensor]) -> Tensor:
            return torch.stack(rows(buffers), dim=1) if self.splits_layers else rows(buffers)[0].clone()

        def write(buffers: list[Tensor], at: SlotIds, values: Tensor) -> None:
            index = torch.from_numpy(at)
            if not self.splits_layers:
                rows(buffers)[0][index] = values
                return
            for layer, target in enumerate(rows(buffers)):
                target[index] = values[:, layer]

        tensors = [buffer.view(shape)[..., : sizes["D"]] for buffer in memory]
        view = from_paged(tensors if self.splits_layers else tensors[0], letters)
        return Pool(memory, view, blocks, write)


def layouts() -> st.SearchStrategy[Layout]:
    orders = st.permutations("BLPTH").map("".join)
    return st.builds(Layout, orders, st.sampled_from([0, 0, 8, 3]), st.booleans())


def copied(src: Pool, src_ids: SlotIds, dst: Pool, dst_ids: SlotIds) -> list[Tensor]:
    """The destination's memory as it must be after the copy."""
    memory = [buffer.clone() for buffer in dst.memory]
    dst.store(memory, dst_ids, src.blocks(src.memory)[torch.from_numpy(src_ids)])
    return memory


@given(
    layouts(),
    layouts(),
    st.sampled_from(list(Direction)[:3]),
    st.sampled_from([Route.COPY_ENGINE, Route.KERNEL, Route.STAGED]),
    st.integers(0, 6),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_every_route_moves_exactly_the_blocks_asked_for(
    src_layout: Layout, dst_layout: Layout, direction: Direction, route: Route, num_pairs: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    driver = FakeDriver(deferred=True, seed=seed, version=int(rng.choice([12060, 12080, 13000])))
    on_gpu = lambda n: driver.device_buffer_new(n, 0)  # noqa: E731
    new_src = driver.pinned_buffer_new if direction == Direction.ONBOARD else on_gpu
    new_dst = driver.pinned_buffer_new if direction == Direction.OFFLOAD else on_gpu
    src = src_layout.build(new_src, SIZES | {"B": 7}, seed)
    dst = dst_layout.build(new_dst, SIZES | {"B": 9}, seed + 1)
    src_ids = rng.integers(0, 7, num_pairs)
    dst_ids = np.sort(rng.permutation(9)[:num_pairs]) if seed % 2 else rng.permutation(9)[:num_pairs]
    expected = copied(src, src_ids, dst, dst_ids)
    layer_bytes = src.view.block_bytes // SIZES["L"]
    with Staging(driver, num_bytes=int(rng.choice([2 * layer_bytes, 5 * layer_bytes, 1 << 20]))) as staging:
        if direction == Direction.ON_DEVICE and route == Route.STAGED:
            route = Route.KERNEL
        copy = plan(src.view, src_ids, dst.view, dst_ids, driver=driver, staging=staging, route=route)
        assert copy.num_bytes == num_pairs * src.view.block_bytes
        assert sum(size * count for size, count in copy.histogram.items()) == copy.num_bytes
        done = run(copy, driver.stream_new(0))
        assert done.wait(timeout_s=60)
    for found, wanted in zip(dst.memory, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("route", [Route.COPY_ENGINE, Route.KERNEL, Route.STAGED])
def test_layers_heads_head_groups_and_block_sizes_are_reconciled(route: Route) -> None:
    driver = FakeDriver(deferred=True)
    gpu = driver.device_buffer_new(6 * 2 * 3 * 8 * 2 * 16, 0)
    host = driver.pinned_buffer_new(4 * 8192)
    generator = torch.Generator().manual_seed(0)
    gpu.copy_(torch.randint(0, 256, gpu.shape, generator=generator, dtype=torch.uint8))
    rank = gpu.view(3, 2, 6, 8, 2, 16)  # layer, plane, block of 8 tokens, token, 2 of the 4 heads, byte
    pool = from_paged(rank, "LPBTHD")
    slots = stored(host.view(4, 8192), num_layers=3, num_tokens=16, num_heads=4, row_bytes=16, head_groups=4)
    with Staging(driver, num_bytes=1 << 20) as staging:
        copy = plan(
            pool,
            ids(5, 0, 2, 3),
            slots,
            ids(3, 1),
            layers=(1, 3),
            heads=(2, 4),
            driver=driver,
            staging=staging,
            route=route,
        )
        assert run(copy, driver.stream_new(0)).wait(timeout_s=60)
    found = host.view(4, 8192)[:, : 4 * 3 * 2 * 16 * 16].view(4, 4, 3, 2, 16, 16)  # slot, group, layer, plane, token
    for slot, first, second in ((3, 5, 0), (1, 2, 3)):
        tokens = torch.cat([rank[:, :, first], rank[:, :, second]], dim=2)  # layer, plane, token, head, byte
        assert torch.equal(found[slot, 2:, 1:], tokens.permute(3, 0, 1, 2, 4)[:, 1:])
        assert (found[slot, :2] == 0xFF).all()
        assert (found[slot, :, 0] == 0xFF).all()
    assert (found[0] == 0xFF).all()
    assert (found[2] == 0xFF).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("route", [None, Route.COPY_ENGINE, Route.KERNEL, Route.STAGED])
@pytest.mark.parametrize("to_host", [True, False])
def test_every_route_moves_the_same_bytes_on_a_gpu(route: Route | None, to_host: bool) -> None:
    from dynamo.kernels.cuda_runtime import cuda_driver

    driver = cuda_driver()
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randint(0, 256, (2, 5000, 16, 4, 128), dtype=torch.uint8, generator=generator) for _ in range(2)]
    gpu = [layer.cuda() for layer in layers]
    host = driver.pinned_buffer_new(5000 * 2 * 2 * 16 * 4 * 128)
    host.copy_(torch.randint(0, 256, host.shape, dtype=torch.uint8, generator=generator))
    pool = from_paged(gpu, "PBTHD")
    slots = stored(host.view(5000, -1), num_layers=2, num_tokens=16, num_heads=4, row_bytes=128, head_groups=2)
    rng = np.random.default_rng(1)
    pool_ids, slot_ids = rng.permutation(5000)[:4500], rng.permutation(5000)[:4500]
    blocks = torch.stack(layers, dim=1)  # plane, layer, block, token, head, byte
    grouped = host.view(5000, 2, 2, 2, 16, 2, 128)  # slot, group, layer, plane, token, head, byte
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with Staging(driver, num_bytes=16 << 20) as staging:
        sides = (pool, pool_ids, slots, slot_ids) if to_host else (slots, slot_ids, pool, pool_ids)
        copy = plan(*sides, driver=driver, staging=staging, route=route)
        submission = run(copy, stream)
        assert submission.wait(timeout_s=60)
    at, of = torch.from_numpy(slot_ids), torch.from_numpy(pool_ids)
    found = grouped[at].permute(3, 2, 0, 4, 1, 5, 6).reshape(2, 2, 4500, 16, 4, 128)
    on_gpu = torch.stack([layer.cpu() for layer in gpu], dim=1)[:, :, of]
    assert torch.equal(found, on_gpu)
    if to_host:
        assert torch.equal(found, blocks[:, :, of])
