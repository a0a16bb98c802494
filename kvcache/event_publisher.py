"""Publishes an `EventLog` over ZMQ, with replay for whoever missed something. This module loads no torch.

    cache's threads ──► EventLog ──► follower thread: waits for events, then gives them 2 ms to gather
                                          │ pokes
    publish_load() ──────────────────► publisher thread: owns the sockets
                                          ├─► XPUB    topic, number, payload: events, a heartbeat each second, load messages
                                          └─► ROUTER  past batches, for those who ask

Whoever tells the log of blocks never waits for this: it wakes the follower, if that waits, and goes on. Batches are
numbered from 0 in each epoch, and heartbeats are batches, so that a reader notices a lost last one within a second. A new
subscription is greeted with a heartbeat at once: what is published from then on, that reader gets.

Replay is answered as vLLM does (https://docs.vllm.ai/en/latest/examples/online_serving/kv_events.html): a DEALER or REQ sends
(b"", first number as 8 bytes, big-endian), and is given (b"", topic, number, payload) for each batch from there on that is
still in the ring, and at last (b"", b"", -1, b"").
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import zmq

from dynamo.kvcache.event_wire import KV_TOPIC, LOAD_TOPIC, MAX_BATCH_HASHES, encode_batch
from dynamo.kvcache.events import Event, EventLog, Removed, Stored

__all__ = ["END_OF_REPLAY", "EventPublisher", "PublisherStats"]

END_OF_REPLAY: Final = (-1).to_bytes(8, "big", signed=True)

_log = logging.getLogger(__name__)
_GATHER_S: Final = 0.002
_FOLLOW_S: Final = 10.0  # only a backstop: events and close() end the wait
_LOOK_S: Final = 0.5  # at most a heartbeat more
_LINGER_MS: Final = 200
# Of one batch, unless a single event has more: a few milliseconds of a router's time, between which it serves others.
_MAX_EVENTS: Final = 512
_MAX_HASHES: Final = 8192
_TELL_AGAIN_S: Final = 10.0
_MAX_LOAD_QUEUE: Final = 4096
_SEND_QUEUE: Final = 10_000  # messages that a slow subscriber may be behind before it misses some


@dataclass(frozen=True, slots=True)
class PublisherStats:
    """Counters since the start.

    Attributes:
        batches: published, heartbeats included; also the next batch's number.
        events: in them.
        overruns: times that the log went round before it was read, so that readers need a snapshot.
        replays: requests for past batches that were answered.
        load_messages: published.
        dropped_load_messages: not published, since too many waited.
        ring_batches, ring_bytes: kept for replay now.
    """

    batches: int
    events: int
    overruns: int
    replays: int
    load_messages: int
    dropped_load_messages: int
    ring_batches: int
    ring_bytes: int


class EventPublisher:
    """Two threads and two sockets, from construction to `close`. A Unix socket that somebody removes is made anew.

    Args:
        log: followed from its beginning. Only one publisher should follow a log, but nothing breaks if there are more.
        epoch: of this incarnation of the worker, larger than that of every earlier one.
        endpoint: ZMQ address to bind for the stream, such as "tcp://127.0.0.1:0" or "ipc:///run/worker-0.events". Anybody who
            reaches it can read it.
        replay_endpoint: likewise for replay.
        ring_batches, ring_bytes: kept for replay, whichever is less.
        heartbeat_s: longest silence.

    Raises:
        zmq.ZMQError: an endpoint cannot be bound.
    """

    def __init__(
        self,
        log: EventLog,
        *,
        epoch: int,
        endpoint: str,
        replay_endpoint: str,
        ring_batches: int = 10_000,
        ring_bytes: int = 64 << 20,
        heartbeat_s: float = 1.0,
    ) -> None:
        self._log = log
        self._epoch = epoch
        self._heartbeat_s = heartbeat_s
        self._ring: deque[tuple[int, bytes]] = deque()
        self._ring_limits = (ring_batches, ring_bytes)
        self._ring_bytes = 0
        self._seq = 0
        self._load_seq = 0
        self._published = -1  # number of the log's last event that was dealt with
        self._load: deque[bytes] = deque()
        self._events = self._overruns = self._replays = self._dropped_load = 0
        self._told_s = float("-inf")
        self._closing = threading.Event()
        self._is_poked = False
        self._context = zmq.Context()
        self._stream = self._context.socket(zmq.XPUB)
        self._replay = self._context.socket(zmq.ROUTER)
        try:
            self._stream.setsockopt(zmq.XPUB_VERBOSE, 1)
            _bind(self._stream, endpoint, _SEND_QUEUE)
            # As vLLM sizes it: a whole replay fits, while acknowledgements of an earlier one are on their way.
            _bind(self._replay, replay_endpoint, 2 * (ring_batches + 1))
        except zmq.ZMQError:
            self._close_sockets()
            raise
        self._endpoint = self._stream.getsockopt_string(zmq.LAST_ENDPOINT)
        self._replay_endpoint = self._replay.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._threads = [
            threading.Thread(target=self._publish_all, name="kv-event-publisher", daemon=True),
            threading.Thread(target=self._follow, name="kv-event-follower", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def endpoint(self) -> str:
        """Where the stream can be subscribed to, with the port that was given for port 0."""
        return self._endpoint

    @property
    def replay_endpoint(self) -> str:
        """Where past batches can be asked for."""
        return self._replay_endpoint

    @property
    def is_running(self) -> bool:
        """False once closed, or when a thread has failed: then subscribers hear nothing more."""
        return all(thread.is_alive() for thread in self._threads)

    def publish_load(self, payload: bytes) -> None:
        """Queues a message of the load topic, and returns at once. Thread-safe. The oldest waiting are dropped if need be."""
        if len(self._load) >= _MAX_LOAD_QUEUE:
            self._load.popleft()
            self._dropped_load += 1
        self._load.append(payload)
        self._poke()

    def stats(self) -> PublisherStats:
        """Counters so far."""
        return PublisherStats(
            batches=self._seq,
            events=self._events,
            overruns=self._overruns,
            replays=self._replays,
            load_messages=self._load_seq,
            dropped_load_messages=self._dropped_load,
            ring_batches=len(self._ring),
            ring_bytes=self._ring_bytes,
        )

    def close(self, timeout_s: float = 2.0) -> bool:
        """Publishes what the log has, and ends the threads. Idempotent. False if they did not end in time."""
        deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._log.wake()
        self._poke()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            _log.error("the publisher of KV events did not end within %.1f s", timeout_s)
            return False
        self._wake_receiver.close()
        self._wake_sender.close()
        return True

    def __enter__(self) -> "EventPublisher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the follower

    def _follow(self) -> None:
        while not self._closing.is_set():
            if self._log.wait(self._published, _FOLLOW_S):
                self._poke()
                # Meanwhile nobody waits for the log, so that telling it of blocks costs its callers nothing more.
                self._closing.wait(_GATHER_S)

    def _poke(self) -> None:
        """Wakes the publisher thread; many pokes make one byte."""
        if not self._is_poked:
            self._is_poked = True
            try:
                self._wake_sender.send(b"\0")
            except OSError:
                return  # full, so it will wake; or closed, so nobody is there to wake

    # --- the publisher thread

    def _publish_all(self) -> None:
        try:
            self._loop()
        except Exception:  # noqa: BLE001 - the thread's root
            _log.exception(
                "the publisher of KV events failed; routers will take this worker's cache for empty or unchanged"
            )
        finally:
            self._close_sockets()

    def _close_sockets(self) -> None:
        """Waits for what was sent last to leave, `_LINGER_MS` at most."""
        self._stream.close()
        self._replay.close()
        self._context.term()

    def _loop(self) -> None:
        poller = zmq.Poller()
        for source in (self._wake_receiver, self._stream, self._replay):
            poller.register(source, zmq.POLLIN)
        due_s = look_s = time.monotonic()
        while True:
            ready = dict(poller.poll(max(0, round(1000 * (due_s - time.monotonic())))))
            is_closing = self._closing.is_set()  # read first: what was told before it was set is still published
            if self._wake_receiver.fileno() in ready:
                self._drain_pokes()
            if self._replay in ready:
                self._answer()
            is_greeting = self._stream in ready and self._has_new_subscriber()
            while self._load:
                self._send(LOAD_TOPIC, self._load_seq, self._load.popleft())
                self._load_seq += 1
            if time.monotonic() >= look_s:
                self._bind_anew()
                look_s = time.monotonic() + _LOOK_S
            num_sent = self._publish_events()
            if num_sent == 0 and (is_greeting or time.monotonic() >= due_s):
                self._publish((), self._published)
                num_sent = 1
            if num_sent:
                due_s = time.monotonic() + self._heartbeat_s
            if is_closing:
                return

    def _bind_anew(self) -> None:
        """Binds the endpoints whose files have been removed: nobody could find the sockets any more."""
        for source, endpoint in ((self._stream, self._endpoint), (self._replay, self._replay_endpoint)):
            path = endpoint.removeprefix("ipc://")
            if path.startswith("/") and not os.path.exists(path):
                with contextlib.suppress(zmq.ZMQError):  # the folder may not be there again yet
                    source.bind(endpoint)

    def _drain_pokes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_receiver.recv(64)
        self._is_poked = False  # before the log and the queue are read, or a poke could be lost

    def _has_new_subscriber(self) -> bool:
        """Reads what subscribers sent: a first byte of 1 subscribes."""
        found = False
        while self._stream.poll(0):
            found |= self._stream.recv()[:1] == b"\1"
        return found

    def _publish_events(self) -> int:
        """Publishes what the log has that was not published yet. Returns how many batches that made."""
        first_seq = self._seq
        events = self._log.read(self._published)
        if events and events[0].sequence_number != self._published + 1:
            self._mark_overrun(events[0].sequence_number - 1)
        for batch in _batches(events):
            if sum(map(_num_hashes, batch)) > MAX_BATCH_HASHES:
                self._mark_overrun(batch[-1].sequence_number)
            else:
                self._publish(batch, batch[-1].sequence_number)
        return self._seq - first_seq

    def _mark_overrun(self, up_to: int) -> None:
        """An empty batch that goes further than the one before: events up to there can be had from a snapshot alone."""
        self._overruns += 1
        if time.monotonic() - self._told_s > _TELL_AGAIN_S:
            self._told_s = time.monotonic()
            _log.warning("KV events %d to %d were not published; routers fetch a snapshot", self._published + 1, up_to)
        self._publish((), up_to)

    def _publish(self, events: Sequence[Event], log_number: int) -> None:
        payload = encode_batch(events, epoch=self._epoch, log_number=log_number)
        self._published = log_number
        self._send(KV_TOPIC, self._seq, payload)
        self._ring.append((self._seq, payload))
        self._ring_bytes += len(payload)
        max_batches, max_bytes = self._ring_limits
        while len(self._ring) > max_batches or self._ring_bytes > max_bytes:
            self._ring_bytes -= len(self._ring.popleft()[1])
        self._seq += 1
        self._events += len(events)

    def _send(self, topic: bytes, seq: int, payload: bytes) -> None:
        self._stream.send_multipart((topic, seq.to_bytes(8, "big"), payload))

    def _answer(self) -> None:
        """Answers one request for replay. What is no request is passed over."""
        frames = self._replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            _log.warning(
                "a replay request of %d frames was ignored; it must be an empty one and 8 bytes", len(frames) - 1
            )
            return
        reader, first = frames[0], int.from_bytes(frames[2], "big")
        num_skipped = max(0, first - self._ring[0][0]) if self._ring else 0
        for seq, payload in islice(self._ring, min(num_skipped, len(self._ring)), None):
            self._replay.send_multipart((reader, b"", KV_TOPIC, seq.to_bytes(8, "big"), payload))
        self._replay.send_multipart((reader, b"", b"", END_OF_REPLAY, b""))
        self._replays += 1


def _bind(socket: zmq.Socket[bytes], endpoint: str, queue: int) -> None:
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, queue)
    socket.bind(endpoint)


def _num_hashes(event: Event) -> int:
    return len(event.keys) if isinstance(event, Stored | Removed) else 0


def _batches(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Pieces of bounded size, in order."""
    batch: list[Event] = []
    num_hashes = 0
    for event in events:
        more = _num_hashes(event)
        if batch and (len(batch) == _MAX_EVENTS or num_hashes + more > _MAX_HASHES):
            yield batch
            batch, num_hashes = [], 0
        batch.append(event)
        num_hashes += more
    if batch:
        yield batch
