"""The background check of blocks on disk."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dynamo.kernels.checks import Rows
from dynamo.kernels.digest import digest_rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierConfigError
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.scrub import BadBlocks, Scrubber

NUM_SLOTS = 64


def name(slot: int) -> bytes:
    return (slot + 1).to_bytes(8, "little") + b"the rest"


@pytest.fixture(params=[1, 2])
def disk(request: pytest.FixtureRequest, tmp_path: Path, layout: BlockLayout, rows: Rows) -> Iterator[DiskTier]:
    """A tier over one or two directories with blocks in its first 40 slots."""
    places = [tmp_path / str(i) for i in range(request.param)]
    tier = DiskTier.open(places, layout, NUM_SLOTS * layout.slot_bytes, b"model-a.")
    slots = np.arange(40)
    assert tier.write(slots, rows, slots % 32).all()
    seeds = np.arange(1, 41, dtype=np.uint64)
    digests = digest_rows(rows, slots % 32, seeds, layout.block_bytes)
    assert tier.journal.put([name(slot) for slot in slots.tolist()], [ROOT_NAME] * 40, slots, digests)
    yield tier
    tier.close()


def flip(tier: DiskTier, slot: int) -> None:
    """Changes a bit of a slot behind the tier's back."""
    count = len(tier.folders)
    with (tier.folders[slot % count] / "blocks.dat").open("r+b") as file:
        file.seek(slot // count * tier.layout.slot_bytes + 77)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 8]))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


@contextmanager
def scrubbing(disk: DiskTier, found: list[BadBlocks], bytes_per_s: float = 1e12) -> Iterator[Scrubber]:
    scrubber = Scrubber(disk, found.append, bytes_per_s=bytes_per_s, quiet_s=0.0)
    yield scrubber
    scrubber.close(20)


def test_good_blocks_are_checked_again_and_again(disk: DiskTier) -> None:
    found: list[BadBlocks] = []
    with scrubbing(disk, found) as scrubber:
        wait_until(lambda: scrubber.stats.num_passes >= 3)
    assert scrubber.stats.num_checked >= 120
    assert scrubber.stats.checked_bytes == scrubber.stats.num_checked * disk.layout.slot_bytes
    assert found == []
    assert disk.stats().read.blocks == 0  # looking is not using


def test_flipped_bits_are_reported_with_name_and_slot(disk: DiskTier) -> None:
    for slot in (3, 17, 38):
        flip(disk, slot)
    found: list[BadBlocks] = []
    with scrubbing(disk, found) as scrubber:
        wait_until(lambda: scrubber.stats.num_passes >= 1)
        scrubber.close(20)
    bad = [
        (block.tobytes(), slot) for part in found for block, slot in zip(part.names, part.slots.tolist(), strict=True)
    ]
    assert set(bad) == {(name(slot), slot) for slot in (3, 17, 38)}
    assert scrubber.stats.num_corrupt == len(bad)


def test_blocks_written_and_dropped_meanwhile_are_no_errors(disk: DiskTier, rows: Rows) -> None:
    found: list[BadBlocks] = []
    slots = np.arange(8)
    rng = np.random.default_rng(0)
    with scrubbing(disk, found) as scrubber:
        for _ in range(100):
            names = [name(slot) for slot in slots.tolist()]
            assert disk.journal.drop(names, slots)
            row_ids = rng.permutation(32)[:8]
            assert disk.write(slots, rows, row_ids).all()
            digests = digest_rows(rows, row_ids, np.arange(1, 9, dtype=np.uint64), disk.layout.block_bytes)
            assert disk.journal.put(names, [ROOT_NAME] * 8, slots, digests)
        wait_until(lambda: scrubber.stats.num_passes >= 1)
    assert found == []


def test_a_paused_scrubber_reads_nothing_until_it_goes_on(disk: DiskTier) -> None:
    with scrubbing(disk, []) as scrubber:
        scrubber.pause()
        wait_until(lambda: scrubber.stats.num_checked == _settled(scrubber))
        before = scrubber.stats.num_checked
        scrubber.resume()
        wait_until(lambda: scrubber.stats.num_checked > before)


def _settled(scrubber: Scrubber) -> int:
    """The number of blocks checked a little later."""
    before = scrubber.stats.num_checked
    deadline = time.monotonic() + 0.05
    while time.monotonic() < deadline and scrubber.stats.num_checked == before:
        time.sleep(0.001)
    return scrubber.stats.num_checked


def test_it_waits_while_the_disk_is_in_use(disk: DiskTier, rows: Rows) -> None:
    scrubber = Scrubber(disk, lambda _: None, bytes_per_s=1e12, quiet_s=30.0)
    assert disk.read(np.arange(4), rows, np.arange(4)).all()
    assert disk.idle_s < 30
    scrubber.close(20)
    assert scrubber.stats.num_checked == 0


def test_it_keeps_to_its_rate_and_closes_in_the_middle_of_a_pause(disk: DiskTier) -> None:
    started_s = time.monotonic()
    with scrubbing(disk, [], bytes_per_s=40 * disk.layout.slot_bytes / 3600) as scrubber:  # an hour per pass
        wait_until(lambda: scrubber.stats.num_checked == 40)
    assert scrubber.stats.num_passes == 1
    assert time.monotonic() - started_s < 20


def test_a_tier_closed_first_ends_it(disk: DiskTier) -> None:
    with scrubbing(disk, []):
        disk.close()


def test_a_rate_of_nothing_is_refused(disk: DiskTier) -> None:
    with pytest.raises(TierConfigError, match="checks nothing"):
        Scrubber(disk, lambda _: None, bytes_per_s=0)
