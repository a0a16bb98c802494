"""The disk tier over restarts, faults of its files, and other processes and models."""

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dynamo.kernels.checks import Rows
from dynamo.kernels.digest import digest_rows
from dynamo.tiers.arena import map_rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.disk_space import disk_space
from dynamo.tiers.errors import TierBusyError, TierConfigError, TierUnavailableError
from dynamo.tiers.file_io import FileIO
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.queued_io import QueuedIO
from dynamo.tiers.slot_io import SlotIO
from dynamo.tiers.verify import verify_directories

NUM_SLOTS = 64
NO_SEED = np.uint64(0)


def ids(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def name(slot: int) -> bytes:
    return (slot + 1).to_bytes(16, "big")


def open_disk(
    directory: Path,
    layout: BlockLayout,
    fingerprint: bytes = b"model-a.",
    num_slots: int = NUM_SLOTS,
    new_io: Callable[[int], SlotIO] = QueuedIO,
) -> DiskTier:
    return DiskTier.open(directory, layout, num_slots * layout.slot_bytes, fingerprint, new_io=new_io)


def store(tier: DiskTier, slots: list[int], rows: Rows) -> None:
    """Writes row `slot % 32` to each slot and records it with its digest."""
    where = ids(*slots)
    row_ids = where % 32
    assert tier.write(where, rows, row_ids).all()
    digests = digest_rows(rows, row_ids, np.full(where.size, NO_SEED), tier.layout.block_bytes)
    assert tier.journal.put([name(slot) for slot in slots], [ROOT_NAME] * where.size, where, digests)


def recovered_names(tier: DiskTier) -> list[bytes]:
    return [found.tobytes() for found in tier.recovered.names]


def readable(tier: DiskTier, slots: list[int], rows: Rows) -> list[int]:
    """Slots whose read succeeds with the bytes that `store` wrote."""
    target = map_rows(tier.layout, len(slots))
    outcomes = tier.read(ids(*slots), target, np.arange(len(slots)))
    payload = tier.layout.block_bytes
    same = [(target[i, :payload] == rows[slot % 32, :payload]).all() for i, slot in enumerate(slots)]
    return [slot for slot, outcome, equal in zip(slots, outcomes, same, strict=True) if outcome and equal]


def test_a_restart_is_warm(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk(tmp_path, layout)
    assert recovered_names(tier) == []
    store(tier, [5, 0, 63], rows)
    tier.close()
    tier = open_disk(tmp_path, layout)
    assert recovered_names(tier) == [name(5), name(0), name(63)]
    assert tier.recovered.slots.tolist() == [5, 0, 63]
    tier.release_recovered()
    assert recovered_names(tier) == []
    assert readable(tier, [5, 0, 63], rows) == [5, 0, 63]
    assert tier.stats().faults == {}
    tier.close()


def test_slots_never_written_are_not_read(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk(tmp_path, layout)
    store(tier, [3], rows)
    assert tier.read(ids(2, 3, 4), rows, ids(0, 3, 1)).tolist() == [False, True, False]
    assert tier.stats().read.failed_blocks == 2
    tier.close()


@pytest.mark.parametrize(("num_slots", "extent_slots"), [(50, 3), (1000, 32)])
def test_space_is_reserved_in_extents_as_slots_are_used(tmp_path: Path, num_slots: int, extent_slots: int) -> None:
    layout = BlockLayout(num_layers=16, block_size=16, num_kv_heads=8, head_dim=128, itemsize=4)  # 2 MiB
    rows = map_rows(layout, 1)
    tier = open_disk(tmp_path, layout, num_slots=num_slots)
    blocks = tier.folder / "blocks.dat"
    assert blocks.stat().st_size == 0
    assert tier.write(ids(0), rows, ids(0)).all()
    assert blocks.stat().st_size == extent_slots * layout.slot_bytes
    assert blocks.stat().st_blocks * 512 >= extent_slots * layout.slot_bytes
    tier.close()


def test_the_file_never_grows_past_the_capacity(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk(tmp_path, layout, num_slots=50)
    store(tier, [49], rows)
    assert (tier.folder / "blocks.dat").stat().st_size == 50 * layout.slot_bytes
    tier.close()


def test_a_smaller_capacity_shrinks_the_file(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk(tmp_path, layout)
    store(tier, [1, 40], rows)
    tier.close()
    tier = open_disk(tmp_path, layout, num_slots=10)
    assert tier.num_slots == 10
    assert recovered_names(tier) == [name(1)]
    assert readable(tier, [1], rows) == [1]
    assert (tier.folder / "blocks.dat").stat().st_size == 10 * layout.slot_bytes
    tier.close()


def test_a_file_cut_while_closed_keeps_the_blocks_before_the_cut(
    tmp_path: Path, layout: BlockLayout, rows: Rows
) -> None:
    tier = open_disk(tmp_path, layout)
    store(tier, list(range(20)), rows)
    tier.close()
    os.truncate(tier.folder / "blocks.dat", 12 * layout.slot_bytes + 100)
    tier = open_disk(tmp_path, layout)
    assert tier.recovered.slots.tolist() == list(range(12))
    assert tier.stats().faults == {"truncated": 8}
    assert readable(tier, list(range(20)), rows) == list(range(12))
    store(tier, [15], rows)
    tier.close()
    tier = open_disk(tmp_path, layout)
    assert tier.recovered.slots.tolist() == [*range(12), 15]
    assert tier.stats().faults == {}
    tier.close()


def test_a_file_cut_while_open_fails_reads_and_takes_new_blocks(
    tmp_path: Path, layout: BlockLayout, rows: Rows
) -> None:
    tier = open_disk(tmp_path, layout)
    store(tier, list(range(20)), rows)
    os.truncate(tier.folder / "blocks.dat", 12 * layout.slot_bytes)
    assert readable(tier, list(range(20)), rows) == list(range(12))
    assert tier.stats().faults == {"truncated": 8}
    store(tier, [18], rows)
    assert readable(tier, [11, 17, 18], rows) == [11, 18]
    assert tier.generation == 0
    tier.close()


def test_blocks_missing_beside_their_index_start_empty(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk(tmp_path, layout)
    store(tier, [1, 2], rows)
    tier.close()
    (tier.folder / "blocks.dat").unlink()
    tier = open_disk(tmp_path, layout)
    assert recovered_names(tier) == []
    assert tier.stats().faults == {"missing": 1}
    store(tier, [3], rows)
    tier.close()
    tier = open_disk(tmp_path, layout)
    assert recovered_names(tier) == [name(3)]
    tier.close()


@pytest.mark.parametrize("index", [b"", b"hello", b"\0" * 4096], ids=["empty", "foreign", "zeros"])
def test_an_unusable_index_starts_empty(tmp_path: Path, layout: BlockLayout, rows: Rows, index: bytes) -> None:
    tier = open_disk(tmp_path, layout)
    store(tier, [1, 2], rows)
    tier.close()
    (tier.folder / "journal.log").write_bytes(index)
    tier = open_disk(tmp_path, layout)
    assert recovered_names(tier) == []
    assert tier.stats().faults == {"index_format": 1}
    store(tier, [3], rows)
    assert readable(tier, [3], rows) == [3]
    tier.close()


def test_damaged_index_records_lose_their_blocks_only(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk(tmp_path, layout)
    store(tier, [1, 2, 3], rows)
    tier.close()
    index = tier.folder / "journal.log"
    data = bytearray(index.read_bytes())
    data[64 + 64 + 30] ^= 4
    index.write_bytes(data)
    tier = open_disk(tmp_path, layout)
    assert tier.recovered.slots.tolist() == [1, 3]
    assert tier.stats().faults == {"index_damaged": 1}
    tier.close()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_deleted_file_is_noticed_and_started_anew(
    tmp_path: Path, layout: BlockLayout, rows: Rows, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    caplog.set_level(logging.WARNING)
    tier = open_disk(tmp_path, layout)
    store(tier, [1, 2], rows)
    gone = list(tier.folder.iterdir()) if what == "folder" else [tier.folder / "blocks.dat"]
    for path in gone:
        path.unlink()
    if what == "folder":
        tier.folder.rmdir()
    assert readable(tier, [1, 2], rows) == []
    assert tier.generation == 1
    store(tier, [2, 7], rows)
    assert readable(tier, [1, 2, 7], rows) == [2, 7]
    assert tier.generation == 1
    assert tier.stats().faults == {"deleted": 1}
    assert len([record for record in caplog.records if "deleted" in record.message]) == 1
    with pytest.raises(TierBusyError):
        open_disk(tmp_path, layout)
    tier.close()
    tier = open_disk(tmp_path, layout)
    assert tier.recovered.slots.tolist() == [2, 7]
    tier.close()


def test_a_file_that_cannot_be_made_again_keeps_nothing_and_does_not_raise(
    tmp_path: Path, layout: BlockLayout, rows: Rows
) -> None:
    directory = tmp_path / "kv"
    tier = open_disk(directory, layout)
    store(tier, [1], rows)
    for path in tier.folder.iterdir():
        path.unlink()
    tier.folder.rmdir()
    directory.rmdir()
    directory.write_text("in the way")
    assert not tier.write(ids(1), rows, ids(1)).any()
    assert not tier.read(ids(1), rows, ids(1)).any()
    assert tier.stats().path == "unavailable"
    assert tier.stats().faults == {"deleted": 1, "unavailable": 2}
    directory.unlink()
    store(tier, [1], rows)
    assert readable(tier, [1], rows) == [1]
    tier.close()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Makes growing any file past `num_bytes` fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_file_size_is_a_full_disk(
    tmp_path: Path, layout: BlockLayout, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tier = open_disk(tmp_path, layout, num_slots=64)
    with largest_file(10 * layout.slot_bytes):
        for _ in range(2):
            assert tier.write(ids(2, 3, 40), rows, ids(2, 3, 4)).sum() == 0
        assert tier.stats().faults == {"disk_full": 2}
    store(tier, [2, 3, 40], rows)
    assert readable(tier, [2, 3, 40], rows) == [2, 3, 40]
    assert len([record for record in caplog.records if "the disk is full" in record.message]) == 1
    tier.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_really_full_disk_keeps_what_fits_and_works_again_with_space(
    small_disk: Path, layout: BlockLayout, rows: Rows
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (700 << 10))
    tier = DiskTier.open(small_disk, layout, 64 << 20, b"model-a.")
    kept = []
    for slot in range(120):
        outcome = tier.write(ids(slot), rows, ids(slot % 32))
        if not outcome[0]:
            break
        kept.append(slot)
    assert 20 < len(kept) < 100
    assert readable(tier, kept, rows) == kept
    assert tier.stats().faults["disk_full"] >= 1
    ballast.unlink()
    store(tier, [len(kept)], rows)
    assert readable(tier, [*kept, len(kept)], rows) == [*kept, len(kept)]
    tier.close()


def test_a_slot_overwritten_while_it_is_read_fails_the_read(
    tmp_path: Path, layout: BlockLayout, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_disk(tmp_path, layout, new_io=FileIO)
    store(tier, [1, 2, 9], rows)
    preadv = os.preadv
    overwritten = False

    def overwriting(fd: int, vectors: list[memoryview], offset: int) -> int:
        nonlocal overwritten
        count = preadv(fd, vectors, offset)
        if not overwritten:
            overwritten = True
            assert tier.write(ids(2), rows, ids(30)).all()
        return count

    monkeypatch.setattr(os, "preadv", overwriting)
    target = map_rows(layout, 3)
    assert tier.read(ids(1, 2, 9), target, ids(0, 1, 2)).tolist() == [True, False, True]
    assert tier.stats().faults == {"overwritten": 1}
    assert tier.read(ids(2), target, ids(0)).all()
    tier.close()


def test_a_read_can_ask_for_what_a_slot_held_before(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    tier = open_disk(tmp_path, layout)
    assert tier.generations(ids(3)).tolist() == [0]
    store(tier, [1, 2, 3], rows)
    before = tier.generations(ids(1, 2, 3, 4))
    assert tier.read(ids(1, 2, 3), rows, ids(1, 2, 3), generations=before[:3]).all()
    store(tier, [2, 4], rows)
    assert (tier.generations(ids(1, 2, 3, 4)) == before).tolist() == [True, False, True, False]
    assert tier.read(ids(1, 2, 3), rows, ids(1, 2, 3), generations=before[:3]).tolist() == [True, False, True]
    assert tier.stats().faults == {}
    tier.close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EIO, "io_error"),
        (errno.EROFS, "read_only"),
        (errno.EACCES, "no_permission"),
        (errno.EDQUOT, "quota_exceeded"),
    ],
)
def test_writes_refused_by_the_system_are_counted_by_kind_and_logged_once(
    tmp_path: Path,
    layout: BlockLayout,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    kind: str,
) -> None:
    caplog.set_level(logging.WARNING)
    tier = open_disk(tmp_path, layout, new_io=FileIO)
    store(tier, [1, 2], rows)

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwritev", refuse)
    for _ in range(2):
        assert not tier.write(ids(3, 7), rows, ids(3, 7)).any()
    assert tier.stats().faults == {kind: 4}
    assert len([record for record in caplog.records if str(tmp_path) in record.message]) == 1
    monkeypatch.undo()
    store(tier, [3], rows)
    assert readable(tier, [1, 2, 3, 7], rows) == [1, 2, 3]
    tier.close()


@pytest.mark.parametrize("what", ["preadv", "pwritev"])
def test_a_dead_disk_is_left_alone_and_used_again_when_it_comes_back(
    tmp_path: Path, layout: BlockLayout, rows: Rows, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    tier = open_disk(tmp_path, layout, new_io=FileIO)
    store(tier, [1], rows)
    num_calls = 0

    def dead(*_: object) -> int:
        nonlocal num_calls
        num_calls += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    move = tier.read if what == "preadv" else tier.write
    with monkeypatch.context() as patch:
        patch.setattr(os, what, dead)
        for _ in range(50):
            assert not move(ids(1), rows, ids(1)).any()
    assert 3 <= num_calls < 10  # three, unless the fifty took longer than the first pause
    assert tier.stats().faults == {"io_error": num_calls, "resting": 50 - num_calls}
    deadline = time.monotonic() + 20
    while not move(ids(1), rows, ids(1)).all():
        assert time.monotonic() < deadline, "the disk is not used again"
        time.sleep(0.01)
    assert tier.write(ids(2), rows, ids(2)).all()
    tier.close()


def test_a_read_only_file_system_is_unavailable_to_a_tier_and_good_enough_to_verify(
    small_disk: Path, layout: BlockLayout, rows: Rows
) -> None:
    tier = DiskTier.open(small_disk, layout, 64 * layout.slot_bytes, b"model-a.")
    store(tier, [1, 2], rows)
    tier.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(TierUnavailableError, match="Read-only file system"):
        DiskTier.open(small_disk, layout, 64 * layout.slot_bytes, b"model-a.")
    (report,) = verify_directories([small_disk])
    assert report.num_blocks == 2


def test_a_second_tier_on_the_folder_is_refused_naming_path_and_process(tmp_path: Path, layout: BlockLayout) -> None:
    tier = open_disk(tmp_path, layout)
    with pytest.raises(TierBusyError) as caught:
        open_disk(tmp_path, layout)
    assert caught.value.pid == os.getpid()
    assert str(tier.folder / "LOCK") in str(caught.value)
    assert f"process {os.getpid()}" in str(caught.value)
    tier.close()
    open_disk(tmp_path, layout).close()


def test_models_do_not_see_each_other(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    first, second = open_disk(tmp_path, layout), open_disk(tmp_path, layout, b"model-b.")
    store(first, [1], rows)
    assert readable(second, [1], rows) == []
    first.close()
    second.close()
    wider = BlockLayout(num_layers=6, block_size=4, num_kv_heads=2, head_dim=20, itemsize=4)
    with pytest.raises(TierUnavailableError, match="holds blocks of another model or block layout"):
        open_disk(tmp_path, wider)  # same fingerprint, other slots: never mixed up
    tier = open_disk(tmp_path, layout)
    assert readable(tier, [1], rows) == [1]
    tier.close()


def fill_model(directory: Path, layout: BlockLayout, rows: Rows, fingerprint: bytes, last_use_s: float) -> Path:
    """A closed folder with 18 slots reserved, last used at `last_use_s`."""
    tier = open_disk(directory, layout, fingerprint, num_slots=48)
    store(tier, list(range(16)), rows)
    tier.close()
    for path in (tier.folder / "LOCK", tier.folder / "journal.log"):
        os.utime(path, (last_use_s, last_use_s))
    return tier.folder


def test_models_not_in_use_make_way_least_recently_used_first(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    newer = fill_model(tmp_path, layout, rows, b"newer...", 2e9)
    older = fill_model(tmp_path, layout, rows, b"older...", 1e9)
    tier = open_disk(tmp_path, layout, num_slots=48)
    seen = []
    for slot in (0, 20, 47):
        assert tier.write(ids(slot), rows, ids(0)).all()
        seen.append((older.exists(), newer.exists()))
    assert seen == [(True, True), (False, True), (False, False)]
    tier.close()


def test_models_in_use_are_spared_and_limit_the_growth(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    other = open_disk(tmp_path, layout, b"model-b.", num_slots=16)
    store(other, list(range(16)), rows)
    tier = open_disk(tmp_path, layout, num_slots=24)
    assert tier.write(ids(*range(4)), rows, ids(*range(4))).all()
    assert not tier.write(ids(20), rows, ids(0)).any()
    assert tier.stats().faults == {"over_capacity": 1}
    assert readable(other, list(range(16)), rows) == list(range(16))
    other.close()
    assert tier.write(ids(20), rows, ids(0)).all()
    assert not other.folder.exists()
    tier.close()


def test_foreign_files_are_never_touched(tmp_path: Path, layout: BlockLayout, rows: Rows) -> None:
    (tmp_path / "0123456789abcdef").mkdir()
    (tmp_path / "0123456789abcdef" / "thesis.txt").write_text("x" * 100_000)
    with_guest = fill_model(tmp_path, layout, rows, b"guest...", 1e9)
    (with_guest / "notes.txt").write_text("mine")
    (tmp_path / "blocks.dat").write_bytes(b"\0" * 100_000)
    tier = open_disk(tmp_path, layout, num_slots=16)
    assert tier.write(ids(15), rows, ids(0)).all()
    tier.close()
    assert (tmp_path / "0123456789abcdef" / "thesis.txt").exists()
    assert sorted(path.name for path in with_guest.iterdir()) == [
        "LOCK",
        "STRIPE",
        "blocks.dat",
        "journal.log",
        "notes.txt",
    ]
    assert (tmp_path / "blocks.dat").exists()


def test_a_capacity_below_one_block_is_refused(tmp_path: Path, layout: BlockLayout) -> None:
    with pytest.raises(TierConfigError, match="a disk capacity of 4095 bytes holds no block of 4096 bytes"):
        DiskTier.open(tmp_path, layout, 4095, b"model")


@pytest.mark.parametrize("name", ["file", "file/kv"])
def test_a_file_in_the_place_of_a_directory_is_named_as_what_is_wrong(
    tmp_path: Path, layout: BlockLayout, name: str
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    which = "this" if name == "file" else file
    with pytest.raises(
        TierUnavailableError, match=f"cannot be in {tmp_path / name}: {which} is no folder; move it away"
    ):
        open_disk(tmp_path / name, layout)


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.disk_space import disk_space
from dynamo.tiers.errors import TierUnavailableError
from dynamo.tiers.layout import BlockLayout
if os.geteuid() == 0:  # nothing is forbidden to root
    os.setegid(65534)
    os.seteuid(65534)
try:
    DiskTier.open(Path(sys.argv[1]), BlockLayout(3, 4, 2, 10, 4), 1 << 20, b"model-a.")
except TierUnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize("closed", ["directory", "blocks.dat", "journal.log"])
def test_files_without_permission_are_unavailable(tmp_path: Path, layout: BlockLayout, rows: Rows, closed: str) -> None:
    tier = open_disk(tmp_path / "kv", layout)
    store(tier, [1], rows)
    tier.close()
    for path in [*tmp_path.parents[:2], tmp_path, tmp_path / "kv", tier.folder, *tier.folder.iterdir()]:
        if path.owner() == tier.folder.owner():
            path.chmod(0o777)
    locked = tmp_path / "kv" if closed == "directory" else tier.folder / closed
    locked.chmod(0o000)
    done = subprocess.run(
        [sys.executable, "-P", "-c", UNPRIVILEGED, str(tmp_path / "kv")], capture_output=True, text=True, timeout=60
    )
    locked.chmod(0o700)
    assert "Permission denied" in done.stdout, done.stderr
    assert "check that this user may write there" in done.stdout


WRITER = """
import sys
from pathlib import Path
import numpy as np
from dynamo.kernels.digest import digest_rows
from dynamo.tiers.arena import map_rows
from dynamo.tiers.disk import DiskTier
from dynamo.tiers.disk_space import disk_space
from dynamo.tiers.journal import ROOT_NAME
from dynamo.tiers.layout import BlockLayout
layout = BlockLayout(3, 4, 2, 10, 4)
tier = DiskTier.open([Path(path) for path in sys.argv[1:]], layout, 64 * layout.slot_bytes, b"model-a.")
rows = map_rows(layout, 8)
rng = np.random.default_rng(0)
number = 0
while True:
    rows[:] = rng.integers(0, 256, rows.shape, dtype=np.uint8)
    slots = rng.permutation(64)[:8]
    numbers = np.arange(number + 1, number + 9, dtype=np.uint64)
    number += 8
    assert tier.write(slots, rows, np.arange(8)).all()
    digests = digest_rows(rows, np.arange(8), numbers, layout.block_bytes)
    names = [n.to_bytes(16, "little") for n in numbers.tolist()]
    assert tier.journal.put(names, [ROOT_NAME] * 8, slots, digests)
    print(number, flush=True)
"""


@pytest.mark.parametrize(("num_lines", "num_directories"), [(30, 1), (300, 1), (2500, 1), (300, 2)])
def test_kill_9_during_writes_leaves_an_index_whose_blocks_are_good_or_found_out(
    tmp_path: Path, layout: BlockLayout, num_lines: int, num_directories: int
) -> None:
    places = [tmp_path / str(i) for i in range(num_directories)]
    command = [sys.executable, "-P", "-c", WRITER, *map(str, places)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(num_lines):
        line = writer.stdout.readline()
        assert line, "the writer ended by itself"
    writer.send_signal(signal.SIGKILL)
    writer.stdout.close()
    writer.wait(30)

    tier = DiskTier.open(places, layout, NUM_SLOTS * layout.slot_bytes, b"model-a.")
    recovered = tier.recovered
    assert tier.stats().faults == {}
    assert len(recovered.names) > 40
    assert max(int.from_bytes(block.tobytes(), "little") for block in recovered.names) >= int(line)
    rows = map_rows(layout, len(recovered.names))
    row_ids = np.arange(len(recovered.names))
    assert tier.read(recovered.slots, rows, row_ids).all()
    seeds = np.array([int.from_bytes(block.tobytes(), "little") for block in recovered.names], dtype=np.uint64)
    bad = digest_rows(rows, row_ids, seeds, layout.block_bytes) != recovered.digests
    assert np.count_nonzero(bad) <= 8  # only slots being overwritten when the kill came, and the digest tells
    tier.close()


BIG_BLOCKS = BlockLayout(num_layers=64, block_size=64, num_kv_heads=8, head_dim=128, itemsize=2)  # of 16 MiB


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_a_tier_larger_than_the_free_space_is_opened_with_a_warning_that_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = free_bytes(tmp_path) + (10 << 30)
    with closing(DiskTier.open(tmp_path / "kv", BIG_BLOCKS, wanted, b"model-a.")) as tier:
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        text = record.getMessage()
        assert text.startswith(f"disk tier {tmp_path / 'kv'}: may take {wanted:,} bytes, but the file system has ")
        assert text.endswith("free space there, or make the disk tier smaller")
        assert tier.num_slots == wanted // BIG_BLOCKS.slot_bytes


def test_directories_on_one_file_system_need_its_room_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = free_bytes(tmp_path) + (10 << 30)  # neither half of it is too much
    with closing(DiskTier.open([tmp_path / "a", tmp_path / "b"], BIG_BLOCKS, wanted, b"model-a.")):
        assert f"disk tier {tmp_path / 'a'}, {tmp_path / 'b'}: may take {wanted:,} bytes" in caplog.text


def test_room_is_judged_again_when_a_tier_grows_and_what_it_has_counts_as_room(
    tmp_path: Path, layout: BlockLayout, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_disk(tmp_path, BIG_BLOCKS, num_slots=2)) as tier:
        assert not caplog.records
        num_slots = (free_bytes(tmp_path) + (10 << 30)) // BIG_BLOCKS.slot_bytes
        tier.resize(num_slots)
        assert f"may take {num_slots * BIG_BLOCKS.slot_bytes:,} bytes" in caplog.text
    (space,) = disk_space([tmp_path], 1 << 20)
    assert space.missing_bytes == 0
    tier = open_disk(tmp_path, layout, b"model-b.")
    store(tier, [0, 1, 2], rows)
    tier.close()
    held = disk_space([tmp_path], 1 << 20)[0].held_bytes
    assert held >= space.held_bytes + 3 * layout.slot_bytes
