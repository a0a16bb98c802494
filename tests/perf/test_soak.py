"""The soak: what a router keeps depends on what its workers hold, not on how long it has run."""

import json
import random

import pytest

from dynamo.perf.__main__ import main
from dynamo.perf.soak import Soak
from dynamo.perf.trace_log import TracedRequest


def requests(count: int, seed: int = 0) -> list[TracedRequest]:
    """Chains that branch off earlier ones."""
    rng = random.Random(seed)
    chains: list[tuple[int, ...]] = [(0,)]
    fresh = iter(range(1, 1 << 30))
    made = []
    for number in range(count):
        parent = rng.choice(chains[-50:])
        keys = (*parent[: rng.randrange(1, len(parent) + 1)], *(next(fresh) for _ in range(rng.randrange(1, 8))))[:40]
        chains.append(keys)
        made.append(TracedRequest(float(number), 512 * len(keys), 100, keys, len(keys), 512))
    return made


def test_everything_is_bounded_by_what_workers_hold_and_gone_when_they_are():
    soak = Soak(requests(300), num_workers=6, worker_blocks=128, churn=50)
    points = list(soak.run(4000))
    for point in points:
        assert point.num_held <= 6 * 128
        assert point.num_entries <= 2 * 6 * 128  # with traces of workers that left a moment ago
        assert point.num_bookings <= 201
        assert point.num_sessions <= 4000 * 600 / 86_400 / 3 + 2
    assert soak.num_hits > 0
    soak.router.check_invariants()
    soak.finish()
    soak.router.check_invariants()
    stats = soak.router.stats()
    assert (stats.num_bookings, stats.index.num_blocks, stats.index.num_predicted, stats.workers) == (0, 0, 0, ())


@pytest.mark.slow
def test_memory_is_flat():
    soak = Soak(requests(2000), num_workers=8, worker_blocks=512, churn=200)
    points = list(soak.run(12_000))
    settled, last = points[len(points) // 4], points[-1]
    assert last.rss_bytes <= 1.05 * settled.rss_bytes
    assert last.index_bytes <= 1.5 * settled.index_bytes


def test_the_command_reports_over_time(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000 * r.time_s, "input_length": 512 * len(r.keys), "output_length": 5, "hash_ids": r.keys}
        for r in requests(50)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--requests", "240", "--workers", "3", "--churn", "20", "--out", str(tmp_path / "out")]
    assert main(["soak", str(path), *options]) == 0
    written = [json.loads(line) for line in next((tmp_path / "out").iterdir()).read_text().splitlines()]
    entries = [line["value"] for line in written if line.get("metric") == "entries"]
    assert len(entries) == 12
    assert min(entries) > 0


def test_options_below_one_are_refused(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "output_length": 5, "hash_ids": [1]}\n')
    assert main(["soak", str(path), "--churn", "0"]) != 0
    assert "--churn" in capsys.readouterr().err
