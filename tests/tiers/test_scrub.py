"""When the background check of a disk tier looks at what."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dynamo.kernels.checks import Rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierClosedError, TierConfigError
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.scrub import Scrubber, ScrubStep

NUM_SLOTS = 64
STEP = 24


@pytest.fixture
def disk(tmp_path: Path, layout: BlockLayout) -> Iterator[DiskTier]:
    tier = DiskTier.open(tmp_path, layout, NUM_SLOTS * layout.slot_bytes, b"model-a.")
    yield tier
    tier.close()


class Looks:
    """A check that finds a block in every slot, and notes where it was asked to look."""

    def __init__(self, disk: DiskTier) -> None:
        self.slot_bytes = disk.layout.slot_bytes
        self.firsts: list[int] = []
        self.is_unwilling = threading.Event()
        self.num_refused = 0

    def __call__(self, first: int) -> ScrubStep | None:
        if self.is_unwilling.is_set():
            self.num_refused += 1
            return None
        self.firsts.append(first)
        count = min(STEP, NUM_SLOTS - first)
        return ScrubStep(count, count * self.slot_bytes, first + count if first + count < NUM_SLOTS else None)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


@contextmanager
def scrubbing(
    disk: DiskTier,
    check: Callable[[int], ScrubStep | None],
    *,
    bytes_per_s: float = 1e12,
    quiet_s: float = 0.0,
    round_s: float = 0.0,
) -> Iterator[Scrubber]:
    scrubber = Scrubber(disk, check, bytes_per_s=bytes_per_s, quiet_s=quiet_s, round_s=round_s)
    try:
        yield scrubber
    finally:
        scrubber.close(20)


def test_it_walks_over_the_tier_again_and_again(disk: DiskTier) -> None:
    looks = Looks(disk)
    with scrubbing(disk, looks) as scrubber:
        wait_until(lambda: scrubber.stats.num_rounds >= 3)
    assert looks.firsts[:9] == [0, 24, 48] * 3
    assert scrubber.stats.num_checked >= 3 * NUM_SLOTS
    assert scrubber.stats.round_ended_s is not None


def test_it_tells_how_far_the_round_is(disk: DiskTier) -> None:
    rate = STEP * disk.layout.slot_bytes / 3600  # a step an hour
    with scrubbing(disk, Looks(disk), bytes_per_s=rate) as scrubber:
        wait_until(lambda: scrubber.stats.num_checked > 0)
    stats = scrubber.stats
    assert (stats.num_checked, stats.num_rounds, stats.round_ended_s) == (STEP, 0, None)
    assert stats.round_share == STEP / NUM_SLOTS


def test_it_waits_while_the_disk_is_in_use(disk: DiskTier, rows: Rows) -> None:
    looks = Looks(disk)
    with scrubbing(disk, looks, quiet_s=30.0):
        assert disk.write(np.arange(4), rows, np.arange(4)).all()
        assert disk.idle_s < 30
    assert looks.firsts == []


def test_to_inspect_is_not_to_use(disk: DiskTier, rows: Rows) -> None:
    assert disk.write(np.arange(4), rows, np.arange(4)).all()
    wait_until(lambda: disk.idle_s > 0.01)
    assert disk.inspect(np.arange(4), rows, np.arange(4)).all()
    assert disk.idle_s > 0.01
    assert disk.stats().read.blocks == 0


def test_what_cannot_be_looked_at_now_is_looked_at_later(disk: DiskTier) -> None:
    looks = Looks(disk)
    looks.is_unwilling.set()
    with scrubbing(disk, looks) as scrubber:
        wait_until(lambda: looks.num_refused > 2)
        assert scrubber.stats.num_checked == 0
        looks.is_unwilling.clear()
        wait_until(lambda: scrubber.stats.num_rounds > 0)
    assert looks.firsts[:3] == [0, 24, 48]


def test_a_small_tier_is_not_read_all_the_time(disk: DiskTier) -> None:
    looks = Looks(disk)
    with scrubbing(disk, looks, round_s=3600.0) as scrubber:
        wait_until(lambda: scrubber.stats.num_rounds == 1)
    assert looks.firsts == [0, 24, 48]
    assert scrubber.stats.round_share == 0.0


def test_it_closes_in_the_middle_of_a_pause(disk: DiskTier) -> None:
    started_s = time.monotonic()
    with scrubbing(disk, Looks(disk), bytes_per_s=1.0) as scrubber:
        wait_until(lambda: scrubber.stats.num_checked > 0)
    assert time.monotonic() - started_s < 20


def test_a_tier_closed_first_ends_it(disk: DiskTier, caplog: pytest.LogCaptureFixture) -> None:
    num_looks = 0

    def check(first: int) -> ScrubStep:
        nonlocal num_looks
        num_looks += 1
        raise TierClosedError("closed")

    with scrubbing(disk, check):
        wait_until(lambda: num_looks > 0)
    assert num_looks == 1
    assert caplog.records == []


def test_a_check_that_fails_ends_it_with_a_word_in_the_log(disk: DiskTier, caplog: pytest.LogCaptureFixture) -> None:
    def check(first: int) -> ScrubStep:
        raise ZeroDivisionError

    with scrubbing(disk, check):
        wait_until(lambda: bool(caplog.records))
    assert "is given up" in caplog.text


def test_a_rate_of_nothing_is_refused(disk: DiskTier) -> None:
    with pytest.raises(TierConfigError, match="checks nothing"):
        Scrubber(disk, Looks(disk), bytes_per_s=0)
