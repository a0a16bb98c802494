"""A worker's name is its own while it lives, and nobody's afterwards."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo.serve.errors import ConfigError
from dynamo.serve.worker_claim import MAX_SOCKET_PATH_BYTES, WorkerClaim


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


@pytest.mark.parametrize("depth", [0, 100])
def test_what_a_killed_worker_left_is_cleared_by_the_next_of_its_name(tmp_path: Path, depth: int) -> None:
    directory = tmp_path / ("x" * depth)
    code = f"""
import os, pathlib, signal
from dynamo.serve.worker_claim import WorkerClaim
claim = WorkerClaim.take(pathlib.Path({str(directory)!r}), "w")
pathlib.Path(claim.socket_path("http")).touch()
print(claim.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    left = Path(done.stdout.strip())
    assert [path.name for path in left.iterdir()] == ["http.sock"]
    with WorkerClaim.take(directory, "w") as claim:
        assert claim.folder == left and list(left.iterdir()) == []
    assert not left.exists()


def test_a_folder_that_cannot_be_used_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"--discovery /proc/1/x: "):
        WorkerClaim.take(Path("/proc/1/x"), None)
