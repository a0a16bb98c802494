"""The key log: what is in it, who may read it, and that nothing waits for it."""

import asyncio
import json
import os
import resource
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from dynamo.kvcache.hashing import BlockKey, block_keys, chain_root
from dynamo.serve.engine.request import FinishedRequest
from dynamo.serve.errors import ConfigError
from dynamo.serve.key_log import KeyLog, check_key_log


def finished(number: int = 0, num_blocks: int = 4) -> FinishedRequest:
    keys = block_keys(range(1000 * number, 1000 * number + 16 * num_blocks), 16, chain_root(b"model", 16))
    return FinishedRequest(num_prompt_tokens=50, num_output_tokens=14, num_cached_tokens=32, block_keys=keys)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counters(log: KeyLog) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(log)
    return {
        sample.name.removeprefix("dynamo_key_log_") + "".join(sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


async def written(log: KeyLog, count: int, eventually: Any) -> None:
    """Waits until that many requests were written or dropped."""

    def is_done() -> bool:
        return sum(value for name, value in counters(log).items() if "requests" in name) >= count

    await asyncio.to_thread(eventually, is_done)


def test_a_line_tells_sizes_and_keys_and_no_text(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    request = finished()

    async def log() -> None:
        async with KeyLog(path, block_size=16) as key_log:
            key_log.record(request)

    before = time.time()
    run(log())
    (line,) = lines_of(path)
    assert before <= line.pop("time_s") <= time.time()
    assert line == {
        "num_prompt_tokens": 50,
        "num_output_tokens": 14,
        "cached_tokens": 32,
        "block_size": 16,
        "keys": "".join(key[:8].hex() for key in request.block_keys),
    }


def test_requests_without_a_full_block_have_no_keys(run: Any, tmp_path: Path) -> None:
    async def log() -> None:
        async with KeyLog(tmp_path / "keys", block_size=16) as key_log:
            key_log.record(finished(num_blocks=0))

    run(log())
    assert lines_of(tmp_path / "keys")[0]["keys"] == ""


def test_the_file_is_its_owners_alone_even_if_it_was_not(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    path.write_text('{"time_s":1,"an earlier":"line"}\n{"one that was interr')
    path.chmod(0o666)

    async def log() -> None:
        async with KeyLog(path, block_size=16) as key_log:
            key_log.record(finished())

    run(log())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first, torn, last = path.read_text().splitlines()
    assert (first, torn) == ('{"time_s":1,"an earlier":"line"}', '{"one that was interr')
    assert json.loads(last)["num_prompt_tokens"] == 50


def test_it_is_put_aside_at_its_largest_size(run: Any, tmp_path: Path, eventually: Any) -> None:
    path = tmp_path / "keys.jsonl"

    async def log() -> KeyLog:
        async with KeyLog(path, block_size=16, max_bytes=1000) as key_log:
            for number in range(50):
                key_log.record(finished(number))
                await written(key_log, number + 1, eventually)
        return key_log

    key_log = run(log())
    aside = Path(f"{path}.1")
    assert 0 < path.stat().st_size <= 1000 and 0 < aside.stat().st_size <= 1000
    assert stat.S_IMODE(aside.stat().st_mode) == stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(tmp_path.iterdir()) == [path, aside]
    last = lines_of(path)[-1]["keys"]
    assert last == "".join(key[:8].hex() for key in finished(49).block_keys)
    assert counters(key_log)["requests_total"] == 50


def test_what_finds_no_place_in_the_queue_is_counted_and_nobody_waits(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.serve.key_log._MAX_QUEUED_BLOCKS", 40)

    async def log() -> KeyLog:
        async with KeyLog(tmp_path / "keys", block_size=16) as key_log:
            for number in range(100):  # without a pause in which the writer could run
                key_log.record(finished(number))
            assert counters(key_log)["dropped_requests_totalqueue_full"] == 90
        key_log.record(finished())
        return key_log

    values = counters(run(log()))
    assert values["requests_total"] == len(lines_of(tmp_path / "keys")) == 10
    assert values["dropped_requests_totalqueue_full"] == 91


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file grows beyond `num_bytes`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_lines_whole_is_logged_once_and_ends(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, eventually: Any
) -> None:
    path = tmp_path / "keys.jsonl"

    async def log() -> KeyLog:
        async with KeyLog(path, block_size=16) as key_log:
            with full_disk(1000):
                for number in range(20):
                    key_log.record(finished(number))
                    await written(key_log, number + 1, eventually)
            key_log.record(finished(99))
            await written(key_log, 21, eventually)
        return key_log

    values = counters(run(log()))
    lines = lines_of(path)  # every one is whole
    assert values["requests_total"] == len(lines)
    assert values["dropped_requests_totalwrite_failed"] == 21 - len(lines) > 10
    assert lines[-1]["keys"].startswith(finished(99).block_keys[0][:8].hex())
    assert values["bytes_total"] == path.stat().st_size
    assert [record.message for record in caplog.records if "cannot be written" in record.message] == [
        f"--key-log {path} cannot be written (File too large): requests are missing from it; "
        "further failures are only counted"
    ]


def test_a_folder_that_vanishes_is_survived(run: Any, tmp_path: Path, eventually: Any) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "keys"

    async def log() -> KeyLog:
        async with KeyLog(path, block_size=16, max_bytes=300) as key_log:
            key_log.record(finished())
            await written(key_log, 1, eventually)
            path.unlink()
            folder.rmdir()
            for number in range(3):
                key_log.record(finished(number))
                await written(key_log, number + 2, eventually)
            folder.mkdir()
            key_log.record(finished())
            await written(key_log, 5, eventually)
        return key_log

    values = counters(run(log()))
    assert values["dropped_requests_totalwrite_failed"] == 3
    assert len(lines_of(path)) == 1


def test_two_writers_of_one_file_are_refused(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"

    async def log() -> None:
        async with KeyLog(path, block_size=16):
            with pytest.raises(ConfigError, match="another process writes it"):
                check_key_log(path)

    run(log())
    check_key_log(path)


def test_a_file_of_other_content_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama"}')
    path.chmod(0o644)
    with pytest.raises(
        ConfigError, match=f"--key-log {path}: this file has other content than a key log; .*another path"
    ):
        check_key_log(path)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ('{"model_type": "llama"}', 0o644)
    for torn in ("", '{"ti', '{"ti\n{"time_s":1}\n', "\n"):
        path.write_text(torn)
        check_key_log(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing"])
def test_what_cannot_be_written_is_one_sentence_before_anything_is_loaded(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = tmp_path / "nowhere" / "file"
    with pytest.raises(ConfigError, match=f"--key-log {path}: "):
        check_key_log(path)


def test_a_server_logs_what_its_requests_used(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    server = start_server("--engine", "mocker", "--speedup", "0", "--key-log", str(path))
    prompt = list(range(100, 200))
    body = {"model": "demo", "prompt": prompt, "max_tokens": 30}
    for _ in range(2):
        assert httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200
    with httpx.stream(
        "POST", server.url + "/v1/completions", json={**body, "stream": True, "max_tokens": 4000}
    ) as left:
        next(left.iter_raw())
    assert server.stop() == 0
    first, second, third = lines_of(path)
    assert (first["num_prompt_tokens"], first["num_output_tokens"], first["cached_tokens"]) == (100, 30, 0)
    assert (second["cached_tokens"], second["keys"]) == (96, first["keys"])
    assert first["block_size"] == 16
    assert len(first["keys"]) == 16 * (129 // 16), "the last token's KV is never computed"
    assert third["keys"].startswith(first["keys"][: 16 * 6])
    assert third["num_output_tokens"] < 4000
    assert "Traceback" not in server.log


def test_keys_are_those_a_router_computes(run: Any, tmp_path: Path) -> None:
    async def log() -> None:
        async with KeyLog(tmp_path / "keys", block_size=16) as key_log:
            key_log.record(
                FinishedRequest(
                    num_prompt_tokens=16,
                    num_output_tokens=0,
                    num_cached_tokens=0,
                    block_keys=[BlockKey(bytes(range(16)))],
                )
            )

    run(log())
    assert lines_of(tmp_path / "keys")[0]["keys"] == "0001020304050607"
