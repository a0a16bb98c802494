from pathlib import Path

import pytest

from dynamo.kvcache.config import DiskPlace, format_size, parse_disk_place, parse_host_sizes, parse_size
from dynamo.kvcache.errors import CacheConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("64MiB", 64 << 20),
        ("8GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("123", 123),
        (7, 7),
        ("0", 0),
        ("9007199254740993", 9007199254740993),
        ("1.3KiB", 1331),
    ],
)
def test_sizes_are_read(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "8Gi", "ten", "1e9", "10%", "1GiB 2MiB", "\u0663", "0.1B", True, 1.5, None]
)
def test_what_is_no_size_is_named(text):
    with pytest.raises(CacheConfigError, match="64MiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9" * 60, "9" * 400, "8388608TiB", 1 << 63])
def test_more_than_any_machine_has_is_refused(text):
    with pytest.raises(CacheConfigError, match="less than 8 EiB"):
        parse_size(text)


def test_a_disk_place_may_have_colons_in_its_path():
    assert parse_disk_place("/mnt/a:b/kv:1GiB") == DiskPlace((Path("/mnt/a:b/kv"),), 1 << 30)
    assert parse_disk_place("/a,/b,/c:1GiB").directories == (Path("/a"), Path("/b"), Path("/c"))
    assert parse_disk_place("~/kv:1GiB").directories == (Path.home() / "kv",)


def test_a_place_below_another_has_its_size_and_a_folder_in_each_of_its_directories():
    place = parse_disk_place("/a,/b:1GiB").below("w")
    assert place == DiskPlace((Path("/a/w"), Path("/b/w")), 1 << 30)
    assert str(place) == "/a/w, /b/w"
    with pytest.raises(CacheConfigError, match="at least one directory"):
        DiskPlace((), 1)


@pytest.mark.parametrize(
    "text",
    ["", "/a", ":1GiB", "/a,:1GiB", "/a,/a:1GiB", "/a:0", "/a:10%", "~nobody-of-that-name/kv:1GiB", "/a\0b:1GiB"],
)
def test_what_is_no_disk_place_is_named(text):
    with pytest.raises(CacheConfigError):
        parse_disk_place(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(512, "512 B"), (64 << 20, "64 MiB"), (3 << 29, "1.5 GiB"), (1 << 41, "2 TiB")]
)
def test_sizes_are_written_for_people(num_bytes, text):
    assert format_size(num_bytes) == text


@pytest.mark.parametrize(
    ("host", "host_max", "sizes"),
    [(None, None, (0, 0)), ("1MiB", None, (1 << 20, 1 << 20)), (4096, "1MiB", (4096, 1 << 20)), (0, 0, (0, 0))],
)
def test_a_host_tier_may_grow_to_its_own_size_unless_told(host, host_max, sizes):
    assert parse_host_sizes(host, host_max) == sizes


@pytest.mark.parametrize(("host", "host_max"), [(None, "1MiB"), ("2MiB", "1MiB")])
def test_a_host_tier_that_cannot_have_its_greatest_size_is_refused(host, host_max):
    with pytest.raises(CacheConfigError, match="host_max=1 MiB"):
        parse_host_sizes(host, host_max)
