"""The disk index's binary form: a 64-byte header and 64-byte records, little-endian, and how a log of them is replayed.

    header   magic 8s, version u32, record_bytes u32, fingerprint 16s, num_slots u64, salt u64, zero u64, check u64
    record   kind u16, digest kind u16, slot u32, sequence u64, name 16s, parent 16s, digest u64, check u64

Kinds were one u32 before digests were of several kinds: records of then say kind 0 of digest, XXH3, which theirs are; and a
program of then passes over records that say another, so that the blocks they name are not there for it.

A record's check starts from its header's check, so a record of another file, or of an earlier life of this one (the salt is
random), does not pass.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from dynamo.kernels.checks import KernelArgumentError, SlotIds
from dynamo.tiers.errors import JournalFormatError
from dynamo.tiers.name_table import Names, NameTable, name_words
from dynamo.tiers.slot_digests import DigestKind

__all__ = [
    "DROP",
    "HEADER_BYTES",
    "NAME_BYTES",
    "PUT",
    "RECORD",
    "RECORD_BYTES",
    "ROOT_NAME",
    "Header",
    "Records",
    "Survivors",
    "chosen",
    "make_records",
    "names_of",
    "record_checks",
    "replay",
    "surviving_puts",
]

NAME_BYTES = 16
ROOT_NAME = bytes(NAME_BYTES)
"""Parent name of a block that starts a sequence."""

PUT = 1
DROP = 2

RECORD = np.dtype(
    [
        ("kind", "<u2"),
        ("digest_kind", "<u2"),
        ("slot", "<u4"),
        ("sequence", "<u8"),
        ("name", "<u8", 2),
        ("parent", "<u8", 2),
        ("digest", "<u8"),
        ("check", "<u8"),
    ]
)
RECORD_BYTES = 64
HEADER_BYTES = 64

Records = npt.NDArray[np.void]
"""Array of RECORD, [n]."""

_MAGIC = b"DYNKVIDX"
_VERSION = 1
_HEADER = struct.Struct("<8sII16sQQQ")  # the check follows
_MAX_TABLE_SLOTS = 1 << 26
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio; odd, so that multiplying loses nothing
_SHIFT = np.uint64(29)
_CHECK_RECORDS = 4096  # at a time, so that they stay in a processor's cache


@dataclass(frozen=True, slots=True)
class Header:
    """First 64 bytes of an index file.

    Attributes:
        fingerprint: 16 bytes naming what the blocks belong to (model, layout).
        num_slots: slots of the tier that wrote the file; for people, not checked.
        salt: random; makes records of other files fail their check.
    """

    fingerprint: bytes
    num_slots: int
    salt: int

    @classmethod
    def new(cls, fingerprint: bytes, num_slots: int) -> "Header":
        """A header with a fresh salt. `fingerprint` may have any length; it is hashed to 16 bytes."""
        return cls(xxhash.xxh3_128_digest(fingerprint), num_slots, int.from_bytes(os.urandom(8), "little"))

    def to_bytes(self) -> bytes:
        """The 64 bytes."""
        body = _HEADER.pack(_MAGIC, _VERSION, RECORD_BYTES, self.fingerprint, self.num_slots, self.salt, 0)
        return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")

    @property
    def seed(self) -> np.uint64:
        """Where the checks of this file's records start from."""
        return np.uint64(int.from_bytes(self.to_bytes()[-8:], "little"))

    @classmethod
    def from_bytes(cls, data: bytes, fingerprint: bytes | None, path: Path) -> "Header":
        """Reads a header and checks that it belongs to `fingerprint`, unless that is None.

        Raises:
            JournalFormatError: it does not, or is no header at all; the message says which.
        """
        if len(data) < HEADER_BYTES and data[:8] == _MAGIC[: len(data[:8])]:
            raise JournalFormatError(
                f"{path} is cut short: {len(data)} of its first {HEADER_BYTES} bytes are left", path=path
            )
        if len(data) < HEADER_BYTES or data[:8] != _MAGIC:
            raise JournalFormatError(f"{path} is not an index of KV blocks (it begins with {data[:8]!r})", path=path)
        _, version, record_bytes, found, num_slots, salt, _ = _HEADER.unpack(data[: _HEADER.size])
        if int.from_bytes(data[_HEADER.size : HEADER_BYTES], "little") != xxhash.xxh3_64_intdigest(
            data[: _HEADER.size]
        ):
            raise JournalFormatError(f"{path} has a damaged header", path=path)
        if version != _VERSION or record_bytes != RECORD_BYTES:
            raise JournalFormatError(
                f"{path} has format version {version}; this program reads {_VERSION}", path=path, is_other_version=True
            )
        if fingerprint is not None and found != xxhash.xxh3_128_digest(fingerprint):
            raise JournalFormatError(f"{path} belongs to another model or block layout", path=path)
        return cls(found, num_slots, salt)


def record_checks(records: Records, seed: np.uint64) -> npt.NDArray[np.uint64]:
    """Check of each record over its other 56 bytes, vectorised: a million take about 0.1 s.

    A chain of xor, odd multiply and xor-shift over the seven words. Every step is a bijection of the state, so a change
    within one word is always found; others pass with probability 2**-64. It guards against accidents, not attackers.

    Args:
        records: RECORD [n], C-contiguous.
        seed: the header's.

    Returns:
        uint64 [n].
    """
    words = records.view("<u8").reshape(-1, RECORD_BYTES // 8)
    states = np.full(records.size, seed, dtype=np.uint64)
    for start in range(0, records.size, _CHECK_RECORDS):
        state, part = states[start : start + _CHECK_RECORDS], words[start : start + _CHECK_RECORDS]
        for column in range(RECORD_BYTES // 8 - 1):
            state ^= part[:, column]
            state *= _MULTIPLIER
            state ^= state >> _SHIFT
    return states


def make_records(
    kind: int,
    names: Sequence[bytes] | Names,
    parents: Sequence[bytes] | Names,
    slots: SlotIds,
    digests: npt.NDArray[np.uint64],
    first_sequence: int,
    seed: np.uint64,
    digest_kind: DigestKind = DigestKind.XXH3,
) -> Records:
    """Builds checked records with consecutive sequence numbers; their digests are all of one kind.

    Raises:
        KernelArgumentError: the lists differ in length, or a name is not 16 bytes.
    """
    n = len(names)
    if not len(parents) == slots.size == digests.size == n:
        raise KernelArgumentError(
            f"{n} names, {len(parents)} parents, {slots.size} slots and {digests.size} digests do not pair up"
        )
    records = np.zeros(n, dtype=RECORD)
    records["kind"] = kind
    records["digest_kind"] = digest_kind
    records["slot"] = slots
    records["sequence"] = np.arange(first_sequence, first_sequence + n, dtype=np.uint64)
    records["name"] = _words(names, "name")
    records["parent"] = _words(parents, "parent")
    records["digest"] = digests
    records["check"] = record_checks(records, seed)
    return records


def names_of(records: Records, field: str) -> Names:
    """The 16-byte names in "name" or "parent" of each record; a copy, uint8 [n, 16]."""
    first = {"name": 2, "parent": 4}[field]
    words = records.view("<u8").reshape(-1, RECORD_BYTES // 8)[:, first : first + 2]
    names: Names = np.ascontiguousarray(words).view(np.uint8)
    return names


@dataclass(frozen=True, slots=True)
class Survivors:
    """What a log comes to.

    Attributes:
        puts: its PUT records in the order they were made, RECORD [n].
        is_alive: which of them are still true at its end, bool [n].
        table: where the last put of each name stands among `puts`.
    """

    puts: Records
    is_alive: npt.NDArray[np.bool_]
    table: NameTable

    @property
    def records(self) -> Records:
        """Those still true, RECORD [m]; names and slots are distinct."""
        return chosen(self.puts, self.is_alive)


def surviving_puts(records: Records) -> Records:
    """The PUT records still true at a log's end, RECORD [m]; see `replay`."""
    return replay(records).records


def replay(records: Records) -> Survivors:
    """Finds the PUT records still true at a log's end.

    A PUT ends with the next PUT of the same name, the next PUT into the same slot, or a DROP of that name in that slot.

    Args:
        records: RECORD [n], checked, in any order; ordered by sequence inside.
    """
    sequences = records["sequence"]
    if not (sequences[:-1] < sequences[1:]).all():
        records = chosen(records, np.argsort(sequences, kind="stable"))
    slots = records["slot"]
    if records.size and slots.max() >= _MAX_TABLE_SLOTS:  # too sparse for a table; no tier writes that
        slots = np.unique(slots, return_inverse=True)[1]
    is_put, is_drop = records["kind"] == PUT, records["kind"] == DROP
    puts = chosen(records, is_put)
    put_slots, positions = slots[is_put], np.arange(puts.size)
    last_of_slot = np.full(int(slots.max()) + 1 if records.size else 0, -1, dtype=np.int64)
    last_of_slot[put_slots] = positions  # of equal slots the last one stays
    names = name_words(names_of(puts, "name"))
    table = NameTable(names)
    alive = (last_of_slot[put_slots] == positions) & table.is_last
    if is_drop.any():
        drops = chosen(records, is_drop)
        at = last_of_slot[slots[is_drop]]
        drops, at = chosen(drops, at >= 0), at[at >= 0]
        is_same = (names[at] == name_words(names_of(drops, "name"))).all(axis=1)
        alive[at[is_same & (puts["sequence"][at] < drops["sequence"])]] = False
    return Survivors(puts, alive, table)


def chosen(records: Records, which: SlotIds | npt.NDArray[np.bool_]) -> Records:
    """`records[which]` without numpy's slow copy field by field; `records` itself when a mask chooses all."""
    if which.dtype == np.bool_ and which.all():
        return records
    picked: Records = records.view(f"V{RECORD_BYTES}")[which].view(RECORD)
    return picked


def _words(names: Sequence[bytes] | Names, what: str) -> npt.NDArray[np.uint64]:
    if isinstance(names, np.ndarray):
        if names.dtype != np.uint8 or names.shape[1:] != (NAME_BYTES,):
            raise KernelArgumentError(f"a block's {what} must have {NAME_BYTES} bytes, got an array {names.shape}")
        return name_words(np.ascontiguousarray(names))
    data = b"".join(names)
    if len(data) != NAME_BYTES * len(names) or any(len(name) != NAME_BYTES for name in names):
        wrong = next(name for name in names if len(name) != NAME_BYTES)
        raise KernelArgumentError(f"a block's {what} must have {NAME_BYTES} bytes, got {len(wrong)}: {wrong.hex()}")
    return np.frombuffer(data, dtype="<u8").reshape(-1, 2)
