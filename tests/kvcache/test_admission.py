"""Admission: how much of what a tier lacks is written."""

from dataclasses import replace

import pytest

from dynamo.kvcache.admission import Adaptive, AdmitAlways, SecondSighting
from dynamo.kvcache.eviction import Use
from dynamo.kvcache.reuse import ReuseTracker

KEYS = list("abcdefgh")


def test_always_admits_everything():
    assert AdmitAlways().admit("disk", KEYS, Use(1, 0.0), 5) == 5


def test_second_sighting_admits_what_another_use_offered():
    policy = SecondSighting()
    assert policy.admit("disk", KEYS[:4], Use(1, 0.0), 4) == 0
    assert policy.admit("disk", KEYS[:6], Use(1, 0.0), 6) == 0  # the same use offers it again: still its first sighting
    assert policy.admit("disk", KEYS[:8], Use(2, 1.0), 8) == 6
    assert policy.admit("disk", KEYS[:8], Use(3, 2.0), 2) == 2


def test_second_sighting_tells_tiers_apart():
    policy = SecondSighting()
    policy.admit("disk", KEYS, Use(1, 0.0), 8)
    assert policy.admit("remote", KEYS, Use(2, 1.0), 8) == 0


def test_second_sighting_forgets_what_was_written():
    policy = SecondSighting()
    policy.admit("disk", KEYS, Use(1, 0.0), 8)
    assert policy.admit("disk", KEYS, Use(2, 1.0), 8) == 8
    assert policy.num_ghosts == 0
    assert policy.admit("disk", KEYS, Use(3, 2.0), 8) == 0


def test_second_sighting_is_bounded_and_forgets_the_oldest():
    policy = SecondSighting(max_ghosts=100)
    for number in range(50):
        policy.admit("disk", [(number, i) for i in range(10)], Use(number + 1, 0.0), 10)
    assert policy.num_ghosts == 100
    assert policy.admit("disk", [(0, i) for i in range(10)], Use(60, 1.0), 10) == 0
    assert policy.admit("disk", [(49, i) for i in range(10)], Use(61, 1.0), 10) == 10


@pytest.fixture(scope="module")
def tracker() -> ReuseTracker:
    """Prompts of 640 tokens come back after a minute, three times; those of 160 never."""
    tracker = ReuseTracker()
    requests = []
    for n in range(400):
        length = 40 if n % 2 else 10
        requests += [(5.0 * n + 60.0 * turn, n, length + 2 * turn) for turn in range(4 if n % 2 else 1)]
    for now_s, n, length in sorted(requests):
        keys = [f"{n}-{i}" for i in range(length)]
        tracker.finish(tracker.observe(keys, now_s, num_prompt_tokens=16 * length), keys, 10)
    return tracker


RETURNS = Use(1, 0.0, num_new_tokens=640, num_output_tokens=10)
LEAVES = Use(2, 0.0, num_new_tokens=160, num_output_tokens=10)


def test_adaptive_writes_what_comes_back(tracker):
    policy = Adaptive(tracker, lambda tier, now_s: 0.0, unproven_cost=0.1)
    assert policy.admit("disk", KEYS, RETURNS, 5) == 5
    assert policy.admit("disk", KEYS, LEAVES, 5) == 0


def test_adaptive_writes_nothing_where_slots_are_worth_more(tracker):
    policy = Adaptive(tracker, lambda tier, now_s: {"disk": 1.0, "large disk": 0.0}[tier], unproven_cost=0.1)
    assert policy.admit("disk", KEYS, RETURNS, 8) == 0
    assert policy.admit("large disk", KEYS, RETURNS, 8) == 8


def test_adaptive_asks_for_the_price_at_the_time_of_the_use(tracker):
    policy = Adaptive(tracker, lambda tier, now_s: 1.0 if now_s < 50 else 0.0, unproven_cost=0.1)
    assert policy.admit("disk", KEYS, RETURNS, 8) == 0
    assert policy.admit("disk", KEYS, replace(RETURNS, number=9, time_s=60.0), 8) == 8


@pytest.mark.parametrize(("tightness", "admitted"), [(0.0, 8), (0.5, 8), (0.999, 0), (1.0, 0), (2.0, 0)])
def test_a_tight_budget_raises_the_cost(tracker, tightness, admitted):
    policy = Adaptive(tracker, lambda tier, now_s: 0.0, unproven_cost=0.05, budget=lambda: tightness)
    assert policy.admit("disk", KEYS, RETURNS, 8) == admitted


def test_a_shared_prefix_is_written_for_the_sake_of_what_follows(tracker):
    """A part is never refused alone if the chain as a whole gains."""
    use = Use(1, 0.0, num_new_tokens=640, num_output_tokens=10, num_shared_blocks=1, num_sharers=2)
    policy = Adaptive(tracker, lambda tier, now_s: 0.0, unproven_cost=0.1)
    assert policy.admit("disk", KEYS, use, 8) == 8


def test_the_cache_is_open_before_anything_was_learned():
    policy = Adaptive(ReuseTracker(), lambda tier, now_s: 0.0)
    assert policy.admit("disk", KEYS, LEAVES, 8) == 8


def test_a_high_price_for_unproven_blocks_makes_it_second_sighting(tracker):
    policy = Adaptive(tracker, lambda tier, now_s: 0.0, unproven_cost=100.0)
    second = Use(3, 60.0, turn=1, num_new_tokens=32, num_output_tokens=10)
    assert policy.admit("disk", KEYS[:6], RETURNS, 6) == 0
    assert policy.admit("disk", KEYS, second, 8) == 6
    assert policy.num_ghosts == 2


def test_adaptive_ghosts_are_bounded(tracker):
    policy = Adaptive(tracker, lambda tier, now_s: 0.0, unproven_cost=100.0, max_ghosts=100)
    for number in range(50):
        policy.admit("disk", [(number, i) for i in range(10)], Use(number + 1, 0.0), 10)
    assert policy.num_ghosts == 100
