"""What an index file says: the blocks that its records leave over, as arrays."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import SlotIds
from dynamo.tiers.name_table import Names, name_words
from dynamo.tiers.plain_file import open_plain
from dynamo.tiers.records import (
    HEADER_BYTES,
    RECORD,
    RECORD_BYTES,
    Header,
    Records,
    Survivors,
    chosen,
    names_of,
    record_checks,
    replay,
)
from dynamo.tiers.slot_digests import DigestKinds, stored_kinds

__all__ = ["IndexScan", "RecoveredBlocks", "read_records", "scan_index"]

_SAMPLES = 1024
_USUAL_SHARE = 1 / 16  # of the samples: below it, trying a lag on all costs more than looking its blocks up


@dataclass(frozen=True, slots=True)
class RecoveredBlocks:
    """Blocks found in an index, least recently put first; names are distinct, and so are slots.

    Attributes:
        names: 16-byte block names, uint8 [n, 16], C-contiguous: `names.tobytes()` is all of them in a row.
        parents: name of each block's parent, ROOT_NAME for none, uint8 [n, 16], C-contiguous.
        parent_index: position of each block's parent in these arrays, int64 [n]; -1 for a block without a parent, or whose
            parent is not there. A parent is usually, not always, put before its children.
        slots: int64 [n].
        digests: uint64 [n].
        digest_kinds: `DigestKind` of each, uint8 [n].
    """

    names: Names
    parents: Names
    parent_index: SlotIds
    slots: SlotIds
    digests: npt.NDArray[np.uint64]
    digest_kinds: DigestKinds

    @classmethod
    def from_log(cls, log: Survivors) -> "RecoveredBlocks":
        """The blocks of the PUT records that are still true."""
        records = log.records
        names, parents = names_of(records, "name"), names_of(records, "parent")
        return cls(
            names,
            parents,
            _parent_index(name_words(names), name_words(parents), log),
            records["slot"].astype(np.int64),
            records["digest"].astype(np.uint64),
            stored_kinds(records["digest_kind"]),
        )

    @classmethod
    def empty(cls) -> "RecoveredBlocks":
        """No blocks."""
        return cls.from_log(replay(np.zeros(0, dtype=RECORD)))

    def __len__(self) -> int:
        return self.slots.size

    def selected(self, which: npt.NDArray[np.bool_]) -> "RecoveredBlocks":
        """The blocks chosen by a mask, bool [n]; parents among those left out are not there any more."""
        if which.all():
            return self
        position = np.cumsum(which) - 1
        parent_index = self.parent_index[which]
        has_parent = (parent_index >= 0) & which[parent_index]
        parent_index = np.where(has_parent, position[parent_index], -1)
        return RecoveredBlocks(
            self.names[which],
            self.parents[which],
            parent_index,
            self.slots[which],
            self.digests[which],
            self.digest_kinds[which],
        )


@dataclass(frozen=True, slots=True)
class IndexScan:
    """What an index file holds, found without changing it.

    Attributes:
        blocks: the blocks it names.
        num_records: whole records in the file.
        num_damaged: those of them whose check fails.
    """

    blocks: RecoveredBlocks
    num_records: int
    num_damaged: int


def scan_index(path: Path) -> IndexScan:
    """Reads an index whatever model it belongs to.

    Raises:
        JournalFormatError: the file is foreign, another version's, or its header is damaged.
        OSError: it cannot be read.
    """
    fd = open_plain(path, os.O_RDONLY)
    try:
        header = Header.from_bytes(os.pread(fd, HEADER_BYTES, 0), None, path)
        records = read_records(fd)
    finally:
        os.close(fd)
    good = chosen(records, record_checks(records, header.seed) == records["check"])
    blocks = RecoveredBlocks.from_log(replay(good))
    return IndexScan(blocks, records.size, records.size - good.size)


def read_records(fd: int) -> Records:
    """All whole records behind the header."""
    num_bytes = max(0, os.fstat(fd).st_size - HEADER_BYTES) // RECORD_BYTES * RECORD_BYTES
    data = np.empty(num_bytes, dtype=np.uint8)
    num_read = 0
    while num_read < num_bytes:
        count = os.preadv(fd, [data.data[num_read:]], HEADER_BYTES + num_read)
        if count == 0:
            break
        num_read += count
    return data[: num_read // RECORD_BYTES * RECORD_BYTES].view(RECORD)


def _parent_index(
    names: npt.NDArray[np.uint64], parents: npt.NDArray[np.uint64], log: Survivors
) -> npt.NDArray[np.int64]:
    """Where each of `parents` stands among `names`, both uint64 [n, 2] of the blocks in `log`; -1 where it does not.

    Most blocks were put right behind their parent, or start a sequence. Where several sequences grew at a time, most were
    put some number of records behind it, which a few of them tell. Only the others are looked up in the table.
    """
    parent_index = np.full(len(names), -1, dtype=np.int64)
    is_open = (parents[:, 0] | parents[:, 1]) != 0
    _take_parents(1, names, parents, is_open, parent_index)
    open_ones = np.flatnonzero(is_open)
    if open_ones.size > _SAMPLES:
        sample = open_ones[:: open_ones.size // _SAMPLES]
        lags = sample - _look_up(parents[sample], log)
        values, counts = np.unique(lags[(lags > 0) & (lags <= sample)], return_counts=True)
        for lag in values[counts >= sample.size * _USUAL_SHARE].tolist():
            _take_parents(lag, names, parents, is_open, parent_index)
        open_ones = np.flatnonzero(is_open)
    if open_ones.size:
        parent_index[open_ones] = _look_up(parents[open_ones], log)
    return parent_index


def _take_parents(
    lag: int,
    names: npt.NDArray[np.uint64],
    parents: npt.NDArray[np.uint64],
    is_open: npt.NDArray[np.bool_],
    parent_index: npt.NDArray[np.int64],
) -> None:
    """Notes the parents of those open blocks that have them `lag` places before; they are not open any more."""
    follows = (parents[lag:, 0] == names[:-lag, 0]) & (parents[lag:, 1] == names[:-lag, 1]) & is_open[lag:]
    places = np.flatnonzero(follows)
    parent_index[places + lag] = places
    is_open[lag:] &= ~follows


def _look_up(names: npt.NDArray[np.uint64], log: Survivors) -> npt.NDArray[np.int64]:
    """Positions of names, uint64 [n, 2], among the blocks in `log`; -1 where they are not."""
    found = log.table.find(names)
    if not log.is_alive.all():
        position = np.append(np.where(log.is_alive, np.cumsum(log.is_alive) - 1, -1), -1)  # the last: of no place
        found = position[found]
    return found
