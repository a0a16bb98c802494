"""Decisions on measured speeds: against brute force, and what a watch allows a load to cost."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.load_decision import LoadQuestion, TierRun
from dynamo.kvcache.planner import LoadPlanner, growing_parts
from dynamo.tiers.transfer import Transfer

SIZE = 16
COSTS = (0.002, 1e-4, 2e-8)  # a step, a token, a pair of tokens; seconds


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def computing_s(start: int, end: int) -> float:
    """What tokens [start, end) of a prompt take in steps of 512."""
    step_s, token_s, pair_s = COSTS
    tokens = end - start
    return step_s * math.ceil(tokens / 512) + token_s * tokens + pair_s * tokens * (start + end) / 2


def teach_compute(planner: LoadPlanner, factor: float = 1.0) -> None:
    step_s, token_s, pair_s = COSTS
    for tokens in (64, 256, 512):
        for context in (0, 512, 2048, 8192):
            for _ in range(2):
                seconds = step_s + token_s * tokens + pair_s * tokens * (context + tokens / 2)
                planner.observe_compute(tokens, context, factor * seconds)


def teach_lane(planner: LoadPlanner, clock: Clock, tier: str, block_s: float) -> None:
    planner.begin_part(tier)
    for _ in range(16):
        planner.expect(tier, 1_000, 8)
        planner.begin_part(tier)
        clock.now_s += 8 * block_s
        planner.end_part(tier, 1_000, 8, 8)
    planner.end_part(tier, 1_000, 0, 0)


def make_planner(**block_s: float) -> tuple[LoadPlanner, Clock]:
    clock = Clock()
    planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20, clock=clock)
    teach_compute(planner)
    for tier, seconds in block_s.items():
        teach_lane(planner, clock, tier, seconds)
    return planner, clock


RUNS = st.lists(st.tuples(st.sampled_from(["host", "disk"]), st.integers(1, 60)), min_size=1, max_size=6).map(
    lambda runs: tuple(TierRun(*run) for run in runs)
)


@settings(deadline=None, max_examples=60)
@given(
    runs=RUNS,
    first=st.integers(0, 50),
    tail=st.integers(1, 700),
    host_s=st.floats(1e-5, 1e-2),
    disk_s=st.floats(1e-5, 1e-2),
)
def test_the_split_is_the_best_there_is(runs, first, tail, host_s, disk_s):
    planner, _ = make_planner(host=host_s, disk=disk_s)
    tiers = [run.tier for run in runs for _ in range(run.num_blocks)]
    num_tokens = (first + len(tiers)) * SIZE + tail
    decision = planner.plan(LoadQuestion(runs, first, num_tokens))

    def total_s(count: int) -> float:
        load_s = max(host_s * tiers[:count].count("host"), disk_s * tiers[:count].count("disk"))
        return load_s + computing_s((first + count) * SIZE, num_tokens)

    best_s = min(map(total_s, range(len(tiers) + 1)))
    assert total_s(decision.num_blocks_to_load) <= 1.03 * best_s  # costs are learned, and nearly exact
    assert total_s(decision.num_blocks_to_load) <= 1.03 * total_s(0)


@settings(deadline=None, max_examples=40)
@given(runs=RUNS, first=st.integers(0, 50), tail=st.integers(1, 700), disk_s=st.floats(1e-5, 1e-2))
def test_no_load_is_planned_that_is_expected_to_take_longer_than_computing_the_same(runs, first, tail, disk_s):
    planner, _ = make_planner(host=1e-5, disk=disk_s)
    num_blocks = sum(run.num_blocks for run in runs)
    decision = planner.plan(LoadQuestion(runs, first, (first + num_blocks) * SIZE + tail))
    assert decision.expected_load_s <= decision.expected_compute_s + 1e-9
    assert 0 <= decision.num_blocks_to_load <= num_blocks


@settings(deadline=None, max_examples=30)
@given(num_blocks=st.integers(1, 300), speeds=st.lists(st.floats(1e-5, 1e-1), min_size=2, max_size=6))
def test_a_faster_disk_never_loads_less(num_blocks, speeds):
    counts = []
    for disk_s in sorted(speeds, reverse=True):
        planner, _ = make_planner(disk=disk_s)
        question = LoadQuestion((TierRun("disk", num_blocks),), 0, num_blocks * SIZE + 1)
        counts.append(planner.plan(question).num_blocks_to_load)
    assert counts == sorted(counts)


def test_a_slow_disk_behind_a_fast_host_splits_the_prefix():
    planner, _ = make_planner(disk=0.1, host=1e-5)
    decision = planner.plan(LoadQuestion((TierRun("host", 64), TierRun("disk", 64)), 0, 4096))
    assert decision.num_blocks_to_load == 64
    assert "64 of 128 blocks" in decision.reason


def test_blocks_at_the_end_of_a_long_prompt_are_dearer_to_compute():
    """At a speed between the two, blocks behind a long context are loaded and those at the start are not."""
    planner, _ = make_planner(disk=0.004)
    early = planner.plan(LoadQuestion((TierRun("disk", 64),), 0, 64 * SIZE + 1))
    late = planner.plan(LoadQuestion((TierRun("disk", 64),), 960, 1024 * SIZE + 1))
    assert (early.num_blocks_to_load, late.num_blocks_to_load) == (0, 64)


def test_loads_that_are_under_way_make_a_lane_slower():
    planner, _ = make_planner(disk=0.001)
    question = LoadQuestion((TierRun("disk", 64),), 0, 64 * SIZE + 1)
    assert planner.plan(question).num_blocks_to_load == 64
    for load in range(3):
        planner.expect("disk", load, 64)
    assert planner.plan(question).num_blocks_to_load == 0


def test_a_short_load_does_not_wait_for_the_whole_of_a_long_one():
    planner, _ = make_planner(disk=0.0005)
    planner.expect("disk", 1, 100_000)
    assert planner.plan(LoadQuestion((TierRun("disk", 64),), 0, 64 * SIZE + 1)).num_blocks_to_load == 64


def test_before_computing_was_measured_all_is_loaded_for_as_long_as_it_takes():
    planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20)
    decision = planner.plan(LoadQuestion((TierRun("disk", 9),), 3, 1000))
    assert (decision.num_blocks_to_load, decision.patience_s) == (9, None)


def test_before_a_tier_was_measured_all_is_loaded_with_patience():
    planner, _ = make_planner(host=1e-5)
    decision = planner.plan(LoadQuestion((TierRun("host", 2), TierRun("disk", 98)), 0, 2000))
    assert (decision.num_blocks_to_load, decision.expected_load_s) == (100, None)
    assert 0 < decision.patience_s <= max(0.010, 0.03 * computing_s(0, 2000))


def test_a_tier_that_has_let_loads_down_is_waited_for_less():
    planner, _ = make_planner()
    question = LoadQuestion((TierRun("disk", 100),), 0, 2000)
    patience_s = []
    for _ in range(2):
        decision = planner.plan(question)
        patience_s.append(decision.patience_s)
        planner.settle(decision, decision.patience_s, 0, gave_up=True)
    compute_s = computing_s(0, 2000)
    assert patience_s == pytest.approx([0.04 * compute_s, 0.03 * compute_s], rel=0.05)


def test_trust_costs_a_short_prompt_no_more_than_a_few_percent():
    planner, _ = make_planner()
    for num_blocks in (50, 100, 400):
        num_tokens = num_blocks * SIZE + 1
        decision = planner.plan(LoadQuestion((TierRun("disk", num_blocks),), 0, num_tokens))
        assert decision.patience_s <= 0.041 * computing_s(0, num_tokens)


def test_a_prompt_waits_for_a_small_part_of_what_loading_saves_however_short_it_is():
    planner, _ = make_planner()
    for num_blocks in (1, 2, 4):
        num_tokens = num_blocks * SIZE + 1
        decision = planner.plan(LoadQuestion((TierRun("disk", num_blocks),), 0, num_tokens))
        limit_s = max(0.2 * decision.expected_compute_s, 0.04 * computing_s(0, num_tokens))
        assert decision.patience_s == pytest.approx(limit_s, rel=0.05)


def test_nothing_to_load_is_no_decision():
    planner, _ = make_planner()
    assert planner.plan(LoadQuestion((), 4, 100)).num_blocks_to_load == 0
    assert not planner.stats().decisions


def arrive(transfer: Transfer, positions: range) -> None:
    places = np.array(positions, dtype=np.int64)
    assert transfer.deliver(places, lambda wanted: wanted)


def hedged_load(num_blocks: int, num_tokens: int) -> tuple[LoadPlanner, Transfer, float, float]:
    """A planner, a load that it watches, when that was decided and its patience."""
    planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20, clock=time.monotonic)
    teach_compute(planner)
    decision = planner.plan(LoadQuestion((TierRun("disk", num_blocks),), 0, num_tokens))
    transfer = Transfer(num_blocks, decision.patience_s)
    planner.watch(decision, transfer, timeout_s=30.0)
    return planner, transfer, decision.decided_s, decision.patience_s


@settings(deadline=None, max_examples=20)
@given(steps=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_watched_load_may_wait_as_long_as_what_arrived_has_saved_and_three_percent_more(steps):
    num_tokens = 200 * SIZE + 100
    _, transfer, decided_s, patience_s = hedged_load(200, num_tokens)
    assert patience_s <= max(0.010, 0.03 * computing_s(0, num_tokens))
    before = transfer.deadline  # the patience from when the transfer was made, a moment after the decision
    done = 0
    for step in steps:
        end = min(200, done + step)
        if end == done:
            break
        arrive(transfer, range(done, end))
        done = end
        saved_s = computing_s(0, num_tokens) - computing_s(done * SIZE, num_tokens)
        assert transfer.deadline <= max(before, decided_s + 1.02 * saved_s + patience_s + 0.001)
        assert transfer.deadline - decided_s >= 0.8 * saved_s


def test_blocks_that_came_out_of_order_do_not_buy_time():
    _, transfer, _, _ = hedged_load(64, 64 * SIZE + 1)
    before = transfer.deadline
    arrive(transfer, range(32, 64))
    assert transfer.deadline == before
    arrive(transfer, range(32))
    assert transfer.deadline > before


def test_a_watched_load_never_outlives_the_timeout():
    planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20)
    teach_compute(planner, factor=1000.0)
    decision = planner.plan(LoadQuestion((TierRun("disk", 64),), 0, 2000))
    transfer = Transfer(64, 0.5)
    planner.watch(decision, transfer, timeout_s=1.0)
    arrive(transfer, range(40))
    assert transfer.deadline == pytest.approx(decision.decided_s + 1.0)


def test_decisions_are_counted_by_kind_and_their_regret_by_tier():
    planner, _ = make_planner(host=1e-5, disk=0.1)
    on_disk, in_host = LoadQuestion((TierRun("disk", 64),), 0, 1100), LoadQuestion((TierRun("host", 64),), 0, 1100)
    assert planner.plan(on_disk).num_blocks_to_load == 0
    loaded = planner.plan(in_host)
    planner.settle(loaded, 0.001, 64, gave_up=False)
    split = planner.plan(LoadQuestion((TierRun("host", 64), TierRun("disk", 64)), 0, 2100))
    planner.settle(split, 0.001, 64, gave_up=False)
    stats = planner.stats()
    assert stats.decisions == {"computed": 1, "loaded": 1, "split": 1}
    assert stats.declined_blocks == 128
    assert sum(stats.regret_s.values()) == 0
    planner.settle(planner.plan(in_host), 0.5, 0, gave_up=True)
    stats = planner.stats()
    assert stats.decisions["gave_up"] == 1
    assert stats.regret_s["host"] == pytest.approx(0.5)
    assert stats.lane_bytes_per_s["disk"] == pytest.approx((1 << 20) / 0.1, rel=0.01)
    assert stats.prefill_tokens_per_s == pytest.approx(512 / computing_s(0, 512), rel=0.05)


def test_computing_is_regretted_when_the_tier_turns_out_to_be_fast():
    planner, clock = make_planner(disk=0.1)
    question = LoadQuestion((TierRun("disk", 64),), 0, 64 * SIZE + 1)
    assert planner.plan(question).num_blocks_to_load == 0
    assert not planner.stats().regret_s
    teach_lane(planner, clock, "disk", 1e-5)
    lost_s = computing_s(0, 64 * SIZE + 1) - computing_s(64 * SIZE, 64 * SIZE + 1)
    assert planner.stats().regret_s["disk"] == pytest.approx(lost_s, rel=0.1)


@given(st.integers(0, 5000), st.integers(1, 64), st.integers(1, 512))
def test_parts_cover_a_load_and_grow(num_blocks, first, most):
    parts = growing_parts(num_blocks, first, most)
    assert sum(parts) == num_blocks
    assert all(0 < part <= most for part in parts)
    assert parts[:-1] == sorted(parts[:-1])
    if parts:
        assert parts[0] <= max(first, 0.01 * num_blocks)


def test_a_tier_that_nobody_has_used_for_a_while_makes_no_secret_of_another_ones_speed():
    planner, clock = make_planner(host=1e-5, disk=0.1)
    question = LoadQuestion((TierRun("host", 8), TierRun("disk", 64), TierRun("host", 8)), 0, 2000)
    teach_lane(planner, clock, "disk", 0.1)
    decision = planner.plan(question)
    assert (decision.num_blocks_to_load, decision.expected_load_s) == (8, None)


def test_without_patience_everything_is_loaded_however_slow():
    clock = Clock()
    planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20, patience=None, clock=clock)
    teach_compute(planner)
    teach_lane(planner, clock, "disk", 1.0)
    decision = planner.plan(LoadQuestion((TierRun("disk", 64),), 0, 1100))
    assert (decision.num_blocks_to_load, decision.patience_s) == (64, None)
