"""The disk index over restarts, damage and full disks."""

import logging
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dynamo.kernels.checks import KernelArgumentError
from dynamo.tiers.errors import JournalFormatError, TierClosedError
from dynamo.tiers.journal import ROOT_NAME, Journal
from dynamo.tiers.records import HEADER_BYTES, RECORD_BYTES
from dynamo.tiers.recovered import RecoveredBlocks
from dynamo.tiers.slot_digests import DigestKind

NUM_SLOTS = 1000


def names(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def ids(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def put(journal: Journal, *blocks: tuple[int, int]) -> bool:
    """Puts (name, slot) pairs; parent is the name before, digest ten times the name."""
    numbers, slots = zip(*blocks, strict=True)
    parents = [ROOT_NAME if n == 0 else n.to_bytes(16, "big") for n in (m - 1 for m in numbers)]
    return journal.put(names(*numbers), parents, ids(*slots), np.array(numbers, dtype=np.uint64) * np.uint64(10))


def found(recovered: RecoveredBlocks) -> list[tuple[int, int]]:
    """(name, slot) pairs, after checking that parents and digests belong to them."""
    numbers = [int.from_bytes(name.tobytes(), "big") for name in recovered.names]
    assert [int.from_bytes(parent.tobytes(), "big") for parent in recovered.parents] == [max(0, n - 1) for n in numbers]
    assert recovered.digests.tolist() == [10 * n for n in numbers]
    return list(zip(numbers, recovered.slots.tolist(), strict=True))


def test_kinds_of_digests_survive_restarts_and_rewriting(path: Path) -> None:
    with opened(path) as journal:
        assert put(journal, (1, 1), (2, 2))
        assert journal.put(names(3, 4), names(2, 3), ids(3, 4), np.array([30, 40], dtype=np.uint64), DigestKind.LINES)
        for number in range(10, 20000):
            if number % 500 == 0:
                assert put(journal, *((n, 9) for n in range(number, number + 500)))
        assert put(journal, (5, 9))
    for _ in range(2):
        with opened(path) as journal:
            assert found(journal.recovered) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 9)]
            assert journal.recovered.digest_kinds.tolist() == [0, 0, 1, 1, 0]
        assert path.stat().st_size < 20000 * RECORD_BYTES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.log"


@contextmanager
def opened(path: Path, num_slots: int = NUM_SLOTS) -> Iterator[Journal]:
    journal = Journal.open(path, num_slots, b"model")
    try:
        yield journal
        journal.check_invariants()
    finally:
        journal.close()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Makes writes past `num_bytes` of any file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_new_index_is_empty(path: Path) -> None:
    with opened(path) as journal:
        assert found(journal.recovered) == []
        assert journal.num_damaged == 0
    assert path.stat().st_size == HEADER_BYTES


def test_what_was_put_is_recovered_least_recently_put_first(path: Path) -> None:
    with opened(path) as journal:
        assert put(journal, (3, 30), (1, 10))
        assert put(journal, (2, 20))
        assert put(journal, (3, 30))
    with opened(path) as journal:
        assert found(journal.recovered) == [(1, 10), (2, 20), (3, 30)]
        assert put(journal, (4, 40))
    with opened(path) as journal:
        assert found(journal.recovered) == [(1, 10), (2, 20), (3, 30), (4, 40)]


def test_the_later_put_wins_by_slot_and_by_name(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10), (2, 20), (3, 30))
        put(journal, (4, 10))
        put(journal, (2, 25))
        put(journal, (5, 50), (6, 50))
    with opened(path) as journal:
        assert found(journal.recovered) == [(3, 30), (4, 10), (2, 25), (6, 50)]


def test_dropped_blocks_are_gone_and_a_late_drop_does_not_hit_the_next_block(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10), (2, 20), (3, 30))
        assert journal.drop(names(2), ids(20))
        put(journal, (4, 10))
        assert journal.drop(names(1, 9), ids(10, 99))
    with opened(path) as journal:
        assert found(journal.recovered) == [(3, 30), (4, 10)]


def test_clear_forgets_everything_and_goes_on(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10), (2, 20))
        assert journal.clear()
        assert path.stat().st_size == HEADER_BYTES
        put(journal, (3, 30))
    with opened(path) as journal:
        assert found(journal.recovered) == [(3, 30)]


def test_empty_lists_record_nothing(path: Path) -> None:
    with opened(path) as journal:
        assert journal.put([], [], ids(), np.zeros(0, dtype=np.uint64))
        assert journal.drop([], ids())
    assert path.stat().st_size == HEADER_BYTES


def test_a_torn_tail_is_cut_off(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10), (2, 20), (3, 30))
    os.truncate(path, path.stat().st_size - 17)
    with opened(path) as journal:
        assert found(journal.recovered) == [(1, 10), (2, 20)]
        assert journal.num_damaged == 0
        put(journal, (4, 40))
    with opened(path) as journal:
        assert found(journal.recovered) == [(1, 10), (2, 20), (4, 40)]


def test_damaged_records_are_skipped_and_counted(path: Path) -> None:
    with opened(path) as journal:
        put(journal, *[(n, n) for n in range(1, 41)])
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    hit = sorted(rng.permutation(40)[:7].tolist())
    for index in hit:
        data[HEADER_BYTES + index * RECORD_BYTES + int(rng.integers(RECORD_BYTES))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    with opened(path) as journal:
        assert found(journal.recovered) == [(n, n) for n in range(1, 41) if n - 1 not in hit]
        assert journal.num_damaged == 7


def test_zeros_after_a_power_cut_are_skipped(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10))
    os.truncate(path, path.stat().st_size + 3 * RECORD_BYTES + 5)
    with opened(path) as journal:
        assert found(journal.recovered) == [(1, 10)]
        assert journal.num_damaged == 3
        put(journal, (2, 20))
    with opened(path) as journal:
        assert found(journal.recovered) == [(1, 10), (2, 20)]


def test_any_single_flipped_bit_loses_at_most_one_block_and_invents_none(path: Path) -> None:
    with opened(path) as journal:
        put(journal, *[(n, n) for n in range(1, 6)])
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for bit in rng.integers(HEADER_BYTES * 8, len(whole) * 8, 60).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with opened(path) as journal:
            assert set(found(journal.recovered)) < {(n, n) for n in range(1, 6)}
            assert len(journal.recovered.names) == 4


def test_a_foreign_or_damaged_header_is_refused_and_left_alone(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10))
    whole = path.read_bytes()
    with pytest.raises(JournalFormatError, match="another model"):
        Journal.open(path, NUM_SLOTS, b"other")
    for bad in (b"", b"hello", whole[:20], b"\0" * 200, whole[:30] + b"\xff" + whole[31:]):
        path.write_bytes(bad)
        with pytest.raises(JournalFormatError) as caught:
            Journal.open(path, NUM_SLOTS, b"model")
        assert caught.value.path == path
        assert path.read_bytes() == bad


def test_create_replaces_whatever_is_there(path: Path) -> None:
    path.write_bytes(b"hello")
    journal = Journal.create(path, NUM_SLOTS, b"model")
    put(journal, (1, 10))
    journal.close()
    with opened(path) as again:
        assert found(again.recovered) == [(1, 10)]


def test_records_of_an_earlier_file_are_not_believed(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10), (2, 20))
    old = path.read_bytes()
    path.unlink()
    with opened(path) as journal:
        put(journal, (3, 30))
    path.write_bytes(path.read_bytes() + old[HEADER_BYTES:])
    with opened(path) as journal:
        assert found(journal.recovered) == [(3, 30)]
        assert journal.num_damaged == 2


def test_a_smaller_tier_forgets_the_slots_it_lacks(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10), (2, 900), (3, 99))
    with opened(path, num_slots=100) as journal:
        assert found(journal.recovered) == [(1, 10), (3, 99)]


def test_a_long_log_is_rewritten_and_says_the_same(path: Path) -> None:
    with opened(path) as journal:
        for turn in range(60):
            put(journal, *[(1000 * turn + slot + 1, slot) for slot in range(NUM_SLOTS)])
            put(journal, (7, 5))
        assert path.stat().st_size < 25_000 * RECORD_BYTES
        expected = [(59_000 + slot + 1, slot) for slot in range(NUM_SLOTS) if slot != 5] + [(7, 5)]
    assert not path.with_name("journal.log.tmp").exists()
    with opened(path) as journal:
        assert found(journal.recovered) == expected


def test_a_left_over_half_rewrite_is_removed(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10))
    path.with_name("journal.log.tmp").write_bytes(b"half")
    with opened(path) as journal:
        assert found(journal.recovered) == [(1, 10)]
    assert not path.with_name("journal.log.tmp").exists()


def test_a_deleted_index_is_made_again_with_what_is_true(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 10), (2, 20))
        path.unlink()
        assert put(journal, (3, 30))
    with opened(path) as journal:
        assert found(journal.recovered) == [(1, 10), (2, 20), (3, 30)]


def test_a_full_disk_refuses_whole_puts_and_harms_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with opened(path) as journal:
        put(journal, (1, 10))
        room = path.stat().st_size + RECORD_BYTES + 20  # one record and a torn second
        with largest_file(room):
            assert not put(journal, (2, 20), (3, 30))
            assert not put(journal, (2, 20), (3, 30))
            journal.check_invariants()
            assert put(journal, (4, 40))
        assert put(journal, (5, 50))
    with opened(path) as journal:
        assert found(journal.recovered) == [(1, 10), (4, 40), (5, 50)]
        assert journal.num_damaged == 0
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1


def test_a_rewrite_that_finds_no_space_keeps_the_old_log(path: Path) -> None:
    with opened(path) as journal:
        for turn in range(16):
            put(journal, *[(1000 * turn + slot + 1, slot) for slot in range(NUM_SLOTS)])
        path.with_name("journal.log.tmp").mkdir()  # the rewrite cannot open its file
        for turn in range(16, 30):
            assert put(journal, *[(1000 * turn + slot + 1, slot) for slot in range(NUM_SLOTS)])
        path.with_name("journal.log.tmp").rmdir()
    with opened(path) as journal:
        assert found(journal.recovered) == [(29_000 + slot + 1, slot) for slot in range(NUM_SLOTS)]


def test_threads_lose_no_record(path: Path) -> None:
    with opened(path) as journal:

        def work(part: int) -> None:
            for slot in range(part, NUM_SLOTS, 4):
                assert put(journal, (slot + 1, slot))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    with opened(path) as journal:
        assert sorted(found(journal.recovered)) == [(slot + 1, slot) for slot in range(NUM_SLOTS)]


def test_wrong_arguments_are_refused(path: Path) -> None:
    with opened(path) as journal:
        with pytest.raises(KernelArgumentError, match=r"slots holds 1000, outside \[0, 1000\)"):
            put(journal, (1, NUM_SLOTS))
        with pytest.raises(KernelArgumentError, match="must have 16 bytes"):
            journal.drop([b"short"], ids(1))


def test_drops_that_come_after_their_slots_were_taken_away_are_ignored(path: Path) -> None:
    with opened(path) as journal:
        put(journal, (1, 1), (2, 900))
        journal.resize(10)
        assert journal.drop(names(1, 2), ids(1, 900))
        assert journal.forget(ids(1, 900))
        assert journal.records_in(ids(1, 900)).size == 0
        assert put(journal, (3, 3))
    with opened(path, 10) as journal:
        assert found(journal.recovered) == [(3, 3)]


def test_a_closed_index_refuses_work_and_may_be_closed_again(path: Path) -> None:
    journal = Journal.open(path, NUM_SLOTS, b"model")
    journal.close()
    journal.close()
    with pytest.raises(TierClosedError):
        put(journal, (1, 10))
    with pytest.raises(TierClosedError):
        journal.clear()
