"""Checks a closed disk tier without changing it: identities, index, extents within the files, every block's digest."""

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynamo.tiers.block_file import BlockFile
from dynamo.tiers.errors import JournalFormatError, TierBusyError, TierUnavailableError
from dynamo.tiers.file_io import FileIO
from dynamo.tiers.identity import IDENTITY_NAME, StripeIdentity, read_identity
from dynamo.tiers.name_table import name_words
from dynamo.tiers.namespace import (
    BLOCKS_NAME,
    JOURNAL_NAME,
    LOCK_NAME,
    find_namespaces,
    find_unusable,
    is_namespace_name,
)
from dynamo.tiers.plain_file import open_plain
from dynamo.tiers.recovered import RecoveredBlocks, scan_index
from dynamo.tiers.slot_digests import match_digests
from dynamo.tiers.tier import Outcomes, Rows, SlotIds

__all__ = ["NamespaceReport", "verify_directories"]

_CHUNK_BYTES = 32 << 20
_IO_THREADS = 8
_MAX_EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class NamespaceReport:
    """What was found in the folder, or folders, of one model.

    Attributes:
        folder: the one in the first directory.
        num_blocks: blocks that the index names.
        num_good: blocks whose bytes match their digest.
        num_corrupt: blocks that could be read and do not match.
        num_unreadable: blocks beyond the end of their file, or where the disk reports an error.
        num_damaged_records: records of the index whose check fails.
        read_bytes: bytes of blocks read.
        seconds: time that took.
        problems: sentences on what is wrong, the first few blocks among them; empty when all is well.
    """

    folder: Path
    num_blocks: int = 0
    num_good: int = 0
    num_corrupt: int = 0
    num_unreadable: int = 0
    num_damaged_records: int = 0
    read_bytes: int = 0
    seconds: float = 0.0
    problems: tuple[str, ...] = ()


def verify_directories(
    directories: Sequence[Path], on_progress: Callable[[int, int], None] | None = None
) -> list[NamespaceReport]:
    """Checks all models in a disk tier's directory, or directories in their order; changes nothing.

    A single folder of one model may be given as well. Models in use by a process are refused as a whole. A folder that is
    called like a model's and is none is a problem, too: the tier of that model could not use it.

    Args:
        directories: as given to the tier.
        on_progress: called with (blocks checked, blocks to check) of the model at hand.

    Returns:
        One report per model, in order of folder names; empty when there is none.

    Raises:
        TierBusyError: a process uses one of them.
        TierUnavailableError: there is no such directory, or it cannot be read.
    """
    first = directories[0]
    try:
        if not first.is_dir():
            raise TierUnavailableError(f"{first} is no directory; give the directory of a disk tier", path=first)
        if (first / IDENTITY_NAME).exists() or (is_namespace_name(first.name) and not find_namespaces(first)):
            return [_verify_namespace(directories, on_progress)]
        reports = [
            _verify_namespace([directory / folder.name for directory in directories], on_progress)
            for folder in find_namespaces(first)
        ]
        reports += [NamespaceReport(folder, problems=(why,)) for folder, why in find_unusable(first)]
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise TierUnavailableError(f"{first} cannot be checked: {what}", path=first) from error
    return sorted(reports, key=lambda report: report.folder.name)


def _verify_namespace(folders: Sequence[Path], on_progress: Callable[[int, int], None] | None) -> NamespaceReport:
    with contextlib.ExitStack() as stack:
        for folder in folders:
            if folder.is_dir():
                stack.enter_context(_shared_lock(folder / LOCK_NAME))
        try:
            identities = [read_identity(folder / IDENTITY_NAME).identity for folder in folders]
            problem = _misfit(folders, identities)
            scan = None if problem else scan_index(folders[0] / JOURNAL_NAME)
        except FileNotFoundError as error:
            problem, scan = f"{error.filename} is missing; the tier starts empty there", None
        except (TierUnavailableError, JournalFormatError) as error:
            problem, scan = str(error), None
        first = identities[0] if not problem else None
        if scan is None or first is None:
            return NamespaceReport(folders[0], problems=(problem or f"{folders[0]} has no identity",))
        problems = []
        if scan.num_damaged:
            problems.append(f"{scan.num_damaged} of {scan.num_records} records of the index are damaged")
        check = _BlockCheck(folders, first, scan.blocks)
        check.run(on_progress)
        return NamespaceReport(
            folders[0],
            len(scan.blocks),
            int(np.count_nonzero(check.is_good)),
            int(np.count_nonzero(check.is_readable & ~check.is_good)),
            int(np.count_nonzero(~check.is_readable)),
            scan.num_damaged,
            check.read_bytes,
            check.seconds,
            (*problems, *check.problems()),
        )


def _misfit(folders: Sequence[Path], identities: Sequence[StripeIdentity | None]) -> str | None:
    """Why these folders are not the directories of one tier in their order, if so."""
    first = identities[0]
    if first is None:
        return f"{folders[0] / IDENTITY_NAME} is missing or damaged; the tier starts empty there"
    if first.index:
        return f"{folders[0]} is directory {first.index + 1} of {first.count}; give all of them, in their order"
    if first.count != len(folders):
        return f"{folders[0]} is the first of {first.count} directories; give all of them, not {len(folders)}"
    for number, (folder, identity) in enumerate(zip(folders, identities, strict=True)):
        if identity is None or (identity.set_id, identity.index) != (first.set_id, number):
            return f"{folder} is not directory {number + 1} of the tier that begins in {folders[0]}"
    return None


class _BlockCheck:
    """Reads and digests the blocks of an index, in the order in which they lie in their files."""

    def __init__(self, folders: Sequence[Path], identity: StripeIdentity, blocks: RecoveredBlocks) -> None:
        self._folders = folders
        self._identity = identity
        self._blocks = blocks
        self.is_readable: Outcomes = np.zeros(len(blocks), dtype=np.bool_)
        self.is_good: Outcomes = np.zeros(len(blocks), dtype=np.bool_)
        self.read_bytes = 0
        self.seconds = 0.0

    def run(self, on_progress: Callable[[int, int], None] | None) -> None:
        """Checks all blocks."""
        slot_bytes = self._identity.slot_bytes
        chunk_slots = max(1, _CHUNK_BYTES // slot_bytes)
        rows: Rows = np.frombuffer(mmap.mmap(-1, chunk_slots * slot_bytes), dtype=np.uint8).reshape(-1, slot_bytes)
        places, numbers = np.divmod(self._blocks.slots, len(self._folders))
        started_s = time.perf_counter()
        num_done = 0
        with contextlib.closing(FileIO(_IO_THREADS)) as io:
            for number, folder in enumerate(self._folders):
                positions = np.flatnonzero(numbers == number)
                positions = positions[np.argsort(places[positions])]
                try:
                    file = BlockFile.open_to_read(folder / BLOCKS_NAME)
                except FileNotFoundError:
                    continue
                with contextlib.closing(file):
                    for start in range(0, positions.size, chunk_slots):
                        chunk = positions[start : start + chunk_slots]
                        self._check(io, file, chunk, places[chunk], rows)
                        num_done += chunk.size
                        if on_progress:
                            on_progress(num_done, len(self._blocks))
        self.seconds = time.perf_counter() - started_s

    def problems(self) -> Iterator[str]:
        """The first few bad blocks as sentences."""
        for which, what in (
            (self.is_readable & ~self.is_good, "does not match its digest"),
            (~self.is_readable, "cannot be read"),
        ):
            positions = np.flatnonzero(which)
            for position in positions[:_MAX_EXAMPLES].tolist():
                name = self._blocks.names[position].tobytes().hex()
                yield f"block {name} in slot {int(self._blocks.slots[position])} {what}"
            if positions.size > _MAX_EXAMPLES:
                yield f"... and {positions.size - _MAX_EXAMPLES} more blocks: {what}"

    def _check(self, io: FileIO, file: BlockFile, chunk: SlotIds, places: SlotIds, rows: Rows) -> None:
        row_ids = np.arange(chunk.size)
        readable = io.read(file, places, rows, row_ids).outcomes
        seeds = name_words(self._blocks.names[chunk])[:, 0]
        digests, kinds = self._blocks.digests[chunk], self._blocks.digest_kinds[chunk]
        self.is_readable[chunk] = readable
        self.is_good[chunk] = readable & match_digests(rows, row_ids, seeds, self._identity.block_bytes, digests, kinds)
        self.read_bytes += int(np.count_nonzero(readable)) * self._identity.slot_bytes


@contextlib.contextmanager
def _shared_lock(path: Path) -> Iterator[None]:
    """Keeps tiers out while the folder is looked at, and leaves the lock file as it is."""
    fd = open_plain(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            data = os.pread(fd, 32, 0).strip()
            raise TierBusyError(path, int(data) if data.isdigit() else None) from None
        yield
    finally:
        os.close(fd)
