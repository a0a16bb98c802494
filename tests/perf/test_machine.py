"""What is written down about the machine, and what is not."""

import dataclasses
import platform
import socket
import subprocess
from pathlib import Path

import pytest

from dynamo.perf.machine import git_commit, machine_record


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, timeout=30)


def test_the_record_names_what_numbers_depend_on() -> None:
    record = machine_record()
    assert record.cpus >= 1
    assert record.memory_bytes > 1 << 20
    assert record.python == platform.python_version()
    assert {"dynamo-kv", "torch", "numpy"} <= record.versions.keys()
    assert record.started.endswith("+00:00")


def test_the_record_can_be_published() -> None:
    values = [str(value) for value in dataclasses.asdict(machine_record()).values()]
    assert socket.gethostname() not in values
    assert not [value for value in values if str(Path(__file__).resolve().parent.parent) in value]


def test_a_folder_outside_a_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None


def test_a_checkout_has_a_commit_and_changes_are_marked(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    assert git_commit(tmp_path) is None, "no commit yet"
    file = tmp_path / "a.txt"
    file.write_text("1")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    clean = git_commit(tmp_path)
    assert clean is not None and len(clean) == 12
    file.write_text("2")
    assert git_commit(tmp_path) == clean + "+changes"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(Path(__file__).parent) is None
