"""A process's folder goes with it, and nothing that is anybody else's does."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynamo.serve.private_folder import private_folder
from dynamo.serve.worker_claim import WorkerClaim, any_worker_in

CHILD = """
import sys
import tempfile
from dynamo.serve.private_folder import private_folder
with private_folder(lambda folder: True) as folder:
    (folder / "workers").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where folders for temporary files are made. Not `tmp_path`: the path of a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dynamo-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr("tempfile.tempdir", None)
        yield Path(folder)


@contextmanager
def owner() -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process with such a folder."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def is_used(folder: Path) -> bool:
    return any_worker_in(folder / "workers")


def test_it_is_this_users_alone_and_gone_in_the_end(place: Path) -> None:
    with private_folder(is_used) as first, private_folder(is_used) as second:
        for folder in (first, second):
            assert folder.parent == place
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (first / "file").touch()
    assert list(place.iterdir()) == []


def test_that_of_a_killed_process_is_removed_once_nobody_uses_it_and_that_of_a_running_one_stays(place: Path) -> None:
    with owner() as (killed, left), owner() as (_, kept):
        killed.kill()
        killed.wait(60)
        with WorkerClaim.take(left / "workers", "w") as worker, private_folder(is_used):
            assert worker.folder.exists(), "its worker still ends what it has"
        with private_folder(is_used) as own:
            assert {*place.iterdir()} == {kept, own}


def test_what_may_be_anybody_elses_stays(place: Path) -> None:
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (place / "dynamo-other").mkdir()
    (place / "dynamo-front-link").symlink_to(elsewhere)
    (place / "dynamo-front-file").touch()
    there = [elsewhere, *(place / name for name in ("dynamo-other", "dynamo-front-link", "dynamo-front-file"))]
    if os.geteuid() == 0:
        theirs = place / "dynamo-front-theirs"
        theirs.mkdir()
        os.chown(theirs, 12345, 12345)
        there.append(theirs)
    with private_folder(is_used) as own:
        assert {*place.iterdir()} == {*there, own}
    assert (elsewhere / "file").exists()
