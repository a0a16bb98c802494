import numpy as np

from dynamo.kvcache.free_slots import FreeSlots


def test_low_slots_go_first_and_then_what_came_back_last():
    free = FreeSlots(6)
    assert free.take(3).tolist() == [0, 1, 2]
    free.push(np.array([1, 0]))
    assert free.take(4).tolist() == [1, 0, 3, 4]
    assert free.count == 1


def test_withheld_slots_are_not_given_until_they_are_put_back():
    free = FreeSlots(6)
    free.take(1)
    free.withhold(3)
    assert (free.count, sorted(free.withheld.tolist())) == (2, [3, 4, 5])
    free.put_back()
    assert (free.count, len(free.withheld)) == (5, 0)
    assert sorted(free.take(5).tolist()) == [1, 2, 3, 4, 5]


def test_slots_beyond_the_limit_are_gone_and_come_back_with_it():
    free = FreeSlots(6)
    free.take(1)
    free.limit(3)
    assert free.take(2).tolist() == [1, 2]
    free.push(np.array([5, 2]))
    assert free.slots.tolist() == [2]
    free.limit(8)
    free.push(np.arange(3, 8))
    assert free.take(6).tolist() == [3, 4, 5, 6, 7, 2]
    free.push(np.arange(2))
    free.clear()
    assert free.count == 0
