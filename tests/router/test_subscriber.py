"""Real sockets: a publisher, a wire that can be made bad, subscribers, and an index that ends where the cache is."""

import asyncio
import logging
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import uvloop
import zmq

from dynamo.kvcache import KVCache, KVSpec
from dynamo.kvcache.event_publisher import EventPublisher
from dynamo.kvcache.event_wire import (
    MAX_BATCH_BYTES,
    BlockRemoved,
    BlockStored,
    EventBatch,
    SnapshotMessage,
    decode_snapshot,
    encode_batch,
    encode_snapshot,
)
from dynamo.kvcache.events import EventLog, Snapshot
from dynamo.kvcache.hashing import BlockKey, block_keys, chain_root
from dynamo.router.chain import PrefixChain
from dynamo.router.feed import Feed
from dynamo.router.foreign import ForeignKeys
from dynamo.router.index import TIERS, PrefixIndex
from dynamo.router.subscriber import Subscriber

TIMEOUT_S = 30.0
ANYWHERE = {"endpoint": "tcp://127.0.0.1:0", "replay_endpoint": "tcp://127.0.0.1:0"}
SPEC = KVSpec(model="test", num_layers=1, num_kv_heads=1, head_dim=4, dtype=torch.float32, block_size=4)

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what it waits for happens in other threads
            await asyncio.sleep(0.005)


class Worker:
    """A log, what it says is held, and a publisher, which can be ended and started anew at the same place."""

    def __init__(self, folder: Path, epoch: int = 1, **options: object) -> None:
        self.ends = {"endpoint": f"ipc://{folder}/events", "replay_endpoint": f"ipc://{folder}/replay"}
        self.rng = random.Random(1)
        self.options = options
        self.start(epoch)

    def start(self, epoch: int) -> None:
        self.epoch = epoch
        self.log = EventLog()
        self.held: list[BlockKey] = []
        self.publisher = EventPublisher(self.log, epoch=epoch, heartbeat_s=0.1, **self.ends, **self.options)  # type: ignore[arg-type]

    def live(self, num_events: int) -> None:
        """Chains of blocks come, and go again from their ends."""
        for _ in range(num_events):
            if self.rng.random() < 0.7 or not self.held:
                keys = [BlockKey(os.urandom(16)) for _ in range(self.rng.randint(1, 4))]
                self.held += keys
                self.log.stored("device", keys, None)
            else:
                count = self.rng.randint(1, min(4, len(self.held)))
                gone = [self.held.pop() for _ in range(count)]
                self.log.removed("device", gone)

    async def snapshot(self) -> SnapshotMessage:
        return decode_snapshot(
            encode_snapshot(Snapshot(self.log.last_number, {"device": list(self.held)}), epoch=self.epoch)
        )

    def truth(self) -> dict[str, set[int]]:
        return {"device": {int.from_bytes(key[:8], "little") for key in self.held}}


class SetIndex:
    """What is claimed, as sets."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}

    def stored(self, slot: int, tier: str, keys: Any, parent: int | None) -> None:
        self.held.setdefault(tier, set()).update(keys)

    def removed(self, slot: int, tier: str, keys: Any) -> int:
        self.held.setdefault(tier, set()).difference_update(keys)
        return 0

    def cleared(self, slot: int, tier: str | None = None) -> None:
        self.held = {} if tier is None else {**self.held, tier: set()}

    def replace(self, slot: int, held: Mapping[str, Any]) -> None:
        self.held = {tier: set(keys) for tier, keys in held.items()}


@contextmanager
def bad_wire(upstream: str, downstream: str, seed: int) -> Iterator[threading.Event]:
    """A proxy between PUB and SUB that loses, doubles and delays messages, until it is told to be good."""
    rng = random.Random(seed)
    is_good, is_over = threading.Event(), threading.Event()
    context = zmq.Context()

    def carry() -> None:
        with context.socket(zmq.XSUB) as source, context.socket(zmq.XPUB) as sink:
            source.setsockopt(zmq.LINGER, 0)
            sink.setsockopt(zmq.LINGER, 0)
            sink.setsockopt(zmq.XPUB_VERBOSE, 1)
            source.connect(upstream)
            sink.bind(downstream)
            poller = zmq.Poller()
            poller.register(source, zmq.POLLIN)
            poller.register(sink, zmq.POLLIN)
            late: list[list[bytes]] = []
            while not is_over.is_set():
                ready = dict(poller.poll(20))
                if sink in ready:
                    source.send(sink.recv())
                if source not in ready:
                    continue
                frames = source.recv_multipart()
                fate = 1.0 if is_good.is_set() else rng.random()
                if fate < 0.2:
                    continue
                if fate < 0.4:
                    late.append(frames)
                    continue
                sink.send_multipart(frames)
                if fate < 0.6:
                    sink.send_multipart(frames)
                while late and (is_good.is_set() or rng.random() < 0.5):
                    sink.send_multipart(late.pop(rng.randrange(len(late))))

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield is_good
    finally:
        is_over.set()
        thread.join()
        context.term()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(tmp_path)
    yield made
    made.publisher.close()


@asynccontextmanager
async def subscribed(worker: Worker, **options: Any) -> AsyncIterator[tuple[Subscriber, SetIndex]]:
    index = SetIndex()
    ends = {**worker.ends, **options.pop("ends", {})}
    feed = Feed(index, 0, name="w")
    async with Subscriber(feed, name="w", fetch_snapshot=worker.snapshot, **ends, **options) as subscriber:
        yield subscriber, index


def test_the_index_starts_with_the_snapshot_and_follows_the_events(run: Run, worker: Worker) -> None:
    async def main() -> None:
        worker.live(50)
        async with subscribed(worker) as (subscriber, index):
            assert await subscriber.wait_ready(TIMEOUT_S)
            assert index.held == worker.truth()
            worker.live(200)
            await until(lambda: index.held == worker.truth())
            stats = subscriber.stats()
            assert (stats.feed.gaps, stats.feed.snapshots, stats.feed.replays, stats.malformed_messages) == (0, 1, 0, 0)
            assert stats.is_connected and not stats.is_silent

    run(main())


@pytest.mark.parametrize("seed", range(3))
def test_a_wire_that_loses_doubles_and_reorders_changes_nothing_in_the_end(
    run: Run, worker: Worker, tmp_path: Path, seed: int
) -> None:
    async def main() -> None:
        downstream = f"ipc://{tmp_path}/bad"
        with bad_wire(worker.ends["endpoint"], downstream, seed) as is_good:
            async with subscribed(worker, ends={"endpoint": downstream}) as (subscriber, index):
                assert await subscriber.wait_ready(TIMEOUT_S)
                for _ in range(60):
                    worker.live(5)
                    await asyncio.sleep(0.005)
                is_good.set()
                await until(lambda: index.held == worker.truth() and subscriber.feed.is_in_sync)
                assert subscriber.stats().feed.gaps > 0

    run(main())


def test_without_replay_snapshots_fill_what_the_wire_lost(worker: Worker, tmp_path: Path) -> None:
    async def main() -> None:
        downstream = f"ipc://{tmp_path}/bad"
        index = SetIndex()
        feed = Feed(index, 0, name="w", can_replay=False)
        with bad_wire(worker.ends["endpoint"], downstream, 1) as is_good:
            async with Subscriber(feed, name="w", endpoint=downstream, fetch_snapshot=worker.snapshot) as subscriber:
                for _ in range(60):
                    worker.live(5)
                    await asyncio.sleep(0.005)
                is_good.set()
                await until(lambda: index.held == worker.truth() and feed.is_in_sync)
                assert subscriber.stats().feed.snapshots > 1

    asyncio.run(main())


def test_a_worker_that_starts_anew_is_followed_anew(run: Run, worker: Worker) -> None:
    async def main() -> None:
        async with subscribed(worker) as (subscriber, index):
            worker.live(100)
            await until(lambda: index.held == worker.truth())
            worker.publisher.close()
            worker.start(epoch=2)
            worker.live(30)
            await until(lambda: index.held == worker.truth())
            assert subscriber.stats().feed.restarts == 1
            assert subscriber.stats().disconnects >= 1

    run(main())


def test_a_front_that_starts_anew_reads_what_is_there(run: Run, worker: Worker) -> None:
    async def main() -> None:
        for _ in range(3):
            async with subscribed(worker) as (subscriber, index):
                worker.live(100)
                assert await subscriber.wait_ready(TIMEOUT_S)
                await until(lambda: index.held == worker.truth())

    run(main())


def test_a_subscriber_may_start_before_its_worker(tmp_path: Path) -> None:
    async def main() -> None:
        worker = Worker(tmp_path)
        worker.publisher.close()
        async with subscribed(worker) as (subscriber, index):
            assert not await subscriber.wait_ready(0.05)
            worker.start(epoch=3)
            worker.live(10)
            assert await subscriber.wait_ready(TIMEOUT_S)
            await until(lambda: index.held == worker.truth())
        worker.publisher.close()

    asyncio.run(main())


def test_a_snapshot_that_fails_is_fetched_again(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    async def flaky() -> SnapshotMessage:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise ConnectionError("no")
        return await worker.snapshot()

    async def main() -> None:
        worker.live(10)
        index = SetIndex()
        async with Subscriber(Feed(index, 0, name="w"), name="w", fetch_snapshot=flaky, **worker.ends) as subscriber:
            assert await subscriber.wait_ready(TIMEOUT_S)
            assert subscriber.stats().snapshot_failures == 2
            assert index.held == worker.truth()

    asyncio.run(main())
    assert caplog.text.count("no snapshot of what w holds: no") == 1


def test_a_message_too_large_costs_a_moment_and_not_the_stream(worker: Worker) -> None:
    """ZMQ does not connect again to a peer that sent one."""

    async def main() -> None:
        async with subscribed(worker, reconnect_s=0.3) as (subscriber, index):
            assert await subscriber.wait_ready(TIMEOUT_S)
            worker.publisher.publish_load(bytes(MAX_BATCH_BYTES + 1))
            await until(lambda: subscriber.stats().disconnects == 1)
            worker.live(10)
            await until(lambda: index.held == worker.truth())
            assert subscriber.stats().is_connected

    asyncio.run(main())


def test_silence_is_noticed_told_and_over_again(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with subscribed(worker, silence_s=0.6) as (subscriber, _):
            assert await subscriber.wait_ready(TIMEOUT_S)
            assert not subscriber.stats().is_silent
            worker.publisher.close()
            await until(lambda: subscriber.stats().is_silent)
            worker.start(epoch=2)
            await until(lambda: not subscriber.stats().is_silent)

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert "no KV events of w for" in caplog.text
    assert "heard again" in caplog.text


def test_load_messages_are_handed_on_and_a_callback_that_fails_ends_nothing(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[bytes] = []

    def take(payload: bytes) -> None:
        if payload == b"bad":
            raise ValueError("cannot read that")
        got.append(payload)

    async def main() -> None:
        async with subscribed(worker, on_load=take) as (subscriber, _):
            assert await subscriber.wait_ready(TIMEOUT_S)
            for payload in (b"one", b"bad", b"two"):
                worker.publisher.publish_load(payload)
            await until(lambda: got == [b"one", b"two"])
            assert (subscriber.stats().load_messages, subscriber.stats().lost_load_messages) == (3, 0)

    asyncio.run(main())
    assert "cannot read that" in caplog.text


def test_nothing_is_applied_after_stop(worker: Worker) -> None:
    async def main() -> None:
        async with subscribed(worker) as (subscriber, index):
            worker.live(10)
            await until(lambda: index.held == worker.truth())
            before = worker.truth()
            subscriber.stop()
            worker.live(10)
            number = worker.publisher.stats().batches
            await until(lambda: worker.publisher.stats().batches > number + 1)
            assert index.held == before

    asyncio.run(main())


def test_close_leaves_nothing_behind_at_any_moment(worker: Worker) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        async with subscribed(worker):
            pass
        before = (descriptors(), threading.active_count(), len(asyncio.all_tasks()))
        for turns in range(8):
            async with subscribed(worker) as (subscriber, _):
                for _ in range(turns):
                    await asyncio.sleep(0.001)
            await subscriber.close()
        assert (descriptors(), threading.active_count(), len(asyncio.all_tasks())) <= before

    asyncio.run(main())


def test_several_share_one_context_which_stays_open(worker: Worker) -> None:
    async def main() -> None:
        worker.live(10)
        with zmq.Context() as context:
            async with AsyncExitStack() as stack:
                for _ in range(3):
                    subscriber, index = await stack.enter_async_context(subscribed(worker, context=context))
                    assert await subscriber.wait_ready(TIMEOUT_S)
                    assert index.held == worker.truth()
            assert not context.closed

    asyncio.run(main())


def test_an_address_that_is_none_is_refused_and_leaves_nothing_open() -> None:
    async def main() -> None:
        subscriber = Subscriber(Feed(SetIndex(), 0, name="w"), name="w", endpoint="nonsense")
        with pytest.raises(zmq.ZMQError):
            await subscriber.start()
        await subscriber.close()

    asyncio.run(main())


# --- a real cache


def claims(index: PrefixIndex, slot: int, conversations: list[list[int]]) -> list[tuple[int, ...]]:
    """What the index says of each conversation, by tier."""
    root = chain_root(SPEC.fingerprint, SPEC.block_size).lo
    found = []
    for tokens in conversations:
        packed = b"".join(token.to_bytes(4, "little") for token in tokens)
        reach = index.match(PrefixChain(root, packed, SPEC.block_size)).get(slot)
        found.append(tuple(getattr(reach, tier) for tier in TIERS) if reach else (0, 0, 0, 0))
    return found


def truth(cache: KVCache, conversations: list[list[int]]) -> list[tuple[int, ...]]:
    """The same, from the cache's own books."""
    held = cache.snapshot().keys
    root = chain_root(SPEC.fingerprint, SPEC.block_size)
    found = []
    for tokens in conversations:
        keys = block_keys(tokens, SPEC.block_size, root)
        depths = []
        union: set[BlockKey] = set()
        for tier in TIERS:
            union |= set(held.get(tier, ()))
            depths.append(next((i for i, key in enumerate(keys) if key not in union), len(keys)))
        found.append(tuple(depths))
    return found


def test_from_a_cache_over_the_wire_to_the_index(run: Run, tmp_path: Path) -> None:
    rng = random.Random(5)
    shared = [rng.randrange(1000) for _ in range(24)]
    conversations = [shared[: rng.randrange(25)] + [rng.randrange(1000) for _ in range(60)] for _ in range(30)]

    def use(cache: KVCache, count: int) -> None:
        for _ in range(count):
            tokens = rng.choice(conversations)
            with cache.open(tokens[: rng.randint(4, len(tokens))]) as sequence:
                sequence.wait()
                sequence.commit()

    async def main() -> None:
        index = PrefixIndex()
        slot = index.join()
        with KVCache(SPEC, device="cpu", device_blocks=64, host="16KiB") as cache:
            use(cache, 30)  # before anybody listens

            async def fetch() -> SnapshotMessage:
                return decode_snapshot(encode_snapshot(cache.snapshot(), epoch=1))

            with EventPublisher(cache.event_log, epoch=1, heartbeat_s=0.1, **ANYWHERE) as publisher:
                ends = {"endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint}
                feed = Feed(index, slot, name="w", tiers=TIERS)
                async with Subscriber(feed, name="w", fetch_snapshot=fetch, **ends) as subscriber:
                    for turn in range(6):
                        await asyncio.to_thread(use, cache, 40)
                        if turn == 3:
                            cache.clear("host")
                        assert await asyncio.to_thread(cache.flush)
                        expected = truth(cache, conversations)
                        await until(lambda expected=expected: claims(index, slot, conversations) == expected)
                        index.check_invariants()
                    held = {tier: len(keys) for tier, keys in cache.snapshot().keys.items() if keys}
                    assert index.stats().entries[slot] == held
                    assert subscriber.stats().feed.gaps == 0

    run(main())


# --- an engine that speaks as vLLM does


class Engine:
    """vLLM's publisher, in its protocol: PUB, and ROUTER for replay, with or without the topic in the answers."""

    def __init__(self, has_topic: bool, seed: int = 1) -> None:
        self.context = zmq.Context()
        self.stream = self.context.socket(zmq.PUB)
        self.router = self.context.socket(zmq.ROUTER)
        for bound in (self.stream, self.router):
            bound.setsockopt(zmq.LINGER, 0)
            bound.bind("tcp://127.0.0.1:0")
        self.topic = [b""] if has_topic else []
        self.ring: list[tuple[bytes, bytes]] = []
        self.depth = 0
        self.tokens = [random.Random(seed).randrange(1000) for _ in range(4 * 100)]

    @property
    def ends(self) -> dict[str, str]:
        return {
            "endpoint": self.stream.getsockopt_string(zmq.LAST_ENDPOINT),
            "replay_endpoint": self.router.getsockopt_string(zmq.LAST_ENDPOINT),
        }

    def hash(self, block: int) -> bytes:
        return b"engine" + block.to_bytes(8, "big")

    def publish(self, depth: int, is_lost: bool = False) -> None:
        """Grows or shrinks the one chain that it holds."""
        event: BlockStored | BlockRemoved
        if depth > self.depth:
            blocks = range(self.depth, depth)
            parent = self.hash(self.depth - 1) if self.depth else None
            event = BlockStored(
                [*map(self.hash, blocks)], parent, self.tokens[4 * self.depth : 4 * depth], 4, medium="GPU"
            )
        else:
            event = BlockRemoved([self.hash(block) for block in reversed(range(depth, self.depth))], medium="GPU")
        self.depth = depth
        message = len(self.ring).to_bytes(8, "big"), msgspec.msgpack.encode(EventBatch(time.time(), [event], 0))
        self.ring.append(message)
        if not is_lost:
            self.stream.send_multipart([b"kv@engine", *message])

    def serve(self) -> bool:
        """Answers one request for replay, if there is one."""
        if not self.router.poll(0):
            return False
        reader, empty, start = self.router.recv_multipart()
        assert empty == b""
        for seq, payload in self.ring:
            if seq >= start:
                self.router.send_multipart([reader, b"", *self.topic, seq, payload])
        self.router.send_multipart([reader, b"", *self.topic, (-1).to_bytes(8, "big", signed=True), b""])
        return True

    def close(self) -> None:
        self.stream.close()
        self.router.close()
        self.context.term()


@pytest.mark.parametrize("has_topic", [True, False], ids=["with topic", "without topic"])
def test_an_engine_of_vllms_protocol_is_followed_and_its_gaps_filled(run: Run, has_topic: bool) -> None:
    engine = Engine(has_topic)
    keys = [int.from_bytes(key[:8], "little") for key in block_keys(engine.tokens, 4, chain_root(b"model", 4))]

    async def main() -> None:
        index = SetIndex()
        feed = Feed(index, 0, name="v", foreign=ForeignKeys("v", b"model", 4), can_snapshot=False)
        engine.publish(5)  # before anybody listens
        async with Subscriber(feed, name="v", topics=(b"",), silence_s=None, **engine.ends) as subscriber:
            await until(lambda: engine.serve() or subscriber.is_ready)
            await until(lambda: subscriber.is_ready)
            assert index.held == {"device": set(keys[:5])}
            await until(lambda: subscriber.stats().is_connected)
            for depth, is_lost in ((8, False), (12, True), (9, True), (20, False), (15, False)):
                engine.publish(depth, is_lost)
            await until(lambda: engine.serve() or index.held == {"device": set(keys[:15])})
            await until(lambda: index.held == {"device": set(keys[:15])})
            stats = subscriber.stats().feed
            assert (stats.losses, stats.restarts) == (0, 0)

    try:
        run(main())
    finally:
        engine.close()


def test_an_engine_whose_replay_never_answers_is_followed_all_the_same() -> None:
    engine = Engine(True)
    keys = [int.from_bytes(key[:8], "little") for key in block_keys(engine.tokens, 4, chain_root(b"model", 4))]

    async def main() -> None:
        index = SetIndex()
        feed = Feed(index, 0, name="v", foreign=ForeignKeys("v", b"model", 4), can_snapshot=False)
        options: dict[str, Any] = {"topics": (b"",), "silence_s": None, "replay_timeout_s": 0.05}
        async with Subscriber(feed, name="v", **options, **engine.ends) as subscriber:
            assert await subscriber.wait_ready(TIMEOUT_S)
            await until(lambda: subscriber.stats().is_connected)
            engine.publish(5)
            await until(lambda: index.held == {"device": set(keys[:5])})

    try:
        asyncio.run(main())
    finally:
        engine.close()


def test_a_stranger_on_the_wire_cannot_crash_the_subscriber() -> None:
    async def main() -> None:
        index = SetIndex()
        with ExitStack() as stack:
            context = stack.enter_context(zmq.Context())
            stream = stack.enter_context(context.socket(zmq.XPUB))
            stream.setsockopt(zmq.LINGER, 0)
            stream.bind("tcp://127.0.0.1:0")
            endpoint = stream.getsockopt_string(zmq.LAST_ENDPOINT)
            feed = Feed(index, 0, name="w", can_replay=False, can_snapshot=False)
            async with Subscriber(feed, name="w", endpoint=endpoint) as subscriber:
                await until(lambda: stream.poll(0))
                last = encode_batch([], epoch=1, log_number=1)
                for frames in (
                    [b"kv"],
                    [b"kv", b"123", b"x"],
                    [b"kv", bytes(8), b"rubbish"],
                    [b"kv"] * 50,
                    [b"kv", b"\xff" * 8, last],
                ):
                    stream.send_multipart(frames)
                await until(lambda: subscriber.stats().malformed_messages == 4)
                assert subscriber.stats().feed.malformed == 1
                with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as other:
                    other.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert subscriber.stats().is_connected

    asyncio.run(main())
