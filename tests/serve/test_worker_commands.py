"""Workers get the server's settings, and a share of the machine each."""

import os
from pathlib import Path
from typing import Any

import pytest

from dynamo.serve.command_line import parse_command_line
from dynamo.serve.config import Config
from dynamo.serve.supervisor import WorkerCommand
from dynamo.serve.worker_commands import count_gpus, worker_commands


def server(*flags: str) -> Any:
    return parse_command_line(["--workers", "2", *flags]).loaded


def settings(command: WorkerCommand) -> Config:
    """What a worker that is started so reads."""
    command.write_files()
    arguments = list(command.arguments)
    return parse_command_line(arguments[arguments.index("worker") :]).loaded.config


def devices(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(os, "listdir", lambda path: ["null", "nvidiactl", "nvidia-uvm", *names])


def test_workers_are_started_with_the_servers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch)
    loaded = server("/models/x", "--threads", "6", "--disk-cache", "/kv:1GiB", "--api-key", "the secret")
    config = loaded.config
    commands = worker_commands(loaded, tmp_path, tmp_path / "d", {"DYNAMO_API_KEY": "the secret", "HOME": "/h"})
    assert [command.worker_id for command in commands] == ["worker-0", "worker-1"]
    for command in commands:
        assert command.environment == {"HOME": "/h"}
        parsed = settings(command)
        assert parsed.model == config.model
        assert parsed.cache == config.cache
        assert parsed.engine.threads == 3
        assert parsed.fleet.worker_id == command.worker_id
        assert parsed.fleet.discovery == tmp_path / "d"
    assert "secret" not in (tmp_path / "workers.toml").read_text()


def test_the_default_disk_tier_is_shared_and_a_given_one_is_each_workers(tmp_path: Path) -> None:
    loaded = server()
    whole = loaded.config.cache.disk_cache
    shared = worker_commands(loaded, tmp_path, tmp_path, {})
    config = settings(shared[0])
    assert whole is not None and config.cache.disk_cache is not None
    assert config.cache.disk_cache.capacity_bytes == whole.capacity_bytes // 2
    given = worker_commands(server("--disk-cache", "/kv:1GiB"), tmp_path / "other", tmp_path, {})
    config = settings(given[0])
    assert config.cache.disk_cache is not None and config.cache.disk_cache.capacity_bytes == 1 << 30


def test_every_worker_gets_a_gpu_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, "nvidia0", "nvidia1")
    loaded = parse_command_line(["--workers", "3", "--threads", "6"]).loaded
    commands = worker_commands(loaded, tmp_path, tmp_path, {})
    assert [command.arguments[-1] for command in commands] == ["cuda:0", "cuda:1", "cuda:0"]
    chosen = parse_command_line(["--workers", "3", "--device", "cuda:1"]).loaded
    assert all("--device" not in command.arguments for command in worker_commands(chosen, tmp_path, tmp_path, {}))


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 3), ("0", 1), ("0,2", 2), ("", 0), ("-1", 0), ("1,-1,2", 1), ("GPU-8f2a, GPU-1b", 2)]
)
def test_gpus_are_counted_as_cuda_shows_them(visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, "nvidia0", "nvidia1", "nvidia7")
    assert count_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_without_a_gpu_there_is_none_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch)
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0
