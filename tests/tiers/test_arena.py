"""Memory that tiers are made of."""

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest

from dynamo.tiers.arena import Arena, map_rows, prefault, resident_pages
from dynamo.tiers.errors import TierMemoryError
from dynamo.tiers.layout import BlockLayout


def test_rows_are_zeroed_aligned_writable_and_contiguous(layout: BlockLayout) -> None:
    rows = map_rows(layout, 5)
    assert rows.shape == (5, layout.slot_bytes)
    assert rows.dtype == np.uint8
    assert rows.ctypes.data % mmap.PAGESIZE == 0
    assert rows.flags.c_contiguous
    assert rows.flags.writeable
    assert not rows.any()


def test_a_view_outlives_the_array_it_came_from(layout: BlockLayout) -> None:
    rows = map_rows(layout, 5)
    rows[4] = 7
    last = rows[4]
    del rows
    gc.collect()
    assert (last == 7).all()


def test_prefault_reports_progress_up_to_the_whole() -> None:
    layout = BlockLayout(num_layers=16, block_size=16, num_kv_heads=8, head_dim=64, itemsize=4)
    rows = map_rows(layout, 160)  # 160 MiB: three steps
    seen: list[tuple[int, int]] = []
    prefault(rows, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == 3
    assert seen[-1] == (rows.nbytes, rows.nbytes)
    assert not rows.any()


def test_impossible_address_space_is_refused_with_the_size(layout: BlockLayout) -> None:
    with pytest.raises(TierMemoryError, match="cannot map") as caught:
        map_rows(layout, 1 << 50)
    assert caught.value.needed_bytes == layout.slot_bytes << 50


def test_only_what_was_touched_is_resident_and_can_be_given_back() -> None:
    layout = BlockLayout(num_layers=16, block_size=16, num_kv_heads=8, head_dim=64, itemsize=4)  # 1 MiB
    arena = Arena(layout, 1 << 20, is_sparse=True)  # a tebibyte of addresses
    prefault(arena.rows[:64])
    arena.rows[3] = 7
    pages = resident_pages(arena.rows)
    assert pages is not None
    assert 64 << 20 <= pages.resident_bytes < 80 << 20
    assert pages.page_bytes in (mmap.PAGESIZE, 2 << 20)
    assert (pages.page_bytes > mmap.PAGESIZE) == (2 * pages.huge_bytes >= pages.resident_bytes)
    arena.give_back(4, 64)
    assert (arena.rows[3] == 7).all()
    assert not arena.rows[4].any()
    pages = resident_pages(arena.rows)
    assert pages is not None
    assert pages.resident_bytes < 16 << 20


SMAPS = """\
{low:x}-{high:x} rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                3000 kB
AnonHugePages:      {huge} kB
VmFlags: rd wr
7fffff000000-7fffff001000 rw-p 00000000 00:00 0          [stack]
Rss:                  99 kB
AnonHugePages:        99 kB
"""


@pytest.mark.parametrize(("huge_kib", "page_bytes"), [(2048, 2 << 20), (1000, mmap.PAGESIZE)])
def test_page_size_is_that_of_most_of_the_memory(
    tmp_path: Path, layout: BlockLayout, huge_kib: int, page_bytes: int
) -> None:
    rows = map_rows(layout, 2)
    low = rows.ctypes.data - 4096
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nHugepagesize:    2048 kB\n")
    (tmp_path / "self" / "smaps").write_text(SMAPS.format(low=low, high=low + (4 << 20), huge=huge_kib))
    pages = resident_pages(rows, tmp_path)
    assert pages is not None
    assert pages.resident_bytes == 3000 << 10
    assert pages.huge_bytes == huge_kib << 10
    assert pages.page_bytes == page_bytes


def test_pages_are_unknown_without_procfs(tmp_path: Path, layout: BlockLayout) -> None:
    assert resident_pages(map_rows(layout, 1), tmp_path) is None
