"""Trace replay: what is simulated is what is said, on traces small enough to check by brute force."""

import gzip
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.admission import AdmitAlways, SecondSighting
from dynamo.kvcache.eviction import LeafFirstLRU
from dynamo.kvcache.hit_density import HitDensity
from dynamo.kvcache.s3_fifo import S3Fifo
from dynamo.perf.__main__ import main
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.trace_belady import Belady
from dynamo.perf.trace_chains import prepare
from dynamo.perf.trace_log import TracedRequest, read_trace
from dynamo.perf.trace_replay import hits_by_tier, replay

ORDERS = {"lru": lambda _: LeafFirstLRU(), "s3": lambda _: S3Fifo(), "hit density": HitDensity}


def always(_tracker, _order):
    return AdmitAlways()


def conversations(seed: int, count: int, *, system: int = 2, gap_s: float = 60.0) -> list[TracedRequest]:
    """Chats that share a system prompt and go on for some turns, now and then from an earlier point."""
    rng = random.Random(seed)
    fresh = itertools.count(1000)
    requests = []
    for _ in range(count):
        now_s = rng.uniform(0, 20 * gap_s)
        keys = [*range(system), *(next(fresh) for _ in range(rng.randrange(1, 6)))]
        while True:
            tokens = 512 * len(keys) - rng.randrange(512)
            requests.append(TracedRequest(now_s, tokens, rng.randrange(600), tuple(keys), tokens // 512, 512))
            if rng.random() < 0.5:
                break
            now_s += rng.expovariate(1 / gap_s)
            keep = len(keys) - 1 if rng.random() < 0.8 else rng.randrange(1, len(keys) + 1)
            keys = [*keys[: max(keep, 1)], *(next(fresh) for _ in range(rng.randrange(1, 4)))]
    return sorted(requests, key=lambda request: request.time_s)


def brute_force_lru(requests: list[TracedRequest], capacity: int) -> int:
    """Block by block: the block used longest ago goes, of one chain the last first; blocks of the request itself never."""
    used: dict[int, tuple[int, int]] = {}  # key -> (request, minus depth): smallest goes first
    hits = 0
    for number, request in enumerate(requests):
        held = list(itertools.takewhile(used.__contains__, request.keys))
        hits += len(held)
        for key in held:
            del used[key]
        lacking = min(len(request.keys), capacity) - len(held)
        while len(used) + len(held) + lacking > capacity:
            del used[min(used, key=used.__getitem__)]
        used.update({key: (number, -i) for i, key in enumerate(request.keys[: len(held) + lacking])})
    return hits


def brute_force_best(requests: list[TracedRequest], capacity: int) -> int:
    """Every choice of what to keep after every request."""
    states = {frozenset[int](): 0}
    parent = {key: r.keys[i - 1] if i else None for r in requests for i, key in enumerate(r.keys)}
    for request in requests:
        following: dict[frozenset[int], int] = {}
        for state, hits in states.items():
            hits += sum(1 for _ in itertools.takewhile(state.__contains__, request.keys))
            known = sorted(state | set(request.keys))
            for size in range(min(capacity, len(known)) + 1):
                for kept in map(frozenset, itertools.combinations(known, size)):
                    if all(parent[key] is None or parent[key] in kept for key in kept):
                        following[kept] = max(following.get(kept, 0), hits)
        states = following
    return max(states.values())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 60), st.booleans())
def test_lru_is_leaf_first_lru(seed, capacity, is_tracked):
    requests = conversations(seed, 15)
    done = replay(prepare(requests), capacity, ORDERS["lru"], always, is_tracked=is_tracked)
    assert done.num_hits == brute_force_lru(requests, capacity)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_belady_is_the_best_possible(seed, capacity):
    rng = random.Random(seed)
    parents = [None, 0, 0, 1, 1, None, 5]
    requests = []
    for number in range(6):
        keys = [rng.randrange(len(parents))]
        while (parent := parents[keys[0]]) is not None:
            keys.insert(0, parent)
        requests.append(TracedRequest(float(number), 512 * len(keys), 1, tuple(keys), len(keys), 512))
    assert Belady(prepare(requests)).hits(capacity) == brute_force_best(requests, capacity)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 120))
def test_no_policy_beats_belady(seed, capacity):
    chains = prepare(conversations(seed, 30))
    best = Belady(chains).hits(capacity)
    assert best <= chains.num_references - chains.num_unique
    for make_order in ORDERS.values():
        assert replay(chains, capacity, make_order, always).num_hits <= best


def test_with_room_for_everything_all_policies_are_perfect():
    chains = prepare(conversations(1, 40))
    possible = chains.num_references - chains.num_unique
    assert Belady(chains).hits(chains.num_unique) == possible
    for make_order in ORDERS.values():
        done = replay(chains, chains.num_unique, make_order, always)
        assert (done.num_hits, done.num_written) == (possible, chains.num_unique)


def test_a_block_counts_for_the_fastest_tier_that_holds_it():
    chains = prepare(conversations(2, 60))
    small, large = (replay(chains, chains.num_unique // n, ORDERS["lru"], always) for n in (20, 4))
    assert hits_by_tier([small, large]) == [small.num_hits, large.num_hits - small.num_hits]
    assert hits_by_tier([large, small]) == [large.num_hits, 0]


def test_what_admission_refuses_is_not_written():
    chains = prepare(conversations(3, 60))
    done = replay(chains, chains.num_unique, ORDERS["lru"], lambda _tracker, _order: SecondSighting())
    assert chains.num_unique > done.num_written > 0
    assert done.num_hits < replay(chains, chains.num_unique, ORDERS["lru"], always).num_hits


def test_hit_density_learns_that_only_long_prompts_come_back():
    """Ten one-time chains for each that returns after a minute: recency keeps the wrong ones."""
    rng = random.Random(4)
    fresh = itertools.count()
    requests = []
    for n in range(1500):
        length = 8 if n % 4 == 0 else 2
        keys = tuple(next(fresh) for _ in range(length))
        at_s = 2.0 * n
        times = [at_s, at_s + rng.uniform(50, 80)] if length == 8 else [at_s]
        requests += [TracedRequest(t, 512 * length, 100, keys, length, 512) for t in times]
    chains = prepare(sorted(requests, key=lambda request: request.time_s))
    rates = {name: replay(chains, 90, make, always).num_hits for name, make in ORDERS.items()}
    assert rates["hit density"] > 2 * rates["lru"]


# --- files


def mooncake_line(request: TracedRequest) -> str:
    line = {
        "timestamp": round(request.time_s * 1000),
        "input_length": request.num_prompt_tokens,
        "output_length": request.num_output_tokens,
        "hash_ids": request.keys,
    }
    return json.dumps(line)


def key_log_line(request: TracedRequest) -> str:
    line = {
        "time_s": request.time_s,
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_output_tokens": request.num_output_tokens,
        "block_size": request.block_tokens,
        "keys": b"".join(key.to_bytes(8, "little") for key in request.keys).hex(),
    }
    return json.dumps(line)


def test_both_formats_are_read_plain_and_gzipped(tmp_path):
    requests = [TracedRequest(float(n), 512 * 3 - 10, 5, (0, 1, 2**40 + n), 2, 512) for n in range(5)]
    for name, line in (("mooncake", mooncake_line), ("log", key_log_line)):
        text = "\n".join(map(line, requests)) + "\n\n"
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert read_trace(tmp_path / name) == requests
        assert read_trace(tmp_path / f"{name}.gz") == requests


GOOD = mooncake_line(TracedRequest(0.0, 600, 5, (0, 1), 1, 512))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n{{", r"trace:2: .*expected a line of Mooncake's format"),
        (f'{GOOD}\n{{"timestamp": 0}}', r"trace:2: .*input_length"),
        ('{"time_s": 0, "num_prompt_tokens": 1, "num_output_tokens": 1, "block_size": 16, "keys": "zz"}', "trace:1: "),
        ('{"time_s": 0, "num_prompt_tokens": 1, "num_output_tokens": 1, "block_size": 0, "keys": ""}', "block_size"),
        (GOOD.replace("[0, 1]", "[0, -1]"), "trace:1: .*hash_ids"),
        (GOOD.replace("600", "-600"), "trace:1: .*input_length"),
        ("\n", "holds no request"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    (tmp_path / "trace").write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        read_trace(tmp_path / "trace")


def test_lines_that_a_killed_server_left_incomplete_are_left_out(tmp_path, caplog):
    lines = [key_log_line(TracedRequest(float(n), 600, 5, (0, n), 1, 512)) for n in range(1, 4)]
    (tmp_path / "log").write_text(f"{lines[0]}\n{lines[1][:40]}\n{lines[2]}\n{lines[1][:90]}")
    assert [request.time_s for request in read_trace(tmp_path / "log")] == [1.0, 3.0]
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == ["log:2", "log:4"]


def test_blocks_of_two_sizes_are_refused(tmp_path):
    lines = [key_log_line(TracedRequest(0.0, 600, 5, (0, 1), 1, size)) for size in (512, 16)]
    (tmp_path / "log").write_text("\n".join(lines))
    with pytest.raises(BenchmarkError, match="log:2: blocks of 16 tokens, and of 512 before"):
        read_trace(tmp_path / "log")


def test_a_cut_gzip_file_is_named(tmp_path):
    text = "\n".join(mooncake_line(request) for request in conversations(5, 20))
    (tmp_path / "trace.gz").write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(BenchmarkError, match="no complete gzip file"):
        read_trace(tmp_path / "trace.gz")


def test_the_command_prints_its_tables_and_writes_them(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(mooncake_line(request) for request in conversations(6, 80)))
    assert main(["trace", str(trace), "--sizes", "5", "50", "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    for expected in ("leaf-first LRU", "hit density (default)", "Belady", "second sighting", "host 5 %, disk"):
        assert expected in output
    (written,) = (tmp_path / "out").iterdir()
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert {line["metric"] for line in lines[1:]} >= {
        "prefix hits",
        "from host",
        "from disk",
        "written",
        "TTFT saved",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("--sizes", "0"),
        ("--sizes", "101"),
        ("--prefill-tokens-per-s", "0"),
        ("--disk-gb-per-s", "nan"),
        ("--plot", "no/x.png"),
    ],
)
def test_options_without_meaning_are_refused(tmp_path, arguments, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(GOOD)
    assert main(["trace", str(trace), *arguments]) == 1
    assert arguments[0] in capsys.readouterr().err


def test_a_picture_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(mooncake_line(request) for request in conversations(7, 40)))
    assert main(["trace", str(trace), "--sizes", "10", "40", "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
