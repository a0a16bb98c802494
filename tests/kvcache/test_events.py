from concurrent.futures import ThreadPoolExecutor

from dynamo.kvcache.events import EventLog, Stored
from dynamo.kvcache.hashing import BlockKey

KEY = BlockKey(bytes(16))


def test_a_reader_sees_from_the_numbers_that_it_was_too_slow():
    log = EventLog(capacity=4)
    for _ in range(10):
        log.stored("device", [KEY], None)
    assert [event.sequence_number for event in log.read(after=7)] == [8, 9]
    assert log.read(after=2)[0].sequence_number == 6
    assert log.read(after=9) == []


def test_nothing_stored_is_no_event():
    log = EventLog()
    log.stored("device", [], None)
    log.removed("device", [])
    assert log.read(after=-1) == []


def test_events_carry_keys_and_parent():
    log = EventLog()
    log.stored("host", [KEY], KEY)
    assert log.read(after=-1) == [Stored(0, "host", (KEY,), KEY)]


def test_blocks_of_several_chains_are_told_chain_by_chain():
    a, b, c, d = (BlockKey(bytes([number]) * 16) for number in range(4))
    log = EventLog()
    log.stored_runs("disk", [a, b, d, c], [None, a, None, b])
    assert log.read(after=-1) == [
        Stored(0, "disk", (a, b), None),
        Stored(1, "disk", (d,), None),
        Stored(2, "disk", (c,), b),
    ]
    log.stored_runs("disk", [], [])
    assert len(log.read(after=-1)) == 3


def test_waiting_ends_with_the_next_event():
    log = EventLog()
    log.stored("device", [KEY], None)
    assert log.wait(after=-1, timeout_s=0)
    assert not log.wait(after=0, timeout_s=0)
    with ThreadPoolExecutor(1) as threads:
        waited = threads.submit(log.wait, 0, 60.0)
        while not waited.done():
            log.cleared("host")
        assert waited.result(timeout=60)


def test_who_waits_can_be_woken_without_an_event():
    log = EventLog()
    with ThreadPoolExecutor(1) as threads:
        waited = threads.submit(log.wait, -1, 60.0)
        while not waited.done():
            log.wake()
        assert not waited.result(timeout=60)
