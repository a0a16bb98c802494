"""S3-FIFO: one-time chains leave through the small queue."""

from dynamo.kvcache.eviction import Use
from dynamo.kvcache.s3_fifo import S3Fifo


def test_first_turns_go_before_chains_that_were_used_again():
    order = S3Fifo()
    order.add(0, Use(1, 0.0, turn=2), 10)
    for entry in range(1, 6):
        order.add(entry, Use(entry + 1, float(entry)), 10)
    assert list(order.candidates(9.0)) == [1, 2, 3, 4, 5, 0]


def test_a_small_queue_within_its_tenth_is_spared():
    order = S3Fifo()
    order.add(0, Use(1, 0.0), 1)
    for entry in range(1, 20):
        order.add(entry, Use(entry + 1, float(entry), turn=1), 1)
    first = next(iter(order.candidates(20.0)))
    assert first == 1


def test_laps_are_used_up():
    order = S3Fifo()
    order.add(0, Use(1, 0.0, turn=9), 1)
    order.add(1, Use(2, 1.0, turn=1), 1)
    assert list(order.candidates(2.0)) == [1, 0]


def test_a_shared_prefix_counts_as_used_before():
    order = S3Fifo()
    order.add(0, Use(1, 0.0, num_sharers=5), 1)
    order.add(1, Use(2, 1.0), 1)
    assert list(order.candidates(2.0)) == [1, 0]
