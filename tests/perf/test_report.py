"""Tables for people and JSON lines for programs."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dynamo.perf.machine import MachineRecord
from dynamo.perf.report import Report, Result, print_report, write_report

MACHINE = MachineRecord(
    cpu="Abacus 3000",
    cpus=2,
    memory_bytes=1 << 30,
    kernel="6.1",
    python="3.11.7",
    versions={"torch": "2.13.0"},
    gpus=(),
    load=0.5,
    commit="0123456789ab",
    started="2026-01-02T03:04:05+00:00",
)


@pytest.fixture
def report() -> Report:
    results = (
        Result(case="cold", subject="dynamo-kv", metric="open", value=239.4, unit="µs", samples=50),
        Result(case="cold", subject="dynamo-kv", metric="total", value=1327.0, unit="µs", samples=50),
        Result(case="cold", subject="peer [x]", metric="total", value=1669.0, unit="µs", source="a paper"),
        Result(case="cached", subject="dynamo-kv", metric="total", value=0.05, unit="µs", samples=50),
    )
    return Report(
        benchmark="blocks",
        title="A title",
        machine=MACHINE,
        parameters={"tokens": 8},
        results=results,
        notes=("read [this]",),
    )


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=140)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_holds_all_metrics_of_a_case_and_subject(report: Report) -> None:
    rows = [line for line in printed(report).splitlines() if "dynamo-kv" in line]
    assert len(rows) == 2
    assert "cold" in rows[0] and "239" in rows[0] and "1,327" in rows[0]
    assert "cached" in rows[1] and "0.05" in rows[1]


def test_numbers_measured_elsewhere_are_marked_with_their_source(report: Report) -> None:
    text = printed(report)
    assert "peer [x] [1]" in text
    assert "[1] a paper" in text


def test_notes_and_machine_follow_the_table(report: Report) -> None:
    text = printed(report)
    assert "- read [this]" in text
    assert "Abacus 3000, 2 CPUs" in text
    assert "commit 0123456789ab" in text


def test_json_lines_hold_one_run_and_its_results(report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "new" / "results")
    assert path.name == "blocks-20260102T030405Z.jsonl"
    run, *results = (json.loads(line) for line in path.read_text().splitlines())
    assert run["record"] == "run"
    assert run["cpu"] == "Abacus 3000"
    assert run["commit"] == "0123456789ab"
    assert run["parameters"] == {"tokens": 8}
    assert [line["record"] for line in results] == ["result"] * 4
    assert {line["started"] for line in results} == {MACHINE.started}
    assert results[2] == {
        "record": "result",
        "benchmark": "blocks",
        "started": MACHINE.started,
        "case": "cold",
        "subject": "peer [x]",
        "metric": "total",
        "value": 1669.0,
        "unit": "µs",
        "samples": None,
        "source": "a paper",
    }
