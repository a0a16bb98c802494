"""A trace over several workers: blocks and requests are accounted for, and prefix routing finds what others scatter."""

import json
import random

import numpy as np
import pytest

from dynamo.perf.__main__ import main
from dynamo.perf.simulated_fleet import FleetSpeeds, SimulatedFleet, fleet_trace
from dynamo.perf.trace_log import TracedRequest
from dynamo.router.config import RouterConfig


def conversations(num_chats: int = 24, num_turns: int = 6, *, gap_s: float = 20.0) -> list[TracedRequest]:
    """Chats that take turns; each turn repeats what was said before and adds two blocks."""
    requests, order = [], random.Random(0)
    for turn in range(num_turns):
        for place, chat in enumerate(order.sample(range(num_chats), num_chats)):
            keys = (0, *(1000 * (chat + 1) + n for n in range(2 * turn + 2)))
            time_s = gap_s * turn + gap_s / num_chats * place
            requests.append(TracedRequest(time_s, 512 * len(keys), 20, keys, len(keys), 512))
    return requests


def simulate(mode: str, *, num_workers: int = 4, blocks: int = 200, load: float = 0.5):
    requests = conversations()
    speeds = FleetSpeeds()
    num_tokens = 512 * sum(len(request.keys) for request in requests)
    duration_s = num_tokens / (num_workers * speeds.prefill_tokens_per_s * load)
    trace = fleet_trace(requests, duration_s=duration_s)
    fleet = SimulatedFleet(trace, num_workers, blocks, RouterConfig(mode=mode), speeds)
    return trace, fleet, fleet.run()


@pytest.mark.parametrize("mode", ["kv", "round-robin", "random", "least-loaded"])
@pytest.mark.parametrize("blocks", [20, 200])
def test_every_request_ends_and_every_token_is_found_or_computed(mode, blocks):
    trace, fleet, outcome = simulate(mode, blocks=blocks)
    assert len(outcome.found) == len(outcome.first_token_s) == len(trace.arrivals)
    # a prompt that is found whole still costs one token
    whole = trace.num_blocks * 512 - 512 * int(outcome.found.sum())
    assert whole <= sum(outcome.prefill_tokens) <= whole + len(trace.arrivals)
    assert (outcome.first_token_s > 0).all()
    stats = fleet.router.stats()
    assert stats.num_bookings == 0
    assert sum(worker.num_chosen for worker in stats.workers) == len(trace.arrivals)
    assert stats.index.num_entries <= 4 * blocks


def test_prefix_routing_finds_what_round_robin_scatters():
    _, _, kv = simulate("kv", blocks=100)
    _, _, turns = simulate("round-robin", blocks=100)
    assert kv.found.sum() > 1.2 * turns.found.sum()
    assert kv.first_token_s.mean() < turns.first_token_s.mean()
    assert max(kv.busy_s) < 1.3 * np.mean(kv.busy_s)
    assert kv.predicted_tokens == pytest.approx(512 * kv.found.sum(), rel=0.05)


def test_one_worker_is_the_same_in_every_mode():
    outcomes = [simulate(mode, num_workers=1)[2] for mode in ("kv", "round-robin")]
    assert (outcomes[0].found == outcomes[1].found).all()
    assert (outcomes[0].first_token_s == outcomes[1].first_token_s).all()


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": 1000 * r.time_s,
                    "input_length": 512 * len(r.keys),
                    "output_length": 5,
                    "hash_ids": r.keys,
                }
            )
            + "\n"
            for r in conversations(8, 3)
        )
    )
    return path


def test_the_command_compares_the_modes(trace_file, tmp_path, capsys):
    assert (
        main(["trace", str(trace_file), "--workers", "3", "--sizes", "25", "50", "--out", str(tmp_path / "out")]) == 0
    )
    lines = [json.loads(line) for line in next((tmp_path / "out").iterdir()).read_text().splitlines()]
    run, results = lines[0], lines[1:]
    assert run["parameters"]["workers"] == 3
    assert {line["subject"] for line in results} == {"kv", "round-robin", "random", "least-loaded"}
    assert len({line["case"] for line in results}) == 2
    hits = {(line["case"], line["subject"]): line["value"] for line in results if line["metric"] == "prefix hits"}
    assert all(0 < value <= 100 for value in hits.values())
    assert "prefix hits: leading blocks found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "0"], "--workers"),
        (["--workers", "2", "--load", "0"], "--load"),
        (["--workers", "2", "--plot", "x.png"], "--plot"),
    ],
)
def test_options_that_make_no_sense_are_refused(trace_file, arguments, says, capsys):
    assert main(["trace", str(trace_file), *arguments]) != 0
    captured = capsys.readouterr()
    assert says in captured.err + captured.out
