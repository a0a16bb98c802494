"""Bytes a day, over restarts and jumping clocks."""

from pathlib import Path

import numpy as np
import pytest

from dynamo.kernels.checks import Rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierConfigError
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.write_budget import WriteBudget

DAY = 24_000_000  # so that an hour's share is a million


class Clocks:
    def __init__(self) -> None:
        self.monotonic_s = 50.0
        self.wall_s = 1e9

    def budget(self, path: Path | None = None, bytes_per_day: int = DAY) -> WriteBudget:
        return WriteBudget(bytes_per_day, path, clock=lambda: self.monotonic_s, wall_clock=lambda: self.wall_s)


def test_an_hours_share_may_be_written_at_once_and_grows_again() -> None:
    clocks = Clocks()
    budget = clocks.budget()
    assert budget.available_bytes == 1_000_000
    assert budget.take(3, 400_000) == 2
    assert (budget.available_bytes, budget.written_bytes) == (200_000, 800_000)
    clocks.monotonic_s += 360
    assert budget.available_bytes == 300_000
    clocks.monotonic_s += 1e6
    assert budget.available_bytes == 1_000_000
    budget.give_back(100)
    assert budget.written_bytes == 799_900


def test_a_day_lets_through_a_days_bytes_and_one_share_more() -> None:
    clocks = Clocks()
    budget = clocks.budget()
    for _ in range(24 * 60):
        budget.take(1000, 1000)
        clocks.monotonic_s += 60
    assert DAY < budget.written_bytes <= DAY + 1_000_000


@pytest.mark.parametrize(
    ("away_s", "available"), [(0, 0), (1800, 500_000), (1e9, 1_000_000), (-1e9, 0)], ids=["no", "half", "far", "back"]
)
def test_a_restart_does_not_refill_it_whatever_the_wall_clock_did(
    tmp_path: Path, away_s: float, available: int
) -> None:
    clocks = Clocks()
    budget = clocks.budget(tmp_path / "budget.dat")
    assert budget.take(10, 100_000) == 10
    budget.close()
    clocks.wall_s += away_s
    clocks.monotonic_s = 3.0
    again = clocks.budget(tmp_path / "budget.dat")
    assert again.available_bytes == available
    assert again.written_bytes == 1_000_000


def test_a_killed_process_forgets_a_sixteenth_of_a_share_at_most(tmp_path: Path) -> None:
    clocks = Clocks()
    budget = clocks.budget(tmp_path / "budget.dat")
    for _ in range(950):
        budget.take(1, 1000)
    assert clocks.budget(tmp_path / "budget.dat").available_bytes < 50_000 + 1_000_000 / 16


def test_a_damaged_file_starts_a_full_budget(tmp_path: Path) -> None:
    clocks = Clocks()
    path = tmp_path / "budget.dat"
    clocks.budget(path).close()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert clocks.budget(path).available_bytes == 1_000_000


@pytest.mark.parametrize("bytes_per_day", [0, -5])
def test_a_budget_of_nothing_is_refused(bytes_per_day: int) -> None:
    with pytest.raises(TierConfigError, match="lets nothing be written"):
        WriteBudget(bytes_per_day)


def test_a_budget_that_lets_no_block_be_written_is_refused_before_anything_is_made(
    tmp_path: Path, layout: BlockLayout
) -> None:
    with pytest.raises(TierConfigError, match=f"no block of 4096 bytes be written; give at least {24 * 4096}"):
        DiskTier.open(tmp_path / "kv", layout, 1 << 20, b"model-a.", write_bytes_per_day=24 * 4096 - 1)
    assert not (tmp_path / "kv").exists()
    DiskTier.open(tmp_path / "kv", layout, 1 << 20, b"model-a.", write_bytes_per_day=24 * 4096).close()


def test_the_tier_refuses_what_goes_beyond_and_counts_it(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    per_day = 10 * 24 * layout.slot_bytes  # ten blocks an hour
    tier = DiskTier.open(tmp_path, layout, 64 * layout.slot_bytes, b"model-a.", write_bytes_per_day=per_day)
    assert tier.write_budget is not None
    slots = np.arange(16)
    assert tier.write(slots, rows, slots).tolist() == [True] * 10 + [False] * 6
    assert tier.stats().faults == {"write_budget": 6}
    assert tier.stats().write.failed_blocks == 6
    assert tier.read(slots, rows, slots).tolist() == [True] * 10 + [False] * 6
    assert tier.write_budget.available_bytes < layout.slot_bytes
    tier.close()
    tier = DiskTier.open(tmp_path, layout, 64 * layout.slot_bytes, b"model-a.", write_bytes_per_day=per_day)
    assert not tier.write(slots, rows, slots).any()
    tier.close()
