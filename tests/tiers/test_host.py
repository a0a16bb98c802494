"""The host arena."""

import numpy as np
import pytest
import torch

from dynamo.tiers import host
from dynamo.tiers.device import DeviceTier
from dynamo.tiers.errors import TierClosedError, TierConfigError, TierMemoryError
from dynamo.tiers.host import HostTier
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
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 1 << 30)
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
    arena = HostTier(layout, 10, lambda done, total: seen.append((done, total)))
    assert seen == [(10 * layout.slot_bytes, 10 * layout.slot_bytes)]
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
