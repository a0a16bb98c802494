"""The index's binary form and its replay."""

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.tiers.errors import JournalFormatError
from dynamo.tiers.records import (
    DROP,
    HEADER_BYTES,
    PUT,
    RECORD,
    RECORD_BYTES,
    Header,
    Records,
    make_records,
    names_of,
    record_checks,
    surviving_puts,
)
from dynamo.tiers.slot_digests import DigestKind

SEED = np.uint64(12345)
PATH = Path("journal.log")


def name(number: int) -> bytes:
    return struct.pack("<QQ", number % 2, number)  # low halves collide on purpose


def record(kind: int, number: int, slot: int, sequence: int) -> Records:
    digest = np.array([sequence], dtype=np.uint64)
    return make_records(kind, [name(number)], [name(0)], np.array([slot]), digest, sequence, SEED)


def naive_replay(steps: list[tuple[int, int, int]]) -> list[tuple[bytes, int]]:
    """(name, slot) of what is true after the steps, in the order put: one dictionary step at a time."""
    slot_of: dict[bytes, int] = {}
    for kind, number, slot in steps:
        if kind == PUT:
            for other in [other for other, at in slot_of.items() if at == slot]:
                del slot_of[other]
            slot_of.pop(name(number), None)
            slot_of[name(number)] = slot
        elif slot_of.get(name(number)) == slot:
            del slot_of[name(number)]
    return list(slot_of.items())


@given(steps=st.lists(st.tuples(st.sampled_from([PUT, PUT, DROP]), st.integers(1, 6), st.integers(0, 4)), max_size=40))
@settings(deadline=None)
def test_replay_agrees_with_one_step_at_a_time(steps: list[tuple[int, int, int]]) -> None:
    log = [record(kind, number, slot, i + 1) for i, (kind, number, slot) in enumerate(steps)]
    records = np.concatenate([np.zeros(0, dtype=RECORD), *log])
    shuffled = records[np.random.default_rng(len(steps)).permutation(records.size)]
    for given_order in (records, shuffled):
        survivors = surviving_puts(given_order)
        found = list(zip(map(bytes, names_of(survivors, "name")), survivors["slot"].tolist(), strict=True))
        assert found == naive_replay(steps)


def test_a_record_is_64_bytes_of_published_form() -> None:
    records = make_records(
        PUT, [bytes(range(16))], [bytes(16)], np.array([7]), np.array([9], dtype=np.uint64), 3, np.uint64(1)
    )
    data = records.tobytes()
    assert len(data) == RECORD_BYTES
    assert data[:56] == struct.pack("<IIQ16s16sQ", PUT, 7, 3, bytes(range(16)), bytes(16), 9)
    assert record_checks(records, np.uint64(1)).tolist() == [scalar_check(data[:56], 1)]
    assert data[56:].hex() == "3a052425216f1bc7"


def test_the_kind_of_digest_stands_where_nothing_but_zeros_stood_before() -> None:
    digest = np.array([9], dtype=np.uint64)
    records = make_records(PUT, [name(1)], [name(0)], np.array([7]), digest, 3, SEED, DigestKind.LINES)
    assert records.tobytes()[:8] == struct.pack("<HHI", PUT, 1, 7)
    assert surviving_puts(records)["digest_kind"].tolist() == [1]
    assert surviving_puts(record(PUT, 3, 4, 5))["digest_kind"].tolist() == [DigestKind.XXH3]


def scalar_check(data: bytes, seed: int) -> int:
    state = seed
    for (word,) in struct.iter_unpack("<Q", data):
        state = (state ^ word) * 0x9E3779B97F4A7C15 % 2**64
        state ^= state >> 29
    return state


def test_every_flipped_bit_fails_the_check() -> None:
    data = record(PUT, 3, 4, 5).tobytes()
    flips: list[bytes] = []
    for bit in range(8 * RECORD_BYTES):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        flips.append(bytes(flipped))
    records = np.frombuffer(b"".join(flips), dtype=RECORD)
    assert not (record_checks(records, SEED) == records["check"]).any()


def test_empty_and_foreign_regions_fail_the_check() -> None:
    zeros = np.zeros(3, dtype=RECORD)
    assert not (record_checks(zeros, SEED) == zeros["check"]).any()
    records = record(PUT, 3, 4, 5)
    assert not (record_checks(records, SEED + np.uint64(1)) == records["check"]).any()


def test_lists_that_do_not_pair_up_are_refused() -> None:
    one: npt.NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
    with pytest.raises(KernelArgumentError, match="2 names, 1 parents, 1 slots and 1 digests do not pair up"):
        make_records(PUT, [name(1), name(2)], [name(0)], np.array([0]), one, 1, SEED)
    with pytest.raises(KernelArgumentError, match="must have 16 bytes, got 3"):
        make_records(PUT, [b"abc"], [name(0)], np.array([0]), one, 1, SEED)


def test_a_header_comes_back() -> None:
    header = Header.new(b"model", 77)
    data = header.to_bytes()
    assert len(data) == HEADER_BYTES
    assert Header.from_bytes(data, b"model", PATH) == header
    assert Header.new(b"model", 77).seed != header.seed


def test_headers_that_are_not_ours_are_refused_saying_why() -> None:
    data = Header.new(b"model", 77).to_bytes()
    later = bytearray(data)
    later[8] = 2
    with pytest.raises(JournalFormatError, match="damaged header"):
        Header.from_bytes(bytes(later), b"model", PATH)
    with pytest.raises(JournalFormatError, match="another model"):
        Header.from_bytes(data, b"other", PATH)
    with pytest.raises(JournalFormatError, match="not an index"):
        Header.from_bytes(b"SQLite format 3\0" + data, b"model", PATH)
    for length in (0, 3, 8, HEADER_BYTES - 1):
        with pytest.raises(JournalFormatError, match=f"cut short: {length} of its first {HEADER_BYTES} bytes are left"):
            Header.from_bytes(data[:length], b"model", PATH)
