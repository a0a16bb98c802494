"""Memory that tiers are made of."""

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest

from dynamo.tiers.arena import available_memory_bytes, map_rows, prefault
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


def test_available_memory_is_known_on_linux() -> None:
    available_bytes = available_memory_bytes()
    assert available_bytes is not None
    assert available_bytes > 0


def lay_out(
    root: Path, available_kib: int, own_group: str, limits: dict[str, tuple[str, int, int]]
) -> tuple[Path, Path]:
    """Makes procfs and cgroup folders; limits are group -> (memory.max, memory.current, page cache)."""
    proc, cgroups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    (proc / "self" / "cgroup").write_text(f"0::{own_group}\n")
    for group, (limit, used, cache) in limits.items():
        folder = cgroups / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 0\n")
    return proc, cgroups


@pytest.mark.parametrize(
    ("own_group", "limits", "expected_bytes"),
    [
        pytest.param("/", {}, 8 << 20, id="no-limit"),
        pytest.param("/", {".": ("3000000", 1000000, 500000)}, 2500000, id="container"),
        pytest.param("/a/b", {"a/b": ("max", 9, 9), "a": ("2000000", 500000, 0)}, 1500000, id="limit-of-the-parent"),
        pytest.param("/a", {"a": ("1000", 5000, 0)}, 0, id="over-the-limit"),
        pytest.param("/a", {"a": ("999999999999", 0, 0)}, 8 << 20, id="machine-is-tighter"),
    ],
)
def test_available_memory_is_the_tightest_rest(
    tmp_path: Path, own_group: str, limits: dict[str, tuple[str, int, int]], expected_bytes: int
) -> None:
    proc, cgroups = lay_out(tmp_path, 8 << 10, own_group, limits)
    assert available_memory_bytes(proc, cgroups) == expected_bytes


def test_unknown_memory_is_none(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path, tmp_path) is None
