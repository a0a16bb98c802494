import argparse
from io import StringIO

import pytest
from rich.console import Console

from dynamo.perf import index
from dynamo.perf.harness import BenchmarkError


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    index.add_arguments(parser)
    return parser.parse_args(arguments)


def test_every_case_is_measured(tmp_path):
    wanted = options("--blocks", "5000", "--chain", "20", "--repeats", "2", "--path", str(tmp_path))
    report = index.run(wanted, Console(file=StringIO()))
    assert {result.case for result in report.results} == set(index.CASES)
    metrics = {result.metric for result in report.results}
    assert metrics == {"journal", "pool", "start-up", "CPU time", "memory", "look-up of 20", "its hashing"}
    assert not list(tmp_path.iterdir())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(BenchmarkError, match="at least one chain"):
        index.run(options("--blocks", "10", "--chain", "20"), Console(file=StringIO()))
