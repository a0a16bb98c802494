"""The serving benchmark, on the real server."""

import argparse
import io

import pytest
from rich.console import Console

from dynamo.perf.harness import BenchmarkError
from dynamo.perf.report import MEASURED
from dynamo.perf.serve import add_arguments, run
from dynamo.perf.server_process import ServerProcess

QUIET = Console(file=io.StringIO())


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.slow
def test_a_case_gives_rates_and_latencies_and_ends_its_server() -> None:
    arguments = ("--streams", "2", "--pace", "unpaced", "--tokens", "40", "--total-tokens", "20000")
    report = run(options(*arguments), QUIET)
    values = {result.metric: result.value for result in report.results if result.source == MEASURED}
    assert values.keys() == {
        "tokens", "CPU", "throughput", "requests", "events", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"
    }  # fmt: skip
    assert values["tokens"] == pytest.approx(1e6 / values["CPU"])
    assert 0 < values["events"] <= 1
    assert 0 < values["TTFT p50"] <= values["TTFT p99"]


@pytest.mark.slow
def test_a_running_server_can_be_measured_by_url() -> None:
    with ServerProcess("--engine", "mocker", "--speedup", "0", "--host-cache", "0", "--disk-cache", "off") as server:
        arguments = ("--url", f"{server.url}/v1/", "--streams", "1", "--tokens", "20", "--total-tokens", "40")
        report = run(options(*arguments), QUIET)
    assert {result.case for result in report.results} == {"as served, 1 stream"}
    assert "CPU" not in {result.metric for result in report.results}, "its processor time is not known"


def test_a_server_that_does_not_start_tells_why() -> None:
    with pytest.raises(BenchmarkError, match="--engine"):
        ServerProcess("--engine", "nonsense")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--streams", "0"), "must be 1 or more"),
        (("--url", "https://example.org"), "http://HOST:PORT"),
        (("--url", "http://127.0.0.1:1"), "does not answer"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        run(options(*arguments), QUIET)
