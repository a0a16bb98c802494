"""The tuning run, on small sizes."""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dynamo.kvcache.config import parse_disk_place
from dynamo.perf import disk
from dynamo.perf.disk_raw import RawDisk, Way
from dynamo.perf.disk_sweep import Measured, best, candidate_depths, recommended_threads, sweep_results
from dynamo.perf.disk_tier import LMCachePeer, TierSide, Windows
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.report import Report, Result
from dynamo.serve.config import load_config
from dynamo.tiers.disk import DiskTier

QUIET = Console(file=io.StringIO())
TIMEOUT_S = 60
KIB, MIB = 1 << 10, 1 << 20

# An interpreter with an LMCache that stores nothing: it speaks the protocol only.
FAKE_PEER = """#!/bin/sh
exec {python} -c '
import json, sys
print(json.dumps({{"lmcache": "9.9"}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"seconds": 0.5}}), flush=True)
'
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder whose file system has direct I/O."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("the temporary folder has no O_DIRECT")
    (tmp_path / "probe").unlink()
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def fake_lmcache(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(FAKE_PEER.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of two sizes and two depths, of a few milliseconds each."""
    monkeypatch.setattr(disk, "_QUICK", disk.Sweep((64 * KIB, 2 * MIB), (1, 2), 0.01))


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    disk.add_arguments(parser)
    return parser.parse_args(arguments)


def rates(report: Report, case: str) -> dict[tuple[str, str], float]:
    return {
        (r.subject.partition(" (")[0].partition(",")[0], r.metric): r.value for r in report.results if r.case == case
    }


def test_tier_and_peer_stand_beside_the_raw_disk(small: None, place: Path, fake_lmcache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--path", str(place), "--size", "32MiB", "--quick", "--lmcache-python", str(fake_lmcache))
    report = disk.run(options(*arguments, "--out", str(out)), QUIET)
    for case in ("2 MiB blocks", "64 KiB blocks"):
        found = rates(report, case)
        assert {subject for subject, _ in found} == {"raw O_DIRECT", "disk tier", "LMCache 9.9"}
        assert {metric for _, metric in found} == {"read", "write", "read share", "write share"}
        assert all(value > 0 for value in found.values())
        assert found["raw O_DIRECT", "read share"] == 100
    changes = [r.subject.partition(": ")[2] for r in report.results if r.case == "raw, one change"]
    assert list(dict.fromkeys(changes)) == [
        "once more",
        "buffered (page cache)",
        "asynchronous, depth 256",
        "memory in 4 KiB pages",
        "3 files in each folder",
    ]
    assert any(note.startswith("GPUDirect Storage was not measured: ") for note in report.notes)
    assert list(place.iterdir()) == [], "everything written is removed"
    assert str(place) not in json.dumps([report.parameters, list(report.notes)]), "paths do not belong into results"
    pictures = [path.name for path in out.glob("*.png")] if out.exists() else []
    assert any(note.startswith(("plot: ", "no plot: ")) for note in report.notes)
    assert pictures or "no plot" in report.notes[-1]


def test_the_recommendation_is_what_the_server_reads(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(disk.recommendation([tmp_path], 12))
    cache = load_config(file, {}, {}).config.cache
    assert cache.io_threads == 12
    assert cache.disk_cache is not None
    assert cache.disk_cache.directories == (tmp_path / "kv",)
    assert cache.disk_cache.capacity_bytes >= 1 << 30
    second = disk.recommendation([tmp_path, tmp_path / "."], 4).splitlines()[2]
    assert second.startswith("# or: disk_cache")
    assert parse_disk_place(second.split('"')[1]).directories == (tmp_path / "kv",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "1000000GiB"), "measure less, or give another --path"),
        (("--size", "1MiB"), "give at least 32 MiB"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_written(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        disk.run(options("--path", str(tmp_path), *arguments), QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="is no folder"):
        disk.run(options("--path", str(tmp_path / "none")), QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up(place: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-P", "-m", "dynamo.perf", "disk", "--path", str(place), "--size", "64MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not list(place.glob("*/raw-*.dat")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        out, errors = process.communicate(timeout=TIMEOUT_S)
    # -2 is 130 to a shell. Python dies of SIGINT in the end where the interrupt came while it ran code given as a string, as
    # a dataclass does when it is made, although it was handled.
    assert process.returncode in (128 + how, -signal.SIGINT)
    assert out == b""
    assert b"interrupted" in errors
    assert b"Traceback" not in errors
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "way",
    [
        Way(call_bytes=64 * KIB, depth=3),
        Way(call_bytes=1 * MIB, depth=1, is_direct=False),
        Way(call_bytes=64 * KIB, depth=2, has_huge_pages=False),
        Way(call_bytes=64 * KIB, depth=2, num_files=3),
        Way(call_bytes=64 * KIB, depth=8, is_queued=True, is_ascending=True),
    ],
)
def test_a_run_visits_every_place_once(place: Path, way: Way) -> None:
    folders = [place / "a", place / "b"]
    for folder in folders:
        folder.mkdir()
    with RawDisk(folders, 8 * MIB, 2 * MIB) as raw:
        done: list[int] = []
        raw.fill(done.append)
        assert sum(done) == raw.total_bytes
        first = (folders[0] / "raw-0.dat").read_bytes()
        pages = {first[at : at + 4096] for at in range(0, 2 * MIB, 4096)}
        assert len(pages) == 512, "no page is like another"
        expected = 8 * MIB if way.num_files == 1 else 6 * MIB
        assert raw.run(way, writes=True).num_bytes == expected
        assert raw.run(way, writes=False).num_bytes == expected
        assert raw.run(way, writes=False, limit_bytes=2 * way.call_bytes).num_bytes == 2 * way.call_bytes
        names = {path.name for path in folders[1].iterdir()}
        assert names == {f"raw-{number}.dat" for number in range(4)}
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_disk_that_gives_less_is_an_error(place: Path) -> None:
    with RawDisk([place], 4 * MIB, 2 * MIB) as raw:
        raw.fill(lambda _: None)
        os.truncate(place / "raw-0.dat", 2 * MIB)
        with pytest.raises(BenchmarkError, match="moved less than 1048576 bytes"):
            raw.run(Way(call_bytes=MIB, depth=2), writes=False)
        with pytest.raises(BenchmarkError, match="moved less than 1048576 bytes"):
            raw.run(Way(call_bytes=MIB, depth=2, is_queued=True), writes=False)
        with pytest.raises(BenchmarkError, match="hold no call"):
            raw.run(Way(call_bytes=16 * MIB, depth=1), writes=False)


def test_wrong_bytes_of_the_tier_are_no_result(place: Path) -> None:
    windows = Windows(block_bytes=64 * KIB, num_blocks=8, num_windows=2)
    with TierSide([place], windows, 2) as side:
        assert side.store(1) > 0
        assert side.load(0) > 0
        (blocks,) = place.glob("*/blocks.dat")
        data = bytearray(blocks.read_bytes())
        data[::4096] = bytes(byte ^ 1 for byte in data[::4096])
        with blocks.open("r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with pytest.raises(RuntimeError, match="other bytes"):
            side.load(0)


def test_a_tier_tells_the_path_that_a_cache_would_take(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, cpu = Windows(block_bytes=64 * KIB, num_blocks=1, num_windows=1), torch.device("cpu")
    with TierSide([place], windows, 1) as side:
        assert side.find_device_path(cpu, keeps_in_host=False) == "two hops through host memory: no CUDA device"
        monkeypatch.setattr(DiskTier, "has_device_io", True)
        assert side.find_device_path(cpu, keeps_in_host=False).startswith("one hop: GPUDirect Storage")
        assert "kept in the host tier" in side.find_device_path(cpu, keeps_in_host=True)


def test_an_interpreter_without_lmcache_is_named_as_the_reason(tmp_path: Path) -> None:
    windows = Windows(block_bytes=4096, num_blocks=1, num_windows=1)
    with pytest.raises(BenchmarkError, match="No module named 'lmcache'"):
        LMCachePeer(Path(sys.executable), tmp_path / "x", windows, 1)


@pytest.mark.slow
@pytest.mark.skipif("DYNAMO_LMCACHE_PYTHON" not in os.environ, reason="DYNAMO_LMCACHE_PYTHON names no interpreter")
def test_the_real_lmcache_stores_and_loads(place: Path) -> None:
    windows = Windows(block_bytes=64 * KIB, num_blocks=16, num_windows=2)
    with LMCachePeer(Path(os.environ["DYNAMO_LMCACHE_PYTHON"]), place / "x", windows, 2) as peer:
        assert peer.store(0) > 0
        assert peer.load(1) > 0
        assert len(list((place / "x").rglob("*.data"))) == 32
    shutil.rmtree(place / "x")


def measured(size: int, depth: int, read: float, write: float, change: str = "") -> Measured:
    return Measured(Way(call_bytes=size, depth=depth), read, write, change)


SWEPT = [
    measured(64 * KIB, 1, 1.0, 1.0),
    measured(64 * KIB, 4, 1.9, 3.0),
    measured(64 * KIB, 8, 2.0, 2.9),
    measured(2 * MIB, 1, 2.0, 5.0),
    measured(2 * MIB, 4, 4.0, 4.9),
    measured(2 * MIB, 8, 3.9, 4.8),
    measured(2 * MIB, 1, 9.0, 9.0, "once more"),
]


def test_the_best_way_is_of_the_sweep_itself() -> None:
    assert best(SWEPT, writes=False).way.depth == 4
    assert best(SWEPT, writes=True).way.depth == 1
    assert best(SWEPT, writes=False, call_bytes=64 * KIB).way.depth == 8
    assert candidate_depths(SWEPT, 64 * KIB, writes=True) == [4, 8]
    shares = {r.subject: r.value for r in sweep_results(SWEPT) if r.metric == "read share"}
    assert shares["depth 4"] == 100
    assert shares["2 MiB calls, depth 1: once more"] == 225


def test_few_threads_are_recommended_when_more_gain_nothing() -> None:
    sizes = (64 * KIB, 2 * MIB)
    assert recommended_threads(SWEPT, sizes) == 4, "close to the best everywhere"
    assert recommended_threads([*SWEPT[:2], measured(64 * KIB, 8, 4.0, 3.0), *SWEPT[3:]], sizes) == 8
    assert recommended_threads([measured(2 * MIB, 1, 2, 1), measured(2 * MIB, 2, 1, 2)], sizes) == 1, (
        "none is: the least bad"
    )


def test_results_are_samples_of_this_run(small: None, place: Path) -> None:
    report = disk.run(options("--path", str(place), "--size", "32MiB", "--quick"), QUIET)
    medians: list[Result] = [r for r in report.results if r.case.endswith(" blocks")]
    assert {r.samples for r in medians} == {3}
    assert "LMCache" not in str(report.results)
    assert list(report.epilogue)[-1].startswith("[cache]\ndisk_cache = ")
