"""The publisher, as a consumer of vLLM's protocol sees it: SUB, and DEALER for replay."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from dynamo.kvcache.event_publisher import END_OF_REPLAY, EventPublisher
from dynamo.kvcache.event_wire import BlockStored, EventBatch, decode_batch
from dynamo.kvcache.events import EventLog
from dynamo.kvcache.hashing import BlockKey

TIMEOUT_MS = 20_000
ANYWHERE = {"endpoint": "tcp://127.0.0.1:0", "replay_endpoint": "tcp://127.0.0.1:0"}


def key() -> BlockKey:
    return BlockKey(os.urandom(16))


@pytest.fixture
def log() -> EventLog:
    return EventLog()


@pytest.fixture
def connect() -> Iterator[Callable[..., zmq.Socket[bytes]]]:
    context, sockets = zmq.Context(), ExitStack()

    def connected(kind: int, endpoint: str, topic: bytes = b"") -> zmq.Socket[bytes]:
        socket = sockets.enter_context(context.socket(kind))
        socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
        socket.setsockopt(zmq.LINGER, 0)
        if kind == zmq.SUB:
            socket.setsockopt(zmq.SUBSCRIBE, topic)
        socket.connect(endpoint)
        return socket

    yield connected
    sockets.close()
    context.term()


@pytest.fixture
def publish(log: EventLog) -> Iterator[Callable[..., EventPublisher]]:
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(EventPublisher(log, epoch=7, **{**ANYWHERE, **options}))


def receive(stream: zmq.Socket[bytes], topic: bytes = b"kv") -> tuple[int, EventBatch]:
    found, number, payload = stream.recv_multipart()
    assert found == topic
    return int.from_bytes(number, "big"), decode_batch(payload)


def replay(dealer: zmq.Socket[bytes], first: int) -> list[tuple[int, EventBatch]]:
    dealer.send_multipart((b"", first.to_bytes(8, "big")))
    batches = []
    while True:
        empty, topic, number, payload = dealer.recv_multipart()
        assert empty == b""
        if number == END_OF_REPLAY:
            assert (topic, payload) == (b"", b"")
            return batches
        assert topic == b"kv"
        batches.append((int.from_bytes(number, "big"), decode_batch(payload)))


def test_a_new_subscription_is_greeted_at_once_and_then_given_every_event(
    log: EventLog, publish: Callable[..., EventPublisher], connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    publisher = publish(heartbeat_s=60.0)
    stream = connect(zmq.SUB, publisher.endpoint)
    first, greeting = receive(stream)
    assert (list(greeting.events), greeting.epoch, greeting.log_number) == ([], 7, -1)
    hashes = []
    for i in range(300):
        log.stored("device", [k := key()], None)
        hashes.append(int.from_bytes(k[:8], "little"))
        if i % 100 == 0:
            log.removed("host", [key()])
    got: list[int] = []
    while len(got) < 300:
        number, batch = receive(stream)
        assert number == first + 1
        first = number
        got += [h for event in batch.events if isinstance(event, BlockStored) for h in event.block_hashes]
    assert got == hashes
    assert batch.log_number == 302
    assert publisher.stats().batches <= number + 1  # what gathered went out together


def test_silence_is_broken_by_heartbeats(
    publish: Callable[..., EventPublisher], connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    publisher = publish(heartbeat_s=0.02)
    stream = connect(zmq.SUB, publisher.endpoint)
    numbers = [receive(stream)[0] for _ in range(4)]
    assert numbers == list(range(numbers[0], numbers[0] + 4))


def test_past_batches_are_replayed_from_the_number_asked_for(
    log: EventLog, publish: Callable[..., EventPublisher], connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    publisher = publish(heartbeat_s=60.0)
    stream = connect(zmq.SUB, publisher.endpoint)
    last, _ = receive(stream)
    for _ in range(5):
        log.stored("device", [key()], None)
        last, _ = receive(stream)
    dealer = connect(zmq.DEALER, publisher.replay_endpoint)
    assert [number for number, _ in replay(dealer, 0)] == list(range(last + 1))
    assert [number for number, _ in replay(dealer, last)] == [last]
    assert replay(dealer, last + 1) == []
    assert replay(dealer, 2**63) == []


def test_the_ring_forgets_the_oldest_by_number_and_by_bytes(
    log: EventLog, publish: Callable[..., EventPublisher], connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    for limits in ({"ring_batches": 3}, {"ring_bytes": 600}):
        publisher = publish(heartbeat_s=60.0, **limits)
        stream = connect(zmq.SUB, publisher.endpoint)
        last, _ = receive(stream)
        for _ in range(8):
            log.stored("device", [key()], None)
            last, _ = receive(stream)
        numbers = [number for number, _ in replay(connect(zmq.DEALER, publisher.replay_endpoint), 0)]
        assert 1 <= len(numbers) <= 4
        assert numbers == list(range(numbers[0], last + 1))
        assert publisher.stats().ring_bytes <= 600


def test_a_request_that_is_none_is_passed_over(
    publish: Callable[..., EventPublisher], connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    publisher = publish(heartbeat_s=60.0)
    dealer = connect(zmq.DEALER, publisher.replay_endpoint)
    for frames in ([b""], [b"", b"1234567"], [b"", b"12345678", b""], [b"x"] * 20):
        dealer.send_multipart(frames)
    assert [number for number, _ in replay(dealer, 0)] == [0]


def test_events_that_the_log_no_longer_had_are_marked(connect: Callable[..., zmq.Socket[bytes]]) -> None:
    log = EventLog(capacity=4)
    for _ in range(10):
        log.stored("device", [key()], None)
    with EventPublisher(log, epoch=7, heartbeat_s=60.0, **ANYWHERE) as publisher:
        first, second = replay(connect(zmq.DEALER, publisher.replay_endpoint), 0)[:2]
    assert (len(first[1].events), first[1].log_number) == (0, 5)
    assert (len(second[1].events), second[1].log_number) == (4, 9)
    assert publisher.stats().overruns == 1


def test_many_events_are_published_in_batches_of_bounded_size(
    log: EventLog, publish: Callable[..., EventPublisher], connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    for _ in range(1500):
        log.stored("device", [key()], None)
    for _ in range(5):
        log.removed("device", [key()] * 5000)
    batches = replay(connect(zmq.DEALER, publish().replay_endpoint), 0)
    sizes = [len(batch.events) for _, batch in batches if batch.events]
    assert sum(sizes) == 1505
    assert max(sizes) <= 512
    assert len(sizes) >= 6


def test_load_messages_have_a_topic_and_numbers_of_their_own(
    publish: Callable[..., EventPublisher], connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    publisher = publish(heartbeat_s=60.0)
    stream = connect(zmq.SUB, publisher.endpoint, b"load")
    events = connect(zmq.SUB, publisher.endpoint, b"kv")
    receive(events)
    number = -1
    while number < 0:  # until the subscription has arrived
        publisher.publish_load(b"hello")
        if stream.poll(10):
            number = int.from_bytes(stream.recv_multipart()[1], "big")
    publisher.publish_load(b"again")
    while (frames := stream.recv_multipart())[2] == b"hello":
        number = int.from_bytes(frames[1], "big")
    assert frames == [b"load", (number + 1).to_bytes(8, "big"), b"again"]


def test_over_a_unix_socket_a_restart_takes_the_same_place(
    log: EventLog, connect: Callable[..., zmq.Socket[bytes]], tmp_path: object
) -> None:
    ends = {"endpoint": f"ipc://{tmp_path}/e", "replay_endpoint": f"ipc://{tmp_path}/r"}
    stream = connect(zmq.SUB, ends["endpoint"])
    for epoch in (1, 2):
        with EventPublisher(log, epoch=epoch, heartbeat_s=60.0, **ends) as publisher:
            assert (publisher.endpoint, publisher.replay_endpoint) == (ends["endpoint"], ends["replay_endpoint"])
            while receive(stream)[1].epoch != epoch:  # one of before may still be on its way
                continue


def test_unix_sockets_that_were_removed_are_made_anew_beside_the_connections_there_are(
    log: EventLog,
    publish: Callable[..., EventPublisher],
    connect: Callable[..., zmq.Socket[bytes]],
    tmp_path: Path,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    paths = [folder / "e", folder / "r"]
    publisher = publish(endpoint=f"ipc://{paths[0]}", replay_endpoint=f"ipc://{paths[1]}", heartbeat_s=0.1)
    before = connect(zmq.SUB, publisher.endpoint)
    receive(before)
    shutil.rmtree(folder)
    receive(before)
    folder.mkdir()
    eventually(lambda: all(path.exists() for path in paths))
    receive(connect(zmq.SUB, publisher.endpoint))
    assert replay(connect(zmq.DEALER, publisher.replay_endpoint), 0)
    receive(before)
    log.stored("device", [key()], None)
    while not receive(before)[1].events:
        pass
    assert publisher.close()


def test_close_publishes_what_the_log_has_and_ends_the_threads(
    log: EventLog, connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    before = set(threading.enumerate())
    publisher = EventPublisher(log, epoch=7, heartbeat_s=60.0, **ANYWHERE)
    stream = connect(zmq.SUB, publisher.endpoint)
    receive(stream)
    assert publisher.is_running
    for _ in range(100):
        log.stored("device", [key()], None)
    assert publisher.close()
    assert publisher.close()
    assert not publisher.is_running
    assert set(threading.enumerate()) <= before
    number = -1
    while number < 99:
        log_number = receive(stream)[1].log_number
        assert log_number is not None
        number = log_number
    publisher.publish_load(b"nobody hears this")


def test_an_endpoint_that_cannot_be_bound_is_refused_and_leaves_nothing_behind(
    log: EventLog, publish: Callable[..., EventPublisher]
) -> None:
    taken = publish().endpoint
    before = set(threading.enumerate())
    for endpoint in (taken, "tcp://nowhere", "nonsense"):
        with pytest.raises(zmq.ZMQError):
            EventPublisher(log, epoch=1, endpoint="tcp://127.0.0.1:0", replay_endpoint=endpoint)
    assert set(threading.enumerate()) <= before
