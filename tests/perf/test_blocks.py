"""The bookkeeping benchmark and its peer process."""

import argparse
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dynamo.perf.blocks import CASES, CacheTimer, VllmPeer, add_arguments, run
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.report import MEASURED

QUIET = Console(file=io.StringIO())
SAMPLE = {"hash": 1000, "match": 2000, "allocate": 3000, "free": 4000}


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def fake_interpreter(tmp_path: Path) -> Path:
    """Something to run in place of vLLM's interpreter: it speaks the protocol and notes what it was asked."""
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "print(json.dumps({'vllm': '9.9', 'hash': sys.argv[-1]}), flush=True)\n"
        "for line in sys.stdin:\n"
        f"    order = json.loads(line)\n"
        f"    print(json.dumps([{SAMPLE}] * order['repeats']), flush=True)\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("case", CASES)
def test_each_case_gives_a_sample_for_each_repeat(case: str) -> None:
    with CacheTimer(num_blocks=32, num_tokens=100) as timer:
        samples = timer.run(case, 3)
    assert len(samples) == 3
    for sample in samples:
        assert sample.keys() == {"hash", "open", "commit", "close", "total"}
        assert min(sample.values()) > 0
        assert sample["total"] == pytest.approx(sample["open"] + sample["commit"] + sample["close"])


def test_cases_may_come_in_any_order() -> None:
    with CacheTimer(num_blocks=20, num_tokens=160) as timer:
        for case in ("cached", "evicting", "cold", "cached"):
            assert len(timer.run(case, 1)) == 1


def test_without_a_peer_the_reference_is_shown_with_its_source() -> None:
    report = run(options("--tokens", "8192", "--blocks", "1024", "--repeats", "1"), QUIET)
    references = [result for result in report.results if result.source != MEASURED]
    assert {result.case for result in references} == {"cold", "cached"}
    assert all("not measured in this run" in result.source for result in references)
    assert {(r.case, r.value) for r in references if r.metric == "total"} == {("cold", 1669), ("cached", 1554)}


def test_the_reference_is_not_shown_for_another_size() -> None:
    report = run(options("--tokens", "64", "--blocks", "8", "--repeats", "1"), QUIET)
    assert {result.source for result in report.results} == {MEASURED}


def test_the_peer_is_measured_in_the_same_run(fake_interpreter: Path) -> None:
    small = ("--tokens", "64", "--blocks", "8", "--repeats", "3", "--vllm-hash", "xxhash")
    report = run(options(*small, "--vllm-python", str(fake_interpreter)), QUIET)
    theirs = [r for r in report.results if r.subject == "vLLM 9.9 (--hash=xxhash)"]
    assert {r.case for r in theirs} == set(CASES)
    assert {(r.metric, r.value) for r in theirs if r.unit == "µs"} == {
        ("hash", 1.0),
        ("open", 5.0),
        ("close", 4.0),
        ("total", 10.0),
    }
    assert "python" not in report.parameters, "paths do not belong into results"


def test_an_interpreter_without_vllm_is_named_as_the_reason() -> None:
    with pytest.raises(BenchmarkError, match="No module named 'vllm'"):
        VllmPeer(Path(sys.executable), num_blocks=8, num_tokens=64, hash_name="sha256")


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no-such-python does not start"):
        VllmPeer(tmp_path / "no-such-python", num_blocks=8, num_tokens=64, hash_name="sha256")


def test_closing_the_peer_ends_its_process(fake_interpreter: Path) -> None:
    fake_interpreter.write_text(fake_interpreter.read_text().replace("'9.9'", "__import__('os').getpid()"))
    peer = VllmPeer(fake_interpreter, num_blocks=8, num_tokens=64, hash_name="sha256")
    pid = int(peer.name.split()[1])
    assert Path(f"/proc/{pid}").exists()
    peer.close()
    peer.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("arguments", [("--blocks", "100"), ("--repeats", "0"), ("--tokens", "1")])
def test_sizes_that_do_not_fit_are_refused(arguments: tuple[str, str]) -> None:
    with pytest.raises(BenchmarkError, match="--tokens"):
        run(options(*arguments), QUIET)
