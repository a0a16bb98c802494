"""A slow disk must not make a cached prompt slower than one that is computed."""

import argparse
import io
import math
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from dynamo.perf.report import MEASURED
from dynamo.perf.throttle import ThrottledTimes, measure_throttled, throttled_reads
from dynamo.perf.ttft import add_arguments, run

MOST = 1.05


def is_above(ratios: list[float], limit: float) -> bool:
    """Whether the median of what `ratios` are drawn from lies above `limit`: a sign test at 1 %."""
    count = sum(ratio > limit for ratio in ratios)
    tail = sum(math.comb(len(ratios), k) for k in range(count, len(ratios) + 1))
    return tail / 2 ** len(ratios) < 0.01


def ratios(*all_times: ThrottledTimes) -> list[float]:
    return [
        cached / computed
        for times in all_times
        for cached, computed in zip(times.cached_s, times.computed_s, strict=True)
    ]


def test_the_sign_test_finds_what_is_above_and_passes_what_is_not() -> None:
    assert is_above([1.06] * 12, MOST)
    assert not is_above([1.06, 1.0] * 6, MOST)
    assert not is_above([1.2, 0.5, 1.04, 1.0, 1.1, 1.0, 1.0, 1.03], MOST)


def test_a_throttle_lets_so_many_bytes_pass_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(50_000))
    buffer = bytearray(50_000)
    with throttled_reads() as throttle, path.open("rb") as file:
        started = time.monotonic()
        assert os.preadv(file.fileno(), [memoryview(buffer)], 0) == 50_000
        assert time.monotonic() - started < 0.2
        throttle.bytes_per_s = 200_000
        assert os.preadv(file.fileno(), [memoryview(buffer)], 0) == 50_000
        assert time.monotonic() - started >= 0.25
    assert os.preadv.__module__ == "posix"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("engine", "megabytes_per_s"), [("model", 2), ("mocker", 1), ("mocker", 10)])
def test_on_a_disk_that_gets_slow_a_cached_prompt_takes_no_more_than_five_percent_longer(
    tmp_path: Path, engine: str, megabytes_per_s: float
) -> None:
    flags = {"engine.threads": "1", "engine.engine": engine}
    with throttled_reads() as throttle:
        sudden, known = measure_throttled(
            flags,
            tmp_path,
            throttle,
            bytes_per_s=1e6 * megabytes_per_s,
            prompt_tokens=3072,
            rounds=3,
            prompts_after=3,
        )
    assert not is_above(ratios(sudden, known), MOST)
    assert sum((sudden.decisions + known.decisions).values()) == 12


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_disk_at_full_speed_is_used(tmp_path: Path) -> None:
    with throttled_reads() as throttle:
        sudden, known = measure_throttled(
            {
                "engine.engine": "mocker",
                "mocker.prefill_rate": "6000",
            },  # a busy machine loads in less than half a second
            tmp_path,
            throttle,
            bytes_per_s=None,
            prompt_tokens=3072,
            rounds=1,
            prompts_after=4,
        )
    assert not is_above(ratios(sudden, known), 0.5)
    assert sorted(sudden.num_cached_tokens + known.num_cached_tokens)[3] == 3056


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_benchmark_reports_both_engines(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ("--throttle", "5", "--rounds", "1", "--prompt-tokens", "512", "--path", str(tmp_path))
    report = run(parser.parse_args(arguments), Console(file=io.StringIO()))
    cases = {result.case for result in report.results if result.source == MEASURED}
    assert cases == {
        f"{engine}, {speed}, {moment}"
        for engine in ("model", "mocker")
        for speed in ("full speed", "5 MB/s")
        for moment in ("sudden", "known")
    }
    assert {"computed TTFT", "cached TTFT", "of computing", "cached", "regret"} <= {r.metric for r in report.results}
