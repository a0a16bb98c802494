"""Opening files of one's own where others may have been."""

import os
from pathlib import Path

import pytest

from dynamo.tiers.plain_file import open_plain


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_RDWR | os.O_CREAT])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, flags: int) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(OSError) as caught:
            open_plain(tmp_path / name, flags)
        assert caught.value.filename == str(tmp_path / name)


def test_a_plain_file_is_made_for_its_owner_and_waits_as_files_do(tmp_path: Path) -> None:
    fd = open_plain(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    assert os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.close(fd)
