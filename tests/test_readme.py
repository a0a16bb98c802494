"""The README says nothing that is not so."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.perf.__main__ import main as perf_main
from dynamo.router.config import RouterConfig
from dynamo.router.router import Router
from dynamo.router.waiting import WaitingRoom
from dynamo.router.workers import WorkerCard
from dynamo.serve.cache_metrics import CacheCollector
from dynamo.serve.command_line import parse_command_line
from dynamo.serve.fleet import MemberStats
from dynamo.serve.migration import MigrationStats
from dynamo.serve.openapi import openapi_document
from dynamo.serve.router_metrics import RouterCollector
from dynamo.serve.routing_hints import FIELD_OF_HEADER
from dynamo.serve.supervisor import Supervisor

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_two_commands_are_there_to_copy() -> None:
    commands = "".join(code_blocks("sh")).splitlines()
    assert "pip install -e . && python -m dynamo.serve" in commands
    assert 'pip install -e ".[test]" && pytest -n auto' in commands


def test_the_embedding_example_runs_and_is_warm_the_second_time(tmp_path: Path) -> None:
    (example,) = code_blocks("python")
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-P", "-W", "error", "-c", example],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    assert outputs[0][0] == "0 of 100 tokens come from the cache"
    assert outputs[1][0] == "96 of 100 tokens come from the cache"
    assert "device_tokens=96" in outputs[0][1]


def test_the_admin_commands_work_as_written(start_server: Any) -> None:
    server = start_server("--engine", "mocker", "--admin")
    commands = [line for block in code_blocks("sh") for line in block.splitlines() if "/admin/" in line]
    described = openapi_document(admin=True)["paths"]
    assert len(commands) >= 6
    for line in commands:
        command = shlex.split(line.replace("http://127.0.0.1:8000", server.url), comments=True)
        done = subprocess.run([*command, "-sS"], capture_output=True, text=True, timeout=60, check=True)
        assert "error" not in json.loads(done.stdout), done.stdout
        assert command[1].removeprefix(server.url) in described
    for mentioned in re.findall(r"/admin/cache[a-z/]*", README):
        assert any(path.startswith(mentioned) for path in described)


def test_every_flag_of_the_server_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    configuration = README.split("## Configuration")[1].split("## Performance")[0]
    mentioned = set(re.findall(r"--[a-z][a-z-]+", configuration))
    assert mentioned and mentioned <= known, mentioned - known


@pytest.mark.parametrize(
    "line",
    [line for block in code_blocks("sh") for line in block.splitlines() if line.startswith("python -m dynamo.serve")],
)
def test_every_command_of_the_server_is_accepted(line: str) -> None:
    parse_command_line(shlex.split(line, comments=True)[3:])


def test_what_is_said_of_many_workers_is_so() -> None:
    section = README.split("## Many workers, one front")[1].split("\n## ")[0]
    assert set(re.findall(r"x-dynamo-[a-z-]+[a-z]", section)) >= set(FIELD_OF_HEADER)
    for header, fields in re.findall(r"^\| `(x-dynamo.*?) \| (.*?) \|", section, re.MULTILINE):
        names = re.findall(r"x-dynamo-[a-z-]+[a-z]", header)
        assert re.findall(r"dynamo\.([a-z]+)", fields) == [FIELD_OF_HEADER[name] for name in names]
    assert {"/router/explain", "/metrics/workers"} <= set(openapi_document(routed=True)["paths"])
    router = Router(RouterConfig())
    router.join(
        WorkerCard(worker_id="w", epoch=1, model="m", fingerprint="00", hash_version=HASH_VERSION, block_size=16)
    )
    member = MemberStats(worker_id="w", epoch=1, is_ready=True, report=None, feed=None)
    collector = RouterCollector(
        router.stats, WaitingRoom(router).stats, lambda: (member,), MigrationStats(), migration_limit=3
    )
    known = {metric.name for metric in (*collector.collect(), *Supervisor([]).collect())}
    mentioned = {name.removesuffix("_total") for name in re.findall(r"`(dynamo_[a-z_]+[a-z])`", section)}
    assert mentioned and mentioned <= known, mentioned - known


@pytest.mark.parametrize(
    "line", [line for block in code_blocks("sh") for line in block.splitlines() if "dynamo.perf" in line]
)
def test_every_benchmark_command_exists(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = line.split("#")[0].split()
    assert command[:3] == ["python", "-m", "dynamo.perf"]
    with pytest.raises(SystemExit) as exit_info:
        perf_main([*command[3:], "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in re.findall(r"--[a-z-]+", line))


def test_every_benchmark_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        perf_main(["--help"])
    commands = set(re.findall(r"^  ([a-z]+) {2,}\S", capsys.readouterr().out, re.MULTILINE))
    shown = set(re.findall(r"^python -m dynamo\.perf ([a-z]+)", "".join(code_blocks("sh")), re.MULTILINE))
    named = set(re.findall(r"`([a-z]+)`", next(line for line in CHANGELOG.splitlines() if "`dynamo.perf`" in line)))
    assert commands and commands == shown
    assert commands <= named


def test_every_metric_of_the_cache_exists(tmp_path: Path) -> None:
    spec = KVSpec(model="m", num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    options = {"disk": f"{tmp_path}:1MiB", "disk_write_budget": "1GB"}  # with which it has all of them
    with KVCache(spec, device="cpu", device_blocks=4, **options) as cache:
        known = {metric.name for metric in CacheCollector(cache.stats).collect()}
    mentioned = {name.removesuffix("_total") for name in re.findall(r"dynamo_kvcache_[a-z_]+[a-z]", README)}
    assert mentioned and mentioned <= known, mentioned - known


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(((?!https?:|#)[^)]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 220
