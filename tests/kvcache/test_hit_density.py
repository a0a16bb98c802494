"""Orders of eviction: what they know they rank, once; priorities and expiry come first; memory is bounded."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kvcache.eviction import EvictionOrder, LeafFirstLRU, Use
from dynamo.kvcache.hit_density import HitDensity
from dynamo.kvcache.retention import Retention
from dynamo.kvcache.reuse import ReuseTracker
from dynamo.kvcache.s3_fifo import S3Fifo

ORDERS = {
    "hit density": lambda: HitDensity(ReuseTracker()),
    "LRU": lambda: Retention(LeafFirstLRU),
    "S3-FIFO": lambda: Retention(S3Fifo),
}


@pytest.fixture(params=ORDERS.values(), ids=ORDERS.keys())
def order(request) -> EvictionOrder:
    return request.param()


def ranked(order: EvictionOrder, now_s: float) -> list[int]:
    return list(order.candidates(now_s))


def test_of_equals_the_oldest_goes_first(order):
    for entry in range(20):
        order.add(entry, Use(entry + 1, float(entry)), 3)
    assert ranked(order, 20.0) == list(range(20))


def test_a_lower_priority_goes_before_a_higher_one(order):
    for entry, priority in enumerate((5, 0, -1, 5, 0)):
        order.add(entry, Use(entry + 1, float(entry), priority=priority), 1)
    assert ranked(order, 10.0) == [2, 1, 4, 0, 3]


def test_what_has_expired_goes_before_all(order):
    order.add(0, Use(1, 0.0), 1)
    order.add(1, Use(2, 1.0, priority=9, expires_s=50.0), 1)
    order.add(2, Use(3, 2.0), 1)
    assert ranked(order, 49.0) == [0, 2, 1]
    assert ranked(order, 51.0) == [1, 0, 2]
    order.remove(1)
    assert ranked(order, 60.0) == [0, 2]


def test_unknown_entries_are_ignored(order):
    order.remove(17)
    order.add(3, Use(1, 0.0), 1)
    order.remove(4)
    order.remove(3)
    order.remove(3)
    assert ranked(order, 1.0) == []


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(ORDERS)), st.integers(0, 2**32))
def test_each_known_entry_is_ranked_exactly_once(name, seed):
    rng = random.Random(seed)
    order, known, now_s = ORDERS[name](), set(), 0.0
    for entry in range(150):
        now_s += rng.choice((0.0, 0.3, 20.0))
        use = Use(
            entry + 1,
            now_s,
            turn=rng.randrange(4),
            num_new_tokens=rng.randrange(5000),
            num_sharers=rng.choice((0, 0, 3)),
            priority=rng.randrange(2),
            expires_s=rng.choice((None, now_s + 30)),
        )
        order.add(entry, use, rng.randrange(1, 9))
        known.add(entry)
        for _ in range(rng.randrange(3)):
            victims = order.candidates(now_s)
            gone = [entry for entry, _ in zip(victims, range(rng.randrange(4)), strict=False)]
            victims.close()
            for victim in gone:
                assert victim in known
                order.remove(victim)
                known.discard(victim)
        everything = ranked(order, now_s)
        assert len(everything) == len(set(everything))
        assert set(everything) == known


def learned_tracker() -> ReuseTracker:
    """First turns never come back; later ones do after a minute."""
    tracker = ReuseTracker()
    for n in range(300):
        for turn in range(3 if n % 3 == 0 else 1):
            keys = [f"{n}-{i}" for i in range(10 + 10 * turn)]
            use = tracker.observe(keys, 10.0 * n + 60 * turn, num_prompt_tokens=160 + 160 * turn)
            tracker.finish(use, keys, 20)
    return tracker


def test_what_comes_back_more_often_stays_though_it_is_older():
    order = HitDensity(learned_tracker())
    order.add(0, Use(1, 0.0, turn=1, num_new_tokens=160, num_output_tokens=20), 4)
    order.add(1, Use(2, 10.0, turn=0, num_new_tokens=160, num_output_tokens=20), 4)
    assert order.price(10.0) == 0
    assert ranked(order, 11.0) == [1, 0]
    assert ranked(order, 11.0) == [1, 0]
    assert order.price(11.0) > 0


def test_a_price_at_which_nothing_is_evicted_falls_with_what_lies_there():
    """Else a tier that admits only what is worth more than its price would never admit anything again."""
    order = HitDensity(learned_tracker())
    order.add(0, Use(1, 0.0, turn=1, num_new_tokens=160, num_output_tokens=20), 4)
    for _ in range(20):
        ranked(order, 1.0)
    begun = order.price(1.0)
    prices = [order.price(1.0 + 10 * n) for n in range(1, 200)]
    assert prices == sorted(prices, reverse=True)
    assert 0 < prices[-1] < begun / 4
    order.remove(0)
    assert [order.price(2000.0 + 10 * n) for n in range(1, 100)][-1] < 1e-9


def test_a_price_that_has_fallen_is_not_raised_by_what_was_evicted_long_ago():
    order = HitDensity(learned_tracker())
    order.add(0, Use(1, 0.0, turn=1, num_new_tokens=160, num_output_tokens=20), 4)
    for _ in range(20):
        ranked(order, 1.0)
    fallen = [order.price(1.0 + 10 * n) for n in range(1, 200)][-1]
    ranked(order, 2000.0)
    ranked(order, 2000.0)
    assert order.price(2000.0) <= fallen


def test_slots_whose_content_has_expired_are_worth_nothing():
    order = HitDensity(learned_tracker())
    order.add(0, Use(1, 0.0, turn=1, num_new_tokens=160, num_output_tokens=20, expires_s=5.0), 4)
    for _ in range(20):
        ranked(order, 1.0)
    assert [order.price(10.0 + 2 * n) for n in range(60)][-1] < 1e-6


def test_an_entry_filed_between_two_sorts_takes_its_place():
    order = HitDensity(learned_tracker())
    order.add(0, Use(1, 0.0, turn=1, num_new_tokens=160, num_output_tokens=20), 4)
    assert ranked(order, 5.0) == [0]
    order.add(1, Use(2, 5.0, turn=0, num_new_tokens=160, num_output_tokens=20), 4)
    assert ranked(order, 5.1) == [1, 0]


def test_rows_are_used_again():
    order = HitDensity(ReuseTracker())
    for entry in range(5000):
        order.add(entry, Use(entry + 1, float(entry)), 1)
        if entry >= 10:
            order.remove(entry - 10)
    assert len(order) == 10
    assert ranked(order, 5000.0) == list(range(4990, 5000))
