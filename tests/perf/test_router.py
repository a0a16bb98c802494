"""The benchmark of the router's index, with a RadixTree of a few lines in the place of ai-dynamo's."""

import argparse
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dynamo.perf import router
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.router_workload import CASES, CHAIN_BLOCKS, RouterWorkload

QUIET = Console(file=StringIO())
SMALL = ("--workers", "4", "--blocks", "8192", "--prompts", "70", "--repeats", "1")

CORE = """
import json

class _Found:
    def __init__(self, scores):
        self.scores = scores

class RadixTree:
    def __init__(self):
        self.held = {{}}

    def apply_event(self, worker, event):
        (kind, data), = json.loads(event)["data"].items()
        held = self.held.setdefault(worker, set())
        if kind == "stored":
            held.update(block["tokens_hash"] for block in data["blocks"])
        else:
            held.difference_update(data["block_hashes"])

    def find_matches(self, hashes):
        depths = {{w: next((i for i, h in enumerate(hashes) if h not in held), len(hashes)) for w, held in self.held.items()}}
        return _Found({{(worker, 0): depth + {error} for worker, depth in depths.items() if depth}})

    def clear_all_blocks(self, worker):
        self.held.pop(worker, None)

def compute_block_hash_for_seq(tokens, block_size):
    return [hash(tuple(tokens[i : i + block_size])) & (2**64 - 1) for i in range(0, len(tokens), block_size)]
"""


def interpreter(folder: Path, error: int = 0) -> Path:
    """A Python that has our stand-in of ai-dynamo, and nothing of ours."""
    (folder / "site" / "dynamo").mkdir(parents=True)
    (folder / "site" / "dynamo" / "__init__.py").touch()
    (folder / "site" / "dynamo" / "_core.py").write_text(CORE.format(error=error))
    metadata = folder / "site" / "ai_dynamo_runtime-0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ai-dynamo-runtime\nVersion: 0.0\n")
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "site"} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    router.add_arguments(parser)
    return parser.parse_args(arguments)


def test_half_of_the_chains_are_shared_and_the_workload_is_the_same_every_time():
    workload = RouterWorkload.make(16, 64 * CHAIN_BLOCKS, [64])
    assert workload == RouterWorkload.make(16, 64 * CHAIN_BLOCKS, [64])
    assert workload.num_blocks == 64 * CHAIN_BLOCKS
    assert len(set(workload.events)) == len(workload.events) == 64
    by_chain = [len({worker for worker, one in workload.events if one == chain}) for _, chain in workload.events]
    assert (by_chain.count(1), by_chain.count(8)) == (32, 32)
    assert [prompt.case for prompt in workload.prompts] == list(CASES)
    depths = {prompt.case: sorted(prompt.depths.values()) for prompt in workload.prompts}
    assert depths["hit"] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert depths["partial"] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert depths["worst"] == [4 * (i + 1) for i in range(16)]
    assert depths["miss"] == []


@pytest.mark.timeout(120)
def test_everything_is_measured_and_the_peer_beside_it(tmp_path):
    report = router.run(options(*SMALL, "--dynamo-python", str(interpreter(tmp_path))), QUIET)
    values = {(result.case, result.subject, result.metric): result.value for result in report.results}
    for case in CASES:
        for subject in ("dynamo-kv", "ai-dynamo 0.0"):
            for metric in ("hash", "look-up", "tokens to answer", "time"):
                assert values[f"{case}, 70 blocks", subject, metric] >= 0
    assert ("hit, one with a hole, 70 blocks", "dynamo-kv", "look-up") in values
    for case in ("store", "store, from the wire", "remove"):
        assert values[case, "dynamo-kv", "events"] > 0
    assert values["clear a worker", "dynamo-kv", "forget"] > 0
    assert values["memory, 8,192 blocks", "ai-dynamo 0.0", "memory"] >= 0
    assert 20 < values["memory, 8,192 blocks", "dynamo-kv, as it counts itself", "memory"] < 200
    assert values["route 70 blocks, 64 workers", "dynamo-kv", "tokens to answer"] > 0


def test_a_peer_that_finds_other_scores_is_no_comparison(tmp_path):
    with pytest.raises(BenchmarkError, match="ai-dynamo found"):
        router.run(options(*SMALL, "--dynamo-python", str(interpreter(tmp_path, error=1))), QUIET)


def test_a_peer_that_does_not_start_is_said(tmp_path):
    with pytest.raises(BenchmarkError, match="does not start"):
        router.run(options(*SMALL, "--dynamo-python", str(tmp_path / "none")), QUIET)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(BenchmarkError, match="256 blocks for each"):
        router.run(options("--workers", "64", "--blocks", "1000"), QUIET)
