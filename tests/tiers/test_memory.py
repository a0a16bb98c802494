"""Limits of the machine and of control groups."""

from pathlib import Path

import pytest

from dynamo.tiers.memory import available_memory_bytes, memory_limit_bytes


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


@pytest.mark.parametrize(
    ("own_group", "expected_bytes", "expected_limit"),
    [("/a", 700000, 1000000), ("/hidden/by/the/container", 6000000, 8000000)],
)
def test_groups_of_version_1_limit_too(
    tmp_path: Path, own_group: str, expected_bytes: int, expected_limit: int
) -> None:
    proc, cgroups = lay_out(tmp_path, 8 << 10, "/", {})
    (proc / "self" / "cgroup").write_text(f"7:cpu,cpuacct:/x\n4:memory:{own_group}\n0::/\n")
    for group, limit, used in (("memory/a", 1000000, 400000), ("memory", 8000000, 2100000)):
        folder = cgroups / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("cache 1\ntotal_inactive_file 60000\ntotal_active_file 40000\n")
    assert available_memory_bytes(proc, cgroups) == expected_bytes
    assert memory_limit_bytes(proc, cgroups) == expected_limit


def test_the_limit_is_the_machines_memory_or_less(tmp_path: Path) -> None:
    proc, cgroups = lay_out(tmp_path, 8 << 10, "/a", {"a": ("max", 9, 9)})
    assert memory_limit_bytes(proc, cgroups) == 99999999 << 10
    (cgroups / "a" / "memory.max").write_text("4096\n")
    assert memory_limit_bytes(proc, cgroups) == 4096


def test_unknown_memory_is_none(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path, tmp_path) is None
    assert memory_limit_bytes(tmp_path, tmp_path) is None
