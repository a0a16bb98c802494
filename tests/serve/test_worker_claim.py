"""A worker's name is its own while it lives, and nobody's afterwards."""

import fcntl
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynamo.serve.errors import ConfigError
from dynamo.serve.worker_claim import MAX_SOCKET_PATH_BYTES, WorkerClaim, any_worker_in


def test_names_are_given_out_in_order_and_given_back(tmp_path: Path) -> None:
    with WorkerClaim.take(tmp_path, None) as first:
        with WorkerClaim.take(tmp_path, None) as second:
            assert (first.worker_id, second.worker_id) == ("worker-0", "worker-1")
        with WorkerClaim.take(tmp_path, None) as third:
            assert third.worker_id == "worker-1"
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_given_out_once(tmp_path: Path) -> None:
    with (
        WorkerClaim.take(tmp_path, "mine"),
        pytest.raises(ConfigError, match="--worker-id mine: a worker of that name runs"),
    ):
        WorkerClaim.take(tmp_path, "mine")
    WorkerClaim.take(tmp_path, "mine").close()


def test_folder_and_sockets_are_this_users_alone(tmp_path: Path) -> None:
    with WorkerClaim.take(tmp_path / "new" / "place", "w") as claim:
        for folder in (tmp_path / "new" / "place", claim.folder):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert Path(claim.socket_path("http")).parent == claim.folder


def test_a_deep_folder_has_its_sockets_where_their_paths_are_short(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    with WorkerClaim.take(deep, "w") as claim:
        assert len(claim.socket_path("replay")) <= MAX_SOCKET_PATH_BYTES
        assert not claim.folder.is_relative_to(deep)
        folder = claim.folder
    assert not folder.exists()


KILLED = """
import os, pathlib, signal, sys
from dynamo.router.workers import WorkerCard
from dynamo.serve.registration import Registration
from dynamo.serve.registration_files import write_entry
from dynamo.serve.worker_claim import WorkerClaim
directory, name = pathlib.Path(sys.argv[1]), sys.argv[2]
claim = WorkerClaim.take(directory, name)
pathlib.Path(claim.socket_path("http")).touch()
card = WorkerCard(worker_id=name, epoch=1, model="m", fingerprint="00", hash_version=1, block_size=16)
write_entry(directory / f"{name}.json", Registration(card=card, address="unix:/x", pid=os.getpid()))
print(claim.folder, flush=True)
sys.stdin.read()
"""


@contextmanager
def worker_in(directory: Path, name: str) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process with a claim and a registration, and its folder."""
    command = [sys.executable, "-P", "-c", KILLED, str(directory), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


@pytest.mark.parametrize("depth", [0, 100])
@pytest.mark.parametrize("next_name", ["w", "another"])
def test_what_killed_workers_left_is_removed_by_the_next_one_and_nothing_else(
    tmp_path: Path, depth: int, next_name: str
) -> None:
    directory = tmp_path / ("x" * depth)
    with worker_in(directory, "w") as (killed, left), worker_in(directory, "alive") as (_, kept):
        killed.kill()
        killed.wait(60)
        assert [path.name for path in left.iterdir()] == ["http.sock"]
        (directory / "mine.txt").touch()
        with WorkerClaim.take(directory, next_name) as claim:
            assert claim.folder == left if next_name == "w" else not left.exists()
            assert list(claim.folder.iterdir()) == []
            assert (kept / "http.sock").exists()
            assert {"alive.json", "alive.lock", "mine.txt"} <= {path.name for path in directory.iterdir()}
            assert not (directory / "w.json").exists()
        assert not left.exists()
        assert not (directory / "w.lock").exists()


def test_a_folder_that_is_used_for_other_things_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "composer.d").mkdir()
    for name in ("composer.lock", "composer.json", "composer.d/conf", "poetry.lock", "worker-0.json"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "empty.lock").touch()
    (tmp_path / "empty.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with WorkerClaim.take(tmp_path, None) as claim:
        assert claim.worker_id == "worker-1"
    for name, strange in (("composer", "lock"), ("poetry", "lock"), ("empty", "json"), ("worker-0", "json")):
        says = f"--worker-id {name}: {tmp_path / name}.{strange} is no worker's, and would be lost; choose another name"
        with pytest.raises(ConfigError, match=says):
            WorkerClaim.take(tmp_path, name)
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "file").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path / 'conf.d'} is no worker's"):
        WorkerClaim.take(tmp_path, "conf")
    shutil.rmtree(tmp_path / "conf.d")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("has_words", [False, True])
def test_a_registration_that_lost_power_left_empty_is_in_no_workers_way(tmp_path: Path, has_words: bool) -> None:
    (tmp_path / "w.json").touch()
    (tmp_path / "w.lock").write_bytes(lock_words(tmp_path) if has_words else b"")
    with WorkerClaim.take(tmp_path, "another"):
        assert (tmp_path / "w.json").exists() is not has_words
    with WorkerClaim.take(tmp_path, "w") as claim:
        assert claim.worker_id == "w"


def test_a_registration_of_another_version_is_replaced_by_its_own_name_alone(tmp_path: Path) -> None:
    (tmp_path / "w.lock").write_bytes(lock_words(tmp_path))
    (tmp_path / "w.json").write_text('{"written": "by another version"}')
    WorkerClaim.take(tmp_path, "another").close()
    assert (tmp_path / "w.json").exists() and (tmp_path / "w.lock").exists()
    WorkerClaim.take(tmp_path, "w").close()
    (tmp_path / "w.lock").write_bytes(lock_words(tmp_path))
    (tmp_path / "w.json").unlink()
    (tmp_path / "w.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'w.json'} is no worker's"):
        WorkerClaim.take(tmp_path, "w")


def lock_words(directory: Path) -> bytes:
    """What a worker writes into its lock."""
    with WorkerClaim.take(directory, "writer"):
        return (directory / "writer.lock").read_bytes()


def test_a_worker_whose_lock_was_removed_is_not_tidied_up_after(tmp_path: Path) -> None:
    with worker_in(tmp_path, "alive") as (_, folder):
        (tmp_path / "alive.lock").unlink()
        (tmp_path / "alive.lock").touch()
        WorkerClaim.take(tmp_path, "another").close()
        assert (tmp_path / "alive.json").exists() and folder.exists()


def test_what_was_removed_is_made_again_for_the_same_worker(tmp_path: Path) -> None:
    with WorkerClaim.take(tmp_path / "fleet", "w") as claim:
        shutil.rmtree(tmp_path / "fleet")
        assert claim.renew()
        assert claim.folder.is_dir()
        with pytest.raises(ConfigError, match="a worker of that name runs"):
            WorkerClaim.take(tmp_path / "fleet", "w")
    assert list((tmp_path / "fleet").iterdir()) == []


@pytest.mark.parametrize("depth", [0, 100])
def test_a_worker_whose_name_was_taken_leaves_it_and_its_folder_to_the_other(tmp_path: Path, depth: int) -> None:
    directory = tmp_path / "fleet" / ("x" * depth)
    slow = WorkerClaim.take(directory, None)
    shutil.rmtree(tmp_path / "fleet")
    with WorkerClaim.take(directory, None) as fast:
        assert fast.worker_id == slow.worker_id
        Path(fast.socket_path("http")).touch()
        assert not slow.renew()
        slow.close()
        assert [path.name for path in fast.folder.iterdir()] == ["http.sock"]
        with pytest.raises(ConfigError, match="a worker of that name runs"):
            WorkerClaim.take(directory, fast.worker_id)


def test_a_worker_whose_name_was_taken_makes_no_folder(tmp_path: Path) -> None:
    slow = WorkerClaim.take(tmp_path / "fleet", None)
    shutil.rmtree(tmp_path / "fleet")
    with WorkerClaim.take(tmp_path / "fleet", None) as fast:
        fast.folder.rmdir()
        assert not slow.renew()
        assert not fast.folder.exists()
        assert fast.renew()
    slow.close()


def test_a_worker_whose_discovery_folder_is_gone_removes_its_own_elsewhere(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    with WorkerClaim.take(directory, "w") as claim:
        folder = claim.folder
        shutil.rmtree(directory)
    assert not folder.exists() and not directory.exists()


def test_it_is_known_whether_any_worker_runs_and_nothing_is_made_to_find_out(tmp_path: Path) -> None:
    directory = tmp_path / "fleet"
    assert not any_worker_in(directory)
    with WorkerClaim.take(directory, "w"):
        assert any_worker_in(directory)
    (directory / "dead.lock").touch()
    assert not any_worker_in(directory)
    assert [path.name for path in directory.iterdir()] == ["dead.lock"]
    shutil.rmtree(directory)
    assert not any_worker_in(directory)
    assert not directory.exists()


def test_a_lock_that_goes_while_it_is_looked_for_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "glob", lambda directory, _: [directory / "gone.lock"])
    assert not any_worker_in(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_worker_is_looked_for_while_one_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo.serve.worker_claim._ALONE_TIMEOUT_S", 0.05)
    starting = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(starting, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="has kept the folder locked"):
            any_worker_in(tmp_path)
    finally:
        os.close(starting)
    assert not any_worker_in(tmp_path)


def test_a_folder_that_cannot_be_used_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"--discovery /proc/1/x: "):
        WorkerClaim.take(Path("/proc/1/x"), None)
