"""When a failing disk is left alone, and when it is tried again."""

from dynamo.tiers.outage import Outage


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_disk_rests_after_three_failures_and_longer_each_time() -> None:
    clock = Clock()
    outage = Outage(clock=clock)
    for _ in range(2):
        outage.note(False)
    assert not outage.is_resting
    outage.note(False)
    pauses = []
    for _ in range(8):
        assert outage.is_resting
        started_s = clock.now_s
        while outage.is_resting:
            clock.now_s += 0.5
        pauses.append(clock.now_s - started_s)
        outage.note(False)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_success_ends_the_outage_and_failures_in_between_do_not_add_up() -> None:
    clock = Clock()
    outage = Outage(clock=clock)
    for _ in range(10):
        outage.note(False)
        outage.note(False)
        outage.note(True)
    assert not outage.is_resting
    for _ in range(3):
        outage.note(False)
    clock.now_s += 1
    assert not outage.is_resting
    outage.note(True)
    outage.note(False)
    assert not outage.is_resting
