import pytest

from dynamo.kvcache.lane_meter import LaneMeter


def load(
    lane: LaneMeter, number: int, start_s: float, parts: list[int], block_s: float, latency_s: float = 0.0
) -> float:
    """A load whose parts run two at a time on a lane that shares its speed between them; returns when it ended."""
    lane.expect(number, sum(parts))
    now = start_s
    lane.begin_part(now)
    if len(parts) > 1:
        lane.begin_part(now)
    now += latency_s
    for i, size in enumerate(parts):
        now += size * block_s
        lane.end_part(now, number, size, size)
        if i + 2 < len(parts):
            lane.begin_part(now)
    return now


def test_a_lane_that_was_never_used_is_unknown():
    lane = LaneMeter()
    assert lane.speed(0.0) is None
    assert lane.bandwidth_blocks_per_s is None
    assert lane.speed_since(0.0) is None


def test_parts_that_run_beside_one_another_add_up_to_the_lanes_speed():
    lane = LaneMeter()
    now = load(lane, 1, 10.0, [4, 4, 6, 8, 8, 8, 8, 8], block_s=0.001, latency_s=0.004)
    speed = lane.speed(now)
    assert speed is not None
    assert speed.block_s == pytest.approx(0.001, rel=0.2)
    assert speed.num_waiting == ()
    assert lane.bandwidth_blocks_per_s == pytest.approx(1000, rel=0.2)


def test_the_latency_of_a_lane_at_rest_is_told_from_its_speed():
    lane = LaneMeter()
    now = 0.0
    for number in range(6):
        now = load(lane, number, now + 1.0, [2, 4, 8, 16, 16, 16, 16, 16], block_s=0.001, latency_s=0.05)
    speed = lane.speed(now)
    assert speed is not None
    assert speed.block_s == pytest.approx(0.001, rel=0.05)
    assert speed.latency_s == pytest.approx(0.05, rel=0.1)


def test_one_load_that_was_given_up_says_nothing_about_an_unknown_lane_and_two_do():
    lane = LaneMeter()
    assert lane.is_trusted
    lane.give_up(1.0, 64, 0, 0.1)
    assert lane.speed(1.0) is None
    assert not lane.is_trusted
    lane.give_up(2.0, 64, 0, 0.1)
    assert lane.speed(2.0).block_s == pytest.approx(0.1)
    lane.load_ended()
    assert lane.is_trusted


def test_one_hiccup_changes_little_and_two_loads_that_were_too_slow_much():
    lane = LaneMeter()
    now = 0.0
    for number in range(3):
        now = load(lane, number, now, [8] * 8, block_s=0.001)
    lane.give_up(now, 64, 0, 0.5)
    assert lane.speed(now).block_s == pytest.approx(0.001)
    lane.give_up(now, 64, 2, 0.5)
    lane.give_up(now, 64, 2, 0.5)
    lane.give_up(now, 64, 2, 0.5)
    assert lane.speed(now).block_s == pytest.approx(0.25)


def test_blocks_that_are_still_to_come_are_told_by_load_and_cancelled_parts_end_the_wait():
    lane = LaneMeter()
    now = load(lane, 1, 0.0, [8] * 4, block_s=0.001)
    lane.expect(2, 16)
    lane.expect(3, 100)
    assert lane.speed(now).num_waiting == (16, 100)
    lane.begin_part(now)
    lane.end_part(now + 1, 3, 60, 60)
    assert lane.speed(now + 1).num_waiting == (16, 40)
    for number, size in ((3, 40), (2, 16)):
        lane.begin_part(now + 1)
        lane.end_part(now + 1, number, size, 0)  # its transfer had ended
    assert lane.speed(now + 1).num_waiting == ()


def test_a_lane_that_was_too_slow_is_tried_again_ever_more_seldom_until_it_proves_fast():
    lane = LaneMeter()
    now = load(lane, 1, 0.0, [8] * 8, block_s=0.1)
    pauses = []
    for _ in range(4):
        started = now
        while lane.speed(now) is not None:
            now += 1.0
        pauses.append(now - started)
        lane.probe(now)
        assert lane.speed(now) is not None  # one at a time
        lane.give_up(now + 0.5, 64, 1, 0.5)
    assert pauses == sorted(pauses)
    assert pauses[-1] > 2 * pauses[0]
    while lane.speed(now) is not None:
        now += 1.0
    lane.probe(now)
    now = load(lane, 2, now, [8] * 8, block_s=0.001)
    lane.load_ended()
    assert lane.speed(now).block_s == pytest.approx(0.001)
