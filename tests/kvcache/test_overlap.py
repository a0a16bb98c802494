"""A load from the end and computing from the start: every block is one's or the other's, and waiting costs little."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.load_decision import LoadQuestion, TierRun
from dynamo.kvcache.overlap import OverlappedLoad
from dynamo.kvcache.planner import FAST_SHARE, LoadPlanner
from dynamo.tiers.transfer import Transfer

SIZE = 16
TOKEN_S = 1e-4


class Clock:
    def __init__(self) -> None:
        self.now_s = time.monotonic()  # transfers look at the real one

    def __call__(self) -> float:
        return self.now_s


def make_planner(clock: Clock, *, patience: float | None = 0.03, block_s: float | None = None) -> LoadPlanner:
    """One that knows computing, at `TOKEN_S` a token, and the disk, if `block_s` says how fast it is."""
    planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20, patience=patience, clock=clock)
    for tokens in (64, 256, 512):
        for context in (0, 512, 2048, 8192):
            planner.observe_compute(tokens, context, TOKEN_S * tokens)
    if block_s is not None:
        planner.begin_part("disk")
        for _ in range(16):
            planner.expect("disk", 1_000, 8)
            planner.begin_part("disk")
            clock.now_s += 8 * block_s
            planner.end_part("disk", 1_000, 8, 8)
        planner.end_part("disk", 1_000, 0, 0)
    return planner


def begin(planner: LoadPlanner, clock: Clock, num_blocks: int = 200) -> tuple[OverlappedLoad, Transfer]:
    question = LoadQuestion((TierRun("disk", num_blocks),), 0, num_blocks * SIZE + 1)
    load = Transfer(num_blocks, 60.0)
    return OverlappedLoad(load, planner.plan_overlapped(question), planner, block_size=SIZE, clock=clock), load


def arrive(load: Transfer, first: int, end: int) -> None:
    load.deliver(np.arange(first, end, dtype=np.int64), lambda wanted: wanted[wanted])


PROMPT_S = 200 * SIZE * TOKEN_S


def test_nothing_is_waited_for_beyond_three_percent_while_nothing_comes() -> None:
    clock = Clock()
    overlapped, _ = begin(make_planner(clock, block_s=1e-5), clock)
    assert not overlapped.is_ready
    assert overlapped.patience_left_s <= 0.031 * PROMPT_S
    clock.now_s += 0.031 * PROMPT_S
    assert overlapped.is_ready
    assert overlapped.patience_left_s == 0


def test_what_arrives_buys_a_quarter_of_what_it_saves() -> None:
    clock = Clock()
    overlapped, load = begin(make_planner(clock, block_s=1e-5), clock)
    before_s = overlapped.patience_left_s
    arrive(load, 150, 200)
    assert overlapped.patience_left_s - before_s == pytest.approx(FAST_SHARE * PROMPT_S / 4, rel=0.05)


def test_a_load_known_to_be_slow_is_not_waited_for_and_still_used() -> None:
    clock = Clock()
    planner = make_planner(clock, block_s=SIZE * TOKEN_S)  # as slow as computing
    overlapped, load = begin(planner, clock)
    assert overlapped.is_ready
    assert overlapped.pass_over(0) == 0
    assert overlapped.claim(0, 32) == 32
    arrive(load, 100, 200)
    assert overlapped.claim(32, 64) == 64
    assert overlapped.claim(64, 128) == 100
    assert overlapped.pass_over(100) == 100
    overlapped.finish()
    assert planner.stats().decisions == {"split": 1}
    assert planner.stats().declined_blocks == 100


def test_a_load_that_has_ended_is_waited_for_no_longer() -> None:
    planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20, patience=None)
    question = LoadQuestion((TierRun("disk", 8),), 0, 8 * SIZE + 1)
    load = Transfer(8, 60.0)
    overlapped = OverlappedLoad(load, planner.plan_overlapped(question), planner, block_size=SIZE)
    overlapped.wait(0.01)
    assert not overlapped.is_ready
    load.finish()
    overlapped.wait()
    assert overlapped.is_ready


def test_once_let_down_nobody_waits_until_the_tier_has_shown_what_it_can() -> None:
    clock = Clock()
    planner = make_planner(clock, block_s=1e-5)
    overlapped, load = begin(planner, clock)
    arrive(load, 198, 200)
    clock.now_s += 1.0
    overlapped.claim(0, 32)
    overlapped.finish()
    overlapped, _ = begin(planner, clock)
    assert overlapped.is_ready
    overlapped.finish()
    for _ in range(2):
        planner.begin_part("disk")
        clock.now_s += 200 * 1e-5
        planner.end_part("disk", 7, 200, 200)
    overlapped, _ = begin(planner, clock)
    assert not overlapped.is_ready
    short, _ = begin(planner, clock, num_blocks=8)  # it is trusted again: even a short prompt waits for threads to wake
    assert short.patience_left_s > 0.035 * 8 * SIZE * TOKEN_S


def test_before_anything_was_measured_a_load_is_waited_for_a_moment() -> None:
    clock = Clock()
    planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20, clock=clock)
    overlapped, load = begin(planner, clock)
    assert 0.01 < overlapped.patience_left_s < 0.1
    arrive(load, 0, 200)
    assert overlapped.pass_over(0) == 200
    assert overlapped.claim(200, 201) == 201
    assert planner.stats().decisions == {"loaded": 1}


@pytest.mark.parametrize("num_blocks", [1, 3, 8, 16, 30])
def test_a_short_prompt_loses_little_when_a_trusted_tier_gets_slow(num_blocks: int) -> None:
    clock = Clock()
    overlapped, _ = begin(make_planner(clock, block_s=1e-5), clock, num_blocks)
    saved_s = num_blocks * SIZE * TOKEN_S
    assert overlapped.patience_left_s == pytest.approx(max(0.03 * saved_s, min(0.002, 0.2 * saved_s)), abs=1e-4)


def test_an_engine_that_has_not_measured_itself_waits_for_a_tier_as_it_is_known() -> None:
    clock = Clock()

    def patience_s(block_s: float) -> float:
        planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20, clock=clock)
        # The first 5 ms are those of threads that wake.
        for num_blocks, seconds in ((8, 0.005 + 8 * block_s), (1, block_s)):
            planner.begin_part("disk")
            clock.now_s += seconds
            planner.end_part("disk", 7, num_blocks, num_blocks)
        return begin(planner, clock, num_blocks=4)[0].patience_left_s

    assert patience_s(1e-5) < 0.006
    assert 0.006 < patience_s(5e-4) < 0.015
    assert patience_s(0.1) == 0


def test_a_tier_that_is_still_being_tried_is_not_waited_for() -> None:
    clock = Clock()
    planner = LoadPlanner(block_size=SIZE, block_bytes=1 << 20, clock=clock)
    planner.begin_trial("disk")
    assert begin(planner, clock)[0].is_ready
    planner.end_trial("disk")
    assert not begin(planner, clock)[0].is_ready


def test_a_hole_is_computed_alone() -> None:
    clock = Clock()
    overlapped, load = begin(make_planner(clock), clock)
    arrive(load, 0, 70)
    arrive(load, 71, 200)
    load.finish()
    assert overlapped.pass_over(0) == 70
    assert overlapped.claim(70, 102) == 71
    assert overlapped.pass_over(71) == 129
    assert overlapped.claim(200, 201) == 201
    assert np.flatnonzero(~overlapped.used).tolist() == [70]


def test_a_few_blocks_that_have_come_are_not_worth_a_step() -> None:
    clock = Clock()
    overlapped, load = begin(make_planner(clock), clock)
    arrive(load, 198, 200)
    assert overlapped.claim(0, 201) == 201
    assert load.is_ended
    assert not overlapped.used.any()


def test_regret_is_the_time_waited_for_what_did_not_come() -> None:
    clock = Clock()
    planner = make_planner(clock, block_s=1e-5)
    overlapped, _ = begin(planner, clock)
    clock.now_s += overlapped.patience_left_s + 0.001
    overlapped.claim(0, 201)
    stats = planner.stats()
    assert stats.decisions == {"gave_up": 1}
    assert stats.regret_s["disk"] == pytest.approx(0.03 * PROMPT_S, rel=0.05)


@settings(deadline=None, max_examples=200)
@given(
    num_blocks=st.integers(1, 60),
    data=st.data(),
)
def test_every_block_is_loaded_or_computed_and_none_both(num_blocks: int, data: st.DataObject) -> None:
    clock = Clock()
    overlapped, load = begin(make_planner(clock, block_s=1e-3), clock, num_blocks)
    computed: set[int] = set()
    passed: set[int] = set()
    waiting = list(range(num_blocks))
    position = 0

    def deliver(blocks: list[int]) -> None:
        before = load.arrived
        arrive_at = np.array(sorted(blocks), dtype=np.int64)
        load.deliver(arrive_at, lambda wanted: wanted[wanted])
        written = set(np.flatnonzero(load.arrived & ~before).tolist())
        assert not written & computed, "a block was written that the caller computes"
        assert not load.is_ended or not written

    while position <= num_blocks:
        if waiting and data.draw(st.booleans(), "arrives"):
            size = data.draw(st.integers(1, len(waiting)), "blocks")
            chosen = (
                data.draw(st.permutations(waiting), "which")[:size] if data.draw(st.booleans()) else waiting[-size:]
            )
            waiting = [block for block in waiting if block not in chosen]
            deliver(chosen)
        num_come = overlapped.pass_over(position)
        passed |= set(range(position, position + num_come))
        position += num_come
        if waiting and data.draw(st.booleans(), "arrives in between"):
            deliver([waiting.pop()])
        stop = overlapped.claim(position, position + data.draw(st.integers(1, 20), "piece"))
        assert stop > position or load.arrived[position]
        computed |= set(range(position, stop))
        position = stop
    assert passed | computed >= set(range(num_blocks))
    assert not passed & computed
    assert set(np.flatnonzero(overlapped.used).tolist()) == passed
    assert all(load.arrived[block] for block in passed)


def test_a_load_that_nobody_computed_beside_is_no_decision() -> None:
    clock = Clock()
    planner = make_planner(clock, block_s=1e-5)
    overlapped, load = begin(planner, clock)
    overlapped.finish()
    assert load.is_ended
    stats = planner.stats()
    assert (dict(stats.decisions), stats.declined_blocks, dict(stats.regret_s)) == ({}, 0, {})
