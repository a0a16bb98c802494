"""Words for what the system refuses."""

import errno
import os
from pathlib import Path

import pytest

from dynamo.serve.errors import ConfigError
from dynamo.serve.model_place import find_model
from dynamo.serve.path_refusal import Use, path_refusal


@pytest.mark.parametrize(
    ("name", "use", "says"),
    [
        ("none", "read", "there is no such file; check the path"),
        ("no/such/file", "read", "there is no folder {}/no; check the path"),
        ("no/such/file", "write", "there is no folder {}/no; make it, or give another path"),
        ("link", "write", "nothing can be made there in {}; give another path"),
        (".", "write", "this is a folder; give the path of a file"),
        ("file/below", "write", "{}/file is no folder; give another path"),
        ("file/below", "folder", "{}/file is no folder; give another path"),
        ("file", "folder", "this is no folder; give another path"),
        (300 * "x", "write", "the name is longer than the file system allows; give a shorter one"),
    ],
)
def test_what_the_system_refuses_is_told_with_the_way_out(tmp_path: Path, name: str, use: Use, says: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "no" / "where")
    path = tmp_path / name
    with pytest.raises(OSError) as caught:  # which one is what is asked
        if use == "folder":
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.open("r" if use == "read" else "w")
    assert path_refusal(path, caught.value, use) == says.format(tmp_path)


@pytest.mark.parametrize(
    ("number", "use", "says"),
    [
        (errno.EACCES, "read", f"this user (uid {os.geteuid()}) may not read it; give it the permission, or"),
        (errno.EPERM, "folder", f"this user (uid {os.geteuid()}) may not write there; give it the permission, or"),
        (errno.EROFS, "write", "the file system there is read-only; give another path"),
        (errno.ENOSPC, "write", "no space is left there; free some"),
        (errno.EIO, "read", "Input/output error; see to that"),
    ],
)
def test_what_cannot_be_had_in_a_test_is_told_too(tmp_path: Path, number: int, use: Use, says: str) -> None:
    assert path_refusal(tmp_path / "path", OSError(number, os.strerror(number)), use).startswith(says)


def test_a_model_that_cannot_be_looked_for_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, says in (
        ("none", "is no folder"),
        ("file", "is no folder"),
        ("file/model", "file is no folder"),
        (300 * "x", "shorter"),
        ("~nobody-of-that-name/model", "is no folder"),
    ):
        with pytest.raises(ConfigError, match=f"^MODEL .*{says}"):
            find_model(name if name.startswith("~") else str(tmp_path / name))
