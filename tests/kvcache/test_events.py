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
