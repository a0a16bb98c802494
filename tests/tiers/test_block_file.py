"""The file itself; what is read from it and written to it is in test_file_io.py."""

import errno
import os
from pathlib import Path

import pytest

from dynamo.tiers.block_file import BlockFile, fault_kind


def test_the_probe_leaves_no_file(tmp_path: Path) -> None:
    BlockFile(tmp_path / "blocks.dat").close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["blocks.dat"]


def test_a_file_goes_buffered_once(tmp_path: Path) -> None:
    file = BlockFile(tmp_path / "blocks.dat")
    was_direct = file.is_direct
    assert [file.use_buffered() for _ in range(2)] == [was_direct, False]
    assert not file.is_direct
    file.close()


def test_a_file_that_is_only_read_is_not_made_and_has_nothing_made_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "blocks.dat"
    with pytest.raises(FileNotFoundError):
        BlockFile.open_to_read(path)
    path.write_bytes(b"x" * 4096)
    file = BlockFile.open_to_read(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(file.fd, b"y", 0)
    file.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["blocks.dat"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "quota_exceeded"),
        (errno.EIO, "io_error"),
        (errno.EPERM, "no_permission"),
    ],
)
def test_failures_have_names(number: int, kind: str) -> None:
    assert fault_kind(OSError(number, os.strerror(number))) == kind
