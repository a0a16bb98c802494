"""The device tier: layer views over the stored form, and copies on a GPU."""

import numpy as np
import pytest
import torch

from dynamo.kernels.checks import Rows
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.errors import TierClosedError, TierConfigError
from dynamo.tiers.host import HostTier
from dynamo.tiers.layout import BlockLayout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_layers_lie_in_the_stored_order(dtype: torch.dtype) -> None:
    layout = BlockLayout(num_layers=2, block_size=4, num_kv_heads=3, head_dim=6, itemsize=dtype.itemsize)
    tier = DeviceTier(layout, dtype, 5, "cpu")
    expected = np.random.default_rng(0).integers(0, 100, (2, 2, 5, 4, 3, 6)).astype(np.float32)
    for i in range(2):
        for plane, values in zip(tier.layer(i), torch.from_numpy(expected[i]), strict=True):
            assert plane.shape == (5, 4, 3, 6)
            plane.copy_(values.to(dtype))
    rows = np.zeros((5, layout.slot_bytes), dtype=np.uint8)
    assert tier.read(np.arange(5), rows, np.arange(5)).all()
    stored = torch.from_numpy(rows[:, : layout.block_bytes].copy()).view(dtype).view(5, 2, 2, 4, 3, 6)
    assert torch.equal(stored.float(), torch.from_numpy(expected).to(dtype).float().permute(2, 0, 1, 3, 4, 5))
    tier.close()


def test_layers_take_index_put_and_give_gather(layout: BlockLayout) -> None:
    tier = DeviceTier(layout, torch.float32, 6, "cpu")
    key, _ = tier.layer(1)
    new = torch.arange(1.0, 1 + 3 * layout.token_bytes // 4).view(3, layout.num_kv_heads, layout.head_dim)
    key[torch.tensor([5, 0, 5]), torch.tensor([0, 2, 3])] = new
    gathered = key[torch.tensor([5, 0])]
    assert torch.equal(gathered[0, 0], new[0])
    assert torch.equal(gathered[0, 3], new[2])
    assert torch.equal(gathered[1, 2], new[1])
    assert torch.count_nonzero(key) == new.numel()
    tier.close()


def test_views_stay_valid_after_close(layout: BlockLayout) -> None:
    tier = DeviceTier(layout, torch.float32, 6, "cpu")
    key, _ = tier.layer(0)
    key[:] = 2.0
    tier.close()
    assert (key == 2.0).all()
    with pytest.raises(TierClosedError):
        tier.layer(0)


def test_the_cpu_needs_no_fence(layout: BlockLayout, rows: Rows) -> None:
    tier = DeviceTier(layout, torch.float32, 6, "cpu")
    assert tier.fences() == []
    assert tier.read(np.array([1]), rows, np.array([1]), after=()).all()
    assert tier.stats().path == "memory"
    tier.close()


def test_wrong_settings_are_refused(layout: BlockLayout) -> None:
    with pytest.raises(TierConfigError, match="at least 1 block, got 0"):
        DeviceTier(layout, torch.float32, 0, "cpu")
    with pytest.raises(TierConfigError, match="takes 2 bytes, the layout says 4"):
        DeviceTier(layout, torch.float16, 1, "cpu")
    with pytest.raises(TierConfigError, match="'meta' is not supported"):
        DeviceTier(layout, torch.float32, 1, "meta")
    tier = DeviceTier(layout, torch.float32, 1, "cpu")
    with pytest.raises(TierConfigError, match="layer 3 does not exist"):
        tier.layer(3)
    tier.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_cuda_without_cuda_is_refused(layout: BlockLayout) -> None:
    with pytest.raises(TierConfigError, match="CUDA is not available"):
        DeviceTier(layout, torch.float32, 1, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_go_to_the_gpu_and_back_behind_queued_work(layout: BlockLayout) -> None:
    tier = DeviceTier(layout, torch.float32, 16, "cuda")
    arena = HostTier(layout, 16)
    rng = np.random.default_rng(0)
    arena.rows[:] = rng.integers(0, 256, arena.rows.shape, dtype=np.uint8)
    source = arena.rows.copy()
    slots, row_ids = rng.permutation(16)[:9], rng.permutation(16)[:9]
    assert tier.write(slots, arena.rows, row_ids, after=tier.fences()).all()
    arena.rows[:] = 0
    assert tier.read(slots, arena.rows, row_ids).all()
    assert (arena.rows[row_ids] == source[row_ids]).all()

    key, _ = tier.layer(0)
    work = torch.randn(2048, 2048, device="cuda")
    for _ in range(50):
        work = work @ work / 2048
    key[:] = work.sum() * 0 + 3.0
    assert tier.read(np.arange(16), arena.rows, np.arange(16), after=tier.fences()).all()
    floats = arena.rows[:, : layout.plane_bytes].view(np.float32)
    assert (floats == 3.0).all()
    tier.close()
    arena.close()


@pytest.mark.parametrize(("first", "end"), [(0, 1), (1, 2), (2, 3), (0, 3), (1, 3)])
@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4], [5, 0, 3, 1, 4], [2, 3, 4, 0, 1]], ids=str)
def test_layers_travel_alone_and_touch_no_other(
    layout: BlockLayout, rows: Rows, slots: list[int], first: int, end: int
) -> None:
    tier = DeviceTier(layout, torch.float32, 6, "cpu")
    row_ids = np.array([7, 8, 9, 30, 11])
    before = rows.copy()
    columns = slice(2 * first * layout.plane_bytes, 2 * end * layout.plane_bytes)
    tier.write_layers(np.array(slots), rows, row_ids, range(first, end))
    stored = np.zeros((5, layout.slot_bytes), dtype=np.uint8)
    assert tier.read(np.array(slots), stored, np.arange(5)).all()
    expected = np.zeros_like(stored)
    expected[:, columns] = before[row_ids, columns]
    assert (stored == expected).all()

    rows[:] = 7
    tier.read_layers(np.array(slots), rows, row_ids, range(first, end))
    expected_rows = np.full_like(rows, 7)
    expected_rows[row_ids, columns] = before[row_ids, columns]
    assert (rows == expected_rows).all()
    tier.close()


def test_layers_that_do_not_exist_are_refused(layout: BlockLayout, rows: Rows) -> None:
    tier = DeviceTier(layout, torch.float32, 6, "cpu")
    ids = np.array([0])
    for layers in (range(2, 4), range(-1, 1), range(0, 3, 2)):
        with pytest.raises(TierConfigError, match="no consecutive layers"):
            tier.write_layers(ids, rows, ids, layers)
    tier.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_go_to_the_gpu_and_back(layout: BlockLayout) -> None:
    tier = DeviceTier(layout, torch.float32, 16, "cuda")
    arena = HostTier(layout, 16)
    rng = np.random.default_rng(0)
    arena.rows[:] = rng.integers(0, 256, arena.rows.shape, dtype=np.uint8)
    source = arena.rows.copy()
    slots, row_ids = rng.permutation(16)[:9], rng.permutation(16)[:9]
    for i in range(layout.num_layers):
        tier.write_layers(slots, arena.rows, row_ids, range(i, i + 1), after=tier.fences())
    arena.rows[:] = 0
    for i in reversed(range(layout.num_layers)):
        tier.read_layers(slots, arena.rows, row_ids, range(i, i + 1), after=tier.fences())
    payload = slice(0, layout.block_bytes)
    assert (arena.rows[row_ids, payload] == source[row_ids, payload]).all()
    tier.close()
    arena.close()
