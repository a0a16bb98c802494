"""The host arena."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo.kernels.checks import KernelArgumentError
from dynamo.tiers import memory
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.errors import TierClosedError, TierConfigError, TierMemoryError
from dynamo.tiers.host import HostTier
from dynamo.tiers.host_budget import HostBudget
from dynamo.tiers.layout import BlockLayout


def test_rows_meet_the_device_tier(layout: BlockLayout) -> None:
    device = DeviceTier(layout, torch.float32, 4, "cpu")
    arena = HostTier(layout, 6)
    device.layer(2)[1][3] = 5.0
    assert device.read(np.array([3]), arena.rows, np.array([5])).all()
    assert device.write(np.array([0]), arena.rows, np.array([5])).all()
    assert (device.layer(2)[1][0] == 5.0).all()
    device.close()
    arena.close()


def test_more_than_the_available_memory_is_refused_naming_both_sizes(
    layout: BlockLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 1 << 30)
    with pytest.raises(TierMemoryError, match=r"needs 2\.00 GiB, 1\.00 GiB are available") as caught:
        HostTier(layout, (2 << 30) // layout.slot_bytes)
    assert caught.value.needed_bytes == 2 << 30
    assert caught.value.available_bytes == 1 << 30


def test_no_blocks_at_all_are_refused(layout: BlockLayout) -> None:
    with pytest.raises(TierConfigError, match="at least 1 block of 4096 bytes, got 0"):
        HostTier(layout, 0)


def test_views_stay_valid_after_close_and_new_ones_are_refused(layout: BlockLayout) -> None:
    arena = HostTier(layout, 2)
    rows = arena.rows
    rows[:] = 3
    arena.close()
    assert (rows == 3).all()
    with pytest.raises(TierClosedError):
        _ = arena.rows


def test_progress_ends_at_the_arena_size(layout: BlockLayout) -> None:
    seen: list[tuple[int, int]] = []
    arena = HostTier(layout, 10, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10 * layout.slot_bytes, 10 * layout.slot_bytes)]
    arena.close()


def test_staging_rows_lie_behind_all_slots_that_may_come(layout: BlockLayout) -> None:
    arena = HostTier(layout, 4, num_staging=3, max_slots=1000)
    assert (arena.num_slots, arena.max_slots, arena.num_staging) == (4, 1000, 3)
    assert arena.rows.shape == (1003, layout.slot_bytes)
    assert arena.resident_bytes == 7 * layout.slot_bytes
    arena.rows[1000:] = 1
    arena.close()


def test_slots_come_and_go_while_the_others_keep_their_bytes(layout: BlockLayout) -> None:
    seen: list[tuple[int, int]] = []
    arena = HostTier(layout, 4, num_staging=2, max_slots=2000)
    arena.rows[:4] = 4
    arena.rows[2000:] = 9
    arena.resize(1500, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1496 * layout.slot_bytes, 1496 * layout.slot_bytes)
    assert arena.num_slots == arena.stats().num_slots == 1500
    assert not arena.rows[4:1500].any()
    slots = np.arange(1500)
    arena.rows[slots] = 6
    assert arena.write(np.array([1499]), arena.rows, np.array([2001])).all()
    arena.resize(3)
    assert arena.resident_bytes == 5 * layout.slot_bytes
    assert (arena.rows[:3] == 6).all()
    assert (arena.rows[2000:] == 9).all()
    assert not arena.rows[3:2000].any(), "what was given back reads as zeros"
    with pytest.raises(KernelArgumentError):
        arena.read(np.array([3]), arena.rows, np.array([2000]))
    arena.resize(2000)
    assert not arena.rows[3:2000].any()
    arena.close()


@pytest.mark.parametrize("num_slots", [-1, 0, 9])
def test_a_size_out_of_range_is_refused(layout: BlockLayout, num_slots: int) -> None:
    arena = HostTier(layout, 4, max_slots=8)
    with pytest.raises(TierConfigError, match=f"up to 8 blocks, got {num_slots}"):
        arena.resize(num_slots)
    arena.close()
    with pytest.raises(TierClosedError):
        arena.resize(5)


def test_a_maximum_below_the_size_is_refused(layout: BlockLayout) -> None:
    with pytest.raises(TierConfigError, match="max_slots is 3"):
        HostTier(layout, 4, max_slots=3)


def test_addresses_that_cannot_be_had_cost_the_growth_only(
    layout: BlockLayout, caplog: pytest.LogCaptureFixture
) -> None:
    arena = HostTier(layout, 4, num_staging=1, max_slots=1 << 50)
    assert arena.max_slots == 4
    assert arena.rows.shape[0] == 5
    assert "cannot grow beyond its 4 blocks" in caplog.text
    arena.close()


def test_an_arena_of_staging_rows_alone_is_not_called_the_host_tier(layout: BlockLayout, tmp_path: Path) -> None:
    budget = HostBudget(tmp_path / "b", 10 * layout.slot_bytes)
    with pytest.raises(TierMemoryError, match="the buffer for transfers needs"):
        HostTier(layout, 0, num_staging=11, budget=budget)


def test_the_budget_holds_what_is_resident(layout: BlockLayout, tmp_path: Path) -> None:
    budget = HostBudget(tmp_path / "b", 10 * layout.slot_bytes)
    arena = HostTier(layout, 4, num_staging=2, max_slots=100, budget=budget)
    assert [holder.num_bytes for holder in budget.holders()] == [6 * layout.slot_bytes]
    with pytest.raises(TierMemoryError, match="the host tier needs"):
        arena.resize(9)
    assert arena.num_slots == 4
    arena.resize(8)
    with pytest.raises(TierMemoryError):
        HostTier(layout, 1, budget=budget)
    arena.resize(1)
    assert [holder.num_bytes for holder in budget.holders()] == [3 * layout.slot_bytes]
    arena.close()
    arena.close()
    assert budget.holders() == []


def test_a_start_that_fails_gives_its_budget_back(layout: BlockLayout, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    budget = HostBudget(tmp_path / "b", 10 * layout.slot_bytes)
    with pytest.raises(KeyboardInterrupt):
        HostTier(layout, 4, budget=budget, progress=stop)
    assert budget.holders() == []


def test_stats_say_which_pages_are_in_use(layout: BlockLayout) -> None:
    arena = HostTier(layout, 4)
    assert arena.stats().page_bytes in (mmap.PAGESIZE, 2 << 20)
    arena.close()
    assert arena.stats().num_slots == 4


def test_more_memory_than_is_available_is_not_taken_later_either(
    layout: BlockLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = HostTier(layout, 4, max_slots=1000)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: layout.slot_bytes)
    with pytest.raises(TierMemoryError):
        arena.resize(6)
    arena.resize(5)
    arena.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs a CUDA device")
def test_the_arena_is_pinned_while_open(layout: BlockLayout) -> None:
    arena = HostTier(layout, 8)
    assert arena.stats().path == "pinned"
    assert torch.from_numpy(arena.rows).is_pinned()
    rows = arena.rows
    arena.close()
    assert not torch.from_numpy(rows).is_pinned()
