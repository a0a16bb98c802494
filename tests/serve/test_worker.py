"""A worker process by itself: what it registers, that it computes, and how it ends."""

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import uvloop

from dynamo.serve.engine.request import GenerationRequest, SamplingParams
from dynamo.serve.errors import ConfigError, WorkerLostError
from dynamo.serve.plane.questions import fetch_snapshot
from dynamo.serve.plane.session import WorkerSession
from dynamo.serve.worker_claim import WorkerClaim

SLOW_MOCKER = ("--engine", "mocker", "--mocker-step-time", "0.05")


def entry_of(discovery: Path, worker_id: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((discovery / f"{worker_id}.json").read_text())["registration"]
    return entry


async def session_of(entry: dict[str, Any]) -> WorkerSession:
    card = entry["card"]
    return await WorkerSession.connect(
        entry["address"], worker_id=card["worker_id"], epoch=card["epoch"], front_id="a front"
    )


def request(max_tokens: int = 4) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerationRequest(request_id="r", prompt_token_ids=[*range(300, 350)], sampling=sampling)


def run(coroutine: Any) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def test_a_worker_says_what_it_has_and_computes_and_can_be_found_again_when_its_folder_was_removed(
    start_worker: Any, discovery: Path, eventually: Any
) -> None:
    worker = start_worker("w", "--engine", "mocker", "--max-model-len", "600", "--max-running", "5")
    entry = entry_of(discovery, "w")
    card = entry["card"]
    assert (card["worker_id"], card["model"], card["max_model_len"], card["max_running"]) == ("w", "demo", 600, 5)
    assert card["num_blocks"] == {"device": 4096, "host": 2048}
    assert entry["pid"] == worker.process.pid

    async def generate() -> list[int]:
        session = await session_of(entry)
        tokens = [t async for deltas in session.generate(request()) for delta in deltas for t in delta.token_ids]
        snapshot = await fetch_snapshot(entry["address"], "w")
        assert snapshot.epoch == card["epoch"]
        assert len(snapshot.held["device"]) == 3
        await session.close()
        return tokens

    assert len(run(generate())) == 4
    files = {path.relative_to(discovery) for path in discovery.rglob("*")}
    shutil.rmtree(discovery)
    eventually(lambda: {path.relative_to(discovery) for path in discovery.rglob("*")} >= files)
    assert entry_of(discovery, "w") == entry
    assert len(run(generate())) == 4
    with pytest.raises(ConfigError, match="a worker of that name runs"):
        WorkerClaim.take(discovery, "w")
    assert worker.stop() == 0
    assert list(discovery.iterdir()) == []
    assert "Traceback" not in worker.log


def test_files_of_workers_with_the_same_settings_are_their_own(
    start_worker: Any, discovery: Path, tmp_path: Path
) -> None:
    flags = ("--engine", "mocker", "--disk-cache", f"{tmp_path}/kv:16MiB", "--key-log", f"{tmp_path}/keys.jsonl")
    for name in ("a", "b"):
        start_worker(name, *flags)
    assert sorted(path.name for path in (tmp_path / "kv").iterdir()) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.glob("keys*")) == ["keys.jsonl.a", "keys.jsonl.b"]


def test_a_worker_that_is_told_to_stop_is_unregistered_and_finishes_what_runs(
    start_worker: Any, discovery: Path, eventually: Any
) -> None:
    worker = start_worker("w", *SLOW_MOCKER)

    async def generate() -> int:
        session = await session_of(entry_of(discovery, "w"))
        num_tokens = 0
        async for deltas in session.generate(request(max_tokens=20)):
            if num_tokens == 0:
                worker.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(eventually, lambda: not (discovery / "w.json").exists())
            num_tokens += sum(len(delta.token_ids) for delta in deltas)
        await session.wait_lost()
        await session.close()
        return num_tokens

    assert run(generate()) == 20
    assert worker.process.wait(20) == 0
    assert "Traceback" not in worker.log


def test_what_runs_when_the_drain_is_over_is_for_others_to_carry_on(start_worker: Any, discovery: Path) -> None:
    worker = start_worker("w", *SLOW_MOCKER, "--drain-timeout", "0.3")

    async def generate() -> None:
        session = await session_of(entry_of(discovery, "w"))
        try:
            async for _ in session.generate(request(max_tokens=2000)):
                worker.process.send_signal(signal.SIGTERM)
        except WorkerLostError:
            return
        finally:
            await session.close()
        raise AssertionError("it did not end")

    run(generate())
    assert worker.process.wait(20) in (0, 1)  # more than one signal may have reached it
    assert "Traceback" not in worker.log


def test_what_a_killed_worker_left_is_in_nobodys_way(start_worker: Any, discovery: Path) -> None:
    worker = start_worker("w", "--engine", "mocker")
    worker.kill()
    before = entry_of(discovery, "w")["card"]["epoch"]
    (discovery / "w.json").unlink()
    start_worker("w", "--engine", "mocker")
    assert entry_of(discovery, "w")["card"]["epoch"] > before
    os.kill(entry_of(discovery, "w")["pid"], 0)
