"""Reading in small calls that somebody may stop."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dynamo.kernels.checks import Rows
from dynamo.tiers.arena import map_rows
from dynamo.tiers.block_file import BlockFile
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.errors import TierClosedError
from dynamo.tiers.interruptible_io import MAX_CALL_BYTES, InterruptibleIO
from dynamo.tiers.layout import BlockLayout

LARGE = BlockLayout(num_layers=10, block_size=16, num_kv_heads=4, head_dim=128, itemsize=4)
NUM_SLOTS = 6


@pytest.fixture
def rows() -> Rows:
    """Distinct bytes in every row; larger than a call."""
    rows = map_rows(LARGE, NUM_SLOTS)
    assert rows.shape[1] > 2 * MAX_CALL_BYTES
    rows[:] = np.random.default_rng(0).integers(0, 256, rows.shape, dtype=np.uint8)
    return rows


@pytest.fixture
def file(tmp_path: Path) -> Iterator[BlockFile]:
    file = BlockFile(tmp_path / "blocks.dat")
    yield file
    file.close()


def test_slots_come_whole_in_small_calls(file: BlockFile, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = np.array([4, 1, 2, 0])
    num_checks = 0
    sizes: list[int] = []
    preadv = os.preadv

    def check() -> None:
        nonlocal num_checks
        num_checks += 1

    def noted(fd: int, vectors: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, vectors)))
        return preadv(fd, vectors, offset)

    monkeypatch.setattr(os, "preadv", noted)
    io = InterruptibleIO(check)
    assert io.start(file, slots, rows, np.arange(4), writes=True).result().outcomes.all()
    read = map_rows(LARGE, NUM_SLOTS)
    num_checks = 0
    result = io.start(file, slots, read, np.array([3, 0, 5, 1]), writes=False).result()
    io.close()
    assert result.outcomes.all()
    assert result.faults == {}
    assert np.array_equal(read[[3, 0, 5, 1]], rows[:4])
    assert sum(sizes) == 4 * rows.shape[1]
    assert max(sizes) <= MAX_CALL_BYTES
    assert num_checks == len(sizes)


def test_whoever_is_told_to_stop_makes_no_further_call(tmp_path: Path, rows: Rows) -> None:
    disk = DiskTier.open(tmp_path, LARGE, NUM_SLOTS * LARGE.slot_bytes, b"model-a.")
    slots = np.arange(NUM_SLOTS)
    assert disk.write(slots, rows, slots).all()
    read = map_rows(LARGE, NUM_SLOTS)
    num_calls = 0

    def check() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise TierClosedError("enough")

    with pytest.raises(TierClosedError, match="enough"):
        disk.inspect(slots, read, slots, check)
    assert num_calls == 3
    flat, wanted = read.reshape(-1), rows.reshape(-1)
    assert np.array_equal(flat[: 2 * MAX_CALL_BYTES], wanted[: 2 * MAX_CALL_BYTES])
    assert not flat[2 * MAX_CALL_BYTES :].any()
    assert disk.inspect(slots, read, slots, lambda: None).all()
    assert np.array_equal(read, rows)
    disk.close()
    assert disk.stats().faults == {}
