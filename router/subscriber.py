"""The sockets around a `Feed`: one worker's event stream, its replay, and its snapshots. asyncio, on any event loop.

    SUB ────► topic of events ──► feed.received ──► what the feed needs ──► recovery task: DEALER for replay, fetch_snapshot
        └──► topic of load ────► on_load
    monitor of the SUB ──► feed.connection_lost

ZMQ connects again by itself. A worker of ours says something each second; when it does not, that is told and counted, and the
owner decides what it means: the worker's registration and its session know more about whether it lives.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from dynamo.kvcache.event_wire import KV_TOPIC, LOAD_TOPIC, MAX_BATCH_BYTES, SnapshotMessage
from dynamo.router.feed import Feed, FeedStats, NeedReplay, NeedSnapshot

__all__ = ["FetchSnapshot", "Subscriber", "SubscriberStats"]

_log = logging.getLogger(__name__)

FetchSnapshot = Callable[[], Awaitable[SnapshotMessage]]
"""Asks a worker what it holds. May fail with any exception, and is then called again a little later."""

_END_OF_REPLAY: Final = (1 << 64) - 1  # -1
_MAX_SEQ: Final = 1 << 62  # more than anybody ever sends, and any number after it still fits the wire
_TURN_S: Final = 0.002  # of reading, before others have their turn on the event loop
_BLOCKS_A_TURN: Final = 8192  # of a snapshot, likewise
_RECEIVE_QUEUE: Final = 2000  # messages; a publisher drops what a slow reader has no room for, and replay brings it
_RECONNECT_MS, _MAX_RECONNECT_MS = 50, 1000
_PING_MS, _PING_TIMEOUT_MS = 1000, 3000
_GREETING_S: Final = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_SNAPSHOT_TIMEOUT_S: Final = 30.0

_Frames = list[bytes]


@dataclass(frozen=True, slots=True)
class SubscriberStats:
    """How one worker's stream goes.

    Attributes:
        feed: what became of its batches.
        load_messages: handed on.
        lost_load_messages: that never came, by their numbers.
        malformed_messages: not of three frames, or under a number that is none.
        snapshot_failures: calls of `fetch_snapshot` that failed.
        disconnects: times that the connection broke.
        is_connected: there is a connection now.
        is_silent: nothing came for longer than it should.
    """

    feed: FeedStats
    load_messages: int
    lost_load_messages: int
    malformed_messages: int
    snapshot_failures: int
    disconnects: int
    is_connected: bool
    is_silent: bool


class Subscriber:
    """Feeds one worker's stream to `feed`, from `start` to `close`. Belongs to the event loop it was started on.

    Args:
        feed: applied to here alone.
        name: of the worker, for log lines.
        endpoint: ZMQ address of the stream.
        replay_endpoint: of past batches; None if there is none, which `feed` must have been told.
        fetch_snapshot: None if there are none, which `feed` must have been told.
        on_load: is given the payloads of the load topic; must return at once.
        topics: prefixes of the topics to subscribe to. Other engines often use the empty one, which takes everything.
        silence_s: after that long without a batch the worker counts as silent; None for engines that send no heartbeats.
        replay_timeout_s: longest wait for the next answer of a replay.
        reconnect_s: without a connection for so long, it is begun anew: ZMQ connects again by itself, but never to a peer that
            broke the protocol, be it by one message that was too large, or as another program had its port for a moment.
        context: of ZMQ, to share its I/O thread with other subscribers; None for one of its own.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        name: str,
        endpoint: str,
        replay_endpoint: str | None = None,
        fetch_snapshot: FetchSnapshot | None = None,
        on_load: Callable[[bytes], None] | None = None,
        topics: Sequence[bytes] = (KV_TOPIC, LOAD_TOPIC),
        silence_s: float | None = 3.0,
        replay_timeout_s: float = 2.0,
        reconnect_s: float = 5.0,
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
    ) -> None:
        self._feed = feed
        self._name = name
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._fetch_snapshot = fetch_snapshot
        self._on_load = on_load
        self._topics = tuple(topics)
        self._silence_s = silence_s
        self._replay_timeout_s = replay_timeout_s
        self._reconnect_s = reconnect_s
        self._connecting_since_s = 0.0
        self._owns_context = context is None
        self._context = zmq.Context() if context is None else context
        self._stream: zmq.Socket[bytes] | None = None
        self._readers: list[_Reader] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ready = asyncio.Event()
        self._needed = asyncio.Event()
        self._heard = asyncio.Event()
        self._next_load_seq: int | None = None
        self._complaint = ""
        self._load_messages = self._lost_load = self._malformed = self._snapshot_failures = self._disconnects = 0
        self._is_connected = self._is_silent = self._is_stopped = False

    @property
    def feed(self) -> Feed:
        """The feed given."""
        return self._feed

    async def start(self) -> None:
        """Opens the sockets and begins. Does not wait for the worker."""
        if self._is_stopped or self._readers:
            raise RuntimeError(f"the subscriber of {self._name} was started before; make another one")
        stream = self._stream = self._context.socket(zmq.SUB)
        stream.setsockopt(zmq.LINGER, 0)
        stream.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
        stream.setsockopt(zmq.MAXMSGSIZE, MAX_BATCH_BYTES)
        stream.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        stream.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
        stream.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
        stream.setsockopt(zmq.HEARTBEAT_TIMEOUT, _PING_TIMEOUT_MS)
        for topic in self._topics:
            stream.setsockopt(zmq.SUBSCRIBE, topic)
        monitor = stream.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._readers = [_Reader(monitor, self._on_monitor), _Reader(stream, self._on_message)]
        self._connecting_since_s = time.monotonic()
        try:
            stream.connect(self._endpoint)
        except zmq.ZMQError:
            self.stop()
            raise
        self._tasks = [
            asyncio.create_task(self._recover(), name=f"kv-events-recovery-{self._name}"),
            asyncio.create_task(self._watch(), name=f"kv-events-watch-{self._name}"),
        ]
        self._after_feed()

    async def wait_ready(self, timeout_s: float) -> bool:
        """Waits until the index has what the worker held when the stream began. False if that takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return False
        return True

    @property
    def is_ready(self) -> bool:
        """The feed was in sync once."""
        return self._ready.is_set()

    def stop(self) -> None:
        """From here on nothing is applied any more, so that the slot can be given up at once. `close` must follow."""
        self._is_stopped = True
        for task in self._tasks:
            task.cancel()
        if self._stream is not None and not self._stream.closed:
            # Before the monitor's reader is closed: to tell a monitor without one of a broken connection, the I/O thread that
            # all subscribers share would wait for ever.
            self._stream.disable_monitor()
        for reader in self._readers:
            reader.close()
        self._readers = []

    async def close(self) -> None:
        """Ends the tasks and sockets. Idempotent."""
        self.stop()
        tasks, self._tasks = self._tasks, []
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._owns_context:
            self._context.destroy(linger=0)

    async def __aenter__(self) -> "Subscriber":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def stats(self) -> SubscriberStats:
        """Counters so far."""
        return SubscriberStats(
            feed=self._feed.stats(),
            load_messages=self._load_messages,
            lost_load_messages=self._lost_load,
            malformed_messages=self._malformed,
            snapshot_failures=self._snapshot_failures,
            disconnects=self._disconnects,
            is_connected=self._is_connected,
            is_silent=self._is_silent,
        )

    # --- what comes in

    def _on_message(self, frames: _Frames) -> None:
        if len(frames) != 3 or len(frames[1]) != 8:
            self._malformed += 1
            return
        topic, number, payload = frames
        seq = int.from_bytes(number, "big")
        if seq >= _MAX_SEQ:
            self._malformed += 1
            return
        if topic == LOAD_TOPIC and self._on_load is not None:
            self._take_load(seq, payload, self._on_load)
            return
        self._heard.set()
        self._feed.received(seq, payload, time.monotonic())
        self._after_feed()

    def _take_load(self, seq: int, payload: bytes, on_load: Callable[[bytes], None]) -> None:
        expected = self._next_load_seq
        if expected is not None and seq > expected:
            self._lost_load += seq - expected
        self._next_load_seq = seq + 1
        self._load_messages += 1
        on_load(payload)

    def _on_monitor(self, frames: _Frames) -> None:
        if parse_monitor_message(frames)["event"] == zmq.EVENT_DISCONNECTED:
            self._is_connected = False
            self._connecting_since_s = time.monotonic()
            self._disconnects += 1
            self._feed.connection_lost()
            self._after_feed()
        else:
            self._is_connected = True

    def _after_feed(self) -> None:
        if self._feed.need is not None:
            self._needed.set()
        else:
            self._ready.set()

    # --- recovery

    async def _recover(self) -> None:
        """Does what the feed needs, one thing at a time, more slowly the more often it was in vain."""
        try:
            pause_s = _FIRST_PAUSE_S
            while True:
                await self._needed.wait()
                self._needed.clear()
                match self._feed.need:
                    case NeedReplay() as need:
                        await self._fill_by_replay(need)
                    case NeedSnapshot():
                        await self._fill_by_snapshot()
                    case None:
                        continue
                self._after_feed()
                if self._feed.need is None:
                    pause_s = _FIRST_PAUSE_S
                else:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except Exception:  # noqa: BLE001 - the task's root
            _log.exception(
                "the recovery of KV events of %s failed; what the router knows of it will go stale", self._name
            )

    async def _fill_by_snapshot(self) -> None:
        if self._fetch_snapshot is None:
            raise RuntimeError(f"the feed of {self._name} wants a snapshot, and there is no way to fetch one")
        if not self._heard.is_set():
            # A publisher greets a new subscription. What it sends from then on comes here, and a snapshot taken later leaves
            # no gap; after one taken earlier another would be needed.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GREETING_S):
                    await self._heard.wait()
        try:
            async with asyncio.timeout(_SNAPSHOT_TIMEOUT_S):
                message = await self._fetch_snapshot()
        except Exception as error:  # noqa: BLE001 - the owner's code, and the network behind it
            self._snapshot_failures += 1
            reason = str(error) or type(error).__name__
            if reason != self._complaint:
                self._complaint = reason
                _log.warning("no snapshot of what %s holds: %s; trying again until there is one", self._name, reason)
            return
        self._complaint = ""
        self._feed.snapshot_arrived(message, _BLOCKS_A_TURN)
        while self._feed.is_loading:
            await asyncio.sleep(0)
            self._feed.load_some(_BLOCKS_A_TURN)

    async def _fill_by_replay(self, need: NeedReplay) -> None:
        """Asks for past batches, on a socket of its own, so that late answers to an earlier question cannot mix in."""
        if self._replay_endpoint is None:
            raise RuntimeError(f"the feed of {self._name} wants a replay, and there is no endpoint for it")
        answers: asyncio.Queue[_Frames] = asyncio.Queue()
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_BATCH_BYTES)
        is_complete = False
        reader = _Reader(dealer, answers.put_nowait)
        try:
            dealer.connect(self._replay_endpoint)
            dealer.send_multipart((b"", need.from_seq.to_bytes(8, "big")))
            reader.look()  # sending may have taken the signal that something has come
            while not is_complete and self._feed.need is need:
                # Not wait_for, which in Python 3.11 forgets that it was cancelled when an answer comes in the same moment.
                async with asyncio.timeout(self._replay_timeout_s):
                    frames = await answers.get()
                is_complete = self._take_answer(need, frames)
        except TimeoutError:
            _log.warning("the replay of %s from batch %d on did not end", self._name, need.from_seq)
        finally:
            reader.close()
        self._feed.replay_ended(need, is_complete=is_complete)

    def _take_answer(self, need: NeedReplay, frames: _Frames) -> bool:
        """Whether that was the last one. Releases of vLLM differ in whether the topic is among the frames."""
        if len(frames) not in (3, 4) or len(frames[-2]) != 8:
            self._malformed += 1
            return False
        seq = int.from_bytes(frames[-2], "big")
        if seq == _END_OF_REPLAY:
            return True
        if seq >= _MAX_SEQ:
            self._malformed += 1
            return False
        self._feed.replayed(need, seq, frames[-1], time.monotonic())
        return False

    async def _watch(self) -> None:
        """Notices silence, and a connection that ZMQ has given up."""
        started_s = time.monotonic()
        pause_s = min(self._reconnect_s, self._silence_s or self._reconnect_s) / 6
        while True:
            await asyncio.sleep(pause_s)
            now_s = time.monotonic()
            if not self._is_connected and now_s - self._connecting_since_s > self._reconnect_s:
                self._connecting_since_s = now_s
                self._connect_anew()
            if self._silence_s is not None:
                heard_s = self._feed.stats().last_heard_s
                self._judge_silence(now_s - (started_s if heard_s is None else heard_s), self._silence_s)

    def _connect_anew(self) -> None:
        assert self._stream is not None
        with contextlib.suppress(zmq.ZMQError):  # it is not known any more to have been connected to
            self._stream.disconnect(self._endpoint)
        self._stream.connect(self._endpoint)
        for reader in self._readers:
            reader.look()  # these calls may have taken the signal that something has come

    def _judge_silence(self, lasted_s: float, longest_s: float) -> None:
        if (lasted_s > longest_s) is self._is_silent:
            return
        self._is_silent = not self._is_silent
        if self._is_silent:
            _log.warning("no KV events of %s for %.1f s, not even a heartbeat", self._name, lasted_s)
        else:
            _log.info("KV events of %s are heard again", self._name)


class _Reader:
    """Calls `take` with each message of a socket. Owns the socket.

    ZMQ's descriptor signals changes, not that something is there (http://api.zeromq.org/4-3:zmq-getsockopt, ZMQ_FD): a socket
    is read until it has nothing more, or else looked at again soon.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", take: Callable[[_Frames], None]) -> None:
        self._socket = socket
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._descriptor = cast("int", socket.getsockopt(zmq.FD))
        self._again: asyncio.Handle | None = None
        self._loop.add_reader(self._descriptor, self._read)
        self.look()

    def look(self) -> None:
        """Reads what is there, soon."""
        if self._again is None:
            self._again = self._loop.call_soon(self._read)

    def close(self) -> None:
        """Idempotent."""
        if self._socket.closed:
            return
        self._loop.remove_reader(self._descriptor)
        if self._again is not None:
            self._again.cancel()
        self._socket.close(linger=0)

    def _read(self) -> None:
        self._again = None
        end_s = time.monotonic() + _TURN_S
        while not self._socket.closed:  # what is taken may close it
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(frames)
            except Exception:  # noqa: BLE001 - a callback's root: one message must not end the stream
                _log.exception("a message could not be dealt with")
            if time.monotonic() > end_s:
                self.look()
                return
