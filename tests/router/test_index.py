"""What the index promises, example by example; `test_index_stateful` compares it with a model."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.router.chain import PrefixChain
from dynamo.router.index import TIERS, PrefixIndex, Reach

NUM_BLOCKS = 700  # look-ups go in stretches of 64, then 256
CHAIN = PrefixChain(1, memoryview(array("I", range(NUM_BLOCKS))).cast("B"), 1)
KEYS = CHAIN.keys(NUM_BLOCKS)


def everywhere(depth: int) -> Reach:
    return Reach(depth, depth, depth, depth)


def fresh_chain() -> PrefixChain:
    return PrefixChain(1, memoryview(array("I", range(NUM_BLOCKS))).cast("B"), 1)


def brute_force(held: list[dict[str, set[int]]]) -> dict[int, Reach]:
    """Counts leading blocks one by one."""
    found = {}
    for slot, tiers in enumerate(held):
        reachable: set[int] = set()
        depths = []
        for tier in TIERS:
            reachable |= tiers.get(tier, set())
            depths.append(next((i for i, key in enumerate(KEYS) if key not in reachable), NUM_BLOCKS))
        if depths[-1]:
            found[slot] = Reach(*depths)
    return found


depths = st.one_of(st.integers(0, NUM_BLOCKS), st.sampled_from([0, 1, 63, 64, 65, 319, 320, 321, NUM_BLOCKS]))


@settings(deadline=None, max_examples=60)
@given(by_worker=st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(TIERS, depths)), max_size=512))
def test_prefixes_of_up_to_512_workers_in_all_tiers_are_found_exactly(by_worker):
    index = PrefixIndex()
    for tiers in by_worker:
        slot = index.join()
        for tier, depth in tiers.items():
            index.stored(slot, tier, KEYS[:depth], None)
    held = [{tier: set(KEYS[:depth]) for tier, depth in tiers.items()} for tiers in by_worker]
    assert index.match(fresh_chain()) == brute_force(held)
    index.check_invariants()


@settings(deadline=None, max_examples=60)
@given(
    depths=st.lists(st.tuples(depths, depths), min_size=1, max_size=40),
    holes=st.lists(
        st.tuples(st.integers(0, 39), st.sampled_from(TIERS[:2]), st.integers(0, NUM_BLOCKS - 1)), max_size=30
    ),
)
def test_holes_anywhere_are_seen(depths, holes):
    index = PrefixIndex()
    held: list[dict[str, set[int]]] = []
    for device, host in depths:
        slot = index.join()
        index.stored(slot, "device", KEYS[:device], None)
        index.stored(slot, "host", KEYS[:host], None)
        held.append({"device": set(KEYS[:device]), "host": set(KEYS[:host])})
    for worker, tier, position in holes:
        slot = worker % len(held)
        index.removed(slot, tier, [KEYS[position]])
        held[slot][tier].discard(KEYS[position])
        assert index.match(fresh_chain()) == brute_force(held)
    index.check_invariants()


def test_a_block_that_comes_back_closes_the_gap_before_the_one_that_never_left():
    index = PrefixIndex()
    slot = index.join()
    index.stored(slot, "device", KEYS[:3], None)
    assert index.removed(slot, "device", [KEYS[1]]) == 0
    assert index.match(CHAIN) == {slot: everywhere(1)}
    index.stored(slot, "device", [KEYS[1]], KEYS[0])
    assert index.match(CHAIN) == {slot: everywhere(3)}


def test_tiers_extend_one_another_and_cover_one_anothers_holes():
    index = PrefixIndex()
    slot = index.join()
    index.stored(slot, "device", KEYS[:4], None)
    index.stored(slot, "host", KEYS[4:6], KEYS[3])
    index.stored(slot, "remote", KEYS[6:9], KEYS[5])
    assert index.match(CHAIN) == {slot: Reach(4, 6, 6, 9)}
    index.removed(slot, "device", [KEYS[2]])
    assert index.match(CHAIN) == {slot: Reach(2, 2, 2, 2)}
    index.stored(slot, "disk", [KEYS[2]], KEYS[1])
    assert index.match(CHAIN) == {slot: Reach(2, 2, 6, 9)}


def test_what_is_stored_behind_an_unknown_parent_counts_once_the_gap_is_filled():
    index = PrefixIndex()
    slot = index.join()
    index.stored(slot, "device", KEYS[5:9], KEYS[4])
    assert index.match(CHAIN) == {}
    index.stored(slot, "device", KEYS[:5], None)
    assert index.match(CHAIN) == {slot: everywhere(9)}


def test_events_that_say_nothing_new_change_nothing():
    index = PrefixIndex()
    slot = index.join()
    index.stored(slot, "device", KEYS[:5], None)
    index.stored(slot, "device", KEYS[:5], None)
    assert index.stats().num_entries == 5
    index.stored(slot, "device", KEYS[2:7], KEYS[1])
    index.stored(slot, "device", [], None)
    assert index.stats().num_entries == 7
    assert index.removed(slot, "device", KEYS[7:9]) == 2
    assert index.removed(slot, "host", KEYS[:3]) == 3
    assert index.match(CHAIN) == {slot: everywhere(7)}


def test_blocks_named_twice_or_known_in_part_are_stored_once():
    index = PrefixIndex()
    slot = index.join()
    index.stored(slot, "device", KEYS[5:8], KEYS[4])
    index.stored(slot, "device", KEYS[:20], None)
    index.stored(slot, "device", [*KEYS[18:25], *KEYS[18:25]], KEYS[17])
    assert index.stats().num_entries == 25
    assert index.match(CHAIN) == {slot: everywhere(25)}
    assert index.removed(slot, "device", [KEYS[24], KEYS[24], KEYS[23]]) == 0
    assert index.match(CHAIN) == {slot: everywhere(23)}
    index.check_invariants()


def test_a_worker_that_holds_other_blocks_behind_the_same_one_changes_nothing_for_others():
    index = PrefixIndex()
    odd, slot = index.join(), index.join()
    index.stored(odd, "device", [KEYS[0], 77, 78, KEYS[3]], None)
    index.stored(slot, "device", KEYS[:4], None)
    index.check_invariants()
    assert index.match(CHAIN) == {odd: everywhere(1), slot: everywhere(4)}


def test_tails_evicted_and_stored_block_by_block_are_exact_and_leave_few_runs():
    index = PrefixIndex()
    stays, moves = index.join(), index.join()
    for slot in (stays, moves):
        index.stored(slot, "device", KEYS[:300], None)
    for end in range(299, 99, -1):
        assert index.removed(moves, "device", [KEYS[end]]) == 0
        assert index.stats().num_runs <= 3
    assert index.match(CHAIN) == {stays: everywhere(300), moves: everywhere(100)}
    index.check_invariants()
    for end in range(100, 300):
        index.stored(moves, "device", [KEYS[end]], KEYS[end - 1])
        assert index.stats().num_runs <= 3
    assert index.match(CHAIN) == {stays: everywhere(300), moves: everywhere(300)}
    index.check_invariants()


def test_blocks_that_come_one_by_one_are_kept_in_long_runs():
    index = PrefixIndex()
    slot = index.join()
    for position in range(NUM_BLOCKS):
        index.stored(slot, "device", [KEYS[position]], KEYS[position - 1] if position else None)
    assert index.stats().num_runs <= NUM_BLOCKS / 60
    assert index.match(CHAIN) == {slot: everywhere(NUM_BLOCKS)}


def test_eviction_from_the_tail_leaves_a_prefix():
    index = PrefixIndex()
    slot = index.join()
    side = [key ^ 1 for key in KEYS[10:20]]
    index.stored(slot, "device", KEYS[:100], None)
    index.stored(slot, "device", side, KEYS[9])
    for batch in (
        KEYS[60:100][::-1],
        KEYS[50:60],
        [KEYS[49]],
        side[5:][::-1],
        KEYS[10:49][::-1],
        [*side[:5], *KEYS[5:10]],
    ):
        index.removed(slot, "device", batch)
        index.check_invariants()
    assert index.match(CHAIN) == {slot: everywhere(5)}


def test_a_block_that_two_sequences_follow_takes_both_with_it():
    index = PrefixIndex()
    slot = index.join()
    side = PrefixChain(1, memoryview(array("I", [*range(10), 7, 8])).cast("B"), 1)
    index.stored(slot, "device", KEYS[:11], None)
    index.stored(slot, "device", side.keys(12)[10:], KEYS[9])
    index.removed(slot, "device", [KEYS[10]])
    index.removed(slot, "device", [KEYS[9]])
    assert index.match(side) == index.match(CHAIN) == {slot: everywhere(9)}


def test_one_batch_may_take_the_ends_of_several_runs():
    index = PrefixIndex()
    slot = index.join()
    side = PrefixChain(1, memoryview(array("I", [*range(10), *range(100)])).cast("B"), 1)
    index.stored(slot, "device", KEYS[:50], None)
    index.stored(slot, "device", side.keys(50)[10:], KEYS[9])
    index.removed(slot, "device", [KEYS[49], side.keys(50)[49], KEYS[48], side.keys(50)[48]])
    index.check_invariants()
    assert index.match(side) == index.match(CHAIN) == {slot: everywhere(48)}


def test_a_hole_that_is_filled_is_gone():
    index = PrefixIndex()
    slot = index.join()
    index.stored(slot, "device", KEYS[:20], None)
    index.removed(slot, "device", [KEYS[5]])
    index.removed(slot, "device", KEYS[6:20][::-1])
    index.stored(slot, "device", KEYS[5:40], KEYS[4])
    index.check_invariants()
    assert index.match(CHAIN) == {slot: everywhere(40)}


def test_memory_of_a_worker_with_holes_does_not_grow_without_bound():
    index = PrefixIndex()
    slot = index.join()
    index.stored(slot, "device", KEYS[1:3], KEYS[0])
    for position in range(3, NUM_BLOCKS):
        index.stored(slot, "device", [KEYS[position]], KEYS[position - 1])
        index.removed(slot, "device", [KEYS[position - 2]])
    assert index.stats().num_bytes < 200_000
    index.check_invariants()


def test_a_worker_that_left_is_gone_at_once_and_its_slot_waits_for_the_sweep():
    index = PrefixIndex()
    left, stays = index.join(), index.join()
    for slot, num_blocks in ((left, 300), (stays, 100)):
        index.stored(slot, "device", KEYS[:num_blocks], None)
        index.predict(slot, KEYS[:400], 10.0)
    index.leave(left)
    assert index.match(CHAIN, 1.0) == {stays: everywhere(400)}
    assert index.join() not in (left, stays)
    assert index.stats().num_unswept == 300
    assert index.sweep(1.0, 50) == 50
    assert 150 <= index.stats().num_unswept <= 250
    assert index.join() not in (left, stays)
    index.check_invariants()
    assert index.sweep(1.0, 1000) < 1000
    assert index.stats().num_unswept == 0
    index.check_invariants()
    assert index.join() == left
    assert index.match(CHAIN, 1.0) == {stays: everywhere(400)}
    with pytest.raises(ValueError, match="slot 99 is no worker's"):
        index.leave(99)


def test_a_cleared_tier_is_empty_at_once_and_filled_anew():
    index = PrefixIndex()
    slot = index.join()
    for tier in ("device", "host"):
        index.stored(slot, tier, KEYS[:50], None)
    index.cleared(slot, "device")
    assert index.match(CHAIN) == {slot: Reach(0, 50, 50, 50)}
    index.stored(slot, "device", KEYS[:7], None)
    assert index.match(CHAIN) == {slot: Reach(7, 50, 50, 50)}
    index.cleared(slot)
    assert index.match(CHAIN) == {}
    index.sweep(0.0, 1000)
    index.check_invariants()
    assert index.stats().num_blocks == 0


def test_a_snapshot_takes_the_place_of_all_that_was_known():
    index = PrefixIndex()
    slot = index.join()
    index.stored(slot, "device", KEYS[:500], None)
    index.stored(slot, "remote", KEYS[:600], None)
    index.replace(slot, {"device": KEYS[9::-1], "host": [*KEYS[100:200], *KEYS[:100]]})
    assert index.match(CHAIN) == {slot: Reach(10, 200, 200, 200)}
    index.stored(slot, "device", KEYS[10:20], KEYS[9])
    assert index.removed(slot, "host", KEYS[150:200]) == 0
    assert index.match(CHAIN) == {slot: Reach(20, 150, 150, 150)}
    index.sweep(0.0, 10_000)
    index.check_invariants()


def test_predictions_count_as_device_blocks_until_they_expire():
    index = PrefixIndex()
    slot = index.join()
    index.stored(slot, "device", KEYS[:10], None)
    index.stored(slot, "host", KEYS[:100], None)
    index.predict(slot, KEYS[:30], 5.0)
    index.predict(slot, KEYS[:20], 9.0)
    assert index.match(CHAIN, 4.9) == {slot: Reach(30, 100, 100, 100)}
    assert index.match(CHAIN, 5.0) == {slot: Reach(20, 100, 100, 100)}
    assert index.match(CHAIN, 9.0) == {slot: Reach(10, 100, 100, 100)}
    assert index.stats().num_predicted == 50
    index.sweep(9.0, 1000)
    assert index.stats().num_predicted == 0


def test_a_later_prediction_is_not_shortened_by_an_earlier_one():
    index = PrefixIndex()
    slot = index.join()
    index.predict(slot, KEYS[:20], 9.0)
    index.predict(slot, KEYS[:30], 5.0)
    assert index.match(CHAIN, 4.0) == {slot: everywhere(30)}
    assert index.match(CHAIN, 6.0) == {slot: everywhere(20)}


def test_predictions_are_bounded_and_those_that_expire_first_go_first():
    index = PrefixIndex(max_predicted_blocks=100)
    first, second = index.join(), index.join()
    index.predict(first, KEYS[:60], 5.0)
    index.predict(second, KEYS[:60], 9.0)
    assert index.match(CHAIN) == {first: everywhere(40), second: everywhere(60)}
    assert index.stats().num_predictions_evicted == 20
    index.check_invariants()


def test_blocks_beyond_the_bound_are_refused_and_counted():
    index = PrefixIndex(max_blocks=100)
    slot = index.join()
    index.stored(slot, "device", KEYS[:150], None)
    assert index.match(CHAIN) == {slot: everywhere(100)}
    index.stored(slot, "device", KEYS[150:160], KEYS[149])
    assert index.stats().num_refused == 60
    index.removed(slot, "device", KEYS[90:100][::-1])
    index.stored(slot, "device", KEYS[90:95], KEYS[89])
    assert index.match(CHAIN) == {slot: everywhere(95)}


def test_no_more_is_hashed_than_the_deepest_worker_has_and_one_stretch():
    index = PrefixIndex()
    slot = index.join()
    chain = fresh_chain()
    assert index.match(chain) == {}
    assert chain.num_hashed == 64
    index.stored(slot, "device", KEYS[:100], None)
    chain = fresh_chain()
    assert index.match(chain) == {slot: everywhere(100)}
    assert chain.num_hashed <= 100 + 256


def test_stats_count_by_worker_and_tier_and_name_what_it_costs():
    index = PrefixIndex()
    slots = [index.join() for _ in range(3)]
    for slot in slots[:2]:
        index.stored(slot, "device", KEYS, None)
    index.stored(slots[0], "disk", KEYS[:100], None)
    stats = index.stats()
    assert stats.num_workers == 3
    assert (stats.num_blocks, stats.num_entries) == (NUM_BLOCKS, 2 * NUM_BLOCKS + 100)
    assert stats.entries == {0: {"device": NUM_BLOCKS, "disk": 100}, 1: {"device": NUM_BLOCKS}, 2: {}}
    assert 8 < stats.num_bytes / stats.num_entries < 120
    assert stats.slot_bytes[0] > stats.slot_bytes[1] > stats.slot_bytes[2] == 0
    assert sum(stats.slot_bytes.values()) == pytest.approx(stats.num_bytes, rel=0.1)


def test_a_tier_that_does_not_exist_is_named():
    index = PrefixIndex()
    slot = index.join()
    with pytest.raises(ValueError, match="no tier 'tape'; the tiers are device, host, disk, remote"):
        index.stored(slot, "tape", KEYS[:1], None)
    with pytest.raises(ValueError, match="tape"):
        index.replace(slot, {"device": KEYS, "tape": KEYS})
    assert index.match(CHAIN) == {}
